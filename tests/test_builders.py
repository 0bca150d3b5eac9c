"""Data sets from small archives of exactly the published layouts."""

import functools
import hashlib
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import archives
import numpy as np
import pytest

from jetflow import cli
from jetflow.data import dataset as pipeline
from jetflow.data import images, prepared
from jetflow.data.builders import BUILDERS, shapes
from jetflow.data.builders.archived import Progress
from jetflow.data.builders.imagenet import ImageNet21k
from jetflow.data.dataset import eval_batches
from jetflow.data.facts import FACTS, differences
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

    def make(name, write=None, **options) -> tuple[dict[str, Batch], dict[str, pipeline.Dataset]]:
        manual = tmp_path / "manual"
        manual.mkdir(exist_ok=True)
        (write or ARCHIVES[name])(manual, **options)
        builder = prepared.prepare(name, tmp_path / "data", manual_dir=manual, workers=1)
        sets = {s: pipeline.load(name, s, data_dir=tmp_path / "data") for s in builder.info.splits}
        return {s: next(eval_batches(each, batch_size=len(each))) for s, each in sets.items()}, sets

    return make


def unreadable(dataset: pipeline.Dataset) -> list[list[str]]:
    """Name and reason of each file that was left out."""
    [folder] = {Path(path).parent for path in dataset.source._records.data_source._paths}
    lines = (folder / "unreadable.tsv").read_text().splitlines()
    return [line.split("\t") for line in lines]


@pytest.mark.parametrize("size", [32, 64])
def test_old_imagenet(make, tmp_path, size):
    pixels = archives.old_imagenet(tmp_path, size)
    batches, sets = make(f"imagenet{size}_old")
    np.testing.assert_array_equal(batches["train"].image, pixels[:30])
    np.testing.assert_array_equal(batches["validation"].image, pixels[30:])
    assert sets["train"].num_classes == 0 and (batches["train"].label == -1).all()
    assert sets["train"].resize == "none (pixels as published)"
    assert unreadable(sets["train"]) == []


def test_old_imagenet_has_images_of_one_size_only(make):
    def write(folder):
        archives.old_imagenet(folder, 32)
        odd = archives.encoded(archives.picture(0, 33, 32), "PNG")
        archives.tar_of({"valid_32x32/1.png": odd, "valid_32x32/2.png": archives.encoded(
            archives.picture(0, 32, 32), "PNG")}, folder / "valid_32x32.tar")  # fmt: skip

    _, sets = make("imagenet32_old", write)
    assert len(sets["validation"]) == 1
    [[name, reason]] = unreadable(sets["train"])
    assert name == "valid_32x32.tar/valid_32x32/1.png" and reason == "33x32 pixels instead of 32x32"


@pytest.mark.parametrize("kind", ["npz", "pickle"])
@pytest.mark.parametrize("size", [32, 64])
def test_new_imagenet(make, tmp_path, monkeypatch, size, kind):
    monkeypatch.setattr(BUILDERS[f"imagenet{size}_new"], "PIECE_IMAGES", 3)
    batches, sets = make(f"imagenet{size}_new", kind=kind)
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
        archives.cifar10(folder)
        evil = b"cos\nsystem\n(S'touch owned'\ntR."
        names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
        files = {f"cifar-10-batches-py/{name}": evil for name in names}
        archives.gzip_tar(files, folder / "cifar-10-python.tar.gz")

    with pytest.raises(UsageError, match=r"asks for os\.system"):
        make("cifar10", write)


@pytest.mark.parametrize("kind", ["npz", "pickle"])
def test_a_batch_that_lacks_or_is_there_twice_is_refused(make, kind):
    def write(folder):
        archives.new_imagenet(folder, 32, kind)
        [path] = folder.glob("*train*.zip")
        with zipfile.ZipFile(path) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
        [fourth] = (name for name in files if "batch_4" in name)
        content = files.pop(fourth)
        archives.zip_of(files | ({} if kind == "npz" else {fourth + ".npz": content,
                                                           fourth: content}), path)  # fmt: skip

    found = {"npz": r"3, 5, 6", "pickle": r"3, 4, 4, 5, 6"}[kind]
    with pytest.raises(UsageError, match=rf"expected files like .*found \[1, 2, {found}"):
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


