"""The launchers: on a stand-in of gcloud whose workers are folders, and on a real Slurm."""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import tiny_runs
import yaml

LAUNCH = tiny_runs.ROOT / "launch"
TIMEOUT = 240  # seconds


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


# restart.sh


def restarted(tmp_path, statuses, **variables):
    """restart.sh on a command that ends with these statuses, one after another."""
    (tmp_path / "statuses").write_text("\n".join(map(str, statuses)) + "\n")
    command = tmp_path / "command"
    command.write_text(
        "#!/usr/bin/env bash\n"
        f"cd {tmp_path}; echo ran >>runs; status=$(head -n 1 statuses); sed -i 1d statuses\n"
        "exit $status\n"
    )
    command.chmod(0o755)
    env = os.environ | {"PAUSE": "0", "STATUS_FILE": str(tmp_path / "status")} | variables
    ended = run(LAUNCH / "restart.sh", command, env=env)
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


def test_crashes_one_after_another_end_it(tmp_path):
    ended, runs = restarted(tmp_path, [1] * 9)
    assert (ended.returncode, runs) == (1, 3)
    assert "three crashes in a row" in ended.stderr
    (tmp_path / "runs").unlink()
    ended, runs = restarted(tmp_path, [1] * 4 + [0], QUICK="0")  # each ran for long
    assert (ended.returncode, runs) == (0, 5)


def test_sigterm_is_passed_on_and_waited_for(tmp_path):
    command = tmp_path / "command"
    command.write_text(
        "#!/usr/bin/env bash\ntrap 'sleep 0.5; touch saved; exit 143' TERM\ntouch up\n"
        "while true; do sleep 0.1; done\n"
    )
    command.chmod(0o755)
    process = subprocess.Popen([LAUNCH / "restart.sh", command], cwd=tmp_path)
    wait_for((tmp_path / "up").exists, "the command")
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert (tmp_path / "saved").exists()


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
    (tmp_path / "gcloud").write_text('#!/usr/bin/env bash\nprintf "%s\\0" "$@" >"$SAID"\n')
    (tmp_path / "gcloud").chmod(0o755)
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
    assert "gcsfuse" in tpu_vm("setup", "pod", "--bucket", "mine", "--dry-run").stdout
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


# gcloud, as far as tpu_vm.sh needs it: workers are folders, and their processes run here.
GCLOUD = """\
#!/usr/bin/env bash
shift 3; verb=$1; subject=$2; shift 2
echo "$verb" >>"$CLOUD/verbs"
workers=(0 1) command=''
for word; do
  case $word in --worker=[0-9]) workers=("${word#*=}") ;; --command=*) command=${word#*=} ;; esac
done
case $verb in
  create) echo READY >"$CLOUD/state" ;;
  delete) rm -r "$CLOUD/state" "$CLOUD"/worker* ;;
  describe) cat "$CLOUD/state" ;;
  scp)
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
#!/usr/bin/env bash
case $1 in
  venv) mkdir -p .venv/bin; echo "export PATH=$ENVIRONMENT:\\$PATH" >.venv/bin/activate ;;
  pip) echo "$*" >installed ;;
esac
"""


@pytest.fixture
def cloud(tmp_path, data_dir):
    """The environment in which `gcloud` is the stand-in with two workers that are one run."""
    if not (tiny_runs.ROOT / ".git").exists():
        pytest.skip("not a clone of the repository, which `setup` copies by git")
    for name, text in {"gcloud": GCLOUD, "uv": UV}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "jetflow").write_text(
        f'#!/usr/bin/env bash\nexec {sys.executable} -m jetflow.cli "$@"\n'
    )
    (tmp_path / "jetflow").chmod(0o755)
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
    for pid in tmp_path.glob("worker*/jetflow/run.pid"):
        run("pkill", "-KILL", "-g", pid.read_text().strip())


