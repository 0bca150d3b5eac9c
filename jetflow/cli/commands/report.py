"""`jetflow report`: one page of a run or a sweep."""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from jetflow import hosts
from jetflow.cli import commands
from jetflow.files import write_atomically
from jetflow.tools.report import text
from jetflow.tools.report.content import Page
from jetflow.tools.report.html import render
from jetflow.tools.report.run import run_page
from jetflow.tools.report.sweep import sweep_page
from jetflow.types import UsageError
from jetflow.workdir import CONFIG, SWEEP

USAGE = "jetflow report runs/digits"
ARGUMENTS = ("DIR",)
FORMATS = {"html": render, "md": text.markdown, "csv": text.comma_separated}


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    del argv
    values.set_gnu_getopt(True)
    flag = commands.definer(values)
    flag(flags.DEFINE_enum, "format", "html", "a page with all pictures inside, its text and "
         "tables alone, or its numbers", enum_values=list(FORMATS))  # fmt: skip
    flag(flags.DEFINE_string, "out", None, "the file to write; default: DIR/report.html, and of "
         "the other formats standard output")  # fmt: skip


def run(values: flags.FlagValues, folder: str) -> int:
    if not Path(folder).is_dir():
        raise UsageError(f"{folder} is no folder; give that of a run or a sweep")
    commands.check_writable("out", values.out)
    if not hosts.is_first():
        return 0
    content = FORMATS[values.format](read_page(Path(folder)))
    out = values.out or (f"{folder}/report.html" if values.format == "html" else None)
    if out is None:
        sys.stdout.write(content)
        return 0
    with write_atomically(Path(out)) as file:
        file.write(content.encode())
    print(out)
    return 0


def read_page(folder: Path) -> Page:
    """What there is to say of a folder of either kind."""
    if (folder / SWEEP).exists():
        return sweep_page(folder)
    found = [path for name in (CONFIG, SWEEP) for path in folder.glob(f"*/{name}")]
    if found and not (folder / CONFIG).exists():
        inside = ", ".join(sorted({path.parent.name for path in found})[:8])
        raise UsageError(f"{folder} is neither a run nor a sweep; give one that is in it: {inside}")
    return run_page(folder)
