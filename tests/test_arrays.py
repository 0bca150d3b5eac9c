"""Flows over arrays [T, D] that are no images: laws, data, training, likelihoods, samples."""

import io

import flow_laws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from array_record.python.array_record_module import ArrayRecordWriter

from jetflow import UsageError, bits_per_dim, build, cli, load_model, prepare, train
from jetflow.data.dataset import eval_batches, load


@pytest.fixture
def arrays(tmp_path):
    """40 arrays of 5 tokens with 3 features of very different size, in the folder of archives."""
    values = np.random.default_rng(0).normal([0, 100, -5], [1, 20, 0.01], (40, 5, 3))
    np.save(tmp_path / "walks.npy", values)
    return values.astype(np.float32)


# The flow.


@pytest.mark.usefixtures("float64")
def test_standardisation_is_part_of_the_flow():
    """With the deviations in the log-determinant."""
    flow = flow_laws.FLOWS["tarflow, arrays, classes"]()
    plain = build(flow_laws.TARFLOW | {"patch_size": 1}, image_shape=(5, 4), num_classes=3)
    variables, x = flow_laws.random_variables(flow), flow_laws.random_images(flow)
    label = jnp.array([0, 2, -1])
    z, logdet = flow.apply(variables, x, label, method="forward")
    mean, deviation = map(np.asarray, (flow.pixels.mean, flow.pixels.deviation))
    same, more = plain.apply(variables, (x - mean) / deviation, label, method="forward")
    np.testing.assert_allclose(same, z, atol=1e-9)
    np.testing.assert_allclose(more - 5 * np.log(deviation).sum(), logdet, atol=1e-9)


def test_patches_are_refused():
    with pytest.raises(UsageError, match="patch_size is 2; arrays have no patches: set it to 1"):
        build(flow_laws.TARFLOW, image_shape=(6, 4))


# The data.


def everything(name, split, folder):
    (batch,) = eval_batches(load(name, split, data_dir=folder), batch_size=40)
    return batch.image[batch.index >= 0], batch.label[batch.index >= 0]


def test_a_file_of_arrays(arrays, tmp_path):
    """Every twentieth is held out; the statistics are of the others."""
    found = prepare("arrays/walks", manual_dir=tmp_path, data_dir=tmp_path)
    is_test = np.arange(40) % 20 == 19
    np.testing.assert_array_equal(everything("arrays/walks", "test", tmp_path)[0], arrays[is_test])
    np.testing.assert_array_equal(
        everything("arrays/walks", "train", tmp_path)[0], arrays[~is_test]
    )
    mean, deviation = found.splits["test"].standard
    tokens = arrays[~is_test].reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(mean, tokens.mean(0))
    np.testing.assert_allclose(deviation, tokens.std(0))
    assert "40" not in found.splits["train"].describe()
    assert "38 arrays of 5x3, no labels" in found.splits["train"].describe()


def test_array_record_is_as_npy(arrays, tmp_path):
    writer = ArrayRecordWriter(str(tmp_path / "records.array_record"), "group_size:1")
    for array in arrays:
        np.save(buffer := io.BytesIO(), array)
        writer.write(buffer.getvalue())
    writer.close()
    sums = [
        prepare(f"arrays/{name}", manual_dir=tmp_path, data_dir=tmp_path).splits["train"].checksum()
        for name in ("walks", "records")
    ]
    assert sums[0] == sums[1]


def test_a_folder_of_splits_and_labels(tmp_path):
    (tmp_path / "own").mkdir()
    for split, num in (("train", 12), ("validation", 5)):
        np.save(tmp_path / "own" / f"{split}.npy", np.arange(num * 8).reshape(num, 4, 2))
        np.save(tmp_path / "own" / f"{split}_labels.npy", np.arange(num) % 3)
    found = prepare("arrays/own", manual_dir=tmp_path, data_dir=tmp_path).splits
    assert {name: len(split) for name, split in found.items()} == {"train": 12, "validation": 5}
    assert found["train"].num_classes == 3
    labels = everything("arrays/own", "validation", tmp_path)[1]
    np.testing.assert_array_equal(labels, [0, 1, 2, 0, 1])


def test_labels_beside_one_file(arrays, tmp_path):
    np.save(tmp_path / "walks_labels.npy", np.arange(40) % 3)
    found = prepare("arrays/walks", manual_dir=tmp_path, data_dir=tmp_path / "data").splits
    assert found["train"].num_classes == found["test"].num_classes == 3
    labels = everything("arrays/walks", "test", tmp_path / "data")[1]
    np.testing.assert_array_equal(labels, [19 % 3, 39 % 3])
    np.save(tmp_path / "walks_labels.npy", np.arange(40) // 39)  # class 1 is held out alone
    with pytest.raises(UsageError, match=r"needs walks_labels\.npy .* train too: 0 to 0"):
        prepare("arrays/walks", manual_dir=tmp_path, data_dir=tmp_path / "other")
    np.save(tmp_path / "walks_labels.npy", np.arange(39) % 3)
    with pytest.raises(UsageError, match="expected 40 whole numbers from 0 on"):
        prepare("arrays/walks", manual_dir=tmp_path, data_dir=tmp_path / "other")
    (tmp_path / "own").mkdir()
    np.save(tmp_path / "own_labels.npy", np.zeros(40, int))
    with pytest.raises(UsageError, match=r"put train_labels\.npy in it"):
        prepare("arrays/own", manual_dir=tmp_path, data_dir=tmp_path / "data")


BAD = {
    "shape": (np.zeros((40, 3)), "has the shape [40, 3]; expected [N, T, D]"),
    "objects": (np.array([{}] * 40), "is no .npy file of real numbers"),
    "words": (np.full((40, 2, 2), "a"), "is no .npy file of real numbers"),
    "nan": (np.full((40, 2, 2), np.nan), "array 0 of"),
    "overflow": (np.full((40, 2, 2), 1e300), "is not finite as float32; leave it out"),
    "few": (np.zeros((19, 2, 2)), "has 19 arrays; expected 20 or more"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name, tmp_path, capsys):
    array, message = BAD[name]
    np.save(tmp_path / f"{name}.npy", array, allow_pickle=True)
    words = ["prepare", f"arrays/{name}", "--manual_dir", tmp_path, "--data_dir", tmp_path / "data"]
    assert cli.main([str(word) for word in words]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(11, int), "int64[11]; expected 12 whole numbers"),
        (np.zeros(12), "float64[12]; expected 12 whole numbers"),
        (np.arange(12) - 1, "expected 12 whole numbers from 0 on"),
    ],
)
def test_refused_labels(labels, message, tmp_path):
    (tmp_path / "own").mkdir()
    np.save(tmp_path / "own" / "train.npy", np.zeros((12, 4, 2)))
    np.save(tmp_path / "own" / "train_labels.npy", labels)
    with pytest.raises(UsageError) as error:
        prepare("arrays/own", manual_dir=tmp_path, data_dir=tmp_path)
    assert message in str(error.value)


