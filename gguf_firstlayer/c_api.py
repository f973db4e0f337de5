"""The C API of `llama-firstlayer.h`, and the other functions of llama.cpp that this package needs, through ctypes."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import numpy.typing as npt

from gguf_firstlayer.errors import UNREADABLE, Caller, FirstLayerError
from gguf_firstlayer.installation import load_backends, paths
from gguf_firstlayer.start import STOPPING

# kept here: the library does not copy it
_BUS_ERROR = f"gguf-firstlayer: {UNREADABLE}; nothing was written, run this again\n".encode()

_LOG_LEVEL_ERROR = 4

# bytes of `llama_model_kv_override::val_str`, without the zero at its end
MAX_OVERRIDE = 127

# values beyond this are not quantized: for the smallest types, ggml compares products of four of them, and aborts if those are
# infinite
MAX_QUANTIZED = 1e8

_LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class CUse(ctypes.Structure):
    """`struct llama_firstlayer_use`."""

    _fields_ = [
        ("weight", ctypes.c_char_p),
        ("n_slices", ctypes.c_int64),
        ("n_used", ctypes.c_int64),
        ("multiply_adds", ctypes.c_int64),
        ("replaced", ctypes.c_bool),
    ]


class CSite(ctypes.Structure):
    """`struct llama_firstlayer_site`."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("recipe", ctypes.c_char_p),
        ("width", ctypes.c_int64),
        ("table", ctypes.c_char_p),
        ("column", ctypes.c_int64),
        ("used", ctypes.c_bool),
    ]


class _CCache(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "max_rows", "hits", "misses", "bytes", "max_bytes", "us")]


class _CProducts(ctypes.Structure):
    _fields_ = [("all", ctypes.c_int64), ("read", ctypes.c_int64)]


class Products(NamedTuple):
    """Multiply-adds of the products of matrices in a graph (`struct llama_firstlayer_products`).

    Attributes:
        all: with attention
        read: of which demand leaves these
    """

    all: int
    read: int


@dataclass(frozen=True)
class RowCache:
    """The rows of the first layer that a loaded model keeps (`struct llama_firstlayer_cache_data`).

    Attributes:
        rows, max_rows: how many there are, and how many fit
        hits: tokens whose row was there, or was computed for the same batch
        misses: rows computed
        bytes, max_bytes: of these rows, and of all that fit
        seconds: that computing rows took
    """

    rows: int
    max_rows: int
    hits: int
    misses: int
    bytes: int
    max_bytes: int
    seconds: float


