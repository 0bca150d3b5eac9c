"""The processes of a run: how each finds the others, and what they agree on.

Every process runs the same program on its own devices. The first one alone writes and prints.
"""

import contextlib
import functools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import filelock
import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from jetflow.types import UsageError

T = TypeVar("T", bool, int, float)

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

    There are if JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say so, or Slurm, MPI
    or, on a TPU pod, JETFLOW_PROCESSES, does.

    A process that fails in this context ends at once, whatever the others do: the way out of Python
    would wait for them. Bad input ends it with status 2, anything else with 1, and the others then
    end within some two minutes. Where some do not come at all, JAX ends those that wait.

    Args:
        saves_at_signals: whether a SIGTERM is only noted, for `StopSignal`. Else it ends a process
            as it does where there is one alone.

    Raises:
        UsageError: if the environment is incomplete.
    """
    _make_room_for_devices()
    if not _are_several():
        yield
        return
    _join()
    if not saves_at_signals:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX has joined with a handler of its own
    try:
        with contextlib.ExitStack() as silence:
            if not is_first():
                nowhere = silence.enter_context(open(os.devnull, "w"))
                silence.enter_context(contextlib.redirect_stdout(nowhere))
            yield
    except KeyboardInterrupt:
        raise
    except UsageError as error:
        print(f"jetflow: {error}", file=sys.stderr, flush=True)
        if is_first():  # the others, joined through it, mostly find the same: let them say so
            time.sleep(LAST_WORDS_SECONDS)
        os._exit(2)
    except Exception as error:
        if not isinstance(error, jax.errors.JaxRuntimeError):  # which says that another one is gone
            traceback.print_exc()
        reason = _one_line(error)[:300]
        print(
            f"jetflow: process {jax.process_index()} of {jax.process_count()} ends, as it or "
            f"another one failed ({reason}); run the same command on all of them again to go on",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


def _join() -> None:
    """Find the other processes, or say after a while that they are still missing."""

    def still_waiting() -> None:
        print(
            "jetflow: still waiting for the other processes of this run, for up to "
            f"{JOIN_SECONDS // 60} minutes in all; the same command must run on all of them",
            file=sys.stderr,
            flush=True,
        )

    notice = threading.Timer(NOTICE_SECONDS, still_waiting)
    notice.daemon = True
    notice.start()
    try:
        jax.distributed.initialize(
            num_processes=_number("JAX_NUM_PROCESSES"),
            process_id=_number("JAX_PROCESS_ID"),
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

    Asks for no device where there is one process: a command that computes nothing must not wait for
    an accelerator that a training holds.
    """
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def agreed(value: T) -> T:
    """The first process's value, on all of them."""
    if jax.process_count() == 1:
        return value
    return type(value)(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def wait_to_see(path: Path | epath.Path) -> None:
    """Until what the first process wrote or found shows here, too: network disks may lag behind."""
    end = time.monotonic() + LARGEST_LAG
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.5)


def agreed_numbers(numbers: Sequence[int]) -> list[int]:
    """The first process's list, on all of them."""
    if jax.process_count() == 1:
        return list(numbers)
    mine = np.zeros(agreed(len(numbers)), np.int64)
    if is_first():
        mine[:] = numbers
    return [int(number) for number in multihost_utils.broadcast_one_to_all(mine)]


@contextlib.contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Whether this process holds the lock of a file, which keeps all other processes out.

    Processes of the same run too: only the first one should ask. The lock goes with the process,
    however it ends. On a disk without locks, such as some network disks, every process gets it,
    and a warning asks the user to start only one.

    Args:
        wait: wait until the lock is free; otherwise the answer may be no.

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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _are_several() -> bool:
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        return True
    return any((_number(name) or 1) > 1 for name in LAUNCHERS)


def _number(name: str) -> int | None:
    value = os.environ.get(name)
    if value is not None and not value.isdigit():
        raise UsageError(f"{name} is {value!r} in the environment; expected a whole number")
    return None if value is None else int(value)


def _make_room_for_devices() -> None:
    """Give XLA enough threads for CPU devices that outnumber the cores.

    Each device waits for the others in a thread of a pool that is otherwise as large as the machine
    has cores, and would wait for ever. The pool's size is read when JAX first looks for devices.
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
