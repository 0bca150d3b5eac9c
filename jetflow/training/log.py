"""What a run leaves to look at: metrics (JSON lines, TensorBoard events), pictures, progress."""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tensorboardX import SummaryWriter

from jetflow import hosts
from jetflow.files import METRICS, read_metrics, write_atomically

SPEED = ("images_per_second", "data_wait_share")  # metrics that an equal run need not have equal
NOTABLE_WAIT = 0.05  # share of the time, from which on the progress shows it
PADDING = 2  # pixels between the images of a grid, before magnification
FRAME = 150  # milliseconds of an animation
SHORTEST_SIDE = 512  # pixels; smaller grids are magnified by a whole number


class Reporter:
    """Writes metrics to `metrics.jsonl` and TensorBoard events, and progress to stderr.

    Of several processes, the first one alone does.

    Opened for a run that resumes at `start_step`, it first drops what was written of later steps,
    so that an interrupted run leaves the same metrics as an uninterrupted one.
    """

    def __init__(self, workdir: Path, *, start_step: int, total_steps: int):
        self._path = workdir / METRICS
        self._total = total_steps
        if first := hosts.is_first():
            self._written = _drop_after(self._path, start_step)
            self._file, self._stream = self._path.open("a"), sys.stderr
        else:
            self._written = set()
            self._file = self._stream = open(os.devnull, "w")  # noqa: SIM115
        self._events = SummaryWriter(
            str(workdir), purge_step=start_step + 1, flush_secs=20, write_to_disk=first
        )
        self._live = self._stream.isatty()
        self._line_length = 0
        self._clock = _Clock(start_step)
        self._wait_share = 0.0

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_) -> None:
        self._clear()
        self._file.close()
        self._events.close()

    def has(self, step: int, name: str) -> bool:
        """Whether metric `name` of `step` was written, now or before an interruption."""
        return (step, name) in self._written

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, and a TensorBoard scalar for each metric."""
        broken = [name for name, value in metrics.items() if not math.isfinite(value)]
        if broken:
            self.say(f"step {step}: not finite: {', '.join(broken)}")
        values = {name: None if name in broken else value for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        self._written |= {(step, name) for name in metrics}
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)

    def picture(self, step: int, name: str, grid: UInt8[np.ndarray, "H W 3"]) -> None:
        """An image for TensorBoard."""
        self._events.add_image(name, grid, step, dataformats="HWC")

    def speed(self, step: int, batch_size: int) -> dict[str, float]:
        """The metrics `SPEED` of the steps since the last call, without the time in `pause`.

        They are images/s, and the share of the time in which the devices waited for data.
        """
        rate, self._wait_share = self._clock.lap(step)
        return dict(zip(SPEED, (rate * batch_size, self._wait_share), strict=True))

    def waited(self, seconds: float) -> None:
        """Note for how long the devices had nothing to do, for want of data."""
        self._clock.waited += seconds

    def pause(self) -> "_Clock":
        """A context whose time does not count as training."""
        return self._clock

    def progress(self, step: int, metric: str, batch_size: int, *, log: bool) -> None:
        """A line that rewrites itself on a terminal; elsewhere a plain one, if `log`."""
        if not (log or self._live):
            return
        rate, waits = self._clock.average(step), self._wait_share >= NOTABLE_WAIT
        text = (
            f"step {step}/{self._total} ({step / self._total:.0%})  {metric}  "
            f"{rate * batch_size:,.0f} images/s  "
            + (f"waiting {self._wait_share:.0%} for data  " if waits else "")
            + f"ETA {_duration((self._total - step) / rate)}"
        )
        if not self._live:
            print(text, file=self._stream, flush=True)
            return
        padding = " " * max(self._line_length - len(text), 0)
        print(f"\r{text}{padding}", end="", file=self._stream, flush=True)
        self._line_length = len(text)

    def say(self, text: str) -> None:
        """A line that stays."""
        self._clear()
        print(text, file=self._stream, flush=True)

    def _clear(self) -> None:
        if self._line_length:
            print(f"\r{' ' * self._line_length}\r", end="", file=self._stream, flush=True)
            self._line_length = 0


class _Clock:
    """Steps per second of training; stands still inside `with clock:`.

    Attributes:
        waited: seconds since the last lap in which the devices waited for data.
    """

    def __init__(self, step: int):
        self._first = self._last = (step, time.perf_counter())
        self.waited = 0.0

    def __enter__(self) -> None:
        self._pause_start = time.perf_counter()

    def __exit__(self, *_) -> None:
        pause = time.perf_counter() - self._pause_start
        self._first = (self._first[0], self._first[1] + pause)
        self._last = (self._last[0], self._last[1] + pause)

    def average(self, step: int) -> float:
        """Since the start."""
        return self._rate(self._first, step)

    def lap(self, step: int) -> tuple[float, float]:
        """Since the last lap, and the share of its time that was `waited`."""
        rate = self._rate(self._last, step)
        now = time.perf_counter()
        share = self.waited / max(now - self._last[1], 1e-9)
        self._last, self.waited = (step, now), 0.0
        return rate, share

    @staticmethod
    def _rate(since: tuple[int, float], step: int) -> float:
        return max(step - since[0], 1e-9) / max(time.perf_counter() - since[1], 1e-9)


def _drop_after(path: Path, step: int) -> set[tuple[int, str]]:
    """Keep the metrics up to `step`, and return which (step, name) there are."""
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    with write_atomically(path) as file:
        file.writelines(f"{json.dumps(line)}\n".encode() for line in kept)
    return {(int(line["step"]), name) for line in kept for name in line}


def make_grid(
    images: UInt8[np.ndarray, "N H W C"], rows: list[int]
) -> UInt8[np.ndarray, "GH GW 3"]:
    """Images side by side, `rows[r]` of them in row r, magnified to a size that one can see."""
    _, height, width, channels = images.shape
    cell_height, cell_width = height + PADDING, width + PADDING
    shape = (len(rows) * cell_height + PADDING, max(rows) * cell_width + PADDING, channels)
    grid = np.full(shape, 255, np.uint8)
    places = [(row, column) for row, count in enumerate(rows) for column in range(count)]
    for image, (row, column) in zip(images, places, strict=True):
        top, left = PADDING + row * cell_height, PADDING + column * cell_width
        grid[top : top + height, left : left + width] = image
    grid = np.broadcast_to(grid[..., :3] if channels >= 3 else grid[..., :1], (*shape[:2], 3))
    factor = max(SHORTEST_SIDE // min(shape[:2]), 1)
    return grid.repeat(factor, axis=0).repeat(factor, axis=1)


def save_png(path: Path, grid: UInt8[np.ndarray, "H W 3"]) -> None:
    """Write a picture, on the first process; a reader never sees half of it."""
    if not hosts.is_first():
        return
    with write_atomically(path) as file:
        Image.fromarray(grid).save(file, format="png")


def save_gif(path: Path, frames: list[UInt8[np.ndarray, "H W 3"]]) -> None:
    """Write an animation of pictures of one size, which stands still on the last.

    On the first process alone, as `save_png`.
    """
    if not hosts.is_first():
        return
    first, *others = [Image.fromarray(frame) for frame in frames]
    durations = [FRAME] * len(others) + [10 * FRAME]
    with write_atomically(path) as file:
        first.save(file, "gif", save_all=True, append_images=others, duration=durations, loop=0)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
