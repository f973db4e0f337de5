"""The command line and the tools of llama.cpp, as a user calls them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from support.builds import PATCHED, ROOT, CachedAndDemanded, Demanded, preloaded


def cli(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does."""
    command = [sys.executable, "-m", "gguf_firstlayer", *map(str, arguments)]
    return subprocess.run(command, **{"text": True, "capture_output": True, "cwd": ROOT, "check": False} | options)


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one sentence with which a run was refused; it may follow lines about what the run was going to do."""
    assert done.returncode in (1, 2), done
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert [line for line in lines if re.match(r"gguf-firstlayer( \w+)?: ", line)] == lines[-1:], done.stderr
    return lines[-1]


def load_options(arguments: Iterable[object]) -> list[object]:
    """The options of the models among the arguments that run with something that they have on request."""
    return [option for argument in arguments for option in getattr(argument, "OPTIONS", [])]


def missing(log: str, arguments: Iterable[object]) -> list[str]:
    """What a log should say, and does not, of what models among the arguments have on request.

    Without it, a model that never got any of it would pass as equal to its source.
    """
    lacking = [line for argument in arguments for line in getattr(argument, "SAYS", []) if line not in log]
    # what is said while a model is loaded may prove wrong with its first batch
    return lacking + [line for line in ("computed without a cache", "rows of a batch cannot be cached") if line in log]


def whole_log() -> dict[str, str]:
    """Environment of a tool whose log is read: with a library that waits for its last lines."""
    return preloaded("whole_log") if sys.platform == "linux" else {}


def run_tool(name: str, *arguments: object, env: Mapping[str, str] = os.environ) -> subprocess.CompletedProcess[str]:
    """Run a tool of the patched build to its end."""
    command = [str(PATCHED / name), *map(str, arguments)]
    preloads = " ".join(filter(None, [env.get("LD_PRELOAD"), whole_log().get("LD_PRELOAD")]))
    env = {**env, "LD_PRELOAD": preloads} if preloads else env
    return subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


# what tools do not say: one shows no warnings, the other reads everything
SILENT = {"llama-cli": CachedAndDemanded.SAYS, "llama-imatrix": Demanded.SAYS}


def tool(name: str, *arguments: object, log: bool = False) -> str:
    """What a tool of the patched build prints, or its log."""
    done = run_tool(name, *arguments, *load_options(arguments))
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    assert set(missing(done.stderr, arguments)) <= set(SILENT.get(name, [])), done.stderr[-2000:]
    return done.stderr if log else done.stdout


def split(source: Path, prefix: Path, *options: str) -> list[Path]:
    """The parts of a model that llama-gguf-split writes."""
    command = [PATCHED / "llama-gguf-split", "--split", "--split-max-tensors", "10", *options, source, prefix]
    subprocess.run(command, check=True, capture_output=True)
    return sorted(prefix.parent.glob(f"{prefix.name}-*.gguf"))


def python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program the way a user of the package would."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment, check=False)
