"""What needs the weights that rows replace: LoRA on layer 0, and vectors as input instead of tokens. Also requantizing."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from support.builds import PATCHED, STOCK, Cached, both, compare, run
from support.models import convert, lora


@pytest.fixture(scope="session")
def adapters(tmp_path_factory) -> dict[str, Path]:
    """For SmolLM2; "embedding" is for the tiny Llama: llama.cpp takes none if the embedding is the output as well."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "layer 0": lora(folder / "0.gguf", "blk.0.attn_q.weight", 576, 576),
        "layer 5": lora(folder / "5.gguf", "blk.5.ffn_down.weight", 576, 1536),
        "embedding": lora(folder / "e.gguf", "token_embd.weight", 256, 128),
    }


@pytest.fixture(scope="session", params=["tables", "row cache"])
def kept(request, smollm, tmp_path_factory) -> Path:
    """SmolLM2 with all its weights and F32 tables, or a row cache."""
    if request.param == "row cache":
        return Cached(smollm)
    return convert(smollm, tmp_path_factory.mktemp("kept") / "kept.gguf", type="f32", keep_weights=True).output


PROMPT = "Once upon a time, in a village by the sea,"


def test_adapters_on_kept_weights(adapters, smollm, kept):
    """Adapters are switched at run time; those of layer 0 change the recipes, so the kept weights are used.

    Fails if a table is used despite an adapter, or is no longer used after one.
    """
    sets = [[], [[0, 1.0]], [[1, 0.5]], [[0, 0.5], [1, 1.0]], []]
    job = {"run": "adapted", "tokens": PROMPT, "adapters": [adapters["layer 0"], adapters["layer 5"]], "sets": sets}
    ((stock, ours),) = compare(smollm, kept, job)
    assert all(map(np.array_equal, stock, ours))
    assert [np.array_equal(stock[0], logits) for logits in stock] == [True, False, False, False, True]


def test_tables_are_used_beside_adapters(smollm, tmp_path):
    """What an adapter adds is added to rows, too. Tables of few bits can be told from weights.

    Fails if they are no longer used after an adapter of layer 0, or if it counts for nothing beside them.
    """
    kept = convert(smollm, tmp_path / "kept.gguf", type="q4_0", keep_weights=True).output
    widths = {"q": 576, "k": 192, "v": 192}
    adapters = [lora(tmp_path / f"{name}.gguf", f"blk.0.attn_{name}.weight", width, 576) for name, width in widths.items()]
    job = {"run": "adapted", "tokens": PROMPT, "adapters": adapters, "sets": [[], [[0, 1.0], [1, 1.0], [2, 1.0]], []]}
    ((stock, ours),) = compare(smollm, kept, job)
    assert [np.array_equal(*logits) for logits in zip(stock, ours, strict=True)] == [False, False, False]
    assert np.array_equal(ours[0], ours[2])
    assert np.abs(ours[1] - stock[1]).mean() < 0.5 * np.abs(stock[1] - stock[0]).mean()


@pytest.mark.parametrize("cached", [False, True])
def test_adapter_of_the_embedding(cached, adapters, llama, tmp_path):
    converted = Cached(llama) if cached else convert(llama, tmp_path / "kept.gguf", type="f32", keep_weights=True).output
    job = {"run": "adapted", "tokens": {"count": 20, "seed": 1}, "adapters": [adapters["embedding"]], "sets": [[[0, 1.0]], []]}
    ((stock, ours),) = compare(llama, converted, job)
    assert all(map(np.array_equal, stock, ours))
    assert not np.array_equal(stock[0], stock[1])


def test_adapters_of_other_layers(adapters, smollm, smollm_flp):
    job = {"run": "adapted", "tokens": PROMPT, "adapters": [adapters["layer 5"]], "sets": [[[0, 1.0]], []]}
    ((stock, ours),) = compare(smollm, smollm_flp["f32"], job)
    assert all(map(np.array_equal, stock, ours))
    assert not np.array_equal(stock[0], stock[1])


