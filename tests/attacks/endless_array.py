"""A list of 2^62 names."""

from pathlib import Path

from gguf import GGUFReader

EXPECTED = {"load": "failed to load model", "inspect": "malformed"}


def forge(model: Path, output: Path) -> None:
    reader = GGUFReader(model, "c")
    length = reader.fields["firstlayer.site.name"].parts[4]
    length[0] = 2**62
    reader.data.tofile(output)
