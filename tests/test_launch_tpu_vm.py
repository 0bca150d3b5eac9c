"""tpu_vm.sh with a stand-in of gcloud whose workers are folders, and whose processes run here."""

import contextlib
import shutil
import signal
import subprocess
import sys

import psutil
import pytest
import tiny_runs
from etils import epath
from test_launch import LAUNCH, PATH, run, script


@pytest.mark.parametrize(
    ("command", "status", "expected"),
    [
        ("tpu_vm.sh create pod v5e:4x4 --dry-run", 0, "--accelerator-type=v5litepod-16 "),
        ("tpu_vm.sh create pod v6e:2x4 --spot --zone=z --dry-run", 0, "tpuv6e --spot --zone=z"),
        ("tpu_vm.sh create pod v4:2x2x4 --dry-run", 0, "create pod --type=v4 --topology=2x2x4 "),
        ("tpu_vm.sh create pod v5p:4x4x4 --dry-run", 0, "--accelerator-type=v5p-128 "),
        ("tpu_vm.sh create pod v3:2x2", 2, "expected one of v4, v5e, v5p or v6e"),
        ("tpu_vm.sh create", 2, "create needs the name of a TPU VM"),
        ("restart.sh --dry-run jetflow train", 0, "until it is done: jetflow train"),
        ("tpu_vm.sh fly pod", 2, "expected create, run"),
        ("tpu_vm.sh run pod --worker=1 jetflow train", 2, "--worker=1 is no option of run"),
        ("tpu_vm.sh keep pod v5e:4x4", 2, "keep needs a command"),
        ("gke.py", 2, "gke.py: '' is no job; expected NAME v5e:4x4 1 IMAGE jetflow train …"),
        ("gke.py jet v5e:5x5 1 IMAGE jetflow train", 2, "no 1 TPU slices v5e:5x5;"),
        ("gke.py jet v5e:4x4 0 IMAGE jetflow train", 2, "there are no 0 TPU slices v5e:4x4;"),
        ("gke.py jet v5e:4x4 x IMAGE python train.py", 2, "IMAGE python train.py' is no job"),
    ],
)  # fmt: skip
def test_the_last_line(command, status, expected):
    program, *words = command.split()
    ended = run(*[sys.executable] * program.endswith("py"), LAUNCH / program, *words)
    assert ended.returncode == status
    assert expected in (ended.stdout + ended.stderr).splitlines()[-1]


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
    for n in 0 1; do mkdir -p "$CLOUD/worker$n"; cp "$subject" "$CLOUD/worker$n/${1#*:}"; done ;;
  ssh)
    for n in 0 1; do
      HOME="$CLOUD/worker$n" JAX_PROCESS_ID=$n bash -c "cd; $command" &
      pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
    exit "${status:-0}" ;;
esac
"""
UV = """\
case $1 in
  venv) mkdir -p .venv/bin; echo "export PATH=$CLOUD:\\$PATH" >.venv/bin/activate ;;
  pip) sleep 1 ;;
