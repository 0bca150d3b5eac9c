"""`jetflow prepare`: a data set made ready to be read, from archives where it needs some."""

import dataclasses

from jetflow.cli.flags import Command
from jetflow.data import dataset
from jetflow.data.builder import UNREADABLE, PrepareOptions
from jetflow.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommandOptions(PrepareOptions):
    """The fields of `jetflow.prepare`."""

    dataset: str = option(help="name of the data set", example="imagenet64_old")


def run(options: CommandOptions) -> None:
    fields = dict(vars(options))
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
    "jetflow prepare imagenet64_old --manual_dir ~/archives", CommandOptions, run, ("dataset",)
)
