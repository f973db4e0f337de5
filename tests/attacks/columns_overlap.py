"""Sites with the same columns: one site's rows for two."""

from pathlib import Path

from support.models import rewrite

EXPECTED = {"load": "overlap, or have gaps"}


def forge(model: Path, output: Path) -> None:
    def change(name: str, value: list) -> list:
        return [value[0]] * len(value) if name == "firstlayer.site.column" else value

    rewrite(model, output, change_key=change)
