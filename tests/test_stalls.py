"""Processes that stop, or do not get on: the others name them, and end or wait."""

import contextlib
import itertools
import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jetflow import checkpoint, hosts, rendezvous, rollcall, sharding, signals
from jetflow.archive import collect
from jetflow.evals import batching
from jetflow.rendezvous import Place
from jetflow.rollcall import Position, RollCall
from jetflow.sampling.ancestral import Drawn

MINUTE = 30  # beats of two seconds


@pytest.fixture
def roll_call(monkeypatch):
    """That of process 0 of three, all of them at step 5 of a training."""
    monkeypatch.setattr(rollcall.STATE, "process_id", 0)
    monkeypatch.setattr(rollcall.STATE, "num_processes", 3)
    one = RollCall(ends=True)
    one._members = {number: rollcall.Member() for number in range(3)}
    hear(one, {number: at(5) for number in range(3)})
    return one


def at(step):
    return Position(step, f"step {step}")


def hear(roll_call, positions, beats=1):
    """Beats with signs of some processes, each at its position."""
    for _ in range(beats):
        members = roll_call._members
        roll_call.beat({n: (members[n].sign + 1, where) for n, where in positions.items()})


def test_one_of_which_nothing_is_heard_is_named_with_its_step(roll_call):
    hear(roll_call, {0: at(6), 1: at(6)}, MINUTE - 1)
    assert not roll_call.lost(60)
    hear(roll_call, {0: at(6), 1: at(6)})
    lost = roll_call.lost(60)
    assert lost.startswith("nothing was heard of process 2") and lost.endswith("at step 5")


def test_without_news_it_is_the_first_that_is_lost(roll_call, monkeypatch):
    """Process 0 passes on the signs of all; nobody else is to blame."""
    monkeypatch.setattr(rollcall.STATE, "process_id", 1)
    for _ in range(MINUTE):
        roll_call.beat({})
    assert "process 0" in roll_call.lost(60)
    hear(roll_call, {number: at(5) for number in range(3)})
    assert not roll_call.lost(rollcall.SILENCE_SECONDS)


def test_one_that_does_not_move_while_others_do_is_behind(roll_call):
    moves = {0: at(7), 1: at(7), 2: at(5)}
    hear(roll_call, moves, MINUTE - 1)
    assert not roll_call.behind(60)
    hear(roll_call, moves, 1)
    text = roll_call.behind(60)
    assert "process 2 has been at step 5 since" in text and "this one is at step 7" in text
    assert not roll_call.behind(61) and not roll_call.lost(60)
    hear(roll_call, dict.fromkeys(range(3), at(7)))
    assert not roll_call.behind(60)


def test_a_process_is_behind_from_when_others_go_on(roll_call):
    """All have been at a compilation for long; and a text may stay the same."""
    text = "the compilation"
    hear(roll_call, dict.fromkeys(range(3), Position(6, text)), 20 * MINUTE)
    moves = {0: Position(7, text), 1: Position(6, text), 2: Position(7, text)}
    hear(roll_call, moves, MINUTE - 1)
    assert not roll_call.behind(60)
    hear(roll_call, moves)
    assert roll_call.behind(60).endswith(", and this one is further on")


def test_a_process_that_was_itself_stopped_says_so(roll_call, monkeypatch, capsys):
    monkeypatch.setattr(rollcall, "STALL_SECONDS", 0.1)
    waits = iter([False, True])
    roll_call._over = SimpleNamespace(wait=lambda _: time.sleep(0.2) or next(waits))
    roll_call._watch()
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit):
        roll_call._end("process 0 is lost")
    assert "is lost (this one was itself stopped for 0 s until" in capsys.readouterr().err


@pytest.mark.parametrize("got", [signal.SIGINT, None])
def test_who_got_ctrl_c_of_several_ends_by_it(monkeypatch, got):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(signals.multihost_utils, "reached_preemption_sync_point", lambda _: True)
    sent = []
    monkeypatch.setattr(os, "kill", lambda _, number: sent.append(number))
    with signals.StopSignal() as stop, pytest.raises(signals.Stopped) as stopped:
        if got:
            signal.raise_signal(got)
        stop.poll()
    assert stopped.value.signal == (got or signal.SIGTERM)
    assert sent == [signal.SIGTERM] * bool(got)


