"""Where the batches of small images lie in an archive, for CIFAR-10 and the new small ImageNets."""

import re
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from jetflow.data.rows import RowsPart, npz_rows
from jetflow.types import UsageError


def rows_parts(
    paths: Sequence[Path],
    wanted: re.Pattern,
    *,
    numbers: Sequence[int],
    image_size: int,
    first_label: int,
    most_rows: int,
) -> list[RowsPart]:
    """The batches of some archives, in the order of their numbers, in parts.

    Args:
        paths: zips, tars or folders.
        wanted: matches a batch's file name; its first group is the number, or empty, which is 0.
        numbers: of the batches that there are.
        most_rows: in a part, where the batch's format can be read in part.

    Raises:
        UsageError: if an archive has none, or a batch lacks or is there twice.
    """
    batches = []
    for path in paths:
        found = [
            (int(match[1] or 0), path, member, size)
            for member, size in _members(path)
            if (match := wanted.fullmatch(PurePosixPath(member).name))
        ]
        if not found:
            raise UsageError(f"{path} holds no file like {wanted.pattern}; is it the right one?")
        batches += found
    batches.sort()
    if (there := [number for number, *_ in batches]) != list(numbers):
        raise UsageError(
            f"expected files like {wanted.pattern} with the numbers {list(numbers)} in "
            f"{' and '.join(map(str, paths))}, found {there}; bring the archives again"
        )
    made = []
    for _, path, member, size in batches:
        rows = npz_rows(path, member)
        if rows is None:
            made.append(RowsPart(path, member, image_size, first_label, size))
            continue
        for start in range(0, rows, most_rows):
            stop = min(start + most_rows, rows)
            share = size * (stop - start) // rows
            made.append(RowsPart(path, member, image_size, first_label, share, start, stop))
    return made


def _members(path: Path) -> list[tuple[str, int]]:
    """(name, size) of each file in an archive."""
    if path.is_dir():
        files = (each for each in path.rglob("*") if each.is_file())
        return [(each.relative_to(path).as_posix(), each.stat().st_size) for each in files]
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return [(each.filename, each.file_size) for each in archive.infolist()]
    with tarfile.open(path) as tar:
        return [(each.name, each.size) for each in tar if each.isfile()]
