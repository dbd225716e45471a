"""Run by test_fsdp.py: a step of QLoRA sharded by FSDP2 over two processes beside the same step in one."""

import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from conftest import tiny_llama

import minift
from minift.methods.base import trainable

IDS = (torch.arange(48).view(4, 12) * 7) % 97


def build():
    model = tiny_llama(hidden_size=64, intermediate_size=96)
    minift.quantize_model(model, "nf4")
    minift.apply(model, minift.QLoRA(r=3))
    torch.manual_seed(5)
    with torch.no_grad():
        for p in trainable(model).values():
            p.add_(0.05 * torch.randn_like(p))
    return model


def step(model, ids):
    loss = model(ids).square().mean()
    loss.backward()
    return loss.detach()


def rank_main(rank, world, port):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    compare(rank, world, mixed=False)
    compare(rank, world, mixed=True)
    dist.destroy_process_group()


def compare(rank, world, mixed):
    reference, model = build(), build()
    packed = sum(p.numel() for p in model.parameters() if p.dtype == torch.uint8)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if mixed else MixedPrecisionPolicy()
    for block in model.blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    own = sum(p.to_local().numel() for p in model.parameters() if p.dtype == torch.uint8)
    assert own < 0.6 * packed, f"rank {rank} keeps {own} of {packed} quantized bytes"
    if mixed:  # scales are bytes, so a policy of bf16 leaves them alone
        for module in model.modules():
            if hasattr(module, "compute_dtype"):
                module.compute_dtype = torch.bfloat16
    loss = step(model, IDS.chunk(world)[rank])
    dist.all_reduce(loss)
    expected = step(reference, IDS)
    error = abs(loss.item() / world - expected.item()) / expected.item()
    assert error < (2e-2 if mixed else 1e-6), f"loss differs by {error}"
    if not mixed:
        grads = {name: p.grad for name, p in trainable(reference).items()}
        for name, p in trainable(model).items():
            got, largest = p.grad.full_tensor(), grads[name].abs().max()
            # 48 tokens in another order, through 2 blocks of at most 97 terms: far below 2^-24 * 48 * 97
            assert (got - grads[name]).abs().max() <= 1e-5 * largest, name
    whole = {name: p.full_tensor() for name, p in model.named_parameters() if p.dtype == torch.uint8}
    original = dict(reference.named_parameters())
    assert whole and all(torch.equal(tensor, original[name]) for name, tensor in whole.items())


if __name__ == "__main__":
    mp.spawn(rank_main, (2, int(sys.argv[1])), nprocs=2)
    print("equal")
