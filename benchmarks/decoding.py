"""A TarFlow decoded token by token, by windows of tokens, and as `--method auto` chooses.

All from the same latents, without guidance and with it; the images are compared:

    python benchmarks/decoding.py --workdir runs/tar32 --num 64

Each method's first call, which compiles, is not timed; `auto` is one of the others, or faster.
"""

import argparse
import json
import time

import jax
import numpy as np

import jetflow
from jetflow import calibration
from jetflow.sampling.ancestral import Drawn, Sampler
from jetflow.sampling.decoding import TOLERANCE, decodings
from jetflow.types import Decoding, Guidance

HALF_RANGE = 128  # pixel values in a unit of [-1, 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", required=True, help="of a trained TarFlow without labels")
    parser.add_argument("--num", type=int, default=64, help="images, in one batch")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--methods", default="cached,jacobi", help="some of cached,jacobi,auto")
    arguments = parser.parse_args()
    model = jetflow.load_model(arguments.workdir)
    for guidance in (None, Guidance(1.0, temperature=0.5)):
        plain = Sampler(model.flow, model.variables, guidance=guidance)
        z = plain.latents(jax.random.key(0), np.arange(arguments.num))
        reference = None
        for method in arguments.methods.split(","):
            sampler = Sampler(
                model.flow, model.variables, guidance=guidance, decoding=how(plain, method, len(z))
            )
            drawn, seconds = timed(sampler, z, arguments.repeats)
            reference = drawn if reference is None else reference
            report(
                sampler,
                drawn,
                reference,
                guided=guidance is not None,
                method=method,
                seconds=seconds,
            )


def how(sampler: Sampler, method: str, batch_size: int) -> tuple[Decoding, ...]:
    if method != "auto":
        return decodings(sampler.flow, method)
    base = Decoding(1, TOLERANCE, None)
    windows = calibration.calibrate(sampler, base, batch_size)
    return tuple(Decoding(window, TOLERANCE, None) for window in windows)


def timed(sampler: Sampler, z: np.ndarray, repeats: int) -> tuple[Drawn, float]:
    """The images, and the median of the seconds that they take."""
    drawn, seconds = sampler.decode(z, None), []
    for _ in range(repeats):
        start = time.perf_counter()
        sampler.decode(z, None)
        seconds.append(time.perf_counter() - start)
    return drawn, float(np.median(seconds)) if seconds else float("nan")


def report(
    sampler: Sampler, drawn: Drawn, first: Drawn, *, guided: bool, method: str, seconds: float
):
    tokens = (sampler.flow.latent_shape[0] - 1) * len(drawn.sweeps)
    print(json.dumps({
        "guided": guided,
        "method": method,
        "images": len(drawn.pixels),
        "windows": [each.window for each in sampler.decoding],
        "sweeps": drawn.sweeps,
        "share_of_evaluations": sum(drawn.sweeps) / tokens,
        "residual": drawn.residual,
        # From the first method's images, in units of [-1, 1].
        "largest_difference": float(np.abs(drawn.pixels - first.pixels).max() / HALF_RANGE),
        "seconds": seconds,
    }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
