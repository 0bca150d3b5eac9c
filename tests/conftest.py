"""Shapes are checked: beartype and jaxtyping check every annotation of jetflow in every test."""

import functools
import os
import shutil
import signal

import filelock
import pytest
from jaxtyping import install_import_hook

# Tests run on CPUs, here and in the processes that they start, whatever else there is.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Their programs run for seconds: compiled without optimisation they are ready in half the time.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# The processes among which pytest-xdist divides the tests ignore Ctrl-C, and so would all that they
# start, among it shells, which could not even trap it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before the first import of jetflow, so that every module of it is instrumented.
install_import_hook("jetflow", "beartype.beartype")

import bucket_server  # noqa: E402
import jax  # noqa: E402
import tiny_runs  # noqa: E402
from jax.experimental.compilation_cache.compilation_cache import reset_cache  # noqa: E402


@pytest.fixture
def float64():
    """Double precision inside the test: production runs in single, laws are tested in double."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def optimised():
    """Programs as users have them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
        jax.config.update("jax_disable_most_optimizations", False)
        yield
        jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def fresh_traces():
    """For tests that replace parts of jetflow: JAX keeps what it has traced of them."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture(scope="session", autouse=True)
def data_dir(tmp_path_factory):
    """Where all tests, and the processes that they start, find data sets: prepared only once."""
    path = tmp_path_factory.mktemp("tensorflow_datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(path))
        yield path


@pytest.fixture(scope="session")
def bucket():
    """The URL of a bucket that this process, and those that it starts, can use."""
    with bucket_server.running() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield f"gs://{bucket_server.BUCKET}"


@pytest.fixture(scope="session")
def shared_dir(tmp_path_factory):
    """A folder of all processes of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def compilation_cache(shared_dir):
    """Lets tests that train the same tiny flow again and again compile it once.

    In all processes, those of pytest-xdist and those that tests start.
    """
    settings = {
        "jax_compilation_cache_dir": str(shared_dir / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        reset_cache()  # JAX looks at the settings only once
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


@pytest.fixture(scope="session")
def trained(tmp_path_factory, shared_dir, compilation_cache):
    """A function: the name of a flow of `tiny_runs` -> the workdir of its run, never interrupted.

    Tests may read it, and evaluate and sample from it, but must train in a copy. The processes of
    pytest-xdist have copies of one run.
    """

    @functools.cache
    def workdir(name):
        original = shared_dir / "trained" / name
        with filelock.FileLock(shared_dir / f"{name}.lock"):
            if not original.exists():
                assert tiny_runs.train(name, original) == 0
        return shutil.copytree(original, tmp_path_factory.mktemp("trained") / name)

    return workdir
