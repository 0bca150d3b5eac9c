"""Batches on their way to the devices: read by worker processes, and put there ahead of a step."""

import collections
import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import resource_tracker
from typing import Any, Generic, TypeVar

import grain
import jax
import psutil
from absl import flags

from jetflow.types import Batch, Interruption

S = TypeVar("S")
T = TypeVar("T")

DEPTH = 2  # one for the step that comes next, and one that is being made
STOPPED_SECONDS = 30  # until a worker that was stopped is given up
_BUFFER = 2  # batches that wait in each worker
# Bytes of the smallest array that goes through shared memory. What is sent then fits into a pipe at
# once: of a worker that is killed, no message may come by halves, for which Grain would wait.
_SMALLEST_SHARED = 2**10


class Ahead(Generic[S, T]):
    """An endless iterator of `change(item)`; a thread makes the next ones ahead, in order."""

    def __init__(
        self, items: Generator[S, None, None], change: Callable[[S], T], depth: int = DEPTH
    ):
        self._items = items
        self._change = change
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._coming = collections.deque(self._thread.submit(self._make) for _ in range(depth))

    def __iter__(self) -> "Ahead[S, T]":
        return self

    def __next__(self) -> T:
        """The next one; raises what its making raised."""
        item = self._coming.popleft().result()
        self._coming.append(self._thread.submit(self._make))
        return item

    def after(self, running: Any) -> tuple[T, float]:
        """The next one, and the seconds for which the device is idle until it is ready.

        Args:
            running: arrays that the device computes meanwhile. They are awaited only if the next
                one is not ready, when nothing could be started anyway.
        """
        if self._coming[0].done():
            return next(self), 0.0
        jax.block_until_ready(running)
        start = time.perf_counter()
        return next(self), time.perf_counter() - start

    def close(self) -> None:
        """End the thread, and close the items."""
        self._thread.shutdown(cancel_futures=True)
        self._items.close()

    def _make(self) -> T:
        return self._change(next(self._items))


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):  # on Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def mapped(
    function: Callable[[S], T], items: Iterable[S], pool: ThreadPoolExecutor, ahead: int
) -> Iterator[T]:
    """`function(item)` of all items, in order; so many chunks of them are under way at once."""
    items, coming = iter(items), collections.deque[Future[list[T]]]()
    while chunk := list(itertools.islice(items, 8)):
        coming.append(pool.submit(lambda chunk: list(map(function, chunk)), chunk))
        if len(coming) > ahead:
            yield from coming.popleft().result()
    for future in coming:
        yield from future.result()


def read_by_workers(batches: grain.IterDataset, count: int) -> Generator[Batch, None, None]:
    """The same batches in the same order, each from one of `count` processes, by turns.

    Python starts them anew ("spawn"), so each imports the trainer's main module first: a script
    that uses workers needs its `if __name__ == "__main__":`. Closing or dropping the generator ends
    them.

    Raises:
        Interruption: a worker was killed, or stopped for some `STOPPED_SECONDS`.
    """
    if not flags.FLAGS.is_parsed():  # as by an `absl.app`: Grain looks at flags of its own
        flags.FLAGS.mark_as_parsed()
    options = grain.experimental.DatasetOptions(min_shm_size=_SMALLEST_SHARED)
    batches = grain.experimental.WithOptionsIterDataset(batches, options)
    workers = grain.MultiprocessingOptions(num_workers=count, per_worker_buffer_size=_BUFFER)
    iterator = iter(batches.mp_prefetch(workers, worker_init_fn=_end_with_parent))
    closed = threading.Event()
    threading.Thread(target=_kill_stopped, args=(closed,), daemon=True).start()
    # It would unblock the signals when it starts; at the end it warns of what a lost worker left.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    resource_tracker.ensure_running()
    # The trainer answers Ctrl-C and SIGTERM: it needs its workers until it has saved. A handler in
    # them would come too late, as they take seconds to start.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        try:
            first = next(iterator)  # which starts them
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield first
        yield from iterator
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        raise Interruption(
            "a process that reads data was killed, perhaps for want of memory, or stopped; run the "
            "same command again to go on, with a lower config.data.workers if that recurs"
        ) from error
    finally:
        closed.set()
        iterator.close()


def _kill_stopped(closed: threading.Event) -> None:
    """Make an end of workers that are stopped for long; Grain would wait for them for ever."""
    checks = collections.Counter[int]()
    while not closed.wait(STOPPED_SECONDS / 3):
        workers = multiprocessing.active_children()
        for pid in (each.pid for each in workers if each.name.startswith("grain")):
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                is_stopped = process.status() == psutil.STATUS_STOPPED
                checks[process.pid] = checks[process.pid] + 1 if is_stopped else 0
                if checks[process.pid] == 3:  # not once: as when a terminal stops this one as well
                    process.kill()


def _end_with_parent(index: int, count: int) -> None:
    """Called in a worker: a parent that was killed cannot ask it to stop."""
    del index, count
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
