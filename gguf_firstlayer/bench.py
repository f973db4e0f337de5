"""`bench`: how much faster tables, a row cache or demand make a model, and how much of the possible gain that is."""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType

from gguf_firstlayer import file_format
from gguf_firstlayer.auto import sample_tokens
from gguf_firstlayer.c_api import RowCache, processors
from gguf_firstlayer.cost import of_file
from gguf_firstlayer.demand import EMBEDDINGS, HELP, POOLINGS, check_demand, own_pooling, saved
from gguf_firstlayer.errors import Caller, FirstLayerError, UsageError, option
from gguf_firstlayer.estimate import bound
from gguf_firstlayer.hub import ModelName, local, model_name
from gguf_firstlayer.isolation import isolated
from gguf_firstlayer.output import check
from gguf_firstlayer.pair import (
    NO_CACHE,
    Files,
    cache_size,
    context_length,
    open_cached,
    open_pair,
    open_source,
    parse_cache,
    try_out,
)
from gguf_firstlayer.plot import plot, plot_path, pyplot_module
from gguf_firstlayer.resources import Resources, all_resources
from gguf_firstlayer.runtime import Analysis, Site
from gguf_firstlayer.source import Source
from gguf_firstlayer.text import count, numbers, progress, show, size_text
from gguf_firstlayer.timing import (
    BLOCK_TOKENS,
    DISTURBED,
    MIN_ROUNDS,
    N_LOADS,
    Load,
    Ratio,
    Tokens,
    fill,
    pinning,
    place_anew,
    ratio,
    take_turns,
)

BATCHES, CONTEXTS = (1, 512), (0,)

# lengths of the texts that are embedded
TEXTS = (64, 512)


F32 = GGMLQuantizationType.F32

CELL_SECONDS = 16.0

MAX_TOKENS = 1 << 20

MAX_THREADS = 1024


UNKNOWN, FASTER, SLOWER = "no significant difference", "faster", "slower"
LIMITED = "faster; what is beyond the bound does not count"
IMPOSSIBLE, BUSY = "noise, beyond what is possible", "no verdict, the machine was busy with other work"


@dataclass(frozen=True)
class Cell:
    """A batch size at a context length.

    Attributes:
        batch: tokens per batch; 1 is decode, more is prefill
        context: tokens decoded before the batch
        rounds: number of blocks of each model
        disturbed: share of the blocks that other work on the machine disturbed; they are left out unless nearly all are
        source: median speed of the source, in tokens per second
        converted: speed of the converted model, or of the source with a row cache or demand: that of the source times the ratio
        ratio: this speed divided by that of the source
        bound: the highest ratio that is possible according to the plan
        verdict: what the ratio shows
        realised: the gain as a share of the bound's gain, if the verdict is "faster"
        limit: with `limit`, the speed with constants instead of lookups, divided by that of the source
        of_limit: with `limit`, the speed of the converted model divided by that with constants
    """

    batch: int
    context: int
    rounds: int
    disturbed: float
    source: float
    converted: float
    ratio: Ratio
    bound: float
    verdict: str
    realised: float | None
    limit: Ratio | None
    of_limit: Ratio | None


@dataclass(frozen=True)
class Bench:
    """What `bench` measured.

    Attributes:
        source, converted: files
        cache: of the source with a row cache instead of a converted file: how it was used in the last load; None otherwise
        demand: what is read, as given
        pooling: of the vectors, as given or chosen; None for logits
        threads: number of threads of each model
        pinned: whether each thread stayed on a processor of its own
        cells: by batch size and context
        resources_source, resources: of each model; None where the system does not report them
    """

    source: Path
    converted: Path
    threads: int
    pinned: bool
    cells: list[Cell]
    resources_source: Resources | None
    resources: Resources | None
    cache: RowCache | None
    demand: str | None
    pooling: str | None

    @property
    def other(self) -> str:
        """What the source is compared with."""
        return "converted" if self.source != self.converted else "cached" if self.cache else "demand"


