"""Pictures, where matplotlib is installed.

Those of a run are written to a path and are left out without matplotlib; those of metrics return a figure.
"""

import numpy as np

from minift.metrics.calibration import reliability_curve
from minift.metrics.columns import positives
from minift.metrics.confusion import confusion, confusion_matrix
from minift.metrics.curves import precision_recall_curve, roc_curve
from minift.metrics.ranking import average_precision, roc_auc


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


def plot_confusion_matrix(y_true, y_pred, labels=None):
    """Shares of each true label's rows, with the counts written in; a matplotlib figure."""
    counted = confusion(y_true, y_pred)
    names = counted.labels.tolist() if labels is None else list(labels)
    names = [str(name).replace("$", r"\$") for name in names]  # which would start a formula
    counts = confusion_matrix(counted, None, labels)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)  # (true, predicted)
    figure = _needed(1.4)
    side = min(20, max(5, 0.55 * len(names) + 2))
    figure.set_size_inches(side + 1, side)
    axes = figure.add_subplot()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(names) <= 30:
        for (i, j), count in np.ndenumerate(counts):
            colour = "white" if shares[i, j] > 0.5 else "black" if count else "0.7"
            axes.text(j, i, f"{count:,}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(names)), names, rotation=90 if len(names) > 8 else 0)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="true", title=f"{counts.sum():,} rows")
    figure.colorbar(picture, label="share of the true label's rows", shrink=0.8)
    return figure


def plot_roc(y_true, y_score, pos_label=None):
    """The ROC curve with its area, beside that of a guess; a matplotlib figure."""
    positive = positives(np.asarray(y_true), pos_label)
    fpr, tpr, _ = roc_curve(positive, y_score)
    figure, axes = _square("ROC curve", "false positive rate", "true positive rate")
    area = roc_auc(positive, y_score)
    axes.plot(fpr, tpr, color="tab:blue", linewidth=2, label=f"area {area:.3f}")
    axes.plot((0, 1), (0, 1), color="0.6", linestyle="--", label="a guess")
    axes.legend(loc="lower right")
    return figure


def plot_precision_recall(y_true, y_score, pos_label=None):
    """Precision over recall with its average, beside that of a guess; a matplotlib figure."""
    positive = positives(np.asarray(y_true), pos_label)
    precision, recall, _ = precision_recall_curve(positive, y_score)
    figure, axes = _square("precision and recall", "recall", "precision")
    mean = average_precision(positive, y_score)
    # A threshold between two scores reaches no point between theirs: steps, not slopes.
    axes.step(recall, precision, where="post", color="tab:blue", linewidth=2, label=f"average {mean:.3f}")
    axes.axhline(positive.mean(), color="0.6", linestyle="--", label="a guess")
    axes.legend(loc="lower left")
    return figure


def plot_reliability(y_true, y_prob, bins: int = 10, pos_label=None, labels=None):
    """The share of rows that came true at each probability, above how many rows there are; a figure.

    A vector of probabilities is of the positive class, of a matrix (rows, classes) the largest of each row.
    """
    confidence, right, rows = reliability_curve(y_true, y_prob, bins, pos_label, labels)
    filled = rows > 0
    figure = _needed(1.4)
    axes, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    axes.plot((0, 1), (0, 1), color="0.6", linestyle="--", label="calibrated")
    axes.plot(confidence[filled], right[filled], color="tab:blue", marker="o", label="rows of a bin")
    share = "share of positive rows" if np.ndim(y_prob) == 1 else "share of rows that are right"
    axes.set(ylabel=share, title="reliability", xlim=(0, 1), ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    below.bar((np.arange(bins) + 0.5) / bins, rows, width=0.9 / bins, color="tab:blue")
    below.set(xlabel="probability", ylabel="rows")
    return figure


def _square(title: str, xlabel: str, ylabel: str):
    figure = _needed(1)
    figure.set_size_inches(5, 5)
    axes = figure.add_subplot()
    axes.set(
        title=title, xlabel=xlabel, ylabel=ylabel, xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal"
    )
    axes.grid(alpha=0.3)
    return figure, axes


def _needed(height: float):
    figure = _figure(height)
    if figure is None:
        raise ModuleNotFoundError("plots need matplotlib: pip install -c constraints.txt -e '.[plots]'")
    return figure


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
