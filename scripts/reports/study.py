"""Measures what first-layer tables gain on this machine, and writes docs/study.md, its plots and docs/study.json.

Each measurement is saved in build/study/measured.json at once, so that an interrupted study can be resumed. Delete the
folder to measure everything again.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import platform
import random
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from study_page import (
    ANSWER,
    BATCHES,
    CONTEXTS,
    DEPTHS,
    DOCS,
    DRAFT_LAYERS,
    PREFILL,
    PROMPT,
    STARTS,
    TYPES,
    VOCABULARIES,
    WIDTHS,
    Result,
    draw,
    synthetic_name,
)
from support.builds import PATCHED, ROOT, STOCK
from support.models import rewrite

from gguf_firstlayer.installation import library_name

os.environ["LLAMA_CPP_LIB_PATH"] = str(PATCHED)

import llama_cpp
import numpy as np
from catalogue import CATALOGUE, Entry, write_model
from gguf import GGMLQuantizationType as Type
from support.counting import bytes_read, can_count, instructions
from support.servers import free_port, openai_client, serving

from gguf_firstlayer import bench, convert
from gguf_firstlayer.auto import sample_tokens
from gguf_firstlayer.cost import of_file
from gguf_firstlayer.decoder import Decoder
from gguf_firstlayer.estimate import estimate
from gguf_firstlayer.file_format import fitting
from gguf_firstlayer.pair import AUTO
from gguf_firstlayer.runtime import analyse
from gguf_firstlayer.source import Source
from gguf_firstlayer.text import size_text
from gguf_firstlayer.timing import place_anew, ratio, take_turns

FOLDER = ROOT / "build" / "study"
LOG = FOLDER / "measured.json"


REAL = ("SmolLM2-135M-Instruct.Q4_1", "gemma-3-270m-q4_k_m")
SHAPES = ("pythia-70m", "pythia-160m", "llama-68m", "mamba-130m")
COUNTED = ("llama-68m", "pythia-70m")

# what is embedded or read, with which pooling (None: a prompt, of which one token's logits are read), in which batches
DEMANDED = (
    ("SmolLM2-135M-Instruct.Q4_1", None, (32, 128, 512)),
    ("gemma-3-270m-q4_k_m", None, (128, 512)),
    ("pythia-160m", None, (32, 128, 512)),
    ("qwen3.5-0.8b", None, (128, 512)),
    ("gemma-4-e2b", None, (32, 128)),
    ("SmolLM2-135M-Instruct.Q4_1", "last", (64, 512)),
    ("gemma-3-270m-q4_k_m", "last", (64, 512)),
    ("all-MiniLM-L6-v2.F16", "mean", (64, 512)),
    ("all-MiniLM-L6-v2.F16", "cls", (64, 512)),
)
SERVED = (("gemma-3-270m-q4_k_m", "last"), ("all-MiniLM-L6-v2.F16", "cls"))

PROMPTS = ("Explain why the sky is blue.", "List the planets of the solar system.", "Write a short story about a harbour.")


#
# measurements
#


def known() -> dict[str, Result]:
    """All measurements so far, by their keys."""
    return json.loads(LOG.read_text()) if LOG.exists() else {}


def measure(key: str, function: Callable[[], Result]) -> Result:
    """The result of a measurement, which is made only once."""
    results = known()
    if key not in results:
        started = time.monotonic()
        results[key] = function()
        temporary = LOG.with_suffix(".tmp")
        temporary.write_text(json.dumps(results, indent=1, default=str))
        temporary.replace(LOG)
        print(f"{key}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return results[key]


def synthetic(layers: int, width: int, vocab: int, parallel: bool) -> Entry:
    """A Pythia or a Llama of any size."""
    like = CATALOGUE["pythia-160m" if parallel else "llama-1-7b"]
    keys = like.keys | {
        "vocab_size": vocab,
        "context_length": 16384,
        "block_count": layers,
        "embedding_length": width,
        "feed_forward_length": 4 * width if parallel else 11 * width // 4,
        "attention.head_count": width // 64,
        "attention.head_count_kv": width // 64,
    }
    return dataclasses.replace(like, name=synthetic_name(layers, width, vocab, parallel), keys=keys)


@contextmanager
def converted(entry: Entry, kind: Type = Type.Q4_K, table: str = "q8_0") -> Iterator[tuple[Path, Path]]:
    """A model with random weights and its conversion; both are deleted afterwards."""
    source = FOLDER / f"{entry.name}.gguf"
    output = source.with_name(f"{entry.name}-{table}.gguf")
    try:
        write_model(entry, source, kind)
        convert(source, output, type=table, force=True)
        yield source, output
    finally:
        source.unlink(missing_ok=True)
        output.unlink(missing_ok=True)


def speeds(pair: tuple[Path, Path], batches: Sequence[int], contexts: Sequence[int] = (0,), **options: Any) -> Result:
    """Cells of `bench`, with the limit."""
    result = bench(*pair, batches=batches, contexts=contexts, limit=True, **{"resources": False} | options)
    return dataclasses.asdict(result)


def depth(layers: int, width: int, vocab: int, parallel: bool) -> Result:
    with converted(synthetic(layers, width, vocab, parallel)) as pair:
        return speeds(pair, (1, PREFILL), loads=4, seconds=2)


def fading() -> Result:
    with converted(synthetic(4, 512, 50304, True)) as pair:
        return speeds(pair, BATCHES, CONTEXTS, loads=4, seconds=2)


class Driver:
    """A model on one libllama, driven like `Decoder` but through llama-cpp-python's declarations of llama.h.

    The stock library has no `Decoder`. Both libraries are loaded into this process, where they share one ggml, which the patch
    does not change.
    """

    def __init__(self, library: ctypes.CDLL, path: Path, n_ctx: int, n_batch: int, n_threads: int) -> None:
        self.library, self.n_batch = library, n_batch
        params = library.llama_model_default_params()
        self.model = library.llama_model_load_from_file(str(path).encode(), params)
        options = library.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = n_ctx, n_batch, n_batch
        options.n_threads = options.n_threads_batch = n_threads
        self.context = library.llama_init_from_model(self.model, options)
        assert self.context, path

    def time(self, tokens: Any, n_batch: int) -> float:
        ids = (llama_cpp.llama_token * len(tokens))(*map(int, tokens))
        started = time.perf_counter()
        for first in range(0, len(ids), n_batch):
            part = ctypes.cast(ctypes.byref(ids, 4 * first), ctypes.POINTER(llama_cpp.llama_token))
            batch = self.library.llama_batch_get_one(part, min(n_batch, len(ids) - first))
            assert self.library.llama_decode(self.context, batch) == 0
            self.library.llama_get_logits_ith(self.context, -1)
        return time.perf_counter() - started

    def keep(self, n: int) -> bool:
        memory = self.library.llama_get_memory(self.context)
        if n == 0:
            self.library.llama_memory_clear(memory, True)
            return True
        return bool(self.library.llama_memory_seq_rm(memory, 0, n, -1))

    def close(self) -> None:
        self.library.llama_free(self.context)
        self.library.llama_model_free(self.model)


def libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """The stock and the patched libllama, quiet, with the declarations of llama-cpp-python."""
    patched = llama_cpp.llama_cpp._lib
    stock = ctypes.CDLL(str(STOCK / library_name("llama")))
    for name in dir(llama_cpp):
        if name.startswith(("llama_", "ggml_")) and hasattr(stock, name) and hasattr(patched, name):
            ours, theirs = getattr(patched, name), getattr(stock, name)
            theirs.restype, theirs.argtypes = ours.restype, ours.argtypes
    assert not hasattr(stock, "llama_firstlayer_init")
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    for library in (stock, patched):
        library.llama_log_set(quiet, None)
    libraries.quiet = quiet  # ctypes does not hold callbacks alive
    return stock, patched


def with_stock(pair: tuple[Path, Path], loads: int = 6, seconds: float = 8) -> Result:
    """Speeds of the source on the stock library, of the source on the patched one, and of the converted model."""
    stock, patched = libraries()
    rng, times = random.Random(0), {1: [], 128: []}
    n_vocab = analysed_vocabulary(pair[0])
    for _ in range(loads):
        for path in pair:
            place_anew(Source(path))
        with ExitStack() as stack:
            wanted = [(stock, pair[0]), (patched, pair[0]), (patched, pair[1])]
            runs: dict[int, Driver] = {}
            for i in rng.sample(range(len(wanted)), len(wanted)):
                runs[i] = Driver(*wanted[i], 512, 128, os.cpu_count() or 1)
                stack.callback(runs[i].close)
            tokens = np.random.default_rng(rng.randrange(1 << 32)).integers(0, n_vocab, 1 << 14, np.int32)
            for batch, measured in times.items():
                turns = take_turns([runs[i] for i in range(3)], tokens, batch, 0, seconds / loads, rng, os.cpu_count() or 1)
                measured.append(turns.quiet if len(turns.quiet) else turns.times)
    cells = []
    for batch, measured in times.items():
        cells.append(
            {
                "batch": batch,
                "patched": dataclasses.asdict(ratio([t[:, 0] / t[:, 1] for t in measured])),
                "converted": dataclasses.asdict(ratio([t[:, 0] / t[:, 2] for t in measured])),
            }
        )
    return {"cells": cells}


def analysed_vocabulary(path: Path) -> int:
    with analyse(path) as analysis:
        return analysis.n_vocab


def real(name: str) -> Result:
    source = ROOT / "models" / f"{name}.gguf"
    output = FOLDER / f"{name}-auto.gguf"
    convert(source, output, force=True)
    pair = (source, output)
    result = speeds(pair, (1, 128), loads=6, seconds=12, resources=True) | {"stock": with_stock(pair)}
    output.unlink()
    return result


def shape(name: str) -> Result:
    with converted(CATALOGUE[name]) as pair:
        return speeds(pair, (1, 128), loads=6, seconds=8, resources=True) | {"stock": with_stock(pair)}


@contextmanager
def model(name: str) -> Iterator[Path]:
    """A real model, or random weights in a published shape, which are deleted afterwards."""
    if name not in CATALOGUE:
        yield ROOT / "models" / f"{name}.gguf"
        return
    source = FOLDER / f"{name}.gguf"
    try:
        large = CATALOGUE[name].parameters > 1e9  # K-quants take long to make
        write_model(CATALOGUE[name], source, Type.Q8_0 if large else Type.Q4_K)
        yield source
    finally:
        source.unlink(missing_ok=True)


def row_cache(name: str) -> Result:
    """Speed of a model with a row cache: warm, by `bench`, and of a first prompt."""
    with model(name) as source:
        return cached(source)


def demanded(name: str, pooling: str | None, batches: Sequence[int]) -> Result:
    """Speed of a model that computes only what is read."""
    with model(name) as source:
        demand = "embeddings" if pooling else "rows"
        loads = 4 if source.stat().st_size > 1 << 30 else 8
        options = {"demand": demand, "pooling": pooling, "batches": batches, "loads": loads, "seconds": 8}
        # in a process of its own: what ran before in this one decides where in memory each model lies, and so its speed
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            return dataclasses.asdict(process.submit(bench, source, resources=bool(pooling), **options).result())


def served(name: str, pooling: str, loads: int = 4, rounds: int = 5) -> Result:
    """Requests per second of llama-server with four clients that embed pieces of a text: plain, and with demand and a cache."""
    words = (DOCS / "design.md").read_text().split()
    rng, speeds = random.Random(0), []
    pieces = [" ".join(words[i : i + n]) for i in range(0, len(words) - 120, 50) for n in (20, 60, 120)]
    server = [PATCHED / "llama-server", "-m", ROOT / "models" / f"{name}.gguf", "--embedding", "--pooling", pooling]
    server += ["-np", 4, "-c", 2048, "-t", os.cpu_count(), "--no-webui"]

    def requests(client: Any, texts: list[str]) -> float:
        started = time.perf_counter()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda text: client.embeddings.create(model="any", input=text), texts))
        return len(texts) / (time.perf_counter() - started)

    for _ in range(loads):
        with (
            openai_client(server) as plain,
            openai_client([*server, "--demand", "embeddings", "--firstlayer-cache", "auto"]) as ours,
        ):
            for client in (plain, ours):
                requests(client, pieces[:4])
            found = []
            for _ in range(rounds):
                texts = rng.sample(pieces, 32)
                pair = {i: requests((plain, ours)[i], texts) for i in rng.sample((0, 1), 2)}
                found.append((pair[0], pair[1]))
            speeds.append(np.array(found))
    every = np.concatenate(speeds)
    return {
        "source": float(np.median(every[:, 0])),
        "ours": float(np.median(every[:, 1])),
        "ratio": dataclasses.asdict(ratio([found[:, 1] / found[:, 0] for found in speeds])),
    }


def cached(source: Path, loads: int = 8, rounds: int = 5) -> Result:
    warm = bench(source, cache="auto", batches=(1, PROMPT), loads=loads, seconds=8, resources=False)
    with analyse(ROOT / "models" / f"{REAL[0]}.gguf") as analysis:  # the others may have no tokenizer
        tokens = sample_tokens(analysis)[:PROMPT] % analysed_vocabulary(source)
    rng, times, misses = random.Random(0), [], 0
    for _ in range(loads):
        place_anew(Source(source))
        pairs = []
        for _ in range(rounds):
            pair = {}
            for cache in rng.sample((0.0, AUTO), 2):  # a fresh model each, so that no row is there
                with Decoder(source, 2 * PROMPT, PROMPT, cache=cache) as run:
                    run.time(tokens[-1:], 1)
                    run.keep(0)
                    pair[cache] = run.time(tokens, PROMPT)
                    misses = row.misses if (row := run.row_cache()) else misses
            pairs.append(pair[0.0] / pair[AUTO])
        times.append(np.array(pairs))
    return dataclasses.asdict(warm) | {"cold": dataclasses.asdict(ratio(times)), "cold_misses": misses}


def table_type(kind: str) -> Result:
    with converted(CATALOGUE["pythia-70m"], table=kind) as pair:
        return speeds(pair, (1, 128), loads=4, seconds=3, resources=True)


def conversion(name: str) -> Result:
    """Tokens per second of a conversion, and of the first layer's prefill, from a model of this layer alone."""
    entry = CATALOGUE[name]
    first = dataclasses.replace(entry, name=f"{name}-first", keys=entry.keys | {"block_count": 1})
    source = FOLDER / f"{first.name}.gguf"
    write_model(first, source, Type.Q4_K)
    n_vocab = analysed_vocabulary(source)
    rates: dict[str, list[float]] = {"prefill": [], "convert": []}
    with Decoder(source, 513, 512) as run:
        for _ in range(8):
            run.keep(0)
            elapsed = run.time(np.random.default_rng(0).integers(0, n_vocab, 512), 512)
            rates["prefill"].append(512 / elapsed)
            if len(rates["convert"]) < 3:
                started = time.perf_counter()
                convert(source, FOLDER / "first-flp.gguf", type="q8_0", force=True)
                rates["convert"].append(n_vocab / (time.perf_counter() - started))
    (FOLDER / "first-flp.gguf").unlink()
    source.unlink()
    return {key: float(np.median(values)) for key, values in rates.items()}


