"""Runs in buckets: trained, gone on with, sampled and measured as in a folder."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import aiohttp
import bucket_server
import numpy as np
import pytest
import tiny_runs
from test_hosts import FIELDS, finish
from tiny_runs import assert_same, remains

import jetflow
from jetflow import archive, buckets, checkpoint, cli, configs, files, hosts
from jetflow.buckets import as_path, leased
from jetflow.training.log import Reporter
from jetflow.types import Interruption, UsageError


@pytest.fixture
def folder(bucket, request):
    """A folder of the bucket for one test."""
    return as_path(f"{bucket}/{re.sub('[^a-z_]', '-', request.node.name)}")


@pytest.fixture
def quick(monkeypatch):
    """Leases that expire soon."""
    monkeypatch.setattr(buckets, "RENEWED_SECONDS", 0.1)
    monkeypatch.setattr(buckets, "EXPIRES_SECONDS", 3.0)
    monkeypatch.setattr(buckets, "WATCHED_SECONDS", 2.0)


def test_a_run_is_the_same_as_in_a_folder(trained, folder, tmp_path, monkeypatch, capsys, caplog):
    """Stopped on the way, with what its last checkpoint brought there, and nothing stays here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    progress = Reporter.progress

    def noticed(self, step, *args):
        if step == 7:
            tiny_runs.send(15)
        progress(self, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "progress", noticed)
        patch.setattr(buckets.Mirror, "close", lambda self: shutil.rmtree(self.folder))
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
    configs.check(tiny_runs.config("tarflow", init_from=str(folder)))


SWEEP = """
from jetflow.sweeps import Sweep, axis, product
def get_sweep():
    points = product(axis("temperature", [0.5, 1.0]))
    fixed = {"num_samples": 8, "draws": 1}
    return Sweep(points, metrics=("sample_accuracy",), fixed=fixed)
"""


def test_a_sweep_goes_on(trained, folder, tmp_path, monkeypatch, capsys):
    file = tmp_path / "temperatures.py"
    file.write_text(SWEEP)
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


def test_a_lease_keeps_others_out(folder, monkeypatch):
    monkeypatch.setattr(buckets, "RENEWED_SECONDS", 0.1)

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
    begun = time.monotonic()
    with leased(folder / "lock", wait=False) as mine:
        assert mine and "is held by process" in caplog.text
        assert time.monotonic() - begun > buckets.WATCHED_SECONDS
        assert ended.wait(60)
        slow.__exit__(None, None, None)
        assert (folder / "lock").exists()  # which is no longer its own
    assert "was taken over by process" in capsys.readouterr().err


def test_a_late_answer_does_not_age_a_lease(folder, quick, monkeypatch):
    """Its holder renews it all the time."""
    monkeypatch.setattr(buckets, "EXPIRES_SECONDS", 1.0)
    other = buckets._Lease(folder / "lock")
    with leased(folder / "lock", wait=False), monkeypatch.context() as patch:
        read = other._store.read
        late = SimpleNamespace(read=lambda key: time.sleep(2) or read(key))
        patch.setattr(other, "_store", late)
        assert not other.take(wait=False)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "ftp://there/run",
            "has an unknown scheme; expected a path of this machine, or gs://BUCKET/",
        ),
        ("GS://bucket/run", "expected a path of this machine, or gs://BUCKET/…, in lower case"),
        ("gs://", "gs:// names no bucket"),
        ("gs:///run", "gs:///run names no bucket"),
        ("gs://bucket/file", "gs://bucket/file is a file; give a folder"),
        ("gs://private/run", "a bucket refuses (Forbidden: gs://private/); see to its name"),
        (
            "gs://nowhere/run",
            "gs://nowhere/run: there is no such bucket; make it",
        ),
    ],
)
def test_what_cannot_be_used_is_said_in_a_line(path, message, bucket, capsys):
    as_path("gs://bucket/file").write_text("")
    arguments = tiny_runs.arguments("tarflow", path)
    assert cli.main(arguments) == 2
    *before, error = capsys.readouterr().err.splitlines()
    assert message in error and all("preparing" in line for line in before)


