"""Images in an .npz, written and read in parts: in constant memory; a kill costs one batch."""

import json
import math
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Bool, Int, Num, UInt8

from jetflow import hosts, rollcall
from jetflow.buckets import AnyPath
from jetflow.fields import differences, shown
from jetflow.files import listed, naming, read_or_set_aside, write_atomically, write_json
from jetflow.npz import ROOM, Npz
from jetflow.sampling.ancestral import Drawn
from jetflow.types import UsageError

SETTINGS = "settings.json"
Row: TypeAlias = tuple[tuple[int, ...], type]  # its shape, and the type of its entries


class Archive:
    """An .npz of arrays with a row for each of N images.

    Until it is complete, the rows lie in the folder FILE.partial, beside their settings: made
    again with the same settings, the archive goes on after the last whole batch.

    Attributes:
        done: how many rows it has.

    Args:
        path: the .npz file.
        rows: name of an array -> shape and type of a row.
        num: N.
        settings: all that the arrays depend on.

    Raises:
        UsageError: if the folder holds rows of other settings.
    """

    def __init__(
        self,
        path: AnyPath,
        *,
        num: int,
        rows: Mapping[str, Row],
        settings: Mapping[str, Any],
    ):
        self._path, self._folder = path, path.with_name(path.name + ".partial")
        self._rows, self.done = rows, 0
        settings = json.loads(json.dumps({"num": num, **settings}))
        before = read_or_set_aside(self._folder / SETTINGS, dict, None)
        if before is None and self._folder.exists():
            logging.warning("%s cannot be gone on with, and is begun anew", self._folder)
            self._remove()
        self._spans: list[tuple[int, int]] = []  # of the parts
        for path in listed(self._folder):
            name, *span = path.name.split("-")
            is_last = name == [*rows][-1] and span[-1].isdigit()
            first, end = map(int, span) if is_last else (-1, 0)
            if first == self.done:
                self._spans.append((first, end))
                self.done = end
        if before and (differing := differences(before, settings, prefix="")):
            raise UsageError(
                f"{self._folder} holds {self.done} rows of other settings "
                f"({shown(differing)}); give the same, or another file, or delete it"
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        write_json(self._folder / SETTINGS, settings)

    def append(self, **arrays: np.ndarray | None) -> None:
        """The next rows of all arrays, on disk when this returns; other arrays are left out.

        The file of the last array comes last: where there is one, there are all.
        """
        first, end = self.done, self.done
        for name, (_, kind) in self._rows.items():
            array: Any = arrays[name]
            end = first + len(array)
            with naming(self._path), write_atomically(self._part(name, (first, end))) as file:
                file.write(np.ascontiguousarray(array, kind).tobytes())
        self._spans.append((first, end))
        self.done = end

    def first(self, name: str, num: int | None = None) -> np.ndarray:
        """The first rows of an array, at most `num`; all by default."""
        shape, kind = self._rows[name]
        rows, missing = [np.zeros((0, *shape), kind)], self.done if num is None else num
        for part in self._parts(name) if missing else ():
            rows.append(part[:missing])
            missing -= len(part)
            if missing <= 0:
                break
        return np.concatenate(rows)

    def finish(self, labels: Int[np.ndarray, "N"] | None = None) -> None:
        """Make the .npz of what was appended, with labels if there are any; remove the folder."""
        with (
            write_atomically(self._path) as whole,
            zipfile.ZipFile(whole, "w", zipfile.ZIP_STORED) as archive,
        ):
            for name, (shape, kind) in reversed([*self._rows.items()]):
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    descr = np.lib.format.dtype_to_descr(np.dtype(kind))
                    header = {"descr": descr, "fortran_order": False, "shape": (self.done, *shape)}
                    np.lib.format.write_array_header_1_0(file, header)
                    for part in self._parts(name):
                        file.write(part.tobytes())
            if labels is not None:
                with archive.open("labels.npy", "w") as file:
                    np.lib.format.write_array(file, np.asarray(labels, np.int32))
        self._remove()

    def _parts(self, name: str) -> Iterator[np.ndarray]:
        """What was appended, part by part, read from the disk."""
        shape, kind = self._rows[name]
        for first, end in self._spans:
            content = self._part(name, (first, end)).read_bytes()
            yield np.frombuffer(content, kind).reshape(end - first, *shape)

    def _part(self, name: str, span: tuple[int, int]) -> AnyPath:
        return self._folder / "{}-{:08d}-{:08d}".format(name, *span)

    def _remove(self) -> None:
        epath.Path(self._folder).rmtree()


class Images(NamedTuple):
    """The images of a file.

    Attributes:
        num: how many they are.
        not_finite: how many of them its `finite` marks as broken.
        chunks: the images, so many at a time.
    """

    num: int
    not_finite: int
    chunks: Iterator[UInt8[np.ndarray, "_ H W C"]]


def read_images(file: Npz, chunk: int) -> Images:
    """The images of a file, "images" or ADM's "arr_0", which are never read as a whole.

    Raises:
        UsageError: if they are not uint8 with 1 or 3 channels, or `chunk` of them take too much
            memory.
    """
    name = "arr_0" if "arr_0" in file else "images"
    num, *shape = file.shape(name, "B", (None,) * 4)
    if not num or 0 in shape or shape[-1] not in (1, 3):
        raise file.fault(f"{name} is {[num, *shape]}, not [N, H, W, 1 or 3]")
    chunk = min(chunk, num)
    if max(16 * num, chunk * math.prod(shape)) > ROOM:  # 16 bytes an image for their order
        raise file.fault(
            f"{num:,} images of {shape}, {chunk} at a time, need too much memory; "
            "lower --batch_size"
        )
    file.verify(name)
    finite = file.array("finite", "?", (num,)) if "finite" in file else np.ones(num, bool)
    return Images(num, int((~finite).sum()), file.rows(name, chunk))


class Collected(NamedTuple):
    """What was drawn.

    Attributes:
        images: the first ones.
        finite: which of all are finite.
        sweeps, residual: as in `Drawn`, the most of a batch.
    """

    images: Num[np.ndarray, "K *X"]
    finite: Bool[np.ndarray, "N"]
    sweeps: tuple[int, ...]
    residual: float


def collect(
    batches: Iterable[Drawn], noise: str, *, num: int, keep: int, archive: Archive | None = None
) -> Collected:
    """Draw batches up to `num` images, with a progress bar, into an archive if there is one.

    Args:
        noise: the kind of noise that the flow was trained with.
        keep: how many of the first images are returned.
        archive: the batches go on after its images.
    """
    images = [archive.first("images", keep)] if archive else []
    finite = [archive.first("finite")] if archive else []
    sweeps, residual = (), 0.0
    done = archive.done if archive else 0
    with hosts.progress(num, "sampling", "images", done) as bar:
        for drawn in batches:
            batch = drawn.images(noise)
            if archive:
                archive.append(images=batch, finite=drawn.finite, latents=drawn.latents)
            if sum(map(len, images)) < keep:
                images.append(batch)
            finite.append(drawn.finite)
            sweeps = tuple(map(max, drawn.sweeps, sweeps or drawn.sweeps))
            residual = max(residual, drawn.residual)
            bar.update(len(batch))
            rollcall.reach()
    if not finite:  # going on, where nothing is left and another process has the archive
        return Collected(np.zeros((0, 0, 0, 1), np.uint8), np.zeros(0, bool), (), 0.0)
    return Collected(np.concatenate(images)[:keep], np.concatenate(finite), sweeps, residual)
