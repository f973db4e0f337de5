"""A model and a file with tables for it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

from gguf_firstlayer import file_format
from gguf_firstlayer.decoder import Decoder
from gguf_firstlayer.errors import FirstLayerError
from gguf_firstlayer.isolation import isolated
from gguf_firstlayer.source import Source


class Files(NamedTuple):
    """What llama.cpp runs.

    Attributes:
        sources: the model, and its sidecar if it has one
    """

    sources: tuple[Source, ...]

    @property
    def path(self) -> Path:
        """Path of the model."""
        return self.sources[0].path

    @property
    def tables(self) -> Path | None:
        """Path of the sidecar, if there is one."""
        return self.sources[1].path if len(self.sources) > 1 else None

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(source.bytes for source in self.sources)


def open_pair(source: Path, converted: Path) -> tuple[Source, Source, Files]:
    """A model, a file with tables for it, and the files to run with these tables.

    Raises:
        FirstLayerError: one of them cannot be read, or is of the wrong kind.
    """
    model, tables = Source(source), Source(converted)
    if model.get_field(file_format.KEY_VERSION) is not None:
        raise FirstLayerError(f"{source} is itself converted; give the original model first")
    if tables.get_field(file_format.KEY_VERSION) is None:
        raise FirstLayerError(f"{converted} is not converted; give the file that convert wrote second")
    files = Files((model, tables) if file_format.is_sidecar(tables) else (tables,))
    isolated(partial(_loads, files.tables), files.path)  # llama.cpp checks it, so that columns and shapes can be relied on
    return model, tables, files


def context_length(model: Source) -> int:
    """Context length that a model was trained for; beyond it, llama.cpp may abort."""
    field = model.get_field(f"{model.architecture}.context_length")
    length = field.contents() if field else None
    return length if isinstance(length, int) and length > 0 else 1 << 31


def _loads(tables: Path | None, path: Path) -> None:
    """Called through `isolated`, since llama.cpp may abort on a malformed file."""
    Decoder(path, 16, 16, tables=tables).close()
