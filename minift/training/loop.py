"""Training, in one plain loop.

    for each step: an effective batch of rows, cut into micro-batches; loss = their sum / its positions;
    backward; clip; AdamW at lr_at(step); log.

The gradient is that of the mean over all supervised positions of the effective batch (tokens of language
models, rows of classifiers), however it is cut.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from minift.data.collate import collate, epoch_order, micro_batches
from minift.data.tokenizer import Tokenizer
from minift.memory import peak_memory_mib, release_free_memory
from minift.methods.base import Method, buffers, trainable, training_adapter
from minift.methods.fingerprint import NO_TEMPLATE
from minift.metrics.language_model import perplexity
from minift.models.disk import write_text
from minift.models.interface import LanguageModel
from minift.optim.schedule import lr_at
from minift.reports.plots import plot_loss
from minift.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from minift.training.evaluation import encode, scores
from minift.training.folder import interruptible, keep_until, open_output, save_trained
from minift.training.log import Log, read_log
from minift.training.objective import Objective
from minift.training.record import describe_run, resume_key
from minift.training.settings import TrainConfig

TRIM_EVERY = 5  # steps


class NonFiniteLoss(ValueError):
    """The loss or its gradient is not a number: no parameter was changed by that step."""


def train(
    model: LanguageModel,
    tokenizer: Tokenizer,
    data,
    config: TrainConfig | None = None,
    *,
    valid=None,
    overwrite: bool = False,
    resume: bool = False,
    quiet: bool = False,
) -> dict:
    """Train what `minift.apply` made trainable; returns the run's metrics, which metrics.json holds too.

    `data` and `valid` are JSONL files or lists of rows: with prompt and completion, or with text and label
    where the model is a sequence classifier. Writes config.json, plan.txt, log.jsonl, the adapter (or, after
    full fine-tuning, the folder model/), metrics.json, loss.png.
    """
    config = config or TrainConfig()
    if not trainable(model):
        raise ValueError(
            "nothing is trainable; call minift.apply(model, method) first, or model.adapters.train(name)"
        )
    examples = encode(model, tokenizer, data, config)
    held_out = encode(model, tokenizer, valid, config) if valid is not None else []
    output = open_output(Path(config.output), overwrite, resume)
    recorded = describe_run(model, data, valid, config)
    run = _prepare(
        model, tokenizer, examples, held_out, config, output, resume_key(recorded, model, examples)
    )
    first = _begin(run, recorded, resume)
    log = Log(output / "log.jsonl", first, run.total, config.log_every, quiet)
    model.train()
    try:
        run.steps(first, log)
    finally:
        log.close()
        model.eval()
    save_trained(model, output, run.template)
    return _summarize(run, log, output)


def _prepare(model, tokenizer, examples, held_out, config, output, key) -> "Run":
    name, parameters = training_adapter(model), trainable(model)
    method = model.adapters[name].method
    model.gradient_checkpointing = config.gradient_checkpointing
    optimizer = torch.optim.AdamW(
        method.param_groups(parameters),
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        fused=model.device.type in ("cpu", "cuda"),
    )
    return Run(
        objective=Objective(model),
        name=name,
        method=method,
        parameters=parameters,
        buffers=buffers(model),
        optimizer=optimizer,
        examples=examples,
        held_out=held_out,
        pad_id=tokenizer.pad_id,
        config=config,
        output=output,
        key=key,
        template=tokenizer.chat_template if config.template == "chat" else NO_TEMPLATE,
    )


@dataclass
class Run:
    """What the steps of one run share."""

    objective: Objective
    name: str  # of the adapter that trains
    method: Method
    parameters: dict[str, torch.nn.Parameter]
    buffers: dict[str, torch.Tensor]  # what the method keeps beside them
    optimizer: torch.optim.Optimizer
    examples: list
    held_out: list
    pad_id: int
    config: TrainConfig
    output: Path
    key: dict  # what a checkpoint must have been made with
    template: str  # the chat template's text, or "none"

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.examples) // self.config.batch_size)

    @property
    def total(self) -> int:
        return self.config.max_steps or self.config.epochs * self.steps_per_epoch

    def batch(self, step: int) -> list:
        """The rows of a step: a function of (seed, step) alone."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = epoch_order(len(self.examples), self.config.seed, epoch)
        return [self.examples[i] for i in order[within * self.config.batch_size :][: self.config.batch_size]]

    def steps(self, first: int, log: Log) -> None:
        """The loop. Stops before a step whose loss is not finite, and after the step in which Ctrl-C came."""
        config = self.config
        with interruptible() as interrupted:
            for step in range(first, self.total):
                torch.manual_seed(step_seed(config.seed, step))  # dropout of this step
                batch = self.batch(step)
                try:
                    loss, norm = self.gradients(batch, step)
                except NonFiniteLoss as error:
                    raise NonFiniteLoss(self.stop(step, str(error))) from None
                lr = lr_at(step, self.total, config.learning_rate, config.warmup_steps, config.schedule)
                for group in self.optimizer.param_groups:
                    group["lr"] = lr * group["lr_ratio"]
                self.method.take_step(self.objective.model, self.name, self.optimizer, step, self.total)
                done = step + 1
                log.step(
                    step,
                    sum(example.tokens for example in batch),
                    self.objective.model.device,
                    epoch=round(done / self.steps_per_epoch, 4),
                    loss=loss,
                    lr=lr,
                    grad_norm=norm,
                )
                if done % TRIM_EVERY == 0:
                    release_free_memory()
                if interrupted.is_set():
                    raise KeyboardInterrupt(self.stop(done, "interrupted"))
                if (
                    self.held_out
                    and config.eval_every
                    and done % config.eval_every == 0
                    and done < self.total
                ):
                    log.write({"step": done, **self.evaluate()})
                if config.save_every and done % config.save_every == 0 and done < self.total:
                    save_checkpoint(
                        self.output, done, self.parameters, self.optimizer, self.key, self.buffers
                    )

    def gradients(self, batch: list, step: int) -> tuple[float, float]:
        """Accumulate the gradient of the batch's mean loss, clip it; (loss, norm before that)."""
        self.optimizer.zero_grad()
        count = sum(example.supervised for example in batch)
        mean = 0.0
        for part in micro_batches(batch, self.config.micro_batch_tokens):
            loss_sum, _ = self.objective(collate(part, self.pad_id, self.objective.model.device))
            loss = loss_sum / count
            if not torch.isfinite(loss):
                raise NonFiniteLoss(
                    f"the loss is {loss.item()} at step {step + 1}, in the rows {_where(part)}"
                )
            loss.backward()
            mean += loss.item()
        extra = self.method.extra_loss(self.objective.model, self.name)
        if extra is not None:
            extra.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        if not torch.isfinite(norm):
            bad = [
                name
                for name, p in self.parameters.items()
                if p.grad is not None and not p.grad.isfinite().all()
            ]
            raise NonFiniteLoss(
                f"the gradient of {bad[0] if bad else 'all parameters together'} is not finite at "
                f"step {step + 1}, in the rows {_where(batch)}"
            )
        if self.config.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.config.max_grad_norm, norm)
        return mean, norm.item()

    def evaluate(self) -> dict:
        """Of the held-out rows."""
        return scores(self.objective, self.held_out, self.pad_id, self.config.micro_batch_tokens)

    def stop(self, finished: int, reason: str) -> str:
        """Save where the run stands; the sentence that says so."""
        kept = save_checkpoint(self.output, finished, self.parameters, self.optimizer, self.key, self.buffers)
        try:
            save_trained(self.objective.model, self.output, self.template)
        except ValueError as error:
            return f"{reason}; {finished} of {self.total} steps were done, and {error}"
        return (
            f"{reason}; {finished} of {self.total} steps are saved: the adapter in {self.output}, and "
            f"{kept.name} to go on from with --resume"
        )


