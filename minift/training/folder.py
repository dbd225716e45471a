"""The folder of a run: made, guarded against overwriting another run, and what is kept in it."""

import contextlib
import json
import shutil
import signal
import threading
from pathlib import Path

from minift.methods.base import training_adapter
from minift.methods.files import save_adapter
from minift.models.disk import write_text
from minift.models.interface import LanguageModel
from minift.models.weights import as_stored, write_folder
from minift.training.checkpoint import checkpoints
from minift.training.log import read_log

WRITTEN = (
    "config.json",
    "plan.txt",
    "log.jsonl",
    "metrics.json",
    "loss.png",
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_encoder.safetensors",
    "model/config.json",
    "model/model.safetensors",
)


def open_output(output: Path, overwrite: bool, resume: bool) -> Path:
    """Make the folder ready and empty of other runs, or say why not. Overwriting removes what a run wrote."""
    if overwrite and resume:
        raise ValueError("give one of --overwrite and --resume, not both")
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is a file; give a folder")
    if resume:
        if (output / "metrics.json").exists():
            raise ValueError(f"the run in {output} is complete; there is nothing to resume")
        if not checkpoints(output):
            raise ValueError(f"{output} holds no checkpoint to resume from")
    elif output.exists() and any(output.iterdir()) and not overwrite:
        raise ValueError(
            f"output {output} already holds files; give another folder, --overwrite to replace the "
            "run in it, or --resume to go on with it"
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / ".writable", "")
        (output / ".writable").unlink()
    except OSError as error:
        raise ValueError(f"cannot write to the output folder {output}: {error.strerror}") from None
    if overwrite:
        for name in WRITTEN:
            (output / name).unlink(missing_ok=True)
        for folder in checkpoints(output):
            shutil.rmtree(folder)
    return output


def save_trained(model: LanguageModel, output: Path, template: str) -> None:
    """The adapter, or the whole model where everything trained."""
    name = training_adapter(model)
    if model.adapters[name].method.adapter_file:
        save_adapter(model, output, name, template)
    else:
        state = as_stored(model, dict(model.named_parameters()))
        write_folder(output / "model", model.to_hf(), state, model.dtype)


def keep_until(log: Path, step: int) -> None:
    """Drop the log's records of steps that the checkpoint does not hold."""
    write_text(log, "".join(json.dumps(r) + "\n" for r in read_log(log) if r["step"] <= step))


@contextlib.contextmanager
def interruptible():
    """Turn the first Ctrl-C into a flag, read after a whole step; the second one interrupts at once."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def on_interrupt(signum, frame):
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)
