"""The patched llama.cpp that this package runs on: its libraries, its tools, and what it was built from."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

from gguf_firstlayer.errors import FirstLayerError

PACKAGE = Path(__file__).resolve().parent

# name that users know -> executable of llama.cpp
TOOLS = {
    "main": "llama-completion",
    "cli": "llama-cli",
    "server": "llama-server",
    "bench": "llama-bench",
    "batched-bench": "llama-batched-bench",
    "perplexity": "llama-perplexity",
    "quantize": "llama-quantize",
    "gguf-split": "llama-gguf-split",
    "imatrix": "llama-imatrix",
    "rpc-server": "ggml-rpc-server",
}


def library_name(name: str) -> str:
    """File name of a shared library on this platform: `libllama.so`, `libllama.dylib`, `llama.dll`."""
    if sys.platform == "win32":
        return f"{name}.dll"
    return f"lib{name}.dylib" if sys.platform == "darwin" else f"lib{name}.so"


def paths() -> dict[str, Path]:
    """Libraries (`libllama`, `libggml`, `libggml-base`) and tools of the build, by name.

    The installed package is searched first, then the `build` folder of a checkout. Tools that were not built are left out.

    Raises:
        FirstLayerError: there is no build.
    """
    for folder in (PACKAGE / "bin", PACKAGE.parent / "build" / "bin"):
        if not (folder / library_name("llama")).exists():
            continue
        found = {f"lib{name}": folder / library_name(name) for name in ("llama", "ggml", "ggml-base")}
        suffix = ".exe" if sys.platform == "win32" else ""
        found |= {name: folder / (tool + suffix) for name, tool in TOOLS.items() if (folder / (tool + suffix)).exists()}
        return found
    raise FirstLayerError("the patched llama.cpp is not built; run: pip install . (in a checkout, scripts/quickstart)")


class Build(NamedTuple):
    """What the libraries were built from.

    Attributes:
        commit: of llama.cpp
        bindings: version of llama-cpp-python whose declarations match; "" if it was built from another llama.cpp
        https: whether the tools can download from the Hub themselves
    """

    commit: str
    bindings: str
    https: bool


def build() -> Build:
    """Read what CMakeLists.txt recorded beside the libraries.

    Raises:
        FirstLayerError: there is no build, or it is incomplete.
    """
    path = paths()["libllama"].with_name("build.json")
    try:
        noted = json.loads(path.read_text())
        return Build(noted["llama.cpp"], noted["llama-cpp-python"], noted["https"])
    except (OSError, ValueError, KeyError) as err:
        raise FirstLayerError(f"{path} is missing or damaged; build llama.cpp again") from err


def load_backends() -> None:
    """Load the backends that fit this machine, if they are not part of the libraries (`GGML_BACKEND_DL`).

    llama.cpp looks for them beside the executable and in the working directory. If the executable is Python, they are in
    neither place.

    Raises:
        FirstLayerError: no backend runs on this machine.
    """
    found = paths()
    ggml, base = ctypes.CDLL(str(found["libggml"])), ctypes.CDLL(str(found["libggml-base"]))
    ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    if ggml.ggml_backend_dev_count() > 0:
        return
    # users of a verb do not need to see on stderr, each time, which backends were found
    silence = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    base.ggml_log_set(silence, None)
    ggml.ggml_backend_load_all_from_path(os.fsencode(found["libggml"].parent))
    base.ggml_log_set(None, None)
    if ggml.ggml_backend_dev_count() == 0:
        raise FirstLayerError(f"none of the backends in {found['libggml'].parent} runs on this machine; build llama.cpp here")
