"""What every benchmark shares: the gate, timing in turns, rows, the machine, results as JSON, table and plot.

A benchmark checks first that the sides compute the same thing and times nothing when they do not. Its
`run(quick)` returns (rows, details). Times are medians; `x` is the median ratio of a peer's time to minift's
in the same turn, so that minift is faster above 1.

On a GPU one time is that of a launch within a replayed CUDA graph, whose launches go over enough copies of
the weights that none is still in the L2 cache; what a call costs the host is measured apart. On a CPU it is
that of a call, and a weight may stay in the caches.
"""

import json
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch

from benchmarks.limits import DEVICE, copy_bandwidth, machine, matmul_rate, roofline
from minift.kernels import library, runtime

RESULTS = Path(__file__).parent / "results"
GRAPH_SECONDS = 4e-3  # of calls, each launched by itself, that one CUDA graph holds
# Largest error of a product, as part of its largest exact entry: 4 roundings of bf16; 256 of fp32, where
# sqrt(8192) are expected.
BOUNDS = {torch.bfloat16: 2**-6, torch.float32: 2**-16}


class Mismatch(Exception):
    """The correctness gate is red; nothing was timed."""


def gate(name: str, error: float, bound: float) -> None:
    if not error <= bound:
        raise Mismatch(f"{name}: error {error:.3g} is above the bound {bound:.3g}; nothing was timed")


def gate_equal(name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    gate(name, (got != expected).sum().item(), 0)


def gate_quality(name: str, w: torch.Tensor, decoded: torch.Tensor, ours: torch.Tensor) -> None:
    """Another's quantization of w has our relative error, within 1 %."""
    theirs, ours = ((w.float() - x.float()).norm().item() for x in (decoded, ours))
    gate(f"{name}, error over ours", abs(theirs / ours - 1), 0.01)


def gate_close(name: str, got: tuple, exact: tuple, dtype: torch.dtype) -> None:
    for one, truth in zip(got, exact, strict=True):
        error = (one.double() - truth).abs().max() / truth.abs().max()
        gate(name, error.item(), BOUNDS[dtype])


@contextmanager
def peer(name: str, left_out: dict[str, str]):
    """Leave a peer out, with the reason, where it is not installed, fails, or its gate is red."""
    try:
        yield
    except ModuleNotFoundError:
        left_out[name] = "not installed"
    except Exception as error:
        left_out[name] = f"{type(error).__name__}: {error}".partition("\n")[0][:300]


def backend(call: Callable) -> str:
    """The backend that a call ran on: the asked one, or the first that has the op on this machine."""
    asked = runtime.setting("backend")
    for name in runtime.BACKENDS[1:] if asked == "auto" else (asked,):
        try:
            with runtime.using(name):
                call()
            return f"c, {library.WHY.partition(',')[0]}" if name == "c" else name
        except RuntimeError as error:
            if "was asked for and cannot run" not in str(error):
                raise
    raise RuntimeError("no backend runs the op")


def alternate(candidates: dict, repeats: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each call; the candidates take turns, so that a drift of the machine meets all of them."""
    times = {name: [] for name in candidates}
    for turn in range(warmup + repeats):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def measure(sides: dict[str, list[Callable]], repeats: int, graph: bool) -> dict[str, list[float]]:
    """Seconds of one call of each side: a side is a list of calls, one for each copy of its weights.

    Without `graph`, calls follow each other, and the host's work counts where it is the longer. A side that
    cannot be captured in a CUDA graph is measured in this way, and named so.
    """
    if DEVICE == "cpu":
        return alternate({name: calls[0] for name, calls in sides.items()}, repeats)
    rounds = {}
    for name, calls in sides.items():
        _launch(calls, len(calls))
        launches = len(calls) * max(1, round(GRAPH_SECONDS / _seconds(partial(_launch, calls, len(calls)))))
        if not graph:
            rounds[name] = partial(_launch, calls, launches), launches
            continue
        try:
            rounds[name] = _captured(calls, launches).replay, launches
        except RuntimeError:
            rounds[f"{name} (without a graph)"] = partial(_launch, calls, launches), launches
    times = {name: [] for name in rounds}
    for turn in range(2 + repeats):
        for name, (launch, launches) in rounds.items():
            seconds = _seconds(launch) / launches
            if turn >= 2:
                times[name].append(seconds)
    return times


def _launch(calls, launches: int) -> None:
    for i in range(launches):
        calls[i % len(calls)]()


def _captured(calls, launches: int):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _launch(calls, len(calls))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _launch(calls, launches)
    return graph


def _seconds(launch: Callable) -> float:
    """Between two events around what is launched."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    launch()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def host_seconds(call: Callable, calls: int = 50) -> float:
    """Median seconds until a call returns, its work still queued on the GPU."""
    torch.cuda.synchronize()
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(seconds)


def quantiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)

    def pick(q):
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]

    return {"median": statistics.median(ordered), "p20": pick(0.2), "p80": pick(0.8)}


