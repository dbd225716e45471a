"""LoftQ: the alternation against a dense reference, inside QLoRA, and what it refuses."""

import copy

import pytest
import torch
from conftest import tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives

import minift
from minift.config import run_config
from minift.methods import loftq
from minift.methods.base import trainable
from minift.methods.files import load_adapter, save_adapter
from minift.models.interface import dense_weight, is_quantized
from minift.models.llama import Llama
from minift.models.wrappers import base_layers
from minift.quant import Quantization, quantize_weight

IDS = torch.arange(24).view(2, 12) % 97
NF4 = Quantization("nf4", 64, True)
# fp32: a singular value decomposition of at most 48 x 40 numbers, a few n u of the largest value
FP32 = 8 * 48 * 2.0**-24


def weight(dtype=torch.float32, seed=0, shape=(40, 48)):
    torch.manual_seed(seed)
    return (0.1 * torch.randn(shape)).to(dtype)


def check(module):
    """Algorithm 1 by induction: Q_t is q of what the branch of t - 1 left, the branch the SVD of W - Q_t."""
    for dtype, recipe, r, s in (
        (torch.float32, NF4, 4, 2.0),
        (torch.bfloat16, NF4, 3, 0.5),
        (torch.float32, Quantization("fp4", 32, False), 5, 1.5),
    ):
        W, size, delta, expected = weight(dtype), weight(dtype).float().norm().item(), None, []
        for t in (1, 2, 3):
            Q, A, B, errors = module.loftq(W, r, s, recipe, t)
            target = W if delta is None else W.float() - delta
            q = quantize_weight(target, recipe.format, recipe.block_size, recipe.double_quant)
            assert Q.dtype == dtype and all(torch.equal(Q.tensors[name], x) for name, x in q.tensors.items())
            rest = W.double() - q.dequantize(dtype).double()
            U, S, Vh = torch.linalg.svd(rest)
            best = U[:, :r] @ torch.diag(S[:r]) @ Vh[:r]
            assert A.shape == (r, 48) and B.shape == (40, r) and A.dtype == B.dtype == torch.float32
            # directions of close singular values may mix, so the fit is compared: Eckart and Young
            left = (rest - s * B.double() @ A.double()).norm().item()
            assert abs(left - (rest - best).norm().item()) <= FP32 * size
            expected += [rest.norm().item()] * (t == 1) + [left]
            assert len(errors) == t + 1
            assert all(abs(x - y) <= FP32 * size for x, y in zip(errors, expected, strict=True))
            delta = s * (B @ A)


def test_the_alternation_is_the_papers():
    check(loftq)


@pytest.mark.parametrize(
    "old, new",
    [
        ("quantize_weight(target,", "quantize_weight(W,"),
        ("target = wide - delta", "target = wide + delta"),
        ("target = wide - delta", "target = Q.dequantize(W.dtype).float()"),
        ("delta = scaling * (B @ A)", "delta = B @ A"),
        ("rest = wide - Q.dequantize", "rest = target.float() - Q.dequantize"),
        ("principal(rest, r, scaling)", "principal(rest, r, 1.0)"),
        ("principal(rest, r, scaling)", "principal(wide, r, scaling)"),
        ("principal(rest, r, scaling)", "principal(rest, r - 1, scaling)"),
        ("recipe.block_size, recipe.double_quant)", "64, recipe.double_quant)"),
        ("recipe.block_size, recipe.double_quant)", "recipe.block_size, True)"),
        ("for _ in range(iterations):", "for _ in range(iterations + 1):"),
        ("[_norm(rest - delta)]", "[_norm(rest)]"),
        ("QuantizedWeight(Q.layout, Q.tensors, W.dtype)", "Q"),
    ],
)
def test_mutants_are_noticed(old, new):
    assert not survives(check, loftq, old, new)


