from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gguf_firstlayer import convert, paths

ROOT = Path(__file__).resolve().parent.parent
STOCK = ROOT / "build" / "stock" / "bin"
PATCHED = paths()["libllama"].parent
WORKER = ROOT / "tests" / "worker.py"

# printed after the results: figures that a test measured
REPORT: list[str] = []


def run(build: Path, *jobs: dict[str, Any]) -> list[Any]:
    """Results of the jobs of tests/worker.py on a build of llama.cpp, in a process of its own."""
    environment = os.environ | {"LLAMA_CPP_LIB_PATH": str(build), "GGML_NO_BACKTRACE": "1"}
    out = Path(os.environ.get("TMPDIR", "/tmp")) / f"worker-{os.getpid()}.pickle"
    command = [sys.executable, str(WORKER), str(out)]
    text = json.dumps(jobs, default=str)
    done = subprocess.run(command, input=text, text=True, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    try:
        return pickle.loads(out.read_bytes())
    finally:
        out.unlink()


def cli(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does."""
    command = [sys.executable, "-m", "gguf_firstlayer", *map(str, arguments)]
    return subprocess.run(command, text=True, capture_output=True, cwd=ROOT, check=False, **options)


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one sentence on stderr of a run that was refused."""
    assert done.returncode in (1, 2), done
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def write_archs(folder: Path) -> None:
    """Write tiny random models of every architecture: llama.cpp's own test writes some, random_models.py the others."""
    subprocess.run([STOCK / "test-llama-archs", "-o", folder], check=True, capture_output=True)
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
