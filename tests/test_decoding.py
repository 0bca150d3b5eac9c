"""Parallel decoding of TarFlow: the same images as token by token, in fewer evaluations."""

import functools
import os
import subprocess
import sys

import flow_laws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

import jetflow
from jetflow import calibration
from jetflow.flows import autoregressive
from jetflow.nn import attention
from jetflow.sampling.ancestral import Sampler
from jetflow.sampling.decoding import decodings
from jetflow.types import Condition, Decoding, Guidance

SHAPE = (8, 8, 1)  # 16 tokens
LABELS = jnp.array([0, 2, -1])
GUIDANCES = {
    "none": None,
    "both": Guidance(1.5),
    "log-scale, annealed": Guidance(2.0, "a", annealed=True),
    "shift": Guidance(1.0, "b", temperature=0.7),
}


@functools.cache
def setting(dtype: str = "float32", volume_preserving: bool = False, strength: float = 1.0):
    """A flow, its variables, and latents.

    Args:
        strength: of the tokens' dependence on those before: a weak one converges in few sweeps.
    """
    flow = flow_laws.tarflow(
        SHAPE, 3, num_blocks=2, layers_per_block=2, volume_preserving=volume_preserving, dtype=dtype
    )
    variables = flow_laws.random_variables(flow, jnp.dtype(dtype))
    for block in variables["params"].values():
        block["proj_out"]["kernel"] *= strength
    z = np.random.default_rng(1).standard_normal((3, *flow.latent_shape))
    return flow, variables, jnp.asarray(z, dtype)


def inverse(how, guidance=None, *, dtype="float64", **fields):
    """Images, log-determinants, and the sweeps and residual of each block."""
    flow, variables, z = setting(dtype, **fields)
    function = jax.jit(functools.partial(flow.apply, method="inverse_blocks"))
    x, logdet, _, sweeps, residuals = function(variables, z, LABELS, guidance, how)
    return x, logdet, sweeps.tolist(), residuals.tolist()


def windows_change_nothing(window: int, name: str, **fields) -> None:
    how = (Decoding(window), Decoding(max(window - 3, 1)))
    x, logdet, sweeps, residual = inverse(how, GUIDANCES[name], **fields)
    expected = inverse(None, GUIDANCES[name], **fields)
    assert expected[2] == [15, 15]
    np.testing.assert_allclose(x, expected[0], rtol=0, atol=1e-9)
    np.testing.assert_allclose(logdet, expected[1], rtol=1e-11)
    assert residual == [0, 0]
    assert max(sweeps) <= 15


@pytest.mark.parametrize(("window", "name"), [(5, "log-scale, annealed"), (40, "both")])
def test_windows_change_nothing(window, name, float64):
    windows_change_nothing(window, name)


@pytest.mark.usefixtures("fresh_traces")
def test_the_cache_of_windows_grows(float64, monkeypatch):
    """As often as a window that begins at a stage's end needs."""
    monkeypatch.setattr(autoregressive, "STAGE", 4)
    stages = [(slice(0, 4), 5), (slice(4, 9), 10), (slice(9, 15), 15)]
    assert autoregressive._stages(16, window=2) == stages
    assert autoregressive._stages(16, window=6) == [(slice(0, 5), 10), (slice(5, 15), 15)]
    assert autoregressive._stages(16, window=15) == [(slice(0, 15), 15)]
    how = (Decoding(2), Decoding(4))
    x, logdet, sweeps, residual = inverse(how, GUIDANCES["both"])
    monkeypatch.setattr(autoregressive, "STAGE", 64)
    jax.clear_caches()
    expected = inverse(how, GUIDANCES["both"])
    np.testing.assert_allclose(x, expected[0], rtol=0, atol=1e-9)
    np.testing.assert_allclose(logdet, expected[1], rtol=1e-11)
    assert (sweeps, residual) == (expected[2], [0, 0])


