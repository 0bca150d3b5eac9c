"""Sweeps that compare samples with real images, by the small network."""

import numpy as np
import pytest
import small_network

import jetflow
from jetflow.sweeps import Sweep, axis, product


@pytest.fixture(autouse=True)
def small(monkeypatch, fresh_traces):
    small_network.install(monkeypatch)


def test_each_data_set_has_its_reference(trained, tmp_path):
    """And each number of features, at one sampling of a flow; metrics come in the order asked."""
    data = ["photos/china8", "photos/flower8"]
    sweep = Sweep(
        product(axis("reference_data", data), axis("num_features", [50, 60])),
        metrics=("fid", "precision_recall", "bpd", "sample_accuracy"),
        fixed={"num_samples": 60, "batch_size": 64, "draws": 1, "reference_split": "test"},
        pictures=4,
    )
    records = jetflow.sweep(sweep, tmp_path, run=trained("tarflow"))
    assert [record["status"] for record in records] == ["done"] * 4, records
    assert [*records[0]["metrics"]] == ["fid", "precision", "recall", "bpd", "sample_accuracy"]
    references = [record["results"][0]["reference"] for record in records]
    assert [one["data"]["name"] for one in references] == [data[0]] * 2 + [data[1]] * 2
    made = list(tmp_path.glob("reference-*.npz"))
    assert len(made) == len({one["checksum"] for one in references}) == 4
    fids = np.array([record["metrics"]["fid"] for record in records])
    assert fids[0] == pytest.approx(fids[1]) and fids[2] == pytest.approx(fids[3])
    assert abs(fids[0] - fids[2]) > 0.01 * fids[0]
    assert len({record["metrics"]["bpd"] for record in records}) == 1
