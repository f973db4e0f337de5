"""The cost model: what a model reads and multiplies for a token, and what tables change about that."""

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
from gguf_firstlayer.device import DevicePlan
from gguf_firstlayer.errors import FirstLayerError
from gguf_firstlayer.isolation import isolated
from gguf_firstlayer.runtime import Analysis, Site, Use, find_spares
from gguf_firstlayer.source import Source, without_data

BATCHES = (1, 16, 256, 1024)

PAGE = 4096

# length of a "typical text"
TEXT_TOKENS = 16384

# tokens of text after which the memory of a row cache is told, and of a prompt that it has seen nothing of
CACHE_TOKENS = (512, 4096, 32768)
PROMPT_TOKENS = 512


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


@dataclass(frozen=True)
class Reads:
    """What a batch reads of the weights that the sites are computed from, and what it reads instead with tables.

    Attributes:
        batch: number of tokens
        values_without, values_with: as the paper counts them (its section 1): rows per token, and each matrix once
        reduction: their ratio
        bytes_without, bytes_with: bytes as stored, including vectors (norms, biases); of the experts, only those that are hit
    """

    batch: int
    values_without: int
    values_with: int
    reduction: float
    bytes_without: float
    bytes_with: float


@dataclass(frozen=True)
class SitePlan:
    """A site with its price.

    Attributes:
        name, width: as in `runtime.Site`
        type: of its table
        bytes_stored: of its columns in the table
        bytes_freed: of weights that are only needed for this site
        bytes_saved: per token: what is read of these weights, minus a row of the table
    """

    name: str
    width: int
    type: GGMLQuantizationType
    bytes_stored: int
    bytes_freed: int
    bytes_saved: float


@dataclass(frozen=True)
class CachePlan:
    """What a row cache would gain and cost, without a file. Rows are F32.

    Attributes:
        sites: their names
        row_bytes: size of a row
        decode_bytes: bytes read of all weights and rows for one token whose row is cached
        decode_bound: highest possible speed-up of decoding, once rows are cached
        prefill_warm: ratio of the multiplications with weights in a prompt whose rows are all cached
        prefill_cold: the same for a prompt of PROMPT_TOKENS tokens of text of which none is
        memory: bytes of the rows after a text, by its number of tokens
    """

    sites: list[str]
    row_bytes: int
    decode_bytes: float
    decode_bound: float
    prefill_warm: float
    prefill_cold: float
    memory: dict[int, int]


@dataclass(frozen=True)
class Plan:
    """What a conversion would gain and cost. Sizes are in bytes unless stated otherwise.

    Attributes:
        name, architecture: of the model
        parameters: values of all its weights
        file_bytes: size of its files
        blocker: why there is nothing to precompute; the attributes below are then empty or 0
        sites: with their prices
        weights_eliminated: number of elided weights
        values_eliminated: their values, without vectors and lookup tables, as the paper counts them
        bytes_eliminated: their size as stored
        values_stored: values of the tables, minus those of elided lookup tables
        reads: reads per batch, by batch size
        table_bytes: size of the tables, by type; where a type's blocks do not fit, with the type used instead
        file_change: change in the size of the file
        resident_change: change in the memory that is touched, with the rows that a text of TEXT_TOKENS tokens reads
        accelerator_change: change in the memory of a device that holds all layers; lookup tables stay on the host
        decode_bytes_without, decode_bytes_with: bytes read of all weights for one token
        decode_bound: their ratio, the highest possible speed-up of decoding if it is bound by reading weights
        prefill_bound: ratio of the multiplications with weights, in a batch of several hundred tokens
        cache: what a row cache would gain instead; None where a model has no site
        demand: what computing only what is read would save; None for a shape, or where llama.cpp cannot build the graphs
        device: what changes on a device that holds all layers; None if none was asked for
    """

    name: str
    architecture: str
    parameters: int
    file_bytes: int
    blocker: str
    sites: list[SitePlan]
    weights_eliminated: int
    values_eliminated: int
    bytes_eliminated: int
    values_stored: int
    reads: list[Reads]
    table_bytes: dict[str, int]
    file_change: int
    resident_change: int
    accelerator_change: int
    decode_bytes_without: float
    decode_bytes_with: float
    decode_bound: float
    prefill_bound: float
    cache: CachePlan | None = None
    demand: DemandPlan | None = None
    device: DevicePlan | None = None


