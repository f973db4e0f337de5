"""Demand: what nobody reads is not computed, and what is read equals the stock library's."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import architectures
import numpy as np
import pytest
from architectures import RANDOM, only_embeds
from gguf import GGUFReader
from support.builds import PATCHED, STOCK, CachedAndDemanded, Demanded, both, run, same, session
from support.command_line import cli, refusal, run_tool, tool
from support.models import convert, lora, rewrite

from gguf_firstlayer import FirstLayerError, UsageError, bench, plan, verify
from gguf_firstlayer.decoder import Decoder
from gguf_firstlayer.demand import N_TOKENS
from gguf_firstlayer.text import to_json

NAMES = sorted(architectures.read())

# llama.cpp aborts if it is asked for no output of theirs, or for their embeddings, or gives NaN
ALWAYS_OUTPUT, NO_EMBEDDINGS = {"chameleon-dense"}, {"deepseek4-moe", "qwen4exp-moe", "t5-dense"}
# decoders whose graphs select no rows, or none that products are computed for
ALL_ROWS = {"cogvlm-dense", "dflash-dense", "dream-dense", "llada-dense", "llada-moe-moe", "rnd1-moe", "wavtokenizer-dec-dense"}
ALL_ROWS |= {"rwkv6-dense", "rwkv7-dense"}

NONE, MEAN, CLS, LAST, RANK = range(5)

N_PROMPTS = 4


def text(count: int, seed: int) -> dict[str, int]:
    return {"count": count, "seed": seed}


def decode(*parts: list) -> list:
    return ["decode", *parts]


def with_one_output(alone: bool) -> list:
    """Prompts with an output for their last token, which is in a batch of its own if `alone`."""
    steps = []
    for seed in range(N_PROMPTS):
        prompt = np.random.default_rng(seed).integers(0, 128, 40).tolist()
        if alone:
            steps += [decode([[0], prompt[:-1], 1]), decode([[0], prompt[-1:], 1])]
        else:
            steps.append(decode([[0], prompt, 1]))
        steps.append(["rm", 0, -1, -1])
    return steps


def rms(a: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(a, dtype=np.float64))))


def close(ours: np.ndarray, stock: np.ndarray, other: np.ndarray) -> bool:
    """Whether each row of ours differs from stock's by no more than stock's between batch sizes, or by F32 rounding."""
    own = max(architectures.distance(a[None], b[None]) for a, b in zip(other, stock, strict=True))
    return all(
        architectures.distance(a[None], b[None]) <= max(2 * own, 1e-6 * rms(stock)) for a, b in zip(ours, stock, strict=True)
    )


@pytest.mark.parametrize("name", [name for name in NAMES if name not in RANDOM and not only_embeds(name)])
def test_prompts(name, archs):
    """With outputs for some tokens, one, or none: logits as stock's, and for several tokens bit for bit, and so is all memory.

    Fails if a row is another token's, if a row that others need is left out, or if an architecture that selects rows is not
    narrowed.
    """
    nothing = 2 if name in ALWAYS_OUTPUT else 0
    begin = [["encode", text(20, 9)]] if name == "t5-dense" else []
    several = [decode([[0], text(30, 12), nothing]), decode([[0], text(40, 13), 9]), decode([[0], text(40, 14), 20])]
    job = {"run": "session", "model": archs / f"{name}.gguf", "context": {"flash_attn_type": 0, "kv_unified": True}}
    ones = job | {"steps": [*begin, *with_one_output(alone=False), *several, ["state"], ["log"]]}
    (stock, alone), (ours,) = both(
        lambda side: run(*side),
        (STOCK, ones, job | {"steps": [*begin, *with_one_output(alone=True)]}),
        (PATCHED, ones | {"load": {"demand": "rows"}}),
    )
    *_, state, log = ours
    assert np.array_equal(stock[-2], state)
    for expected, found in zip(stock[N_PROMPTS:-2], ours[N_PROMPTS:-2], strict=True):
        assert np.array_equal(expected, found)
    assert close(np.concatenate(ours[:N_PROMPTS]), np.concatenate(stock[:N_PROMPTS]), np.concatenate(alone[1::2]))
    assert ("nobody reads" in log[0]) == (name not in ALL_ROWS)


@pytest.mark.parametrize("name", sorted(set(NAMES) - RANDOM - NO_EMBEDDINGS))
def test_embeddings(name, archs):
    """With every kind of pooling, and without logits.

    Fails if pooling takes a row that was not computed, or if logits are computed after all.
    """
    parts = [[[i], text(count, i)] for i, count in enumerate((40, 30, 25))]
    job = {"run": "session", "model": archs / f"{name}.gguf"}
    context = {"flash_attn_type": 0, "kv_unified": True, "n_seq_max": 4, "embeddings": True}
    jobs = [
        job | {"steps": steps, "context": context | {"pooling_type": pooling}}
        for pooling in (NONE, MEAN, CLS, LAST, RANK)
        for steps in ([decode(*parts), ["logits"], ["log"]], [decode(part) for part in parts])
    ]
    stock, ours = both(
        lambda side: run(*side), (STOCK, *jobs), (PATCHED, *(job | {"load": {"demand": "embeddings"}} for job in jobs[::2]))
    )
    for pooling, (found, has_logits, log) in enumerate(ours):
        (expected, had_logits, _), alone = stock[2 * pooling : 2 * pooling + 2]
        if pooling in (NONE, MEAN):
            assert np.array_equal(expected, found)
        else:
            assert close(found, expected, np.concatenate(alone))
        assert not has_logits.any()
        # without logits there is no buffer for them either, so this shows more
        if name in ("llama-dense", "falcon-dense", "gemma2-dense"):
            assert had_logits.all()
            assert "nodes are left out" in log[0]
            assert ("nodes compute 3 of 95 rows" in log[0]) == (pooling not in (NONE, MEAN))


#
# together with other features
#

PROMPT = [decode([[0], text(40, 1), 9]), decode([[0], text(30, 2), 0]), decode([[0], text(40, 3), 20]), ["state"]]


@pytest.mark.parametrize(
    "name", ["llama-dense", "falcon-dense", "gemma3-dense", "gemma4-dense", "deepseek2-moe", "mamba-dense"]
)
def test_with_rows(name, archs, tmp_path):
    """Beside tables, and beside a row cache. Fails if what one of them rewrites is not recognized by the other."""
    source, context = archs / f"{name}.gguf", {"flash_attn_type": 0, "kv_unified": True}
    converted = convert(source, tmp_path / "flp.gguf", type="f32").output
    stock = session(source, STOCK, PROMPT, context=context)
    for model in (Demanded(converted), CachedAndDemanded(source)):
        assert same(stock, session(model, PATCHED, PROMPT, context=context))


def test_with_rows_of_the_only_layer(archs, tmp_path):
    """Layer 0 is the last one, so tables and selections meet in it."""
    source = rewrite(
        archs / "llama-dense.gguf",
        tmp_path / "one.gguf",
        change_key=lambda name, value: 1 if name.endswith("block_count") else value,
        drop={tensor.name for tensor in GGUFReader(archs / "llama-dense.gguf").tensors if tensor.name.startswith("blk.1.")},
    )
    converted = convert(source, tmp_path / "flp.gguf", type="f32").output
    context = {"flash_attn_type": 0, "kv_unified": True}
    stock = session(source, STOCK, PROMPT, context=context)
    for model in (Demanded(source), Demanded(converted), CachedAndDemanded(source)):
        assert same(stock, session(model, PATCHED, PROMPT, context=context))


def test_adapters_of_the_last_layer(smollm, tmp_path):
    """Their products are narrowed like the weight's. Fails if an adapter's part has other rows than the weight's."""
    adapters = [
        lora(tmp_path / "q.gguf", "blk.29.attn_q.weight", 576, 576),
        lora(tmp_path / "o.gguf", "blk.29.attn_output.weight", 576, 576),
    ]
    job = {"run": "adapted", "model": smollm, "tokens": "Once upon a time, in a village by the sea,", "outputs": 4}
    job |= {"adapters": adapters, "sets": [[], [[0, 1.0]], [[0, 0.5], [1, 1.0]]], "context": {"flash_attn_type": 0}}
    (stock,), (ours,) = run(STOCK, job), run(PATCHED, job | {"load": {"demand": "rows"}})
    assert same(stock, ours)
    assert not np.array_equal(stock[0], stock[1])
    assert not np.array_equal(stock[1], stock[2])


