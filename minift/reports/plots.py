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
