"""`convert`: write a copy of a model whose first layer comes from tables."""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from gguf import GGMLQuantizationType

from gguf_firstlayer import auto, file_format
from gguf_firstlayer.cost import CostModel, of_model
from gguf_firstlayer.device import PROFILES, DevicePlan, device_plan
from gguf_firstlayer.errors import FirstLayerError, UsageError, option, program
from gguf_firstlayer.estimate import SitePlan, estimate
from gguf_firstlayer.hub import ModelName, is_remote, local, model_name
from gguf_firstlayer.output import check, replacing
from gguf_firstlayer.runtime import IsolatedAnalysis, analyse
from gguf_firstlayer.selection import Growth, describe_price, read_growth, within
from gguf_firstlayer.source import Source
from gguf_firstlayer.text import change_text, count, log, show, size_text
from gguf_firstlayer.writer import lay_out, split, write

INTERRUPTED = ", nothing was written"

# elided weights that the summary names; `inspect` lists all
LISTED = 4


@dataclass(frozen=True)
class Conversion:
    """What `convert` did.

    Attributes:
        source, output: files
        sites: with their places in the tables
        tables: those that were added
        elided: weights elided from the output
        spares: names of weights that it keeps for images, audio or hidden states, and does not read for tokens
        fallbacks: names of sites whose table has another type than requested, whose blocks do not fit the site's width
        left_out: sites that max_growth left out
        measurement: measured effect of the tables, if their types were chosen by it
        unmeasured: why types were not measured, although that was requested; "" otherwise
        source_bytes, output_bytes: sizes of the files
        sidecar: whether the output holds only tables, to be used with the source
        decode_bound, prefill_bound: the highest possible speed-up, see `plan`
        devices: what changes on some devices that hold all layers
    """

    source: Path
    output: Path
    sites: list[file_format.StoredSite]
    tables: list[file_format.Table]
    elided: list[file_format.Elided]
    spares: list[str]
    fallbacks: list[str]
    left_out: list[SitePlan]
    measurement: file_format.Measurement | None
    unmeasured: str
    source_bytes: int
    output_bytes: int
    sidecar: bool
    decode_bound: float
    prefill_bound: float
    devices: list[DevicePlan]


def convert(
    source: ModelName,
    output: str | os.PathLike[str] | None = None,
    *,
    type: str = "auto",
    max_kld: float = 1e-4,
    max_growth: str | float | None = None,
    keep_weights: bool = False,
    split_max_size: str | None = None,
    sidecar: bool = False,
    device: str | None = None,
    force: bool = False,
) -> Conversion:
    """Write a copy of a GGUF model in which tables replace what its first layer computes from the token alone.

    All other tensors and keys are copied byte for byte. The output appears under its name only when it is complete.

    Args:
        source: the model, which is not modified, or what `hub.local` takes; of a split model, the first part
        output: default: `x-flp.gguf` beside `x.gguf`; of a sidecar, `x_firstlayer.gguf`
        type: ggml type of the tables, as llama.cpp spells it; where its blocks do not divide a site's width, the nearest type
            that fits. "auto" measures, and takes the smallest types without a measurable effect
        max_kld: the most that "auto" may add to the mean KL divergence of the next-token distribution, in nats
        max_growth: how much the file may grow, in per cent like "5%", or in bytes, also like "500M" or "2G" (powers of 1000):
            of the sites that fit, those that together save most per token become tables
        keep_weights: keep the weights that would be elided, for LoRA on layer 0 and for batches of embeddings (images,
            audio)
        split_max_size: split the output into parts `x-flp-00001-of-0000N.gguf` of at most this size, like "2G" or "500M"
            (`llama-gguf-split --split-max-size`)
        sidecar: write only the tables, to be used with the source (`llama-server -m SOURCE --firstlayer OUTPUT`)
        device: whose kernels compute the rows, like "CUDA0", or HOST:PORT of an RPC server, so that the text equals the
            source's on that device; None for the CPU
        force: replace an existing output

    Raises:
        UsageError: an argument is invalid.
        FirstLayerError: the model cannot be converted, or the output cannot be written; nothing is left behind.
    """
    job = _prepare(source, output, type, max_kld, max_growth, keep_weights, split_max_size, sidecar, force)
    model = job.model
    with analyse(model.path, device) as analysis:
        if not analysis.sites:
            raise FirstLayerError(f"{model.path}: a {model.architecture} model has nothing to precompute: {analysis.blocker}")
        costs = of_model(model, analysis)
        selection = _select(job, analysis, costs)
        contents = lay_out(model, analysis, selection.types, costs, keep_weights, sidecar)
        _check_room(job, costs, selection.types)
        with replacing(job.output, force) as temporary:
            write(temporary, analysis, contents, selection.measurement)
            if split_max_size:
                split(temporary, split_max_size)
            first = min(temporary.parent.iterdir())
            analysis.check(*((model.path, first) if sidecar else (first,)))
            output_bytes = sum(part.stat().st_size for part in temporary.parent.iterdir())
            model.check_unchanged()

    expected = estimate(costs, selection.types)
    return Conversion(
        source=model.path,
        output=job.output.with_name(first.name),
        sites=contents.sites,
        tables=contents.tables,
        elided=contents.elided,
        spares=contents.spares,
        fallbacks=[site.name for site, chosen in selection.types.items() if job.type not in (None, chosen)],
        left_out=selection.left_out,
        measurement=selection.measurement,
        unmeasured=selection.unmeasured,
        source_bytes=model.bytes,
        output_bytes=output_bytes,
        sidecar=sidecar,
        decode_bound=expected.decode_bound,
        prefill_bound=expected.prefill_bound,
        devices=[device_plan(costs, selection.types, device, keep_weights) for device in PROFILES.values()],
    )


