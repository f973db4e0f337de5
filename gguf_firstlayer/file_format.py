"""What a converted file holds: the `firstlayer.*` keys, tables, and elided weights. docs/format.md is the specification."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from gguf_firstlayer.errors import FirstLayerError, UsageError
from gguf_firstlayer.runtime import Site
from gguf_firstlayer.source import Source

VERSION = 1
MAX_DIMS = 4

# of a measurement that is stored as F32
LARGEST = float(np.finfo(np.float32).max)

# columns; kernels read rows in vectors of four floats
ALIGNMENT = 4

KEY_VERSION = "firstlayer.version"
KEY_SAMPLE = "firstlayer.source.sample"

# bytes from the middle of a weight by which a sidecar recognises its source (llama_firstlayer::N_SAMPLE)
SAMPLE = 32

_T = GGMLQuantizationType

TYPES = {
    kind.name.lower(): kind
    for kind in GGMLQuantizationType
    if kind not in (_T.F64, _T.I8, _T.I16, _T.I32, _T.I64, _T.Q8_1, _T.Q8_K)  # lookups do not support these
}

# what llama-quantize uses in place of types whose blocks are too wide
_NARROWER = (
    dict.fromkeys((_T.IQ1_S, _T.IQ1_M, _T.IQ2_XXS, _T.IQ2_XS, _T.IQ2_S, _T.IQ3_XXS, _T.IQ3_S, _T.IQ4_XS), _T.IQ4_NL)
    | dict.fromkeys((_T.Q2_K, _T.Q3_K, _T.TQ1_0, _T.TQ2_0), _T.Q4_0)
    | {_T.Q4_K: _T.Q5_0, _T.Q5_K: _T.Q5_1, _T.Q6_K: _T.Q8_0}
)


@dataclass(frozen=True)
class StoredSite:
    """A site and its place in a table.

    Attributes:
        name, recipe, width: as in `runtime.Site`
        table: number of the table
        column: first column of the site in the table's rows
        fingerprint: SHA-256 of the weights it was computed from, hexadecimal; see `fingerprints`
    """

    name: str
    recipe: str
    width: int
    table: int
    column: int
    fingerprint: str


@dataclass(frozen=True)
class Table:
    """A table [width, vocabulary], one row per token.

    Attributes:
        name: of the tensor
        type: ggml type
        width: values per row
        rows: entries of the vocabulary
    """

    name: str
    type: GGMLQuantizationType
    width: int
    rows: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row as stored."""
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return self.width // block * size

    @property
    def bytes(self) -> int:
        """Bytes of the table as stored."""
        return self.row_bytes * self.rows


@dataclass(frozen=True)
class Elided:
    """A weight that is elided from the file.

    Attributes:
        name: of the tensor in the source
        type: ggml type in the source
        shape: dimensions in ggml's order, the contiguous one first
        bytes: its size in the source
    """

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Measurement:
    """Effect of tables on the next-token distribution, against the same model without them.

    Attributes:
        tokens: length of the text
        max_kld: bound on `kld_tables` and its error together
        kld: mean KL divergence over the tokens, in nats
        kld_floor: the same if only the last bits of the first layer change
        kld_tables: the tables' part of it: the rise over the floor, measured with errors enlarged; noise may make it negative
        kld_tables_error: its standard error over the tokens
        top1: share of the tokens whose most probable successor is the same
        perplexity_source, perplexity: of the text, without and with tables
    """

    tokens: int
    max_kld: float
    kld: float
    kld_floor: float
    kld_tables: float
    kld_tables_error: float
    top1: float
    perplexity_source: float
    perplexity: float


@dataclass(frozen=True)
class Origin:
    """What is needed to restore the source of a converted file.

    Attributes:
        sizes: of its files, in bytes: one, or the parts of a split model
        sha256: of the file, or of the parts one after the other, hexadecimal
        headers: of each file, without the model's keys; see `Source.headers`
    """

    sizes: list[int]
    sha256: str
    headers: list[bytes]


def table_name(i: int) -> str:
    """Name of the tensor of table i."""
    return f"firstlayer.{i}.table"


def fitting(wanted: GGMLQuantizationType, width: int) -> GGMLQuantizationType:
    """The type itself if its blocks divide the width, otherwise the nearest that fits.

    llama-quantize would choose the same (`tensor_type_fallback`).
    """
    for kind in (wanted, _NARROWER.get(wanted, wanted)):
        if width % gguf.GGML_QUANT_SIZES[kind][0] == 0:
            return kind
    return GGMLQuantizationType.F16


