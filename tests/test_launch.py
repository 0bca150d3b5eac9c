"""The launchers: on a stand-in of gcloud whose workers are folders, and on a real Slurm."""

import contextlib
import dataclasses
import importlib.util
import os
import pty
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_runs
import yaml
from absl import flags

from jetflow import cli, config, sharding

LAUNCH = tiny_runs.ROOT / "launch"
TIMEOUT = 600  # seconds, on a machine with much else to do


def run(*command, env=None, timeout=TIMEOUT, **options):
    return subprocess.run(
        [str(part) for part in command], env=env, timeout=timeout, capture_output=True, text=True,
        **options,
    )  # fmt: skip


def wait_for(condition, what):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.1)


def script(path, text):
    """An executable for a PATH."""
    path.write_text(f"#!/usr/bin/env bash\n{text}")
    path.chmod(0o755)


def without_slurm():
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}


# restart.sh


def restarted(tmp_path, statuses, *arguments, work=""):
    """restart.sh on a command that does `work`, and ends with these statuses one after another."""
    (tmp_path / "statuses").write_text("\n".join(map(str, statuses)) + "\n")
    script(
        tmp_path / "command",
        f"cd {tmp_path}; echo ran >>runs; status=$(head -n 1 statuses); sed -i 1d statuses\n"
        f"{work}\nexit $status\n",
    )
    env = os.environ | {"PAUSE": "0", "STATUS_FILE": str(tmp_path / "status")}
    ended = run(LAUNCH / "restart.sh", tmp_path / "command", *arguments, env=env)
    assert (tmp_path / "status").read_text() == f"{ended.returncode}\n"
    return ended, (tmp_path / "runs").read_text().count("ran")


@pytest.mark.parametrize("status", [0, 2, 3, 130, 143])
def test_what_has_ended_is_not_started_again(tmp_path, status):
    ended, runs = restarted(tmp_path, [status, 0])
    assert (ended.returncode, runs) == (status, 1)


def test_a_crash_is_started_again(tmp_path):
    ended, runs = restarted(tmp_path, [1, 137, 0])
    assert (ended.returncode, runs) == (0, 3)
    assert "status 137" in ended.stderr


def test_crashes_without_a_new_checkpoint_end_it(tmp_path):
    work = "mkdir -p 'a run/checkpoints/'{20,9.orbax-checkpoint-tmp-$RANDOM}"
    ended, runs = restarted(tmp_path, [1] * 9, "--workdir", tmp_path / "a run", work=work)
    assert (ended.returncode, runs) == (1, 5)
    assert "5 crashes without a new checkpoint" in ended.stderr


@pytest.mark.parametrize("arguments", [["--workdir", "{}"], ["--workdir={}", "--seed=1"]])
def test_crashes_with_new_checkpoints_do_not(tmp_path, arguments):
    work = "mkdir -p 'a run/checkpoints/'$((10 * $(wc -l <runs) / 3))"  # more digits, too
    given = [argument.format(tmp_path / "a run") for argument in arguments]
    ended, runs = restarted(tmp_path, [1] * 12 + [0], *given, work=work)
    assert (ended.returncode, runs) == (0, 13)


def test_sigterm_is_passed_on_and_waited_for(tmp_path):
    script(
        tmp_path / "command",
        "trap 'sleep 0.5; touch saved; exit 143' TERM\ntouch up\nwhile true; do sleep 0.1; done\n",
    )
    process = subprocess.Popen([LAUNCH / "restart.sh", tmp_path / "command"], cwd=tmp_path)
    wait_for((tmp_path / "up").exists, "the command")
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert (tmp_path / "saved").exists()


SIGNALS = """\
import pathlib, signal, sys, time
got = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: got.append(number))
pathlib.Path("up").touch()
while not got:
    time.sleep(0.05)
time.sleep(1)
pathlib.Path("got").write_text(" ".join(signal.Signals(number).name for number in got))
sys.exit(143)
"""


def test_ctrl_c_in_a_terminal_reaches_the_command_once(tmp_path):
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execv(LAUNCH / "restart.sh", ["restart.sh", sys.executable, "-c", SIGNALS])
    wait_for((tmp_path / "up").exists, "the command")
    os.write(terminal, b"\x03")
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 143
    assert (tmp_path / "got").read_text() == "SIGTERM"


