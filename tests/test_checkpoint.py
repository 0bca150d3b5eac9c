"""Checkpoints: what comes back is, bit for bit, what was saved at the step that is reported."""

import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jetflow import checkpoint, checksums, hosts
from jetflow.checkpoint import Checkpoints, NotFinite
from jetflow.training.step import TrainState
from jetflow.types import UsageError

# A failed restore must not litter the terminal with the tracebacks of Orbax's other reads.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")

CONFIG = {"flow": {"width": 64}, "optim": {"lr": 3e-4}, "kinds": ["channels", "spatial"]}


def make_state(step: int, ema: bool = True) -> TrainState:
    keys = jax.random.split(jax.random.key(step), 2)
    params = {
        "dense": {"kernel": jax.random.normal(keys[0], (32, 48)), "bias": jnp.ones(48) / step},
        "half": jax.random.normal(keys[1], (7, 3), jnp.bfloat16),
    }
    optimizer = optax.adam(1e-3, mu_dtype=jnp.bfloat16).init(params)
    words = jnp.array([0x7FC00001, 0xFF800000, 0x80000000, 0x00000001, 0x7F800001], jnp.uint32)
    special = jax.lax.bitcast_convert_type(words, jnp.float32)
    return TrainState(
        step=jnp.int32(step),
        params=params,
        collections={"constants": {"mask": words % 2 == 0, "special": special}, "empty": {}},
        opt_state=jax.tree.map(lambda leaf: leaf + jnp.ones_like(leaf) * step, optimizer),
        ema=jax.tree.map(lambda leaf: leaf * 0.5, params) if ema else None,
    )


def abstract(tree: Any) -> Any:
    return jax.eval_shape(lambda tree: tree, tree)


def assert_same(actual: Any, expected: Any) -> None:
    """Equal in every bit, of NaNs too."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


def save_steps(directory, *steps: int) -> None:
    with Checkpoints(directory, keep=len(steps)) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), CONFIG)


def restore(directory, step=None) -> tuple[TrainState, int]:
    with Checkpoints(directory) as checkpoints:
        return checkpoints.restore(abstract(make_state(1)), step)


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    """The warnings that jetflow.checkpoint logs."""
    lines = []
    monkeypatch.setattr(
        checkpoint.logging, "warning", lambda message, *args: lines.append(message % args)
    )
    return lines


# Round trips


@pytest.mark.parametrize("ema", [False, True])
def test_round_trip_of_a_state_and_of_its_parts(tmp_path, ema):
    state = make_state(3, ema)
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        assert checkpoints.latest() is None
        with pytest.raises(
            UsageError, match=r"no checkpoint in .*; train first .* --workdir .*run`"
        ):
            checkpoints.restore(abstract(state))
        assert not (tmp_path / "run").exists()
        checkpoints.save(3, state, CONFIG)
        restored, step = checkpoints.restore(abstract(state))
        assert step == checkpoints.latest() == 3
        assert_same(restored, state)
        part = {"ema": state.ema, "collections": state.collections}
        assert_same(checkpoints.restore(part)[0], part)
        with pytest.raises(UsageError, match=r"ema/dense/bias is (float32\[48\]|absent) there"):
            checkpoints.restore({"ema": None if ema else state.params})
    record = json.loads((tmp_path / "run/checkpoints/3/record/metadata").read_text())
    assert record["config"] == CONFIG
    assert record["arrays"]["opt_state/0/mu/dense/kernel"][0] == "bfloat16[32,48]"


def test_donation_right_after_saving(tmp_path):
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = {"params": {str(i): jnp.full((1 << 20,), float(i)) for i in range(4)}}
    expected = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state, {})
        for _ in range(5):
            state = step(state)
        assert_same(checkpoints.restore(abstract(state))[0], expected)


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


@pytest.mark.parametrize("harm", [flip, truncate, lambda path: path.unlink()])
def test_every_file(tmp_path, harm, warnings):
    """Whichever file is harmed: the state is that of the step, or the step is passed over."""
    save_steps(tmp_path / "whole", 1, 2)
    files = [path for path in (tmp_path / "whole" / "2").rglob("*") if path.is_file()]
    assert len(files) > 8
    noticed = 0
    for file in files:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "copy")
        harm(tmp_path / "copy" / file.relative_to(tmp_path / "whole"))
        warnings.clear()
        restored, step = restore(tmp_path / "copy")
        assert_same(restored, make_state(step))
        assert len(warnings) == 2 - step
        noticed += 2 - step
    assert noticed >= 3  # the record, the index and the data


@pytest.mark.parametrize("old, new", [("0.0003", "0.0004"), ("[32,48]", "[32,49]"), ("{", "")])
def test_a_changed_record(tmp_path, old, new, warnings):
    save_steps(tmp_path, 1, 2)
    path = tmp_path / "2" / "record" / "metadata"
    path.write_text(path.read_text().replace(old, new))
    assert restore(tmp_path)[1] == 1
    assert len(warnings) == 1


def test_no_fallback_for_a_named_step_nor_where_all_are_damaged(tmp_path, warnings):
    save_steps(tmp_path, 1, 2)
    shutil.rmtree(tmp_path / "2" / "state")
    with pytest.raises(UsageError, match=r"checkpoint 2 in .* is damaged: .*steps there: \[1]"):
        restore(tmp_path, 2)
    with pytest.raises(UsageError, match=r"no checkpoint of step 5 in .*; it has \[1, 2]"):
        restore(tmp_path, 5)
    assert restore(tmp_path, 1)[1] == 1
    truncate(biggest_file(tmp_path / "1" / "state"))
    with pytest.raises(UsageError, match=r"every checkpoint in .* \(steps \[1, 2]"):
        restore(tmp_path)
    assert len(warnings) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}  # reading deletes nothing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {"params": {**state.params, "half": jnp.zeros((7, 3))}},
         r"params/half is bfloat16\[7,3\] there and float32\[7,3\] here"),
        (lambda state: {"opt_state": optax.sgd(1.0, momentum=0.9).init(state.params)},
         r"opt_state/0/\S+ is \S+ there and absent here, .*and \d+ more; use the config"),
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


def attention_state(kernel, bias) -> dict[str, Any]:
    """A layer's, with its moments."""
    ones = jnp.arange(2 * 8 * 24, dtype=jnp.float32)
    params = {"qkv": {"kernel": ones.reshape(kernel), "bias": ones[:48].reshape(bias)}}
    moments = optax.adam(1e-3).init(params)
    moments = jax.tree.map(lambda a: a + ones[: a.size].reshape(a.shape).astype(a.dtype), moments)
    return {"params": params, "opt_state": moments}


