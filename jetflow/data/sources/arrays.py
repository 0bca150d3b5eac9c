"""Arrays of T tokens with D features, which are no images: latents, audio frames, molecules.

`arrays/NAME` is made of `NAME.npy`, an array [N, T, D] of real numbers, or of `NAME.array_record`,
whose records are .npy files of [T, D]; then every twentieth array is held out as `test`. Or of a
folder `NAME` with such a file for each split, `train.npy` and perhaps `validation.npy` and
`test.npy`. Classes are beside a file, in `NAME_labels.npy` or `train_labels.npy`: whole numbers [N]
from 0 on. Stored are float32, and the mean and the standard deviation of each feature in training.
"""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import Float, Int

from jetflow.data.source import Archive, Contents, Image, Member, Source
from jetflow.data.sources import digits
from jetflow.types import NO_LABEL, Standard, UsageError

HELD_OUT = 20
CHUNK = 256  # arrays that are read at once
SUFFIXES = (".npy", ".array_record")
SPLITS = ("train", "validation", "test")


def find(name: str) -> Source:
    """The data set "arrays/NAME".

    Raises:
        UsageError: the name is malformed.
    """
    root = name.removeprefix("arrays").removeprefix("/")
    if not root or root.startswith(".") or "/" in root:
        raise UsageError(
            f"data set {name!r} is none; expected arrays/NAME, with NAME.npy, NAME.array_record or "
            "a folder NAME in --manual_dir"
        )
    files = tuple(root + suffix for suffix in SUFFIXES)
    archive = Archive(root, "a folder with train.npy", instead=files)
    labels = Archive(f"{root}_labels.npy", "classes, if there are some", is_optional=True)
    return Source(
        name=name, image_shape=(), contents=_contents, about=__doc__, archives=(archive, labels)
    )


class Part(NamedTuple):
    """The arrays of one split."""

    path: Path
    arrays: Any  # [N, T, D], read where it is indexed
    rows: Int[np.ndarray, "K"]  # which of them are of the split
    labels: Int[np.ndarray, "N"] | None = None

    def chunks(self) -> Iterator[tuple[Int[np.ndarray, "C"], Float[np.ndarray, "C T D"]]]:
        """So many at a time, with their places in the file; raises a UsageError."""
        for start in range(0, len(self.rows), CHUNK):
            rows = self.rows[start : start + CHUNK]
            with np.errstate(over="ignore"):
                values = np.asarray(self.arrays[rows], np.float32)
            if broken := np.flatnonzero(~np.isfinite(values).all(axis=(1, 2))).tolist():
                raise UsageError(
                    f"array {rows[broken[0]]} of {self.path} is not finite as float32; leave it out"
                )
            yield rows, values

    def members(self) -> list[Member]:
        """For `Contents`: one of each chunk, which is read only then."""
        size = 4 * int(np.prod(self.arrays.shape[1:]))
        starts = range(0, len(self.rows), CHUNK)
        parts = [self._replace(rows=self.rows[start : start + CHUNK]) for start in starts]
        return [Member(size * len(part.rows), part.images()) for part in parts]

    def images(self) -> Iterator[Image]:
        for rows, values in self.chunks():
            for row, array in zip(rows, values, strict=True):
                label = NO_LABEL if self.labels is None else int(self.labels[row])
                yield Image(f"{self.path.name}/{row}", array, label)


class Records:
    """The arrays of an ArrayRecord file, each stored as an .npy file."""

    def __init__(self, path: Path):
        self._reader = ArrayRecordReader(str(path))
        count = self._reader.num_records()
        self.shape = (count, *(self[np.arange(1)].shape[1:] if count else ()))

    def __getitem__(self, rows: Int[np.ndarray, "K"]) -> np.ndarray:
        records = self._reader.read(rows.tolist())
        return np.stack([np.load(io.BytesIO(record), allow_pickle=False) for record in records])


def standard(chunks: Iterable[Float[np.ndarray, "C T D"]]) -> Standard:
    """The mean and the standard deviation of each feature, over all tokens.

    That of a feature that never changes is taken for 1.
    """
    count, mean, squares = 0, np.zeros(1), np.zeros(1)  # squares: of the distances from the mean
    for chunk in chunks:
        tokens = chunk.reshape(-1, chunk.shape[-1]).astype(np.float64)
        total, shift = count + len(tokens), tokens.mean(0) - mean
        squares = squares + tokens.var(0) * len(tokens) + shift**2 * count * len(tokens) / total
        mean, count = mean + shift * len(tokens) / total, total
    deviation = np.sqrt(squares / count)
    return mean.tolist(), np.where(deviation > 1e-6 * np.abs(mean), deviation, 1).tolist()