@pytest.mark.parametrize(
    ("renewed", "watched", "expected"),
    [(0, 44, False), (0, 46, True), (60, 11, False), (60, 13, True), (-900, 46, True)],
)
def test_when_a_lease_counts_as_left(renewed, watched, expected):
    """Also where the clock of its holder goes wrong."""
    holder = {"renewed": time.time() - renewed}
    assert buckets._is_left(holder, float(watched)) == expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (TimeoutError(), Interruption),
        (ConnectionResetError(104, "Connection reset by peer"), Interruption),
        (ValueError("ABORTED: All 33 retry attempts failed: CURL error[7]"), Interruption),
        (aiohttp.ClientPayloadError("half of it"), Interruption),
        (OSError("Forbidden: b/private/o"), UsageError),
        (ValueError("PERMISSION_DENIED: Forbidden [http_response_code='403']"), UsageError),
        (FileNotFoundError("b/bucket/o/run%2Fconfig.json"), None),
        (ValueError("FAILED_PRECONDITION: Error reading: ZSTD_decompressStream() failed"), None),
        (json.JSONDecodeError("Expecting value", "", 0), None),
        (BrokenPipeError(32, "Broken pipe"), None),
    ],
)
def test_what_the_network_did_is_told_from_damage(error, expected):
    wrapped = RuntimeError("a library")
    wrapped.__cause__ = error
    for each in (error, wrapped):
        assert type(buckets.refusal(each)) is (expected or type(None))


def late(*_):
    raise TimeoutError


def test_what_does_not_answer_stays_as_it_is(trained, folder, monkeypatch):
    """It is no damage: nothing is set aside, overlooked or deleted."""
    workdir = trained("tarflow")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_read_arrays", late)
        with pytest.raises(Interruption):
            jetflow.load_model(workdir)
    for step in ("4", "8"):
        (folder / step / "commit_success.txt").write_text("")
    (folder / "known.json").write_text("{}")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    steps = checkpoint.Checkpoints(folder)
    assert steps.steps() == [4, 8]
    with monkeypatch.context() as patch:
        patch.setattr(type(folder), "read_bytes", late)
        for read in (files.read_metrics, lambda path: files.read_or_set_aside(path, dict, None)):
            name = "metrics.jsonl" if read is files.read_metrics else "known.json"
            with pytest.raises(Interruption):
                read(folder / name)
    with monkeypatch.context() as patch:
        patch.setattr("gcsfs.GCSFileSystem._info", late)
        with pytest.raises(TimeoutError):
            steps.steps()
    assert sorted(path.name for path in folder.iterdir()) == [
        "4", "8", "known.json", "metrics.jsonl",
    ]  # fmt: skip
    with pytest.raises(Interruption):
        hosts.by_first(late)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UsageError, match=r"needs gcsfs: pip install 'jetflow\[gcs\]'"):
        as_path("gs://bucket/run")


@pytest.mark.parametrize("option", ["out", "npz"])
def test_a_result_is_refused_before_the_work(option, trained, bucket, capsys):
    arguments = ["sample", "--workdir", str(trained("tarflow")), "--num=4"]
    capsys.readouterr()
    path = "gs://private/a.png" if option == "out" else "gs://private/a.npz"
    assert cli.main([*arguments, f"--{option}", path]) == 2
    error = capsys.readouterr().err
    assert "a bucket refuses" in error and error.count("\n") == 1


REMAINS = """
import pickle, sys, tiny_runs
from jetflow.buckets import as_path
sys.stdout.buffer.write(pickle.dumps(tiny_runs.remains(as_path(sys.argv[1]))))
"""
DAMAGE = """
import sys, jetflow
from jetflow.buckets import as_path
for path in as_path(sys.argv[1]).glob("checkpoints/12/state/ocdbt.process_0/d/*"):
    path.write_bytes(bytes(path.stat().length))
print(jetflow.load_model(sys.argv[1]).step)
"""


