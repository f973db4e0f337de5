"""Runs functions of this package in a child process: on hostile metadata, llama.cpp's loader aborts its process."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar, cast

from gguf_firstlayer.errors import UNREADABLE, Caller, FirstLayerError
from gguf_firstlayer.start import STOPPING, imported_from, interrupt

T = TypeVar("T")

# seconds that a child has to remove what it has written, when it is interrupted
CLEAN_UP = 5.0

# With -I and -c, Python imports nothing from the working directory, from environment variables or from the user's own folder.
# The child gets its parent's import path, and this package from its own folder, which need not be on that path
_CHILD = """
import importlib.util, sys
sys.path[:], folder = {path!r}, {folder!r}
spec = importlib.util.spec_from_file_location("gguf_firstlayer", f"{{folder}}/__init__.py", submodule_search_locations=[folder])
sys.modules["gguf_firstlayer"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
from gguf_firstlayer.isolation import serve
serve()
"""


def isolated(function: Callable[[Path], T], path: Path) -> T:
    """Call a function of this package for a model in a child process, which may abort. Returns the function's result.

    Raises:
        FirstLayerError: the function raises it, an OSError or a MemoryError, or llama.cpp aborts.
    """
    code = _CHILD.format(path=imported_from(), folder=str(Path(__file__).resolve().parent))
    child = subprocess.Popen(
        [sys.executable, "-I", "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"GGML_NO_BACKTRACE": "1"},  # on an abort, ggml would start a debugger, which would hold up the child
    )
    try:
        answer, told = child.communicate(pickle.dumps((Caller.is_command_line, function, path)))
    except BaseException:
        _end(child)
        raise
    if child.returncode != 0:
        lines = told.decode(errors="replace").splitlines()
        if child.returncode == -getattr(signal, "SIGBUS", 0) or any(UNREADABLE in line for line in lines):
            raise FirstLayerError(f"{path}: {UNREADABLE}")
        if child.returncode == -getattr(signal, "SIGKILL", 0):
            raise FirstLayerError(f"{path}: the system killed llama.cpp, perhaps for lack of memory; close other programs")
        if any(line.startswith("Traceback") for line in lines):
            raise FirstLayerError(f"{path} cannot be analysed ({lines[-1]}); please report this")
        asserted = [line for line in lines if "ASSERT" in line or "error" in line.lower()]
        raise FirstLayerError(f"{path}: llama.cpp cannot run this model ({asserted[0] if asserted else 'it crashed'})")
    result = pickle.loads(answer)
    if isinstance(result, MemoryError):
        raise FirstLayerError(f"{path}: out of memory; close other programs, or use a smaller model") from result
    if isinstance(result, OSError):
        raise FirstLayerError(f"{result.filename or path}: {result.strerror or result}") from result
    if isinstance(result, FirstLayerError):
        raise result
    return cast(T, result)


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a child, which first removes what it has written."""
    child.terminate()
    with suppress(subprocess.TimeoutExpired):
        child.wait(CLEAN_UP)
    child.kill()
    child.wait()


def serve() -> None:
    """The child's side of `isolated`."""
    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, interrupt)
    Caller.is_command_line, function, path = pickle.load(sys.stdin.buffer)
    with os.fdopen(os.dup(1), "wb") as answer:
        os.dup2(2, 1)  # whatever libraries print is no part of the answer
        try:
            result = function(path)
        except (FirstLayerError, OSError, MemoryError) as err:
            result = err
        pickle.dump(result, answer)
