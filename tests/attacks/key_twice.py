"""Two keys of one name, which readers may tell apart or not."""

from pathlib import Path

from gguf import GGUFReader

EXPECTED = {"load": "failed to load model", "inspect": "malformed"}


def forge(model: Path, output: Path) -> None:
    reader = GGUFReader(model, "c")
    table, width = (reader.fields[f"firstlayer.site.{key}"].parts[1] for key in ("table", "width"))
    width[:] = table
    reader.data.tofile(output)
