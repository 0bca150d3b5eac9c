"""`jetflow bench`, as a user calls it."""

import json
import time

import jax
import pytest
import tiny_runs

import jetflow
from jetflow import cli, configs
from jetflow.data import dataset
from jetflow.tools import throughput

pytestmark = pytest.mark.usefixtures("compilation_cache")


def bench(name, *arguments):
    config = tiny_runs.arguments("jet", "")[1:-2]
    return cli.main(["bench", name, *config, *map(str, arguments)])


def slow_reading(monkeypatch, seconds):
    read = dataset._read

    def slowly(*arguments):
        time.sleep(seconds)
        return read(*arguments)

    monkeypatch.setattr(dataset, "_read", slowly)


@pytest.mark.parametrize("workers", [0, 1])
def test_data(workers, monkeypatch, capsys):
    monkeypatch.setattr(throughput, "ROUND_SECONDS", 0.2)
    arguments = ("--repeats", 2, "--workers", workers, "--batch_size", 8)
    assert bench("data", "--json", *arguments) == 0
    line = json.loads(capsys.readouterr().out)
    assert (line["data"], line["split"], line["workers"]) == ("digits", "train", workers)
    least, most = line["images_per_second_range"]
    assert 0 < least <= line["images_per_second"] <= most
    assert line["megabytes_per_second"] == pytest.approx(line["images_per_second"] * 64 / 1e6)
    assert line["images_per_core_second"] > 0 and line["first_batch_seconds"] > 0


def test_reading_measures_the_source(monkeypatch):
    """Of batches that take 50 ms each, in two threads, no more than 40 come in a second."""
    slow_reading(monkeypatch, 0.05)
    config = configs.read(f"{tiny_runs.ROOT}/configs/digits_tarflow.py")
    speed = jetflow.bench.bench_data(config, batch_size=10, repeats=2)
    assert 0 < speed.images_per_second < 1.3 * 400
    assert speed.images_per_core_second > speed.images_per_second  # it sleeps most of the time


def test_train(monkeypatch, capsys):
    monkeypatch.setitem(throughput.PEAK_FLOPS, "cpu", 1e12)
    assert bench("train", "--json", "--steps", 2, "--repeats", 2) == 0
    line = json.loads(capsys.readouterr().out)
    least, most = line["step_seconds_range"]
    assert line["batch_size"] == 16 and "cpu" in line["device"]
    assert 0 < least <= line["step_seconds"] <= most
    assert line["images_per_second"] == pytest.approx(16 / line["step_seconds"])
    assert line["utilisation"] == pytest.approx(line["model_flops"] / line["step_seconds"] / 1e12)
    # 16 images, thrice forward, 2 FLOPs, 4 tokens, 5 layers of 12 W² and some more at their ends.
    matrices = 16 * 3 * 2 * 4 * 5 * 12 * 32**2
    assert matrices < line["model_flops"] < 1.2 * matrices
    assert line["peak_bytes"] > 0


def test_train_waits_for_slow_data(monkeypatch, capsys):
    slow_reading(monkeypatch, 0.3)
    assert bench("train", "--steps", 4, "--repeats", 3) == 0
    lines = [line.split("|")[1:3] for line in capsys.readouterr().out.splitlines()]
    figures = {name.strip(): value.strip() for name, value in lines}
    assert 0.4 < float(figures["data_wait_share"]) <= 1


def test_sample(trained, capsys):
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


def test_sample_of_random_weights(capsys):
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
