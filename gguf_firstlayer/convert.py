"""`convert`: write a copy of a model whose first layer comes from tables."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, ReaderTensor
from tqdm import tqdm

from gguf_firstlayer import tables as tab
from gguf_firstlayer.errors import FirstLayerError
from gguf_firstlayer.runtime import Analysis, Site, analyse, library

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# of rows in F32, computed before they are written
CHUNK_BYTES = 32 << 20

TYPES = {
    kind.name.lower(): kind
    for kind in GGMLQuantizationType
    if kind.name not in ("F64", "I8", "I16", "I32", "I64", "Q8_1", "Q8_K")
}


@dataclass(frozen=True)
class Conversion:
    """What `convert` did.

    Attributes:
        source, output: files
        sites: with their places in the tables
        tables: that were added
        elided: weights that the output does not hold
        source_bytes, output_bytes: sizes of the files
    """

    source: Path
    output: Path
    sites: list[tab.Placed]
    tables: list[tab.Table]
    elided: list[tab.Elided]
    source_bytes: int
    output_bytes: int


class _Writer(GGUFWriter):
    """A GGUFWriter that starts from the keys of another file, copied byte for byte."""

    def __init__(self, reader: GGUFReader, architecture: str) -> None:
        super().__init__(None, architecture)
        self.kv_data[0].clear()  # the source has its architecture already
        self.data_alignment = int(reader.alignment)
        self._n_source_keys = int(reader.fields["GGUF.kv_count"].contents())
        start = sum(
            part.nbytes for name in ("version", "tensor_count", "kv_count") for part in reader.fields[f"GGUF.{name}"].parts
        )
        self._source_keys = reader.data[4 + start : reader.tensors[0].field.offset]

    @property
    def file(self) -> IO[bytes]:
        assert self.fout is not None
        return self.fout[0]

    def write_kv_data_to_file(self) -> None:
        self.file.seek(-8, os.SEEK_CUR)
        self.file.write(self._pack("Q", self._n_source_keys + len(self.kv_data[0])))
        self.file.write(self._source_keys.tobytes())
        super().write_kv_data_to_file()


def fingerprints(reader: GGUFReader, sites: Sequence[Site]) -> dict[str, str]:
    """SHA-256 of the weights that each site was computed from, by recipe.

    For every weight in the order of the names: its name, a zero byte, its type and its dimensions as 32 and 4 times 64 bit
    little-endian integers, and the SHA-256 of its data.
    """
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    weights: dict[str, bytes] = {}
    for name in sorted({name for site in sites for name in site.weights}):
        tensor = tensors[name]
        shape = ([int(size) for size in tensor.shape] + [1] * tab.MAX_DIMS)[: tab.MAX_DIMS]
        header = np.array([int(tensor.tensor_type)], "<u4").tobytes() + np.array(shape, "<u8").tobytes()
        weights[name] = name.encode() + b"\0" + header + hashlib.sha256(_data(reader, tensor)).digest()
    return {site.recipe: hashlib.sha256(b"".join(weights[name] for name in sorted(site.weights))).hexdigest() for site in sites}


def _data(reader: GGUFReader, tensor: ReaderTensor) -> memoryview:
    return reader.data[tensor.data_offset : tensor.data_offset + tensor.n_bytes].data


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    type: str = "q8_0",
    keep_weights: bool = False,
    force: bool = False,
) -> Conversion:
    """Write a copy of a GGUF model in which tables replace what its first layer computes from the token alone.

    All other tensors and keys are copied byte for byte. The output appears under its name when it is complete.

    Args:
        source: the model, which is not modified
        output: default: `x-flp.gguf` beside `x.gguf`
        type: ggml type of the tables, as llama.cpp spells it; where a site's width is no multiple of its block size, f16
        keep_weights: also keep the weights that the tables make superfluous, for LoRA on layer 0 and for batches of
            embeddings (images, audio)
        force: replace an existing output

    Raises:
        FirstLayerError: the model cannot be converted, or the output cannot be written; nothing is left behind.
    """
    source = Path(source)
    output = Path(output) if output is not None else source.with_name(f"{source.stem}-flp.gguf")
    kind = _table_type(type)
    reader = tab.open_gguf(source)
    _check(source, output, reader, force)

    with analyse(source) as analysis:
        if not analysis.sites:
            raise FirstLayerError(f"{source}: a {tab.architecture(reader)} model has nothing to precompute: {analysis.blocker}")

        tables, placed = tab.layout(analysis.sites, kind, analysis.n_vocab)
        prints = fingerprints(reader, analysis.sites)
        sites = [tab.Placed(s.name, s.recipe, s.width, table, column, prints[s.recipe]) for s, table, column in placed]
        dropped = set() if keep_weights else set(analysis.elidable)
        elided = [
            tab.Elided(t.name, t.tensor_type, tuple(int(size) for size in t.shape), t.n_bytes)
            for t in reader.tensors
            if t.name in dropped
        ]
        kept = [tensor for tensor in reader.tensors if tensor.name not in dropped]

        needed = sum(t.n_bytes for t in kept) + sum(t.bytes for t in tables) + reader.data_offset + (1 << 20)
        free = shutil.disk_usage(output.parent).free
        if needed > free:
            raise FirstLayerError(
                f"{output.parent} has {size_text(free)} free, the output takes {size_text(needed)}; choose another with -o"
            )

        with _replacing(output) as temporary:
            writer = _Writer(reader, tab.architecture(reader))
            for key, value, value_type, sub_type in tab.metadata(sites, elided):
                writer.add_key_value(key, value, value_type, sub_type)
            for tensor in kept:
                writer.add_tensor_info(
                    tensor.name, tensor.shape[::-1].tolist(), np.dtype(np.float32), tensor.n_bytes, tensor.tensor_type
                )
            for table in tables:
                writer.add_tensor_info(table.name, (table.rows, table.width), np.dtype(np.float32), table.bytes, table.type)

            writer.write_header_to_file(temporary)
            try:
                writer.write_kv_data_to_file()
                writer.write_ti_data_to_file()
                writer.write_padding(writer.file, writer.file.tell())
                for tensor in kept:
                    writer.file.write(_data(reader, tensor))
                    writer.write_padding(writer.file, tensor.n_bytes)
                _write_tables(writer, analysis, tables, placed)
                writer.file.flush()
                os.fsync(writer.file.fileno())
            finally:
                writer.close()

    return Conversion(source, output, sites, tables, elided, source.stat().st_size, output.stat().st_size)


def _table_type(name: str) -> GGMLQuantizationType:
    kind = TYPES.get(name.lower())
    if kind is None:
        raise FirstLayerError(f"unknown table type {name}; choose one of {', '.join(TYPES)}")
    if library().requires_imatrix(kind):
        raise FirstLayerError(f"ggml cannot quantize to {name} without an importance matrix; choose another --type")
    return kind


def _check(source: Path, output: Path, reader: GGUFReader, force: bool) -> None:
    """Refuse what can be refused from the header."""
    if reader.get_field(tab.KEY_VERSION) is not None:
        raise FirstLayerError(f"{source} is already converted; convert the original model")
    if not reader.tensors:
        raise FirstLayerError(f"{source} holds a vocabulary only, there are no weights to precompute from")
    split = reader.get_field("split.count")
    if split is not None and split.contents() > 1:
        raise FirstLayerError(f"{source} is one part of a split model; join it with llama-gguf-split --merge first")
    if output.exists() and output.samefile(source):
        raise FirstLayerError(f"{output} is the source itself; choose another name with -o")
    if output.is_dir() or not output.parent.is_dir():
        raise FirstLayerError(f"{output} cannot be written: it is a folder, or its folder does not exist")
    if output.exists() and not force:
        raise FirstLayerError(f"{output} exists; replace it with --force, or choose another name with -o")


@contextmanager
def _replacing(output: Path) -> Iterator[Path]:
    """A temporary file beside the output that takes its place in the end, or disappears."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{output.name}.", suffix=".part", dir=output.parent)
    except OSError as err:
        raise FirstLayerError(f"{output} cannot be written: {err.strerror}") from err
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes private files
        temporary.replace(output)
    except OSError as err:
        raise FirstLayerError(f"{output} cannot be written: {err.strerror}") from err
    finally:
        temporary.unlink(missing_ok=True)

    # the new name survives a power failure
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(output.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _write_tables(
    writer: _Writer, analysis: Analysis, tables: Sequence[tab.Table], placed: Sequence[tuple[Site, int, int]]
) -> None:
    """Compute the tables in chunks of tokens and write them at the end of the file, one after the other."""
    start: list[int] = []
    end = writer.file.tell()
    for table in tables:
        start.append(end)
        end += GGUFWriter.ggml_pad(table.bytes, writer.data_alignment)

    # the analysis returns the sites in the order of the graph, the tables have an order of their own
    offsets = dict(zip(analysis.sites, np.cumsum([0] + [site.width for site in analysis.sites]).tolist(), strict=False))
    columns = [
        np.concatenate([np.arange(offsets[site], offsets[site] + site.width) for site, number, _ in placed if number == i])
        for i in range(len(tables))
    ]

    n_chunk = max(1, CHUNK_BYTES // (4 * sum(site.width for site in analysis.sites)))
    with tqdm(total=analysis.n_vocab, unit="token", desc="tables", disable=None) as progress:
        for first in range(0, analysis.n_vocab, n_chunk):
            tokens = np.arange(first, min(first + n_chunk, analysis.n_vocab))
            rows = analysis.rows(tokens)
            for table, offset, column in zip(tables, start, columns, strict=True):
                writer.file.seek(offset + first * table.row_bytes)
                writer.file.write(library().quantize(rows[:, column], table.type).data)
            progress.update(len(tokens))

    writer.file.truncate(end)


def size_text(n: int) -> str:
    """Bytes as people read them."""
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB"


def summary(result: Conversion) -> str:
    """What was eliminated and what the file gained, one line each."""
    names = ", ".join(site.name for site in result.sites)
    eliminated = sum(weight.bytes for weight in result.elided)
    change = result.output_bytes - result.source_bytes
    table_bytes = sum(table.bytes for table in result.tables)
    lines = [
        f"{names} of every token now come from {len(result.tables)} table(s) of {size_text(table_bytes)}.",
        f"eliminated: {len(result.elided)} weights, {size_text(eliminated)}"
        + (f" ({', '.join(weight.name for weight in result.elided)})" if result.elided else " (--keep-weights)"),
        f"file: {size_text(result.source_bytes)} -> {size_text(result.output_bytes)} ({change / result.source_bytes:+.1%})",
        f"wrote {result.output}",
    ]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `convert`."""
    parser.add_argument("source", type=Path, metavar="IN.gguf", help="the model to convert; it is not modified")
    parser.add_argument("-o", "--output", type=Path, metavar="OUT.gguf", help="default: IN-flp.gguf beside IN.gguf")
    parser.add_argument(
        "--type", default="q8_0", metavar="TYPE", help=f"type of the tables: {', '.join(TYPES)} (default: q8_0)"
    )
    parser.add_argument("--keep-weights", action="store_true", help="for LoRA on layer 0, and for image or audio input")
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    """Run `convert` from the command line."""
    result = convert(args.source, args.output, type=args.type, keep_weights=args.keep_weights, force=args.force)
    print(to_json(result) if args.json else summary(result))
    return 0


def to_json(result: DataclassInstance) -> str:
    """A result as JSON: types by their names, files as strings."""

    def encode(value: object) -> object:
        return value.name.lower() if isinstance(value, GGMLQuantizationType) else str(value)

    def factory(items: list[tuple[str, object]]) -> dict[str, object]:
        return {key: encode(value) if isinstance(value, GGMLQuantizationType | Path) else value for key, value in items}

    return json.dumps(dataclasses.asdict(result, dict_factory=factory), indent=2)
