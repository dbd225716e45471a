"""The loss and its accumulation."""

import pytest
import torch
from conftest import CharTokenizer, tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from training.test_loop import ROWS, fresh, run

import minift
from minift.data.collate import Example, collate, encode_row, micro_batches
from minift.kernels import cross_entropy
from minift.methods.base import trainable
from minift.training import objective
from minift.training.objective import Objective
from minift.training.settings import TrainConfig


def test_the_objective_is_the_summed_loss_of_supervised_tokens():
    model = tiny_llama(torch.float64, vocab_size=128)
    batch = collate([Example([5, 6, 7, 1], 2, ""), Example([9, 8, 1], 0, "")], 0)
    total, tokens = Objective(model)(batch)
    logits = model(batch["input_ids"]).log_softmax(-1)
    want = -(logits[0, 1, 7] + logits[0, 2, 1] + logits[1, 0, 8] + logits[1, 1, 1])
    assert tokens == 4
    torch.testing.assert_close(total.double(), want, rtol=4 * 128 * 2.0**-53, atol=0)  # 4 sums of 128 terms


def test_logits_in_chunks_change_nothing(monkeypatch):
    model = fresh(dropout=0.0).double()
    batch = collate([Example(list(range(2, 30)), 3, ""), Example(list(range(40, 60)), 0, "")], 0)
    whole, _ = Objective(model)(batch)
    whole.backward()
    gradients = [p.grad.clone() for p in trainable(model).values()]
    model.zero_grad()
    for module in (objective, cross_entropy):
        monkeypatch.setattr(module, "ROWS", 7)
    chunked, _ = Objective(model)(batch)
    chunked.backward()
    unit = 48 * 128 * 2.0**-53  # fp64 sums over at most 48 tokens and 128 ids, in another order
    torch.testing.assert_close(chunked, whole, rtol=unit, atol=0)
    for p, g in zip(trainable(model).values(), gradients, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=0, atol=unit * g.abs().max().item())


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), min_size=1, max_size=7), st.integers(1, 60))
def test_accumulation_is_the_big_batch(sizes, max_tokens):
    """Any cut of an effective batch gives its gradient, in fp64."""
    model = tiny_llama(torch.float64, vocab_size=128)
    minift.apply(model, minift.LoRA(r=2))
    for name, p in trainable(model).items():
        p.data = torch.randn(p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(name)))
    examples = [
        Example([2 + (7 * i + j) % 120 for j in range(p + c)], p, "")
        for i, (p, c) in enumerate(sizes)
        if p + c > 1
    ]
    if not examples:
        return
    tokens, gradients = sum(e.supervised for e in examples), []
    for parts in ([examples], micro_batches(examples, max_tokens), [[e] for e in examples]):
        model.zero_grad()
        for part in parts:
            (Objective(model)(collate(part, 0))[0] / tokens).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trainable(model).values()]))
    for other in gradients[1:]:
        assert (other - gradients[0]).abs().max() <= 1e-12 * gradients[0].abs().max()


def test_evaluation_weights_every_token_alike(tmp_path):
    model, tokenizer = tiny_llama(torch.float64, vocab_size=128), CharTokenizer()
    nats, tokens = 0.0, 0
    for row in ROWS:
        example = encode_row(tokenizer, {**row, "where": ""}, "none", 64)
        total, n = Objective(model)(collate([example], 0))
        nats, tokens = nats + total.item(), tokens + n
    for size in (8, 16, 1000):
        assert minift.evaluate_loss(
            model, tokenizer, ROWS, TrainConfig(micro_batch_tokens=size, max_length=64)
        ) == pytest.approx(nats / tokens, rel=1e-6)


def test_ids_outside_the_vocabulary_are_refused(tmp_path):
    model = tiny_llama(vocab_size=80)
    minift.apply(model, minift.LoRA(r=2))
    with pytest.raises(ValueError, match="the vocabulary ends at 79"):
        run(model, tmp_path / "run", rows=[{"prompt": "a", "completion": "~"}])
    with pytest.raises(ValueError, match="above the model's context"):
        minift.evaluate_loss(model, CharTokenizer(), ROWS, TrainConfig(max_length=65))
