"""`inspect`: what a converted file holds; for a plain model, its sites."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from gguf_firstlayer import file_format
from gguf_firstlayer.auto import describe
from gguf_firstlayer.hub import ModelName, local, model_name
from gguf_firstlayer.runtime import Site, analyse
from gguf_firstlayer.source import Source
from gguf_firstlayer.text import show, size_text


@dataclass(frozen=True)
class Inspection:
    """What is in a GGUF file.

    Attributes:
        path, architecture, file_bytes: of the file, or of all parts of a split model
        converted: whether it holds tables
        sidecar: whether it holds nothing else
        sites: `file_format.StoredSite` in a converted file, `runtime.Site` in a plain model
        tables: tables of a converted file
        elided: weights elided from a converted file
        spares: names of weights that images, audio or hidden states need, and tokens do not once there are tables
        measurement: the one by which the types of the tables were chosen, if any
        elidable: weights that a conversion of a plain model would elide
        blocker: why a plain model has no site; "" otherwise
    """

    path: Path
    architecture: str
    file_bytes: int
    converted: bool
    sidecar: bool
    sites: list[file_format.StoredSite] | list[Site]
    tables: list[file_format.Table]
    elided: list[file_format.Elided]
    spares: list[str]
    measurement: file_format.Measurement | None
    elidable: list[str]
    blocker: str


def inspect(path: ModelName) -> Inspection:
    """Look into a GGUF file, converted or not.

    Raises:
        FirstLayerError: it cannot be read, or llama.cpp cannot load it.
    """
    path = local(path)
    source = Source(path)
    architecture, file_bytes = source.architecture, source.bytes
    sites, tables, elided = file_format.read(source)
    if sites:
        spares = file_format.read_spares(source)
        sidecar, measurement = file_format.is_sidecar(source), file_format.read_measurement(source)
        return Inspection(path, architecture, file_bytes, True, sidecar, sites, tables, elided, spares, measurement, [], "")
    with analyse(path) as analysis:
        return Inspection(
            path, architecture, file_bytes, False, False, list(analysis.sites), [], [], list(analysis.spares), None,
            [name for name in analysis.elidable if name not in analysis.spares], analysis.blocker,
        )  # fmt: skip


def text(result: Inspection) -> list[str]:
    """The result as lines of readable text."""
    state = "tables of a model in another file" if result.sidecar else "converted" if result.converted else "not converted"
    lines = [f"{result.path}: {result.architecture}, {size_text(result.file_bytes)}, {state}"]
    if not result.sites:
        lines.append(f"no sites: {result.blocker}")
    for table in result.tables:
        lines.append(f"table {table.name}: {table.type.name.lower()} [{table.width}, {table.rows}], {size_text(table.bytes)}")
    if result.measurement:
        types = {
            site.name: result.tables[site.table].type.name.lower()
            for site in result.sites
            if isinstance(site, file_format.StoredSite)
        }
        lines += describe(types, result.measurement, "")
    for site in result.sites:
        place = (
            f", columns {site.column} to {site.column + site.width - 1} of table {site.table}"
            if isinstance(site, file_format.StoredSite)
            else ""
        )
        lines.append(f"site {site.name}: {site.width} values per token{place}")
        lines.append(f"    {site.recipe}")
    for weight in result.elided:
        shape = "x".join(str(size) for size in weight.shape).removesuffix("x1").removesuffix("x1").removesuffix("x1")
        lines.append(f"elided {weight.name}: {weight.type.name.lower()} [{shape}], {size_text(weight.bytes)}")
    for name in result.spares:
        lines.append(f"not read for tokens: {name}" if result.converted else f"would not be read for tokens: {name}")
    for name in result.elidable:
        lines.append(f"would be elided: {name}")
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `inspect`."""
    parser.add_argument("path", type=model_name, metavar="FILE.gguf")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    """Run `inspect` from the command line."""
    result = inspect(args.path)
    show(result, args.json, text)
    return 0
