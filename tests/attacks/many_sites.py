"""200,000 sites in one table."""

from pathlib import Path

from support.models import rewrite

N = 200_000
EXPECTED = {"load": "overlap, or have gaps", "inspect": "too long"}


def forge(model: Path, output: Path) -> None:
    def change(name: str, value: list) -> list:
        return value[:1] * N if name.startswith("firstlayer.site.") else value

    rewrite(model, output, change_key=change)
