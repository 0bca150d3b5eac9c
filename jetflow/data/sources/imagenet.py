"""ImageNet from its photographs: ILSVRC 2012, and the whole of it in two releases.

O. Russakovsky, J. Deng, H. Su et al., arXiv 1409.0575; cut to squares and resized. Class k is the
k-th WordNet id in alphabetical order. The images are in the order of the archive, or of the ids
where it is a folder of tars. The whole has no official validation split: here it is one image of
256, those for which the first 8 bytes of the SHA-256 of the file's name ("n01440764_10026.JPEG"),
as a big-endian number, are a multiple of that.
"""

import gzip
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from tqdm import tqdm

from jetflow.data.archives import tar_files, tar_of_class, tar_of_images
from jetflow.data.source import Archive, Contents, Member, at_sizes
from jetflow.files import read_json, write_atomically
from jetflow.types import UsageError


class _Tar(NamedTuple):
    """The tar of a class: its name, and where it lies in its archive."""

    name: str
    offset: int
    size: int


def _classes(path: Path, notes: Path) -> tuple[list[str], list[Member]]:
    """The classes in alphabetical order, and their tars in the order of the archive or folder."""
    archive = None if path.is_dir() else _opened(path)
    if archive:
        tars = _inner_tars(path, notes / f"{path.name}.json")
    else:
        tars = [_Tar(file.name, 0, file.stat().st_size) for file in sorted(path.glob("*.tar"))]
    classes = sorted(tar.name.removesuffix(".tar") for tar in tars)
    if not classes or len(set(classes)) < len(classes):
        raise UsageError(f"{path} holds no tars of classes, n01440764.tar say, or one twice")
    number = {f"{name}.tar": label for label, name in enumerate(classes)}
    return classes, [
        tar_of_class(archive or path / tar.name, tar.offset, tar.size, tar.name, number[tar.name])
        for tar in tars
    ]


def _opened(path: Path) -> io.BufferedIOBase:
    file = open(path, "rb")  # noqa: SIM115 (the members read it)
    is_gzip = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    return gzip.GzipFile(fileobj=file) if is_gzip else file


def _inner_tars(path: Path, note: Path) -> list[_Tar]:
    """Noted for the next start: if the archive is compressed, it takes a pass over all of it."""
    if note.exists():
        return [_Tar(*each) for each in read_json(note, list)]
    title = f"{path.name}: first pass"
    with tqdm(total=path.stat().st_size, desc=title, unit="B", unit_scale=True) as bar:
        tars = [
            _Tar(PurePosixPath(member.name).name, member.offset_data, member.size)
            for member in tar_files(path, lambda position: bar.update(position - bar.n))
            if member.name.endswith(".tar")
        ]
    with write_atomically(note) as file:
        file.write(json.dumps(tars).encode())
    return tars


def _contents_1k(paths: Sequence[Path], notes: Path) -> Contents:
    train_path, validation_path, devkit = paths
    classes, train = _classes(train_path, notes)
    labels = _validation_labels(devkit, classes)

    def label(name: str) -> int:  # "ILSVRC2012_val_00000001.JPEG" has the first one
        return labels[int(Path(name).stem.split("_")[-1]) - 1]

    return Contents(classes, {"train": train, "validation": tar_of_images(validation_path, label)})


def _validation_labels(devkit: Path, classes: Sequence[str]) -> list[int]:
    """The class of each validation image, by number; the devkit numbers the classes its own way."""
    import scipy.io  # needed only here, once

    wanted = ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
    with tarfile.open(devkit) as tar:
        members = {PurePosixPath(member.name).name: member for member in tar}
        if missing := set(wanted) - set(members):
            raise UsageError(f"{devkit} has no {min(missing)}; is it the devkit for tasks 1 and 2?")
        files: Any = [tar.extractfile(members[name]) for name in wanted]
        meta, truth = (file.read() for file in files)
    synsets: Any = scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    names = {int(each["ILSVRC2012_ID"]): str(each["WNID"]) for each in synsets}
    labels = [names[int(number)] for number in truth.split()]
    if unknown := set(labels) - set(classes):
        raise UsageError(
            f"{len(unknown)} classes of the validation images, {min(unknown)} for one, have no tar "
            "in ILSVRC2012_img_train.tar; is it whole?"
        )
    return [classes.index(name) for name in labels]


def _contents_21k(paths: Sequence[Path], notes: Path) -> Contents:
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
