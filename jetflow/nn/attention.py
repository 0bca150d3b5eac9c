"""One door to attention: written out, or as the fused kernel of the platform.

Written out, the logits [B, N, T, T] go through memory several times, which bounds every
accelerator. The fused kernels never store them: Splash attention on TPUs, cuDNN's on NVIDIA GPUs.
"""

import functools
import math
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from jetflow.nn.dense import at_least_float32, matmul_precision, mesh_axes, parts
from jetflow.types import UsageError

Heads: TypeAlias = Float[Array, "B T N H"]
METHODS = ("auto", "xla", "splash", "cudnn")
KERNELS = {"tpu": "splash", "gpu": "cudnn"}
LANES, LARGEST_BLOCK = 128, 512  # tokens in a register of a TPU, and in a tile of its kernel


class Choice(NamedTuple):
    """The form of attention that is taken, and why no fused one is, if none is."""

    method: str
    reason: str = ""

    def __str__(self) -> str:
        return self.method + (f" ({self.reason})" if self.reason else "")


class Cached(NamedTuple):
    """Keys, or values, of a layer, of all tokens so far.

    G heads lie side by side: on a TPU as many as fill its registers, whose rest would be padding
    in memory. int8 entries have a scale for each head of a token, which they are multiplied by.
    """

    entries: Num[Array, "B N//G T G*H"]
    scale: Float[Array, "B N T"] | None

    @classmethod
    def empty(cls, batch: int, heads: int, tokens: int, head_dim: int, dtype) -> "Cached":
        target = platform() or jax.default_backend()
        is_padded = target == "tpu" and batch // parts("batch") % LANES  # else rows fill them
        side = max(1, LANES // head_dim) if is_padded else 1
        side = side if heads // parts("heads") % side == 0 else 1
        shape = (batch, heads // side, tokens, side * head_dim)
        is_scaled = jnp.dtype(dtype) == jnp.int8
        scale = jnp.zeros((batch, heads, tokens), jnp.bfloat16) if is_scaled else None
        return cls(jnp.zeros(shape, dtype), scale)

    def written(self, new: Float[Array, "B N S H"], start: Int[Array, ""]) -> "Cached":
        """With the tokens from `start` on replaced."""
        scale = None
        if self.scale is not None:
            largest = jnp.abs(new).max(axis=-1, initial=1e-6).astype(jnp.float32)
            scale = (largest / 127).astype(self.scale.dtype)
            new = jnp.clip(jnp.rint(new / scale[..., None].astype(jnp.float32)), -127, 127)
        batch, groups, _, width = self.entries.shape
        new = new.reshape(batch, groups, -1, *new.shape[2:]).swapaxes(2, 3)
        new = new.reshape(batch, groups, -1, width)

        def write(old: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis=2)

        return jax.tree.map(write, self, Cached(new, scale))


class KVCache(NamedTuple):
    """Keys and values of a layer.

    Each layer has arrays of its own, which a loop updates in place: of one array for all layers
    it would copy the whole at each token. With heads before tokens, one token's attention is a
    product of matrices as they lie in memory.
    """

    key: Cached
    value: Cached


def choose(
    method: str, *, platform: str, dtype: jnp.dtype, tokens: int, head_dim: int, precision: str
) -> Choice:
    """The form that `method` comes to.

    Args:
        method: one of `METHODS`; "auto" takes the platform's kernel where that serves.
        platform: "tpu", "gpu" or "cpu".
        precision: of the matrix products, as `jax.default_matmul_precision` takes it.

    Raises:
        UsageError: a kernel is asked for where it cannot serve.
    """
    if method == "xla" or (method == "splash" and platform != "gpu"):
        return Choice(method)  # on CPUs Splash is interpreted
    kernel, reason = KERNELS.get(platform, ""), ""
    if method == "splash":
        reason = f"Splash attention is for TPUs, and this is a {platform}"
    elif method == "cudnn" and kernel != "cudnn":
        reason = f"cuDNN is for NVIDIA GPUs, and this is a {platform}"
    elif not kernel:
        reason = f"no kernel for a {platform}"
    elif kernel == "cudnn" and dtype not in (jnp.bfloat16, jnp.float16):
        reason = f"cuDNN takes no {dtype.name}"
    elif kernel == "cudnn" and (old := older_than_ampere()):
        reason = f"cuDNN's takes compute capability 8.0 and newer, and this GPU has {old}"
    elif kernel == "cudnn" and (head_dim > 128 or head_dim % 8):
        reason = f"cuDNN takes heads of 8, 16, … 128 features, not {head_dim}"
    elif kernel == "splash" and head_dim % 64:
        reason = f"a head of {head_dim} features is no multiple of 64"
    elif dtype == jnp.float64:
        reason = "no kernel computes in float64"
    elif kernel == "splash" and tokens % LANES:
        reason = f"{tokens} tokens are no multiple of {LANES}"
    elif kernel == "splash" and dtype == jnp.float32 and precision != "default":
        reason = f"the gradient of the kernel would not have precision {precision}"
    if method != "auto" and reason:
        raise UsageError(f"config.flow.attention is {method!r}, but {reason}; set it to 'auto'")
    return Choice("xla", reason) if reason else Choice(kernel)


def older_than_ampere() -> str:
    """The compute capability of this machine's GPUs, if it is below 8.0."""
    if jax.default_backend() != "gpu":
        return ""  # also where programs are compiled for GPUs that are not here
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    major = capability.partition(".")[0]
    return capability if major.isdecimal() and int(major) < 8 else ""


def platform() -> str | None:
    """Of the devices of the mesh that a program is traced for, if it is traced for one."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else getattr(mesh.abstract_device, "platform", None)


def attend(
    query: Heads,
    key: Heads,
    value: Heads,
    *,
    causal: bool,
    method: str,
) -> Heads:
    """Attention of all tokens to all, or to the earlier ones and themselves.

    Fused kernels are for programs that are compiled under a mesh, `sharding.on`, whose devices say
    for which platform. Elsewhere, where parameters are initialised say, attention is written out.
    """
    target = platform()
    if target is None:
        return written_out(query, key, value, causal)
    tokens, head_dim = query.shape[1], query.shape[3]
    chosen, _ = choose(
        method,
        platform=target,
        dtype=query.dtype,
        tokens=tokens,
        head_dim=head_dim,
        precision=matmul_precision() or "default",
    )
    if chosen == "cudnn":
        return jax.nn.dot_product_attention(
            query, key, value, is_causal=causal, implementation="cudnn"
        )
    # Rows and heads of each device; one image, as at initialisation, cannot be split.
    is_even = query.shape[0] % parts("batch") == 0 == query.shape[2] % parts("heads")
    if chosen == "splash" and is_even:
        kernel = functools.partial(_splash, causal=causal, interpret=target != "tpu")
        spec = mesh_axes("batch", None, "heads")
        sharded = jax.shard_map(kernel, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
        return sharded(query, key, value)
    return written_out(query, key, value, causal)


def written_out(
    query: Heads,
    key: Heads,
    value: Heads,
    causal: bool,
) -> Heads:
    """The definition, with the softmax in at least float32."""
    logits = jnp.einsum("bsnh,btnh->bnst", query, key)
    visible = jnp.tri(query.shape[1], dtype=bool) if causal else True
    weights = _softmax(logits, math.sqrt(query.shape[-1]), visible)
    return jnp.einsum("bnst,btnh->bsnh", weights.astype(value.dtype), value)


def attend_cached(
    query: Float[Array, "B N S H"],
    cache: KVCache,
    visible: Bool[Array, "S T"],
    temperature: Float[Array, "B"],
) -> Float[Array, "B N S H"]:
    """Attention of a few query tokens to the visible ones of a cache."""
    batch, heads, size, head_dim = query.shape
    key, value = (cached.entries.astype(query.dtype) for cached in cache)
    key_scale, value_scale = (
        1.0 if cached.scale is None else cached.scale[:, :, None] for cached in cache
    )
    side = key.shape[-1] // head_dim
    own = jnp.eye(side, dtype=query.dtype)[:, None, :, None]  # of the heads in a group
    rows = (batch, heads // side, side * size, -1)
    spread = query.reshape(batch, heads // side, side, size, 1, head_dim) * own
    logits = jnp.einsum("bnsh,bnth->bnst", spread.reshape(rows), key)
    logits = logits.reshape(batch, heads, size, -1)
    logits = logits.astype(at_least_float32(logits.dtype)) * key_scale
    scale = temperature[:, None, None, None] * math.sqrt(head_dim)
    # The softmax, but for its division: so the weights are written to memory in the net's dtype.
    logits = jnp.where(visible, logits / scale, -jnp.inf)
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    total = weights.sum(axis=-1, keepdims=True)
    if (platform() or jax.default_backend()) == "cpu":  # rounded as `written_out` rounds them
        weights, total = weights / total, 1.0
    weights = (weights * value_scale).astype(query.dtype)
    mixed = jnp.einsum("bnst,bnth->bnsh", weights.reshape(rows), value)
    mixed = mixed.reshape(batch, heads // side, side, size, side, head_dim) * own
    return (mixed.sum(axis=-2).reshape(query.shape) / total).astype(query.dtype)


def _softmax(logits: Array, scale: Array | float, visible: Array | bool) -> Array:
    """softmax(logits / scale) over the visible positions of the last axis, at least in float32.

    `jax.nn.dot_product_attention` computes it in float32 also for float64 inputs, which would
    hide errors of that size from the laws that the flows are tested by.
    """
    logits = logits.astype(at_least_float32(logits.dtype)) / scale
    return jax.nn.softmax(jnp.where(visible, logits, -jnp.inf), axis=-1)


def tile(tokens: int) -> int:
    """The side of a tile of logits that Splash attention computes at once."""
    return next(size for size in (LARGEST_BLOCK, 256, LANES) if tokens % size == 0)


def _splash(
    query: Heads,
    key: Heads,
    value: Heads,
    *,
    causal: bool,
    interpret: bool,
) -> Heads:
    """Splash attention of one device's rows and heads, with tokens filled up to whole registers."""
    # Imported where it is needed: it takes half a second.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, tokens, heads, head_dim = query.shape
    padded = -(-tokens // LANES) * LANES
    block = tile(padded)
    layout = kernels.QKVLayout.SEQ_MINOR  # heads of 64 fill half of a register, tokens all of it
    mask = (masks.CausalMask if causal else masks.FullMask)((padded, padded))
    splash = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=kernels.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            use_fused_bwd_kernel=True,
            q_layout=layout,
            k_layout=layout,
            v_layout=layout,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    # A segment of their own for the tokens of the padding, which come last anyhow if causal.
    segments = jnp.asarray(jnp.arange(padded) >= tokens, jnp.int32)
    ids = None if causal or padded == tokens else kernels.SegmentIds(segments, segments)
    rows = [
        jnp.pad(x, ((0, 0), (0, padded - tokens), (0, 0), (0, 0))).swapaxes(1, 2)
        for x in (query / math.sqrt(head_dim), key, value)
    ]
    with jax.named_scope("causal" if causal else "full"):  # which the plan of a run reads
        mixed: Any = jax.vmap(functools.partial(splash, segment_ids=ids))(*rows)
    return mixed.swapaxes(1, 2)[:, :tokens].astype(query.dtype)
