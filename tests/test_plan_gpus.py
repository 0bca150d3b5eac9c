"""Plans for GPUs: programs as XLA writes them for NVIDIA's, and the plans of such."""

import importlib.util
import json
import re

import pytest
import tiny_runs

import jetflow
from jetflow import cli, configs
from jetflow.tools.plan import costs, devices, hlo

CONFIGS = tiny_runs.ROOT / "configs"

pytestmark = pytest.mark.usefixtures("optimised")
PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
needs_cuda = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, PLUGINS)),
    reason="JAX's CUDA plugin is not installed: pip install -e '.[cuda12]'",
)

# A layer in a loop of three: a Triton product in a fusion, one of cuBLAS with its workspace, and
# cuDNN's attention, forwards and backwards; exchanges grouped and not.
PROGRAM = """\
HloModule jit_step, is_scheduled=true

%gemm_fusion_dot.1_computation (parameter_0: bf16[64,32], parameter_1: bf16[32,96]) -> bf16[64,96] {
  %parameter_0 = bf16[64,32]{1,0} parameter(0)
  %parameter_1 = bf16[32,96]{1,0} parameter(1)
  ROOT %dot.1 = bf16[64,96]{1,0} dot(%parameter_0, %parameter_1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%region_body (b: (s32[], bf16[64,32], bf16[32,96])) -> (s32[], bf16[64,32], bf16[32,96]) {
  %b = (s32[], bf16[64,32]{1,0}, bf16[32,96]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %x = bf16[64,32]{1,0} get-tuple-element(%b), index=1
  %w = bf16[32,96]{1,0} get-tuple-element(%b), index=2
  %y = bf16[64,96]{1,0} fusion(%x, %w), kind=kCustom, calls=%gemm_fusion_dot.1_computation, backend_config={"fusion_backend_config":{"kind":"__triton_gemm"}}
  ROOT %out = (s32[], bf16[64,32]{1,0}, bf16[32,96]{1,0}) tuple(%i, %x, %w)
}

%region_condition (c: (s32[], bf16[64,32], bf16[32,96])) -> pred[] {
  %c = (s32[], bf16[64,32]{1,0}, bf16[32,96]{1,0}) parameter(0)
  ROOT %less = pred[] custom-call(%c), custom_call_target="unknown"
}

ENTRY %main (x.0: bf16[64,32], w.0: bf16[32,96], a.0: f32[2,32,64], q: bf16[4,256,6,64], g: f32[128]) -> f32[64,16] {
  %x.0 = bf16[64,32]{1,0} parameter(0)
  %w.0 = bf16[32,96]{1,0} parameter(1)
  %a.0 = f32[2,32,64]{2,1,0} parameter(2)
  %q = bf16[4,256,6,64]{3,2,1,0} parameter(3)
  %g = f32[128]{0} parameter(4)
  %zero = s32[] constant(0)
  %init = (s32[], bf16[64,32]{1,0}, bf16[32,96]{1,0}) tuple(%zero, %x.0, %w.0)
  %while.1 = (s32[], bf16[64,32]{1,0}, bf16[32,96]{1,0}) while(%init), condition=%region_condition, body=%region_body, backend_config={"known_trip_count":{"n":"3"}}
  %custom-call.1 = (f32[2,64,16]{2,1,0}, s8[4096]{0}) custom-call(%a.0, %a.0), custom_call_target="__cublas$lt$matmul", backend_config={"operation_queue_id":"0","gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]},"precision_config":{"operand_precision":["HIGHEST","HIGHEST"],"algorithm":"ALG_UNSET"}}}
  %dot_product_attention_fwd.1 = (bf16[4,6,256,64]{3,1,2,0}, f32[4,6,256]{2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config": {"fmha_scale": 0.125, "intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["4", "6", "256", "256"], "tuple_shapes": []}, "mask_type": "CAUSAL"}}
  %stats = f32[4,6,256]{2,1,0} get-tuple-element(%dot_product_attention_fwd.1), index=1
  %dot_product_attention_bwd.1 = (bf16[4,6,256,64]{3,1,2,0}, bf16[4,6,256,64]{3,1,2,0}, bf16[4,6,256,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q, %stats, %q, /*index=5*/%q), custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["4", "6", "256", "256"], "tuple_shapes": []}, "mask_type": "NO_MASK"}}
  %all-gather-start = ((bf16[64,32]{1,0}, bf16[32,96]{1,0}), (bf16[512,32]{1,0}, bf16[256,96]{1,0})) all-gather-start(%x.0, %w.0), channel_id=2, replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_0'}, dimensions={0}
  %all-gather-done = (bf16[512,32]{1,0}, bf16[256,96]{1,0}) all-gather-done(%all-gather-start)
  %all-reduce-start = f32[128]{0} all-reduce-start(%g), channel_id=3, replica_groups=[2,8]<=[16], to_apply=%region_condition
  %all-reduce-done = f32[128]{0} all-reduce-done(%all-reduce-start)
  %collective-permute-start = (f32[128]{0}, f32[128]{0}) collective-permute-start(%g), channel_id=4, source_target_pairs={{0,8},{8,0}}
  %collective-permute-done = f32[128]{0} collective-permute-done(%collective-permute-start)
  ROOT %result = f32[64,16]{1,0} bitcast(%custom-call.1)
}
"""  # noqa: E501


