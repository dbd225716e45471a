"""Where a run stands, on disk: trainable tensors, the method's buffers, the optimizer's moments, the step.

checkpoint-<step>/ holds state.safetensors and state.json. It is written beside its name, flushed and renamed,
so it is complete or absent. Learning rate, data order and dropout are functions of (seed, step), so nothing
else is needed to continue to the bit.
"""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import torch

from minift.models.disk import write_text
from minift.models.json_file import read_json
from minift.models.safetensors_file import HEADER_BYTES, read_tensors, write_safetensors

MOMENTS = ("exp_avg", "exp_avg_sq")  # of torch.optim.AdamW


def checkpoints(output: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [p for p in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.partition("-")[2]))


def save_checkpoint(
    output: Path, step: int, parameters: dict, optimizer, config: dict, buffers: dict, keep: int = 2
) -> Path:
    """Save after `step` finished steps and retire all but the newest `keep`."""
    target = output / f"checkpoint-{step}"
    tensors = {}
    for name, parameter in parameters.items():
        tensors[f"parameter:{name}"] = parameter
        for moment in MOMENTS:
            if moment in optimizer.state.get(parameter, {}):
                tensors[f"{moment}:{name}"] = optimizer.state[parameter][moment]
    tensors |= {f"buffer:{name}": buffer for name, buffer in buffers.items()}
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise ValueError(f"{bad[0]} is not finite after {step} steps; no checkpoint was written")
    work = Path(tempfile.mkdtemp(prefix=".checkpoint-", dir=output))
    try:
        write_safetensors(work / "state.safetensors", tensors, {"format": "pt"})
        write_text(work / "state.json", json.dumps({"step": step, "config": config}, indent=2) + "\n")
        if target.exists():
            shutil.rmtree(target)
        os.chmod(work, output.stat().st_mode & 0o777)
        os.rename(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for old in checkpoints(output)[:-keep]:
        shutil.rmtree(old)
    return target


def load_checkpoint(folder: Path, parameters: dict, optimizer, config: dict, buffers: dict) -> int:
    """Restore in place what `save_checkpoint` wrote; returns the number of finished steps.

    The configuration must be the one that the checkpoint was made with, field by field.
    """
    state = read_json(folder / "state.json")
    if not isinstance(state.get("step"), int) or not isinstance(state.get("config"), dict):
        raise ValueError(f"{folder / 'state.json'} is damaged; remove {folder} to resume from an older one")
    changed = {
        key
        for key in state["config"].keys() | config.keys()
        if state["config"].get(key) != json.loads(json.dumps(config.get(key)))
    }
    if changed:
        was = ", ".join(
            f"{key} = {state['config'].get(key)!r} (now {config.get(key)!r})" for key in sorted(changed)
        )
        raise ValueError(
            f"{folder} was made with {was}; resume with the same configuration, or start afresh "
            "with --overwrite"
        )
    tensors, _ = read_tensors(folder / "state.safetensors", HEADER_BYTES)
    wanted = {
        f"{kind}:{name}" for name in parameters for kind in ("parameter", *(MOMENTS if state["step"] else ()))
    }
    wanted |= {f"buffer:{name}" for name in buffers}
    if wanted != tensors.keys():
        raise ValueError(f"{folder} does not fit this model: {sorted(wanted ^ tensors.keys())[:3]} differ")
    for key, tensor in tensors.items():
        kind, _, name = key.partition(":")
        shape = (buffers if kind == "buffer" else parameters)[name].shape
        if tensor.shape != shape:
            raise ValueError(
                f"{folder}: {key} has shape {tuple(tensor.shape)}, the model's is {tuple(shape)}"
            )
    with torch.no_grad():
        for name, buffer in buffers.items():
            buffer.copy_(tensors[f"buffer:{name}"])
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameter:{name}"])
            if state["step"]:
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(state["step"])),
                    **{moment: tensors[f"{moment}:{name}"].to(parameter.device) for moment in MOMENTS},
                }
    return state["step"]
