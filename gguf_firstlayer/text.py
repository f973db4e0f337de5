"""How results are shown: sizes for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from gguf import GGMLQuantizationType

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def size_text(n: float) -> str:
    """Bytes as people read them."""
    for power, unit in ((30, "GiB"), (20, "MiB")):
        if abs(n) >= 2**power:
            return f"{n / 2**power:.{2 if power == 30 else 1}f} {unit}"
    return f"{n / 2**10:.1f} KiB"


def to_json(result: DataclassInstance) -> str:
    """A result as JSON: types by their names, files as strings."""

    def encode(value: object) -> object:
        return value.name.lower() if isinstance(value, GGMLQuantizationType) else str(value)

    def factory(items: list[tuple[str, object]]) -> dict[str, object]:
        return {key: encode(value) if isinstance(value, GGMLQuantizationType | Path) else value for key, value in items}

    return json.dumps(dataclasses.asdict(result, dict_factory=factory), indent=2)
