"""Plans: what is counted in a compiled program, and what the user is told."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import tiny_runs

import jetflow
from jetflow import cli, configs
from jetflow.flows.autoregressive import SETTLES
from jetflow.nn.transformer import REMAT_POLICIES
from jetflow.tools.plan import costs, devices, roofline
from jetflow.training.experiment import count_steps

CONFIGS = tiny_runs.ROOT / "configs"

pytestmark = pytest.mark.usefixtures("optimised")
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install -e '.[tpu]'",
)


def read(name: str, **fields):
    """A config with changes: `{"flow.remat": "full"}`."""
    config = configs.read(f"{CONFIGS}/{name}")
    config.update_from_flattened_dict(fields)
    return config


# A program of three loops: one runs its body 2 + 3·4 products deep, on a platform that says the
# number of trips, and the last is of unknown length.


def products_in_loops(x, steps):
    def product(carry, _):
        return jnp.tanh(carry @ x), None

    def outer(carry, _):
        return jax.lax.scan(product, carry, length=4)[0], None

    x = jax.lax.scan(product, x, length=2)[0]
    x = jax.lax.scan(outer, x, length=3)[0]
    with jax.named_scope(f"{SETTLES}20"):
        return jax.lax.while_loop(lambda c: c[1] < steps, lambda c: (c[0] @ x, c[1] + 1), (x, 0))[0]


def test_loops_are_counted_as_often_as_they_run():
    x = jnp.ones((16, 16))
    compiled = jax.jit(products_in_loops).lower(x, 5).compile()
    cost = costs.cost(compiled.as_text(), devices=1)
    assert cost.flops == (2 + 3 * 4 + 1) * 2 * 16**3
    assert cost.unknown_loops == 1
    assert cost.collectives == ()
    of_sweeps = costs.cost(compiled.as_text(), devices=1, sweeps=0.35)
    assert of_sweeps.flops == (2 + 3 * 4 + 7) * 2 * 16**3
    assert compiled.cost_analysis()["flops"] < cost.flops / 2  # why we count ourselves


# As libtpu writes it: a counter instead of a number of trips, products as convolutions, a slice of
# stacked weights in a fusion, an exchange that two fusions share, and one between slices.
PROGRAM = """\
HloModule jit_step, is_scheduled=true

%sliced (p.0: f32[6,8,8], p.1: s32[], p.2: f32[4,8]) -> f32[4,8] {
  %p.0 = f32[6,8,8]{2,1,0:T(8,128)} parameter(0)
  %p.1 = s32[]{:T(128)} parameter(1)
  %p.2 = f32[4,8]{1,0:T(8,128)S(1)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %slice = f32[1,8,8]{2,1,0:T(8,128)} dynamic-slice(%p.0, %p.1, %zero, %zero), dynamic_slice_sizes={1,8,8}
  %weights = f32[8,8]{1,0:T(8,128)} bitcast(%slice)
  ROOT %product = f32[4,8]{1,0:T(8,128)} convolution(%p.2, %weights), dim_labels=bf_io->bf
}

%gathering (q.0: f32[2,8]) -> f32[8,8] {
  %q.0 = f32[2,8]{1,0:T(8,128)} parameter(0)
  ROOT %gather = f32[8,8]{1,0:T(8,128)S(1)} all-gather(%q.0), channel_id=7, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}
}

%condition (c: (s32[], f32[4,8], f32[6,8,8])) -> pred[] {
  %c = (s32[]{:T(128)}, f32[4,8]{1,0}, f32[6,8,8]{2,1,0}) parameter(0)
  %bound = s32[]{:T(128)} constant(6)
  %count = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %less = pred[]{:T(512)} compare(%count, %bound), direction=LT
}

