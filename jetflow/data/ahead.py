"""Items that a thread takes before they are asked for: batches on their way to the devices."""

import collections
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

S = TypeVar("S")
T = TypeVar("T")


class Ahead(Generic[S, T]):
    """An endless iterator of `change(item)`, of which `depth` are made ahead, in order."""

    def __init__(self, items: Iterator[S], change: Callable[[S], T], depth: int = 2):
        self._items = items
        self._change = change
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._coming = collections.deque(self._thread.submit(self._make) for _ in range(depth))

    def __iter__(self) -> "Ahead[S, T]":
        return self

    def __next__(self) -> T:
        """The next one; raises what its making raised."""
        item = self._coming[0].result()
        self._coming.popleft()
        self._coming.append(self._thread.submit(self._make))
        return item

    def ready(self) -> bool:
        """Whether the next one can be had at once."""
        return self._coming[0].done()

    def close(self) -> None:
        """End the thread, and close the items if they can be."""
        self._thread.shutdown(cancel_futures=True)
        if close := getattr(self._items, "close", None):
            close()

    def _make(self) -> T:
        return self._change(next(self._items))
