"""Runs jetflow on TPU slices of a GKE cluster, as a JobSet. See launch/README.md.

python launch/gke.py --name NAME --topology v5e:4x4 --image IMAGE jetflow train --config …
"""

import argparse
import math
import shlex
import subprocess
import sys
from typing import Any

import yaml

from jetflow.tools.plan import devices as tpus
from jetflow.types import UsageError

# The node label cloud.google.com/gke-tpu-accelerator, and Google's names for chips of a generation.
ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}
COMPUTE_TYPES = {"v4": ("v4", 2), "v5e": ("v5litepod", 1), "v5p": ("v5p", 2), "v6e": ("v6e", 1)}
SINGLE_HOSTS = {"1x1": 1, "2x4": 8}  # chips of slices with one host other than four
BUCKET = "/bucket"
# A checkpoint is written under another name, then renamed; by default gcsfuse renames no folder.
MOUNT_OPTIONS = "implicit-dirs,rename-dir-limit=200000"
SERVICE_ACCOUNT = "jetflow"  # of Kubernetes, which may use the bucket
GRACE_SECONDS = 300  # to save, when a pod is told to go
RESTARTS = 100  # in all; what ended them, and whether there was progress, a JobSet does not know
ENDING = [2, 3]  # exit statuses of bad input, and of a loss that is not finite
TOOLKIT_RESTARTS = 10  # by `gcluster`, which starts bad input again as well


def chips_and_hosts(topology: str) -> tuple[int, int]:
    """Chips of a host, and hosts of a slice."""
    shape = topology.partition(":")[2]
    chips = math.prod(map(int, shape.split("x")))
    of_host = SINGLE_HOSTS.get(shape, 4)
    return of_host, chips // of_host


def job_set(
    name: str, topology: str, slices: int, image: str, command: list[str], bucket: str | None
) -> dict[str, Any]:
    """The JobSet: a job for each slice, a pod for each host.

    A lost pod restarts all of them, in the same workdir; bad input does not.
    """
    generation, _, shape = topology.partition(":")
    chips, hosts = chips_and_hosts(topology)
    container: dict[str, Any] = {
        "name": "jetflow",
        "image": image,
        "command": command,
        "env": [{"name": "JETFLOW_PROCESSES", "value": str(hosts * slices)}],
        "ports": [{"containerPort": 8471}, {"containerPort": 8080}],
        "resources": {"limits": {"google.com/tpu": chips}},
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": ACCELERATORS[generation],
            "cloud.google.com/gke-tpu-topology": shape,
        },
        "containers": [container],
    }
    metadata = {}
    if bucket:
        metadata = {"annotations": {"gke-gcsfuse/volumes": "true"}}
        container["volumeMounts"] = [{"name": "bucket", "mountPath": BUCKET}]
        volume = {"bucketName": bucket, "mountOptions": MOUNT_OPTIONS}
        driver = {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": volume}
        pod["serviceAccountName"] = SERVICE_ACCOUNT
        pod["volumes"] = [{"name": "bucket", "csi": driver}]
    ends = {"action": "FailJob", "onExitCodes": {"operator": "In", "values": ENDING}}
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [ends]},
        "template": {"metadata": metadata, "spec": pod} if metadata else {"spec": pod},
    }
    fails = {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    one_pool = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name, "annotations": one_pool},
        "spec": {
            "failurePolicy": {"maxRestarts": RESTARTS, "rules": [fails]},
            "replicatedJobs": [{"name": "slice", "replicas": slices, "template": {"spec": job}}],
        },
    }


def gcluster(
    name: str, topology: str, slices: int, image: str, command: list[str], bucket: str | None
) -> str | None:
    """The same by Google's Cluster Toolkit, for a generation whose name there we know.

    It leaves out that bad input ends the JobSet, and the option of the mount that lets gcsfuse
    rename folders.
    """
    generation, _, shape = topology.partition(":")
    if generation not in COMPUTE_TYPES:
        return None
    prefix, per_chip = COMPUTE_TYPES[generation]
    size = per_chip * math.prod(map(int, shape.split("x")))
    options = {
        "--cluster": "CLUSTER",
        "--location": "LOCATION",
        "--name": name,
        "--compute-type": f"{prefix}-{size}",
        "--topology": shape,
        "--num-slices": str(slices),
        "--image": image,
        "--env": f"JETFLOW_PROCESSES={chips_and_hosts(topology)[1] * slices}",
        "--restarts": str(TOOLKIT_RESTARTS),
        "--grace-period": f"{GRACE_SECONDS}s",
        "--command": shlex.join(command),
    }
    if bucket:
        options |= {"--mount": f"gs://{bucket}:{BUCKET}:rw", "--service-account": SERVICE_ACCOUNT}
    return shlex.join(["gcluster", "job", "submit", *(x for pair in options.items() for x in pair)])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="launch/gke.py", description="Run jetflow on TPU slices of a GKE cluster."
    )
    parser.add_argument("--name", required=True, help="of the JobSet")
    parser.add_argument("--topology", required=True, help="GENERATION:SHAPE, as in v5e:4x4")
    parser.add_argument("--slices", type=int, default=1, help="so many of that topology")
    parser.add_argument("--image", required=True, help="a container image with jetflow in it")
    parser.add_argument("--bucket", help=f"mounted at {BUCKET} by gcsfuse: workdir and data")
    parser.add_argument("--dry-run", action="store_true", help="print, do nothing")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="jetflow train --config …")
    options = parser.parse_args(argv)
    try:
        if tpus.find(options.topology).chip:
            raise UsageError(f"{options.topology} is of GPUs; expected TPUs, as in v5e:4x4")
        if options.slices < 1:
            raise UsageError(f"--slices is {options.slices}; expected 1 or more")
        if options.command[:1] != ["jetflow"]:
            raise UsageError("no command; expected one such as jetflow train --config …")
    except UsageError as error:
        print(f"gke.py: {error}", file=sys.stderr)
        return 2
    run = (options.name, options.topology, options.slices, options.image, options.command,
           options.bucket)  # fmt: skip
    manifest = yaml.safe_dump(job_set(*run), sort_keys=False)
    if not options.dry_run:
        return subprocess.run(["kubectl", "apply", "-f", "-"], input=manifest, text=True).returncode
    print(f"# kubectl apply -f - with\n{manifest}", end="")
    if line := gcluster(*run):
        print("# or, by Google's Cluster Toolkit, with the names of your CLUSTER and its LOCATION;")
        print("# it starts bad input again as well, and mounts a bucket without that option:")
        print(f"# {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
