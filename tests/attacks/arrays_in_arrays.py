"""A list of lists of lists, each of 4 bytes."""

from pathlib import Path

from gguf import GGUFReader, GGUFValueType

EXPECTED = {"load": "failed to load model", "inspect": "malformed"}


def forge(model: Path, output: Path) -> None:
    reader = GGUFReader(model, "c")
    kind = reader.fields["firstlayer.site.width"].parts[3]
    kind[0] = GGUFValueType.ARRAY
    reader.data.tofile(output)