@pytest.mark.skipif(sys.platform != "linux", reason="names of C++ functions differ")
@pytest.mark.parametrize("name", ["llama-dense", "qwen35-dense"])
def test_hidden_states_for_drafts(name, archs):
    """They are there for all tokens, although only one is output. Fails if an output that somebody asked for is dropped."""
    steps = [["hidden"], decode([[0], text(40, 1), 1]), decode([[0], text(40, 2), 9])]
    context = {"flash_attn_type": 0, "kv_unified": True}
    stock = session(archs / f"{name}.gguf", STOCK, steps, context=context)
    ours = session(archs / f"{name}.gguf", PATCHED, steps, context=context, load={"demand": "rows"})
    assert same(stock[1:], ours[1:])
    assert stock[1].shape[0] == 40


@pytest.mark.parametrize("name", ["llama-dense", "gemma4-dense", "qwen35-dense"])
def test_contexts_that_change(name, archs):
    """A context is asked for embeddings and for logits in turn, as by llama-server, so that its graphs differ from each other.

    Fails if one is computed in memory that was planned for another.
    """
    part, steps = [[0], text(40, 1), 9], []
    for flag in (True, False, True, False):
        steps += [["embeddings", flag], decode(part), ["rm", 0, -1, -1], decode([[0], text(20, 2), 20]), ["rm", 0, -1, -1]]
    context = {"flash_attn_type": 0, "kv_unified": True, "embeddings": True, "pooling_type": LAST}
    stock = session(archs / f"{name}.gguf", STOCK, steps, context=context)
    for demand in ("rows", "embeddings"):
        ours = session(archs / f"{name}.gguf", PATCHED, steps, context=context, load={"demand": demand})
        for i, (expected, found) in enumerate(zip(stock, ours, strict=True)):
            assert np.allclose(expected, found, rtol=1e-4, atol=1e-5), i


