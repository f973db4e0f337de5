"""The C API of `llama-firstlayer.h`, and what else of libllama the converter needs, through ctypes."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from gguf_firstlayer.errors import FirstLayerError
from gguf_firstlayer.paths import paths

_LOG_LEVEL_ERROR = 4
_LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


@dataclass(frozen=True)
class Site:
    """A tensor of the graph that depends on the token alone (`struct llama_firstlayer_site`).

    Attributes:
        name: name of the graph's node, for example `Qcur-0`
        recipe: the expression that computes it
        width: F32 values per token
        weights: names of the weights that the recipe reads
    """

    name: str
    recipe: str
    width: int
    weights: tuple[str, ...]


class _CSite(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("recipe", ctypes.c_char_p),
        ("width", ctypes.c_int64),
        ("table", ctypes.c_char_p),
        ("column", ctypes.c_int64),
        ("used", ctypes.c_bool),
    ]


class _GGUFInitParams(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Let signals wait for the end of a call into C: an exception raised in the log callback would be lost there.

    Blocking them would not do, since any thread of the process may receive them for the main one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, lambda number, _frame: received.append(number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler or signal.SIG_DFL)
        if received:
            signal.raise_signal(received[0])


class Library:
    """libllama and libggml-base of the build. Use `library()` to get the one instance."""

    def __init__(self) -> None:
        found = paths()
        try:
            self.ggml = ctypes.CDLL(str(found["libggml-base"]))
            self.llama = ctypes.CDLL(str(found["libllama"]))
        except OSError as err:
            raise FirstLayerError(f"the patched llama.cpp cannot be loaded ({err}); build it again") from err
        if not hasattr(self.llama, "llama_firstlayer_open"):
            raise FirstLayerError(f"{found['libllama']} is not patched; build again without -DFIRSTLAYER=OFF")

        self.errors: list[str] = []

        # kept as attributes: ctypes does not hold callbacks alive
        def log(level: int, text: bytes, _user_data: int | None) -> None:
            if level == _LOG_LEVEL_ERROR:
                self.errors.append(text.decode(errors="replace").strip())

        self._log = _LOG_CALLBACK(log)
        self.llama.llama_log_set(self._log, None)

        handle, text, i32, i64 = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_int64
        signatures: dict[str, tuple[Any, Any]] = {
            "llama_firstlayer_error": (text, []),
            "llama_firstlayer_open": (handle, [text, i32, i32]),
            "llama_firstlayer_close": (None, [handle]),
            "llama_firstlayer_n_vocab": (i32, [handle]),
            "llama_firstlayer_n_sites": (i32, [handle]),
            "llama_firstlayer_get_site": (i32, [handle, i32, ctypes.POINTER(_CSite)]),
            "llama_firstlayer_get_site_weight": (text, [handle, i32, i32]),
            "llama_firstlayer_get_elidable": (text, [handle, i32]),
            "llama_firstlayer_get_blocker": (text, [handle]),
            "llama_firstlayer_check": (i32, [text]),
            "llama_firstlayer_eval": (i32, [handle, ctypes.c_void_p, i32, ctypes.c_void_p]),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(self.llama, name)
            function.restype, function.argtypes = result, arguments

        self.ggml.gguf_init_from_file.restype = handle
        self.ggml.gguf_init_from_file.argtypes = [text, _GGUFInitParams]
        self.ggml.gguf_free.argtypes = [handle]
        self.ggml.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
        self.ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
        self.ggml.ggml_quantize_chunk.argtypes = [i32, handle, handle, i64, i64, i64, handle]

    def error(self) -> str:
        """What the last function of ours that failed said, and the first that llama.cpp logged before."""
        return " / ".join([self.llama.llama_firstlayer_error().decode(), *self.errors[:1]])

    def check(self, path: Path) -> None:
        """Let llama.cpp load a converted file without its weights (`llama_firstlayer_check`).

        Raises:
            FirstLayerError: it cannot be loaded.
        """
        self.errors.clear()
        with _undisturbed():
            status = self.llama.llama_firstlayer_check(os.fsencode(path))
        if status != 0:
            raise FirstLayerError(f"{path.name} would not load, so it was not written; please report this: {self.error()}")

    def validate(self, path: Path) -> None:
        """Let ggml parse a GGUF header (`gguf_init_from_file`), which is hardened against malformed files.

        Raises:
            FirstLayerError: it is malformed or truncated.
        """
        self.errors.clear()
        with _undisturbed():
            context = self.ggml.gguf_init_from_file(os.fsencode(path), _GGUFInitParams(True, None))
        if not context:
            reason = self.errors[0] if self.errors else "unknown reason"
            raise FirstLayerError(f"{path} is malformed or truncated ({reason}); download or create it again")
        self.ggml.gguf_free(context)

    def requires_imatrix(self, ggml_type: gguf.GGMLQuantizationType) -> bool:
        """Whether ggml can only quantize to this type with an importance matrix."""
        return bool(self.ggml.ggml_quantize_requires_imatrix(int(ggml_type)))

    def quantize(self, rows: npt.NDArray[np.float32], ggml_type: gguf.GGMLQuantizationType) -> npt.NDArray[np.uint8]:
        """Convert F32 rows [n, width] to a ggml type with ggml's own quantizer (`ggml_quantize_chunk`).

        Returns the rows as bytes, u8 [n, bytes of a row]. The width must be a multiple of the type's block size.
        """
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        n, width = rows.shape
        block, size = gguf.GGML_QUANT_SIZES[ggml_type]
        out = np.empty((n, width // block * size), dtype=np.uint8)
        written = self.ggml.ggml_quantize_chunk(int(ggml_type), rows.ctypes.data, out.ctypes.data, 0, n, width, None)
        assert written == out.nbytes
        return out


@cache
def library() -> Library:
    """The build's libraries, loaded once."""
    return Library()


