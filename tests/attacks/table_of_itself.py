"""A table that is also a weight which it replaces, and that its own recipe reads."""

from pathlib import Path

from support.models import rewrite

EXPECTED = {"load": "is in the file, but is said to be elided", "inspect": ""}


def forge(model: Path, output: Path) -> None:
    def change(name: str, value: list) -> list:
        if name == "firstlayer.elided.name":
            return ["firstlayer.0.table", *value[1:]]
        if name == "firstlayer.site.recipe":
            return ["get_rows[256,*](firstlayer.0.table, tokens)", *value[1:]]
        return value

    rewrite(model, output, change_key=change)
