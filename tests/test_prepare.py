"""`jetflow prepare`: killed and started again, with any number of processes, from a shell."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import archives
import numpy as np
import pytest
from test_builders import ARCHIVES

from jetflow import cli
from jetflow.cli.commands import prepare as command
from jetflow.data import dataset as pipeline
from jetflow.data import pieces, prepared
from jetflow.data.builders.archived import Progress
from jetflow.data.builders.imagenet import ImageNet21k
from jetflow.data.facts import FACTS, differences

ROOT = Path(__file__).parents[1]
NAME = "imagenet21k/32"
LAYOUT = "winter21_whole.tar.gz"

SYNSETS = tuple(f"n{number:08d}" for number in range(12))

# A piece for each synset, told when it is done; a file, as processes are started from it.
PROGRAM = f"""
import sys, time
from jetflow.data import prepared
from jetflow.data.builders.imagenet import ImageNet21k
from jetflow.data.facts import FACTS, differences
ImageNet21k.PIECE_BYTES = 10_000
def tell(progress):
    if progress.is_first_pass:
        return
    print("piece", progress.images, progress.unreadable, file=sys.stderr, flush=True)
    for _ in range(int(10 * float(pause))):  # Ctrl-C just before a sleep is heard after it
        time.sleep(0.1)
if __name__ == "__main__":
    data, manual, workers, pause = sys.argv[1:]
    prepared.prepare({NAME!r}, data, manual_dir=manual, workers=int(workers), on_progress=tell)
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
    monkeypatch.setattr(ImageNet21k, "PIECE_BYTES", 10_000)
    prepared.prepare(NAME, tmp_path / "whole", manual_dir=manual, workers=1)
    return contents(tmp_path / "whole")


def contents(data: Path) -> dict[str, bytes]:
    files = (path for path in data.rglob("*") if path.is_file())
    return {str(path.relative_to(data)): path.read_bytes() for path in files}


def start(tmp_path: Path, manual: Path, workers: int, pause: float = 0) -> subprocess.Popen:
    program = tmp_path / "prepare.py"
    program.write_text(PROGRAM)
    arguments = [program, tmp_path / "data", manual, workers, pause]
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def children(process: int) -> list[int]:
    return [
        int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()
    ]


