"""Reference for virtual tokens: attention written out for one text, without batch, padding or cache; fp64."""

import torch
import torch.nn.functional as F
from conftest import tiny_llama
from torch import nn

from minift.models.layers import rotary_frequencies, rotary_tables
from minift.models.slots import Slot

# Sums of at most 97 terms, 2 blocks of 7 products each, rounded to 2^-53: 2 * 7 * 97 * 2^-53 = 1.5e-13 of the
# largest logit to first order; the factor left is for what norms and softmax amplify.
FP64 = 1e-12


class Given(Slot):
    """Virtual tokens as they are given: prompt (P, D), or prefix (2 L, KV, P, hd)."""

    def __init__(self, prompt=None, prefix=None, rows=None):
        super().__init__(prompt.shape[0] if prefix is None else prefix.shape[2])
        self.given = nn.Parameter(prompt if prefix is None else prefix)
        self.is_prompt, self.rows = prefix is None, rows

    def prompt(self):
        return self.given if self.is_prompt else None

    def prefix_kv(self):
        return None if self.is_prompt else list(zip(self.given[0::2], self.given[1::2], strict=True))


def prompt_slot(P, seed=1, rows=None):
    return Given(torch.randn(P, 32, generator=torch.Generator().manual_seed(seed)) * 0.3, rows=rows)


def prefix_slot(P, seed=2, rows=None):
    made = torch.randn(4, 2, P, 8, generator=torch.Generator().manual_seed(seed))
    return Given(prefix=made, rows=rows)


def slotted(*made, dtype=torch.float64, **config):
    model = tiny_llama(dtype, **config)
    model.slots.extend(made).to(dtype)
    return model


def rms(x, norm):
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def turned(x, cos, sin):
    """Rotary positions as complex numbers: x (heads, T, hd), cos and sin (T, hd / 2)."""
    z = torch.complex(*x.chunk(2, dim=-1)) * torch.complex(cos, sin)
    return torch.cat((z.real, z.imag), dim=-1)


def dense(model, x, prefix=None, positions=None):
    """Logits (T, V) of one text of embeddings (T, D) after keys and values prefix (2 L, KV, P, hd)."""
    hd, (T, _) = model.config.head_dim, x.shape
    prefix = x.new_zeros(4, 2, 0, hd) if prefix is None else prefix
    P = prefix.shape[2]
    positions = torch.arange(P, P + T) if positions is None else positions
    cos, sin = (
        t[0, 0, :, hd // 2 :]
        for t in rotary_tables(positions[None], rotary_frequencies(hd, 10000.0), torch.float64)
    )
    for i, block in enumerate(model.model.layers):
        attn, mlp, h = block.self_attn, block.mlp, rms(x, block.input_layernorm)
        q, k, v = (
            (h @ p.weight.T).view(T, -1, hd).transpose(0, 1) for p in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        q, k = turned(q, cos, sin), torch.cat((prefix[2 * i], turned(k, cos, sin)), dim=1)  # (KV, P + T, hd)
        k, v = (t.repeat_interleave(2, dim=0) for t in (k, torch.cat((prefix[2 * i + 1], v), dim=1)))
        seen = torch.arange(P + T)[None] <= P + torch.arange(T)[:, None]
        scores = (q @ k.mT / hd**0.5).masked_fill(~seen, -torch.inf)  # (H, T, P + T)
        heads = scores.softmax(dim=-1) @ v  # (H, T, hd)
        x = x + heads.transpose(0, 1).reshape(T, -1) @ attn.o_proj.weight.T
        h = rms(x, block.post_attention_layernorm)
        x = x + (F.silu(h @ mlp.gate_proj.weight.T) * (h @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
    return rms(x, model.model.norm) @ model.lm_head.weight.T


def expected(model, ids, row=0, explicit=None, positions=None):
    """Logits (T, V) of one text after the slots that its row of the batch sees."""
    chosen = [slot for slot in model.slots if slot.active and (slot.rows is None or slot.rows[row])]
    prefixes = [] if explicit is None else [explicit]
    prefixes += [slot.given for slot in chosen if not slot.is_prompt]
    prompts = [slot.given for slot in chosen if slot.is_prompt]
    prefix = torch.cat(prefixes, dim=2) if prefixes else None
    x = torch.cat([*prompts, model.embed_weight[torch.tensor(ids)]])
    n, P = len(x) - len(ids), 0 if prefix is None else prefix.shape[2]
    if positions is not None:
        positions = torch.cat((torch.arange(P, P + n), P + n + torch.tensor(positions)))
    return dense(model, x, prefix, positions)[n:]