# A run.


def config(**noise):
    found = tiny_runs.config("tarflow")
    found.data.name = "digits_rows"
    found.flow.patch_size, found.noise.flip = 1, False
    found.noise.update(noise)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("arrays") / "run"
    train(config(), workdir)
    return load_model(workdir)


def test_run(run):
    """Samples and likelihoods are in the units of the data."""
    images = run.sample(3, label=1)
    assert images.dtype == np.float32 and images.shape == (3, 8, 8)
    np.testing.assert_allclose(run.sample(2, label=1, batch_size=1), images[:2], rtol=1e-4)
    z, logdet = run.encode(images, label=1)
    np.testing.assert_allclose(run.decode(z, label=1), images, rtol=1e-3, atol=0.05)
    nats = 0.5 * (z**2 + np.log(2 * np.pi)).sum((1, 2)) - logdet
    bits = run.bits_per_dim(images, label=1)
    np.testing.assert_allclose(bits, nats / (64 * np.log(2)), rtol=1e-5)
    key = jax.random.key(0)
    alone = bits_per_dim(run.flow, run.variables, jnp.asarray(images), jnp.ones(3, int), key)
    np.testing.assert_allclose(alone, bits, rtol=1e-6)  # nothing is added
    (gap,) = run.evaluate(["bpd_gap"], draws=1, batch_size=8)
    assert gap["metric"] == "density_bpd_gap"
    noised, exact = run.evaluate(["noised_bpd", "bpd"], draws=2, batch_size=8)
    assert exact["metric"] == "density_bpd" and exact["draws"] == 1
    assert noised["metric"] == "noised_bpd" and noised["standard_error"] > 0
    assert {path.name.split("-")[0] for path in (run.workdir / "evals").iterdir()} >= {
        "density_bpd", "noised_bpd",
    }  # fmt: skip
    (told,) = run.evaluate(["sample_accuracy"], num_samples=12, draws=1, batch_size=8)
    assert told["samples"]["images"] == 12 and 0 <= told["value"] <= 1
    with pytest.raises(UsageError, match="this flow is of arrays; leave them out"):
        run.evaluate(["fid"], make_reference=True)
    with pytest.raises(UsageError, match="values that are not finite; leave those out"):
        run.encode(np.full((1, 8, 8), np.inf, np.float32))
    with pytest.raises(UsageError, match="denoise_clip is for pixels"):
        run.sample(1, denoise=True, denoise_clip=True)


def test_commands(run, tmp_path, monkeypatch):
    """Samples as a picture and as float32, latents, a reconstruction, a report."""
    monkeypatch.chdir(tmp_path)
    workdir = str(run.workdir)
    sample = ["sample", "--workdir", workdir, "--num", "12", "--npz", "a.npz", "--denoise"]
    assert cli.main([*sample, "--guidance", "1"]) == 0
    with np.load("a.npz") as file:
        assert file["images"].dtype == np.float32 and file["images"].shape == (12, 8, 8)
    assert cli.main(["encode", "--workdir", workdir, "--out", "z.npz"]) == 0
    with np.load("z.npz") as file:
        assert file["latents"].shape == (297, 8, 8)
    words = ["sample", "--workdir", workdir, "--mode", "reconstruct", "--out", "b.png"]
    assert cli.main(words) == 0
    assert cli.main(["report", workdir]) == 0
    assert "arrays of 8×8" in (run.workdir / "report.html").read_text()
    assert (tmp_path / "grid.png").exists() and (tmp_path / "b.png").exists()


@pytest.mark.parametrize(
    ("noise", "data", "message"),
    [
        (dict(kind="uniform", std=0.0), "digits_rows", "kind is uniform, which is not for arrays"),
        (dict(flip=True), "digits_rows", "arrays have no left and right"),
        (dict(kind="none", std=0.0), "digits", "kind is none, which is not for images"),
    ],
)
def test_refused_noise(noise, data, message, tmp_path):
    found = config(**noise)
    found.data.name, found.eval.denoise = data, False
    with pytest.raises(UsageError, match=message):
        train(found, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_noise_training_maximises_the_density(tmp_path):
    found = config(kind="none", std=0.0)
    found.eval.denoise = False
    train(found, tmp_path / "run")
    (result,) = load_model(tmp_path / "run").evaluate(["bpd"], draws=1)
    names = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert result["metric"] == "density_bpd" and '"density_bpd"' in names
