"""The two pictures of train_text.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from train_text import Run

COLOURS = {"HC": "#c2571a", "mHC": "#1f5fa8"}


def plot_loss_gap(runs: list[Run], folder: Path) -> list[Path]:
    """Training loss of HC and mHC minus the baseline's on the same batch, smoothed."""
    figure, axes = plt.subplots(figsize=(7, 4))
    base = runs[0].losses
    window = max(1, len(base) // 20)
    for run in runs[1:]:
        gap = [a - b for a, b in zip(run.losses, base, strict=True)]
        smooth = [
            sum(gap[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(gap))
        ]
        axes.plot(range(1, len(gap) + 1), gap, color=COLOURS[run.version], alpha=0.2, linewidth=0.8)
        axes.plot(range(1, len(gap) + 1), smooth, color=COLOURS[run.version], label=run.version)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="step", ylabel="training loss minus baseline's (nats per byte)",
             title=f"Loss gap to the plain residual (bold: mean of {window} steps)")  # fmt: skip
    axes.legend(frameon=False)
    return _save(figure, folder / "loss_gap")


def plot_gains(runs: list[Run], folder: Path) -> list[Path]:
    """Composite gains of H_res from the first sublayer to each one, after training."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for run in runs[1:]:
        layers = range(1, len(run.gains) + 1)
        for which, style, label in ((0, "o-", "forward (rows)"), (1, "s--", "backward (columns)")):
            gains = [gain[which] for gain in run.gains]
            axes.plot(layers, gains, style, color=COLOURS[run.version], markersize=4,
                      label=f"{run.version}, {label}")  # fmt: skip
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(
        xlabel="sublayer",
        ylabel="composite gain of H_res (log scale)",
        yscale="log",
        title="Gain per layer after training",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    return _save(figure, folder / "gain_per_layer")


def _save(figure: Any, stem: Path) -> list[Path]:
    figure.tight_layout()
    paths = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    plt.close(figure)
    return paths