esac
"""
RUNS = """\
trap 'exit 143' TERM
echo ran >>"$CLOUD/ran$JAX_PROCESS_ID"
until [[ -e $CLOUD/finish ]]; do sleep 0.1; done
exit "$(cat "$CLOUD/finish")"
"""
KEEP = ("keep", "pod", "v5e:2x4", "jetflow", "train")


@pytest.fixture
def pod(tmp_path):
    """A function: the arguments of tpu_vm.sh, of a clone of the launchers -> its process."""
    clone = tmp_path / "a clone"
    shutil.copytree(LAUNCH, clone / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    for words in ("init --quiet", "add --all"):
        run("git", "-C", clone, *words.split(), check=True)
    (clone / "new.py").touch()
    (clone / "launch" / "README.md").unlink()
    for name, text in {"gcloud": GCLOUD, "uv": UV, "jetflow": RUNS}.items():
        script(tmp_path / name, text)
    join = dict(JAX_NUM_PROCESSES="2", JAX_COORDINATOR_ADDRESS=f"localhost:{tiny_runs.free_port()}")
    cloud = dict(PATH=f"{tmp_path}:{PATH}", CLOUD=str(tmp_path), PAUSE="1", POLL="1")
    env, started = tiny_runs.environment(**cloud, **join), []

    def start(*arguments):
        program, pipe = [str(clone / "launch" / "tpu_vm.sh"), *arguments], subprocess.PIPE
        started.append(subprocess.Popen(program, env=env, text=True, stdout=pipe, stderr=pipe))
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


def times(path):
    return path.read_text().count("ran") if path.exists() else 0


def test_keep_goes_on_after_failures_losses_and_preemption(pod, tmp_path):
    (tmp_path / "state").write_text("PREEMPTED\n")
    (tmp_path / "worker0").mkdir()
    (tmp_path / "scp_fails").touch()
    keep = pod(*KEEP)
    ran = [tmp_path / "ran0", tmp_path / "ran1"]
    tiny_runs.wait_for(lambda: all(map(times, ran)), "both workers")
    for number, count in ((signal.SIGTERM, 2), (signal.SIGKILL, 3)):
        kill(tmp_path / "worker1" / "jetflow" / "run.pid", number)
        tiny_runs.wait_for(lambda: times(ran[1]) == count, "the worker to start again")  # noqa: B023
    copy = tmp_path / "worker1" / "jetflow"
    assert (copy / "new.py").exists() and not (copy / "launch" / "README.md").exists()
    again = pod("run", "pod", "jetflow", "train")
    assert again.communicate()[1].count("a run is under way") == 2 and again.returncode == 2
    (tmp_path / "finish").write_text("0")
    output, errors = keep.communicate()
    assert keep.returncode == 0 and output.endswith("ended with status 0\n"), errors
    assert "begin failed for pod; again in 1 s" in errors
    assert times(ran[0]) == 1  # the healthy worker was left alone
    verbs = (tmp_path / "verbs").read_text().split()
    assert [verb for verb in verbs if verb in ("create", "delete")] == ["delete", "create"]
    assert not list(tmp_path.glob("worker*/*.tgz"))


def test_two_that_start_at_once_start_each_worker_once(pod, tmp_path):
    both = [pod("run", "pod", "jetflow", "train") for _ in range(2)]
    assert sum(each.communicate()[1].count("a run is under way") for each in both) == 2
    assert [times(tmp_path / "ran0"), times(tmp_path / "ran1")] == [1, 1]


@pytest.mark.parametrize("end", ["stop", "one gives up"])
def test_keep_ends_with_the_run(pod, tmp_path, end):
    if end == "one gives up":
        script(tmp_path / "jetflow", f"((JAX_PROCESS_ID)) && exit 2\n{RUNS}")
    keep = pod(*KEEP)
    tiny_runs.wait_for((tmp_path / "ran0").exists, "a worker")
    if end == "stop":
        tiny_runs.wait_for((tmp_path / "ran1").exists, "the other")
        assert pod("stop", "pod").communicate()[0].count("ended with status 143") == 2
    output, statuses = keep.communicate()[0], {"stop": "143", "one gives up": "2 143"}[end]
    assert output.splitlines()[-1] == f"ended with status {statuses}"
    assert keep.returncode == int(statuses.split()[0])


@pytest.mark.slow
def test_two_workers_train_into_a_bucket_and_go_on(bucket, compilation_cache, pod, tmp_path):
    script(tmp_path / "jetflow", f'exec {sys.executable} -m jetflow "$@"\n')
    fields = {"train__steps": 300, "train__checkpoint_every": 100, "train__sample_every": 0,
              "train__eval_every": 0, "eval__guidance": 0.0, "eval__denoise": False}  # fmt: skip
    words = ["jetflow", *tiny_runs.arguments("tarflow", epath.Path(bucket, "pod"), **fields)]
    logs = [tmp_path / f"worker{number}" / "jetflow" / "run.log" for number in (0, 1)]
    keep = pod("keep", "pod", "v5e:2x4", *words)
    tiny_runs.wait_for(lambda: logs[0].exists() and "step 20/" in logs[0].read_text(), "step 20")
    assert pod("stop", "pod").communicate()[0].count("ended with status 143") == 2
    assert keep.wait() == 143
    assert pod("keep", "pod", "v5e:2x4", *words).wait() == 0
    said = ("2 x", "resumed at step", "done: step 300")
    assert all(text in logs[0].read_text() for text in said)