%body (b: (s32[], f32[4,8], f32[6,8,8])) -> (s32[], f32[4,8], f32[6,8,8]) {
  %b = (s32[]{:T(128)}, f32[4,8]{1,0:S(1)}, f32[6,8,8]{2,1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%b), index=0
  %x = f32[4,8]{1,0:T(8,128)S(1)} get-tuple-element(%b), index=1
  %stack = f32[6,8,8]{2,1,0:T(8,128)} get-tuple-element(%b), index=2
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  %y = f32[4,8]{1,0:T(8,128)} fusion(%stack, %i, %x), kind=kOutput, calls=%sliced
  ROOT %out = (s32[]{:T(128)}, f32[4,8]{1,0}, f32[6,8,8]{2,1,0}) tuple(%next, %y, %stack)
}

ENTRY %main (w: f32[6,8,8], x.0: f32[4,8], part: f32[2,8]) -> f32[4,8] {
  %w = f32[6,8,8]{2,1,0:T(8,128)} parameter(0)
  %x.0 = f32[4,8]{1,0:T(8,128)S(1)} parameter(1)
  %part = f32[2,8]{1,0:T(8,128)} parameter(2)
  %start = f32[8,8]{1,0:T(8,128)S(1)} fusion(%part), kind=kCustom, calls=%gathering
  %rest = f32[8,8]{1,0:T(8,128)S(1)} fusion(%part), kind=kCustom, calls=%gathering
  %reduced = f32[8,8]{1,0:T(8,128)S(1)} all-reduce(%rest), channel_id=8, replica_groups=[2,4]<=[8], to_apply=%condition
  %token = token[] after-all()
  %sent = (f32[8,8]{1,0}, u32[], token[]) send(%reduced, %token), channel_id=9, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %from = s32[]{:T(128)} constant(0)
  %copied = s32[]{:T(128)} copy(%from)
  %init = (s32[]{:T(128)}, /*index=1*/f32[4,8]{1,0}, f32[6,8,8]{2,1,0}) tuple(%copied, %x.0, %w)
  %loop = (s32[]{:T(128)}, /*index=1*/f32[4,8]{1,0}, f32[6,8,8]{2,1,0}) while(%init), condition=%condition, body=%body
  ROOT %result = f32[4,8]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_a_tpus_program_is_read():
    cost = costs.cost(PROGRAM, devices=8, slices=4)
    trips = 3  # from 0 to 6 by two
    assert cost.unknown_loops == 0
    assert cost.flops == trips * 2 * 4 * 8 * 8
    tile = 8 * 128 * 4
    in_loop = 2 * tile + 4 + (4 + 4 + 4)  # slice, result, two counters' reads, add
    outside = 2 * tile + 2 * 4  # both fusions read the part; a counter is copied
    compare = trips * (1 + 4 + 4)
    assert cost.hbm_bytes == trips * in_loop + outside + compare
    sent = {one.kind: (one.count, one.bytes) for one in cost.collectives}
    assert sent == {
        "all-gather": (1, 3 * tile),
        "all-reduce": (1, 2 * 3 / 4 * tile),
        "all-reduce between slices": (1, 2 * 3 / 4 * tile),
    }


def test_a_convolution_that_is_a_batch_of_products():
    """As libtpu writes attention: the batch, 16 x 2, is a window that meets one element at most."""
    text = """
ENTRY %main (q: f32[16,64,2,32], k: f32[16,64,2,32]) -> f32[16,2,64,64] {
  %q = f32[16,64,2,32]{3,2,1,0} parameter(0)
  %k = f32[16,64,2,32]{3,2,1,0} parameter(1)
  ROOT %c = f32[16,2,64,64]{2,3,1,0} convolution(%q, %k), window={size=16x2 stride=15x1 lhs_dilate=16x2}, dim_labels=0b1f_0o1i->01bf
}
"""  # noqa: E501
    assert costs.cost(text, devices=1).flops == 2 * 16 * 2 * 64 * 64 * 32


def test_forward_flops_by_hand():
    """One layer of width 8 on 4 tokens: 2·T·(3 + 1 + 4 + 4)·W², and attention 4·T²·W."""
    shapes = {"qkv": (8, 3, 8), "out": (8, 8), "mlp_in": (8, 32), "mlp_out": (32, 8)}
    layer = {name: {"kernel": jnp.zeros((1, *shape)), "bias": jnp.zeros((1, *shape[1:]))}
             for name, shape in shapes.items()}  # fmt: skip
    assert costs.forward_flops({"layers": layer}, tokens=4) == 2 * 4 * 12 * 64 + 4 * 16 * 8


SMALL = ["plan", f"--config={CONFIGS}/photos_tarflow.py:8", "--topology=v5e:2x2"]
SMALL += ["--config.flow.num_blocks=2", "--config.flow.layers_per_block=(1,)"]  # quick to compile


@needs_libtpu
def test_formula_and_program_agree(capsys):
    """Without recomputation they count the same products, but for what is not needed."""
    assert cli.main([*SMALL, "--json", "--price=1.2"]) == 0
    plan = json.loads(capsys.readouterr().out)
    memory, cost = plan["memory"], plan["cost"]
    assert cost["unknown_loops"] == 0
    assert cost["flops"] == pytest.approx(plan["model_flops"], rel=0.02)
    assert plan["mesh"] == {"data": 4, "fsdp": 1, "tensor": 1}
    [collective] = cost["collectives"]
    assert collective["kind"] == "all-reduce"  # of the gradients: each is sent about twice
    assert collective["bytes"] == pytest.approx(2 * 3 / 4 * memory["params"], rel=0.1)
    parts = ("params", "optimizer", "ema", "other", "temporaries")
    assert sum(memory[part] for part in parts) == memory["total"] <= memory["capacity"]
    assert plan["fits"] and plan["estimate"]["images_per_second"] > 0
    hours = 500 * plan["estimate"]["step_seconds"] / 3600
    for budget, share in zip(plan["estimate"]["budgets"], (1, 1 / 2), strict=True):
        expected = [share, hours / 24 / share, 4 * hours / share, 1.2 * 4 * hours / share]
        assert list(budget.values()) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("topology", "slices", "chips"),
    [("v5e:4x8", 1, 32), ("tpu7x:2x2x1", 2, 8), ("h100:2x8", 1, 16)],
)
def test_chips(topology, slices, chips):
    assert devices.chips(topology, slices) == chips


@pytest.mark.slow
@needs_libtpu
def test_formula_and_program_agree_for_jet():
    changes = {"flow.width": 64, "flow.num_heads": 4, "flow.num_couplings": 4}
    plan = jetflow.plan(read("photos_jet.py", **changes), "v5e:2x2")
    assert plan.cost.flops == pytest.approx(plan.model_flops, rel=0.02)


@pytest.mark.slow
@needs_libtpu
def test_recomputation_and_a_split_state_are_counted():
    changes = {"flow.num_blocks": 2, "flow.remat": "full", "mesh.data": 1, "mesh.fsdp": -1}
    plan = jetflow.plan(read("photos_tarflow.py:8", **changes), "v5e:2x2")
    kept = jetflow.plan(read("photos_tarflow.py:8", **changes | {"flow.remat": "dots"}), "v5e:2x2")
    assert kept.cost.flops / kept.model_flops < 1.1  # the weights' products are not computed again
    assert 1.15 < plan.cost.flops / plan.model_flops < 1.34  # at most a forward pass more
    assert plan.memory.params < 0.4 * 4 * plan.parameters
    assert plan.memory.optimizer < 0.4 * 8 * plan.parameters
    assert "all-gather" in {one.kind for one in plan.cost.collectives}


@needs_libtpu
def test_command_prints_what_fits(capsys):
    assert cli.main([*SMALL, "--what=sample", "--price=2"]) == 0
    text = capsys.readouterr().out
    assert "steps on 4 chips" in text and "| cost " in text
    assert "fits, with" in text and "of 15.75" in text and "estimate" in text
    assert "a step evaluates 30 tokens one after another" in text
    assert "\nno guidance, token by token, cache in float32\n" in text


@needs_libtpu
def test_command_plans_windows_by_their_sweeps(capsys):
    command = [*SMALL, "--what=sample", "--method=jacobi", "--window=4", "--json"]
    few, many = [
        (cli.main([*command, f"--sweeps={sweeps}"]), json.loads(capsys.readouterr().out))[1]
        for sweeps in (0.2, 0.4)
    ]
    assert (few["sequential"], many["sequential"], few["window"]) == (2 * 3, 2 * 6, 4)
    assert few["cost"]["flops"] > 0
    assert many["cost"]["flops"] == 2 * few["cost"]["flops"]
    assert many["model_flops"] == 2 * few["model_flops"]
    assert few["cost"]["hbm_bytes"] < many["cost"]["hbm_bytes"]


@needs_libtpu
def test_command_prints_what_does_not_fit(capsys):
    large = ["--config.flow.width=1024", "--config.train.batch_size=262144"]
    assert cli.main([*SMALL, *large]) == 0
    text = capsys.readouterr().out
    assert "DOES NOT FIT" in text and "--config.flow.remat=full" in text and "estimate" not in text


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "slices", "devices", "program"),
    [
        ("v4:2x2x1", 1, 4, "train"),
        ("v5e:1x1", 1, 1, "train"),
        ("v5e:2x2", 2, 8, "train"),
        ("v5e:2x2", 1, 4, "eval"),
        ("v5p:2x2x1", 1, 4, "train"),
        ("v6e:2x2", 1, 4, "train"),
        ("tpu7x:2x2x1", 1, 8, "train"),
    ],
)
def test_every_generation(topology, slices, devices, program):
    config = read(
        "digits_tarflow.py",
        **{"flow.num_blocks": 2, "flow.width": 64, "flow.layers_per_block": (1,)},
    )
    plan = jetflow.plan(config, topology, slices=slices, program=program)
    assert plan.devices == devices and plan.fits
    assert plan.memory.total < 2**30
    assert plan.cost.flops > 0
    between = [one for one in plan.cost.collectives if one.kind.endswith(costs.BETWEEN_SLICES)]
    assert bool(between) == (slices > 1)


