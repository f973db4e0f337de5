"""`convert`: write a copy of a model whose first layer comes from tables."""

from __future__ import annotations

import argparse
import glob
import hashlib
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from gguf import GGUFWriter
from tqdm import tqdm

from gguf_firstlayer import auto, plan
from gguf_firstlayer import tables as tab
from gguf_firstlayer.errors import FirstLayerError
from gguf_firstlayer.paths import paths
from gguf_firstlayer.runtime import Analysis, Site, analyse, library
from gguf_firstlayer.source import Source
from gguf_firstlayer.text import size_text, to_json

# of rows in F32, computed before they are written
CHUNK_BYTES = 32 << 20


@dataclass(frozen=True)
class Conversion:
    """What `convert` did.

    Attributes:
        source, output: files
        sites: with their places in the tables
        tables: that were added
        elided: weights that the output does not hold
        fallbacks: names of sites whose table has another type than wanted, because its blocks do not divide their width
        left_out: sites that max_growth left out
        measurement: of the tables, if types were chosen by it
        unmeasured: why they were not, although they should have been; "" otherwise
        source_bytes, output_bytes: sizes of the files
        sidecar: whether the output has tables only, and is used with the source
        decode_bound, prefill_bound: how many times as fast that can be at most, see `plan`
    """

    source: Path
    output: Path
    sites: list[tab.Placed]
    tables: list[tab.Table]
    elided: list[tab.Elided]
    fallbacks: list[str]
    left_out: list[plan.SitePlan]
    measurement: tab.Measurement | None
    unmeasured: str
    source_bytes: int
    output_bytes: int
    sidecar: bool
    decode_bound: float
    prefill_bound: float


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
        assert self.fout is not None
        return self.fout[0]

    def write_kv_data_to_file(self) -> None:
        self.file.seek(-8, os.SEEK_CUR)
        self.file.write(self._pack("Q", self._n_source_keys + len(self.kv_data[0])))
        self.file.write(self._source_keys)
        super().write_kv_data_to_file()


