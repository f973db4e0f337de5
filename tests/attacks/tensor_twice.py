"""Two tensors of one name."""

from pathlib import Path

from gguf import GGUFReader

EXPECTED = {"load": "failed to load model", "inspect": "malformed"}


def forge(model: Path, output: Path) -> None:
    reader = GGUFReader(model, "c")
    names = {tensor.name: tensor.field.parts[1] for tensor in reader.tensors}
    names["blk.1.attn_k.weight"][:] = names["blk.1.attn_q.weight"]
    reader.data.tofile(output)
