"""`bench`: how much faster a converted model is than its source, and of what that is a share."""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from gguf_firstlayer import tables as tab
from gguf_firstlayer.auto import sample_tokens
from gguf_firstlayer.errors import FirstLayerError, UsageError
from gguf_firstlayer.isolation import isolated
from gguf_firstlayer.output import check
from gguf_firstlayer.plan import bound, of_file
from gguf_firstlayer.runtime import Analysis, Run, Site, library
from gguf_firstlayer.source import Source
from gguf_firstlayer.text import count, numbers, progress, size_text, to_json
from gguf_firstlayer.verify import Files, context_length, open_pair

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

BATCHES, CONTEXTS = (1, 512), (0,)

# A block is so many tokens of one model, short enough that the machine does not change its mood in between
BLOCK_SECONDS, BLOCK_TOKENS = 0.05, 32

# Where the system puts a model in memory makes it faster or slower by some per cent, for as long as it is loaded. So models are
# loaded so often, and each time a cell is measured in so many blocks of each model at least
N_LOADS, MIN_ROUNDS = 8, 3
# A block is disturbed if its threads waited for a processor, or another machine had theirs, for more than this share of it.
# Blocks that are disturbed are measured again, for so many times the time at most
DISTURBED, PATIENCE = 0.02, 3
# seconds that a thread waits if another one takes its processor, where the system only counts how often that happens
TIME_SLICE = 0.004
CELL_SECONDS = 16.0
N_BOOTSTRAP = 2000
PINNING_SECONDS = 0.2

MAX_TOKENS = 1 << 20

# of the resources: a prompt, tokens that are generated, and how often a model is loaded
PROMPT, GENERATED, N_PROCESSES = 128, 32, 3

CHUNK_BYTES = 1 << 20
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096

Seconds = npt.NDArray[np.float64]
Tokens = npt.NDArray[np.int32]

UNKNOWN, FASTER, SLOWER = "no difference that could be told", "faster", "slower"
LIMITED = "faster; what is beyond the bound does not count"
IMPOSSIBLE, BUSY = "noise, beyond what tables can gain", "no verdict, the machine was busy with other work"


@dataclass(frozen=True)
class Ratio:
    """A ratio of speeds, and what is known of it.

    Attributes:
        value: mean over loads of the median over pairs of blocks
        low, high: 95 % bootstrap interval over loads
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Cell:
    """A batch size at a length of context.

    Attributes:
        batch: tokens decoded at once; 1 is decoding, more is prefill
        context: tokens before them
        rounds: blocks of each model
        disturbed: share of the blocks that other work on the machine disturbed; they are left out unless nearly all are
        source: speed, the median in tokens per second
        converted: speed, that of the source times the ratio
        ratio: speed of the converted model by that of the source
        bound: that the plan predicts for it, beyond which it cannot be
        verdict: what can be said with the ratio
        realised: the gain as a share of the gain of the bound, if the verdict is "faster"
        limit: with `limit`, the speed of constants instead of lookups by that of the source
        of_limit: with `limit`, the speed of the converted model by that of constants
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
class Resources:
    """What a model takes in a process of its own, which decodes a prompt and generates some tokens. Bytes and seconds.

    Attributes:
        file: size
        resident: memory after that, of files and others
        resident_files: the part of it that is mapped from files
        peak: most memory at any time
        minor_faults, major_faults: of pages, from opening the model on
        tables: bytes of the tables
        tables_mapped: of them, in pages that the process has touched or that Linux mapped with those
        rows_touched: bytes of the rows that were looked up
        load_cold, load: seconds to load it when the page cache is empty, and when it is not; None where it cannot be emptied
        first_token_cold, first_token: from the start of loading to the logits of a first token
    """

    file: int
    resident: int
    resident_files: int
    peak: int
    minor_faults: int
    major_faults: int
    tables: int
    tables_mapped: int
    rows_touched: int
    load_cold: float | None
    load: float
    first_token_cold: float | None
    first_token: float


