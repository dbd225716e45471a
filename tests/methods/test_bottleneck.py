"""Bottleneck adapters against the same network written out in fp64 around a bare model."""

import laws
import pytest
import torch
from conftest import tiny_config, tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from laws import BASES, IDS, base_model, leaves, moved
from mutants import survives

import minift
from minift.methods import bottleneck
from minift.methods.base import trainable
from minift.methods.bottleneck import ACTIVATIONS, PLACEMENTS, Bottleneck, BottleneckAdapter
from minift.models.llama import Llama
from minift.models.skeleton import shapes_only

D, M = 32, 5
ACT = {  # written out
    "relu": lambda z: z * (z > 0),
    "gelu": lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2,
    "tanh": lambda z: 1 - 2 / (torch.exp(2 * z) + 1),
}
FFN = "mlp.down_proj"
WHERE = {"houlsby": ["self_attn.o_proj", FFN], "pfeiffer": [FFN], "parallel": ["mlp"]}
CASES = [
    {"placement": "houlsby", "activation": "gelu", "scaling": 2.0},
    {"placement": "pfeiffer", "activation": "tanh"},
    {"placement": "parallel", "activation": "relu", "scaling": 4.0},
    {"placement": "parallel", "activation": "tanh", "init_std": 0.01},
]


def with_networks(bare, leaves, fields, low=None):
    """`bare` with the adapters as hooks that read `leaves`; `low` (path -> BA) is added outside of them."""
    parts = {}
    for name, leaf in leaves.items():
        path, _, last = name.replace(".base", "").rpartition(".")
        parts.setdefault(path, {})[last] = leaf

    def network(path):
        p, act, s = parts[path], ACT[fields["activation"]], fields.get("scaling", 1.0)

        def hook(module, inputs, output):
            h = inputs[0] if fields["placement"] == "parallel" else output
            y = output + s * (act(h @ p["down"].T + p["down_bias"]) @ p["up"].T + p["up_bias"])
            return y if low is None or path not in low else y + inputs[0] @ low[path].T

        return hook

    for path in parts:
        bare.get_submodule(path).register_forward_hook(network(path))
    return bare


def assert_network(model, fields, bare=None, low=None):
    mine = leaves(model)
    bare = with_networks(bare or base_model(), mine, fields, low)
    laws.assert_dense(model, bare, mine, lambda _: {})


def check(module):
    for fields in CASES:
        fresh, method = base_model(), module.Bottleneck(bottleneck_dim=M, **fields)
        model = moved(base_model(), method, std=0.3)
        adapter, where = model.adapters["default"], WHERE[fields["placement"]]
        assert sorted(adapter.modules) == sorted(f"model.layers.{i}.{path}" for i in (0, 1) for path in where)
        count = 2 * len(where) * (2 * D * M + M + D)
        laws.assert_counts(model, count)
        assert adapter.plan.added == count
        shapes = {"down.weight": (M, D), "down.bias": (M,), "up.weight": (D, M), "up.bias": (D,)}
        for made in adapter.modules.values():
            assert {k: tuple(t.shape) for k, t in made.state().items()} == {
                f"adapter_{k}": shape for k, shape in shapes.items()
            }
        assert_network(model, fields)
        laws.assert_base_kept(model, fresh)
        laws.assert_rows(model)
        start = tiny_llama()
        minift.apply(start, method)
        for made in start.adapters["default"].modules.values():
            std = fields.get("init_std", 0)
            assert not made.down_bias.any() and not made.up_bias.any()
            assert made.down.any() and made.down.abs().max() <= (2 * std or D**-0.5)
            assert made.down.std() >= 0.7 * (std or (3 * D) ** -0.5)  # 0.88 std, and 1 of a uniform one
            assert made.up.any() == bool(std) and made.up.abs().max() <= 2 * std
        assert torch.equal(start(IDS), tiny_llama()(IDS)) == (method.identity_at_init == "bitwise")


def test_outputs_gradients_counts_and_starts_are_those_of_the_papers():
    check(bottleneck)


