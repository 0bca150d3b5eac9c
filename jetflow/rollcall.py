"""Which process of a run is lost or behind: each process hears of all the others, and names it.

JAX's own heartbeat tells neither that a process hangs nor where it is. When JAX aborts the others
from C++, with pages of output, the last line still says which one it is.
"""

import ctypes
import dataclasses
import itertools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import jax
from jax._src import distributed  # the only way to the service through which processes join

from jetflow.rendezvous import Desk, ask, say

BEAT_SECONDS = 2  # between the signs of life of a process
SILENCE_SECONDS = 7  # without one, after which a process is named where a run has failed
STALL_SECONDS = 60  # of silence, or behind the others, after which a process is named
PATIENCE_SECONDS = 900  # behind the others, after which the run ends
TRIES = 5  # to reach process 0 for the first time, before a process says that it cannot
STATE: Any = distributed.global_state


class Position(NamedTuple):
    """Where a process is."""

    count: int = 0  # of the positions before, which are the same on all processes
    text: str = "the start"
    moves: int = 0  # within this one


_position = START = Position()
BARRIER = "the barrier after "


def reach(text: str = "") -> None:
    """Say where this process is, as in "step 12"; without a text, that it goes on with the same.

    All processes must call this equally often. The others name one that stays behind.
    """
    global _position
    _position = Position(_position.count + 1, text or _position.text.removeprefix(BARRIER))


def reach_barrier() -> None:
    """Say that this process waits for the others; to be called as `reach` is.

    Needed wherever it does, also within a program on all devices: who hangs before is then behind.
    """
    reach(BARRIER + _position.text.removeprefix(BARRIER))


def advance() -> None:
    """Say that this process is not stuck where it is; it alone may call this, and often."""
    global _position
    _position = _position._replace(moves=_position.moves + 1)


@dataclasses.dataclass
class Member:
    """What was heard last of a process, and for how many beats it has been the same: its
    position since others went on."""

    sign: int = 0  # before the first one
    position: Position = START
    silent: int = 0
    still: int = 0

    def hear(self, sign: int, position: Position) -> None:
        """Take in the sign of a beat, which may be an old one."""
        self.silent = self.silent + 1 if sign == self.sign else 0
        self.still = self.still + 1 if position == self.position else 0
        self.sign, self.position = sign, position


