"""`convert`: write a copy of a model whose first layer comes from tables."""

from __future__ import annotations

import argparse
import dataclasses
import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from tqdm import tqdm

from gguf_firstlayer import tables as tab
from gguf_firstlayer.errors import FirstLayerError
from gguf_firstlayer.paths import paths
from gguf_firstlayer.runtime import Analysis, Site, analyse, library
from gguf_firstlayer.source import Source

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

    def __init__(self, source: Source) -> None:
        super().__init__(None, source.architecture)
        self.kv_data[0].clear()  # the source has its architecture already
        self.data_alignment = int(source.parts[0].alignment)
        self._n_source_keys, self._source_keys = source.keys()

    @property
    def file(self) -> IO[bytes]:
        assert self.fout is not None
        return self.fout[0]

    def write_kv_data_to_file(self) -> None:
        self.file.seek(-8, os.SEEK_CUR)
        self.file.write(self._pack("Q", self._n_source_keys + len(self.kv_data[0])))
        self.file.write(self._source_keys)
        super().write_kv_data_to_file()


def fingerprints(source: Source, sites: Sequence[Site]) -> dict[str, str]:
    """SHA-256 of the weights that each site was computed from, by recipe.

    For every weight in the order of the names: its name, a zero byte, its type and its dimensions as 32 and 4 times 64 bit
    little-endian integers, and the SHA-256 of its data.
    """
    weights: dict[str, bytes] = {}
    for name in sorted({name for site in sites for name in site.weights}):
        tensor = source.tensors[name]
        shape = ([int(size) for size in tensor.shape] + [1] * tab.MAX_DIMS)[: tab.MAX_DIMS]
        header = np.array([int(tensor.tensor_type)], "<u4").tobytes() + np.array(shape, "<u8").tobytes()
        weights[name] = name.encode() + b"\0" + header + hashlib.sha256(source.data(name)).digest()
    return {site.recipe: hashlib.sha256(b"".join(weights[name] for name in sorted(site.weights))).hexdigest() for site in sites}


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    type: str = "q8_0",
    keep_weights: bool = False,
    split_max_size: str | None = None,
    force: bool = False,
) -> Conversion:
    """Write a copy of a GGUF model in which tables replace what its first layer computes from the token alone.

    All other tensors and keys are copied byte for byte. The output appears under its name when it is complete.

    Args:
        source: the model, which is not modified; of a split model, the first part
        output: default: `x-flp.gguf` beside `x.gguf`
        type: ggml type of the tables, as llama.cpp spells it; where a site's width is no multiple of its block size, f16
        keep_weights: also keep the weights that the tables make superfluous, for LoRA on layer 0 and for batches of
            embeddings (images, audio)
        split_max_size: split the output into parts `x-flp-00001-of-0000N.gguf` of this size at most, like "2G" or "500M"
            (`llama-gguf-split --split-max-size`)
        force: replace an existing output

    Raises:
        FirstLayerError: the model cannot be converted, or the output cannot be written; nothing is left behind.
    """
    kind = _table_type(type)
    model = Source(Path(source))
    output = Path(output) if output is not None else model.path.with_name(f"{model.stem}-flp.gguf")
    _check(model, output, split_max_size, force)

    with analyse(model.path) as analysis:
        if not analysis.sites:
            raise FirstLayerError(f"{model.path}: a {model.architecture} model has nothing to precompute: {analysis.blocker}")

        tables, placed = tab.layout(analysis.sites, kind, analysis.n_vocab)
        prints = fingerprints(model, analysis.sites)
        sites = [tab.Placed(s.name, s.recipe, s.width, table, column, prints[s.recipe]) for s, table, column in placed]
        dropped = set() if keep_weights else set(analysis.elidable)
        elided = [
            tab.Elided(t.name, t.tensor_type, tuple(int(size) for size in t.shape), t.n_bytes)
            for t in model.tensors.values()
            if t.name in dropped
        ]
        kept = [tensor for tensor in model.tensors.values() if tensor.name not in dropped]

        needed = sum(t.n_bytes for t in kept) + sum(t.bytes for t in tables) + model.parts[0].data_offset + (1 << 20)
        needed *= 2 if split_max_size else 1
        free = shutil.disk_usage(output.parent).free
        if needed > free:
            raise FirstLayerError(
                f"{output.parent} has {size_text(free)} free, the output takes {size_text(needed)}; choose another with -o"
            )

        with _replacing(output) as temporary:
            writer = _Writer(model)
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
                    writer.file.write(model.data(tensor.name))
                    writer.write_padding(writer.file, tensor.n_bytes)
                _write_tables(writer, analysis, tables, placed)
            finally:
                writer.close()
            if split_max_size:
                _split(temporary, split_max_size)
            first = min(temporary.parent.iterdir())
            library().check(first)
            output_bytes = sum(part.stat().st_size for part in temporary.parent.iterdir())

    return Conversion(model.path, output.with_name(first.name), sites, tables, elided, model.bytes, output_bytes)


