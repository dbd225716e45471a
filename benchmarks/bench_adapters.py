"""Resident LoRA adapters beside peft's: switching, a batch of mixed adapters; and a layer with DoRA.

Needs: minift fetch smollm2. LoRA of rank 8 on every linear layer of SmolLM2. Switching goes round three
resident adapters. Then four texts of 128 tokens, each with an adapter of its own, are read as one batch and
one after another. peft gets the same base and adapters through minift's files. DoRA of rank 16 stands on a
layer of 2048 x 2048 and reads 512 rows.

Gate: fp32 logits of a batch, of the texts alone and of peft are the same up to 2^-13 of the largest, and
another adapter's are not; DoRA's outputs and gradients have the bound of a product (benchmarks/harness.py)
against fp64. Before it is timed in bf16, the model is held to its fp32 logits, peft within the same bound.
"""

import statistics
import tempfile
from functools import partial
from itertools import cycle

import torch
from torch import nn

import minift
from benchmarks.harness import alternate, gate, gate_close, peer, quantiles
from benchmarks.limits import DEVICE
from minift.methods.dora import DoRALinear

NAMES = ("a", "b", "c", "d")
T = 128
WHOLE_MODEL = {torch.float32: 2**-13, torch.bfloat16: 2**-4}  # 8 and 4 times the bound of one product


def run(quick: bool) -> tuple[list[dict], dict]:
    details = {"left out": {}}
    with tempfile.TemporaryDirectory() as folder:
        write(folder)
        rows = resident(folder, quick, details)
    for dtype in (torch.float32, torch.bfloat16):
        rows.append(dora(dtype, quick, details))
    return rows, details


def write(folder: str) -> None:
    """The base in fp32, in a Hugging Face folder, and the adapters beside it."""
    model = minift.load_model("smollm2")
    for name in NAMES:
        minift.apply(model, minift.LoRA(r=8, alpha=16, target_modules=["all-linear"]), name)
        random = torch.Generator().manual_seed(NAMES.index(name))
        for part in model.adapters[name].parts:
            part.lora_B.data.normal_(0, 0.04, generator=random)  # so that one adapter is far from another
        minift.save_adapter(model, f"{folder}/{name}", name)
    for name in NAMES:
        model.adapters.remove(name)
    minift.save_model(model, f"{folder}/base")


def texts() -> torch.Tensor:
    """(4, T) tokens."""
    ids = minift.load_tokenizer("smollm2").encode(f"{__doc__} {nn.Module.__doc__}" * 8)
    return torch.tensor(ids[: len(NAMES) * T], device=DEVICE).view(len(NAMES), T)


class Ours:
    """minift's model with resident adapters."""

    def __init__(self, folder: str, dtype: torch.dtype):
        self.model = minift.load_model(f"{folder}/base", str(dtype).removeprefix("torch."), DEVICE)
        for name in NAMES:
            minift.load_adapter(self.model, f"{folder}/{name}", name)

    def remove(self, name: str) -> None:
        self.model.adapters.remove(name)

    def switch(self, name: str) -> None:
        self.model.adapters.switch(name)

    @torch.no_grad()
    def mixed(self, ids, names) -> torch.Tensor:
        with self.model.adapters.rows(list(names)):
            return self.model(ids)

    @torch.no_grad()
    def alone(self, ids, names) -> torch.Tensor:
        logits = []
        for text, name in zip(ids.split(1), names, strict=True):
            self.switch(name)
            logits.append(self.model(text))
        return torch.cat(logits)


class Theirs(Ours):
    """transformers and peft."""

    def __init__(self, folder: str, dtype: torch.dtype):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype=dtype).to(DEVICE)
        first, *others = NAMES
        self.peft = PeftModel.from_pretrained(model, f"{folder}/{first}", adapter_name=first).eval()
        for name in others:
            self.peft.load_adapter(f"{folder}/{name}", adapter_name=name)

    def remove(self, name: str) -> None:
        self.peft.delete_adapter(name)

    def switch(self, name: str) -> None:
        self.peft.set_adapter(name)

    def model(self, ids, **arguments) -> torch.Tensor:
        return self.peft(input_ids=ids, use_cache=False, **arguments).logits

    @torch.no_grad()
    def mixed(self, ids, names) -> torch.Tensor:
        return self.model(ids, adapter_names=list(names))