def test_a_tolerance_saves_sweeps_and_bounds_the_error(float64):
    exact = inverse(None, strength=0.1)[0]
    before = 15
    for tolerance in (1e-12, 1e-6, 1e-2):
        x, _, sweeps, residual = inverse((Decoding(15, tolerance),) * 2, strength=0.1)
        assert max(sweeps) <= before
        assert 0 <= max(residual) <= tolerance
        assert jnp.abs(x - exact).max() <= 2e4 * tolerance
        before = max(sweeps)
    assert before < 10
    assert max(residual) > 0
    assert jnp.abs(x - exact).max() > 0


def test_the_default_tolerance_is_below_a_thousandth_of_a_grey_level():
    """Where tokens depend weakly on each other, so that a window settles many at once."""
    fields = {"guidance": GUIDANCES["both"], "dtype": "float32", "strength": 0.03}
    sequential = inverse(None, **fields)[0]
    x, _, sweeps, _ = inverse(decodings(setting()[0], "jacobi"), **fields)
    np.testing.assert_allclose(x, sequential, rtol=0, atol=1e-4 * 128)  # 1e-4 in [-1, 1]
    assert max(sweeps) <= 8


def test_accelerators_try_windows_of_all_tokens():
    assert calibration.windows(1024, "cpu") == [1, 256, 128, 64, 32, 16, 8]
    assert calibration.windows(1024, "gpu") == [1, 1023, 512, 256, 128, 64, 32, 16, 8]


@pytest.mark.parametrize("tokens", [1, 3])
def test_few_tokens(tokens):
    assert {1, max(1, tokens - 1)} == {*calibration.windows(tokens, "cpu")}
    flow = flow_laws.tarflow((2 * tokens, 2, 1), dtype="float32", num_blocks=1)
    variables = flow_laws.random_variables(flow, jnp.float32)
    images = [
        Sampler(flow, variables, decoding=how).draw(jax.random.key(0), np.arange(2), None).pixels
        for how in (None, decodings(flow, "jacobi"))
    ]
    np.testing.assert_allclose(*images, atol=1e-3)


def test_broken_images_come_to_an_end():
    """Not a number never converges, and the others do not wait for it."""
    flow, variables, z = setting(strength=0.03)
    z = z.at[0].set(jnp.nan)
    sampler = Sampler(flow, variables, decoding=(Decoding(8, tolerance=1e-4),) * 2)
    drawn = sampler.decode(z, LABELS)
    assert drawn.sweeps == sampler.decode(z[1:], LABELS[1:]).sweeps < (15, 15)
    assert np.isnan(drawn.pixels[0]).all()
    assert np.isfinite(drawn.pixels[1:]).all()


def decode_with_infinite_end(how):
    """A block's tokens in decoding order; the last but one has an infinite latent and guess."""
    flow, variables, z = setting()
    block = flow.blocks[0]
    assert not block.backward
    params, z = {"params": variables["params"]["blocks_0"]}, z.at[:, -2].set(jnp.inf)
    inputs = params, z, Condition(LABELS), None
    inverse = functools.partial(block.clone(name=None).apply, method="inverse_blocks")
    return jax.jit(inverse)(*inputs, how).x


def test_wild_guesses_do_not_reach_back():
    expected = decode_with_infinite_end(None)
    assert jnp.isfinite(expected[:, :-2]).all()
    actual = decode_with_infinite_end(Decoding(15))
    np.testing.assert_allclose(actual[:, :-2], expected[:, :-2], atol=1e-3)


def test_the_cache_may_be_narrow():
    sequential = inverse(None, dtype="float32")[0]
    for dtype, window in (("bfloat16", 1), ("int8", 1), ("int8", 5)):
        narrow = inverse((Decoding(window, cache_dtype=dtype),) * 2, dtype="float32")[0]
        difference = np.abs(narrow - sequential).max()
        assert 1e-3 < difference < 16, (dtype, window, difference)


