"""Tables compared with their source: whether they belong to it, and what their rows are worth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from gguf_firstlayer import auto, file_format
from gguf_firstlayer.auto import round_trip
from gguf_firstlayer.c_api import library
from gguf_firstlayer.runtime import Analysis, Site
from gguf_firstlayer.source import Source

N_ROWS = 64
# allowed error of a row: relative to the row, for products with 8-bit activations in other kernels, plus relative to the
# rounding error of the recomputed row
ROW_ERROR, ROW_ROUNDING = 0.02, 1.5


def foreign(model: Source, placed: Sequence[file_format.StoredSite], by_recipe: dict[str, Site]) -> list[str]:
    """What shows that tables belong to another model."""
    unknown = [site.name for site in placed if site.recipe not in by_recipe or by_recipe[site.recipe].width != site.width]
    if unknown:
        return [f"{', '.join(unknown)} of the converted file are computed differently in the source: it is from another model"]
    prints = file_format.fingerprints(model, [by_recipe[site.recipe] for site in placed])
    changed = [site.name for site in placed if prints[site.recipe] != site.fingerprint]
    if changed:
        return [f"{', '.join(changed)} were computed from other weights than the source has: convert it again"]
    return []


def check_rows(analysis: Analysis, file: Source, by_recipe: dict[str, Site]) -> tuple[int, float, list[str]]:
    """Recompute some rows.

    Returns:
        Their number, the share that is the same bit for bit, and the problems.
    """
    placed, tables, _ = file_format.read(file)
    random = np.random.default_rng(0)
    tokens = np.unique(np.append(random.integers(0, analysis.n_vocab, N_ROWS), [0, analysis.n_vocab - 1]))
    rows = analysis.rows(tokens)
    ends = np.cumsum([site.width for site in analysis.sites])
    exact = {site.recipe: rows[:, end - site.width : end] for site, end in zip(analysis.sites, ends.tolist(), strict=True)}

    wrong, same, problems = [], np.ones(len(tokens), bool), []
    for i, table in enumerate(tables):
        data = np.frombuffer(file.data(table.name), np.uint8).reshape(table.rows, -1)[tokens]
        for site in placed:
            if site.table != i:
                continue
            block, size = gguf.GGML_QUANT_SIZES[table.type]
            stored = np.ascontiguousarray(data[:, site.column // block * size : (site.column + site.width) // block * size])
            expected = library().quantize(exact[site.recipe], table.type)
            identical = (stored == expected).all(axis=1)
            same &= identical
            try:
                back = gguf.quants.dequantize(stored, table.type)
                rounding = round_trip(exact[site.recipe], table.type) - exact[site.recipe]
            except NotImplementedError:  # gguf-py cannot read the type
                bad = ~identical
            else:
                norm = np.linalg.norm(exact[site.recipe], axis=1)
                allowed = ROW_ERROR * norm + ROW_ROUNDING * np.linalg.norm(rounding, axis=1)
                bad = ~(np.linalg.norm(back - exact[site.recipe], axis=1) <= allowed)
            if bad.any():
                wrong.append(f"{site.name} of {bad.sum()} tokens, such as {tokens[bad][0]}")
    if wrong:
        problems.append(f"of {len(tokens)} rows recomputed, some differ from the tables: {'; '.join(wrong)}; convert again")
    return len(tokens), float(same.mean()), problems


def added(path: Path, analysis: Analysis, file: Source, ids: npt.NDArray[np.int32]) -> tuple[float, float] | None:
    """What tables add to the KL divergence over some tokens, and its standard error; None if gguf-py cannot read their type."""
    placed, tables, _ = file_format.read(file)
    sites = {site.recipe: site for site in analysis.sites}
    with auto.Effects(path, analysis, ids, n_measured=1) as effects:
        errors = {}
        for site in placed:
            table = tables[site.table]
            data = np.frombuffer(file.data(table.name), np.uint8).reshape(table.rows, -1)[effects.ids]
            try:
                rows = gguf.quants.dequantize(data, table.type)
            except NotImplementedError:
                return None
            exact = effects.exact[sites[site.recipe]]
            errors[sites[site.recipe]] = rows[:, site.column : site.column + site.width] - exact
        return effects.rise(errors, auto.ENLARGED)
