"""Shapes without weights: modules on the meta device, and GPT-3, which has no public checkpoint.

GPT-3's shapes are table 2.1 of Brown et al. 2020 (arXiv:2005.14165), with q, k and v apart as in Hu et al.
2021 (arXiv:2106.09685, section 7).
"""

from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from minift.models.gpt2 import GPT2, GPT2Config


class SkipInit(TorchFunctionMode):
    """Leave out torch.nn.init: random starts on the meta device load 77 MB of modules for nothing."""

    def __torch_function__(self, function, kinds, arguments=(), keywords=None):
        if getattr(function, "__module__", "") == "torch.nn.init":
            return arguments[0] if arguments else keywords["tensor"]
        return function(*arguments, **(keywords or {}))


@contextmanager
def shapes_only():
    """Modules made in here lie on the meta device."""
    with torch.device("meta"), SkipInit():
        yield


class GPT3(GPT2):
    """A GPT-2 whose blocks have three layers in the place of the fused one; it plans and counts."""

    heads: ClassVar = ("causal_lm",)
    sites: ClassVar = {**GPT2.sites, "k": ("attn.k_proj",), "v": ("attn.v_proj",)}
    usual_targets: ClassVar = ("q_proj", "v_proj")

    def __init__(self, config: GPT2Config, head: str = "causal_lm", labels: tuple[str, ...] = ()):
        super().__init__(config, head, labels)
        D = config.n_embd
        for block in self.blocks:
            parts = {f"{name}_proj": nn.Linear(D, D) for name in "qkv"}
            block.attn = nn.ModuleDict({**parts, "c_proj": block.attn.c_proj})

    def run_blocks(self, *_):
        raise ValueError(f"{self.source or 'this model'} has no forward here; it plans and counts")
