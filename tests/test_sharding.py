"""The mesh, and where the arrays of a run lie on it."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
import tiny_runs
from jax.sharding import PartitionSpec as P

from jetflow import sharding
from jetflow.files import read_metrics
from jetflow.flows.build import build
from jetflow.noise import Noise
from jetflow.training.log import SPEED
from jetflow.training.step import Trainer
from jetflow.types import UsageError

GOLDEN = Path(__file__).parent / "golden" / "workdirs" / "tar"


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a device as a mesh is made of."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "gpu"
    coords: tuple[int, int, int] = (0, 0, 0)  # of a TPU, in its slice
    core_on_chip: int = 0
    device_kind: str = "a chip"


def chips(slices: int, each: int, platform: str = "gpu") -> list[Chip]:
    return [
        Chip(number, number // each, number // each, platform, (number % 2, number % each // 2, 0))
        for number in range(slices * each)
    ]


def specs(shapes, rules=()):
    tree = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    mesh = sharding.make_mesh(data=2, fsdp=4, tensor=2, devices=chips(1, 16))
    return {path: s.spec for path, s in sharding.state_shardings(mesh, tree, rules).items()}


def test_large_arrays_are_split_and_layers_over_tensor():
    """What enters a layer is split by columns, what leaves it by rows."""
    shapes = {
        "blocks_0/proj_in/kernel": ((512, 1024), P(None, "fsdp")),
        "odd": ((1023, 1023), P()),
        "small": ((8, 128), P()),
    }
    for prefix in ("params/blocks_0/transformer/layers", "opt_state/1/nu/net/layers"):
        shapes |= {
            f"{prefix}/qkv/kernel": ((4, 256, 3, 256), P(None, "fsdp", None, "tensor")),
            f"{prefix}/out/kernel": ((4, 256, 256), P(None, "tensor", "fsdp")),
            f"{prefix}/mlp_in/bias": ((64, 1024), P("fsdp", "tensor")),
            f"{prefix}/mlp_out/kernel": ((4, 1024, 256), P(None, "tensor", "fsdp")),
        }
    expected = {path: spec for path, (_, spec) in shapes.items()}
    assert specs({path: shape for path, (shape, _) in shapes.items()}) == expected


def test_rules_of_the_config_come_first():
    shapes = {"a/position": (1024, 512), "b/kernel": (1024, 512)}
    rules = (("position", "replicated"), ("kernel", "columns"))
    assert specs(shapes, rules=rules) == {
        "a/position": P(),
        "b/kernel": P("fsdp", "tensor"),
    }


def test_slices_are_joined_by_data_alone_and_nodes_of_gpus_by_any_axis():
    mesh = sharding.make_mesh(data=-1, fsdp=4, devices=chips(2, 8, "tpu"))
    assert dict(mesh.shape) == {"data": 4, "fsdp": 4, "tensor": 1}
    for row in mesh.devices.reshape(4, 4):
        assert len({chip.slice_index for chip in row}) == 1
    mesh = sharding.make_mesh(data=1, fsdp=-1, devices=chips(2, 8))
    assert dict(mesh.shape) == {"data": 1, "fsdp": 16, "tensor": 1}
    mesh = sharding.make_mesh(data=2, fsdp=-1, devices=chips(2, 8))
    for node in mesh.devices.reshape(2, 8):
        assert len({chip.slice_index for chip in node}) == 1


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data": 3}, "data=3, fsdp=1, tensor=1, but there are 16 devices"),
        ({"data": -1, "fsdp": -1}, "one of them may be -1"),
        ({"fsdp": 16}, "makes data 1 on 2 slices; set data to a multiple of 2"),
        ({"tensor": 0}, "tensor=0"),
    ],
)
def test_impossible_meshes(axes, message):
    with pytest.raises(UsageError, match=message):
        sharding.make_mesh(devices=chips(2, 8, "tpu"), **axes)


def test_the_state_of_a_device_falls_with_their_number():
    """Parameters, their average, and both moments of the optimizer, of a published flow."""
    section = dict(kind="tarflow", patch_size=2, width=768, num_blocks=8, layers_per_block=8)
    flow = build(section, image_shape=(64, 64, 3))
    rate = optax.constant_schedule(1e-4)
    trainer = Trainer(flow, optax.adam(rate), rate, Noise(), seed=0, ema_decay=0.9)
    state = jax.eval_shape(trainer.first_state)
    total = sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(state))
    for fsdp in (1, 8, 64):  # small arrays are on every device
        mesh = sharding.make_mesh(data=1, fsdp=fsdp, devices=chips(1, fsdp))
        placed = jax.tree.map(
            lambda array, where: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where),
            state,
            sharding.state_shardings(mesh, state),
        )
        bytes_per_device = sharding.bytes_per_device(placed)
        assert bytes_per_device == pytest.approx(total / fsdp, rel=0.02 * (fsdp - 1) ** 0.5)


# In a process of its own, as the number of devices is fixed when JAX starts.
ON_FOUR_DEVICES = """
import json, re, sys
from pathlib import Path
import jax, numpy as np
import tiny_runs
from jetflow import checksums, sharding
from jetflow.checkpoint import Checkpoints
from jetflow.evals import likelihoods
from jetflow.training.experiment import set_up

