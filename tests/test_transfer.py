"""Training from another run's weights: what is taken of them, and that it resumes without them."""

import functools
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from absl import flags
from flow_laws import random_variables
from tiny_runs import FLOWS, ROOT, STEPS, assert_same, read_state, remains

from jetflow import cli, manifest
from jetflow.checkpoint import Checkpoints
from jetflow.cli import configs as config
from jetflow.data.dataset import Dataset
from jetflow.files import write_json
from jetflow.flows import coupling
from jetflow.flows import splits as orders
from jetflow.model import load_model
from jetflow.training import log as report
from jetflow.training import resample, transfer_plan
from jetflow.training.experiment import Run, set_up
from jetflow.training.log import SPEED, read_metrics
from jetflow.training.state import TrainState
from jetflow.types import UsageError

pytestmark = pytest.mark.usefixtures("compilation_cache")

# --- resampling ----------------------------------------------------------------------------------

GRIDS = [((4, 4), (8, 8)), ((8, 6), (4, 12)), ((6, 8), (10, 14))]


def places(grid):
    """Row and column of each token, in units of the image: [T, 2]."""
    return (np.indices(grid).reshape(2, -1).T + 0.5) / grid


def seen_places(pattern, grid):
    """Row, column and half of the tokens that a coupling's net sees, by the coupling itself."""
    order = orders.token_pattern(pattern, grid)
    split = orders.Splits(jnp.array(order), jnp.arange(6), jnp.array(True))
    tokens = [np.concatenate([[*place, 0], [*place, 1]]) for place in places(grid)]
    first, _ = coupling.divide(jnp.array(tokens, jnp.float32)[None], split)
    return np.asarray(first[0])


def linear(places):
    return 3 + places @ np.array([1.0, -2.0, 5.0])[: places.shape[1]]


def inside(places, there):
    """Between the centres of old tokens, and off the border, where a checkerboard has holes."""
    margin = 1.5 / np.array(there)
    return ((places[:, :2] >= margin) & (places[:, :2] <= 1 - margin)).all(axis=1)


CASES = {pattern: functools.partial(resample.on_spatial_split, pattern) for pattern in
         orders.SPATIAL_CYCLE} | {"image order": resample.in_image_order}  # fmt: skip


@pytest.mark.parametrize(("there", "here"), GRIDS)
@pytest.mark.parametrize("name", CASES)
def test_linear_fields_are_resampled_exactly(name, there, here):
    of = places if name == "image order" else functools.partial(seen_places, name)
    weights = CASES[name](there, here)
    assert weights.shape == (here[0] * here[1], there[0] * there[1])
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-12)
    old, new = of(there), of(here)
    within = inside(new, there)
    assert within.sum() >= 4
    np.testing.assert_allclose((weights @ linear(old))[within], linear(new)[within], rtol=1e-6)
    np.testing.assert_array_equal(CASES[name](there, there), np.eye(there[0] * there[1]))


def test_beyond_the_outermost_centres_values_stay_constant():
    weights = resample.in_image_order((1, 2), (1, 4))
    np.testing.assert_allclose(weights @ [0.0, 1.0], [0, 0.25, 0.75, 1])


# --- what becomes of each array ------------------------------------------------------------------


