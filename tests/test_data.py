"""Data sets, their order, and how it is shared among processes."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tiny_runs
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from jetflow import cli, hosts
from jetflow.data import builder, sources
from jetflow.data import dataset as pipeline
from jetflow.data.dataset import Dataset, eval_batches, load, train_batches
from jetflow.data.sources import photos
from jetflow.training.experiment import set_up
from jetflow.types import Batch, UsageError

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def digits(data_dir):
    return load("digits", "test", data_dir=data_dir)


@pytest.fixture(scope="session")
def crops(data_dir):
    return load("photos/16", "test", data_dir=data_dir)


def toy(num_examples: int, *, labelled: bool = True) -> Dataset:
    """Images of 2x2x1 pixels that hold their own index + 1, labels three times it."""
    source = [
        {"image": np.full((2, 2, 1), i + 1, np.uint8), "label": 3 * i} for i in range(num_examples)
    ]
    return Dataset("toy", "1.0.0", "train", (2, 2, 1), 1000 if labelled else 0, source)


def take(batches, count: int) -> Batch:
    """The first `count` batches, joined."""
    return Batch(*(np.concatenate(x) for x in zip(*itertools.islice(batches, count), strict=True)))


def global_batches(make_batches, batch_size: int, readers: int, count: int) -> list[Batch]:
    """The first `count` batches, put together from several readers, of some rows each.

    Reader p has every `readers`-th pair of rows: what a process reads may be in several pieces.
    """
    number = np.arange(batch_size)
    rows = [number[number // 2 % readers == p] for p in range(readers)]
    parts = [itertools.islice(make_batches(rows=part), count) for part in rows]
    order = np.argsort(np.concatenate(rows))
    steps = list(zip(*parts, strict=True))
    return [Batch(*(np.concatenate(x)[order] for x in zip(*step, strict=True))) for step in steps]


def assert_same(a: Batch, b: Batch):
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


# The data sets.


def test_digits_are_the_shuffled_file(data_dir, digits):
    order = np.random.default_rng(0).permutation(1797)
    train = load("digits", "train", data_dir=data_dir)
    file = load_digits()
    for dataset, rows in [(train, order[:1500]), (digits, order[1500:])]:
        batch = next(eval_batches(dataset, batch_size=len(rows)))
        assert batch.image.shape == (len(rows), 8, 8, 1)
        expected = (file.images[rows] * 255 / 16).round()
        np.testing.assert_array_equal(batch.image[..., 0], expected)
        np.testing.assert_array_equal(batch.label, file.target[rows])
    assert digits.describe() == "digits 1.0.0 test: 297 images of 8x8x1, 10 classes"


def test_test_crops_are_the_published_ones(crops):
    golden = np.load(GOLDEN / "photos16_test.npz")["images"]
    batch = next(eval_batches(crops, batch_size=512))
    np.testing.assert_array_equal(batch.image, golden)
    assert (batch.label == -1).all()
    assert crops.describe() == "photos/16 1.0.0 test: 512 images of 16x16x3, no labels"
    assert crops.checksum() == "1498269fcc20510c"


def test_train_crops_lie_left_of_every_test_crop(data_dir):
    train = load("photos/16", "train", data_dir=data_dir)
    corners = list(photos.corners("train", 16))
    assert len(train) == len(corners) == 32_768
    pictures = load_sample_images().images
    for k in (0, 1, 12_345, 32_767):
        picture, top, left = corners[k]
        expected = pictures[picture][top : top + 16, left : left + 16]
        np.testing.assert_array_equal(train.source[k]["image"], expected)

    picture, top, left = np.transpose(corners)
    assert (picture[:4] == [0, 1, 0, 1]).all()
    # Every position that fits is reached, and no other.
    assert (left.min(), left.max() + 16) == (0, 512)
    assert (top.min(), top.max() + 16) == (0, 427)
    assert min(left for _, _, left in photos.corners("test", 16)) >= 512


@pytest.mark.parametrize(("number", "name"), enumerate(photos.PICTURES))
def test_one_picture_alone(number, name, tmp_path):
    """The crops of both, at the same places, with one of the pictures throughout."""
    picture = load_sample_images().images[number]
    source = sources.find(f"photos/{name}8")
    [member] = source.contents([], tmp_path, 1).splits["test"]
    for image, (_, top, left) in zip(member.images, photos.corners("test", 8), strict=True):
        np.testing.assert_array_equal(image.content, picture[top : top + 8, left : left + 8])


def test_shapes_are_drawn_in_all_classes_and_sizes(data_dir):
    train, test = (load("shapes/64", split, data_dir=data_dir) for split in ("train", "test"))
    assert (len(train), len(test), train.image_shape) == (256, 64, (64, 64, 3))
    assert train.checksum() != test.checksum()
    labels = next(eval_batches(train, batch_size=256)).label
    assert np.bincount(labels).tolist() == [26] * 6 + [25] * 4


@pytest.mark.parametrize("encoding", ["bytes", "zlib", "png"])
def test_data_that_tfds_wrote_is_read(encoding, tmp_path):
    """In whichever encoding, as by another release."""
    image = {
        "png": tfds.features.Image(shape=(8, 8, 1), dtype=np.uint8, encoding_format="png")
    }.get(encoding) or tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8, encoding=encoding)
    features = {"image": image, "label": tfds.features.ClassLabel(num_classes=10)}
    pixels = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 1), dtype=np.uint8)

    class Digits(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "digits"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            info = tfds.core.DatasetInfo
            return info(builder=self, features=tfds.features.FeaturesDict(features),
                        disable_shuffling=True)  # fmt: skip

        def _split_generators(self, dl_manager):
            return {"test": self._generate_examples()}

        def _generate_examples(self):
            for key, each in enumerate(pixels):
                content = Image.fromarray(each[..., 0]) if encoding == "png" else each
                yield key, {"image": content, "label": key % 10}

    Digits(data_dir=tmp_path).download_and_prepare(file_format="array_record")
    source = load("digits", "test", data_dir=tmp_path).source
    assert len(source) == 50 and source.__getitems__([]) == []
    for index, example in enumerate(source.__getitems__(range(50))):
        np.testing.assert_array_equal(example["image"], pixels[index])
        assert example["label"] == index % 10 == source[index]["label"]


def test_checksum_covers_pixels_labels_and_order(digits):
    images = [digits.source[i]["image"] for i in range(len(digits))]
    labels = [np.int32(digits.source[i]["label"]) for i in range(len(digits))]
    expected = hashlib.sha256(
        b"".join(x.tobytes() + y.tobytes() for x, y in zip(images, labels, strict=True))
    ).hexdigest()[:16]
    assert digits.checksum() == expected == "155e0069c5c5089c"

    rows = list(toy(5).source)
    other_pixel, other_label = [dict(row) for row in rows], [dict(row) for row in rows]
    other_pixel[4]["image"] = np.array([5, 5, 5, 6], np.uint8).reshape(2, 2, 1)
    other_label[4]["label"] = 0
    sources = [rows, other_pixel, other_label, rows[::-1], rows[:4]]
    checksums = {dataclasses.replace(toy(5), source=source).checksum() for source in sources}
    assert len(checksums) == len(sources)
    assert toy(5, labelled=False).checksum() not in checksums


# Finding and preparing them.


def test_prepares_once_with_a_line(tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    load("digits", "train")
    line = f"preparing data set digits in {tmp_path / 'digits' / '1.0.0'} (once)\n"
    assert capfd.readouterr() == ("", line)
    load("digits", "train")
    load("digits", "test", data_dir=tmp_path)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


@pytest.mark.parametrize("moment", ["grouped", "mapped"])
def test_another_process_may_finish_first(moment, tmp_path, monkeypatch, digits):
    """On a disk without locks."""
    monkeypatch.setattr(hosts, "locked", lambda *_, **__: contextlib.nullcontext(True))
    original = getattr(builder, moment)

    def overtaken(*args, **kwargs):
        monkeypatch.setattr(builder, moment, original)
        load("digits", "train", data_dir=tmp_path)
        return original(*args, **kwargs)

    monkeypatch.setattr(builder, moment, overtaken)
    assert load("digits", "test", data_dir=tmp_path).checksum() == digits.checksum()
    assert getattr(builder, moment) is original  # it did come to the race
    assert not list(tmp_path.rglob("*partial*"))


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("digitz", "'digits'"), ("photos/17", "'photos/16'"), ("photos", "'photos/"), ("q", None)],
)
def test_unknown_name(name, nearest, data_dir):
    with pytest.raises(UsageError) as error:
        load(name, "train", data_dir=data_dir)
    message = str(error.value)
    assert message.startswith(f"config.data.name is {name!r}; known data sets: digits, digits_ro")
    assert f"did you mean {nearest}" in message if nearest else "did you mean" not in message


@pytest.mark.parametrize("split", ["tran", "test[:", "test[:0]", "test[7:3]", ""])
def test_unknown_split(split, digits, data_dir):
    with pytest.raises(UsageError, match=r"train \(1,500\), test \(297\)") as error:
        load("digits", split, data_dir=data_dir)
    assert str(error.value).startswith(repr(split))


def test_part_of_a_split(digits, data_dir):
    part = load("digits", "test[100:110]", data_dir=data_dir)
    assert len(part) == 10
    np.testing.assert_array_equal(part.source[3]["image"], digits.source[103]["image"])
    assert [len(load("digits", s, data_dir=data_dir)) for s in ("train[:90%]", "all")] == [
        1350,
        1797,
    ]


def test_unusable_data_dir(tmp_path):
    file = tmp_path / "file"
    file.touch()
    (tmp_path / "digits" / "1.0.0").mkdir(parents=True)
    reasons = {file: "Not a directory.*TFDS_DATA_DIR", tmp_path: "prepare digits --overwrite"}
    for directory, reason in reasons.items():
        with pytest.raises(UsageError, match=f"{directory}.*{reason}"):
            load("digits", "train", data_dir=directory)


def test_sizes_are_known_without_the_images(digits, data_dir):
    source = sources.find("digits")
    assert source.count("train[:90%]+test[7:]") == 1350 + 290
    assert source.count("all") == 1797
    assert (source.image_shape, source.num_classes) == ((8, 8, 1), digits.num_classes)
    with pytest.raises(UsageError, match=r"'dev' is no split of digits; it has train \(1,500\)"):
        source.count("dev")


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        *(("bench", k) for k in ("missing", "cut", "a bit", "no JSON", "no features", "no UTF-8")),
        *(("evaluate", kind) for kind in ("missing", "cut", "a bit")),
        *(("train", kind) for kind in ("missing", "cut")),
    ],
)
def test_damaged_shards_are_one_line(kind, command, tmp_path, digits, data_dir, capsys, request):
    name = "digits-train.array_record-00000-of-00001"
    file = tmp_path / "digits" / "1.0.0" / name
    shutil.copytree(data_dir / digits.name, tmp_path / "digits")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    match kind:
        case "missing":
            file.unlink()
        case "cut":
            file.write_bytes(content[:-100])
        case "a bit":
            file.write_bytes(content)
        case "no JSON":
            (file.parent / "dataset_info.json").write_text("{")
        case "no features":
            (file.parent / "features.json").unlink()
        case "no UTF-8":
            (file.parent / "metadata.json").write_bytes(b"\xff")
    train, *config, workdir, _ = tiny_runs.arguments("jet", tmp_path / "run")
    argv = {"train": [train, *config, workdir, _], "bench": ["bench", "data", *config]}
    if command == "evaluate":
        run = request.getfixturevalue("trained")("jet")
        argv["evaluate"] = ["evaluate", "--workdir", str(run), "--metrics=bpd", "--split=train"]
    assert cli.main([*argv[command], f"--data_dir={tmp_path}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    [line] = [line for line in lines if line.startswith("jetflow:")]
    assert lines[-1] == line and str(file.parent) in line and "prepare digits --overwrite" in line
    assert (name in line) == (kind in ("missing", "cut", "a bit"))
    prepare = ["prepare", "digits", "--overwrite", f"--data_dir={tmp_path}"]
    assert cli.main(prepare) == 0
    assert load("digits", "train", data_dir=tmp_path).checksum() == "2ce31b9f2230b1fd"


def test_a_run_records_what_its_data_is(digits, data_dir):
    load = functools.partial(pipeline.load, data_dir=data_dir)
    resolved = set_up(tiny_runs.config("jet"), load).resolved_config["resolved"]
    assert (resolved["train_examples"], resolved["data_version"]) == (1500, digits.version)
    assert resolved["train_checksum"] == "2ce31b9f2230b1fd"


# The stream of training batches.


def test_every_epoch_is_a_new_permutation(digits):
    size = len(digits)
    index = take(train_batches(digits, batch_size=33, seed=1), 27).index.reshape(3, size)
    np.testing.assert_array_equal(np.sort(index, axis=1), np.tile(np.arange(size), (3, 1)))
    for a, b in [(index[0], index[1]), (index[1], index[2]), (index[0], np.arange(size))]:
        assert np.mean(a == b) < 0.05


def test_seeds_share_no_epoch(digits):
    streams = [take(train_batches(digits, batch_size=297, seed=s), 3).index for s in (0, 1, 2)]
    epochs = {tuple(epoch) for stream in streams for epoch in stream.reshape(3, -1)}
    assert len(epochs) == 9
    again = take(train_batches(digits, batch_size=297, seed=1), 3).index
    np.testing.assert_array_equal(again, streams[1])


def test_rows_are_the_examples_they_name(digits, crops):
    for dataset in (digits, crops):
        batch = next(train_batches(dataset, batch_size=16, seed=3))
        assert [x.dtype for x in batch] == [np.uint8, np.int32, np.int32]
        for image, label, index in zip(*batch, strict=True):
            example = dataset.source[int(index)]
            np.testing.assert_array_equal(image, example["image"])
            assert label == example.get("label", -1)


def test_batch_k_does_not_depend_on_where_the_run_starts(digits):
    whole = list(itertools.islice(train_batches(digits, batch_size=32, seed=5), 12))
    for start in (1, 9, 11):  # 32 does not divide 297: batch 9 spans two epochs
        resumed = next(train_batches(digits, batch_size=32, seed=5, start_step=start))
        assert_same(resumed, whole[start])
    # Within the stream, the batch size does not matter either.
    by_eight = take(train_batches(digits, batch_size=8, seed=5, start_step=8), 4)
    assert_same(by_eight, whole[2])


def test_a_late_start_reads_no_earlier_batch():
    class Counting(list):
        reads = 0

        def __getitem__(self, i):
            Counting.reads += 1
            return super().__getitem__(i)

    dataset = dataclasses.replace(toy(7), source=Counting(toy(7).source))
    batch = next(train_batches(dataset, batch_size=4, seed=0, start_step=10**9))
    assert sorted(batch.label // 3) == sorted(batch.index)
    assert Counting.reads <= 4 * (1 + 2 * pipeline._READ_OPTIONS.prefetch_buffer_size)


def test_processes_share_every_batch(digits):
    batches = functools.partial(train_batches, digits, batch_size=32, seed=5, start_step=7)
    for readers in (2, 4):
        together = global_batches(batches, 32, readers, 5)
        for a, b in zip(itertools.islice(batches(), 5), together, strict=True):
            assert_same(a, b)


# The batches of an evaluation.


@pytest.mark.parametrize("readers", [1, 2, 4])
def test_evaluation_sees_each_example_once_in_order(readers):
    # The last batch of 16 holds 3 examples: of 4 readers, two get padding only.
    dataset = toy(35)
    batches = global_batches(
        functools.partial(eval_batches, dataset, batch_size=16), 16, readers, 100
    )
    assert len(batches) == 3
    joined = take(iter(batches), 3)
    positions = np.concatenate([np.arange(35), np.full(13, -1)])
    np.testing.assert_array_equal(joined.index, positions)
    np.testing.assert_array_equal(joined.label, np.where(positions < 0, -1, 3 * positions))
    np.testing.assert_array_equal(joined.image[:, 1, 1, 0], positions + 1)
    assert [x.dtype for x in joined] == [np.uint8, np.int32, np.int32]
