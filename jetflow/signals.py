"""Signals that ask a run to stop, and what it raises when it does."""

import os
import signal

import jax
from jax.experimental import multihost_utils

from jetflow import rollcall


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
        os.write(2, b"\nstopping as soon as what runs now is done; "
                    b"a second signal ends the run at once\n")  # fmt: skip
        self._number = number
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)

    def poll(self) -> None:
        """Raise `Stopped` if a signal came."""
        self._polls += 1
        rollcall.reach()
        noted = self._number
        if multihost_utils.reached_preemption_sync_point(self._polls) if self._several else noted:
            raise Stopped(noted or signal.SIGTERM)
