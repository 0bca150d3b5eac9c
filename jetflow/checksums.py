"""What a checkpoint records of its arrays, so that restored ones can be checked against it.

An array is named by its path in the tree, such as "params/dense/kernel". Its type, shape and a
checksum are recorded, and a digest seals the record itself. Version 0.1 kept the last two axes of
some arrays as one, which changes neither their bytes nor their checksum.
"""

import hashlib
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped, UInt32

from jetflow.types import AnyArray

MERGED = re.compile(r"/qkv/")  # the arrays whose last two axes, [3, W], version 0.1 kept as one


def flatten(tree: Any) -> dict[str, Any]:
    """Path -> leaf, in the order of the tree's leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    flat = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}
    if len(flat) < len(leaves):
        raise ValueError('two leaves of the state share a path; avoid "/" in the keys of its dicts')
    return flat


def types(arrays: dict[str, Any]) -> dict[str, str]:
    """Path -> type and shape, as "float32[64,3]"."""
    return {
        path: f"{jnp.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"
        for path, leaf in arrays.items()
    }


def as_recorded(path: str, leaf: Any, kind: str | None) -> Any:
    """The abstract array to read for a wanted one, for `as_wanted`; kind: as `types` names it.

    The recorded shape alone tells whether version 0.1 wrote it: it has an axis less then. What the
    mesh splits of the two axes is whole while the array is read.
    """
    if not MERGED.search(path):
        return leaf
    *others, count, width = leaf.shape
    where = getattr(leaf, "sharding", None)
    if isinstance(where, NamedSharding):
        where = NamedSharding(where.mesh, PartitionSpec(*where.spec[: len(others)]))
    merged = jax.ShapeDtypeStruct((*others, count * width), leaf.dtype, sharding=where)
    return merged if types({path: merged})[path] == kind else leaf


def as_wanted(array: jax.Array, leaf: Any) -> jax.Array:
    """An array that was read, in the shape of the wanted leaf and where that is to lie."""
    if array.shape == leaf.shape:
        return array
    return jax.device_put(array.reshape(leaf.shape), getattr(leaf, "sharding", None))


def describe(arrays: dict[str, Any]) -> dict[str, list[str]]:
    """Path -> [type and shape, checksum]."""
    # One at a time: in several programs with sums over the mesh, XLA's CPU devices can wait for
    # each other for ever.
    sums = {path: jax.device_get(checksum(array)) for path, array in arrays.items()}
    return {path: [kind, f"{int(sums[path]):08x}"] for path, kind in types(arrays).items()}


@jax.jit
def checksum(array: Shaped[AnyArray, "..."]) -> UInt32[Array, ""]:
    """Σ bits(a_i)·w_i mod 2³², the weight w_i odd and hashed from the position i.

    Sums of integers do not depend on their order, hence not on the sharding. An odd number has an
    inverse mod 2³², so no change of a single element of up to 32 bits goes unnoticed.
    """
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    width = min(array.dtype.itemsize, 4)  # of a wider element, 32-bit words in a trailing axis
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * width}")).astype(jnp.uint32)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        position *= np.uint32(size % 2**32)
        position += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    weight = (position + np.uint32(1)) * np.uint32(0x9E3779B1)  # 2³² / golden ratio
    weight = (weight ^ (weight >> 15)) * np.uint32(0x85EBCA77)
    weight = (weight ^ (weight >> 13)) | np.uint32(1)
    return jnp.sum(bits * weight, dtype=jnp.uint32)


def seal(content: dict) -> dict:
    """`content` and the digest of its canonical JSON."""
    canonical = json.dumps(content, sort_keys=True)
    return {**content, "digest": hashlib.sha256(canonical.encode()).hexdigest()}
