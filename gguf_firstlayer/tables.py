"""What a converted file holds: the `firstlayer.*` keys, tables, and elided weights. docs/format.md is the specification."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import gguf
from gguf import GGMLQuantizationType, GGUFValueType

from gguf_firstlayer.errors import FirstLayerError
from gguf_firstlayer.runtime import Site
from gguf_firstlayer.source import Source

VERSION = 1
MAX_DIMS = 4

# columns; kernels read rows in vectors of four floats
ALIGNMENT = 4

KEY_VERSION = "firstlayer.version"


@dataclass(frozen=True)
class Placed:
    """A site and its place in a table.

    Attributes:
        name, recipe, width: as in `runtime.Site`
        table: number of the table
        column: first column of the site in the table's rows
        fingerprint: SHA-256 of the weights it was computed from, hexadecimal; see `convert.fingerprints`
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
    """A weight that the file does not hold.

    Attributes:
        name: of the tensor in the source
        type: ggml type in the source
        shape: dimensions in ggml's order, the contiguous one first
        bytes: that it took in the source
    """

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    bytes: int


def table_name(i: int) -> str:
    """Name of the tensor of table i."""
    return f"firstlayer.{i}.table"


def layout(
    sites: Sequence[Site], wanted: GGMLQuantizationType, n_vocab: int
) -> tuple[list[Table], list[tuple[Site, int, int]]]:
    """Put sites side by side, in one table if the blocks of the type allow it.

    A site whose width is no multiple of the type's block size goes to a table of F16, so that no block mixes two sites.
    Sites start at multiples of ALIGNMENT columns, and rows end there.

    Returns:
        The tables, and (site, table number, first column) for each site in order of table and column.
    """
    groups: dict[GGMLQuantizationType, list[Site]] = {}
    for site in sites:
        fits = site.width % gguf.GGML_QUANT_SIZES[wanted][0] == 0
        groups.setdefault(wanted if fits else GGMLQuantizationType.F16, []).append(site)

    tables: list[Table] = []
    placed: list[tuple[Site, int, int]] = []
    for kind, group in groups.items():
        column = 0
        for site in group:
            placed.append((site, len(tables), column))
            column += -(-site.width // ALIGNMENT) * ALIGNMENT
        tables.append(Table(table_name(len(tables)), kind, column, n_vocab))
    return tables, placed


def metadata(sites: Sequence[Placed], elided: Sequence[Elided]) -> list[tuple[str, Any, GGUFValueType, GGUFValueType | None]]:
    """The `firstlayer.*` keys as (key, value, type, element type of an array)."""

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
    return keys


def read(source: Source) -> tuple[list[Placed], list[Table], list[Elided]]:
    """The sites, tables and elided weights of a converted file; empty lists for a plain model.

    Raises:
        FirstLayerError: the keys are malformed, or of a version that is not known here.
    """
    version = source.get_field(KEY_VERSION)
    if version is None:
        return [], [], []
    if version.contents() != VERSION:
        raise FirstLayerError(f"the file has {KEY_VERSION} {version.contents()}, this program reads {VERSION}; update it")

    def values(key: str) -> list[Any]:
        field = source.get_field(f"firstlayer.{key}")
        return list(field.contents()) if field else []

    try:
        columns = [values(f"site.{key}") for key in ("name", "recipe", "width", "table", "column", "fingerprint")]
        sites = [Placed(*row) for row in zip(*columns, strict=True)]
        tables = []
        for i in range(max((site.table for site in sites), default=-1) + 1):
            tensor = source.tensors[table_name(i)]
            tables.append(Table(tensor.name, tensor.tensor_type, int(tensor.shape[0]), int(tensor.shape[1])))

        names, kinds, sizes = (values(f"elided.{key}") for key in ("name", "type", "dimension"))
        elided = []
        for i, (name, number) in enumerate(zip(names, kinds, strict=True)):
            shape = tuple(sizes[i * MAX_DIMS : (i + 1) * MAX_DIMS])
            kind = GGMLQuantizationType(number)
            block, size = gguf.GGML_QUANT_SIZES[kind]
            count = shape[0] * shape[1] * shape[2] * shape[3]
            elided.append(Elided(name, kind, shape, count // block * size))
    except (ValueError, KeyError, IndexError, TypeError) as err:
        raise FirstLayerError(f"the firstlayer keys of the file are malformed ({err}); convert the model again") from err
    return sites, tables, elided
