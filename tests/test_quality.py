"""`jetflow evaluate` with samples: statistics, references, and the metrics that compare them."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import small_network
import tiny_runs

from jetflow import cli
from jetflow.data import dataset as pipeline
from jetflow.evals import features, inception, reference
from jetflow.evals.features import Statistics, images_of
from jetflow.model import Model
from jetflow.types import UsageError

STEP = tiny_runs.STEPS


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The small network for the FID's own."""
    small_network.install(monkeypatch)


# Statistics.


@pytest.mark.parametrize("batch_size", [23, 5, 64])
def test_each_image_counts_once(batch_size):
    """Whether the last batch is full, padded, or the only one."""
    arrays = small_network.network().arrays
    direct = np.asarray(small_network.activations(arrays, small_network.images())["2048"])
    statistics = small_network.collected(batch_size)
    assert statistics.done == 23
    for name, size in (("pooled", 48), ("spatial", 24)):
        mean, covariance = statistics.gaussian(name)
        assert mean.dtype == np.float64
        np.testing.assert_allclose(mean, direct[:, :size].mean(0), atol=1e-5)
        np.testing.assert_allclose(covariance, np.cov(direct[:, :size].T), atol=1e-5)
    kept = statistics.arrays["features"]
    index = [np.abs(direct - row).max(1).argmin() for row in kept]
    assert len(kept) == small_network.KEPT
    assert (np.diff(index) > 0).all() and index[-1] > small_network.KEPT  # not only the first ones
    np.testing.assert_allclose(kept, direct[index], atol=1e-5)


