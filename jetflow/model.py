"""A trained flow: samples, likelihoods and latents, as its training asks for them."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from jaxtyping import Int

from jetflow import calibration, sharding
from jetflow.checkpoint import Checkpoints
from jetflow.files import METRICS, read_metrics
from jetflow.noise import Noise, Purpose, key_for
from jetflow.sampling.ancestral import Drawn, Sampler, draw_all
from jetflow.sampling.decoding import decodings
from jetflow.sampling.options import SamplingOptions
from jetflow.training.step import abstract_variables
from jetflow.types import AnyArray, Decoding, Flow, UsageError
from jetflow.workdir import read_flow


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A trained flow.

    Attributes:
        workdir: of the run.
        config: the resolved config of its training, a tree of plain values.
        flow, variables: the flow, with its averaged parameters where the run has them.
        step: of the checkpoint.
        mesh: the devices on which the variables lie.
    """

    workdir: Path
    config: dict[str, Any]
    flow: Flow
    variables: dict[str, Any]
    step: int
    mesh: Mesh

    @property
    def noise(self) -> Noise:
        """The noise of its training."""
        return Noise(**self.config["noise"])

    @property
    def weights(self) -> str:
        """Which parameters of the training these are: "ema", averaged ones, or "params"."""
        return "ema" if self.config["train"]["ema_decay"] else "params"

    def sampler(self, options: SamplingOptions, batch_size: int) -> Sampler:
        """The sampler for these options; method "auto" is measured for this batch size.

        Raises:
            UsageError: on options that this flow does not have.
        """
        sampler = Sampler(
            self.flow,
            self.variables,
            guidance=options.prescribed_guidance(),
            temperature=options.temperature,
            denoise=options.denoised_std(self.noise),
            mesh=self.mesh,
        )
        if options.method == "auto":
            decodings(self.flow, "jacobi")  # raises for a flow without windows
            base = Decoding(1, options.tolerance, options.cache_dtype)
            path = self.workdir / "checkpoints" / "decoding.json"
            decoding = calibration.fastest(sampler, base, batch_size, path=path, step=self.step)
        else:
            decoding = decodings(
                self.flow, options.method, window=options.window, tolerance=options.tolerance,
                cache_dtype=options.cache_dtype,
            )  # fmt: skip
        return dataclasses.replace(sampler, decoding=decoding)

    def draw(
        self,
        options: SamplingOptions,
        *,
        num: int,
        label: int | Int[AnyArray, "N"] | None,
        seed: int,
        batch_size: int,
        start: int = 0,
    ) -> Iterator[Drawn]:
        """The images start, …, num − 1 in batches; `drawn.images(model.noise.kind)` is uint8.

        Image i depends on the seed, its label and i alone.
        """
        sampler = self.sampler(options, min(batch_size, num))
        key = key_for(seed, 0, Purpose.SAMPLE)
        return draw_all(sampler, key, num=num, label=label, batch_size=batch_size, start=start)


def load_model(
    workdir: str | os.PathLike, step: int | None = None, mesh: Mesh | None = None
) -> Model:
    """The flow of a run, at its newest sound checkpoint or the one of `step`.

    Args:
        mesh: where the variables are laid out; default: all devices.

    Raises:
        UsageError: if there is no run, no checkpoint, or none that is sound.
    """
    workdir, mesh = Path(workdir), mesh or sharding.make_mesh()
    config, flow, weights = read_flow(workdir)
    abstract = abstract_variables(flow)
    shardings = sharding.state_shardings(mesh, abstract, config.get("mesh", {}).get("rules", ()))
    abstract = sharding.placed(abstract, shardings)
    wanted = {weights: abstract.pop("params"), "collections": abstract}
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        if checkpoints.latest() is None and read_metrics(workdir / METRICS):
            first = config["train"]["checkpoint_every"]
            raise UsageError(f"the run in {workdir} has no checkpoint yet; step {first} makes one")
        restored, step = checkpoints.restore(wanted, step)
    variables = {"params": restored[weights], **restored["collections"]}
    return Model(workdir, config, flow, variables, step, mesh)
