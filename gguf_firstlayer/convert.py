"""`convert`: write a copy of a model whose first layer comes from tables."""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from gguf import GGUFWriter

from gguf_firstlayer import auto, plan
from gguf_firstlayer import tables as tab
from gguf_firstlayer.errors import FirstLayerError, UsageError, option, program
from gguf_firstlayer.output import check, replacing
from gguf_firstlayer.paths import paths
from gguf_firstlayer.runtime import Analysis, Site, analyse, library
from gguf_firstlayer.source import Source
from gguf_firstlayer.text import change_text, count, log, progress, size_text, to_json

INTERRUPTED = ", nothing was written"

# names of weights that people are told; `inspect` tells all
LISTED = 4

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
) -> Conversion:
    """Write a copy of a GGUF model in which tables replace what its first layer computes from the token alone.

    All other tensors and keys are copied byte for byte. The output appears under its name when it is complete.

    Args:
        source: the model, which is not modified; of a split model, the first part
        output: default: `x-flp.gguf` beside `x.gguf`; of a sidecar, `x.firstlayer.gguf`
        type: ggml type of the tables, as llama.cpp spells it; where its blocks do not divide a site's width, the nearest that
            do. "auto" measures, and takes the smallest types whose effect cannot be told from none
        max_kld: the most that "auto" may add to the mean KL divergence of the next-token distribution, in nats
        max_growth: of the file, in per cent like "5%", or in bytes, also like "500M" or "2G" (powers of 1000): the sites that
            together save most per token and fit are taken
        keep_weights: also keep the weights that the tables make superfluous, for LoRA on layer 0 and for batches of
            embeddings (images, audio)
        split_max_size: split the output into parts `x-flp-00001-of-0000N.gguf` of this size at most, like "2G" or "500M"
            (`llama-gguf-split --split-max-size`)
        sidecar: write the tables only, to be used with the source (`llama-server -m SOURCE --firstlayer OUTPUT`)
        force: replace an existing output

    Raises:
        UsageError: an argument is not what it should be.
        FirstLayerError: the model cannot be converted, or the output cannot be written; nothing is left behind.
    """
    wanted = None if type == "auto" else plan.table_type(type)
    model = Source(Path(source))
    output = (
        Path(output)
        if output is not None
        else model.path.with_name(f"{model.stem}.firstlayer.gguf" if sidecar else f"{model.stem}-flp.gguf")
    )
    if not 0 <= max_kld < math.inf:
        raise UsageError(f"{max_kld} is no bound on the KL divergence; give a number of nats like 1e-4")
    if split_max_size is not None and not re.fullmatch(r"[1-9]\d{0,6}[MG]", split_max_size):
        raise UsageError(f"{split_max_size} is no size of a part; give one like 500M or 2G")
    if sidecar and split_max_size is not None:
        raise UsageError(f"a sidecar is not split; leave {option('split_max_size')} out")
    budget = math.inf if max_growth is None else _growth(max_growth, model.bytes)
    if model.get_field(tab.KEY_VERSION) is not None:
        raise FirstLayerError(f"{model.path} is already converted; convert the original model")
    if not model.tensors:
        raise FirstLayerError(f"{model.path} holds a vocabulary only, there are no weights to precompute from")
    check(output, model.paths, force, parts=split_max_size is not None)

    with analyse(model.path) as analysis:
        if not analysis.sites:
            raise FirstLayerError(f"{model.path}: a {model.architecture} model has nothing to precompute: {analysis.blocker}")

        outline = plan.of_model(model, analysis)
        keeps = keep_weights or sidecar
        if wanted is None:
            kinds, least, most = auto.types(outline.sites)
        else:
            kinds = least = most = {site: tab.fitting(wanted, site.width) for site in analysis.sites}
        growth = _Growth(max_growth, budget, _metadata_bytes(analysis))
        _within(growth, outline, least, keeps)
        _announce(outline, output, kinds, least, most, budget, keeps, sidecar)
        if math.isinf(budget):
            _check_room(output, _output_bytes(outline, kinds, keep_weights, sidecar), split_max_size)

        measurement, unmeasured = None, ""
        if wanted is None:
            kinds, measurement, unmeasured = auto.choose(model, analysis, max_kld)
        chosen, left_out = _within(growth, outline, kinds, keeps)
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

        chosen_kinds = {site: kinds[site] for site in chosen}
        _check_room(output, _output_bytes(outline, chosen_kinds, keep_weights, sidecar), split_max_size)

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

    expected = plan.make(outline, chosen_kinds)
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


class _Growth(NamedTuple):
    """What a file may grow by.

    Attributes:
        asked: by the caller
        bytes: that it is
        metadata: of them, those that keys take
    """

    asked: str | float | None
    bytes: float
    metadata: int


def _growth(max_growth: str | float, source_bytes: int) -> float:
    """Bytes that the file may grow by."""
    match = re.fullmatch(r"(-?\d+(?:\.\d*)?(?:e[+-]?\d+)?)([%KMG]?)", str(max_growth).strip())
    if match is None:
        raise UsageError(f"'{max_growth}' is no growth; give one like 5%, 500M or 2G, or a number of bytes")
    factors = {"": 1.0, "%": source_bytes / 100, "K": 1e3, "M": 1e6, "G": 1e9}
    return float(match[1]) * factors[match[2]]


