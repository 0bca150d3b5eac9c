"""`jetflow report`: one page of a run or a sweep."""

import dataclasses
import sys

from jetflow import hosts
from jetflow.buckets import AnyPath
from jetflow.cli.flags import Command
from jetflow.options import Options, option
from jetflow.tools.report.document import FORMATS, report


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportOptions(Options):
    """What `jetflow report` takes."""

    dir: AnyPath = option(help="the folder of a run or a sweep")
    format: str = option("html", "a page with all pictures inside, its text and tables alone, or "
                         "its numbers", choices=FORMATS)  # fmt: skip
    out: AnyPath | None = option(
        None,
        "the file to write; default: DIR/report.html, and of the other formats standard output",
    )


def run(options: ReportOptions) -> None:
    """Print the path of the page, or its text."""
    content = report(options.dir, options.format, options.out)
    if hosts.is_first():
        sys.stdout.write(content if isinstance(content, str) else f"{content}\n")


COMMAND = Command("jetflow report runs/digits", ReportOptions, run, arguments=("dir",))
