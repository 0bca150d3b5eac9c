"""Whether a run fits on other devices: said before it compiles, with what to change."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
import tiny_runs

from jetflow import sharding
from jetflow.data.dataset import load
from jetflow.training import footprint
from jetflow.training.experiment import Run, set_up
from jetflow.workdir import scan_environments


@pytest.fixture
def resumed(trained, compilation_cache, tmp_path):
    """A copy of a run that stopped at step 10."""
    workdir = shutil.copytree(trained("tarflow"), tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "12")
    return workdir


@pytest.fixture(scope="module")
def run(data_dir):
    return set_up(tiny_runs.config("tarflow"), load)


def edit_environment(workdir, **facts):
    path = workdir / "environment.json"
    environments = json.loads(path.read_text())
    path.write_text(json.dumps([*environments[:-1], environments[-1] | facts]))


def test_a_run_keeps_what_its_step_takes(trained):
    ((environment,), _) = scan_environments(trained("tarflow"))
    assert environment["images_at_once"] == tiny_runs.COMMON["train.batch_size"] // 2
    assert environment["bytes_beside_state"] > 0


def test_what_does_not_fit_is_said_with_an_accumulation_that_does(
    run, resumed, trained, monkeypatch, capsys
):
    """As if it had run on twice the devices, each with half of the images."""
    ((environment,), _) = scan_environments(resumed)
    beside = environment["bytes_beside_state"]
    edit_environment(resumed, devices="2 x cpu", images_at_once=4, bytes_beside_state=beside // 2)
    state = sharding.bytes_per_device(run.abstract_state)
    monkeypatch.setattr(sharding, "memory_of", lambda mesh: state + int(beside * 0.6))
    assert tiny_runs.train("tarflow", resumed) == 0
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if "by what it took on 2 x cpu" in line]
    assert said.index(line) < said.index("compiling the training step")
    field, value = re.search(r"--config\.(train\.accumulation)=(\d+)", line).groups()
    assert value == "4"  # of 8 images at once, 4
    shutil.rmtree(resumed / "checkpoints" / "12")
    assert tiny_runs.train("tarflow", resumed, **{field.replace(".", "__"): int(value)}) == 0
    assert "took on" not in capsys.readouterr().err
    one, other = (tiny_runs.remains(path) for path in (resumed, trained("tarflow")))
    for path, array in other.state.items():
        np.testing.assert_allclose(one.state[path], array, rtol=1e-4, atol=1e-6, err_msg=path)
    for line, expected in zip(one.metrics, other.metrics, strict=True):
        names = [name for name in expected if "bpd" in name or name == "gradient_norm"]
        assert [line[name] for name in names] == pytest.approx(
            [expected[n] for n in names], rel=1e-5
        )


def test_a_run_that_fits_is_told_nothing(resumed, monkeypatch, capsys):
    monkeypatch.setattr(sharding, "memory_of", lambda mesh: 1 << 40)
    edit_environment(resumed, devices="2 x cpu")
    assert tiny_runs.train("tarflow", resumed) == 0
    assert "took on" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("facts", "memory", "expected"),
    [
        ({}, 0.1, ""),  # the same devices: it ran
        ({"devices": "2 x cpu"}, 0.1, "no accumulation helps"),  # one image at once is too many
        ({"devices": "2 x cpu"}, 0.3, "train.accumulation=8 "),
        ({"devices": "2 x cpu"}, 0.6, "train.accumulation=4 "),
        ({"devices": "2 x cpu"}, 1.1, ""),
        ({"devices": "2 x TPU v4"}, 0.1, ""),  # another compiler's program
        ({"images_at_once": ...}, 0.1, ""),  # of an older version
    ],
)
def test_the_accumulation_that_would_fit(run, monkeypatch, facts, memory, expected):
    beside, images = 8_000_000_000, footprint._images(run, 2)
    assert images == 8
    known = {"devices": "1 x cpu", "images_at_once": images, "bytes_beside_state": beside, **facts}
    known = {name: value for name, value in known.items() if value is not ...}
    state = sharding.bytes_per_device(run.abstract_state)
    monkeypatch.setattr(sharding, "memory_of", lambda mesh: state + int(memory * beside))
    text = footprint.doubt(run, [known | {"bytes_beside_state": 1}, known, {"from_step": 3}])
    assert expected in text and bool(expected) == bool(text)


def test_accumulations_begin_with_the_next_one():
    once = set_up(tiny_runs.config("tarflow", train__accumulation=1), load)
    assert [*footprint._accumulations(once)] == [2, 4, 8, 16]


def test_a_step_that_does_not_fit_is_one_line(run, resumed, monkeypatch, capsys):
    def lower(self, *_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in hbm")

    monkeypatch.setattr(Run, "lower_step", lower)
    assert tiny_runs.train("tarflow", resumed) == 2
    assert "--config.train.accumulation=4" in capsys.readouterr().err.splitlines()[-1]


def test_another_error_of_the_device_is_not_about_memory(run):
    with pytest.raises(jax.errors.JaxRuntimeError), footprint.explained(run):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
