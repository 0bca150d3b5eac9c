"""The processes of a run: how each finds the others, and which of them speaks for all."""

import os

import jax

ROOM = 4  # threads per device of one process


def make_room_for_devices() -> None:
    """Give XLA enough threads for CPU devices that outnumber the cores.

    Each device waits for the others in a thread of a pool that is otherwise as large as the machine
    has cores, and would wait for ever. The pool's size is read when JAX first looks for devices.
    """
    if (devices := jax.config.jax_num_cpu_devices) > 1:  # pyright: ignore[reportAttributeAccessIssue]
        os.environ.setdefault("NPROC", str(max(ROOM * devices, os.cpu_count() or 1)))