def decoders(process: int) -> list[int]:
    """The processes below one that decode images, once Python answers Ctrl-C in them."""
    begun = []
    for pid in children(process):
        if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
            status = Path(f"/proc/{pid}/status").read_text().splitlines()
            [caught] = (int(line.split()[1], 16) for line in status if line.startswith("SigCgt"))
            begun += [pid] if caught >> (signal.SIGINT - 1) & 1 else []
    return begun


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for_end(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while not all(map(ended, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_a_kill_costs_only_the_pieces_at_hand(manual, tmp_path, whole, monkeypatch):
    process = start(tmp_path, manual, workers=2, pause=60)
    assert process.stderr
    while not process.stderr.readline().startswith("piece"):
        assert process.poll() is None
    below = children(process.pid)
    process.kill()
    process.wait()
    assert len(below) >= 2
    wait_for_end(below)  # nobody goes on decoding for a parent that is gone
    final = tmp_path / "data" / "imagenet21k" / "32" / "1.0.0"
    partial = final.with_name("1.0.0.partial")
    assert partial.exists() and not final.exists()
    done = {int(path.stem) for path in partial.glob("*.json") if path.stem.isdecimal()}
    assert 0 in done and 11 not in done
    (partial / "000011-train.array_record.99.unfinished").write_bytes(b"what a kill leaves")

    made, write = set(), pieces.write_piece

    def write_piece(folder, piece):
        made.add(piece.index)
        return write(folder, piece)

    monkeypatch.setattr(pieces, "write_piece", write_piece)
    prepared.prepare(NAME, tmp_path / "data", manual_dir=manual, workers=1)
    assert made == set(range(12)) - done
    assert contents(tmp_path / "data") == whole and not partial.exists()


@pytest.mark.slow
def test_ctrl_c_ends_it_at_once(manual, tmp_path):
    process = start(tmp_path, manual, workers=2, pause=60)
    assert process.stderr
    while not process.stderr.readline().startswith("piece"):
        assert process.poll() is None
    below = children(process.pid)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode != 0 and "KeyboardInterrupt" in said
    wait_for_end(below)


@pytest.mark.slow
def test_ctrl_c_while_processes_start_is_this_ones_to_answer(manual, tmp_path):
    process = start(tmp_path, manual, workers=2, pause=60)
    deadline = time.monotonic() + 120
    while not (below := decoders(process.pid)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    for pid in [process.pid, *below]:  # as a terminal does
        os.kill(pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert said.count("Traceback") == 1 and said.strip().endswith("KeyboardInterrupt")
    wait_for_end(below)


def test_a_kill_in_the_last_second_leaves_nothing_for_good(tmp_path):
    archives.old_imagenet(tmp_path, 32)
    for _ in range(2):
        builder: Any = prepared.prepare(
            "imagenet32_old", tmp_path / "data", manual_dir=tmp_path, workers=1
        )
        assert builder.info.initialized and not list(tmp_path.rglob("*.partial"))
        builder.partial_dir.mkdir()
        (builder.partial_dir / "000000-train.array_record").write_bytes(b"written")


def test_the_number_of_processes_does_not_matter(manual, tmp_path, whole):
    process = start(tmp_path, manual, workers=3)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0
    assert contents(tmp_path / "data") == whole
    counts = [line.split()[1:] for line in said.splitlines() if line.startswith("piece")]
    assert len(counts) == 12
    assert [int(count) for _, count in counts[:11]] == list(range(4, 48, 4))


def test_a_piece_that_was_made_of_something_else_is_made_again(
    manual, tmp_path, whole, monkeypatch
):
    """Another archive of the same name, begun and given up."""
    other = tmp_path / "other"
    other.mkdir()
    archives.imagenet21k(other, LAYOUT, count=24, synsets=SYNSETS)

    def stop(progress):
        if not progress.is_first_pass:
            raise KeyboardInterrupt

    for folder in (other, manual):
        with pytest.raises(KeyboardInterrupt):
            prepared.prepare(
                NAME, tmp_path / "data", manual_dir=folder, workers=1, on_progress=stop
            )
    partial = tmp_path / "data" / "imagenet21k" / "32" / "1.0.0.partial"
    record = partial / "000000-train.array_record"
    record.write_bytes(record.read_bytes()[:-100])  # a disk that was full
    prepared.prepare(NAME, tmp_path / "data", manual_dir=manual, workers=1)
    assert contents(tmp_path / "data") == whole


def test_an_archive_that_was_brought_again_is_read_again(manual, tmp_path, whole, capsys):
    def stop(progress):
        if not progress.is_first_pass:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared.prepare(NAME, tmp_path / "data", manual_dir=manual, workers=1, on_progress=stop)
    (manual / LAYOUT).write_bytes((manual / LAYOUT).read_bytes())
    capsys.readouterr()
    prepared.prepare(NAME, tmp_path / "data", manual_dir=manual, workers=1)
    said = capsys.readouterr().err
    assert "was begun with other archives; starting anew" in said and "first pass" in said
    assert contents(tmp_path / "data") == whole


def test_small_pieces_are_joined_and_large_ones_are_shards(manual, tmp_path, whole, monkeypatch):
    monkeypatch.setattr(ImageNet21k, "SHARD_IMAGES", 20)
    prepared.prepare(NAME, tmp_path / "data", manual_dir=manual, workers=1)
    shards = [name for name in contents(tmp_path / "data") if "train.array_record" in name]
    assert len(shards) == 12 and len([name for name in whole if "train.array_record" in name]) == 1
    for split in ("train", "validation"):
        pixels = []
        for where in ("data", "whole"):
            loaded = pipeline.load(NAME, split, data_dir=tmp_path / where)
            pixels.append(next(pipeline.eval_batches(loaded, batch_size=len(loaded))).image)
        np.testing.assert_array_equal(*pixels)


# The command.


@pytest.mark.parametrize("name", [*ARCHIVES, "shapes/32"])
def test_command(name, tmp_path, capsys):
    manual = tmp_path / "manual"
    manual.mkdir()
    if name in ARCHIVES:
        ARCHIVES[name](manual)
    argv = ["prepare", name, f"--data_dir={tmp_path / 'data'}", f"--manual_dir={manual}"]
    for _ in range(2):  # the second time, nothing is left to do
        assert cli.main([*argv, "--workers=1"]) == 0
        said = capsys.readouterr()
        assert "custom data configuration" not in said.err
        lines = said.out.splitlines()
        builder = prepared.find(name, tmp_path / "data")
        for line, split in zip(lines, builder.info.splits, strict=False):
            dataset = pipeline.load(name, split, data_dir=tmp_path / "data")
            assert line.startswith(dataset.describe())
            assert line.endswith(f"resize: {dataset.resize}, checksum {dataset.checksum()}")
        assert lines[-1] == f"prepared in {builder.data_dir}"
        assert ("files were left out" in lines[-2]) == (name.split("/")[0] in (
            "imagenet1k", "imagenet21k", "imagenet21k_fall11", "folder"))  # fmt: skip
        told = [line for line in lines if "were published" in line]
        assert told == differences(name, prepared.counts(builder))
        assert len(told) == (0 if name not in FACTS else 1 if FACTS[name].hashed else 2)


@pytest.mark.parametrize("name", ARCHIVES)
def test_progress_ends_at_the_whole(name, tmp_path):
    ARCHIVES[name](tmp_path)
    seen = []
    prepared.prepare(
        name, tmp_path / "data", manual_dir=tmp_path, workers=1, on_progress=seen.append
    )
    last = seen[-1]
    # The rest of a tar is its end: some blocks, more than its images where they are small.
    whole = {"imagenet32_old": 0.5, "imagenet64_old": 0.9, "imagenet1k/64": 0.7}.get(name, 1)
    assert whole <= last.bytes_read / last.bytes_in_all <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHIVES)
def test_command_from_a_shell(name, tmp_path):
    ARCHIVES[name](tmp_path)
    argv = ["-m", "jetflow.cli", "prepare", name, "--manual_dir", tmp_path, "--workers", 2]
    result = subprocess.run(
        [sys.executable, *map(str, argv), "--data_dir", str(tmp_path / "data")],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert f"{name} 1.0.0 train: " in result.stdout


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


@pytest.mark.parametrize("empty", ["train", "valid"])
def test_a_split_without_images_is_an_error(tmp_path, capsys, empty):
    archives.old_imagenet(tmp_path, 32, train=2, validation=2)
    archives.tar_of({"a.png": b""}, tmp_path / f"{empty}_32x32.tar")
    argv = ["prepare", "imagenet32_old", f"--manual_dir={tmp_path}", f"--data_dir={tmp_path}"]
    assert cli.main([*argv, "--workers=1"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    split = {"train": "train", "valid": "validation"}[empty]
    assert f"not one readable image for split {split};" in error
    assert error.endswith(f"1 files, first ('{empty}_32x32.tar/a.png', 'empty file')")


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys, monkeypatch):
    now = iter([0.0, 1.0, 20.0, 40.0])
    monkeypatch.setattr(command.time, "monotonic", lambda: next(now))
    with command.Display("set") as display:
        for step in (1, 2, 3):
            display.update(Progress(1000 * step, step, 10 * step, 100))
    # Of the rate, what was there at the first call does not count: it may be from an earlier start.
    line = "set: 30%, 3,000 images, 51 images/s, 3 unreadable"
    assert capsys.readouterr().err.splitlines() == [line]