def test_who_waits_for_the_last_is_not_behind(roll_call):
    """Process 0 waits for process 2, which copies a large data set, and process 1 for both."""
    for moves in range(20 * MINUTE):
        hear(roll_call, {0: at(6), 1: at(7), 2: Position(5, "the copy", moves)})
        assert not roll_call.behind(60)
    hear(roll_call, {0: at(6), 1: at(7), 2: Position(5, "the copy", moves)}, MINUTE)
    assert "process 2 has been at the copy since" in roll_call.behind(60)


def test_one_that_was_never_heard_of_is_left_to_jax(roll_call):
    """And those that may wait for it are not blamed."""
    roll_call._members[2] = rollcall.Member()
    hear(roll_call, {0: at(6), 1: at(7)}, 20 * MINUTE)
    assert not roll_call.lost(60) and not roll_call.behind(60)
    hear(roll_call, {0: at(6)}, MINUTE)
    assert "process 1" in roll_call.lost(60)


def test_one_that_is_slow_but_moves_is_not_behind(roll_call):
    for step in range(6, 12):
        hear(roll_call, {0: at(step + 1), 1: at(step + 1), 2: at(step)}, MINUTE // 2)
    assert not roll_call.behind(60)


def test_what_all_wait_for_together_is_no_stall(roll_call):
    """A long compilation, say, or a dead disk."""
    hear(roll_call, dict.fromkeys(range(3), Position(6, "the compilation")), 20 * MINUTE)
    assert not roll_call.behind(60) and not roll_call.lost(60)


@pytest.mark.parametrize(("ends", "minutes"), [(True, 14), (False, 19)])
def test_one_behind_is_named_each_minute(roll_call, monkeypatch, capsys, ends, minutes):
    """For 15 minutes, or for good."""
    signs = itertools.count(2)

    def wait(_):
        sign = next(signs)
        roll_call._signs = {number: (sign, at(5 if number == 2 else 6)) for number in range(3)}
        return sign > 20 * MINUTE

    def end(why):
        raise InterruptedError(why)

    monkeypatch.setattr(roll_call, "_end", end)
    roll_call._ends, roll_call._over = ends, SimpleNamespace(wait=wait)
    with pytest.raises(InterruptedError) if ends else contextlib.nullcontext():
        roll_call._watch()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == minutes and all("process 2 has been at step 5" in line for line in lines)


def test_where_a_process_is(monkeypatch):
    monkeypatch.setattr(rollcall, "_position", rollcall.START)
    rollcall.reach("step 1")
    rollcall.reach()
    assert rollcall._position == Position(2, "step 1")
    rollcall.advance()
    assert rollcall._position == Position(2, "step 1", 1)
    assert checkpoint._everywhere(lambda: rollcall._position.text) == "reading a checkpoint"


@pytest.mark.parametrize("number", [0, 1])
def test_who_waits_for_the_others_says_so(roll_call, monkeypatch, number):
    client = SimpleNamespace(key_value_set=lambda *_: None, blocking_key_value_get=lambda *_: "7")
    monkeypatch.setattr(rollcall.STATE, "client", client)
    monkeypatch.setattr(rollcall.STATE, "process_id", number)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(rollcall, "_position", at(5))
    hosts.gathered(7)
    assert rollcall._position == Position(6, "the barrier after step 5")
    assert hosts.agreed(7) == 7
    assert rollcall._position == Position(7, "the barrier after step 5")


def test_the_end_is_a_barrier_too(monkeypatch):
    """Who hangs in its last file is behind those that are done."""
    monkeypatch.setattr(rollcall, "_position", at(5))
    monkeypatch.setattr(rendezvous, "find_place", lambda **_: Place(1, 2, "nowhere:1", None))
    monkeypatch.setattr(rendezvous, "meet", lambda *_: "nowhere:1")
    monkeypatch.setattr(RollCall, "start", lambda _: None)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
    seen, key = [], "heartbeat_timeout_seconds"
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **names: seen.append(names[key]))
    client = SimpleNamespace(wait_at_barrier=lambda *_: seen.append(rollcall._position))
    monkeypatch.setattr(rollcall.STATE, "client", client)
    with hosts.joined({}, hosts.ProcessOptions(on_stall="wait"), saves_at_signals=True):
        pass
    assert seen == [hosts.LONGEST_WAIT, Position(6, "the barrier after step 5")]


