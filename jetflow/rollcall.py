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
        self._began = self._answered = time.time()  # when process 0 last passed on the signs
        self._heard: dict[int, tuple[str, float]] = {}  # the last sign of each, and when it came
        self._set_handler: Any = ctypes.CDLL(None).signal
        abort = "JAX failed, as the lines above say"
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: self.leave(abort))

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
        when, who = self._began, ""
        if self._heard:
            number, (_, when) = min(self._heard.items(), key=lambda item: item[1][1])
            if self._answered - when < SILENCE_SECONDS:
                number, when = 0, self._answered
                if self.is_alive() and time.time() - when < SILENCE_SECONDS:
                    return None
            who = "this one" if number == STATE.process_id else f"process {number}"
        clock = time.strftime("%H:%M:%S", time.localtime(when))
        return f"{f'nothing was heard of {who}' if who else _absent()} since {clock}"

    def leave(self, cause: str, *, another: bool = True) -> NoReturn:
        """End this process with one line: which one is lost, or else the cause, and what to do.

        Args:
            another: wait a while, for another one may be lost just now.
        """
        with self._leaving:
            end = time.monotonic() + another * (SILENCE_SECONDS + 2 * BEAT_SECONDS)
            while not (lost := self.lost()) and time.monotonic() < end:
                time.sleep(BEAT_SECONDS / 4)
            me = f"process {STATE.process_id} of {STATE.num_processes}"
            remedy = "run the same command on all of them again to go on"
            print(f"jetflow: {me} ends, as {lost or cause}; {remedy}", file=sys.stderr, flush=True)
            os._exit(1)


def _absent() -> str:
    """Which processes did not come, as far as this one can know."""
    others, address = {*range(STATE.num_processes)}, STATE.coordinator_address or ""
    others.discard(STATE.process_id)
    try:
        host, _, port = address.rpartition(":")
        socket.create_connection((host, int(port)), timeout=5).close()
        others.discard(0)
    except OSError:
        others = {0}
    numbers = " or ".join(map(str, sorted(others))) if len(others) < 4 else "of some number"
    return f"process {numbers} has not come to {address}"