@pytest.mark.slow
def test_a_pod_trains_loses_a_worker_stops_and_is_preempted(cloud, tmp_path):
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
    verbs = (tmp_path / "verbs").read_text().split()
    assert verbs.count("create") == 2 and verbs.count("delete") == 1
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
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "mine"
    assert pod["containers"][0]["volumeMounts"][0]["mountPath"] == "/bucket"
    assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}


def test_gcluster_line(manifest):
    command = ["jetflow", "train", "--workdir", "/bucket/a b"]
    _, text = manifest("--topology=v5e:4x4", command=command)
    line = text.splitlines()[-1]
    assert line.startswith("# gcluster job submit --name jet --compute-type v5litepod-16 --image ")
    assert line.endswith("""--command 'jetflow train --workdir '"'"'/bucket/a b'"'"''""")
    assert "gcluster" not in manifest("--topology=v5e:4x4", "--slices=2")[1]


def test_apply_gives_kubectl_the_manifest(tmp_path):
    (tmp_path / "kubectl").write_text(f"#!/bin/sh\necho $* >{tmp_path}/said; cat >{tmp_path}/in\n")
    (tmp_path / "kubectl").chmod(0o755)
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


def test_slurm_dry_run_and_bad_input():
    command = ["jetflow", "train", "--workdir", "a b"]
    said = run(LAUNCH / "slurm.sbatch", "--dry-run", *command).stdout
    assert "sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8" in said
    assert r"srun --kill-on-bad-exit=1 jetflow train --workdir a\ b" in said
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    outside = run(LAUNCH / "slurm.sbatch", *command, env=env)
    assert outside.returncode == 2 and "this is a job script: sbatch" in outside.stderr
    assert run(LAUNCH / "slurm.sbatch", "train", env=env).returncode == 2


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
def slurm(tmp_path, data_dir):
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
        for pid in tmp_path.glob("slurm*.pid"):
            os.kill(int(pid.read_text()), signal.SIGTERM)


@pytest.mark.slow
def test_slurm_runs_two_tasks_and_queues_them_again(slurm, tmp_path):
    workdir = tmp_path / "runs" / "tiny"
    fields = {"train__steps": 400, "train__checkpoint_every": 20, "train__eval_every": 0,
              "train__sample_every": 0, "eval__guidance": 0.0, "eval__denoise": False}  # fmt: skip
    command = tiny_runs.arguments("tarflow", workdir, **fields)
    (tmp_path / "jetflow").write_text(
        f'#!/usr/bin/env bash\nexec {sys.executable} -m jetflow.cli "$@"\n'
    )
    (tmp_path / "jetflow").chmod(0o755)
    submitted = run(
        "sbatch", "--parsable", "--ntasks=2", LAUNCH / "slurm.sbatch", "jetflow", *command,
        env=slurm, cwd=tmp_path,
    )  # fmt: skip
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.strip()
    log = tmp_path / f"jetflow-{job}.log"

    def state():
        shown = run("scontrol", "show", "job", job, env=slurm).stdout
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def said(text):
        if state()["JobState"] in ("FAILED", "CANCELLED"):
            pytest.fail(log.read_text())
        return log.exists() and text in log.read_text()

    wait_for(lambda: any((workdir / "checkpoints").glob("[0-9]*")), "a checkpoint")
    assert "2 x" in log.read_text()
    run("scancel", "--signal=TERM", job, env=slurm)  # what a time limit or a preemption sends
    wait_for(lambda: said("queueing the job again"), "the end of the first part")
    assert "all saved" in log.read_text()
    wait_for(lambda: said("done: step 400"), "the end")
    wait_for(lambda: state()["JobState"] == "COMPLETED", "Slurm to see it")
    assert state()["Restarts"] == "1"
    assert "resumed at step" in log.read_text()


# The scripts themselves


def test_readme_names_every_launcher():
    text = (LAUNCH / "README.md").read_text()
    for path in LAUNCH.iterdir():
        assert path.name == "README.md" or path.name in text or path.name == "__pycache__"
