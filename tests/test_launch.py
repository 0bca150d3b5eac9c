"""restart.sh, and what the launchers' README says can be typed."""

import dataclasses
import math
import os
import pty
import re
import shlex
import signal
import subprocess
import sys

import pytest
import tiny_runs
from launchers import LAUNCH, load_gke, run, script, wait_for, without_slurm

from jetflow import cli, sharding
from jetflow.cli.flags import parse

GKE = load_gke()


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
    ended = []

    def has_ended():
        ended[:] = os.waitpid(pid, os.WNOHANG)
        return ended[0] == pid

    try:
        wait_for(has_ended, "the end")
    finally:
        os.close(terminal)
    assert os.waitstatus_to_exitcode(ended[1]) == 143
    assert (tmp_path / "got").read_text() == "SIGTERM"


# The README

README = (LAUNCH / "README.md").read_text()


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


@pytest.mark.parametrize("command", documented(), ids=lambda command: " ".join(command)[:60])
def test_documented_commands_are_taken(capsys, command):
    where = command.index("jetflow") if "jetflow" in command else len(command)
    words = [*command[:where], "--dry-run", *command[where:]]
    if words[0] == "python":
        assert GKE.main(words[2:]) == 0
        assert "kind: JobSet" in capsys.readouterr().out
    else:
        ended = run(*words, env=without_slurm(), cwd=tiny_runs.ROOT)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.startswith(("gcloud compute tpus", "bash -o pipefail -c", "sbatch "))


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
def test_documented_meshes_fit(monkeypatch, command):
    monkeypatch.chdir(tiny_runs.ROOT)
    slices = int(flag(command, "--slices", 1))
    if "sbatch" in command[0]:
        each = int(flag(command, "--nodes", 0)) * int(flag(command, "--ntasks-per-node", 0))
    else:  # `run` is of the TPU VM that was made above it
        each = math.prod(GKE.chips_and_hosts(flag(command, "--topology", "v5e:4x4")))
    devices = [Device(number, number, number // each) for number in range(slices * each)]
    arguments = command[command.index("jetflow") + 1 :]
    options = parse(*cli.find(arguments))
    sizes = {axis: options.config.mesh[axis] for axis in sharding.AXES}
    mesh = sharding.make_mesh(**sizes, devices=devices)
    sharding.check_batch("config.train.batch_size", options.config.train.batch_size, mesh)
    sharding.check_batch("config.eval.batch_size", options.config.eval.batch_size, mesh)
    assert str(options.workdir).startswith(("/bucket/", "/shared/"))


def test_readme_names_every_launcher():
    for path in LAUNCH.iterdir():
        assert path.name == "README.md" or path.name in README or path.name == "__pycache__"
