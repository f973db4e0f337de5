"""`plan`: what a conversion would gain and cost, from the metadata of a model or from a published shape."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
from gguf import GGMLQuantizationType

from gguf_firstlayer import tables as tab
from gguf_firstlayer.errors import FirstLayerError, UsageError
from gguf_firstlayer.isolation import isolated
from gguf_firstlayer.runtime import Analysis, Site, Use
from gguf_firstlayer.source import Source, without_data
from gguf_firstlayer.text import change_text, count, numbers, size_text, to_json

BATCHES = (1, 16, 256, 1024)
MAX_NUMBER = 10_000_000

# types of which people are told the size of the tables
SHOWN = ("q4_0", "q5_1", "q8_0", "f16", "f32")

# of sites, of which all combinations are tried to fit a budget: the ones that read most
MAX_GROUPS = 12

# growth of a file that people may want to avoid
LARGE_GROWTH = 0.25

PAGE = 4096
# "typical text": of so many tokens
TEXT_TOKENS = 16384


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
class Outline:
    """What a plan is made from: of a model `of_model` or `of_file`, of a published shape `Shape.outline`.

    Attributes:
        name: of the file or the shape
        architecture: as llama.cpp calls it
        bytes: of its files
        n_vocab: entries of the vocabulary
        n_batch: tokens of the prefill that the uses tell of
        weights: all of the model's, by name
        sites: in the order of the graph
        uses: what the graph reads of the weights
        elidable: names of weights that nothing reads once all sites come from tables
        blocker: why there is no site; "" otherwise
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

    def replaced(self, sites: Sequence[Site]) -> list[Use]:
        """The uses that are gone if some of the sites come from tables."""
        needed = {name for site in self.sites if site not in sites for name in site.weights}
        return [use for use in self.uses if use.replaced and use.weight not in needed]

    def elided(self, sites: Sequence[Site]) -> list[str]:
        """The weights that nothing reads if some of the sites come from tables."""
        needed = {name for site in self.sites if site not in sites for name in site.weights}
        return [name for name in self.elidable if name not in needed]

    def bytes_read(self, use: Use, n_tokens: int = 1) -> float:
        """Bytes that a batch reads of a weight.

        Rows of embeddings are counted for each token; experts once, as many as are expected to be hit if routing is uniform and
        independent.
        """
        weight = self.weights[use.weight]
        share = use.n_used / use.n_slices
        if use.is_lookup:
            return weight.bytes * share * n_tokens
        return weight.bytes * (1 - (1 - share) ** n_tokens)

    def products(self, use: Use, n_tokens: int = 1) -> float:
        """Multiplications with a weight for a batch of which the last token's logits are wanted."""
        # what is done for one token only, like the head, does not grow
        of_all = use.multiply_adds > self.weights[use.weight].values
        return use.multiply_adds * n_tokens / self.n_batch if of_all else use.multiply_adds


@dataclass(frozen=True)
class Reads:
    """What a batch reads of the weights that the sites are computed from, and what it reads instead.

    Attributes:
        batch: tokens
        values_without, values_with: as the paper counts them (its section 1): rows per token, and each matrix once
        reduction: their ratio
        bytes_without, bytes_with: as stored, vectors (norms, biases) included; of experts only those that are hit
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
class Plan:
    """What a conversion would gain and cost. Bytes unless said otherwise.

    Attributes:
        name, architecture: of the model
        parameters: values of all its weights
        file_bytes: of its files
        blocker: why there is nothing to precompute; the attributes below are then empty or 0
        sites: with their prices
        weights_eliminated: number of weights that are not needed any more
        values_eliminated: their values, without vectors and lookup tables, as the paper counts them
        bytes_eliminated: as stored
        values_stored: values of the tables, minus those of lookup tables that are not needed any more
        reads: by batch size
        table_bytes: size of the tables, by type; where its blocks do not fit, of the type taken instead
        file_change: of the file
        resident_change: of memory that is touched, with the rows that a text of TEXT_TOKENS tokens reads
        accelerator_change: of the memory of a device that holds all layers: lookup tables stay on the host
        decode_bytes_without, decode_bytes_with: of all weights, read for one token
        decode_bound: their ratio, which the speed-up of decoding cannot exceed if it is bound by reading weights
        prefill_bound: ratio of the multiplications in products with weights, in a batch of several hundred tokens
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


