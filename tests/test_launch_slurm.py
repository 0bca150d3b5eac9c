"""slurm.sbatch with stand-ins of Slurm's commands, and on a real Slurm of one node."""

import dataclasses
import os
import shlex
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import tiny_runs
from launchers import JETFLOW_HERE, LAUNCH, run, script, wait_for, without_slurm


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


# srun of two tasks, as it is where the first fails: the other is killed, and has a higher status.
SRUN = """\
shift
"$@"; first=$?
((first)) && exit 143
exit 0
"""


@pytest.fixture
def job(tmp_path):
    """A function: what jetflow ends with, and does -> the job's status, and if it is requeued."""
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
def slurm(tmp_path, compilation_cache):
    """The environment of a Slurm of one node; skips, and says why, where it cannot start."""
    path = f"{tmp_path}:{os.environ['PATH']}:/usr/sbin"
    env = tiny_runs.environment(PATH=path)
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

    def wait_for_log(self, text):
        wait_for(lambda: self.log.exists() and text in self.log.read_text(), text)


@pytest.fixture
def submit(slurm, tmp_path):
    """A function: the arguments of jetflow, and what that is -> the job."""

    def submitted(*arguments):
        script(tmp_path / "jetflow", JETFLOW_HERE)
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
    wait_for(lambda: job.shown()["JobState"] == "COMPLETED", "the end of the job")
    assert job.shown()["Restarts"] == "1"
    assert "resumed at step" in job.log.read_text()
