"""`revert`: restore the source of a converted file, byte for byte."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from gguf_firstlayer import file_format
from gguf_firstlayer.errors import FirstLayerError, option
from gguf_firstlayer.output import check, replacing
from gguf_firstlayer.source import Source
from gguf_firstlayer.text import count, size_text, to_json

INTERRUPTED = ", nothing was written"


@dataclass(frozen=True)
class Reversion:
    """What `revert` did.

    Attributes:
        converted, output: files
        output_bytes: size of the output
        sha256: of the output, which is that of the source, hexadecimal
    """

    converted: Path
    output: Path
    output_bytes: int
    sha256: str


def revert(
    converted: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    source: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> Reversion:
    """Restore the source of a converted file. The output appears only if its SHA-256 is that of the source.

    Args:
        converted: GGUF file; of a split one, the first part
        output: default: `x.gguf` beside `x-flp.gguf`
        source: a file with the weights that were elided from the converted one
        force: replace an existing output

    Raises:
        FirstLayerError: the file does not hold all of its source, or the output cannot be written; nothing is left behind.
    """
    tables = Source(Path(converted))
    output = Path(output) if output is not None else tables.path.with_name(f"{tables.stem.removesuffix('-flp')}.gguf")
    donor = Source(Path(source)) if source is not None else None
    origin = _check(tables, donor, output, force)

    with replacing(output) as temporary:
        with temporary.open("w+b") as file:
            _n_keys, keys = tables.keys()
            file.write(origin.header[:24] + keys + origin.header[24:])
            if not file.tell() <= origin.size <= tables.bytes + (donor.bytes if donor else 0):
                raise FirstLayerError(f"the firstlayer keys of {tables.path} are malformed; get the original model again")
            file.truncate(origin.size)
            file.flush()
            restored = Source(temporary)
            for name, tensor in restored.tensors.items():
                holder = tables if name in tables.tensors else donor
                if holder is None or name not in holder.tensors or holder.tensors[name].n_bytes != tensor.n_bytes:
                    raise FirstLayerError(f"{(holder or tables).path} does not hold weight {name} as {tables.path} needs it")
                file.seek(tensor.data_offset)
                file.write(holder.data(name))
        sha256 = Source(temporary).sha256()
        if sha256 != origin.sha256:
            donated = f", or {donor.path} is another model" if donor else ""
            raise FirstLayerError(f"the source of {tables.path} had more than its tensors{donated}, so it cannot be restored")
    return Reversion(tables.path, output, origin.size, sha256)


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
        raise FirstLayerError(f"{tables.path} was made from a split model, which cannot be restored; use the original parts")
    if elided and donor is None:
        size = size_text(sum(weight.bytes for weight in elided))
        raise FirstLayerError(
            f"{tables.path} lacks {count(len(elided), 'elided weight')} of its source ({size}), so it cannot be reverted;"
            f" give a file that has them with {option('source')}"
        )
    check(output, [path for model in (tables, donor) if model for path in model.paths], force)
    return origin


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `revert`."""
    parser.add_argument("converted", type=Path, metavar="CONVERTED.gguf")
    parser.add_argument("-o", "--output", type=Path, metavar="OUT.gguf", help="default: X.gguf beside X-flp.gguf")
    parser.add_argument("--source", type=Path, metavar="FILE.gguf", help="has the weights that were elided")
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    """Run `revert` from the command line."""
    result = revert(args.converted, args.output, source=args.source, force=args.force)
    print(
        to_json(result)
        if args.json
        else f"wrote {result.output}, {size_text(result.output_bytes)}, identical to the source: {result.sha256}"
    )
    return 0