def test_callbacks_see_everything(llama):
    """What llama-imatrix, llama-eval-callback and others observe is what the stock library computes."""
    job = {"run": "graph", "model": llama, "tokens": text(20, 1), "outputs": 1}
    (stock,), (ours,) = run(STOCK, job), run(PATCHED, job | {"load": {"demand": "embeddings"}})
    assert stock == ours


def test_logits_are_there_with_rows(llama):
    """Only "embeddings" leaves out logits, and only where a context gives embeddings."""
    for demand, embeddings, expected in (("rows", True, True), ("embeddings", False, True), ("embeddings", True, False)):
        context = {"embeddings": embeddings, "pooling_type": LAST if embeddings else NONE}
        steps = [decode([[0], text(20, 1)]), ["logits"]]
        *_, found = session(llama, PATCHED, steps, context=context, load={"demand": demand})
        assert bool(found[0]) == expected


#
# what users see
#


def test_options(smollm):
    """--demand and its variable, whose effect is told once, with the first batch that has any. What is wrong is an error."""
    options = ["-m", smollm, "-t", 1, "-no-cnv", "-c", 64, "-n", 4, "-p", "one two three four", "-lv", 4]
    line = re.compile(r"not computed, since nobody reads it: (\d+) of (\d+) nodes compute 1 of \d+ rows")
    narrowed = [tool("llama-completion", *options, "--demand", what, log=True) for what in ("rows", "embeddings")]
    assert all(len(line.findall(log)) == 1 for log in narrowed), narrowed
    assert not line.search(tool("llama-completion", *options, "--demand", "none", log=True))
    assert not line.search(tool("llama-completion", *options, log=True))
    assert line.search(run_tool("llama-completion", *options, env=os.environ | {"LLAMA_ARG_DEMAND": "rows"}).stderr)
    done = run_tool("llama-completion", *options, "--demand", "everything")
    assert done.returncode == 1
    assert 'override \'firstlayer.demand\' must be "none", "rows" or "embeddings"' in done.stderr