def test_products_in_fusions_and_calls_are_counted():
    cost = costs.cost(PROGRAM, devices=16, nodes=2)
    assert cost.unknown_loops == 0
    tiles = 4 * 6 * 256**2 * 64  # multiplications of one product of attention
    forward = 2 * 2 * tiles * (3 / 4)  # of four tiles of 128 x 128, one is all masked
    backward = 5 * 2 * tiles
    triton = 3 * 2 * 64 * 32 * 96
    assert cost.flops_by_arithmetic == {
        "bfloat16": triton + forward + backward,
        "float32 highest": 2 * 2 * 64 * 16 * 32,
    }
    assert cost.flops == sum(cost.flops_by_arithmetic.values())


def test_exchanges_within_a_node_and_between_nodes():
    """16 GPUs in two nodes: rings of four a node and two nodes, of one node, and a pair."""
    cost = costs.cost(PROGRAM, devices=16, nodes=2)
    sent = {one.kind: (one.count, one.bytes) for one in cost.collectives}
    gathered = 7 * 2 * (64 * 32 + 32 * 96)
    assert sent == {
        "all-gather": (1, gathered),
        "all-gather between nodes": (1, gathered / 4),
        "all-reduce": (1, 2 * 7 / 8 * 4 * 128),
        "collective-permute between nodes": (1, 4 * 128),
    }


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("{{0,3},{1,2}}", [[0, 3], [1, 2]]),
        ("{}", [[0, 1, 2, 3]]),
    ],
)
def test_groups_of_devices(text, groups):
    found = hlo.replica_groups(f"channel_id=1, replica_groups={text}, dimensions={{0}}", 4)
    assert sorted(map(sorted, found.tolist())) == groups


def test_peaks_of_each_precision():
    """float32: three and six passes of bfloat16 on TPUs; TF32, then units of its own on GPUs."""
    tpu, gpu = devices.find("v5e:4x4"), devices.find("h100:2x8")
    names = ("float32 default", "float32 high", "float32 highest")
    assert [tpu.flops / tpu.peak(name) for name in names] == pytest.approx([1, 3, 6])
    assert [gpu.flops / gpu.peak(name) for name in names] == pytest.approx([2, 2, 989.4 / 67])


@pytest.mark.parametrize("topology", ["h100", "h100:", "h100:9", "h100:0x8", "h100:4x4x4", "k80:8"])
def test_topologies_that_do_not_exist(topology):
    with pytest.raises(jetflow.UsageError, match="expected GENERATION:SHAPE"):
        devices.find(topology)


def test_nodes_are_no_slices():
    with pytest.raises(jetflow.UsageError, match="h100:4x8"):
        devices.devices("h100:2x8", slices=2)


def test_without_the_plugin(monkeypatch):
    def absent(**_):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(devices.topologies, "get_topology_desc", absent)
    with pytest.raises(jetflow.UsageError, match=r"pip install -e '\.\[cuda12\]'"):
        devices.devices("h100:8")


