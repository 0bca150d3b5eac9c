"""Images written to an .npz as they come, in constant memory, so that a kill costs one batch."""

import json
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt8

from jetflow.files import write_atomically
from jetflow.types import UsageError


class Archive:
    """An .npz of `images`, uint8 [N, H, W, C], and which of them are `finite`, bool [N]; and of
    `labels`, int32 [N], where there are any.

    Until it is complete, the images lie in the folder FILE.partial, beside what they were made
    with: made again with the same settings, the archive goes on behind the last whole batch.

    Attributes:
        done: images that are in it.

    Args:
        path: the .npz file.
        num, image_shape: N and (H, W, C).
        settings: all that the images depend on.

    Raises:
        UsageError: if the folder holds images of other settings.
    """

    def __init__(
        self,
        path: Path,
        *,
        num: int,
        image_shape: tuple[int, int, int],
        settings: Mapping[str, Any],
    ):
        self._path = path
        self._folder = path.with_name(path.name + ".partial")
        self._settings = json.loads(json.dumps({"num": num, **settings}))
        self._folder.mkdir(parents=True, exist_ok=True)
        state = self._read()
        if state is not None and state["settings"] != self._settings:
            there, here = state["settings"], self._settings
            differing = [name for name in {**there, **here} if there.get(name) != here.get(name)]
            raise UsageError(
                f"{self._folder} holds {state['done']} images of another sampling "
                f"({', '.join(differing)} differ); give what it was begun with, or another --npz, "
                "or delete it"
            )
        self.done = state["done"] if state else 0
        mode = "r+" if state else "w+"
        self._images = np.lib.format.open_memmap(
            self._folder / "images.npy", mode, np.uint8, (num, *image_shape)
        )
        self._finite = np.lib.format.open_memmap(self._folder / "finite.npy", mode, bool, (num,))
        if not state:
            self._note()

    @property
    def finite(self) -> Bool[np.ndarray, "K"]:
        """Which of the images that are in it are finite."""
        return np.array(self._finite[: self.done])

    def append(self, images: UInt8[np.ndarray, "B H W C"], finite: Bool[np.ndarray, "B"]) -> None:
        """The next images, and which are finite; on disk when this returns."""
        new = slice(self.done, self.done + len(images))
        for array, values in ((self._images, images), (self._finite, finite)):
            array[new] = values
            array.flush()
        self.done += len(images)
        self._note()

    def first(self, index: Int[np.ndarray, "K"]) -> UInt8[np.ndarray, "K H W C"]:
        """Some of the images, by number."""
        return np.array(self._images[index])

    def finish(self, labels: Int[np.ndarray, "N"] | None) -> None:
        """Make the .npz of what was appended, and remove the folder."""
        with (
            write_atomically(self._path) as whole,
            zipfile.ZipFile(whole, "w", zipfile.ZIP_STORED) as archive,
        ):
            for name in ("images.npy", "finite.npy"):
                archive.write(self._folder / name, name)
            if labels is not None:
                with archive.open("labels.npy", "w") as file:
                    np.lib.format.write_array(file, np.asarray(labels, np.int32))
        del self._images, self._finite
        shutil.rmtree(self._folder)

    def _read(self) -> dict[str, Any] | None:
        path = self._folder / "progress.json"
        return json.loads(path.read_text()) if path.exists() else None

    def _note(self) -> None:
        state = {"settings": self._settings, "done": self.done}
        with write_atomically(self._folder / "progress.json") as file:
            file.write(json.dumps(state).encode())
