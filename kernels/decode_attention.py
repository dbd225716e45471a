"""decode_attention: one new token of each text meets the keys and values in the cache, in one call.

    q' = rotate(q),   K[length] = rotate(k),   V[length] = v,   S = length + 1
    o = softmax(q' K^T / sqrt(hd) + bias) V,   bias 0 where attended and -inf elsewhere
    rotate(x) = x cos + swap(x) sin,   swap exchanges the halves of a head (sin has its signs)

B batch, H query heads, KV key-value heads (H = G * KV), hd head size, S keys. The work is reading the cache,
2 S KV hd numbers a text; for short texts a chain of torch's operators costs many times that. The C file runs
where no gradients are recorded: in fp32, each head by itself, and what is stored is rounded once.
Source: rotation Su et al. 2021, arXiv:2104.09864, section 3.4.2; grouped queries Ainslie et al. 2023,
arXiv:2305.13245.
"""

import torch

from minift.kernels import library, runtime
from minift.kernels.attention import attention, attention_ref


def decode_attention_ref(q, k, v, keys, values, length: int, cos=None, sin=None, mask=None):
    """q (B, 1, H hd), k and v (B, 1, KV hd) -> (B, 1, H hd).

    keys and values (B, KV, capacity, hd) hold `length` tokens and get one more. cos and sin (B or 1, 1, 1,
    hd), None for heads that are not rotated. mask (B or 1, 1, 1, S) bool, true where attended, None for all.
    """
    return _chain(attention_ref, q, k, v, keys, values, length, cos, sin, mask)


def decode_attention(q, k, v, keys, values, length: int, cos=None, sin=None, mask=None):
    """Same contract as `decode_attention_ref`; keys and values have no gradient."""
    capacity = keys.shape[2]
    if capacity <= length:
        raise ValueError(f"the KV cache holds {capacity} tokens and {length + 1} were given; make it larger")
    tensors = [x for x in (q, k, v, keys, values, cos, sin, mask) if x is not None]
    if _fits(*tensors[:5], length, cos, sin, mask) and runtime.takes_c("decode_attention", *tensors):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        return library.attend(q, k, v, keys, values, length, cos, sin, mask)
    return _chain(attention, q, k, v, keys, values, length, cos, sin, mask)


def _fits(q, k, v, keys, values, length, cos, sin, mask) -> bool:
    """Whether the C file has this attention: one dtype, hd a multiple of 16, contiguous, shapes as above."""
    B, KV, _, hd = keys.shape
    dtype, kv = q.dtype, (B, 1, KV * hd)
    tables = (B, 1, 1, hd), (1, 1, 1, hd)
    masks = (B, 1, 1, length + 1), (1, 1, 1, length + 1)
    return (
        dtype in library.DTYPES
        and dtype == k.dtype == v.dtype == keys.dtype == values.dtype
        and hd % 16 == 0
        and k.shape == v.shape == kv
        and q.shape[:2] == kv[:2]
        and q.shape[2] % kv[2] == 0
        and q.numel() > 0
        and keys.shape == values.shape
        and keys.is_contiguous()
        and values.is_contiguous()
        and (cos is None or (cos.dtype == dtype and cos.shape in tables and cos.is_contiguous()))
        and (cos is None or (sin.dtype == dtype and sin.shape == cos.shape and sin.is_contiguous()))
        and (mask is None or (mask.dtype == torch.bool and mask.shape in masks and mask.is_contiguous()))
    )


def _chain(attention, q, k, v, keys, values, length, cos, sin, mask):
    B, hd = q.shape[0], keys.shape[-1]
    q, k, v = (x.view(B, -1, 1, hd) for x in (q, k, v))  # (B, H or KV, 1, hd)
    if cos is not None:
        q, k = (x * cos + x.roll(hd // 2, dims=-1) * sin for x in (q, k))
    keys[:, :, length], values[:, :, length] = k[:, :, 0], v[:, :, 0]
    o = attention(q, keys[:, :, : length + 1], values[:, :, : length + 1], mask)  # (B, H, 1, hd)
    return o.reshape(B, 1, -1)
