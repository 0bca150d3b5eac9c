"""The options of sampling, which commands, evaluations and `Model.sample` share."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jetflow.noise import NOISY, Noise
from jetflow.options import Options, option
from jetflow.sampling.ancestral import Sampler
from jetflow.sampling.decoding import CACHE_DTYPES, METHODS, TOLERANCE, WINDOW, decodings
from jetflow.sampling.denoise import Denoising
from jetflow.types import GUIDANCE_RULES, Flow, Guidance, UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions(Options):
    """All that an image depends on, but for the flow, the seed and the label."""

    temperature: float = option(1.0, "of the prior: multiplies its standard deviation", least=0.0)
    guidance: float = option(0.0, "strength of guidance", least=0.0)
    guide_what: str = option("ab", "guided: a (log-scale), b (shift)", choices=("a", "b", "ab"))
    guide_rule: str = option(
        "log_scale",
        "guidance of log-scales and shifts (TarFlow), of scales and shifts (iTARFlow), or by "
        "STARFlow's rule, which widens no distribution",
        choices=GUIDANCE_RULES,
    )
    guide_blocks: int = option(0, "guided, of those decoded first; 0: all", least=0)
    attention_temperature: float = option(
        1.0, "of guidance's unconditional pass; must differ from 1 without labels"
    )
    annealed: bool = option(False, "let guidance grow from the first token to the last")
    denoise: bool = option(False, "denoise, in one step by default, after noise in training")
    denoise_std: float | None = option(
        None, "standard deviation that denoise removes; default: that of the training", least=0.0
    )
    denoise_steps: int = option(
        1, "of denoise, from noise_level to the training's least level; noise-conditional", least=1
    )
    denoise_clip: bool = option(False, "clip what each step of denoise takes for the clean image")
    denoise_eta: float = option(
        0.0, "share of new noise in each step of denoise but the last: 0 none, 1 all", least=0.0
    )
    noise_level: float | None = option(
        None, "that a noise-conditional flow draws; default: the training's largest", least=1e-6
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
            self.guidance, self.guide_what, self.attention_temperature, self.annealed,
            self.guide_rule, self.guide_blocks,
        )  # fmt: skip
        how = decodings(
            flow, "jacobi" if self.method == "auto" else self.method, window=self.window,
            tolerance=self.tolerance, cache_dtype=self.cache_dtype,
        )  # fmt: skip
        if self.window != WINDOW and self.method != "jacobi":
            raise UsageError(
                f"window is {self.window}, which has no effect with method {self.method}; add "
                "method jacobi, or leave it out"
            )
        level, denoising = self._level(noise), self._denoising(noise)
        return Sampler(flow, variables, guidance, self.temperature, denoising, how, mesh, level)

    def _level(self, noise: Noise) -> float | None:
        """The noise level of the images that a noise-conditional flow draws."""
        if noise.kind == "levels":
            return noise.t1 if self.noise_level is None else self.noise_level
        if self.noise_level is not None:
            raise UsageError(
                f"noise_level is {self.noise_level}, which is for flows trained with noise of all "
                "levels; leave it out"
            )
        return None

    def _denoising(self, noise: Noise) -> Denoising | None:
        """What denoises after a training with `noise`.

        Raises:
            UsageError: if there is no noise to remove, or an option has no effect.
        """
        if not self.denoise:
            for field in dataclasses.fields(self):
                value = getattr(self, field.name)
                if field.name.startswith("denoise_") and value != field.default:
                    raise UsageError(f"{field.name} is {value} without denoise; add denoise")
            return None
        if noise.kind not in NOISY:
            raise UsageError("denoise needs a flow trained with gaussian noise; leave it out")
        std = self.denoise_std
        if noise.kind == "levels" and std is not None:
            raise UsageError(
                f"denoise_std is {std}, but this flow is told its noise; set noise_level instead"
            )
        first = self._level(noise) or (noise.std if std is None else std)
        if not first:
            return None
        levels = np.linspace(first, noise.t0, self.denoise_steps).tolist()
        return Denoising(tuple(levels), self.denoise_clip, self.denoise_eta)

    def used(self, noise: Noise) -> dict[str, Any]:
        """These options for the record: `denoise_std` and `noise_level` as in use, else None."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(SamplingOptions)}
        level, std = self._level(noise), self.denoise_std
        if self.denoise and level is None and std is None:
            std = noise.std
        return values | {"denoise_std": std, "noise_level": level}
