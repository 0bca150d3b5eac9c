"""`jetflow prepare`: stopped and started again, on full disks, and what is told of it."""

import os
import subprocess

import archives
import pytest
from test_sources import ARCHIVES

import jetflow
from jetflow import cli
from jetflow.data import builder, shards, sources
from jetflow.data.dataset import load
from jetflow.types import UsageError

NAME, LAYOUT = "imagenet21k/32", "winter21_whole.tar.gz"
SYNSETS = tuple(f"n{number:08d}" for number in range(12))


@pytest.fixture
def manual(tmp_path, monkeypatch):
    """The folder of an archive that becomes twelve shards."""
    monkeypatch.setattr(builder, "SHARD_BYTES", 10_000)
    archives.imagenet21k(tmp_path, LAYOUT, count=25, synsets=SYNSETS)
    return tmp_path


@pytest.fixture
def prepare(tmp_path, manual):
    """A function: a folder, and options -> all files that are made there, without interruption."""

    def prepared(folder, **options):
        options = {"manual_dir": manual, "workers": 1} | options
        jetflow.prepare(NAME, data_dir=tmp_path / folder, **options)
        files = (path for path in (tmp_path / folder).rglob("*") if path.is_file())
        assert not list((tmp_path / folder).rglob("*.partial"))
        return {str(path.relative_to(tmp_path / folder)): path.read_bytes() for path in files}

    return prepared


def stop_after(monkeypatch, number, error):
    """An error after so many shards."""
    write, written = shards.write, []

    def stopping(*args):
        if len(written) == number:
            raise error
        written.append(args)
        write(*args)

    monkeypatch.setattr(shards, "write", stopping)


@pytest.mark.parametrize(
    "change",
    ["none", "half a shard", "cut shard", "another archive", "touched archive", "zeros", "limit"],
)
def test_a_start_goes_on_where_the_last_one_ended(manual, tmp_path, monkeypatch, prepare, change):
    whole = prepare("whole", workers=3)  # whose number does not matter
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 4, KeyboardInterrupt)
        prepare("data")
    [partial] = tmp_path.glob("data/imagenet21k/32/*.partial")
    done = sorted(partial.glob("*train.array_record-*"))
    assert len(done) == 4
    kept, options = 4, {}
    match change:
        case "half a shard":
            (partial / "imagenet21k-train.array_record-00004-of-00012.9.incomplete").touch()
        case "cut shard":
            done[0].write_bytes(done[0].read_bytes()[:-100])
            kept = 3
        case "zeros":  # within the first records
            content = done[0].read_bytes()
            done[0].write_bytes(content[:100] + bytes(4000) + content[4100:])
            kept = 3
        case "limit":
            options = {"max_pixels": 10**6}
            whole, kept = prepare("of the other", **options), 0
        case "another archive":
            archives.imagenet21k(manual, LAYOUT, count=24, synsets=SYNSETS)
            whole, kept = prepare("of the other"), 0
        case "touched archive":
            os.utime(manual / LAYOUT, (0, 0))
            kept = 0
    written, write = [], shards.write
    monkeypatch.setattr(shards, "write", lambda *args: (written.append(1), write(*args)))
    now = prepare("data", **options)
    assert len(written) == 12 - kept
    if change == "touched archive":  # whose time is on record
        record = f"{NAME}/1.0.0/{builder.ORIGIN}"
        assert now.pop(record) != whole.pop(record)
    assert now == whole


@pytest.mark.parametrize("kind", ["full", "read-only"])
def test_a_disk_that_takes_no_more_is_one_line(kind, manual, tmp_path, capsys, prepare):
    if os.geteuid() or subprocess.run(["mount", "-V"], capture_output=True).returncode:
        pytest.skip("needs to mount a small disk, which root may")
    disk = tmp_path / "disk"
    disk.mkdir()
    size = "size=500k" if kind == "full" else "ro"
    mount = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine mounts no small disk")
    argv = ["prepare", NAME, f"--manual_dir={manual}", f"--data_dir={disk}", "--workers=1"]
    try:
        assert cli.main(argv) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert str(disk) in line and "--data_dir" in line and "room" in line
        kept = len(list(disk.rglob("*train.array_record-*")))
        assert (kept > 0) == (kind == "full")
        subprocess.run(["mount", "-o", "remount,rw,size=50m", str(disk)], check=True)
        assert cli.main(argv) == 0
        if kind == "full":  # what needs no archive begins anew, so nothing remains of its 63 MB
            assert cli.main(["prepare", "shapes/256", f"--data_dir={disk}"]) == 2
            assert not list(disk.glob("shapes/**/*partial*"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# The command.


@pytest.mark.parametrize("name", ["cifar10", "imagenet21k/32", "folder/pets/48", "shapes/32"])
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
        assert any("files were left out" in line for line in lines) == bool(prepared.unreadable)
        source = sources.find(name)
        count = 0 if not source.archives or not source.splits else 1 if source.held_out else 2
        assert [line for line in lines if "were published" in line] == prepared.differences
        assert len(prepared.differences) == count


def test_archives_lie_in_the_data_directory_by_default(tmp_path):
    manual = tmp_path / "downloads" / "manual"
    manual.mkdir(parents=True)
    archives.old_imagenet(manual, 32)
    assert cli.main(["prepare", "imagenet32_old", f"--data_dir={tmp_path}", "--workers=1"]) == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "DATASET is missing"),
        (["cifar11"], "did you mean 'cifar10'?"),
        (["cifar10", "--manual_dir=/nowhere"], "found there: no such folder"),
        (["cifar10", "--workers=0"], "workers"),
        (["folder/file/8", "--manual_dir=."], "expected a folder"),
        ([f"folder/{'x' * 300}/8", "--manual_dir=."], "found there: file"),
        (["digits", f"--data_dir={'x' * 300}"], "data_dir"),
    ],
)
def test_bad_input(argv, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert cli.main(["prepare", f"--data_dir={tmp_path}", *argv]) == 2
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
    (tmp_path / "pets").mkdir()
    assert cli.main(["prepare", "folder/pets/8", *argv[2:]]) == 2
    assert "not one readable image" in capsys.readouterr().err
