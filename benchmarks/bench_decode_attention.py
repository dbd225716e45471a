"""Attention of one new token, with rotation and cache: minift.kernels.decode_attention beside torch's chain.

Heads of SmolLM2-135M (9 of queries, 3 of keys and values, 64 numbers each). The limit is reading the keys and
values once. The other side is the same op with plain torch.
"""

import torch

from benchmarks.harness import backend, products
from benchmarks.limits import DEVICE
from minift.kernels import runtime
from minift.kernels.decode_attention import decode_attention, decode_attention_ref

H, KV, HD = 9, 3, 64


def run(quick: bool) -> tuple[list[dict], dict]:
    rows, left_out = [], {}
    for B, S in [(1, 64)] if quick else [(1, 64), (8, 64), (1, 512), (8, 512), (1, 4096)]:
        q = torch.randn(B, 1, H * HD, device=DEVICE).bfloat16()
        k, v = (torch.randn(B, 1, KV * HD, device=DEVICE).bfloat16() for _ in range(2))
        keys, values = (torch.randn(B, KV, S, HD, device=DEVICE).bfloat16() for _ in range(2))
        angle = torch.randn(B, 1, 1, HD // 2, device=DEVICE).repeat(1, 1, 1, 2)
        tables = angle.cos().bfloat16(), angle.sin().bfloat16()

        def call(q, rest=(k, v, keys, values, S - 1, *tables)):
            return decode_attention(q, *rest)

        def chain(q, call=call):
            with runtime.using("torch"):
                return call(q)

        def exact(q, rest=(k, v, keys, values), tables=tables, last=S - 1):
            return decode_attention_ref(q, *(x.double() for x in rest), last, *(t.double() for t in tables))

        sides = {"minift": ([call], exact), "torch": ([chain], exact)}
        labels = {"op": "decode_attention", "B": B, "S": S, "dtype": "bfloat16"}
        flops = 4 * B * H * S * HD
        rows += products(labels, sides, (q,), 2 * keys.nbytes, (flops,), quick, left_out)
    with torch.no_grad():
        ran = backend(lambda: call(q))
    return rows, {"backend": ran, "left out": left_out}
