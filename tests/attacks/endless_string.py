"""A key of 2^64 - 1 characters."""

from pathlib import Path

from gguf import GGUFReader

EXPECTED = {"load": "failed to load model", "inspect": "malformed"}


def forge(model: Path, output: Path) -> None:
    reader = GGUFReader(model, "c")
    length = reader.fields["firstlayer.version"].parts[0]
    length[0] = 2**64 - 1
    reader.data.tofile(output)