def toy(shape, classes=0, name="toy"):
    """A data set of a few random images."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, *shape), np.uint8)
    source = [{"image": image, "label": i % max(classes, 1)} for i, image in enumerate(images)]
    return lambda _, split: Dataset(name, "1.0.0", split, shape, classes, source)


def prepare(name, shape=(8, 8, 1), classes=0, **fields) -> Run:
    """A run of a tiny flow, on toy data; fields as of `tiny_runs.train`."""
    labels = tiny_runs.LABELS if classes else tiny_runs.NO_LABELS
    fields = {key.replace(".", "__"): value for key, value in labels.items()} | fields
    fields = {"flow__patch_size": 2, "data__name": "toy"} | fields
    argv = tiny_runs.arguments(name, Path(), **fields)[:-2]
    values = flags.FlagValues()
    config.define(values, argv)
    config.parse(values, argv)
    return set_up(values.config, toy(shape, classes, values.config.data.name))


def leave(run: Run, workdir: Path):
    """A checkpoint of the run with random weights and averages, no optimizer; returns the state."""
    variables, averaged = (random_variables(run.trainer.flow, jnp.float32, seed) for seed in (1, 2))
    if "prior" in variables:
        shape = variables["prior"]["variance"].shape
        variables["prior"]["variance"] = jax.random.uniform(jax.random.key(0), shape, minval=0.5)
    state = run.abstract_state.replace(
        step=jnp.array(7),
        params=variables.pop("params"),
        collections=variables,
        opt_state=None,
        ema=averaged["params"] if run.config.train.ema_decay else None,
    )
    change(state, run, workdir, step=7)
    write_json(workdir / "config.json", run.resolved_config)
    return state


def change(state: TrainState, run: Run, workdir: Path, *, step=8) -> None:
    """Save another state as the newest one."""
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(step, state, run.resolved_config, wait=True)


def begin(name, source, *arguments, **fields):
    return prepare(name, *arguments, init_from=source, **fields).fresh_state()


def fates(table: str) -> dict[str, str]:
    """Array → what happens to it, of a printed table."""
    rows = [re.split(r"  +", line.strip()) for line in table.splitlines()[2:-1]]
    return {name: what for name, _, what, _ in rows}


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("name", FLOWS)
def test_the_same_flow_is_loaded(name, tmp_path):
    classes = 0 if name == "volume preserving" else 3
    old = leave(prepare(name, (8, 8, 1), classes), tmp_path)
    new, table = begin(name, tmp_path, (8, 8, 1), classes, train__seed=1)
    for params in (new.params, new.ema):
        assert_equal(params, old.ema)
    assert_equal(new.collections, old.collections)
    assert new.step == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(new.opt_state))
    assert {what.partition(":")[0] for what in fates(table).values()} == {"loaded"}
    count = sum(leaf.size for leaf in jax.tree.leaves(old.params))
    assert table.splitlines()[0] == f"averaged weights of {tmp_path}, step 7:"
    assert table.endswith(f"parameters: {count:,} loaded, 0 resampled, 0 fresh, 0 dropped")


@pytest.mark.parametrize(("weights", "field"), [("params", "params"), ("ema", "ema")])
def test_weights_as_asked_for(weights, field, tmp_path):
    old = leave(prepare("jet"), tmp_path)
    new, table = begin("jet", tmp_path, init_weights=weights)
    assert_equal(new.params, getattr(old, field))
    assert table.startswith("averaged" if weights == "ema" else "weights of")


def test_without_averages_the_weights_are_raw(tmp_path):
    old = leave(prepare("jet", train__ema_decay=0.0), tmp_path)
    new, _ = begin("jet", tmp_path)
    assert_equal(new.params, old.params)
    assert_equal(new.ema, old.params)
    with pytest.raises(UsageError, match="init_weights is 'ema', but that run has no averaged"):
        begin("jet", tmp_path, init_weights="ema")
    with pytest.raises(UsageError, match="init_weights is 'all'; expected one of auto, ema, par"):
        begin("jet", tmp_path, init_weights="all")


def test_jets_splits_come_from_the_source(tmp_path):
    run = prepare("jet")
    old = leave(run, tmp_path)
    constants = old.collections["constants"]["blocks_0"]
    other = constants | {"feature_order": constants["feature_order"][:, ::-1]}
    change(old.replace(collections={"constants": {"blocks_0": other}}), run, tmp_path)
    for shape in ((8, 8, 1), (16, 8, 1)):
        new, _ = begin("jet", tmp_path, shape)
        order = new.collections["constants"]["blocks_0"]["feature_order"]
        np.testing.assert_array_equal(order, other["feature_order"])


def test_position_embeddings_of_a_jet_follow_their_places(tmp_path):
    """On each kind of split: its tokens' places, as the coupling divides them."""
    fields = {"flow__kinds": "('channels', 'spatial')", "flow__num_couplings": 12}
    run = prepare("jet", **fields)
    old = leave(run, tmp_path)

    def tables(grid):
        patterns = orders.layer_patterns(12, ("channels", "spatial"))
        return [seen_places(p, grid) if p else places(grid) for p in patterns]

    net = old.ema["blocks_0"]["layers"]["net"]
    fields_there = np.stack([linear(table) for table in tables((4, 4))])
    net["position"] = jnp.broadcast_to(fields_there[..., None], net["position"].shape)
    change(old, run, tmp_path)
    new, table = begin("jet", tmp_path, (16, 12, 1), **fields)
    position = np.asarray(new.params["blocks_0"]["layers"]["net"]["position"])
    for actual, expected in zip(position, tables((8, 6)), strict=True):
        within = inside(expected, (4, 4))
        wanted = np.repeat(linear(expected)[within, None], position.shape[-1], axis=1)
        np.testing.assert_allclose(actual[within], wanted, rtol=1e-6)
    assert fates(table)["blocks_0/layers/net/position"] == "resampled: 4x4 -> 8x6"
    orders_here = "fresh: the same patterns, 4x4 -> 8x6"
    assert fates(table)["constants/blocks_0/token_order"] == orders_here
    assert f", {12 * 48 * 32:,} resampled, 0 fresh, 0 dropped" in table
    np.testing.assert_array_equal(
        new.collections["constants"]["blocks_0"]["token_order"],
        orders.splits(12, ("channels", "spatial"), (8, 6), 4).token_order,
    )