def _split(path: Path, max_size: str) -> None:
    """Replace a file by parts of it, with llama.cpp's own tool."""
    tool = paths().get("gguf-split")
    if tool is None:
        raise FirstLayerError("llama-gguf-split is not built, so the output cannot be split")
    command: list[str | Path] = [tool, "--split", "--split-max-size", max_size, path, path.with_suffix("")]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        lines = (done.stderr + done.stdout).strip().splitlines() or ["it gave no reason"]
        raise FirstLayerError(f"the output cannot be split into parts of {max_size}: {lines[-1]}")
    path.unlink()


def _table_type(name: str) -> GGMLQuantizationType:
    kind = TYPES.get(name.lower())
    if kind is None:
        raise FirstLayerError(f"unknown table type {name}; choose one of {', '.join(TYPES)}")
    if library().requires_imatrix(kind):
        raise FirstLayerError(f"ggml cannot quantize to {name} without an importance matrix; choose another --type")
    return kind


def _check(model: Source, output: Path, split_max_size: str | None, force: bool) -> None:
    """Refuse what can be refused from the header."""
    if model.get_field(tab.KEY_VERSION) is not None:
        raise FirstLayerError(f"{model.path} is already converted; convert the original model")
    if not model.tensors:
        raise FirstLayerError(f"{model.path} holds a vocabulary only, there are no weights to precompute from")
    if split_max_size is not None and not re.fullmatch(r"[1-9]\d{0,6}[MG]", split_max_size):
        raise FirstLayerError(f"{split_max_size} is no size of a part; give one like 500M or 2G")
    if output.is_dir() or not output.parent.is_dir():
        raise FirstLayerError(f"{output} cannot be written: it is a folder, or its folder does not exist")
    outputs = [output] if output.exists() else []
    if split_max_size is not None:
        outputs = sorted(output.parent.glob(f"{glob.escape(output.stem)}-[0-9]*-of-[0-9]*.gguf"))
    for path in outputs:
        if any(path.samefile(part) for part in model.paths):
            raise FirstLayerError(f"{path} is the source itself; choose another name with -o")
        if not force:
            raise FirstLayerError(f"{path} exists; replace it with --force, or choose another name with -o")


@contextmanager
def _replacing(output: Path) -> Iterator[Path]:
    """A file of the output's name in a temporary folder beside it; what is in the folder moves out in the end."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".part", dir=output.parent))
    except OSError as err:
        raise FirstLayerError(f"{output} cannot be written: {err.strerror}") from err
    try:
        yield folder / output.name
        parts = sorted(folder.iterdir(), reverse=True)  # without its first part, a split model is not there
        for part in parts:
            _sync(part)
        for part in parts:
            part.replace(output.with_name(part.name))
        _sync(output.parent)
    except OSError as err:
        raise FirstLayerError(f"{output} cannot be written: {err.strerror}") from err
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sync(path: Path) -> None:
    """Write a file, or the names in a folder, to the disk."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_tables(
    writer: _Writer, analysis: Analysis, tables: Sequence[tab.Table], placed: Sequence[tuple[Site, int, int]]
) -> None:
    """Compute the tables in chunks of tokens and write them at the end of the file, one after the other."""
    start: list[int] = []
    end = writer.file.tell()
    for table in tables:
        start.append(end)
        end += GGUFWriter.ggml_pad(table.bytes, writer.data_alignment)

    # first value of each site in the rows that the analysis returns, which are in the order of the graph
    offsets = dict(zip(analysis.sites, np.cumsum([0] + [site.width for site in analysis.sites]).tolist(), strict=False))

    n_chunk = max(1, CHUNK_BYTES // (4 * sum(site.width for site in analysis.sites)))
    with tqdm(total=analysis.n_vocab, unit="token", desc="tables", disable=None) as progress:
        for first in range(0, analysis.n_vocab, n_chunk):
            tokens = np.arange(first, min(first + n_chunk, analysis.n_vocab))
            rows = analysis.rows(tokens)
            for i, table in enumerate(tables):
                table_rows = np.zeros((len(tokens), table.width), dtype=np.float32)
                for site, number, column in placed:
                    if number == i:
                        table_rows[:, column : column + site.width] = rows[:, offsets[site] : offsets[site] + site.width]
                writer.file.seek(start[i] + first * table.row_bytes)
                writer.file.write(library().quantize(table_rows, table.type).data)
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
    parser.add_argument("--split-max-size", metavar="N(M|G)", help="write parts of this size at most, as llama-gguf-split does")
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    """Run `convert` from the command line."""
    result = convert(
        args.source,
        args.output,
        type=args.type,
        keep_weights=args.keep_weights,
        split_max_size=args.split_max_size,
        force=args.force,
    )
    print(to_json(result) if args.json else summary(result))
    return 0


def to_json(result: DataclassInstance) -> str:
    """A result as JSON: types by their names, files as strings."""

    def encode(value: object) -> object:
        return value.name.lower() if isinstance(value, GGMLQuantizationType) else str(value)

    def factory(items: list[tuple[str, object]]) -> dict[str, object]:
        return {key: encode(value) if isinstance(value, GGMLQuantizationType | Path) else value for key, value in items}

    return json.dumps(dataclasses.asdict(result, dict_factory=factory), indent=2)
