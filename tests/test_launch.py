"""The launchers: restart.sh and slurm.sbatch run for real, YAML by its schema; their README."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

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
    status = "status=$(head -n 1 statuses); sed -i 1d statuses"
    script(
        tmp_path / "command", f"cd {tmp_path}; echo ran >>runs; {status}\n{work}\nexit $status\n"
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
    tiny_runs.wait_for((tmp_path / "up").exists, "the command")
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
    words = ["jet", topology, slices, "i/j:1", *command]
    found = yaml.safe_load(run(sys.executable, LAUNCH / "gke.py", *words).stdout)
    [replicated] = found["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "jet"}}
    kubernetes_validate.validate(job | replicated["template"], "1.33", strict=True)
    spec = replicated["template"]["spec"]
    numbers = [replicated["replicas"], spec["parallelism"], spec["completions"]]
    assert numbers == [slices, hosts, hosts]
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