def refuse_growth(growth: str) -> None:
    """Do not write a file that grows that much without being asked for."""
    raise FirstLayerError(f"{growth}; convert it with --yes, or fewer tables with --max-growth")


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
    type: str = "auto",
    max_kld: float = 1e-4,
    max_growth: str | float | None = None,
    keep_weights: bool = False,
    split_max_size: str | None = None,
    sidecar: bool = False,
    force: bool = False,
    confirm: Callable[[str], None] = refuse_growth,
) -> Conversion:
    """Write a copy of a GGUF model in which tables replace what its first layer computes from the token alone.

    All other tensors and keys are copied byte for byte. The output appears under its name when it is complete.

    Args:
        source: the model, which is not modified; of a split model, the first part
        output: default: `x-flp.gguf` beside `x.gguf`; of a sidecar, `x.firstlayer.gguf`
        type: ggml type of the tables, as llama.cpp spells it; where its blocks do not divide a site's width, the nearest that
            do. "auto" measures, and takes the smallest types whose effect cannot be told from none
        max_kld: the most that "auto" may add to the mean KL divergence of the next-token distribution, in nats
        max_growth: of the file, as "5%" or in bytes: the sites that together save most per token and fit are taken
        keep_weights: also keep the weights that the tables make superfluous, for LoRA on layer 0 and for batches of
            embeddings (images, audio)
        split_max_size: split the output into parts `x-flp-00001-of-0000N.gguf` of this size at most, like "2G" or "500M"
            (`llama-gguf-split --split-max-size`)
        sidecar: write the tables only, to be used with the source (`llama-server -m SOURCE --firstlayer OUTPUT`)
        force: replace an existing output
        confirm: called, if the file grows by more than a quarter and no max_growth is given, with a sentence that says so; by
            default it raises

    Raises:
        FirstLayerError: the model cannot be converted, or the output cannot be written; nothing is left behind.
    """
    wanted = None if type == "auto" else plan.table_type(type)
    model = Source(Path(source))
    output = (
        Path(output)
        if output is not None
        else model.path.with_name(f"{model.stem}.firstlayer.gguf" if sidecar else f"{model.stem}-flp.gguf")
    )
    _check(model, output, split_max_size, force)
    if not 0 <= max_kld < math.inf:
        raise FirstLayerError(f"{max_kld} is no bound on the KL divergence; give a number of nats like 1e-4")
    if sidecar and split_max_size is not None:
        raise FirstLayerError("a sidecar is not split; leave --split-max-size out")
    budget = math.inf if max_growth is None else _budget(max_growth, model.bytes)

    with analyse(model.path) as analysis:
        if not analysis.sites:
            raise FirstLayerError(f"{model.path}: a {model.architecture} model has nothing to precompute: {analysis.blocker}")

        outline = plan.of_model(model, analysis)
        measurement, unmeasured = None, ""
        if wanted is None:
            kinds, measurement, unmeasured = auto.choose(model, analysis, max_kld)
        else:
            kinds = {site: tab.fitting(wanted, site.width) for site in analysis.sites}
        if max_growth is None:
            _check_growth(outline, kinds, keep_weights, sidecar, confirm)
        chosen, left_out = _within(budget - _metadata_bytes(analysis), outline, kinds, keep_weights or sidecar)
        if left_out and measurement is not None:
            measurement = auto.measure_again(model, analysis, {site: kinds[site] for site in chosen}, max_kld)

        tables, placed = tab.layout(chosen, kinds, analysis.n_vocab)
        prints = fingerprints(model, chosen)
        sites = [tab.Placed(s.name, s.recipe, s.width, table, column, prints[s.recipe]) for s, table, column in placed]
        dropped = set() if keep_weights else set(outline.elided(chosen))
        elided = [
            tab.Elided(t.name, t.tensor_type, tuple(int(size) for size in t.shape), t.n_bytes)
            for t in model.tensors.values()
            if t.name in dropped
        ]
        kept = [] if sidecar else [tensor for tensor in model.tensors.values() if tensor.name not in dropped]

        needed = sum(t.n_bytes for t in kept) + sum(t.bytes for t in tables) + model.parts[0].data_offset + (1 << 20)
        needed *= 2 if split_max_size else 1
        free = shutil.disk_usage(output.parent).free
        if needed > free:
            raise FirstLayerError(
                f"{output.parent} has {size_text(free)} free, the output takes {size_text(needed)}; choose another with -o"
            )

        with replacing(output) as temporary:
            writer = _Writer(model, sidecar)
            origin = None if sidecar or len(model.parts) > 1 else tab.Origin(model.bytes, model.sha256(), model.header())
            samples = _samples(model, chosen, dropped) if sidecar else None
            for key, value, value_type, sub_type in tab.metadata(sites, elided, measurement, origin, samples):
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
            library().check(*((model.path, first) if sidecar else (first,)))
            output_bytes = sum(part.stat().st_size for part in temporary.parent.iterdir())

    expected = plan.make(outline, {site: kinds[site] for site in chosen})
    fallbacks = [site.name for site in chosen if wanted not in (None, kinds[site])]
    return Conversion(
        model.path, output.with_name(first.name), sites, tables, elided, fallbacks, left_out, measurement, unmeasured,
        model.bytes, output_bytes, sidecar, expected.decode_bound, expected.prefill_bound,
    )  # fmt: skip