@pytest.mark.parametrize(
    "old, new",
    [
        ("x if self.parallel else y", "y if self.parallel else x"),
        ("alpha=self.scaling), y)", "alpha=1.0), y)"),
        ("alpha=self.scaling), y)", "alpha=self.scaling), x)"),
        ("torch.add(y, branch", "torch.add(x, branch"),
        ("self.activation(F.linear(h, ", "(F.linear(h, "),
        ("self.down_bias.to(h.dtype)", "None"),
        ("self.up_bias.to(h.dtype)", "self.up_bias.to(h.dtype) * 2"),
        ("self.up.to(h.dtype)", "self.up.float().to(h.dtype)"),
        ('"gelu": F.gelu', '"gelu": F.silu'),
        ('("attn_out", "ffn_out")', '("ffn_out",)'),
        ('"parallel": ("ffn",)', '"parallel": ("ffn_out",)'),
        ("sum(2 * D * m + m + D", "sum(2 * D * m + D"),
        ("if std == 0:", "if std >= 0:"),
        ("-2 * std, 2 * std, random", "-9 * std, 3 * std, random"),
        ("for weight in (self.down, self.up)", "for weight in (self.down,)"),
        ("self.down.shape[1] ** -0.5", "self.down.shape[0] ** -0.5"),
        ('"none" if self.init_std else "bitwise"', '"bitwise"'),
        ("if not self.active:", "if False:"),
    ],
)
def test_mutants_are_noticed(old, new):
    assert not survives(check, bottleneck, old, new)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_starts_as_the_base_to_the_bit_keeps_its_bits_and_rows(base, placement):
    fresh, model = base_model(base), base_model(base)
    minift.apply(model, Bottleneck(bottleneck_dim=M, placement=placement, activation="gelu"))
    laws.assert_starts_as_the_base_and_trains(model, fresh, base)
    with pytest.raises(ValueError, match="bottleneck cannot be merged: its branch is not linear"):
        minift.merge(model)
    model.adapters.remove("default")
    assert torch.equal(model(IDS), fresh(IDS)) and list(model.state_dict()) == list(fresh.state_dict())


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_near_identity_start_changes_the_output_by_little(placement, record_property):
    """At most 1e-2 of the logits, with the deviation that the paper took."""
    model, fresh = tiny_llama(), tiny_llama()
    method = Bottleneck(bottleneck_dim=64, placement=placement, init_std=1e-2)
    minift.apply(model, method)
    change = ((model(IDS) - fresh(IDS)).norm() / fresh(IDS).norm()).item()
    record_property("relative change of the logits", change)
    assert 0 < change <= 1e-2 and method.identity_at_init == "none"


def bounds(made, h, dy, u):
    """(branch, gradients) in fp64 from operands rounded to the dtype, each with its largest error.

    Each product of length K is off by 2 gamma_K of its absolute values, each stored number by u of it; errors
    of operands pass through |A|, |B| and the slopes of the activation: at most 1.13, its own slope 0.8.
    """
    w = {n: getattr(made, n).detach().to(made.dtype).double() for n in made.keys}
    A, a, B, b, g32 = w["down"], w["down_bias"], w["up"], w["up_bias"], 2.0**-24
    z1 = (h @ A.T + a).requires_grad_()
    z = made.activation(z1)
    [slope] = torch.autograd.grad(z.sum(), z1)
    z1, z, n = z1.detach(), z.detach(), len(h)
    e1 = 2 * (A.shape[1] + 1) * g32 * (h.abs() @ A.abs().T + a.abs()) + u * ((h @ A.T).abs() + z1.abs())
    ez = 1.13 * e1 + (u + 8 * g32) * (z.abs() + z1.abs())
    branch, size = z @ B.T + b, (z.abs() + ez) @ B.abs().T + b.abs()
    eb = ez @ B.abs().T + 2 * (len(a) + 1) * g32 * size + u * ((z @ B.T).abs() + branch.abs())
    g, eg = made.scaling * dy, (u + g32) * (made.scaling * dy).abs()
    dz, edz = g @ B, eg @ B.abs() + 2 * len(b) * g32 * (g.abs() @ B.abs()) + u * (g @ B).abs()
    jump = made.activation is ACTIVATIONS["relu"]  # the slope is exact, or off by one where z1 may be zero
    eslope = (z1.abs() <= e1).double() if jump else 0.8 * e1 + 2 * ez + 8 * g32
    d1, ed1 = dz * slope, edz * 1.13 + (dz.abs() + edz) * eslope + (u + 2 * g32) * (dz * slope).abs()
    ones, sums = torch.ones(n, 1, dtype=torch.float64), {}
    for name, left, off, right, more in (
        ("up", g, eg, z, ez),
        ("up_bias", g, eg, ones, 0 * ones),
        ("down", d1, ed1, h, 0 * h),
        ("down_bias", d1, ed1, ones, 0 * ones),
    ):
        size = (left.abs() + off).T @ (right.abs() + more)
        limit = off.T @ (right.abs() + more) + left.abs().T @ more + 2 * n * g32 * size
        sums[name] = left.T @ right, limit + u * (left.T @ right).abs()
    return (branch, eb), sums


kinds = st.sampled_from(list(ACTIVATIONS))


