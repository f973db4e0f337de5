"""A converted file whose source was 64 TiB, all but its tensors zeros."""

from pathlib import Path

from gguf import GGUFValueType
from support.models import rewrite

EXPECTED = {"load": "", "revert": "malformed"}


def forge(model: Path, output: Path) -> None:
    rewrite(model, output, keys={"firstlayer.origin.bytes": (1 << 46, GGUFValueType.UINT64)})
