"""`jetflow bench train` and `bench data`, as a user calls them."""

import json
import time

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
