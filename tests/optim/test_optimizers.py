"""AdamW8bit against its formula in fp64, torch.optim.AdamW and bitsandbytes' limits; its state."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from minift.kernels.adamw_8bit import BLOCK
from minift.optim.adamw_8bit import AdamW8bit, dynamic_map, dynamic_maps
from minift.quant import codebook

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}


def decoded(state, moment):
    """m or v in fp64, as it stands in the state."""
    values = dynamic_maps(CPU)[moment == "v"].values.double()
    codes = state[f"{moment}_codes"]
    return values[codes.int()] * state[f"{moment}_absmax"].double().repeat_interleave(BLOCK)[: codes.numel()]


def exact(p, g, m, v, step, lr, betas, eps, weight_decay):
    """p, m and v after a step in fp64, and the bound on the error of p in fp32.

    u = 2^-24 for each rounding. m: map value * absmax, beta1, its product, the sum: 4 u of the sizes of the
    two terms. v, all of it positive: 4 u, since g^2 is one more product and not decoded. Its root: 4 u / 2 +
    u; `root` and its product: 2 u; eps and the sum: u. That is 6 u; the quotient, step_size and its product:
    3 u. So 9 u of the update, beside the 4 u of m's terms. p * keep: 2 u; the difference: u. 1 % for products
    of these.
    """
    u, (beta1, beta2) = 2.0**-24, betas
    g, old = g.double().view(-1), m * beta1
    m, v = old + g * (1 - beta1), v * beta2 + g * g * (1 - beta2)
    factor = lr / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + eps)
    kept, update = p.double().view(-1) * (1 - lr * weight_decay), factor * m
    sizes = 9 * update.abs() + 4 * factor * (old.abs() + g.abs() * (1 - beta1)) + 2 * kept.abs()
    return kept - update, m, v, 1.01 * u * (sizes + (kept - update).abs())


def to_nearest(x, values):
    """How far the nearest of ascending values is."""
    above = torch.bucketize(x, values).clamp(1, len(values) - 1)
    return torch.minimum((x - values[above - 1]).abs(), (x - values[above]).abs())


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_50_steps_each_within_the_bound_of_the_formula_and_the_limits_of_bitsandbytes(dtype, weight_decay):
    """Each step starts where the last one ended, since it is the error of one step that has a bound.

    The limits are those of bitsandbytes' tests of 8-bit Adam: mean error 6e-5, relative 6e-4 (1.7e-4 and
    1.6e-3 for 16 bits). Its limit for moments, 3e-3 + 1e-3 of them, is for moments near 1; these are near
    1e-3, and each is held to the map's nearest value.
    """
    p = torch.randn(65, 100).mul_(0.1).to(dtype).requires_grad_()
    one = AdamW8bit([p], **SETTINGS, weight_decay=weight_decay)
    m = v = torch.zeros(p.numel(), dtype=torch.float64)
    for step in range(1, 51):
        p.grad = torch.randn(65, 100).mul_(0.01).to(dtype)
        want, m, v, bound = exact(p.detach(), p.grad, m, v, step, **SETTINGS, weight_decay=weight_decay)
        one.step()
        if dtype != torch.float32:  # one more rounding; fp16 has steps of 2^-24 below 2^-14
            bound = bound + torch.finfo(dtype).eps / 2 * (want.abs() + bound)
            bound += 2.0**-25 if dtype == torch.float16 else 0
        error = (p.detach().double().view(-1) - want).abs()
        assert (error <= bound).all()
        small = dtype == torch.float32
        assert error.mean() < (6e-5 if small else 1.7e-4)
        assert (error / (want.abs() + 1e-9)).mean() < (6e-4 if small else 1.6e-3)
        for name, moment, widest in (("m", m, 0.9 / 64), ("v", v, 0.9 / 128)):
            stored = decoded(one.state[p], name)
            scale = one.state[p][f"{name}_absmax"].double().repeat_interleave(BLOCK)[: p.numel()]
            # 10 roundings: 4 of the moment, 3 of the search, 3 of the map; a code chosen from a number that
            # is off by that lies no further from the right one than the nearest value and twice that
            distance = to_nearest(moment / scale, dynamic_maps(CPU)[name == "v"].values.double())
            assert (distance <= widest / 2 + 10 * 2.0**-24).all()
            assert ((stored - moment).abs() <= scale * (distance + 2 * 10 * 2.0**-24)).all()
        m, v = decoded(one.state[p], "m"), decoded(one.state[p], "v")


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_first_step_is_that_of_adamw(weight_decay):
    p = torch.randn(700).requires_grad_()
    p.grad = torch.randn(700).mul_(0.01)
    q = p.detach().double().requires_grad_()
    q.grad = p.grad.double()
    zero = torch.zeros(700, dtype=torch.float64)
    want, *_, bound = exact(p.detach(), p.grad, zero, zero, 1, **SETTINGS, weight_decay=weight_decay)
    AdamW8bit([p], **SETTINGS, weight_decay=weight_decay).step()
    torch.optim.AdamW([q], **SETTINGS, weight_decay=weight_decay).step()
    # torch and `exact` round in fp64 what `exact` counts in fp32: the bound of each, 2^-29 as large
    assert ((q.detach() - want).abs() <= 2 * 2.0**-29 * bound).all()
    assert ((p.detach().double() - q.detach()).abs() <= (1 + 2 * 2.0**-29) * bound).all()


def test_a_thousand_steps_end_within_one_percent_of_the_loss_of_adamw():
    """Linear regression with noise, full batches: the loss does not go to zero."""
    torch.manual_seed(3)
    x = torch.randn(256, 20)
    y = x @ torch.randn(20) + 0.5 * torch.randn(256)
    losses = []
    for kind in (AdamW8bit, torch.optim.AdamW):
        w = torch.zeros(20, requires_grad=True)
        optimizer = kind([w], lr=3e-3, weight_decay=0.01)
        for _ in range(1000):
            optimizer.zero_grad()
            loss = (x @ w - y).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] / losses[1] - 1) < 0.01


@given(st.integers(0, 10**6), st.sampled_from([1e-30, 1e-20, 1e-6, 1.0, 1e6]))
def test_no_gradients_make_a_parameter_nan(seed, scale):
    """Gradients over many decades, many of them zero: v decodes to zero while m does not."""
    g = torch.Generator().manual_seed(seed)
    p = torch.randn(300, generator=g).requires_grad_()
    one = AdamW8bit([p], **SETTINGS)
    for _ in range(5):
        p.grad = scale * torch.randn(300, generator=g) * torch.randn(300, generator=g).mul(4).exp()
        p.grad[torch.rand(300, generator=g) < 0.5] = 0
        one.step()
    p.grad = torch.zeros(300)
    one.state[p]["v_codes"].zero_()
    one.step()
    assert p.isfinite().all()


def test_what_is_not_finite_stays_in_its_block():
    p = torch.randn(3 * BLOCK).requires_grad_()
    p.grad = torch.randn(3 * BLOCK)
    p.grad[5] = float("nan")
    one = AdamW8bit([p])
    one.step()
    assert p[5].isnan() and p.isfinite().sum() == p.numel() - 1
    for name in ("m_absmax", "v_absmax"):
        assert one.state[p][name].isnan().tolist() == [True, False, False]


SIZES = [(1,), (), (300,), (16, 40), (0, 4), (2, 3, 50)]


def parameters():
    return [torch.randn(size).to(DTYPES[i % 3]).requires_grad_() for i, size in enumerate(SIZES)]


def optimizer(params):
    groups = [{"params": params[:4], "lr": 1e-2}, {"params": params[4:], "weight_decay": 0.0}]
    return AdamW8bit(groups, **SETTINGS)


def run(one, params, seeds):
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        for p in params:
            p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
        one.step()


def numbers(one):
    """Every tensor of the state, under a name."""
    return {f"{i}.{name}": x for i, s in one.state_dict()["state"].items() for name, x in s.items()}


def test_a_saved_state_loads_byte_for_byte_and_continues_with_the_same_bits():
    params = parameters()
    one = optimizer(params)
    run(one, params, range(3))
    kept = save({name: x.clone() for name, x in numbers(one).items()})
    state = {}
    for key, x in load(kept).items():
        i, _, name = key.partition(".")
        state.setdefault(int(i), {})[name] = x
    others = [p.detach().clone().requires_grad_() for p in params]
    other = optimizer(others)
    other.load_state_dict({**one.state_dict(), "state": state})
    assert save(numbers(other)) == kept
    run(one, params, range(3, 6))
    run(other, others, range(3, 6))
    assert save(numbers(other)) == save(numbers(one)) != kept
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
    assert all(torch.equal(x, state[int(k[0])][k[2:]]) for k, x in load(kept).items())  # not those in use


def test_parameters_together_and_alone_get_the_same_bits():
    params = parameters()
    alone = [p.detach().clone().requires_grad_() for p in params]
    together = AdamW8bit(params)
    each = [AdamW8bit([p]) for p in alone]
    for seed in range(3):
        run(together, params, [seed])
        g = torch.Generator().manual_seed(seed)
        for p, one in zip(alone, each, strict=True):
            p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
            one.step()
    assert all(torch.equal(a, b) for a, b in zip(params, alone, strict=True))


def test_a_parameter_without_a_gradient_stays_and_counts_its_own_steps():
    params = parameters()[2:4]
    one, before = AdamW8bit(params), params[1].detach().clone()
    params[0].grad = torch.ones_like(params[0])
    one.step()
    assert torch.equal(params[1], before) and params[1] not in one.state
    run(one, params, range(2))
    assert [one.state[p]["step"].item() for p in params] == [3, 2]


@given(st.integers(0, 2000))
def test_the_state_takes_the_bytes_that_the_docstring_says(n):
    p = torch.zeros(n).requires_grad_()
    p.grad = torch.ones(n)
    one = AdamW8bit([p])
    one.step()
    assert sum(x.nbytes for x in one.state[p].values()) == 2 * n + 8 * -(-n // BLOCK) + 4


def test_a_closure_runs_with_gradients_and_its_loss_comes_back():
    p = torch.ones(3, requires_grad=True)
    one = AdamW8bit([p], lr=0.1)

    def closure():
        loss = p.square().sum()
        loss.backward()
        return loss

    assert one.step(closure).item() == 3 and (p < 1).all()


def test_the_maps():
    signed, unsigned = (torch.tensor(dynamic_map(signed)) for signed in (True, False))
    assert tuple(signed.tolist()) == tuple(torch.tensor(codebook.dynamic_map()).tolist())
    assert unsigned[0] == 0 and unsigned[-1] == 1 and (unsigned.diff() > 0).all()
    for i in range(7):  # 2^(i + 1) values between powers of ten
        inside = (unsigned > 10.0 ** (i - 7)) & (unsigned < 10.0 ** (i - 6))
        assert inside.sum() == 2 ** (i + 1)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"betas": (0.9, 1.0)}, "betas are"),
        ({"betas": (0.9,)}, "betas are"),
        ({"eps": 0.0}, "eps is 0.0"),
    ],
)
def test_a_setting_that_cannot_be_is_an_error(change, match):
    with pytest.raises(ValueError, match=match):
        AdamW8bit([torch.zeros(3, requires_grad=True)], **change)


def test_what_has_no_8_bit_moments_is_an_error():
    for p in (torch.zeros(3, 4).t(), torch.zeros(3, dtype=torch.float64), torch.zeros(1, 4).expand(2, 4)):
        with pytest.raises(ValueError, match="contiguous fp32, bf16 or fp16"):
            AdamW8bit([p.detach().requires_grad_()])
    p = torch.zeros(3, 4, requires_grad=True)
    one = AdamW8bit([p])
    for grad, match in ((torch.ones(3, 4).to_sparse(), "dense"), (torch.ones(4, 3).t(), "not contiguous")):
        p.grad = grad
        with pytest.raises(ValueError, match=match):
            one.step()
    assert one.state[p]["step"] == 0


def test_another_optimizers_state_is_an_error():
    p = torch.zeros(300, requires_grad=True)
    p.grad = torch.ones(300)
    theirs, ours = torch.optim.AdamW([p]), AdamW8bit([p])
    theirs.step(), ours.step()
    with pytest.raises(ValueError, match="parameter 0 has .'exp_avg', 'exp_avg_sq', 'step'."):
        AdamW8bit([p]).load_state_dict({**ours.state_dict(), "state": theirs.state_dict()["state"]})
    with pytest.raises(
        ValueError, match=r"m_codes of parameter 0 is torch.uint8 .300,.; it must be .* .30,."
    ):
        AdamW8bit([torch.zeros(30, requires_grad=True)]).load_state_dict(ours.state_dict())
