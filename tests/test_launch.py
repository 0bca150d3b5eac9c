"""The launchers: restart.sh and slurm.sbatch run for real, YAML by its schema; their README."""

import getpass
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import kubernetes_validate
import pytest
import tiny_runs
import yaml

from jetflow import cli
from jetflow.cli.flags import parse

LAUNCH = tiny_runs.ROOT / "launch"
PATH = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"


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


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


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
    env = os.environ | {"PATH": PATH, "PAUSE": "0", "STATUS_FILE": str(tmp_path / "status")}
    command = (LAUNCH / "restart.sh", tmp_path / "command", "--workdir", tmp_path / "a run")
    assert run(*command, env=env).returncode == ends
    assert (tmp_path / "status").read_text() == f"{ends}\n"
    assert (tmp_path / "runs").read_text().count("ran") == runs


SIGNALS = """\
got=; trap 'got+=INT' INT; trap 'got+=TERM' TERM; touch up
until [[ $got ]]; do sleep 0.1; done; sleep 1; echo $got >got; exit 143
"""


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_the_command_gets_one_sigterm_and_is_waited_for(tmp_path, sent):
    """A terminal, too, sends Ctrl-C to a whole group."""
    command = [LAUNCH / "restart.sh", "bash", "-c", SIGNALS]
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True)
    wait_for((tmp_path / "up").exists, "the command")
    os.killpg(process.pid, sent)
    assert process.wait() == 143
    assert (tmp_path / "got").read_text() == "TERM\n"


# GKE and SkyPilot


