"""Data sets from small archives of exactly the published layouts."""

import dataclasses
import errno
import functools
import hashlib
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import archives
import numpy as np
import pytest
import tensorflow_datasets as tfds

import jetflow
from jetflow.data import archives as reading
from jetflow.data import builder, images, sources
from jetflow.data.archives import entries, images_of_tar
from jetflow.data.dataset import Dataset, eval_batches
from jetflow.data.images import Unreadable
from jetflow.types import Batch, UsageError

# How to write the archives of each data set, at one of its sizes.
ARCHIVES: dict[str, Callable[[Path], object]] = {
    "imagenet64_old": functools.partial(archives.old_imagenet, size=64),
    "imagenet32_old": functools.partial(archives.old_imagenet, size=32),
    "imagenet64_new": functools.partial(archives.new_imagenet, size=64),
    "imagenet32_new": functools.partial(archives.new_imagenet, size=32),
    "cifar10": archives.cifar10,
    "imagenet1k/64": archives.ilsvrc2012,
    "imagenet21k/32": functools.partial(archives.imagenet21k, layout="winter21_whole"),
    "imagenet21k_fall11/64": functools.partial(archives.imagenet21k, layout="fall11_whole.tar"),
    "afhq/64": archives.afhq,
    "afhq_v2/64": functools.partial(archives.afhq, name="afhq_v2.zip", held_out="test"),
    "folder/pets/48": archives.tree,
}


@pytest.fixture
def make(tmp_path):
    """A function: name and archives -> the splits as whole batches, and the data sets."""

    def make(name, write=None, **options) -> tuple[dict[str, Batch], dict[str, Dataset]]:
        manual = tmp_path / "manual"
        manual.mkdir(exist_ok=True)
        (write or ARCHIVES[name])(manual, **options)
        sets = jetflow.prepare(
            name, data_dir=tmp_path / "data", manual_dir=manual, workers=1
        ).splits
        return {s: next(eval_batches(each, batch_size=len(each))) for s, each in sets.items()}, sets

    return make


@pytest.fixture
def unreadable(tmp_path):
    """A function: the name and reason of each file that a data set left out."""

    def unreadable(name: str) -> list[list[str]]:
        file = tmp_path / "data" / name / "1.0.0" / builder.UNREADABLE
        return [line.split("\t") for line in file.read_text().splitlines()]

    return unreadable


@pytest.mark.parametrize("name", ARCHIVES)
def test_tfds_reads_the_same_and_the_checksum_is_of_the_pixels(make, name, tmp_path):
    batches, sets = make(name)
    written = tfds.builder_from_directory(tmp_path / "data" / name / "1.0.0")
    for split, dataset in sets.items():
        whole = list(written.as_data_source(split))
        np.testing.assert_array_equal([each["image"] for each in whole], batches[split].image)
        if dataset.num_classes:
            assert [each["label"] for each in whole] == batches[split].label.tolist()
        known = dataset.known_checksum
        assert known == dataclasses.replace(dataset, known_checksum=None).checksum()
        assert dataset.facts() == {
            "name": name, "version": "1.0.0", "split": split, "examples": len(whole),
            "resize": dataset.resize, "checksum": known,
        }  # fmt: skip


@pytest.mark.parametrize("size", [32, 64])
def test_old_imagenet(make, tmp_path, size):
    pixels = archives.old_imagenet(tmp_path, size)
    batches, sets = make(f"imagenet{size}_old")
    np.testing.assert_array_equal(batches["train"].image, pixels[:30])
    np.testing.assert_array_equal(batches["validation"].image, pixels[30:])
    assert sets["train"].num_classes == 0 and (batches["train"].label == -1).all()
    assert sets["train"].resize == "none (pixels as published)"


@pytest.mark.parametrize(
    ("size", "kind"), [(64, "npz"), (64, "pickle"), (32, "npz"), (32, "unpacked")]
)
def test_new_imagenet(make, tmp_path, size, kind):
    def write(folder):
        archives.new_imagenet(folder, size, "npz" if kind == "unpacked" else kind)
        for path in list(folder.glob("*.zip")) if kind == "unpacked" else ():
            with zipfile.ZipFile(path) as archive:
                archive.extractall(path.with_suffix(""))
            path.unlink()

    batches, sets = make(f"imagenet{size}_new", write)
    pixels, labels = archives.new_imagenet(tmp_path, size)
    np.testing.assert_array_equal(batches["train"].image, pixels[:40])
    np.testing.assert_array_equal(batches["validation"].image, pixels[40:])
    np.testing.assert_array_equal(batches["train"].label, labels[:40] - 1)
    assert sets["train"].num_classes == 1000
    assert sets["train"].resize == "box filter, by its publishers"


