"""How processes find each other: by hand, by launchers, and by what the hosts of a pod know."""

import contextlib
import http.server
import os
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny_runs
from jax._src.clusters import cloud_tpu_cluster
from tiny_runs import free_port

from jetflow import rendezvous
from jetflow.rendezvous import Place, find_place
from jetflow.types import Interruption, UsageError

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "{}",
    "SLURM_LOCALID": "{}",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "{}",
    "OMPI_COMM_WORLD_LOCAL_RANK": "{}",
}
TPU = {"JAX_FORCE_TPU_INIT": "1", "JAX_PLATFORMS": "cpu"}
SLICE = {
    "TPU_WORKER_HOSTNAMES": "localhost,localhost",
    "TPU_WORKER_ID": "{}",
    "MEGASCALE_COORDINATOR_ADDRESS": "",
    "MEGASCALE_NUM_SLICES": "1",
    "MEGASCALE_SLICE_ID": "0",
}
SLICES = {
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "{}",
}
HOSTS = {"tpu-env": "ZONE: 'a'", "worker-network-endpoints": "a:b:127.0.0.1,c:d:127.0.0.1"}


BY_HAND = {
    "JAX_COORDINATOR_ADDRESS": "localhost:1",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "{}",
}


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """No trace of a launcher."""
    for name in os.environ:
        if re.match("SLURM_|OMPI_|JAX_(COORD|NUM_PROC|PROCESS)|TPU_|MEGASCALE|KUBE|JOB_", name):
            monkeypatch.delenv(name)


def set_all(monkeypatch, variables, number):
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(number))


@contextlib.contextmanager
def metadata(attributes):
    """A metadata server; the address at which it answers."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            value = attributes.get(self.path.rpartition("/")[2])
            self.send_response(404 if value is None else 200)
            self.end_headers()
            self.wfile.write((value or "").encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


# Joins, and says where it is.
PROGRAM = """
import os, sys, jax
if sys.argv[1:]:
    os.environ.pop("TPU_SKIP_MDS_QUERY")  # JAX has set it, as this machine has no TPU
from jetflow import hosts
with hosts.joined({}, hosts.ProcessOptions(), saves_at_signals=False):
    print(jax.process_index(), "of", jax.process_count(), file=sys.__stdout__, flush=True)
