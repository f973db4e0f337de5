"""`plan`: what tables, a row cache and demand would gain and cost, from the metadata of models or from a published shape."""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gguf_firstlayer import file_format
from gguf_firstlayer.cost import CostModel, all_of_file, both_of_file
from gguf_firstlayer.demand import N_TOKENS
from gguf_firstlayer.device import PROFILES, DevicePlan, device_plan, parse_device
from gguf_firstlayer.errors import FirstLayerError, UsageError
from gguf_firstlayer.estimate import BATCHES, PROMPT_TOKENS, TEXT_TOKENS, Plan, cached, estimate
from gguf_firstlayer.hub import ModelName, header, is_remote, model_name, models, models_among
from gguf_firstlayer.selection import describe_price
from gguf_firstlayer.shape import MAX_NUMBER, Shape, parse_shape
from gguf_firstlayer.text import change_text, count, log, numbers, printable, progress, show, show_table, size_text, to_json

# types for which the size of the tables is printed
SHOWN = ("q4_0", "q5_1", "q8_0", "f16", "f32")

# growth of the file that users may want to avoid
LARGE_GROWTH = 0.25

# the least speed-up that is worth a choice
NOTICEABLE = 1.001


def plan(
    model: ModelName | CostModel,
    *,
    type: str = "q8_0",
    batches: Sequence[int] = BATCHES,
    keep_weights: bool = False,
    device: str | None = None,
) -> Plan:
    """What tables, a row cache and demand would gain and cost.

    Args:
        model: a GGUF file, of a split model the first part; what `hub.local` takes, of which only the header is read; or
            `Shape(...).cost_model()`
        type: of the tables; "auto" is planned as q8_0
        batches: batch sizes to report the reads of
        keep_weights: for a conversion with `keep_weights`
        device: that holds all layers, one of `device.PROFILES` or its peaks, see `device.parse_device`

    Raises:
        UsageError: the type is unknown, or a batch size is not positive.
        FirstLayerError: as for `of_file`.
    """
    if not all(1 <= size <= MAX_NUMBER for size in batches):
        raise UsageError(f"a batch has between 1 and {MAX_NUMBER:,} tokens")
    wanted = file_format.table_type("q8_0" if type == "auto" else type)
    where = parse_device(device) if device else None
    demand = None
    if isinstance(model, CostModel):
        shape = for_cache = model
    else:
        path = header(model)
        try:
            shape, for_cache, demand = all_of_file(path)
        except FirstLayerError:  # perhaps llama.cpp aborted on a graph that embeds
            shape, for_cache = both_of_file(path)
    site_types = {site: file_format.fitting(wanted, site.width) for site in shape.sites}
    return replace(
        estimate(shape, site_types, batches, keep_weights),
        cache=cached(for_cache),
        demand=demand,
        device=device_plan(shape, site_types, where, keep_weights) if where else None,
    )


@dataclass(frozen=True)
class Plans:
    """Plans of several models.

    Attributes:
        plans: those that gain most in decoding first; where two files have one name, it has their folders
        refused: why the others have none, by name
    """

    plans: list[Plan]
    refused: dict[str, str]


def plan_all(names: ModelName | Sequence[ModelName], *, type: str = "q8_0", device: str | None = None) -> Plans:
    """Plan several models, each as `plan` does.

    Args:
        names: models; folders stand for all models in them, and `hf:user/repo` for all in this repository
        type: as for `plan`
        device: likewise

    Raises:
        UsageError: the type is unknown.
        FirstLayerError: a repository cannot be listed, or none of the models can be planned.
    """
    names = _expand([names] if isinstance(names, str | os.PathLike) else names)
    plans: dict[str, Plan] = {}
    refused: dict[str, str] = {}
    with progress("planning", len(names), "model") as bar:
        for name in names:
            try:
                plans[str(name)] = plan(name, type=type, device=device)
            except UsageError:
                raise
            except FirstLayerError as err:
                refused[str(name)] = str(err)
            bar.update()
    if not plans:
        raise FirstLayerError(next(iter(refused.values()), "there is no GGUF model; name a file, a folder or a repository"))
    alike = Counter(each.name for each in plans.values())
    told_apart = [replace(each, name=name) if alike[each.name] > 1 else each for name, each in plans.items()]
    return Plans(sorted(told_apart, key=lambda each: (-each.decode_bound, each.name)), refused)


def _expand(names: Sequence[ModelName]) -> list[ModelName]:
    found: list[ModelName] = []
    for name in names:
        if is_remote(name):
            found += models(str(name))
        elif os.path.isdir(name):
            found += map(Path, models_among(_files(name)))
        else:
            found.append(name)
    return found


