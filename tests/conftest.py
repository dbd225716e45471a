"""Fixtures: a tiny Llama, a tiny tokenizer, the real SmolLM2 where it has been fetched.

Tests marked `triton` run kernels: on the GPU where there is one, otherwise in Triton's interpreter. That is
a property of the process (TRITON_INTERPRET=1), so kernels/test_interpreter.py runs them in one of their own,
and the process that compiles kernels leaves them out.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import minift
from minift.fetch import ALIASES, cache_folder
from minift.kernels import runtime
from minift.models.llama import Llama, LlamaConfig

settings.register_profile("default", deadline=None, max_examples=30, derandomize=True, print_blob=True)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tiny_config(**changes) -> LlamaConfig:
    values = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rms_norm_eps": 2.0**-20,
    }
    return LlamaConfig(**{**values, **changes})


def tiny_llama(dtype=torch.float32, seed=0, **changes) -> Llama:
    """Random weights large enough that every part of the forward matters."""
    torch.manual_seed(seed)
    model = Llama(tiny_config(**changes))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(1 + 0.1 * torch.randn_like(p) if "norm" in name else 0.2 * torch.randn_like(p))
    return model.to(dtype).eval()


@pytest.fixture
def model():
    return tiny_llama()


class CharTokenizer:
    """One id for each printable ASCII character: a tokenizer with nothing to learn."""

    bos_id, eos_ids, pad_id, chat_template = None, (1,), 0, None

    def encode(self, text, special_tokens=False):
        return [ord(c) - 30 for c in text]

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(i + 30) for i in ids if i > 1)


@pytest.fixture
def tokenizer():
    return CharTokenizer()


@pytest.fixture(scope="session")
def smollm2_path():
    path = cache_folder() / "smollm2" / ALIASES["smollm2"].model
    if not path.exists():
        pytest.skip("needs SmolLM2: minift fetch smollm2")
    return path


@pytest.fixture(scope="session")
def shared_data():
    """A folder with reference data that the project does not ship."""
    folder = os.environ.get("MINIFT_TEST_DATA")
    if not folder:
        pytest.skip("needs MINIFT_TEST_DATA, a folder with the reference data sets")
    return Path(folder)


@pytest.fixture
def eager():
    """bitsandbytes compiles a function anew for each shape; one thread is fast for weights this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.compiler.set_stance("force_eager"):
        yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available() or runtime.INTERPRETED:
        return
    left = [item for item in items if "triton" in item.keywords and item.get_closest_marker("triton")]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


@pytest.fixture(autouse=True, scope="session")
def full_precision_sums():
    """The bounds are for sums in fp32, which cuBLAS gives up for speed unless it is told."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """A tiny model with a tokenizer, training rows and a config, in the current folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(["<eos>", *alphabet])}, []))
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    backend.add_special_tokens(["<eos>"])
    minift.save_model(tiny_llama(vocab_size=backend.get_vocab_size()), tmp_path / "model")
    backend.save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "model" / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    rows = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "run.toml").write_text(
        'model = "model"\ndtype = "float32"\ndata = "rows.jsonl"\n[method]\nname = "lora"\nr = 2\n'
        '[train]\noutput = "out"\nmax_length = 32\nbatch_size = 4\n'
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIFT_CACHE", str(tmp_path / "cache"))
    return tmp_path
