"""What tables, a row cache and demand change about what a model reads and multiplies: the figures of `plan`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gguf import GGMLQuantizationType

from gguf_firstlayer import file_format
from gguf_firstlayer.cost import CostModel, SiteTypes
from gguf_firstlayer.demand import DemandPlan
from gguf_firstlayer.device import DevicePlan
from gguf_firstlayer.runtime import Site

BATCHES = (1, 16, 256, 1024)

PAGE = 4096

# length of a "typical text"
TEXT_TOKENS = 16384

# tokens of text after which the memory of a row cache is told, and of a prompt that it has seen nothing of
CACHE_TOKENS = (512, 4096, 32768)
PROMPT_TOKENS = 512

# what the size `auto` of a row cache is: llama-firstlayer-cache-load.cpp
AUTO_ROWS, AUTO_SHARE, AUTO_AT_LEAST = 4096, 32, 16 << 20


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
        prefill_cold: the same for a prompt of 512 tokens of text of which none is
        memory: bytes of the rows after a text, by its number of tokens, if there is room for all
        auto_bytes: what the size `auto` has room for
    """

    sites: list[str]
    row_bytes: int
    decode_bytes: float
    decode_bound: float
    prefill_warm: float
    prefill_cold: float
    memory: dict[int, int]
    auto_bytes: int


@dataclass(frozen=True)
class Plan:
    """What tables, a row cache and demand would gain and cost. Sizes are in bytes unless stated otherwise.

    Attributes:
        name, architecture: of the model
        parameters: values of all its weights
        file_bytes: size of its files
        blocker: why there is nothing to precompute; there are no sites then
        sites: with their prices
        weights_eliminated: number of elided weights
        values_eliminated: their values, without vectors and lookup tables, as the paper counts them
        bytes_eliminated: their size as stored
        values_stored: values of the tables, minus those of elided lookup tables
        reads: reads per batch, by batch size
        table_bytes: size of the tables, by type; where a type's blocks do not fit, with the type used instead
        file_change: change in the size of the file
        resident_change: change in the memory that is touched, with the rows that a text of 16,384 tokens reads
        accelerator_change: change in the memory of a device that holds all layers; lookup tables stay on the host
        decode_bytes_without, decode_bytes_with: bytes read of all weights for one token, without tables and with them
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
        min(AUTO_ROWS * row_bytes, max(model.bytes // AUTO_SHARE, AUTO_AT_LEAST)),
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
