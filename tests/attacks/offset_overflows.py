"""A table whose offset leads back to the start of the file."""

from pathlib import Path

from gguf import GGUFReader

EXPECTED = {"load": "failed to load model", "inspect": "malformed"}


def forge(model: Path, output: Path) -> None:
    reader = GGUFReader(model, "c")
    *_, offset = reader.tensors[-1].field.parts
    offset[0] = 2**64 - reader.data_offset
    reader.data.tofile(output)
