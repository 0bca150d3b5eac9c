"""`jetflow sample` and `jetflow bench sample`, as a user calls them."""

import json
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from PIL import Image

import jetflow
from jetflow import cli
from jetflow.data import dataset as pipeline
from jetflow.sampling.ancestral import Sampler
from jetflow.training.log import make_grid

pytestmark = pytest.mark.usefixtures("compilation_cache", "digits")


@pytest.fixture(scope="module")
def digits(data_dir):
    """Prepared, so that no test is the first and sees the line that says so."""
    return pipeline.load("digits", "test")


@pytest.fixture
def sample(trained, tmp_path, capsys):
    """A function: samples from a trained flow; gives the grid, the images and the labels."""

    def run(name, *flags):
        out, npz = tmp_path / "some" / "grid.png", tmp_path / "other" / "images"
        arguments = ["sample", "--workdir", trained(name), "--out", out, "--npz", npz, *flags]
        assert cli.main([str(argument) for argument in arguments]) == 0
        assert f"samples of step {tiny_runs.STEPS}: {out}" in capsys.readouterr().out
        with Image.open(out) as picture:
            grid = np.asarray(picture)
        with np.load(npz) as arrays:
            return grid, arrays["images"], arrays.get("labels")

    return run


def test_samples_have_a_row_for_each_class(sample):
    grid, images, labels = sample("tarflow", "--num", 20)
    assert (images.dtype, images.shape) == (np.uint8, (20, 8, 8, 1))
    assert list(labels) == [label for label in range(10) for _ in range(2)]
    assert (grid == make_grid(images, [2] * 10)).all()
    assert len({image.tobytes() for image in images}) == 20


def test_samples_without_labels_make_a_square(sample):
    grid, images, labels = sample("volume preserving", "--num", 20)
    assert labels is None
    assert (grid == make_grid(images, [5, 5, 5, 5])).all()


def test_samples_of_one_class(sample):
    """An image depends on the seed and its number, not on how many there are, or at a time."""
    grid, images, labels = sample("tarflow", "--num", 7, "--label", 3, "--batch_size", 20)
    assert list(labels) == [3] * 7
    assert (grid == make_grid(images, [3, 3, 1])).all()
    _, more, _ = sample("tarflow", "--num", 20, "--label", 3)
    # Another batch size may round the last bit of a pixel's value differently.
    assert np.abs(more[:7].astype(int) - images).max() <= 1
    assert (more[:7] != images).mean() < 0.01
    assert (more[7:14] != images).mean() > 0.5


def test_the_seed_fixes_the_samples(sample):
    grid, images, _ = sample("jet", "--num", 20, "--seed", 5)
    again = sample("jet", "--num", 20, "--seed", 5)
    other = sample("jet", "--num", 20, "--seed", 6)
    assert (again[0] == grid).all() and (again[1] == images).all()
    assert (other[1] != images).mean() > 0.5


def test_guidance_denoising_and_temperature_change_samples(sample):
    _, plain, _ = sample("tarflow", "--num", 20)
    for flags in (["--denoise"], ["--guidance", 2], ["--temperature", 0.5]):
        assert (sample("tarflow", "--num", 20, *flags)[1] != plain).any(), flags
    _, certain, _ = sample("tarflow", "--num", 20, "--temperature", 0)
    pairs = certain.reshape(10, 2, -1)
    assert (pairs[:, 0] == pairs[:, 1]).all()


def test_samples_of_an_earlier_step(trained, tmp_path, capsys):
    """Of the checkpoint before the last one."""
    out = tmp_path / "grid.png"
    arguments = ["sample", "--workdir", str(trained("jet")), "--num", "20", "--out", str(out)]
    pictures = []
    for step in (10, 12):
        assert cli.main([*arguments, "--step", str(step)]) == 0
        assert f"20 samples of step {step}" in capsys.readouterr().out
        pictures.append(out.read_bytes())
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize(
    ("name", "mesh"), [("jet", "data=-1"), ("tarflow", "data=2,fsdp=2,tensor=2")]
)
def test_eight_devices_draw_the_images_of_one(name, mesh, sample, trained, tmp_path):
    _, one, _ = sample(name, "--num", 30)
    npz = tmp_path / "eight.npz"
    arguments = ["sample", "--workdir", trained(name), "--num", 30, "--batch_size", 12]
    arguments += ["--npz", npz, "--out", tmp_path / "eight.png", "--mesh", mesh]
    process = tiny_runs.start(list(map(str, arguments)), JAX_NUM_CPU_DEVICES="8")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    with np.load(npz) as arrays:
        eight = arrays["images"]
    # The last bit of a pixel's value may be rounded differently.
    assert np.abs(eight.astype(int) - one).max() <= 1
    assert (eight != one).mean() < 0.01


