"""What processes that work for another have in common, and how many cores there are for them."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker

# They come to the whole process group, but are the parent's to answer.
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):  # on Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def blocked_signals() -> Iterator[None]:
    """Processes that are started inside never get `_SIGNALS`, from their first moment on.

    This process still does, in its other threads or after the block. A handler in the child would
    come too late: it takes seconds to start.
    """
    resource_tracker.ensure_running()  # it would unblock them when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def later_interrupt() -> Iterator[None]:
    """Ctrl-C raises after the block: in its midst, it would leave a process half started."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # somebody else answers it
        return
    came = []
    signal.signal(signal.SIGINT, lambda *_: came.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt


def end_with_parent() -> None:
    """Called in a child: a parent that was killed cannot ask it to stop."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