ROWS = re.findall(
    r"\| ([\d.]+) of ([\d.]+) \| ([\d.]+), ([\d.]+) \| ([\d.]+) s, bound by ([\w ]+) \| (\d+) % "
    r"\| `jetflow plan --config configs/(\S+) --topology (\S+)` \|",
    (tiny_runs.ROOT / "docs" / "scaling.md").read_text(),
)


BUDGETS = re.findall(
    r"\| (\d+) \| (\d+) \| ([\d.]+) s \| ([\d.]+) ([\d.]+) \| ([\d.]+) ([\d.]+) "
    r"\| `jetflow plan --config configs/(\S+) --topology (\S+)` \|",
    (tiny_runs.ROOT / "docs" / "scaling.md").read_text().replace(",", ""),
)


@pytest.mark.parametrize("row", BUDGETS, ids=lambda row: row[-2])
def test_budgets_of_the_page_follow_from_their_steps(row):
    *figures, name, topology = row
    config = read(name)
    images = len(roofline.load(config.data.name, config.data.train_split))
    seconds, chips = float(figures[2]), devices.chips(topology)
    steps = count_steps(config.train, images)
    days = steps * seconds / 86400
    expected = [chips, steps, seconds, days, 2 * days, 24 * chips * days, 48 * chips * days]
    assert list(map(float, figures)) == pytest.approx(expected, rel=0.02)


