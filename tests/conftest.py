from __future__ import annotations

import json
import os
import pickle
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from gguf import GGUFReader, GGUFWriter

import gguf_firstlayer
from gguf_firstlayer import Conversion, paths

ROOT = Path(__file__).resolve().parent.parent
STOCK = ROOT / "build" / "stock" / "bin"
PATCHED = paths()["libllama"].parent
WORKER = ROOT / "tests" / "worker.py"

# tools compute on the processor unless a test says otherwise: devices round otherwise, which exactness is not about
os.environ |= {"LLAMA_ARG_DEVICE": "none", "LLAMA_ARG_N_GPU_LAYERS": "0", "LLAMA_ARG_N_GPU_LAYERS_DRAFT": "0"}

# printed after the results: figures that a test measured
REPORT: list[str] = []


def run(build: Path, *jobs: dict[str, Any]) -> list[Any]:
    """Results of the jobs of tests/worker.py on a build of llama.cpp, in a process of its own."""
    environment = os.environ | {"LLAMA_CPP_LIB_PATH": str(build), "GGML_NO_BACKTRACE": "1"}
    with tempfile.NamedTemporaryFile(suffix=".pickle") as out:
        command = [sys.executable, str(WORKER), out.name]
        text = json.dumps(jobs, default=str)
        done = subprocess.run(command, input=text, text=True, capture_output=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return pickle.load(out)


def convert(source: Path, output: Path | None = None, *, type: str = "q8_0", **options: Any) -> Conversion:
    """Convert a model without measuring it."""
    return gguf_firstlayer.convert(source, output, type=type, **options)


def free_port() -> int:
    """A port on the loopback device that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def openai_client(command: list[object], environment: dict[str, str] | None = None) -> Iterator[openai.OpenAI]:
    """A client of a server, which gets the option --port and ends with the context."""
    port = free_port()
    arguments = [*map(str, command), "--port", str(port)]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(arguments, cwd=ROOT, env=os.environ | (environment or {}), **quiet) as process:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        try:
            deadline = time.monotonic() + 120
            while True:
                assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
                assert time.monotonic() < deadline
                try:
                    client.models.list()
                    break
                except (openai.APIConnectionError, openai.InternalServerError):  # not listening yet, or loading
                    time.sleep(0.1)
            yield client
        finally:
            process.kill()


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


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def divergence(p: np.ndarray, q: np.ndarray) -> tuple[float, float, float]:
    """Mean and maximum KL divergence in nats, and top-1 agreement, of two sets of logits."""
    p, q = log_softmax(p), log_softmax(q)
    values = np.sum(np.exp(p) * (p - q), axis=1)
    return float(values.mean()), float(values.max()), float(np.mean(p.argmax(axis=1) == q.argmax(axis=1)))


def cli(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does."""
    command = [sys.executable, "-m", "gguf_firstlayer", *map(str, arguments)]
    return subprocess.run(command, **{"text": True, "capture_output": True, "cwd": ROOT, "check": False} | options)


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one sentence that a run was refused with; before it, there may be what it was about to do."""
    assert done.returncode in (1, 2), done
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert [line for line in lines if re.match(r"gguf-firstlayer( \w+)?: ", line)] == lines[-1:], done.stderr
    return lines[-1]


def rewrite(source: Path, target: Path, change_key=None, change_tensor=None, change_type=None, drop=frozenset()) -> Path:
    """Copy a GGUF file, changing values of keys and tensors: the callbacks get name and value and return the new value.

    change_type: ggml type of the bytes that `change_tensor` returns instead of numbers
    """
    reader = GGUFReader(source)
    writer = GGUFWriter(target, "unused")
    writer.kv_data[0].clear()
    for name, field in reader.fields.items():
        if name.startswith("GGUF."):
            continue
        value = field.contents()
        if value == []:
            continue  # GGUFWriter has no empty arrays
        value = change_key(name, value) if change_key else value
        writer.add_key_value(name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        if tensor.name in drop:
            continue
        data = change_tensor(tensor.name, tensor.data) if change_tensor else tensor.data
        kind = tensor.tensor_type if data.dtype == tensor.data.dtype else change_type if data.dtype == np.uint8 else None
        writer.add_tensor(tensor.name, np.ascontiguousarray(data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def write_archs(folder: Path) -> None:
    """Write tiny random models of every architecture: llama.cpp's own test writes some, random_models.py the others."""
    subprocess.run([STOCK / "test-llama-archs", "-s", "1", "-o", folder], check=True, capture_output=True)
    environment = os.environ | {"LLAMA_CPP_LIB_PATH": str(STOCK)}
    subprocess.run(
        [sys.executable, ROOT / "tests" / "random_models.py", folder], check=True, capture_output=True, env=environment
    )


@pytest.fixture(scope="session")
def archs(tmp_path_factory) -> Path:
    """A folder of tiny random models of every architecture."""
    folder = tmp_path_factory.mktemp("archs")
    write_archs(folder)
    return folder


@pytest.fixture(scope="session")
def llama(archs) -> Path:
    return archs / "llama-dense.gguf"


@pytest.fixture(scope="session")
def llama_flp(llama, tmp_path_factory) -> Path:
    return convert(llama, tmp_path_factory.mktemp("llama") / "llama-flp.gguf", type="f32").output


@pytest.fixture(scope="session")
def smollm() -> Path:
    """A real model: SmolLM2-135M-Instruct Q4_1."""
    return ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm_flp(smollm, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("smollm")
    return {kind: convert(smollm, folder / f"{kind}.gguf", type=kind).output for kind in ("f32", "q8_0")}


def pytest_terminal_summary(terminalreporter):
    if REPORT:
        terminalreporter.section("measured")
        for line in REPORT:
            terminalreporter.write_line(line)
