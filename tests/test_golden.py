"""What must never change: the spelling of recipes, the choice of sites, and that files written once still load."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from gguf import GGUFReader
from support.builds import PATCHED, ROOT, STOCK, run, same, session
from support.models import convert

GOLDEN = ROOT / "tests" / "golden"
sys.path.append(str(GOLDEN))
import make  # noqa: E402

STEPS: list[Any] = [["decode", [[0], {"count": 30, "seed": 1}]], ["decode", [[0], [7, 8, 9]]], ["decode", [[0], [5]]]]
FILES = ["serial-elided", "serial-kept", "serial-part", "serial-split-00001-of-00002", "parallel-elided", "parallel-kept"]


def test_recipes(archs):
    """Recipes of every architecture. If one changes, released files with it are refused."""
    assert list(make.recipes(archs)) == (GOLDEN / "recipes.txt").read_text().splitlines()


@pytest.mark.parametrize("name", [*FILES, "serial.firstlayer", "parallel.firstlayer"])
def test_files_load_for_ever(name):
    """All their sites are used, and logits are the stock library's for the source, bit for bit."""
    kind = name.partition("-")[0].partition(".")[0]
    source, file = GOLDEN / f"{kind}.gguf", GOLDEN / f"{name}.gguf"
    model: dict[str, Any] = {"model": file}
    if name.endswith(".firstlayer"):
        model = {"model": source, "load": {"sidecar": str(file)}}
    theirs, ours = session(source, STOCK, STEPS), session(build=PATCHED, steps=STEPS, **model)
    assert same(theirs, ours)
    (uses,) = run(PATCHED, model | {"run": "uses"})
    assert len(uses) == len(GGUFReader(file).fields["firstlayer.site.name"].contents())
    assert all(used for *_, used in uses)


@pytest.mark.parametrize("name", ["serial", "parallel"])
def test_the_same_keys_are_written_today(name, tmp_path):
    """What a file says about itself: names and places of sites, elided weights, fingerprints, the source."""
    today = convert(GOLDEN / f"{name}.gguf", tmp_path / "x.gguf", type="f32").output

    def keys(path: Any) -> dict[str, Any]:
        fields = GGUFReader(path).fields.items()
        return {key: field.contents() for key, field in fields if key.startswith("firstlayer.")}

    assert keys(today) == keys(GOLDEN / f"{name}-elided.gguf")
    assert len(keys(today)) > 8