def output(program, folder, environment) -> bytes:
    """Of a program in a process of its own."""
    environment |= {"PYTHONPATH": f"{tiny_runs.ROOT}:{tiny_runs.ROOT / 'tests'}"}
    command = [sys.executable, "-c", program, folder]
    ended = subprocess.run(command, env=tiny_runs.environment(**environment), capture_output=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_kills_and_a_bad_network_change_nothing(trained, data_dir, compilation_cache):
    """Every tenth request is refused, and one in fifty takes five seconds."""
    folder = "gs://bucket/run"
    expected = remains(trained("tarflow"))
    with bucket_server.running("flaky") as environment:
        for kill, line in enumerate(["step 4/12", "step 8/12", ""]):
            process = tiny_runs.start(tiny_runs.arguments("tarflow", folder), **environment)
            said = ""
            while line and line not in said:
                said += (last := process.stderr.readline())
                assert last, said
            if line:
                process.kill()
            said += process.communicate(timeout=900)[1]
            assert process.returncode == (-9 if line else 0) and "Traceback" not in said, said
            assert ("is taken over" in said) == (kill > 0)
        assert_same(pickle.loads(output(REMAINS, folder, environment)), expected)
        assert output(DAMAGE, folder, environment) == b"10\n"


@pytest.fixture
def together(bucket, tmp_path, compilation_cache):
    """A function: starts a command line on processes that share eight devices and a bucket, and
    have an empty folder each for all else."""
    started = []

    def start(*line, processes) -> list[subprocess.Popen]:
        address, group = f"localhost:{tiny_runs.free_port()}", []
        for number in range(processes):
            own = tmp_path / f"{len(started)}"
            own.mkdir()
            folders = dict.fromkeys(["HOME", "TMPDIR", "TFDS_DATA_DIR", "XDG_CACHE_HOME"], str(own))
            several = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
            several |= {"JAX_PROCESS_ID": str(number), "JAX_NUM_CPU_DEVICES": str(8 // processes)}
            data = ["--data_dir", f"{bucket}/data", "--data_cache", str(own / "data")]
            group.append(tiny_runs.start([*map(str, line), *data], **folders, **several))
            started.append(group[-1])
        return group

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tarflow", "jet"])
def test_processes_share_nothing_but_a_bucket(name, together, folder, tmp_path):
    """One is killed, and twice as many go on; they end as one alone would have."""
    expected = as_path(f"{folder}-alone")
    finish(together(*tiny_runs.arguments(name, expected, **FIELDS), processes=1))
    command = tiny_runs.arguments(name, folder, **FIELDS)
    group = together(*command, processes=2)
    while not (folder / "checkpoints" / "5" / "commit_success.txt").exists():
        assert all(process.poll() is None for process in group), finish(group)
        time.sleep(0.1)
    group[1].kill()
    for process in group:
        process.communicate(timeout=900)
        assert process.returncode
    finish(together(*command, processes=4))
    lines = (files.read_metrics(path / "metrics.jsonl") for path in (folder, expected))
    for line, wanted in zip(*lines, strict=True):
        assert line.keys() == wanted.keys()
        for metric in [metric for metric in wanted if "bpd" in metric]:
            assert line[metric] == pytest.approx(wanted[metric], rel=1e-6), (metric, line["step"])
    if name == "jet":
        return
    bits = []
    for workdir, processes in ((folder, 2), (expected, 1)):
        flags = ["--workdir", workdir, "--draws", 1, "--mesh", "fsdp=2,data=4"]
        finish(together("evaluate", *flags, "--metrics", "bpd", processes=processes))
        (result,) = workdir.glob("evals/bpd-*draws=1.json")
        bits.append(json.loads(result.read_text())["value"])
    assert bits[0] == pytest.approx(bits[1], rel=1e-6)
    sweep = tmp_path / "temperatures.py"
    sweep.write_text(SWEEP)
    flags = ["--workdir", folder / "sweep", "--run", folder, "--fix", "mesh=fsdp=2"]
    finish(together("sweep", "--sweep", sweep, *flags, processes=2))
    records = sorted((folder / "sweep" / "points").glob("*.json"))
    assert [json.loads(path.read_text())["status"] for path in records] == ["done"] * 2
