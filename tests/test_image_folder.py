"""Trees of images: which folders are splits and classes, what is left out, what was prepared."""

import hashlib
import os
from collections import Counter
from pathlib import Path

import archives
import numpy as np
import pytest

import jetflow
from jetflow import hosts
from jetflow.cli import main
from jetflow.data.dataset import eval_batches, load
from jetflow.types import UsageError

PICTURES = [archives.jpeg(number, 8, 8) for number in range(6)]


@pytest.fixture
def pets(tmp_path):
    """A function: paths below a folder `pets`, of images or of given content -> its path."""

    def write(*paths, **contents):
        for number, path in enumerate([*paths, *contents]):
            file = tmp_path / "pets" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(contents.get(path, PICTURES[number % 6]))
        return tmp_path / "pets"

    return write


@pytest.fixture
def prepare(tmp_path):
    """A function: options -> the data set that is prepared of `pets`."""

    def prepared(**options):
        return jetflow.prepare(
            "folder/pets/4", manual_dir=tmp_path, data_dir=tmp_path / "data", workers=1, **options
        )

    return prepared


def images(*folders, number=3):
    return [f"{folder}/{k}.jpg" for folder in folders for k in range(number)]


def labels(prepared, split="train"):
    """How many images of the split each class has, by its name."""
    data = prepared.splits[split]
    names = (prepared.folder / "label.labels.txt").read_text().split("\n")
    found = next(eval_batches(data, batch_size=len(data))).label
    return dict(Counter(names[label] for label in found))


def lengths(prepared):
    return {split: len(data) for split, data in prepared.splits.items()}


@pytest.mark.parametrize(
    ("train", "others"),
    [
        ("train", {"valid": "validation", "test": "test"}),
        ("Training", {"Testing": "test"}),
        ("train", {"val": "validation"}),
        ("training_set", {"test_set": "test"}),
        ("TRAIN", {"dev": "validation"}),
    ],
)
def test_split_folders(pets, prepare, capsys, train, others):
    root = pets(*images(*(f"{split}/{kind}" for split in (train, *others) for kind in "ab")))
    prepared = prepare()
    assert lengths(prepared) == dict.fromkeys(["train", *others.values()], 6)
    assert labels(prepared) == {"a": 3, "b": 3}
    said = capsys.readouterr().err
    for name, split in {train: "train", **others}.items():
        assert f"split {split} is folder {name}" in said
    assert f"from {root}" in prepared.splits["train"].describe()


@pytest.mark.parametrize(
    ("paths", "left_out", "left"),
    [
        (images("train/a", "test/a", "extra"), "pets/extra (3 images)", {"train": 3, "test": 3}),
        (images("train/a", "test/a", "test/b"), "pets/test/b (3 images)", {"train": 3, "test": 3}),
        (images("train/a", "train/b", "test"), "pets/test (3 images)", {"train": 4, "test": 2}),
        (images("train/a", "val/a", "validation/a"), "pets/val (3 images)",
         {"train": 3, "validation": 3}),
        ([*images("train/a", "test/a"), "one.jpg"], "pets (1 images)", {"train": 3, "test": 3}),
    ],
)  # fmt: skip
def test_images_outside_of_splits_and_classes(pets, prepare, capsys, paths, left_out, left):
    root = pets(*paths)
    (root / "notes.txt").write_text("which are no images")
    argv = ["prepare", "folder/pets/4", f"--manual_dir={root.parent}"]
    assert main([*argv, f"--data_dir={root.parent / 'data'}"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert left_out in line and "--leave_out" in line
    assert lengths(prepare(leave_out=True)) == left


def test_splits_without_train_are_refused(pets, prepare):
    pets(*images("Test/a", "valid/a"))
    with pytest.raises(UsageError, match="valid, Test and no folder train"):
        prepare()


def test_classes_have_a_readable_image(pets, prepare):
    pets(*images("cat", "dog", number=8), **{"annotations/1.xml": b"<a/>"})
    pets(**{f"cut/{number}.jpg": archives.unreadable(1)["truncated"] for number in range(2)})
    pets(**{"LICENSE.txt": b"free", "cat/.hidden": b""})
    (prepared := prepare())
    assert set(labels(prepared)) == {"cat", "dog"} and prepared.splits["train"].num_classes == 2
    assert [line.split("\t")[0] for line in prepared.unreadable] == [
        "LICENSE.txt", "annotations/1.xml", "cut/0.jpg", "cut/1.jpg",
    ]  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"max_pixels": 100}])