def test_query_key_and_value_of_version_0_1_are_rearranged(tmp_path, warnings):
    """They were side by side in one axis. Any other shape is refused."""
    old, new = attention_state((2, 8, 24), (2, 24)), attention_state((2, 8, 3, 8), (2, 3, 8))
    with Checkpoints(tmp_path / "old") as checkpoints:
        checkpoints.save(1, old, CONFIG)
        assert_same(checkpoints.restore(abstract(new))[0], new)
        assert_same(checkpoints.restore(abstract(old))[0], old)
        for shape in ((2, 8, 3, 7), (2, 3, 8, 8), (2, 8, 12)):
            kernel = jax.ShapeDtypeStruct(shape, jnp.float32)
            other = {"params": {"qkv": {"kernel": kernel, "bias": new["params"]["qkv"]["bias"]}}}
            message = rf"qkv/kernel is float32\[2,8,24\] there and float32\[{shape[0]},{shape[1]},"
            with pytest.raises(UsageError, match=message):
                checkpoints.restore(other)
    path = tmp_path / "old" / "1" / "record" / "metadata"
    record = json.loads(path.read_text())
    record["arrays"]["params/qkv/kernel"][1] = "0" * 8
    path.write_text(json.dumps(checksums.seal({key: record[key] for key in ("config", "arrays")})))
    with pytest.raises(UsageError, match="damaged: the checksum of params/qkv/kernel is"):
        Checkpoints(tmp_path / "old").restore(abstract(new), 1)
    with Checkpoints(tmp_path / "new") as checkpoints:
        checkpoints.save(1, new, CONFIG)
        assert_same(checkpoints.restore(abstract(new))[0], new)
        with pytest.raises(UsageError, match="does not fit"):
            checkpoints.restore(abstract(old))


# What stays on disk


