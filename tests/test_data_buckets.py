"""Data sets in buckets: prepared there, and read from copies that the processes of a host share."""

import itertools
import json
import os
import signal
import threading

import archives
import bucket_server
import numpy as np
import pytest
import tiny_runs
from test_disk import last_line, mount, small  # noqa: F401 (a fixture)
from test_hosts import finish, start  # noqa: F401 (a fixture)
from test_prepare import LAYOUT, NAME, SYNSETS, stop_after
from tiny_runs import assert_same, remains

import jetflow
from jetflow import cli, hosts, rollcall
from jetflow.buckets import as_path
from jetflow.data import builder, cache, shards
from jetflow.data.dataset import eval_batches, load, train_batches
from jetflow.types import UsageError

MB = 1e-3  # in units of data_cache_gb


@pytest.fixture
def data(bucket, request, tmp_path, monkeypatch):
    """A function: loads from a folder of a bucket, with a cache, both of one test."""
    folder, options = as_path(f"{bucket}/{request.node.name}"), {"data_cache": tmp_path / "cache"}

    def loaded(name="digits", split="test", **more):
        return load(name, split, **{"data_dir": folder, **options, **more})

    loaded.folder, loaded.cache = folder, tmp_path / "cache"
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    yield loaded
    assert not list(scratch.iterdir())


@pytest.fixture
def manual(tmp_path, monkeypatch):
    """A function: writes an archive of twelve shards, and gives its folder."""
    monkeypatch.setattr(builder, "SHARD_BYTES", 10_000)

    def written(count=25):
        archives.imagenet21k(tmp_path, LAYOUT, count=count, synsets=SYNSETS)
        return tmp_path

    return written


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def copied(folder):
    """The files of images in a cache, or in a copy."""
    return sorted(path.name for path in folder.rglob("*array_record*"))


def images(dataset):
    batches = list(eval_batches(dataset, batch_size=64))
    return np.concatenate([batch.image for batch in batches])[: len(dataset)]


# Prepared.


def test_preparing_goes_on_shard_by_shard(data, manual, tmp_path, monkeypatch):
    """What comes of it is the same as in a folder; until the end, there is no data set."""
    options = {"manual_dir": manual(), "workers": 1}
    whole = jetflow.prepare(NAME, data_dir=tmp_path / "whole", **options)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 4, KeyboardInterrupt)
        jetflow.prepare(NAME, data_dir=data.folder, **options)
    with pytest.raises(UsageError, match="was not found"):
        data(NAME, "train")
    written, write = [], shards.write

    def watched(note, *arguments):
        assert not (data.folder / NAME / "1.0.0" / "dataset_info.json").exists()
        kept = copied(tmp_path / "scratch")  # at most the one that is damaged
        assert all(f"-{note.stem[-5:]}-of" in name for name in kept)
        written.append(note)
        write(note, *arguments)

    monkeypatch.setattr(shards, "write", watched)
    damaged = data.folder / NAME / "1.0.0" / "imagenet21k-train.array_record-00001-of-00012"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    prepared = jetflow.prepare(NAME, data_dir=data.folder, **{**options, "workers": 2})
    assert len(written) == 12 - 3
    assert contents(prepared.folder) == contents(whole.folder)
    assert not any("notes" in path.name for path in prepared.folder.iterdir())
    assert [path.name for path in prepared.folder.parent.iterdir()] == ["1.0.0"]
    for split, dataset in prepared.splits.items():
        assert dataset.facts() == whole.splits[split].facts()
    assert not data.cache.exists()

    manual(24)
    with pytest.raises(UsageError, match=r"prepared in gs://.* from other files"):
        jetflow.prepare(NAME, data_dir=data.folder, **options)
    anew = jetflow.prepare(NAME, data_dir=data.folder, overwrite=True, **options)
    jetflow.prepare(NAME, data_dir=data.folder, overwrite=True, **options)  # of the same files
    assert len(written) == 12 - 3 + 12 + 12
    assert len(anew.splits["train"]) < len(whole.splits["train"])


# Copied.


def test_the_shards_of_a_split_are_copied_once(data, data_dir):
    here = load("digits", "train", data_dir=data_dir)
    test, again = data(split="test"), data(split="test[:50%]")
    assert copied(data.cache) == ["digits-test.array_record-00000-of-00001"]
    assert test.copied > 0 == again.copied
    train = data(split="train")
    assert (train.checksum(), train.facts()) == (here.checksum(), here.facts())
    theirs = train_batches(here, batch_size=64, seed=3)
    ours = train_batches(train, batch_size=64, seed=3, workers=1)
    for one, other in itertools.islice(zip(theirs, ours, strict=False), 3):
        assert np.array_equal(one.image, other.image) and np.array_equal(one.label, other.label)
    theirs.close(), ours.close()

    [file] = data.cache.rglob("*test.array_record*")
    file.write_bytes(file.read_bytes()[:-100])
    leftover = file.with_name(f"{file.name}.1234.tmp")
    leftover.touch()
    assert data(split="test").copied == test.copied
    assert np.array_equal(images(data()), images(load("digits", "test", data_dir=data_dir)))
    assert not leftover.exists()
    origin = data.folder / "digits" / "1.0.0" / file.name
    origin.write_bytes(origin.read_bytes()[:-100])
    file.unlink()
    with pytest.raises(UsageError, match="damaged"):
        data(split="test")


