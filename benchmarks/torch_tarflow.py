"""TarFlow in PyTorch, written from its equations (arXiv 2412.06329), to measure jetflow against.

The tensors have the names of apple/ml-tarflow, so `torch.load` of what `jetflow.convert.to_tarflow`
writes gives the weights of a jetflow flow. tests/test_benchmarks.py checks in float32 that latents,
log-determinants and samples are then jetflow's.

It is written to be fast. As in jetflow, matrix products and what lies between the layers are in
bfloat16, and layer norms, the affine maps and their parameters in float32. Attention is
`scaled_dot_product_attention`, Adam is the fused one, the blocks are compiled in training. Samples
are drawn token by token against a cache that is allocated once; on a GPU a step of a block is
recorded as a CUDA graph, besides the plain loop.
"""

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

HEAD_DIM = 64
STAGES = 4  # lengths of the cache that a CUDA graph is recorded for


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, [B, N, T, H] each."""
        batch, tokens, width = x.shape
        qkv = linear(self.qkv, self.norm(x.float()))
        heads = (batch, tokens, 3, width // HEAD_DIM, HEAD_DIM)
        return qkv.reshape(heads).permute(2, 0, 3, 1, 4).unbind()

    def merged(self, mixed: Tensor) -> Tensor:
        return linear(self.proj, mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.main = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.main[1](linear(self.main[0], self.norm(x.float())))
        return linear(self.main[2], hidden)


class Layer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.attention, self.mlp = Attention(width), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        """All tokens at once, each with those before it."""
        query, key, value = self.attention.heads(x)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention.merged(mixed)
        return x + self.mlp(x)

    def extend(self, x: Tensor, cache: Tensor, index: Tensor, length: int, visible) -> Tensor:
        """Token `index` [1] alone, [B, 1, W], which sees the first `length` ones of the cache
        [2, B, N, T, H], or those of them that are `visible` [1, length]."""
        query, *new = self.attention.heads(x)
        cache.index_copy_(3, index, torch.stack(new))
        key, value = cache[:, :, :, :length]
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        x = x + self.attention.merged(mixed)
        return x + self.mlp(x)


class Block(nn.Module):
    """z_i = (x_i − μ_i)·exp(−α_i), with (α_i, μ_i) predicted from the tokens before i."""

    def __init__(self, tokens: int, features: int, width: int, layers: int):
        super().__init__()
        self.proj_in = nn.Linear(features, width)
        self.pos_embed = nn.Parameter(1e-2 * torch.randn(tokens, width))
        self.attn_blocks = nn.ModuleList(Layer(width) for _ in range(layers))
        self.proj_out = nn.Linear(width, 2 * features)
        nn.init.zeros_(self.proj_out.weight)

    def forward(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """z and the log-determinant, of tokens in their order of decoding."""
        hidden = linear(self.proj_in, x)
        hidden = hidden + position.to(hidden.dtype)
        for layer in self.attn_blocks:
            hidden = layer(hidden)
        # Shifted by one token: token 0 has no past, so its α and μ are zero.
        log_scale, shift = functional.pad(self.predicted(hidden)[:, :-1], (0, 0, 1, 0)).chunk(2, 2)
        return (x - shift) * torch.exp(-log_scale), -log_scale.sum((1, 2))

    def predicted(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return self.proj_out(hidden.float())

    def extend(self, x, z, position, caches, index: Tensor, length: int, masked: bool) -> None:
        """Token `index` + 1 of x [B, T, D], in place, by the first `length` tokens of the caches.

        They are masked where there may be later ones among them.
        """
        hidden = linear(self.proj_in, x.index_select(1, index))
        hidden = hidden + position.index_select(0, index).to(hidden.dtype)
        visible = (torch.arange(length, device=x.device) <= index)[None] if masked else None
        for layer, cache in zip(self.attn_blocks, caches, strict=True):
            hidden = layer.extend(hidden, cache, index, length, visible)
        log_scale, shift = self.predicted(hidden).chunk(2, 2)
        index += 1
        x.index_copy_(1, index, z.index_select(1, index) * log_scale.exp() + shift)


class TarFlow(nn.Module):
    """Images [B, H, W, C] in pixel units to latents [B, T, D] and back."""

    def __init__(self, image_shape, *, patch_size: int, width: int, blocks: int, layers: int,
                 pixel_scale: float = 127.5):  # fmt: skip
        super().__init__()
        height, columns, channels = image_shape
        self.grid = height // patch_size, columns // patch_size
        self.image_shape, self.patch_size, self.pixel_scale = image_shape, patch_size, pixel_scale
        self.token_shape = math.prod(self.grid), patch_size**2 * channels
        self.blocks = nn.ModuleList(Block(*self.token_shape, width, layers) for _ in range(blocks))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """z and the log-determinant of the whole map, in nats."""
        x = self.patches(images / self.pixel_scale - 1)
        logdet = -math.prod(self.image_shape) * math.log(self.pixel_scale)
        for number, (block, position) in enumerate(zip(self.blocks, self.positions(), strict=True)):
            x, part = block(in_order(x, number), position)
            x, logdet = in_order(x, number), logdet + part
        return x, logdet

    def positions(self) -> list[Tensor]:
        """The embeddings of each block, in its order of decoding."""
        return [
            in_order(block.pos_embed[None], number)[0] for number, block in enumerate(self.blocks)
        ]

    def patches(self, images: Tensor) -> Tensor:
        rows, columns = self.grid
        size, channels = self.patch_size, self.image_shape[2]
        x = images.reshape(-1, rows, size, columns, size, channels)
        return x.permute(0, 1, 3, 5, 2, 4).reshape(-1, *self.token_shape)

    def images(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, *self.grid, self.image_shape[2], self.patch_size, self.patch_size)
        x = x.permute(0, 1, 4, 2, 5, 3).reshape(-1, *self.image_shape)
        return (x + 1) * self.pixel_scale

    def load(self, path: str) -> None:
        """The weights of a file of `jetflow.convert.to_tarflow`."""
        tensors = torch.load(path, weights_only=True)
        own = self.state_dict()
        self.load_state_dict({name: tensors[name] for name in own})


class Sampler:
    """The inverse, token by token, of a batch of one size; its memory is allocated once.

    Args:
        flow: its layers are converted to `dtype`.
        graphs: record a step of each block, at a few lengths of the cache, as a CUDA graph.
    """

    def __init__(self, flow: TarFlow, batch_size: int, dtype: torch.dtype, graphs: bool = False):
        self.flow, self.graphs = flow, graphs
        for block in flow.blocks:
            for part in (block.proj_in, block.attn_blocks):
                for module in part.modules():
                    if isinstance(module, nn.Linear):
                        module.to(dtype)
        first = flow.blocks[0]
        tokens, width = first.pos_embed.shape
        device = first.pos_embed.device
        shape = (2, batch_size, width // HEAD_DIM, tokens, HEAD_DIM)
        self.caches = [torch.zeros(shape, dtype=dtype, device=device) for _ in first.attn_blocks]
        self.x, self.z = torch.zeros((2, batch_size, *flow.token_shape), device=device)
        self.index = torch.zeros(1, dtype=torch.long, device=device)
        self.positions = [position.detach().clone() for position in flow.positions()]
        self.recorded: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}

    @torch.inference_mode()
    def sample(self, z: Tensor) -> Tensor:
        """The images of latents."""
        for number in reversed(range(len(self.flow.blocks))):
            self.z.copy_(in_order(z, number))
            self.x.copy_(self.z)
            self.index.zero_()
            self._invert(number)
            z = in_order(self.x, number).clone()
        return self.flow.images(z)

    def _invert(self, number: int) -> None:
        """Token 0 of x is that of z; the others follow."""
        steps = self.x.shape[1] - 1
        if not self.graphs:
            for index in range(steps):
                self._step(number, index + 1, masked=False)
            return
        bounds = [steps * stage // STAGES for stage in range(STAGES + 1)]
        for first, last in itertools.pairwise(bounds):
            graph = self._graph(number, min(-(-last // 8) * 8, steps + 1))
            for _ in range(first, last):
                graph.replay()

    def _step(self, number: int, length: int, masked: bool) -> None:
        self.flow.blocks[number].extend(
            self.x, self.z, self.positions[number], self.caches, self.index, length, masked
        )

    def _graph(self, number: int, length: int) -> torch.cuda.CUDAGraph:
        if (number, length) not in self.recorded:
            x, index = self.x.clone(), self.index.clone()
            self._step(number, length, masked=True)  # libraries set themselves up, unrecorded
            self.x.copy_(x)
            self.index.copy_(index)
            graph = self.recorded[number, length] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step(number, length, masked=True)
        return self.recorded[number, length]


class Trainer:
    """Training steps as the published recipe has them: noise, flips, AdamW; nets in `dtype`."""

    def __init__(self, flow: TarFlow, noise_std: float, dtype: torch.dtype = torch.bfloat16):
        self.flow, self.std, self.dtype = flow, noise_std * flow.pixel_scale, dtype
        self.device = flow.blocks[0].pos_embed.device
        self.optimizer = torch.optim.AdamW(
            flow.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=1e-4, fused=True
        )

    def step(self, images: Tensor) -> Tensor:
        """One update by uint8 images; the loss, in nats a dimension."""
        flipped = torch.rand(len(images), 1, 1, 1, device=self.device) < 0.5
        x = torch.where(flipped, images.flip(2), images).float()
        x = x + self.std * torch.randn_like(x)
        narrow = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype if narrow else None, enabled=narrow):
            z, logdet = self.flow(x)
        loss = 0.5 * z.square().mean() - logdet.mean() / z[0].numel()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """In the dtype of autocast, or else of the weights."""
    return layer(x if torch.is_autocast_enabled(x.device.type) else x.to(layer.weight.dtype))


def in_order(tokens: Tensor, number: int) -> Tensor:
    """Between image order and the decoding order of block `number`; its own inverse."""
    return tokens.flip(1) if number % 2 else tokens


def compile_blocks(flow: TarFlow) -> None:
    """All blocks are one program, compiled once: they differ in their weights alone."""
    for block in flow.blocks:
        block.compile()
