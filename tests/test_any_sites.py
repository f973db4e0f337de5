"""Sites that conversion would not choose: the rewrite is right for whatever a file names."""

from __future__ import annotations

import numpy as np
import pytest
from architectures import PLM
from attacks.any_sites import check
from support.builds import Cached, compare
from support.models import convert, without_attention

from gguf_firstlayer.runtime import Analysis

# name -> a seed with which an earlier rewrite aborted or gave wrong logits: readers that allow no gaps, nor values apart; sites
# that are computed after all, although others were counted on
CASES = {
    "qwen35-dense": 1,
    "deepseek32-moe": 1,
    "dots3note-moe": 3,
    "bailingmoe3-moe": 1,
    "plm-dense": 5,
    "minicpm3-dense": 5,
}


@pytest.mark.parametrize("name", CASES)
def test_any_sites(name, archs, tmp_path):
    """Oracle: stock llama.cpp. `python -m attacks.any_sites` tries all architectures, with as many seeds as one likes."""
    for flash in (0,) if name == PLM else (0, 1):
        assert check(archs / f"{name}.gguf", CASES[name], flash, tmp_path)["tables"]


def test_recipes_do_not_depend_on_the_batch(archs, monkeypatch):
    """Gemma 3n's layers each have a view of one tensor, beyond the tokens of other layers: an offset in bytes would name one
    layer in one batch and another in the next.
    """
    monkeypatch.setenv("LLAMA_FIRSTLAYER_SAMPLE_SITES", "1")
    recipes = []
    for n_batch in (2, 6, 64):
        with Analysis(archs / "gemma3n-dense.gguf", n_batch, load_vocab=False) as analysis:
            recipes.append([site.recipe for site in analysis.sites])
    assert recipes[0] == recipes[1] == recipes[2]
    assert any(recipe.startswith("view[256,*;offset=") for recipe in recipes[0])


def test_a_model_that_depends_on_the_token_alone(tmp_path):
    """Two hundred layers before the first attention. Oracle: stock llama.cpp.

    Fails if a graph has less room since its weights are gone, which aborts, or if recipes reach through all layers, which takes
    more stack than there is.
    """
    source = without_attention(tmp_path / "model.gguf", 200)
    converted = convert(source, tmp_path / "x.gguf", type="f32")
    assert converted.elided
    job = {"run": "on_a_small_stack", "job": "logits", "tokens": {"count": 20, "seed": 1}, "batches": [1, 16]}
    for ours in (converted.output, Cached(source)):
        ((stock, found),) = compare(source, ours, job)
        for size in job["batches"]:
            assert np.allclose(stock[size], found[size], atol=1e-6)  # kernels round F32 products by the size of the batch
    assert found["cache"]["n_hits"] > 0
