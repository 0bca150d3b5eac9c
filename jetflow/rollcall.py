"""Which process of a run is lost or behind: each hears of all the others, and names it.

Where JAX aborts the processes that are left, from C++ and after pages of it, the last line is ours.
"""

import contextlib
import ctypes
import dataclasses
import itertools
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
from jax._src import distributed  # the only way to the service through which processes join

from jetflow.rendezvous import say

BEAT_SECONDS = 2  # between the signs of life of a process
SILENCE_SECONDS = 7  # without one, after which a process is named where a run has failed
STALL_SECONDS = 60  # of silence, or behind the others, after which a process is named
PATIENCE_SECONDS = 600  # behind the others, after which the run ends
STATE: Any = distributed.global_state


class Position(NamedTuple):
    """Where a process is. All pass the same positions in the same order.

    Attributes:
        count: of the positions before it.
        text: for a person, as in "step 12".
        is_prompt: whether it takes minutes at most, unlike what compiles, or reads a first time.
    """

    count: int = 0
    text: str = "the start"
    is_prompt: bool = False


_position = START = Position()


def enter(text: str) -> None:
    """Say that this process begins what may take long; the others name it if it stays behind."""
    global _position
    _position = Position(_position.count + 1, text)


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """While this process waits for the others to come where it is."""
    text = _position.text
    enter(f"the end of {text}")
    yield
    enter(text)


def advance(text: str = "") -> None:
    """Say that this process gets on, as it does every few seconds or minutes."""
    global _position
    _position = Position(_position.count + 1, text or _position.text, is_prompt=True)


@dataclasses.dataclass
class Member:
    """What is known of a process: its last sign of life, and for how many beats it gave no other.

    Attributes:
        sign, position: a number, and where it was.
        heard, moved: when it gave that sign, and when it came to its position.
        silent, still: beats since then.
    """

    sign: int = 0
    position: Position = START
    heard: float = dataclasses.field(default_factory=time.time)
    moved: float = dataclasses.field(default_factory=time.time)
    silent: int = 0
    still: int = 0

    def note(self, sign: int, position: Position) -> None:
        """Take in what process 0 passed on, at each beat."""
        self.silent, self.still = self.silent + 1, self.still + 1
        if sign != self.sign:
            self.sign, self.heard, self.silent = sign, time.time(), 0
        if position != self.position:
            self.position, self.moved, self.still = position, time.time(), 0


class RollCall:
    """A context that names the process that is lost or behind, and ends this one if it must.

    A process is lost if nothing is heard of it, and behind if others have passed it and it does not
    move. Time is counted in beats of this process's own, which it does not make while it is
    stopped: when it goes on, it does not take the others for lost.

    Args:
        ends: whether it ends this process where another one stalls; else it waits, and says so.
    """

    def __init__(self, *, ends: bool):
        self._ends, self._over, self._leaving = ends, threading.Event(), threading.Lock()
        self._members: dict[int, Member] = {}
        self._signs: dict[int, tuple[int, Position]] = {}  # as process 0 passed them on last
        self._is_cut = False  # from process 0
        self._set_handler: Any = ctypes.CDLL(None).signal
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: self.leave())

    def __enter__(self) -> "RollCall":
        # One of Python's own would not run any more: it only leaves a note for the main thread.
        self._set_handler(signal.SIGABRT, self._handler)
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._set_handler(signal.SIGABRT, None)

    def start(self) -> None:
        """Begin, now that all are there."""
        self._members = {number: Member() for number in range(STATE.num_processes)}
        for target in (self._exchange, self._watch):
            threading.Thread(target=target, daemon=True).start()

    def _exchange(self) -> None:
        """Give signs of life, and take those of the others; this hangs while process 0 does."""
        for beat in itertools.count(1):
            try:
                sign = json.dumps([beat, _position])
                STATE.client.key_value_set(f"jetflow/alive/{STATE.process_id}", sign, True)
                signs = STATE.client.key_value_dir_get("jetflow/alive/")
            except jax.errors.JaxRuntimeError:
                self._is_cut = True
                return
            pairs = [(int(key.rpartition("/")[2]), *json.loads(text)) for key, text in signs]
            self._signs = {number: (sign, Position(*where)) for number, sign, where in pairs}
            if self._over.wait(BEAT_SECONDS):
                return

    def _watch(self) -> None:
        """Count the beats without a sign, and name who stalls once a minute."""
        before, quiet = None, 0
        while not self._over.wait(BEAT_SECONDS):
            self.beat(self._signs if self._signs is not before else {})
            before, quiet = self._signs, quiet + 1
            lost, (behind, for_long) = self.lost(STALL_SECONDS), self.behind()
            if self._ends and (lost or for_long):
                self._end(lost or behind)
            if (lost or behind) and quiet * BEAT_SECONDS >= STALL_SECONDS:
                quiet = 0
                say(f"{lost or behind}")

    def beat(self, signs: Mapping[int, tuple[int, Position]]) -> None:
        """Take in the signs of a beat; if there are none, process 0 did not pass them on."""
        for number, member in self._members.items():
            if signs or number == 0:
                member.note(*signs.get(number, (member.sign, member.position)))

    def lost(self, seconds: int | float = SILENCE_SECONDS) -> str | None:
        """The process that has been silent for longest, in words, if for so long."""
        if not self._members:
            return None
        number, member = max(self._members.items(), key=lambda item: item[1].silent)
        if member.silent * BEAT_SECONDS < seconds:
            if not self._is_cut:
                return None
            number, member = 0, self._members[0]
        text = f"nothing was heard of {_who(number)} since {_clock(member.heard)}"
        return f"{text}, when it was at {member.position.text}"

    def behind(self) -> tuple[str, bool]:
        """The process that others wait for, in words, and whether for longer than is bearable."""
        first = max(self._members, key=lambda number: self._members[number].position.count)
        front = self._members[first].position
        slow = {n: each for n, each in self._members.items() if each.position.count < front.count}
        number, member = max(slow.items(), key=lambda item: item[1].still, default=(0, Member()))
        if (seconds := member.still * BEAT_SECONDS) < STALL_SECONDS:
            return "", False
        text = f"{_who(number)} has been at {member.position.text} since {_clock(member.moved)}"
        text += f", and {_who(first)} is at {front.text}"
        return text, member.position.is_prompt and seconds >= PATIENCE_SECONDS

    def leave(self, error: Exception | None = None) -> NoReturn:
        """End this process with one line: which other one is lost, or its own error; what to do."""
        seconds = SILENCE_SECONDS + 2 * BEAT_SECONDS  # until one that has ended is missed
        of_jax = error is None or isinstance(error, jax.errors.JaxRuntimeError)
        if not of_jax and "Gloo" not in str(error):
            traceback.print_exception(error)
            seconds = 0
        end = time.monotonic() + seconds
        while not (lost := self.lost()) and time.monotonic() < end:
            time.sleep(BEAT_SECONDS / 4)
        cause = " ".join(str(error).split())[:300] if error else "see the lines above"
        self._end(lost or f"it or another one failed ({cause})")

    def _end(self, why: str) -> NoReturn:
        with self._leaving:
            say(
                f"process {STATE.process_id} of {STATE.num_processes} ends, as {why}; "
                "run the same command on all of them again to go on"
            )
            sys.stdout.flush()
            os._exit(1)


def _who(number: int) -> str:
    return "this one" if number == STATE.process_id else f"process {number}"


def _clock(when: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(when))
