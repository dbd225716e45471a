"""The measuring itself: red gates time nothing, peers that fail are named, devices are kept apart."""

import json

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import Mismatch, alternate, gate, gate_close, peer, products, quantiles, report, table
from benchmarks.weights import copies, nbytes, pack, random
from minift.kernels.dequantize_4bit import dequantize_4bit

MACHINE = {"cpu": "a CPU", "threads": 2, "gpu": None, "versions": {"torch": "2"}, "commit": "c", "date": "d"}
MACHINE["limits"] = {"copy GB/s": 10.0, "float32 TFLOP/s": 1.0, "bfloat16 TFLOP/s": 2.0}


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(harness, "machine", lambda: dict(MACHINE))
    monkeypatch.setattr(harness, "copy_bandwidth", lambda: 1e10)
    monkeypatch.setattr(harness, "matmul_rate", lambda dtype: 1e12)


@pytest.mark.parametrize("error", [1.01, float("inf"), float("nan")])
def test_a_red_gate_raises(error):
    gate("green", 1.0, 1.0)
    with pytest.raises(Mismatch, match="nothing was timed"):
        gate("red", error, 1.0)


def test_a_peer_that_is_missing_fails_or_differs_is_left_out_with_the_reason():
    left_out = {}
    with peer("absent", left_out):
        import no_such_package  # noqa: F401
    with peer("broken", left_out):
        raise RuntimeError("one line\nanother")
    with peer("wrong", left_out):
        gate("wrong", 2, 1)
    assert left_out["absent"] == "not installed" and left_out["broken"] == "RuntimeError: one line"
    assert left_out["wrong"].startswith("Mismatch")


def test_sides_take_turns_and_warm_up():
    calls = []
    times = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warmup=1)
    assert calls == ["a", "b"] * 4 and len(times["a"]) == len(times["b"]) == 3
    assert quantiles([3.0, 1.0, 2.0])["median"] == 2.0


def test_a_product_is_gated_and_timed_forward_and_backward():
    W = torch.randn(5, 7)
    x = torch.randn(3, 7, requires_grad=True)

    def exact(x):
        return x @ W.to(x.dtype).t()

    def wrong(x):
        return 1.001 * exact(x)

    sides, left_out = {"minift": ([exact], exact), "wrong": ([wrong], exact)}, {}
    labels = {"op": "product", "dtype": "float32"}
    rows = products(labels, sides, (x,), 1000, (210, 420), True, left_out)
    assert [row["pass"] for row in rows] == ["forward", "forward + backward"]
    assert len(left_out) == 2 and not [key for row in rows for key in row if "wrong" in key]
    assert rows[0]["GB/s"] == pytest.approx(1000 / rows[0]["ms"] / 1e6)
    assert (
        rows[0]["of limit"] == pytest.approx(1000 / 1e10 / (rows[0]["ms"] / 1e3))
        and rows[0]["limit"] == "copy"
    )
    with pytest.raises(Mismatch, match="minift"):
        products(labels, {"minift": ([wrong], exact)}, (x,), 1, (1,), True, {})


def test_an_output_that_was_never_written_is_red():
    exact = torch.randn(4, 4).double()
    with pytest.raises(Mismatch):
        gate_close("hole", (torch.full((4, 4), float("nan")),), (exact,), torch.bfloat16)


def test_results_of_each_device_stand_apart_and_missing_ones_are_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "committed")
    rows = [{"op": "a", "dtype": "float32", "ms": 1.0, "GB/s": 2.0, "TFLOP/s": 0.5}]
    report("nothing", rows, {}, None)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(harness, "DEVICE", "cpu")
    report("op", rows, {"backend": "torch", "left out": {"peer": "not installed"}}, tmp_path / "committed")
    text = (tmp_path / "committed" / "op.md").read_text()
    assert "## GPU\n\nnot measured" in text and "Left out: peer: not installed" in text
    assert json.loads((tmp_path / "committed" / "op.json").read_text())["machine"]["backend"] == "torch"
    monkeypatch.setattr(harness, "DEVICE", "cuda")
    report("op", rows, {}, tmp_path / "elsewhere")
    text = (tmp_path / "elsewhere" / "op.md").read_text()
    assert "not measured" not in text and text.count("| a |") == 2  # the CPU's committed rows as well
    report("any", [{"op": "a"}], {"device": "any"}, tmp_path)
    assert "##" not in (tmp_path / "any.md").read_text() and "a CPU" not in (tmp_path / "any.md").read_text()
    assert (tmp_path / "elsewhere" / "op_gpu.json").exists() and not (
        tmp_path / "elsewhere" / "op.json"
    ).exists()


def test_a_table_has_every_column_and_names_what_is_missing():
    assert table([{"a": 1.23456}, {"b": "x"}]).splitlines()[2:] == ["| 1.23 | - |", "| - | x |"]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_packed_weights_are_those_of_quantize_weight(format, double_quant):
    import minift

    w = random(8, 128, dtype=torch.float32)
    weight = pack(w, format, double_quant)
    q = minift.quantize_weight(w, format, double_quant=double_quant)
    assert torch.equal(weight.scales(), q.scales()) and weight.bits == q.layout.format.bits
    assert nbytes(weight) - (64 if format == "nf4" else 0) - (1024 if double_quant else 0) == q.nbytes
    assert torch.equal(copies(weight)[-1].packed, q.packed)
    if format == "nf4":
        assert torch.equal(dequantize_4bit(weight, torch.empty_like(w)), q.dequantize())
