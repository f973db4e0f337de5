"""Converted models against the stock library, through llama-cpp-python's own bindings."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest
from support.builds import PATCHED, ROOT, STOCK, compare, run, session
from support.figures import divergence
from support.models import convert

from gguf_firstlayer import inspect

# architecture -> least number of sites, and weights of layer 0 that must be gone from file and graph
ARCHITECTURES = {
    "llama-dense": (3, ["attn_q", "attn_k", "attn_v", "attn_norm"]),
    "gptneox-dense": (1, ["attn_qkv", "attn_norm"]),
    "falcon-dense": (2, ["attn_qkv", "ffn_up", "ffn_down", "attn_norm"]),
    "phi2-dense": (4, ["attn_q", "attn_k", "attn_v", "ffn_up", "ffn_down"]),
    "command-r-dense": (4, ["attn_q", "attn_k", "attn_v", "ffn_up", "ffn_gate", "ffn_down"]),
    "gemma3-dense": (3, ["attn_q", "attn_k", "attn_v", "attn_q_norm", "attn_k_norm"]),
    "qwen3-dense": (3, ["attn_q", "attn_k", "attn_v", "attn_q_norm", "attn_k_norm"]),
    "deepseek2-moe": (3, ["attn_kv_a_mqa", "attn_kv_a_norm", "attn_k_b"]),
    "mamba-dense": (1, ["ssm_in"]),
    "arctic-moe": (4, ["attn_q", "attn_k", "attn_v", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"]),
    "qwen35-dense": (4, ["attn_qkv", "attn_gate", "ssm_alpha", "ssm_beta"]),
    "bloom-dense": (1, ["attn_qkv"]),
}

TEXT = (ROOT / "tests" / "text.txt").read_text()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_are_gone(name, archs, tmp_path):
    """Eliminated weights are gone from file and graph; those that images need are gone from the graph."""
    n_sites, gone = ARCHITECTURES[name]
    result = convert(archs / f"{name}.gguf", tmp_path / "flp.gguf", type="f32")
    assert len(result.sites) >= n_sites

    elided = {weight.name for weight in result.elided} | set(result.spares)
    assert bool(result.spares) == (name in ("gemma3-dense", "qwen35-dense"))
    assert {f"blk.0.{weight}.weight" for weight in gone} <= elided
    (nodes,) = run(PATCHED, {"run": "graph", "model": result.output, "tokens": {"count": 3, "seed": 2}})
    read = {operand for _, _, operands, *_ in nodes for operand in operands}
    assert not read & elided
    assert "firstlayer.0.table" in read


@pytest.mark.parametrize("threads", [1, 2])
def test_large_gathers(threads, smollm, smollm_flp):
    """From 4 MiB on, all threads look rows up. Fails if one of them takes the wrong rows, or none."""
    context = {"n_ctx": 2048, "n_batch": 2048, "n_ubatch": 2048, "n_threads_batch": threads}
    steps = [["decode", [[0], {"count": 1501, "seed": 1}, 16]]]
    stock, ours = (
        session(model, build, steps, context=context) for model, build in ((smollm, STOCK), (smollm_flp["f32"], PATCHED))
    )
    assert np.array_equal(stock[0], ours[0])


def test_warmup_of_elided_experts(archs, tmp_path):
    """llama.cpp warms up with all experts at once; those of arctic's first layer are gone."""
    result = convert(archs / "arctic-moe.gguf", tmp_path / "flp.gguf", type="f32")
    job = {"run": "logits", "tokens": {"count": 20, "seed": 1}, "batches": [20]}
    ((stock, ours),) = compare(result.source, result.output, job | {"warmup": True})
    assert np.array_equal(stock[20], ours[20])


def test_falcon_has_two_terms_but_command_r_one(archs):
    """The FFN of a parallel block is one site, including the skip if the graph adds them before the attention."""
    recipes = {name: [s.recipe for s in inspect(archs / f"{name}.gguf").sites] for name in ("falcon-dense", "command-r-dense")}
    assert any(recipe.startswith("mul_mat(blk.0.ffn_down.weight") for recipe in recipes["falcon-dense"])
    assert any(recipe.startswith("add(") and "ffn_down" in recipe for recipe in recipes["command-r-dense"])


