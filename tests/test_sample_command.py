"""`jetflow sample`, as a user calls it."""

import json
import shutil
import time

import numpy as np
import pytest
import tiny_runs
from PIL import Image

from jetflow import cli, load_model, pictures
from jetflow.archive import Archive
from jetflow.cli import sample as command
from jetflow.sampling.ancestral import Sampler

pytestmark = pytest.mark.usefixtures("compilation_cache")


def run(trained, name, *flags) -> int:
    arguments = ["sample", "--workdir", trained(name), *flags]
    return cli.main([str(argument) for argument in arguments])


def read_picture(path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


@pytest.fixture
def sample(trained, tmp_path, capsys):
    """A function: samples from a trained flow; gives the picture, the images and the labels."""

    def draw(name, *flags):
        out, npz = tmp_path / "some" / "grid.png", tmp_path / "other" / "images"
        assert run(trained, name, "--out", out, "--npz", npz, *flags) == 0
        assert f"samples of step {tiny_runs.STEPS}: {out}" in capsys.readouterr().out
        with np.load(npz) as arrays:
            return read_picture(out), arrays["images"], arrays.get("labels")

    return draw


def test_samples_have_labels_in_turn_and_a_row_for_each_class(sample):
    grid, images, labels = sample("tarflow", "--num", 20)
    assert (images.dtype, images.shape) == (np.uint8, (20, 8, 8, 1))
    assert list(labels) == [*range(10)] * 2
    assert (grid == pictures.grid(images, [np.array([i, 10 + i]) for i in range(10)])).all()
    assert len({image.tobytes() for image in images}) == 20
    _, fewer, _ = sample("tarflow", "--num", 7, "--batch_size", 20)
    # Another batch size may round the last bit of a pixel's value differently.
    assert np.abs(fewer.astype(int) - images[:7]).max() <= 1
    assert (fewer != images[:7]).mean() < 0.01


def test_samples_of_one_class_and_without_labels(sample, monkeypatch):
    """The picture of many samples shows the first."""
    grid, images, labels = sample("tarflow", "--num", 7, "--label", 3)
    assert list(labels) == [3] * 7
    assert (grid == pictures.grid(images, rows(3, 3, 1))).all()
    monkeypatch.setattr(command, "SHOWN", 16)
    grid, images, labels = sample("volume preserving", "--num", 20)
    assert labels is None and len(images) == 20
    assert (grid == pictures.grid(images[:16], rows(4, 4, 4, 4))).all()


def rows(*lengths):
    return np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1])


def test_settings_change_samples(trained):
    model = load_model(trained("tarflow"))
    plain = model.sample(20)
    for setting in ({"denoise": True}, {"guidance": 2.0}, {"temperature": 0.5}, {"seed": 1}):
        assert (model.sample(20, **setting) != plain).any(), setting
    certain = model.sample(20, temperature=0.0)
    assert (certain[:10] == certain[10:]).all()
    jacobi = model.sample(20, method="jacobi", tolerance=0.0)
    assert np.abs(jacobi.astype(int) - plain).max() <= 1
    assert (jacobi != plain).mean() < 0.01


def test_samples_of_an_earlier_step(trained, tmp_path, capsys):
    flags = ["--num", 4, "--out", tmp_path / "grid.png", "--npz", tmp_path / "a", "--step", 10]
    assert run(trained, "jet", *flags) == 0
    assert "4 samples of step 10" in capsys.readouterr().out
    with np.load(tmp_path / "a") as arrays:
        assert (arrays["images"] != load_model(trained("jet")).sample(4)).any()


@pytest.mark.slow
def test_eight_devices_draw_the_images_of_one(sample, trained, tmp_path):
    _, one, _ = sample("tarflow", "--num", 30)
    npz = tmp_path / "eight.npz"
    arguments = ["sample", "--workdir", trained("tarflow"), "--num", 30, "--batch_size", 12]
    arguments += ["--npz", npz, "--out", tmp_path / "a.png", "--mesh", "data=2,fsdp=2,tensor=2"]
    process = tiny_runs.start(list(map(str, arguments)), JAX_NUM_CPU_DEVICES="8")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    with np.load(npz) as arrays:
        eight = arrays["images"]
    # The last bit of a pixel's value may be rounded differently.
    assert np.abs(eight.astype(int) - one).max() <= 1
    assert (eight != one).mean() < 0.01


def test_images_that_are_not_finite_are_counted(trained, tmp_path, monkeypatch, capsys):
    """And marked in the arrays, where they are black."""
    latents = Sampler.latents

    def broken(self, key, index):
        z = np.array(latents(self, key, index))
        z[index % 3 == 1, -1] = np.nan
        return z

    npz = tmp_path / "images.npz"
    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "latents", broken)
        flags = ["--num", 20, "--batch_size", 8, "--out", tmp_path / "grid.png", "--npz", npz]
        assert run(trained, "tarflow", *flags) == 0
    assert "7 of 20 images are not finite, and black" in capsys.readouterr().err
    with np.load(npz) as arrays:
        np.testing.assert_array_equal(arrays["finite"], np.arange(20) % 3 != 1)
        assert not arrays["images"][1::3].any() and arrays["images"][::3].any((1, 2, 3)).all()


