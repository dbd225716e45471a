"""RMSNorm without gradients: minift.kernels.rms_norm beside torch's. The limit is reading x and writing y."""

import torch
import torch.nn.functional as F

from benchmarks.harness import backend, products
from benchmarks.limits import DEVICE
from minift.kernels.rms_norm import rms_norm, rms_norm_ref

EPS = 1e-5


def run(quick: bool) -> tuple[list[dict], dict]:
    rows, left_out = [], {}
    for R, D in [(1, 576)] if quick else [(1, 576), (8, 576), (1, 4096), (512, 576), (2048, 4096)]:
        x, weight = torch.randn(R, D, device=DEVICE).bfloat16(), torch.randn(D, device=DEVICE).bfloat16()

        def exact(x, weight=weight):
            return rms_norm_ref(x, weight.to(x.dtype), EPS)

        sides = {
            "minift": ([lambda x, w=weight: rms_norm(x, w, EPS)], exact),
            "torch": ([lambda x, w=weight: F.rms_norm(x, w.shape, w, EPS)], exact),
        }
        labels = {"op": "rms_norm", "rows": R, "D": D, "dtype": "bfloat16"}
        rows += products(labels, sides, (x,), 4 * R * D + 2 * D, (0,), quick, left_out)
    with torch.no_grad():
        ran = backend(lambda: rms_norm(x, weight, EPS))
    return rows, {"backend": ran, "left out": left_out}
