"""How the processes of a run find each other, and which of them are still missing.

JAX knows the launchers and the pods; it does not say who is late. So the processes first meet at
the address of the first one, which tells each of them who is missing. Then JAX joins them there.
"""

import contextlib
import json
import os
import re
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from jax._src.clusters import ClusterEnv  # what `jax.distributed.initialize` asks

from jetflow.types import Interruption, UsageError

NOTICE_SECONDS = 20  # until a process says who is missing; then it does so each minute
MINUTE = 60
PAUSE_SECONDS = 1  # between two questions to the first process
ABSENCE_SECONDS = 10  # without a question, after which a process has gone
MOST_NAMED = 8

# What launchers set to the number of processes that they start.
LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
BY_HAND = "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"


class Place(NamedTuple):
    """A process's place in its run.

    Attributes:
        number, count: of this process, and of all.
        address: of the first one, HOST:PORT, if it was given by hand.
        environment: JAX's class for the launcher or the pod, where there is one.
    """

    number: int
    count: int
    address: str | None
    environment: type[ClusterEnv] | None

    @property
    def devices(self) -> list[int] | None:
        """The local device of this process, or None for all that it sees.

        JAX takes it that launchers start a process for each GPU; where they start one for each
        node, or show each process its GPU alone, it would leave the others idle, or find none.
        """
        shares = os.environ.get("SLURM_STEP_NUM_NODES") != str(self.count)
        shares &= os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") != "1"
        shares &= "," in os.environ.get("CUDA_VISIBLE_DEVICES", ",")
        local = self.environment.get_local_process_id() if self.environment and shares else None
        return None if local is None or "JAX_LOCAL_DEVICE_IDS" in os.environ else [local]


def find_place(*, on_pods: bool) -> Place | None:
    """This process's place, from the environment; None for a process that is alone.

    It is set by hand, by Slurm, Open MPI or Kubernetes, or by a TPU host's pod. On any other
    machine nothing is looked up, above all not over the network.

    Args:
        on_pods: whether the hosts of a pod join. Unlike a launcher, a pod does not start a command
            on all of them, so one that can do without the others must not wait for them.

    Raises:
        UsageError: the environment tells of others, but not enough to join them.
        Interruption: a pod's own service does not answer.
    """
    address, environment = os.environ.get("JAX_COORDINATOR_ADDRESS"), None
    launched = max(whole_number(name) or 0 for name in LAUNCHERS)  # 1 in an interactive shell, too
    number, count = whole_number("JAX_PROCESS_ID"), whole_number("JAX_NUM_PROCESSES")
    count = count or launched or None
    if count == 1 or not (address or launched or on_pods):
        return None
    try:
        if launched or None in (address, count, number):
            environment = next(filter(_is_present, ClusterEnv._cluster_types), None)
        if environment:
            count = count or environment.get_process_count()
            number = environment.get_process_id() if number is None else number
    except (OSError, RuntimeError, LookupError, ValueError) as error:
        raise Interruption(
            f"this machine is one of a pod, but does not know which ({_short(error)}); set "
            f"{BY_HAND} on each of them, or JAX_NUM_PROCESSES=1 for one alone"
        ) from error
    numbered = whole_number("JAX_PROCESS_ID")  # 0 may be the only one
    if (count or 1) == 1 and not (address or launched or numbered):
        return None
    known = re.search(r":\d+$", address) if address else environment
    if not known or number is None or count is None or number >= count:
        raise UsageError(
            "this process is one of several, but the environment does not say which one, and where "
            f"the first one is; set {BY_HAND} on each of them, as HOST:PORT, their number, and a "
            "number from 0 on, or JAX_NUM_PROCESSES=1 for one alone"
        )
    return Place(number, count, address, environment)


def _is_present(kind: type[ClusterEnv]) -> bool:
    # Of Kubernetes, JAX would warn in each of its pods that its package is missing.
    is_possible = kind.__name__ != "K8sCluster" or "JOB_COMPLETION_INDEX" in os.environ
    return is_possible and not kind.opt_in_only_method and kind.is_env_present()


class Desk(socketserver.ThreadingTCPServer):
    """A port at which this process answers questions, lines of JSON; a context manager.

    Args:
        port: 0 for any, which is then in `server_address`.
        answer: takes a question, which is of JSON, and gives the answer.
    """

    daemon_threads = allow_reuse_address = True
    request_queue_size = 1024
    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET

    def __init__(self, port: int, answer: Callable[..., Any]):
        self.answer = answer
        super().__init__(("", port), _Question)
        threading.Thread(target=self.serve_forever, args=(PAUSE_SECONDS / 10,), daemon=True).start()

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, *_) -> None:
        """Ignore what strangers send, such as port scanners."""


