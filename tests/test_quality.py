"""Samples against real images: statistics, references, and the metrics that compare them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_network
import tiny_runs

from jetflow import cli, load_model
from jetflow.data import dataset as pipeline
from jetflow.evals import features, inception
from jetflow.evals.evaluation import evaluate
from jetflow.evals.features import Statistics
from jetflow.evals.settings import DISTANCES, EvaluateOptions
from jetflow.model import Model
from jetflow.types import UsageError

STEP = tiny_runs.STEPS


@pytest.fixture(scope="module", autouse=True)
def small():
    """The small network for the FID's own."""
    with pytest.MonkeyPatch.context() as patch:
        small_network.install(patch)
        yield


# Statistics.


@pytest.mark.parametrize("batch_size", [23, 5, 64])
def test_each_image_counts_once(batch_size):
    """Whether the last batch is full, padded, or the only one."""
    arrays = small_network.network().arrays
    direct = np.asarray(small_network.activations(arrays, small_network.images())[0])
    statistics = small_network.collected(batch_size)
    assert statistics.done == 23
    for name, size in (("pooled", 48), ("spatial", 24)):
        mean, covariance = statistics.parts()[name]
        assert mean.dtype == np.float64
        np.testing.assert_allclose(mean, direct[:, :size].mean(0), atol=1e-5)
        np.testing.assert_allclose(covariance, np.cov(direct[:, :size].T), atol=1e-5)
    kept = statistics.arrays["features"]
    index = [np.abs(direct - row).max(1).argmin() for row in kept]
    assert len(kept) == small_network.KEPT
    assert (np.diff(index) > 0).all() and index[-1] > small_network.KEPT  # not only the first ones
    np.testing.assert_allclose(kept, direct[index], atol=1e-5)