def of_model(source: Source, analysis: Analysis) -> CostModel:
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
    models = []
    with without_data(path) as whole:
        try:
            source = Source(whole)
            if source.get_field(file_format.KEY_VERSION) is not None:
                raise FirstLayerError(f"{path} is already converted; plan with the original model")
            for choice in for_cache:
                with Analysis(whole, load_vocab=False, for_cache=choice) as analysis:
                    models.append(of_model(source, analysis))
        except FirstLayerError as err:
            raise FirstLayerError(str(err).replace(str(whole.parent), str(path.parent))) from err
    return models


def estimate(
    model: CostModel,
    site_types: SiteTypes,
    batches: Sequence[int] = BATCHES,
    keep_weights: bool = False,
) -> Plan:
    """The plan for the sites that have a type in `site_types`."""
    sites = [site for site in model.sites if site in site_types]
    tables, _ = file_format.layout(sites, site_types, model.n_vocab)
    replaced = model.replaced(sites)
    elided = [] if keep_weights else model.elided(sites)
    unread = [] if keep_weights else model.unread(sites)
    eliminated = [model.weights[name] for name in elided]
    lookup_tables = {use.weight for use in model.uses if use.is_lookup}

    def is_matrix(name: str) -> bool:
        return sum(size > 1 for size in model.weights[name].shape) > 1

    # what the sites read for each token, in values: rows of embeddings
    inputs = {name for site in sites for name in site.weights}
    lookups = [use for use in model.uses if use.weight in inputs and use.is_lookup]
    row_values = {use: model.weights[use.weight].values // use.n_slices * use.n_used for use in lookups}
    matrices = {use.weight for use in replaced if use not in row_values and is_matrix(use.weight)}
    matrix_values = sum(model.weights[name].values for name in matrices)
    table_values = sum(site.width for site in sites)
    row_bytes = sum(table.row_bytes for table in tables)

    reads = []
    for n in batches:
        rows = n * sum(row_values.values())
        kept_rows = n * sum(values for use, values in row_values.items() if use not in replaced)
        without = rows + matrix_values
        instead = kept_rows + n * table_values
        bytes_rows = sum(model.bytes_read(use, n) for use in lookups if use not in replaced)
        bytes_without = bytes_rows + sum(model.bytes_read(use, n) for use in replaced)
        reads.append(Reads(n, without, instead, without / max(1, instead), bytes_without, bytes_rows + n * row_bytes))

    decode = sum(model.bytes_read(use) for use in model.uses)
    decode_with = decode - sum(model.bytes_read(use) for use in replaced) + row_bytes
    products = sum(use.multiply_adds for use in model.uses)
    products_with = products - sum(use.multiply_adds for use in replaced)
    bytes_eliminated = sum(weight.bytes for weight in eliminated)
    table_bytes = sum(table.bytes for table in tables)

    return Plan(
        name=model.name,
        architecture=model.architecture,
        parameters=sum(weight.values for weight in model.weights.values()),
        file_bytes=model.bytes,
        blocker=model.blocker,
        sites=[price(model, [], site, site_types[site]) for site in sites],
        weights_eliminated=len(elided),
        values_eliminated=sum(model.weights[name].values for name in elided if is_matrix(name) and name not in lookup_tables),
        bytes_eliminated=bytes_eliminated,
        values_stored=table_values * model.n_vocab
        - sum(model.weights[name].values for name in elided if name in lookup_tables),
        reads=reads if sites else [],
        table_bytes={name: _table_bytes(model, sites, kind) for name, kind in file_format.TYPES.items() if sites},
        file_change=table_bytes - bytes_eliminated,
        # only rows of lookup tables were in memory
        resident_change=round(_touched(tables))
        - sum(model.weights[name].bytes for name in unread if name not in lookup_tables),
        accelerator_change=-sum(model.weights[name].bytes for name in unread if name not in lookup_tables),
        decode_bytes_without=decode,
        decode_bytes_with=decode_with,
        decode_bound=decode / decode_with if sites else 1.0,
        prefill_bound=products / products_with if sites else 1.0,
    )


def bound(model: CostModel, site_types: SiteTypes, batch: int) -> float:
    """The highest possible speed-up of a batch, whether it is bound by reading weights or by multiplying."""
    result = estimate(model, site_types, [batch])
    if not result.reads:
        return 1.0
    n_bytes = sum(model.bytes_read(use, batch) for use in model.uses)
    by_bytes = n_bytes / (n_bytes - result.reads[0].bytes_without + result.reads[0].bytes_with)
    if batch == 1:
        return by_bytes
    total = sum(model.products(use, batch) for use in model.uses)
    gone = sum(model.products(use, batch) for use in model.replaced([site for site in model.sites if site in site_types]))
    return max(by_bytes, total / (total - gone))


def cached(model: CostModel) -> CachePlan | None:
    """The plan of a row cache for all sites of a model; None if it has none."""
    if not model.sites:
        return None
    row_bytes = 4 * sum(file_format.padded(site.width) for site in model.sites)
    replaced = model.replaced(model.sites)
    decode = sum(model.bytes_read(use) for use in model.uses)
    decode_with = decode - sum(model.bytes_read(use) for use in replaced) + row_bytes
    products = sum(use.multiply_adds for use in model.uses)
    gone = sum(use.multiply_adds for use in replaced)
    new = distinct_tokens(PROMPT_TOKENS, model.n_vocab) / PROMPT_TOKENS
    return CachePlan(
        [site.name for site in model.sites],
        row_bytes,
        decode_with,
        decode / decode_with,
        products / (products - gone),
        products / (products - gone * (1 - min(1.0, new))),
        {n: round(min(model.n_vocab, distinct_tokens(n, model.n_vocab)) * row_bytes) for n in CACHE_TOKENS},
    )


def price(model: CostModel, sites: Sequence[Site], site: Site, kind: GGMLQuantizationType) -> SitePlan:
    """What one more site costs and saves if other sites already come from tables."""
    together = [*sites, site]
    freed = set(model.elided(together)) - set(model.elided(sites))
    saved = sum(map(model.bytes_read, model.replaced(together))) - sum(map(model.bytes_read, model.replaced(sites)))
    row = file_format.Table("", kind, file_format.padded(site.width), model.n_vocab)
    return SitePlan(
        site.name,
        site.width,
        kind,
        row.bytes,
        sum(model.weights[name].bytes for name in freed),
        saved - row.row_bytes,
    )


def _table_bytes(model: CostModel, sites: Sequence[Site], wanted: GGMLQuantizationType) -> int:
    tables, _ = file_format.layout(sites, {site: file_format.fitting(wanted, site.width) for site in sites}, model.n_vocab)
    return sum(table.bytes for table in tables)


def _touched(tables: Sequence[file_format.Table]) -> float:
    """Bytes of the pages that a typical text touches: tables are mapped, and read page by page."""
    touched = 0.0
    for table in tables:
        rows = min(table.rows, distinct_tokens(TEXT_TOKENS, table.rows))
        pages = table.bytes / PAGE
        per_row = (table.row_bytes + PAGE - 1) / PAGE
        touched += PAGE * pages * -math.expm1(-rows * per_row / pages) if pages > per_row else table.bytes
    return touched


def distinct_tokens(n_tokens: int, n_vocab: int) -> float:
    """Expected number of distinct tokens in a text: a fit to texts of 12 kinds and 6 tokenizers, see docs/hot-rows.md."""
    return float(0.807 * n_tokens**0.639 * n_vocab**0.148)