@pytest.mark.parametrize("how", [Decoding(), Decoding(5), Decoding(cache_dtype="int8")])
def test_a_tpus_cache_gives_the_same(how, float64, monkeypatch):
    """It has heads side by side, so that they fill the registers."""
    expected = inverse((how,) * 2, GUIDANCES["both"])
    net = setting("float64")[0].blocks[0].net
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    monkeypatch.setattr(attention, "LANES", net.width)
    assert (
        net.num_heads
        > 1
        == attention.Cached.empty(1, 2, 3, net.width // 2, "int8").entries.shape[1]
    )
    jax.clear_caches()
    for value, other in zip(inverse((how,) * 2, GUIDANCES["both"])[:2], expected, strict=False):
        np.testing.assert_allclose(value, other, rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize(
    ("windows", "is_loop"), [((1, 1, 1), True), ((5, 5, 5), True), ((5, 6, 5), False)]
)
def test_blocks_that_decode_alike_are_one_loop(windows, is_loop):
    """However many they are; the tolerance may differ."""
    how = tuple(Decoding(window, 0.01 * number) for number, window in enumerate(windows))
    products = []
    for decoding in (how, how[:1]):
        flow = flow_laws.tarflow(SHAPE, num_blocks=len(decoding), dtype="float32")
        variables = flow_laws.random_variables(flow, jnp.float32)
        decode = functools.partial(flow.apply, method="inverse")
        z = jnp.zeros((1, *flow.latent_shape))
        program = jax.make_jaxpr(decode)(variables, z, None, None, decoding)
        products.append(str(program).count("dot_general"))
    assert (products[0] == products[1] > 0) == is_loop


GUIDED_ON_EIGHT_DEVICES = """
import flow_laws, jax, jax.numpy as jnp, numpy as np
from jetflow import sharding
from jetflow.tools.plan.costs import cost
from jetflow.sampling.ancestral import Sampler
from jetflow.sampling.decoding import decodings
from jetflow.types import Guidance

flow = flow_laws.tarflow((8, 8, 1), 3, num_blocks=1, dtype="float32")
variables = flow_laws.random_variables(flow, jnp.float32)
for method in ("cached", "jacobi"):
    how = decodings(flow, method)
    sampler = Sampler(flow, variables, Guidance(2.0), decoding=how, mesh=sharding.make_mesh())
    z = sampler.place(np.zeros((8, *flow.latent_shape), np.float32))
    program = sampler.lower(z, sampler.place(np.zeros(8, np.int32))).compile()
    print(method, *[f"{kind.kind}*{kind.count}" for kind in cost(program.as_text(), 8).collectives])
"""


def test_guided_tokens_need_no_other_device():
    """Of a split batch: an image's two rows are neighbours. Windows must agree how far they are."""
    process = subprocess.run(
        [sys.executable, "-c", GUIDED_ON_EIGHT_DEVICES],
        env=tiny_runs.environment(JAX_NUM_CPU_DEVICES="8", PYTHONPATH=os.pathsep.join(sys.path)),
        capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    cached, jacobi = process.stdout.splitlines()
    assert cached == "cached"
    assert set(jacobi.split()[1:]) <= {"all-reduce*1"}, jacobi


@pytest.mark.parametrize("method", ["cached", "jacobi"])
def test_samples_by_method(method):
    flow, variables, _ = setting(strength=0.1)
    key = jax.random.key(0)
    plain = jetflow.sample(flow, variables, key, num=4, label=1)
    for each in (method, decodings(flow, method)):
        images = jetflow.sample(flow, variables, key, num=4, label=1, method=each)
        assert np.abs(images.astype(int) - plain).max() <= 1


# Planted bugs.


@pytest.mark.slow
def test_bug_is_caught_one_token_too_many(monkeypatch, float64):
    """A token whose predecessor has just changed counts as right."""
    real = autoregressive._change
    monkeypatch.setattr(
        autoregressive, "_change", lambda value, guess: jnp.roll(real(value, guess), 1, 1)
    )
    with pytest.raises(AssertionError):
        windows_change_nothing(5, "none")
