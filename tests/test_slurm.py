"""A Slurm of one node, for real: the tasks of slurm.sbatch join by themselves, and go on."""

import getpass
import os
import shutil
import signal
import socket
import sys

import pytest
import tiny_runs
from test_launch import LAUNCH, PATH, run, script


@pytest.fixture
def slurm(tmp_path, compilation_cache):
    """The environment of a Slurm of one node; skips, and says why, where it cannot start."""
    path, conf = f"{tmp_path}:{PATH}:/usr/sbin", f"{tmp_path}/slurm.conf"
    env = tiny_runs.environment(PATH=path, SLURM_CONF=conf)
    if not shutil.which("slurmctld", path=env["PATH"]):
        pytest.skip("slurmctld not found; in Debian: apt install slurm-wlm")
    host, user = socket.gethostname().split(".")[0], getpass.getuser()
    conf = (
        f"ClusterName=test SlurmctldHost={host}(127.0.0.1) SlurmUser={user} SlurmdUser={user} "
        "AuthType=auth/none AuthInfo=cred_expire=5 CredType=cred/none KillWait=60 "
        "ProctrackType=proctrack/linuxproc "
        f"SlurmctldPort={tiny_runs.free_port()} SlurmctldPidFile={tmp_path}/slurmctld.pid "
        f"SlurmdPort={tiny_runs.free_port()} SlurmdPidFile={tmp_path}/slurmd.pid "
        f"StateSaveLocation={tmp_path} SlurmdSpoolDir={tmp_path}/spool"
    ).replace(" ", "\n")
    conf += f"\nNodeName={host} NodeAddr=127.0.0.1 CPUs=2\n"
    conf += "PartitionName=all Nodes=ALL Default=YES\n"
    (tmp_path / "slurm.conf").write_text(conf)
    for daemon in ("slurmctld", "slurmd"):
        run(daemon, env=env)
    try:
        said = lambda name: run(name, "--noheader", env=env).stdout  # noqa: E731
        tiny_runs.wait_for(lambda: "idle" in said("sinfo"), "Slurm", 60)
        yield env
    finally:
        run("scancel", "--user", user, env=env)
        tiny_runs.wait_for(lambda: not said("squeue"), "the queue to be empty")
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
    tiny_runs.wait_for(lambda: any((workdir / "checkpoints").glob("[0-9]*")), "a checkpoint")
    assert "2 x" in log.read_text()
    run("scancel", "--signal=TERM", number, env=slurm)  # as a time limit or a preemption does
    tiny_runs.wait_for(lambda: "done: step 300" in log.read_text(), "the end")
    assert all(text in log.read_text() for text in ("told to stop", "all saved", "resumed at step"))
    queue = lambda: run("squeue", "--noheader", env=slurm).stdout  # noqa: E731
    tiny_runs.wait_for(lambda: not queue(), "the end of the job")
    assert "Restarts=1" in run("scontrol", "show", "job", number, env=slurm).stdout