sharding.SMALLEST_SHARDED = 1024
GOLDEN = Path(sys.argv[1])
BATCH, TOKENS = 22, 16  # 11 divides the size of no weight
fields = {"flow.num_blocks": 1, "flow.width": 64, "flow.patch_size": 2, "train.accumulation": 1}

def run(precision="default", **mesh):
    more = {f"mesh.{axis}": size for axis, size in mesh.items()} | {"flow.precision": precision}
    config = tiny_runs.config("tarflow", **fields | more | {"train.batch_size": BATCH})
    return set_up(config)

def size(dims):
    dims = [int(dim) for dim in dims.split(",") if dim]
    return int(np.prod(dims)) if any(dim % 11 == 0 for dim in dims) else 0

moves = {}
for mesh in ({"data": 2, "tensor": 2}, {"data": 1, "fsdp": 2, "tensor": 2}):
    trained = run(**mesh)
    lowered = trained.lower_step(trained.abstract_state, trained.abstract_batch(BATCH))
    kinds = " (all-to-all|all-gather|collective-permute)(-start)?[(]"
    lines = [line for line in lowered.compile().as_text().splitlines() if re.search(kinds, line)]
    least = BATCH // trained.mesh.shape["data"] // trained.mesh.shape["fsdp"] * TOKENS * 16
    moves[str(mesh)] = [
        line.strip() for line in lines
        if any(
            size(dims) >= least
            for dims in re.findall(r"f32.([0-9,]*).", re.split(kinds, line)[0])
        )
    ]

products = {}
for precision in ("default", "highest"):
    made = run(precision, data=1, fsdp=2, tensor=2)
    state, batch, flow = made.abstract_state, made.abstract_batch(BATCH), made.trainer.flow
    variables = {"params": state.params, **state.collections}
    sampler = made.sampler(variables, guidance=1.0, denoise=True)
    z = jax.ShapeDtypeStruct((BATCH, *flow.latent_shape), np.float32, sharding=batch.image.sharding)
    programs = {
        "train": made.lower_step(state, batch),
        "evaluate": likelihoods.lower(flow, variables, batch, made.mesh),
        "sample": sampler.lower(z, batch.label),
    }
    for name, program in programs.items():
        lines = [line for line in program.as_text().splitlines() if "dot_general" in line]
        highest = [line for line in lines if "[HIGHEST, HIGHEST]" in line]
        products[f"{name} {precision}"] = len(lines), len(highest)

file, settings = tiny_runs.FLOWS["tarflow"]
golden = tiny_runs.configs.read(str(tiny_runs.ROOT / "configs" / file))
for name, value in {"flow.num_blocks": 2, "flow.width": 64, "mesh.data": 1, "mesh.fsdp": 2,
                    "mesh.tensor": 2}.items():
    tiny_runs.configs.change(golden, name, value)