@pytest.mark.slow
def test_killed_sampling_goes_on(trained, tmp_path, capsys):
    arguments = ["sample", "--workdir", trained("tarflow"), "--num", 2000, "--batch_size", 20]
    arguments = [*map(str, arguments), "--out", str(tmp_path / "grid.png"), "--npz"]
    killed, whole = tmp_path / "killed.npz", tmp_path / "whole.npz"
    process = tiny_runs.start([*arguments, str(killed)])
    folder = tmp_path / "killed.npz.partial"
    while len(parts := list(folder.glob("images-*-????????"))) < 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    done = max(int(part.name.split("-")[2]) for part in folder.glob("images-*-????????"))
    assert len(parts) * 20 <= done < 2000

    assert cli.main([*arguments, str(killed)]) == 0
    assert f"going on after {done:,} images" in capsys.readouterr().out
    assert cli.main([*arguments, str(whole)]) == 0
    assert "already there" not in capsys.readouterr().out
    with np.load(killed) as actual, np.load(whole) as expected:
        np.testing.assert_array_equal(actual["images"], expected["images"])
        np.testing.assert_array_equal(actual["labels"], expected["labels"])
    assert not folder.exists()


def test_windows_are_measured_once(trained, tmp_path, capsys):
    """Once for the settings that matter, and again where the file of it is damaged."""
    workdir = tmp_path / "run"
    shutil.copytree(trained("tarflow"), workdir)
    known = workdir / "checkpoints" / "decoding.json"

    def draw(*flags):
        arguments = ["sample", "--workdir", workdir, "--method", "auto", "--num", 4, *flags]
        assert cli.main([*map(str, arguments), "--out", str(tmp_path / "grid.png")]) == 0
        return json.loads(known.read_text())

    (plain,) = draw()
    assert len(plain["windows"]) == 2 and set(plain["windows"]) <= {1, 3}
    assert draw() == [plain]
    before, guided = draw("--guidance", "1")
    assert before == plain and plain["conditions"]["guidance"] is None
    assert guided["conditions"]["guidance"]["scale"] == 1
    for content in ("[{", '[{"windows": [1]}]'):
        known.write_text(content)
        assert len(draw()) == 1


@pytest.mark.parametrize(
    ("name", "mode", "shape"),
    [
        ("tarflow", "reconstruct", (2, 5)),
        ("jet", "interpolate", (1, 5)),
        ("jet", "trace", (5, 6)),  # noise, and behind each of five couplings
    ],
)
def test_modes(name, mode, shape, trained, tmp_path, capsys):
    out = tmp_path / "picture.png"
    assert run(trained, name, "--mode", mode, "--num", 5, "--out", out) == 0
    output = capsys.readouterr().out
    assert f"{mode} of step {tiny_runs.STEPS}: {out}" in output
    blank = pictures.strips(np.zeros((*shape, 8, 8, 1), np.uint8))
    assert read_picture(out).shape == blank.shape
    if mode == "reconstruct":
        assert 0 < float(output.partition("largest ")[2].partition(",")[0]) < 0.01


def test_a_trace_ends_in_the_samples(trained, tmp_path):
    """Its last frame is what plain sampling draws."""
    moving, flags = tmp_path / "trace.gif", ["--num", 4, "--denoise", "--guidance", 1.0]
    assert run(trained, "tarflow", *flags, "--mode", "trace", "--out", moving) == 0
    images = load_model(trained("tarflow")).sample(4, denoise=True, guidance=1.0)
    with Image.open(moving) as picture:
        assert picture.n_frames == 4  # noise, two blocks, denoised
        picture.seek(3)
        last = np.asarray(picture.convert("L")).astype(int)
    expected = pictures.strips(images[None])[..., 0]
    assert last.std() > 10 and np.abs(last - expected).max() <= 2


def test_interpolation_between_pictures(trained, tmp_path):
    """The ends of the path are the pictures."""
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8), np.uint8)
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    out, names = tmp_path / "way.png", ",".join(map(str, paths))
    flags = ["--mode", "interpolate", "--num", 2, "--images", names, "--out", out]
    assert run(trained, "jet", *flags) == 0
    assert (read_picture(out) == pictures.strips(images[None, ..., None])).all()


# Latents.


def test_pairs_of_latents_and_images(trained, tmp_path):
    """Each image is decoded from its latents, under its label."""
    npz = tmp_path / "pairs.npz"
    flags = ["--num", 5, "--batch_size", 2, "--latents", "--out", tmp_path / "a.png", "--npz", npz]
    assert run(trained, "tarflow", *flags) == 0
    with np.load(npz) as pairs:
        decoded = load_model(trained("tarflow")).decode(pairs["latents"], pairs["labels"])
        assert np.abs(decoded.astype(int) - pairs["images"]).max() <= 1
        assert pairs["images"].std() > 10


def test_latents_of_a_data_set_go_on_after_a_kill(trained, tmp_path, monkeypatch, capsys):
    whole, killed = tmp_path / "whole.npz", tmp_path / "killed.npz"

    def encode(out):
        words = ["encode", "--workdir", trained("tarflow"), "--batch_size", 100, "--out", out]
        return cli.main([str(word) for word in words])

    assert encode(whole) == 0
    real = Archive.append

    def dies(archive, **arrays):
        if archive.done == 200:
            raise KeyboardInterrupt
        real(archive, **arrays)

    monkeypatch.setattr(Archive, "append", dies)
    assert encode(killed) == 130
    assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.undo()
    assert encode(killed) == 0
    with np.load(whole) as arrays, np.load(killed) as others:
        assert all((arrays[name] == others[name]).all() for name in arrays)
        z, logdet = arrays["latents"], arrays["logdet"]
        assert z.shape == (297, 4, 16) and logdet.shape == (297,)
        label = arrays["labels"]
    assert sorted(set(label)) == [*range(10)]
    model = load_model(trained("tarflow"))
    images = model.decode(z[:20], label[:20])
    again, same = model.encode(images, label[:20])
    np.testing.assert_allclose(again, z[:20], atol=1e-3)
    np.testing.assert_allclose(same, logdet[:20], rtol=1e-4)