class _Job(NamedTuple):
    """The arguments of a conversion, checked as far as they and the headers allow; `type` is None if it is to be measured."""

    model: Source
    output: Path
    type: GGMLQuantizationType | None
    max_kld: float
    growth: Growth
    keep_weights: bool
    split_max_size: str | None
    sidecar: bool


def _prepare(
    source: ModelName,
    output: str | os.PathLike[str] | None,
    type: str,
    max_kld: float,
    max_growth: str | float | None,
    keep_weights: bool,
    split_max_size: str | None,
    sidecar: bool,
    force: bool,
) -> _Job:
    """Check what can be checked before the model is analysed."""
    wanted = None if type == "auto" else file_format.table_type(type)
    if not 0 <= max_kld < math.inf:
        raise UsageError(f"{max_kld} is not a bound on the KL divergence; give a number of nats like 1e-4")
    if split_max_size is not None and not re.fullmatch(r"[1-9]\d{0,6}[MG]", split_max_size):
        raise UsageError(f"{split_max_size} is not a size of parts; give one like 500M or 2G")
    if sidecar and split_max_size is not None:
        raise UsageError(f"a sidecar cannot be split; leave out {option('split_max_size')}")
    if output is not None and is_remote(source):
        check(Path(output), [], force, parts=split_max_size is not None)  # before a download
    model = Source(local(source))
    growth = read_growth(max_growth, model.bytes)
    if model.get_field(file_format.KEY_VERSION) is not None:
        raise FirstLayerError(f"{model.path} is already converted; convert the original model")
    default = f"{model.stem}_firstlayer.gguf" if sidecar else f"{model.stem}-flp.gguf"
    path = model.path.with_name(default) if output is None else Path(output)
    check(path, model.paths, force, parts=split_max_size is not None)
    return _Job(model, path, wanted, max_kld, growth, keep_weights, split_max_size, sidecar)


class _Selection(NamedTuple):
    """The sites that become tables, with their types; the sites left out; the measurement, or why there is none."""

    types: auto.SiteTypes
    left_out: list[SitePlan]
    measurement: file_format.Measurement | None
    unmeasured: str


def _select(job: _Job, analysis: IsolatedAnalysis, costs: CostModel) -> _Selection:
    """Choose sites and types, after announcing the cost."""
    if job.type is None:
        types, least, most = auto.types(costs.sites)
    else:
        types = least = most = {site: file_format.fitting(job.type, site.width) for site in costs.sites}
    keeps = job.keep_weights or job.sidecar
    within(job.growth, costs, least, keeps)
    _announce(job, costs, types, least, most)
    if not job.sidecar and job.model.holds_more:
        log.warning(
            "%s holds more than its metadata and tensors, which %s will lack: revert cannot restore it, so keep it",
            job.model.path.name,
            job.output.name,
        )
    if job.growth.asked is None:
        _check_room(job, costs, types)

    measurement, unmeasured = None, ""
    if job.type is None:
        types, measurement, unmeasured = auto.choose(job.model, analysis, job.max_kld)
    sites, left_out = within(job.growth, costs, types, keeps)
    types = {site: types[site] for site in sites}
    if left_out and measurement is not None:
        measurement = auto.measure_again(job.model, analysis, types, job.max_kld)
    return _Selection(types, left_out, measurement, unmeasured)


def _announce(job: _Job, costs: CostModel, types: auto.SiteTypes, least: auto.SiteTypes, most: auto.SiteTypes) -> None:
    """Announce what the conversion will cost and gain, before its slow part."""
    expected = estimate(costs, types)

    def change(of: auto.SiteTypes) -> str:
        growth = estimate(costs, of, keep_weights=job.keep_weights or job.sidecar).file_change
        return f"{change_text(growth)} ({growth / costs.bytes:+.0%})"

    if job.growth.asked is not None:
        size = f"{change_text(job.growth.bytes)} at most"
    elif least == most:
        size = change(types)
    else:
        size = f"{change(least)} to {change(most)}, with q8_0 tables {change(types)}"
    what = "beside the source," if job.sidecar else "size"
    log.info(
        f"{job.output.name}: {what} {size}; at best {expected.decode_bound:.4g} times as fast in decoding,"
        f" {expected.prefill_bound:.4g} in prefill; smaller with {option('max_growth')} or {option('type')}"
    )


