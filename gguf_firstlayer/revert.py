"""`revert`: restore the source of a converted file, byte for byte."""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from gguf_firstlayer import file_format
from gguf_firstlayer.errors import FirstLayerError, option
from gguf_firstlayer.hub import ModelName, local, model_name
from gguf_firstlayer.output import check, replacing
from gguf_firstlayer.source import Source, part_name
from gguf_firstlayer.text import count, show, size_text

INTERRUPTED = ", nothing was written"


@dataclass(frozen=True)
class Reversion:
    """What `revert` did.

    Attributes:
        converted, output: files; of a split model, the first part
        output_bytes: size of the output
        sha256: of the output, which is that of the source, hexadecimal; of parts, one after the other
    """

    converted: Path
    output: Path
    output_bytes: int
    sha256: str


def revert(
    converted: ModelName,
    output: str | os.PathLike[str] | None = None,
    *,
    source: ModelName | None = None,
    force: bool = False,
) -> Reversion:
    """Restore the source of a converted file. The output appears only if its SHA-256 is that of the source.

    Args:
        converted: GGUF file, or what `hub.local` takes; of a split one, the first part
        output: default: `x.gguf` beside `x-flp.gguf`; a source in parts becomes `x-00001-of-0000N.gguf` and so on
        source: a file with the weights that were elided from the converted one
        force: replace an existing output

    Raises:
        FirstLayerError: the file does not hold all of its source, or the output cannot be written; nothing is left behind.
    """
    tables = Source(local(converted))
    output = Path(output) if output is not None else tables.path.with_name(f"{tables.stem.removesuffix('-flp')}.gguf")
    donor = Source(local(source)) if source is not None else None
    origin = _check(tables, donor, output, force)

    names = [output.name]
    if len(origin.sizes) > 1:
        names = [part_name(output.stem, i, len(origin.sizes)) for i in range(len(origin.sizes))]
    with replacing(output, force) as temporary:
        parts = [temporary.with_name(name) for name in names]
        _n_keys, keys = tables.keys()
        for part, header, size in zip(parts, origin.headers, origin.sizes, strict=True):
            part.write_bytes(header[:24] + (keys if part == parts[0] else b"") + header[24:])
            if size < part.stat().st_size:
                raise FirstLayerError(f"the firstlayer keys of {tables.path} are malformed; get the original model again")
            os.truncate(part, size)
        _write_weights(Source(parts[0]), tables, donor)
        sha256 = Source(parts[0]).sha256()
        if sha256 != origin.sha256:
            donated = f", or {donor.path} is another model" if donor else ""
            raise FirstLayerError(f"the source of {tables.path} had more than its tensors{donated}, so it cannot be restored")
    return Reversion(tables.path, output.with_name(names[0]), sum(origin.sizes), sha256)


def _check(tables: Source, donor: Source | None, output: Path, force: bool) -> file_format.Origin:
    """Check the headers. Returns what is needed to restore the source."""
    _sites, _tables, elided = file_format.read(tables)
    if tables.get_field(file_format.KEY_VERSION) is None:
        raise FirstLayerError(f"{tables.path} is not converted, so there is nothing to revert")
    if file_format.is_sidecar(tables):
        raise FirstLayerError(
            f"{tables.path} holds only tables, and its source was not changed; delete the file if you do not need it"
        )
    origin = file_format.read_origin(tables)
    if origin is None:
        raise FirstLayerError(
            f"{tables.path} was made from a split model by an older version, and does not tell where its parts began;"
            " use the original parts"
        )
    if elided and donor is None:
        size = size_text(sum(weight.bytes for weight in elided))
        raise FirstLayerError(
            f"{tables.path} lacks {count(len(elided), 'elided weight')} of its source ({size}), so it cannot be reverted;"
            f" give a file that has them with {option('source')}"
        )
    if sum(origin.sizes) > tables.bytes + (donor.bytes if donor else 0):
        raise FirstLayerError(f"the firstlayer keys of {tables.path} are malformed; get the original model again")
    check(output, [path for model in (tables, donor) if model for path in model.paths], force, parts=len(origin.sizes) > 1)
    return origin


def _write_weights(restored: Source, tables: Source, donor: Source | None) -> None:
    """Write the weights of a source whose headers are there. Afterwards, nothing maps it: Windows would not move it."""
    with ExitStack() as stack:
        files = {part: stack.enter_context(part.open("r+b")) for part in restored.paths}
        for name, tensor in restored.tensors.items():
            holder = tables if name in tables.tensors else donor
            if holder is None or name not in holder.tensors or holder.tensors[name].n_bytes != tensor.n_bytes:
                raise FirstLayerError(f"{(holder or tables).path} does not hold weight {name} as {tables.path} needs it")
            part, offset, _size = restored.place(name)
            files[part].seek(offset)
            files[part].write(holder.data(name))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `revert`."""
    parser.add_argument("converted", type=model_name, metavar="CONVERTED.gguf")
    parser.add_argument("-o", "--output", type=Path, metavar="OUT.gguf", help="default: X.gguf beside X-flp.gguf")
    parser.add_argument("--source", type=model_name, metavar="FILE.gguf", help="has the weights that were elided")
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    """Run `revert` from the command line."""
    result = revert(args.converted, args.output, source=args.source, force=args.force)
    show(
        result,
        args.json,
        lambda done: [f"wrote {done.output}, {size_text(done.output_bytes)}, identical to the source: {done.sha256}"],
    )
    return 0
