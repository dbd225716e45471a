"""Pictures, where matplotlib is installed."""

import numpy as np


def plot_loss(records: list[dict], path) -> bool:
    """Records with `step` and `loss` as a picture: each step, a running mean. False without matplotlib."""
    figure = _figure(1)
    if figure is None or not records:
        return False
    steps = np.array([r["step"] for r in records])
    losses = np.array([r["loss"] for r in records], dtype=float)
    window = max(1, len(losses) // 10)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="0.75", linewidth=1, label="each step")
    axes.plot(steps[window - 1 :], smooth, color="tab:blue", linewidth=2, label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="loss, nats per supervised token", title="training loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    return True


def plot_quantization(layers: list[dict], path) -> bool:
    """Relative error over depth, a line for each kind of layer; False without matplotlib."""
    figure = _figure(1.2)
    if figure is None or not layers:
        return False
    kinds = {}
    for row in layers:
        numbers = [int(part) for part in row["path"].split(".") if part.isdigit()]
        name = row["path"].rpartition(".")[2]
        kinds.setdefault(f"{name} ({row['format']})", []).append(
            (numbers[0] if numbers else 0, row["relative"])
        )
    axes = figure.add_subplot()
    for kind, points in kinds.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=kind)
    axes.set(xlabel="block", ylabel="relative error |W - Q| / |W|", title="quantization error by layer")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=110)
    return True


COLOURS = {  # what a module is, by the first rule that means it -> its colour
    "new head": "tab:red",
    "usual": "tab:orange",
    "all-linear": "lightskyblue",
    "norm": "0.7",
    "": "0.85",
}


def plot_tree(nodes: list, path) -> bool:
    """The module tree (reports/module_tree.py) as an icicle: a column for each depth, heights are parameters.

    Modules that are alike are one box with their number. False without matplotlib.
    """
    figure = _figure(2)
    if figure is None or not nodes:
        return False
    depth = max(node.depth for node in nodes) + 1
    figure.set_size_inches(1.7 * depth + 1, 8)
    axes = figure.add_subplot()
    total = sum(node.parameters for node in nodes if node.depth == 0)
    tops, seen = [0.0], set()  # where the next box of each depth starts, in parameters
    for node in nodes:
        del tops[node.depth + 1 :]
        low = tops[node.depth]
        tops[node.depth] += node.parameters
        tops.append(low)
        kind = _what(node)
        seen.add(kind)
        axes.barh(low, 1, node.parameters, left=node.depth, align="edge", color=COLOURS[kind], edgecolor="w")
        if node.parameters > total / 90:
            times = f" x {node.copies}" if node.copies > 1 else ""
            shape = (
                f"\n{' x '.join(map(str, node.shape))}" if node.parameters > total / 30 and node.shape else ""
            )
            text = f"{node.name}{times}, {node.parameters / 1e6:.3g}M{shape}"
            axes.text(
                node.depth + 0.03, low + node.parameters / 2, text, va="center", fontsize=7, clip_on=True
            )
    names = {
        "usual": "the usual target of LoRA",
        "": "other",
        "norm": "norms",
        "all-linear": "other linear layers",
    }
    for kind in [kind for kind in COLOURS if kind in seen]:
        axes.barh(0, 0, color=COLOURS[kind], label=names.get(kind, kind))
    axes.set(xlim=(0, depth), ylim=(total, 0), xticks=[])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}M")
    axes.set(ylabel="parameters, all copies together", title=f"{total:,} parameters")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.02), ncols=5, fontsize="small", frameon=False)
    figure.savefig(path, dpi=110)
    return True


def _what(node) -> str:
    """The key in COLOURS."""
    if "new head" in node.rules:
        return "new head"
    if "role norms" in node.rules:
        return "norm"
    own = [rule for rule in node.rules if not rule.startswith("role ")]
    return "" if not own else "all-linear" if own == ["all-linear"] else "usual"


def _figure(height: float):
    """An empty figure, or None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(7, 4 * height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
