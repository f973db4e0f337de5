"""Names that give orders to a terminal."""

from pathlib import Path

from gguf import GGUFValueType
from support.models import rewrite

EXPECTED = {"load": "", "inspect": ""}


def forge(model: Path, output: Path) -> None:
    names = ["\x1b]0;owned\x07", "\x9b31m", "\x1b[2J"], GGUFValueType.ARRAY, GGUFValueType.STRING
    rewrite(model, output, keys={"firstlayer.site.name": names})