def test_each_class_is_trained_on(pets, prepare, options):
    root = pets(*images("one", "two", number=1), "cut/0.jpg", **{"cut/1.jpg": b"", "README": b""})
    pets(**{f"big/{number}.jpg": archives.jpeg(1, 16, 16) for number in range(2)})
    prepared = prepare(**options)
    classes = {"one", "two", "cut"} | ({"big"} if not options else set())
    assert set(labels(prepared)) == classes
    assert prepared.splits["train"].num_classes == len(classes)
    assert sum("max_pixels" in line for line in prepared.unreadable) == (2 if options else 0)
    assert lengths(prepared).get("test", 0) == (0 if options else 1)
    (root / "Thumbs.db").write_bytes(b"no image")
    (root / "README").unlink()
    prepare(**options)
    with pytest.raises(UsageError, match=r"max_pixels.*--overwrite"):
        prepare(max_pixels=200)
    assert prepare(overwrite=True).splits["train"].num_classes == 4


@pytest.mark.parametrize("left", ["nothing", "no dataset_info.json", "the old one aside"])
def test_overwrite_goes_on_after_a_kill_within_it(pets, prepare, left):
    pets(*images("a", "b"))
    folder = prepare().folder
    if left == "the old one aside":
        folder.rename(folder.with_name(f"{folder.name}.old"))
    else:
        (folder / "dataset_info.json").unlink()
        with pytest.raises(UsageError, match=r"without a complete .* --overwrite"):
            prepare()
    if left == "nothing":
        for file in folder.iterdir():
            file.unlink()
    assert sum(lengths(prepare(overwrite=True)).values()) == 6
    assert {path.name for path in folder.parent.iterdir()} == {"1.0.0", "1.0.0.lock"}


def test_numbered_classes_are_in_the_order_of_numbers(pets, prepare):
    pets(*images(*map(str, range(12)), number=6))
    (prepared := prepare())
    names = (prepared.folder / "label.labels.txt").read_text().split()
    assert names == list(map(str, range(12)))
    assert labels(prepared)["10"] + labels(prepared, "test").get("10", 0) == 6


def test_images_beside_folders_have_no_classes(pets, prepare, capsys):
    pets(*images("cats", "dogs"), "one.jpg")
    assert prepare().splits["train"].num_classes == 0
    assert "pets/one.jpg lies beside folders of images" in capsys.readouterr().err


def test_classes_below_a_single_folder_are_hinted_at(pets, prepare, capsys):
    pets(*images("pets/cat", "pets/dog"))
    assert prepare().splits["train"].num_classes == 1
    assert "one class, pets" in capsys.readouterr().err


def test_links_and_special_files(pets, prepare):
    root = pets(*images("real/a", "linked"))
    (root / "b").symlink_to(root / "real" / "a")
    (root / "linked" / "gone.jpg").symlink_to(root / "nowhere.jpg")
    os.mkfifo(root / "linked" / "pipe.jpg")
    prepared = prepare()
    assert sum(lengths(prepared).values()) == 9 and len(prepared.unreadable) == 1
    (root / "real" / "back").symlink_to(root)
    with pytest.raises(UsageError, match=r"real/back leads back .*remove"):
        prepare()


def test_one_of_twenty_is_held_out_by_path_and_at_least_one(pets, prepare):
    pets(*images(*map(str, range(30)), number=8))
    paths = [f"{kind}/{number}.jpg" for kind in range(30) for number in range(8)]
    hashes = [int.from_bytes(hashlib.sha256(p.encode()).digest()[:8], "big") for p in paths]
    chosen = {path for path, value in zip(paths, hashes, strict=True) if value % 20 == 0}
    chosen.add(paths[np.argmin(hashes)])
    test = prepare().splits["test"]
    expected = [int(path.split("/")[0]) for path in sorted(chosen)]
    assert next(eval_batches(test, batch_size=len(test))).label.tolist() == expected
    assert len(chosen) > 5