def test_eight_devices_find_the_same(tmp_path):
    out = tmp_path / "eight.npz"
    process = subprocess.run(
        [sys.executable, small_network.__file__, out, "16", "data=2", "fsdp=2", "tensor=2"],
        env=tiny_runs.environment(JAX_NUM_CPU_DEVICES="8", NPROC="32"),
        capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    expected = small_network.collected(16).arrays
    with np.load(out) as eight:
        assert set(eight) == set(expected)
        for name, array in expected.items():
            np.testing.assert_allclose(eight[name], array, rtol=2e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("content", ["settings", b"", b"PK", None])
def test_only_whole_statistics_of_the_same_settings_are_taken_up(content, tmp_path):
    path, saved = tmp_path / "a.partial.npz", small_network.collected(8)
    saved.save(path, {"seed": 0})
    resumed = Statistics(23, small_network.KEPT)
    resumed.resume(path, {"seed": 0})
    for name, array in saved.arrays.items():
        np.testing.assert_array_equal(resumed.arrays[name], array)
    if content != "settings":
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    resumed = Statistics(23, small_network.KEPT)
    resumed.resume(path, {"seed": int(content == "settings")})
    assert resumed.done == 0 and not resumed.arrays["pooled_sum"].any()


# References.


def moments(size):
    rows = np.random.default_rng(0).standard_normal((10, size))
    return rows.mean(0), np.cov(rows.T)


def read(path, *, images=False, name=inception.PUBLISHED):
    def measure(images):
        assert [len(chunk) for chunk in images.chunks] == [8, 8, 7]
        return small_network.collected(8)

    network = small_network.network(name)
    return features.read_reference(path, network, measure, chunk=8, images=images)


def test_reference_is_read_as_written(tmp_path):
    statistics, path = small_network.collected(8), tmp_path / "some" / "reference.npz"
    data = pipeline.load("digits", "test").facts()
    features.write_reference(path, statistics, small_network.network("a"), data)
    parts, facts = read(path, images=True, name="a")
    for name in ("pooled", "spatial"):
        for actual, expected in zip(parts[name], statistics.parts()[name], strict=True):
            np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(parts["features"], statistics.arrays["features"])
    assert facts["data"] == data and facts["images"] == 23
    assert len(facts["checksum"]) == 16
    with pytest.raises(UsageError, match=r"made with weights_sha256 'aaaa.* has 'bbbb"):
        read(path, name="b")


def test_file_of_adm(tmp_path):
    """Moments, of more images than the file has, stay; single features are of its images."""
    mu, sigma = moments(48)
    path, images = tmp_path / "a.npz", small_network.images()
    np.savez(path, mu=mu, sigma=sigma)
    found = read(path)
    np.testing.assert_array_equal(found.part("pooled").covariance, sigma)
    for part, message in (("spatial", "has no mu_s and sigma_s"), ("features", "has no features")):
        with pytest.raises(UsageError, match=message):
            found.part(part)
    with pytest.raises(UsageError, match="was made with published_weights True"):
        read(path, name="a")
    np.savez(path, mu=mu, sigma=sigma, arr_0=images)
    found = read(path, images=True)
    np.testing.assert_array_equal(found.part("pooled").mean, mu)
    assert len(found.part("features")) == small_network.KEPT and found.facts["images"] is None
    assert "features" not in read(path).parts  # which nobody asked for
    np.savez(path, arr_0=images)
    found, expected = read(path), small_network.collected(8)
    np.testing.assert_array_equal(found.part("pooled").mean, expected.parts()["pooled"].mean)
    np.testing.assert_array_equal(found.part("features"), expected.arrays["features"])
    assert found.facts["images"] == 23 and found.facts["data"] is None


# Evaluations.


@pytest.fixture(scope="module")
def model(trained, tmp_path_factory):
    """A flow with a reference of some of its data, where the default one would be."""
    folder = tmp_path_factory.mktemp("quality") / "run"
    shutil.copytree(trained("tarflow"), folder)
    model = load_model(folder)
    assert measure(model, make_reference=True, reference_split="train[:40]", metrics=None) == {}
    made = folder / "evals" / "reference-digits-train%5B%3A40%5D.npz"
    made.rename(folder / "evals" / "reference-digits-train.npz")
    return model


def measure(model, *, metrics=("fid",), **fields):
    options = EvaluateOptions(metrics=metrics, batch_size=16, **fields)
    return {result["metric"]: result for result in evaluate(model, options)}


def test_command(model, capsys):
    arguments = ["--batch_size", "16", "--num_samples", "30", "--metrics", ",".join(DISTANCES)]
    assert cli.main(["evaluate", "--workdir", str(model.workdir), *arguments]) == 0
    said = capsys.readouterr().out
    names = ["fid", "sfid", "kid", "precision", "recall", "density", "coverage"]
    ending = f"{STEP:08d}-inception=aaaaaaaa,num_samples=30.json"
    by_name = {
        name: json.loads((model.workdir / "evals" / f"{name}-{ending}").read_text())
        for name in names
    }
    data = pipeline.load("digits", "train[:40]")
    for name, result in by_name.items():
        assert result["metric"] == name and result["value"] is not None
        assert result["network"] == {
            "weights_sha256": "a" * 64, "published_weights": False, "resize": inception.RESIZE
        }  # fmt: skip
        assert (result["samples"]["images"], result["samples"]["not_finite"]) == (30, 0)
        assert result["samples"]["temperature"] == 1 and result["samples"]["seed"] == 0
        assert result["reference"]["data"]["checksum"] == data.checksum()
        assert result["reference"]["images"] == 40
        assert (result["step"], result["weights"]) == (STEP, "ema")
    assert by_name["fid"]["value"] > by_name["sfid"]["value"] > 0  # of some of the features
    assert by_name["precision"]["k"] == 3 and by_name["density"]["k"] == 5
    assert by_name["recall"]["features"] == {"samples": 30, "reference": 40}
    assert by_name["kid"]["subset_size"] == 30
    assert f"step {STEP}: fid {by_name['fid']['value']:.4f} of 30 samples against digits" in said
    named = f"digits 1.0.0 train[:40]: 40 images, resize: none, checksum {data.checksum()}\n"
    assert said.count(f"of 30 samples against {named}") == 7
    assert said.count("weights aaaaaaaa, not the published ones: comparable only with itself") == 7


def test_real_images_are_at_no_distance(model, tmp_path):
    path = tmp_path / "real.npz"
    batch = next(pipeline.eval_batches(pipeline.load("digits", "train[:40]"), batch_size=40))
    np.savez(path, images=batch.image)
    results = measure(model, metrics=DISTANCES, samples=path)
    values = {name: result["value"] for name, result in results.items()}
    assert abs(values["fid"]) < 1e-6 and abs(values["sfid"]) < 1e-6
    assert values["precision"] == values["recall"] == values["coverage"] == 1
    ending = f"inception=aaaaaaaa,samples={features.checksum(path)}"
    assert (model.workdir / f"evals/fid-{STEP:08d}-{ending}.json").exists()


def test_samples_of_a_file_are_measured_like_drawn_ones(model, tmp_path):
    fields, path = {"temperature": 0.5, "seed": 3}, tmp_path / "samples.npz"
    drawn = measure(model, num_samples=20, **fields)["fid"]
    arguments = ["sample", "--workdir", model.workdir, "--num", 20, "--npz", path]
    arguments += [f"--{name}={value}" for name, value in fields.items()]
    assert cli.main([*map(str, arguments), "--out", str(tmp_path / "grid.png")]) == 0
    with np.load(path) as file:
        np.savez(path, images=file["images"], finite=np.arange(20) > 1)
    from_file = measure(model, samples=path)["fid"]
    assert from_file["value"] == pytest.approx(drawn["value"], rel=1e-6)
    assert from_file["samples"]["not_finite"] == 2
    assert from_file["samples"]["images"] == 20 and "temperature" not in from_file["samples"]


def test_killed_evaluation_goes_on(model, monkeypatch):
    fields = {"metrics": DISTANCES, "num_samples": 40, "guidance": 0.5}
    monkeypatch.setattr(features, "SAVED_EVERY", 16)
    draw, starts, stops = Model.draw, [], [2, 2]

    def interrupted(*args, start, **fields):
        starts.append(start)
        for number, batch in enumerate(draw(*args, start=start, **fields)):
            if stops and number == stops[-1]:
                stops.pop()
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(Model, "draw", interrupted)
    for seed in (0, 1):  # the other one starts from none, and leaves its own
        with pytest.raises(KeyboardInterrupt):
            measure(model, **fields, seed=seed)
        assert len(list(model.workdir.glob("evals/*.partial.npz"))) == 1 + seed
    resumed = measure(model, **fields)
    assert len(list(model.workdir.glob("evals/*.partial.npz"))) == 1
    whole = measure(model, **fields)
    assert starts == [0, 0, 32, 0] and resumed.keys() == whole.keys()
    for name, result in whole.items():
        assert resumed[name]["value"] == pytest.approx(result["value"], rel=1e-9, abs=1e-9), name


def test_images_that_are_not_finite_are_counted(model):
    result = measure(model, num_samples=16, temperature=1e38)["fid"]
    assert result["samples"]["not_finite"] == 16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reference": Path("none.npz")}, "none.npz does not exist; make it with"),
        ({"make_reference": True, "reference_split": "none"}, "'none' is not a split"),
        ({"make_reference": True, "reference_data": "none"}, "known data sets"),
        ({"samples": Path("none.npz")}, "none.npz cannot be read"),
        ({"num_samples": 5}, "there are 5 features, too few for 5 neighbours"),
        ({"num_features": 4}, "there are 4 features, too few for 5 neighbours"),
        ({"reference_split": "train[:5]"}, "there are 5 features, too few for 5 neighbours"),
    ],
)
def test_what_is_missing_is_noticed_before_samples_are_drawn(fields, message, model, monkeypatch):
    monkeypatch.setattr(Model, "draw", lambda *_, **__: 1 / 0)
    if fields.get("reference_split") == "train[:5]":
        measure(model, metrics=None, make_reference=True, **fields)
    with pytest.raises(UsageError, match=message):
        measure(model, metrics=("fid", "density_coverage"), **fields)


@pytest.mark.parametrize("makes_reference", [False, True])
def test_bad_samples_are_refused_before_the_reference_is_measured(
    makes_reference, model, tmp_path, monkeypatch
):
    given = {name: tmp_path / f"{name}.npz" for name in ("samples", "reference")}
    np.savez(given["reference"], arr_0=small_network.images())
    given["samples"].write_bytes(b"text")
    monkeypatch.setattr(Statistics, "collect", lambda *_, **__: 1 / 0)
    with pytest.raises(UsageError, match=r"samples\.npz cannot be read"):
        measure(model, make_reference=makes_reference, **given)
