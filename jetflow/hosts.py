"""The processes of a run: how each finds the others, what they agree on, and how they stop.

Every process runs the same program on its own devices. The first one alone writes and prints.
"""

import contextlib
import functools
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn, TypeVar

import filelock
import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from jetflow.types import UsageError

T = TypeVar("T")

THREADS_PER_DEVICE = 4
JOIN_SECONDS = 300  # for all processes to come; then JAX aborts those that are there
NOTICE_SECONDS = 20  # before a process says that it waits for others
HEARTBEAT_SECONDS = 30  # without a sign of life from a process, after which the others end
LAST_WORDS_SECONDS = 5
LARGEST_LAG = 60  # seconds until a network disk shows a file that another machine wrote

# What a launcher sets where there are several processes, which `jax.distributed` then finds.
LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "JETFLOW_PROCESSES")


@contextlib.contextmanager
def joined(*, saves_at_signals: bool) -> Iterator[None]:
    """With the other processes of this run, if there are any.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say so, or Slurm, MPI or, on a TPU
    pod, JETFLOW_PROCESSES.

    A process that fails here ends at once, as the way out of Python would wait for the others: with
    status 2 for bad input, else 1. The others then end within some two minutes. If some do not come
    at all, JAX ends those that wait.

    Args:
        saves_at_signals: SIGTERM is only noted, for `StopSignal`; otherwise it ends the process.

    Raises:
        UsageError: the environment is incomplete.
    """
    _make_room_for_devices()
    launched = any((_whole_number(name) or 1) > 1 for name in LAUNCHERS)
    if not launched and "JAX_COORDINATOR_ADDRESS" not in os.environ:
        yield
        return
    _join()
    if not saves_at_signals:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX has joined with a handler of its own
    try:
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(sys.stdout if is_first() else nowhere),
        ):
            yield
    except KeyboardInterrupt:
        raise
    except Exception as error:
        _end(error)


def _end(error: Exception) -> NoReturn:
    """Say why this process fails, and end it."""
    if isinstance(error, UsageError):
        _print(str(error))
        if is_first():  # the others, joined through it, mostly fail alike: let them say so
            time.sleep(LAST_WORDS_SECONDS)
        os._exit(error.status)
    if not isinstance(error, jax.errors.JaxRuntimeError):  # which says that another one is gone
        traceback.print_exception(error)
    _print(
        f"process {jax.process_index()} of {jax.process_count()} ends, as it or another one failed "
        f"({_one_line(error)[:300]}); run the same command on all of them again to go on"
    )
    os._exit(1)


def _join() -> None:
    """Find the other processes, or say after a while that they are still missing."""
    text = "still waiting for the other processes of this run, on which the same command must run"
    notice = threading.Timer(NOTICE_SECONDS, _print, [text])
    notice.daemon = True
    notice.start()
    try:
        jax.distributed.initialize(
            num_processes=_whole_number("JAX_NUM_PROCESSES"),
            process_id=_whole_number("JAX_PROCESS_ID"),
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=2 * HEARTBEAT_SECONDS,
        )
    except ValueError as error:
        raise UsageError(
            f"the processes of this run cannot join ({_one_line(error)}); set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID on each of them"
        ) from error
    finally:
        notice.cancel()


def is_first() -> bool:
    """Whether this process is the one that writes and prints.

    A single process asks JAX for no device: a command that computes nothing must not wait for an
    accelerator that a training holds.
    """
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def agreed(value: T) -> T:
    """The first process's value, on all of them: anything that JSON can hold."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    text = multihost_utils.broadcast_one_to_all(np.resize(text, length))
    return json.loads(np.asarray(text).tobytes())


def wait_to_see(path: Path | epath.Path) -> None:
    """Wait until this machine sees a file of the first process: network disks may lag behind."""
    end = time.monotonic() + LARGEST_LAG
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.5)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Whether this process has the lock of a file; with `wait`, as soon as no other one has it.

    Processes of the same run count too: only the first one should ask. The lock goes with the
    process, however it ends. On a disk without locks, such as some network disks, every process
    gets it, and a warning asks the user to start only one.

    Raises:
        OSError: the file cannot be written.
    """
    with open(path, "a") as file:
        try:
            mine = filelock.lock_descriptor(file.fileno(), blocking=wait)
        except OSError as error:
            _warn_of_no_locks(path.parent, str(error))
            mine = True
        yield mine


@functools.cache  # once a folder
def _warn_of_no_locks(folder: Path, error: str) -> None:
    logging.warning("%s cannot be locked (%s): start no other process there", folder, error)


def _print(text: str) -> None:
    print(f"jetflow: {text}", file=sys.stderr, flush=True)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _whole_number(name: str) -> int | None:
    value = os.environ.get(name)
    if value is not None and not value.isdigit():
        raise UsageError(f"{name} is {value!r} in the environment; expected a whole number")
    return None if value is None else int(value)


def _make_room_for_devices() -> None:
    """Give XLA enough threads for CPU devices that outnumber the cores, before JAX makes its pool.

    Each device waits for the others in a thread of that pool, which is as large as the machine has
    cores: with too few threads they would wait for ever.
    """
    devices: int = getattr(jax.config, "jax_num_cpu_devices")  # noqa: B009
    if devices > 1:
        threads = max(THREADS_PER_DEVICE * devices, os.cpu_count() or 1)
        os.environ.setdefault("NPROC", str(threads))


class Stopped(Exception):
    """A signal asked the run to stop; `signal` is its number."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.signal = number


class StopSignal:
    """Notes SIGTERM and Ctrl-C, so that a run can save before it ends; a second one ends it.

    Any of several processes may get the signal, and all of them stop at the same call of `poll`,
    which they make equally often: JAX listens for SIGTERM and lets them agree.
    """

    def __enter__(self) -> "StopSignal":
        self._number: int | None = None
        self._several = jax.process_count() > 1
        self._polls = 0
        numbers = (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT)
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        for again in self._before:
            signal.signal(again, signal.SIG_DFL)
        os.write(2, b"\nstopping as soon as this step, or its compilation, is done; "
                    b"a second signal ends the run at once\n")  # fmt: skip
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self._number = number

    def poll(self) -> None:
        """Raise `Stopped` if a signal came."""
        self._polls += 1
        if self._several and multihost_utils.reached_preemption_sync_point(self._polls):
            self._number = signal.SIGTERM
        if self._number is not None:
            raise Stopped(self._number)
