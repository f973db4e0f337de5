"""Writing a converted file or a sidecar: the source's keys and tensors as they are, then the tables."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
from gguf import GGUFWriter, ReaderTensor

from gguf_firstlayer import file_format
from gguf_firstlayer.c_api import library
from gguf_firstlayer.cost import CostModel, SiteTypes
from gguf_firstlayer.errors import FirstLayerError
from gguf_firstlayer.installation import paths
from gguf_firstlayer.runtime import Analysis, IsolatedAnalysis
from gguf_firstlayer.source import Source
from gguf_firstlayer.text import progress

# bytes of rows in F32 that are computed before they are written
CHUNK_BYTES = 32 << 20


@dataclass(frozen=True)
class Contents:
    """What an output holds.

    Attributes:
        model: its source
        sites: with their places in the tables
        tables: those that are added
        elided: weights elided from it
        spares: names of weights that it keeps for batches of embeddings only
        kept: tensors of the source that are copied
        is_sidecar: whether it holds only tables
    """

    model: Source
    sites: list[file_format.StoredSite]
    tables: list[file_format.Table]
    elided: list[file_format.Elided]
    spares: list[str]
    kept: list[ReaderTensor]
    is_sidecar: bool


def lay_out(
    model: Source, analysis: IsolatedAnalysis, types: SiteTypes, costs: CostModel, keep_weights: bool, sidecar: bool
) -> Contents:
    """Decide where each site is stored, and which tensors of the source are kept."""
    tables, placed = file_format.layout(list(types), types, analysis.n_vocab)
    fingerprints = file_format.fingerprints(model, list(types))
    sites = [
        file_format.StoredSite(site.name, site.recipe, site.width, table, column, fingerprints[site.recipe])
        for site, table, column in placed
    ]
    # beside a sidecar, the source has all weights
    unread = [] if keep_weights else costs.unread(list(types))
    spares = [] if sidecar else [name for name in unread if name in costs.spares]
    dropped = set(unread) - set(spares)
    tensors = model.tensors.values()
    left_out = [
        file_format.Elided(t.name, t.tensor_type, tuple(int(size) for size in t.shape), t.n_bytes)
        for t in tensors
        if t.name in dropped
    ]
    kept = [] if sidecar else [tensor for tensor in tensors if tensor.name not in dropped]
    return Contents(model, sites, tables, left_out, spares, kept, sidecar)


def write(path: Path, analysis: IsolatedAnalysis, contents: Contents, measurement: file_format.Measurement | None) -> None:
    """Write a file: the source's keys and ours, the tensors that are kept, and the tables, which are computed meanwhile."""
    model = contents.model
    writer = _Writer(model, contents.is_sidecar)
    origin = samples = None
    if contents.is_sidecar:
        samples = _samples(contents, analysis)
    else:
        origin = file_format.Origin([len(reader.data) for reader in model.parts], model.sha256(), model.headers())
    for key in file_format.metadata(contents.sites, contents.elided, contents.spares, measurement, origin, samples):
        writer.add_key_value(*key)
    for tensor in contents.kept:
        writer.add_tensor_info(
            tensor.name, tensor.shape[::-1].tolist(), np.dtype(np.float32), tensor.n_bytes, tensor.tensor_type
        )
    for table in contents.tables:
        writer.add_tensor_info(table.name, (table.rows, table.width), np.dtype(np.float32), table.bytes, table.type)

    writer.write_header_to_file(path)
    try:
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.write_padding(writer.file, writer.file.tell())
        for tensor in contents.kept:
            writer.file.write(model.data(tensor.name))
            writer.write_padding(writer.file, tensor.n_bytes)
        _write_tables(writer, analysis, contents)
    finally:
        writer.close()