# tpu_vm.sh


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


def test_dry_run_prints_what_a_shell_takes(tmp_path):
    """What is printed, given to a shell, calls gcloud with the same words."""
    script(tmp_path / "gcloud", 'printf "%s\\0" "$@" >"$SAID"\n')
    command = ["run", "pod", "--zone", "z-a"]
    jetflow = ["jetflow", "train", "--config=configs/photos_jet.py", "--workdir", "/bucket/it's me"]
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert (
        tpu_vm(*command, *jetflow, env=os.environ | env | {"SAID": f"{tmp_path}/done"}).stdout == ""
    )
    printed = tpu_vm(*command, "--dry-run", *jetflow).stdout
    run("bash", "-c", printed, env=env | {"SAID": f"{tmp_path}/printed"})
    words = (tmp_path / "done").read_text().split("\0")
    assert (tmp_path / "printed").read_text().split("\0") == words
    assert words[:6] == ["compute", "tpus", "tpu-vm", "ssh", "pod", "--worker=all"]
    assert r"--workdir /bucket/it\'s\ me" in words[6]


def test_setup_mounts_a_bucket_only_where_asked():
    mounting = tpu_vm("setup", "pod", "--bucket", "mine", "--dry-run").stdout
    assert "gcsfuse --implicit-dirs --rename-dir-limit=200000 mine /bucket" in mounting
    plain = tpu_vm("setup", "pod", "--dry-run").stdout
    assert "gcsfuse" not in plain and "uv pip install --quiet -e" in plain


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
JETFLOW_HERE = f'exec {sys.executable} -m jetflow.cli "$@"\n'


def descendants(pid):
    children = run("pgrep", "-P", pid).stdout.split()
    return [pid, *(found for child in children for found in descendants(child))]


