"""Animal Faces-HQ: cats, dogs and wild animals, in its two versions."""

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import tensorflow_datasets as tfds

from jetflow.data import parts
from jetflow.data.builders.archived import Archive, ArchiveBuilder, Split
from jetflow.data.parts import ZipPart

CLASSES = ("cat", "dog", "wild")
_MEMBER = re.compile(r"(?:.*/)?(train|val|test)/(cat|dog|wild)/[^/.][^/]*")
_SPLITS = {"train": "train", "val": "validation", "test": "test"}


class Afhq(ArchiveBuilder, skip_registration=True):
    """At a chosen size, 3 classes; splits train (14,630) and validation (1,500)."""

    name = "afhq"
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name=str(size), description=f"Resized to {size}x{size} pixels.")
        for size in (64, 128, 256)
    ]
    HOMEPAGE = "https://github.com/clovaai/stargan-v2"
    DESCRIPTION = """
    Animal Faces-HQ, photographs of 512x512 pixels, resized; in the order of their names. Its second
    version holds fewer images, aligned and resized anew, and has a split "test" for "val".
    """
    CITATION = """
    @inproceedings{choi2020stargan,
      author = {Choi, Yunjey and Uh, Youngjung and Yoo, Jaejun and Ha, Jung-Woo},
      title = {{StarGAN} v2: Diverse Image Synthesis for Multiple Domains},
      booktitle = {CVPR},
      year = {2020},
      eprint = {1912.01865},
    }
    """
    archives = (Archive("afhq.zip", "about 1 GB"),)
    PIECE_IMAGES = 1024  # there are few, and all cores are to have some

    def _splits(self, found: dict[str, Path]) -> tuple[Sequence[str], Sequence[Split]]:
        [path] = found.values()
        with zipfile.ZipFile(path) as archive:
            members = sorted((each.filename, each.compress_size) for each in archive.infolist())
        splits = []
        for folder, name in _SPLITS.items():
            matches = [(_MEMBER.fullmatch(member), size) for member, size in members]
            files = [(match, size) for match, size in matches if match and match[1] == folder]
            if files:
                splits.append(Split(name, self._parts(path, files)))
        return CLASSES, splits

    def _parts(self, path: Path, files: list[tuple[re.Match, int]]) -> list[ZipPart]:
        sizes = [size for _, size in files]
        made = []
        for run in parts.runs(sizes, self.PIECE_BYTES, self.PIECE_IMAGES):
            names = tuple(match[0] for match, _ in files[run])
            labels = tuple(CLASSES.index(match[2]) for match, _ in files[run])
            made.append(ZipPart(path, names, labels, sum(sizes[run])))
        return made


class AfhqV2(Afhq, skip_registration=True):
    """At a chosen size, 3 classes; splits train (14,336) and test (1,467)."""

    name = "afhq_v2"
    archives = (Archive("afhq_v2.zip", "about 6.5 GB"),)
