"""`jetflow prepare`: a data set made ready to be read, from archives where it needs some."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from tqdm import tqdm

from jetflow.cli import commands
from jetflow.data import dataset as pipeline
from jetflow.data import prepared
from jetflow.data.builders.archived import UNREADABLE, Progress
from jetflow.data.facts import differences

USAGE = "jetflow prepare imagenet64_old --manual_dir ~/archives"
ARGUMENTS = ("DATASET",)

SECONDS_PER_LINE = 30  # of progress, where no terminal shows a bar


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    del argv
    commands.define_data_dir(values)
    flag = commands.definer(values)
    flag(flags.DEFINE_string, "manual_dir", None,
         "the folder of the archives; default: downloads/manual in the data directory")  # fmt: skip
    flag(flags.DEFINE_integer, "workers", None, "processes that decode images; default: all cores",
         lower_bound=1)  # fmt: skip


def run(values: flags.FlagValues, name: str) -> int:
    with Display(name) as display:
        builder = prepared.prepare(
            name, values.data_dir, manual_dir=values.manual_dir,
            workers=values.workers,
            on_progress=display.update,
        )  # fmt: skip
    for split in builder.info.splits:
        dataset = pipeline.load(name, split, data_dir=values.data_dir)
        print(f"{dataset.describe()}, resize: {dataset.resize}, checksum {dataset.checksum()}")
    left_out = (builder.info.metadata or {}).get("unreadable", 0)
    if found := differences(name, prepared.counts(builder), left_out):
        print(*found, sep="\n")
        print(f"If not, bring it again, delete {builder.data_dir}, and run the same command.")
    if left_out:
        print(f"{left_out:,} files were left out: {Path(builder.data_dir) / UNREADABLE}")
    print(f"prepared in {builder.data_dir}")
    return 0


class Display:
    """Progress on standard error: a bar on a terminal, else a line now and then."""

    def __init__(self, name: str):
        self._name = name
        self._begin = self._said = time.monotonic()
        self._first: Progress | None = None
        self._bar: tqdm | None = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._close()

    def update(self, progress: Progress) -> None:
        now = time.monotonic()
        if self._first is None or self._first.is_first_pass != progress.is_first_pass:
            self._first, self._begin = progress, now
            self._close()
        state = "first pass" if progress.is_first_pass else self._state(progress, now)
        if sys.stderr.isatty():
            if self._bar is None:
                self._bar = tqdm(
                    total=progress.bytes_in_all, desc=self._name, unit="B", unit_scale=True,
                    file=sys.stderr,
                )  # fmt: skip
            self._bar.set_postfix_str(state, refresh=False)
            self._bar.update(progress.bytes_read - self._bar.n)
        elif now - self._said >= SECONDS_PER_LINE:
            self._said = now
            share = progress.bytes_read / max(progress.bytes_in_all, 1)
            print(f"{self._name}: {share:.0%}, {state}", file=sys.stderr, flush=True)

    def _state(self, progress: Progress, now: float) -> str:
        assert self._first is not None
        new = progress.images - self._first.images  # what an earlier start did took no time now
        rate = new / max(now - self._begin, 1e-9)
        return (
            f"{progress.images:,} images, {rate:,.0f} images/s, {progress.unreadable:,} unreadable"
        )

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
