"""A model and a file with tables for it."""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from gguf_firstlayer import file_format
from gguf_firstlayer.decoder import Decoder
from gguf_firstlayer.errors import FirstLayerError, UsageError
from gguf_firstlayer.isolation import isolated
from gguf_firstlayer.source import Source

# a row cache of the size that the model chooses, and the largest in MiB
AUTO, MAX_CACHE = -1.0, float(1 << 20)

NO_CACHE = "{} has no row cache of this size; give a larger one, or see what plan says of it"


class Files(NamedTuple):
    """What llama.cpp runs.

    Attributes:
        sources: the model, and its sidecar if it has one
        cache, demand, pooling: as `Decoder` takes them
    """

    sources: tuple[Source, ...]
    cache: float = 0.0
    demand: str | None = None
    pooling: str | None = None

    @property
    def path(self) -> Path:
        """Path of the model."""
        return self.sources[0].path

    @property
    def tables(self) -> Path | None:
        """Path of the sidecar, if there is one."""
        return self.sources[1].path if len(self.sources) > 1 else None

    def open(self, n_ctx: int, n_batch: int, n_threads: int = 0, constants: bool = False) -> Decoder:
        """The model, to decode one text; see `Decoder`."""
        return Decoder(self.path, n_ctx, n_batch, n_threads, constants, **self.options)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `Decoder`, besides the model."""
        return {"tables": self.tables, "cache": self.cache, "demand": self.demand, "pooling": self.pooling}

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(source.bytes for source in self.sources)


def try_out(files: Files) -> None:
    """Decode a token in a child process: with hostile metadata, llama.cpp aborts while it loads or computes.

    Raises:
        FirstLayerError: llama.cpp cannot load or run the files, or aborts.
    """
    isolated(partial(_decode, files.options), files.path)


def open_source(path: Path, refusal: str = "is converted; give the original model first") -> Source:
    """A model that is not converted.

    Raises:
        FirstLayerError: it cannot be read, or is converted: with this refusal.
    """
    source = Source(path)
    if source.get_field(file_format.KEY_VERSION) is not None:
        raise FirstLayerError(f"{path} {refusal}")
    return source


def open_pair(source: Path, converted: Path, pooling: str | None = None) -> tuple[Source, Source, Files]:
    """A model, a file with tables for it, and the files to run with these tables; with a pooling, for embeddings.

    Raises:
        FirstLayerError: one of them cannot be read or run, or is of the wrong kind.
    """
    model, tables = open_source(source, "is itself converted; give the original model first"), Source(converted)
    if tables.get_field(file_format.KEY_VERSION) is None:
        raise FirstLayerError(f"{converted} is not converted; give the file that convert wrote second")
    files = Files((model, tables) if file_format.is_sidecar(tables) else (tables,), pooling=pooling)
    try_out(Files((model,), pooling=pooling))
    try_out(files)  # llama.cpp checks it, so that columns and shapes can be relied on
    return model, tables, files


def open_cached(source: Path, cache: float, pooling: str | None = None) -> tuple[Source, Files]:
    """A model, and the same with a row cache, see `Decoder`; with a pooling, for embeddings.

    Raises:
        FirstLayerError: it cannot be read or run, or has tables instead.
    """
    model = open_source(source, "has tables, so its rows are not cached; give the original model")
    files = Files((model,), cache, pooling=pooling)
    try_out(files)
    return model, files


def parse_cache(text: str) -> float:
    """The size of a row cache in MiB, as llama.cpp's option --firstlayer-cache takes it; AUTO for `auto`.

    Raises:
        UsageError: it is not one.
    """
    try:
        size = AUTO if text == "auto" else float(text)
    except ValueError:
        size = math.nan
    if not (text == "auto" or 0 < size <= MAX_CACHE):
        raise UsageError(f"'{text}' is not the size of a cache; give a number of MiB, or auto")
    return size


def cache_size(text: str) -> str:
    """The same as an argument of the command line, kept as text.

    Raises:
        argparse.ArgumentTypeError: it is no size, perhaps since the option stands before a model.
    """
    try:
        parse_cache(text)
    except UsageError:
        raise argparse.ArgumentTypeError(f"'{text}' is not the size of a cache; put --cache after the model") from None
    return text


def context_length(model: Source) -> int:
    """Context length that a model was trained for; beyond it, llama.cpp may abort."""
    length = model.value(f"{model.architecture}.context_length")
    return length if isinstance(length, int) and length > 0 else 1 << 31


def _decode(options: dict[str, Any], path: Path) -> None:
    with Decoder(path, 16, 16, **options) as run:
        run.time([0], 1)
