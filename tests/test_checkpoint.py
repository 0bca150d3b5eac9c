"""Checkpoints: what comes back is, bit for bit, what was saved at the step that is reported."""

import json
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from jetflow import checkpoint, manifest
from jetflow.checkpoint import Checkpoints
from jetflow.types import UsageError

# A failed restore must not litter the terminal with the tracebacks of Orbax's other reads.
quiet = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")

CONFIG = {"flow": {"width": 64}, "optim": {"lr": 3e-4}, "kinds": ["channels", "spatial"]}


@flax.struct.dataclass
class State:
    step: jax.Array
    params: Any
    optimizer: Any
    ema: Any
    collections: Any


def make_state(step: int, ema: bool = False, width: int = 32) -> State:
    keys = jax.random.split(jax.random.key(step), 3)
    params = {
        "dense": {"kernel": jax.random.normal(keys[0], (width, 48)), "bias": jnp.ones(48) / step},
        "half": jax.random.normal(keys[1], (7, 3), jnp.bfloat16),
    }
    optimizer = optax.adam(1e-3, mu_dtype=jnp.bfloat16).init(params)
    optimizer = jax.tree.map(lambda leaf: leaf + jnp.ones_like(leaf) * step, optimizer)
    constants = {"order": jax.random.permutation(keys[2], 48), "mask": jnp.arange(5) % 2 == 0}
    return State(
        step=jnp.int32(step),
        params=params,
        optimizer=optimizer,
        ema=jax.tree.map(lambda leaf: leaf * 0.5, params) if ema else None,
        collections={"constants": constants, "empty": {}},
    )


def abstract(tree: Any) -> Any:
    return jax.eval_shape(lambda tree: tree, tree)


def assert_same(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


def save_steps(directory, *steps: int) -> None:
    with Checkpoints(directory, keep=len(steps)) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), CONFIG)


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    """The warnings that jetflow.checkpoint logs."""
    lines = []
    monkeypatch.setattr(
        checkpoint.logging, "warning", lambda message, *args: lines.append(message % args)
    )
    return lines


def run_python(source: str, *args) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", source, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


# Round trips


@pytest.mark.parametrize("ema", [False, True])
def test_round_trip(tmp_path, ema):
    state = make_state(3, ema)
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(3, state, CONFIG, wait=True)
        assert checkpoints.latest() == 3
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        restored, step = checkpoints.restore(abstract(state))
        assert step == 3
        assert_same(restored, state)
        assert_same(checkpoints.restore(state)[0], state)  # concrete arrays as the template
        assert checkpoints.restore_config() == CONFIG


def test_special_values_keep_their_bits(tmp_path):
    words = jnp.array([0x7FC00001, 0xFF800000, 0x80000000, 0x00000001, 0x7F800001], jnp.uint32)
    state = {"params": {"odd": jax.lax.bitcast_convert_type(words, jnp.float32)}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state, {})
        assert_same(checkpoints.restore(abstract(state))[0], state)


def test_a_part_of_the_state(tmp_path):
    state = make_state(2, ema=True)
    save_steps(tmp_path, 1)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, state, CONFIG)
        part = {"ema": state.ema, "collections": state.collections}
        restored, step = checkpoints.restore(abstract(part))
        assert step == 2
        assert_same(restored, part)
        with pytest.raises(UsageError, match=r"ema/dense/bias is float32\[48\] there and absent"):
            checkpoints.restore({"params": abstract(state.params), "ema": None})
        with pytest.raises(UsageError, match=r"ema/dense/bias is absent there and float32\[48\]"):
            checkpoints.restore(abstract(part), 1)


def test_donation_right_after_saving(tmp_path):
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = {"params": {str(i): jnp.full((1 << 20,), float(i)) for i in range(4)}}
    expected = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state, {})
        for _ in range(5):
            state = step(state)
        restored, _ = checkpoints.restore(abstract(state))
        assert_same(restored, expected)
        before = jax.tree.map(lambda leaf: np.array(leaf, copy=True), step(restored))
        assert_same(step(checkpoints.restore(abstract(state))[0]), before)


