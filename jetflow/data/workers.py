"""Worker processes that read batches for a trainer, and end with it.

Python starts them anew ("spawn"), so each imports the trainer's main module first: a script that
uses `jetflow` with workers needs its `if __name__ == "__main__":`, as the `jetflow` command has.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator
from multiprocessing import resource_tracker

import grain
from absl import flags

from jetflow.types import Batch

_BUFFER = 2  # batches that wait in each worker
_SMALLEST_SHARED = 2**16  # bytes; smaller arrays are cheaper to send than to share

# They come to the whole process group, but are the trainer's to answer: it needs its workers until
# it has saved.
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def read(batches: grain.IterDataset, count: int) -> Generator[Batch, None, None]:
    """The same batches in the same order, each from one of `count` processes, by turns.

    To close the generator, or to drop it, ends the processes.
    """
    if not flags.FLAGS.is_parsed():  # as by an `absl.app`: Grain looks at flags of its own
        flags.FLAGS.mark_as_parsed()
    options = grain.experimental.DatasetOptions(min_shm_size=_SMALLEST_SHARED)
    batches = grain.experimental.WithOptionsIterDataset(batches, options)
    processes = grain.MultiprocessingOptions(num_workers=count, per_worker_buffer_size=_BUFFER)
    iterator = iter(batches.mp_prefetch(processes, worker_init_fn=_end_with_parent))
    try:
        with _blocked_signals():
            first = next(iterator)  # which starts them
        yield first
        yield from iterator
    finally:
        iterator.close()


@contextlib.contextmanager
def _blocked_signals() -> Iterator[None]:
    """Processes that are started inside never get `_SIGNALS`, from their first moment on.

    This process still does, in its other threads. A handler in the worker would come too late: it
    takes seconds to start.
    """
    resource_tracker.ensure_running()  # it would unblock them when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent(index: int, count: int) -> None:
    """Runs in each worker: a parent that was killed cannot ask it to stop."""
    del index, count
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
