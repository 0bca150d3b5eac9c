"""What a run leaves to look at: metrics (JSON lines, TensorBoard events), pictures, progress."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tqdm import tqdm

from jetflow import hosts
from jetflow.buckets import AnyPath, Mirror
from jetflow.files import METRICS, naming, scan_metrics, set_aside, write_atomically

SPEED = ("images_per_second", "data_wait_share")  # metrics that an equal run need not have equal
START = 1  # SessionLog.START
_Event: Any = vars(event_pb2)["Event"]  # made at import: no type checker sees it
NOTABLE_WAIT = 0.05  # share of the time, from which on the progress shows it


class Reporter:
    """Writes metrics to `metrics.jsonl` and TensorBoard events, and progress to stderr.

    Of several processes, the first one alone does.

    Opened for a run that resumes at `start_step`, it first drops what was written of later steps,
    so that an interrupted run leaves the same metrics as an uninterrupted one.

    Attributes:
        mirror: brings the files to a bucket, if the run lives in one.
        waited: seconds since the last `log` in which the devices had nothing to do, for want of
            data; to be added to.
    """

    def __init__(self, workdir: AnyPath, *, start_step: int, total_steps: int):
        first, self._total = hosts.is_first(), total_steps
        self.mirror = Mirror(workdir)
        self._path = path = self.mirror.folder / METRICS
        self._written = _drop_after(workdir / METRICS, path, start_step) if first else set()
        self._file = path.open("a") if first else open(os.devnull, "w")  # noqa: SIM115
        self._stream = sys.stderr if first else self._file
        # Written at once: a thread of its own would end on a full disk, and adding to it hang.
        self._events = EventsWriter(str(path.with_name("events"))) if first else None
        self._add_event(start_step + 1, session_log={"status": START})
        self._live = self._stream.isatty()
        self._bar = tqdm(
            total=total_steps, desc="training", initial=start_step, file=self._stream, leave=False,
            dynamic_ncols=True, disable=not self._live,
        )  # fmt: skip
        self._lap_step, self._lap_start = start_step, time.perf_counter()
        self.waited = 0.0

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()
        with contextlib.suppress(OSError):  # all is written; what a full disk refused stays out
            self._file.close()
            if self._events:
                self._events.close()

        self.mirror.close()

    def has(self, step: int, name: str) -> bool:
        """Whether metric `name` of `step` was written, now or before an interruption."""
        return (step, name) in self._written

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, and a TensorBoard scalar for each metric."""
        broken = [name for name, value in metrics.items() if not math.isfinite(value)]
        if broken:
            self.say(f"step {step}: not finite: {', '.join(broken)}")
        values = {name: None if name in broken else value for name, value in metrics.items()}
        with naming(self._path):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        self._written |= {(step, name) for name in metrics}
        scalars = [one for name in metrics for one in summary.scalar(name, metrics[name]).value]
        self._add_event(step, summary={"value": scalars})
        self.mirror.copy()

    def picture(self, step: int, name: str, grid: UInt8[np.ndarray, "H W 3"]) -> None:
        """An image for TensorBoard."""
        self._add_event(step, summary=summary.image(name, grid, dataformats="HWC"))

    def _add_event(self, step: int, **content: Any) -> None:
        """An event for TensorBoard; the first one tells it to forget what came from `step` on."""
        if self._events:
            with naming(self._path.with_name("events")):
                self._events.write_event(_Event(wall_time=time.time(), step=step, **content))
                self._events.flush()

    def progress(self, step: int, text: str) -> None:
        """Move the bar of a terminal to a step."""
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(step - self._bar.n)

    def log(self, step: int, metrics: Mapping[str, float], text: str, batch_size: int) -> None:
        """The metrics of a step, with the speed since the last ones; off a terminal a line besides.

        The speed is in images per second, without the time in `pause`, and in the share of the time
        in which the devices waited for data.
        """
        now = time.perf_counter()
        seconds = max(now - self._lap_start, 1e-9)
        rate, waiting = max(step - self._lap_step, 1e-9) / seconds, self.waited / seconds
        self._lap_step, self._lap_start, self.waited = step, now, 0.0
        speed = rate * batch_size
        self.write(step, {**metrics, **dict(zip(SPEED, (speed, waiting), strict=True))})
        if not self._live:
            wait = f"waiting {waiting:.0%} for data  " if waiting >= NOTABLE_WAIT else ""
            eta = tqdm.format_interval((self._total - step) / rate)
            share = step / self._total
            self.say(
                f"step {step}/{self._total} ({share:.0%})  {text}  {speed:,.0f} images/s  "
                f"{wait}ETA {eta}"
            )

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """A context whose time does not count as training."""
        start = time.perf_counter()
        yield
        self._lap_start += time.perf_counter() - start

    def say(self, text: str) -> None:
        """A line that stays."""
        tqdm.write(text, file=self._stream)
        self._stream.flush()


def _drop_after(source: AnyPath, path: AnyPath, step: int) -> set[tuple[int, str]]:
    """Write the metrics up to `step` to `path`, and return which (step, name) there are."""
    lines, wrong = scan_metrics(source)
    kept = [line for line in lines if line["step"] <= step]
    with write_atomically(path) as file:
        file.writelines(f"{json.dumps(line)}\n".encode() for line in kept)
        if wrong:
            set_aside(source, wrong[0])
    return {(int(line["step"]), name) for line in kept for name in line}