def _check_room(job: _Job, costs: CostModel, types: auto.SiteTypes) -> None:
    """Refuse an output for which the disk has no room."""
    growth = estimate(costs, types, keep_weights=job.keep_weights or job.sidecar).file_change
    needed = growth + (0 if job.sidecar else costs.bytes) + (1 << 20)
    needed *= 2 if job.split_max_size else 1  # for the whole file and its parts
    folder = job.output.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise FirstLayerError(
            f"{folder} has only {size_text(free)} free, but the output needs {size_text(needed)}; choose another"
            f" folder with {option('output')}, or a smaller output with {option('max_growth')} or {option('type')}"
        )


def summary(result: Conversion) -> list[str]:
    """What was elided and what the file gained, one line each."""
    names = ", ".join(site.name for site in result.sites)
    elided = sum(weight.bytes for weight in result.elided)
    change = result.output_bytes - result.source_bytes
    table_bytes = sum(table.bytes for table in result.tables)
    types = {site.name: result.tables[site.table].type.name.lower() for site in result.sites}
    command = [*program(), "run", "main", "-m", result.source if result.sidecar else result.output]
    command += ["--firstlayer", result.output] if result.sidecar else []
    join = subprocess.list2cmdline if sys.platform == "win32" else shlex.join
    what = "not loaded" if result.sidecar else "elided"
    before, after = size_text(result.source_bytes), size_text(result.output_bytes)
    files = f"{after} beside {before}" if result.sidecar else f"{before} -> {after} ({change / result.source_bytes:+.1%})"
    verb = "comes" if len(result.sites) == 1 else "come"
    listed = ", ".join([*(weight.name for weight in result.elided[:LISTED]), *["..."][: len(result.elided) > LISTED]])
    slowest = min(result.devices, key=lambda device: device.decode)
    on_gpu = f"on a GPU that holds all layers: {slowest.decode:.3f} on an {slowest.device}"
    kept = "vectors as input need them" if result.spares else option("keep_weights", True)
    lines = [
        f"{names} of every token now {verb} from {count(len(result.tables), 'table')} of {size_text(table_bytes)}.",
        f"{what}: {count(len(result.elided), 'weight')}, {size_text(elided)} ({listed or kept})",
        *([f"read only for images, audio or hidden states: {count(len(result.spares), 'weight')}"] if result.spares else []),
        *(f"{name}: {types[name]}, as the blocks of the requested type do not divide its width" for name in result.fallbacks),
        *(f"left out by {option('max_growth')}: {describe_price(site)}" for site in result.left_out),
        *auto.describe(types, result.measurement, result.unmeasured),
        f"file: {files}",
        f"at best {result.decode_bound:.3f} times as fast in decoding, {result.prefill_bound:.3f} in prefill",
        *([f"slower in decoding {on_gpu}"] if round(slowest.decode, 3) < 1 else []),
        f"wrote {result.output}",
        f'run it: {join(list(map(str, command)))} -p "..."',
    ]
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `convert`."""
    parser.add_argument(
        "source", type=model_name, metavar="IN.gguf", help="the model to convert; it is not modified; or hf:USER/REPO[:QUANT]"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="OUT.gguf", help="default: IN-flp.gguf beside IN.gguf")
    parser.add_argument(
        "--type", default="auto", metavar="TYPE", help=f"type of the tables: auto (default), {', '.join(file_format.TYPES)}"
    )
    parser.add_argument(
        "--max-kld", type=float, default=1e-4, metavar="NATS", help="KL divergence that auto may add (default: 1e-4)"
    )
    parser.add_argument(
        "--max-growth", metavar="N%|N(K|M|G)", help="let the file grow by at most this, with the tables that save most"
    )
    parser.add_argument("--yes", action="store_true", help=argparse.SUPPRESS)  # from versions that asked before writing
    parser.add_argument("--keep-weights", action="store_true", help="elide nothing, for LoRA on layer 0, image or audio input")
    parser.add_argument("--split-max-size", metavar="N(M|G)", help="write parts of at most this size, as llama-gguf-split does")
    parser.add_argument("--sidecar", action="store_true", help="write only the tables, to IN_firstlayer.gguf, for use with IN")
    parser.add_argument(
        "--device", metavar="NAME|HOST:PORT", help="compute the rows there, for use there (default: on the CPU), like CUDA0"
    )
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
        device=args.device,
        force=args.force,
    )
    show(result, args.json, summary)
    return 0
