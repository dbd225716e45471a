"""Random numbers that depend on a seed and a module's path, not on the order in which modules are made."""

import hashlib

import torch


def generator(seed: int, path: str) -> torch.Generator:
    """A random stream of (seed, path)."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