def _contents(paths: Sequence[Path], notes: Path, max_pixels: int) -> Contents:
    path, *beside = paths
    if path.is_dir():
        if beside:
            raise UsageError(f"{beside[0]} is beside the folder {path}; put train_labels.npy in it")
        files = {split: _file_of(path, split) for split in SPLITS}
        parts = {split: _part(file) for split, file in files.items() if file}
        if "train" not in parts:
            raise UsageError(f"{path} has no train.npy, nor train.array_record; put one there")
    else:
        whole = _part(path, has_labels=bool(beside))
        is_held_out = whole.rows % HELD_OUT == HELD_OUT - 1
        if not is_held_out.any():
            raise UsageError(f"{path} has {len(whole.rows)} arrays; expected {HELD_OUT} or more")
        parts = {
            "train": whole._replace(rows=whole.rows[~is_held_out]),
            "test": whole._replace(rows=whole.rows[is_held_out]),
        }
    return _described(parts, _classes(parts))


def _described(parts: Mapping[str, Part], classes: Sequence[str]) -> Contents:
    train = parts["train"]
    for part in parts.values():
        if part.arrays.shape[1:] != train.arrays.shape[1:]:
            raise UsageError(
                f"{part.path} has arrays of {part.arrays.shape[1:]}, and {train.path} of "
                f"{train.arrays.shape[1:]}; make them alike"
            )
    members = {split: part.members() for split, part in parts.items()}
    statistics = standard(values for _, values in train.chunks())
    return Contents(classes, members, shape=train.arrays.shape[1:], standard=statistics)


def _file_of(folder: Path, name: str) -> Path | None:
    paths = (folder / f"{name}{suffix}" for suffix in SUFFIXES)
    return next((path for path in paths if path.exists()), None)


def _part(path: Path, has_labels: bool | None = None) -> Part:
    """All arrays of a file, with the labels beside it; by default, if they are there."""
    arrays = Records(path) if path.suffix == ".array_record" else _load(path)
    shape = arrays.shape
    if len(shape) != 3 or 0 in shape:
        raise UsageError(f"{path} has the shape {list(shape)}; expected [N, T, D], none of them 0")
    labels, beside = None, path.with_name(f"{path.stem}_labels.npy")
    if beside.exists() if has_labels is None else has_labels:
        labels = _load(beside)
        if labels.shape != shape[:1] or labels.dtype.kind not in "iu" or labels.min() < 0:
            raise UsageError(
                f"{beside} is {labels.dtype}{list(labels.shape)}; expected {shape[0]} whole "
                "numbers from 0 on, a class for each array"
            )
    return Part(path, arrays, np.arange(shape[0]), labels)


def _load(path: Path) -> np.ndarray:
    """An .npy file, of which only what is indexed is read."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
            raise ValueError("it has no real numbers")
    except (ValueError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{path} is no .npy file of real numbers ({reason})") from error
    return array


def _classes(parts: Mapping[str, Part]) -> list[str]:
    """The numbers from 0 to the largest label in training, as names; none without labels."""
    labels = {split: part.labels for split, part in parts.items()}
    missing = [split for split, values in labels.items() if values is None]
    if len(missing) == len(parts):
        return []
    count = 0 if labels["train"] is None else int(labels["train"][parts["train"].rows].max()) + 1
    for part in parts.values():
        if part.labels is None or part.labels.max() >= count:
            raise UsageError(
                f"{part.path} needs {part.path.stem}_labels.npy beside it, with classes that are "
                f"in split train too: 0 to {count - 1}"
            )
    return [str(label) for label in range(count)]


def _rows_of_digits(paths: Sequence[Path], notes: Path, max_pixels: int) -> Contents:
    """Of each split, the rows of the digits' images as tokens."""
    parts = {}
    for split, count in digits.COUNTS.items():
        found = list(digits.images(split))
        values = np.stack([np.asarray(image.content, np.float32)[..., 0] for image in found])
        labels = np.array([image.label for image in found])
        parts[split] = Part(Path("digits"), values, np.arange(count), labels)
    return _described(parts, digits.CLASSES)


SOURCES = (
    Source(
        name="digits_rows", image_shape=(8, 8), contents=_rows_of_digits, splits=digits.COUNTS,
        num_classes=len(digits.CLASSES),
        about="The rows of scikit-learn's digits as sequences of 8 tokens of 8 grey values.",
    ),
)  # fmt: skip