class _GGUFInitParams(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


@contextmanager
def undisturbed() -> Iterator[None]:
    """Delay signals until a call into C has ended: an exception raised in the log callback would be lost.

    Blocking them is not enough: any thread of the process may receive them for the main one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    numbers = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]
    previous = [signal.signal(number, lambda number, _frame: received.append(number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler or signal.SIG_DFL)
        if received:
            signal.raise_signal(received[0])


class Extent(NamedTuple):
    """Sizes in bytes according to the header of a GGUF file: of the header, and of the whole file."""

    header: int
    file: int


class Library:
    """libllama and libggml-base of the build. Use `library()` to get the one instance."""

    def __init__(self) -> None:
        found = paths()
        try:
            self.ggml = ctypes.CDLL(str(found["libggml-base"]))
            self.llama = ctypes.CDLL(str(found["libllama"]))
        except OSError as err:
            raise FirstLayerError(f"the patched llama.cpp cannot be loaded ({err}); build it again") from err
        load_backends()
        self.errors: list[str] = []

        # kept as attributes: ctypes does not hold callbacks alive
        def log(level: int, text: bytes, _user_data: int | None) -> None:
            if level == _LOG_LEVEL_ERROR:
                self.errors.append(text.decode(errors="replace").strip())

        self._log = _LOG_CALLBACK(log)
        self.llama.llama_log_set(self._log, None)

        handle, text, i32, i64 = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_int64
        floats, flag = ctypes.POINTER(ctypes.c_float), ctypes.c_bool
        signatures: dict[str, tuple[Any, Any]] = {
            "llama_firstlayer_error": (text, []),
            "llama_firstlayer_explain_bus_errors": (None, [text]),
            "llama_firstlayer_remove_on_bus_error": (None, [text, text]),
            "llama_firstlayer_init": (handle, [text, i32, i32, flag]),
            "llama_firstlayer_init_on": (handle, [text, text, i32, i32, flag]),
            "llama_firstlayer_init_for_cache": (handle, [text, i32]),
            "llama_firstlayer_free": (None, [handle]),
            "llama_firstlayer_n_vocab": (i32, [handle]),
            "llama_firstlayer_n_sites": (i32, [handle]),
            "llama_firstlayer_get_site": (i32, [handle, i32, ctypes.POINTER(CSite)]),
            "llama_firstlayer_get_site_weight": (text, [handle, i32, i32]),
            "llama_firstlayer_get_elidable": (text, [handle, i32]),
            "llama_firstlayer_find_spares": (i32, [handle]),
            "llama_firstlayer_get_spare": (text, [handle, i32]),
            "llama_firstlayer_get_blocker": (text, [handle]),
            "llama_firstlayer_n_uses": (i32, [handle]),
            "llama_firstlayer_get_use": (i32, [handle, i32, ctypes.POINTER(CUse)]),
            "llama_firstlayer_set_tables": (None, [text]),
            "llama_firstlayer_set_cache": (None, [ctypes.c_double]),
            "llama_firstlayer_set_demand": (None, [text]),
            "llama_firstlayer_count_products": (i32, [text, i32, i32, ctypes.c_int, ctypes.POINTER(_CProducts)]),
            "llama_firstlayer_check": (i32, [text]),
            "llama_firstlayer_eval": (i32, [handle, handle, i32, handle]),
            "llama_firstlayer_tokenize": (i32, [handle, text, i32, handle, i32]),
            "llama_firstlayer_run_init": (handle, [text, i32, i32, i32, flag, ctypes.c_int, handle]),
            "llama_firstlayer_run_free": (None, [handle]),
            "llama_firstlayer_run_n_vocab": (i32, [handle]),
            "llama_firstlayer_run_rows": (floats, [handle]),
            "llama_firstlayer_run_decode": (floats, [handle, handle, i32]),
            "llama_firstlayer_run_last": (floats, [handle, handle, i32]),
            "llama_firstlayer_run_n_out": (i32, [handle]),
            "llama_firstlayer_run_time": (i64, [handle, handle, i32, i32]),
            "llama_firstlayer_run_keep": (flag, [handle, i32]),
            "llama_firstlayer_run_left_out": (flag, [handle]),
            "llama_firstlayer_run_get_model": (handle, [handle]),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(self.llama, name, None)
            if function is None:
                raise FirstLayerError(f"{found['libllama']} lacks this package's patches, or has others; build again")
            function.restype, function.argtypes = result, arguments
        if Caller.is_command_line:
            self.llama.llama_firstlayer_explain_bus_errors(_BUS_ERROR)

        self.ggml.gguf_init_from_file.restype = handle
        self.ggml.gguf_init_from_file.argtypes = [text, _GGUFInitParams]
        self.ggml.gguf_free.argtypes = [handle]
        self.ggml.gguf_get_n_tensors.argtypes, self.ggml.gguf_get_n_tensors.restype = [handle], i64
        self.ggml.gguf_get_data_offset.argtypes, self.ggml.gguf_get_data_offset.restype = [handle], ctypes.c_size_t
        for name in ("gguf_get_tensor_offset", "gguf_get_tensor_size"):
            getattr(self.ggml, name).argtypes, getattr(self.ggml, name).restype = [handle, i64], ctypes.c_size_t
        self.ggml.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
        self.ggml.ggml_validate_row_data.argtypes = [i32, handle, ctypes.c_size_t]
        self.ggml.ggml_validate_row_data.restype = ctypes.c_bool
        self.ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
        self.ggml.ggml_quantize_chunk.argtypes = [i32, handle, handle, i64, i64, i64, handle]

    @contextmanager
    def writing(self, path: Path) -> Iterator[None]:
        """Remove an incomplete file, and its temporary folder, if a bus error ends the process in this context."""
        self._incomplete = [os.fsencode(path), os.fsencode(path.parent)]  # kept here, too
        self.llama.llama_firstlayer_remove_on_bus_error(*self._incomplete)
        try:
            yield
        finally:
            self.llama.llama_firstlayer_remove_on_bus_error(None, None)

    def error(self) -> str:
        """The message of our last function that failed, and the first error that llama.cpp logged before it."""
        return " / ".join([self.llama.llama_firstlayer_error().decode(), *self.errors[:1]])

    @contextmanager
    def loading(self, tables: Path | None, cache: float = 0.0, demand: str | None = None) -> Iterator[None]:
        """Let models loaded in this context take tables from a sidecar, keep rows in a cache, and leave out what nobody reads.

        See `Decoder`, and `llama_firstlayer_set_tables`, `llama_firstlayer_set_cache` and `llama_firstlayer_set_demand`.
        """
        self.llama.llama_firstlayer_set_tables(os.fsencode(tables) if tables else None)
        self.llama.llama_firstlayer_set_cache(cache)
        self.llama.llama_firstlayer_set_demand((demand or "none").encode())
        try:
            yield
        finally:
            self.llama.llama_firstlayer_set_tables(None)
            self.llama.llama_firstlayer_set_cache(0.0)
            self.llama.llama_firstlayer_set_demand(b"none")

    def count_products(self, path: Path, n_tokens: int, n_past: int, pooling: int) -> Products:
        """What demand saves for a text in a single batch (`llama_firstlayer_count_products`), from a model's metadata.

        Args:
            path: of the model
            n_tokens: length of the text
            n_past: tokens before it
            pooling: `enum llama_pooling_type` of an embedding; -1 for logits of the last token

        Raises:
            FirstLayerError: llama.cpp cannot build such a graph.
        """
        self.errors.clear()
        products = _CProducts()
        with undisturbed():
            status = self.llama.llama_firstlayer_count_products(
                os.fsencode(path), n_tokens, n_past, pooling, ctypes.byref(products)
            )
        if status != 0:
            raise FirstLayerError(f"{path}: {self.error()}")
        return Products(products.all, products.read)

    def check(self, path: Path, tables: Path | None = None) -> None:
        """Let llama.cpp load a converted file without its weights (`llama_firstlayer_check`).

        Args:
            path: of the model
            tables: its sidecar, if that is to be checked

        Raises:
            FirstLayerError: it cannot be loaded.
        """
        self.errors.clear()
        with undisturbed(), self.loading(tables):
            status = self.llama.llama_firstlayer_check(os.fsencode(path))
        if status != 0:
            raise FirstLayerError(
                f"{(tables or path).name} would not load, so it was not written; please report this: {self.error()}"
            )

    def validate(self, path: Path) -> Extent:
        """Let ggml parse a GGUF header (`gguf_init_from_file`), which is hardened against malformed files.

        Raises:
            FirstLayerError: it is malformed or truncated.
        """
        self.errors.clear()
        with undisturbed():
            context = self.ggml.gguf_init_from_file(os.fsencode(path), _GGUFInitParams(True, None))
        if not context:
            reason = self.errors[0] if self.errors else "unknown reason"
            raise FirstLayerError(f"{path} is malformed or truncated ({reason}); download or create it again")
        header = self.ggml.gguf_get_data_offset(context)
        ends = [
            self.ggml.gguf_get_tensor_offset(context, i) + self.ggml.gguf_get_tensor_size(context, i)
            for i in range(self.ggml.gguf_get_n_tensors(context))
        ]
        self.ggml.gguf_free(context)
        return Extent(header, header + max(ends, default=0))

    def quantize(self, rows: npt.NDArray[np.float32], ggml_type: gguf.GGMLQuantizationType) -> npt.NDArray[np.uint8]:
        """Convert F32 rows [n, width] to a ggml type with ggml's own quantizer (`ggml_quantize_chunk`), on all processors.

        For types that need an importance matrix, all columns count as equally important.

        Returns the rows as bytes, u8 [n, bytes of a row]. The width must be a multiple of the type's block size.

        Raises:
            FirstLayerError: a value is not finite, or exceeds what the type can hold.
        """
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        n, width = rows.shape
        block, size = gguf.GGML_QUANT_SIZES[ggml_type]
        out = np.empty((n, width // block * size), dtype=np.uint8)
        needs_importance = self.ggml.ggml_quantize_requires_imatrix(int(ggml_type))
        importance = np.ones(width, np.float32).ctypes.data_as(ctypes.c_void_p) if needs_importance else None

        def part(first: int, end: int) -> bool:
            source, target = rows[first:end], out[first:end]
            self.ggml.ggml_quantize_chunk(
                int(ggml_type), source.ctypes.data, target.ctypes.data, 0, end - first, width, importance
            )
            return bool(self.ggml.ggml_validate_row_data(int(ggml_type), target.ctypes.data, target.nbytes))

        n_threads = len(processors())
        ends = [n * i // n_threads for i in range(n_threads + 1)]
        valid = block == 1 or bool((np.abs(rows) <= MAX_QUANTIZED).all())
        with undisturbed(), ThreadPoolExecutor(n_threads) as pool:
            valid = valid and all(pool.map(part, ends, ends[1:]))
        if not valid:
            raise FirstLayerError(
                f"the first layer has values that {ggml_type.name.lower()} cannot hold; convert with a wider type, like f32"
            )
        return out


def processors() -> list[int]:
    """The processors that this process may use; each -1 where the system does not report their numbers."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [-1] * (os.cpu_count() or 1)


@cache
def library() -> Library:
    """The build's libraries, loaded once."""
    return Library()


def sidecar_overrides(path: str | os.PathLike[str]) -> dict[str, str]:
    """What `llama_cpp.Llama(kv_overrides=...)` takes to use a sidecar: several overrides if the path is long."""
    parts = [""]
    for character in os.fspath(path):
        if len((parts[-1] + character).encode()) > MAX_OVERRIDE:
            parts.append("")
        parts[-1] += character
    return {f"firstlayer.file.{i}" if i else "firstlayer.file": part for i, part in enumerate(parts)}


def row_cache(model: Any) -> RowCache | None:
    """The row cache of a `llama_cpp.Llama`; None if it has none, or is closed.

    `gguf_firstlayer.llama_cpp` must have been imported first.
    """
    # not through `library()`, which would take over the log from llama-cpp-python
    return read_row_cache(ctypes.CDLL(str(paths()["libllama"])), model.model)


def read_row_cache(llama: ctypes.CDLL, model: int | None) -> RowCache | None:
    """The row cache of a `struct llama_model *` (`llama_model_firstlayer_get_cache`); None if it has none."""
    if not model:
        return None
    get, data = llama.llama_model_firstlayer_get_cache, _CCache()
    get.argtypes = [ctypes.c_void_p, ctypes.POINTER(_CCache)]
    if get(model, ctypes.byref(data)) != 0:
        return None
    return RowCache(data.rows, data.max_rows, data.hits, data.misses, data.bytes, data.max_bytes, data.us / 1e6)
