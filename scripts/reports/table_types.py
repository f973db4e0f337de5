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
from gguf_firstlayer.runtime import Analysis

DOC, PLOT = ROOT / "docs" / "types.md", ROOT / "docs" / "types.png"
SOURCE = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
MAX_KLD = 1e-4
LOWEST = 1e-6  # in the plot

# all of llama-quantize's that need no importance matrix, from F16 to Q2_K
MODELS = (
    *("F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0"),
    *("IQ4_NL", "IQ4_XS", "Q3_K_L", "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_S", "Q2_K"),
)
TABLES = ("mxfp4", "q4_0", "iq4_nl", "q4_1", "q5_0", "q5_1", "q8_0", "f16")

PAGE = """# Types of tables

Which type of table loses nothing, measured on SmolLM2-135M-Instruct in all quantizations from F16 to Q2_K that need no
importance matrix. llama-quantize made them from a dequantized copy of the Q4_1 model. Written by `scripts/docs types`.

## How `--type auto` chooses

It runs the model over a text of {tokens} tokens, with the rows of the tables' types in memory, and compares the distributions of
the next token with the source's: mean KL divergence (KLD), share of tokens with the same most probable successor, perplexity.

* **The yardstick is the model itself.** Most models round their activations to 8 bits, so a change of any last bit grows: another
  batch size, another processor, or the last bits of the first layer move the output by the *floor* below. Tables are
  blamed for what they add to it.
* **Errors are measured {enlarged:.0f} times enlarged.** KLD grows with the square of a small error, the floor does not, so what
  is added to the floor stands out, and is divided by {squared:.0f}. Where the floor is low, as in the F16 model, the plain
  measurement gives the same; a test holds both together.
* **Each site has a type of its own.** One run per site tells how sensitive the output is to it; the error of each type is
  known from the rows. The smallest tables whose expected KLD is within `--max-kld` (default {bound:.0e}) are measured, and if
  they are above it, standard error included, the expectation is corrected and the search goes on; if they are within it, the next
  narrower type is tried for each site. Types made for importance matrices (iq1 to iq3) are not tried.

The result is in the file (`firstlayer.measured.*`), and `inspect` shows it.

## Result

KLD that the tables add, in nats, with all three sites in one type; then the types that auto chose for Q, K and V, the size of the
tables, what they add with its standard error, and what is measured in all, the floor included. Tables of f16 change last bits
only, so their column shows how far such a measurement can be trusted. Noise may make it negative.

| model | MiB | floor | {types} | auto: Q, K, V | MiB | adds | KLD | same token | perplexity |
|---|--:|--:|{dashes}---|--:|--:|--:|--:|--:|
{rows}

![Size of tables against KL divergence]({plot})

Sizes of tables in one type: {sizes}. Blocks of 256 do not divide this model's widths of 576 and 192, so the types q2_k to q6_k
are not among them. For the same reason, llama-quantize makes the same file of Q3_K_S and Q2_K.

`--rows`, tables of the most used tokens only, was measured and left out: [hot-rows.md](hot-rows.md).
"""  # noqa: E501


def quantized(folder: Path, kind: str) -> Path:
    """The model in another quantization; from Q4_1 to F16 and on."""
    path, base = folder / f"{kind}.gguf", folder / "F16.gguf"
    for source, target, name in ((SOURCE, base, "F16"), (base, path, kind)):
        if not target.exists():
            command = [PATCHED / "llama-quantize", "--allow-requantize", source, target, name]
            subprocess.run(command, check=True, capture_output=True)
    return path


def study(path: Path) -> tuple[float, dict[str, float], dict[str, str], int, Measurement]:
    """Of a model: floor, KLD that tables of each type add, auto's types by site, size of its tables, its measurement."""
    with Analysis(path) as analysis, auto.Effects(path, analysis) as effects:
        added = {}
        for name in TABLES:
            kinds = {site: fitting(TYPES[name], site.width) for site in analysis.sites}
            added[name], _ = effects.rise(auto.table_errors(effects, kinds), auto.ENLARGED)
        kinds, result = auto.search(effects, MAX_KLD)
        tables, _ = layout(analysis.sites, kinds, analysis.n_vocab)
        types = {site.name[0]: kinds[site].name.lower() for site in analysis.sites}
        return effects.floor, added, types, sum(table.bytes for table in tables), result


def sizes(path: Path) -> dict[str, int]:
    """Bytes of tables of each type."""
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