def _begin(run: Run, recorded: dict, resume: bool) -> int:
    """The number of finished steps; writes what a run writes first, once a checkpoint has been accepted."""
    output, first = run.output, 0
    if resume:
        first = load_checkpoint(checkpoints(output)[-1], run.parameters, run.optimizer, run.key, run.buffers)
        keep_until(output / "log.jsonl", first)
    plan = run.objective.model.adapters[run.name].plan
    write_text(output / "config.json", json.dumps(recorded, indent=2) + "\n")
    write_text(output / "plan.txt", f"{plan.table()}\n{plan.totals()}\n")
    return first


def _summarize(run: Run, log: Log, output: Path) -> dict:
    """metrics.json and loss.png."""
    records = [r for r in read_log(output / "log.jsonl") if "loss" in r]
    metrics = {
        "steps": run.total,
        "train_loss": records[-1]["loss"] if records else None,
        "train_seconds": round(log.elapsed, 2),
        "tokens_per_second": round(log.tokens / max(log.elapsed, 1e-9), 1),
        "peak_memory_mib": round(peak_memory_mib(run.objective.model.device)),
    }
    if run.held_out:
        metrics |= run.evaluate()
        loss = metrics["eval_loss"]
        if not math.isfinite(loss):
            raise NonFiniteLoss(f"the loss on the validation rows is {loss}; the adapter is in {output}")
        if run.objective.model.head_kind in ("causal_lm", "seq2seq_lm"):
            metrics["eval_perplexity"] = perplexity(loss, 1)
    write_text(output / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    plot_loss(records, output / "loss.png")
    return metrics


def step_seed(seed: int, step: int) -> int:
    """A seed for one step; 32 bits, which is all that torch's CPU generator uses."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{step}".encode()).digest()[:4], "little")


def _where(examples) -> str:
    return ", ".join(example.where for example in examples)