SHARDINGS = """
import sys, jax, jax.numpy as jnp, numpy as np
from absl import logging
logging.set_verbosity(logging.INFO)
jax.config.update("jax_num_cpu_devices", 4)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jetflow.checkpoint import Checkpoints
from jetflow.manifest import checksum

mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
values = {"a": np.random.default_rng(0).normal(size=(512, 256)).astype("float32")}
specs = [P(), P("data"), P(None, "model"), P("model", "data"), P(("data", "model")), None]
sums = set()
step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 2, state), donate_argnums=0)
with Checkpoints(sys.argv[1], keep=99) as checkpoints:
    for i, spec in enumerate(specs):
        place = jax.devices()[0] if spec is None else NamedSharding(mesh, spec)
        state = {"params": jax.device_put(values, place)}
        sums.add(int(checksum(state["params"]["a"])))
        checkpoints.save(i, state, {})
        step(state)
    assert len(sums) == 1, sums
    for i in range(len(specs)):
        for spec in specs:
            sharding = None if spec is None else NamedSharding(mesh, spec)
            leaf = jax.ShapeDtypeStruct((512, 256), jnp.float32, sharding=sharding)
            restored = checkpoints.restore({"params": {"a": leaf}}, i)[0]["params"]["a"]
            assert sharding is None or restored.sharding == sharding
            np.testing.assert_array_equal(restored, values["a"])
"""


def test_other_shardings_and_a_quiet_terminal(tmp_path):
    result = run_python(SHARDINGS, tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# Damage


def flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def truncate(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def biggest_file(directory):
    files = [path for path in directory.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def test_a_bit_that_orbax_misses(tmp_path, warnings):
    save_steps(tmp_path, 1, 2)
    flip(biggest_file(tmp_path / "2" / "state"))
    flat = manifest.flatten(make_state(2))
    raw = checkpoint._read_arrays(epath.Path(tmp_path / "2" / "state"), flat)
    assert sum(not np.array_equal(raw[path], flat[path]) for path in flat) == 1
    with Checkpoints(tmp_path) as checkpoints:
        restored, step = checkpoints.restore(abstract(make_state(1)))
    assert step == 1
    assert_same(restored, make_state(1))
    assert len(warnings) == 1
    assert "checkpoint 2 in" in warnings[0]
    assert "the checksum of " in warnings[0]


def test_arrays_of_another_step(tmp_path, warnings):
    save_steps(tmp_path, 1, 2, 3)
    shutil.rmtree(tmp_path / "3" / "state")
    shutil.copytree(tmp_path / "2" / "state", tmp_path / "3" / "state")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(abstract(make_state(1)))[1] == 2
    assert "the checksum of " in warnings[0]


# Not `quiet`: once in a thousand reads TensorStore answers when the event loop is closed already.
@pytest.mark.parametrize("harm", [flip, truncate, lambda path: path.unlink()])
def test_every_file(tmp_path, harm, warnings):
    """Whichever file is harmed: the state is that of the step, or the step is passed over."""
    save_steps(tmp_path / "whole", 1, 2)
    noticed = 0
    files = [path for path in (tmp_path / "whole" / "2").rglob("*") if path.is_file()]
    assert len(files) > 8
    for file in files:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "copy")
        harm(tmp_path / "copy" / file.relative_to(tmp_path / "whole"))
        warnings.clear()
        with Checkpoints(tmp_path / "copy") as checkpoints:
            restored, step = checkpoints.restore(abstract(make_state(1)))
        assert_same(restored, make_state(step))
        assert len(warnings) == 2 - step
        noticed += 2 - step
    assert noticed >= 3  # the record, the index and the data


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace("0.0003", "0.0004"),
        lambda text: text.replace("float32[32,48]", "float32[32,49]"),
        lambda text: text.replace("params/half", "params/calf"),
        lambda text: text[:-1],
        lambda text: "[]",
        lambda text: "",
    ],
)
def test_a_changed_record(tmp_path, edit, warnings):
    save_steps(tmp_path, 1, 2)
    path = tmp_path / "2" / "record" / "metadata"
    text = path.read_text()
    assert edit(text) != text
    path.write_text(edit(text))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(abstract(make_state(1)))[1] == 1
        assert len(warnings) == 1
        assert checkpoints.restore_config() == CONFIG


@quiet
def test_no_fallback_for_a_named_step(tmp_path):
    save_steps(tmp_path, 1, 2)
    shutil.rmtree(tmp_path / "2" / "state")
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UsageError, match=r"checkpoint 2 in .* is damaged: .*steps there: \[1]"):
            checkpoints.restore(abstract(make_state(1)), 2)
        with pytest.raises(UsageError, match=r"no checkpoint of step 5 in .*; it has \[1, 2]"):
            checkpoints.restore(abstract(make_state(1)), 5)
        assert checkpoints.restore(abstract(make_state(1)), 1)[1] == 1


@quiet
def test_nothing_left(tmp_path, warnings):
    save_steps(tmp_path, 1, 2)
    for step in (1, 2):
        truncate(biggest_file(tmp_path / str(step) / "state"))
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UsageError, match=r"every checkpoint in .* \(steps \[1, 2]"):
            checkpoints.restore(abstract(make_state(1)))
        assert len(warnings) == 2
        assert checkpoints.steps() == [1, 2]  # reading deletes nothing