def bench(
    source: ModelName,
    converted: ModelName | None = None,
    *,
    cache: float | str | None = None,
    demand: str | None = None,
    pooling: str | None = None,
    batches: Sequence[int] | None = None,
    contexts: Sequence[int] = CONTEXTS,
    threads: int = 0,
    limit: bool = False,
    resources: bool = True,
    loads: int = N_LOADS,
    seconds: float = CELL_SECONDS,
    random_tokens: bool = False,
) -> Bench:
    """Compare the speed of a converted model, or of a model with a row cache or demand, with its source's, in this process.

    The models take turns in short blocks, in random order, so that changes in the machine's speed affect both, and are loaded
    several times. Tokens come from the built-in sample, repeated from random places. The files are in the page cache.

    Args:
        source: GGUF file, or what `hub.local` takes; of a split model, the first part
        converted: likewise
        cache: instead of a converted file: MiB for a row cache of the source, or "auto". It is warm, unless tokens are random:
            the text has passed through it
        demand: what is read, "rows" or "embeddings": the rest is left out; alone, or beside tables or a row cache. With
            "embeddings", both models embed texts of the batch sizes
        pooling: of these embeddings, one of `demand.POOLINGS`; by default the model's own, or "last"
        batches: batch sizes in tokens; by default BATCHES, or TEXTS to embed
        contexts: numbers of tokens decoded before the batch
        threads: 0 for one on each processor that this process may use
        limit: also measure the ceiling, the same graph with constants instead of lookups
        resources: also measure memory, load time and time to the first token, each model in processes of its own
        loads: how often the models are loaded, at least twice
        seconds: for each batch size and context, over all loads
        random_tokens: random ids instead, as in llama-bench: unlike in a text, nearly every id is new

    Raises:
        UsageError: an argument is invalid.
        FirstLayerError: a file cannot be read or run, or is of the wrong kind.
    """
    check_demand(demand, pooling)
    embeds = demand == EMBEDDINGS
    # each once: what is measured twice would count as more loads
    batches = list(dict.fromkeys(map(int, (TEXTS if embeds else BATCHES) if batches is None else batches)))
    contexts = list(dict.fromkeys(map(int, contexts)))
    for size in (*batches, *contexts):
        if not 0 <= size <= MAX_TOKENS:
            raise UsageError(f"{size} is too long for a batch or a context; give {MAX_TOKENS:,} tokens at most")
    if not contexts or not batches or min(batches) < 1:
        raise UsageError("a batch needs at least one token")
    if not 0 <= threads <= MAX_THREADS:
        raise UsageError(f"{threads} is not a valid number of threads; give one between 1 and {MAX_THREADS}")
    if not 0 <= seconds < math.inf:
        raise UsageError(f"{seconds} is not a number of seconds")
    if embeds and any(contexts):
        name = "context" if Caller.is_command_line else "contexts"
        raise UsageError(f"an embedded text has no {option(name)} before it; leave it out")
    if converted is not None and cache is not None:
        raise UsageError(f"give a converted file or {option('cache')}, not both")
    if converted is None and cache is None and demand is None:
        raise UsageError(f"give either a converted file, or {option('cache')}, or {option('demand')}")
    if converted is None and limit:
        raise UsageError("the ceiling needs a converted file, whose tables constants replace")
    if loads < 2:
        raise UsageError("speed depends on where in memory a model is loaded; give at least two loads")
    path = local(source)
    if embeds:
        pooling = pooling or own_pooling(Source(path))
    if converted is not None:
        model, tables, files = open_pair(path, local(converted), pooling)
    elif cache is not None:
        model, files = open_cached(path, parse_cache(str(cache)), pooling)
        tables = model
    else:
        model = tables = open_source(path)
        files = Files((model,), pooling=pooling)
        try_out(files)
    files = files._replace(demand=demand, pooling=pooling)
    plain = Files((model,), pooling=pooling)
    longest = max(contexts) + max(BLOCK_TOKENS, *batches) + (0 if embeds else 1)
    if longest > context_length(model):
        raise FirstLayerError(f"the model has a context of {context_length(model)} tokens, {longest} are needed; give less")
    n_threads = threads or len(processors())
    expected = _bounds(model, tables, cache is not None, batches, contexts, demand, pooling)
    tokens = isolated(partial(_tokens, random_tokens), model.path)
    if cache is not None:
        with files.open(BLOCK_TOKENS, BLOCK_TOKENS) as run:
            if run.row_cache() is None:
                raise FirstLayerError(NO_CACHE.format(model.path))

    taken: list[Resources | None] = [None, None]
    if resources and sys.platform == "linux":
        taken = list(all_resources([plain, files], n_threads, tokens))

    n_ctx = longest
    n_batch = max(BLOCK_TOKENS, *batches)
    rng, pinned = random.Random(0), True
    measured: dict[tuple[int, int], list[Load]] = {(batch, context): [] for context in contexts for batch in batches}
    with progress("measuring", loads, "load") as bar:
        for _ in range(loads):
            for file in rng.sample([model, tables], 1 if tables is model else 2):
                place_anew(file)
            with ExitStack() as stack:
                # in random order, since the order decides which memory each gets
                kinds_of_run = [(plain, False), (files, False), (files, True)][: 3 if limit else 2]
                opened = {
                    kind: stack.enter_context(kind[0].open(n_ctx, n_batch, n_threads, kind[1]))
                    for kind in rng.sample(kinds_of_run, len(kinds_of_run))
                }
                runs = [opened[kind] for kind in kinds_of_run]
                pinned = stack.enter_context(pinning(runs[0], n_threads)) and pinned
                if files.cache and not random_tokens:
                    for first in range(0, len(tokens), n_batch):
                        runs[1].keep(0)
                        runs[1].time(tokens[first : first + n_batch], n_batch)
                for context in contexts:
                    for run in runs:
                        fill(run, tokens, context)
                    for batch in batches:
                        measured[batch, context].append(
                            take_turns(runs, tokens, batch, context, seconds / loads, rng, n_threads)
                        )
                used = runs[1].row_cache()
            bar.update()
    cells = [_cell(batch, context, loads, expected[batch, context]) for (batch, context), loads in measured.items()]
    return Bench(model.path, tables.path, n_threads, pinned, cells, taken[0], taken[1], used, demand, pooling)


