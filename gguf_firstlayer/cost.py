"""The cost model: what a model reads and multiplies for a token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import gguf
from gguf import GGMLQuantizationType

from gguf_firstlayer import file_format
from gguf_firstlayer.demand import DemandPlan, demand_plan
from gguf_firstlayer.errors import FirstLayerError
from gguf_firstlayer.isolation import isolated
from gguf_firstlayer.runtime import Analysis, IsolatedAnalysis, Site, Use, find_spares
from gguf_firstlayer.source import Source, without_data

SiteTypes = Mapping[Site, GGMLQuantizationType]


@dataclass(frozen=True)
class Weight:
    """A tensor of a model.

    Attributes:
        type: as stored
        shape: dimensions in ggml's order
    """

    type: GGMLQuantizationType
    shape: tuple[int, ...]

    @property
    def values(self) -> int:
        """Number of its values."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """As stored."""
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return self.values // block * size


@dataclass(frozen=True)
class CostModel:
    """The input of a plan, from a model by `of_model` or `of_file`, or from a published shape by `Shape.cost_model`.

    Attributes:
        name: of the file or the shape
        architecture: as llama.cpp calls it
        bytes: size of its files
        n_vocab: entries of the vocabulary
        n_batch: tokens of the prefill that the uses describe
        weights: all weights of the model, by name
        sites: in the order of the graph
        uses: what the graph reads of the weights
        elidable: names of weights that no graph of tokens reads once all sites come from tables
        blocker: why there is no site; "" otherwise
        spares: those among the elidable ones that images, audio or hidden states need
    """

    name: str
    architecture: str
    bytes: int
    n_vocab: int
    n_batch: int
    weights: Mapping[str, Weight]
    sites: tuple[Site, ...]
    uses: tuple[Use, ...]
    elidable: tuple[str, ...]
    blocker: str = ""
    spares: tuple[str, ...] = ()

    def replaced(self, sites: Sequence[Site]) -> list[Use]:
        """The uses that disappear if these sites come from tables."""
        needed = {name for site in self.sites if site not in sites for name in site.weights}
        return [use for use in self.uses if use.replaced and use.weight not in needed]

    def elided(self, sites: Sequence[Site]) -> list[str]:
        """The weights that nothing reads if these sites come from tables."""
        return [name for name in self.unread(sites) if name not in self.spares]

    def unread(self, sites: Sequence[Site]) -> list[str]:
        """The same with the spares, which are mapped, but not read, while there are only tokens."""
        needed = {name for site in self.sites if site not in sites for name in site.weights}
        return [name for name in self.elidable if name not in needed]

    def bytes_read(self, use: Use, n_tokens: int = 1) -> float:
        """Bytes that a batch reads of a weight.

        Rows of embeddings are counted for each token. Experts are counted once, as many as uniform and independent routing is
        expected to hit.
        """
        weight = self.weights[use.weight]
        share = use.n_used / use.n_slices
        if use.is_lookup:
            return weight.bytes * share * n_tokens
        return weight.bytes * (1 - (1 - share) ** n_tokens)

    def products(self, use: Use, n_tokens: int = 1) -> float:
        """Multiplications with a weight for a batch that computes only the last token's logits."""
        # what is computed for one token only, like the head, does not grow with the batch
        of_all = use.multiply_adds > self.weights[use.weight].values
        return use.multiply_adds * n_tokens / self.n_batch if of_all else use.multiply_adds


def of_model(source: Source, analysis: Analysis | IsolatedAnalysis) -> CostModel:
    """The cost model of an open model."""
    weights = {
        tensor.name: Weight(tensor.tensor_type, tuple(int(size) for size in tensor.shape)) for tensor in source.tensors.values()
    }
    return CostModel(
        source.path.name,
        source.architecture,
        source.bytes,
        analysis.n_vocab,
        analysis.n_batch,
        weights,
        analysis.sites,
        analysis.uses,
        analysis.elidable,
        analysis.blocker,
        analysis.spares,
    )


def of_file(path: Path, for_cache: bool = False) -> CostModel:
    """The cost model of a GGUF file, of which only the header is needed.

    Args:
        path: of the model; of a split model, the first part
        for_cache: with the sites of a row cache

    Raises:
        FirstLayerError: the file cannot be read or is already converted, or llama.cpp cannot load it.
    """
    return _with_spares(path, *isolated(partial(_read, (for_cache,)), path))[0]


def both_of_file(path: Path) -> tuple[CostModel, CostModel]:
    """The cost models of a GGUF file with the sites of tables, and with those of a row cache, as `of_file`."""
    tables, cache = isolated(partial(_read, (False, True)), path)
    (tables,) = _with_spares(path, tables)
    return tables, cache


def all_of_file(path: Path) -> tuple[CostModel, CostModel, DemandPlan]:
    """The same, and the plan of demand, for which llama.cpp builds graphs that it may never have built for such a model."""
    tables, cache, demand = isolated(_read_all, path)
    (tables,) = _with_spares(path, tables)
    return tables, cache, demand


def _with_spares(path: Path, *models: CostModel) -> list[CostModel]:
    """Cost models of a file with their spares, for which llama.cpp builds a graph that not every architecture has."""
    if not any(model.elidable for model in models):
        return list(models)
    with without_data(path) as whole:
        spares = find_spares(whole) or ()
    return [replace(model, spares=spares) for model in models]


def _read_all(path: Path) -> tuple[CostModel, CostModel, DemandPlan]:
    tables, cache = _read((False, True), path)
    with without_data(path) as whole:
        return tables, cache, demand_plan(whole, Source(whole))


def _read(for_cache: Sequence[bool], path: Path) -> list[CostModel]:
    with without_data(path) as whole:
        try:
            return _read_whole(for_cache, whole)
        except FirstLayerError as err:
            raise FirstLayerError(str(err).replace(str(whole.parent), str(path.parent))) from err


def _read_whole(for_cache: Sequence[bool], path: Path) -> list[CostModel]:
    source = Source(path)
    if source.get_field(file_format.KEY_VERSION) is not None:
        raise FirstLayerError(f"{path} is already converted; plan with the original model")
    models = []
    for choice in for_cache:
        with Analysis(path, load_vocab=False, for_cache=choice) as analysis:
            models.append(of_model(source, analysis))
    return models