@pytest.mark.parametrize("name", ["tarflow", "volume preserving"])
def test_position_embeddings_of_a_tarflow_follow_their_places(name, tmp_path):
    """In image order, in blocks of either direction; the learned prior likewise."""
    old = leave(prepare(name, train__ema_decay=0.0), tmp_path)
    new, table = begin(name, tmp_path, (8, 16, 1))
    weights = resample.in_image_order((4, 4), (4, 8))
    for block in ("blocks_0", "blocks_1"):
        wanted = weights @ np.asarray(old.params[block]["position"], np.float64)
        np.testing.assert_allclose(new.params[block]["position"], wanted, atol=1e-6)
    found = fates(table)
    assert found["blocks_*/position (2)"] == "resampled: 4x4 -> 4x8"
    if name == "volume preserving":
        variance = old.collections["prior"]["variance"]
        np.testing.assert_allclose(
            new.collections["prior"]["variance"], weights @ np.asarray(variance), rtol=1e-6
        )
        assert found["prior/variance"] == "resampled: 4x4 -> 4x8"


def test_a_grid_of_as_many_tokens_is_another_grid(tmp_path):
    old = leave(prepare("tarflow", (8, 8, 1)), tmp_path)
    new, _ = begin("tarflow", tmp_path, (4, 16, 1))
    before, after = old.ema["blocks_0"]["position"], new.params["blocks_0"]["position"]
    wanted = resample.in_image_order((4, 4), (2, 8)) @ np.asarray(before)
    np.testing.assert_allclose(after, wanted, atol=1e-6)


def embeddings(state):
    flat = manifest.flatten(state.params)
    return {path: a for path, a in flat.items() if path.endswith("class_embedding")}


@pytest.mark.parametrize(
    ("name", "there", "here", "fate"),
    [
        ("jet", (3, "a/8"), (3, "a/16"), "loaded: the classes of a"),
        ("tarflow", (3, "a/8"), (3, "a/16"), "loaded: the classes of a"),
        ("jet", (3, "afhq/64"), (3, "afhq_v2/128"), "loaded: the classes of afhq"),
        ("jet", (3, "a"), (3, "b"), "fresh: 3 classes of b, there 3 of a"),
        ("tarflow", (3, ""), (3, "b"),
         "fresh: 3 classes of b, there 3 of data that its config does not name"),
        ("jet", (3, "a"), (5, "a"), "fresh: 5 classes of a, there 3 of a"),
        ("tarflow", (0, "a"), (3, "a"), "fresh: there are no labels there"),
        ("jet", (3, "a"), (0, "a"), "dropped: there are no labels here"),
        ("tarflow", (3, "a"), (0, "a"), "dropped: there are no labels here"),
    ],
)  # fmt: skip
def test_class_embeddings(name, there, here, fate, tmp_path):
    old = leave(prepare(name, (8, 8, 1), there[0], data__name=there[1]), tmp_path)
    run = prepare(name, (8, 8, 1), here[0], data__name=here[1], init_from=tmp_path)
    new, table = run.fresh_state()
    row = "blocks_0/layers/net/class_embedding" if name == "jet" else "blocks_*/class_embedding (2)"
    assert fates(table)[row] == fate
    before, after = embeddings(old.replace(params=old.ema)), embeddings(new)
    if fate.startswith("loaded"):
        assert_equal(after, before)
    elif fate.startswith("fresh"):
        assert_equal(after, embeddings(prepare(name, (8, 8, 1), here[0]).fresh_state()[0]))
        assert all(array.shape[-2] == here[0] for array in after.values())
    else:
        assert not after and before
    total = sum(array.size for array in (after or before).values())
    assert re.search(rf"\b{total:,} {fate.partition(':')[0]}\b", table) or "loaded" in fate