def test_imagenet1k(make):
    batches, sets = make("imagenet1k/64")
    kinds = archives.awkward(0)
    # The classes lie in the tar from last to first, and are numbered in alphabetical order.
    assert batches["train"].label.tolist() == [2] * 8 + [1] * 8 + [0] * 8
    for row, content in enumerate(kinds.values()):
        expected = images.resize(images.decode(content), 64)
        np.testing.assert_array_equal(batches["train"].image[16 + row], expected)
    reasons = unreadable(sets["train"])
    assert [name for name, _ in reasons] == [f"{s}.tar/{s}_8.JPEG" for s in archives.SYNSETS[::-1]]
    assert all("truncated" in reason for _, reason in reasons)
    # Image k of validation has the k-th line of the devkit, in numbers of the devkit's own.
    order = (3, 1, 2, 6, 5, 4)
    truth = [2, 1, 0, 0, 2, 1]
    assert batches["validation"].label.tolist() == [truth[number - 1] for number in order]
    first = images.resize(images.decode(archives.jpeg(103)), 64)
    np.testing.assert_array_equal(batches["validation"].image[0], first)
    assert sets["train"].resize == (
        "short side to 64 by a box filter (bicubic where it enlarges), centre crop"
    )


def test_imagenet21k(make):
    batches, sets = make("imagenet21k/32")
    train, held_out = batches["train"], batches["validation"]
    names = [f"{s}_{k}.JPEG" for s in archives.SYNSETS for k in range(40)]
    chosen = [
        int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 256 == 0
        for name in names
    ]
    # The last tar is cut in two.
    assert 0 < len(train.label) + len(held_out.label) - 80 < 40
    assert len(held_out.label) == sum(chosen[: len(train.label) + len(held_out.label)]) > 0
    assert sorted({*train.label, *held_out.label}) == [0, 1, 2] and sets["train"].num_classes == 3
    reasons = dict(unreadable(sets["train"]))
    assert len(reasons) == 2 * 4 + 1
    assert reasons["n01440764.tar/n01440764_901.JPEG"] == "empty file"
    assert "tar is damaged behind its file number" in reasons["n02119789.tar"]


def test_imagenet21k_is_the_same_from_each_layout(make, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ImageNet21k, "PIECE_BYTES", 10_000)
    layouts = ("winter21_whole", "winter21_whole.tar", "winter21_whole.tar.gz")
    checksums = []
    for layout in layouts:
        manual = tmp_path / layout.replace(".", "_")
        manual.mkdir()
        archives.imagenet21k(manual, layout)
        where = tmp_path / "data" / manual.name
        said: list[Progress] = []
        prepared.prepare(
            "imagenet21k/32", where, manual_dir=manual, workers=1, on_progress=said.append
        )
        looked = [each.bytes_read for each in said if each.is_first_pass]
        assert looked == sorted(looked) and bool(looked) == layout.endswith(".gz")
        assert (
            not looked or 0 < looked[-1] <= said[0].bytes_in_all == (manual / layout).stat().st_size
        )
        loaded = [
            pipeline.load("imagenet21k/32", s, data_dir=where) for s in ("train", "validation")
        ]
        checksums.append([each.checksum() for each in loaded])
        assert not list(where.rglob("*.partial"))
    assert checksums[0] == checksums[1] == checksums[2]
    assert "takes a first pass" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "held_out"), [("afhq/64", "validation"), ("afhq_v2/64", "test")])
def test_afhq(make, name, held_out):
    batches, sets = make(name)
    assert batches["train"].label.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert batches[held_out].label.tolist() == [0, 0, 1, 1, 2, 2]
    wild = images.resize(images.decode(archives.jpeg(41, 96, 96)), 64)
    np.testing.assert_array_equal(batches["train"].image[7], wild)
    assert sets["train"].num_classes == 3


def test_folder_with_classes(make):
    batches, sets = make("folder/pets/48")
    assert sets["train"].image_shape == (48, 48, 3) and sets["train"].num_classes == 2
    assert len(sets["train"]) + len(sets["test"]) == 48 and len(sets["test"]) > 0
    assert len(unreadable(sets["train"])) == 4  # but no .DS_Store
    assert set(batches["train"].label) == {0, 1}