def _files(folder: ModelName) -> list[str]:
    """The files in a folder and those below it, links to folders included."""
    found, seen = list[str](), set[str]()
    for path, folders, files in os.walk(folder, followlinks=True):
        if (place := os.path.realpath(path)) in seen:
            folders.clear()
        else:
            seen.add(place)
            found += [os.path.join(path, file) for file in files]
    return found


def _factor(value: float) -> str:
    """A ratio with three digits, or with all digits before the point: 12,346x, 1.98x, 0.73x."""
    return f"{value:,.0f}x" if value >= 100 else f"{value:.3g}x"


def text(result: Plan) -> list[str]:
    """The plan as lines of readable text."""
    lines = [
        f"{result.name}: {result.architecture}, {size_text(result.file_bytes)}, {result.parameters / 1e6:,.1f} M parameters"
    ]
    if not result.sites:
        return [*lines, f"nothing to precompute: {result.blocker}", *_demand(result)]

    lines += [f"site {describe_price(site)}" for site in result.sites]
    lines += [
        f"elided: {count(result.weights_eliminated, 'weight')}, {size_text(result.bytes_eliminated)};"
        f" {result.values_eliminated:,} values in matrices",
        "",
        f"{'read per batch':>14} {'values without':>16} {'with':>14} {'reduction':>10} {'bytes without':>14} {'with':>10}",
    ]
    for row in result.reads:
        lines.append(
            f"{row.batch:>14,} {row.values_without:>16,} {row.values_with:>14,} {_factor(row.reduction):>10}"
            f" {size_text(row.bytes_without):>14} {size_text(row.bytes_with):>10}"
        )
    sizes = ", ".join(f"{name} {size_text(result.table_bytes[name])}" for name in SHOWN)
    chosen = ", ".join(dict.fromkeys(site.type.name.lower() for site in result.sites))
    lines += [
        "",
        f"tables: {sizes}; below, {chosen}",
        f"file: {change_text(result.file_change)} ({result.file_change / result.file_bytes:+.1%})",
        f"memory: {change_text(result.resident_change)} after a text of {TEXT_TOKENS:,} tokens;"
        f" {change_text(result.accelerator_change)} on a device that holds all layers",
        f"decoding: {result.decode_bound:.4f}x at best, {size_text(result.decode_bytes_without)} of weights per token become"
        f" {size_text(result.decode_bytes_with)}",
        f"prefill: {result.prefill_bound:.4f}x at best, by operations",
    ]
    if result.file_change > LARGE_GROWTH * result.file_bytes:
        lines.append(
            "The file would grow a lot: convert --max-growth writes only the tables that save most, --type smaller ones."
        )
    if result.cache:
        memory = ", ".join(f"{size_text(n_bytes)} after {n:,}" for n, n_bytes in result.cache.memory.items())
        limit = f"; auto keeps {size_text(result.cache.auto_bytes)}"
        lines += [
            "",
            f"row cache: decoding {result.cache.decode_bound:.4f}x at best, prefill {result.cache.prefill_warm:.4f}x,"
            f" or {result.cache.prefill_cold:.4f}x for the first {PROMPT_TOKENS} tokens",
            f"    memory for rows of {size_text(result.cache.row_bytes)}: {memory} tokens of text"
            f"{limit if result.cache.auto_bytes < max(result.cache.memory.values()) else ''}",
            _advice(result),
        ]
    if result.device:
        lines += ["", *_device(result.device)]
    return [*lines, *_demand(result)]


# of a table of plans, and if a device is given
_COLUMNS = ("model", "size", "decoding", "prefill", "file", "cached", "new prompt", "demand", "embedding")
_DEVICE_COLUMNS = ("device decoding", "device prefill")
_CSV = (
    "name",
    "architecture",
    "file_bytes",
    "decode_bound",
    "prefill_bound",
    "file_change",
    "cache_decode_bound",
    "cache_prefill_cold",
    "blocker",
    "demand_prompt",
    "demand_embedding",
    "device_decode",
    "device_prefill",
)


def _row(result: Plan) -> list[str]:
    """A plan in one line: ratios of tables, a row cache, demand for a prompt and an embedding, and a device."""

    def ratios(*values: float | None) -> list[str]:
        return [f"{value:.4f}x" if value else "-" for value in values]

    tables = ratios(result.decode_bound, result.prefill_bound) if result.sites else ["-", "-"]
    cache = ratios(result.cache.decode_bound, result.cache.prefill_cold) if result.cache else ["-", "-"]
    demand = ratios(result.demand.prompt, result.demand.embedding) if result.demand else ["-", "-"]
    device = ratios(result.device.decode, result.device.prefill) if result.device else []
    change = f"{result.file_change / result.file_bytes:+.1%}"
    return [result.name, size_text(result.file_bytes), *tables, change, *cache, *demand, *device]