def test_images_that_are_not_finite_are_counted(trained, tmp_path, monkeypatch, capsys):
    """And said to be so in the arrays, where they are black."""
    latents = Sampler._prior_noise

    def broken(self, key, index):
        return (
            latents(self, key, index).at[:, -1].set(jnp.where(index % 3 == 1, jnp.nan, 0)[:, None])
        )

    monkeypatch.setattr(Sampler, "_prior_noise", broken)
    npz = tmp_path / "images.npz"
    arguments = ["sample", "--workdir", trained("tarflow"), "--num", 20, "--batch_size", 8]
    assert (
        cli.main([*map(str, arguments), "--out", str(tmp_path / "grid.png"), "--npz", str(npz)])
        == 0
    )
    assert "7 of 20 images are not finite, and black" in capsys.readouterr().err
    with np.load(npz) as arrays:
        np.testing.assert_array_equal(arrays["finite"], np.arange(20) % 3 != 1)
        assert not arrays["images"][1::3].any() and arrays["images"][::3].any((1, 2, 3)).all()
    for mode in ("interpolate", "trace"):
        flags = ["--mode", mode, "--temperature", "1e38", "--out", str(tmp_path / "mode.png")]
        assert cli.main(["sample", "--workdir", str(trained("tarflow")), *flags]) == 0
        assert "of 8 images are not finite" in capsys.readouterr().err


def test_killed_sampling_goes_on(trained, tmp_path, capsys):
    arguments = ["sample", "--workdir", trained("tarflow"), "--num", 2000, "--batch_size", 20]
    arguments = [*map(str, arguments), "--out", str(tmp_path / "grid.png"), "--npz"]
    killed, whole = tmp_path / "killed.npz", tmp_path / "whole.npz"
    process = tiny_runs.start([*arguments, str(killed)])
    progress = tmp_path / "killed.npz.partial" / "progress.json"
    while not (progress.exists() and json.loads(progress.read_text())["done"] >= 100):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    done = json.loads(progress.read_text())["done"]
    assert done < 2000

    assert cli.main([*arguments, str(killed)]) == 0
    assert f"going on behind {done:,} images" in capsys.readouterr().out
    assert cli.main([*arguments, str(whole)]) == 0
    with np.load(killed) as actual, np.load(whole) as expected:
        np.testing.assert_array_equal(actual["images"], expected["images"])
        np.testing.assert_array_equal(actual["labels"], expected["labels"])
    assert not progress.parent.exists()


def test_methods_draw_the_same(sample, capsys):
    _, cached, _ = sample("tarflow", "--num", 20)
    _, jacobi, _ = sample("tarflow", "--num", 20, "--method", "jacobi", "--tolerance", 0)
    assert np.abs(jacobi.astype(int) - cached).max() <= 1
    assert (jacobi != cached).mean() < 0.01