class Analysis:
    """The sites of a model file (`llama_firstlayer_open`). A context manager.

    Only metadata is read until `rows` is called, which maps the weights of the sites.

    Args:
        path: GGUF file of a model that is not converted; of a split model, the first part
        n_batch: tokens that are evaluated at once

    Attributes:
        n_vocab: entries of the vocabulary
        sites: in the order of the graph
        elidable: names of weights that no graph of the model reads if all sites come from tables
        blocker: why there is no site, in llama.cpp's terms; "" otherwise

    Raises:
        FirstLayerError: llama.cpp cannot load the model.
    """

    def __init__(self, path: Path, n_batch: int = 512) -> None:
        self._library = library()
        self._library.errors.clear()
        with _undisturbed():
            self._handle = self._library.llama.llama_firstlayer_open(os.fsencode(path), n_batch, 0)
        if not self._handle:
            raise FirstLayerError(f"{path}: {self._library.error()}")

        llama = self._library.llama
        self.n_vocab: int = llama.llama_firstlayer_n_vocab(self._handle)
        self.sites = tuple(self._site(i) for i in range(llama.llama_firstlayer_n_sites(self._handle)))
        self.elidable = self._names(lambda i: llama.llama_firstlayer_get_elidable(self._handle, i))
        self.blocker: str = llama.llama_firstlayer_get_blocker(self._handle).decode()

    def _names(self, get: Callable[[int], bytes | None]) -> tuple[str, ...]:
        names: list[str] = []
        while (name := get(len(names))) is not None:
            names.append(name.decode())
        return tuple(names)

    def _site(self, i: int) -> Site:
        llama, site = self._library.llama, _CSite()
        llama.llama_firstlayer_get_site(self._handle, i, ctypes.byref(site))
        weights = self._names(lambda j: llama.llama_firstlayer_get_site_weight(self._handle, i, j))
        return Site(site.name.decode(), site.recipe.decode(), site.width, weights)

    def rows(self, tokens: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Evaluate all sites for some token ids with llama.cpp's kernels (`llama_firstlayer_eval`).

        Args:
            tokens: ids, [n]

        Returns:
            F32 [n, sum of the widths], the sites side by side in their order.

        Raises:
            FirstLayerError: an id is out of range, or memory is short.
        """
        ids = np.ascontiguousarray(tokens, dtype=np.int32)
        out = np.empty((len(ids), sum(site.width for site in self.sites)), dtype=np.float32)
        with _undisturbed():
            status = self._library.llama.llama_firstlayer_eval(self._handle, ids.ctypes.data, len(ids), out.ctypes.data)
        if status != 0:
            raise FirstLayerError(f"the first layer cannot be computed: {self._library.error()}")
        return out

    def close(self) -> None:
        """Free the model; the object must not be used any more."""
        if self._handle:
            with _undisturbed():
                self._library.llama.llama_firstlayer_close(self._handle)
            self._handle = None

    def __enter__(self) -> Analysis:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def analyse(path: Path) -> Analysis:
    """Open an `Analysis`, after a child process did: on hostile metadata, llama.cpp's loader aborts the process.

    Raises:
        FirstLayerError: llama.cpp cannot load the model, or aborts.
    """
    code = (
        "import sys; from pathlib import Path; from gguf_firstlayer import runtime; runtime.Analysis(Path(sys.argv[1])).close()"
    )
    child = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, errors="replace", env=_child_environment()
    )
    if child.returncode < 0:
        asserted = [line for line in child.stderr.splitlines() if "ASSERT" in line or "error" in line.lower()]
        raise FirstLayerError(f"{path}: llama.cpp cannot run this model ({asserted[0] if asserted else 'it crashed'})")
    return Analysis(path)


def _child_environment() -> dict[str, str]:
    # a debugger that ggml starts on an abort would hold the child up
    package_root = str(Path(__file__).resolve().parent.parent)
    return os.environ | {
        "GGML_NO_BACKTRACE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")])),
    }
