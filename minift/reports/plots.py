"""Pictures, where matplotlib is installed."""

import numpy as np


def plot_loss(records: list[dict], path) -> bool:
    """Records with `step` and `loss` as a picture: each step, a running mean. False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not records:
        return False
    steps = np.array([r["step"] for r in records])
    losses = np.array([r["loss"] for r in records], dtype=float)
    window = max(1, len(losses) // 10)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="0.75", linewidth=1, label="each step")
    axes.plot(steps[window - 1 :], smooth, color="tab:blue", linewidth=2, label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="loss, nats per supervised token", title="training loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    return True
