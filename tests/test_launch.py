"""The launchers: restart.sh and slurm.sbatch run for real, gke.py by its fields; their README."""

import dataclasses
import importlib.util
import math
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

import pytest
import tiny_runs
import yaml

from jetflow import cli, sharding
from jetflow.cli.flags import parse

LAUNCH = tiny_runs.ROOT / "launch"
README = (LAUNCH / "README.md").read_text()


def run(*command, **options):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)


def wait_for(condition, what, seconds=600):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)


def script(path, text):
    """An executable for a PATH."""
    path.write_text(f"#!/usr/bin/env bash\n{text}")
    path.chmod(0o755)


# restart.sh


@pytest.mark.parametrize(
    ("statuses", "work", "ends", "runs"),
    [
        *(([status, 0], "", status, 1) for status in (0, 2, 3, 130, 143)),
        ([1, 137, 0], "", 0, 3),
        ([1] * 9, "mkdir -p 'a run/checkpoints/'{20,9.orbax-checkpoint-tmp-$RANDOM}", 1, 5),
        ([1] * 12 + [0], "mkdir -p 'a run/checkpoints/'$((10 * $(wc -l <runs) / 3))", 0, 13),
    ],
)
def test_a_crash_is_started_again_while_there_is_progress(tmp_path, statuses, work, ends, runs):
    (tmp_path / "statuses").write_text("\n".join(map(str, statuses)) + "\n")
    script(
        tmp_path / "command",
        f"cd {tmp_path}; echo ran >>runs; status=$(head -n 1 statuses); sed -i 1d statuses\n"
        f"{work}\nexit $status\n",
    )
    env = os.environ | {"PAUSE": "0", "STATUS_FILE": str(tmp_path / "status")}
    command = (LAUNCH / "restart.sh", tmp_path / "command", "--workdir", tmp_path / "a run")
    assert run(*command, env=env).returncode == ends
    assert (tmp_path / "status").read_text() == f"{ends}\n"
    assert (tmp_path / "runs").read_text().count("ran") == runs


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


@pytest.mark.parametrize("sent", ["SIGTERM", "Ctrl-C"])
def test_the_command_gets_one_sigterm_and_is_waited_for(tmp_path, sent):
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execv(LAUNCH / "restart.sh", ["restart.sh", sys.executable, "-c", SIGNALS])
    wait_for((tmp_path / "up").exists, "the command")
    if sent == "SIGTERM":
        os.kill(pid, signal.SIGTERM)
    else:
        os.write(terminal, b"\x03")
    try:
        _, status = os.waitpid(pid, 0)
    finally:
        os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 143
    assert (tmp_path / "got").read_text() == "SIGTERM"


# gke.py