def off(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest difference, as part of the largest exact entry."""
    return ((got.double() - exact.double()).abs().max() / exact.double().abs().max()).item()


def resident(folder: str, quick: bool, details: dict) -> list[dict]:
    """Rows of four texts with four adapters, and of switching among three, in both dtypes."""
    ids, exact, rows, details["errors"] = texts(), None, [], {}
    for dtype in (torch.float32, torch.bfloat16):
        what = str(dtype).removeprefix("torch.")
        sides = {"minift": Ours(folder, dtype)}
        with peer("peft", details["left out"]):
            sides["peft"] = Theirs(folder, dtype)
        exact = sides["minift"].alone(ids, NAMES) if exact is None else exact
        wrong = off(sides["minift"].alone(ids, NAMES[1:] + NAMES[:1]), exact)
        gate(f"{what}, the bound beside what a wrong adapter changes", WHOLE_MODEL[dtype] / wrong, 0.5)
        for name, side in sides.items():
            for way in ("mixed", "alone"):
                error = details["errors"][f"{name}, {what}, {way}"] = off(
                    getattr(side, way)(ids, NAMES), exact
                )
                gate(f"{name}, {what}, 4 adapters {way}", error, WHOLE_MODEL[dtype])
        for way in ("mixed", "alone"):
            calls = {name: partial(getattr(side, way), ids, NAMES) for name, side in sides.items()}
            labels = {"what": f"4 texts of 4 adapters, {way}", "dtype": what}
            rows.append(row(labels, alternate(calls, 3 if quick else 9)))
        for side in sides.values():
            side.remove(NAMES[3])
        turns = {name: (side, cycle(NAMES[:3])) for name, side in sides.items()}
        calls = {name: partial(lambda side, names: side.switch(next(names)), *turns[name]) for name in turns}
        rows.append(row({"what": "switch, 3 resident", "dtype": what}, alternate(calls, 100)))
    return rows


def row(labels: dict, times: dict[str, list[float]]) -> dict:
    """minift's quantiles, and how a peer stands to them in the same turns."""
    t = quantiles(times["minift"])
    found = {**labels, "ms": 1e3 * t["median"], "p20 - p80": f"{1e3 * t['p20']:.3g} - {1e3 * t['p80']:.3g}"}
    for name in times.keys() - {"minift"}:
        found[f"{name} ms"] = 1e3 * statistics.median(times[name])
        found[f"x {name}"] = statistics.median(
            b / a for a, b in zip(times["minift"], times[name], strict=True)
        )
    return found


def dora(dtype: torch.dtype, quick: bool, details: dict) -> dict:
    """Forward and backward of one layer, to x, A, B and the magnitudes."""
    D, r, n, scaling = 2048, 16, 512, 2.0
    random = torch.Generator().manual_seed(0)
    W, A, B = (torch.randn(shape, generator=random) * D**-0.5 for shape in ((D, D), (r, D), (D, r)))
    x, dy = (torch.randn(n, D, generator=random).to(DEVICE, dtype) for _ in range(2))
    m = torch.rand(D, generator=random) + 0.5  # not the norms of W, that the scale takes part
    W = W.to(dtype)
    x.requires_grad_()
    layer = DoRALinear(bare(W), r, scaling, device=DEVICE)
    sides = {"minift": (layer, [layer.lora_A, layer.lora_B, layer.magnitude])}
    with peer("peft", details["left out"]):
        sides["peft"] = peft_dora(W, r, scaling)
    wide = [t.detach().to(DEVICE).double().requires_grad_() for t in (x, A, B, m)]
    V = W.to(DEVICE).double() + scaling * wide[2] @ wide[1]
    y = (wide[0] @ V.t()) * (wide[3] / V.detach().norm(dim=1))
    exact = (y.detach(), *torch.autograd.grad(y, wide, dy.double()))
    calls, what = {}, str(dtype).removeprefix("torch.")
    for name, (module, own) in sides.items():
        for parameter, start in zip(own, (A, B, m), strict=True):
            parameter.data.copy_(start)
        calls[name] = partial(forward_backward, module, (x, *own), dy)
    gate_close(f"dora, minift, {what}", calls["minift"](), exact, dtype)
    green = {"minift": calls.pop("minift")}
    for name, call in calls.items():
        with peer(f"{name}, dora, {what}", details["left out"]):
            gate_close(f"dora, {name}, {what}", call(), exact, dtype)
            green[name] = call
    labels = {"what": f"DoRA, {D} x {D}, r = {r}, {n} rows, forward + backward", "dtype": what}
    return row(labels, alternate(green, 5 if quick else 21))


def bare(W: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(*W.shape[::-1], bias=False, dtype=W.dtype, device=DEVICE)
    layer.weight.data.copy_(W)
    return layer.requires_grad_(False)


def peft_dora(W: torch.Tensor, r: int, scaling: float):
    """(peft's layer, its A, B and magnitudes)."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=scaling * r, target_modules=["0"], use_dora=True)
    layer = get_peft_model(nn.Sequential(bare(W)), config).base_model.model[0]
    parts = layer.lora_A, layer.lora_B, layer.lora_magnitude_vector
    return layer, [part["default"].weight for part in parts]


def forward_backward(module, inputs, dy) -> tuple[torch.Tensor, ...]:
    y = module(inputs[0])
    return (y.detach(), *torch.autograd.grad(y, inputs, dy))