@pytest.mark.parametrize("axes", [["data=8"], ["data=2", "fsdp=2", "tensor=2"]])
def test_eight_devices_find_the_same(axes, tmp_path):
    out = tmp_path / "eight.npz"
    process = subprocess.run(
        [sys.executable, small_network.__file__, out, "16", *axes],
        env=tiny_runs.environment(JAX_NUM_CPU_DEVICES="8", NPROC="32"),
        capture_output=True, text=True, timeout=600,
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


def adm_file(path, **arrays):
    np.savez(path, **arrays)
    return path


def moments(size, seed=0):
    rows = np.random.default_rng(seed).standard_normal((10, size))
    return rows.mean(0), np.cov(rows.T)


def published():
    return inception.Network(small_network.network().arrays, sha256=inception.PUBLISHED * 8)


def read(path, *, images=False, network=None):
    def measure(chunks, count):
        assert [len(chunk) for chunk in chunks] == [8, 8, 7] and count == 23
        return small_network.collected(8)

    network = network or small_network.network()
    return reference.read(path, network, measure, chunk=8, images=images)


def test_reference_is_read_as_written(tmp_path):
    statistics = small_network.collected(8)
    path = tmp_path / "some" / "reference.npz"
    reference.write(path, statistics, small_network.network(), {"name": "digits"})
    found = read(path, images=True)
    np.testing.assert_array_equal(found.part("pooled").mean, statistics.gaussian("pooled").mean)
    np.testing.assert_array_equal(
        found.part("spatial").covariance, statistics.gaussian("spatial").covariance
    )
    np.testing.assert_array_equal(found.part("features"), statistics.arrays["features"])
    assert found.facts["data"] == {"name": "digits"} and found.facts["images"] == 23
    assert len(found.facts["checksum"]) == 16
    with pytest.raises(UsageError, match=r"made with weights_sha256 aaaa.* has bbbb"):
        read(path, network=small_network.network("b"))


def test_adm_file_of_moments_alone(tmp_path):
    (mu, sigma), (mu_s, sigma_s) = moments(48), moments(24)
    path = adm_file(tmp_path / "a.npz", mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    found = read(path, network=published())
    np.testing.assert_array_equal(found.part("pooled").covariance, sigma)
    np.testing.assert_array_equal(found.part("spatial").mean, mu_s)
    with pytest.raises(UsageError, match="has no features"):
        found.part("features")
    path = adm_file(tmp_path / "b.npz", mu=mu, sigma=sigma)  # as of pytorch-fid
    found = read(path, network=published())
    with pytest.raises(UsageError, match="has no mu_s and sigma_s"):
        found.part("spatial")
    with pytest.raises(UsageError, match="was made with published_weights True"):
        read(path)


def test_adm_file_of_images_alone(tmp_path):
    path = adm_file(tmp_path / "a.npz", arr_0=small_network.images())
    found, expected = read(path), small_network.collected(8)
    np.testing.assert_array_equal(found.part("pooled").mean, expected.gaussian("pooled").mean)
    np.testing.assert_array_equal(found.part("features"), expected.arrays["features"])
    assert found.facts["images"] == 23 and found.facts["data"] is None


def test_adm_file_of_moments_and_some_images(tmp_path):
    """The moments, of more images than there are in it, stay; single features are of the images."""
    mu, sigma = moments(48)
    path = adm_file(tmp_path / "a.npz", mu=mu, sigma=sigma, arr_0=small_network.images())
    found = read(path, images=True, network=published())
    np.testing.assert_array_equal(found.part("pooled").mean, mu)
    assert len(found.part("features")) == small_network.KEPT
    assert "features" not in read(path, network=published()).parts  # which nobody asked for


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.zeros(3)}, "has neither mu and sigma nor images"),
        ({"mu": np.zeros(3), "sigma": np.zeros((3, 3))}, r"has mu \[3\] .* expected 48 features"),
        ({"arr_0": np.zeros((2, 8, 8, 1))}, r"holds float64 \[2, 8, 8, 1\]; expected uint8"),
        ({"arr_0": np.zeros((2, 8, 8, 4), np.uint8)}, "expected uint8"),
    ],
)
def test_files_that_are_no_reference(arrays, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        read(adm_file(tmp_path / "a.npz", **arrays))


def test_no_file_at_all(tmp_path):
    (tmp_path / "a.npz").write_text("text")
    for name in ("a.npz", "b.npz"):
        with pytest.raises(UsageError, match=f"{name} cannot be read"):
            read(tmp_path / name)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_come_in_chunks(save, tmp_path):
    save(tmp_path / "a.npz", images=small_network.images(), labels=np.zeros(23))
    count, chunks = images_of(tmp_path / "a.npz", "samples", 10)
    chunks = list(chunks)
    assert count == 23 and [len(chunk) for chunk in chunks] == [10, 10, 3]
    np.testing.assert_array_equal(np.concatenate(chunks), small_network.images())


# The command.

ALL = ["fid", "sfid", "kid", "precision", "recall", "density", "coverage"]
METRICS = "fid,sfid,kid,precision_recall,density_coverage"


@pytest.fixture
def evaluate(trained, tmp_path, capsys):
    """A function: evaluates a copy of a trained flow; gives what is said, and new results."""
    folder = tmp_path / "run"
    shutil.copytree(trained("tarflow"), folder)
    shutil.rmtree(folder / "evals")

    def run(*flags, status=0):
        before = {path.name for path in folder.glob("evals/*.json")}
        arguments = ["evaluate", "--workdir", folder, "--batch_size", 16, *flags]
        assert cli.main(list(map(str, arguments))) == status
        said = capsys.readouterr()
        paths = [path for path in folder.glob("evals/*.json") if path.name not in before]
        results = {path.name: json.loads(path.read_text()) for path in paths}
        return (said.err if status else said.out), results

    run.folder = folder
    return run


@pytest.fixture
def with_reference(evaluate):
    said, results = evaluate("--make_reference", "--reference_split", "train[:40]")
    assert not results
    made = evaluate.folder / "evals" / "reference-digits-train%5B%3A40%5D.npz"
    assert said == f"reference written to {made}\n"
    made.rename(evaluate.folder / "evals" / "reference-digits-train.npz")  # the default
    return evaluate


def test_all_metrics(with_reference):
    said, results = with_reference("--metrics", METRICS, "--num_samples", 30)
    assert sorted(results) == sorted(
        f"{m}-{STEP:08d}-inception=aaaaaaaa,num_samples=30.json" for m in ALL
    )
    data = pipeline.load("digits", "train[:40]")
    for result in results.values():
        assert result["network"] == {
            "weights_sha256": "a" * 64, "published_weights": False, "resize": inception.RESIZE
        }  # fmt: skip
        assert (result["samples"]["images"], result["samples"]["not_finite"]) == (30, 0)
        assert result["samples"]["temperature"] == 1 and result["samples"]["seed"] == 0
        assert result["reference"]["data"]["checksum"] == data.checksum()
        assert result["reference"]["images"] == 40
        assert (result["step"], result["weights"]) == (STEP, "ema")
        assert result["value"] is not None
    by_name = {result["metric"]: result for result in results.values()}
    assert by_name["fid"]["value"] > by_name["sfid"]["value"] > 0  # of some of the features
    assert by_name["precision"]["k"] == 3 and by_name["density"]["k"] == 5
    assert by_name["recall"]["features"] == {"samples": 30, "reference": 40}
    assert by_name["kid"]["subset_size"] == 30
    assert f"step {STEP}: fid {by_name['fid']['value']:.4f} of 30 samples against digits" in said
    named = f"digits 1.0.0 train[:40]: 40 images, resize: none, checksum {data.checksum()}\n"
    assert said.count(f"of 30 samples against {named}") == 7
    assert said.count("weights aaaaaaaa, not the published ones: comparable only with itself") == 7


def test_real_images_are_at_no_distance(with_reference, tmp_path):
    batch = next(pipeline.eval_batches(pipeline.load("digits", "train[:40]"), batch_size=40))
    np.savez(tmp_path / "real.npz", images=batch.image)
    _, results = with_reference("--metrics", METRICS, "--samples", tmp_path / "real.npz")
    values = {result["metric"]: result["value"] for result in results.values()}
    assert abs(values["fid"]) < 1e-6 and abs(values["sfid"]) < 1e-6
    assert values["precision"] == values["recall"] == values["coverage"] == 1
    (name,) = {name.partition("-")[2] for name in results}
    checksum = reference.checksum(tmp_path / "real.npz")
    assert name == f"{STEP:08d}-inception=aaaaaaaa,samples={checksum}.json"


def test_samples_of_a_file(with_reference, tmp_path):
    """Other ones than those drawn here, where labels take turns: there they come in rows."""
    flags = ["--temperature", 0.5, "--seed", 3]
    _, drawn_here = with_reference("--metrics", "fid", "--num_samples", 20, *flags)
    npz = tmp_path / "samples.npz"
    arguments = ["sample", "--workdir", with_reference.folder, "--num", 20, "--npz", npz, *flags]
    assert cli.main([*map(str, arguments), "--out", str(tmp_path / "grid.png")]) == 0
    _, from_file = with_reference("--metrics", "fid", "--samples", npz)
    with np.load(npz) as file:
        arrays = dict(file) | {"finite": np.arange(len(file["images"])) > 1}
    np.savez(tmp_path / "broken.npz", **arrays)
    said, _ = with_reference("--metrics", "fid", "--samples", tmp_path / "broken.npz")
    assert "2 samples are not finite" in said
    (one,), (other,) = drawn_here.values(), from_file.values()
    assert other["value"] > 0
    assert other["value"] != one["value"]
    assert other["samples"]["images"] == 20 and "temperature" not in other["samples"]


def test_settings_have_names_of_their_own(with_reference):
    names = set()
    for flags in ([], ["--guidance", 1], ["--denoise"], ["--seed", 1]):
        _, results = with_reference("--metrics", "fid", "--num_samples", 16, *flags)
        names |= set(results)
    assert len(names) == 4
    assert f"fid-{STEP:08d}-guidance=1.0,inception=aaaaaaaa,num_samples=16.json" in names


def test_killed_evaluation_goes_on(with_reference, monkeypatch):
    flags = ["--metrics", METRICS, "--num_samples", 40]
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
    with_reference(*flags, status=130)
    (partial,) = with_reference.folder.glob("evals/*.partial.npz")
    with_reference(*flags, "--seed", 1, status=130)  # starts from none, and leaves its own
    assert len(list(with_reference.folder.glob("evals/*.partial.npz"))) == 2
    _, resumed = with_reference(*flags)
    assert starts == [0, 0, 32] and not partial.exists()
    for path in with_reference.folder.glob("evals/*.json"):
        path.unlink()
    _, whole = with_reference(*flags)
    assert starts[-1] == 0 and resumed.keys() == whole.keys()
    for name, result in whole.items():
        assert resumed[name]["value"] == pytest.approx(result["value"], rel=1e-9, abs=1e-9), name


def test_images_that_are_not_finite_are_counted(with_reference):
    flags = ["--metrics", "fid", "--num_samples", 16, "--temperature", 1e38]
    said, results = with_reference(*flags)
    (result,) = results.values()
    assert result["samples"]["not_finite"] == 16
    assert "16 samples are not finite" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "does not exist; make it with"),
        (["--reference", "none.npz"], "reference none.npz does not exist; make it with"),
        (["--make_reference", "--reference_split", "none"], "'none' is not a split"),
        (["--make_reference", "--reference_data", "none"], "known data sets"),
    ],
)
def test_bad_flags(flags, message, evaluate):
    said, results = evaluate("--metrics", "fid", *flags, status=2)
    assert message in said and len(said.splitlines()) == 1 and not results


@pytest.mark.parametrize(
    ("flags", "count"), [(["--num_samples", 5], 5), (["--num_features", 4], 4), ([], None)]
)
def test_too_few_features_are_noticed_before_samples_are_drawn(
    flags, count, with_reference, monkeypatch
):
    monkeypatch.setattr(Model, "draw", lambda *_, **__: 1 / 0)
    if count is None:  # those of the reference
        count = 5
        with_reference("--make_reference", "--reference_split", "train[:5]")
        flags = ["--reference_split", "train[:5]"]
    said, results = with_reference("--metrics", "fid,density_coverage", *flags, status=2)
    assert f"there are {count} features, too few for 5 neighbours" in said and not results


def test_bad_samples(with_reference, tmp_path):
    said, _ = with_reference("--metrics", "fid", "--samples", tmp_path / "a.npz", status=2)
    assert "samples" in said and "cannot be read" in said
