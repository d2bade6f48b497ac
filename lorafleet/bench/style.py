"""The colors and the style of all plots: those of `lorafleet bench` and of the benchmark scripts."""

from __future__ import annotations

from typing import Any

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, ORANGE, GREEN, RED = "#2f6fde", "#e8833a", "#2a9d6f", "#c8453b"


def plot_style() -> dict[Any, Any]:
    """Return the settings for `matplotlib.rc_context`."""
    return {
        "axes.axisbelow": True,
        "axes.edgecolor": MUTED,
        "axes.grid": True,
        "axes.labelcolor": MUTED,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlecolor": INK,
        "axes.titlelocation": "left",
        "axes.titlesize": 10,
        "font.size": 9,
        "grid.color": GRID,
        "legend.frameon": False,
        "legend.labelcolor": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
    }