def test_folder_with_stray_files(make, tmp_path):
    def write(folder):
        archives.tree(folder)
        (folder / "pets" / "LICENSE.txt").write_text("free")
        (folder / "pets" / "cats" / "gone.jpg").symlink_to(folder / "nowhere.jpg")
        os.mkfifo(folder / "pets" / "cats" / "pipe.jpg")

    batches, sets = make("folder/pets/16", write)
    assert sets["train"].num_classes == 2 and set(batches["train"].label) == {0, 1}
    reasons = dict(unreadable(sets["train"]))
    assert {"LICENSE.txt", "cats/gone.jpg"} <= set(reasons) and len(reasons) == 6


def test_folder_with_images_beside_folders_has_no_classes(make, capsys):
    def write(folder):
        archives.tree(folder)
        (folder / "pets" / "one.jpg").write_bytes(archives.jpeg(0))

    _, sets = make("folder/pets/16", write)
    assert sets["train"].num_classes == 0
    assert "pets/one.jpg lies beside folders of images" in capsys.readouterr().err


def test_folder_without_classes_or_with_splits(make, tmp_path):
    def write(folder):
        archives.tree(folder, classes=False)
        other = tmp_path / "manual" / "own"
        for split in ("train", "val"):
            archives.tree(other / split, classes=True)

    batches, sets = make("folder/pets/16", write)
    assert sets["train"].num_classes == 0 and (batches["train"].label == -1).all()
    prepared.prepare("folder/own/16", tmp_path / "data", manual_dir=tmp_path / "manual", workers=1)
    whole = pipeline.load("folder/own/16", "validation", data_dir=tmp_path / "data")
    assert len(whole) == 48 and whole.num_classes == 1  # "pets"


def test_folder_holds_out_by_path_and_at_least_one_image(make):
    def write(folder):
        for kind in range(30):
            for number in range(8):
                path = folder / "pets" / str(kind) / f"{number}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archives.jpeg(0, 8, 8))
        for number in range(3):
            path = folder / "few" / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(archives.encoded(np.full((4, 4, 3), number, np.uint8), "PNG"))

    batches, _ = make("folder/pets/4", write)
    paths = [f"{kind}/{number}.jpg" for kind in range(30) for number in range(8)]
    hashes = [int.from_bytes(hashlib.sha256(p.encode()).digest()[:8], "big") for p in paths]
    chosen = {path for path, value in zip(paths, hashes, strict=True) if value % 20 == 0}
    chosen.add(paths[np.argmin(hashes)])
    names = sorted(map(str, range(30)))  # class k is that of the k-th name
    expected = [names.index(path.split("/")[0]) for path in sorted(chosen)]
    assert batches["test"].label.tolist() == expected and len(chosen) > 5

    batches, sets = make("folder/few/4", write)
    assert (len(sets["train"]), len(sets["test"])) == (2, 1)
    values = [hashlib.sha256(f"{number}.png".encode()).digest() for number in range(3)]
    assert batches["test"].image.max() == values.index(min(values))


def test_file_names_of_every_kind(make, tmp_path):
    odd = b"b\xffd\tn\nm.jpg"  # not UTF-8, and neither of one line nor of one column

    def write(folder):
        for kind in (b"cats \xe9", b"do\ngs"):
            inner = os.fsencode(folder / "pets") + b"/" + kind
            os.makedirs(inner)
            for name, content in {odd: b"", b"\xfc.jpg": archives.jpeg(0), b"c": b"x"}.items():
                Path(os.fsdecode(inner + b"/" + name)).write_bytes(content)

    _, sets = make("folder/pets/8", write)
    assert {name for name, _ in unreadable(sets["train"])} == {
        f"{kind}/{name}"
        for kind in (r"cats \udce9", r"do\ngs")
        for name in (r"b\udcffd\tn\nm.jpg", "c")
    }
    assert sets["train"].num_classes == 2


def test_shapes_are_drawn_without_archives(data_dir):
    for size in shapes.SIZES[:2]:
        train, test = (
            pipeline.load(f"shapes/{size}", s, data_dir=data_dir) for s in ("train", "test")
        )
        assert (len(train), len(test), train.num_classes) == (256, 64, 10)
        assert train.image_shape == (size, size, 3)
        assert not np.array_equal(train.source[0]["image"], test.source[0]["image"])
    means = {label: [] for label in range(10)}
    batch = next(eval_batches(train, batch_size=256))
    for image, label in zip(batch.image, batch.label, strict=True):
        means[int(label)].append(image)
    assert min(map(len, means.values())) == 25


