"""A trained flow: samples, likelihoods and latents, as its training asks for them."""

import dataclasses
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Num

from jetflow import calibration, hosts, sharding
from jetflow.archive import collect
from jetflow.buckets import as_path
from jetflow.checkpoint import Checkpoints
from jetflow.evals import evaluation
from jetflow.evals.likelihoods import bits_per_dim
from jetflow.evals.settings import EvaluateOptions, TrainedFlow
from jetflow.fields import flat
from jetflow.files import METRICS, read_metrics
from jetflow.flows.stack import check_labels
from jetflow.noise import Noise, Purpose, key_for
from jetflow.pictures import labels_in_turn
from jetflow.sampling import latents
from jetflow.sampling.ancestral import Drawn, Sampler, check_guided, draw_all, not_finite
from jetflow.sampling.sampling_options import SamplingOptions
from jetflow.training.step import abstract_variables
from jetflow.types import AnyArray, Decoding, Shape, UsageError, is_arrays
from jetflow.workdir import read_flow


class Model(TrainedFlow):
    """A trained flow; see `TrainedFlow` for its attributes."""

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.flow.image_shape))
        classes = f", {self.flow.num_classes} classes" if self.flow.num_classes else ""
        return (
            f"<{self.config['flow']['kind']} of {shape} images{classes}, {self.noise.kind} noise, "
            f"{self.weights} weights of step {self.step} in {self.workdir}>"
        )

    def sampler(self, options: SamplingOptions, batch_size: int) -> Sampler:
        """The sampler for these options; method "auto" is measured for this batch size.

        Raises:
            UsageError: on options that this flow does not have.
        """
        sampler = options.sampler(self.flow, self.variables, self.noise, self.mesh)
        if options.method != "auto":
            return sampler
        base = Decoding(1, options.tolerance, options.cache_dtype)
        path = self.workdir / "checkpoints" / "decoding.json"
        decoding = calibration.fastest(sampler, base, batch_size, path=path, step=self.step)
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

    def sample(
        self,
        num: int,
        *,
        label: int | Int[AnyArray, "N"] | None = None,
        seed: int = 0,
        batch_size: int = 64,
        defaults: str | None = None,
        **fields: Any,
    ) -> Num[np.ndarray, "N *X"]:
        """`num` images, rounded after gaussian noise in training, and floored after uniform noise.

        Of a flow of arrays they are float32 [N, T, D], as they are drawn.

        Args:
            label: one class for all images, or one an image, -1 for none; default: labels take
                turns. Image i depends on the seed, its label and i alone.
            defaults: "run" samples as the pictures of the training do, by the run's `config.eval`.
            fields: of `SamplingOptions`, such as guidance=1.0.

        Raises:
            UsageError: on a label or option that this flow does not have.

        Warns if some of the images are not finite.
        """
        if defaults not in (None, "run"):
            raise UsageError(f'defaults is {defaults!r}; expected "run" or None')
        options = SamplingOptions.of(self.config["eval"] if defaults else {}, **fields)
        label = labels_in_turn(num, self.flow.num_classes) if label is None else label
        batches = self.draw(options, num=num, label=label, seed=seed, batch_size=batch_size)
        drawn = collect(batches, self.noise.kind, num=num, keep=num)
        if complaint := not_finite(drawn.finite):
            warnings.warn(complaint, RuntimeWarning, stacklevel=2)
        return drawn.images

    def bits_per_dim(
        self,
        images: Num[AnyArray, "B *X"],
        label: int | Int[AnyArray, "B"] | None = None,
        *,
        seed: int = 0,
        noise: Noise | None = None,
    ) -> Float[Array, "B"]:
        """−log2 p per dimension of each image, under one draw of the noise, all images at once.

        With the default, uniform dequantisation, it is the `bpd` of `jetflow evaluate`; of arrays,
        to which nothing is added, the `density_bpd`.

        Args:
            images: whole pixel values 0..255; uint8 inside `jax.jit`; or arrays.
            label: of the images, p(x | label); None or -1 for none.
            noise: pass `model.noise` for the likelihood that a training with gaussian noise raises,
                or `model.noise.at(0.1)` for that of a noise level.

        Raises:
            UsageError: on images that are no pixels, such as floats in [0, 1], or a bad label.
        """
        key = key_for(seed, 0, Purpose.EVALUATE)
        pixels = jnp.asarray(_pixels(images, self.flow.image_shape))
        label = check_labels(self.flow, label, len(pixels))
        noise = noise or self.noise.of_data(self.flow.image_shape)
        return bits_per_dim(self.flow, self.variables, pixels, label, key, noise=noise)

    def encode(
        self,
        images: Num[AnyArray, "N *X"],
        label: int | Int[AnyArray, "N"] | None = None,
        batch_size: int = 64,
    ) -> tuple[Float[np.ndarray, "N T D"], Float[np.ndarray, "N"]]:
        """The latents of images, at the centre of the noise, and log |det ∂z/∂x| in nats."""
        sampler = self.sampler(SamplingOptions(), batch_size)
        pixels = _pixels(images, self.flow.image_shape)
        label = check_labels(self.flow, label, len(pixels))
        return latents.encode(sampler, pixels, label, self.noise.kind, batch_size)

    def decode(
        self,
        z: Float[AnyArray, "N T D"],
        label: int | Int[AnyArray, "N"] | None = None,
        batch_size: int = 64,
        **fields: Any,
    ) -> Num[np.ndarray, "N *X"]:
        """The images of latents; `fields` are of `SamplingOptions`."""
        sampler = self.sampler(SamplingOptions(**fields), batch_size)
        label = check_labels(self.flow, label, len(z))
        check_guided(sampler.guidance, label)
        return latents.decode(sampler, z, label, batch_size).images(self.noise.kind)

    def evaluate(self, metrics: Sequence[str], **fields: Any) -> list[dict[str, Any]]:
        """The records of metrics such as "bpd" and "fid", as `jetflow evaluate` writes them.

        They have "value", "standard_error" and all that the value depends on.

        Args:
            fields: of `EvaluateOptions`, such as num_samples=50_000.

        Raises:
            UsageError: on what this flow, its data or the reference do not have.
        """
        return evaluation.evaluate(self, EvaluateOptions(metrics=tuple(metrics), **fields))


