"""The processes of a run: how each finds the others, what they agree on, and how they stop.

Every process runs the same program on its own devices. The first one alone writes and prints.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import filelock
import jax
from absl import logging
from tqdm import tqdm

from jetflow import rendezvous, rollcall
from jetflow.buckets import AnyPath, is_bucket, leased, refusal
from jetflow.fields import MOST_SHOWN, differences
from jetflow.options import Options, option
from jetflow.rollcall import STATE, RollCall
from jetflow.types import Interruption, UsageError

T = TypeVar("T")

THREADS_PER_DEVICE = 4
JOIN_SECONDS = 300  # for JAX to join processes that are all there
HEARTBEAT_SECONDS = 150  # without one, after which JAX ends what the roll call has not ended
LAST_WORDS_SECONDS = 5
LONGEST_WAIT = 24 * 3600  # seconds, for what another process has not done yet
LOG_SECONDS, LOG_DELAY = 30, 5  # between lines of progress off a terminal, and before the first
LARGEST_LAG = 60  # seconds until a network disk shows a file that another machine wrote

_calls = itertools.count()  # of what all processes must call equally often


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessOptions(Options):
    """How the processes of a command find each other, and how long they wait for each other."""

    join_timeout: float = option(15.0, "minutes to wait for processes that are missing", least=0)
    on_stall: str = option(
        "end",
        "if a process is silent for a minute, or stays behind the others for 15: end the run, or "
        "wait for it, and say so each minute",
        choices=("end", "wait"),
    )


@contextlib.contextmanager
def joined(
    facts: Mapping[str, Any], options: ProcessOptions | None, *, saves_at_signals: bool
) -> Iterator[None]:
    """A context in which this process is joined to the others of its run, if there are any.

    A process that fails inside ends at once, with status 2 for bad input, else 1: Python's own exit
    would wait for the others. They then end within a minute.

    Args:
        facts: what all of them must be asked for, by name; `compare` says where they are not.
        options: None for a command that does not compute: the hosts of a pod do not join for it.
        saves_at_signals: SIGTERM is only noted, for `StopSignal`; otherwise it ends the process.

    Raises:
        UsageError: the environment is incomplete.
        Interruption: another one has not come in time.
    """
    _make_room_for_devices()
    place = rendezvous.find_place(on_pods=options is not None)
    if place is None:
        yield
        return
    options = options or ProcessOptions()
    address = rendezvous.meet(place, options.join_timeout)
    ends = options.on_stall == "end"
    with RollCall(ends=ends) as roll_call, open(os.devnull, "w") as nowhere:
        jax.distributed.initialize(
            address, place.count, place.number, place.devices,
            cluster_detection_method="deactivate",
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS if ends else LONGEST_WAIT,
            shutdown_timeout_seconds=2 * HEARTBEAT_SECONDS,
        )  # fmt: skip
        if not saves_at_signals:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX has joined with one of its own
        roll_call.start()
        try:
            compare({**_code(), **facts})
            with contextlib.redirect_stdout(sys.stdout if is_first() else nowhere):
                yield
            rollcall.reach_barrier()
            STATE.client.wait_at_barrier("jetflow/end", 1000 * LONGEST_WAIT)
        except UsageError as error:
            rendezvous.say(str(error))
            if is_first():  # the others, joined through it, mostly fail alike: let them say so
                time.sleep(LAST_WORDS_SECONDS)
            sys.stdout.flush()
            os._exit(error.status)
        except Exception as error:
            roll_call.leave(error)


def _code() -> dict[str, Any]:
    """What a result depends on besides the command and its data."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    settings = ("jax_enable_x64", "jax_default_matmul_precision")
    return {
        **{name.upper(): getattr(jax.config, name) for name in settings},
        "JAX_NUM_PROCESSES": STATE.num_processes,
        "the digest of jetflow's code": digest.hexdigest()[:8],
        "the version of jax": jax.__version__,
    }


def compare(facts: Mapping[str, Any]) -> None:
    """Let all processes go on only if they have the same facts; all of them must call this.

    Args:
        facts: values by name, of any kind; their texts are compared.

    Raises:
        UsageError: on all of them, with the names that differ and both values.
    """
    if not jax.distributed.is_initialized():
        return
    own = {name: str(fact) for name, fact in facts.items()}

    def check() -> None:
        differing: dict[str, str] = {}
        for number, other in enumerate(others):
            for name, (here, there) in differences(own, other, prefix="").items():
                text = f"{name} is {here} on process 0 and {there} on process {number}"
                differing.setdefault(name, text)
        if differing:
            more = [f"and {len(differing) - MOST_SHOWN} more"] * (len(differing) > MOST_SHOWN)
            raise UsageError(
                "the processes of this run differ: "
                f"{'; '.join([*differing.values()][:MOST_SHOWN] + more)}; start the same command, "
                "with the same code and data, on all of them"
            )

    others = gathered(own)
    by_first(check)