def test_file_names_of_every_kind(tmp_path, prepare):
    odd = b"b\xffd\tn\nm.jpg"  # not UTF-8, and neither of one line nor of one column
    for kind in (b"cats \xe9", b"do\ngs"):
        inner = os.fsencode(tmp_path / "pets") + b"/" + kind
        os.makedirs(inner)
        for name, content in {odd: b"", b"\xfc.jpg": PICTURES[0], b"c": b"x"}.items():
            Path(os.fsdecode(inner + b"/" + name)).write_bytes(content)
    prepared = prepare()
    assert {line.split("\t")[0] for line in prepared.unreadable} == {
        f"{kind}/{name}"
        for kind in (r"cats \udce9", r"do\ngs")
        for name in (r"b\udcffd\tn\nm.jpg", "c")
    }
    assert prepared.splits["train"].num_classes == 2
    assert lengths(prepare()) == lengths(prepared)


@pytest.mark.parametrize("name", ["folder", "folder/pets", "folder/pets/2", "folder/../64"])
def test_malformed_names(name, tmp_path):
    with pytest.raises(UsageError, match="expected folder/NAME/SIZE"):
        load(name, "train", data_dir=tmp_path)


# What was prepared, and what is there now.


@pytest.mark.parametrize("change", ["added", "removed", "edited", "touched", "another tree"])
def test_a_tree_that_is_another_is_refused_or_prepared_anew(pets, prepare, change, tmp_path):
    root = pets(*images("a", "b", number=4))
    before = prepare()
    assert lengths(prepare()) == lengths(before)
    file = root / "b" / "3.jpg"
    match change:
        case "added":
            pets("b/4.jpg")
        case "removed":
            file.unlink()
        case "edited":
            file.write_bytes(archives.jpeg(7, 8, 8))
        case "touched":
            os.utime(file, ns=(0, 0))
        case "another tree":
            root.rename(tmp_path / "elsewhere")
            pets(*images("c", "d"))
    with pytest.raises(UsageError, match=r"pets/.*--overwrite"):
        prepare()
    assert load("folder/pets/4", "train", data_dir=tmp_path / "data").checksum() == (
        before.splits["train"].checksum()
    )
    after = prepare(overwrite=True)
    images_now = sum(path.suffix == ".jpg" for path in root.rglob("*"))
    assert sum(lengths(after).values()) == images_now
    assert lengths(prepare()) == lengths(after)


def test_what_another_process_made_meanwhile_is_compared_too(pets, prepare, monkeypatch, tmp_path):
    root = pets(*images("a", "b"))
    (tmp_path / "other").mkdir()
    locked = hosts.locked

    def overtaken(*args, **kwargs):
        monkeypatch.setattr(hosts, "locked", locked)
        root.rename(tmp_path / "other" / "pets")
        pets(*images("c"))
        prepare()
        return locked(*args, **kwargs)

    monkeypatch.setattr(hosts, "locked", overtaken)
    with pytest.raises(UsageError, match=r"pets/a.*--overwrite"):
        prepare()


def test_a_tree_that_was_moved_or_is_gone_is_the_same(pets, prepare, tmp_path):
    root = pets(*images("a", "b"))
    before = prepare()
    (tmp_path / "moved").mkdir()
    root.rename(tmp_path / "moved" / "pets")
    for place in (tmp_path / "moved", tmp_path):
        now = jetflow.prepare("folder/pets/4", manual_dir=place, data_dir=tmp_path / "data")
        assert now.splits["train"].checksum() == before.splits["train"].checksum()
        assert str(root) in now.splits["train"].origin


def test_the_first_images_that_were_left_out_are_named(pets, tmp_path, capsys):
    pets(*images("a", "b"), **{f"a/broken{number}.jpg": b"x" for number in range(7)})
    argv = ["prepare", "folder/pets/4", f"--manual_dir={tmp_path}"]
    assert main([*argv, f"--data_dir={tmp_path / 'data'}"]) == 0
    said = capsys.readouterr().out
    assert sum(f"a/broken{number}.jpg" in said for number in range(7)) == 5
    assert "7 files" in said and "unreadable.tsv" in said
