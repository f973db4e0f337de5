"""Tables compared with their source: whether they belong to it, and what their rows are worth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from gguf_firstlayer import auto, file_format
from gguf_firstlayer.runtime import IsolatedAnalysis, Site
from gguf_firstlayer.source import Source

N_ROWS = 64
# that are recomputed at once
CHUNK = 4096
# bytes of weights that are compared at once
PIECE = 16 << 20
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


def changed(model: Source, file: Source) -> list[str]:
    """What of a converted file, besides its tables and what they elide, is not its source's."""
    _, tables, elided = file_format.read(file)
    gone, own = {weight.name for weight in elided}, {table.name for table in tables}
    others = [name for name in model.tensors if name not in gone and not _same(model, file, name)]
    others += [name for name in file.tensors if name not in own and name not in model.tensors]
    others += [] if model.keys() == file.keys() else ["metadata"]
    if not others:
        return []
    told = ", ".join(others[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else "")
    return [f"{told} of the converted file differ from the source's: convert it again"]


def _same(model: Source, file: Source, name: str) -> bool:
    a, b = model.tensors[name], file.tensors.get(name)
    if b is None or (a.tensor_type, a.shape.tolist()) != (b.tensor_type, b.shape.tolist()):
        return False
    one, other = (np.frombuffer(source.data(name), np.uint8) for source in (model, file))
    return all(np.array_equal(one[i : i + PIECE], other[i : i + PIECE]) for i in range(0, len(one), PIECE))


def check_rows(analysis: IsolatedAnalysis, file: Source, every: bool) -> tuple[int, float, list[str]]:
    """Recompute all rows, or some at random: which ones, nobody who made the file can know.

    Returns:
        Their number, the share that is the same bit for bit, and the problems.
    """
    tokens = np.unique(np.append(np.random.default_rng().integers(0, analysis.n_vocab, N_ROWS), [0, analysis.n_vocab - 1]))
    chunks = np.array_split(np.arange(analysis.n_vocab), -(-analysis.n_vocab // CHUNK)) if every else [tokens]
    same, wrong = 0, dict[str, npt.NDArray[np.int64]]()
    placed, tables, _ = file_format.read(file)
    for chunk in chunks:
        identical, differ = _check_rows(analysis, file, placed, tables, chunk)
        same += identical
        for name, some in differ.items():
            wrong[name] = np.append(wrong.get(name, some[:0]), some)
    n_rows = sum(map(len, chunks))
    if not wrong:
        return n_rows, same / n_rows, []
    told = "; ".join(f"{name} of {len(some)} tokens, such as {some[0]}" for name, some in wrong.items())
    return n_rows, same / n_rows, [f"of {n_rows} rows recomputed, some differ from the tables: {told}; convert again"]


def _check_rows(
    analysis: IsolatedAnalysis,
    file: Source,
    placed: Sequence[file_format.StoredSite],
    tables: Sequence[file_format.Table],
    tokens: npt.NDArray[np.int64],
) -> tuple[int, dict[str, npt.NDArray[np.int64]]]:
    """The number of rows that are the same bit for bit, and for sites that differ, the tokens for which they do."""
    rows = analysis.rows(tokens)
    ends = np.cumsum([site.width for site in analysis.sites])
    exact = {site.recipe: rows[:, end - site.width : end] for site, end in zip(analysis.sites, ends.tolist(), strict=True)}

    wrong, same = {}, np.ones(len(tokens), bool)
    for i, table in enumerate(tables):
        data = np.frombuffer(file.data(table.name), np.uint8).reshape(table.rows, -1)[tokens]
        for site in placed:
            if site.table != i:
                continue
            block, size = gguf.GGML_QUANT_SIZES[table.type]
            stored = np.ascontiguousarray(data[:, site.column // block * size : (site.column + site.width) // block * size])
            expected = analysis.quantize(exact[site.recipe], table.type)
            identical = (stored == expected).all(axis=1)
            same &= identical
            try:
                back, rounded = (gguf.quants.dequantize(data, table.type) for data in (stored, expected))
            except NotImplementedError:  # gguf-py cannot read the type
                bad = ~identical
            else:
                norm = np.linalg.norm(exact[site.recipe], axis=1)
                allowed = ROW_ERROR * norm + ROW_ROUNDING * np.linalg.norm(rounded - exact[site.recipe], axis=1)
                bad = ~(np.linalg.norm(back - exact[site.recipe], axis=1) <= allowed)
            if bad.any():
                wrong[site.name] = tokens[bad]
    return int(same.sum()), wrong


def added(path: Path, analysis: IsolatedAnalysis, file: Source, ids: npt.NDArray[np.int32]) -> tuple[float, float] | None:
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
