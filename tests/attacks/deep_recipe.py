"""A recipe of a million parentheses."""

from pathlib import Path

from support.models import rewrite

EXPECTED = {"load": "no node of the graph matches the recipe", "inspect": ""}


def forge(model: Path, output: Path) -> None:
    def change(name: str, value: list) -> list:
        recipe = "cont(" * 1_000_000 + "tokens" + ")" * 1_000_000
        return [recipe, *value[1:]] if name == "firstlayer.site.recipe" else value

    rewrite(model, output, change_key=change)
