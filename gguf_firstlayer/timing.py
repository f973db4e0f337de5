"""Speed ratios of models that take turns in one process."""

from __future__ import annotations

import math
import os
import random
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gguf_firstlayer.c_api import processors
from gguf_firstlayer.decoder import Decoder
from gguf_firstlayer.source import Source

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


# Length of a block of one model: short enough that the machine's speed hardly changes between the models' blocks
BLOCK_SECONDS, BLOCK_TOKENS = 0.05, 32

# Its place in memory makes a model a few per cent faster or slower for as long as it is loaded. So models are loaded N_LOADS
# times, and each time a cell is measured in at least MIN_ROUNDS blocks of each model
N_LOADS, MIN_ROUNDS = 8, 3

# A block is disturbed if its threads waited for a processor, or the host gave it to another machine, for more than this share
# of it. Disturbed blocks are measured again, for at most PATIENCE times the planned time
DISTURBED, PATIENCE = 0.02, 3

# seconds that a thread is assumed to wait when another one takes its processor, where the system only counts such events
TIME_SLICE = 0.004

N_BOOTSTRAP = 2000

PINNING_SECONDS = 0.2

CHUNK_BYTES = 1 << 20

Seconds = npt.NDArray[np.float64]

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Ratio:
    """A speed ratio and its confidence interval.

    Attributes:
        value: mean over loads of the median over pairs of blocks
        low, high: 95 % bootstrap interval over loads
    """

    value: float
    low: float
    high: float


def _ticks() -> dict[int, int]:
    """Processor time of each thread of this process, in the system's ticks; empty where it does not report them."""
    if sys.platform != "linux":
        return {}
    stats = {int(entry.name): (entry / "stat").read_text(errors="replace") for entry in Path("/proc/self/task").iterdir()}
    # the name in parentheses may hold spaces; user and system time are the 14th and 15th field
    return {thread: sum(map(int, stat.rpartition(")")[2].split()[11:13])) for thread, stat in stats.items()}


@contextmanager
def pinning(run: Decoder, n_threads: int) -> Iterator[bool]:
    """Pin each thread that works for a model to a processor of its own.

    Yields whether that was possible: the threads must outlive a batch, as OpenMP's do.
    """
    before, started = _ticks(), time.monotonic()
    while time.monotonic() - started < PINNING_SECONDS:
        run.keep(0)
        run.time([0] * BLOCK_TOKENS, BLOCK_TOKENS)
    spent = {thread: ticks - before.get(thread, 0) for thread, ticks in _ticks().items()}
    busy = spent.get(threading.get_native_id(), 0) / 2
    workers = [thread for thread, ticks in spent.items() if ticks > 0 and ticks >= busy]
    allowed = processors()
    if len(workers) != n_threads or len(allowed) < n_threads:
        yield False
        return
    try:
        for thread, processor in zip(workers, allowed, strict=False):
            os.sched_setaffinity(thread, {processor})
        yield True
    finally:
        for thread in workers:
            with suppress(ProcessLookupError):
                os.sched_setaffinity(thread, allowed)


def seconds_waited(n_threads: int) -> float:
    """Seconds per thread that this process has waited for a processor, or the machine for its host."""
    try:
        stats = [(entry / "schedstat").read_text() for entry in Path("/proc/self/task").iterdir()]
        delays = sum(int(stat.split()[1]) for stat in stats) / 1e9
        stolen = int(Path("/proc/stat").read_text().split(maxsplit=9)[8]) / os.sysconf("SC_CLK_TCK")
        return (delays + stolen) / n_threads
    except (OSError, IndexError):  # not Linux, or without these figures
        return 0.0 if resource is None else TIME_SLICE * resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw / n_threads


class Load(NamedTuple):
    """Blocks of the models measured during one load.

    Attributes:
        times: seconds per token, [rounds, runs]
        waited: share of its time that a block waited for a processor, the largest of each round, [rounds]
    """

    times: Seconds
    waited: Seconds

    @property
    def quiet(self) -> Seconds:
        """The times of the undisturbed rounds."""
        return self.times[self.waited <= DISTURBED]


def fill(run: Decoder, tokens: Tokens, n: int) -> None:
    """Decode n tokens of a new text."""
    run.keep(0)
    if n:
        run.time(np.resize(tokens, n), run.n_batch)


def take_turns(
    runs: Sequence[Decoder], tokens: Tokens, batch: int, context: int, seconds: float, rng: random.Random, n_threads: int
) -> Load:
    """Let runs take turns in blocks."""

    def block(run: Decoder, n: int, first: int) -> tuple[float, float]:
        if not run.keep(context):
            fill(run, tokens, context)
        if batch > 1:
            # a prompt follows other work, so its graph is built anew; a decoded token reuses the previous one's graph
            run.time(tokens[:1], 1)
            if not run.keep(context):
                fill(run, tokens, context)
        before = seconds_waited(n_threads)
        elapsed = run.time(np.resize(np.roll(tokens, -first), n), batch)
        return elapsed / n, (seconds_waited(n_threads) - before) / elapsed

    # warm-up, which also shows how long a block takes
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


def ratio(loads: Sequence[Seconds]) -> Ratio:
    """The ratio from pairs of blocks [rounds] of several loads.

    Blocks of one load share its place in memory, so the bootstrap draws loads. With n loads it underestimates their spread, and
    a normal distribution is narrower than Student's t: the interval is widened by both factors.
    """
    n, rng = len(loads), np.random.default_rng(0)
    medians = np.array([np.median(pairs) for pairs in loads])
    low, high = np.percentile(medians[rng.integers(0, n, (N_BOOTSTRAP, n))].mean(axis=1), [2.5, 97.5]).tolist()
    value = float(medians.mean())
    student = float(np.quantile(np.abs(rng.standard_t(n - 1, 1 << 18)), 0.95))
    wider = student / NormalDist().inv_cdf(0.975) * math.sqrt(n / (n - 1))
    return Ratio(value, value - wider * (value - low), value + wider * (high - value))


def forget(model: Source) -> None:
    """Drop a model from the page cache, where the system allows it."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in model.paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def place_anew(model: Source) -> None:
    """Read a model into the page cache again, into other pages than before."""
    forget(model)
    for path in model.paths:
        with path.open("rb") as file:
            while file.read(CHUNK_BYTES):
                pass
