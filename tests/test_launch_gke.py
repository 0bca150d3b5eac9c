"""The JobSet that gke.py makes, parsed, and the line for Google's Cluster Toolkit."""

import os
import shlex
import sys

import pytest
import tiny_runs
import yaml
from launchers import LAUNCH, load_gke, run, script

GKE = load_gke()
JETFLOW = ("jetflow", "train", "--config", "configs/photos_jet.py")


@pytest.fixture
def manifest(capsys):
    """A function: options -> the manifest that a dry run prints, and all that it prints."""

    def dry_run(*options, command=JETFLOW):
        given = ["--name=jet", "--image=registry/jetflow:1", "--dry-run", *options]
        assert GKE.main([*given, *command]) == 0
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
def test_gke_bad_input(capsys, arguments, message):
    assert GKE.main(["--name=jet", "--image=i", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
