"""Tensors that start at multiples of 0."""

from pathlib import Path

from gguf import GGUFValueType
from support.models import rewrite

EXPECTED = {"load": "failed to load model", "inspect": "malformed"}


def forge(model: Path, output: Path) -> None:
    rewrite(model, output, keys={"general.alignment": (0, GGUFValueType.UINT32)})
