"""AdamW whose state is 2 bytes a parameter: both moments in 8 bits (kernels/adamw_8bit.py).

State of a parameter of n elements: m_codes and v_codes (n,) uint8, m_absmax and v_absmax (ceil(n / 256),)
fp32, step. Bytes: 2 n + 8 ceil(n / 256) + 4, where torch.optim.AdamW keeps 8 n + 4 of an fp32 parameter.
Source: Dettmers et al. 2022, arXiv:2110.02861.
"""

from functools import cache

import torch

from minift.kernels.adamw_8bit import BLOCK, DTYPES, TINY, Moments, adamw_8bit, make_map


def dynamic_map(signed: bool) -> list[float]:
    """256 ascending numbers: 0, 1 and, for i = 0 to 6, the middles of equal parts of 10^(i - 6) [0.1, 1].

    Signed: 2^i parts, each middle with both signs. Unsigned: 2^(i + 1) parts.
    Source: Dettmers 2016, arXiv:1511.04561, section 3; Dettmers et al. 2022, section 1.3.
    """
    values = [0.0, 1.0]
    for i in range(7):
        parts = 2**i if signed else 2 ** (i + 1)
        edges = torch.linspace(0.1, 1, parts + 1, dtype=torch.float32, device="cpu")
        decade = 10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*decade.tolist(), *((-decade).tolist() if signed else ())]
    return sorted(values)


@cache
def dynamic_maps(device: torch.device):
    """The maps of m and of v."""
    with torch.inference_mode(False):
        return make_map(dynamic_map(signed=True), device), make_map(dynamic_map(signed=False), device)


class AdamW8bit(torch.optim.Optimizer):
    """One call of the kernel for the parameters of a group that have taken the same number of steps."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name, least in (("lr", 0), ("weight_decay", 0), ("eps", TINY)):
            if not least <= group[name] < float("inf"):
                raise ValueError(f"{name} is {group[name]}; it must be at least {least:.3g}, and finite")
        if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"betas are {group['betas']}; they are two numbers, at least 0 and below 1")
        for i, p in enumerate(group["params"]):
            if type(p) not in (torch.nn.Parameter, torch.Tensor):
                raise ValueError(f"params[{i}] is a {type(p).__name__}; 8-bit moments need plain tensors")
            if p.dtype not in DTYPES or not p.is_contiguous():
                raise ValueError(
                    f"params[{i}] is {p.dtype} {tuple(p.shape)} with strides {p.stride()}; 8-bit moments "
                    "need contiguous fp32, bf16 or fp16"
                )

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike = {}
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p] or self._start(p)
                    alike.setdefault((p.device, int(state["step"]) + 1), []).append(p)
            for (device, step), params in alike.items():
                adamw_8bit(
                    params,
                    [p.grad for p in params],
                    [Moments(*(self.state[p][name] for name in Moments._fields)) for p in params],
                    dynamic_maps(device),
                    step,
                    float(group["lr"]),
                    group["betas"],
                    group["eps"],
                    group["weight_decay"],
                )
                for p in params:
                    self.state[p]["step"] += 1
        return loss

    def _start(self, p):
        """The state before the first step: numbers whose absmax is 0 decode to 0, whatever their codes."""
        self.state[p] = {"step": torch.tensor(0.0)}
        for name in Moments._fields:
            size, dtype = _shape(name, p)
            self.state[p][name] = torch.zeros(size, dtype=dtype, device=p.device)
        return self.state[p]

    def load_state_dict(self, state_dict):
        """As torch's, which would round the state to the dtype of the parameter."""
        super().load_state_dict({**state_dict, "state": {}})
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(numbers, params, strict=True):
            if i in state_dict["state"]:
                self.state[p] = _checked(i, p, state_dict["state"][i])


def _shape(name: str, p: torch.Tensor) -> tuple[int, torch.dtype]:
    n = p.numel()
    return (n, torch.uint8) if name.endswith("codes") else (-(-n // BLOCK), torch.float32)


def _checked(i: int, p: torch.Tensor, state: dict) -> dict:
    """A copy of the state of a parameter, on its device."""
    wanted = {"step", *Moments._fields}
    if state.keys() != wanted:
        raise ValueError(f"the state of parameter {i} has {sorted(state)}; AdamW8bit has {sorted(wanted)}")
    for name in Moments._fields:
        x, (size, dtype) = state[name], _shape(name, p)
        if x.shape != (size,) or x.dtype != dtype:
            raise ValueError(
                f"{name} of parameter {i} is {x.dtype} {tuple(x.shape)}; it must be {dtype} ({size},)"
            )
    moments = {name: state[name].to(p.device, copy=True) for name in Moments._fields}
    return {"step": torch.tensor(float(state["step"])), **moments}
