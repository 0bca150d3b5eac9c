"""The tasks of benchmarks/gpu.py. Each is a process, which yields what it measured.

JAX, PyTorch and jetflow are imported in the tasks that need them: no process
computes with both frameworks.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from gpu_sizes import Result, Setting, Skip

# The card


def peak(setting: Setting, by: str) -> Result:
    """Products of square matrices of normal numbers, in bfloat16."""
    size = setting.size.matrix
    if by == "jetflow":
        import jax
        import jax.numpy as jnp

        left, right = jax.random.normal(jax.random.key(0), (2, size, size), jnp.bfloat16)
        product = jax.jit(lambda a, b: a @ b)

        def multiply() -> None:
            results = [product(left, right) for _ in range(10)]
            jax.block_until_ready(results[-1])
    else:
        import torch

        device = torch_device(setting)
        left, right = torch.randn((2, size, size), dtype=torch.bfloat16, device=device)

        def multiply() -> None:
            for _ in range(10):
                left @ right
            wait(device)

    seconds = rounds(multiply, 10)
    yield {"by": by, "size": size, "tflops": 10 * 2 * size**3 / statistics.median(seconds) / 1e12}


# Training steps


def train(setting: Setting, kind: str, attention: str, remat: str) -> Result:
    """Of jetflow; `remat` as `config.flow.remat` takes it."""
    import jax

    import jetflow
    from jetflow import bench

    batch = setting.size.batch["none" if remat == "none" else kind]
    fields = {"flow.dtype": "bfloat16", "flow.attention": attention, "flow.remat": remat}
    config = setting.config(kind, fields | {"train.batch_size": batch})
    measured = bench.bench_train(config, steps=setting.size.steps, repeats=3)
    flow = jetflow.build(config.flow, image_shape=image_shape(config))
    in_use = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    yield {
        "by": "jetflow",
        "flow": kind,
        "attention": flow.attention_on(jax.local_devices()[0].platform).method,
        "remat": remat,
        **dataclasses.asdict(measured),
        "peak_bytes_in_use": in_use,
    }


def plan(setting: Setting, kind: str, topology: str, remat: str) -> Result:
    """What `jetflow plan` says of the same step, without the card."""
    import jetflow

    batch = setting.size.batch["none" if remat == "none" else kind]
    fields = {"flow.dtype": "bfloat16", "flow.remat": remat, "train.batch_size": batch}
    planned = jetflow.plan(setting.config(kind, fields), topology)
    estimate = planned.estimate
    yield {
        "by": f"jetflow plan {topology}",
        "flow": kind,
        "remat": remat,
        "batch_size": batch,
        "peak_bytes": planned.memory.total,
        "step_seconds": estimate.step_seconds if estimate else None,
        "images_per_second": estimate.images_per_second if estimate else None,
    }


def torch_train(setting: Setting) -> Result:
    """The TarFlow of `train`, in PyTorch."""
    import torch
    from torch_tarflow import Trainer, compile_blocks

    device, batch = torch_device(setting), setting.size.batch["none"]
    torch.set_float32_matmul_precision("high")  # TF32, which is JAX's default, for what is float32
    flow = torch_flow(setting, "tarflow").to(device)
    compile_blocks(flow)
    trainer, compiled = Trainer(flow, noise_std=0.05), True
    images = torch.randint(0, 256, (batch, *flow.image_shape), dtype=torch.uint8, device=device)
    try:
        trainer.step(images)
    except Exception as error:
        if device.type == "cuda":
            raise
        print(f"not compiled, as is fit for a trial alone: {error}", file=sys.stderr)
        torch.compiler.set_stance("force_eager")
        compiled = False

    def steps() -> None:
        for _ in range(setting.size.steps):
            trainer.step(images)
        wait(device)

    seconds = [value / setting.size.steps for value in rounds(steps, 3)]
    in_use = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    yield {
        "by": "PyTorch",
        "flow": "tarflow",
        "attention": "scaled_dot_product_attention",
        "remat": "none",
        "batch_size": batch,
        "compiled": compiled,
        "step_seconds": statistics.median(seconds),
        "step_seconds_range": (min(seconds), max(seconds)),
        "images_per_second": batch / statistics.median(seconds),
        "peak_bytes_in_use": in_use,
    }


# Samples and likelihoods of the TarFlow that the task `fit` trains


def sample(setting: Setting, method: str) -> Result:
    import jetflow
    from jetflow import bench

    model = jetflow.load_model(setting.fit)
    for batch in setting.size.sampled:
        [measured] = bench.bench_sample(model, batch_sizes=(batch,), methods=(method,), repeats=1)
        yield {"by": "jetflow", "step": model.step, **dataclasses.asdict(measured)}


def torch_sample(setting: Setting) -> Result:
    """Token by token against a cache: a plain loop, and on a GPU recorded steps."""
    import torch
    from torch_tarflow import Sampler

    device = torch_device(setting)
    flow = torch_flow(setting, "likelihood")
    flow.load(str(setting.weights))
    flow.to(device)
    for graphs in (False, True)[: 1 + (device.type == "cuda")]:
        for batch in setting.size.sampled:
            sampler = Sampler(flow, batch, torch.bfloat16, graphs)
            z = torch.randn((batch, *flow.token_shape), device=device)

            def draw(sampler=sampler, z=z) -> Any:
                images = sampler.sample(z)
                wait(device)
                return images

            finite = bool(draw().isfinite().all())
            [seconds] = rounds(draw, 1, warm_up=0)
            yield {
                "by": "PyTorch",
                "method": "CUDA graphs" if graphs else "loop",
                "batch_size": batch,
                "seconds": seconds,
                "images_per_second": batch / seconds,
                "finite": finite,
            }


def bpd(setting: Setting) -> Result:
    """Held-out likelihoods under the same noise, of nets in several dtypes."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jetflow
    from jetflow import sharding
    from jetflow.data import dataset

    model = jetflow.load_model(setting.fit)
    held_out = dataset.load(model.config["data"]["name"], "test")
    batches = dataset.eval_batches(held_out, batch_size=setting.size.likelihoods)
    images, reference = jnp.asarray(next(iter(batches)).image), None
    for dtype, precision, attention in (
        ("float32", "highest", "xla"),
        ("float32", "default", "xla"),
        ("bfloat16", "default", "xla"),
        ("bfloat16", "default", "auto"),
    ):
        net = {"dtype": dtype, "precision": precision, "attention": attention}
        flow = jetflow.build(model.config["flow"] | net, image_shape=model.flow.image_shape)
        with sharding.on(model.mesh):
            bits = jetflow.bits_per_dim(flow, model.variables, images, None, jax.random.key(0))
        bits = np.asarray(bits, np.float64)
        reference = bits if reference is None else reference
        chosen = flow.attention_on(jax.local_devices()[0].platform).method
        yield {
            **net,
            "attention": chosen,
            "images": len(bits),
            "bpd": bits.mean(),
            "difference": (bits - reference).mean(),
            "largest_difference": np.abs(bits - reference).max(),
        }


# PyTorch


def torch_device(setting: Setting) -> Any:
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    if not setting.size.for_cpu:
        raise Skip("PyTorch sees no GPU")
    return torch.device("cpu")


def wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def torch_flow(setting: Setting, kind: str) -> Any:
    from torch_tarflow import TarFlow

    config = setting.config(kind, {})
    (layers,) = config.flow.layers_per_block
    return TarFlow(
        image_shape(config),
        patch_size=config.flow.patch_size,
        width=config.flow.width,
        blocks=config.flow.num_blocks,
        layers=layers,
        pixel_scale=config.flow.pixel_scale,
    )


def image_shape(config: Any) -> tuple[int, int, int]:
    from jetflow.data import sources

    return sources.find(config.data.name).image_shape


def rounds(function: Callable[[], Any], repeats: int, warm_up: int = 1) -> list[float]:
    """Seconds of each call, after some that compile or warm up."""
    for _ in range(warm_up):
        function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return times


TASKS: dict[str, Callable[..., Result]] = {
    task.__name__: task for task in (peak, train, plan, torch_train, sample, torch_sample, bpd)
}