def _bounds(
    model: Source,
    tables: Source,
    is_cached: bool,
    batches: Sequence[int],
    contexts: Sequence[int],
    demand: str | None,
    pooling: str | None,
) -> dict[tuple[int, int], float]:
    """The highest possible speed-up, by batch size and context."""
    bounds = {(batch, context): 1.0 for batch in batches for context in contexts}
    if is_cached or tables is not model:
        outline = of_file(model.path, for_cache=is_cached)
        site_types = dict.fromkeys(outline.sites, F32) if is_cached else _site_types(tables, outline.sites)
        bounds = {(batch, context): bound(outline, site_types, batch) for batch, context in bounds}
    if demand:
        for (batch, context), first in bounds.items():
            second = isolated(partial(saved, batch, context, pooling), model.path)
            left = 1 / first + 1 / second - 1  # of the work, if they leave out different parts of it
            bounds[batch, context] = 1 / left if left > 0 else math.inf
    return bounds


def _tokens(random_tokens: bool, path: Path) -> Tokens:
    """Token ids to decode; called through `isolated`."""
    with Analysis(path) as analysis:
        if random_tokens:
            return np.random.default_rng(0).integers(0, analysis.n_vocab, 1 << 16, np.int32)
        return sample_tokens(analysis)


def _site_types(file: Source, sites: Sequence[Site]) -> Mapping[Site, GGMLQuantizationType]:
    """The sites that come from tables in a converted file, and the types of these tables."""
    placed, tables, _ = file_format.read(file)
    types = {site.recipe: tables[site.table].type for site in placed}
    known = {site: types[site.recipe] for site in sites if site.recipe in types}
    if len(known) != len(types):
        raise FirstLayerError(f"{file.path} was not converted from this source; give the model that it was made from")
    return known


def _cell(batch: int, context: int, loads: Sequence[Load], expected: float) -> Cell:
    quiet = [load.quiet for load in loads if len(load.quiet) >= MIN_ROUNDS]
    busy = len(quiet) < max(2, len(loads) / 2)
    used = [load.times for load in loads] if busy else quiet
    converted = ratio([times[:, 0] / times[:, 1] for times in used])
    found = BUSY if busy else verdict(converted, expected)
    limit = of_limit = None
    if used[0].shape[1] == 3:
        limit = ratio([times[:, 0] / times[:, 2] for times in used])
        of_limit = ratio([times[:, 2] / times[:, 1] for times in used])
    blocks = np.concatenate(used)
    source = float(1 / np.median(blocks[:, 0]))
    return Cell(
        batch,
        context,
        len(blocks),
        float((np.concatenate([load.waited for load in loads]) > DISTURBED).mean()),
        source,
        source * converted.value,
        converted,
        expected,
        found,
        (converted.value - 1) / (expected - 1) if found == FASTER else None,
        limit,
        of_limit,
    )


def verdict(ratio: Ratio, bound: float) -> str:
    """The verdict on a ratio that was measured on a quiet machine."""
    if ratio.high < 1:
        return SLOWER
    if ratio.low <= 1:
        return UNKNOWN
    if ratio.value <= bound:
        return FASTER
    # the measurement is off by at least the excess over the bound
    return LIMITED if ratio.low - (ratio.value - bound) > 1 else IMPOSSIBLE