SPLASH = """\
ENTRY %main (q: bf16[4,6,64,TOKENS]) -> bf16[4,6,TOKENS,64] {
  %q = bf16[4,6,64,TOKENS]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %splash_mha_KIND.1 = bf16[4,6,TOKENS,64]{3,2,1,0} custom-call(%q, %q, %q), \
metadata={op_name="jit(step)/MASK/splash"}
}
"""


@pytest.mark.parametrize(
    ("kind", "products", "mask", "tokens", "tiles"),
    [
        ("fwd", 2, "full", 256, 1),
        ("dkv", 5, "full", 1024, 1),
        ("fwd", 2, "causal", 1024, 3 / 4),
        ("dkv", 5, "causal", 768, 6 / 9),
    ],
)
def test_splash_attention_counts_by_its_tiles(kind, products, mask, tokens, tiles):
    """Of 512x512 where that divides the tokens, else of 256x256; masked ones are skipped."""
    text = SPLASH.replace("KIND", kind).replace("MASK", mask).replace("TOKENS", str(tokens))
    flops = costs.cost(text, devices=1).flops
    assert flops == products * tiles * 2 * 4 * 6 * tokens**2 * 64


@pytest.mark.slow
@pytest.mark.parametrize("index", [*range(5), 7])  # of TPUs, and the first of GPUs
def test_published_models_need_what_the_page_states(index):
    *figures, bound, share, name, topology = ROWS[index]
    compiler, extra = ("libtpu", "tpu") if topology[0] == "v" else ("jax_cuda12_plugin", "cuda12")
    pytest.importorskip(compiler, reason=f"the compiler is missing: pip install -e '.[{extra}]'")
    plan = jetflow.plan(read(name), topology)
    assert plan.fits and plan.memory.spare > 0
    assert plan.model_flops < plan.cost.flops < 4 / 3 * plan.model_flops
    computed = [
        plan.memory.total / 2**30, plan.memory.capacity / 2**30, plan.model_flops / 1e12,
        plan.cost.flops / 1e12, plan.estimate.step_seconds,
    ]  # fmt: skip
    # Other versions of the compiler differ somewhat.
    assert computed == pytest.approx([float(figure) for figure in figures], rel=0.05)
    assert plan.estimate.bound_by == {"memory": "hbm", "matrix products": "compute"}[bound]
    assert 100 * plan.estimate.peak_share == pytest.approx(float(share), abs=4)