@dataclass(frozen=True)
class Bench:
    """What `bench` measured.

    Attributes:
        source, converted: files
        threads: of each model
        pinned: whether each stays on a processor of its own
        cells: by batch size and context
        resources_source, resources: None where the system does not tell
    """

    source: Path
    converted: Path
    threads: int
    pinned: bool
    cells: list[Cell]
    resources_source: Resources | None
    resources: Resources | None


def bench(
    source: str | os.PathLike[str],
    converted: str | os.PathLike[str],
    *,
    batches: Sequence[int] = BATCHES,
    contexts: Sequence[int] = CONTEXTS,
    threads: int = 0,
    limit: bool = False,
    resources: bool = True,
    loads: int = N_LOADS,
    seconds: float = CELL_SECONDS,
    random_tokens: bool = False,
) -> Bench:
    """Compare the speed of a converted model with its source's, both on the patched llama.cpp, in this process.

    They take turns in short blocks, in random order, so that both see the same moods of the machine, and are loaded several
    times. Tokens are those of the built-in sample, over and over from random places. The files are in the page cache.

    Args:
        source: GGUF file; of a split model, the first part
        converted: likewise
        batches: tokens decoded at once
        contexts: tokens before them
        threads: 0 for one on each processor that this process may use
        limit: also measure the ceiling, the same graph with constants instead of lookups
        resources: also measure memory, loading and first tokens, each model in processes of its own
        loads: how often the models are loaded, at least twice
        seconds: for each batch size and context, over all loads
        random_tokens: random ids instead, like llama-bench's: nearly every one is the first of its kind, as in no text

    Raises:
        UsageError: an argument is not what it should be.
        FirstLayerError: a file cannot be read or run, or is not what it should be.
    """
    for size in (*batches, *contexts):
        if not 0 <= size <= MAX_TOKENS:
            raise UsageError(f"{size} is too long for a batch or a context; give {MAX_TOKENS:,} tokens at most")
    if not batches or not contexts or min(batches) < 1:
        raise UsageError("a batch has a token at least")
    if loads < 2:
        raise UsageError("one load tells nothing of where in memory a model lies; measure two at least")
    model, tables, files = open_pair(Path(source), Path(converted))
    plain = Files((model,))
    longest = max(contexts) + max(BLOCK_TOKENS, *batches) + 1
    if longest > context_length(model):
        raise FirstLayerError(f"the model has a context of {context_length(model)} tokens, {longest} are asked for; give less")
    n_threads = threads or len(_processors())
    outline = of_file(model.path)
    kinds = _kinds(tables, outline.sites)
    tokens = isolated(partial(_tokens, random_tokens), model.path)

    taken: list[Resources | None] = [None, None]
    if resources and sys.platform == "linux":
        taken = list(_all_resources([plain, files], n_threads, tokens))

    n_ctx = longest
    n_batch = max(BLOCK_TOKENS, *batches)
    rng, pinned = random.Random(0), True
    measured: dict[tuple[int, int], list[Load]] = {(batch, context): [] for context in contexts for batch in batches}
    with progress("measuring", loads, "load") as bar:
        for _ in range(loads):
            for file in rng.sample([model, tables], 2):
                _place_anew(file)
            with ExitStack() as stack:
                # in random order, which decides on the memory that each gets
                kinds_of_run = [(plain, False), (files, False), (files, True)][: 3 if limit else 2]
                opened = {
                    kind: stack.enter_context(
                        Run(kind[0].path, n_ctx, n_batch, n_threads, constants=kind[1], tables=kind[0].tables)
                    )
                    for kind in rng.sample(kinds_of_run, len(kinds_of_run))
                }
                runs = [opened[kind] for kind in kinds_of_run]
                pinned = stack.enter_context(_pinned(runs[0], n_threads)) and pinned
                for context in contexts:
                    for run in runs:
                        _fill(run, tokens, context)
                    for batch in batches:
                        measured[batch, context].append(_measure(runs, tokens, batch, context, seconds / loads, rng, n_threads))
            bar.update()
    cells = [_cell(batch, context, loads, bound(outline, kinds, batch)) for (batch, context), loads in measured.items()]
    return Bench(model.path, tables.path, n_threads, pinned, cells, *taken)