def test_small_savings_are_left_alone(smollm):
    """A rewrite takes time. Fails if short prompts get slower by it."""
    options = ["-m", smollm, "-t", 1, "-no-cnv", "-c", 64, "-n", 1, "-p", "one two three", "--demand", "rows"]
    environment = {key: value for key, value in os.environ.items() if key != "LLAMA_FIRSTLAYER_DEMAND_ALWAYS"}
    assert "nobody reads" not in run_tool("llama-completion", *options, env=environment).stderr
    options[options.index("one two three")] = " ".join(["one two three"] * 15)
    assert "nobody reads" in run_tool("llama-completion", *options, env=environment).stderr


def products(path: Path, job: dict) -> int:
    """Multiply-adds that the stock library runs for a batch of N_TOKENS tokens, attention included."""
    context = {"n_ctx": N_TOKENS, "n_batch": N_TOKENS, "n_ubatch": N_TOKENS}
    job = {"run": "graph", "model": path, "tokens": text(N_TOKENS, 1), "flash_attn": 0} | job
    (nodes,) = run(STOCK, job | {"context": context | job.get("context", {})})
    return sum(
        int(np.prod(result)) * weight[0] for op, _, _, _, (result, weight, *_) in nodes if op in ("MUL_MAT", "MUL_MAT_ID")
    )


def test_plan(llama):
    """Ratios of multiply-adds: what the stock library runs, and, by the formula, the same without what is not read."""
    shapes = {tensor.name: tensor.shape.tolist() for tensor in GGUFReader(llama).tensors}
    last = max(int(name.split(".")[1]) for name in shapes if name.startswith("blk."))
    size = {name: width * height for name, (width, height) in ((n, s) for n, s in shapes.items() if len(s) == 2)}
    block = f"blk.{last}."
    queries = size[block + "attn_q.weight"] + size[block + "attn_output.weight"]
    queries += 2 * N_TOKENS * shapes[block + "attn_q.weight"][1]  # with keys, and with values
    others = sum(size[block + f"ffn_{name}.weight"] for name in ("gate", "up", "down"))

    demand = plan(llama).demand
    whole = products(llama, {"outputs": 1})
    assert demand.prompt == pytest.approx(whole / (whole - (N_TOKENS - 1) * queries), rel=1e-12)

    assert demand.pooling == "last"
    whole = products(llama, {"context": {"embeddings": True, "pooling_type": LAST}})
    read = whole - (N_TOKENS - 1) * (queries + others) - N_TOKENS * size["output.weight"]
    assert demand.embedding == pytest.approx(whole / read, rel=1e-12)


@pytest.mark.parametrize(("name", "pooling"), [("llama", None), ("minilm", "cls")])
def test_verify_embeddings(name, pooling, request):
    vectors = verify(request.getfixturevalue(name), demand="embeddings", pooling=pooling, tokens=100)
    assert [json.loads(to_json(vectors))[key] for key in ("top1", "perplexity", "rows_same", "kld_bound")] == [None] * 4
    assert vectors.problems == []
    assert vectors.scored == 64
    assert 0.999 < vectors.cosine_min <= vectors.cosine <= 1.0000001


def test_verify_prompts(archs):
    prompts = verify(archs / "gemma3-dense.gguf", demand="rows", tokens=100)
    assert prompts.problems == []
    assert prompts.scored == 64
    assert prompts.greedy == (None,) * 4