@dataclass(frozen=True)
class Shape:
    """The published shape of a transformer, in the terms of the paper.

    Attributes:
        vocab_size: entries of the vocabulary
        embedding_length: width of the layers, the paper's d
        block_count: layers
        head_count, head_count_kv: attention heads, for queries and for keys and values
        feed_forward_length: hidden width of the FFN
        feed_forward_matrices: 2, or 3 if it is gated
        expert_count: 1 if it is no mixture of experts
        parallel: attention and FFN both read the layer's input
        expert_used_count: experts that a token is routed to
    """

    vocab_size: int
    embedding_length: int
    block_count: int
    head_count: int
    head_count_kv: int
    feed_forward_length: int
    feed_forward_matrices: int = 3
    expert_count: int = 1
    parallel: bool = False
    expert_used_count: int = 1

    def __post_init__(self) -> None:
        if self.embedding_length % self.head_count or self.feed_forward_matrices not in (2, 3):
            raise UsageError("the heads of the shape do not divide its embedding, or its FFN has not 2 or 3 matrices")
        if not 1 <= self.expert_used_count <= self.expert_count:
            raise UsageError(f"a token uses {self.expert_used_count} experts, and the shape has {self.expert_count}")
        if self.block_count > 10_000:
            raise UsageError(f"{self.block_count} layers are more than any model has")

    def outline(self, kind: GGMLQuantizationType = GGMLQuantizationType.F16) -> Outline:
        """All weights of one type, without norms and biases.

        As in the paper, a parallel block has no more use for its embedding.
        """
        d, n_batch = self.embedding_length, 512
        e = d // self.head_count * self.head_count_kv
        attention = {"attn_q": (d, d), "attn_k": (d, e), "attn_v": (d, e)}
        matrices = {
            "gate": (d, self.feed_forward_length),
            "up": (d, self.feed_forward_length),
            "down": (self.feed_forward_length, d),
        }
        ffn = {f"ffn_{name}": shape for name, shape in matrices.items() if name != "gate" or self.feed_forward_matrices == 3}

        weights = {name: Weight(kind, (d, self.vocab_size)) for name in ("token_embd", "output")}
        uses = [Use("token_embd", self.vocab_size, 1, 0, self.parallel), Use("output", 1, 1, d * self.vocab_size, False)]
        for i in range(self.block_count):
            for name, shape in (attention | {"attn_output": (d, d)} | ffn).items():
                experts, used = (self.expert_count, self.expert_used_count) if name in ffn else (1, 1)
                weight = weights[f"blk.{i}.{name}"] = Weight(kind, (*shape, experts))
                replaced = i == 0 and (name in attention or (self.parallel and name in ffn))
                products = weight.values // experts * used * n_batch
                uses.append(Use(f"blk.{i}.{name}", experts, used, products, replaced))

        sites = [Site(name, "", shape[1], ("token_embd", f"blk.0.{name}")) for name, shape in attention.items()]
        if self.parallel:
            sites.append(Site("ffn + skip", "", d, ("token_embd", *(f"blk.0.{name}" for name in ffn))))
        elidable = tuple(dict.fromkeys(use.weight for use in uses if use.replaced))
        name = "parallel" if self.parallel else "serial"
        n_bytes = sum(weight.bytes for weight in weights.values())
        return Outline("shape", name, n_bytes, self.vocab_size, n_batch, weights, tuple(sites), tuple(uses), elidable)


def of_model(source: Source, analysis: Analysis) -> Outline:
    """The outline of an opened model."""
    weights = {
        tensor.name: Weight(tensor.tensor_type, tuple(int(size) for size in tensor.shape)) for tensor in source.tensors.values()
    }
    return Outline(
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
    )


def of_file(path: Path) -> Outline:
    """The outline of a GGUF model, of which only the header need be there.

    Raises:
        FirstLayerError: it cannot be read, is converted already, or llama.cpp cannot load it.
    """
    return isolated(_read, path)


def _read(path: Path) -> Outline:
    with without_data(path) as whole:
        try:
            source = Source(whole)
            if source.get_field(tab.KEY_VERSION) is not None:
                raise FirstLayerError(f"{path} is already converted; plan with the original model")
            with Analysis(whole, load_vocab=False) as analysis:
                return of_model(source, analysis)
        except FirstLayerError as err:
            raise FirstLayerError(str(err).replace(str(whole.parent), str(path.parent))) from err