class RollCall:
    """A context that names the process that is lost or behind, and ends this one if it must.

    A process is lost if it was heard of but no longer is (else it is left to JAX, as with a
    firewall between), and behind if it is the last of all and does not move. Time is counted in
    this process's own beats: after a stop, it does not take the others for lost.

    Args:
        ends: whether to end this process where another one stalls; else it waits, and says so.
    """

    def __init__(self, *, ends: bool):
        self._ends, self._over, self._leaving = ends, threading.Event(), threading.Lock()
        self._members: dict[int, Member] = {}
        self._gap = ""  # in this one's own beats, in words
        self._signs: dict[int, tuple[int, Position]] = {}  # as process 0 passed them on last
        self._last: dict[int, list[Any]] = {}  # as they came to process 0
        self._set_handler: Any = ctypes.CDLL(None).signal
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: self.leave())

    def __enter__(self) -> "RollCall":
        # A handler of Python's would run too late: it waits for the main thread.
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
        """Give signs of life to process 0, and take those of the others.

        Not through JAX's service, which drops a process that is stopped for a minute just after it
        has sent something. From process 0 the network may not lead back to it.
        """
        key, host = "jetflow/desk", STATE.coordinator_address.rpartition(":")[0]
        if is_first := STATE.process_id == 0:
            self._pass_on(0, [1, _position])  # so that whoever asks first hears of it
            desk = Desk(0, self._pass_on)
            STATE.client.key_value_set(key, str(desk.server_address[1]))
        port = STATE.client.blocking_key_value_get(key, 1000 * int(PATIENCE_SECONDS))
        for beat in itertools.count(1):
            question = STATE.process_id, [beat, _position]
            try:
                signs = self._pass_on(*question) if is_first else ask(host, port, *question)
                self._signs = {number: (sign, Position(*where)) for number, (sign, where) in signs}
            except (OSError, ValueError) as error:  # a ValueError of what is not JSON
                if beat == TRIES and not self._signs:
                    own, where = STATE.process_id, f"{host}:{port} does not answer ({error})"
                    say(f"process {own} cannot name who stalls, as {where}; open all ports for it")
            if self._over.wait(BEAT_SECONDS):
                return

    def _pass_on(self, number: int, sign: list[Any]) -> list[tuple[int, list[Any]]]:
        self._last[number] = sign
        return [*self._last.items()]

    def _watch(self) -> None:
        """Name who stalls, once a minute, or end this process."""
        before, beats, then = None, itertools.count(), time.monotonic()
        while not self._over.wait(BEAT_SECONDS):
            if (gap := time.monotonic() - then) > STALL_SECONDS:
                self._gap = f" (this one was itself stopped for {gap:.0f} s until {_clock(0)})"
            then = time.monotonic()
            self.beat(self._signs if self._signs is not before else {})
            before, lost = self._signs, self.lost(STALL_SECONDS)
            if self._ends and (why := lost or self.behind(PATIENCE_SECONDS)):
                self._end(why)
            stall = lost or self.behind(STALL_SECONDS)
            if not stall:
                beats = itertools.count()
            elif next(beats) * BEAT_SECONDS % STALL_SECONDS < BEAT_SECONDS:
                say(stall)

    def beat(self, signs: Mapping[int, tuple[int, Position]]) -> None:
        """Take in the signs of a beat; if there are none, process 0 did not pass them on."""
        for number, member in self._members.items():
            if signs or number == 0:
                member.hear(*signs.get(number, (member.sign, member.position)))
        front = max(member.position.count for member in self._members.values())
        for member in self._members.values():
            member.still *= member.position.count < front

    def lost(self, seconds: int | float) -> str:
        """The process that has been silent for longest, in words, if for so long; else nothing."""
        members, own = self._members, STATE.process_id
        silent = {n: member.silent for n, member in members.items() if member.sign and n != own}
        number = max(silent, key=lambda number: silent[number], default=0)
        if not silent or silent[number] * BEAT_SECONDS < seconds:
            return ""
        since, where = _clock(silent[number]), members[number].position.text
        return f"nothing was heard of process {number} since {since}, when it was at {where}"

    def behind(self, seconds: int | float) -> str:
        """The process that all others wait for, in words, if for so long; else nothing."""
        members = self._members
        last = min(members, key=lambda n: (members[n].position.count, -members[n].still))
        first = max(members, key=lambda n: members[n].position.count)
        member, front = members[last], members[first].position
        is_known = all(each.sign for each in members.values())  # else it may wait itself
        is_behind = is_known and member.position.count < front.count
        if not is_behind or member.still * BEAT_SECONDS < seconds:
            return ""
        there = "further on" if front.text == member.position.text else f"at {front.text}"
        return (
            f"{_who(last)} has been at {member.position.text} since {_clock(member.still)}, "
            f"and {_who(first)} is {there}"
        )

    def leave(self, error: Exception | None = None) -> NoReturn:
        """End this process with one line: which other one is lost, or its own error; what to do."""
        seconds = SILENCE_SECONDS + 2 * BEAT_SECONDS  # until one that has ended is missed
        of_jax = error is None or isinstance(error, jax.errors.JaxRuntimeError)
        if not of_jax and "Gloo" not in str(error):
            traceback.print_exception(error)
            seconds = 0
        end = time.monotonic() + seconds
        while not (lost := self.lost(SILENCE_SECONDS)) and time.monotonic() < end:
            time.sleep(BEAT_SECONDS / 4)
        cause = " ".join(str(error).split())[:300] if error else "see the lines above"
        self._end(lost or f"it or another one failed ({cause})")

    def _end(self, why: str) -> NoReturn:
        with self._leaving:
            say(
                f"process {STATE.process_id} of {STATE.num_processes} ends, as {why}{self._gap}; "
                "run the same command on all of them again to go on"
            )
            sys.stdout.flush()
            os._exit(1)


def _who(number: int) -> str:
    return "this one" if number == STATE.process_id else f"process {number}"


def _clock(beats: int) -> str:
    """The time of so many beats ago."""
    return time.strftime("%H:%M:%S", time.localtime(time.time() - beats * BEAT_SECONDS))