def _tokens(random_tokens: bool, path: Path) -> Tokens:
    """Token ids that are decoded, for `isolated`."""
    with Analysis(path) as analysis:
        if random_tokens:
            return np.random.default_rng(0).integers(0, analysis.n_vocab, 1 << 16, np.int32)
        return sample_tokens(analysis)


def _processors() -> list[int]:
    """Those that this process may use; unnumbered where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [-1] * (os.cpu_count() or 1)


def _ticks() -> dict[int, int]:
    """Processor time of each thread of this process, in the system's ticks; of none where it does not tell."""
    if sys.platform != "linux":
        return {}
    stats = {int(entry.name): (entry / "stat").read_text(errors="replace") for entry in Path("/proc/self/task").iterdir()}
    # the name in parentheses may hold spaces; user and system time are the 14th and 15th field
    return {thread: sum(map(int, stat.rpartition(")")[2].split()[11:13])) for thread, stat in stats.items()}


@contextmanager
def _pinned(run: Run, n_threads: int) -> Iterator[bool]:
    """Keep the threads that work for a model on a processor each.

    Yields whether that was possible: they must outlive a batch, as those of OpenMP do.
    """
    before, started = _ticks(), time.monotonic()
    while time.monotonic() - started < PINNING_SECONDS:
        run.keep(0)
        run.time([0] * BLOCK_TOKENS, BLOCK_TOKENS)
    spent = {thread: ticks - before.get(thread, 0) for thread, ticks in _ticks().items()}
    busy = spent.get(threading.get_native_id(), 0) / 2
    workers = [thread for thread, ticks in spent.items() if ticks > 0 and ticks >= busy]
    processors = _processors()
    if len(workers) != n_threads or len(processors) < n_threads:
        yield False
        return
    try:
        for thread, processor in zip(workers, processors, strict=False):
            os.sched_setaffinity(thread, {processor})
        yield True
    finally:
        for thread in workers:
            with suppress(ProcessLookupError):
                os.sched_setaffinity(thread, processors)


def _kinds(file: Source, sites: Sequence[Site]) -> Mapping[Site, GGMLQuantizationType]:
    """The sites that come from tables in a converted file, and the types of those."""
    placed, tables, _ = tab.read(file)
    kinds = {site.recipe: tables[site.table].type for site in placed}
    known = {site: kinds[site.recipe] for site in sites if site.recipe in kinds}
    if len(known) != len(kinds):
        raise FirstLayerError(f"{file.path} was not converted from this source; give the model that it was made from")
    return known


def _waited(n_threads: int) -> float:
    """Seconds, averaged over threads, that those of this process have waited for a processor, or the machine for its host."""
    try:
        stats = [(entry / "schedstat").read_text() for entry in Path("/proc/self/task").iterdir()]
        delays = sum(int(stat.split()[1]) for stat in stats) / 1e9
        stolen = int(Path("/proc/stat").read_text().split(maxsplit=9)[8]) / os.sysconf("SC_CLK_TCK")
        return (delays + stolen) / n_threads
    except (OSError, IndexError):  # not Linux, or without these figures
        return 0.0 if resource is None else TIME_SLICE * resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw / n_threads


class Load(NamedTuple):
    """Blocks of the models while they lie at one place in memory.

    Attributes:
        times: seconds per token, [rounds, runs]
        waited: share of a block in which its threads waited for a processor, the largest of each round, [rounds]
    """

    times: Seconds
    waited: Seconds

    @property
    def quiet(self) -> Seconds:
        """The times of the rounds that nothing disturbed."""
        return self.times[self.waited <= DISTURBED]


