"""`jetflow bench train` and `bench data`, as a user calls them."""

import json
import time

import pytest
import tiny_runs

from jetflow import cli
from jetflow.data import dataset as pipeline
from jetflow.tools.bench import training

pytestmark = pytest.mark.usefixtures("compilation_cache")


def bench(what, *arguments, **fields):
    config = tiny_runs.arguments("jet", "", **fields)[1:-2]
    return cli.main(["bench", what, *config, *map(str, arguments)])


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_data_as_json(monkeypatch, capsys):
    monkeypatch.setattr(training, "ROUND_SECONDS", 0.2)
    assert bench("data", "--json", "--repeats", 2, "--workers", "0", "--batch_size", 8) == 0
    assert bench("data", "--json", "--repeats", 1, "--workers", "0") == 0
    first, second = lines(capsys)
    assert (first["data"], first["split"], first["workers"]) == ("digits", "train", 0)
    assert (first["batch_size"], second["batch_size"]) == (8, 16)
    for line in (first, second):
        least, most = line["images_per_second_range"]
        assert 0 < least <= line["images_per_second"] <= most
        assert line["megabytes_per_second"] == pytest.approx(line["images_per_second"] * 64 / 1e6)
        assert line["images_per_core_second"] > 0
        assert line["first_batch_seconds"] > 0
        assert line["cores"] >= 1


def test_data_by_a_worker(monkeypatch, capsys):
    monkeypatch.setattr(training, "ROUND_SECONDS", 0.2)
    assert bench("data", "--repeats", 1, "--workers", "1") == 0
    title, _, line = capsys.readouterr().out.splitlines()
    assert title.startswith("digits 1.0.0 train: 1,500 images of 8x8x1") and "of 16" in title
    assert line.split()[0] == "1" and all(float(x.replace(",", "")) > 0 for x in line.split())


def test_reading_measures_the_source(monkeypatch):
    """Of batches that take 50 ms each, in two threads, no more than 40 come in a second."""
    read = pipeline._read

    def slowly(*arguments):
        time.sleep(0.05)
        return read(*arguments)

    monkeypatch.setattr(pipeline, "_read", slowly)
    dataset = pipeline.load("digits", "test")
    found = training.reading(dataset, batch_size=10, workers=0, repeats=2)
    assert 20 < found.images_per_second < 1.3 * 400
    assert found.images_per_core_second > found.images_per_second  # it sleeps most of the time


def test_train_as_json(capsys):
    assert bench("train", "--json", "--steps", 2, "--repeats", 2) == 0
    (line,) = lines(capsys)
    least, most = line["step_seconds_range"]
    assert line["batch_size"] == 16
    assert 0 < least <= line["step_seconds"] <= most
    assert line["steps_per_second"] == pytest.approx(1 / line["step_seconds"])
    assert line["images_per_second"] == pytest.approx(16 / line["step_seconds"])
    assert line["images_per_second_with_data"] == pytest.approx(16 / line["step_seconds_with_data"])
    assert 0 <= line["data_wait_share"] <= 1
    assert line["utilisation"] is None  # nobody has stated a CPU's peak
    assert "cpu" in line["device"]
    assert line["peak_bytes"] > 0


def test_train_waits_for_slow_data(monkeypatch, capsys):
    read = pipeline._read

    def slowly(*arguments):
        time.sleep(0.3)
        return read(*arguments)

    monkeypatch.setattr(pipeline, "_read", slowly)
    assert bench("train", "--steps", 4, "--repeats", 3) == 0
    text = capsys.readouterr().out
    share = float(text.split("% of it waiting")[0].split()[-1])
    assert 40 < share <= 100


def test_utilisation_where_the_peak_is_known(monkeypatch, capsys):
    monkeypatch.setitem(training.PEAK_FLOPS, "cpu", 1e12)
    assert bench("train", "--json", "--steps", 1, "--repeats", 1) == 0
    (line,) = lines(capsys)
    rate = line["model_flops"] * line["steps_per_second"]
    assert line["utilisation"] == pytest.approx(rate / 1e12)
    # 16 images, thrice forward, 2 FLOPs, 4 tokens, 5 layers of 12 W² and some more at their ends.
    matrices = 16 * 3 * 2 * 4 * 5 * 12 * 32**2
    assert matrices < line["model_flops"] < 1.2 * matrices
    assert training.PEAK_FLOPS["TPU v5 lite"] == 197e12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected `jetflow bench WHAT`, where WHAT is one of sample, train, data"),
        (["trian"], "'trian' cannot be measured"),
        (["data"], "--config is missing"),
        (["train"], "--config is missing"),
        (["sample"], "--workdir is missing"),
        (["train", "--workers", "2"], "Unknown command line flag 'workers'"),
    ],
)
def test_bad_input(arguments, message, capsys):
    assert cli.main(["bench", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_workers_are_numbers(capsys):
    assert bench("data", "--workers", "two") == 2
    assert "--workers has 'two'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "flag"), [("sample", "methods"), ("train", "steps"), ("data", "workers")]
)
def test_help(what, flag, capsys):
    assert cli.main(["bench", what, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"--{flag}: " in text and "--json: " in text
    assert cli.main(["bench", "--help"]) == 0
    assert f"jetflow bench {what} " in capsys.readouterr().out
