"""Training from another run's weights: what is taken of them, and that it resumes without them."""

import functools
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from chex import assert_trees_all_equal
from flow_laws import random_variables
from tiny_runs import FLOWS, assert_same, read_state, remains

from jetflow import checksums
from jetflow.checkpoint import Checkpoints
from jetflow.data.dataset import Dataset
from jetflow.files import write_json
from jetflow.flows import coupling
from jetflow.model import load_model
from jetflow.training.experiment import Run, set_up
from jetflow.training.finetune import Side, make_plan
from jetflow.training.log import Reporter
from jetflow.training.resample import between_grids, between_spatial_splits
from jetflow.types import UsageError

pytestmark = pytest.mark.usefixtures("compilation_cache")

# Resampling.


def places(grid):
    """Row and column of each token, in units of the image: [T, 2]."""
    return (np.indices(grid).reshape(2, -1).T + 0.5) / grid


def seen_places(pattern, grid):
    """Row, column and half of the tokens that a coupling's net sees, by the coupling itself."""
    order = coupling.token_pattern(pattern, grid)
    split = coupling.Splits(jnp.array(order), jnp.arange(6), jnp.array(True))
    tokens = [np.concatenate([[*place, 0], [*place, 1]]) for place in places(grid)]
    first, _ = coupling.divide(jnp.array(tokens, jnp.float32)[None], split)
    return np.asarray(first[0])


def linear(places):
    return 3 + places @ np.array([1.0, -2.0, 5.0])[: places.shape[1]]


def inside(places, old):
    """Between the centres of old tokens, and off the border, where a checkerboard has holes."""
    margin = 1.5 / np.array(old)
    return ((places[:, :2] >= margin) & (places[:, :2] <= 1 - margin)).all(axis=1)


@pytest.mark.parametrize(("old", "new"), [((4, 4), (8, 8)), ((8, 6), (4, 12)), ((6, 8), (10, 14))])
def test_linear_fields_are_resampled_exactly(old, new):
    cases = {pattern: functools.partial(between_spatial_splits, pattern)
             for pattern in coupling.SPATIAL_CYCLE} | {None: between_grids}  # fmt: skip
    for pattern, between in cases.items():
        of = functools.partial(seen_places, pattern) if pattern else places
        weights = between(old, new)
        np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-12)
        within = inside(of(new), old)
        assert within.sum() >= 4
        np.testing.assert_allclose(
            (weights @ linear(of(old)))[within], linear(of(new))[within], rtol=1e-6
        )
        np.testing.assert_array_equal(between(old, old), np.eye(old[0] * old[1]))


def test_beyond_the_outermost_centres_values_stay_constant():
    np.testing.assert_allclose(between_grids((1, 2), (1, 4)) @ [0.0, 1.0], [0, 0.25, 0.75, 1])


# What becomes of each array.


def prepare(name, shape=(8, 8, 1), classes=0, **fields) -> Run:
    """A run of a tiny flow on a few random images; fields as of `tiny_runs.train`."""
    labels = tiny_runs.LABELS if classes else tiny_runs.NO_LABELS
    fields = {key.replace(".", "__"): value for key, value in labels.items()} | fields
    config = tiny_runs.config(name, **{"flow__patch_size": 2, "data__name": "toy"} | fields)
    images = np.random.default_rng(0).integers(0, 256, (20, *shape), np.uint8)
    source = [{"image": image, "label": i % max(classes, 1)} for i, image in enumerate(images)]
    data = Dataset(config.data.name, "1.0.0", "train", shape, classes, source)
    return set_up(config, lambda *_: data)


def leave(run: Run, workdir):
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
    save(state, run, workdir)
    write_json(workdir / "config.json", run.resolved_config)
    return state


def save(state, run: Run, workdir, step=7) -> None:
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(step, state, run.resolved_config)


def begin(name, source, *arguments, **fields):
    return prepare(name, *arguments, init_from=source, **fields).fresh_state()


def fates(table: str) -> dict[str, str]:
    """Array → what happens to it, of a printed table."""
    rows = [re.split(r"  +", line.strip()) for line in table.splitlines()[2:-1]]
    return {name: what for name, _, what, _ in rows}


def splits_of(state):
    return state.collections["constants"]["blocks_0"]


@pytest.mark.parametrize("name", FLOWS)
def test_the_same_flow_is_loaded(name, tmp_path):
    classes = 0 if name == "volume preserving" else 3
    old = leave(prepare(name, (8, 8, 1), classes), tmp_path)
    new, table = begin(name, tmp_path, (8, 8, 1), classes, train__seed=1)
    assert_trees_all_equal(new.params, old.ema)
    assert_trees_all_equal(new.ema, old.ema)
    assert_trees_all_equal(new.collections, old.collections)
    assert new.step == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(new.opt_state))
    assert {what.partition(":")[0] for what in fates(table).values()} == {"loaded"}
    count = sum(leaf.size for leaf in jax.tree.leaves(old.params))
    assert table.startswith(f"averaged weights of {tmp_path}, step 7:\n")
    assert table.endswith(f"parameters: {count:,} loaded, 0 resampled, 0 fresh, 0 dropped")