def plan(
    model: str | os.PathLike[str] | Outline, *, type: str = "q8_0", batches: Sequence[int] = BATCHES, keep_weights: bool = False
) -> Plan:
    """What a conversion would gain and cost.

    Args:
        model: a GGUF file, of a split model the first part; or `Shape(...).outline()`
        type: of the tables; "auto" stands for q8_0, which measuring begins with
        batches: sizes to tell the reads of
        keep_weights: of a conversion that does

    Raises:
        UsageError: the type is unknown, or a batch size is not positive.
        FirstLayerError: as `of_file`.
    """
    if not all(1 <= size <= MAX_NUMBER for size in batches):
        raise UsageError(f"a batch has between 1 and {MAX_NUMBER:,} tokens")
    wanted = table_type("q8_0" if type == "auto" else type)
    shape = model if isinstance(model, Outline) else of_file(Path(model))
    return make(shape, {site: tab.fitting(wanted, site.width) for site in shape.sites}, batches, keep_weights)


def table_type(name: str) -> GGMLQuantizationType:
    """A type by its name.

    Raises:
        UsageError: there is none that tables can have.
    """
    kind = tab.TYPES.get(name.lower())
    if kind is None:
        raise UsageError(f"unknown table type {name}; choose one of {', '.join(tab.TYPES)}")
    return kind


