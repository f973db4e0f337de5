"""A file that says it has 2^60 tensors."""

from pathlib import Path

from gguf import GGUFReader

EXPECTED = {"load": "failed to load model", "inspect": "malformed"}


def forge(model: Path, output: Path) -> None:
    reader = GGUFReader(model, "c")
    reader.fields["GGUF.tensor_count"].parts[0][0] = 2**60
    reader.data.tofile(output)
