"""TarFlow sampled by jetflow, and by a loop over tokens in PyTorch with a growing cache.

Both draw from the same weights and the same latents, by turns, and their images are compared:

    pip install torch && python benchmarks/torch_sampling.py --workdir runs/tar32 --batch_size 8
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn import functional

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
    samplers: dict[str, Callable[[], np.ndarray]] = {
        "torch": TorchLoop(flow, model.variables, np.array(latents), device).sample
    }
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
            "dtype": str(jnp.dtype(flow.blocks[0].transformer.dtype)),
            "seconds": seconds[name],
            "images_per_second": arguments.batch_size / seconds[name],
            "times_torch": seconds["torch"] / seconds[name],
            "largest_difference": float(np.abs(images[name] - images["torch"]).max()),  # in pixels
        }))  # fmt: skip


@dataclasses.dataclass
class Layer:
    """One transformer layer with the keys and values of the tokens so far, [B, N, t, H]."""

    tensors: dict[str, torch.Tensor]
    num_heads: int
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None

    def step(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output for the next token, [B, W]."""
        batch, width = x.shape
        qkv = self.linear("qkv", self.norm("norm_attention", x))
        heads = (batch, 3, self.num_heads, 1, width // self.num_heads)
        query, key, value = qkv.reshape(heads).unbind(1)
        self.keys = key if self.keys is None else torch.cat([self.keys, key], dim=2)
        self.values = value if self.values is None else torch.cat([self.values, value], dim=2)
        mixed = functional.scaled_dot_product_attention(query, self.keys, self.values)
        x = x + self.linear("out", mixed.reshape(batch, width))
        hidden = functional.gelu(self.linear("mlp_in", self.norm("norm_mlp", x)))
        return x + self.linear("mlp_out", hidden)

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        scale, bias = self.tensors[f"{name}/scale"], self.tensors[f"{name}/bias"]
        return functional.layer_norm(x.float(), scale.shape, scale, bias, eps=1e-5)

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        kernel, bias = self.tensors[f"{name}/kernel"], self.tensors[f"{name}/bias"]
        return functional.linear(x.to(kernel.dtype), kernel, bias)


class TorchLoop:
    """x_i = z_i·exp(α_i) + μ_i, token after token, from a jetflow TarFlow's weights."""

    def __init__(self, flow, variables, latents: np.ndarray, device: str):
        dtype = getattr(torch, jnp.dtype(flow.blocks[0].transformer.dtype).name)
        self.flow = flow
        self.latents = torch.from_numpy(latents).to(device)
        self.blocks = []
        for index in range(len(flow.blocks)):
            flat = {
                "/".join(key.key for key in path): torch.tensor(np.array(value), device=device)
                for path, value in jax.tree.leaves_with_path(variables["params"][f"blocks_{index}"])
            }
            for name in flat:
                if "/qkv/" in name:  # query, key and value are on an axis of their own
                    flat[name] = flat[name].flatten(-2)
                if name.endswith("kernel"):  # [in, out] to [out, in]
                    flat[name] = flat[name].mT.contiguous()
                narrow = "norm" not in name and not name.startswith(("proj_out", "position"))
                flat[name] = flat[name].to(dtype) if narrow else flat[name]
            self.blocks.append(flat)

    @torch.inference_mode()
    def sample(self) -> np.ndarray:
        """The images of the latents, in pixel values, on the host."""
        x = self.latents
        for block, tensors in reversed(list(zip(self.flow.blocks, self.blocks, strict=True))):
            x = self._invert(block, tensors, x.flip(1) if block.backward else x)
            x = x.flip(1) if block.backward else x
        return np.asarray(self.flow.as_image(jnp.asarray(x.cpu().numpy())))

    def _invert(self, block, tensors: dict[str, torch.Tensor], z: torch.Tensor) -> torch.Tensor:
        layers = [
            Layer(
                {name.removeprefix("transformer/layers/"): tensor[index]
                 for name, tensor in tensors.items() if name.startswith("transformer/")},
                block.transformer.num_heads,
            )
            for index in range(block.transformer.num_layers)
        ]  # fmt: skip
        position = tensors["position"].flip(0) if block.backward else tensors["position"]
        proj_in = tensors["proj_in/kernel"]
        tokens = [z[:, 0]]
        for index in range(z.shape[1] - 1):
            token = tokens[-1].to(proj_in.dtype)
            hidden = functional.linear(token, proj_in, tensors["proj_in/bias"])
            hidden = hidden + position[index].to(hidden.dtype)
            for layer in layers:
                hidden = layer.step(hidden)
            out = functional.linear(
                hidden.float(), tensors["proj_out/kernel"], tensors["proj_out/bias"]
            )
            log_scale, shift = out.chunk(2, dim=-1)
            tokens.append(z[:, index + 1] * log_scale.exp() + shift)
        return torch.stack(tokens, dim=1)


if __name__ == "__main__":
    main()
