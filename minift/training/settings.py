"""The settings of a run of the loop; a default is written here and nowhere else."""

from dataclasses import dataclass

from minift.data.collate import TEMPLATES
from minift.optim.schedule import SCHEDULES


@dataclass(frozen=True)
class TrainConfig:
    output: str = "out"
    """Folder of the run; it must be empty or absent unless overwrite or resume is asked for."""
    epochs: int = 1
    """Passes over the rows."""
    max_steps: int = 0
    """Stop after this many steps; 0 means after the epochs."""
    batch_size: int = 8
    """Rows of one optimizer step, the effective batch."""
    micro_batch_tokens: int = 1024
    """Most tokens, padding included, of one forward and backward; sets memory and speed, not the gradient."""
    learning_rate: float = 2e-4
    schedule: str = "cosine"
    """cosine, linear or constant, after the warm-up."""
    warmup_steps: int = 0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    gradient_checkpointing: bool = False
    """Recompute each block in the backward: less memory, about a third more time."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this 2-norm; 0 means never."""
    max_length: int = 1024
    """Most tokens of a row; a longer row is an error."""
    truncate: bool = False
    """Cut a classifier's longer text at its end instead."""
    template: str = "none"
    """none: prompt and completion as they stand; chat: as a user turn and its answer."""
    seed: int = 0
    """Data order and dropout; from the command line also the adapter's start."""
    eval_every: int = 0
    """Steps between evaluations of the validation rows; 0 means only at the end."""
    save_every: int = 0
    """Steps between checkpoints; 0 means only when interrupted."""
    log_every: int = 10
    """Steps between printed lines where there is no terminal; log.jsonl gets every step."""

    def __post_init__(self):
        for name in ("epochs", "batch_size", "micro_batch_tokens", "max_length", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it must be at least 1")
        for name in (
            "max_steps",
            "warmup_steps",
            "weight_decay",
            "max_grad_norm",
            "eval_every",
            "save_every",
            "seed",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it must be at least 0")
        if self.template not in TEMPLATES:
            raise ValueError(f"train.template is {self.template!r}; it is one of {', '.join(TEMPLATES)}")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"train.learning_rate is {self.learning_rate}; it must be positive and finite")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"train.schedule is {self.schedule!r}; it is one of {', '.join(SCHEDULES)}")
