"""A table whose number of bytes is 0 in 64 bits."""

from pathlib import Path

from gguf import GGUFReader

EXPECTED = {"load": "failed to load model", "inspect": "malformed"}


def forge(model: Path, output: Path) -> None:
    reader = GGUFReader(model, "c")
    dimensions = reader.tensors[-1].field.parts[3]
    dimensions[:] = 2**32
    reader.data.tofile(output)
