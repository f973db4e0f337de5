"""An elided weight that would take 64 TiB."""

from pathlib import Path

from support.models import rewrite

EXPECTED = {"load": "has wrong shape", "inspect": ""}


def forge(model: Path, output: Path) -> None:
    def change(name: str, value: list) -> list:
        return [2**20, 2**14, 1, 1, *value[4:]] if name == "firstlayer.elided.dimension" else value

    rewrite(model, output, change_key=change)