def summary(result: Bench) -> list[str]:
    """The result as lines of readable text."""

    def interval(ratio: Ratio) -> str:
        return f"{ratio.value:.4f} [{ratio.low:.4f}, {ratio.high:.4f}]"

    lines = [f"{count(result.threads, 'thread')}, {'each on a processor of its own' if result.pinned else 'not pinned'}"]
    if result.demand:
        lines.append(f"demand: {result.demand}" + (f", pooling {result.pooling}" if result.pooling else ""))
    for cell in result.cells:
        lines.append(
            f"batch {cell.batch}, context {cell.context}: {cell.source:.1f} -> {cell.converted:.1f} tokens/s,"
            f" ratio {interval(cell.ratio)}: {cell.verdict}"
        )
        share = f", {cell.realised:.0%} of its gain realised" if cell.realised is not None else ""
        lines.append(
            f"    bound by the plan {cell.bound:.4f}{share}; {count(cell.rounds, 'block')} each,"
            f" {cell.disturbed:.0%} of all were disturbed by other work"
        )
        if cell.limit and cell.of_limit:
            lines.append(f"    without any lookup {interval(cell.limit)}; of that, {interval(cell.of_limit)}")
    if result.cache:
        tokens = result.cache.hits + result.cache.misses
        lines.append(
            f"row cache: {result.cache.rows:,} of {result.cache.max_rows:,} rows, {size_text(result.cache.bytes)};"
            f" {result.cache.hits / max(1, tokens):.2%} of {tokens:,} tokens were hits,"
            f" {1e6 * result.cache.seconds / max(1, result.cache.misses):,.0f} us for each miss"
        )
    for name, taken in (("source", result.resources_source), (result.other, result.resources)):
        if taken is None:
            continue
        lines.append(
            f"{name}: file {size_text(taken.file)}, resident {size_text(taken.resident)} (from files"
            f" {size_text(taken.resident_files)}), peak {size_text(taken.peak)},"
            f" {taken.minor_faults} minor and {taken.major_faults} major page faults"
        )
        if taken.tables:
            lines.append(
                f"    tables {size_text(taken.tables)}, of which {size_text(taken.tables_mapped)} mapped for"
                f" {size_text(taken.rows_touched)} of rows"
            )
        for label, load, first in (
            ("empty", taken.load_cold, taken.first_token_cold),
            ("warm", taken.load, taken.first_token),
        ):
            if load is not None and first is not None:
                lines.append(f"    page cache {label}: loaded after {load:.3f} s, first token after {first:.3f} s")
            else:
                lines.append(f"    page cache {label}: could not be measured, the system keeps the file in memory")
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `bench`."""
    parser.add_argument("source", type=model_name, metavar="SOURCE.gguf")
    parser.add_argument("converted", type=model_name, nargs="?", metavar="CONVERTED.gguf")
    parser.add_argument(
        "--cache", type=cache_size, nargs="?", const="auto", metavar="MIB", help="instead, a row cache of the source"
    )
    parser.add_argument("--demand", metavar="WHAT", help=HELP)
    parser.add_argument("--pooling", metavar="TYPE", help=f"of the embeddings: {', '.join(POOLINGS)}")
    parser.add_argument("--batch", type=numbers, metavar="N,...", help="tokens per batch (default: 1,512; embedded, 64,512)")
    parser.add_argument("--context", type=numbers, default=CONTEXTS, metavar="N,...", help="tokens of context (default: 0)")
    parser.add_argument("--threads", type=int, metavar="N", help="default: one per processor")
    parser.add_argument("--ceiling", action="store_true", help="also measure constants instead of lookups: the highest gain")
    parser.add_argument("--limit", action="store_true", dest="ceiling", help=argparse.SUPPRESS)  # its old name
    parser.add_argument("--random-tokens", action="store_true", help="random ids instead of the tokens of a text")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write a plot of the ratios to this folder")


def main(args: argparse.Namespace) -> int:
    """Run `bench` from the command line."""
    if args.threads == 0:
        raise UsageError(f"0 is not a valid number of threads; give one between 1 and {MAX_THREADS}")
    if args.plot:
        pyplot_module()
        args.plot.mkdir(parents=True, exist_ok=True)
        args.source, args.converted = (local(name) if name else None for name in (args.source, args.converted))
        inputs = [path for path in (args.source, args.converted) if path]
        check(plot_path(inputs[-1], args.plot), inputs, force=True, argument="plot")
    result = bench(
        args.source,
        args.converted,
        cache=args.cache,
        demand=args.demand,
        pooling=args.pooling,
        batches=args.batch,
        contexts=args.context,
        threads=args.threads or 0,
        limit=args.ceiling,
        random_tokens=args.random_tokens,
    )
    show(result, args.json, summary)
    if args.plot:
        print(f"wrote {plot(result, args.plot)}", file=sys.stderr)
    return 0
