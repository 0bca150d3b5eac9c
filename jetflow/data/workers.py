"""Worker processes that read batches for a trainer, and end with it.

Python starts them anew ("spawn"), so each imports the trainer's main module first: a script that
uses `jetflow` with workers needs its `if __name__ == "__main__":`, as the `jetflow` command has.
"""

from collections.abc import Generator

import grain
from absl import flags

from jetflow.data import processes
from jetflow.types import Batch

_BUFFER = 2  # batches that wait in each worker
_SMALLEST_SHARED = 2**16  # bytes; smaller arrays are cheaper to send than to share


def read(batches: grain.IterDataset, count: int) -> Generator[Batch, None, None]:
    """The same batches in the same order, each from one of `count` processes, by turns.

    To close the generator, or to drop it, ends the processes.
    """
    if not flags.FLAGS.is_parsed():  # as by an `absl.app`: Grain looks at flags of its own
        flags.FLAGS.mark_as_parsed()
    options = grain.experimental.DatasetOptions(min_shm_size=_SMALLEST_SHARED)
    batches = grain.experimental.WithOptionsIterDataset(batches, options)
    workers = grain.MultiprocessingOptions(num_workers=count, per_worker_buffer_size=_BUFFER)
    iterator = iter(batches.mp_prefetch(workers, worker_init_fn=_start))
    try:
        # Ctrl-C is the trainer's to answer: it needs its workers until it has saved.
        with processes.blocked_signals():
            first = next(iterator)  # which starts them
        yield first
        yield from iterator
    finally:
        iterator.close()


def _start(index: int, count: int) -> None:
    """Runs in each worker."""
    del index, count
    processes.end_with_parent()
