"""`jetflow prepare`: killed and started again, with any number of processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import archives
import psutil
import pytest
from test_sources import ARCHIVES

import jetflow
from jetflow import cli
from jetflow.data import builder, shards, sources
from jetflow.data.dataset import load
from jetflow.types import UsageError

ROOT = Path(__file__).parents[1]
NAME, LAYOUT = "imagenet21k/32", "winter21_whole.tar.gz"
SYNSETS = tuple(f"n{number:08d}" for number in range(12))
TIMEOUT = 300  # seconds

# A shard for each synset, told when it is done; a file, as processes are started from it.
PROGRAM = f"""
import sys, time
import jetflow
from jetflow.data import builder
builder.SHARD_BYTES = 10_000
read = builder.read_shard
def tell(path):
    print("shard", path.name, file=sys.stderr, flush=True)
    for _ in range(int(10 * float(pause))):  # Ctrl-C just before a sleep is heard after it
        time.sleep(0.1)
    return read(path)
builder.read_shard = tell
if __name__ == "__main__":
    data, manual, workers, pause = sys.argv[1:]
    jetflow.prepare({NAME!r}, data_dir=data, manual_dir=manual, workers=int(workers))
"""


@pytest.fixture
def manual(tmp_path):
    folder = tmp_path / "manual"
    folder.mkdir()
    archives.imagenet21k(folder, LAYOUT, count=25, synsets=SYNSETS)
    return folder


@pytest.fixture
def whole(manual, tmp_path, monkeypatch):
    """What one process makes without interruption."""
    monkeypatch.setattr(builder, "SHARD_BYTES", 10_000)
    jetflow.prepare(NAME, data_dir=tmp_path / "whole", manual_dir=manual, workers=1)
    files = contents(tmp_path / "whole")
    assert sum("train.array_record" in name for name in files) == 12
    return files


def contents(data: Path) -> dict[str, bytes]:
    files = (path for path in data.rglob("*") if path.is_file())
    return {str(path.relative_to(data)): path.read_bytes() for path in files}


def start(tmp_path: Path, manual: Path, workers: int, pause: float = 0) -> subprocess.Popen:
    program = tmp_path / "prepare.py"
    program.write_text(PROGRAM)
    arguments = [program, tmp_path / "data", manual, workers, pause]
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_a_shard(process: subprocess.Popen) -> list[psutil.Process]:
    """The processes below one, as soon as its first shard is there."""
    assert process.stderr
    while not process.stderr.readline().startswith("shard"):
        assert process.poll() is None
    return psutil.Process(process.pid).children()


def assert_ended(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=TIMEOUT)
    assert not alive


@pytest.mark.slow
def test_a_kill_costs_only_the_shards_at_hand(manual, tmp_path, whole, monkeypatch):
    process = start(tmp_path, manual, workers=2, pause=60)
    below = wait_for_a_shard(process)
    process.kill()
    process.communicate()
    assert len(below) >= 2
    assert_ended(below)  # nobody goes on decoding for a parent that is gone
    final = tmp_path / "data" / "imagenet21k" / "32" / "1.0.0"
    partial = final.with_name("1.0.0.partial")
    assert partial.exists() and not final.exists()
    done = {path.name for path in (partial / "notes").glob("train-??????")}
    assert "train-000000" in done and "train-000011" not in done
    (partial / "imagenet21k-train.array_record-00011-of-00012.9.incomplete").write_bytes(b"half")

    made, encode = [], shards.encode
    monkeypatch.setattr(shards, "encode", lambda *args: made.append(1) or encode(*args))
    jetflow.prepare(NAME, data_dir=tmp_path / "data", manual_dir=manual, workers=1)
    assert len(made) == 290 - 25 * len(done)  # the last tar is cut
    assert contents(tmp_path / "data") == whole and not partial.exists()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["at the first shard", "while processes start"])
def test_ctrl_c_ends_it_at_once(manual, tmp_path, moment):
    process = start(tmp_path, manual, workers=2, pause=60)
    if moment == "at the first shard":
        below = wait_for_a_shard(process)
    else:
        deadline = time.monotonic() + TIMEOUT
        while not (below := psutil.Process(process.pid).children(recursive=True)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    for pid in [process.pid, *(child.pid for child in below)]:  # as a terminal does
        os.kill(pid, signal.SIGINT)
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode != 0
    assert err.count("Traceback") == 1 and err.strip().endswith("KeyboardInterrupt")
    assert_ended(below)


@pytest.mark.slow
def test_a_killed_worker_is_one_line(manual, tmp_path):
    process = start(tmp_path, manual, workers=2, pause=3)
    for child in wait_for_a_shard(process):
        if any("spawn_main" in word for word in child.cmdline()):
            child.kill()
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1
    assert "UsageError: a process that decodes images was killed" in err.splitlines()[-1]


def test_the_number_of_processes_does_not_matter(manual, tmp_path, whole):
    process = start(tmp_path, manual, workers=3)
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, err
    assert contents(tmp_path / "data") == whole


@pytest.mark.parametrize("change", ["another archive", "touched", "cut shard"])
def test_shards_that_do_not_fit_are_made_again(
    change, manual, tmp_path, whole, monkeypatch, capsys
):
    """An earlier start was given up; since then, an archive came again, or a shard was cut."""
    other = tmp_path / "other"
    other.mkdir()
    archives.imagenet21k(other, LAYOUT, count=24, synsets=SYNSETS)

    def stop(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(builder, "read_shard", stop)
        folder = other if change == "another archive" else manual
        jetflow.prepare(NAME, data_dir=tmp_path / "data", manual_dir=folder, workers=1)
    if change == "touched":
        os.utime(manual / LAYOUT, (0, 0))
    [shard] = (tmp_path / "data").rglob("*train.array_record-00000-of-00012")
    if change == "cut shard":
        shard.write_bytes(shard.read_bytes()[:-100])  # a disk that was full
    capsys.readouterr()
    jetflow.prepare(NAME, data_dir=tmp_path / "data", manual_dir=manual, workers=1)
    err = capsys.readouterr().err
    assert ("was begun with other archives; starting anew" in err) == (change != "cut shard")
    assert ("first pass" in err) == (change != "cut shard")
    assert contents(tmp_path / "data") == whole


# The command.


@pytest.mark.parametrize("name", [*ARCHIVES, "shapes/32"])
def test_command(name, tmp_path, capsys):
    if name in ARCHIVES:
        ARCHIVES[name](tmp_path)
    argv = ["prepare", name, f"--data_dir={tmp_path / 'data'}", f"--manual_dir={tmp_path}"]
    for _ in range(2):  # the second time, nothing is left to do
        assert cli.main([*argv, "--workers=1"]) == 0
        lines = capsys.readouterr().out.splitlines()
        prepared = jetflow.prepare(name, data_dir=tmp_path / "data")
        for line, dataset in zip(lines, prepared.splits.values(), strict=False):
            assert line.startswith(dataset.describe())
            assert line.endswith(f"resize: {dataset.resize}, checksum {dataset.checksum()}")
        assert lines[-1] == f"prepared in {prepared.folder}"
        assert (
            ("files were left out" in lines[-2])
            == (prepared.unreadable > 0)
            == (name.split("/")[0] in ("imagenet1k", "imagenet21k", "imagenet21k_fall11", "folder"))
        )
        source = sources.find(name)
        count = 0 if not source.archives or not source.splits else 1 if source.held_out else 2
        assert sum("were published" in line for line in lines) == count
        assert [line for line in lines if "were published" in line] == prepared.differences


@pytest.mark.slow
def test_command_from_a_shell(tmp_path):
    archives.cifar10(tmp_path)
    argv = ["-m", "jetflow", "prepare", "cifar10", "--manual_dir", tmp_path, "--workers", 2]
    result = subprocess.run(
        [sys.executable, *map(str, argv), "--data_dir", str(tmp_path / "data")],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "cifar10 1.0.0 train: 25 images of 32x32x3" in result.stdout


def test_archives_lie_in_the_data_directory_by_default(tmp_path, capsys):
    manual = tmp_path / "downloads" / "manual"
    manual.mkdir(parents=True)
    archives.old_imagenet(manual, 32)
    assert cli.main(["prepare", "imagenet32_old", f"--data_dir={tmp_path}", "--workers=1"]) == 0
    assert "published file has 4,113,018,880" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "DATASET is missing"),
        (["cifar11"], "did you mean 'cifar10'?"),
        (["cifar10", "--manual_dir=/nowhere"], "found there: no such folder"),
        (["cifar10", "--workers=0"], "workers"),
    ],
)
def test_bad_input(argv, message, tmp_path, capsys):
    assert cli.main(["prepare", *argv, f"--data_dir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["imagenet64_new", "imagenet1k/64", "imagenet21k/32", "afhq/64"])
def test_missing_archives_are_named_with_their_sizes(name, tmp_path):
    (tmp_path / "other.tar").touch()
    data, described = tmp_path / "data", map(str, sources.find(name).archives)
    with pytest.raises(UsageError, match=r"found there: other\.tar; put them") as missing:
        jetflow.prepare(name, data_dir=data, manual_dir=tmp_path)
    with pytest.raises(UsageError, match=f"jetflow prepare {name} --manual_dir DIR") as unprepared:
        load(name, "train", data_dir=data)
    for archive in described:
        assert archive in str(missing.value) and archive in str(unprepared.value)
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("empty", ["train", "valid"])
def test_a_split_without_images_is_an_error(tmp_path, capsys, empty):
    archives.old_imagenet(tmp_path, 32, train=2, validation=2)
    archives.tar_of({"a.png": b""}, tmp_path / f"{empty}_32x32.tar")
    argv = ["prepare", "imagenet32_old", f"--manual_dir={tmp_path}", f"--data_dir={tmp_path}"]
    assert cli.main([*argv, "--workers=1"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    split = {"train": "train", "valid": "validation"}[empty]
    assert f"not one readable image for split {split}; left out were 1 files" in error
    assert f"'{empty}_32x32.tar/a.png" in error and "empty file" in error
