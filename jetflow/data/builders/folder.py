"""Any tree of images, with one sub-folder per class or without classes."""

import functools
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from PIL import Image

from jetflow.data import parts
from jetflow.data.builders.archived import Archive, ArchiveBuilder, Split, one_line, say
from jetflow.data.parts import FilePart
from jetflow.data.pieces import HeldOut
from jetflow.types import NO_LABEL, UsageError

SIZES = range(4, 1025)
# A `val` and a `validation` beside each other would be one split: only the first is taken.
_SPLITS = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}


class Folder(ArchiveBuilder, skip_registration=True):
    """The images below `manual_dir`/NAME at any size: the data set "folder/NAME/SIZE".

    Where the tree has a folder `train`, that is the split of this name, and `val`, `validation` and
    `test` beside it are others; else all images are one tree. What has only one split gets another,
    `test`. Where the trees have all images in sub-folders, those are the classes.
    """

    name = "folder"
    HELD_OUT: ClassVar = HeldOut("test", share=20, by_path=True)
    DESCRIPTION = f"""
    A tree of images, cut to squares and resized, in the order of their names. Without folders of
    splits, one image of {HELD_OUT.share} is held out as `test`: those for which the first 8 bytes
    of the SHA-256 of the path below the tree ("cats/1.jpg"), as a big-endian number, are a multiple
    of that, and the one for which they are lowest.
    """
    PIECE_IMAGES = 4096

    def __init__(self, *, config: str, **kwargs):
        self.archives = (Archive(config.rsplit("/", 1)[0], "a folder of images"),)
        super().__init__(config=self.get_builder_config(config), **kwargs)

    @classmethod
    def get_builder_config(cls, name: str, version: Any = None) -> tfds.core.BuilderConfig:
        """Any tree at any size is one: of a config that it does not find here, TFDS warns."""
        return _config(name)

    def _splits(self, found: dict[str, Path]) -> tuple[Sequence[str], Sequence[Split]]:
        [root] = found.values()
        roots = {
            name: root / folder
            for name, folders in _SPLITS.items()
            for folder in reversed(folders)
            if (root / folder).is_dir()
        }
        if "train" not in roots:
            roots = {"train": root}
        files = {split: _files(tree) for split, tree in roots.items()}
        classes = _classes({roots[split]: names for split, names in files.items()})
        held_out = None
        if len(roots) == 1:
            held_out = self.HELD_OUT.at_least_one([name for name, _ in files["train"]])
        splits = [
            Split(split, self._parts(roots[split], names, classes), held_out)
            for split, names in files.items()
        ]
        return [one_line(name) for name in classes], splits

    def _parts(
        self, root: Path, files: list[tuple[str, int]], classes: list[str]
    ) -> list[FilePart]:
        number = {name: label for label, name in enumerate(classes)}
        sizes = [size for _, size in files]
        made = []
        for run in parts.runs(sizes, self.PIECE_BYTES, self.PIECE_IMAGES):
            names = tuple(name for name, _ in files[run])
            labels = tuple(number.get(name.split("/")[0], NO_LABEL) for name in names)
            made.append(FilePart(root, names, labels, sum(sizes[run])))
        return made


@functools.cache  # TFDS asks again, and wants the very same
def _config(name: str) -> tfds.core.BuilderConfig:
    return tfds.core.BuilderConfig(name=name, description="A tree of images, resized.")


def config_name(name: str) -> str:
    """ "pets/64" of the data set "folder/pets/64".

    Raises:
        UsageError: if it is none.
    """
    _, _, config = name.partition("/")
    tree, _, size = config.partition("/")
    if not tree or tree.startswith(".") or not size.isdecimal() or int(size) not in SIZES:
        raise UsageError(
            f"data set {name!r} is none; expected folder/NAME/SIZE, as in folder/pets/64, with a "
            f"size of {SIZES.start} to {SIZES.stop - 1} and the images below NAME in --manual_dir"
        )
    return f"{tree}/{int(size)}"


def _classes(files: dict[Path, list[tuple[str, int]]]) -> list[str]:
    """The sub-folders of the trees; none where images lie beside them."""
    names = [(root, name) for root, there in files.items() for name, _ in there]
    tops = {name.split("/")[0] for _, name in names if "/" in name}
    beside = [root / name for root, name in names if "/" not in name]
    if tops and (image := next(filter(_is_image, beside), None)):
        say(f"{image} lies beside folders of images, so these are not taken for classes")
        return []
    return sorted(tops)


def _is_image(path: Path) -> bool:
    try:
        with Image.open(path):
            return True
    except Exception:  # whatever Pillow raises of a file that is none
        return False


def _files(root: Path) -> list[tuple[str, int]]:
    """(path below root, size) of all files, in the order of their paths; no hidden ones."""
    found = []
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                path = Path(folder, name)
                try:
                    state = path.stat()
                except OSError:  # a link to nothing, say: it will be listed as unreadable
                    found.append((path.relative_to(root).as_posix(), 0))
                    continue
                if stat.S_ISREG(state.st_mode):
                    found.append((path.relative_to(root).as_posix(), state.st_size))
    return sorted(found)
