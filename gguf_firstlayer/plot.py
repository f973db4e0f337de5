"""The plot of what `bench` measured."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_firstlayer.errors import FirstLayerError
from gguf_firstlayer.text import count

if TYPE_CHECKING:
    from gguf_firstlayer.bench import Bench


def pyplot_module() -> Any:
    """matplotlib, which only plots need."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as err:
        raise FirstLayerError("a plot needs matplotlib: pip install matplotlib") from err
    return pyplot


def plot_path(converted: Path, folder: Path) -> Path:
    """Where `plot` writes the plot for a file."""
    return folder / f"{converted.stem}-bench.png"


def plot(result: Bench, folder: Path) -> Path:
    """Write a plot of the ratios to a folder. Returns the file, a PNG.

    Raises:
        FirstLayerError: matplotlib is not installed.
    """
    pyplot = pyplot_module()
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for context in dict.fromkeys(cell.context for cell in result.cells):
        cells = sorted((cell for cell in result.cells if cell.context == context), key=lambda cell: cell.batch)
        batches = [cell.batch for cell in cells]
        ratios = [cell.ratio.value for cell in cells]
        errors = [
            [max(0.0, cell.ratio.value - cell.ratio.low) for cell in cells],
            [max(0.0, cell.ratio.high - cell.ratio.value) for cell in cells],
        ]
        line = axes.errorbar(batches, ratios, errors, marker="o", capsize=3, label=f"after {context} tokens")
        limits = [cell.limit for cell in cells if cell.limit]
        if len(limits) == len(cells):
            axes.plot(batches, [value.value for value in limits], ":", color=line[0].get_color(), label="without any lookup")
    bounds = dict(sorted((cell.batch, cell.bound) for cell in result.cells))
    axes.plot(list(bounds), list(bounds.values()), "k--", label="bound by the plan")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(bounds), [str(batch) for batch in bounds])
    axes.set_xlabel("tokens per batch")
    axes.set_ylabel(f"speed, {result.other} / source")
    name = os.fsencode(result.converted.name).decode(errors="replace")
    axes.set_title(f"{name}, {count(result.threads, 'thread')}, 95 % confidence intervals", fontsize=10)
    axes.legend(fontsize=8)
    path = plot_path(result.converted, folder)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
