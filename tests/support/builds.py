"""The two builds of llama.cpp, stock and patched, and models that run on them."""

from __future__ import annotations

import json
import os
import pickle
import platform
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gguf_firstlayer import paths

# tools run on the CPU unless a test says otherwise: devices round differently, which the tests of exactness are not about
os.environ |= {"LLAMA_ARG_DEVICE": "none", "LLAMA_ARG_N_GPU_LAYERS": "0", "LLAMA_ARG_N_GPU_LAYERS_DRAFT": "0"}

# a process that aborts would start a debugger, which may wait for ever
os.environ["GGML_NO_BACKTRACE"] = "1"

# several tests run at once, so a thread that waits for others leaves its processor to them
os.environ["OMP_WAIT_POLICY"] = "passive"

# demand is left alone where it saves less than it costs, as in tiny models, with which it is tested
os.environ["LLAMA_FIRSTLAYER_DEMAND_ALWAYS"] = "1"

ROOT = Path(__file__).resolve().parent.parent.parent

STOCK = ROOT / "build" / "stock" / "bin"

PATCHED = paths()["libllama"].parent

WORKER = Path(__file__).with_name("worker.py")


# from this batch size on, kernels round like those of large batches, with which rows are computed; what differs is seen by the
# difference of the stock library between batch sizes
EXACT_FROM = 2 if platform.machine() in ("x86_64", "AMD64") else 64

# MiB that hold so few rows of SmolLM2 that some are evicted now and then
CACHE_SIZE = 1


class Optional(type(Path())):  # type: ignore[misc] # before Python 3.12, Path itself has no subclasses
    """A model that runs with something that it has on request, as worker.Model takes it, and as tools do."""

    LOAD: ClassVar[dict[str, Any]] = {}
    OPTIONS: ClassVar[list[object]] = []
    # of the context, and of tools: with these, for the source too, SmolLM2 has the same bits
    CONTEXT: ClassVar[dict[str, Any]] = {}
    EXACT: ClassVar[list[object]] = []
    # what a log says once it is used
    SAYS: ClassVar[list[str]] = []


class Cached(Optional):
    """With a row cache."""

    LOAD, OPTIONS = {"cache": CACHE_SIZE}, ["--firstlayer-cache", CACHE_SIZE]
    SAYS: ClassVar = ["rows of the first layer are cached"]


class Demanded(Optional):
    """Computing only what is read. Flash attention has a kernel for few rows, which rounds differently."""

    LOAD, OPTIONS = {"demand": "embeddings"}, ["--demand", "embeddings"]
    CONTEXT, EXACT = {"flash_attn_type": 0}, ["-fa", "off"]
    SAYS: ClassVar = ["not computed, since nobody reads it"]


class CachedAndDemanded(Cached):
    """With both."""

    LOAD, OPTIONS = Cached.LOAD | Demanded.LOAD, Cached.OPTIONS + Demanded.OPTIONS
    CONTEXT, EXACT = Demanded.CONTEXT, Demanded.EXACT
    SAYS: ClassVar = Cached.SAYS + Demanded.SAYS


# what all processes are run with, such as a sanitizer's library
PRELOADED = os.environ.get("LD_PRELOAD")

# processes of worker.py that wait for jobs, by their build
IDLE: dict[Path, list[subprocess.Popen[str]]] = defaultdict(list)


def preload(library: Path) -> dict[str, str]:
    """Environment of a process with a library of its own, beside what all have."""
    return {"LD_PRELOAD": f"{PRELOADED} {library}" if PRELOADED else str(library)}


@cache
def preloaded(name: str) -> dict[str, str]:
    """Environment of a process with a library of tests/support."""
    library = Path(tempfile.mkdtemp()) / f"{name}.so"
    subprocess.run(["c++", "-shared", "-fPIC", Path(__file__).with_name(f"{name}.cpp"), "-o", library], check=True)
    return preload(library)


def run(build: Path, *jobs: dict[str, Any]) -> list[Any]:
    """Results of jobs of worker.py on a build of llama.cpp, in a separate process."""
    jobs = tuple(job | {"load": job.get("load", {}) | getattr(job.get("model"), "LOAD", {})} for job in jobs)
    environment = os.environ | {"LLAMA_CPP_LIB_PATH": str(build)}
    # elsewhere, libraries of devices may not survive a fork; what is preloaded must be there from the start
    forks = sys.platform == "linux" and environment.get("LD_PRELOAD") == PRELOADED
    worker = IDLE[build].pop() if forks and IDLE[build] else None
    if worker is None:
        pipe = subprocess.PIPE
        worker = subprocess.Popen([sys.executable, str(WORKER)], stdin=pipe, stdout=pipe, text=True, env=environment)
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder, "out"), Path(folder, "log")
        log.touch()
        request = {"jobs": jobs, "environment": environment, "out": out, "log": log, "forks": forks}
        worker.stdin.write(json.dumps(request, default=str) + "\n")
        worker.stdin.flush()
        if forks:
            code = worker.stdout.readline().strip()
            assert code, "worker.py ended"
            IDLE[build].append(worker)
        else:
            worker.communicate()
            code = str(worker.returncode)
        assert code == "0", f"{code}: {log.read_text(errors='replace')[-2000:]}"
        return pickle.loads(out.read_bytes())


def both(function: Callable[[Any], Any], *arguments: Any) -> tuple[Any, ...]:
    """Results of a function for two arguments, computed at the same time."""
    with ThreadPoolExecutor(2) as pool:
        return tuple(pool.map(function, arguments))


def compare(source: Path, converted: Path, *jobs: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Pairs of results: of the stock library on the source, and of the patched one on the converted model."""

    def results(side: tuple[Path, Path]) -> list[Any]:
        build, model = side
        return run(build, *(job | {"model": model} for job in jobs))

    return list(zip(*both(results, (STOCK, source), (PATCHED, converted)), strict=True))


def session(model: Path, build: Path, steps: list[Any], **job: Any) -> list[np.ndarray]:
    """The results of the decode steps of a session."""
    (results,) = run(build, job | {"run": "session", "model": model, "steps": steps})
    assert all(np.isfinite(result).all() for result in results)
    return results


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) > 0 and all(map(np.array_equal, a, b))
