"""Any tree of images, with one sub-folder per class or without classes.

Cut to squares and resized, in the order of their names. Where the tree has a folder `train`, that
is the split of this name, and `val`, `validation` and `test` beside it are others; otherwise all
images are one tree. Of a single split, one image of 20 is held out as `test`: those for which the
first 8 bytes of the SHA-256 of the path below the tree ("cats/1.jpg"), as a big-endian number, are
a multiple of that, and the one for which they are lowest.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image as pillow

from jetflow.data.archives import ImageMember
from jetflow.data.source import Archive, Contents, Source, at_sizes, name_hash
from jetflow.types import NO_LABEL, UsageError

SIZES = range(4, 1025)
HELD_OUT = 20
# A `val` and a `validation` beside each other would be one split: only the first is taken.
_SPLITS = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}


def find(name: str) -> Source:
    """The data set "folder/NAME/SIZE".

    Raises:
        UsageError: the name is malformed.
    """
    tree, _, size = name.removeprefix("folder").removeprefix("/").partition("/")
    if not tree or tree.startswith(".") or not size.isdecimal() or int(size) not in SIZES:
        raise UsageError(
            f"data set {name!r} is none; expected folder/NAME/SIZE, as in folder/pets/64, with a "
            f"size of {SIZES.start} to {SIZES.stop - 1} and the images below NAME in --manual_dir"
        )
    archive = Archive(tree, "a folder of images")
    [source] = at_sizes(
        f"folder/{tree}", [int(size)], contents=_contents, about=__doc__, archives=(archive,),
        resize=None,
    )  # fmt: skip
    return source


def _contents(paths: Sequence[Path], notes: Path) -> Contents:
    roots = {
        split: paths[0] / name
        for split, names in _SPLITS.items()
        for name in reversed(names)
        if (paths[0] / name).is_dir()
    }
    roots = roots if "train" in roots else {"train": paths[0]}
    files = {split: sorted(_files(root)) for split, root in roots.items()}
    classes = _classes([(roots[split], name) for split in files for name, _ in files[split]])
    number = {name: label for label, name in enumerate(classes)}
    splits = {
        split: [
            ImageMember(roots[split] / name, name, size, number.get(name.split("/")[0], NO_LABEL))
            for name, size in some
        ]
        for split, some in files.items()
    }
    return Contents(classes, splits if len(splits) > 1 else _divided(splits["train"]))


def _classes(files: Sequence[tuple[Path, str]]) -> list[str]:
    """The sub-folders of the trees of (root, name); none where images lie beside them."""
    tops = {name.split("/")[0] for _, name in files if "/" in name}
    beside = (root / name for root, name in files if "/" not in name)
    if tops and (image := next(filter(_is_image, beside), None)):
        text = f"{image} lies beside folders of images, so these are not taken for classes"
        print(text, file=sys.stderr)
        return []
    return sorted(tops)


def _is_image(path: Path) -> bool:
    try:
        with pillow.open(path):
            return True
    except Exception:  # Pillow raises nearly any type on a file that is none
        return False


def _files(root: Path) -> Iterator[tuple[str, int]]:
    """(path below root, size) of all files but hidden and special ones."""
    for parent, folders, names in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(parent, name) for name in names if not name.startswith(".")):
            if not path.exists():  # a link to nothing: to be listed as unreadable
                yield path.relative_to(root).as_posix(), 0
            elif path.is_file():
                yield path.relative_to(root).as_posix(), path.stat().st_size


def _divided(members: Sequence[ImageMember]) -> dict[str, list[ImageMember]]:
    """Some of the images held out as `test`, at least one of two."""
    hashes = [name_hash(member.name) for member in members]
    lowest = min(hashes) if hashes[1:] else None
    splits: dict[str, list[ImageMember]] = {"train": [], "test": []}
    for member, value in zip(members, hashes, strict=True):
        is_held_out = value == lowest or value % HELD_OUT == 0
        splits["test" if is_held_out else "train"].append(member)
    return splits