def test_windows_are_measured_once(trained, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(trained("tarflow"), workdir)
    out = str(tmp_path / "grid.png")
    arguments = ["sample", "--workdir", str(workdir), "--method", "auto", "--out", out]
    said = []
    for flags in ([], [], ["--guidance", "1"]):
        assert cli.main([*arguments, *flags]) == 0
        said.append(capsys.readouterr().err)
    assert ["measuring how each block" in text for text in said] == [True, False, True]
    plain, guided = json.loads((workdir / "checkpoints" / "decoding.json").read_text())
    assert len(plain["windows"]) == 2 and set(plain["windows"]) <= {1, 3}
    assert plain["conditions"]["guidance"] is None
    assert guided["conditions"]["guidance"]["scale"] == 1


@pytest.mark.parametrize("content", ["[{", "{}", '[{"windows": [1]}]'])
def test_damaged_calibrations_are_measured_again(content, trained, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(trained("tarflow"), workdir)
    known = workdir / "checkpoints" / "decoding.json"
    known.write_text(content)
    arguments = ["sample", "--workdir", workdir, "--method", "auto", "--out", tmp_path / "grid.png"]
    assert cli.main(list(map(str, arguments))) == 0
    assert f"{known} is damaged, and will be written anew" in capsys.readouterr().err
    assert len(json.loads(known.read_text())) == 1


@pytest.mark.parametrize(
    ("name", "mode", "size"),
    [
        ("tarflow", "reconstruct", (2, 5)),
        ("jet", "interpolate", (1, 5)),
        ("tarflow", "interpolate", (1, 5)),
        ("tarflow", "trace", (5, 3)),  # noise, and behind each of two blocks
        ("jet", "trace", (5, 6)),
    ],
)
def test_modes(name, mode, size, trained, tmp_path, capsys):
    out = tmp_path / "picture.png"
    arguments = ["sample", "--workdir", trained(name), "--mode", mode, "--num", 5, "--out", out]
    assert cli.main(list(map(str, arguments))) == 0
    said = capsys.readouterr().out
    assert f"{mode} of step {tiny_runs.STEPS}: {out}" in said
    rows, columns = size
    with Image.open(out) as picture:
        blank = make_grid(np.zeros((rows * columns, 8, 8, 1), np.uint8), [columns] * rows)
        assert (picture.height, picture.width) == blank.shape[:2]
    if mode == "reconstruct":
        largest = float(said.partition("largest ")[2].partition(",")[0])
        assert 0 < largest < 0.01


def test_a_trace_moves(trained, tmp_path, capsys):
    out = tmp_path / "trace.gif"
    arguments = ["sample", "--workdir", trained("tarflow"), "--mode", "trace", "--out", out]
    assert cli.main(list(map(str, arguments))) == 0
    with Image.open(out) as picture:
        assert picture.n_frames == 3


def test_a_trace_is_of_the_samples(trained, tmp_path, capsys):
    """Its last frame is what plain sampling draws, denoised or not."""
    for flags in ([], ["--denoise", "--guidance", "1"]):
        images = {}
        for mode in ("samples", "trace"):
            out = tmp_path / f"{mode}.png"
            arguments = ["sample", "--workdir", trained("tarflow"), "--mode", mode, "--num", 4]
            assert cli.main([*map(str, arguments), *flags, "--out", str(out)]) == 0
            with Image.open(out) as picture:
                images[mode] = np.asarray(picture).astype(int)
        stages = 3 + bool(flags)
        scale = images["trace"].shape[0] // (4 * 10 + 2)
        last = images["trace"][::scale, ::scale][:, (stages - 1) * 10 :]
        scale = images["samples"].shape[0] // (2 * 10 + 2)  # of four classes, two a row
        drawn = images["samples"][::scale, ::scale]
        for number in range(4):
            y, x = 10 * (number // 2) + 2, 10 * (number % 2) + 2
            tile = last[10 * number + 2 :][:8, 2:10]
            assert tile.any() and np.abs(tile - drawn[y : y + 8, x : x + 8]).max() <= 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mode", "reconstruct", "--guidance", "2"], "--guidance is for samples"),
        (["--mode", "reconstruct", "--denoise"], "--denoise is for samples"),
        (["--images", "a.png"], "--images is for --mode reconstruct and interpolate"),
        (["--mode", "interpolate", "--guidance", "2"], "the images have no labels"),
        (["--label", "-1", "--guidance", "2"], "the images have no labels"),
    ],
)
def test_flags_without_effect_are_refused(flags, message, trained, tmp_path, capsys):
    arguments = ["sample", "--workdir", str(trained("tarflow")), "--out", str(tmp_path / "x.png")]
    assert cli.main([*arguments, *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_interpolation_between_pictures(trained, tmp_path, capsys):
    """The ends of the path are the pictures."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (2, 8, 8), np.uint8)
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, picture in zip(paths, pictures, strict=True):
        Image.fromarray(picture).save(path)
    out = tmp_path / "way.png"
    arguments = ["sample", "--workdir", trained("jet"), "--mode", "interpolate", "--num", 2]
    arguments += ["--images", ",".join(map(str, paths)), "--out", out]
    assert cli.main(list(map(str, arguments))) == 0
    with Image.open(out) as picture:
        assert (np.asarray(picture) == make_grid(pictures[..., None], [2])).all()


def test_bench_as_json(trained, tmp_path, capsys):
    arguments = ["bench", "sample", "--workdir", trained("tarflow"), "--batch_sizes", "2,4"]
    arguments += ["--repeats", 2, "--json"]
    variables = jetflow.load_model(trained("tarflow")).variables
    parameters = sum(x.size for x in jax.tree.leaves(variables))
    assert cli.main(list(map(str, arguments))) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["batch_size"], line["method"]) for line in lines] == [
        (2, "cached"), (2, "jacobi"), (4, "cached"), (4, "jacobi"),
    ]  # fmt: skip
    for line in lines:
        least, most = line["seconds_range"]
        assert 0 < least <= line["seconds"] <= most
        assert line["images_per_second"] == pytest.approx(line["batch_size"] / line["seconds"])
        assert line["ms_per_image"] == pytest.approx(1000 / line["images_per_second"])
        assert line["token_by_token"] == [3, 3]
        assert all(1 <= sweeps <= 3 for sweeps in line["sweeps"])
        assert line["peak_bytes"] > parameters * 4
        assert "cpu" in line["device"]
    assert lines[0]["sweeps"] == [3, 3]


def test_bench_of_random_weights(capsys):
    """Of a config, whose data set need not be there."""
    name = tiny_runs.ROOT / "configs" / "imagenet64_tarflow.py"
    arguments = ["bench", "sample", f"--config={name}", "--batch_sizes=2", "--repeats=1", "--json"]
    small = ["--config.flow.width=64", "--config.flow.num_blocks=1", "--config.flow.patch_size=16"]
    arguments += [*small, "--config.flow.layers_per_block=(1,)"]
    assert cli.main([*arguments, "--methods=cached"]) == 0
    [line] = map(json.loads, capsys.readouterr().out.splitlines())
    assert line["token_by_token"] == [15] and line["images_per_second"] > 0
    assert cli.main(arguments) == 2
    assert "give --workdir of a trained flow, or --methods cached" in capsys.readouterr().err
