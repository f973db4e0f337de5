"""What tables, a row cache and demand would gain for published models: writes docs/gains.md."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from support.builds import ROOT, STOCK

from gguf_firstlayer.cost import of_model
from gguf_firstlayer.demand import demand_plan
from gguf_firstlayer.device import PROFILES, device_plan
from gguf_firstlayer.estimate import Plan, cached, estimate
from gguf_firstlayer.file_format import fitting, table_type
from gguf_firstlayer.runtime import Analysis, find_spares
from gguf_firstlayer.source import Source, without_data
from gguf_firstlayer.text import size_text

DOC = ROOT / "docs" / "gains.md"
MATRICES, TABLES, DEVICE = "Q4_K", "q8_0", "rtx-4090"

HEAD = Path(__file__).with_name("gains.md").read_text(encoding="utf-8")

NONE = """
Nothing to precompute:

| model | architecture | why | prompt by demand |
|---|---|---|--:|
"""


def headers(folder: Path) -> list[Path]:
    """Write headers of all models of the catalogue."""
    environment = os.environ | {"LLAMA_CPP_LIB_PATH": str(STOCK), "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, Path(__file__).with_name("catalogue.py"), folder, MATRICES]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return sorted(folder.iterdir())


def plan_of(path: Path) -> tuple[Plan, int]:
    """The plan of a header, and its number of layers."""
    with without_data(path) as whole:
        source = Source(whole)
        with Analysis(whole, load_vocab=False) as analysis:
            analysis.spares = (find_spares(whole) or ()) if analysis.sites else ()
            outline = of_model(source, analysis)
        with Analysis(whole, load_vocab=False, for_cache=True) as analysis:
            cache = cached(of_model(source, analysis))
        field = source.get_field(f"{source.architecture}.block_count")
        assert field
        site_types = {site: fitting(table_type(TABLES), site.width) for site in outline.sites}
        result = replace(
            estimate(outline, site_types),
            cache=cache,
            demand=demand_plan(whole, source),
            device=device_plan(outline, site_types, PROFILES[DEVICE]),
        )
        return result, int(field.contents())


def count_text(n: float) -> str:
    """A number of parameters as readable text."""
    return f"{n / 1e9:,.1f} B" if n >= 1e9 else f"{n / 1e6:,.1f} M"


def prompt(plan: Plan) -> str:
    """What demand gains for a prompt."""
    return f"{plan.demand.prompt:.4f}" if plan.demand and plan.demand.prompt else ""


def row(plan: Plan, layers: int) -> str:
    """A plan's row in the table."""
    name = plan.name.removesuffix(".gguf")
    stored = sum(site.width for site in plan.sites)
    device = f"-{size_text(-plan.accelerator_change)}"
    assert plan.cache
    assert plan.device
    return (
        f"| {name} | {plan.architecture} | {layers} | {count_text(plan.parameters)} | {stored:,} |"
        f" {count_text(plan.values_eliminated)} | {plan.decode_bound:.4f} | {plan.prefill_bound:.4f} |"
        f" {plan.file_change / plan.file_bytes:+.1%} | {device} | {plan.cache.decode_bound:.4f} |"
        f" {plan.cache.prefill_cold:.4f} | {size_text(plan.cache.memory[4096])} | {prompt(plan)} |"
        f" {plan.device.decode:.3f} / {plan.device.prefill:.3f} |"
    )


def page(paths: Iterable[Path]) -> str:
    """The text of docs/gains.md, from headers of models."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # whose children find the spares
        plans = list(pool.map(plan_of, paths))
    plans.sort(key=lambda item: -item[0].decode_bound)
    head = HEAD.format(count=len(plans), matrices=MATRICES, tables=TABLES, device=DEVICE)
    lines = [row(plan, layers) for plan, layers in plans if plan.sites]
    none = [
        f"| {plan.name.removesuffix('.gguf')} | {plan.architecture} | {plan.blocker} | {prompt(plan)} |"
        for plan, _ in plans
        if not plan.sites
    ]
    return head + "\n".join(lines) + "\n" + NONE + "\n".join(none) + "\n"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        DOC.write_text(page(headers(Path(folder))), encoding="utf-8")
