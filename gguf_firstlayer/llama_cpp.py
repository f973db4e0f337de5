"""llama-cpp-python on the patched libraries: `import gguf_firstlayer.llama_cpp as llama_cpp`.

The import returns the module `llama_cpp` itself, set up to load these libraries. `python -m gguf_firstlayer.llama_cpp` is its
OpenAI-compatible server, as `python -m llama_cpp.server` is.

Raises:
    FirstLayerError: llama-cpp-python is missing, does not fit the libraries, or was already imported.
"""

from __future__ import annotations

import importlib.metadata
import os
import runpy
import sys

from gguf_firstlayer.errors import FirstLayerError
from gguf_firstlayer.installation import build, load_backends, paths

_INSTALL = 'CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF" pip install --no-cache-dir llama-cpp-python=='


def _prepare() -> None:
    """Check that llama-cpp-python fits the libraries, and tell it where they are."""
    libraries, wanted = paths()["libllama"].parent, build().bindings
    if not wanted:
        raise FirstLayerError("no llama-cpp-python fits these libraries, which were built from another llama.cpp; build them "
                              "again without LLAMA_CPP_SOURCE_DIR")  # fmt: skip
    try:
        version = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError as err:
        raise FirstLayerError(f"llama-cpp-python is not installed: {_INSTALL}{wanted}") from err
    if version != wanted:
        raise FirstLayerError(f"llama-cpp-python {version} does not fit these libraries: {_INSTALL}{wanted}")
    if "llama_cpp" in sys.modules and os.environ.get("LLAMA_CPP_LIB_PATH") != str(libraries):
        raise FirstLayerError("llama_cpp was already imported on other libraries; import gguf_firstlayer.llama_cpp first")
    os.environ["LLAMA_CPP_LIB_PATH"] = str(libraries)
    load_backends()


if __name__ == "__main__":
    try:
        _prepare()
    except FirstLayerError as err:
        sys.exit(f"gguf-firstlayer: {err}")
    runpy.run_module("llama_cpp.server", run_name="__main__", alter_sys=True)
else:
    _prepare()
    import llama_cpp

    sys.modules[__name__] = llama_cpp
