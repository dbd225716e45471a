"""Selective fine-tuning: some modules of the model train, the rest stays.

    y = base(x; theta'),   theta' = theta at the start, in fp32

The head alone, the last k blocks and the head, or any modules that rules mean. What trains are copies in
fp32, rounded to the base's dtype for computing (trained.py).
Trainable: the sizes of those parameters, a tied weight once.
Source of the last blocks: Lee, Tang and Lin 2019, arXiv:1911.03090.
"""

from dataclasses import dataclass
from math import prod
from typing import ClassVar

from minift.methods.base import Method, check_flag, check_one_of, check_whole
from minift.methods.trained import TIED, inject_trained, plan_trained
from minift.models.targets import as_rules
from minift.models.wrappers import path_of


@dataclass(frozen=True)
class Selective(Method):
    name: ClassVar[str] = "selective"
    law: ClassVar[str] = "sizes of the chosen parameters"

    modules: tuple[str, ...] = ()
    """Names, or globs over whole paths, of modules; everything in them trains."""
    last_blocks: int = 0
    """This many blocks from the end train."""
    head: bool = True
    """The head trains."""
    tied: str = "refuse"
    """Where head and embedding are one weight: both (train as one), untie (the one that is meant), refuse."""

    def __post_init__(self):
        object.__setattr__(self, "modules", as_rules(self.modules))
        check_whole(self, "last_blocks", 0)
        check_flag(self, "head")
        check_one_of(self, "tied", TIED)
        if not (self.modules or self.last_blocks or self.head):
            raise ValueError("head is false and modules and last_blocks are empty: nothing would train")

    def sites(self, model):
        blocks = len(model.blocks)
        if self.last_blocks > blocks:
            raise ValueError(f"last_blocks is {self.last_blocks}; the model has {blocks} blocks")
        rules = [f"{model.blocks_path}.{i}" for i in range(blocks - self.last_blocks, blocks)]
        rules += [*self.modules, *([path_of(model, model.head)] if self.head else [])]
        sites = plan_trained(model, rules, "modules, last_blocks or head", self.tied)
        return sites

    def inject(self, model, plan, name, seed):
        inject_trained(model, plan.sites, name)

    def count(self, plan):
        return sum(prod(site.shape) for site in plan.sites if not site.tied_to)
