"""The loop: accumulation, order, resume to the bit, what it writes, what stops it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CharTokenizer, tiny_llama

import minift
from minift.methods.base import trainable
from minift.training import loop
from minift.training.checkpoint import checkpoints
from minift.training.loop import NonFiniteLoss
from minift.training.settings import TrainConfig

ROWS = [{"prompt": "ab" * (1 + i % 4), "completion": "cde"[: 1 + i % 3]} for i in range(10)]


def fresh(dropout=0.2, dtype=torch.float32):
    model = tiny_llama(dtype, vocab_size=128)
    minift.apply(model, minift.LoRA(r=2, dropout=dropout))
    return model


def config(output, **changes):
    values = {
        "output": str(output),
        "batch_size": 3,
        "epochs": 2,
        "learning_rate": 0.01,
        "max_length": 32,
        "micro_batch_tokens": 16,
    }
    return TrainConfig(**{**values, **changes})


def run(model, output, rows=ROWS, **keywords):
    return minift.train(
        model, CharTokenizer(), rows, config(output, **keywords.pop("config", {})), quiet=True, **keywords
    )


def test_a_run_writes_its_folder_and_learns(tmp_path):
    model = fresh()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    metrics = run(model, tmp_path / "run", valid=ROWS[:3], config={"epochs": 6, "eval_every": 2})
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "config.json",
        "plan.txt",
        "log.jsonl",
        "metrics.json",
        "loss.png",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [r for r in log if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 25)) and any("eval_loss" in r for r in log)
    assert {
        "total_steps",
        "epoch",
        "lr",
        "grad_norm",
        "tokens_per_second",
        "peak_memory_mib",
        "remaining_s",
    } <= set(steps[0])
    assert steps[-1]["loss"] < steps[0]["loss"] and metrics["train_loss"] == steps[-1]["loss"]
    assert metrics["eval_perplexity"] == pytest.approx(2.718281828459045 ** metrics["eval_loss"])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["learning_rate"] == 0.01
    assert "trainable params:" in (tmp_path / "run" / "plan.txt").read_text()
    assert (tmp_path / "run" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(trainable(model)) and not model.training
    again = tiny_llama(vocab_size=128)
    minift.load_adapter(again, tmp_path / "run")
    assert all(
        torch.equal(a, b) for a, b in zip(trainable(again).values(), trainable(model).values(), strict=True)
    )


def test_full_fine_tuning_writes_a_model_that_loads(tmp_path):
    model = tiny_llama(vocab_size=128)
    minift.apply(model, minift.Full())
    run(model, tmp_path, config={"epochs": 1})
    loaded = minift.load_model(tmp_path / "model")
    assert all(torch.equal(p, loaded.get_parameter(n)) for n, p in model.named_parameters())


def state_after(output, **keywords):
    model = fresh()
    run(model, output, **keywords)
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return {n: p.detach() for n, p in trainable(model).items()}, [
        (r["step"], r["loss"], r["lr"]) for r in log
    ]


def test_resuming_after_any_step_continues_to_the_bit(tmp_path, monkeypatch):
    want, log = state_after(tmp_path / "whole")
    real = loop.Run.gradients
    for stop in range(8):

        def gradients(self, batch, step, stop=stop):
            if step == stop:
                raise NonFiniteLoss("stopped for the test")
            return real(self, batch, step)

        output = tmp_path / f"stop-{stop}"
        monkeypatch.setattr(loop.Run, "gradients", gradients)
        with pytest.raises(NonFiniteLoss, match=f"{stop} of 8 steps are saved"):
            run(fresh(), output)
        monkeypatch.setattr(loop.Run, "gradients", real)
        got, resumed_log = state_after(output, resume=True)
        assert resumed_log == log
        assert all(torch.equal(got[n], want[n]) for n in want)


def test_checkpoints_are_kept_two_at_a_time_and_resume_wants_the_same_configuration(tmp_path):
    run(fresh(), tmp_path / "a", config={"save_every": 2})
    assert [p.name for p in checkpoints(tmp_path / "a")] == ["checkpoint-4", "checkpoint-6"]
    with pytest.raises(ValueError, match="is complete"):
        run(fresh(), tmp_path / "a", resume=True)
    (tmp_path / "a" / "metrics.json").unlink()
    with pytest.raises(ValueError, match=r"train.learning_rate = 0.01 \(now 0.5\)"):
        run(fresh(), tmp_path / "a", resume=True, config={"learning_rate": 0.5})
    with pytest.raises(ValueError, match="tokens_sha256"):
        run(fresh(), tmp_path / "a", resume=True, rows=ROWS[1:] + ROWS[:1])
    with pytest.raises(ValueError, match="no checkpoint"):
        run(fresh(), tmp_path / "b", resume=True)


def test_an_output_folder_with_files_is_refused_and_overwriting_removes_the_old_run_alone(tmp_path):
    run(fresh(), tmp_path, config={"epochs": 1, "save_every": 1})
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="already holds files.*--overwrite.*--resume"):
        run(fresh(), tmp_path)
    run(fresh(), tmp_path, overwrite=True, config={"epochs": 1})
    assert (tmp_path / "mine.txt").read_text() == "keep" and not checkpoints(tmp_path)
    with pytest.raises(ValueError, match="not both"):
        run(fresh(), tmp_path, overwrite=True, resume=True)


def test_an_unwritable_output_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        run(fresh(), tmp_path / "file")
    with pytest.raises(ValueError, match="cannot write to the output folder"):
        run(fresh(), tmp_path / "file" / "below")


def test_a_non_finite_loss_stops_before_the_step_and_says_where(tmp_path):
    model = fresh()
    model.model.norm.weight.data[0] = float("nan")
    before = [p.detach().clone() for p in trainable(model).values()]
    with pytest.raises(NonFiniteLoss, match="the loss is nan at step 1, in the rows row [0-9].*0 of 8 steps"):
        run(model, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, trainable(model).values(), strict=True))


def test_a_non_finite_gradient_names_the_parameter(tmp_path, monkeypatch):
    model = fresh()
    name = list(trainable(model))[1]
    trainable(model)[name].register_hook(lambda g: g * float("inf"))
    with pytest.raises(NonFiniteLoss, match=f"the gradient of {name} is not finite at step 1"):
        run(model, tmp_path)


def test_bad_input_stops_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="nothing is trainable"):
        model = tiny_llama(vocab_size=128)
        run(model.requires_grad_(False), tmp_path / "a")
    with pytest.raises(ValueError, match="above the model's context of 64"):
        run(fresh(), tmp_path / "a", config={"max_length": 65})
    with pytest.raises(ValueError, match="row 1: no field 'completion'"):
        run(fresh(), tmp_path / "a", rows=[ROWS[0], {"prompt": "x"}])
    with pytest.raises(ValueError, match="row 0: prompt and completion have 44 tokens, the limit is 32"):
        run(fresh(), tmp_path / "a", rows=[{"prompt": "x" * 40, "completion": "abc"}])
    with pytest.raises(ValueError, match="list of rows is empty"):
        run(fresh(), tmp_path / "a", rows=[])
    for field, value in (
        ("epochs", 0),
        ("learning_rate", -1.0),
        ("schedule", "step"),
        ("beta2", 1.0),
        ("max_grad_norm", -1.0),
        ("learning_rate", float("nan")),
    ):
        with pytest.raises(ValueError, match=f"train.{field} is"):
            TrainConfig(**{field: value})
    assert not (tmp_path / "a").exists()


INTERRUPTED = """
import sys; sys.path.insert(0, {tests!r})
from training.test_loop import ROWS, config, fresh
import minift, conftest
try:
    minift.train(fresh(), conftest.CharTokenizer(), ROWS, config({output!r}, epochs=100000, log_every=1))