def _pixels(images: Num[AnyArray, "B *X"], shape: Shape) -> Num[AnyArray, "B *X"]:
    """Images as uint8, or arrays as float32.

    Raises:
        UsageError: if their values are no whole numbers 0..255, or floats that are all within 0..1;
            of arrays, if they are not finite.
    """
    if is_arrays(shape):
        if not isinstance(images, Tracer) and not np.isfinite(images).all():
            raise UsageError("arrays have values that are not finite; leave those out")
        return images.astype(np.float32)
    if images.dtype == np.uint8:
        return images
    if isinstance(images, Tracer):
        raise UsageError(f"images are {images.dtype} inside jax.jit; convert them to uint8 before")
    values = np.asarray(images)
    if np.issubdtype(values.dtype, np.floating) and values.min() >= 0 and values.max() <= 1:
        raise UsageError(
            "images are floats in [0, 1]; expected pixel values 0..255: give "
            "(255 * images).round().astype('uint8')"
        )
    pixels = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    if (pixels != values).any():
        raise UsageError(
            f"images have the value {values[pixels != values][0]:g}; expected whole pixel values "
            "0..255, as uint8"
        )
    return pixels


def load_model(
    workdir: str | os.PathLike,
    step: int | None = None,
    mesh: Mesh | None = None,
    *,
    weights: str = "auto",
) -> Model:
    """The flow of a run, at its newest sound checkpoint or the one of `step`.

    Args:
        mesh: where the variables are laid out; default: all devices.
        weights: "ema", averaged ones; "params"; or "auto", averaged ones where the run has them.

    Raises:
        UsageError: if there is no run, no checkpoint, or none that is sound.
    """
    workdir, mesh = as_path(workdir), mesh or sharding.make_mesh()
    config, flow, best = read_flow(workdir)
    hosts.compare(flat(config))
    choices = {"auto": best, best: best, "params": "params"}
    if weights not in choices:
        has = f"the run in {workdir} has {', '.join(choices)}"
        raise UsageError(f"weights is {weights!r}, but {has}; ask for one of these")
    weights = choices[weights]
    layout = config.get("mesh")  # which a run does not keep: it may be anything
    rules = layout.get("rules", ()) if isinstance(layout, dict) else ()
    abstract = abstract_variables(flow)
    shardings = sharding.state_shardings(mesh, abstract, rules)
    abstract = sharding.placed(abstract, shardings)
    wanted = {weights: abstract.pop("params"), "collections": abstract}
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        if checkpoints.latest() is None and read_metrics(workdir / METRICS):
            first = config["train"]["checkpoint_every"]
            raise UsageError(f"the run in {workdir} has no checkpoint yet; step {first} makes one")
        restored, step = checkpoints.restore(wanted, step)
    variables = {"params": restored[weights], **restored["collections"]}
    return Model(workdir, config, flow, variables, step, mesh, weights)