def test_who_waits_for_a_batch_is_ahead_of_who_reads_it(monkeypatch):
    """So that one is named whose disk hangs within an evaluation, or within an archive."""
    monkeypatch.setattr(rollcall, "_position", at(5))
    seen = []

    def watched(content):
        seen.append(rollcall._position)
        return content

    monkeypatch.setattr(batching, "gather", lambda tree: watched(jax.device_get(tree)))
    whole = batching.Batching(sharding.make_mesh(data=1, devices=jax.devices()[:1]), 4)
    batches = map(watched, whole.of_images(np.zeros((2, 4, 8, 8, 3), np.uint8)))
    drawn = [Drawn(np.zeros((4, 8, 8, 3)), (), 0.0)] * 2
    assert [*whole.results(lambda batch: batch.image, batches, total=8, name="images")]
    assert collect(map(watched, drawn), "uniform", num=8, keep=8)
    barrier = "the barrier after step 5"
    texts = ["step 5", barrier, "step 5", barrier, "step 5", "step 5"]
    assert [each.text for each in seen] == texts
    assert [each.count for each in seen] == [5, 6, 7, 8, 9, 10]


@pytest.fixture
def exchange(monkeypatch):
    """A function: the exchange of signs of one process of two; what came of it after 20 beats.

    Args:
        ask: is called with the number of the beat in place of a question to process 0.
    """
    monkeypatch.setattr(rollcall, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(rollcall.STATE, "coordinator_address", "nowhere.invalid:1")
    client = SimpleNamespace(key_value_set=lambda *_: None, blocking_key_value_get=lambda *_: "1")
    monkeypatch.setattr(rollcall.STATE, "client", client)
    monkeypatch.setattr(rollcall.STATE, "num_processes", 2)

    def exchange(number, ask=None):
        monkeypatch.setattr(rollcall.STATE, "process_id", number)
        beats, enough, ends = itertools.count(1), threading.Event(), []

        def count(answer):
            if (beat := next(beats)) == 20:
                enough.set()
            return answer(beat)

        roll_call = RollCall(ends=True)
        monkeypatch.setattr(rollcall, "ask", lambda *_: count(ask))
        monkeypatch.setattr(roll_call, "_end", ends.append)
        if number == 0:
            passed = roll_call._pass_on
            monkeypatch.setattr(roll_call, "_pass_on", lambda *sign: count(lambda _: passed(*sign)))
        roll_call.start()
        assert enough.wait(60)
        roll_call._over.set()
        return roll_call, ends

    return exchange


@pytest.mark.parametrize("error", [ConnectionResetError(), ValueError("an empty answer")])
def test_a_cut_from_process_0_is_not_its_loss_at_once(exchange, error):
    def ask(beat):
        if beat > 1:
            raise error
        return [(0, [1, [5, "step 5", 0]]), (1, [1, [5, "step 5", 0]])]

    roll_call, ends = exchange(1, ask)
    assert not ends and not roll_call.lost(60)
    for _ in range(6000):
        roll_call.beat({})
    assert "nothing was heard of process 0" in roll_call.lost(60)


def test_process_0_needs_no_network_to_itself(exchange):
    roll_call, ends = exchange(0)
    assert not ends and roll_call._signs[0][0] >= 18  # of the first beat there are two


def test_who_never_reaches_process_0_says_so_once_and_goes_on(exchange, monkeypatch, capsys):
    def ask(_):
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(rollcall, "STALL_SECONDS", 0.05)
    roll_call, ends = exchange(1, ask)
    assert not ends and not roll_call.lost(0)
    assert capsys.readouterr().err.count("nowhere.invalid:1 does not answer (refused)") == 1
