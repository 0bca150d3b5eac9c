"""tpu_vm.sh with a stand-in of gcloud whose workers are folders, and whose processes run here."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess

import pytest
import tiny_runs
from launchers import JETFLOW_HERE, LAUNCH, TIMEOUT, run, script, wait_for


def tpu_vm(*arguments, env=None):
    return run(LAUNCH / "tpu_vm.sh", *arguments, env=env, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("topology", "expected"),
    [
        ("v5e:4x4", "--accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite"),
        ("v6e:2x4", "--accelerator-type=v6e-8 --version=v2-alpha-tpuv6e"),
        ("v5p:4x4x4", "--accelerator-type=v5p-128 --version=v2-alpha-tpuv5"),
        ("v4:2x2x4", "--type=v4 --topology=2x2x4 --version=tpu-ubuntu2204-base"),
    ],
)
def test_creation(topology, expected):
    ended = tpu_vm("create", "pod", "--topology", topology, "--spot", "--zone=z-a", "--dry-run")
    command = f"gcloud compute tpus tpu-vm create pod {expected} --zone=z-a --spot\n"
    assert sorted(ended.stdout.split()) == sorted(command.split())
    assert ended.stdout.startswith("gcloud compute tpus tpu-vm create pod ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "fly is no action; expected create"),
        (["create"], "create needs the name of a TPU VM"),
        (["create", "pod"], "create needs --topology"),
        (["create", "pod", "--topology", "tpu7x:2x2x1"], "launch/gke.py"),
        (["create", "pod", "--topology", "h100"], "expected GENERATION:SHAPE"),
        (["create", "pod", "--topology", "v3:2x2"], "a generation of v4, v5e, v5p or v6e"),
        (["run", "pod"], "run needs a command"),
        (["run", "pod", "train"], "begins with the word jetflow"),
        (["keep", "pod", "--topology", "v5e:4x4"], "keep needs a command"),
        (["logs", "pod", "--worker"], "--worker needs a value"),
    ],
)
def test_bad_input(arguments, message):
    ended = tpu_vm(*arguments, "--dry-run") if arguments[-1] != "--worker" else tpu_vm(*arguments)
    assert ended.returncode == 2
    assert message in ended.stderr and ended.stderr.count("\n") == 1


# gcloud, as far as tpu_vm.sh needs it: workers are folders, and their processes run here. The lines
# of the file `state` are what `describe` says, one after another; `scp` fails once if asked to.
GCLOUD = """\
shift 3; verb=$1; subject=$2; shift 2
echo "$verb" >>"$CLOUD/verbs"
workers=(0 1) command=''
for word; do
  case $word in --worker=[0-9]) workers=("${word#*=}") ;; --command=*) command=${word#*=} ;; esac
done
case $verb in
  create) echo READY >"$CLOUD/state" ;;
  delete) rm -r "$CLOUD/state" "$CLOUD"/worker* ;;
  describe) head -n 1 "$CLOUD/state" && sed -i '1{$!d}' "$CLOUD/state" ;;
  scp)
    ! rm "$CLOUD/scp_fails" 2>/dev/null || exit 1
    for worker in "${workers[@]}"; do
      mkdir -p "$CLOUD/worker$worker"; cp "$subject" "$CLOUD/worker$worker/${1#*:}"
    done ;;
  ssh)
    for worker in "${workers[@]}"; do
      HOME="$CLOUD/worker$worker" JAX_PROCESS_ID=$worker bash -c "cd; $command" &
      pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
    exit "${status:-0}" ;;
esac
"""
UV = """\
case $1 in
  venv) mkdir -p .venv/bin; echo "export PATH=$ENVIRONMENT:\\$PATH" >.venv/bin/activate ;;
  pip) echo "$*" >installed ;;
esac
"""


def descendants(pid):
    children = run("pgrep", "-P", pid).stdout.split()
    return [pid, *(found for child in children for found in descendants(child))]


def kill(run_pid, number=signal.SIGKILL):
    """Signals a worker's run, from restart.sh on, as when the machine goes down."""
    for pid in descendants(run_pid.read_text().strip()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), number)


@pytest.fixture
def cloud(tmp_path):
    """The environment in which `gcloud` is the stand-in with two workers that are one run."""
    for name, text in {"gcloud": GCLOUD, "uv": UV, "jetflow": JETFLOW_HERE}.items():
        script(tmp_path / name, text)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    yield tiny_runs.environment(
        CLOUD=str(tmp_path),
        ENVIRONMENT=str(tmp_path),
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
        JAX_NUM_PROCESSES="2",
        JETFLOW_PROCESSES="2",
        PAUSE="1",
        POLL="1",
    )
    for run_pid in tmp_path.glob("worker*/jetflow/run.pid"):
        kill(run_pid)