def test_cifar10(make, tmp_path):
    batches, sets = make("cifar10")
    pixels, labels = archives.cifar10(tmp_path)
    for split, some in (("train", slice(25)), ("test", slice(25, 30))):
        np.testing.assert_array_equal(batches[split].image, pixels[some])
        np.testing.assert_array_equal(batches[split].label, labels[some])
    assert sets["test"].num_classes == 10


def test_a_pickle_that_would_run_code_is_refused(make):
    def write(folder):
        evil = b"cos\nsystem\n(S'touch owned'\ntR."
        names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
        files = {f"cifar-10-batches-py/{name}": evil for name in names}
        archives.gzip_tar(files, folder / "cifar-10-python.tar.gz")

    with pytest.raises(UsageError, match=r"asks for os\.system"):
        make("cifar10", write)


def test_a_batch_that_is_missing_is_refused(make):
    def write(folder):
        archives.new_imagenet(folder, 32)
        [path] = folder.glob("*train*.zip")
        with zipfile.ZipFile(path) as archive:
            files = {n: archive.read(n) for n in archive.namelist() if "batch_4" not in n}
        archives.zip_of(files, path)

    with pytest.raises(UsageError, match=r"expected files like .*found \[1, 2, 3, 5, 6"):
        make("imagenet32_new", write)


@pytest.mark.parametrize("name", ["imagenet64_old", "imagenet64_new", "afhq/64", "imagenet1k/64"])
def test_an_incomplete_archive_is_refused(make, name):
    def write(folder):
        ARCHIVES[name](folder)
        for path in folder.iterdir():
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2 + 100])

    with pytest.raises(UsageError, match="damaged, or not what its name says"):
        make(name, write)


def test_imagenet1k(make, unreadable):
    batches, sets = make("imagenet1k/64")
    # The classes lie in the tar from last to first, and are numbered in alphabetical order.
    assert batches["train"].label.tolist() == [2] * 8 + [1] * 8 + [0] * 8
    for row, content in enumerate(archives.awkward(0).values()):
        expected = images.resize(images.decode(content), 64)
        np.testing.assert_array_equal(batches["train"].image[16 + row], expected)
    names, reasons = zip(*unreadable("imagenet1k/64"), strict=True)
    assert list(names) == [f"{synset}.tar/{synset}_8.JPEG" for synset in archives.SYNSETS[::-1]]
    assert all("truncated" in reason for reason in reasons)
    # Image k of validation has the k-th line of the devkit, in numbers of the devkit's own.
    truth = [2, 1, 0, 0, 2, 1]
    assert batches["validation"].label.tolist() == [truth[k - 1] for k in (3, 1, 2, 6, 5, 4)]
    first = images.resize(images.decode(archives.jpeg(103)), 64)
    np.testing.assert_array_equal(batches["validation"].image[0], first)
    assert sets["train"].resize.startswith("short side to 64 by a box filter")


def test_imagenet21k_is_held_out_by_hash_and_the_same_from_each_layout(
    monkeypatch, tmp_path, unreadable, capsys
):
    monkeypatch.setattr(builder, "SHARD_BYTES", 10_000)
    checksums = set()
    for layout in ("winter21_whole", "winter21_whole.tar", "winter21_whole.tar.gz"):
        manual = tmp_path / layout.replace(".", "_")
        manual.mkdir()
        archives.imagenet21k(manual, layout)
        data = tmp_path / "data" if layout.endswith("gz") else manual / "data"
        done = jetflow.prepare("imagenet21k/32", data_dir=data, manual_dir=manual, workers=1)
        checksums.add(tuple(each.checksum() for each in done.splits.values()))
        assert sorted(os.listdir(data / "imagenet21k" / "32")) == ["1.0.0", "1.0.0.lock"]
        assert not list(data.rglob("*.tar"))
    assert len(checksums) == 1
    train, held_out = (
        next(eval_batches(each, batch_size=len(each))).label for each in done.splits.values()
    )
    names = [f"{synset}_{k}.JPEG" for synset in archives.SYNSETS for k in range(40)]
    count = len(train) + len(held_out)
    assert 0 < count - 80 < 40  # the last tar is cut in two
    digests = [hashlib.sha256(name.encode()).digest() for name in names[:count]]
    assert len(held_out) == sum(int.from_bytes(d[:8], "big") % 256 == 0 for d in digests) > 0
    assert {*train, *held_out} == {0, 1, 2} and done.splits["train"].num_classes == 3
    reasons = dict(unreadable("imagenet21k/32"))
    assert len(reasons) == len(done.unreadable) == 2 * 4 + 1
    assert reasons["n01440764.tar/n01440764_901.JPEG"] == "empty file"
    assert "tar is damaged behind its file number" in reasons["n02119789.tar"]