def layout(
    sites: Sequence[Site], site_types: Mapping[Site, GGMLQuantizationType], n_vocab: int
) -> tuple[list[Table], list[tuple[Site, int, int]]]:
    """Put sites of one type side by side in one table, so that a lookup reads one row for all of them.

    Sites start, and rows end, at multiples of ALIGNMENT columns.

    Args:
        sites: to store
        site_types: type of each; its block size divides the site's width, so that no block holds parts of two sites
        n_vocab: rows of the tables

    Returns:
        The tables, and (site, table number, first column) for each site in order of table and column.
    """
    groups: dict[GGMLQuantizationType, list[Site]] = {}
    for site in sites:
        groups.setdefault(site_types[site], []).append(site)

    tables: list[Table] = []
    placed: list[tuple[Site, int, int]] = []
    for kind, group in groups.items():
        column = 0
        for site in group:
            placed.append((site, len(tables), column))
            column += padded(site.width)
        tables.append(Table(table_name(len(tables)), kind, column, n_vocab))
    return tables, placed


def table_type(name: str) -> GGMLQuantizationType:
    """A type by its name.

    Raises:
        UsageError: tables cannot have this type.
    """
    kind = TYPES.get(name.lower())
    if kind is None:
        raise UsageError(f"unknown table type {name}; choose one of {', '.join(TYPES)}")
    return kind


