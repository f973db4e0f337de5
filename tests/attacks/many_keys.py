"""30,000 keys."""

from pathlib import Path

from gguf import GGUFValueType
from support.models import rewrite

EXPECTED = {"load": "", "inspect": ""}


def forge(model: Path, output: Path) -> None:
    rewrite(model, output, keys={f"key.{i}": (i, GGUFValueType.UINT32) for i in range(30_000)})
