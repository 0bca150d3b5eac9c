"""Items that a thread takes before they are asked for: batches on their way to the devices."""

import collections
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import jax

S = TypeVar("S")
T = TypeVar("T")

DEPTH = 2  # one for the step that comes next, and one that is being made


class Ahead(Generic[S, T]):
    """An endless iterator of `change(item)`, of which some are made ahead, in order."""

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
        """The next one, and the seconds for which the device has nothing to do before it is there.

        Args:
            running: arrays that the device computes meanwhile; they are awaited only if the next
                one is not there yet, and nothing could be started anyway.
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