def _show_all(result: Plans, as_csv: bool) -> None:
    """Print plans, one line each."""
    if as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(_CSV)
        for each in result.plans:
            cache = (each.cache.decode_bound, each.cache.prefill_cold) if each.cache else ("", "")
            demand = (each.demand.prompt, each.demand.embedding) if each.demand else ("", "")
            device = (each.device.decode, each.device.prefill) if each.device else ("", "")
            figures = (each.file_bytes, each.decode_bound, each.prefill_bound, each.file_change, *cache)
            names = [printable(text) for text in (each.name, each.architecture, each.blocker)]
            writer.writerow([*names[:2], *figures, names[2], *demand, *device])
    else:
        columns = _COLUMNS + (_DEVICE_COLUMNS if any(each.device for each in result.plans) else ())
        show_table(columns, [_row(each) for each in result.plans])
    for reason in result.refused.values():
        log.info(reason)


def _device(result: DevicePlan) -> list[str]:
    """What tables change on a device."""
    slower = " Tables make it slower there: use the source." if max(result.decode, result.prefill) < 1 else ""
    return [
        f"{result.device}, with all layers: decoding {result.decode:.4f}x, a prompt of {N_TOKENS} tokens"
        f" {result.prefill:.4f}x.{slower}",
        f"    per token, {size_text(result.bus_without)} to the device become {size_text(result.bus_with)}, and"
        f" {size_text(result.memory_without)} of its memory {size_text(result.memory_with)};",
        f"    {size_text(result.freed)} of it are freed",
    ]


def _demand(result: Plan) -> list[str]:
    """What computing only what is read would save."""
    if result.demand is None:
        return []
    gains = [
        (result.demand.prompt, f"a prompt of {N_TOKENS} tokens"),
        (result.demand.embedding, f"an embedding (pooling {result.demand.pooling})"),
    ]
    told = [f"{ratio:.4f}x for {what}" for ratio, what in gains if ratio]
    if not told:
        return []
    lines = ["", f"demand: {', '.join(told)} at best, by operations"]
    if max(ratio for ratio, _ in gains if ratio) > NOTICEABLE:
        lines.append("    It takes no memory and no other file: --demand embeddings.")
    return lines


def _advice(result: Plan) -> str:
    """Which of tables and a row cache to choose."""
    if max(result.decode_bound, result.prefill_bound) < NOTICEABLE:
        return "Neither is worth the trouble: no clock would show the gain."
    if result.file_change < 0:
        return "Convert: the file gets smaller, and what the tables replace is not loaded at all."
    return "Choose the row cache, --firstlayer-cache auto: nearly the same speed, and the file stays as it is."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `plan`."""
    parser.add_argument(
        "paths",
        type=model_name,
        nargs="*",
        metavar="FILE.gguf",
        help="a model, or its first megabytes; for several, folders, or hf:USER/REPO, one line for each model",
    )
    parser.add_argument("--shape", metavar="KEY=N,...", help="instead of a file: " + ", ".join(Shape.__annotations__))
    parser.add_argument(
        "--batch", type=numbers, default=BATCHES, metavar="N,...", help=f"batch sizes (default: {','.join(map(str, BATCHES))})"
    )
    parser.add_argument(
        "--type",
        default="q8_0",
        metavar="TYPE",
        help="type of the tables (default: q8_0, also for auto)",
    )
    parser.add_argument(
        "--device",
        metavar="NAME",
        help=f"a device that holds all layers: {', '.join(PROFILES)}, or memory=GB/s,bus=GB/s,compute=TFLOP/s",
    )
    parser.add_argument("--csv", action="store_true", help="print one line of comma-separated values for each model")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    """Run `plan` from the command line."""
    if bool(args.paths) == (args.shape is not None):
        raise UsageError("give either a file, or a --shape")
    if args.csv and (args.json or args.shape is not None):
        raise UsageError("--csv is for plans of files, and without --json")
    names = _expand(args.paths)
    if args.csv or len(names) > 1 or names != args.paths:
        if args.batch is not BATCHES:
            raise UsageError("--batch is for a single file")
        plans = plan_all(names, type=args.type, device=args.device)
        if args.json:
            print(to_json(plans))
        else:
            _show_all(plans, args.csv)
        return 1 if any(str(name) in plans.refused for name in args.paths) else 0
    model = names[0] if names else parse_shape(args.shape).cost_model()
    show(plan(model, type=args.type, batches=args.batch, device=args.device), args.json, text)
    return 0