@pytest.mark.parametrize("name", ["layer 0", "embedding"])
def test_adapter_of_an_elided_weight(name, adapters, smollm_flp, llama_flp):
    """Tables were computed without the adapter, so it cannot be loaded."""
    model = llama_flp if name == "embedding" else smollm_flp["f32"]
    job = {"run": "adapted", "model": model, "tokens": PROMPT, "adapters": [adapters[name]], "sets": []}
    (message,) = run(PATCHED, job)
    assert "--keep-weights" in message
    assert GGUFReader(adapters[name]).tensors[0].name.removesuffix(".lora_a") in message


STEPS = [["decode", [[0], {"count": 9, "seed": 1}]], ["embed", 9, 12, 2], ["decode", [[0], {"count": 5, "seed": 3}]]]


@pytest.mark.parametrize("name", ["smollm", "gemma3-dense", "gemma4-dense", "qwen2vl-dense", "command-r-dense", "mamba-dense"])
def test_embeddings_as_input(name, archs, smollm, kept, tmp_path):
    """Vectors, such as those of images, come between tokens: with the weights there, everything is as without rows."""
    source = smollm if name == "smollm" else archs / f"{name}.gguf"
    if name == "smollm":
        converted = kept
    elif isinstance(kept, Cached):
        converted = Cached(source)
    else:
        converted = convert(source, tmp_path / "x.gguf", type="f32", keep_weights=True).output
    ((stock, ours),) = compare(source, converted, {"run": "session", "steps": STEPS})
    assert all(map(np.array_equal, stock, ours))


@pytest.mark.parametrize("sidecar", [False, True])
@pytest.mark.parametrize("name", ["gemma3-dense", "gemma4-dense", "qwen2vl-dense", "qwen3vl-dense", "qwen35-dense"])
def test_images(name, sidecar, archs, tmp_path):
    """Models that take images by design have what these need, without --keep-weights, and without loading it for tokens."""
    source = archs / f"{name}.gguf"
    result = convert(source, tmp_path / "x.gguf", type="f32", sidecar=sidecar)
    assert bool(result.spares) != sidecar
    model, load = (source, {"sidecar": str(result.output)}) if sidecar else (result.output, {})
    job = {"run": "session", "steps": STEPS}
    (stock,), (ours,) = both(
        lambda side: run(side[0], job | {"model": side[1], "load": side[2]}), (STOCK, source, {}), (PATCHED, model, load)
    )
    assert all(map(np.array_equal, stock, ours))


@pytest.mark.parametrize("kind", ["converted", "sidecar", "row cache"])
def test_draft_from_hidden_states(kind, archs, tmp_path):
    """A draft that is given its target's hidden states computes keys and values from them with weights of layer 0."""
    source = archs / "dflash-dense.gguf"
    result = convert(source, tmp_path / "x.gguf", type="f32", sidecar=kind == "sidecar")
    models = {
        "converted": (result.output, {}),
        "sidecar": (source, {"sidecar": str(result.output)}),
        "row cache": (Cached(source), {}),
    }
    model, load = models[kind]
    width = next(int(tensor.shape[0]) for tensor in GGUFReader(source).tensors if tensor.name == "fc.weight")
    job = {"run": "injection", "count": 6, "width": width}
    ((status, log, ours),) = run(PATCHED, job | {"model": model, "load": load})
    ((_, _, stock),) = run(STOCK, job | {"model": source})
    assert status == 0, log
    assert np.ptp(stock) > 0
    assert np.array_equal(ours, stock)


