"""The learning rate against its formulas and against torch's schedulers."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR

from minift.optim.schedule import SCHEDULES, lr_at

FORMULAS = {
    "constant": lambda t: 1.0,
    "linear": lambda t: 1 - t,
    "cosine": lambda t: 0.5 * (1 + math.cos(t * math.pi)),
}
names = st.sampled_from(sorted(FORMULAS))
peaks = st.floats(1e-8, 10)


@st.composite
def lengths(draw):
    """(total, warmup), with at least one step after the warm-up."""
    warmup = draw(st.integers(0, 100))
    return warmup + draw(st.integers(1, 100)), warmup


def rates(total, peak, warmup, name):
    return [lr_at(step, total, peak, warmup, name) for step in range(total)]


def test_every_schedule_has_a_formula_here():
    assert SCHEDULES.keys() == FORMULAS.keys()


@given(names, lengths(), peaks)
def test_rates_are_those_of_the_formulas(name, length, peak):
    total, warmup = length
    expected = [(step + 1) / warmup for step in range(warmup)]
    expected += [FORMULAS[name](i / (total - warmup)) for i in range(total - warmup)]
    assert rates(total, peak, warmup, name) == pytest.approx([peak * e for e in expected], rel=1e-12)


@given(names, st.integers(1, 100), peaks)
def test_without_a_warm_up_the_first_step_has_the_peak_rate(name, total, peak):
    assert lr_at(0, total, peak, 0, name) == peak


@given(names, st.integers(1, 100), peaks)
def test_the_first_step_of_a_warm_up_moves_already(name, warmup, peak):
    assert lr_at(0, warmup + 1, peak, warmup, name) == peak / warmup


@given(names, lengths(), peaks)
def test_the_border_of_the_warm_up_is_the_peak_from_both_sides(name, length, peak):
    total, warmup = length
    assert lr_at(warmup, total, peak, warmup, name) == peak
    if warmup:
        assert lr_at(warmup - 1, total, peak, warmup, name) == pytest.approx(peak, rel=2**-52)


@given(names, lengths(), peaks)
def test_rates_rise_to_the_border_and_never_rise_after_it(name, length, peak):
    total, warmup = length
    lrs = rates(total, peak, warmup, name)
    assert all(a < b for a, b in pairwise(lrs[:warmup]))
    assert all(a >= b if name == "constant" else a > b for a, b in pairwise(lrs[warmup:]))
    assert all(0 < lr <= peak for lr in lrs)


@given(st.sampled_from(["linear", "cosine"]), lengths(), peaks)
def test_the_end_of_a_decay_is_zero(name, length, peak):
    total, warmup = length
    assert lr_at(total, total, peak, warmup, name) == pytest.approx(0, abs=peak * 1e-15)


@given(names, st.integers(1, 50), st.integers(0, 50), peaks)
def test_a_warm_up_longer_than_the_run_only_rises(name, total, longer, peak):
    warmup = total + longer
    lrs = rates(total, peak, warmup, name)
    assert lrs == pytest.approx([peak * (step + 1) / warmup for step in range(total)], rel=1e-12)


def torch_rates(make, total, peak) -> list[float]:
    """What a scheduler of torch sets for each step."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    scheduler, lrs = make(optimizer), []
    for _ in range(total):
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return lrs


@given(names, lengths())
def test_rates_are_those_of_lambda_lr(name, length):
    total, warmup = length

    def factor(step):
        return (step + 1) / warmup if step < warmup else FORMULAS[name]((step - warmup) / (total - warmup))

    expected = torch_rates(lambda optimizer: LambdaLR(optimizer, factor), total, 0.3)
    assert rates(total, 0.3, warmup, name) == pytest.approx(expected, rel=0, abs=1e-12)


@given(st.integers(1, 200))
def test_the_cosine_is_that_of_torch(total):
    expected = torch_rates(lambda optimizer: CosineAnnealingLR(optimizer, T_max=total), total, 0.3)
    assert rates(total, 0.3, 0, "cosine") == pytest.approx(expected, rel=0, abs=1e-12)


@given(st.integers(2, 100), st.integers(1, 20))
def test_the_warm_up_is_that_of_torch(warmup, more):
    total = warmup + more
    expected = torch_rates(lambda o: LinearLR(o, start_factor=1 / warmup, total_iters=warmup - 1), total, 0.3)
    assert rates(total, 0.3, warmup, "constant") == pytest.approx(expected, rel=0, abs=1e-12)


@pytest.mark.parametrize("step", [0, 5])
def test_an_unknown_schedule_is_an_error_that_lists_the_known_ones_also_in_the_warm_up(step):
    with pytest.raises(ValueError, match="schedule 'exponential' is not one of cosine, linear, constant"):
        lr_at(step, 10, 1e-3, 2, "exponential")