class _Question(socketserver.StreamRequestHandler):
    timeout = ABSENCE_SECONDS

    def handle(self) -> None:
        assert isinstance(self.server, Desk)
        answer = self.server.answer(*json.loads(self.rfile.readline()))
        self.wfile.write(json.dumps(answer).encode())


def ask(host: str, port: int | str, *question: Any) -> Any:
    """What a desk answers; an OSError or a JSONDecodeError if it does not."""
    with socket.create_connection((host.strip("[]"), int(port)), ABSENCE_SECONDS) as desk:
        desk.sendall(json.dumps(question).encode() + b"\n")
        return json.loads(desk.makefile().read())


class Lobby:
    """What the first process knows of those that come."""

    def __init__(self, count: int):
        self._count, self._over = count, False
        self._seen: dict[int, tuple[str, float]] = {}  # who each process is, and when it asked
        self._informed: set[int] = set()  # who know that all are there

    def answer(self, number: int, who: str, over: bool = False) -> dict[str, Any]:
        """Who is missing, and whether one may go on; `over`: the first one waits no longer."""
        now, self._over = time.monotonic(), self._over or (over and number == 0)
        present = {n for n, (_, when) in self._seen.items() if now - when < ABSENCE_SECONDS}
        if number in present and self._seen[number][0] != who:
            return {"refusal": f"there are two of process {number}; give each its own number"}
        self._seen[number] = who, now
        missing = sorted({*range(self._count)} - present - {number})
        if not missing:
            self._informed.add(number)
        ready = not missing and (number > 0 or len(self._informed) == self._count)
        return {"missing": missing, "ready": ready, "over": self._over}


def meet(place: Place, minutes: float) -> str:
    """Wait until all processes are there; the address at which JAX joins them.

    Raises:
        UsageError: another one has this process's number.
        Interruption: one has not come in time, by the clock of the first one if that has come.
    """
    notice, end = time.monotonic() + NOTICE_SECONDS, time.monotonic() + MINUTE * minutes
    address, desk, cause = place.address, None, ""
    who = f"{socket.gethostname()} {os.getpid()}"
    with contextlib.ExitStack() as stack:
        while True:
            missing, over = {0}, time.monotonic() > end
            try:
                address = address or _address(place)
                if place.number == 0 and desk is None:
                    bound = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", address)
                    desk = Desk(int(bound.rpartition(":")[2]), Lobby(place.count).answer)
                    stack.enter_context(desk)
                host, _, port = address.rpartition(":")
                question = place.number, who, over
                news = desk.answer(*question) if desk else ask(host, port, *question)
                if "refusal" in news:
                    raise UsageError(f"the processes of this run cannot join: {news['refusal']}")
                if news["ready"]:
                    return address
                missing, over, cause = {*news["missing"]}, news["over"], ""
            except (OSError, RuntimeError, json.JSONDecodeError) as error:
                cause = f" ({_short(error)})"
            where = f"{named(missing)} of {place.count} at {address or 'an unknown address'}{cause}"
            if missing and over:
                time.sleep(0 if place.number else 3 * PAUSE_SECONDS)  # for the others to hear of it
                raise Interruption(
                    f"no sign of {where} in {minutes:g} minutes; start the same command on all "
                    "hosts, or let them wait longer with --join_timeout"
                )
            if missing and time.monotonic() > notice:
                notice = time.monotonic() + MINUTE
                say(f"process {place.number} waits for {where}")
            time.sleep(PAUSE_SECONDS)


def _address(place: Place) -> str:
    """Of the first process, as soon as its host has a name."""
    assert place.environment
    return place.environment.get_coordinator_address(1, os.environ.get("JAX_COORDINATOR_PORT"))


def named(numbers: Collection[int]) -> str:
    """Processes for a person: "process 1", "processes 1, 3 and 4"."""
    names = [*map(str, sorted(numbers))]
    if len(names) > MOST_NAMED:
        names[MOST_NAMED - 1 :] = [f"{len(names) - MOST_NAMED + 1} more"]
    *first, last = names or ["none"]
    return f"processes {', '.join(first)} and {last}" if first else f"process {last}"


def say(text: str) -> None:
    """A line on standard error, of any process."""
    print(f"jetflow: {' '.join(text.split())}", file=sys.stderr, flush=True)


def whole_number(name: str) -> int | None:
    """A variable of the environment; a UsageError if it is anything else."""
    value = os.environ.get(name)
    if value is not None and not value.isdigit():
        raise UsageError(f"{name} is {value!r} in the environment; expected a whole number")
    return None if value is None else int(value)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