@pytest.mark.parametrize(
    ("shape", "fields", "said"),
    [
        ((8, 8, 1), {"flow__width": 64}, "config.flow.width is 32 there and 64 here, "
         "params/blocks_0/layers/net/layers/mlp_in/bias is 5x1x128 there and 5x1x256 here"),
        ((8, 8, 1), {"flow__num_couplings": 6}, "config.flow.num_couplings is 5 there and 6 here"),
        ((8, 8, 1), {"flow__num_heads": 4}, "config.flow.num_heads is 2 there and 4 here; set"),
        ((16, 16, 1), {"flow__patch_size": 4}, "config.flow.patch_size is 2 there and 4 here"),
        ((8, 8, 3), {}, "the number of colour channels is 1 there and 3 here, params/"),
    ],
)  # fmt: skip
def test_other_differences_are_refused(shape, fields, said, tmp_path):
    leave(prepare("jet"), tmp_path)
    with pytest.raises(UsageError, match=f"config.init_from is {tmp_path}: it holds another flow"):
        begin("jet", tmp_path, shape, **fields)
    with pytest.raises(UsageError, match=re.escape(said)):
        begin("jet", tmp_path, shape, **fields)


def test_an_array_without_counterpart_is_refused(tmp_path, monkeypatch):
    """Even where no field of the configs says so."""
    leave(prepare("tarflow"), tmp_path)
    real = transfer_plan.Side.arrays.fget
    more = {"params/extra": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
    for side in (transfer_plan.Source, transfer_plan.Side):
        arrays = lambda self, side=side: real(self) | (more if type(self) is side else {})  # noqa: E731
        monkeypatch.setattr(transfer_plan.Side, "arrays", property(arrays))
        where = "2x3 there and absent" if side is transfer_plan.Source else "absent there and 2x3"
        with pytest.raises(UsageError, match=f"params/extra is {where} here"):
            begin("tarflow", tmp_path)


def test_splits_of_unknown_patterns_stay_on_their_grid(tmp_path):
    run = prepare("jet")
    old = leave(run, tmp_path)
    constants = old.collections["constants"]["blocks_0"]
    other = constants | {"token_order": constants["token_order"][:, ::-1]}
    change(old.replace(collections={"constants": {"blocks_0": other}}), run, tmp_path)
    new, _ = begin("jet", tmp_path)
    order = new.collections["constants"]["blocks_0"]["token_order"]
    np.testing.assert_array_equal(order, other["token_order"])
    with pytest.raises(UsageError, match="token_order are not the patterns of its"):
        begin("jet", tmp_path, (16, 16, 1))


# --- through the command line --------------------------------------------------------------------

FINETUNE = {"train__steps": 6, "train__checkpoint_every": 4, "train__sample_every": 0}
FINETUNE |= {"train__seed": 1, "optim__lr": 1e-3}
FINETUNE |= {"eval__guidance": 0.0, "eval__denoise": False}  # which takes long to compile
ON_DIGITS = {"flow__patch_size": 4, "data__name": "digits"}


def test_interrupted_without_its_source_it_ends_the_same(tmp_path, capsys):
    source = tmp_path / "source"
    leave(prepare("tarflow", (8, 8, 1), 10, **ON_DIGITS), source)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    arguments = FINETUNE | {"init_from": source}
    assert tiny_runs.train("tarflow", whole, **arguments) == 0
    said = capsys.readouterr().err
    assert f"6 steps of 16 images each, from {source}" in said
    assert re.search(
        r"  blocks_\*/class_embedding \(2\) +10x32 +loaded: the classes of digits +640\n", said
    )
    progress = report.Reporter.progress

    def interrupted(self, step, *arguments, **fields):
        if step == 1:
            raise RuntimeError("lost power")
        progress(self, step, *arguments, **fields)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report.Reporter, "progress", interrupted)
        with pytest.raises(RuntimeError, match="lost power"):
            tiny_runs.train("tarflow", cut, **arguments)
    shutil.rmtree(source)
    capsys.readouterr()
    assert tiny_runs.train("tarflow", cut, **arguments) == 0
    assert "class_embedding" not in capsys.readouterr().err
    assert_same(remains(cut), remains(whole))


