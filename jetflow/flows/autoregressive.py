"""TarFlow: autoregressive affine blocks over patches (arXiv 2412.06329)."""

from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jetflow.flows import affine
from jetflow.flows.guidance import Prediction, guided, interleave
from jetflow.nn.attention import platform
from jetflow.nn.causal import KERNEL_INIT, Cache, CausalTransformer, bias_init, enlarged
from jetflow.nn.condition import LevelEmbedding, class_token
from jetflow.nn.dense import at_least_float32
from jetflow.types import BlockInputs, BlockOutputs, Condition, Decoding, Guidance

LARGEST_GUESS = 1e4  # far above any token's value, far below what overflows in a net
# Tokens between enlargements of the cache. Each stage is compiled anew; its steps read the whole
# cache, which is what bounds accelerators.
STAGE, MOST_STAGES = 64, {"tpu": 8, "gpu": 8, "cpu": 3}
SETTLES = "settles_"  # and how many tokens: in the name of a loop, which the plan of a run reads
EMBEDDING_INIT = nn.initializers.normal(stddev=1e-2)


class _Context(NamedTuple):
    """What each step of a decoding needs; P rows are B, or with guidance twice as many.

    Then an image's conditional and unconditional row are neighbours, so that they lie on one device
    where the batch is split over several.
    """

    position: Float[Array, "T W"]  # embeddings in decoding order
    embedding: Float[Array, "P W"]  # of the label and the noise level
    temperature: Float[Array, "P"]
    layer_params: tuple[Any, ...]
    guidance: Guidance | None


class _Window(NamedTuple):
    """The carry of windowed decoding: tokens before `done` are final, those after are guesses."""

    done: Int[Array, ""]
    tokens: Float[Array, "B T D"]
    cache: Cache
    logdet: Float[Array, "B"]
    sweeps: Int[Array, ""]
    residual: Float[Array, ""]