@given(st.sampled_from(BASES), kinds, st.booleans(), st.integers(1, 20), st.integers(0, 99))
def test_a_layer_and_its_gradients_are_within_the_bound_of_fp64(base, activation, parallel, n, seed):
    torch.manual_seed(seed)
    layer = laws.frozen_linear(base, 64, 64)
    dtype = layer.bias.dtype
    made = BottleneckAdapter(layer, 64, M, activation, 2.0, parallel)
    made.dtype = dtype
    with torch.no_grad():
        for name in made.keys:
            getattr(made, name).add_(0.3 * torch.randn_like(getattr(made, name)))
    x, dy = torch.randn(n, 64).to(dtype), torch.randn(n, 64).to(dtype)
    y, y0 = made(x), layer(x)
    y.backward(dy)
    u = 2.0**-8 if dtype == torch.bfloat16 else 0.0
    (branch, error), sums = bounds(made, (x if parallel else y0).double(), dy.double(), u)
    want = y0.double() + 2 * branch
    limit = 2 * error + (u + 2.0**-23) * (want.abs() + 2 * error)
    assert ((y.detach().double() - want).abs() <= 1.01 * limit).all()
    for name, (exact, limit) in sums.items():
        got = getattr(made, name).grad
        assert got.dtype == torch.float32
        got = got[:, None] if got.ndim == 1 else got
        assert ((got.double() - exact).abs() <= 1.01 * limit).all(), name


LOW = minift.LoRA(r=2, target_modules=(FFN,))


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
def test_lora_outside_adds_to_what_the_adapter_made_of_the_base(placement):
    fields = {"placement": placement, "activation": "tanh", "scaling": 0.5}
    model = moved(base_model(), Bottleneck(bottleneck_dim=M, **fields))
    low = moved(model, LOW, name="low").adapters["low"].modules
    deltas = {path: made.delta(torch.float64).detach() for path, made in low.items()}
    model.requires_grad_(False)
    for made in model.adapters["default"].parts:
        for name in made.keys:
            getattr(made, name).requires_grad_()
    assert_network(model, fields, low=deltas)
    laws.assert_rows(model)
    with pytest.raises(ValueError, match="merge 'default' first"):
        minift.merge(model, "low")


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_lora_inside_is_what_the_adapter_reads_and_merges_into_the_base(placement):
    fields = {"placement": placement, "activation": "tanh", "scaling": 0.5}
    model, bare = moved(base_model(), LOW, name="low"), base_model()
    for path, made in model.adapters["low"].modules.items():
        bare.get_submodule(path).weight.data += made.delta(torch.float64).detach()
    moved(model, Bottleneck(bottleneck_dim=M, **fields))
    assert_network(model, fields, bare)
    laws.assert_rows(model)
    laws.assert_checkpointing_changes_nothing(model)
    want = model(IDS)
    minift.merge(model, "low")
    laws.assert_close(model(IDS), want)


def test_the_paper_s_example_768_to_64_to_768():
    with shapes_only():
        shapes = Llama(tiny_config(hidden_size=768))
    plan = minift.apply(shapes, Bottleneck(bottleneck_dim=64, placement="houlsby"))
    assert {site.parameters for site in plan.sites} == {2 * 49_152 + 64 + 768}
    assert plan.trainable == 2 * 2 * 99_136 == sum(p.numel() for p in trainable(shapes).values())
    assert plan.sites[0].formula == "2 x 768 x 64 + 64 + 768" and plan.sites[0].shape == (768, 64)
    assert {site.r for site in plan.sites} == {None}  # the width is no rank
    assert all(p.is_meta for p in trainable(shapes).values())


def test_chosen_blocks_the_meta_device_and_the_start_of_each_path():
    method = Bottleneck(bottleneck_dim=M, layers_to_transform=[1])
    model, again, other = tiny_llama(), tiny_llama(), tiny_llama()
    laws.assert_plans_on_meta(method, model)
    assert list(method.plan(model).sites) == list(Bottleneck(bottleneck_dim=M).plan(model).sites[1:])
    minift.apply(model, method, seed=3)
    minift.apply(again, Bottleneck(bottleneck_dim=M), seed=3)
    minift.apply(other, method, seed=4)
    [one], two, [three] = (m.adapters["default"].parts for m in (model, again, other))
    assert torch.equal(one.down, two[1].down)
    assert not torch.equal(one.down, two[0].down) and not torch.equal(one.down, three.down)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"bottleneck_dim": 0}, "bottleneck_dim is 0; it is a whole number of at least 1"),
        ({"activation": "swish"}, "activation is 'swish'; it is one of relu, gelu, tanh"),
        ({"placement": "after"}, "placement is 'after'; it is one of houlsby, pfeiffer, parallel"),
        ({"scaling": 0}, "scaling is 0; it is a finite number above 0"),
        ({"scaling": float("nan")}, "scaling is nan"),
        ({"scaling": "4"}, "scaling is '4'"),
        ({"init_std": -0.01}, "init_std is -0.01; it is a finite number of at least 0"),
        ({"layers_to_transform": "2"}, "layers_to_transform '2' is outside the blocks 0-1"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Bottleneck(**fields).plan(tiny_llama())
