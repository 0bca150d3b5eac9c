"""Disks that are full or read-only, and paths that are none: one line, and nothing is lost."""

import os
import shutil
import subprocess

import numpy as np
import pytest
import tiny_runs

from jetflow import cli


@pytest.fixture
def mount(tmp_path):
    """A function: options of mount -> a folder with that disk; again, for another size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def run(*options: str):
        if os.geteuid():
            pytest.skip("only root may mount a disk")
        remount = ["-o", "remount,size=50m"] if mounted and not options else []
        result = subprocess.run(["mount", *options, *remount, str(folder)], capture_output=True)
        if result.returncode and not mounted:
            pytest.skip(f"this machine mounts no disk: {result.stderr!r}")
        mounted.append(options)
        return folder

    yield run
    for _ in [options for options in mounted if options and "remount" not in options[1]]:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def small(size: str) -> tuple[str, ...]:
    return ("-t", "tmpfs", "-o", f"size={size}", "tmpfs")


def last_line(capsys) -> str:
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


def test_samples_go_on_when_there_is_room(mount, trained, tmp_path, capsys):
    disk = mount(*small("32k"))
    command = ["sample", "--workdir", str(trained("jet")), "--num=300", "--batch_size=100"]
    command += [f"--out={tmp_path / 'a.png'}"]
    assert cli.main([*command, f"--npz={disk / 'a.npz'}"]) == 2
    line = last_line(capsys)
    assert str(disk / "a.npz") in line and "No space left" in line and "make room" in line
    mount()
    assert cli.main([*command, f"--npz={disk / 'a.npz'}"]) == 0
    assert "going on after 200 images" in capsys.readouterr().out
    assert cli.main([*command, f"--npz={tmp_path / 'b.npz'}"]) == 0
    with np.load(disk / "a.npz") as there, np.load(tmp_path / "b.npz") as here:
        assert all(np.array_equal(there[name], here[name]) for name in here)


@pytest.mark.parametrize("size", ["8k", "60k", "1800k"])
def test_a_training_goes_on_when_there_is_room(size, mount, trained, capsys):
    """The disk is full at its start, at its first checkpoint, and at a later one."""
    workdir = mount(*small(size)) / "run"
    assert tiny_runs.train("jet", workdir) == 2
    line = last_line(capsys)
    assert str(workdir) in line and "No space left" in line and "make room" in line
    mount()
    assert tiny_runs.train("jet", workdir) == 0
    assert ("resumed at step 5" in capsys.readouterr().err) == (size == "1800k")
    tiny_runs.assert_same(tiny_runs.remains(workdir), tiny_runs.remains(trained("jet")))


@pytest.mark.parametrize("kind", ["read-only", "a file in the way"])
def test_a_run_that_cannot_be_written_is_evaluated(kind, mount, trained, tmp_path, capsys):
    run = shutil.copytree(trained("jet"), tmp_path / "run")
    if kind == "read-only":
        workdir = mount("--bind", str(run))
        mount("-o", "remount,ro,bind")
    else:
        workdir = run
        shutil.rmtree(run / "evals")
        (run / "evals").touch()
        (run / "report.html").mkdir()
    assert cli.main(["evaluate", "--workdir", str(workdir), "--metrics=bpd"]) == 0
    printed = capsys.readouterr()
    assert "step 12: bpd" in printed.out and "nothing was kept" in printed.out
    assert cli.main(["report", str(workdir)]) == 2
    assert "--out" in last_line(capsys)
    assert cli.main(["report", str(workdir), f"--out={tmp_path / 'page.html'}"]) == 0
    if kind == "read-only":
        assert tiny_runs.train("jet", workdir) == 2
        assert "Read-only" in last_line(capsys)