def test_which_weights(tmp_path):
    """Averaged ones by default, raw ones if asked for or if there are no averages."""
    averaged, raw = tmp_path / "averaged", tmp_path / "raw"
    old = leave(prepare("jet"), averaged)
    new, table = begin("jet", averaged, init_weights="params")
    assert_trees_all_equal((new.params, new.ema), (old.params, old.params))
    assert table.startswith("weights of")
    assert_trees_all_equal(load_model(averaged, weights="ema").variables["params"], old.ema)
    leave(prepare("jet", train__ema_decay=0.0), raw)
    assert_trees_all_equal(load_model(raw).variables["params"], old.params)
    for weights in ("ema", "all"):
        with pytest.raises(UsageError, match=f"weights is '{weights}', but .* has auto, params"):
            load_model(raw, weights=weights)


def test_splits_of_a_jet_come_from_the_source(tmp_path):
    """On another grid too, but for patterns that are unknown on it."""
    run = prepare("jet")
    old = leave(run, tmp_path)
    for field, shapes in (("feature_order", [(8, 8, 1), (16, 8, 1)]), ("token_order", [(8, 8, 1)])):
        other = splits_of(old) | {field: splits_of(old)[field][:, ::-1]}
        save(old.replace(collections={"constants": {"blocks_0": other}}), run, tmp_path, step=8)
        for shape in shapes:
            new, _ = begin("jet", tmp_path, shape)
            np.testing.assert_array_equal(splits_of(new)[field], other[field])
    with pytest.raises(UsageError, match="token_order are not the patterns of its"):
        begin("jet", tmp_path, (16, 16, 1))


def test_position_embeddings_of_a_jet_follow_their_places(tmp_path):
    """On each kind of split: the places of its tokens, as the coupling divides them."""
    fields = {"flow__kinds": "('channels', 'spatial')", "flow__num_couplings": 12}
    run = prepare("jet", **fields)
    old = leave(run, tmp_path)

    def tables(grid):
        patterns = coupling.layer_patterns(12, ("channels", "spatial"))
        return [seen_places(p, grid) if p else places(grid) for p in patterns]

    net = old.ema["blocks_0"]["layers"]["net"]
    values = np.stack([linear(table) for table in tables((4, 4))])
    net["position"] = jnp.broadcast_to(values[..., None], net["position"].shape)
    save(old, run, tmp_path, step=8)
    new, table = begin("jet", tmp_path, (16, 12, 1), **fields)
    position = np.asarray(new.params["blocks_0"]["layers"]["net"]["position"])
    for actual, expected in zip(position, tables((8, 6)), strict=True):
        within = inside(expected, (4, 4))
        wanted = np.repeat(linear(expected)[within, None], position.shape[-1], axis=1)
        np.testing.assert_allclose(actual[within], wanted, rtol=1e-6)
    assert fates(table)["blocks_0/layers/net/position"] == "resampled: 4x4 -> 8x6"
    same_patterns = "fresh: the same patterns, 4x4 -> 8x6"
    assert fates(table)["constants/blocks_0/token_order"] == same_patterns
    assert f", {12 * 48 * 32:,} resampled, 0 fresh, 0 dropped" in table
    expected = coupling.splits(12, ("channels", "spatial"), (8, 6), 4).token_order
    np.testing.assert_array_equal(splits_of(new)["token_order"], expected)


