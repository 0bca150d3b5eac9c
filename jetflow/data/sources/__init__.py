"""The data sets that jetflow knows, by name."""

import difflib

from jetflow.data.source import Source
from jetflow.data.sources import (
    afhq,
    arrays,
    cifar10,
    digits,
    image_folder,
    imagenet,
    imagenet_small,
    photos,
    shapes,
)
from jetflow.types import UsageError

SOURCES: dict[str, Source] = {
    source.name: source
    for module in (digits, arrays, photos, shapes, cifar10, imagenet_small, imagenet, afhq)
    for source in module.SOURCES
}


def find(name: str) -> Source:
    """The data set "digits", "photos/16", "folder/NAME/SIZE" or "arrays/NAME".

    Raises:
        UsageError: there is none of this name.
    """
    if name.split("/")[0] == "folder":
        return image_folder.find(name)
    if name.split("/")[0] == "arrays":
        return arrays.find(name)
    if name not in SOURCES:
        nearest = difflib.get_close_matches(name, SOURCES, n=1)
        raise UsageError(
            f"config.data.name is {name!r}; known data sets: {', '.join(SOURCES)}, "
            "folder/NAME/SIZE, arrays/NAME" + (f"; did you mean {nearest[0]!r}?" if nearest else "")
        )
    return SOURCES[name]
