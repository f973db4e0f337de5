"""A table that lies where another tensor does."""

from pathlib import Path

from gguf import GGUFReader

EXPECTED = {"load": "failed to load model", "inspect": "malformed"}


def forge(model: Path, output: Path) -> None:
    reader = GGUFReader(model, "c")
    *_, offset = reader.tensors[-1].field.parts
    offset[0] = 0
    reader.data.tofile(output)
