"""Sweeps that compare samples with real images, by the small network."""

import csv
from pathlib import Path

import numpy as np
import pytest
import small_network
import tiny_runs

from jetflow import cli
from jetflow.evals import evaluation
from jetflow.tools.sweep.folder import Folder

SWEEP = '''"""Samples of two kinds."""

from jetflow.sweeps import Sweep, axis, product


def get_sweep():
    return Sweep(
        GRID,
        metrics=("fid", "sample_accuracy"),
        config="ROOT/configs/digits_tarflow.py",
        fixed={"num_samples": 60, "batch_size": 64, "draws": 1},
        pictures=4,
    )
'''


@pytest.fixture(autouse=True)
def small(monkeypatch):
    small_network.install(monkeypatch)


def arguments(folder: Path, grid: str, run: Path) -> list[str]:
    folder.mkdir(exist_ok=True)
    path = folder / "sweep.py"
    path.write_text(SWEEP.replace("GRID", grid).replace("ROOT", str(tiny_runs.ROOT)))
    return ["sweep", "--sweep", str(path), f"--workdir={folder}/swept", f"--run={run}"]


def table(folder: Path, capsys) -> str:
    capsys.readouterr()
    assert cli.main(["report", f"{folder}/swept", "--format=csv"]) == 0
    return capsys.readouterr().out


def test_interrupted_and_resumed_it_finds_the_same(trained, tmp_path, monkeypatch, capsys):
    """In the evaluation of the second point, after its samples."""
    grid, run = "axis('guidance', [0.0, 4.0])", trained("tarflow")
    assert cli.main(arguments(tmp_path / "whole", grid, run)) == 0
    accuracy, calls = evaluation._Likelihoods.measure, []

    def interrupt(likelihoods, metric):
        calls.append(likelihoods.options.guidance)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return accuracy(likelihoods, metric)

    monkeypatch.setattr(evaluation._Likelihoods, "measure", interrupt)
    command = arguments(tmp_path / "parts", grid, run)
    assert cli.main(command) == 130
    assert [record["number"] for record in Folder(tmp_path / "parts/swept").records()] == [0]
    assert cli.main(command) == 0
    assert calls == [0.0, 4.0, 4.0]
    whole = table(tmp_path / "whole", capsys)
    assert table(tmp_path / "parts", capsys) == whole
    first, second = csv.DictReader(whole.splitlines())
    assert first["fid"] != second["fid"] and 0 <= float(first["sample_accuracy"]) <= 1


def test_each_data_set_has_its_reference(trained, tmp_path, capsys):
    """And each number of features, at one sampling of a flow."""
    data = ["photos/china8", "photos/flower8"]
    grid = f"product(axis('reference_data', {data}), axis('num_features', [50, 60]))"
    command = arguments(tmp_path, grid, trained("tarflow"))
    assert cli.main([*command, "--fix=reference_split=test"]) == 0
    records = Folder(tmp_path / "swept").records()
    found = [record["results"][0]["reference"] for record in records]
    assert [reference["data"]["name"] for reference in found] == [data[0]] * 2 + [data[1]] * 2
    made = list((tmp_path / "swept").glob("reference-*.npz"))
    assert len(made) == len({reference["checksum"] for reference in found}) == 4
    fids = np.array([record["metrics"]["fid"] for record in records])
    assert fids[0] == pytest.approx(fids[1]) and fids[2] == pytest.approx(fids[3])
    assert abs(fids[0] - fids[2]) > 0.01 * fids[0]