def timed_row(labels: dict, sides: dict, moved: int, flops: int, quick: bool, graph: bool = True) -> dict:
    """Time the sides, the first of them minift, and say how minift stands to them and to the limit.

    `moved`: bytes that the work must read and write. `labels` has the dtype of its products.
    """
    times = measure(sides, 5 if quick else 15, graph)
    (side, ours), *peers = times.items()
    t = quantiles(ours)
    memory = moved / copy_bandwidth()
    arithmetic = flops / matmul_rate(getattr(torch, labels["dtype"])) if flops else 0.0
    row = {
        **labels,
        "ms": 1e3 * t["median"],
        "p20 - p80": f"{1e3 * t['p20']:.3g} - {1e3 * t['p80']:.3g}",
        "GB/s": moved / t["median"] / 1e9,
        "TFLOP/s": flops / t["median"] / 1e12 if flops else "-",
        "of limit": max(memory, arithmetic) / t["median"],
        "limit": "copy" if memory > arithmetic else "matmul",
    }
    if side != "minift":
        row["timed"] = side
    for name, theirs in peers:
        row[f"{name} ms"] = 1e3 * statistics.median(theirs)
        row[f"x {name}"] = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    if DEVICE == "cuda":
        host = {name: 1e6 * host_seconds(calls[0]) for name, calls in sides.items()}
        row["host us"] = ", ".join(f"{name} {us:.0f}" for name, us in host.items())
    return row


def products(labels: dict, sides: dict, inputs: tuple, moved: int, flops: tuple, quick: bool, left_out: dict):
    """Rows of a product's forward and, where flops are given for both, of forward and backward.

    `sides`: name -> (calls, exact). Each call takes `inputs`, whose gradients the backward gives; `exact` is
    the same product, to be called in fp64. A side whose name ends in "train" runs its forward with autograd,
    as training does; one that ends in "eval" has no backward and may compute in bf16. One of minift's paths
    alone (runtime.PATHS) has no backward either.
    """
    torch.manual_seed(0)
    plain = [x.detach() for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    results = {exact: exact(*wide) for _, exact in sides.values()}
    dy = torch.randn(next(iter(results.values())).shape, device=DEVICE).to(inputs[0].dtype)

    def forward(name, call):
        return partial(call, *inputs) if name.endswith("train") else torch.no_grad()(partial(call, *plain))

    def both(call):
        return torch.autograd.grad(call(*inputs), inputs, dy)

    passes = {"forward": {n: [forward(n, c) for c in calls] for n, (calls, _) in sides.items()}}
    if len(flops) == 2:
        trained = {n: c for n, (c, _) in sides.items() if n not in runtime.PATHS and not n.endswith("eval")}
        passes["forward + backward"] = {n: [partial(both, c) for c in calls] for n, calls in trained.items()}
    rows = []
    for turn, (what, calls) in enumerate(passes.items()):
        green = {}
        for name, side in calls.items():
            with nullcontext() if name == "minift" else peer(f"{name}, {what}, {labels}", left_out):
                y, got = results[sides[name][1]], side[0]()
                truth = (
                    torch.autograd.grad(y, wide, dy.double(), retain_graph=True) if turn else (y.detach(),)
                )
                dtype = torch.bfloat16 if name.endswith("eval") else inputs[0].dtype
                gate_close(f"{name}, {what}, {labels}", got if turn else (got.detach(),), truth, dtype)
                green[name] = side
        rows.append(timed_row({**labels, "pass": what}, green, moved * (turn + 1), flops[turn], quick))
    return rows


def table(rows: list[dict]) -> str:
    """Markdown; a column for every key, in the order in which they first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[row.get(column, "-") for column in columns] for row in rows]
    text = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in line] for line in cells]
    lines = [columns, ["---"] * len(columns), *text]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(name: str, rows: list[dict], details: dict, folder: Path | None) -> None:
    """Print the table; write NAME.json (NAME_gpu.json on a GPU), the plot, and NAME.md with both tables.

    details: `backend` is the one that ran; `device` "any" says that the figures belong to no device.
    """
    print(table(rows), *details.get("left out", {}).items(), sep="\n", flush=True)
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    device, where = details.pop("device", DEVICE), {**machine(), "backend": details.pop("backend", None)}
    stem = f"{name}_gpu" if device == "cuda" else name
    roofline(rows, where["limits"], folder / f"{stem}.png")
    if device == "any":
        where = {key: where[key] for key in ("versions", "commit", "date")}
    result = {"machine": where, "rows": rows, **details}
    (folder / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    parts = [f"# {name}"]
    for title, stem in [("", name)] if device == "any" else [("CPU", name), ("GPU", f"{name}_gpu")]:
        path = next((p for f in (folder, RESULTS) if (p := f / f"{stem}.json").exists()), None)
        parts += [f"## {title}"] if title else []
        parts += section(json.loads(path.read_text())) if path else ["not measured"]
    (folder / f"{name}.md").write_text("\n\n".join(parts) + "\n")


def section(result: dict) -> list[str]:
    """What the figures belong to, the table, and what is not in it."""
    where = result["machine"]
    facts = []
    if "cpu" in where:
        facts.append(f"{where['cpu']}; {where['threads']} threads; GPU: {where['gpu'] or 'none'}")
    if where.get("backend"):
        facts.append(f"backend: {where['backend']}")
    facts.append(", ".join(f"{k} {v}" for k, v in where.get("limits", {}).items()))
    facts.append(", ".join(f"{k} {v}" for k, v in where["versions"].items()))
    facts.append(f"commit {where['commit']}, {where['date']}")
    left_out = [f"Left out: {name}: {reason}" for name, reason in result.get("left out", {}).items()]
    return ["; ".join(fact for fact in facts if fact), table(result["rows"]), *left_out]
