"""tpu_vm.sh with a stand-in of gcloud whose workers are folders, and whose processes run here."""

import contextlib
import os
import shutil
import signal
import subprocess

import psutil
import pytest
import tiny_runs
from test_launch import LAUNCH, run, script, wait_for


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
    arguments = ("create", "pod", "--topology", topology, "--spot", "--zone=z-a", "--dry-run")
    command = f"gcloud compute tpus tpu-vm create pod {expected} --zone=z-a --spot\n"
    said = run(LAUNCH / "tpu_vm.sh", *arguments).stdout
    assert sorted(said.split()) == sorted(command.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("fly", "fly is no action; expected create"),
        ("create", "create needs the name of a TPU VM"),
        ("create pod", "create needs --topology"),
        ("create pod --topology tpu7x:2x2x1", "launch/gke.py"),
        ("create pod --topology h100", "expected GENERATION:SHAPE"),
        ("create pod --topology v3:2x2", "a generation of v4, v5e, v5p or v6e"),
        ("run pod", "run needs a command"),
        ("run pod train", "begins with the word jetflow"),
        ("keep pod --topology v5e:4x4", "keep needs a command"),
        ("logs pod --worker", "--worker needs a value"),
    ],
)
def test_bad_input(arguments, message):
    ended = run(LAUNCH / "tpu_vm.sh", *arguments.split())
    assert ended.returncode == 2
    assert message in ended.stderr and ended.stderr.count("\n") == 1


# The lines of the file `state` are what `describe` says, one after another.
GCLOUD = """\
shift 3; verb=$1; subject=$2; shift 2
echo "$verb" >>"$CLOUD/verbs"
for word; do case $word in --command=*) command=${word#*=} ;; esac; done
case $verb in
  create) echo READY >"$CLOUD/state" ;;
  delete) rm -r "$CLOUD/state" "$CLOUD"/worker* ;;
  describe) head -n 1 "$CLOUD/state" && sed -i '1{$!d}' "$CLOUD/state" ;;
  scp)
    ! rm "$CLOUD/scp_fails" 2>/dev/null || exit 1
    for worker in 0 1; do mkdir -p "$CLOUD/worker$worker"; cp "$subject" "$CLOUD/worker$worker/${1#*:}"; done ;;
  ssh)
    for worker in 0 1; do
      HOME="$CLOUD/worker$worker" JAX_PROCESS_ID=$worker bash -c "cd; $command" &
      pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
    exit "${status:-0}" ;;
esac
"""  # noqa: E501
UV = """\
case $1 in
  venv) mkdir -p .venv/bin; echo "export PATH=$CLOUD:\\$PATH" >.venv/bin/activate ;;
  pip) echo "$*" >installed ;;
esac
"""
RUNS = """\
trap 'exit 143' TERM
echo ran >>"$CLOUD/ran$JAX_PROCESS_ID"
until [[ -e $CLOUD/finish ]]; do sleep 0.1; done
exit "$(cat "$CLOUD/finish")"
"""
KEEP = ("keep", "pod", "--topology=v5e:2x4", "jetflow", "train")


@pytest.fixture
def pod(tmp_path):
    """A function: the arguments of tpu_vm.sh, of a clone of the launchers -> its process."""
    clone = tmp_path / "a clone"
    shutil.copytree(LAUNCH, clone / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-C", clone, "-c", "user.name=me", "-c", "user.email=me@localhost"]
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "-m", "first"]):
        assert run(*git, *command).returncode == 0
    (clone / "new.py").touch()
    (clone / "launch" / "README.md").unlink()
    for name, text in {"gcloud": GCLOUD, "uv": UV, "jetflow": RUNS}.items():
        script(tmp_path / name, text)
    variables = {"CLOUD": str(tmp_path), "JETFLOW_PROCESSES": "2", "PAUSE": "1", "POLL": "1"}
    env = tiny_runs.environment(PATH=f"{tmp_path}:{os.environ['PATH']}", **variables)
    started = []

    def start(*arguments):
        program = [str(clone / "launch" / "tpu_vm.sh"), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(program, env=env, text=True, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
    for run_pid in tmp_path.glob("worker*/jetflow/run.pid"):
        kill(run_pid)


def kill(run_pid, number=signal.SIGKILL):
    """Signals a worker's run, from restart.sh on, as when the machine goes down."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(int(run_pid.read_text()))
        for each in [process, *process.children(recursive=True)]:
            each.send_signal(number)


def test_keep_goes_on_after_failures_losses_and_preemption(pod, tmp_path):
    (tmp_path / "state").write_text("PREEMPTED\n")
    (tmp_path / "worker0").mkdir()
    (tmp_path / "scp_fails").touch()
    keep = pod(*KEEP)
    ran = [tmp_path / "ran0", tmp_path / "ran1"]
    wait_for(lambda: all(path.exists() for path in ran), "both workers")
    for number, count in ((signal.SIGTERM, 2), (signal.SIGKILL, 3)):
        kill(tmp_path / "worker1" / "jetflow" / "run.pid", number)
        wait_for(lambda: ran[1].read_text().count("ran") == count, "the worker to start again")  # noqa: B023
    copy = tmp_path / "worker1" / "jetflow"
    assert (copy / "new.py").exists() and not (copy / "launch" / "README.md").exists()
    again = pod("setup", "pod")
    assert again.communicate()[1].count("a run is under way") == 2 and again.returncode == 2
    (tmp_path / "finish").write_text("0")
    output, errors = keep.communicate()
    assert keep.returncode == 0 and output.endswith("ended with status 0\n"), errors
    assert "begin failed for pod; again in 1 s" in errors
    assert ran[0].read_text().count("ran") == 1
    verbs = (tmp_path / "verbs").read_text().split()
    assert [verb for verb in verbs if verb in ("create", "delete")] == ["delete", "create"]


@pytest.mark.parametrize("end", ["stop", "one gives up"])
def test_keep_ends_with_the_run(pod, tmp_path, end):
    if end == "one gives up":
        script(tmp_path / "jetflow", f"((JAX_PROCESS_ID)) && exit 2\n{RUNS}")
    keep = pod(*KEEP)
    wait_for((tmp_path / "ran0").exists, "a worker")
    if end == "stop":
        wait_for((tmp_path / "ran1").exists, "the other")
        assert pod("stop", "pod").communicate()[0].count("ended with status 143") == 2
    output, _ = keep.communicate()
    statuses = {"stop": "143", "one gives up": "2 143"}[end]
    assert output.splitlines()[-1] == f"ended with status {statuses}"
    assert keep.returncode == int(statuses.split()[0])
