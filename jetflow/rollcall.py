"""Which process of a run is lost: each hears of all the others, and names it before it ends.

JAX aborts the processes that are left, from C++ and after pages of it; the last line is ours.
"""

import ctypes
import itertools
import os
import signal
import socket
import sys
import threading
import time
from typing import Any, NoReturn

import jax
from jax._src import distributed  # the only way to the service through which JAX joins processes

BEAT_SECONDS = 2  # between the signs of life of a process
SILENCE_SECONDS = 7  # without one, after which a process that JAX misses is named
STATE = distributed.global_state


class RollCall(threading.Thread):
    """A context in which an abort ends with a line that names the lost process.

    It ends no process by itself: JAX does, or a computation that fails.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._over = threading.Event()
        self._leaving = threading.Lock()
        self._began = time.time()
        self._heard: dict[int, tuple[str, float]] = {}  # the last sign of each, and when it came
        self._answered = 0.0  # when process 0 last did, which passes the signs on
        self._set_handler: Any = ctypes.CDLL(None).signal
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._at_abort)

    def __enter__(self) -> "RollCall":
        # Of Python's own handlers, none would run: the process ends when the one of C returns.
        self._set_handler(signal.SIGABRT, self._handler)
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._set_handler(signal.SIGABRT, None)

    def start(self) -> None:
        """Begin, now that all processes are there."""
        self._answered = time.time()
        self._heard = {number: ("", self._answered) for number in range(STATE.num_processes)}
        super().start()

    def run(self) -> None:
        """Give signs of life, and note those of the others."""
        client: Any = STATE.client
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
            return f"{_absent()} since {_clock(self._began)}"
        number = min(self._heard, key=lambda number: self._heard[number][1])
        when = self._heard[number][1]
        if self._answered - when < SILENCE_SECONDS:
            if self.is_alive() and time.time() - self._answered < SILENCE_SECONDS:
                return None
            number, when = 0, self._answered
        who = "this one" if number == STATE.process_id else f"process {number}"
        return f"nothing was heard of {who} since {_clock(when)}"

    def leave(self, cause: str, *, another: bool = True) -> NoReturn:
        """End this process with one line: which one is lost, or else the cause, and what to do.

        Args:
            another: wait a while, for another one may be lost just now.
        """
        with self._leaving:
            end = time.monotonic() + another * (SILENCE_SECONDS + 2 * BEAT_SECONDS)
            while not self.lost() and time.monotonic() < end:
                time.sleep(BEAT_SECONDS / 4)
            text = (
                f"jetflow: process {STATE.process_id} of {STATE.num_processes} ends, as "
                f"{self.lost() or cause}; run the same command on all of them again to go on"
            )
            print(text, file=sys.stderr, flush=True)
            os._exit(1)

    def _at_abort(self, _) -> None:
        self.leave("JAX failed, as the lines above say")


def _clock(when: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(when))


def _absent() -> str:
    """Which processes did not come, as far as this one can know."""
    others = {*range(STATE.num_processes)} - {STATE.process_id}
    address = STATE.coordinator_address or ""
    if STATE.process_id:
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            others -= {0}
        except OSError:
            others = {0}
    numbers = " or ".join(map(str, sorted(others))) if len(others) <= 3 else "of some number"
    return f"process {numbers} has not come to {address}"