def _fill(run: Run, tokens: npt.NDArray[np.int32], n: int) -> None:
    """Decode n tokens of a new text."""
    run.keep(0)
    if n:
        run.time(np.resize(tokens, n), run.n_batch)


def _measure(
    runs: Sequence[Run], tokens: Tokens, batch: int, context: int, seconds: float, rng: random.Random, n_threads: int
) -> Load:
    """Let runs take turns in blocks."""

    def block(run: Run, n: int, first: int) -> tuple[float, float]:
        if not run.keep(context):
            _fill(run, tokens, context)
        if batch > 1:
            # a prompt comes after something else, so its graph is built for it; a token is decoded with the last one's graph
            run.time(tokens[:1], 1)
            if not run.keep(context):
                _fill(run, tokens, context)
        before = _waited(n_threads)
        elapsed = run.time(np.resize(np.roll(tokens, -first), n), batch)
        return elapsed / n, (_waited(n_threads) - before) / elapsed

    # warm-up, which also tells how long a block takes
    n = max(batch, BLOCK_TOKENS // batch * batch)
    for run in runs:
        block(run, n, 0)
    n_batches = int(BLOCK_SECONDS / batch / max(block(run, n, 0)[0] for run in runs))
    n = min(n, max(1, n_batches) * batch)

    times, waited = [], []
    started = time.monotonic()
    while True:
        first = rng.randrange(len(tokens))
        blocks = {i: block(runs[i], n, first) for i in rng.sample(range(len(runs)), len(runs))}
        times.append([blocks[i][0] for i in range(len(runs))])
        waited.append(max(waiting for _, waiting in blocks.values()))
        load, elapsed = Load(np.array(times), np.array(waited)), time.monotonic() - started
        if elapsed >= seconds and len(load.quiet) >= MIN_ROUNDS:
            return load
        if elapsed >= PATIENCE * seconds and len(times) >= PATIENCE * MIN_ROUNDS:
            return load


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
    """What a ratio says that was measured on a quiet machine."""
    if ratio.high < 1:
        return SLOWER
    if ratio.low <= 1:
        return UNKNOWN
    if ratio.value <= bound:
        return FASTER
    # the measurement is wrong by so much at least
    return LIMITED if ratio.low - (ratio.value - bound) > 1 else IMPOSSIBLE


def ratio(loads: Sequence[Seconds]) -> Ratio:
    """The ratio that pairs of blocks [rounds] of several loads tell.

    Blocks of one load share where it lies in memory, so the bootstrap draws loads. Of n of them it makes too little of their
    spread, as a normal distribution does of Student's t: the interval is widened by that.
    """
    n, rng = len(loads), np.random.default_rng(0)
    medians = np.array([np.median(pairs) for pairs in loads])
    low, high = np.percentile(medians[rng.integers(0, n, (N_BOOTSTRAP, n))].mean(axis=1), [2.5, 97.5]).tolist()
    value = float(medians.mean())
    student = float(np.quantile(np.abs(rng.standard_t(n - 1, 1 << 18)), 0.95))
    wider = student / NormalDist().inv_cdf(0.975) * math.sqrt(n / (n - 1))
    return Ratio(value, value - wider * (value - low), value + wider * (high - value))


def _all_resources(models: Sequence[Files], n_threads: int, tokens: Tokens) -> Iterator[Resources]:
    """Resources of models, each in processes of its own, one after the other."""
    cold: list[list[_Load]] = [[] for _ in models]
    warm: list[list[_Load]] = [[] for _ in models]
    tokens = np.resize(tokens, PROMPT + GENERATED)
    with progress("loading", 2 * N_PROCESSES * len(models), "load") as bar:
        for _ in range(N_PROCESSES):
            for i, model in enumerate(models):
                for source in model.sources:
                    _forget(source)
                for loads in (cold, warm):
                    loads[i].append(isolated(partial(_load, n_threads, model.tables, tokens), model.path))
                    bar.update()
    for i, model in enumerate(models):
        last = warm[i][-1]
        weights = model.bytes - last.memory[TABLES]  # of tables, only rows are read
        was_cold = [load for load in cold[i] if load.bytes_read > weights / 4]
        yield Resources(
            model.bytes,
            *last.memory,
            _median([load.load for load in was_cold]),
            _median([load.load for load in warm[i]]) or 0.0,
            _median([load.first_token for load in was_cold]),
            _median([load.first_token for load in warm[i]]) or 0.0,
        )


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if values else None


def _forget(model: Source) -> None:
    """Drop a model from the page cache, where the system lets us."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in model.paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _place_anew(model: Source) -> None:
    """Let a model be in the page cache, but in other pages than before."""
    _forget(model)
    for path in model.paths:
        with path.open("rb") as file:
            while file.read(CHUNK_BYTES):
                pass


# place of the tables' size in `_Load.memory`
TABLES = 5


@dataclass(frozen=True)
class _Load:
    load: float
    first_token: float
    bytes_read: int
    memory: tuple[int, int, int, int, int, int, int, int]  # as in Resources, from `resident` to `rows_touched`


def _load(n_threads: int, sidecar: Path | None, tokens: Tokens, path: Path) -> _Load:
    """Load a model and use it, for `isolated`."""
    assert resource is not None

    def status() -> dict[str, int]:
        lines = [line.split() for line in Path("/proc/self/status").read_text(errors="replace").splitlines()]
        return {line[0].rstrip(":"): 1024 * int(line[1]) for line in lines if line[0].startswith(("Vm", "Rss"))}

    def bytes_read() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))

    library()  # not a part of loading the model
    before, read, usage = status(), bytes_read(), resource.getrusage(resource.RUSAGE_SELF)
    started = time.perf_counter()
    with Run(path, PROMPT + GENERATED + 1, PROMPT, n_threads, tables=sidecar) as run:
        loaded = time.perf_counter()
        run.time(tokens[:1], 1)
        first_token = time.perf_counter()
        read = bytes_read() - read
        run.keep(0)
        run.time(tokens[:PROMPT], PROMPT)
        run.time(tokens[PROMPT:], 1)
        after, usage_after = status(), resource.getrusage(resource.RUSAGE_SELF)
        file = Source(sidecar or path)
        _, tables, _ = tab.read(file)
        memory = (
            after["VmRSS"] - before["VmRSS"],
            after["RssFile"] - before["RssFile"],
            after["VmHWM"] - before["VmRSS"],
            usage_after.ru_minflt - usage.ru_minflt,
            usage_after.ru_majflt - usage.ru_majflt,
            sum(table.bytes for table in tables),
            sum(_mapped(*file.place(table.name)) for table in tables),
            len(np.unique(tokens)) * sum(table.row_bytes for table in tables),
        )
    return _Load(loaded - started, first_token - started, read, memory)


def _mapped(path: Path, offset: int, size: int) -> int:
    """Bytes of a range of a file that are in memory of this process, in whole pages (`/proc/self/pagemap`)."""
    total = 0
    for line in os.fsdecode(Path("/proc/self/maps").read_bytes()).splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) < 6 or fields[5] != str(path.resolve()):
            continue
        begin, end = (int(value, 16) for value in fields[0].split("-"))
        first = max(offset, int(fields[2], 16)) - int(fields[2], 16) + begin
        last = min(offset + size - int(fields[2], 16) + begin, end)
        if first >= last:
            continue
        with open("/proc/self/pagemap", "rb") as file:
            file.seek(first // PAGE * 8)
            entries = np.frombuffer(file.read(((last - 1) // PAGE - first // PAGE + 1) * 8), "<u8")
        total += int((entries >> 63).sum()) * PAGE
    return total


def summary(result: Bench) -> str:
    """The result as people read it."""

    def interval(ratio: Ratio) -> str:
        return f"{ratio.value:.4f} [{ratio.low:.4f}, {ratio.high:.4f}]"

    lines = [f"{count(result.threads, 'thread')}, {'each on a processor of its own' if result.pinned else 'not pinned'}"]
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
    for name, taken in (("source", result.resources_source), ("converted", result.resources)):
        if taken is None:
            continue
        lines.append(
            f"{name}: file {size_text(taken.file)}, resident {size_text(taken.resident)} (of files"
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
    return "\n".join(lines)


def _pyplot() -> Any:
    """matplotlib, which only plots need."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as err:
        raise FirstLayerError("a plot needs matplotlib: pip install matplotlib") from err
    return pyplot


def _plot_path(converted: Path, folder: Path) -> Path:
    return folder / f"{converted.stem}-bench.png"


def plot(result: Bench, folder: Path) -> Path:
    """Write a plot of the ratios to a folder. Returns the file, a PNG.

    Raises:
        FirstLayerError: matplotlib is not installed.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for context in dict.fromkeys(cell.context for cell in result.cells):
        cells = sorted((cell for cell in result.cells if cell.context == context), key=lambda cell: cell.batch)
        batches = [cell.batch for cell in cells]
        ratios = [cell.ratio.value for cell in cells]
        errors = [
            [max(0.0, cell.ratio.value - cell.ratio.low) for cell in cells],
            [max(0.0, cell.ratio.high - cell.ratio.value) for cell in cells],
        ]
        line = axes.errorbar(batches, ratios, errors, marker="o", capsize=3, label=f"after {context} tokens")
        limits = [cell.limit for cell in cells if cell.limit]
        if len(limits) == len(cells):
            axes.plot(batches, [value.value for value in limits], ":", color=line[0].get_color(), label="without any lookup")
    bounds = dict(sorted((cell.batch, cell.bound) for cell in result.cells))
    axes.plot(list(bounds), list(bounds.values()), "k--", label="bound by the plan")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(bounds), [str(batch) for batch in bounds])
    axes.set_xlabel("tokens per batch")
    axes.set_ylabel("speed, converted / source")
    name = os.fsencode(result.converted.name).decode(errors="replace")
    axes.set_title(f"{name}, {count(result.threads, 'thread')}, 95 % confidence intervals", fontsize=10)
    axes.legend(fontsize=8)
    path = _plot_path(result.converted, folder)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `bench`."""
    parser.add_argument("source", type=Path, metavar="SOURCE.gguf")
    parser.add_argument("converted", type=Path, metavar="CONVERTED.gguf")
    parser.add_argument("--batch", type=numbers, default=BATCHES, metavar="N,...", help="tokens at once (default: 1,512)")
    parser.add_argument("--context", type=numbers, default=CONTEXTS, metavar="N,...", help="tokens before them (default: 0)")
    parser.add_argument("--threads", type=int, metavar="N", help="default: one on each processor")
    parser.add_argument("--limit", action="store_true", help="also measure constants instead of lookups: the ceiling")
    parser.add_argument("--random-tokens", action="store_true", help="random ids instead of the tokens of a text")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write a plot of the ratios there")


def main(args: argparse.Namespace) -> int:
    """Run `bench` from the command line."""
    if args.threads is not None and not 1 <= args.threads <= 1024:
        raise UsageError(f"{args.threads} is no number of threads; give one between 1 and 1024")
    if args.plot:
        _pyplot()
        args.plot.mkdir(parents=True, exist_ok=True)
        check(_plot_path(args.converted, args.plot), [args.source, args.converted], force=True)
    result = bench(
        args.source,
        args.converted,
        batches=args.batch,
        contexts=args.context,
        threads=args.threads or 0,
        limit=args.limit,
        random_tokens=args.random_tokens,
    )
    print(to_json(result) if args.json else summary(result))
    if args.plot:
        print(f"wrote {plot(result, args.plot)}", file=sys.stderr)
    return 0
