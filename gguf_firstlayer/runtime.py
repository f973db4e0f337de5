"""The sites of a model file, what its graph reads, and rows: the analysis of `llama-firstlayer.h`."""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from gguf_firstlayer.c_api import CSite, CUse, library, processors, undisturbed
from gguf_firstlayer.errors import FirstLayerError
from gguf_firstlayer.isolation import EndedError, Isolated, Process, isolated
from gguf_firstlayer.text import count


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


@dataclass(frozen=True)
class Use:
    """What a node of the graph reads of a weight (`struct llama_firstlayer_use`).

    Attributes:
        weight: its name
        n_slices: rows or experts that the node selects from; 1 if it reads all of the weight
        n_used: how many of these it reads for one token
        multiply_adds: in a prefill of `Analysis.n_batch` tokens that computes only the last token's logits
        replaced: whether it disappears if all sites come from tables
    """

    weight: str
    n_slices: int
    n_used: int
    multiply_adds: int
    replaced: bool

    @property
    def is_lookup(self) -> bool:
        """Whether it looks up rows, as in an embedding."""
        return self.n_slices > 1 and self.multiply_adds == 0


class Analysis:
    """The sites of a model file (`llama_firstlayer_init`). A context manager.

    Only metadata is read until `rows` is called, which maps the weights of the sites.

    Args:
        path: GGUF file of a model that is not converted; of a split model, the first part
        n_batch: tokens per batch
        load_vocab: load the vocabulary, which takes longer than everything else; without it, there is no tokenizer
        for_cache: take the sites of a row cache, without the vocabulary (`llama_firstlayer_init_for_cache`)
        device: whose kernels compute rows, like "CUDA0", or HOST:PORT of an RPC server (`llama_firstlayer_init_on`); None for
            the CPU

    Attributes:
        n_vocab: entries of the vocabulary
        sites: in the order of the graph
        uses: what the model's graph reads of the weights; empty if there is no site
        n_batch: tokens of the prefill that the uses describe
        elidable: names of weights that no graph of tokens reads if all sites come from tables
        spares: those among them that images, audio or hidden states need; set by `find_spares`
        blocker: why there is no site, in llama.cpp's terms; "" otherwise

    Raises:
        FirstLayerError: llama.cpp cannot load the model.
    """

    def __init__(
        self,
        path: Path,
        n_batch: int = 512,
        load_vocab: bool = True,
        for_cache: bool = False,
        device: str | None = None,
    ) -> None:
        self._library = library()
        self._library.errors.clear()
        n_threads = len(processors())
        with undisturbed():
            if for_cache:
                self.handle = self._library.llama.llama_firstlayer_init_for_cache(os.fsencode(path), n_batch)
            elif device is not None:
                self.handle = self._library.llama.llama_firstlayer_init_on(
                    os.fsencode(path), device.encode(), n_batch, n_threads, load_vocab
                )
            else:
                self.handle = self._library.llama.llama_firstlayer_init(os.fsencode(path), n_batch, n_threads, load_vocab)
        if not self.handle:
            raise FirstLayerError(f"{path}: {self._library.error()}")

        llama = self._library.llama
        self.n_vocab: int = llama.llama_firstlayer_n_vocab(self.handle)
        self.sites = tuple(self._site(i) for i in range(llama.llama_firstlayer_n_sites(self.handle)))
        self.uses = tuple(self._use(i) for i in range(llama.llama_firstlayer_n_uses(self.handle)))
        self.n_batch = n_batch
        self.elidable = self._names(lambda i: llama.llama_firstlayer_get_elidable(self.handle, i))
        self.spares: tuple[str, ...] = ()
        self.blocker: str = llama.llama_firstlayer_get_blocker(self.handle).decode()

    def find_spares(self) -> tuple[str, ...]:
        """The `spares` (`llama_firstlayer_find_spares`). Call it in a child process, since llama.cpp may abort."""
        llama = self._library.llama
        if llama.llama_firstlayer_find_spares(self.handle) < 0:
            return ()
        return self._names(lambda i: llama.llama_firstlayer_get_spare(self.handle, i))

    def _names(self, get: Callable[[int], bytes | None]) -> tuple[str, ...]:
        names: list[str] = []
        while (name := get(len(names))) is not None:
            names.append(name.decode())
        return tuple(names)

    def _site(self, i: int) -> Site:
        llama, site = self._library.llama, CSite()
        llama.llama_firstlayer_get_site(self.handle, i, ctypes.byref(site))
        weights = self._names(lambda j: llama.llama_firstlayer_get_site_weight(self.handle, i, j))
        return Site(site.name.decode(), site.recipe.decode(), site.width, weights)

    def _use(self, i: int) -> Use:
        use = CUse()
        self._library.llama.llama_firstlayer_get_use(self.handle, i, ctypes.byref(use))
        return Use(use.weight.decode(), use.n_slices, use.n_used, use.multiply_adds, use.replaced)

    def tokenize(self, text: str) -> npt.NDArray[np.int32]:
        """Token ids of a text (`llama_firstlayer_tokenize`), i32 [n]; none if the model has no tokenizer.

        Raises:
            FirstLayerError: the tokenizer fails.
        """
        data = text.encode()
        ids = np.empty(len(data) + 8, np.int32)  # a token takes at least one byte, except those that mark begin and end
        with undisturbed():
            n = self._library.llama.llama_firstlayer_tokenize(self.handle, data, len(data), ids.ctypes.data, len(ids))
        if n < 0:
            raise FirstLayerError(f"the text cannot be tokenized: {self._library.error()}")
        return ids[:n]

    def rows(self, tokens: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Evaluate all sites for some token ids with llama.cpp's kernels (`llama_firstlayer_eval`).

        Args:
            tokens: ids, [n]

        Returns:
            F32 [n, sum of the widths], the sites side by side in their order.

        Raises:
            FirstLayerError: an id is out of range, memory runs out, or a value is not finite.
        """
        wide = np.asarray(tokens, dtype=np.int64)
        if len(wide) and not 0 <= wide.min() <= wide.max() < self.n_vocab:
            raise FirstLayerError(f"token ids are from 0 to {self.n_vocab - 1}")
        ids = np.ascontiguousarray(wide, dtype=np.int32)
        out = np.empty((len(ids), sum(site.width for site in self.sites)), dtype=np.float32)
        with undisturbed():
            status = self._library.llama.llama_firstlayer_eval(self.handle, ids.ctypes.data, len(ids), out.ctypes.data)
        if status != 0:
            raise FirstLayerError(f"the first layer cannot be computed: {self._library.error()}")
        ends = np.cumsum([site.width for site in self.sites]).tolist()
        for site, end in zip(self.sites, ends, strict=True):
            bad = ~np.isfinite(out[:, end - site.width : end]).all(axis=1)
            if bad.any():
                raise FirstLayerError(
                    f"{site.name} is not finite for {count(int(bad.sum()), 'token')}, such as {ids[bad][0]}: there are NaN or"
                    f" infinite values in {', '.join(site.weights)}, or a parameter of the model is wrong; get the model again"
                )
        return out

    def close(self) -> None:
        """Free the model; the object must not be used afterwards."""
        if self.handle:
            with undisturbed():
                self._library.llama.llama_firstlayer_free(self.handle)
            self.handle = None

    def __enter__(self) -> Analysis:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class IsolatedAnalysis(Isolated[Analysis]):
    """An `Analysis` in a child process, which computes and quantizes rows. A context manager.

    Args:
        path: as of `Analysis`
        device: likewise
        with_spares: find them

    Attributes:
        n_vocab, n_batch, sites, uses, elidable, spares, blocker: as of `Analysis`

    Raises:
        FirstLayerError: llama.cpp cannot load the model or compute a row, or aborts; or there is no such device.
    """

    def __init__(self, path: Path, device: str | None, with_spares: bool) -> None:
        if device is not None:
            _check_server(device)
        with ExitStack() as stack:
            process = stack.enter_context(Process(path))
            opened = process.model.make(_open, device, with_spares)
            super().__init__(process, opened.index)
            facts = self.call(_facts)
            stack.pop_all()
        self.n_vocab, self.n_batch, self.sites, self.uses, self.elidable, self.spares, self.blocker = facts

    def rows(self, tokens: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """As `Analysis.rows`."""
        return self.call(Analysis.rows, tokens)

    def tokenize(self, text: str) -> npt.NDArray[np.int32]:
        """As `Analysis.tokenize`."""
        return self.call(Analysis.tokenize, text)

    def quantize(self, rows: npt.NDArray[np.float32], ggml_type: GGMLQuantizationType) -> npt.NDArray[np.uint8]:
        """As `Library.quantize`."""
        return self.call(_quantize, rows, ggml_type)

    def check(self, path: Path, tables: Path | None = None) -> None:
        """As `Library.check`."""
        self.call(_check, path, tables)

    def __enter__(self) -> IsolatedAnalysis:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(EndedError):
            self.call(Analysis.close)  # some devices abort a process that ends with anything on them
        self.process.close()


def analyse(path: Path, device: str | None = None) -> IsolatedAnalysis:
    """Open an `IsolatedAnalysis`, without spares if they cannot be found.

    Raises:
        FirstLayerError: as of `IsolatedAnalysis`.
    """
    try:
        return IsolatedAnalysis(path, device, with_spares=True)
    except FirstLayerError:  # perhaps llama.cpp aborted on a graph that embeds
        return IsolatedAnalysis(path, device, with_spares=False)


def _open(path: Path, device: str | None, with_spares: bool) -> Analysis:
    analysis = Analysis(path, device=device)
    if analysis.sites:
        analysis.rows([0])
    if with_spares:
        analysis.spares = analysis.find_spares()
    return analysis


def _facts(
    analysis: Analysis,
) -> tuple[int, int, tuple[Site, ...], tuple[Use, ...], tuple[str, ...], tuple[str, ...], str]:
    return (
        analysis.n_vocab,
        analysis.n_batch,
        analysis.sites,
        analysis.uses,
        analysis.elidable,
        analysis.spares,
        analysis.blocker,
    )


def _quantize(_: Analysis, rows: npt.NDArray[np.float32], ggml_type: GGMLQuantizationType) -> npt.NDArray[np.uint8]:
    return library().quantize(rows, ggml_type)


def _check(_: Analysis, path: Path, tables: Path | None) -> None:
    library().check(path, tables)


def _check_server(device: str) -> None:
    """Refuse an RPC server that does not answer, for which llama.cpp would abort."""
    if ":" not in device:
        return
    host, _, port = device.rpartition(":")
    try:
        if not host:
            raise ValueError("it has no host")
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as err:
        raise FirstLayerError(f"there is no device '{device}': no RPC server answers ({err})") from err


def find_spares(path: Path) -> tuple[str, ...] | None:
    """`Analysis.spares` of a model file, found in a child process; None if llama.cpp cannot load the model, or aborts.

    Some architectures take no vectors, and llama.cpp aborts while it builds such a graph of them.
    """
    try:
        return isolated(_find_spares, path)
    except FirstLayerError:
        return None


def _find_spares(path: Path) -> tuple[str, ...]:
    with Analysis(path, load_vocab=False) as analysis:
        return analysis.find_spares()