def test_a_copy_shows_on_any_process_how_it_gets_on(data, monkeypatch, capsys):
    """And the others count no more positions than without it."""
    monkeypatch.setattr(rollcall, "_position", rollcall.START)
    monkeypatch.setattr(hosts, "LOG_DELAY", 0)
    monkeypatch.setattr(hosts, "is_first", lambda: False)
    data()
    first = rollcall._position
    assert "copying digits" in capsys.readouterr().err
    data()
    assert rollcall._position.count == 2 * first.count
    assert first[1:] == ("loading the data set digits", 1) and not rollcall._position.moves


def test_who_waits_for_the_copy_of_another_is_not_stuck(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rollcall, "_position", rollcall.START)
    lock = tmp_path / "lock"

    def wait():
        with cache.locked_in_turn(lock, "copies"):
            pass

    waiter = threading.Thread(target=wait)
    with hosts.locked(lock, wait=True):
        waiter.start()
        while not rollcall._position.moves:
            assert waiter.is_alive()
    waiter.join()
    assert capsys.readouterr().err == "another process copies; waiting\n"


def test_without_a_cache_the_bucket_itself_is_read(data):
    straight, here = data(split="test[5:15]", data_cache_gb=0.0), load("digits", "test[5:15]")
    assert np.array_equal(images(straight), images(here))
    assert not data.cache.exists()


def test_a_run_is_the_same_as_from_a_folder(data, trained, tmp_path, capsys):
    options = [f"--data_dir={data.folder}", f"--data_cache={data.cache}"]
    assert cli.main([*tiny_runs.arguments("jet", tmp_path / "run"), *options]) == 0
    assert_same(remains(tmp_path / "run"), remains(trained("jet")))
    evaluation = ["evaluate", "--metrics=bpd", "--draws=1", "--workdir"]
    capsys.readouterr()
    assert cli.main([*evaluation, str(tmp_path / "run"), *options]) == 0
    ours = capsys.readouterr().out.splitlines()[0]
    assert cli.main([*evaluation, str(trained("jet"))]) == 0
    assert capsys.readouterr().out.splitlines()[0] == ours


def test_a_data_set_that_is_prepared_anew_is_noticed(data, manual, monkeypatch):
    """Also while it is copied: of two data sets, nothing is mixed."""
    options = {"manual_dir": manual(), "data_dir": data.folder}
    jetflow.prepare(NAME, **options)
    before = data(NAME, "train")
    assert len(images(before)) == len(before)
    manual(24)
    second = jetflow.prepare(NAME, overwrite=True, **options).splits["train"]
    download = cache.download

    def overtaken(*arguments):
        monkeypatch.setattr(cache, "download", download)
        manual(23)
        jetflow.prepare(NAME, overwrite=True, **options)
        download(*arguments)

    monkeypatch.setattr(cache, "download", overtaken)
    monkeypatch.setattr(cache, "THREADS", 1)
    with pytest.raises(UsageError, match=r"being prepared anew.*same command"):
        data(NAME, "train")
    assert len(copied(data.cache)) == 12  # of the first one
    after = data(NAME, "train")
    assert len(images(after)) == len(after) < len(second) < len(before)


def test_the_copies_not_used_for_longest_make_room(data, manual):
    jetflow.prepare(NAME, manual_dir=manual(), data_dir=data.folder)
    digits = data("digits", "train")  # 0.33 MB
    files = (data.folder / NAME / "1.0.0").glob("*train.array_record*")
    room = sum(len(path.read_bytes()) for path in files) / 1e9 + 0.1 * MB
    with pytest.raises(UsageError, match=r"takes 0\.00\d+ GB.*room for 0\.00\d+ GB.*data_cache_gb"):
        data(NAME, "train", data_cache_gb=room)
    assert len(images(digits)) == 1500
    del digits
    with pytest.raises(UsageError, match=r"takes 0\.00\d+ GB.*room for 0\.0001 GB"):
        data(NAME, "train", data_cache_gb=0.1 * MB)  # for which nothing else need go
    assert copied(data.cache) == ["digits-train.array_record-00000-of-00001"]
    train = data(NAME, "train", data_cache_gb=room)
    assert len(images(train)) == len(train)
    assert len(copied(data.cache)) == 12 and all("21k" in name for name in copied(data.cache))


