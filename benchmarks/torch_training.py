"""The training step of a TarFlow in float32, jetflow's and PyTorch's by turns on the same batch:

    pip install torch && python benchmarks/torch_training.py --config configs/photos_tarflow.py

Both add noise and flips, and update by AdamW. jetflow's reports metrics besides. The ratio by
processor time holds on a busy machine too, that by the clock on an idle one alone.
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
import torch
import torch_tarflow

from jetflow import configs
from jetflow.data import dataset
from jetflow.training.experiment import set_up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/photos_tarflow.py")
    parser.add_argument("--compile", action="store_true", help="PyTorch's blocks by torch.compile")
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    config = configs.read(arguments.config)

    run = set_up(config, dataset.load, jax.devices())
    with contextlib.closing(run.batches()) as batches:
        batch = next(batches)
    program = run.lower_step(run.abstract_state, batch).compile()
    state, _ = run.fresh_state()

    def jetflow_step() -> None:
        nonlocal state
        state, metrics = program(state, batch)
        jax.block_until_ready((state, metrics))

    flow = config.flow
    copy = torch_tarflow.TarFlow(
        run.train_data.image_shape,
        patch_size=flow.patch_size,
        width=flow.width,
        blocks=flow.num_blocks,
        layers=flow.layers_per_block[0],
        pixel_scale=flow.pixel_scale,
    )
    if arguments.compile:
        torch_tarflow.compile_blocks(copy)
    trainer = torch_tarflow.Trainer(copy, noise_std=0.1, dtype=torch.float32)
    images = torch.tensor(np.array(batch.image))

    steps: dict[str, Callable[[], object]] = {
        "torch": lambda: trainer.step(images).item(),
        "jetflow": jetflow_step,
    }
    for step in steps.values():  # which compiles, and warms up
        step(), step()
    clock: dict[str, list[float]] = {name: [] for name in steps}
    processor: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.repeats):
        for name, step in steps.items():
            start, spent = time.perf_counter(), time.process_time()
            step()
            clock[name].append(time.perf_counter() - start)
            processor[name].append(time.process_time() - spent)
    print(json.dumps({
        "config": arguments.config,
        "batch_size": config.train.batch_size,
        "compiled_torch": arguments.compile,
        "seconds": {name: statistics.median(values) for name, values in clock.items()},
        "processor_seconds": {
            name: statistics.median(values) for name, values in processor.items()
        },
        "jetflow_over_torch": ratio(clock),
        "jetflow_over_torch_by_processor_time": ratio(processor),
    }, indent=1))  # fmt: skip


def ratio(times: dict[str, list[float]]) -> float:
    """The median over the turns."""
    pairs = zip(times["jetflow"], times["torch"], strict=True)
    return statistics.median(ours / theirs for ours, theirs in pairs)


if __name__ == "__main__":
    main()