def test_bench(smollm, short_blocks):
    prompt = bench(smollm, demand="rows", batches=[512], loads=2, seconds=0, resources=False)
    assert prompt.cells[0].bound == pytest.approx(plan(smollm).demand.prompt)
    embedded = bench(smollm, cache=16, demand="embeddings", loads=2, seconds=0)
    assert [cell.batch for cell in embedded.cells] == [64, 512]
    assert embedded.cells[1].bound > plan(smollm).demand.embedding > 1.2
    if embedded.resources and "SANITIZER" not in os.environ:  # logits of 512 tokens; a sanitizer's own memory differs
        assert embedded.resources_source.peak - embedded.resources.peak > 20 << 20


def test_bench_without_logits(archs, minilm, short_blocks):
    """With a row cache. Fails if such a model is tried as one that has logits."""
    options = {"demand": "embeddings", "batches": [16], "loads": 2, "seconds": 0, "resources": False}
    assert bench(archs / "gemma-embedding-dense.gguf", cache=1, **options).cache.misses > 0
    with pytest.raises(FirstLayerError, match="has no row cache of this size"):
        bench(minilm, cache="auto", **options)


def test_other_models(llama_flp, minilm, archs):
    """Those that there is nothing to measure of are refused, in a sentence that says what to do."""
    for verb, *options in (("bench", "--batch", 32), ("verify",)):
        assert "is converted; give the original model first" in refusal(cli(verb, llama_flp, "--demand", "rows"))
        both = cli(verb, archs / "t5-dense.gguf", "--demand", "embeddings", *options)
        assert "llama.cpp encodes and decodes with" in refusal(both) or "cannot run on its own" in refusal(both)
    assert "gives no logits; use --demand embeddings" in refusal(cli("verify", minilm, "--demand", "rows"))
    assert "llama.cpp encodes and decodes with" in refusal(cli("verify", archs / "t5-dense.gguf", "--demand", "rows"))
    for option in (["--all"], ["--max-kld", 1]):
        assert "are for converted files" in refusal(cli("verify", minilm, "--demand", "embeddings", *option))
    assert "nothing was left out" in refusal(cli("verify", minilm, "--demand", "embeddings"))  # its pooling is the mean
    assert plan(archs / "t5-dense.gguf").demand.embedding is None


def test_verify_finds_what_is_wrong(llama, monkeypatch):
    """Fails if `verify` calls other output the same; or one wrong prompt chance, as it makes the error of the mean wide."""
    last, wrong = Decoder.last, set()

    def replaced(run, tokens):
        out = last(run, tokens)
        return 100 * np.roll(out, 1) if run.left_out and len(tokens) in wrong else out

    monkeypatch.setattr(Decoder, "last", replaced)
    for demand, lengths in (("rows", range(512)), ("rows", [20]), ("embeddings", range(512))):
        wrong.clear()
        wrong.update(lengths)
        (problem,) = verify(llama, demand=demand, tokens=100).problems[:1]
        assert "please report this" in problem


def test_arguments(llama):
    assert "not a kind of demand; give rows or embeddings" in refusal(cli("bench", llama, "--demand", "all"))
    assert "is not a type of pooling; give one of" in refusal(cli("bench", llama, "--demand", "embeddings", "--pooling", "x"))
    assert "--pooling needs --demand embeddings" in refusal(cli("bench", llama, "--demand", "rows", "--pooling", "cls"))
    assert "no --context before it" in refusal(cli("bench", llama, "--demand", "embeddings", "--context", 64))
    assert "or --demand" in refusal(cli("verify", llama, "--demand", "rows", "--cache"))
    assert "not both" in refusal(cli("bench", llama, llama, "--cache"))
    with pytest.raises(UsageError, match=r"either a converted file, or cache=\.\.\., or demand=\.\.\."):
        verify(llama)