except KeyboardInterrupt as stop:
    print("SAID:", stop)
"""


def test_ctrl_c_saves_the_adapter_and_says_so(tmp_path):
    program = INTERRUPTED.format(tests=str(Path(__file__).parent.parent), output=str(tmp_path / "run"))
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    process.send_signal(signal.SIGINT)
    said = next(line for line in process.stdout if line.startswith("SAID:"))
    process.wait(timeout=60)
    assert "interrupted" in said and "are saved" in said and "--resume" in said
    minift.load_adapter(tiny_llama(vocab_size=128), tmp_path / "run")
    step = int(checkpoints(tmp_path / "run")[-1].name.split("-")[1])
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["step"] == step >= 3


def test_dropout_depends_on_the_seed_and_on_the_step():
    assert len({loop.step_seed(seed, step) for seed in range(3) for step in range(3)}) == 9
    assert all(0 <= loop.step_seed(seed, 0) < 2**32 for seed in (0, 2**40))


def test_gradients_left_behind_do_not_enter_the_first_step(tmp_path):
    clean, dirty = fresh(), fresh()
    for p in trainable(dirty).values():
        p.grad = torch.ones_like(p)
    run(clean, tmp_path / "a", config={"max_steps": 1})
    run(dirty, tmp_path / "b", config={"max_steps": 1})
    assert all(
        torch.equal(a, b) for a, b in zip(trainable(clean).values(), trainable(dirty).values(), strict=True)
    )


def test_a_refused_resume_leaves_the_run_as_it_was_and_another_base_is_noticed(tmp_path):
    run(fresh(), tmp_path, config={"save_every": 2})
    (tmp_path / "metrics.json").unlink()
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(ValueError, match="learning_rate"):
        run(fresh(), tmp_path, resume=True, config={"learning_rate": 0.5})
    assert (tmp_path / "config.json").read_text() == before
    other = tiny_llama(vocab_size=128, seed=1)
    minift.apply(other, minift.LoRA(r=2, dropout=0.2))
    with pytest.raises(ValueError, match="base_sha256"):
        run(other, tmp_path, resume=True)