class _Writer(GGUFWriter):
    """A GGUFWriter that starts from the keys of another file, copied byte for byte; for a sidecar, from none."""

    def __init__(self, source: Source, sidecar: bool) -> None:
        super().__init__(None, source.architecture)
        self._n_source_keys, self._source_keys = 0, b""
        if sidecar:
            self.add_type("firstlayer")
        else:
            self.kv_data[0].clear()  # the source has its architecture already
            self.data_alignment = int(source.parts[0].alignment)
            self._n_source_keys, self._source_keys = source.keys()

    @property
    def file(self) -> IO[bytes]:
        """The file that is written."""
        assert self.fout is not None
        return self.fout[0]

    def write_kv_data_to_file(self) -> None:
        """The source's keys, then those that were added."""
        self.file.seek(-8, os.SEEK_CUR)
        self.file.write(self._pack("Q", self._n_source_keys + len(self.kv_data[0])))
        self.file.write(self._source_keys)
        super().write_kv_data_to_file()


def _samples(contents: Contents, analysis: IsolatedAnalysis) -> dict[str, bytes]:
    """Some bytes of each weight that a sidecar replaces or was computed from, to recognise the source."""
    recipes = {site.recipe for site in contents.sites}
    names = {name for site in analysis.sites if site.recipe in recipes for name in site.weights}
    names |= {weight.name for weight in contents.elided}
    data = {name: contents.model.data(name) for name in sorted(names)}
    size = file_format.SAMPLE
    starts = {name: (len(weight) - size) // 2 for name, weight in data.items() if len(weight) >= size}
    return {name: bytes(data[name][start : start + size]) for name, start in starts.items()}


def split(path: Path, max_size: str) -> None:
    """Replace a file by its parts, with llama.cpp's own tool."""
    tool = paths().get("gguf-split")
    if tool is None:
        raise FirstLayerError("the output cannot be split without llama-gguf-split; build that target of llama.cpp")
    command: list[str | Path] = [tool, "--split", "--split-max-size", max_size, path, path.with_suffix("")]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        lines = (done.stderr + done.stdout).strip().splitlines() or ["it gave no reason"]
        raise FirstLayerError(f"the output cannot be split into parts of {max_size}: {lines[-1]}")
    path.unlink()


def _write_tables(writer: _Writer, analysis: IsolatedAnalysis, contents: Contents) -> None:
    """Compute the tables in chunks of tokens and write them at the end of the file, one after the other."""
    start: list[int] = []
    end = writer.file.tell()
    for table in contents.tables:
        start.append(end)
        end += GGUFWriter.ggml_pad(table.bytes, writer.data_alignment)

    n_chunk = max(1, CHUNK_BYTES // (4 * sum(site.width for site in analysis.sites)))
    with progress("tables", analysis.n_vocab, "token") as bar:
        for first in range(0, analysis.n_vocab, n_chunk):
            tokens = np.arange(first, min(first + n_chunk, analysis.n_vocab))
            rows = analysis.call(_table_rows, tokens, contents.sites, contents.tables)
            for i, table in enumerate(contents.tables):
                writer.file.seek(start[i] + first * table.row_bytes)
                writer.file.write(rows[i].data)
            bar.update(len(tokens))

    writer.file.truncate(end)


def _table_rows(
    analysis: Analysis,
    tokens: npt.NDArray[np.int64],
    sites: Sequence[file_format.StoredSite],
    tables: Sequence[file_format.Table],
) -> list[npt.NDArray[np.uint8]]:
    """Rows of the tables for some tokens, u8 [n, bytes of a row], in the child process of the analysis."""
    rows = analysis.rows(tokens)
    # first value of each site in the rows, which are in the order of the graph
    ends = np.cumsum([site.width for site in analysis.sites]).tolist()
    offsets = {site.recipe: end - site.width for site, end in zip(analysis.sites, ends, strict=True)}
    quantized = []
    for i, table in enumerate(tables):
        table_rows = np.zeros((len(tokens), table.width), dtype=np.float32)
        for site in sites:
            if site.table == i:
                offset = offsets[site.recipe]
                table_rows[:, site.column : site.column + site.width] = rows[:, offset : offset + site.width]
        quantized.append(library().quantize(table_rows, table.type))
    return quantized
