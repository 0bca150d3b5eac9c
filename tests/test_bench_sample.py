"""`jetflow bench sample`, as a user calls it."""

import json

import jax
import pytest
import tiny_runs

import jetflow
from jetflow import cli

pytestmark = pytest.mark.usefixtures("compilation_cache")


def test_json(trained, capsys):
    arguments = ["bench", "sample", "--workdir", trained("tarflow"), "--batch_sizes", "2,4"]
    arguments += ["--repeats", 2, "--json"]
    variables = jetflow.load_model(trained("tarflow")).variables
    parameters = sum(x.size for x in jax.tree.leaves(variables))
    capsys.readouterr()
    assert cli.main(list(map(str, arguments))) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["batch_size"], line["method"]) for line in lines] == [
        (2, "cached"), (2, "jacobi"), (4, "cached"), (4, "jacobi"),
    ]  # fmt: skip
    for line in lines:
        least, most = line["seconds_range"]
        assert 0 < least <= line["seconds"] <= most
        assert line["images_per_second"] == pytest.approx(line["batch_size"] / line["seconds"])
        assert line["token_by_token"] == [3, 3]
        assert all(1 <= sweeps <= 3 for sweeps in line["sweeps"])
        assert line["peak_bytes"] > parameters * 4
        assert "cpu" in line["device"]
    assert lines[0]["sweeps"] == [3, 3]


def test_random_weights(capsys):
    """Of a config, whose data set need not be there."""
    name = tiny_runs.ROOT / "configs" / "imagenet64_tarflow.py"
    arguments = ["bench", "sample", f"--config={name}", "--batch_sizes=2", "--repeats=1", "--json"]
    small = ["--config.flow.width=64", "--config.flow.num_blocks=1", "--config.flow.patch_size=16"]
    arguments += [*small, "--config.flow.layers_per_block=(1,)"]
    assert cli.main([*arguments, "--methods=cached"]) == 0
    [line] = map(json.loads, capsys.readouterr().out.splitlines())
    assert line["token_by_token"] == [15] and line["images_per_second"] > 0
    assert cli.main(arguments) == 2
    assert "give a trained flow (workdir), or cached alone" in capsys.readouterr().err
