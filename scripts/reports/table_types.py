"""Size of tables against their effect, for all quantizations of a real model: docs/types.md and its plot."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib
from support.builds import PATCHED, ROOT

from gguf_firstlayer import auto
from gguf_firstlayer.file_format import TYPES, Measurement, fitting, layout
from gguf_firstlayer.runtime import Analysis, analyse

DOC, PLOT = ROOT / "docs" / "types.md", ROOT / "docs" / "types.png"
SOURCE = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
MAX_KLD = 1e-4
LOWEST = 1e-6  # in the plot

# all types of llama-quantize that need no importance matrix, from F16 to Q2_K
MODELS = (
    *("F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0"),
    *("IQ4_NL", "IQ4_XS", "Q3_K_L", "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_S", "Q2_K"),
)
TABLES = ("mxfp4", "q4_0", "iq4_nl", "q4_1", "q5_0", "q5_1", "q8_0", "f16")

PAGE = Path(__file__).with_name("table_types.md").read_text(encoding="utf-8")


def quantized(folder: Path, kind: str) -> Path:
    """The model in another quantization, requantized from Q4_1 through F16."""
    path, base = folder / f"{kind}.gguf", folder / "F16.gguf"
    for source, target, name in ((SOURCE, base, "F16"), (base, path, kind)):
        if not target.exists():
            command = [PATCHED / "llama-quantize", "--allow-requantize", source, target, name]
            subprocess.run(command, check=True, capture_output=True)
    return path


def study(path: Path) -> tuple[float, dict[str, float], dict[str, str], int, Measurement]:
    """For a model: floor, KLD that tables of each type add, and auto's types by site, size of tables and measurement."""
    with analyse(path) as analysis, auto.Effects(path, analysis) as effects:
        added = {}
        for name in TABLES:
            kinds = {site: fitting(TYPES[name], site.width) for site in analysis.sites}
            added[name], _ = effects.rise(auto.table_errors(effects, kinds), auto.ENLARGED)
        kinds, result = auto.search(effects, MAX_KLD)
        tables, _ = layout(analysis.sites, kinds, analysis.n_vocab)
        types = {site.name[0]: kinds[site].name.lower() for site in analysis.sites}
        return effects.floor, added, types, sum(table.bytes for table in tables), result


def sizes(path: Path) -> dict[str, int]:
    """Bytes of the tables, by type."""
    with Analysis(path) as analysis:
        return {
            name: sum(
                table.bytes for table in layout(analysis.sites, dict.fromkeys(analysis.sites, TYPES[name]), analysis.n_vocab)[0]
            )
            for name in TABLES
        }


def main() -> None:
    """Measure, and write the page and the plot."""
    rows = []
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    bytes_of = sizes(SOURCE)
    mib = {name: size / 2**20 for name, size in bytes_of.items()}
    with tempfile.TemporaryDirectory() as folder:
        for i, kind in enumerate(MODELS):
            path = quantized(Path(folder), kind)
            floor, added, types, size, result = study(path)
            cells = " | ".join(f"{value:.1e}" for value in added.values())
            rows.append(
                f"| {kind} | {path.stat().st_size / 2**20:.1f} | {floor:.1e} | {cells} |"
                f" {', '.join(types[name] for name in 'QKV')} | {size / 2**20:.1f} |"
                f" {result.kld_tables:.1e} ± {result.kld_tables_error:.0e} | {result.kld:.1e} |"
                f" {result.top1:.1%} | {result.perplexity_source:.3f} -> {result.perplexity:.3f} |"
            )
            print(rows[-1], file=sys.stderr, flush=True)
            points = sorted((mib[name], max(value, LOWEST)) for name, value in added.items())
            colour = matplotlib.colormaps["viridis"](i / len(MODELS))
            axes.plot(*zip(*points, strict=True), ".-", color=colour, label=kind, linewidth=1)
            axes.plot(size / 2**20, max(result.kld_tables, LOWEST), "o", color=colour, markersize=8, fillstyle="none")
            if path.stem != "F16":
                path.unlink()

    axes.axhline(MAX_KLD, color="black", linestyle="--", linewidth=1)
    axes.annotate(f"bound of --type auto, {MAX_KLD:.0e}", (max(mib.values()), MAX_KLD), ha="right", va="bottom")
    for size in sorted(set(mib.values())):
        label = ", ".join(name for name in mib if mib[name] == size)
        axes.annotate(label, (size, LOWEST), (4, 8), textcoords="offset points", rotation=90, fontsize=8)
    axes.set(
        yscale="log",
        xlabel="size of the tables, MiB",
        ylabel=f"KL divergence that they add, nats ({LOWEST:.0e}: that or less)",
        title="SmolLM2-135M-Instruct: tables of one type (dots) and those that auto chose (circles)",
    )
    axes.legend(fontsize=8, ncol=2)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(PLOT, dpi=120, metadata={"Software": None})

    DOC.write_text(
        PAGE.format(
            tokens=auto.N_TOKENS,
            enlarged=auto.ENLARGED,
            squared=auto.ENLARGED**2,
            bound=MAX_KLD,
            types=" | ".join(TABLES),
            dashes="--:|" * len(TABLES),
            rows="\n".join(rows),
            plot=PLOT.name,
            sizes=", ".join(f"{name} {size:.1f} MiB" for name, size in mib.items()),
        ),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
