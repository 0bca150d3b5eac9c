"""`jetflow prepare`: a data set made ready to be read, from archives where it needs some."""

import dataclasses
from pathlib import Path

from jetflow.cli.flags import Command
from jetflow.data import dataset
from jetflow.data.builder import UNREADABLE
from jetflow.options import MOST_WORKERS, DataOptions, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareOptions(DataOptions):
    """The fields of `jetflow.prepare`."""

    dataset: str = option(help="name of the data set", example="imagenet64_old")
    manual_dir: Path | None = option(
        None, "the folder of the archives; default: downloads/manual in the data directory"
    )
    workers: int | None = option(
        None, "processes that decode images; default: all cores", least=1, most=MOST_WORKERS
    )


def run(options: PrepareOptions) -> None:
    prepared = dataset.prepare(
        options.dataset,
        manual_dir=options.manual_dir,
        data_dir=options.data_dir,
        workers=options.workers,
    )
    for split in prepared.splits.values():
        print(f"{split.describe()}, resize: {split.resize}, checksum {split.checksum()}")
    if prepared.differences:
        print(*prepared.differences, sep="\n")
        print(f"If not, bring it again, delete {prepared.folder}, and run the same command.")
    if prepared.unreadable:
        print(f"{prepared.unreadable:,} files were left out: {prepared.folder / UNREADABLE}")
    print(f"prepared in {prepared.folder}")


COMMAND = Command(
    "jetflow prepare imagenet64_old --manual_dir ~/archives", PrepareOptions, run, ("dataset",)
)
