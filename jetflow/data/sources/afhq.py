"""Animal Faces-HQ: cats, dogs and wild animals of 512x512 pixels, in the order of their names.

Y. Choi, Y. Uh, J. Yoo and J.-W. Ha, arXiv 1912.01865. The second version has fewer images, aligned
and resized anew.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from jetflow.data.archives import entries, image
from jetflow.data.source import Archive, Contents, Member, at_sizes

CLASSES = ("cat", "dog", "wild")
_NAME = re.compile(r"(?:.*/)?(train|val|test)/(cat|dog|wild)/[^/.][^/]*")


def _contents(paths: Sequence[Path], notes: Path, max_pixels: int) -> Contents:
    splits: dict[str, list[Member]] = {}
    for entry in sorted(entries(paths[0])):
        if match := _NAME.fullmatch(entry.name):
            split = {"val": "validation"}.get(match[1], match[1])
            splits.setdefault(split, []).append(image(entry, entry.name, CLASSES.index(match[2])))
    return Contents(CLASSES, splits)


SOURCES = tuple(
    source
    for name, archive_size, splits in (
        ("afhq", "about 1 GB", {"train": 14_630, "validation": 1_500}),
        ("afhq_v2", "about 6.5 GB", {"train": 14_336, "test": 1_467}),
    )
    for source in at_sizes(
        name,
        (64, 128, 256),
        contents=_contents,
        about=__doc__,
        splits=splits,
        num_classes=3,
        archives=(Archive(f"{name}.zip", archive_size),),
        homepage="https://github.com/clovaai/stargan-v2",
        resize=None,
    )
)