class AutoregressiveBlock(nn.Module):
    """z_i = (x_i − μ_i)·exp(−α_i), with (α_i, μ_i) predicted from the tokens before i.

    Attributes:
        transformer: the causal net.
        token_shape: (T, D).
        num_classes: 0 for a block without class embedding.
        backward: decode the tokens from the last to the first; an array in a loop over blocks.
        volume_preserving: predict no α; the log-determinant is 0.
        noise_conditional: embed the noise level as well.
    """

    transformer: CausalTransformer
    token_shape: tuple[int, int]
    num_classes: int
    backward: bool | Array
    volume_preserving: bool
    noise_conditional: bool = False

    @property
    def net(self) -> CausalTransformer:
        return self.transformer

    def setup(self):
        tokens, features = self.token_shape
        width, dtype = self.transformer.width, self.transformer.dtype
        self.proj_in = nn.Dense(
            width, dtype=dtype, kernel_init=KERNEL_INIT, bias_init=bias_init(features)
        )
        self.position = self.param("position", EMBEDDING_INIT, (tokens, width), jnp.float32)
        if self.num_classes:
            shape = (self.num_classes, width)
            self.class_embedding = self.param("class_embedding", EMBEDDING_INIT, shape, jnp.float32)
        if self.noise_conditional:
            self.level_embedding = LevelEmbedding(width)
        self.proj_out = nn.Dense(
            features if self.volume_preserving else 2 * features,
            dtype=at_least_float32(dtype),
            kernel_init=nn.initializers.zeros_init(),
            bias_init=bias_init(width),
        )

    def forward_blocks(self, x: Float[Array, "B T D"], condition: Condition) -> BlockOutputs:
        """All tokens at once."""
        x = self._in_order(x)
        predict = AutoregressiveBlock._predict
        if self.transformer.remat == "block":
            predict = nn.remat(predict)
        log_scale, shift = predict(self, x, condition)
        z, logdet = affine.normalise(x, log_scale, shift)
        scale = affine.root_mean_square(z)
        return BlockOutputs(self._in_order(z), logdet, logdet[None], scale[None])

    def inverse_blocks(
        self,
        z: Float[Array, "B T D"],
        condition: Condition,
        guidance: Guidance | None,
        decoding: Decoding | None = None,
    ) -> BlockInputs:
        """Token by token, or a window of tokens at a time, against a KV cache."""
        decoding = decoding or Decoding()
        (z,) = affine.widen(self._in_order(z))
        context = self._context(condition, len(z), guidance)
        window = min(decoding.window, z.shape[1] - 1)
        decode = self._by_windows if window > 1 else self._token_by_token
        x, logdet, sweeps, residual = decode(z, context, decoding)
        x = self._in_order(x)
        return BlockInputs(x, logdet, x[None], sweeps[None], residual[None])

    def _token_by_token(self, z, context: _Context, decoding: Decoding):
        """T − 1 steps."""
        batch, tokens, _ = z.shape

        def step(block: AutoregressiveBlock, carry, inputs):
            token, cache, total = carry
            index, next_z = inputs
            predicted, cache = block._extend(token[:, None], index, cache, context)
            x, logdet = affine.denormalise(next_z[:, None], *predicted)
            return (x[:, 0], cache, total + logdet), x[:, 0]

        # Token 0 has no past: its shift and log-scale are zero.
        cache = self.transformer.empty_cache(len(context.embedding), 0, decoding.cache_dtype)
        carry, parts = (z[:, 0], cache, jnp.zeros(batch, z.dtype)), [z[None, :, 0]]
        scanned = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
        inputs = jnp.arange(tokens - 1), z[:, 1:].swapaxes(0, 1)
        for stage, room in _stages(tokens, window=1):
            token, cache, total = carry
            carry = token, enlarged(cache, room), total
            carry, part = scanned(self, carry, jax.tree.map(lambda a, s=stage: a[s], inputs))
            parts.append(part)
        x = jnp.concatenate(parts).swapaxes(0, 1)
        return x, carry[-1], jnp.array(tokens - 1), jnp.zeros((), z.dtype)

    def _by_windows(self, z, context: _Context, decoding: Decoding):
        """Gauss–Seidel–Jacobi: sweep a window of guesses, keep the leading ones that came true.

        A token follows from those before it. So the first one that is not settled is right after
        one sweep, and each further one as long as the guesses before it did not change by more
        than the tolerance. The window then starts behind them, but does not slide past the end:
        the settled tokens in it stay as they are. An image with a settled token that is not finite
        is lost, and keeps no other image waiting.
        """
        batch, tokens, _ = z.shape
        width = min(decoding.window, tokens - 1)

        def sweep(block: AutoregressiveBlock, carry: _Window):
            first, place = jnp.minimum(carry.done, tokens - width), jnp.arange(width)
            settled = first + place < carry.done
            final = jnp.arange(tokens)[:, None] < carry.done
            lost = ~jnp.isfinite(jnp.where(final, carry.tokens, 0.0)).all((1, 2))
            before = _window(carry.tokens, first - 1, width)
            predicted, cache = block._extend(before, first - 1, carry.cache, context)
            value, _ = affine.denormalise(_window(z, first, width), *predicted)
            old = _window(carry.tokens, first, width)
            change = jnp.where(lost[:, None, None], 0.0, _change(value, old)).max((0, 2))
            change = jnp.where(settled, 0.0, change)
            agreed = jnp.cumprod(change <= decoding.tolerance)
            count = 1 + agreed[:-1].sum()
            new = ((place < count) & ~settled)[:, None]
            guess = jnp.where(settled[:, None], old, jnp.where(new, value, _guess(value)))
            return _Window(
                first + count,
                jax.lax.dynamic_update_slice_in_dim(carry.tokens, guess, first, axis=1),
                cache,
                carry.logdet + jnp.where(new, predicted.log_scale, 0.0).sum((1, 2)),
                carry.sweeps + 1,
                jnp.maximum(carry.residual, jnp.where(place < count - 1, change, 0.0).max()),
            )

        carry = _Window(
            jnp.array(1),
            _guess(z).at[:, 0].set(z[:, 0]),
            self.transformer.empty_cache(len(context.embedding), 0, decoding.cache_dtype),
            jnp.zeros(batch, z.dtype),
            jnp.array(0),
            jnp.zeros((), z.dtype),
        )
        for stage, room in _stages(tokens, width):
            carry = carry._replace(cache=enlarged(carry.cache, room))
            goes_on = lambda _, carry, stop=stage.stop: carry.done <= stop  # noqa: E731
            with jax.named_scope(f"{SETTLES}{stage.stop - stage.start}"):
                carry = nn.while_loop(goes_on, sweep, self, carry, split_rngs={"params": False})
        return carry.tokens, carry.logdet, carry.sweeps, carry.residual

    def _context(self, condition: Condition, batch: int, guidance: Guidance | None) -> _Context:
        """With guidance the conditional and the unconditional pass are one batch."""
        embedding, temperature = self._embedding(condition, batch), jnp.ones(batch)
        if guidance is not None:
            without = self._embedding(condition._replace(label=None), batch)
            embedding = interleave(embedding, without)
            temperature = interleave(temperature, jnp.full_like(temperature, guidance.temperature))
        position = self._in_order(self.position[None])[0]
        layer_params = self.transformer.layer_params()
        return _Context(position, embedding, temperature, layer_params, guidance)

    def _extend(self, x: Float[Array, "B S D"], start, cache: Cache, context: _Context):
        """The map of the tokens after each of x, which are the tokens from `start`; the cache."""
        batch, size, _ = x.shape
        position = jax.lax.dynamic_slice_in_dim(context.position, start, size)
        hidden = self.proj_in(jnp.repeat(x, len(context.embedding) // batch, axis=0))
        hidden = hidden + (position + context.embedding[:, None]).astype(hidden.dtype)
        hidden, cache = self.transformer.extend(
            hidden, cache, start, context.temperature, context.layer_params
        )
        predicted, guidance = Prediction(*self._split(self.proj_out(hidden))), context.guidance
        if guidance is not None:
            strength = guidance.scale
            if guidance.annealed:
                index = start + jnp.arange(size)[:, None]
                strength = strength * ((index + 1) / (self.token_shape[0] - 1))
            predicted = guided(predicted, guidance, strength)
        return predicted, cache

    def _predict(self, x, condition: Condition):
        """Log-scale and shift of every token: the net's outputs, shifted by one token."""
        # Summed before it is rounded to the net's dtype, as in `inverse`.
        embedding = self._embedding(condition, len(x))[:, None]
        embedding = self._in_order(self.position[None]) + embedding
        hidden = self.proj_in(x) + embedding.astype(self.transformer.dtype)
        out = self.proj_out(self.transformer(hidden))
        return self._split(jnp.pad(out[:, :-1], ((0, 0), (1, 0), (0, 0))))

    def _split(self, out):
        if self.volume_preserving:
            return jnp.zeros_like(out), out
        return jnp.split(out, 2, axis=-1)

    def _embedding(self, condition: Condition, batch: int) -> Float[Array, "B W"]:
        """That of the label, or of a dropped one the mean over the classes; and of the level."""
        embedding = jnp.zeros((batch, self.transformer.width))
        if self.num_classes:
            mean = self.class_embedding.mean(axis=0)
            embedding = class_token(self.class_embedding, mean, condition.label, batch)
        if self.noise_conditional:
            embedding = embedding + self.level_embedding(condition.noise_level)
        return embedding

    def _in_order(self, tokens: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Between image order and decoding order; its own inverse."""
        if isinstance(self.backward, bool):
            return tokens[:, ::-1] if self.backward else tokens
        return jnp.where(self.backward, tokens[:, ::-1], tokens)


def _stages(tokens: int, window: int) -> list[tuple[slice, int]]:
    """The stages of a decoding, between which the cache grows, and its room in each.

    A sweep reads the whole cache. Yet the stages are few, as each is a loop of its own. A step is
    the settling of a token after the first, and a window that begins at a stage's end has room.
    """
    steps = tokens - 1
    most = MOST_STAGES.get(platform() or jax.default_backend(), MOST_STAGES["cpu"])
    count = min(-(-steps // STAGE), most)
    rooms = [steps * number // count for number in range(1, count + 1)]
    rooms = [room for room in rooms if room == steps or room >= window]
    stops = [room if room == steps else room - window + 1 for room in rooms]
    return [(slice(*pair), room) for pair, room in zip(pairwise([0, *stops]), rooms, strict=True)]


def _change(value: Float[Array, "B S D"], guess: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    """By how much a guess was off: relative to values above 1, whose rounding grows with them."""
    return jnp.abs(value - guess) / jnp.maximum(jnp.abs(value), 1)


def _guess(x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    """A value that does no harm where it is wrong: masked attention multiplies it by zero.

    No settled token passes through this, so no answer is changed.
    """
    return jnp.clip(jnp.nan_to_num(x, nan=0.0), -LARGEST_GUESS, LARGEST_GUESS)


def _window(tokens: Float[Array, "B N D"], start, size: int) -> Float[Array, "B S D"]:
    return jax.lax.dynamic_slice_in_dim(tokens, start, size, axis=1)
