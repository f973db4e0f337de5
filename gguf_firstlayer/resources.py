"""What a model needs in a process of its own: memory, page faults, time to load."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gguf_firstlayer import file_format
from gguf_firstlayer.c_api import library
from gguf_firstlayer.decoder import Decoder
from gguf_firstlayer.isolation import isolated
from gguf_firstlayer.pair import Files, context_length
from gguf_firstlayer.source import Source
from gguf_firstlayer.text import progress
from gguf_firstlayer.timing import Tokens, forget

# tokens of the prompt, tokens that are generated, and processes per model, with a cold and with a warm page cache
PROMPT, GENERATED, N_PROCESSES = 128, 32, 3

PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


@dataclass(frozen=True)
class Resources:
    """What a model needs in a process that decodes a prompt and generates some tokens. In bytes and seconds.

    Attributes:
        file: size of the files
        resident: memory afterwards, of files and others
        resident_files: the part of it that is mapped from files
        peak: highest memory at any time
        minor_faults, major_faults: page faults since the model was opened
        tables: bytes of the tables
        tables_mapped: of these, bytes in pages that the process touched, or that Linux mapped along with them
        rows_touched: bytes of the rows that were looked up
        load_cold: seconds to load it with an empty page cache; None where it cannot be emptied
        load: the same with a warm one
        first_token_cold, first_token: seconds from the start of loading to the logits of the first token, likewise
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


def all_resources(models: Sequence[Files], n_threads: int, tokens: Tokens) -> Iterator[Resources]:
    """Resources of models, each in processes of its own, one after the other."""
    cold: list[list[_Load]] = [[] for _ in models]
    warm: list[list[_Load]] = [[] for _ in models]
    tokens = np.resize(tokens, PROMPT + GENERATED)
    with progress("loading", 2 * N_PROCESSES * len(models), "load") as bar:
        for _ in range(N_PROCESSES):
            for i, model in enumerate(models):
                for source in model.sources:
                    forget(source)
                n_prompt = max(1, min(PROMPT, context_length(model.sources[0]) - GENERATED - 1))
                for loads in (cold, warm):
                    loads[i].append(isolated(partial(_load, n_threads, n_prompt, model.options, tokens), model.path))
                    bar.update()
    for i, model in enumerate(models):
        last = warm[i][-1]
        weights = model.bytes - last.memory[TABLES]  # only rows of the tables are read
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


# place of the tables' size in `_Load.memory`
TABLES = 5


@dataclass(frozen=True)
class _Load:
    load: float
    first_token: float
    bytes_read: int
    memory: tuple[int, int, int, int, int, int, int, int]  # as in Resources, from `resident` to `rows_touched`


def _load(n_threads: int, n_prompt: int, options: dict[str, Any], tokens: Tokens, path: Path) -> _Load:
    """Load a model and use it; called through `isolated`."""
    import resource  # which Windows does not have

    def status() -> dict[str, int]:
        lines = [line.split() for line in Path("/proc/self/status").read_text(errors="replace").splitlines()]
        return {line[0].rstrip(":"): 1024 * int(line[1]) for line in lines if line[0].startswith(("Vm", "Rss"))}

    def bytes_read() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))

    library()  # loaded beforehand, as it is not part of loading the model
    before, read, usage = status(), bytes_read(), resource.getrusage(resource.RUSAGE_SELF)
    started = time.perf_counter()
    with Decoder(path, n_prompt + GENERATED + 1, n_prompt, n_threads, **options) as run:
        loaded = time.perf_counter()
        run.time(tokens[:1], 1)
        first_token = time.perf_counter()
        read = bytes_read() - read
        run.keep(0)
        run.time(tokens[:n_prompt], n_prompt)
        run.time(tokens[PROMPT:], 1)
        after, usage_after = status(), resource.getrusage(resource.RUSAGE_SELF)
        file = Source(options["tables"] or path)
        _, tables, _ = file_format.read(file)
        memory = (
            after["VmRSS"] - before["VmRSS"],
            after["RssFile"] - before["RssFile"],
            after["VmHWM"] - before["VmRSS"],
            usage_after.ru_minflt - usage.ru_minflt,
            usage_after.ru_majflt - usage.ru_majflt,
            sum(table.bytes for table in tables),
            sum(mapped(*file.place(table.name)) for table in tables),
            len(np.unique(tokens)) * sum(table.row_bytes for table in tables),
        )
    return _Load(loaded - started, first_token - started, read, memory)


def mapped(path: Path, offset: int, size: int) -> int:
    """Bytes of a range of a file that are mapped into this process, in whole pages (`/proc/self/pagemap`)."""
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
