"""Training batches of the same photographs, read by jetflow and by a tf.data pipeline of PNGs.

TensorFlow lives in an environment of its own, whose Python is named here:

    python -m venv tf && tf/bin/pip install tensorflow-cpu
    python benchmarks/tfdata_reading.py --tensorflow tf/bin/python --size 64

Both read 8,192 images of the train split of photos/SIZE, shuffled over all of them: jetflow from
ArrayRecord, as `jetflow train` does, and tf.data the same pixels as PNG in one TFRecord file, which
it decodes and batches with parallelism and prefetching by AUTOTUNE. Each is a process that idles
while the other has its turn. Compared are batches in host memory: "decode" of uint8, which is all
that jetflow's training needs (it rescales on the device), and "rescale" of float32 in [-1, 1],
which jetflow makes for this comparison alone.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

WHAT = ("decode", "rescale")
IMAGES = 8192
WARM_UP = 1.0  # seconds of each turn: until what was read ahead is used up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tensorflow", help="the Python of an environment with TensorFlow")
    parser.add_argument("--size", type=int, default=64, help="of the images, in pixels")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a turn")
    parser.add_argument("--workers", type=int, default=0, help="worker processes of jetflow")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)  # reader, file
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments)
        return
    if not arguments.tensorflow:
        parser.error(
            "--tensorflow is missing; expected the Python of an environment with TensorFlow"
        )
    with tempfile.TemporaryDirectory() as folder:
        pngs = Path(folder) / "photos.tfrecord"
        write_pngs(pngs, arguments.size)
        for what in WHAT:
            print(json.dumps(compare(arguments, what, pngs)), flush=True)


def compare(arguments: argparse.Namespace, what: str, pngs: Path) -> dict[str, Any]:
    """Medians by turns."""
    pythons = {"jetflow": sys.executable, "tfdata": arguments.tensorflow}
    options = [f"--{name}={getattr(arguments, name)}"
               for name in ("size", "batch_size", "seconds", "workers")]  # fmt: skip
    servers = {
        reader: subprocess.Popen(
            [python, __file__, *options, "--serve", f"{reader}-{what}", str(pngs)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for reader, python in pythons.items()
    }  # fmt: skip
    found: dict[str, list[dict[str, float]]] = {reader: [] for reader in servers}
    for turn in range(arguments.turns + 1):
        for reader, server in servers.items():
            assert server.stdin and server.stdout
            print("go", file=server.stdin, flush=True)
            measured = json.loads(server.stdout.readline())
            if turn:  # the first one starts everything
                found[reader].append(measured)
    for server in servers.values():
        server.communicate()
    result: dict[str, Any] = {"what": what, "size": arguments.size, "workers": arguments.workers}
    for unit in found["jetflow"][0]:
        values = {reader: [turn[unit] for turn in turns] for reader, turns in found.items()}
        medians = {reader: statistics.median(speeds) for reader, speeds in values.items()}
        ratio = medians["jetflow"] / medians["tfdata"]
        result[unit] = {**{reader: round(value) for reader, value in medians.items()},
                        "ratio": round(ratio, 2)}  # fmt: skip
    return result


def serve(arguments: argparse.Namespace) -> None:
    """One reader: a turn for each line that comes in."""
    name, path = arguments.serve
    reader, what = name.split("-")
    make = {"jetflow": jetflow_batches, "tfdata": tfdata_batches}[reader]
    batches, processor_seconds = make(arguments, what == "rescale", path)
    for _ in sys.stdin:
        print(json.dumps(turn(batches, processor_seconds, arguments)), flush=True)


def turn(
    batches: Iterator[Any], processor_seconds: Callable[[], float], arguments: argparse.Namespace
) -> dict[str, float]:
    """Images by the second, and by the second of processor time."""
    begin = time.perf_counter()
    while time.perf_counter() - begin < WARM_UP:
        next(batches)
    start, processor = time.perf_counter(), processor_seconds()
    images, seconds = 0, 0.0
    while seconds < arguments.seconds:
        next(batches)
        images, seconds = images + arguments.batch_size, time.perf_counter() - start
    return {
        "images_per_second": images / seconds,
        "images_per_core_second": images / (processor_seconds() - processor),
    }


def jetflow_batches(arguments: argparse.Namespace, rescale: bool, _path: str):
    import numpy as np

    from jetflow.data import dataset as pipeline
    from jetflow.data.reading import Ahead
    from jetflow.tools.throughput import processor_seconds

    dataset = pipeline.load(f"photos/{arguments.size}", f"train[:{IMAGES}]")
    batches = pipeline.train_batches(
        dataset, batch_size=arguments.batch_size, seed=0, workers=arguments.workers
    )
    if not rescale:
        return batches, processor_seconds
    scaled = Ahead(batches, lambda batch: batch.image.astype(np.float32) / np.float32(127.5) - 1)
    return scaled, processor_seconds


def tfdata_batches(arguments: argparse.Namespace, rescale: bool, path: str):
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow as tf  # type: ignore[reportMissingImports]

    features = {"image": tf.io.FixedLenFeature([], tf.string)}
    shape = (arguments.size, arguments.size, 3)

    def decode(record):
        stored = tf.io.parse_single_example(record, features)["image"]
        image = tf.ensure_shape(tf.io.decode_png(stored, channels=3), shape)
        return tf.cast(image, tf.float32) / 127.5 - 1 if rescale else image

    data = tf.data.TFRecordDataset(path).shuffle(IMAGES).repeat()
    data = data.map(decode, num_parallel_calls=tf.data.AUTOTUNE)
    data = data.batch(arguments.batch_size, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
    return data.as_numpy_iterator(), time.process_time


def write_pngs(path: Path, size: int) -> None:
    """The train split of photos/SIZE, as `tf.train.Example`s in a TFRecord file."""
    import io

    from PIL import Image
    from tensorboardX.record_writer import RecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    from jetflow.data import dataset as pipeline

    writer = RecordWriter(str(path))
    for batch in pipeline.eval_batches(
        pipeline.load(f"photos/{size}", f"train[:{IMAGES}]"), batch_size=256
    ):
        for image in batch.image[batch.index >= 0]:
            png = io.BytesIO()
            Image.fromarray(image).save(png, "png")
            example = tf_example_pb2.Example()
            example.features.feature["image"].bytes_list.value.append(png.getvalue())
            writer.write(example.SerializeToString())
    writer.close()


if __name__ == "__main__":
    main()