@pytest.mark.parametrize("shape", [(8, 16, 1), (4, 16, 1)], ids=["more tokens", "as many tokens"])
def test_position_embeddings_of_a_tarflow_follow_their_places(shape, tmp_path):
    """In image order, in blocks of either direction; the learned prior likewise."""
    old = leave(prepare("volume preserving", train__ema_decay=0.0), tmp_path)
    new, table = begin("volume preserving", tmp_path, shape)
    weights = between_grids((4, 4), (shape[0] // 2, shape[1] // 2))
    pairs = [(old.params[b]["position"], new.params[b]["position"])
             for b in ("blocks_0", "blocks_1")]  # fmt: skip
    pairs.append((old.collections["prior"]["variance"], new.collections["prior"]["variance"]))
    for before, after in pairs:
        np.testing.assert_allclose(after, weights @ np.asarray(before, np.float64), atol=1e-6)
    resampled = f"resampled: 4x4 -> {shape[0] // 2}x{shape[1] // 2}"
    assert fates(table)["blocks_*/position (2)"] == resampled
    assert fates(table)["prior/variance"] == resampled


def side(name, *arguments, data="toy", **fields) -> Side:
    run = prepare(name, *arguments, **fields)
    return Side(run.trainer.flow, run.config.to_dict() | {"data": {"name": data}})


@pytest.mark.parametrize(
    ("name", "old", "new", "fate", "why"),
    [
        ("jet", (3, "a/8"), (3, "a/16"), "loaded", "the classes of a"),
        ("tarflow", (3, "afhq/64"), (3, "afhq_v2/128"), "loaded", "the classes of afhq"),
        ("jet", (3, "a"), (3, "b"), "fresh", "3 classes of b, not the 3 of a"),
        ("tarflow", (3, ""), (3, "b"), "fresh", "not the 3 of data that its config does not name"),
        ("jet", (3, "a"), (5, "a"), "fresh", "5 classes of a, not the 3 of a"),
        ("tarflow", (0, "a"), (3, "a"), "fresh", "that run has no labels"),
        ("jet", (3, "a"), (0, "a"), "dropped", "this flow has no labels"),
    ],
)
def test_class_embeddings(name, old, new, fate, why):
    sides = [side(name, (8, 8, 1), classes, data=data) for classes, data in (old, new)]
    plan = make_plan(*sides)
    actual = {each for path, each in plan.items() if path.endswith("class_embedding")}
    assert {each.fate for each in actual} == {fate} and all(why in each.why for each in actual)
    assert {each.fate for each in {*plan.values()} - actual} == {"loaded"}


def test_fresh_embeddings_are_those_of_a_fresh_training(tmp_path):
    old = leave(prepare("jet", (8, 8, 1), 3, data__name="a"), tmp_path)
    new, table = begin("jet", tmp_path, (8, 8, 1), 5, data__name="a")
    fresh, _ = prepare("jet", (8, 8, 1), 5).fresh_state()
    old, new, fresh = (checksums.flatten(tree) for tree in (old.ema, new.params, fresh.params))
    for path, array in new.items():
        source = fresh if path.endswith("class_embedding") else old
        np.testing.assert_array_equal(array, source[path])
    assert f"{5 * 5 * 32:,} fresh, 0 dropped" in table


@pytest.mark.parametrize(
    ("shape", "fields", "message"),
    [
        ((8, 8, 1), {"flow__width": 64}, "config.flow.width is 32 there and 64 here, "
         "params/blocks_0/layers/net/layers/mlp_in/bias is 5x1x128 there and 5x1x256 here"),
        ((8, 8, 1), {"flow__num_heads": 4}, "config.flow.num_heads is 2 there and 4 here; set"),
        ((8, 8, 3), {}, "config.channels is 1 there and 3 here, params/"),
    ],
)  # fmt: skip
def test_other_differences_are_refused(shape, fields, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        make_plan(side("jet"), side("jet", shape, **fields))


# Whole trainings.

FINETUNE = {"train__steps": 6, "train__checkpoint_every": 4, "train__sample_every": 0}
FINETUNE |= {"train__seed": 1, "optim__lr": 1e-3}
FINETUNE |= {"eval__guidance": 0.0, "eval__denoise": False}  # which takes long to compile
ON_DIGITS = {"flow__patch_size": 4, "data__name": "digits"}


def test_interrupted_without_its_source_it_ends_the_same(tmp_path, capsys):
    source, whole, cut = (tmp_path / name for name in ("source", "whole", "cut"))
    leave(prepare("tarflow", (8, 8, 1), 10, **ON_DIGITS), source)
    arguments = FINETUNE | {"init_from": source}
    assert tiny_runs.train("tarflow", whole, **arguments) == 0
    printed = capsys.readouterr().err
    assert f"6 steps of 16 images each, from {source}" in printed
    row = r"  blocks_\*/class_embedding \(2\) +10x32 +loaded: the classes of digits +640\n"
    assert re.search(row, printed)
    progress = Reporter.progress

    def interrupted(self, step, *arguments, **options):
        if step == 1:
            raise RuntimeError("lost power")
        progress(self, step, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reporter, "progress", interrupted)
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
    averages = {path.removeprefix("ema/"): a for path, a in before.items() if path[:4] == "ema/"}
    stay = {path: "position" in path or "qkv" in path for path in averages}
    assert {*stay.values()} == {True, False}
    for path, array in averages.items():
        for field in ("ema", "params"):
            same = after[f"{field}/{path}"].tobytes() == array.tobytes()
            assert same == stay[path], path
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
    _, printed = process.communicate(timeout=900)
    assert process.returncode == 0, printed
    assert "on 8 x cpu (data 2 and fsdp 2 and tensor 2)" in printed
    tiny_runs.assert_metrics_near(tmp_path / "eight", tmp_path / "one", rel=1e-5)
    (_, a), (_, b) = read_state(tmp_path / "eight"), read_state(tmp_path / "one")
    frozen = [path for path in b if path.startswith(("params", "ema")) and "position" in path]
    assert frozen and all(a[path].tobytes() == b[path].tobytes() for path in frozen)