def test_no_checkpoint_at_all(tmp_path):
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        assert checkpoints.steps() == []
        remedy = "train first with `jetflow train --config … --workdir .*/run`"
        with pytest.raises(UsageError, match=f"no checkpoint in .*{remedy}"):
            checkpoints.restore(abstract(make_state(1)))
    assert not (tmp_path / "run").exists()


def test_memory_errors_are_not_damage(tmp_path, monkeypatch):
    save_steps(tmp_path, 1, 2)

    def exhausted(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(checkpoint, "_read_arrays", exhausted)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(jax.errors.JaxRuntimeError):
        checkpoints.restore(abstract(make_state(1)))


# Another config


def with_params(state: State, **changes) -> State:
    return state.replace(params={**state.params, **changes})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: with_params(state, half=jnp.zeros((7, 4), jnp.bfloat16)),
         r"params/half is bfloat16\[7,3\] there and bfloat16\[7,4\] here"),
        (lambda state: with_params(state, half=jnp.zeros((7, 3))),
         r"params/half is bfloat16\[7,3\] there and float32\[7,3\] here"),
        (lambda state: with_params(state, new=jnp.zeros(3)),
         r"params/new is absent there and float32\[3\] here"),
        (lambda state: state.replace(optimizer=optax.sgd(1.0, momentum=0.9).init(state.params)),
         r"optimizer/0/trace/dense/bias is absent there .*; and \d+ more; use the config"),
        (lambda state: state.replace(collections={}),
         r"collections/constants/mask is bool\[5\] there and absent here"),
    ],
)  # fmt: skip
def test_another_config_is_not_damage(tmp_path, change, message, warnings):
    other = change(make_state(1))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, other, CONFIG)
        checkpoints.save(2, make_state(2), CONFIG)
        with pytest.raises(UsageError, match=f"checkpoint 2 in .* does not fit .*{message}"):
            checkpoints.restore(abstract(other))  # although step 1 would fit
        assert checkpoints.restore(abstract(other), 1)[1] == 1
    assert warnings == []


# What stays on disk


def test_retention(tmp_path):
    with Checkpoints(tmp_path, keep=2, keep_every=4) as checkpoints:
        for step in range(1, 12):
            checkpoints.save(step, {"params": jnp.full(3, step)}, {})
        checkpoints.wait()
        assert checkpoints.steps() == [4, 8, 10, 11]
        checkpoints.save(9, {"params": jnp.full(3, 9)}, {}, wait=True)  # older, yet the last saved
        assert checkpoints.steps() == [4, 8, 9, 11]
        for step in checkpoints.steps():
            assert_same(checkpoints.restore({"params": jnp.zeros(3, int)}, step)[0]["params"],
                        jnp.full(3, step))  # fmt: skip


def test_an_interrupted_save_is_ignored(tmp_path):
    save_steps(tmp_path, 1)
    shutil.copytree(tmp_path / "1", tmp_path / "5.orbax-checkpoint-tmp")
    (tmp_path / "notes_7").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 1
        assert checkpoints.restore(abstract(make_state(1)))[1] == 1
        assert (tmp_path / "5.orbax-checkpoint-tmp").exists()  # perhaps another process saves
        checkpoints.save(2, make_state(2), CONFIG, wait=True)
        assert not (tmp_path / "5.orbax-checkpoint-tmp").exists()
        assert checkpoints.steps() == [1, 2]


