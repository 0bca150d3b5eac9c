"""Any tree of images, with one sub-folder per class or without classes.

Cut to squares and resized, in the order of their names. Where the tree has a folder `train`, that
is the split of this name, and `validation` and `test` beside it are others; `Training`, `val`,
`valid`, `test_set` and the like are taken for them. Otherwise all images are one tree: then one
image of 20 is held out as `test`: those for which the first 8 bytes of the SHA-256 of the path
below the tree ("cats/1.jpg"), as a big-endian number, are a multiple of that, and the one for which
they are lowest; but one readable image of each class is not. A class is a sub-folder of the
training images that has a readable one; numbered ones are in the order of their numbers.
"""

import contextlib
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL import Image as pillow

from jetflow.data.archives import Entry, entries, image
from jetflow.data.images import Unreadable, decode
from jetflow.data.source import Archive, Contents, Member, Source, at_sizes, name_hash
from jetflow.types import NO_LABEL, UsageError

SIZES = range(4, 1025)
HELD_OUT = 20
_SPLITS = {"train": "train(ing)?", "validation": "val(id(ation)?)?|dev", "test": "test(ing)?"}
_SUFFIX = "([-_ ]?(set|data|images?|split))?"


def find(name: str) -> Source:
    """The data set "folder/NAME/SIZE".

    Raises:
        UsageError: the name is malformed.
    """
    root, _, size = name.removeprefix("folder").removeprefix("/").partition("/")
    if not root or root.startswith(".") or not size.isdecimal() or int(size) not in SIZES:
        raise UsageError(
            f"data set {name!r} is none; expected folder/NAME/SIZE, as in folder/pets/64, with a "
            f"size of {SIZES.start} to {SIZES.stop - 1} and the images below NAME in --manual_dir"
        )
    archive = Archive(root, "a folder of images")
    return at_sizes(
        f"folder/{root}", [int(size)], contents=_contents, about=__doc__, archives=(archive,),
        is_read=_is_image, resize=None,
    )[0]  # fmt: skip


def _contents(paths: Sequence[Path], notes: Path, max_pixels: int) -> Contents:
    root = paths[0]
    if not root.is_dir():
        raise UsageError(f"{root} is a file; expected a folder of images")
    files = list(entries(root))
    prefixes = _prefixes(root, files)
    kept = _classes(root, files, prefixes["train"], max_pixels)
    classes = list(filter(None, kept))
    number = {name: label for label, name in enumerate(classes)}
    splits: dict[str, list[Member]] = {split: [] for split in prefixes}
    left_out = Counter[str]()
    for file in files:
        split = next((s for s, prefix in prefixes.items() if file.name.startswith(prefix)), "")
        prefix = prefixes.get(split, "")
        top = _top(file.name, prefix)
        if split and (split == "train" or not classes or top in number):
            splits[split].append(image(file, file.name, number.get(top, NO_LABEL)))
        elif _is_image(root / file.name):
            left_out[str(root / prefix / top)] += 1
    splits = {split: members for split, members in splits.items() if members}
    if list(splits) == ["train"]:
        splits = _divided(splits["train"], prefixes["train"], set(kept.values()))
    return Contents(classes, splits, left_out)


def _top(name: str, prefix: str) -> str:
    """The first folder below a prefix; "" of a file that lies in none."""
    folder, slash, _ = name.removeprefix(prefix).partition("/")
    return folder if slash else ""


def _prefixes(root: Path, files: Sequence[Entry]) -> dict[str, str]:
    """What the names of each split's files begin with; "" of the only one, which has all."""
    tops = sorted({_top(file.name, "") for file in files})
    folders = {
        split: [top for top in tops if re.fullmatch(pattern + _SUFFIX, top, re.IGNORECASE)]
        for split, pattern in _SPLITS.items()
    }
    folders = {split: names for split, names in folders.items() if names}
    if not folders:
        return {"train": ""}
    chosen = {split: split if split in names else names[0] for split, names in folders.items()}
    if "train" not in chosen:
        raise UsageError(
            f"{root} has a split {', '.join(chosen.values())} and no folder train; call that of "
            "the training images so, or the others otherwise if they are classes"
        )
    text = ", ".join(f"split {split} is folder {top}" for split, top in chosen.items())
    print(f"{root}: {text}", file=sys.stderr)
    return {split: f"{top}/" for split, top in chosen.items()}


def _classes(root: Path, files: Sequence[Entry], prefix: str, max_pixels: int) -> dict[str, str]:
    """Each sub-folder with a readable image, "" for none of them, and that image, to train on."""
    inside = [(_top(file.name, prefix), file) for file in files if file.name.startswith(prefix)]
    beside = [file for top, file in inside if not top] if any(top for top, _ in inside) else []
    if first := next((file.name for file in beside if _is_image(root / file.name)), ""):
        text = f"{root / first} lies beside folders of images, so these are not taken for classes"
        print(text, file=sys.stderr)
        inside = [("", file) for _, file in inside]
    kept: dict[str, str] = {}

    def rank(each: tuple[str, Entry]) -> int:
        value = name_hash(each[1].name.removeprefix(prefix))
        return value if value % HELD_OUT else 0  # last of all: it would be held out

    for top, file in sorted(inside, key=rank, reverse=True):
        if top not in kept and _is_image(root / file.name):
            with contextlib.suppress(Unreadable):
                decode(file.read(), max_pixels)
                kept[top] = file.name
    if len(kept) == 1 and all(file.name.removeprefix(prefix).count("/") > 1 for _, file in inside):
        text = f"{root / prefix} has one class, {min(kept)}, and all images in folders below it"
        print(f"{text}; if these are the classes, move them up", file=sys.stderr)
    names = sorted(sorted(kept), key=int if all(map(str.isdecimal, kept)) else str)
    return {name: kept[name] for name in names}


def _is_image(path: Path) -> bool:
    """By its first bytes."""
    with contextlib.suppress(Exception), pillow.open(path):  # which raises nearly any type
        return True
    return False


def _divided(members: Sequence[Member], prefix: str, kept: set[str]) -> dict[str, list[Member]]:
    """Some of the images held out as `test`, at least one of those that are not `kept`."""
    names = [image.name for member in members for image in member.images]
    hashes = {name: name_hash(name.removeprefix(prefix)) for name in names if name not in kept}
    lowest = min(hashes.values(), default=0)
    splits: dict[str, list[Member]] = {"train": [], "test": []}
    for member, name in zip(members, names, strict=True):
        is_held_out = name in hashes and (hashes[name] == lowest or hashes[name] % HELD_OUT == 0)
        splits["test" if is_held_out else "train"].append(member)
    return splits
