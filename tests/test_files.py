"""Readers find whole files: of several writers at once, and of one that fails."""

import os

import pytest

from jetflow.files import write_atomically, write_json


def test_two_write_the_same_file(tmp_path):
    path = tmp_path / "some" / "a.json"
    with write_atomically(path) as slow:
        slow.write(b"slow")
        write_json(path, ["fast"])
        assert path.read_text() == '[\n  "fast"\n]\n'
    assert path.read_text() == "slow"
    assert list(path.parent.iterdir()) == [path]


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt), write_atomically(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_others_may_read_what_the_user_lets_them(tmp_path):
    before = os.umask(0o022)
    try:
        write_json(tmp_path / "a.json", {})
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644
