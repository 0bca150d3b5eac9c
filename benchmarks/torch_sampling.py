"""TarFlow sampled by jetflow, and by a loop over tokens in PyTorch with a cache.

Both draw from the same weights and the same latents, by turns, and their images are compared:

    pip install torch && python benchmarks/torch_sampling.py --workdir runs/tar32 --batch_size 8
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch_tarflow

import jetflow
from jetflow.sampling.ancestral import Sampler
from jetflow.sampling.decoding import decodings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", required=True, help="of a trained TarFlow without labels")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", default="cached", help="of jetflow: some of cached,jacobi")
    arguments = parser.parse_args()

    model = jetflow.load_model(arguments.workdir)
    flow = model.flow
    latents = Sampler(flow, model.variables).latents(
        jax.random.key(0), np.arange(arguments.batch_size)
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = jnp.dtype(flow.blocks[0].transformer.dtype).name
    loop = torch_tarflow.Sampler(
        in_torch(flow, model.variables).to(device), arguments.batch_size, getattr(torch, dtype)
    )
    z = torch.tensor(np.array(latents), device=device)
    samplers: dict[str, Callable[[], np.ndarray]] = {"torch": lambda: loop.sample(z).cpu().numpy()}
    for method in arguments.methods.split(","):
        sampler = Sampler(flow, model.variables, decoding=decodings(flow, method))
        samplers[method] = lambda sampler=sampler: sampler.decode(latents, None).pixels

    images = {name: sample() for name, sample in samplers.items()}  # which compiles, and warms up
    times: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(arguments.repeats):
        for name, sample in samplers.items():
            start = time.perf_counter()
            sample()
            times[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    for name in samplers:
        print(json.dumps({
            "sampler": name,
            "devices": [jax.devices()[0].device_kind, device],  # of jetflow, of PyTorch
            "batch_size": arguments.batch_size,
            "dtype": dtype,
            "seconds": seconds[name],
            "images_per_second": arguments.batch_size / seconds[name],
            "times_torch": seconds["torch"] / seconds[name],
            "largest_difference": float(np.abs(images[name] - images["torch"]).max()),  # in pixels
        }))  # fmt: skip


def in_torch(flow: Any, variables: Any) -> torch_tarflow.TarFlow:
    """The same TarFlow in PyTorch; its blocks are of one depth."""
    net = flow.blocks[0].transformer
    if net.width != net.num_heads * torch_tarflow.HEAD_DIM:
        raise SystemExit(
            f"the heads are not of {torch_tarflow.HEAD_DIM} features, as PyTorch's are"
        )
    copy = torch_tarflow.TarFlow(
        flow.image_shape,
        patch_size=flow.pixels.patch_size,
        width=net.width,
        blocks=len(flow.blocks),
        layers=net.num_layers,
        pixel_scale=flow.pixel_scale,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/weights.pth"
        jetflow.convert.to_tarflow(path, flow, variables)
        copy.load(path)
    return copy


if __name__ == "__main__":
    main()
