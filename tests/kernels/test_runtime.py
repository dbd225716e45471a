"""Which backend runs: the first that can, or the one asked for, or an error that says why not."""

import pytest
import torch

from minift.kernels import library, runtime
from minift.kernels.dequantize_4bit import dequantize_4bit
from minift.quant import quantize_weight

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto_takes_the_first_that_can_run():
    assert runtime.choose("op", CPU, ("torch",)) == "torch"
    has = ("triton", "c", "torch")
    expected = "triton" if runtime.INTERPRETED else "c" if library.LIBRARY else "torch"
    assert runtime.choose("op", CPU, has) == expected


def test_what_is_asked_for_runs_or_raises():
    with runtime.using("torch"):
        assert runtime.choose("op", CPU, ("triton", "c", "torch")) == "torch"
        with pytest.raises(RuntimeError, match="op: backend 'torch' was asked for .* the op has triton"):
            runtime.choose("op", CPU, ("triton",))
    with runtime.using("c"), pytest.raises(RuntimeError, match="the C file runs on CPU tensors; got cuda"):
        runtime.choose("op", CUDA, ("triton", "c", "torch"))


@pytest.mark.skipif(runtime.INTERPRETED, reason="in the interpreter Triton runs on CPUs")
def test_triton_on_a_cpu_is_an_error_that_names_the_interpreter():
    weight = quantize_weight(torch.randn(64), "nf4").as_packed()
    with runtime.using("triton"), pytest.raises(RuntimeError, match="TRITON_INTERPRET=1; got cpu"):
        dequantize_4bit(weight, torch.empty(64))


def test_without_the_c_file_plain_torch_runs_and_asking_for_it_says_why(monkeypatch):
    monkeypatch.setattr(library, "LIBRARY", None)
    monkeypatch.setattr(library, "WHY", "not built: no compiler")
    assert runtime.choose("op", CPU, ("c", "torch")) == "torch"
    with runtime.using("c"), pytest.raises(RuntimeError, match="the C file is not built: no compiler"):
        runtime.choose("op", CPU, ("c", "torch"))


def test_using_ends_with_its_block_also_after_an_error():
    before = runtime.setting("backend")
    with pytest.raises(KeyError), runtime.using("torch", path="slabs", deterministic=False):
        raise KeyError
    assert (runtime.setting("backend"), runtime.setting("path")) == (before, None)
    assert runtime.setting("deterministic") is True


@pytest.mark.parametrize("wish", [{"backend": "cuda"}, {"path": "slow"}])
def test_an_unknown_wish_lists_the_known_ones(wish):
    with pytest.raises(ValueError, match="is not known; known"), runtime.using(**wish):
        pass
