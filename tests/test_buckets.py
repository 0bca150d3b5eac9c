"""Runs in buckets: trained, gone on with, sampled and measured as in a folder."""

import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tiny_runs
from tiny_runs import assert_same, remains

import jetflow
from jetflow import archive, buckets, cli
from jetflow.buckets import as_path, leased
from jetflow.training.log import Reporter
from jetflow.types import UsageError


@pytest.fixture
def folder(bucket, request):
    """A folder of the bucket for one test."""
    return as_path(f"{bucket}/{request.node.name}")


@pytest.fixture
def quick(monkeypatch):
    """Leases that expire soon."""
    monkeypatch.setattr(buckets, "RENEWED_SECONDS", 0.1)
    monkeypatch.setattr(buckets, "EXPIRES_SECONDS", 3.0)
    monkeypatch.setattr(buckets, "WATCHED_SECONDS", 2.0)


def test_a_run_is_the_same_as_in_a_folder(trained, folder, tmp_path, monkeypatch, capsys):
    """Stopped on the way, and nothing of it stays on this machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    progress = Reporter.progress

    def noticed(self, step, *args):
        if step == 7:
            tiny_runs.send(15)
        progress(self, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "progress", noticed)
        assert tiny_runs.train("tarflow", folder) == 143
    assert tiny_runs.read_state(folder)[0] == 8
    assert tiny_runs.train("tarflow", folder) == 0
    assert "resumed at step 8 of 12" in capsys.readouterr().err
    assert_same(remains(folder), remains(trained("tarflow")))
    assert len(list(folder.glob("events.*"))) == 2
    assert not (folder / ".lock").exists()

    def command(*words):
        assert cli.main([*map(str, words)]) == 0
        return capsys.readouterr().out

    out = folder / "out"
    files = ["--out", out / "grid.png", "--npz", out / "images.npz"]
    command("sample", "--workdir", folder, "--num", 12, "--batch_size", 5, *files)
    assert (out / "grid.png").read_bytes().startswith(b"\x89PNG")
    with (out / "images.npz").open("rb") as file, np.load(file) as arrays:
        drawn = jetflow.load_model(folder).sample(12, label=arrays["labels"], defaults="run")
        assert arrays["images"].shape == drawn.shape
    assert sorted(path.name for path in out.iterdir()) == ["grid.png", "images.npz"]
    bits = command("evaluate", "--workdir", folder, "--metrics", "bpd", "--draws", 1)
    workdir = trained("tarflow")
    there = command("evaluate", "--workdir", workdir, "--metrics", "bpd", "--draws", 1)
    assert bits.replace(str(folder), "") == there.replace(str(workdir), "")
    assert command("report", folder) == f"{folder}/report.html\n"
    assert "</html>" in (folder / "report.html").read_text()
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_goes_on(trained, folder, tmp_path, monkeypatch, capsys):
    file = tmp_path / "temperatures.py"
    file.write_text(
        "from jetflow.sweeps import Sweep, axis, product\n"
        "def get_sweep():\n"
        "    points = product(axis('temperature', [0.5, 1.0]))\n"
        "    fixed = {'num_samples': 8, 'draws': 1}\n"
        "    return Sweep(points, metrics=('sample_accuracy',), fixed=fixed)\n"
    )
    command = ["sweep", "--sweep", file, "--workdir", folder, "--run", trained("tarflow")]
    assert cli.main([*map(str, command), "--point", "1"]) == 0
    assert cli.main([*map(str, command)]) == 0
    assert capsys.readouterr().err.count("one of 2") == 2
    records = sorted((folder / "points").glob("*.json"))
    assert [json.loads(path.read_text())["status"] for path in records] == ["done"] * 2
    assert "temperature" in (folder / "report.html").read_text()
    assert not list(folder.glob("locks/*"))


def test_images_go_on_after_a_kill(folder):
    images, finite = np.arange(7 * 12, dtype=np.uint8).reshape(7, 2, 2, 3), np.arange(7) % 3 != 0

    def begun(**settings):
        return archive.Archive(folder / "a.npz", num=7, image_shape=(2, 2, 3), settings=settings)

    begun(seed=0).append(images[:3], finite[:3])
    with pytest.raises(UsageError, match="holds 3 images of another sampling"):
        begun(seed=1)
    going_on = begun(seed=0)
    assert going_on.done == 3
    going_on.append(images[3:], finite[3:])
    going_on.finish(None)
    with (folder / "a.npz").open("rb") as file, np.load(file) as arrays:
        np.testing.assert_array_equal(arrays["images"], images)
        np.testing.assert_array_equal(arrays["finite"], finite)


def test_a_lease_keeps_others_out(folder, quick):
    def wait():
        with leased(folder / "lock", wait=True) as mine:
            assert mine

    with leased(folder / "lock", wait=False) as mine, leased(folder / "lock", wait=False) as other:
        assert mine and not other
        waited = threading.Thread(target=wait)
        waited.start()
        time.sleep(1)
        assert waited.is_alive()
    waited.join(60)
    assert not waited.is_alive()


HOLDER = "import sys, time; from jetflow.buckets import as_path, leased\n"
HOLDER += "with leased(as_path(sys.argv[1]), wait=False): print('held', flush=True); time.sleep(99)"


def test_the_lease_of_a_killed_process_is_free_at_once(folder, monkeypatch, caplog):
    monkeypatch.setattr(buckets, "WATCHED_SECONDS", 1e9)
    monkeypatch.setattr(buckets, "EXPIRES_SECONDS", 1e9)
    command = [sys.executable, "-c", HOLDER, str(folder / "lock")]
    process = subprocess.Popen(command, env=tiny_runs.environment(), stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    process.kill()
    process.wait()
    with leased(folder / "lock", wait=False) as mine:
        assert mine
    assert f"of process {process.pid}" in caplog.text and "taken over" in caplog.text


def test_a_lease_that_nobody_renews_is_taken_over(folder, quick, monkeypatch, capsys, caplog):
    """Its holder, which was only slow, hears of it and ends."""
    ended = threading.Event()
    monkeypatch.setattr(buckets, "_machine", lambda: str(threading.get_ident()))  # another one
    monkeypatch.setattr(os, "_exit", lambda status: status == 1 and ended.set())
    with monkeypatch.context() as patch:
        patch.setattr(buckets, "RENEWED_SECONDS", 5)
        slow = leased(folder / "lock", wait=False)
        assert slow.__enter__()
    monkeypatch.setattr(buckets, "_machine", lambda: "this one")
    with leased(folder / "lock", wait=False) as mine:
        assert mine and "is held by process" in caplog.text
        assert ended.wait(60)
        slow.__exit__(None, None, None)
        assert (folder / "lock").exists()  # which is no longer its own
    assert "was taken over by process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("ftp://there/run", "ftp://there/run has an unknown scheme; expected a folder, or one of"),
        ("s3://there/run", "s3://there/run needs s3fs: pip install 'jetflow[s3]'"),
        ("gs://private/run", "a bucket refuses (Forbidden: b/private/o"),
        ("gs://nowhere/run", "gs://nowhere/run/.lock cannot be written: there is no such bucket"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_line(path, message, bucket, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    arguments = tiny_runs.arguments("tarflow", path)
    assert cli.main(arguments) == 2
    *before, error = capsys.readouterr().err.splitlines()
    assert message in error and all("preparing" in line for line in before)


@pytest.mark.parametrize("option", ["out", "npz"])
def test_a_result_is_refused_before_the_work(option, trained, bucket, capsys):
    arguments = ["sample", "--workdir", str(trained("tarflow")), "--num=4"]
    capsys.readouterr()
    path = "gs://private/a.png" if option == "out" else "gs://private/a.npz"
    assert cli.main([*arguments, f"--{option}", path]) == 2
    error = capsys.readouterr().err
    assert "a bucket refuses" in error and error.count("\n") == 1