def make(
    outline: Outline,
    kinds: Mapping[Site, GGMLQuantizationType],
    batches: Sequence[int] = BATCHES,
    keep_weights: bool = False,
) -> Plan:
    """The plan for those sites that have a type in `kinds`."""
    sites = [site for site in outline.sites if site in kinds]
    tables, _ = tab.layout(sites, kinds, outline.n_vocab)
    replaced = outline.replaced(sites)
    elided = [] if keep_weights else outline.elided(sites)
    eliminated = [outline.weights[name] for name in elided]
    lookup_tables = {use.weight for use in outline.uses if use.is_lookup}

    def is_matrix(name: str) -> bool:
        return sum(size > 1 for size in outline.weights[name].shape) > 1

    # what the sites read for each token, in values: rows of embeddings
    inputs = {name for site in sites for name in site.weights}
    lookups = [use for use in outline.uses if use.weight in inputs and use.is_lookup]
    row_values = {use: outline.weights[use.weight].values // use.n_slices * use.n_used for use in lookups}
    matrices = {use.weight for use in replaced if use not in row_values and is_matrix(use.weight)}
    matrix_values = sum(outline.weights[name].values for name in matrices)
    table_values = sum(site.width for site in sites)
    row_bytes = sum(table.row_bytes for table in tables)

    reads = []
    for n in batches:
        rows = n * sum(row_values.values())
        kept_rows = n * sum(values for use, values in row_values.items() if use not in replaced)
        without = rows + matrix_values
        instead = kept_rows + n * table_values
        bytes_rows = sum(outline.bytes_read(use, n) for use in lookups if use not in replaced)
        bytes_without = bytes_rows + sum(outline.bytes_read(use, n) for use in replaced)
        reads.append(Reads(n, without, instead, without / max(1, instead), bytes_without, bytes_rows + n * row_bytes))

    decode = sum(outline.bytes_read(use) for use in outline.uses)
    decode_with = decode - sum(outline.bytes_read(use) for use in replaced) + row_bytes
    products = sum(use.multiply_adds for use in outline.uses)
    products_with = products - sum(use.multiply_adds for use in replaced)
    bytes_eliminated = sum(weight.bytes for weight in eliminated)
    table_bytes = sum(table.bytes for table in tables)

    return Plan(
        name=outline.name,
        architecture=outline.architecture,
        parameters=sum(weight.values for weight in outline.weights.values()),
        file_bytes=outline.bytes,
        blocker=outline.blocker,
        sites=[price(outline, [], site, kinds[site]) for site in sites],
        weights_eliminated=len(elided),
        values_eliminated=sum(outline.weights[name].values for name in elided if is_matrix(name) and name not in lookup_tables),
        bytes_eliminated=bytes_eliminated,
        values_stored=table_values * outline.n_vocab
        - sum(outline.weights[name].values for name in elided if name in lookup_tables),
        reads=reads if sites else [],
        table_bytes={name: _table_bytes(outline, sites, kind) for name, kind in tab.TYPES.items() if sites},
        file_change=table_bytes - bytes_eliminated,
        # of lookup tables, only rows were in memory
        resident_change=round(_touched(tables))
        - sum(outline.weights[name].bytes for name in elided if name not in lookup_tables),
        accelerator_change=-sum(outline.weights[name].bytes for name in elided if name not in lookup_tables),
        decode_bytes_without=decode,
        decode_bytes_with=decode_with,
        decode_bound=decode / decode_with if sites else 1.0,
        prefill_bound=products / products_with if sites else 1.0,
    )


def bound(outline: Outline, kinds: Mapping[Site, GGMLQuantizationType], batch: int) -> float:
    """What the speed-up of a batch cannot exceed, whether it is bound by reading weights or by multiplying."""
    result = make(outline, kinds, [batch])
    if not result.reads:
        return 1.0
    n_bytes = sum(outline.bytes_read(use, batch) for use in outline.uses)
    by_bytes = n_bytes / (n_bytes - result.reads[0].bytes_without + result.reads[0].bytes_with)
    if batch == 1:
        return by_bytes
    total = sum(outline.products(use, batch) for use in outline.uses)
    gone = sum(outline.products(use, batch) for use in outline.replaced([site for site in outline.sites if site in kinds]))
    return max(by_bytes, total / (total - gone))


def price(outline: Outline, sites: Sequence[Site], site: Site, kind: GGMLQuantizationType) -> SitePlan:
    """What one more site costs and saves if others come from tables already."""
    together = [*sites, site]
    freed = set(outline.elided(together)) - set(outline.elided(sites))
    saved = sum(map(outline.bytes_read, outline.replaced(together))) - sum(map(outline.bytes_read, outline.replaced(sites)))
    row = tab.Table("", kind, tab.padded(site.width), outline.n_vocab)
    return SitePlan(
        site.name,
        site.width,
        kind,
        row.bytes,
        sum(outline.weights[name].bytes for name in freed),
        saved - row.row_bytes,
    )


def _table_bytes(outline: Outline, sites: Sequence[Site], wanted: GGMLQuantizationType) -> int:
    tables, _ = tab.layout(sites, {site: tab.fitting(wanted, site.width) for site in sites}, outline.n_vocab)
    return sum(table.bytes for table in tables)


def _touched(tables: Sequence[tab.Table]) -> float:
    """Bytes of the pages that a typical text touches: tables are mapped, and read page by page."""
    touched = 0.0
    for table in tables:
        rows = min(table.rows, distinct_tokens(TEXT_TOKENS, table.rows))
        pages = table.bytes / PAGE
        per_row = (table.row_bytes + PAGE - 1) / PAGE
        touched += PAGE * pages * -math.expm1(-rows * per_row / pages) if pages > per_row else table.bytes
    return touched


def distinct_tokens(n_tokens: int, n_vocab: int) -> float:
    """Distinct tokens of a text: a fit to texts of 12 kinds and 6 tokenizers, see docs/hot-rows.md."""
    return float(0.807 * n_tokens**0.639 * n_vocab**0.148)


def select(
    outline: Outline, kinds: Mapping[Site, GGMLQuantizationType], budget: float, keep_weights: bool
) -> tuple[list[Site], list[SitePlan], int]:
    """The sites that save most bytes per token while the file grows by no more than a number of bytes.

    A weight is only saved if all sites that are computed from it come from tables, so such groups of sites are taken or left.
    Of those that save most, the ones that need the least space.

    Returns:
        The sites, the prices of those that were left out, and the least that the file grows by with any.
    """

    def growth(sites: Sequence[Site]) -> int:
        tables, _ = tab.layout(sites, kinds, outline.n_vocab)
        elided = [] if keep_weights else outline.elided(sites)
        return sum(table.bytes for table in tables) - sum(outline.weights[name].bytes for name in elided)

    def saved(sites: Sequence[Site]) -> float:
        tables, _ = tab.layout(sites, kinds, outline.n_vocab)
        return sum(map(outline.bytes_read, outline.replaced(sites))) - sum(table.row_bytes for table in tables)

    if growth(outline.sites) <= budget:
        return list(outline.sites), [], growth(outline.sites)

    gone = sorted((use for use in outline.uses if use.replaced and not use.is_lookup), key=outline.bytes_read, reverse=True)
    groups = list(dict.fromkeys(frozenset(site for site in outline.sites if use.weight in site.weights) for use in gone))
    unions = {frozenset[Site]()}
    for group in groups[:MAX_GROUPS]:
        unions |= {union | group for union in unions}
    candidates = [[site for site in outline.sites if site in union] for union in unions]
    fitting = [sites for sites in candidates if not sites or growth(sites) <= budget]
    least = min((growth(sites) for sites in candidates if sites), default=growth(outline.sites))
    chosen = max(fitting, key=lambda sites: (saved(sites), -growth(sites), [site.name for site in sites]))
    return chosen, [price(outline, chosen, site, kinds[site]) for site in outline.sites if site not in chosen], least


def describe_price(site: SitePlan) -> str:
    """A site and its price on one line."""
    return (
        f"{site.name} ({site.width} values per token): {size_text(site.bytes_stored)} of {site.type.name.lower()}"
        f" for {size_text(site.bytes_freed)} of weights, {size_text(site.bytes_saved)} less to read per token"
    )


def _factor(value: float) -> str:
    """A ratio with three digits, or all before the point: 12,346x, 1.98x, 0.73x."""
    return f"{value:,.0f}x" if value >= 100 else f"{value:.3g}x"


def text(result: Plan) -> str:
    """The plan as people read it."""
    lines = [
        f"{result.name}: {result.architecture}, {size_text(result.file_bytes)}, {result.parameters / 1e6:,.1f} M parameters"
    ]
    if not result.sites:
        return "\n".join([*lines, f"nothing to precompute: {result.blocker}"])

    lines += [f"site {describe_price(site)}" for site in result.sites]
    lines += [
        f"eliminated: {count(result.weights_eliminated, 'weight')}, {size_text(result.bytes_eliminated)};"
        f" {result.values_eliminated:,} values in matrices",
        "",
        f"{'read per batch':>14} {'values without':>16} {'with':>14} {'reduction':>10} {'bytes without':>14} {'with':>10}",
    ]
    for row in result.reads:
        lines.append(
            f"{row.batch:>14,} {row.values_without:>16,} {row.values_with:>14,} {_factor(row.reduction):>10}"
            f" {size_text(row.bytes_without):>14} {size_text(row.bytes_with):>10}"
        )
    sizes = ", ".join(f"{name} {size_text(result.table_bytes[name])}" for name in SHOWN)
    chosen = ", ".join(dict.fromkeys(site.type.name.lower() for site in result.sites))
    lines += [
        "",
        f"tables: {sizes}; below, {chosen}",
        f"file: {change_text(result.file_change)} ({result.file_change / result.file_bytes:+.1%})",
        f"memory: {change_text(result.resident_change)} after a text of {TEXT_TOKENS:,} tokens;"
        f" {change_text(result.accelerator_change)} on a device that holds all layers",
        f"decoding: {result.decode_bound:.4f}x at best, {size_text(result.decode_bytes_without)} of weights per token become"
        f" {size_text(result.decode_bytes_with)}",
        f"prefill: {result.prefill_bound:.4f}x at best, by operations",
    ]
    if result.file_change > LARGE_GROWTH * result.file_bytes:
        lines.append(
            "The file would grow by much: convert --max-growth takes the tables that are worth it, --type smaller ones."
        )
    return "\n".join(lines)


def parse_shape(value: str) -> Shape:
    """A `Shape` from `key=value,...`; `parallel` stands for `parallel=1`.

    Raises:
        UsageError: a key is unknown, missing, or no positive number.
    """
    fields = {field.name: field for field in dataclasses.fields(Shape)}
    given: dict[str, int] = {}
    for item in value.split(","):
        key, _, number = item.strip().partition("=")
        if (
            key not in fields
            or not (number.isdecimal() or (key == "parallel" and not number))
            or len(number) > len(str(MAX_NUMBER))
        ):
            raise UsageError(f"'{item}' is no part of a shape; give {','.join(f'{name}=N' for name in fields)}")
        given[key] = int(number or 1)
    missing = [name for name, field in fields.items() if field.default is dataclasses.MISSING and not given.get(name)]
    if given.get("expert_count", 1) > 1 and "expert_used_count" not in given:
        missing.append("expert_used_count")
    if missing:
        raise UsageError(f"the shape lacks {', '.join(missing)}")
    return Shape(**(given | {"parallel": bool(given.get("parallel"))}))  # type: ignore[arg-type]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `plan`."""
    parser.add_argument("path", type=Path, nargs="?", metavar="FILE.gguf", help="a model, or its first megabytes")
    parser.add_argument("--shape", metavar="KEY=N,...", help="instead of a file: " + ", ".join(Shape.__annotations__))
    parser.add_argument(
        "--batch", type=numbers, default=BATCHES, metavar="N,...", help=f"batch sizes (default: {','.join(map(str, BATCHES))})"
    )
    parser.add_argument(
        "--type",
        default="q8_0",
        metavar="TYPE",
        help="type of the tables (default: q8_0, where auto begins)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    """Run `plan` from the command line."""
    if (args.path is None) == (args.shape is None):
        raise UsageError("give either a file, or a --shape")
    model = parse_shape(args.shape).outline() if args.path is None else args.path
    result = plan(model, type=args.type, batches=args.batch)
    print(to_json(result) if args.json else text(result))
    return 0