def gathered(value: T) -> list[T]:
    """The values of all processes on the first one, and [] on the others; all must call this.

    Only the first one waits. The others learn of the outcome by `agreed` or `by_first`.
    """
    if not jax.distributed.is_initialized():
        return [value]
    rollcall.reach_barrier()
    key = f"jetflow/gathered/{next(_calls)}"
    STATE.client.key_value_set(f"{key}/{STATE.process_id}", json.dumps(value))
    numbers = range(STATE.num_processes) if STATE.process_id == 0 else ()
    return [json.loads(_wait_for(f"{key}/{number}")) for number in numbers]


def failing(failed: bool) -> int | None:
    """The first process on which something failed, on all of them, however late one of them is.

    Not by the devices, whose exchanges end in an error where one process is late.
    """
    numbers = agreed([number for number, bad in enumerate(gathered(failed)) if bad])
    return numbers[0] if numbers else None


def is_first() -> bool:
    """Whether this process is the one that writes and prints.

    A single process asks JAX for no device: a command that computes nothing must not wait for an
    accelerator that a training holds.
    """
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def agreed(value: T) -> T:
    """The first process's value on all of them, which must all call this; of JSON's kinds.

    The first one does not wait.
    """
    if not jax.distributed.is_initialized():
        return value
    rollcall.reach_barrier()
    key = f"jetflow/agreed/{next(_calls)}"
    if STATE.process_id == 0:
        STATE.client.key_value_set(key, json.dumps(value))
    return json.loads(_wait_for(key))


def by_first(call: Callable[[], T]) -> T:
    """What a call gives on the first process, or its UsageError or OSError, on all of them."""
    result: Any = None
    fault: Sequence[Any] = ()
    if STATE.process_id == 0:
        try:
            result = call()
        except Exception as error:
            known = refusal(error) or error
            if isinstance(known, UsageError):
                fault = (str(known), known.status)
            elif isinstance(known, OSError):
                fault = (known.errno, known.strerror, known.filename and str(known.filename))
            else:
                raise
    result, fault = agreed([result, fault])
    if len(fault) == 2:
        raise (Interruption if fault[1] == Interruption.status else UsageError)(fault[0])
    if fault:
        raise OSError(*fault)
    return result


def _wait_for(key: str) -> str:
    return STATE.client.blocking_key_value_get(key, 1000 * LONGEST_WAIT)


def wait_to_see(path: AnyPath) -> None:
    """Wait until this machine sees a file of the first process: network disks may lag behind."""
    end = time.monotonic() + LARGEST_LAG
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.5)


@contextlib.contextmanager
def locked(path: AnyPath, *, wait: bool) -> Iterator[bool]:
    """Whether this process has the lock of a file; with `wait`, as soon as no other one has it.

    Processes of the same run count too: only the first one should ask. The lock goes with the
    process, however it ends. On a disk without locks, such as some network disks, every process
    gets it, and a warning asks the user to start only one. In a bucket it is a lease.

    Raises:
        OSError: the file cannot be written.
    """
    if is_bucket(path):
        with leased(path, wait=wait) as mine:
            yield mine
        return
    with open(path, "a") as file:
        try:
            mine = filelock.lock_descriptor(file.fileno(), blocking=wait)
        except OSError as error:
            _warn_of_no_locks(path.parent, str(error))
            mine = True
        yield mine


@functools.cache  # once a folder
def _warn_of_no_locks(folder: AnyPath, error: str) -> None:
    logging.warning("%s cannot be locked (%s): start no other process there", folder, error)


def note(text: str) -> None:
    """A line on standard error, of the first process alone."""
    if is_first():
        print(text, file=sys.stderr, flush=True)


def progress(total: int, name: str, unit: str, done: int = 0, *, shown: bool = False) -> tqdm:
    """A bar of the first process, or one `shown` by any; off a terminal a line now and then."""
    interval = 0.1 if sys.stderr.isatty() else LOG_SECONDS
    return tqdm(
        total=total, initial=done, desc=name, unit=f" {unit}", disable=not (shown or is_first()),
        leave=False, mininterval=interval, delay=0 if sys.stderr.isatty() else LOG_DELAY,
    )  # fmt: skip


def _make_room_for_devices() -> None:
    """Give XLA enough threads for CPU devices that outnumber the cores, before JAX makes its pool.

    Each device waits for the others in a thread of that pool, which is as large as the machine has
    cores: with too few threads they would wait for ever.
    """
    devices: int = getattr(jax.config, "jax_num_cpu_devices")  # noqa: B009
    if devices > 1:
        threads = max(THREADS_PER_DEVICE * devices, os.cpu_count() or 1)
        os.environ.setdefault("NPROC", str(threads))
