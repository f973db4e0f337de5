"""A model that decodes one text, to measure what tables do to its output and its speed (`llama_firstlayer_run`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from gguf_firstlayer import file_format
from gguf_firstlayer.c_api import RowCache, library, processors, read_row_cache, undisturbed
from gguf_firstlayer.demand import pooling_number
from gguf_firstlayer.errors import FirstLayerError
from gguf_firstlayer.runtime import Analysis

Self = TypeVar("Self", bound="Decoder")


# bytes that the logits of a text, and those of a batch, may take: vocabularies of more than half a million tokens reach that
TEXT_BYTES, BATCH_BYTES = 1 << 30, 1 << 28


def held(n_bytes: int, n_vocab: int) -> int:
    """The number of tokens whose logits take no more than some bytes, at least 1."""
    return max(1, n_bytes // (4 * n_vocab))


class Decoder:
    """A model with its weights that decodes one text (`llama_firstlayer_run_init`). A context manager.

    Args:
        path: of the model
        n_ctx: tokens of the text
        n_batch: maximum number of tokens per batch
        n_threads: 0 for one per processor that this process may use
        constants: for a converted model: sites come from constants instead of lookups, and the output is wrong
        tables: sidecar with the model's tables
        cache: MiB for a row cache, if the model has no tables; negative for as much as it chooses itself
        demand: what is read, `demand.ROWS` or `demand.EMBEDDINGS`: the rest is left out; None for everything
        pooling: one of `demand.POOLINGS`: texts of up to n_batch tokens are embedded; None for logits

    Attributes:
        n_vocab: entries of the vocabulary
        n_out: width of what `last` returns

    Raises:
        FirstLayerError: llama.cpp cannot load the model with its weights, or it has no next-token distribution of its own.
    """

    def __init__(
        self,
        path: Path,
        n_ctx: int,
        n_batch: int = 128,
        n_threads: int = 0,
        constants: bool = False,
        tables: Path | None = None,
        cache: float = 0.0,
        demand: str | None = None,
        pooling: str | None = None,
        _rows_of: Analysis | None = None,
    ) -> None:
        self._library, self.path, self.n_batch = library(), path, n_batch
        self._library.errors.clear()
        analysis = _rows_of.handle if _rows_of else None
        n_threads = n_threads or len(processors())
        with undisturbed(), self._library.loading(tables, cache, demand):
            self.handle = self._library.llama.llama_firstlayer_run_init(
                os.fsencode(path), n_ctx, n_batch, n_threads, constants, pooling_number(pooling), analysis
            )
        if not self.handle:
            raise FirstLayerError(f"{path}: {self._library.error()}")
        self.n_vocab: int = self._library.llama.llama_firstlayer_run_n_vocab(self.handle)
        self.n_out: int = self._library.llama.llama_firstlayer_run_n_out(self.handle)

    def decode(self, tokens: npt.ArrayLike, n_batch: int | None = None) -> Iterator[npt.NDArray[np.float32]]:
        """Decode further tokens. Yields their logits, F32 [n, vocabulary], batch by batch; each array is valid until the next.

        Raises:
            FirstLayerError: llama.cpp cannot decode.
        """
        ids = np.ascontiguousarray(tokens, np.int32)
        size = n_batch or self.n_batch
        for first in range(0, len(ids), size):
            batch = ids[first : first + size]
            with undisturbed():
                logits = self._library.llama.llama_firstlayer_run_decode(self.handle, batch.ctypes.data, len(batch))
            if not logits:
                raise FirstLayerError(f"{self.path}: {self._library.error()}")
            yield np.ctypeslib.as_array(logits, (len(batch), self.n_vocab))

    def last(self, tokens: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Decode further tokens in a single batch. Returns the last one's logits; or embed them, as a text of its own.

        Returns:
            F32 [n_out]

        Raises:
            FirstLayerError: llama.cpp cannot decode.
        """
        ids = np.ascontiguousarray(tokens, np.int32)
        with undisturbed():
            out = self._library.llama.llama_firstlayer_run_last(self.handle, ids.ctypes.data, len(ids))
        if not out:
            raise FirstLayerError(f"{self.path}: {self._library.error()}")
        return np.ctypeslib.as_array(out, (self.n_out,)).copy()

    def time(self, tokens: npt.ArrayLike, n_batch: int) -> float:
        """Decode further tokens in batches that compute only the last token's logits, or embed each batch. Returns the seconds.

        Raises:
            FirstLayerError: llama.cpp cannot decode.
        """
        ids = np.ascontiguousarray(tokens, np.int32)
        with undisturbed():
            elapsed = self._library.llama.llama_firstlayer_run_time(self.handle, ids.ctypes.data, len(ids), n_batch)
        if elapsed < 0:
            raise FirstLayerError(f"{self.path}: {self._library.error()}")
        return float(elapsed) / 1e6

    @property
    def left_out(self) -> bool:
        """Whether demand has left anything out so far."""
        return bool(self._library.llama.llama_firstlayer_run_left_out(self.handle))

    def row_cache(self) -> RowCache | None:
        """The model's row cache; None if it has none."""
        model = self._library.llama.llama_firstlayer_run_get_model(self.handle)
        return read_row_cache(self._library.llama, model)

    def keep(self, n: int) -> bool:
        """Forget all but the first n tokens. Returns false if the model cannot forget a part, like recurrent models."""
        return bool(self._library.llama.llama_firstlayer_run_keep(self.handle, n))

    def close(self) -> None:
        """Free the model; the object must not be used afterwards."""
        if self.handle:
            with undisturbed():
                self._library.llama.llama_firstlayer_run_free(self.handle)
            self.handle = None

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class InMemoryDecoder(Decoder):
    """A `Decoder` of a source on the CPU whose sites come from rows in memory. It shows what tables would do to the output.

    Args:
        path: of the model
        analysis: of the same model
        n_ctx: tokens of a text

    Attributes:
        rows: F32 [vocabulary, columns], where each site begins at a multiple of `file_format.ALIGNMENT` columns. Rows must be
            set before their tokens are decoded, and may be changed between texts. Rows that are never set take no memory.

    Raises:
        FirstLayerError: as for `Decoder`.
    """

    def __init__(self, path: Path, analysis: Analysis, n_ctx: int) -> None:
        super().__init__(path, n_ctx, min(128, held(BATCH_BYTES, analysis.n_vocab)), _rows_of=analysis)
        columns = sum(file_format.padded(site.width) for site in analysis.sites)
        self.rows: npt.NDArray[np.float32] = np.ctypeslib.as_array(
            self._library.llama.llama_firstlayer_run_rows(self.handle), (self.n_vocab, columns)
        )