KILLED = """
import os, signal, sys, jax
from jetflow.checkpoint import Checkpoints
make = jax.jit(lambda i: {"params": jax.random.normal(jax.random.key(i), (1 << 22,))})
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, make(1), {}, wait=True)
checkpoints.save(2, make(2), {})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_while_saving(tmp_path):
    assert run_python(KILLED, tmp_path).returncode == -9
    with Checkpoints(tmp_path) as checkpoints:
        restored, step = checkpoints.restore(
            {"params": jax.ShapeDtypeStruct((1 << 22,), "float32")}
        )
    np.testing.assert_array_equal(
        restored["params"], jax.random.normal(jax.random.key(step), (1 << 22,))
    )


def test_a_damaged_step_is_saved_again(tmp_path, warnings):
    save_steps(tmp_path, 1, 2)
    flip(biggest_file(tmp_path / "2" / "state"))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(abstract(make_state(1)))[1] == 1
        checkpoints.save(2, make_state(2), CONFIG)
        assert_same(checkpoints.restore(abstract(make_state(2)))[0], make_state(2))
    assert len(warnings) == 1


def test_a_damaged_step_does_not_outlive_the_next_save(tmp_path, warnings):
    save_steps(tmp_path, 10, 20, 30)
    truncate(tmp_path / "30" / "record" / "metadata")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.restore(abstract(make_state(1)))[1] == 20
        checkpoints.save(25, make_state(25), CONFIG, wait=True)
        assert checkpoints.steps() == [20, 25]
    assert len(warnings) == 1


def test_saving_a_step_twice(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), CONFIG, wait=True)
        (tmp_path / "1" / "mark").touch()
        checkpoints.save(1, make_state(1), CONFIG, wait=True)
        assert (tmp_path / "1" / "mark").exists()  # the same content is left alone
        checkpoints.save(1, make_state(2), CONFIG, wait=True)
        assert_same(checkpoints.restore(abstract(make_state(1)))[0], make_state(2))
        checkpoints.save(1, make_state(2), {"other": 1}, wait=True)
        assert checkpoints.restore_config() == {"other": 1}
    flip(biggest_file(tmp_path / "1" / "state"))
    with Checkpoints(tmp_path) as checkpoints:  # has not verified all of it, so writes it anew
        assert checkpoints.restore({"step": jnp.int32(0)})[1] == 1
        checkpoints.save(1, make_state(2), {"other": 1})
        assert_same(checkpoints.restore(abstract(make_state(1)))[0], make_state(2))


def test_bad_input_fails_at_once(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(TypeError, match="JSON"):
            checkpoints.save(1, make_state(1), {"config": object()})
        clash = {"params": {"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}}
        with pytest.raises(ValueError, match="share a path"):
            checkpoints.save(1, clash, {})
    assert list(tmp_path.iterdir()) == []


def test_the_record_is_plain_json(tmp_path):
    save_steps(tmp_path, 1)
    record = json.loads((tmp_path / "1" / "record" / "metadata").read_text())
    assert record["config"] == CONFIG
    kind, checksum = record["arrays"]["optimizer/0/mu/dense/kernel"]
    assert kind == "bfloat16[32,48]"
    assert len(checksum) == 8


# The checksum


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "bool"])
def test_checksum_sees_every_bit_and_every_swap(dtype):
    rng = np.random.default_rng(0)
    values = np.asarray(jnp.asarray(rng.integers(0, 100, size=(3, 5, 2)), dtype))
    checksum = manifest.checksum
    whole = int(checksum(values))
    assert whole != int(checksum(values.reshape(5, 3, 2).swapaxes(0, 1)))
    for bit in [0] if dtype == "bool" else range(8 * values.itemsize):
        changed = values.copy()
        changed.view(f"uint{8 * values.itemsize}")[1, 2, 1] ^= 1 << bit
        assert int(checksum(changed)) != whole
    for left, right in (((0, 0, 0), (2, 4, 1)), ((0, 1, 0), (1, 0, 0)), ((1, 2, 0), (1, 2, 1))):
        changed = values.copy()
        changed[left], changed[right] = values[right], values[left]
        assert (int(checksum(changed)) == whole) == (values[left] == values[right])


def test_checksum_of_64_bits():
    with jax.enable_x64(True):
        values = np.random.default_rng(0).normal(size=(4, 4))
        whole = int(manifest.checksum(values))
        for bit in range(64):
            changed = values.copy()
            changed.view("uint64")[3, 1] ^= np.uint64(1 << bit)
            assert int(manifest.checksum(changed)) != whole


# Two processes

TWO_PROCESSES = """
import sys, jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
directory, port, process = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.distributed.initialize("localhost:" + port, 2, process)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jetflow import checkpoint

mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
make = lambda i: {"params": jax.random.normal(jax.random.key(i), (64, 32))}
make_split = jax.jit(make, out_shardings=split)
leaf = lambda sharding: {"params": jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=sharding)}

with checkpoint.Checkpoints(directory, keep=2) as checkpoints:
    for i in range(4):
        checkpoints.save(i, make_split(i), {})
    restored, step = checkpoints.restore(leaf(whole))
    assert (step, checkpoints.steps()) == (3, [2, 3])
    np.testing.assert_array_equal(restored["params"], make(3)["params"])

    read, calls = checkpoint._read_arrays, []
    def read_on_one_process(*args):
        calls.append(args)
        if process == 1 and len(calls) == 1:
            raise OSError("only this process sees it")
        return read(*args)
    checkpoint._read_arrays = read_on_one_process
    assert checkpoints.restore(leaf(split))[1] == 2
    checkpoints.save(3, make_split(3), {})
    assert checkpoints.restore(leaf(split))[1] == 3
"""


@pytest.mark.slow
def test_two_processes_agree(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda i: run_python(TWO_PROCESSES, tmp_path, port, i), range(2)))
    assert [result.returncode for result in results] == [0, 0], results[0].stderr
    assert "is damaged: not readable on process 1" in results[0].stderr
    assert "is damaged: OSError: only this process sees it" in results[1].stderr
