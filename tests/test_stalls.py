"""Processes that stop, or do not get on: the others name them, and end or wait."""

import pytest

from jetflow import rollcall
from jetflow.rollcall import Position, RollCall

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
    assert not roll_call.lost()


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


def test_one_that_is_slow_but_moves_is_not_behind(roll_call):
    for step in range(6, 12):
        hear(roll_call, {0: at(step + 1), 1: at(step + 1), 2: at(step)}, MINUTE // 2)
    assert not roll_call.behind(60)


def test_what_all_wait_for_together_is_no_stall(roll_call):
    """A long compilation, say, or a dead disk."""
    hear(roll_call, dict.fromkeys(range(3), Position(6, "the compilation")), 20 * MINUTE)
    assert not roll_call.behind(60) and not roll_call.lost(60)


def test_where_a_process_is(monkeypatch):
    monkeypatch.setattr(rollcall, "_position", rollcall.START)
    rollcall.reach("step 1")
    rollcall.reach()
    assert rollcall._position == Position(2, "step 1")