@pytest.mark.parametrize(("name", "held_out"), [("afhq/64", "validation"), ("afhq_v2/64", "test")])
def test_afhq(make, name, held_out):
    batches, sets = make(name)
    assert batches["train"].label.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert batches[held_out].label.tolist() == [0, 0, 1, 1, 2, 2]
    wild = images.resize(images.decode(archives.jpeg(41, 96, 96)), 64)
    np.testing.assert_array_equal(batches["train"].image[7], wild)
    assert sets["train"].num_classes == 3


@pytest.mark.parametrize("name", ["imagenet64_old", "afhq/64"])
def test_awkward_files_come_and_what_is_no_image_is_listed(make, unreadable, name):
    size, published = sources.find(name).image_shape[0], name.endswith("_old")
    good, bad = archives.awkward(1, *((size, size) if published else (80, 60))), {}
    if published:
        bad["small"] = good.pop("small")
    bad |= archives.unreadable(1)
    contents = enumerate([*good.values(), *bad.values()])
    files = {f"{number:02d}.JPEG": content for number, content in contents}
    batches, _ = make(name, functools.partial(archives.training_images, name=name, files=files))
    expected = [images.resize(images.decode(content), size) for content in good.values()]
    np.testing.assert_array_equal(batches["train"].image, expected)
    reasons = {name.rsplit("/", 1)[1]: reason for name, reason in unreadable(name)}
    assert list(reasons) == list(files)[len(good) :] and len(reasons) >= 4
    if published:
        assert "20x17 pixels instead of 64x64" in reasons.values()


def test_counts_that_are_not_the_published_ones_are_named():
    question = "were published; is the archive whole?"
    assert sources.find("cifar10").differences({"train": 25, "test": 5}) == [
        f"cifar10 train: 25 images, but 50,000 {question}",
        f"cifar10 test: 5 images, but 10,000 {question}",
    ]
    hashed = {"train": 13_102_119 + 231, "validation": 51_381 - 241}
    imagenet = sources.find("imagenet21k/64")
    assert imagenet.differences(hashed, unreadable=10) == []
    [line] = imagenet.differences(hashed, unreadable=9)
    assert line == f"imagenet21k/64 train+validation: 13,153,490 images, but 13,153,500 {question}"
    assert sources.find("folder/pets/64").differences({"train": 3}) == []


# Damage.

FILES = {f"{number}.png": bytes([number + 1]) * 700 for number in range(10)}
BLOCKS = 3  # of 512 bytes, that each file takes with its header
WHOLE = archives.tar_of(FILES)
BIT = 5 * BLOCKS * 512 + 20  # in the header of the sixth file
DAMAGED = {
    "a bit": WHOLE[:BIT] + bytes([WHOLE[BIT] ^ 1]) + WHOLE[BIT + 1 :],
    "cut in a header": WHOLE[: 5 * BLOCKS * 512 + 200],
    "cut in a file": WHOLE[: 5 * BLOCKS * 512 + 600],
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_of_a_damaged_tar_in_a_tar_the_rest_is_listed(tmp_path, kind):
    path = tmp_path / "outer.tar"  # the next bytes are those of another class
    archives.tar_of({"n1.tar": DAMAGED[kind], "n2.tar": WHOLE}, path)
    images = images_of_tar(path, 512, len(DAMAGED[kind]), "n1.tar", 0)
    contents = [image.content for image in images]
    assert contents[:5] == list(FILES.values())[:5]
    [reason] = contents[5:]
    assert isinstance(reason, Unreadable) and "damaged behind its file number 5" in str(reason)
    path.write_bytes(DAMAGED[kind])
    with pytest.raises(tarfile.ReadError):  # of images, it is damaged as a whole
        list(entries(path))


@pytest.mark.parametrize("trailer", [0, 512, 10_000])
def test_a_whole_tar_is_read_whatever_follows_its_last_file(tmp_path, trailer):
    path = tmp_path / "whole.tar"
    path.write_bytes(WHOLE[: 10 * BLOCKS * 512] + bytes(trailer))
    images = images_of_tar(path, 0, path.stat().st_size, path.name, 0)
    assert {image.name: image.content for image in images} == {
        f"whole.tar/{name}": content for name, content in FILES.items()
    }
    assert [entry.read() for entry in entries(path)] == list(FILES.values())


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ENOENT])
def test_what_a_disk_fails_to_read_for_now_is_not_left_out(tmp_path, monkeypatch, code):
    def failing(*_):
        raise OSError(code, "of that kind")

    monkeypatch.setattr(reading, "open", failing, raising=False)
    expected = UsageError if code in (errno.EIO, errno.ESTALE) else Unreadable
    with pytest.raises(expected, match="of that kind"):
        reading.read(tmp_path / "b.png")
