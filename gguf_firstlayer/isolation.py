"""Functions of this package in a child process: on hostile metadata, llama.cpp's loader aborts its process."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

from gguf_firstlayer.errors import Caller, FirstLayerError
from gguf_firstlayer.start import imported_from

T = TypeVar("T")

# Started with -I and -c, Python imports nothing from the working directory, from variables or from the user's own folder: the
# child gets the import path of its parent, and this package from where it is, be that a folder which is not on the path
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
    """Result of a function of this package for a model, from a child process, which may abort.

    Raises:
        FirstLayerError: the function raises it, or llama.cpp aborts.
    """
    code = _CHILD.format(path=imported_from(), folder=str(Path(__file__).resolve().parent))
    child = subprocess.run(
        [sys.executable, "-I", "-c", code],
        input=pickle.dumps((Caller.is_command_line, function, path)),
        capture_output=True,
        env=os.environ | {"GGML_NO_BACKTRACE": "1"},  # a debugger that ggml starts on an abort would hold the child up
    )
    if child.returncode != 0:
        lines = child.stderr.decode(errors="replace").splitlines()
        asserted = [line for line in lines if "ASSERT" in line or "error" in line.lower()]
        raise FirstLayerError(f"{path}: llama.cpp cannot run this model ({asserted[0] if asserted else 'it crashed'})")
    result = pickle.loads(child.stdout)
    if isinstance(result, FirstLayerError):
        raise result
    return cast(T, result)


def serve() -> None:
    """The other side of `isolated`."""
    Caller.is_command_line, function, path = pickle.load(sys.stdin.buffer)
    try:
        result = function(path)
    except FirstLayerError as err:
        result = err
    pickle.dump(result, sys.stdout.buffer)