def test_retention(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, keep=2, keep_every=4) as checkpoints:
        for step in range(1, 12):
            checkpoints.save(step, {"params": jnp.full(3, step)}, {})
        checkpoints.wait()
        assert checkpoints.steps() == [4, 8, 10, 11]
        checkpoints.save(9, {"params": jnp.full(3, 9)}, {})  # older, yet the last saved
        checkpoints.wait()
        assert checkpoints.steps() == [4, 8, 9, 11]
        monkeypatch.setattr(hosts, "agreed", lambda steps: steps[:-1])  # as the first process saw
        assert checkpoints.restore({"params": jnp.zeros(3, int)})[1] == 9


@pytest.mark.parametrize("field", ["params", "ema"])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, field):
    state = make_state(2)
    broken = {**getattr(state, field), "half": jnp.full((7, 3), jnp.inf, jnp.bfloat16)}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, make_state(1), CONFIG)
        with pytest.raises(NotFinite):
            checkpoints.save(2, state.replace(**{field: broken}), CONFIG)
        checkpoints.wait()
        assert checkpoints.steps() == [1]


def test_an_interrupted_save_is_ignored(tmp_path):
    save_steps(tmp_path, 1)
    shutil.copytree(tmp_path / "1", tmp_path / "5.orbax-checkpoint-tmp")
    assert restore(tmp_path)[1] == 1
    assert (tmp_path / "5.orbax-checkpoint-tmp").exists()  # perhaps another process saves
    save_steps(tmp_path, 6)
    assert {path.name for path in tmp_path.iterdir()} == {"6"}


def test_a_damaged_step_does_not_outlive_the_next_save(tmp_path, warnings):
    save_steps(tmp_path, 10, 20, 30)
    truncate(tmp_path / "30" / "record" / "metadata")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.restore(abstract(make_state(1)))[1] == 20
        checkpoints.save(25, make_state(25), CONFIG)
        checkpoints.wait()
        assert checkpoints.steps() == [20, 25]
    assert len(warnings) == 1


def test_saving_a_step_twice(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), CONFIG)
        checkpoints.wait()
        (tmp_path / "1" / "mark").touch()
        checkpoints.save(1, make_state(1), {"train": {"log_every": 1}})
        assert (tmp_path / "1" / "mark").exists()  # the same arrays are left alone
        checkpoints.save(1, make_state(2), CONFIG)
        assert_same(checkpoints.restore(abstract(make_state(1)))[0], make_state(2))
    flip(biggest_file(tmp_path / "1" / "state"))
    with Checkpoints(tmp_path) as checkpoints:  # has not verified all of it, so writes it anew
        assert checkpoints.restore({"step": jnp.int32(0)})[1] == 1
        checkpoints.save(1, make_state(2), CONFIG)
        assert_same(checkpoints.restore(abstract(make_state(1)))[0], make_state(2))


def test_bad_input_fails_at_once(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(TypeError, match="JSON"):
            checkpoints.save(1, make_state(1), {"config": object()})
        clash = {"params": {"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}}
        with pytest.raises(ValueError, match="share a path"):
            checkpoints.save(1, clash, {})
    assert list(tmp_path.iterdir()) == []


# The checksum


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "uint8", "bool"])
def test_checksum_sees_every_bit_and_every_swap(dtype):
    with jax.enable_x64(dtype == "float64"):
        rng = np.random.default_rng(0)
        values = np.asarray(jnp.asarray(rng.integers(0, 100, size=(3, 5, 2)), dtype))
        whole = int(checksums.checksum(values))
        assert whole != int(checksums.checksum(values.reshape(5, 3, 2).swapaxes(0, 1)))
        for bit in [0] if dtype == "bool" else range(8 * values.itemsize):
            changed = values.copy()
            changed.view(np.uint8)[1, 2, values.itemsize + bit // 8] ^= 1 << bit % 8
            assert int(checksums.checksum(changed)) != whole
        for left, right in (((0, 0, 0), (2, 4, 1)), ((0, 1, 0), (1, 0, 0)), ((1, 2, 0), (1, 2, 1))):
            changed = values.copy()
            changed[left], changed[right] = values[right], values[left]
            assert (int(checksums.checksum(changed)) == whole) == (values[left] == values[right])
