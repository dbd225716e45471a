"""Dequantization at the speed of a table look-up: a byte of codes finds its fp32 values, times absmax.

Works in chunks whose scratch stays in the L2 cache: int64 indices of the bytes (gather wants them), the
values found, and the rows of the result. Limit: n/2 bytes read and n elements written once; what is measured
beside that is in benchmarks/results/quantization.md.
"""

import torch

CHUNK = 2**18  # elements in flight
ROW = 4096  # elements in a row of the flat form


def decode(packed, absmax, lookup, out) -> torch.Tensor:
    """out[r, c] = value of code c in row r, times absmax[r, c // block]; fp32, rounded once to out's dtype.

    packed (R, bytes) and absmax (R, blocks) may be slices of larger matrices; out (R, C) is contiguous, and a
    row of it is `blocks` blocks of equal size. lookup (256, values in a byte) fp32.
    """
    R, C = out.shape
    width, per_byte = packed.shape[1], lookup.shape[1]
    block = C // absmax.shape[1]
    table = lookup.view(torch.float64 if per_byte == 2 else torch.float32).view(1, 256)  # one entry a byte
    step = min(R, max(1, CHUNK // C))
    index = torch.empty(step, width, dtype=torch.int64, device=packed.device)
    entries = torch.empty(step, width, dtype=table.dtype, device=packed.device)
    for start in range(0, R, step):
        stop = min(R, start + step)
        rows = stop - start
        index[:rows].copy_(packed[start:stop])
        torch.gather(table.expand(rows, 256), 1, index[:rows], out=entries[:rows])
        values = entries[:rows].view(torch.float32)[:, :C].unflatten(1, (-1, block))  # (rows, blocks, block)
        scale, target = absmax[start:stop, :, None], out[start:stop].unflatten(1, (-1, block))
        if out.dtype == torch.float32:
            torch.mul(values, scale, out=target)
        else:
            target.copy_(values.mul_(scale))
    return out


def decode_flat(packed, absmax, format, block_size: int, out) -> torch.Tensor:
    """`decode` of a flattened run of whole blocks, of which the last may be short: out (n,)."""
    n, start = out.numel(), 0
    lookup = format.lookup(packed.device)
    for width in (max(1, ROW // block_size) * block_size, block_size, n % block_size):
        rows = (n - start) // width if width else 0
        if not rows:
            continue
        stop = start + rows * width
        bytes_ = packed[start * format.bits // 8 : -(-stop * format.bits // 8)]
        scales = absmax[start // block_size : -(-stop // block_size)]
        decode(bytes_.view(rows, -1), scales.view(rows, -1), lookup, out[start:stop].view(rows, width))
        start = stop
    return out
