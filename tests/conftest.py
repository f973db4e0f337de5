from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from support.builds import ROOT
from support.models import convert, write_archs

from gguf_firstlayer.c_api import processors


def pytest_configure() -> None:
    """One processor for each worker under ThreadSanitizer: there, ggml's threads that wait for each other take minutes."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker and "libtsan" in os.environ.get("SANITIZER", ""):
        allowed = processors()
        os.sched_setaffinity(0, {allowed[int(worker.removeprefix("gw")) % len(allowed)]})


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
def minilm() -> Path:
    """A real encoder: all-MiniLM-L6-v2 in F16."""
    return ROOT / "models" / "all-MiniLM-L6-v2.F16.gguf"


@pytest.fixture(scope="session")
def smollm_flp(smollm, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("smollm")
    return {kind: convert(smollm, folder / f"{kind}.gguf", type=kind).output for kind in ("f32", "q8_0")}


@pytest.fixture
def short_blocks(monkeypatch) -> None:
    """Lets `bench` measure little, for tests in which the times themselves do not matter."""
    for name, value in (("MIN_ROUNDS", 1), ("BLOCK_TOKENS", 8), ("PATIENCE", 1)):
        for module in ("timing", "bench"):  # the latter does not import all of them
            monkeypatch.setattr(sys.modules[f"gguf_firstlayer.{module}"], name, value, raising=False)


@pytest.fixture
def short_continuations(monkeypatch) -> None:
    """Lets `verify` continue prompts by a few tokens, which takes much of its time otherwise, for tests of other figures."""
    monkeypatch.setattr("gguf_firstlayer.scores.GREEDY", 4)


@pytest.fixture
def measured(record_property) -> Callable[[str], None]:
    """Takes a line about figures that a test measured, which is printed after the results."""
    return partial(record_property, "measured")


def pytest_terminal_summary(terminalreporter):
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome)]
    lines = [line for report in reports for name, line in report.user_properties if name == "measured"]
    if lines:
        terminalreporter.section("measured")
        for line in lines:
            terminalreporter.write_line(line)
