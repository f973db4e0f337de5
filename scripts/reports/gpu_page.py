"""The tables of docs/study.md about GPUs. Imports no more than scripts/test-gpu packs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gguf_firstlayer.text import size_text

Result = dict[str, Any]


def interval(value: Result) -> str:
    """A ratio with its interval; in parentheses if it does not differ significantly from 1."""
    text = f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
    return f"({text})" if value["low"] <= 1 <= value["high"] else text


def rows(*lines: Sequence[str]) -> str:
    head, *body = lines
    ruler = ["---", *["--:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ruler, *body)) + "\n"


def gpu_tables(found: Result) -> str:
    """What scripts/reports/gpu.py measured."""

    def shown(cell: Result, variant: str) -> str:
        value = cell[variant]
        return interval(dict(zip(("value", "low", "high"), value, strict=True))) if value else "not measured"

    speeds = [["model", "tokens", "source, tokens/s", "with tables", "with a row cache", "ceiling"]]
    needs = [["model", "bounds: bytes, multiplications", "memory of the source, MiB", "with tables", "with a row cache"]]
    for model in found["models"]:
        name = f"{model['model']}, {model['type']}"
        for cell in model["cells"]:
            ratios = [shown(cell, variant) for variant in ("converted", "cached", "constants")]
            speeds.append([name, f"{cell['batch']:,}", f"{cell['source']:,.0f}", *ratios])
        taken = [f"{model['device_mib'][variant]:,}" for variant in ("source", "converted", "cached")]
        needs.append([name, f"{model['decode_bound']:.3f}, {model['prefill_bound']:.3f}", *taken])
    return rows(*speeds) + "\n" + rows(*needs)


def gather_table(us: dict[str, dict[str, int]]) -> str:
    """Microseconds of a prompt, by the size from which on all threads look up."""
    sizes = list(us["source"])
    limits = {key: f"tables, threads from {size_text(int(key))} on" for key in us if key != "source"}
    limits[max(limits, key=int)] = "tables, one thread"
    names = {"source": "source"} | limits
    return rows(["tokens", *sizes], *([name, *(f"{us[key][size]:,}" for size in sizes)] for key, name in names.items()))
