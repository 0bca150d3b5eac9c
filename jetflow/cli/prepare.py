"""`jetflow prepare`: a data set made ready to be read, from archives where it needs some."""

import dataclasses
from pathlib import Path

from jetflow.cli.flags import Command
from jetflow.data import dataset
from jetflow.data.builder import UNREADABLE
from jetflow.data.images import MAX_PIXELS
from jetflow.options import Options, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareOptions(Options):
    """The fields of `jetflow.prepare`."""

    dataset: str = option(help="name of the data set", example="imagenet64_old")
    manual_dir: Path | None = option(
        None, "the folder of the archives; default: downloads/manual in the data directory"
    )
    data_dir: Path | None = option(
        None, "prepared data sets; default: $TFDS_DATA_DIR, or ~/tensorflow_datasets"
    )
    workers: int | None = option(None, "threads that decode images; default: all cores", least=1)
    max_pixels: int = option(MAX_PIXELS, "an image that has more is left out", least=1)
    leave_out: bool = option(
        False, "go on without folders of images that belong to no split or class"
    )
    overwrite: bool = option(False, "prepare it anew although it is there")


def run(options: PrepareOptions) -> None:
    fields = dataclasses.asdict(options)
    prepared = dataset.prepare(fields.pop("dataset"), **fields)
    for split in prepared.splits.values():
        print(f"{split.describe()}, resize: {split.resize}, checksum {split.checksum()}")
    if prepared.differences:
        print(*prepared.differences, sep="\n")
        print("If not, bring it again, and run the same command with --overwrite.")
    if prepared.unreadable:
        print(*prepared.unreadable[:5], sep="\n")
        number, file = len(prepared.unreadable), prepared.folder / UNREADABLE
        print(f"{number:,} files were left out, the first of them above: {file}")
    print(f"prepared in {prepared.folder}")


COMMAND = Command(
    "jetflow prepare imagenet64_old --manual_dir ~/archives", PrepareOptions, run, ("dataset",)
)