def draft() -> Result:
    """Speed of a server that drafts with the first layers of its own model, before and after the draft is converted."""
    target = ROOT / "models" / f"{REAL[0]}.gguf"
    dropped = {f"blk.{i}." for i in range(DRAFT_LAYERS, 30)}
    gone = frozenset(name for name in Source(target).tensors if name[: name.find(".", 4) + 1] in dropped)
    plain = rewrite(
        target,
        FOLDER / "draft.gguf",
        change_key=lambda key, value: DRAFT_LAYERS if key.endswith(".block_count") else value,
        drop=gone,
    )
    tables = convert(plain, FOLDER / "draft-flp.gguf", type="q8_0", force=True).output
    outline = of_file(plain)
    bound = estimate(outline, {site: fitting(Type.Q8_0, site.width) for site in outline.sites}).decode_bound

    def ask(port: int, prompt: str) -> Result:
        body = {"prompt": prompt, "n_predict": ANSWER, "temperature": 0, "cache_prompt": False}
        request = urllib.request.Request(f"http://127.0.0.1:{port}/completion", json.dumps(body).encode())
        with urllib.request.urlopen(request) as response:
            return json.load(response)

    rng, times, same, drafted, accepted = random.Random(0), [], True, 0, 0
    for _ in range(STARTS):
        with ExitStack() as stack:
            ports = {}
            for i in rng.sample((0, 1), 2):
                ports[i] = free_port()
                command = [PATCHED / "llama-server", "-m", target, "-md", (plain, tables)[i], "--spec-type", "draft-simple"]
                options = ["--port", ports[i], "-c", 512, "-np", 1]
                health = f"http://127.0.0.1:{ports[i]}/health"
                stack.enter_context(serving([*command, *options], partial(urllib.request.urlopen, health), (OSError,)))
            pairs = []
            for prompt in (PROMPTS[0], *PROMPTS):
                answers = {i: ask(ports[i], prompt) for i in rng.sample((0, 1), 2)}
                pairs.append(answers[0]["timings"]["predicted_ms"] / answers[1]["timings"]["predicted_ms"])
                same = same and answers[0]["content"] == answers[1]["content"]
                drafted += answers[1]["timings"].get("draft_n", 0)
                accepted += answers[1]["timings"].get("draft_n_accepted", 0)
            times.append(np.array(pairs[1:]))
    return {
        "bound_of_draft": bound,
        "ratio": dataclasses.asdict(ratio(times)),
        "drafted": drafted,
        "accepted": accepted,
        "same_text": same,
    }


