"""Numbers as text, and text that is no UTF-8."""

from pathlib import Path

from gguf import GGUFValueType
from support.models import rewrite

EXPECTED = {"load": "firstlayer.site.width", "inspect": "malformed", "revert": "malformed", "verify": "firstlayer.site.width"}


def forge(model: Path, output: Path) -> None:
    keys = {
        "firstlayer.site.width": (["256", "256", "256"], GGUFValueType.ARRAY, GGUFValueType.STRING),
        "firstlayer.origin.bytes": (float("nan"), GGUFValueType.FLOAT32),
        "general.name": (b"\xff\xfe", GGUFValueType.STRING),
    }
    rewrite(model, output, keys=keys)