@pytest.mark.parametrize(
    ("topology", "slices", "label", "chips", "hosts"),
    [
        ("v4:2x2x4", 1, "tpu-v4-podslice", 4, 4),
        ("v5e:1x1", 1, "tpu-v5-lite-podslice", 1, 1),
        ("v5e:2x4", 2, "tpu-v5-lite-podslice", 8, 1),
        ("v6e:4x8", 2, "tpu-v6e-slice", 4, 8),
        ("tpu7x:2x2x2", 1, "tpu7x", 4, 2),
    ],
)
def test_job_set(topology, slices, label, chips, hosts):
    command = ["jetflow", "train", "--workdir", 'gs://b/a "b" $image']
    options = ["--name=jet", "--image=i/j:1", f"--topology={topology}", f"--slices={slices}"]
    found = yaml.safe_load(run(sys.executable, LAUNCH / "gke.py", *options, *command).stdout)
    [replicated] = found["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "jet"}}
    kubernetes_validate.validate(job | replicated["template"], "1.33", strict=True)
    spec = replicated["template"]["spec"]
    assert [replicated["replicas"], spec["parallelism"], spec["completions"]] == [
        slices,
        hosts,
        hosts,
    ]
    pod = spec["template"]["spec"]
    labels = {"accelerator": label, "topology": topology.partition(":")[2]}
    assert pod["nodeSelector"] == {f"cloud.google.com/gke-tpu-{k}": v for k, v in labels.items()}
    [container] = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert (container["command"], container["image"]) == (command, "i/j:1")


@pytest.mark.parametrize("gpus", [True, False])
def test_sky_joins_nodes_of_gpus_alone(tmp_path, gpus):
    """SkyPilot counts the hosts of a TPU pod slice as nodes too, but by an order of its own."""
    script(tmp_path / "nvidia-smi", "" if gpus else "exit 1")
    script(tmp_path / "jetflow", 'echo "${JAX_COORDINATOR_ADDRESS:-} ${JAX_PROCESS_ID:-} $*"')
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    shutil.copytree(LAUNCH, tmp_path / "launch")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    env = {"PATH": f"{tmp_path}:{PATH}", "COMMAND": "train --workdir w", "SKYPILOT_NUM_NODES": "2",
           "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}  # fmt: skip
    said = run("bash", "-c", task["run"], cwd=tmp_path, env=env).stdout
    assert said.split() == ["10.0.0.1:8476", "1"] * gpus + ["train", "--workdir", "w"]


# The README


BLOCKS = re.findall(r"```bash\n(.*?)```", (LAUNCH / "README.md").read_text(), flags=re.DOTALL)
LINES = "".join(BLOCKS).replace("\\\n", " ").splitlines()


@pytest.mark.parametrize("line", [line for line in LINES if "config" in line or "tpu_vm" in line])
def test_documented_commands_are_taken(monkeypatch, line):
    monkeypatch.chdir(tiny_runs.ROOT)
    words = shlex.split(line.partition("|")[0], comments=True)
    if words[0] == "launch/tpu_vm.sh":
        assert run(*words[:3], "--dry-run", *words[3:]).stdout.startswith("gcloud compute tpus")
    if words[0] == "python":
        assert "kind: JobSet" in run(sys.executable, *words[1:]).stdout
    if train := " ".join(words).partition("train --config")[2]:
        parse(*cli.find(["train", "--config", *train.split()]))


# slurm.sbatch


@pytest.mark.parametrize(("status", "again"), [(0, False), (2, False), (143, True)])
def test_slurm_queues_again_what_was_told_to_stop(tmp_path, status, again):
    script(tmp_path / "srun", 'shift 2; "$@"')
    script(tmp_path / "scontrol", f'echo "$@" >>{tmp_path}/requeued\n')
    script(tmp_path / "jetflow", f"exit {status}\n")
    env = os.environ | {"PATH": f"{tmp_path}:{PATH}", "SLURM_JOB_ID": "7"}
    command = ("bash", LAUNCH / "slurm.sbatch", "jetflow", "train", "--workdir=a run")
    assert run(*command, env=env, cwd=tiny_runs.ROOT).returncode == status
    assert (tmp_path / "requeued").exists() == again


@pytest.fixture
def slurm(tmp_path, compilation_cache):
    """The environment of a Slurm of one node; skips, and says why, where it cannot start."""
    env = tiny_runs.environment(
        PATH=f"{tmp_path}:{PATH}:/usr/sbin", SLURM_CONF=f"{tmp_path}/slurm.conf"
    )
    if not shutil.which("slurmctld", path=env["PATH"]):
        pytest.skip("slurmctld not found; in Debian: apt install slurm-wlm")
    host, user = socket.gethostname().split(".")[0], getpass.getuser()
    conf = (
        f"ClusterName=test SlurmctldHost={host}(127.0.0.1) SlurmUser={user} SlurmdUser={user} "
        "AuthType=auth/none AuthInfo=cred_expire=5 CredType=cred/none KillWait=60 "
        "ProctrackType=proctrack/linuxproc "
        f"SlurmctldPort={free_port()} SlurmctldPidFile={tmp_path}/slurmctld.pid "
        f"SlurmdPort={free_port()} SlurmdPidFile={tmp_path}/slurmd.pid "
        f"StateSaveLocation={tmp_path} SlurmdSpoolDir={tmp_path}/spool"
    ).replace(" ", "\n")
    conf += (
        f"\nNodeName={host} NodeAddr=127.0.0.1 CPUs=2\nPartitionName=all Nodes=ALL Default=YES\n"
    )
    (tmp_path / "slurm.conf").write_text(conf)
    for daemon in ("slurmctld", "slurmd"):
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
    shutil.copytree(LAUNCH, tmp_path / "launch")
    arguments = tiny_runs.arguments("tarflow", workdir, **fields)
    command = ["sbatch", "--parsable", "--ntasks=2", "launch/slurm.sbatch", "jetflow", *arguments]
    number = run(*command, env=slurm, cwd=tmp_path, check=True).stdout.strip()
    log = tmp_path / f"jetflow-{number}.log"
    wait_for(lambda: any((workdir / "checkpoints").glob("[0-9]*")), "a checkpoint")
    assert "2 x" in log.read_text()
    run("scancel", "--signal=TERM", number, env=slurm)  # as a time limit or a preemption does
    wait_for(lambda: "done: step 300" in log.read_text(), "the end")
    assert all(text in log.read_text() for text in ("told to stop", "all saved", "resumed at step"))
    wait_for(lambda: not run("squeue", "--noheader", env=slurm).stdout, "the end of the job")
    assert "Restarts=1" in run("scontrol", "show", "job", number, env=slurm).stdout