def kill(run_pid):
    """A worker's run, from restart.sh on, as when the machine is lost."""
    for pid in descendants(run_pid.read_text().strip()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


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


def verbs(tmp_path):
    return (tmp_path / "verbs").read_text().split()


def test_setup_copies_the_checkout_as_it_is(pod, tmp_path):
    assert pod("setup").returncode == 0
    for worker in (0, 1):
        there = tmp_path / f"worker{worker}" / "jetflow"
        assert (there / "configs" / "mine.py").exists() and (there / "launch" / "gke.py").exists()
        assert not (there / "old.py").exists() and not (there / "runs").exists()


def test_keep_tries_again_what_failed(pod, tmp_path):
    (tmp_path / "scp_fails").touch()
    kept = pod(*KEEP)
    assert (kept.returncode, kept.stdout) == (0, "ended with status 0\n"), kept.stderr
    assert "begin failed for pod; again in 1 s" in kept.stderr
    assert verbs(tmp_path).count("create") == 1 and verbs(tmp_path).count("scp") == 2


def test_keep_runs_on_a_pod_that_has_not_run(pod, tmp_path):
    (tmp_path / "state").write_text("REIMAGING\nSTARTING\nREADY\n")
    kept = pod(*KEEP)
    assert (kept.returncode, kept.stdout) == (0, "ended with status 0\n"), kept.stderr
    assert not {"create", "delete"} & set(verbs(tmp_path))


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


def test_keep_leaves_alone_what_somebody_stopped(pod, tmp_path):
    (tmp_path / "state").write_text("STOPPING\nSTOPPED\n")
    kept = pod(*KEEP)
    assert kept.returncode == 1 and kept.stderr.count("\n") == 1
    assert "pod is STOPPED, and left as it is; start or delete it" in kept.stderr
    assert set(verbs(tmp_path)) == {"describe"}


def test_keep_stops_the_others_when_a_worker_has_ended(pod, tmp_path):
    script(
        tmp_path / "jetflow",
        "((JAX_PROCESS_ID)) && exit 2\ntrap 'exit 143' TERM; while true; do sleep 0.1; done\n",
    )
    kept = pod(*KEEP)
    assert (kept.returncode, kept.stdout.splitlines()[-1]) == (2, "ended with status 2 143")


def test_keep_starts_a_lost_worker_and_no_other(pod, tmp_path, cloud, clone):
    script(
        tmp_path / "jetflow",
        'echo ran >>"$CLOUD/ran$JAX_PROCESS_ID"\n'
        "until [[ -e $CLOUD/finish ]]; do sleep 0.1; done\n",
    )
    keep = subprocess.Popen(
        [clone / "launch" / "tpu_vm.sh", KEEP[0], "pod", *KEEP[1:]], env=cloud,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    ran = [tmp_path / "ran0", tmp_path / "ran1"]
    wait_for(lambda: all(path.exists() for path in ran), "both workers")
    kill(tmp_path / "worker1" / "jetflow" / "run.pid")
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
def test_a_pod_trains_loses_a_worker_stops_and_is_preempted(cloud, tmp_path, data_dir):
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
    assert b"done: step 400" in following.value.stdout
    run("pkill", "-f", f"tail -n 200 -F {workers[0]}")


# gke.py


@pytest.fixture(scope="module")
def gke():
    spec = importlib.util.spec_from_file_location("gke", LAUNCH / "gke.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


JETFLOW = ("jetflow", "train", "--config", "configs/photos_jet.py")


@pytest.fixture
def manifest(gke, capsys):
    """A function: options -> the manifest that a dry run prints, and all that it prints."""

    def dry_run(*options, command=JETFLOW):
        given = ["--name=jet", "--image=registry/jetflow:1", "--dry-run", *options]
        assert gke.main([*given, *command]) == 0
        text = capsys.readouterr().out
        return yaml.safe_load(text), text

    return dry_run


@pytest.mark.parametrize(
    ("topology", "label", "chips", "hosts"),
    [
        ("v4:2x2x4", "tpu-v4-podslice", 4, 4),
        ("v5e:1x1", "tpu-v5-lite-podslice", 1, 1),
        ("v5e:2x4", "tpu-v5-lite-podslice", 8, 1),
        ("v5e:4x4", "tpu-v5-lite-podslice", 4, 4),
        ("v5p:4x4x4", "tpu-v5p-slice", 4, 16),
        ("v6e:4x8", "tpu-v6e-slice", 4, 8),
        ("tpu7x:2x2x2", "tpu7x", 4, 2),
    ],
)
def test_job_set(manifest, topology, label, chips, hosts):
    found, _ = manifest("--topology", topology)
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    [replicated] = found["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (job["parallelism"], job["completions"], replicated["replicas"]) == (hosts, hosts, 1)
    assert job["backoffLimit"] == 0 and job["completionMode"] == "Indexed"
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": label,
        "cloud.google.com/gke-tpu-topology": topology.partition(":")[2],
    }
    [container] = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert container["command"] == ["jetflow", "train", "--config", "configs/photos_jet.py"]
    assert container["image"] == "registry/jetflow:1"
    assert container["env"] == [{"name": "JETFLOW_PROCESSES", "value": str(hosts)}]


def test_job_set_restarts_what_was_lost_and_not_what_is_wrong(manifest):
    found, _ = manifest("--topology=v5e:4x4", "--slices=2", "--bucket=mine")
    policy = found["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 10
    assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    [replicated] = found["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 2
    job = replicated["template"]["spec"]
    [rule] = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [2, 3]
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 120
    assert pod["containers"][0]["env"][0]["value"] == "8"
    assert pod["volumes"][0]["csi"]["volumeAttributes"] == {
        "bucketName": "mine",
        "mountOptions": "implicit-dirs,rename-dir-limit=200000",
    }
    assert pod["containers"][0]["volumeMounts"][0]["mountPath"] == "/bucket"
    assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}


@pytest.mark.parametrize(
    ("topology", "slices", "expected"),
    [
        ("v5e:4x4", 1, {"--compute-type": "v5litepod-16", "--env": "JETFLOW_PROCESSES=4"}),
        ("v5e:4x4", 2, {"--compute-type": "v5litepod-16", "--env": "JETFLOW_PROCESSES=8"}),
        ("v5p:4x4x4", 1, {"--compute-type": "v5p-128", "--env": "JETFLOW_PROCESSES=16"}),
    ],
)
def test_gcluster_line(manifest, topology, slices, expected):
    command = ["jetflow", "train", "--workdir", "/bucket/a b"]
    options = [f"--topology={topology}", f"--slices={slices}", "--bucket=mine"]
    comment, *words = shlex.split(manifest(*options, command=command)[1].splitlines()[-1])
    assert [comment, *words[:3]] == ["#", "gcluster", "job", "submit"]
    assert dict(zip(words[3::2], words[4::2], strict=True)) == expected | {
        "--cluster": "CLUSTER",
        "--location": "LOCATION",
        "--name": "jet",
        "--topology": topology.partition(":")[2],
        "--num-slices": str(slices),
        "--image": "registry/jetflow:1",
        "--restarts": "10",
        "--grace-period": "300s",
        "--command": "jetflow train --workdir '/bucket/a b'",
        "--mount": "gs://mine:/bucket:rw",
        "--service-account": "jetflow",
    }
    assert "--mount" not in manifest("--topology=v5e:4x4")[1]


def test_apply_gives_kubectl_the_manifest(tmp_path):
    script(tmp_path / "kubectl", f"echo $* >{tmp_path}/said; cat >{tmp_path}/in\n")
    options = ["--name=jet", "--image=i", "--topology=v5e:4x4", "jetflow", "train"]
    env = tiny_runs.environment(PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert run(sys.executable, LAUNCH / "gke.py", *options, env=env).returncode == 0
    assert (tmp_path / "said").read_text() == "apply -f -\n"
    assert yaml.safe_load((tmp_path / "in").read_text())["kind"] == "JobSet"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v5e:5x5", "jetflow", "train"], "those of v5e are"),
        (["--topology=v5e:4x4"], "expected one such as jetflow train"),
        (["--topology=v5e:4x4", "--slices=0", "jetflow", "train"], "--slices is 0"),
    ],
)
def test_gke_bad_input(gke, capsys, arguments, message):
    assert gke.main(["--name=jet", "--image=i", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


# slurm.sbatch


def test_slurm_dry_run_and_submission(tmp_path):
    script(tmp_path / "sbatch", 'printf "%s\\n" "$@"\n')
    env = without_slurm() | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["jetflow", "train", "--workdir", "a b"]
    options = ["--nodes=3", "--time", "1:00"]
    said = run(LAUNCH / "slurm.sbatch", "--dry-run", *options, *command, env=env).stdout
    lines = [shlex.split(line, comments=True) for line in said.splitlines()]
    assert lines[0] == ["sbatch", *options, str(LAUNCH / "slurm.sbatch"), *command]
    assert lines[2][:2] == ["srun", "--kill-on-bad-exit=1"] and lines[2][-4:] == command
    submitted = run(LAUNCH / "slurm.sbatch", *options, *command, env=env)
    assert submitted.stdout.splitlines() == lines[0][1:]
    wrong = run(LAUNCH / "slurm.sbatch", "--nodes=3", "train", env=env)
    assert wrong.returncode == 2 and "a command that begins with jetflow" in wrong.stderr


# srun of two tasks, as it behaves where the first fails: the other is killed, and its status higher.
SRUN = """\
shift
"$@"; first=$?
((first)) && exit 143
exit 0
"""


@pytest.fixture
def job(tmp_path):
    """A function: the status of `jetflow`, what it does -> that of the job, and if it is requeued."""
    script(tmp_path / "srun", SRUN)
    script(tmp_path / "scontrol", f'echo "$@" >>{tmp_path}/requeued\n')
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    requeued = tmp_path / "requeued"

    def ends(status, work=""):
        requeued.unlink(missing_ok=True)
        script(tmp_path / "jetflow", f"{work}\nexit {status}\n")
        command = ["jetflow", "train", "--workdir=a run"]
        ended = run(LAUNCH / "slurm.sbatch", *command, env=env, cwd=tmp_path)
        assert not requeued.exists() or requeued.read_text() == "requeue 7\n"
        return ended.returncode, requeued.exists()

    return ends


@pytest.mark.parametrize(
    ("status", "again"),
    [(0, False), (2, False), (3, False), (130, False), (1, True), (137, True), (143, True)],
)
def test_slurm_queues_again_by_the_first_status(job, tmp_path, status, again):
    assert job(status) == (status, again)
    left = {path.name for path in tmp_path.glob("jetflow-*")}
    assert left == ({"jetflow-7.crashes"} if again and status != 143 else set())


def test_slurm_gives_up_after_crashes_without_a_new_checkpoint(job, tmp_path):
    checkpoint = "mkdir -p 'a run/checkpoints/'{}"
    for step in range(7, 14):  # progress, however many crashes, and digits
        assert job(1, checkpoint.format(step)) == (1, True)
    for status in (1, 143, 1, 137, 143):
        assert job(status) == (status, True)
    assert job(1) == (1, False)
    assert not list(tmp_path.glob("jetflow-*"))


SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
KillWait=60
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE
"""


@pytest.fixture
def slurm(tmp_path):
    """The environment of a Slurm of one node; skips, and says why, where it cannot start."""
    env = tiny_runs.environment(PATH=f"{tmp_path}:{os.environ['PATH']}:/usr/sbin")
    daemons = ["slurmctld", "slurmd"]
    missing = [name for name in [*daemons, "sbatch"] if not shutil.which(name, path=env["PATH"])]
    if missing:
        pytest.skip(f"{', '.join(missing)} not found; in Debian: apt install slurm-wlm")
    host = socket.gethostname().split(".")[0]
    try:
        socket.gethostbyname(host)
    except OSError:
        pytest.skip(f"the name of this machine, {host}, has no address; put it in /etc/hosts")
    ports = []
    for _ in daemons:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            ports.append(free.getsockname()[1])
    for name in ("state", "spool"):
        (tmp_path / name).mkdir()
    user = run("id", "-un").stdout.strip()
    (tmp_path / "slurm.conf").write_text(
        SLURM_CONF.format(host=host, user=user, ports=ports, folder=tmp_path)
    )
    env["SLURM_CONF"] = str(tmp_path / "slurm.conf")
    for daemon in daemons:
        run(daemon, env=env)
    try:
        for _ in range(60):
            if "idle" in run("sinfo", "--noheader", env=env).stdout:
                break
            time.sleep(0.5)
        else:
            logs = "".join(path.read_text()[-500:] for path in tmp_path.glob("slurm*.log"))
            pytest.skip(f"Slurm does not start here: {logs}")
        yield env
    finally:
        run("scancel", "--user", user, env=env)
        wait_for(lambda: not run("squeue", "--noheader", env=env).stdout, "the queue to be empty")
        for pid in tmp_path.glob("slurm*.pid"):
            os.kill(int(pid.read_text()), signal.SIGTERM)


@dataclasses.dataclass
class Job:
    """A job of two tasks, submitted by slurm.sbatch."""

    number: str
    log: Path
    env: dict[str, str]

    def shown(self):
        text = run("scontrol", "show", "job", self.number, env=self.env).stdout
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait_for_state(self, state):
        wait_for(lambda: self.shown()["JobState"] == state, f"the state {state}")
        return self.shown()

    def wait_for_log(self, text):
        def said():
            if self.shown()["JobState"] in ("FAILED", "CANCELLED"):
                pytest.fail(self.log.read_text())
            return self.log.exists() and text in self.log.read_text()

        wait_for(said, text)


@pytest.fixture
def submit(slurm, tmp_path):
    """A function: the arguments of jetflow, and what that is -> the job."""

    def submitted(*arguments, jetflow=JETFLOW_HERE):
        script(tmp_path / "jetflow", jetflow)
        command = [LAUNCH / "slurm.sbatch", "--parsable", "--ntasks=2", "jetflow", *arguments]
        ended = run(*command, env=slurm, cwd=tmp_path)
        assert ended.returncode == 0, ended.stderr
        number = ended.stdout.strip()
        return Job(number, tmp_path / f"jetflow-{number}.log", slurm)

    return submitted


@pytest.mark.slow
def test_slurm_runs_two_tasks_and_queues_them_again(submit, tmp_path, data_dir):
    workdir = tmp_path / "runs" / "tiny"
    fields = {"train__steps": 300, "train__checkpoint_every": 20, "train__eval_every": 0,
              "train__sample_every": 0, "eval__guidance": 0.0, "eval__denoise": False}  # fmt: skip
    job = submit(*tiny_runs.arguments("tarflow", workdir, **fields))
    wait_for(lambda: any((workdir / "checkpoints").glob("[0-9]*")), "a checkpoint")
    assert "2 x" in job.log.read_text()
    run("scancel", "--signal=TERM", job.number, env=job.env)  # as a time limit or a preemption does
    job.wait_for_log("status 143")
    assert "all saved" in job.log.read_text()
    job.wait_for_log("done: step 300")
    assert job.wait_for_state("COMPLETED")["Restarts"] == "1"
    assert "resumed at step" in job.log.read_text()


@pytest.mark.slow
def test_slurm_ends_at_bad_input_and_scancel(submit, tmp_path, data_dir):
    bad = submit(*tiny_runs.arguments("tarflow", tmp_path / "bad"), "--config.optim.lrr=1")
    ended = bad.wait_for_state("FAILED")
    assert (ended["ExitCode"], ended["Restarts"]) == ("2:0", "0"), bad.log.read_text()
    assert "config.optim.lrr is no field" in bad.log.read_text()
    late = "((SLURM_PROCID)) || exit 2\nsleep 600\n"  # killed by then, with a higher status
    ended = submit("train", jetflow=late).wait_for_state("FAILED")
    assert (ended["ExitCode"], ended["Restarts"]) == ("2:0", "0")
    cancelled = submit("train", jetflow="trap 'exit 143' TERM; while true; do sleep 0.1; done\n")
    cancelled.wait_for_state("RUNNING")
    run("scancel", cancelled.number, env=cancelled.env)
    time.sleep(3)  # enough to be queued again
    assert cancelled.wait_for_state("CANCELLED")["Restarts"] == "0"


# The README

README = (LAUNCH / "README.md").read_text()


def documented():
    """The launchers' commands in the README, as lists of words."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    return [command for command in commands if "launch/" in " ".join(command[:2])]


def following(command, *flags):
    """The whole numbers, or topologies, after these flags."""
    values = dict(zip(command, command[1:], strict=False))
    values |= dict(word.split("=", 1) for word in command if word.startswith("--") and "=" in word)
    return [values.get(flag) for flag in flags]


@pytest.mark.parametrize("command", documented(), ids=lambda command: " ".join(command)[:60])
def test_documented_commands_are_taken(command):
    where = command.index("jetflow") if "jetflow" in command else len(command)
    words = [*command[:where], "--dry-run", *command[where:]]
    if words[0] == "python":
        words[0] = sys.executable
    env = without_slurm() | {"PYTHONPATH": str(tiny_runs.ROOT)}
    ended = run(*words, env=env, cwd=tiny_runs.ROOT)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout


@dataclasses.dataclass(frozen=True)
class Device:
    """As far as a mesh looks at it."""

    id: int
    process_index: int
    slice_index: int
    device_kind: str = "cpu"
    platform: str = "cpu"


@pytest.mark.parametrize(
    "command",
    [command for command in documented() if "jetflow" in command],
    ids=lambda command: " ".join(command)[:60],
)
def test_documented_meshes_fit(gke, monkeypatch, command):
    monkeypatch.chdir(tiny_runs.ROOT)
    topology, slices, nodes, tasks = following(
        command, "--topology", "--slices", "--nodes", "--ntasks-per-node"
    )
    if nodes:
        slices, each = 1, int(nodes) * int(tasks)
    else:  # `run` is of the TPU VM that was made above it
        chips, hosts = gke.chips_and_hosts(topology or "v5e:4x4")
        slices, each = int(slices or 1), chips * hosts
    devices = [Device(number, number, number // each) for number in range(slices * each)]
    arguments = command[command.index("jetflow") + 1 :]
    values = flags.FlagValues()
    cli.load("train").define(values, arguments)
    config.parse(values, arguments)
    sizes = {axis: values.config.mesh[axis] for axis in sharding.AXES}
    mesh = sharding.make_mesh(**sizes, devices=devices)
    sharding.check_batch("config.train.batch_size", values.config.train.batch_size, mesh)
    sharding.check_batch("config.eval.batch_size", values.config.eval.batch_size, mesh)
    assert values.workdir.startswith(("/bucket/", "/shared/"))


def test_readme_names_every_launcher():
    for path in LAUNCH.iterdir():
        assert path.name == "README.md" or path.name in README or path.name == "__pycache__"