@pytest.mark.parametrize("sidecar", [False, True])
def test_saving(sidecar, smollm, smollm_flp, tmp_path):
    """llama_model_save_to_file writes a model that has all its weights, and refuses one whose weights are gone."""
    if sidecar:
        tables = convert(smollm, tmp_path / "x.gguf", type="f32", sidecar=True).output
        job = {"run": "saved", "tokens": [1, 2, 3]}
        (stock,), (ours,) = both(
            lambda side: run(side[0], job | {"model": smollm, "load": side[1]}),
            (STOCK, {}),
            (PATCHED, {"sidecar": str(tables)}),
        )
        assert stock == ours
        return
    (message,) = run(PATCHED, {"run": "refused_saving", "model": smollm_flp["f32"], "path": tmp_path / "saved.gguf"})
    assert "was replaced by a table" in message
    assert not (tmp_path / "saved.gguf").exists()


@pytest.mark.parametrize("keep_weights", [True, False])
def test_training(keep_weights, archs, tmp_path):
    """Where layer 0's weights are there, training changes them, and rows computed before are no longer used; where they are
    gone, that is said. Oracle: stock llama.cpp, which trains the source.
    """
    source = archs / "llama-dense.gguf"
    converted = convert(source, tmp_path / "x.gguf", type="f32", keep_weights=keep_weights).output
    job = {"run": "training", "tokens": {"count": 20, "seed": 1}}
    ((stock, ours),) = compare(source, converted, job)
    assert np.array_equal(stock[0], ours[0])
    assert not np.array_equal(stock[0], stock[1])
    assert np.array_equal(stock[1], ours[1]) == keep_weights
    assert ("weights that were replaced by tables are not trained" in ours[2]) == (not keep_weights)


@pytest.mark.parametrize("name", ["llama-dense", "qwen2vl-dense"], ids=["sidecar", "images"])
def test_training_of_spares(name, archs, tmp_path):
    """Weights that only other batches need are mapped from the file; training gives them memory. Oracle: stock llama.cpp.

    Fails if they are written where they are mapped, which ends the process, also those that are trained later, or if a graph
    goes on reading them there.
    """
    source, sidecar = archs / f"{name}.gguf", name == "llama-dense"
    output = convert(source, tmp_path / "x.gguf", type="f32", sidecar=sidecar).output
    job = {"run": "training", "tokens": {"count": 20, "seed": 1}, "stages": ["blk.0.attn_q", ""]}
    ours = job | ({"model": source, "load": {"sidecar": str(output)}} if sidecar else {"model": output})
    (stock,), (found,) = both(lambda side: run(*side), (STOCK, job | {"model": source}), (PATCHED, ours))
    assert np.array_equal(stock[0], found[0])
    assert np.array_equal(stock[1], found[1])
    assert not np.array_equal(stock[0], stock[1])


def test_quantize_leaves_tables_alone(smollm, smollm_flp, tmp_path):
    """llama-quantize copies tables: they were quantized on purpose, or kept exact. Everything else is quantized."""
    small = tmp_path / "q8_0.gguf"
    subprocess.run(
        [PATCHED / "llama-quantize", "--allow-requantize", "--pure", smollm_flp["f32"], small, "q8_0"],
        check=True,
        capture_output=True,
    )
    before, after = ({t.name: t for t in GGUFReader(path).tensors} for path in (smollm_flp["f32"], small))
    assert before.keys() == after.keys()
    table = "firstlayer.0.table"
    assert after[table].tensor_type == before[table].tensor_type
    assert np.array_equal(after[table].data, before[table].data)
    assert after["blk.1.attn_q.weight"].tensor_type != before["blk.1.attn_q.weight"].tensor_type

    # the same as quantizing the source, except for the first layer, which stays that of the source
    plain = tmp_path / "plain.gguf"
    subprocess.run(
        [PATCHED / "llama-quantize", "--allow-requantize", "--pure", smollm, plain, "q8_0"], check=True, capture_output=True
    )
    reference = {t.name: t for t in GGUFReader(plain).tensors}
    assert all(np.array_equal(tensor.data, reference[name].data) for name, tensor in after.items() if name != table)
    (logits,) = run(PATCHED, {"run": "logits", "model": small, "tokens": PROMPT, "batches": [8]})
    assert np.isfinite(logits[8]).all()