"""


@pytest.mark.parametrize(
    ("environment", "arguments"),
    [(SLURM, []), (OPEN_MPI, []), (TPU | SLICE, []), (TPU | SLICES, []), (TPU, ["asks"])],
    ids=["Slurm", "Open MPI", "slice on GKE", "slices on GKE", "TPU VMs"],
)
def test_two_processes_join(environment, arguments):
    with contextlib.ExitStack() as stack:
        group, port = [], str(free_port())
        for number in map(str, (0, 1)):
            server = stack.enter_context(metadata(HOSTS | {"agent-worker-number": number}))
            variables = {name: value.format(number) for name, value in environment.items()}
            variables |= {"GCE_METADATA_IP": server, "JAX_COORDINATOR_PORT": port}
            group.append(tiny_runs.start(arguments, ["-c", PROGRAM], **variables))
        for number, process in enumerate(group):
            output, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors
            assert f"{number} of 2" in output


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        (SLURM, (1, 2)),
        (OPEN_MPI, (1, 2)),
        (SLICE, (1, 2)),
        (SLICES, (1, 2)),
        (BY_HAND, (1, 2)),
        (BY_HAND | {"JAX_NUM_PROCESSES": "1"}, None),
        (SLURM | {"JAX_NUM_PROCESSES": "1"}, None),  # alone on purpose
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),  # a shell on the first node
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, None),  # a batch script
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        (SLICE | {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
    ],
)
def test_a_process_knows_its_place(monkeypatch, environment, place):
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    set_all(monkeypatch, environment, 1)
    found = find_place(on_pods=True)
    assert (found and (found.number, found.count)) == place


def test_what_a_pod_does_not_start_everywhere_waits_for_nobody(monkeypatch):
    """A report on one host of a pod; but a launcher starts all tasks alike."""
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    set_all(monkeypatch, SLICE, 1)
    assert find_place(on_pods=False) is None
    set_all(monkeypatch, SLURM, 1)
    assert find_place(on_pods=False)


def test_a_machine_of_no_pod_asks_no_network(monkeypatch):
    def fail(*_, **__):
        pytest.fail("it used the network")

    for name in ("connect", "sendto"):
        monkeypatch.setattr(socket.socket, name, fail)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, fail)
    assert find_place(on_pods=True) is None


@pytest.mark.parametrize(
    "environment",
    [
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},  # of Open MPI 5
        BY_HAND | {"JAX_PROCESS_ID": "2"},
        BY_HAND | {"JAX_COORDINATOR_ADDRESS": "localhost"},
        {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2"},
        {"JAX_COORDINATOR_ADDRESS": "localhost:1"},
        {"JAX_PROCESS_ID": "1"},
    ],
)
def test_one_of_several_never_goes_alone(monkeypatch, environment):
    set_all(monkeypatch, environment, 1)
    with pytest.raises(UsageError, match="one of several"):
        find_place(on_pods=True)


def test_a_pod_that_does_not_answer_is_no_pod_of_one(monkeypatch):
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{free_port()}")
    with pytest.raises(Interruption, match="one of a pod"):
        find_place(on_pods=True)


@pytest.mark.parametrize(
    ("changes", "devices"),
    [
        ({}, [1]),
        ({"SLURM_STEP_NUM_NODES": "2"}, None),  # one task a node
        ({"CUDA_VISIBLE_DEVICES": "0"}, None),  # --gpus-per-task=1
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, [1]),
        ({"JAX_LOCAL_DEVICE_IDS": "0"}, None),  # which JAX reads itself
    ],
)
def test_the_devices_of_a_task(monkeypatch, changes, devices):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    set_all(monkeypatch, SLURM | changes, 1)
    assert find_place(on_pods=True).devices == devices


@pytest.fixture
def meeting(monkeypatch):
    """A function: some of three processes meet; the address, or the error, of each."""
    for name, seconds in (("NOTICE", 0.1), ("PAUSE", 0.05)):
        monkeypatch.setattr(rendezvous, f"{name}_SECONDS", seconds)
    monkeypatch.setattr(rendezvous, "MINUTE", 0.5)
    address = f"localhost:{free_port()}"

    def meet(*processes):
        def one(number, minutes):
            try:
                return rendezvous.meet(Place(number, 3, address, None), float(minutes))
            except UsageError as error:
                return error

        with ThreadPoolExecutor() as pool:
            return [*pool.map(lambda each: one(*each), processes)], address

    return meet


def test_processes_meet(meeting):
    results, address = meeting((2, 60), (1, 60), (0, 60))
    assert results == [address] * 3


def test_the_first_needs_no_way_to_its_own_address(monkeypatch):
    """As in a container, whose port another machine's address leads to."""
    port = free_port()
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", f"0.0.0.0:{port}")
    places = Place(0, 2, "nowhere.invalid:1", None), Place(1, 2, f"localhost:{port}", None)
    with ThreadPoolExecutor() as pool:
        results = [*pool.map(rendezvous.meet, places, (0.5, 0.5))]
    assert results == [place.address for place in places]


def test_all_say_who_is_missing_until_the_first_gives_up(meeting, capsys):
    (first, second), address = meeting((0, 6), (1, 60))
    notices = capsys.readouterr().err.splitlines()
    for number, error in ((0, first), (1, second)):
        assert isinstance(error, Interruption)
        assert f"no sign of process 2 of 3 at {address}" in str(error)
        said = [line for line in notices if line.startswith(f"jetflow: process {number} waits")]
        assert len(said) > 1 and f"for process 2 of 3 at {address}" in said[-1]


def test_without_the_first_the_others_know_of_it_alone(meeting):
    (one, other), _ = meeting((1, 1), (2, 1))
    assert "no sign of process 0 of 3" in str(one) and "no sign of process 0 of 3" in str(other)


def test_the_first_leaves_when_all_others_know():
    lobby = rendezvous.Lobby(3)
    ready = [lobby.answer(number, f"host {number}")["ready"] for number in (0, 1, 2, 0, 1, 0)]
    assert ready == [False, False, True, False, True, True]


def test_two_of_one_number_are_refused():
    lobby = rendezvous.Lobby(3)
    assert "refusal" not in lobby.answer(1, "one host")
    assert "refusal" not in lobby.answer(1, "one host")
    assert "two of process 1" in lobby.answer(1, "another")["refusal"]


def test_a_stranger_at_the_door_does_no_harm(capsys):
    port = free_port()
    with rendezvous.Desk(port, rendezvous.Lobby(3).answer):
        for greeting in (b"", b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b"\xff\n"):
            with socket.create_connection(("localhost", port)) as stranger:
                stranger.sendall(greeting)
                stranger.shutdown(socket.SHUT_WR)
                assert stranger.recv(100) == b""
        assert rendezvous.ask("localhost", port, 0, "me")["missing"] == [1, 2]
    assert not capsys.readouterr().err


def test_the_first_waits_for_its_port(meeting):
    """A process of the run before may still have it."""
    _, address = meeting()
    with socket.create_server(("", int(address.rpartition(":")[2]))):
        (result,), _ = meeting((0, 1))
    assert "in use" in str(result)
