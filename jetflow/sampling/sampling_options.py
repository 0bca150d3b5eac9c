"""The options of sampling, which commands, evaluations and `Model.sample` share."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from jetflow.noise import Noise
from jetflow.options import Options, option
from jetflow.sampling.ancestral import Sampler
from jetflow.sampling.decoding import CACHE_DTYPES, METHODS, TOLERANCE, WINDOW, decodings
from jetflow.types import Flow, Guidance, UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions(Options):
    """All that an image depends on, but for the flow, the seed and the label."""

    temperature: float = option(1.0, "of the prior: multiplies its standard deviation", least=0.0)
    guidance: float = option(0.0, "strength of guidance", least=0.0)
    guide_what: str = option("ab", "guided: a (log-scale), b (shift)", choices=("a", "b", "ab"))
    attention_temperature: float = option(
        1.0, "of guidance's unconditional pass; must differ from 1 without labels"
    )
    annealed: bool = option(False, "let guidance grow from the first token to the last")
    denoise: bool = option(False, "one denoising step, for gaussian training noise")
    denoise_std: float | None = option(
        None, "standard deviation that denoise removes; default: that of the training", least=0.0
    )
    method: str = option(
        "cached",
        "how a TarFlow is inverted: token by token, by windows of tokens in parallel, or as is "
        "fastest on this machine, which is measured once",
        choices=(*METHODS, "auto"),
    )
    window: int = option(WINDOW, "of jacobi: tokens a sweep", least=1)
    tolerance: float = option(
        TOLERANCE,
        "of jacobi and auto: a token is accepted when a sweep changes those before it by at most "
        "this, in units of the blocks' tokens; 0 gives what token by token gives, to rounding",
        least=0.0,
    )
    cache_dtype: str | None = option(
        None, "of cached keys and values; default: the net's", choices=CACHE_DTYPES
    )

    @classmethod
    def of(cls, section: Mapping[str, Any], **fields: Any) -> "SamplingOptions":
        """The options that a config's section `eval` gives for samples, with some changed."""
        names = {field.name for field in dataclasses.fields(SamplingOptions)}
        return cls(**{name: section[name] for name in names & set(section)} | fields)

    def sampler(
        self, flow: Flow, variables: Any, noise: Noise, mesh: Mesh | None = None
    ) -> Sampler:
        """The sampler of a flow that was trained with `noise`; method "auto" by windows.

        Raises:
            UsageError: on options that this flow does not have.
        """
        guidance = Guidance(
            self.guidance, self.guide_what, self.attention_temperature, self.annealed
        )
        how = decodings(
            flow, "jacobi" if self.method == "auto" else self.method, window=self.window,
            tolerance=self.tolerance, cache_dtype=self.cache_dtype,
        )  # fmt: skip
        if self.window != WINDOW and self.method != "jacobi":
            raise UsageError(
                f"window is {self.window}, which has no effect with method {self.method}; add "
                "method jacobi, or leave it out"
            )
        std = self.denoised_std(noise)
        return Sampler(flow, variables, guidance, self.temperature, std, how, mesh)

    def denoised_std(self, noise: Noise) -> float:
        """σ of the denoising step after a training with `noise`; 0 for none.

        Raises:
            UsageError: if that noise is not gaussian.
        """
        if not self.denoise:
            if self.denoise_std is not None:
                raise UsageError(f"denoise_std is {self.denoise_std} without denoise; add denoise")
            return 0.0
        if noise.kind != "gaussian":
            raise UsageError("denoise needs a flow trained with gaussian noise; leave it out")
        return noise.std if self.denoise_std is None else self.denoise_std

    def used(self, noise: Noise) -> dict[str, Any]:
        """These options for the record: `denoise_std` as in use, None without denoising."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(SamplingOptions)}
        return values | {"denoise_std": self.denoised_std(noise) if self.denoise else None}