@pytest.fixture
def clone(tmp_path):
    """A checkout with the launchers alone: a file that is new, one that is ignored, one deleted."""
    path = tmp_path / "a clone"
    shutil.copytree(LAUNCH, path / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    (path / "old.py").touch()
    (path / ".gitignore").write_text("runs/\n")
    git = ["git", "-C", path, "-c", "user.name=me", "-c", "user.email=me@localhost"]
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "-m", "first"]):
        assert run(*git, *command).returncode == 0
    (path / "old.py").unlink()
    for name in ("configs/mine.py", "runs/big"):
        (path / name).parent.mkdir()
        (path / name).touch()
    return path


@pytest.fixture
def pod(cloud, clone, tmp_path):
    """A function: an action and its arguments -> how tpu_vm.sh of `clone` ends."""

    def act(action, *arguments, **variables):
        return run(clone / "launch" / "tpu_vm.sh", action, "pod", *arguments, env=cloud | variables)

    script(tmp_path / "jetflow", "exit 0\n")
    return act


KEEP = ("keep", "--topology=v5e:2x4", "jetflow", "train")


@pytest.fixture
def kept(pod, cloud, clone):
    """`keep` in the background."""
    command = [clone / "launch" / "tpu_vm.sh", KEEP[0], "pod", *KEEP[1:]]

    def start():
        nonlocal process
        process = subprocess.Popen(
            command, env=cloud, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        return process

    process = None
    yield start
    if process:
        process.kill()


def verbs(tmp_path):
    return (tmp_path / "verbs").read_text().split()


def test_setup_copies_the_checkout_as_it_is(pod, tmp_path):
    assert pod("setup").returncode == 0
    for worker in (0, 1):
        copy = tmp_path / f"worker{worker}" / "jetflow"
        assert (copy / "configs" / "mine.py").exists() and (copy / "launch" / "gke.py").exists()
        assert not (copy / "old.py").exists() and not (copy / "runs").exists()


def test_keep_tries_again_what_failed(pod, tmp_path):
    (tmp_path / "scp_fails").touch()
    kept = pod(*KEEP)
    assert (kept.returncode, kept.stdout) == (0, "ended with status 0\n"), kept.stderr
    assert "begin failed for pod; again in 1 s" in kept.stderr
    assert verbs(tmp_path).count("create") == 1 and verbs(tmp_path).count("scp") == 2


def test_a_run_that_was_stopped_stays_so(pod, kept, tmp_path):
    script(
        tmp_path / "jetflow", "trap 'exit 143' TERM; touch ran; while true; do sleep 0.1; done\n"
    )
    keep = kept()
    wait_for(lambda: len(list(tmp_path.glob("worker*/jetflow/ran"))) == 2, "both workers")
    again = pod("setup")
    assert again.returncode == 2 and again.stderr.count("a run is under way") == 2
    assert pod("stop").stdout.count("ended with status 143") == 2
    assert keep.communicate(timeout=TIMEOUT)[0].endswith(b"ended with status 143\n")
    assert keep.returncode == 143


@pytest.mark.parametrize("state", ["PREEMPTED", "TERMINATED"])
def test_keep_makes_anew_what_was_preempted(pod, tmp_path, state):
    assert pod("setup").returncode == 0  # of which nothing may remain
    (tmp_path / "state").write_text(f"{state}\n")
    kept = pod(*KEEP)
    assert (kept.returncode, kept.stdout) == (0, "ended with status 0\n"), kept.stderr
    assert [verb for verb in verbs(tmp_path) if verb in ("create", "delete")] == [
        "delete",
        "create",
    ]


def test_keep_stops_the_others_when_a_worker_has_ended(pod, tmp_path):
    script(
        tmp_path / "jetflow",
        "((JAX_PROCESS_ID)) && exit 2\ntrap 'exit 143' TERM; while true; do sleep 0.1; done\n",
    )
    kept = pod(*KEEP)
    assert (kept.returncode, kept.stdout.splitlines()[-1]) == (2, "ended with status 2 143")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_keep_starts_a_lost_worker_and_no_other(kept, tmp_path, number):
    script(
        tmp_path / "jetflow",
        "trap 'exit 143' TERM\n"
        'echo ran >>"$CLOUD/ran$JAX_PROCESS_ID"\n'
        "until [[ -e $CLOUD/finish ]]; do sleep 0.1; done\n",
    )
    keep = kept()
    ran = [tmp_path / "ran0", tmp_path / "ran1"]
    wait_for(lambda: all(path.exists() for path in ran), "both workers")
    kill(tmp_path / "worker1" / "jetflow" / "run.pid", number)
    wait_for(lambda: ran[1].read_text().count("ran") == 2, "the worker to be started again")
    (tmp_path / "finish").touch()
    output, errors = keep.communicate(timeout=TIMEOUT)
    assert output.endswith(b"ended with status 0\n"), errors
    assert ran[0].read_text().count("ran") == 1


def test_run_where_there_is_nothing_fails(pod, tmp_path):
    assert pod("run", "jetflow", "train").returncode != 0
    (tmp_path / "jetflow").unlink()
    assert pod("setup").returncode == 0
    failed = pod("run", "jetflow", "train", PATH=f"{tmp_path}:/usr/bin:/bin")
    assert failed.returncode == 1 and "jetflow is not there; setup first" in failed.stderr
    assert not list(tmp_path.glob("worker*/jetflow/run.*"))


@pytest.mark.parametrize(
    ("answer", "processes"), [("exit 22", None), ("echo", None), ("echo a:b:10.0.0.2,c:d:e", 2)]
)
def test_workers_are_counted_or_nothing_runs(pod, tmp_path, answer, processes):
    script(tmp_path / "curl", f"{answer}\n")
    script(tmp_path / "jetflow", 'echo "of $JETFLOW_PROCESSES"\n')
    assert pod("setup").returncode == 0
    ended = pod("run", "jetflow", "train", JETFLOW_PROCESSES="")
    assert (ended.returncode == 0) == (processes is not None)
    log = tmp_path / "worker0" / "jetflow" / "run.log"
    if processes is None:
        assert not log.exists()
    else:
        wait_for(lambda: "of" in log.read_text(), "the run")
        assert log.read_text() == f"of {processes}\n"


@pytest.mark.slow
def test_a_pod_trains_loses_a_worker_stops_and_is_preempted(
    cloud, tmp_path, data_dir, compilation_cache
):
    if not (tiny_runs.ROOT / ".git").exists():
        pytest.skip("not a clone of the repository, which `setup` copies by git")
    workdir = tmp_path / "runs" / "it's tiny"
    fields = {"train__steps": 400, "train__checkpoint_every": 20, "train__eval_every": 0,
              "train__sample_every": 0, "eval__guidance": 0.0, "eval__denoise": False}  # fmt: skip
    command = ["jetflow", *tiny_runs.arguments("tarflow", workdir, **fields)]
    workers = [tmp_path / f"worker{number}" / "jetflow" for number in (0, 1)]
    log = workers[0] / "run.log"

    def do(action, *arguments):
        ended = tpu_vm(action, "pod", *arguments, env=cloud)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    def statuses():
        found = [worker / "run.status" for worker in workers]
        return [file.read_text().strip() for file in found if file.exists()]

    def has_checkpoint(above):
        steps = [int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*")
                 if path.name.isdecimal()]  # fmt: skip
        return max(steps, default=0) > above

    do("create", "--topology", "v5e:2x4")
    do("setup")
    assert (workers[1] / "installed").read_text() == "pip install --quiet -e .[tpu]\n"
    do("run", *command)
    again = tpu_vm("run", "pod", *command, env=cloud)
    assert again.returncode == 2 and "a run is under way" in again.stderr

    wait_for(lambda: has_checkpoint(0), "a checkpoint")
    shell = (workers[1] / "run.pid").read_text().strip()
    child = run("pgrep", "-P", shell, "-f", "jetflow").stdout.split()[0]
    os.kill(int(child), signal.SIGKILL)  # the other one ends as well, and both start again
    wait_for(lambda: "resumed at step" in log.read_text(), "the restart")
    assert "status 137" in (workers[1] / "run.log").read_text()
    assert statuses() == []

    stopped = do("stop")
    assert stopped.count("ended with status 143") == 2 and statuses() == ["143", "143"]
    assert "all saved" in log.read_text() and not has_checkpoint(399)

    (tmp_path / "state").write_text("PREEMPTED\n")
    kept = tpu_vm("keep", "pod", "--topology=v5e:2x4", *command, env=cloud)
    assert kept.returncode == 0 and "pod is PREEMPTED" in kept.stderr, kept.stderr
    assert kept.stdout.endswith("ended with status 0\n")
    assert verbs(tmp_path).count("create") == 2 and verbs(tmp_path).count("delete") == 1
    assert has_checkpoint(399) and statuses() == ["0", "0"]
    with pytest.raises(subprocess.TimeoutExpired) as following:
        run(LAUNCH / "tpu_vm.sh", "logs", "pod", env=cloud, timeout=3)
    assert b"done: step 400" in (following.value.stdout or b"")
    run("pkill", "-f", f"tail -n 200 -F {workers[0]}")
