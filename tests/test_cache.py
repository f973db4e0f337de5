"""The row cache: rows of the first layer that are computed when their token is first seen, on any model as it is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import architectures
import numpy as np
import pytest
from architectures import RANDOM
from support.builds import EXACT_FROM, PATCHED, ROOT, STOCK, Cached, both, preloaded, run, same, session
from support.command_line import run_tool, tool
from support.counting import COUNTED, can_count, instructions
from support.models import convert, quantized
from support.servers import prompt, server

from gguf_firstlayer import FirstLayerError, bench, plan, verify
from gguf_firstlayer.file_format import TYPES

TEXT = (ROOT / "tests" / "text.txt").read_text()

DOCUMENTED = architectures.read()
# whose ids are not the batch's tokens
OTHER_IDS = {"graniteswitch-dense"}

TOKENS = {"count": 100, "seed": 1}
SMALL = 40


@pytest.mark.parametrize("name", sorted(set(DOCUMENTED) - RANDOM))
def test_architecture(name, archs):
    """Outputs equal the stock library's under the exactness rule, with a cache that holds all rows and one that evicts.

    Fails if a row belongs to another token, is overwritten while it is needed, or its values are in another order; or if
    an architecture that has sites is not cached.
    """
    job = {"run": "outputs", "model": archs / f"{name}.gguf", "tokens": TOKENS, "batches": [1, 7, 64, "parallel"]}
    jobs = [job | {"load": load} for load in ({"cache": 64}, {"cache_rows": SMALL})]
    (stock,), (large, small) = both(lambda side: run(*side), (STOCK, job), (PATCHED, *jobs))
    for cached in (large, small):
        own = max(architectures.distance(stock[1], stock[size]) for size in job["batches"] if stock[size] is not None)
        for size in (1, 7, 64):
            if size >= EXACT_FROM:
                assert np.array_equal(stock[size], cached[size])
            assert architectures.distance(stock[size], cached[size]) <= 1.5 * own
        if stock["parallel"] is not None:
            assert np.array_equal(stock["parallel"], cached["parallel"])
    # rows do not depend on when they were computed, nor on what was evicted before
    for size in job["batches"]:
        assert stock[size] is None or np.array_equal(large[size], small[size])

    has_sites = "| none:" not in DOCUMENTED[name] and name not in OTHER_IDS
    assert (large["cache"] is not None) == has_sites
    if has_sites:
        assert large["cache"]["n_misses"] == large["cache"]["n_rows"] > SMALL
        assert small["cache"]["n_rows"] == SMALL
        assert small["cache"]["n_misses"] > large["cache"]["n_misses"]
        assert min(large["cache"]["n_hits"], small["cache"]["n_hits"]) > 0
        # with as many nodes, llama.cpp's allocator would take a batch that does not fit for one that reads the cache
        assert all(usual != cached for usual, cached in zip(stock["nodes"], large["nodes"], strict=True))


@pytest.mark.parametrize("kind", TYPES)
def test_when_rows_are_computed(kind, llama, tmp_path):
    """A prompt has the same logits whatever came before it: rows that were computed alone equal those of a batch.

    Fails if rows of single tokens come from kernels for single tokens that round differently.
    """
    model = Cached(quantized(llama, tmp_path / "model.gguf", TYPES[kind]))
    text = {"count": 50, "seed": 3}
    alone = [["decode", [[0], [token]]] for token in range(0, 128, 3)]
    first = session(model, PATCHED, [["decode", [[0], text]]])
    later = session(model, PATCHED, [*alone, ["rm", 0, -1, -1], ["decode", [[0], text]]])
    assert same(first, later[-1:])


def test_contexts_on_threads(smollm):
    """Contexts share the rows of a model, whoever computed them, and are freed in any order. Fails if one overwrites, or
    reads before they are complete, rows of another.
    """
    texts = [TEXT[i * 100 : i * 100 + 400] for i in range(4)]
    job = {"run": "contexts", "model": smollm, "texts": texts, "times": 3}
    ((expected, _),) = run(STOCK, job)
    for load in ({"cache": 16}, {"cache_rows": 70}):
        ((found, data),) = run(PATCHED, job | {"load": load})
        assert all(map(same, expected, found))
        assert data["n_hits"] > data["n_misses"] > 0
        assert data["n_rows"] <= data["n_rows_max"]


def test_a_batch_that_does_not_fit(smollm):
    """It is computed as usual, evicts nothing, and the batches after it are cached again."""
    few, many = {"count": 20, "seed": 1}, {"count": 100, "seed": 2}
    steps = [["decode", [[0], few]], ["cache"], ["decode", [[0], many]], ["cache"], ["decode", [[0], few]], ["cache"]]
    cached = session(smollm, PATCHED, steps, load={"cache_rows": 30})
    assert [list(counts) for counts in cached[1::2]] == [[0, 20], [0, 20], [20, 20]]
    decodes = [step for step in steps if step[0] == "decode"]
    assert same(cached[::2], session(smollm, STOCK, decodes))


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc to overwrite what is freed")
def test_pools_of_threads(smollm, monkeypatch):
    """Rows are computed before llama.cpp sets the pool for a batch.

    Fails if they are on the last one, which has too few threads after a control vector made llama.cpp reserve, or is gone.
    """
    # what is preloaded makes it a new process, as glibc reads the variable only once
    for name, value in {**preloaded("failing"), "MALLOC_PERTURB_": "90"}.items():
        monkeypatch.setenv(name, value)
    tokens = [["decode", [[0], [token]]] for token in range(40, 44)]
    start = ["decode", [[0], TEXT[:200]]]
    steps = [start, ["threads", 1, 4], tokens[0], ["control", 1], tokens[1], ["threads"], tokens[2], tokens[3]]
    context = {"n_threads": 1, "n_threads_batch": 4}
    stock, ours = (
        session(model, build, steps, context=context) for model, build in [(smollm, STOCK), (Cached(smollm), PATCHED)]
    )
    assert same(stock, ours)


def test_a_context_without_weights(smollm):
    """It can be attached to pools of threads, and has no backend for them. Fails if that is asked for its device."""
    steps = [["threads", 1, 1], ["threads"], ["resident"]]
    assert len(session(smollm, PATCHED, steps, load={"vocab_only": True})) == 1


def test_tokens_are_counted_once(smollm):
    """Fails if those of a batch count again when its graph turns out to be built anew, as the KV cache has grown."""
    texts = [["decode", [[0], {"count": 256, "seed": seed}]] for seed in (1, 2)]
    *_, counts = session(smollm, PATCHED, [*texts, ["cache"]], load={"cache": 16})
    assert sum(counts) == 512


def test_a_prompt_leaves_its_rows(smollm):
    """Fails if the rows of a graph that will not run again, one without outputs, cannot be replaced."""
    prompt = ["decode", [[0], {"count": 50, "seed": 1}, 0]]
    tokens = [["decode", [[0], [token]]] for token in range(100, 160)]
    *_, before, after = (
        found
        for found in session(smollm, PATCHED, [prompt, *tokens, ["cache"], *tokens, ["cache"]], load={"cache_rows": 100})
        if found.shape == (2,)
    )
    assert list(after - before) == [60, 0]


@pytest.mark.skipif(sys.platform != "linux", reason="preloads a library")
def test_no_memory_for_rows(smollm, monkeypatch):
    """A batch whose rows cannot be computed is computed as usual, and its tokens are not taken for cached ones.

    Fails also if the exception gets out of llama_decode.
    """
    few, many = ["decode", [[0], {"count": 3, "seed": 1}]], ["decode", [[0], {"count": 100, "seed": 2}]]
    stock = session(smollm, STOCK, [few, many, many])
    for name, value in preloaded("failing").items():
        monkeypatch.setenv(name, value)
    steps = [few, ["fail"], many, ["log"], many, ["cache"]]
    job = {"run": "session", "model": smollm, "steps": steps, "load": {"cache": 16}}
    ((*first, log, last, counts),) = run(PATCHED, job)
    assert "rows of a batch cannot be cached" in str(log)
    assert same(stock, [*first, last])
    assert counts[1] > 90


def test_graphs_are_reused(smollm):
    """Fails if a cache makes llama.cpp build a graph for every token."""
    options = ["-t", 1, "-no-cnv", "-c", 256, "-n", 40, "-p", "Once upon a time", "--temp", 0]
    logs = both(lambda model: tool("llama-completion", "-m", model, *options, log=True), smollm, Cached(smollm))
    reused = [int(re.search(r"graphs reused = +(\d+)", log)[1]) for log in logs]
    assert reused[0] == reused[1] > 30


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux")
def test_memory_is_touched_when_used(smollm):
    steps = [["decode", [[0], [1, 2, 3]]], ["resident"]]
    small, large = (session(smollm, PATCHED, steps, load={"cache": size})[1][0] for size in (1, 180))
    assert abs(large - small) < 20 << 20


def test_tables_are_not_cached(smollm_flp, smollm, tmp_path):
    """A converted model, and one with a sidecar, take their rows from tables."""
    tables = convert(smollm, tmp_path / "x.gguf", type="q8_0", sidecar=True).output
    job = {"run": "outputs", "tokens": TOKENS, "batches": [64]}
    converted, beside = run(
        PATCHED,
        job | {"model": smollm_flp["q8_0"], "load": {"cache": 16}},
        job | {"model": smollm, "load": {"cache": 16, "sidecar": str(tables)}},
    )
    assert converted["cache"] is None
    assert beside["cache"] is None
    assert np.array_equal(converted[64], beside[64])


def test_saving(llama):
    """llama_model_save_to_file writes what it would without a cache."""
    job = {"run": "saved", "model": llama, "tokens": TOKENS}
    assert run(STOCK, job) == run(PATCHED, job | {"load": {"cache": 16}})


def test_training(llama):
    """A model that is trained beside a context gives that context the stock library's logits: no row is older than its weights.

    Fails if training builds graphs without layer 0's weights, or a graph that was built before goes on reading the cache.
    """
    job = {"run": "training", "model": llama, "tokens": {"count": 20, "seed": 1}}
    (stock,), (cached,) = both(lambda side: run(*side), (STOCK, job), (PATCHED, job | {"load": {"cache": 16}}))
    assert np.array_equal(stock[0], cached[0])
    assert np.array_equal(stock[1], cached[1])
    assert not np.allclose(stock[0], stock[1], atol=1e-3)


#
# what users see
#


def test_reports(smollm):
    """The load, the timings and /metrics say what the cache does, in numbers that fit together."""
    options = ["-t", 1, "-no-cnv", "-c", 256, "-n", 8, "-p", "one two one two one two", "--temp", 0]
    log = tool("llama-completion", "-m", Cached(smollm), *options, log=True)
    assert log.count("rows of the first layer are cached (3 sites, up to 273 rows in 1.0 MiB)") == 1
    found = re.search(r"first layer = (\d+) of 273 rows cached .* (\d+) hits, (\d+) misses", log)
    rows, hits, misses = map(int, found.groups())
    assert hits > 0
    assert rows == misses > 1

    path, body = prompt("one two one two")
    with server(Cached(smollm), "-np", 1, "-c", 256, "--metrics") as post:
        post(path, body)
        metrics = dict(re.findall(r"^llamacpp:firstlayer_cache_(\w+) ([\d.e+-]+)$", post("/metrics"), re.M))
    assert float(metrics["hits_total"]) > 0
    assert float(metrics["misses_total"]) == float(metrics["rows"]) > 1
    assert float(metrics["bytes"]) == float(metrics["rows"]) * 960 * 4
    assert float(metrics["seconds_total"]) > 0


def test_no_report_without_a_cache(smollm):
    log = tool("llama-completion", "-m", smollm, "-t", 1, "-no-cnv", "-c", 64, "-n", 1, "-p", "x", log=True)
    assert "first layer" not in log
    with server(smollm, "-np", 1, "-c", 256, "--metrics") as post:
        assert "firstlayer" not in post("/metrics")


def complete(*options: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_tool("llama-completion", "-t", 1, "-no-cnv", "-c", 64, "-n", 1, "-p", "x", *options, env=environment)


def test_options(smollm, archs):
    """MiB with a fraction, `auto`, the variable, which an option overrides; 0 is none. What is none of these is an error."""
    model = ["-m", smollm]
    variable = {"LLAMA_ARG_FIRSTLAYER_CACHE": "0.5"}
    assert "up to 4096 rows in 15.0 MiB" in complete(*model, "--firstlayer-cache", "auto").stderr
    assert "up to 136 rows in 0.5 MiB" in complete(*model, **variable).stderr
    assert "up to 273 rows" in complete(*model, "--firstlayer-cache", 1, **variable).stderr
    assert "rows" not in complete(*model, "--firstlayer-cache", 0, **variable).stderr

    for wrong in ("much", "-1", "nan", "5x", ""):
        done = complete(*model, "--firstlayer-cache", wrong)
        assert done.returncode == 1
        assert "override 'firstlayer.cache' must be a number of MiB or \"auto\"" in done.stderr

    done = complete(*model, "--firstlayer-cache", 0.001)
    assert "the first layer is computed without a cache: a row takes 3840 bytes, more than the cache of 1048" in done.stderr
    assert done.returncode == 0
    done = complete("-m", archs / "gpt2-dense.gguf", "--firstlayer-cache", 1)
    assert "the first layer is computed without a cache: " in done.stderr


def test_plan(smollm):
    """The memory is that of as many rows as a text of that length has distinct tokens; other figures follow from the uses."""
    cache = plan(smollm).cache
    assert cache.row_bytes == 960 * 4
    assert cache.auto_bytes == 4096 * 960 * 4  # as test_options finds
    assert cache.memory[4096] == round(0.807 * 4096**0.639 * 49152**0.148 * 960 * 4)
    assert 1 < cache.prefill_cold < cache.prefill_warm
    # of 3 projections of 576, in Q4_1, a row of the embedding remains
    saved = 576 * 960 * 20 / 32 + 576 * 4
    before = cache.decode_bytes + saved - 960 * 4
    assert cache.decode_bound == pytest.approx(before / cache.decode_bytes, rel=1e-5)


def test_verify(smollm, short_continuations):
    """Bit for bit where the kernels are the same; with evictions in the second pass."""
    result = verify(smollm, cache="auto", tokens=600)
    assert result.problems == []
    assert result.logits_same == 1
    first, second = result.caches
    assert first.misses == first.rows
    assert second.misses > first.misses
    with pytest.raises(FirstLayerError, match="either a converted file"):
        verify(smollm)


def test_bench(smollm):
    result = bench(smollm, cache=16, batches=[1], loads=2, seconds=0.5, resources=False)
    assert result.cache.rows == result.cache.misses > 0
    assert result.cache.hits > 0
    assert result.cells[0].bound == pytest.approx(plan(smollm).cache.decode_bound)
    with pytest.raises(FirstLayerError, match="MiB, or auto"):
        bench(smollm, cache="many")


@pytest.mark.skipif(not can_count() or not COUNTED.exists(), reason="needs valgrind")
def test_instructions(llama, llama_flp):
    """A hit costs no more than a lookup in a table, but for finding its slot."""
    cached, converted = instructions(llama, cached=True), instructions(llama_flp)
    assert cached < 1.002 * converted