def padded(width: int) -> int:
    """Columns that a site takes."""
    return -(-width // ALIGNMENT) * ALIGNMENT


def metadata(
    sites: Sequence[StoredSite],
    elided: Sequence[Elided],
    spares: Sequence[str] = (),
    measurement: Measurement | None = None,
    origin: Origin | None = None,
    samples: Mapping[str, bytes] | None = None,
) -> list[tuple[str, Any, GGUFValueType, GGUFValueType | None]]:
    """The `firstlayer.*` keys as (key, value, type, element type of an array).

    Args:
        sites: of the file
        elided: weights elided from it
        spares: names of weights that only batches of embeddings read
        measurement: by which the types were chosen
        origin: for a file that replaces its source
        samples: for a sidecar: bytes of the source's weights, by name
    """

    def array(key: str, values: Iterable[Any], kind: GGUFValueType) -> tuple[str, Any, GGUFValueType, GGUFValueType]:
        return f"firstlayer.{key}", list(values), GGUFValueType.ARRAY, kind

    keys: list[tuple[str, Any, GGUFValueType, GGUFValueType | None]] = [
        (KEY_VERSION, VERSION, GGUFValueType.UINT32, None),
        array("site.name", (site.name for site in sites), GGUFValueType.STRING),
        array("site.recipe", (site.recipe for site in sites), GGUFValueType.STRING),
        array("site.table", (site.table for site in sites), GGUFValueType.UINT32),
        array("site.column", (site.column for site in sites), GGUFValueType.UINT32),
        array("site.width", (site.width for site in sites), GGUFValueType.UINT32),
        array("site.fingerprint", (site.fingerprint for site in sites), GGUFValueType.STRING),
    ]
    if elided:
        padded = [(*weight.shape, 1, 1, 1, 1)[:MAX_DIMS] for weight in elided]
        keys += [
            array("elided.name", (weight.name for weight in elided), GGUFValueType.STRING),
            array("elided.type", (int(weight.type) for weight in elided), GGUFValueType.UINT32),
            array("elided.dimension", (size for shape in padded for size in shape), GGUFValueType.INT64),
        ]
    if spares:
        keys.append(array("spare.name", spares, GGUFValueType.STRING))
    if measurement:
        keys += [
            (f"firstlayer.measured.{name}", value, GGUFValueType.UINT32, None)
            if name == "tokens"
            else (f"firstlayer.measured.{name}", min(value, LARGEST), GGUFValueType.FLOAT32, None)
            for name, value in dataclasses.asdict(measurement).items()
        ]
    if origin:
        keys += [
            ("firstlayer.origin.bytes", sum(origin.sizes), GGUFValueType.UINT64, None),
            ("firstlayer.origin.sha256", origin.sha256, GGUFValueType.STRING, None),
            array("origin.header", b"".join(origin.headers), GGUFValueType.UINT8),
        ]
    if origin and len(origin.sizes) > 1:
        keys += [
            array("origin.part.bytes", origin.sizes, GGUFValueType.UINT64),
            array("origin.part.header", map(len, origin.headers), GGUFValueType.UINT64),
        ]
    if samples:
        keys += [
            array("source.name", samples, GGUFValueType.STRING),
            array("source.sample", b"".join(samples.values()), GGUFValueType.UINT8),
        ]
    return keys


def is_sidecar(source: Source) -> bool:
    """Whether a file holds tables for a model in another file."""
    return source.get_field(KEY_SAMPLE) is not None


def read_spares(source: Source) -> list[str]:
    """Names of the weights in a converted file that only batches of embeddings read; none if the key is malformed."""
    names = source.value("firstlayer.spare.name")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def read_origin(source: Source) -> Origin | None:
    """What is needed to restore the source of a converted file, None if the file does not have it.

    Raises:
        FirstLayerError: the keys are malformed.
    """
    size, sha256 = (source.value(f"firstlayer.origin.{name}") for name in ("bytes", "sha256"))
    header = source.array_bytes("firstlayer.origin.header")
    if size is None or sha256 is None or not header:
        return None
    parts = [source.value(f"firstlayer.origin.part.{name}") for name in ("bytes", "header")]
    try:
        sizes, lengths = (_integers(part or []) for part in parts)
        if not any(parts):
            sizes, lengths = _integers([size]), [len(header)]
        ends = list(accumulate(lengths))
        if len(sizes) != len(lengths) or min(sizes + lengths, default=0) < 24 or ends[-1] != len(header):
            raise ValueError("sizes of the source's parts")
    except (ValueError, TypeError) as err:
        raise FirstLayerError(f"the firstlayer keys of the file are malformed ({err}); get the original model again") from err
    return Origin(sizes, str(sha256), [header[end - n : end] for n, end in zip(lengths, ends, strict=True)])


def read_measurement(source: Source) -> Measurement | None:
    """The measurement by which the types of a converted file's tables were chosen, None if there was none."""
    values = [_number(source.value(f"firstlayer.measured.{field.name}")) for field in dataclasses.fields(Measurement)]
    return Measurement(*values) if None not in values else None  # type: ignore[arg-type]


def _number(value: Any) -> int | float | None:
    return value if isinstance(value, int | float) else None


def _integers(values: Any) -> list[int]:
    if not isinstance(values, list) or not all(isinstance(value, int) for value in values):
        raise ValueError("a list of whole numbers is expected")
    return values


def _strings(values: Any) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError("a list of texts is expected")
    return values


def read(source: Source) -> tuple[list[StoredSite], list[Table], list[Elided]]:
    """The sites, tables and elided weights of a converted file; empty lists for a plain model.

    Raises:
        FirstLayerError: the keys are malformed, or of an unknown version.
    """
    version = source.value(KEY_VERSION)
    if version is None:
        return [], [], []
    if version != VERSION:
        raise FirstLayerError(f"the file has {KEY_VERSION} {version}, but this program reads {VERSION}; update it")

    def values(key: str) -> list[Any]:
        check = _strings if key.endswith(("name", "recipe", "fingerprint")) else _integers
        return check(source.value(f"firstlayer.{key}") or [])

    try:
        if any(number < 0 for key in ("width", "table", "column") for number in values(f"site.{key}")):
            raise ValueError("a negative number")
        columns = [values(f"site.{key}") for key in ("name", "recipe", "width", "table", "column", "fingerprint")]
        sites = [StoredSite(*row) for row in zip(*columns, strict=True)]
        tables = []
        for i in range(max((site.table for site in sites), default=-1) + 1):
            tensor = source.tensors[table_name(i)]
            tables.append(Table(tensor.name, tensor.tensor_type, int(tensor.shape[0]), int(tensor.shape[1])))

        names, types, sizes = (values(f"elided.{key}") for key in ("name", "type", "dimension"))
        elided = []
        for i, (name, number) in enumerate(zip(names, types, strict=True)):
            shape = tuple(sizes[i * MAX_DIMS : (i + 1) * MAX_DIMS])
            kind = GGMLQuantizationType(number)
            block, size = gguf.GGML_QUANT_SIZES[kind]
            count = shape[0] * shape[1] * shape[2] * shape[3]
            elided.append(Elided(name, kind, shape, count // block * size))
    except (ValueError, KeyError, IndexError, TypeError) as err:
        raise FirstLayerError(f"the firstlayer keys of the file are malformed ({err}); convert the model again") from err
    return sites, tables, elided


def fingerprints(source: Source, sites: Sequence[Site]) -> dict[str, str]:
    """SHA-256 of the weights that each site was computed from, by recipe.

    For every weight in the order of the names: its name, a zero byte, its type and its dimensions as 32 and 4 times 64 bit
    little-endian integers, and the SHA-256 of its data.
    """
    weights: dict[str, bytes] = {}
    for name in sorted({name for site in sites for name in site.weights}):
        tensor = source.tensors[name]
        shape = ([int(size) for size in tensor.shape] + [1] * MAX_DIMS)[:MAX_DIMS]
        header = np.array([int(tensor.tensor_type)], "<u4").tobytes() + np.array(shape, "<u8").tobytes()
        weights[name] = name.encode() + b"\0" + header + hashlib.sha256(source.data(name)).digest()
    return {site.recipe: hashlib.sha256(b"".join(weights[name] for name in sorted(site.weights))).hexdigest() for site in sites}
