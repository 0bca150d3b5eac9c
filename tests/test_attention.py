"""The fused forms of attention against the one that is written out, and which one is taken."""

import itertools
import types

import flow_laws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

from jetflow import configs, sharding
from jetflow.nn.attention import attend, choose
from jetflow.tools.plan import costs, devices, roofline
from jetflow.training.experiment import set_up
from jetflow.types import UsageError

FLOAT32 = jnp.dtype("float32")
OPTIONS = {"dtype": jnp.dtype("bfloat16"), "tokens": 256, "head_dim": 64, "precision": "default"}


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 3e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("tokens", [64, 256, 1024])
@pytest.mark.parametrize("causal", [True, False])
def test_splash_is_attention(tokens, causal, dtype, rtol):
    """Interpreted on CPUs: values and gradients."""
    shape = (1, tokens, 2, 64)
    inputs = [jax.random.normal(jax.random.key(i), shape).astype(dtype) for i in range(3)]
    weight = jax.random.normal(jax.random.key(3), shape)

    @jax.jit
    def both(*inputs):
        def total(method, *inputs):
            mixed = attend(*inputs, causal=causal, method=method)
            return (mixed * weight).sum(), mixed

        gradient = jax.grad(total, argnums=(1, 2, 3), has_aux=True)
        return [gradient(method, *inputs) for method in ("splash", "xla")]

    with sharding.on(sharding.make_mesh()):
        assert "splash" in str(jax.make_jaxpr(both)(*inputs))
        actual, expected = both(*inputs)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


@pytest.mark.parametrize(
    ("platform", "changed", "method", "reason"),
    [
        ("tpu", {}, "splash", ""),
        ("tpu", {"dtype": FLOAT32}, "splash", ""),
        ("tpu", {"dtype": FLOAT32, "precision": "highest"}, "xla", "precision highest"),
        ("tpu", {"tokens": 64}, "xla", "64 tokens"),
        ("tpu", {"head_dim": 32}, "xla", "32 features"),
        ("gpu", {}, "cudnn", ""),
        ("gpu", {"tokens": 63}, "cudnn", ""),
        ("gpu", {"dtype": FLOAT32}, "xla", "float32"),
        ("gpu", {"head_dim": 256}, "xla", "256"),
        ("cpu", {}, "xla", "cpu"),
    ],
)
def test_auto_takes_what_serves(platform, changed, method, reason):
    chosen = choose("auto", platform=platform, **OPTIONS | changed)
    assert chosen.method == method and reason in chosen.reason
    assert bool(chosen.reason) == (method == "xla")


@pytest.mark.parametrize(
    ("capability", "reason"), [("7.5", "has 7.5"), ("8.0", ""), ("12.0", ""), ("gfx942", "")]
)
def test_old_gpus_have_no_kernel(capability, reason, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    gpu = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
    chosen = choose("auto", platform="gpu", **OPTIONS)
    assert chosen.method == ("xla" if reason else "cudnn") and reason in chosen.reason


@pytest.mark.parametrize(
    ("method", "platform"), [("cudnn", "cpu"), ("cudnn", "tpu"), ("splash", "gpu")]
)
def test_a_kernel_of_another_platform_is_refused(method, platform):
    with pytest.raises(UsageError, match=f"{method}.*{platform}"):
        choose(method, platform=platform, **OPTIONS)


@pytest.mark.parametrize("name", ["tarflow", pytest.param("jet", marks=pytest.mark.slow)])
def test_losses_of_a_training_agree(name):
    """Of twenty steps in float32, with splash as it is interpreted on CPUs."""
    losses, programs = {}, set()
    for method in ("xla", "splash"):
        fields = {"flow.patch_size": 2, "flow.attention": method, "train.accumulation": 1}
        fields |= {"flow.num_couplings": 1, "flow.num_heads": 1} if name == "jet" else {
            "flow.num_blocks": 1, "flow.head_dim": 32}  # fmt: skip
        run = set_up(tiny_runs.config(name, **fields))
        state, _ = run.fresh_state()
        lowered = run.lower_step(state, next(run.batches()))
        step, losses[method] = lowered.compile(), []
        programs.add(lowered.as_text())
        for batch in itertools.islice(run.batches(), 20):
            state, metrics = step(state, batch)
            losses[method].append(float(metrics["bpd"]))
    assert losses["xla"][-1] < 0.995 * losses["xla"][0]
    assert len(programs) == 2
    np.testing.assert_allclose(losses["splash"], losses["xla"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_a_step_for_tpus_has_whole_products_and_fused_attention():
    """Compiled for sixteen devices between which the weights are split; no TPU is needed."""
    pytest.importorskip("libtpu", reason="pip install -e '.[tpu]' to compile for TPUs")
    config = configs.read(str(tiny_runs.ROOT / "configs/imagenet64_tarflow.py:conditional"))
    changes = {"flow.width": 512, "flow.num_blocks": 1, "flow.layers_per_block": (2,)}
    for field, value in (changes | {"mesh.fsdp": 16, "train.batch_size": 32}).items():
        configs.change(config, field, value)
    run = set_up(config, roofline.load, devices.devices("v5e:4x4", 1))
    lowered = run.lower_step(run.abstract_state, run.abstract_batch(config.train.batch_size))
    text = lowered.compile().as_text()
    assert "splash_mha_fwd" in text and "splash_mha_dkv" in text
    assert "all-gather" in text
    moves = [line for line in text.splitlines() if " collective-permute" in line]
    assert not [line for line in moves if "dot_general" in line]
    assert "/causal/" in text  # so that the quarter of the tiles that is masked does not count
    formula = costs.forward_flops(run.abstract_state.params, 1024) * 32 / 16
    assert 3 * formula < costs.cost(text, 16).flops < 4 * formula


@pytest.mark.parametrize(
    ("name", "fields"), [("jet", {}), ("jet", {"net": "conv"}), ("tarflow", {})]
)
def test_products_have_the_precision_that_is_asked_for(name, fields):
    """In both directions and in the gradient."""
    for precision, wanted in (("default", 0), ("highest", 1)):
        flow = getattr(flow_laws, name)(dtype="float32", precision=precision, **fields)
        variables = flow_laws.random_variables(flow, jnp.float32)
        x = flow_laws.random_images(flow).astype(jnp.float32)

        def likelihood(params, x, flow=flow, variables=variables):
            variables = variables | {"params": params}
            z, logdet = flow.apply(variables, x, method="forward")
            return (z**2).sum() - logdet.sum()

        def inverse(variables, z, flow=flow):
            return flow.apply(variables, z, method="inverse")

        z = jnp.zeros((3, *flow.latent_shape))
        lowered = jax.jit(jax.grad(likelihood)).lower(variables["params"], x)
        for text in (lowered.as_text(), jax.jit(inverse).lower(variables, z).as_text()):
            products = [line for line in text.splitlines() if "dot_general" in line]
            assert len(products) > 4
            assert all(("HIGHEST" in line) == bool(wanted) for line in products)
