"""From a data set's name to its TFDS builder, with the data on disk."""

import contextlib
import difflib
import functools
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from jetflow import hosts
from jetflow.data import processes
from jetflow.data.builders import BUILDERS, Folder, folder
from jetflow.data.builders.archived import ArchiveBuilder, Progress, say
from jetflow.types import UsageError


def find(name: str, data_dir: str | os.PathLike | None) -> tfds.core.DatasetBuilder:
    """The builder of a data set; one that needs no archive is prepared where it is not yet.

    Several processes may call this at once.

    Raises:
        UsageError: unknown name, or data that is not there and cannot be made.
    """
    make_builder = _maker(name, data_dir)
    builder = make_builder()
    if builder.info.initialized:  # read from disk; is_prepared() would log a warning where not
        return builder
    if isinstance(builder, ArchiveBuilder):
        manual_dir = default_manual_dir(data_dir)
        here = "" if builder.missing(manual_dir) else f"; its archives are in {manual_dir}"
        raise UsageError(
            f"data set {name!r} was not found in {builder.data_dir}; prepare it once with `jetflow "
            f"prepare {name} --manual_dir DIR`, DIR with {'; '.join(map(str, builder.archives))}"
            + here
        )
    say(f"preparing data set {name} in {builder.data_dir} (once)")
    builder = _made(name, builder, make_builder)
    say(f"prepared data set {name}")
    return builder


def prepare(
    name: str,
    data_dir: str | os.PathLike | None = None,
    *,
    manual_dir: str | os.PathLike | None = None,
    workers: int | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> tfds.core.DatasetBuilder:
    """Prepare a data set, from archives where it needs some; goes on where a kill stopped it.

    Args:
        data_dir: where the data is to lie; default as for `pipeline.load`.
        manual_dir: the folder of the archives; default: downloads/manual in `data_dir`, as in TFDS.
        workers: processes that decode; default: one for each core.

    Raises:
        UsageError: unknown name, archives that are missing, no space or no rights.
    """
    make_builder = _maker(name, data_dir)
    builder: Any = make_builder()
    if not isinstance(builder, ArchiveBuilder):
        return find(name, data_dir)
    if builder.info.initialized:
        builder.tidy_up()
        return builder
    folder = Path(manual_dir or default_manual_dir(data_dir)).expanduser().absolute()
    if missing := builder.missing(folder):
        remedy = "put them there, or give another --manual_dir"
        raise UsageError(f"data set {name!r} lacks archives: {missing}; {remedy}")
    with _alone(builder):
        builder = make_builder()
        if builder.info.initialized:  # by another process, while this one waited
            builder.tidy_up()
            return builder
        builder.workers = workers or processes.cores()
        builder.on_progress = on_progress
        for leftover in Path(builder.data_dir).parent.glob(f"{builder.version}.incomplete*"):
            shutil.rmtree(leftover)  # links to pieces only, if a kill came in the last second
        return _made(name, builder, make_builder, manual_dir=folder)


def counts(builder: tfds.core.DatasetBuilder) -> dict[str, int]:
    """Images in each split of prepared data."""
    return {name: split.num_examples for name, split in builder.info.splits.items()}


def unprepared(name: str) -> tfds.core.DatasetBuilder:
    """The builder of a data set, whether the data is there or not.

    Raises:
        UsageError: if there is no such data set.
    """
    return _maker(name, None)()


def default_manual_dir(data_dir: str | os.PathLike | None) -> Path:
    return Path(resolve(data_dir)) / "downloads" / "manual"


def resolve(data_dir: str | os.PathLike | None) -> str:
    """Where prepared data lies: as given, or $TFDS_DATA_DIR, or ~/tensorflow_datasets."""
    # TFDS has the same default, but reads the environment only once, at import.
    default_dir = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    return os.path.expanduser(data_dir or default_dir)


@contextlib.contextmanager
def _alone(builder: ArchiveBuilder) -> Iterator[None]:
    """While no other process prepares the same; the lock goes with the process, however it ends."""
    lock = builder.partial_dir.with_suffix(".lock")
    try:
        builder.partial_dir.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except OSError as error:
        raise UsageError(
            f"cannot write to {lock.parent} ({error}); give another --data_dir"
        ) from error
    with hosts.locked(lock, wait=False) as mine:
        if mine:
            yield
            return
    say(f"another process prepares {builder.name}; waiting")
    with hosts.locked(lock, wait=True):
        yield


def _made(
    name: str,
    builder: Any,  # TFDS's decorators hide the signatures of its builders
    make_builder: Callable[[], tfds.core.DatasetBuilder],
    manual_dir: Path | None = None,
) -> tfds.core.DatasetBuilder:
    error = None
    try:
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS's announcements
            builder.download_and_prepare(
                file_format="array_record",
                download_config=tfds.download.DownloadConfig(
                    try_download_gcs=False, manual_dir=manual_dir
                ),
            )
    except (OSError, ImportError) as caught:
        # TFDS writes into a directory of its own and renames it at the end. Where another process
        # has come first, the rename fails, and that one's data is as good.
        error = caught
    builder = make_builder()  # anew, to read what lies on disk, whoever wrote it
    if not builder.info.initialized:
        reason = error or "the directory exists, but holds no complete data set: delete it"
        raise UsageError(
            f"data set {name!r} was not found in {builder.data_dir} and cannot be prepared there "
            f"({reason}); set TFDS_DATA_DIR to a writable directory, or to one that holds it, and "
            "run the command again"
        ) from error
    return builder


def known_names() -> list[str]:
    """All that `find` takes; "folder/NAME/SIZE" stands for many."""
    names = []
    for name, builder_class in BUILDERS.items():
        configs = [config.name for config in builder_class.BUILDER_CONFIGS]
        names += [f"{name}/{config}" for config in configs] or [name]
    return ["folder/NAME/SIZE" if name == "folder" else name for name in names]


def _maker(name: str, data_dir: str | os.PathLike | None) -> Callable[[], tfds.core.DatasetBuilder]:
    """Makes the builder of "digits" or "photos/16" each time it is called."""
    where = {"data_dir": resolve(data_dir)}
    if name == "folder" or name.startswith("folder/"):
        return functools.partial(Folder, config=folder.config_name(name), **where)
    if name not in (known := known_names()):
        nearest = difflib.get_close_matches(name, known, n=1)
        raise UsageError(
            f"config.data.name is {name!r}; known data sets: {', '.join(known)}"
            + (f"; did you mean {nearest[0]!r}?" if nearest else "")
        )
    builder_name, _, config = name.partition("/")
    return functools.partial(BUILDERS[builder_name], config=config or None, **where)