@pytest.mark.parametrize("batch", [1, 32, 512])
def test_smollm_f32_is_exact(batch, smollm, smollm_flp):
    """Q4_1 has one kernel for all batch sizes, so every logit of a real model must be the same bit for bit."""
    job = {"run": "logits", "tokens": TEXT, "batches": [batch]}
    ((stock, ours),) = compare(smollm, smollm_flp["f32"], job)
    assert len(stock[batch]) > 400
    assert np.array_equal(stock[batch], ours[batch])


def test_repacked_weights_are_exact(smollm, tmp_path):
    """llama.cpp repacks Q4_0 for kernels of its own; rows must come from the same kernels."""
    source = tmp_path / "q4_0.gguf"
    subprocess.run([PATCHED / "llama-quantize", "--allow-requantize", smollm, source, "q4_0"], check=True, capture_output=True)
    converted = convert(source, tmp_path / "flp.gguf", type="f32").output
    job = {"run": "logits", "tokens": TEXT[:600], "batches": [1, 32, 512]}
    ((stock, ours),) = compare(source, converted, job)
    assert all(np.array_equal(stock[size], ours[size]) for size in job["batches"])


def test_smollm_graph(smollm, smollm_flp):
    job = {"run": "graph", "tokens": [1, 2, 3]}
    ((stock, ours),) = compare(smollm, smollm_flp["f32"], job)
    products = [[operands[0] for op, _, operands, *_ in nodes if op == "MUL_MAT"] for nodes in (stock, ours)]
    projections = {f"blk.0.attn_{which}.weight" for which in "qkv"}
    assert set(products[0]) - set(products[1]) == projections
    assert len(products[0]) - len(products[1]) == 3
    assert len(ours) < len(stock)
    lookups = [operands[0] for op, _, operands, *_ in ours if op == "GET_ROWS"]
    assert lookups.count("firstlayer.0.table") == 1  # one lookup for Q, K and V


def test_smollm_q8_0_is_close(smollm, smollm_flp, measured):
    """The model rounds its activations to 8 bits, so any change of a last bit, such as by another batch size, changes its
    output. Tables of q8_0 must not change it more than another batch size does in the stock library.
    """
    prompts = ["The capital of France is", "def fibonacci(n):", "Once upon a time, in a village by the sea,"]
    jobs = [
        {"run": "logits", "tokens": TEXT, "batches": [1, 32, 512]},
        {"run": "greedy", "prompts": prompts, "n_predict": 256},
    ]
    (stock, ours), (stock_text, our_text) = compare(smollm, smollm_flp["q8_0"], *jobs)

    divergences = {
        "stock, batches of 1 against 512": divergence(stock[512], stock[1]),
        "stock, batches of 32 against 512": divergence(stock[512], stock[32]),
        "q8_0 tables, batches of 512": divergence(stock[512], ours[512]),
        "q8_0 tables, batches of 1": divergence(stock[1], ours[1]),
    }
    for name, (mean, peak, agreement) in divergences.items():
        measured(f"SmolLM2, {name}: KL divergence mean {mean:.2e}, max {peak:.2e} nats; top-1 agreement {agreement:.1%}")
    same = []
    for a, b in zip(stock_text, our_text, strict=True):
        same.append(next((i for i, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1]), 256))
    measured(f"SmolLM2, q8_0 tables: of 256 tokens of greedy text, the first {same} are the stock library's")

    means = [mean for mean, _, _ in divergences.values()]
    assert max(means[2:]) < 1.25 * max(means[:2])


def test_smollm_f32_text_is_the_same(smollm, smollm_flp):
    job = {"run": "greedy", "prompts": ["The capital of France is", "def fibonacci(n):"], "n_predict": 256}
    ((stock, ours),) = compare(smollm, smollm_flp["f32"], job)
    assert stock == ours


def test_plain_model_is_untouched(smollm):
    """Without firstlayer keys, the patched library computes the same graph as the stock one."""
    jobs = [
        {"run": "graph", "tokens": [1, 2, 3]},
        {"run": "logits", "tokens": [1, 2, 3], "batches": [1]},
    ]
    (stock_graph, our_graph), (stock, ours) = compare(smollm, smollm, *jobs)
    assert stock_graph == our_graph
    assert np.array_equal(stock[1], ours[1])