@pytest.mark.slow
@needs_libtpu
def test_fit_finds_the_largest_batch(capsys):
    argv = ["plan", f"--config={CONFIGS}/photos_tarflow.py:32", "--topology=v5e:2x2", "--fit",
            "--config.flow.width=1024", "--config.flow.num_blocks=1", "--json",
            "--config.train.batch_size=4096"]  # fmt: skip
    assert cli.main(argv) == 0
    output = capsys.readouterr()
    plans = json.loads(output.out)
    speeds = [plan["estimate"]["images_per_second"] for plan in plans]
    assert speeds == sorted(speeds, reverse=True)
    assert [plan["best"] for plan in plans] == [True, False, False, False]
    records = {record["remat"]: record for record in plans}
    assert set(records) == set(REMAT_POLICIES)
    assert records["none"]["batch_size"] < records["full"]["batch_size"]
    for record in records.values():
        assert record["fits"]
        assert 0 <= record["memory"]["spare"] < 0.6 * record["memory"]["capacity"]
    tried = re.findall(r"(remat \w+, \d+ images a device): (\w+)", output.err)
    assert [word for _, word in tried[::2]] == ["compiling"] * (len(tried) // 2)
    assert [what for what, _ in tried[::2]] == [what for what, _ in tried[1::2]]


@pytest.mark.slow
@needs_libtpu
def test_fit_of_sampling():
    """Whatever the training's accumulation is, and with an axis that takes the rest."""
    changes = {"train.accumulation": 2, "mesh.data": 1, "mesh.tensor": -1, "flow.width": 4096,
               "flow.num_blocks": 1, "flow.head_dim": 1024, "eval.batch_size": 2**20}  # fmt: skip
    config = read("digits_tarflow.py", **changes)
    [plan] = roofline.fit(config, "v5e:2x2", program="sample")
    assert plan.program == "sample" and plan.fits and plan.mesh["tensor"] == 4


@pytest.mark.parametrize("start", [0, 1, 3, 64])
def test_largest(start):
    for limit, expected in [(0.5, 0), (1, 1), (2, 2), (3, 3), (5, 4), (6, 6), (1000, 768)]:
        for constant in (0.0, 0.25):  # memory that does not grow with the size
            tried = []

            def used(size, limit=limit, constant=constant, tried=tried):
                tried.append(size)
                return constant + (1 - constant) * size / limit

            assert roofline._largest(used, start, 1000) == expected
            assert len(tried) <= 7
    assert roofline._largest(lambda size: size / 1000, start, 48) == 48


def test_without_libtpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(jetflow.UsageError, match=r"pip install -e '\.\[tpu\]'"):
        devices.devices("v5e:4x4")


@needs_libtpu
def test_compilers_are_silent_on_a_machine_without_accelerators():
    code = "import jax; from jetflow.tools.plan import devices; devices.silence_compilers(); "
    code += "jax.devices()"
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.returncode == 0
    assert b"TPU" not in done.stderr and b"CUDA" not in done.stderr


@pytest.mark.parametrize(
    ("split", "count"),
    [("train", 1_281_149), ("train[:90%]", 1_153_034), ("train[:100]+validation", 50_099)],
)
def test_sizes_of_data_sets(split, count):
    assert len(roofline.load("imagenet64_old", split)) == count