def test_frozen_parameters_stay_to_the_last_bit(tmp_path):
    """And their averages; they have no moments. The others move."""
    source, workdir = tmp_path / "source", tmp_path / "run"
    leave(prepare("jet", (8, 8, 1), 10, **ON_DIGITS), source)
    fields = FINETUNE | {"init_from": source, "optim__weight_decay": 0.1}
    frozen = r"(('/(position|qkv)', 0), ('proj_in', 0.5))"
    fields |= {"optim__multipliers": frozen, "optim__clip_norm": 1.0}
    assert tiny_runs.train("jet", workdir, **fields) == 0
    (_, before), (_, after) = read_state(source), read_state(workdir)
    seen = set()
    for path, array in before.items():
        field, _, rest = path.partition("/")
        if field == "ema":
            stays = "position" in rest or "qkv" in rest
            assert (after[path].tobytes() == array.tobytes()) == stays, path
            assert (after[f"params/{rest}"].tobytes() == array.tobytes()) == stays, path
            seen.add(stays)
    assert seen == {True, False}
    moments = [path for path in after if path.startswith("opt_state/")]
    assert not [path for path in moments if "position" in path or "qkv" in path]
    assert [path for path in moments if "proj_in" in path]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tarflow", "jet"])
def test_all_meshes_start_alike(name, tmp_path):
    """Written by one device, read by eight: with sharded arrays, classes and a frozen part."""
    source = tmp_path / "source"
    assert tiny_runs.train(name, source, flow__width=128, train__steps=2) == 0
    fields = FINETUNE | {"flow__width": 128, "optim__multipliers": "(('position', 0),)"}
    fields |= {"init_from": source}
    assert tiny_runs.train(name, tmp_path / "one", **fields) == 0
    mesh = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
    arguments = tiny_runs.arguments(name, tmp_path / "eight", **fields, **mesh)
    process = tiny_runs.start(arguments, JAX_NUM_CPU_DEVICES="8")
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert "on 8 x cpu (data 2 and fsdp 2 and tensor 2)" in said
    several, one = (read_metrics(tmp_path / n / "metrics.jsonl") for n in ("eight", "one"))
    for a, b in zip(several, one, strict=True):
        assert a.keys() == b.keys()
        for metric in b.keys() - set(SPEED):
            assert a[metric] == pytest.approx(b[metric], rel=1e-5), metric
    (_, a), (_, b) = read_state(tmp_path / "eight"), read_state(tmp_path / "one")
    frozen = [path for path in b if path.startswith(("params", "ema")) and "position" in path]
    assert frozen and all(a[path].tobytes() == b[path].tobytes() for path in frozen)


def test_a_config_without_the_field_is_refused(tmp_path, capsys):
    path = tmp_path / "old.py"
    path.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom configs import base\n"
        "def get_config():\n    config = base.jet().unlock()\n"
        "    del config.init_from\n    return config\n"
    )
    assert cli.main(["train", f"--config={path}", f"--workdir={tmp_path}/run"]) == 2
    assert "has no field init_from; start from configs/base.py" in capsys.readouterr().err


def test_a_config_of_a_former_run_still_loads(trained, tmp_path):
    shutil.copytree(trained("jet"), tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["init_from"], settings["init_weights"], settings["optim"]["multipliers"]
    settings["train"]["init_from"] = ""
    write_json(tmp_path / "config.json", settings)
    assert load_model(tmp_path).step == STEPS
    new, _ = begin("jet", tmp_path, (8, 8, 1), 10, **ON_DIGITS)
    _, before = read_state(tmp_path)
    for path, array in manifest.flatten(new.params).items():
        np.testing.assert_array_equal(array, before[f"ema/{path}"])
