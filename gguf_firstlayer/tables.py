"""What a converted file holds: the `firstlayer.*` keys, tables, and elided weights. docs/format.md is the specification."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType

from gguf_firstlayer.errors import FirstLayerError
from gguf_firstlayer.runtime import Site, library

VERSION = 1
MAX_DIMS = 4

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
    return f"firstlayer.{i}.weight"


class _Reader(GGUFReader):
    """A GGUFReader that steps over the elements of long arrays: vocabularies, which would take it 3 KB per entry."""

    _LONG = 4096
    _HEADER = struct.Struct("<IQ")  # element type and number of elements

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[npt.NDArray[Any]], list[int], list[GGUFValueType]]:
        if raw_type == GGUFValueType.ARRAY:
            raw_kind, count = self._HEADER.unpack(self.data[orig_offs : orig_offs + self._HEADER.size].tobytes())
            kind, end = GGUFValueType(raw_kind), orig_offs + self._HEADER.size
            if count > self._LONG and kind == GGUFValueType.STRING:
                for _ in range(count):
                    end += 8 + int.from_bytes(self.data[end : end + 8].tobytes(), "little")
            elif count > self._LONG and kind in self.gguf_scalar_to_np:
                end += count * np.dtype(self.gguf_scalar_to_np[kind]).itemsize
            if end > orig_offs + self._HEADER.size:
                return end - orig_offs, [self.data[orig_offs:end]], [], [GGUFValueType.ARRAY, kind]
        return super()._get_field_parts(orig_offs, raw_type)


def open_gguf(path: Path) -> GGUFReader:
    """Open a GGUF file whose header is sound and whose tensors are all within the file.

    Raises:
        FirstLayerError: it cannot be read, is no GGUF file, is malformed, truncated, or of the other byte order.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(8)
    except OSError as err:
        raise FirstLayerError(f"{path} cannot be read: {err.strerror}") from err
    if magic[:4] != b"GGUF":
        raise FirstLayerError(f"{path} is not a GGUF file; convert the model with llama.cpp's convert_hf_to_gguf.py first")
    if magic[4:] not in (b"\2\0\0\0", b"\3\0\0\0"):
        raise FirstLayerError(
            f"{path} is a GGUF file of another byte order or version; only little-endian version 2 and 3 are read"
        )

    library().validate(path)
    try:
        return _Reader(path)
    except (ValueError, IndexError, KeyError, OverflowError, struct.error) as err:
        raise FirstLayerError(f"{path} is truncated or malformed ({err}); download or create it again") from err


def architecture(reader: GGUFReader) -> str:
    """Value of `general.architecture`, "unknown" if it has none."""
    field = reader.get_field("general.architecture")
    return str(field.contents()) if field else "unknown"


def layout(
    sites: Sequence[Site], wanted: GGMLQuantizationType, n_vocab: int
) -> tuple[list[Table], list[tuple[Site, int, int]]]:
    """Put sites side by side, in one table if the blocks of the type allow it.

    A site whose width is no multiple of the type's block size goes to a table of F16, so that no block mixes two sites.

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
            column += site.width
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


def read(reader: GGUFReader) -> tuple[list[Placed], list[Table], list[Elided]]:
    """The sites, tables and elided weights of a converted file; empty lists for a plain model.

    Raises:
        FirstLayerError: the keys are malformed, or of a version that is not known here.
    """
    version = reader.get_field(KEY_VERSION)
    if version is None:
        return [], [], []
    if version.contents() != VERSION:
        raise FirstLayerError(f"the file has {KEY_VERSION} {version.contents()}, this program reads {VERSION}; update it")

    def values(key: str) -> list[Any]:
        field = reader.get_field(f"firstlayer.{key}")
        return list(field.contents()) if field else []

    try:
        columns = [values(f"site.{key}") for key in ("name", "recipe", "width", "table", "column", "fingerprint")]
        sites = [Placed(*row) for row in zip(*columns, strict=True)]
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        tables = []
        for i in range(max((site.table for site in sites), default=-1) + 1):
            tensor = tensors[table_name(i)]
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