def counts(pair: tuple[Path, Path]) -> Result:
    """Instructions and bytes per decoded token, before and after conversion, compared with the plan."""
    outline = of_file(pair[0])
    plan = estimate(outline, {site: fitting(Type.Q8_0, site.width) for site in outline.sites})
    total = sum(outline.products(use) for use in outline.uses)
    gone = sum(outline.products(use) for use in outline.replaced(outline.sites))
    return {
        "bytes": [bytes_read(path) for path in pair],
        "bytes_planned": [plan.decode_bytes_without, plan.decode_bytes_with],
        "instructions": [instructions(path) for path in pair] if can_count() else None,
        "products_eliminated": gone / total,
    }


def counted(name: str) -> Result:
    if name in CATALOGUE:
        with converted(CATALOGUE[name], Type.Q4_1) as pair:  # a type that is not repacked
            return counts(pair)
    source, output = ROOT / "models" / f"{name}.gguf", FOLDER / f"{name}-q8_0.gguf"
    convert(source, output, type="q8_0", force=True)
    return counts((source, output))


def machine() -> Result:
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ""
    )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": cpu or platform.processor(),
        "processors": os.cpu_count(),
        "memory": size_text(memory),
        "system": f"{platform.system()} {platform.machine()}, a virtual machine that shares its processor with others",
        "commit": commit.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def all_measurements() -> dict[str, Callable[[], Result]]:
    """All measurements, in the order in which they are made."""
    wanted: dict[str, Callable[[], Result]] = {"machine": machine}
    for name in REAL:
        wanted[f"real {name}"] = lambda name=name: real(name)
    for name in SHAPES:
        wanted[f"shape {name}"] = lambda name=name: shape(name)
    wanted["cache machine"] = machine
    for name in (*REAL, *SHAPES):
        wanted[f"cache {name}"] = lambda name=name: row_cache(name)
    wanted["demand machine"] = machine
    for name, pooling, batches in DEMANDED:
        options = (name, pooling, batches)
        wanted[f"demand {name} {pooling or 'prompt'}"] = lambda options=options: demanded(*options)
    for name, pooling in SERVED:
        wanted[f"served {name} {pooling}"] = lambda name=name, pooling=pooling: served(name, pooling)
    wanted["draft"] = draft
    wanted["fading"] = fading
    for kind in TYPES:
        wanted[f"type {kind}"] = lambda kind=kind: table_type(kind)
    for name in ("pythia-70m", "qwen3-0.6b"):
        wanted[f"conversion {name}"] = lambda name=name: conversion(name)
    for layers in DEPTHS:
        for width in WIDTHS:
            for vocab in VOCABULARIES:
                for parallel in (False, True):
                    options = (layers, width, vocab, parallel)
                    wanted[f"depth {synthetic(*options).name}"] = lambda options=options: depth(*options)
    for name in (REAL[0], *COUNTED):
        wanted[f"counted {name}"] = lambda name=name: counted(name)
    return wanted


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for key, function in all_measurements().items():
        measure(key, function)
    measured = {key: known()[key] for key in all_measurements()}
    (DOCS / "study.json").write_text(json.dumps(measured, indent=1).replace(f"{ROOT}/", "") + "\n")
    draw()
