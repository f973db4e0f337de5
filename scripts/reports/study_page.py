"""docs/study.md and its plots, from docs/study.json: `scripts/docs study --draw` draws them again without measuring."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gpu_page import Result, gather_table, gpu_tables, interval, rows
from matplotlib import pyplot

from gguf_firstlayer.text import size_text

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"

DEPTHS = (1, 2, 4, 6, 8, 12, 16, 24, 32)

WIDTHS = (256, 1024)

VOCABULARIES = (512, 50304)

PREFILL = 64

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

CONTEXTS = (0, 512, 2048, 8192)

# tokens of a prompt that a row cache is measured with
PROMPT = 128

TYPES = ("q4_0", "q8_0", "f16", "f32")

# layers of SmolLM2 that make its draft, starts of the servers, tokens of an answer
DRAFT_LAYERS, STARTS, ANSWER = 4, 5, 48


def synthetic_name(layers: int, width: int, vocab: int, parallel: bool) -> str:
    """Name of a Pythia or a Llama of any size."""
    return f"{'parallel' if parallel else 'serial'}-{layers}x{width}-{vocab}"


def cells(results: dict[str, Result], prefix: str) -> Iterator[tuple[str, Result]]:
    """The cells of all measurements whose keys have a prefix, by the rest of the key."""
    for key, result in results.items():
        if key.startswith(f"{prefix} "):
            for cell in result["cells"]:
                yield key.removeprefix(f"{prefix} "), cell


def overview(results: dict[str, Result]) -> str:
    """How well all cells meet the targets."""
    found = [cell for prefix in ("real", "shape", "type", "depth") for _, cell in cells(results, prefix)]
    found += results["fading"]["cells"]
    limits = [cell["of_limit"] for cell in found]
    stock = [cell for key in results if key.split()[0] in ("real", "shape") for cell in results[key]["stock"]["cells"]]
    gains = [cell["converted"] for cell in stock] + [cell["ratio"] for cell in found]
    sources = [cell["patched"] for cell in stock]

    def above(ratios: list[Result], bound: float = 1) -> int:
        return sum(value["low"] > bound for value in ratios)

    def below(ratios: list[Result], bound: float = 1) -> int:
        return sum(value["high"] < bound for value in ratios)

    reached = sum(value["value"] >= 0.95 for value in limits)
    median = np.median([value["value"] for value in limits])
    lines = [
        f"* {len(found)} cells (a model, a batch size, a context length) were compared with their limit, the same graph",
        f"  with constants instead of lookups. {reached} reach 95 % of it, the median is {median:.3f}; the whole interval is",
        f"  below 95 % for {below(limits, 0.95)}.",
        f"* Of {len(gains)} ratios to the source, {above(gains)} are significantly faster, {below(gains)} slower, and",
        f"  {below(gains, 0.995)} significantly below 0.995. The others are within noise. Of 95 % intervals, one in forty lies",
        "  below the truth by chance, and one in forty above.",
        f"* Of {len(sources)} ratios of the source on the patched library to the source on the stock one,",
        f"  {above(sources)} are significantly above 1 and {below(sources)} below. They run the same code, which shows how far",
        "  the intervals can be trusted.",
    ]
    return "\n".join(lines) + "\n"


def depth_section(results: dict[str, Result]) -> str:
    figure, axes = pyplot.subplots(2, 4, figsize=(15, 7), layout="constrained", sharex=True)
    lines = []
    columns = [(width, vocab) for vocab in VOCABULARIES for width in WIDTHS]
    for line, parallel in enumerate((False, True)):
        for column, (width, vocab) in enumerate(columns):
            axis = axes[line][column]
            for index, batch in enumerate((1, PREFILL)):
                points = []
                for layers in DEPTHS:
                    name = synthetic_name(layers, width, vocab, parallel)
                    cell = next(cell for cell in results[f"depth {name}"]["cells"] if cell["batch"] == batch)
                    points.append(cell)
                    if batch == 1:
                        prefill = next(cell for cell in results[f"depth {name}"]["cells"] if cell["batch"] == PREFILL)
                        texts = [
                            text
                            for shown in (cell, prefill)
                            for text in (interval(shown["ratio"]), f"{shown['bound']:.3f}", f"{shown['of_limit']['value']:.3f}")
                        ]
                        lines.append([name, *texts])
                saved = [100 * (1 - 1 / cell["ratio"]["value"]) for cell in points]
                low = [100 * (1 - 1 / cell["ratio"]["low"]) for cell in points]
                high = [100 * (1 - 1 / cell["ratio"]["high"]) for cell in points]
                errors = [np.subtract(saved, low), np.subtract(high, saved)]
                label = "decoding" if batch == 1 else f"prefill of {PREFILL}"
                axis.errorbar(DEPTHS, saved, errors, fmt="o", color=f"C{index}", capsize=2, markersize=4, label=label)
                bounds = [100 * (1 - 1 / cell["bound"]) for cell in points]
                axis.plot(DEPTHS, bounds, color=f"C{index}", linewidth=1, label=f"{label}, by the plan")
            axis.plot(DEPTHS, [100 / layers for layers in DEPTHS], "k:", label="1 / layers")
            axis.set_title(f"{'parallel' if parallel else 'serial'}, width {width}, vocabulary {vocab}", fontsize=9)
            axis.set_xscale("log", base=2)
            axis.set_xticks(DEPTHS, map(str, DEPTHS))
            axis.set_yscale("symlog", linthresh=1)
            axis.grid(alpha=0.3)
            if column == 0:
                axis.set_ylabel("time saved, %")
            if line == 1:
                axis.set_xlabel("layers")
    axes[0][0].legend(fontsize=7)
    figure.savefig(DOCS / "study-depth.png", dpi=100)
    parts = [f"{name}{part}" for name in ("decoding", "prefill") for part in ("", ": bound", ": of limit")]
    return rows(["layers x width - vocabulary", *parts], *lines)


def fading_section(results: dict[str, Result]) -> str:
    found = {(cell["batch"], cell["context"]): cell for cell in results["fading"]["cells"]}
    figure, axis = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for context in CONTEXTS:
        points = [found[batch, context]["ratio"] for batch in BATCHES]
        values = [point["value"] for point in points]
        errors = [[p["value"] - p["low"] for p in points], [p["high"] - p["value"] for p in points]]
        axis.errorbar(BATCHES, values, errors, marker="o", capsize=2, label=f"after {context} tokens")
    axis.plot(BATCHES, [found[batch, 0]["bound"] for batch in BATCHES], "k--", label="bound by the plan")
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set_xticks(BATCHES, map(str, BATCHES))
    axis.set_xlabel("tokens per batch")
    axis.set_ylabel("speed, converted / source")
    axis.legend(fontsize=8)
    figure.savefig(DOCS / "study-fading.png", dpi=100)
    lines = [
        [str(batch), f"{found[batch, 0]['bound']:.3f}", *[interval(found[batch, context]["ratio"]) for context in CONTEXTS]]
        for batch in BATCHES
    ]
    return rows(["batch", "bound", *[f"after {context}" for context in CONTEXTS]], *lines)


def real_section(results: dict[str, Result]) -> str:
    lines = []
    for prefix in ("real", "shape"):
        for name, cell in cells(results, prefix):
            stock = next(c for c in results[f"{prefix} {name}"]["stock"]["cells"] if c["batch"] == cell["batch"])
            of_stock = [interval(stock["patched"]), interval(stock["converted"])]
            ratios = [interval(cell["ratio"]), f"{cell['bound']:.3f}", interval(cell["of_limit"])]
            lines.append([name, str(cell["batch"]), *of_stock, *ratios])
    head = ["model", "batch", "source: patched / stock", "converted / stock", "converted / source", "bound", "of limit"]
    return rows(head, *lines)


def cache_section(results: dict[str, Result]) -> str:
    lines = []
    for key, result in results.items():
        name = key.removeprefix("cache ")
        if not key.startswith("cache ") or name == "machine":
            continue
        converted = next(results[f"{prefix} {name}"]["cells"] for prefix in ("real", "shape") if f"{prefix} {name}" in results)
        decode, prefill = result["cells"]
        lines.append(
            [
                name,
                f"{decode['bound']:.3f}",
                interval(decode["ratio"]),
                interval(converted[0]["ratio"]),
                f"{prefill['bound']:.3f}",
                interval(prefill["ratio"]),
                interval(converted[1]["ratio"]),
                interval(result["cold"]),
                f"{result['cold_misses']} of {PROMPT}",
            ]
        )
    head = [
        "model",
        "bound",
        "decoding, cached",
        "converted",
        "bound",
        f"prefill of {PROMPT}, warm",
        "converted",
        "cold",
        "new",
    ]
    return rows(head, *lines)


def demand_section(results: dict[str, Result]) -> str:
    lines = []
    for key, result in results.items():
        if not key.startswith("demand ") or key == "demand machine":
            continue
        _, name, pooling = key.split()
        what = "prompt" if pooling == "prompt" else f"embedding, {pooling}"
        for cell in result["cells"]:
            speed = [f"{cell['source']:,.0f}", f"{cell['converted']:,.0f}"]
            ratio = interval(cell["ratio"])
            if cell["verdict"].startswith("noise") and not ratio.startswith("("):
                ratio = f"({ratio})"
            lines.append([name, what, str(cell["batch"]), *speed, ratio, f"{cell['bound']:.3f}"])
    return rows(["model", "read", "tokens", "tokens/s without", "with", "ratio", "bound"], *lines)


def served_section(results: dict[str, Result]) -> str:
    lines = [
        [*key.split()[1:], f"{result['source']:,.1f}", f"{result['ours']:,.1f}", interval(result["ratio"])]
        for key, result in results.items()
        if key.startswith("served ")
    ]
    return rows(["model", "pooling", "requests/s without", "with", "ratio"], *lines)


def seconds(value: float | None) -> str:
    return "?" if value is None else f"{value:.3f}"


def memory_section(results: dict[str, Result]) -> str:
    lines = []
    for key, result in results.items():
        if key.split()[0] not in ("real", "shape") or not result["resources"]:
            continue
        for label, taken in (("source", result["resources_source"]), ("converted", result["resources"])):
            sizes_text = [size_text(taken[name]) for name in ("file", "resident", "peak", "tables_mapped", "rows_touched")]
            faults = f"{taken['minor_faults']} + {taken['major_faults']}"
            loads = [f"{seconds(taken[name])} / {seconds(taken[name + '_cold'])}" for name in ("load", "first_token")]
            lines.append([f"{key.split()[1]}, {label}", *sizes_text, faults, *loads])
    head = ["model", "file", "resident", "peak", "tables mapped", "rows read", "page faults", "load, s", "first token, s"]
    return rows(head, *lines)


def type_section(results: dict[str, Result]) -> str:
    lines = []
    for kind in TYPES:
        result = results[f"type {kind}"]
        ratios = [interval(cell["ratio"]) for cell in result["cells"]]
        lines.append([kind, size_text(result["resources"]["tables"]), *ratios])
    return rows(["tables", "size", "decoding", "prefill of 128"], *lines)


def count_section(results: dict[str, Result]) -> str:
    lines = []
    for key, result in results.items():
        if not key.startswith("counted "):
            continue
        before, after = result["bytes"]
        planned = result["bytes_planned"]
        row = [key.split()[1], f"{before:,}", f"{planned[0]:,.0f}", f"{after:,}", f"{planned[1]:,.0f}"]
        if result["instructions"]:
            one, other = result["instructions"]
            row += [f"{one / 1e6:,.2f} M", f"{other / 1e6:,.2f} M", f"{1 - other / one:.2%}"]
        else:
            row += ["no valgrind"] * 3
        lines.append([*row, f"{result['products_eliminated']:.2%}"])
    head = ["model", "bytes read", "plan", "converted", "plan", "instructions", "converted", "fewer", "products saved, plan"]
    return rows(head, *lines)


def page(results: dict[str, Result]) -> str:
    where, of_draft = results["machine"], results["draft"]
    gpu = json.loads((DOCS / "gpu.json").read_text())
    parts = {
        "gpu": gpu_tables(gpu),
        "gpu_device": gpu["device"],
        "gpu_threads": gpu["threads"],
        "gpu_commit": gpu["commit"],
        "gpu_date": gpu["date"],
        "gpu_gather": gather_table(gpu["gather"]["us"]),
        "machine": f"{where['processors']} processors ({where['processor']}), {where['memory']},\n{where['system']}",
        "commit": where["commit"],
        "date": where["date"],
        "overview": overview(results),
        "depth": depth_section(results),
        "fading": fading_section(results),
        "real": real_section(results),
        "cache": cache_section(results),
        "cache_commit": results["cache machine"]["commit"],
        "cache_date": results["cache machine"]["date"],
        "demand": demand_section(results),
        "demand_commit": results["demand machine"]["commit"],
        "demand_date": results["demand machine"]["date"],
        "served": served_section(results),
        "memory": memory_section(results),
        "types": type_section(results),
        "counts": count_section(results),
        "prefill": str(PREFILL),
        "prompt": str(PROMPT),
        "draft": (
            f"SmolLM2 drafted by its own first {DRAFT_LAYERS} layers, in llama-server, greedily: with the draft converted,"
            f" an answer is {interval(of_draft['ratio'])} times as fast. The draft's own bound is"
            f" {of_draft['bound_of_draft']:.3f}, and it is a poor draft: of {of_draft['drafted']} drafted tokens,"
            f" {of_draft['accepted']} were accepted. The texts are"
            f" {'the same' if of_draft['same_text'] else 'different'}."
        ),
        "conversion": rows(
            ["first layer of", "prefill, tokens/s", "conversion, tokens/s", "ratio"],
            *[
                [
                    key.split()[1],
                    f"{result['prefill']:,.0f}",
                    f"{result['convert']:,.0f}",
                    f"{result['convert'] / result['prefill']:.2f}",
                ]
                for key, result in results.items()
                if key.startswith("conversion ")
            ],
        ),
    }
    return Path(__file__).with_name("study.md").read_text().format(**parts)


def draw() -> None:
    """Write the page and its plots."""
    (DOCS / "study.md").write_text(page(json.loads((DOCS / "study.json").read_text())))


if __name__ == "__main__":
    draw()
