"""Which process of a run is lost: each hears of all the others, and names it before it ends.

JAX aborts the processes that are left, from C++ and after pages of it; the last line is ours.
"""

import ctypes
import itertools
import os
import signal
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

import jax
from jax._src import distributed  # the only way to the service through which processes join

BEAT_SECONDS = 2  # between the signs of life of a process
SILENCE_SECONDS = 7  # without one, after which a process is named where a run has failed
STATE: Any = distributed.global_state


class RollCall(threading.Thread):
    """A context in which a process that JAX aborts says which other one is lost.

    It ends no process by itself: JAX does, or a computation that fails.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._over, self._leaving = threading.Event(), threading.Lock()
        self._answered = time.time()  # when process 0 last passed on the signs
        self._heard: dict[int, tuple[str, float]] = {}  # the last sign of each, and when it came
        self._set_handler: Any = ctypes.CDLL(None).signal
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: self.leave())

    def __enter__(self) -> "RollCall":
        # One of Python's own would not run any more: it only leaves a note for the main thread.
        self._set_handler(signal.SIGABRT, self._handler)
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._set_handler(signal.SIGABRT, None)

    def run(self) -> None:
        """Give signs of life, and note those of the others, now that all are there."""
        client = STATE.client
        self._answered = time.time()
        self._heard = {number: ("", self._answered) for number in range(STATE.num_processes)}
        for beat in itertools.count():
            try:
                key = f"jetflow/alive/{STATE.process_id}"
                client.key_value_set(key, str(beat), allow_overwrite=True)
                signs = client.key_value_dir_get("jetflow/alive/")
            except jax.errors.JaxRuntimeError:
                return
            self._answered = time.time()
            for key, sign in signs:
                number = int(key.rpartition("/")[2])
                if self._heard[number][0] != sign:
                    self._heard[number] = sign, self._answered
            if self._over.wait(BEAT_SECONDS):
                return

    def lost(self) -> str | None:
        """The process that has been silent for longest, in words, if one has been for long."""
        if not self._heard:
            return None
        number, (_, when) = min(self._heard.items(), key=lambda item: item[1][1])
        if self._answered - when < SILENCE_SECONDS:
            number, when = 0, self._answered
            if self.is_alive() and time.time() - when < SILENCE_SECONDS:
                return None
        who = "this one" if number == STATE.process_id else f"process {number}"
        return f"nothing was heard of {who} since {_clock(when)}"

    def leave(self, error: Exception | None = None) -> NoReturn:
        """End this process with one line: which other one is lost, or its own error; what to do."""
        with self._leaving:
            seconds = SILENCE_SECONDS + 2 * BEAT_SECONDS  # until one that has ended is missed
            of_jax = error is None or isinstance(error, jax.errors.JaxRuntimeError)
            if not of_jax and "Gloo" not in str(error):
                traceback.print_exception(error)
                seconds = 0
            end = time.monotonic() + seconds
            while not (lost := self.lost()) and time.monotonic() < end:
                time.sleep(BEAT_SECONDS / 4)
            cause = " ".join(str(error).split())[:300] if error else "see the lines above"
            print(
                f"jetflow: process {STATE.process_id} of {STATE.num_processes} ends, as "
                f"{lost or f'it or another one failed ({cause})'}; "
                "run the same command on all of them again to go on",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            sys.stdout.flush()
            os._exit(1)


def _clock(when: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(when))