def test_the_copy_that_was_used_last_stays(tmp_path):
    for used, name in enumerate(("b", "c", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(bytes(100))
        (tmp_path / f"{name}.lock").touch()
        os.utime(tmp_path / f"{name}.lock", (used, used))
    copy = object.__new__(cache.Copy)
    with open(tmp_path / "a.lock") as lock:
        vars(copy).update(_root=tmp_path, _name="a", _limit=350 / 1e9, _lock=lock)
        copy._make_room(100)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["a", "c"]


def test_a_disk_that_takes_no_copy_is_one_line(data, mount, tmp_path, monkeypatch, capsys):  # noqa: F811
    config = tiny_runs.arguments("jet", "")[1:-2]
    command = ["bench", "data", *config, "--workers=0", "--repeats=1", f"--data_dir={data.folder}"]
    data()
    (tmp_path / "file").touch()
    assert cli.main([*command, f"--data_cache={tmp_path / 'file'}"]) == 2
    assert str(tmp_path / "file") in last_line(capsys)
    disk = mount(*small("200k"))
    assert cli.main([*command, f"--data_cache={disk}"]) == 2
    assert str(disk) in last_line(capsys)
    usage = cache.shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(cache.shutil, "disk_usage", lambda _: usage)  # filled by others meanwhile
        assert cli.main([*command, f"--data_cache={disk}"]) == 2
        line = last_line(capsys)
        assert str(disk) in line and "make room" in line
    assert not copied(disk)
    mount()
    assert cli.main([*command, f"--data_cache={disk}", "--json"]) == 0
    assert '"copied_megabytes": 0.3' in capsys.readouterr().out


@pytest.mark.parametrize("place", ["private", "nowhere"])
def test_a_bucket_that_cannot_be_used_is_one_line(place, bucket, tmp_path, capsys):
    for name in ("digits", "cifar10"):
        config = [*tiny_runs.arguments("jet", "")[1:-2], f"--config.data.name={name}"]
        assert cli.main(["bench", "data", *config, f"--data_dir=gs://{place}/data"]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert [line for line in lines if "preparing" not in line] == lines[-1:]
        assert place in lines[-1] and "config.data" not in lines[-1]
    assert cli.main(["prepare", "cifar10", f"--manual_dir=gs://{place}/archives"]) == 2
    assert "manual_dir" in last_line(capsys)


# Processes of their own.

KILLED = """
import os, signal, sys
import jetflow
from jetflow.data import builder, cache
from jetflow.data.dataset import load
moment, data_dir, data_cache, manual = sys.argv[1:]
builder.SHARD_BYTES, count = 10_000, 0

def counted(call):
    def stopping(*arguments):
        global count
        call(*arguments)
        count += 1
        if count == 9:
            os.kill(os.getpid(), signal.SIGKILL)
    return stopping

if moment == "preparing":
    builder.upload = counted(builder.upload)
elif moment == "copying":
    cache.download, cache.THREADS = counted(cache.download), 1
jetflow.prepare("imagenet21k/32", manual_dir=manual, data_dir=data_dir, workers=1)
load("imagenet21k/32", "train", data_dir=data_dir, data_cache=data_cache)
"""


SHARING = """
import json, sys
from jetflow import hosts
from jetflow.data.dataset import eval_batches, load
with hosts.joined({}, None, saves_at_signals=False):
    data = load("digits", "train", **json.loads(sys.argv[1]))
    total = sum(int(batch.image.sum()) for batch in eval_batches(data, batch_size=100))
    print(json.dumps([data.copied, total]), file=sys.__stdout__, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("caches", [1, 2])
def test_processes_share_what_one_of_them_prepares_and_copies(caches, data, start):  # noqa: F811
    options = [
        {"data_dir": str(data.folder), "data_cache": f"{data.cache}{number % caches}"}
        for number in range(2)
    ]
    group = start(*([json.dumps(each)] for each in options), program=["-c", SHARING])
    said = finish(group)
    ends = [json.loads(output) for output, _ in said]
    size = data("digits", "train").copied
    assert sum(copied for copied, _ in ends) == caches * size
    assert {total for _, total in ends} == {int(images(data("digits", "train")).sum())}
    assert sum(errors.count("preparing data set") for _, errors in said) == 1


@pytest.mark.slow
def test_a_flaky_server_changes_nothing(manual, tmp_path):
    manual_dir = manual()
    whole = jetflow.prepare(NAME, data_dir=tmp_path / "whole", manual_dir=manual_dir)
    arguments = ["all", "gs://bucket/data", str(tmp_path / "cache"), str(manual_dir)]
    with bucket_server.running("flaky") as environment:
        assert tiny_runs.start(arguments, ["-c", KILLED], **environment).wait() == 0
    [copy] = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    files = contents(whole.folder)
    assert contents(copy) == {name: files[name] for name in contents(copy)}
    assert len(copied(copy)) == 12


@pytest.mark.slow
def test_a_kill_leaves_nothing_that_counts(data, manual, tmp_path, monkeypatch):
    folder, manual_dir, tried = data.folder, manual(), []
    for moment in ("preparing", "copying"):
        arguments = [moment, str(folder), str(data.cache), str(manual_dir)]
        process = tiny_runs.start(arguments, ["-c", KILLED], TMPDIR=str(tmp_path))
        assert process.wait() == -signal.SIGKILL
    download = cache.download
    monkeypatch.setattr(cache, "download", lambda *each: (tried.append(1), download(*each)))
    assert len(copied(data.cache)) == 8 + 1  # and one that is not whole
    assert len(images(data(NAME, "train"))) > 200 and len(copied(data.cache)) == 12
    assert sum(tried) == 12 - 8
