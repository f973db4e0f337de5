"""Stock against tables and a row cache on a GPU that holds all layers: speed, memory, graph splits.

    python scripts/reports/gpu.py FOLDER [SECONDS]

Models of published shapes with random weights are written and converted in the folder, so it needs some 20 GB. SECONDS is the
time for each batch size of each model. Results go to FOLDER/gpu.json and, as tables, to FOLDER/gpu.md. scripts/test-gpu runs
it. docs/gpu.json is what it found, with a comparison of thread limits made by hand; docs/study.md shows it.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from gpu_page import gpu_tables

from gguf_firstlayer import convert, paths, plan
from gguf_firstlayer.c_api import library
from gguf_firstlayer.decoder import Decoder
from gguf_firstlayer.timing import ratio, take_turns

# serial, parallel, and with per-layer embeddings
MODELS = {"llama-3.2-1b": "Q8_0", "pythia-6.9b": "Q4_K", "gemma-4-e2b": "Q4_K"}

BATCHES, CONTEXT, LOADS, THREADS = (1, 32, 512, 2048), 0, 3, 8

_LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_KEPT: list[Any] = []

# distinct tokens of the text, all of which the row cache has seen
N_DISTINCT = 512


def memory() -> int:
    """MiB of GPU memory in use."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0])


def watch_splits() -> list[str]:
    """Collect the parts that the scheduler splits graphs into, of contexts made from now on, with their inputs."""
    found: list[str] = []

    def log(_level: int, text: bytes, _user_data: int | None) -> None:
        if text.lstrip().startswith(b"## SPLIT #"):
            found.append(text.decode().strip())

    callback = _LOG_CALLBACK(log)
    _KEPT.append(callback)  # ctypes does not hold it alive
    library().llama.llama_log_set(callback, None)
    return found


def last_graph(splits: list[str]) -> list[str]:
    """The parts of the last graph of all."""
    first = max((i for i, line in enumerate(splits) if line.startswith("## SPLIT #0")), default=0)
    return splits[first:]


def measure(name: str, kind: str, folder: Path, seconds: float) -> dict[str, Any]:
    """All about one model."""
    started = time.time()
    source = folder / f"{name}.gguf"
    command = [sys.executable, Path(__file__).with_name("catalogue.py"), name, source, kind]
    environment = os.environ | {"LLAMA_CPP_LIB_PATH": str(paths()["libllama"].parent)}
    subprocess.run(list(map(str, command)), check=True, env=environment, capture_output=True)
    converted = convert(source, folder / f"{name}-flp.gguf", type="q8_0", force=True).output
    expected = plan(source, type="q8_0")
    made = time.time() - started

    variants: dict[str, dict[str, Any]] = {
        "source": {"path": source},
        "converted": {"path": converted},
        "cached": {"path": source, "cache": 64.0},
        "constants": {"path": converted, "constants": True},
    }
    taken: dict[str, int] = {}
    logs: dict[str, Any] = {}
    os.environ["GGML_SCHED_DEBUG"] = "1"
    n_ctx = max(BATCHES) + 64
    for variant, options in variants.items():
        before, logs[variant] = memory(), watch_splits()
        with Decoder(n_ctx=n_ctx, n_batch=max(BATCHES), n_threads=THREADS, **options) as run:
            run.time([1] * 8, 1)
            taken[variant] = memory() - before
        logs[variant] = len(last_graph(logs[variant]))
    del os.environ["GGML_SCHED_DEBUG"]

    rng = random.Random(0)
    vocabulary = np.random.default_rng(0).integers(0, expected_vocab(source), N_DISTINCT)
    tokens = vocabulary[np.random.default_rng(1).integers(0, N_DISTINCT, 1 << 14)].astype(np.int32)
    blocks: dict[int, list[Any]] = {batch: [] for batch in BATCHES}
    for _ in range(LOADS):
        with ExitStack() as stack:
            opened = {
                variant: stack.enter_context(Decoder(n_ctx=n_ctx, n_batch=max(BATCHES), n_threads=THREADS, **variants[variant]))
                for variant in rng.sample(list(variants), len(variants))
            }
            runs = [opened[variant] for variant in variants]
            for run in runs:
                run.keep(0)
                run.time(tokens[: max(BATCHES)], max(BATCHES))
            for batch in BATCHES:
                blocks[batch].append(take_turns(runs, tokens, batch, CONTEXT, seconds / LOADS, rng, THREADS).times)
    cells = []
    for batch, loads in blocks.items():
        cell: dict[str, Any] = {"batch": batch, "source": float(1 / np.median(np.concatenate(loads)[:, 0]))}
        for i, variant in enumerate(variants):
            if i:
                found = ratio([times[:, 0] / times[:, i] for times in loads])
                cell[variant] = [found.value, found.low, found.high]
        cells.append(cell)
    result = {
        "model": name,
        "type": kind,
        "file_bytes": expected.file_bytes,
        "decode_bound": expected.decode_bound,
        "prefill_bound": expected.prefill_bound,
        "device_change": expected.accelerator_change,
        "seconds_to_make": made,
        "device_mib": taken,
        "parts": logs,
        "cells": cells,
    }
    source.unlink()
    converted.unlink()
    return result


def expected_vocab(source: Path) -> int:
    """Entries of a model's vocabulary."""
    with Decoder(source, 8, 8) as run:
        return run.n_vocab


def main(folder: Path, seconds: float) -> None:
    """Measure all models, and write what there is after each."""
    folder.mkdir(parents=True, exist_ok=True)
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    device = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    results = []
    for name, kind in MODELS.items():
        results.append(measure(name, kind, folder, seconds))
        found = {"device": device, "threads": THREADS, "models": results}
        (folder / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
        (folder / "gpu.md").write_text(gpu_tables(found))
        print((folder / "gpu.md").read_text(), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 9.0)