@pytest.mark.parametrize("share", ["abc", "0", "90"])
@pytest.mark.parametrize("name", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_the_share_of_the_memory(monkeypatch, name, share):
    """Of GPUs alone, and refused before the plugin reads it."""
    monkeypatch.setenv(name, "0.5")
    assert devices.find("h100:8").capacity == devices.find("h100:8").hbm_bytes // 2
    monkeypatch.setenv(name, share)
    assert devices.find("v5e:2x2").capacity == devices.find("v5e:2x2").hbm_bytes
    with pytest.raises(jetflow.UsageError, match=f"{name} is '{share}'"):
        devices.devices("h100:8")


SMALL = {"flow.num_blocks": 2, "flow.width": 128, "flow.head_dim": 64,
         "flow.layers_per_block": (2,), "flow.dtype": "bfloat16"}  # fmt: skip


def read(name: str, **fields):
    config = configs.read(f"{CONFIGS}/{name}")
    config.update_from_flattened_dict(fields)
    return config


def program(monkeypatch, *args, **kwargs) -> tuple:
    """A plan, and the text of its program."""
    texts, real = [], costs.cost
    monkeypatch.setattr(costs, "cost", lambda text, *rest: texts.append(text) or real(text, *rest))
    return jetflow.plan(*args, **kwargs), *texts


@pytest.mark.slow
@needs_cuda
@pytest.mark.parametrize("topology", ["a100:8", "h100:2x8", "b200:8"])
def test_every_gpu(topology, capsys):
    argv = ["plan", f"--config={CONFIGS}/photos_tarflow.py:32", f"--topology={topology}", "--json"]
    argv += [f"--config.{name}={value}" for name, value in SMALL.items()]
    assert cli.main([*argv, "--config.train.batch_size=64"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] and plan["attention"] == "cudnn"
    assert plan["devices"] == (16 if "2x8" in topology else 8)
    assert 0.8 < plan["cost"]["flops"] / plan["model_flops"] < 1.15
    spans = [one for one in plan["cost"]["collectives"] if "between nodes" in one["kind"]]
    assert bool(spans) == ("2x8" in topology)


@pytest.mark.slow
@needs_cuda
def test_attention_is_cudnns_on_any_mesh(monkeypatch):
    """Forwards and backwards: no logits, and no device gathers the rows or heads of others."""
    mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "train.batch_size": 64}
    config = read("photos_tarflow.py:32", **SMALL, **mesh)
    plan, text = program(monkeypatch, config, "h100:8")
    assert plan.attention == "cudnn"
    batch, heads, tokens = 64 // 4, 1, 256
    calls = re.findall(r"= \(bf16\[([\d,]+)\].*custom_call_target=\"(__cudnn\$fmha\w+)\"", text)
    shape = f"{batch},{heads},{tokens},64"
    assert {*calls} == {(shape, "__cudnn$fmhaSoftmax"), (shape, "__cudnn$fmhaSoftmaxBackward")}
    assert not re.search(rf"\[{batch},{heads},{tokens},{tokens}\]", text)
    activations = batch * tokens * 128 * 2  # bytes
    gathers = [one.result for computation in hlo.parse(text).values()
               for one in computation.values() if one.opcode.startswith("all-gather")]  # fmt: skip
    assert gathers and all(array.size < activations for result in gathers for array in result)


@pytest.mark.slow
@needs_cuda
def test_precision_of_a_program():
    changes = {**SMALL, "flow.dtype": "float32", "train.batch_size": 64}
    plans = {}
    for precision in ("default", "highest"):
        config = read("photos_tarflow.py:32", **changes, **{"flow.precision": precision})
        plans[precision] = jetflow.plan(config, "h100:1")
        assert (
            max(plans[precision].cost.flops_by_arithmetic.items(), key=lambda item: item[1])[0]
            == f"float32 {precision}"
        )
    seconds = [plan.estimate.seconds_by_resource["compute"] for plan in plans.values()]
    assert seconds[1] / seconds[0] == pytest.approx(494.7 / 67, rel=0.02)


@pytest.mark.slow
@needs_cuda
def test_a_batch_that_is_too_large_does_not_fit():
    config = read("photos_tarflow.py:32", **SMALL, **{"train.batch_size": 2**16})
    plan = jetflow.plan(config, "h200:1")
    assert not plan.fits and plan.memory.spare < 0 and plan.estimate is None