def _samples(model: Source, sites: Sequence[Site], elided: Iterable[str]) -> dict[str, bytes]:
    """Some bytes of each weight that a sidecar replaces or was computed from, to tell the source by."""
    names = {name for site in sites for name in site.weights}.union(elided)
    data = {name: model.data(name) for name in sorted(names)}
    starts = {name: (len(weight) - tab.SAMPLE) // 2 for name, weight in data.items() if len(weight) >= tab.SAMPLE}
    return {name: bytes(data[name][start : start + tab.SAMPLE]) for name, start in starts.items()}


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


def _budget(max_growth: str | float, source_bytes: int) -> float:
    """Bytes that the file may grow by."""
    text = str(max_growth).strip()
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise FirstLayerError(f"{text} is no growth; give one like 5%, or a number of bytes")
    return value / 100 * source_bytes if text.endswith("%") else value


def _metadata_bytes(analysis: Analysis) -> int:
    """No less than the keys of a converted file take."""
    sites = sum(len(site.recipe) + len(site.name) + 256 for site in analysis.sites)
    return sites + sum(len(name) + 128 for name in analysis.elidable) + 4096


def _check_growth(
    outline: plan.Outline, kinds: auto.Kinds, keep_weights: bool, sidecar: bool, confirm: Callable[[str], None]
) -> None:
    """Ask whether to write a file that grows by much, or a sidecar that is large."""
    growth = plan.make(outline, kinds, keep_weights=keep_weights or sidecar).file_change
    if growth > plan.GROWTH_ASKED * outline.bytes:
        before, added = size_text(outline.bytes), f"{size_text(growth)} ({growth / outline.bytes:+.0%})"
        confirm(
            f"a sidecar of {outline.name} would take {added} beside its {before}"
            if sidecar
            else f"{outline.name} would grow from {before} by {added}"
        )


def _within(
    budget: float, outline: plan.Outline, kinds: auto.Kinds, keep_weights: bool
) -> tuple[list[Site], list[plan.SitePlan]]:
    """The sites that are worth their place in a budget, and the prices of the others."""
    chosen, left_out = plan.select(outline, kinds, budget, keep_weights)
    if not chosen:
        prices = "; ".join(map(plan.describe_price, left_out))
        raise FirstLayerError(f"no table of {outline.name} fits into --max-growth: {prices}")
    return chosen, left_out


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
def replacing(output: Path) -> Iterator[Path]:
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


def summary(result: Conversion) -> str:
    """What was eliminated and what the file gained, one line each."""
    names = ", ".join(site.name for site in result.sites)
    eliminated = sum(weight.bytes for weight in result.elided)
    change = result.output_bytes - result.source_bytes
    table_bytes = sum(table.bytes for table in result.tables)
    types = {site.name: result.tables[site.table].type.name.lower() for site in result.sites}
    command = ["python", "-m", "gguf_firstlayer", "run", "main", "-m", result.source if result.sidecar else result.output]
    command += ["--firstlayer", result.output] if result.sidecar else []
    what = "not loaded" if result.sidecar else "eliminated"
    before, after = size_text(result.source_bytes), size_text(result.output_bytes)
    files = f"{after} beside {before}" if result.sidecar else f"{before} -> {after} ({change / result.source_bytes:+.1%})"
    lines = [
        f"{names} of every token now come from {len(result.tables)} table(s) of {size_text(table_bytes)}.",
        f"{what}: {len(result.elided)} weights, {size_text(eliminated)}"
        + (f" ({', '.join(weight.name for weight in result.elided)})" if result.elided else " (--keep-weights)"),
        *(f"{name}: {types[name]}, as the blocks of the type wanted do not divide its width" for name in result.fallbacks),
        *(f"left out by --max-growth: {plan.describe_price(site)}" for site in result.left_out),
        *auto.describe(types, result.measurement, result.unmeasured),
        f"file: {files}",
        f"at best {result.decode_bound:.3f} times as fast in decoding, {result.prefill_bound:.3f} in prefill",
        f"wrote {result.output}",
        f'run it: {shlex.join(map(str, command))} -p "..."',
    ]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `convert`."""
    parser.add_argument("source", type=Path, metavar="IN.gguf", help="the model to convert; it is not modified")
    parser.add_argument("-o", "--output", type=Path, metavar="OUT.gguf", help="default: IN-flp.gguf beside IN.gguf")
    parser.add_argument(
        "--type", default="auto", metavar="TYPE", help=f"type of the tables: auto (default), {', '.join(tab.TYPES)}"
    )
    parser.add_argument(
        "--max-kld", type=float, default=1e-4, metavar="NATS", help="that auto may add to the KL divergence (default: 1e-4)"
    )
    parser.add_argument(
        "--max-growth", metavar="N%|BYTES", help="only tables that are worth it, while the file grows by no more"
    )
    parser.add_argument("--yes", action="store_true", help="whatever the file grows by")
    parser.add_argument("--keep-weights", action="store_true", help="for LoRA on layer 0, and for image or audio input")
    parser.add_argument("--split-max-size", metavar="N(M|G)", help="write parts of this size at most, as llama-gguf-split does")
    parser.add_argument("--sidecar", action="store_true", help="write the tables only, to IN.firstlayer.gguf; IN stays in use")
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _accept(_growth: str) -> None:
    pass


def _ask(growth: str) -> None:
    """Let the user at the terminal decide."""
    print(f"{growth}. Convert it all the same? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        refuse_growth(growth)


def main(args: argparse.Namespace) -> int:
    """Run `convert` from the command line."""
    result = convert(
        args.source,
        args.output,
        type=args.type,
        max_kld=args.max_kld,
        max_growth=args.max_growth,
        keep_weights=args.keep_weights,
        split_max_size=args.split_max_size,
        sidecar=args.sidecar,
        force=args.force,
        confirm=_accept if args.yes else _ask if sys.stdin.isatty() else refuse_growth,
    )
    print(to_json(result) if args.json else summary(result))
    return 0