@pytest.mark.parametrize("name", [
    "imagenet64_old", "imagenet32_old", "imagenet21k/32", "imagenet21k_fall11/64", "afhq/64",
    "afhq_v2/64",
])  # fmt: skip
def test_awkward_files_come_and_what_is_no_image_is_listed(make, name):
    size, published = FACTS[name].image_shape[0], name.endswith("_old")
    good, bad = archives.awkward(1, *((size, size) if published else (80, 60))), {}
    if published:
        bad["small"] = good.pop("small")
    bad |= archives.unreadable(1)
    contents = enumerate([*good.values(), *bad.values()])
    files = {f"{number:02d}.JPEG": content for number, content in contents}
    batches, sets = make(name, functools.partial(archives.training_images, name=name, files=files))
    expected = [images.resize(images.decode(content), size) for content in good.values()]
    np.testing.assert_array_equal(batches["train"].image, expected)
    listed = [name.rsplit("/", 1)[1] for name, _ in unreadable(sets["train"])]
    assert listed == list(files)[len(good) :] and len(listed) >= 4


# What is said.


@pytest.mark.parametrize("name", ARCHIVES)
def test_the_checksum_is_that_of_the_decoded_pixels(make, name):
    _, sets = make(name)
    for dataset in sets.values():
        known = dataset.known_checksum
        assert (
            known and known == pipeline.dataclasses.replace(dataset, known_checksum=None).checksum()
        )
        assert dataset.facts() == {
            "name": name,
            "version": "1.0.0",
            "split": dataset.split,
            "examples": len(dataset),
            "resize": dataset.resize,
            "checksum": known,
        }


@pytest.mark.parametrize("name", sorted({name.partition("/")[0] for name in ARCHIVES}))
def test_missing_archives_are_named_with_their_sizes(name, tmp_path, capsys):
    full_name = next(each for each in ARCHIVES if each.partition("/")[0] == name)
    (tmp_path / "other.tar").touch()
    argv = ["prepare", full_name, f"--data_dir={tmp_path / 'data'}", f"--manual_dir={tmp_path}"]
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "found there: other.tar" in error
    builder = prepared._maker(full_name, tmp_path / "data")()
    for archive in builder.archives:
        size = f"{archive.size:,} bytes" if isinstance(archive.size, int) else archive.size
        assert f"{archive.name} ({size}" in error
    with pytest.raises(UsageError, match=f"jetflow prepare {full_name} --manual_dir DIR") as caught:
        pipeline.load(full_name, "train", data_dir=tmp_path / "data")
    assert all(archive.name in str(caught.value) for archive in builder.archives)
    assert not list((tmp_path / "data").rglob("*.partial"))


@pytest.mark.parametrize("name", ["folder", "folder/pets", "folder/pets/2", "folder/../64"])
def test_malformed_names_of_folders(name, tmp_path):
    with pytest.raises(UsageError, match="expected folder/NAME/SIZE"):
        pipeline.load(name, "train", data_dir=tmp_path)


def test_counts_that_are_not_the_published_ones_are_named():
    question = "were published; is the archive whole?"
    assert differences("cifar10", {"train": 25, "test": 5}) == [
        f"cifar10 train: 25 images, but 50,000 {question}",
        f"cifar10 test: 5 images, but 10,000 {question}",
    ]
    hashed = {"train": 13_102_119 + 231, "validation": 51_381 - 241}
    assert differences("imagenet21k/64", hashed, unreadable=10) == []
    [said] = differences("imagenet21k/64", hashed, unreadable=9)
    assert said == f"imagenet21k/64 train+validation: 13,153,490 images, but 13,153,500 {question}"
    whole = FACTS["afhq/64"].splits
    assert differences("afhq/64", whole) == [] == differences("folder/pets/64", {"train": 3})
    assert "afhq/64 validation: 0 images" in differences("afhq/64", {"train": 14_630})[0]


def test_plans_know_the_sets_that_need_archives():
    assert set(FACTS) == {
        name
        for name in prepared.known_names()
        if name.partition("/")[0] not in ("digits", "photos", "shapes", "folder")
    }
    for name, facts in FACTS.items():
        features = prepared._maker(name, None)().info.features
        assert features["image"].shape == facts.image_shape
        assert ("label" in features) == (facts.num_classes > 0)