def _metadata_bytes(analysis: Analysis) -> int:
    """No less than the keys of a converted file take."""
    sites = sum(len(site.recipe) + len(site.name) + 256 for site in analysis.sites)
    return sites + sum(len(name) + 128 for name in analysis.elidable) + 4096


def _announce(
    outline: plan.Outline,
    output: Path,
    kinds: auto.Kinds,
    least: auto.Kinds,
    most: auto.Kinds,
    budget: float,
    keeps: bool,
    sidecar: bool,
) -> None:
    """Say what the conversion will cost and gain, before it takes time."""
    expected = plan.make(outline, kinds)

    def change(of: auto.Kinds) -> str:
        growth = plan.make(outline, of, keep_weights=keeps).file_change
        return f"{change_text(growth)} ({growth / outline.bytes:+.0%})"

    if budget < math.inf:
        size = f"{change_text(budget)} at most"
    elif least == most:
        size = change(kinds)
    else:
        size = f"{change(least)} to {change(most)}, with q8_0 tables {change(kinds)}"
    smaller = f"smaller with {option('max_growth')} or {option('type')}"
    log.info(
        "%s: %s %s; at best %.4g times as fast in decoding, %.4g in prefill; %s",
        output.name, "beside the source," if sidecar else "size", size, expected.decode_bound, expected.prefill_bound, smaller,
    )  # fmt: skip


def _output_bytes(outline: plan.Outline, kinds: auto.Kinds, keep_weights: bool, sidecar: bool) -> int:
    """No less than the output takes."""
    growth = plan.make(outline, kinds, keep_weights=keep_weights or sidecar).file_change
    return growth + (0 if sidecar else outline.bytes) + (1 << 20)


def _check_room(output: Path, needed: int, split_max_size: str | None) -> None:
    """Refuse an output that the disk has no room for."""
    needed *= 2 if split_max_size else 1  # whole, and in parts
    free = shutil.disk_usage(output.parent).free
    if needed > free:
        raise FirstLayerError(
            f"{output.parent} has {size_text(free)} free, the output takes {size_text(needed)};"
            f" choose another with {option('output')}, or less with {option('max_growth')} or {option('type')}"
        )


def _within(growth: _Growth, outline: plan.Outline, kinds: auto.Kinds, keeps: bool) -> tuple[list[Site], list[plan.SitePlan]]:
    """The sites that are worth their place in a budget, and the prices of the others."""
    chosen, left_out, least = plan.select(outline, kinds, growth.bytes - growth.metadata, keeps)
    if not chosen:
        needed = least + growth.metadata
        prices = "; ".join(map(plan.describe_price, left_out))
        raise FirstLayerError(
            f"no table of {outline.name} fits into {option('max_growth', growth.asked)}, which is"
            f" {count(round(growth.bytes), 'byte')}; the least is {needed:,}, or {needed / outline.bytes:.2%}: {prices}"
        )
    return chosen, left_out


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
    with progress("tables", analysis.n_vocab, "token") as bar:
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
            bar.update(len(tokens))

    writer.file.truncate(end)


def summary(result: Conversion) -> str:
    """What was eliminated and what the file gained, one line each."""
    names = ", ".join(site.name for site in result.sites)
    eliminated = sum(weight.bytes for weight in result.elided)
    change = result.output_bytes - result.source_bytes
    table_bytes = sum(table.bytes for table in result.tables)
    types = {site.name: result.tables[site.table].type.name.lower() for site in result.sites}
    command = [*program(), "run", "main", "-m", result.source if result.sidecar else result.output]
    command += ["--firstlayer", result.output] if result.sidecar else []
    what = "not loaded" if result.sidecar else "eliminated"
    before, after = size_text(result.source_bytes), size_text(result.output_bytes)
    files = f"{after} beside {before}" if result.sidecar else f"{before} -> {after} ({change / result.source_bytes:+.1%})"
    verb = "comes" if len(result.sites) == 1 else "come"
    listed = ", ".join([*(weight.name for weight in result.elided[:LISTED]), *["..."][: len(result.elided) > LISTED]])
    lines = [
        f"{names} of every token now {verb} from {count(len(result.tables), 'table')} of {size_text(table_bytes)}.",
        f"{what}: {count(len(result.elided), 'weight')}, {size_text(eliminated)} ({listed or option('keep_weights', True)})",
        *(f"{name}: {types[name]}, as the blocks of the type wanted do not divide its width" for name in result.fallbacks),
        *(f"left out by {option('max_growth')}: {plan.describe_price(site)}" for site in result.left_out),
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
        "--max-growth", metavar="N%|N(K|M|G)", help="only tables that are worth it, while the file grows by no more"
    )
    parser.add_argument("--yes", action="store_true", help=argparse.SUPPRESS)  # of versions that asked before they wrote
    parser.add_argument("--keep-weights", action="store_true", help="for LoRA on layer 0, and for image or audio input")
    parser.add_argument("--split-max-size", metavar="N(M|G)", help="write parts of this size at most, as llama-gguf-split does")
    parser.add_argument("--sidecar", action="store_true", help="write the tables only, to IN.firstlayer.gguf; IN stays in use")
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


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
    )
    print(to_json(result) if args.json else summary(result))
    return 0