@given(
    st.integers(1, 40),
    st.sampled_from([0.25, 2.0]),
    st.integers(1, 4),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from(["nf4", "fp4", "int8"]),
    st.integers(0, 20),
)
def test_each_branch_takes_from_the_error_what_its_rank_can(r, s, iterations, dtype, format, seed):
    W, recipe = weight(dtype, seed), Quantization(format)
    Q, A, B, errors = loftq.loftq(W, r, s, recipe, iterations)
    first = quantize_weight(W, format)
    slack = FP32 * W.float().norm().item()
    assert errors[0] == pytest.approx((W.float() - first.dequantize(dtype).float()).norm().item(), rel=1e-5)
    assert errors[1] < errors[0]  # nearer than without LoftQ, at any rank
    left = (W.float() - Q.dequantize(dtype).float() - s * B @ A).norm().item()
    assert abs(left - errors[-1]) <= slack and len(errors) == iterations + 1
    if iterations == 1:  # the base of every other start, bit for bit
        assert all(torch.equal(t, first.tensors[name]) for name, t in Q.tensors.items())


def error(model, start):
    """|W - what the layer stands for| / |W| over all adapted layers."""
    layers = base_layers(start)
    rows = [
        (layers[p].weight, dense_weight(m.base) + m.delta())
        for p, m in model.adapters["default"].modules.items()
    ]
    return (sum((a - b).square().sum() for a, b in rows) / sum(a.square().sum() for a, _ in rows)) ** 0.5


@pytest.mark.parametrize("iterations", [1, 5])
def test_qlora_starts_nearer_to_the_dense_model_with_loftq(iterations):
    models = [tiny_llama() for _ in range(3)]
    dense, plain, ours = models
    minift.apply(plain, minift.QLoRA(r=4))
    method = minift.QLoRA(r=4, init="loftq", loftq_iterations=iterations)
    plan = minift.apply(ours, method)
    assert method.identity_at_init == "none" and plan.trainable == sum(
        p.numel() for p in trainable(ours).values()
    )
    # rank 4 of at most 32 takes a fifth of the squares or more from errors that look like noise
    assert error(ours, dense) < 0.9 * error(plain, dense)
    assert (ours(IDS) - dense(IDS)).norm() < (plain(IDS) - dense(IDS)).norm()
    for path, layer in ours.adapters["default"].modules.items():
        assert (
            layer.start_A is None and is_quantized(layer.base) and len(layer.loftq_errors) == iterations + 1
        )
        W, want = base_layers(dense)[path].weight, dense_weight(layer.base) + layer.delta()
        assert layer.loftq_errors[-1] == pytest.approx(((W - want).norm() / W.norm()).item(), rel=1e-4)
        same = [
            torch.equal(p, plain.adapters["default"].modules[path].base.get_parameter(n))
            for n, p in layer.base.named_parameters()
        ]
        assert all(same) == (iterations == 1)


def test_the_errors_of_each_iteration_are_a_table():
    model = tiny_llama()
    minift.apply(model, minift.QLoRA(r=4, init="loftq", loftq_iterations=2, rank_pattern={"v_proj": 8}))
    adapter = model.adapters["default"]
    lines = loftq.loftq_table(adapter).split("\n")
    assert lines[0].split() == ["module", "q(W)", "1", "2"] and len(lines) == 1 + 14
    for line, (path, layer) in zip(lines[1:], adapter.modules.items(), strict=True):
        assert line.split() == [path, *(f"{e:.5f}" for e in layer.loftq_errors)]
    known = {row.path: row.relative for row in model.quantization_table}
    assert set(known.values()) == {None}  # the base is no longer q(W), whose error the table would hold
    one = tiny_llama()
    minift.apply(one, minift.QLoRA(r=4, init="loftq"))
    for row in one.quantization_table:
        assert row.relative == pytest.approx(
            one.adapters["default"].modules[row.path].loftq_errors[0], rel=1e-5
        )
    minift.apply(tiny_llama(), minift.LoRA())
    assert loftq.loftq_table(one.adapters["default"]).count("\n") == 14