def load_gke():
    """launch/gke.py as a module."""
    spec = importlib.util.spec_from_file_location("gke", LAUNCH / "gke.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GKE = load_gke()


@pytest.mark.parametrize(
    ("topology", "slices", "label", "chips", "hosts", "compute_type"),
    [
        ("v4:2x2x4", 1, "tpu-v4-podslice", 4, 4, "v4-32"),
        ("v5e:1x1", 1, "tpu-v5-lite-podslice", 1, 1, "v5litepod-1"),
        ("v5e:2x4", 2, "tpu-v5-lite-podslice", 8, 1, "v5litepod-8"),
        ("v5p:4x4x4", 1, "tpu-v5p-slice", 4, 16, "v5p-128"),
        ("v6e:4x8", 2, "tpu-v6e-slice", 4, 8, "v6e-32"),
        ("tpu7x:2x2x2", 1, "tpu7x", 4, 2, ""),
    ],
)
def test_job_set(capsys, topology, slices, label, chips, hosts, compute_type):
    command = ["jetflow", "train", "--workdir", "/bucket/a b"]
    options = ["--name=jet", "--image=registry/jetflow:1", "--dry-run", "--bucket=mine"]
    shape, processes = topology.partition(":")[2], str(hosts * slices)
    options += [f"--topology={topology}", f"--slices={slices}"]
    assert GKE.main([*options, *command]) == 0
    text = capsys.readouterr().out
    found = yaml.safe_load(text)
    policy = found["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 10
    assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    [replicated] = found["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (job["parallelism"], job["completions"], replicated["replicas"]) == (
        hosts, hosts, slices,
    )  # fmt: skip
    [rule] = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [2, 3]
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": label,
        "cloud.google.com/gke-tpu-topology": shape,
    }
    [container] = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert container["command"] == command
    assert container["env"] == [{"name": "JETFLOW_PROCESSES", "value": processes}]
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "mine"
    words = shlex.split(text.splitlines()[-1])
    assert ("gcluster" in words) == bool(compute_type)
    if compute_type:
        assert words[words.index("--compute-type") + 1] == compute_type
        assert words[words.index("--env") + 1] == f"JETFLOW_PROCESSES={processes}"
        assert words[words.index("--command") + 1] == shlex.join(command)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v5e:5x5", "jetflow", "train"], "v5e:5x5"),
        (["--topology=v5e:4x4"], "expected one such as jetflow train"),
        (["--topology=v5e:4x4", "--slices=0", "jetflow", "train"], "--slices is 0"),
    ],
)
def test_gke_bad_input(capsys, arguments, message):
    assert GKE.main(["--name=jet", "--image=i", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


# The README


def documented():
    """The launchers' commands in the README, as lists of words."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    return [command for command in commands if "launch/" in " ".join(command[:2])]


def flag(command, name, default):
    """What follows a flag, in the same word or the next one."""
    words = [part for word in command for part in word.split("=", 1)]
    return words[words.index(name) + 1] if name in words else default


@dataclasses.dataclass(frozen=True)
class Device:
    """As far as a mesh looks at it."""

    id: int
    process_index: int
    slice_index: int
    device_kind: str = "cpu"
    platform: str = "cpu"


@pytest.mark.parametrize("command", documented(), ids=lambda command: " ".join(command)[:60])
def test_documented_commands_are_taken_and_their_meshes_fit(monkeypatch, command):
    monkeypatch.chdir(tiny_runs.ROOT)
    where = command.index("jetflow") if "jetflow" in command else len(command)
    words = [*command[:where], "--dry-run", *command[where:]]
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    ended = run(*words, env=env | {"PYTHONPATH": str(tiny_runs.ROOT)})
    assert ended.returncode == 0, ended.stderr
    starts = ("gcloud compute tpus", "bash -o pipefail -c", "sbatch ", "# kubectl apply")
    assert ended.stdout.startswith(starts)
    if where == len(command):
        return
    slices = int(flag(command, "--slices", 1))
    if "sbatch" in command[0]:
        each = int(flag(command, "--nodes", 0)) * int(flag(command, "--ntasks-per-node", 0))
    else:  # `run` is of the TPU VM that was made above it
        each = math.prod(GKE.chips_and_hosts(flag(command, "--topology", "v5e:4x4")))
    devices = [Device(number, number, number // each) for number in range(slices * each)]
    config = parse(*cli.find(command[where + 1 :])).config
    mesh = sharding.make_mesh(
        **{axis: config.mesh[axis] for axis in sharding.AXES}, devices=devices
    )
    sharding.check_batch("config.train.batch_size", config.train.batch_size, mesh)
    sharding.check_batch("config.eval.batch_size", config.eval.batch_size, mesh)


# slurm.sbatch


@pytest.mark.parametrize(
    ("status", "again"),
    [(0, False), (2, False), (3, False), (130, False), (1, True), (137, True), (143, True)],
)
def test_slurm_queues_again_by_the_first_status(tmp_path, status, again):
    """With an srun of two tasks, as where the first fails: it kills the other."""
    srun = 'shift; [[ $1 == --* ]] && shift\n"$@"; first=$?\n((first)) && exit 143\nexit 0\n'
    script(tmp_path / "srun", srun)
    script(tmp_path / "scontrol", f'echo "$@" >>{tmp_path}/requeued\n')
    script(tmp_path / "jetflow", f"exit {status}\n")
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    command = (LAUNCH / "slurm.sbatch", "jetflow", "train", "--workdir=a run")
    tries = 6 if status in (1, 137) else 1  # without a checkpoint, the fifth crash is the last
    for number in range(1, tries + 1):
        requeued = tmp_path / "requeued"
        requeued.unlink(missing_ok=True)
        assert run(*command, env=env, cwd=tmp_path).returncode == status
        assert requeued.exists() == (again and number != 5)


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
def slurm(tmp_path, compilation_cache):
    """The environment of a Slurm of one node; skips, and says why, where it cannot start."""
    path = f"{tmp_path}:{os.environ['PATH']}:/usr/sbin"
    daemons = ["slurmctld", "slurmd"]
    if missing := [name for name in [*daemons, "sbatch"] if not shutil.which(name, path=path)]:
        pytest.skip(f"{', '.join(missing)} not found; in Debian: apt install slurm-wlm")
    ports = []
    for name in ("state", "spool"):
        (tmp_path / name).mkdir()
        with socket.socket() as free:
            free.bind(("localhost", 0))
            ports.append(free.getsockname()[1])
    host, user = socket.gethostname().split(".")[0], run("id", "-un").stdout.strip()
    conf = SLURM_CONF.format(host=host, user=user, ports=ports, folder=tmp_path)
    (tmp_path / "slurm.conf").write_text(conf)
    env = tiny_runs.environment(PATH=path, SLURM_CONF=str(tmp_path / "slurm.conf"))
    for daemon in daemons:
        run(daemon, env=env)
    try:
        wait_for(lambda: "idle" in run("sinfo", "--noheader", env=env).stdout, "Slurm", 60)
        yield env
    finally:
        run("scancel", "--user", user, env=env)
        wait_for(lambda: not run("squeue", "--noheader", env=env).stdout, "the queue to be empty")
        for pid in tmp_path.glob("slurm*.pid"):
            os.kill(int(pid.read_text()), signal.SIGTERM)


@pytest.mark.slow
def test_slurm_runs_two_tasks_and_queues_them_again(slurm, tmp_path, data_dir):
    workdir = tmp_path / "runs" / "tiny"
    fields = {"train__steps": 300, "train__checkpoint_every": 20, "train__eval_every": 0,
              "train__sample_every": 0, "eval__guidance": 0.0, "eval__denoise": False}  # fmt: skip
    script(tmp_path / "jetflow", f'exec {sys.executable} -m jetflow "$@"\n')
    arguments = tiny_runs.arguments("tarflow", workdir, **fields)
    command = [LAUNCH / "slurm.sbatch", "--parsable", "--ntasks=2", "jetflow", *arguments]
    number = run(*command, env=slurm, cwd=tmp_path, check=True).stdout.strip()
    log = tmp_path / f"jetflow-{number}.log"
    wait_for(lambda: any((workdir / "checkpoints").glob("[0-9]*")), "a checkpoint")
    assert "2 x" in log.read_text()
    run("scancel", "--signal=TERM", number, env=slurm)  # as a time limit or a preemption does
    wait_for(lambda: "done: step 300" in log.read_text(), "the end")
    for text in ("status 143", "all saved", "resumed at step"):
        assert text in log.read_text()

    def shown():
        return run("scontrol", "show", "job", number, env=slurm).stdout

    wait_for(lambda: "JobState=COMPLETED" in shown(), "the end of the job")
    assert "Restarts=1" in shown()
