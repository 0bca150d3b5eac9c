"""ImageNet from its photographs: ILSVRC 2012, and the whole of it in two releases.

O. Russakovsky, J. Deng, H. Su et al., arXiv 1409.0575; cut to squares and resized. Class k is the
k-th WordNet id in alphabetical order. The images are in the order of the archive, or of the ids
where it is a folder of tars. The whole has no official validation split: here it is one image of
256, those for which the first 8 bytes of the SHA-256 of the file's name ("n01440764_10026.JPEG"),
as a big-endian number, are a multiple of that.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from jetflow.data.archives import entries, image, images_of_tar, opened
from jetflow.data.source import Archive, Contents, Member, at_sizes
from jetflow.files import read_json, write_atomically
from jetflow.types import UsageError


def _classes(path: Path, notes: Path) -> tuple[list[str], list[Member]]:
    """The classes in alphabetical order, and their tars in the order of the archive or folder."""
    # Noted for the next start: if the archive is compressed, it takes a pass over all of it.
    note = notes / f"{path.name}.json"
    if not note.exists():
        tars = [entry for entry in entries(path) if entry.name.endswith(".tar")]
        fields = [(PurePosixPath(tar.name).name, tar.offset, tar.size) for tar in tars]
        with write_atomically(note) as file:
            file.write(json.dumps(fields).encode())
    tars = read_json(note, list)
    classes = sorted(name.removesuffix(".tar") for name, *_ in tars)
    if not classes or len(set(classes)) < len(classes):
        raise UsageError(f"{path} holds no tars of classes, n01440764.tar say, or one twice")
    number = {f"{name}.tar": label for label, name in enumerate(classes)}
    archive = None if path.is_dir() else opened(path)
    return classes, [
        Member(size, images_of_tar(archive or path / name, offset, size, name, number[name]))
        for name, offset, size in tars
    ]


def _contents_1k(paths: Sequence[Path], notes: Path, max_pixels: int) -> Contents:
    train_path, validation_path, devkit = paths
    classes, train = _classes(train_path, notes)
    labels = _validation_labels(devkit, classes)
    validation = []
    for entry in entries(validation_path):  # "ILSVRC2012_val_00000001.JPEG" has the first label
        label = labels[int(PurePosixPath(entry.name).stem.split("_")[-1]) - 1]
        validation.append(image(entry, f"{validation_path.name}/{entry.name}", label))
    return Contents(classes, {"train": train, "validation": validation})


def _validation_labels(devkit: Path, classes: Sequence[str]) -> list[int]:
    """The class of each validation image, by number; the devkit numbers the classes its own way."""
    import scipy.io  # needed only here, once

    wanted = ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
    files = {PurePosixPath(entry.name).name: entry.read for entry in entries(devkit)}
    if missing := set(wanted) - set(files):
        raise UsageError(f"{devkit} has no {min(missing)}; is it the devkit for tasks 1 and 2?")
    meta, truth = (files[name]() for name in wanted)
    synsets: Any = scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    names = {int(each["ILSVRC2012_ID"]): str(each["WNID"]) for each in synsets}
    labels = [names[int(number)] for number in truth.split()]
    if unknown := set(labels) - set(classes):
        raise UsageError(
            f"{len(unknown)} classes of the validation images, {min(unknown)} for one, have no tar "
            "in ILSVRC2012_img_train.tar; is it whole?"
        )
    return [classes.index(name) for name in labels]


def _contents_21k(paths: Sequence[Path], notes: Path, max_pixels: int) -> Contents:
    classes, train = _classes(paths[0], notes)
    return Contents(classes, {"train": train, "validation": []})


def _whole(name: str, archive: Archive, num_classes: int, **splits: int) -> tuple:
    return at_sizes(
        name,
        (32, 64),
        contents=_contents_21k,
        about=__doc__,
        splits=splits,
        num_classes=num_classes,
        held_out=256,
        archives=(archive,),
        homepage="https://image-net.org/download-images",
        resize=None,
    )


_WINTER21 = Archive(
    "winter21_whole.tar.gz", "about 1.2 TB", ("winter21_whole.tar", "winter21_whole")
)
_FALL11 = Archive("fall11_whole.tar", "about 1.3 TB", ("fall11_whole",))
SOURCES = (
    *at_sizes(
        "imagenet1k",
        (64, 128, 256),
        contents=_contents_1k,
        about=__doc__,
        splits={"train": 1_281_167, "validation": 50_000},
        num_classes=1000,
        archives=(
            Archive("ILSVRC2012_img_train.tar", 147_897_477_120),
            Archive("ILSVRC2012_img_val.tar", 6_744_924_160),
            Archive("ILSVRC2012_devkit_t12.tar.gz", "about 2.6 MB"),
        ),
        homepage="https://image-net.org/challenges/LSVRC/2012/",
        resize=None,
    ),
    # Of the two splits, the sum is published; the hash holds out about one image of 256.
    *_whole("imagenet21k", _WINTER21, 19_167, train=13_102_119, validation=51_381),
    *_whole("imagenet21k_fall11", _FALL11, 21_841, train=14_141_664, validation=55_458),
)