def test_layers_without_a_branch_are_quantized_as_ever_and_dense_ones_start_as_kaiming():
    model, plain = tiny_llama(torch.bfloat16), tiny_llama(torch.bfloat16)
    minift.quantize_model(plain)
    method = minift.QLoRA(r=2, init="loftq", loftq_iterations=3, target_modules=["q_proj", "lm_head"])
    minift.apply(model, method)
    for path, layer in base_layers(plain).items():
        mine = base_layers(model)[path]
        if "q_proj" in path:
            assert is_quantized(mine.base) and mine.lora_B.any() and mine.base.compute_dtype == torch.bfloat16
        elif path == "lm_head":
            assert torch.equal(mine.base.weight, layer.weight) and not mine.lora_B.any() and mine.lora_A.any()
        else:
            assert all(torch.equal(p, mine.get_parameter(n)) for n, p in layer.named_parameters())
    assert sum(row.relative is None for row in model.quantization_table) == 2
    assert model.quantization == (method.recipe,)
    assert torch.isfinite(model(IDS)).all()


def test_it_trains_saves_loads_and_merges_as_any_lora(tmp_path):
    model = tiny_llama()
    minift.apply(model, minift.QLoRA(r=4, init="loftq"))
    layer = model.adapters["default"].modules["model.layers.0.self_attn.q_proj"]
    W, start = dense_weight(layer.base), layer.delta().detach().clone()
    model(IDS).square().mean().backward()
    assert all(p.grad.any() for p in trainable(model).values())
    save_adapter(model, tmp_path)
    fresh = tiny_llama()
    minift.quantize_model(fresh)  # after one iteration the base is the quantized model
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(IDS), model(IDS))
    want = model(IDS)
    minift.merge(model)
    merged = model.get_submodule("model.layers.0.self_attn.q_proj").weight
    assert (merged - W - start).abs().max() <= 2.0**-23 * (W.abs() + start.abs()).max()
    assert (model(IDS) - want).abs().max() <= 2e-5 * want.abs().max()


def test_after_more_iterations_the_base_is_kept_beside_its_adapter(tmp_path):
    model = tiny_llama()
    minift.apply(model, minift.QLoRA(r=4, init="loftq", loftq_iterations=3))
    want = model(IDS)
    save_adapter(model, tmp_path / "adapter")
    fresh = tiny_llama()
    minift.quantize_model(fresh)
    with pytest.raises(ValueError, match="was trained on another base"):
        load_adapter(fresh, tmp_path / "adapter")
    model.adapters.remove("default")
    minift.save_model(model, tmp_path / "base")
    again = minift.load_model(tmp_path / "base")
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(IDS), want)


def test_the_same_base_and_start_come_again():
    a, b = (tiny_llama() for _ in range(2))
    for seed, model in enumerate((a, b)):
        minift.apply(model, minift.QLoRA(r=4, init="loftq", loftq_iterations=3), seed=seed)
    assert all(
        torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_the_meta_device_plans_and_injects():
    with torch.device("meta"):
        model = Llama(tiny_llama().config)
    method = minift.QLoRA(init="loftq", loftq_iterations=2)
    assert method.plan(model).sites == method.plan(tiny_llama()).sites
    minift.apply(model, method)
    assert all(p.is_meta for p in model.parameters()) and sum(is_quantized(m) for m in model.modules()) == 14


def test_a_quantized_base_is_refused_with_the_fix():
    model = tiny_llama()
    minift.quantize_model(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError,
        match="q_proj is quantized already, and init 'loftq' starts from the dense weight; load the",
    ):
        minift.apply(model, minift.QLoRA(init="loftq"))
    assert not model.adapters and all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: minift.LoRA(init="loftq"),
            "init is 'loftq', which quantizes as it starts; apply method qlora",
        ),
        (
            lambda: minift.QLoRA(init="zeros"),
            "init is 'zeros'; it is one of kaiming, gaussian, pissa, olora, loftq$",
        ),
        (
            lambda: minift.QLoRA(init="loftq", loftq_iterations=0),
            "loftq_iterations is 0; it is a whole number",
        ),
        (lambda: minift.QLoRA(init="loftq", loftq_iterations=True), "loftq_iterations is True"),
        (
            lambda: minift.QLoRA(loftq_iterations=5),
            "loftq_iterations is 5 and init 'kaiming'; say init='loftq'",
        ),
    ],
)
def test_wrong_fields_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_run_with_loftq_loads_the_model_dense():
    table = {"data": "rows.jsonl", "method": {"name": "qlora", "init": "loftq"}}
    assert run_config(table).base_quantization is None
    del table["method"]["init"]
    assert run_config(table).base_quantization == NF4