_, stored = tiny_runs.read_state(GOLDEN)
wanted = checksums.flatten(set_up(golden).abstract_state)
with Checkpoints(GOLDEN / "checkpoints") as checkpoints:
    restored = checksums.flatten(checkpoints.restore(set_up(golden).abstract_state)[0])
for _ in range(30):  # in several programs at once, the devices would wait for each other for ever
    checksums.describe(restored)
rearranged = []
for path, array in restored.items():
    assert array.sharding == wanted[path].sharding, path
    assert np.asarray(array).tobytes() == stored[path].tobytes(), path
    if array.shape != stored[path].shape:
        rearranged.append(f"{path} {array.sharding.spec}")
print(json.dumps([moves, products, rearranged]))
"""


@pytest.fixture(scope="module")
def on_four_devices():
    process = subprocess.run(
        [sys.executable, "-c", ON_FOUR_DEVICES, str(GOLDEN)],
        env=tiny_runs.environment(JAX_NUM_CPU_DEVICES="4", PYTHONPATH=os.pathsep.join(sys.path)),
        capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def test_splitting_heads_moves_no_activations(on_four_devices):
    """Query, key and value of a head lie on the same devices: sums apart, nothing is exchanged."""
    moves, _, _ = on_four_devices
    assert len(moves) == 2
    assert not any(moves.values()), moves


def test_products_on_a_mesh_have_the_precision_that_is_asked_for(on_four_devices):
    """Those of gathered weights and their gradients too; in evaluation and sampling as well."""
    _, products, _ = on_four_devices
    for name, (count, highest) in products.items():
        assert count > 6 and highest == (count if "highest" in name else 0), name


def test_a_run_of_version_0_1_is_restored_on_a_mesh_to_the_last_bit(on_four_devices):
    """Query, key and value of its layers, their average and both moments are rearranged."""
    _, _, rearranged = on_four_devices
    assert len(rearranged) == 4 * 2 * 2  # blocks, kernel and bias
    assert any("None, 'fsdp', None, 'tensor'" in line for line in rearranged)


@pytest.mark.slow
def test_all_meshes_train_alike(tmp_path):
    """With noise, averaged parameters and accumulation; and each goes on where another stopped."""
    # Wide enough for all matrices of its layers to be split.
    fields = dict(flow__width=256, train__steps=20, train__checkpoint_every=10)
    fields |= dict(train__sample_every=0)

    def run(workdir, data, fsdp, tensor):
        mesh = {"mesh__data": data, "mesh__fsdp": fsdp, "mesh__tensor": tensor}
        arguments = tiny_runs.arguments("tarflow", workdir, **fields, **mesh)
        process = tiny_runs.start(arguments, JAX_NUM_CPU_DEVICES=str(data * fsdp * tensor))
        _, errors = process.communicate(timeout=1800)
        assert process.returncode == 0, errors
        megabytes = float(re.search(r"takes ([\d.,]+) MB a device", errors)[1].replace(",", ""))
        return read_metrics(workdir / "metrics.jsonl"), megabytes

    expected, whole = run(tmp_path / "one", 1, 1, 1)
    actual, part = run(tmp_path / "eight", 2, 2, 2)
    assert part < 1.4 * whole / 4
    moved = shutil.copytree(tmp_path / "eight", tmp_path / "moved")
    for made_later in [*moved.glob("checkpoints/20"), *moved.glob("evals/*00000020.json")]:
        shutil.rmtree(made_later) if made_later.is_dir() else made_later.unlink()
    resumed, _ = run(moved, 1, 4, 1)
    assert resumed[-1]["step"] == 20
    for lines in (actual, resumed):
        for several, one in zip(lines, expected, strict=True):
            assert several.keys() == one.keys()
            for metric in set(one) - set(SPEED):
                assert several[metric] == pytest.approx(one[metric], rel=1e-5), metric
