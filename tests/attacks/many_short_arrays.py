"""A thousand keys with lists of 4096 bytes, each of which would be an object."""

from pathlib import Path

from gguf import GGUFValueType
from support.models import rewrite

EXPECTED = {"load": "", "inspect": "", "verify": "metadata"}


def forge(model: Path, output: Path) -> None:
    value = [*range(256)] * 16
    rewrite(model, output, keys={f"x.{i}": (value, GGUFValueType.ARRAY, GGUFValueType.UINT8) for i in range(1000)})
