"""Ways of running llama.cpp: with F32 tables, each gives the same as for the source model, to the last bit.

What a context computes is compared with the stock library; what only a tool does, with the same tool on the source model.
Everything runs on one thread, which is slower but does not collapse when the machine has other things to do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter, PoolingType
from support.builds import PATCHED, ROOT, STOCK, Cached, CachedAndDemanded, Demanded, Optional, both, compare, same, session
from support.command_line import tool
from support.models import convert
from support.projector import picture, write_projector
from support.servers import Requests, prompt, serve, server

FILE = ROOT / "tests" / "text.txt"
TEXT = FILE.read_text()
Q4_0, Q8_0 = 2, 8  # enum ggml_type


#
# one context
#


WAYS: dict[str, Any] = {"tables": Path, "row cache": Cached, "demand": Demanded, "row cache and demand": CachedAndDemanded}


@pytest.fixture(params=WAYS)
def ours(request, smollm, smollm_flp, tmp_path) -> Path:
    """SmolLM2 with F32 tables, or with what it has on request, under another name than without."""
    if request.param == "tables":
        return smollm_flp["f32"]
    (tmp_path / "ours.gguf").symlink_to(smollm)
    return WAYS[request.param](tmp_path / "ours.gguf")


@pytest.fixture(params=WAYS)
def made(request, tmp_path) -> Callable[[Path], Path]:
    """Gives a model F32 tables, or what it has on request."""
    if request.param == "tables":
        return lambda source: convert(source, tmp_path / "flp.gguf", type="f32").output
    return WAYS[request.param]


# with outputs for some tokens, so that demand leaves something out
PROMPT: list[Any] = [["decode", [[0], TEXT[:250], 9]], ["decode", [[0], [5]]], ["decode", [[0], [6, 7, 8]]]]
EMBED: list[Any] = [["decode", [[0], TEXT[:200]], [[1], TEXT[300:340]], [[2], TEXT[400:600]]], ["decode", [[3], [5]]]]

# sequences of unequal length, some of them with one token, in one batch; tokens that alternate between sequences
UNEQUAL: list[Any] = [
    ["decode", [[0], TEXT[:100], 9], [[1], TEXT[300:340], 3], [[2], TEXT[400:600], 20]],
    ["decode", [[1], TEXT[340:420]], [[2], [42]]],
    ["cp", 0, 3, -1, -1],
    ["decode", [[3], [44]], [[1], [45]], [[0], [46]], [[2], [47, 48]], [[0], [49]], [[3], [50]]],
]
COUPLED = [["decode", [[0, 3], TEXT[200:260]], [[2], [43]]], *UNEQUAL[3:]]

# name -> options of the model, options of the context, steps
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], list[Any]]] = {
    "flash attention": ({}, {"flash_attn_type": 1}, PROMPT),
    "no flash attention": ({}, {"flash_attn_type": 0}, PROMPT),
    "cache q8_0": ({}, {"flash_attn_type": 1, "type_k": Q8_0, "type_v": Q8_0}, PROMPT),
    "cache q4_0": ({}, {"flash_attn_type": 1, "type_k": Q4_0, "type_v": Q4_0}, PROMPT),
    "small ubatch": ({}, {"n_ubatch": 16}, PROMPT),
    "rope options": ({}, {"rope_freq_base": 5e3, "rope_freq_scale": 0.5}, PROMPT),
    "control vector": ({}, {}, [["control", 1], *PROMPT]),
    "shift": ({}, {}, [*PROMPT, ["rm", 0, 4, 20], ["add", 0, 20, -1, -16], *PROMPT]),
    "self-extend": ({}, {}, [*PROMPT, ["div", 0, 8, 40, 4], ["add", 0, 40, -1, -24], *PROMPT]),
    "unified cache": ({}, {"n_seq_max": 4, "kv_unified": True}, UNEQUAL + COUPLED),
    "separate caches": ({}, {"n_seq_max": 4, "kv_unified": False}, UNEQUAL),
    "unified cache, small ubatch": ({}, {"n_seq_max": 4, "kv_unified": True, "n_ubatch": 16}, UNEQUAL + COUPLED),
    "separate caches, small ubatch": ({}, {"n_seq_max": 4, "kv_unified": False, "n_ubatch": 16}, UNEQUAL),
} | {
    f"pooling {name}": ({}, {"embeddings": True, "pooling_type": number, "n_seq_max": 4, "kv_unified": True}, EMBED)
    for number, name in enumerate(["none", "mean", "cls", "last"])
}


@pytest.mark.parametrize("name", CASES)
def test_context(name, smollm, ours):
    """A real model gives the same bits, whatever the options of the context.

    Fails if the rewrite takes the token axis for another one, rows of one sequence for another's, or a graph that is built
    only here is rewritten wrongly or not at all.
    """
    load, context, steps = CASES[name]
    context = getattr(ours, "CONTEXT", {}) | context
    stock, found = (
        session(model, build, steps, load=load, context=context) for model, build in [(smollm, STOCK), (ours, PATCHED)]
    )
    assert same(stock, found)
    assert len(np.unique(stock[0])) > 500


# llama_load_mode: none, mmap, mlock, both, direct I/O; llama_lazy_mode: off, on
@pytest.mark.parametrize("load", [*({"load_mode": mode} for mode in range(5)), {"lazy_mode": 0}, {"lazy_mode": 2}], ids=str)
def test_loading(load, smollm, smollm_flp):
    """However the tables come into memory, or are left in the file, rows are the same.

    Fails if tables are not loaded, or from the wrong place, or are not kept where rows are read.
    """
    steps = [["decode", [[0], TEXT[:200]]]]
    assert same(session(smollm, STOCK, steps), session(smollm_flp["f32"], PATCHED, steps, load=load))


def test_loading_builds_few_graphs(smollm, smollm_flp):
    """The check of a converted file takes one graph of llama.cpp's constructor of contexts, which would build seven."""
    options = ["-no-cnv", "-fit", "off", "-n", 1, "-p", "x", "-v"]
    logs = [tool("llama-completion", "-m", model, *options, log=True) for model in (smollm, smollm_flp["f32"])]
    plain, converted = (log.count("reserving a graph for ubatch") for log in logs)
    assert plain > 1
    assert converted == plain + 1


def test_lazy_reading_of_a_replaced_table(archs, tmp_path):
    """Per-layer embeddings are read lazily, as are the table that replaces them for tokens, and all other weights that only
    images need.
    """
    converted = convert(archs / "gemma4-dense.gguf", tmp_path / "flp.gguf", type="f32")
    assert "per_layer_token_embd.weight" in converted.spares
    steps = [["decode", [[0], random(20, 1)]]]
    ours = session(converted.output, PATCHED, steps, load={"lazy_mode": 2})
    assert same(session(converted.source, STOCK, steps), ours)

    def lazy(model: Path) -> list[str]:
        options = ["-m", model, "-t", 1, "-c", 64, "-n", 1, "-p", "x", "-no-cnv", "--lazy-mode", "on", "-lv", 4]
        return re.findall(r"tensor (\S+) .*lazy read enabled", tool("llama-completion", *options, log=True))

    assert set(lazy(converted.source)) == {"per_layer_token_embd.weight"}
    assert set(lazy(converted.output)) == {"firstlayer.0.table", *converted.spares}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux")
def test_lazy_tables_stay_in_the_file(smollm_flp):
    """Tables are read lazily too: rows that are not looked up take no memory. Fails if tables are not marked for it."""
    steps = [["decode", [[0], [1, 2, 3]]], ["resident"]]
    off, on = (session(smollm_flp["f32"], PATCHED, steps, load={"lazy_mode": mode})[1][0] for mode in (0, 2))
    table = 49152 * 960 * 4
    assert off - on > table / 2  # neighbouring pages are read too


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="asks Linux")
def test_loading_reads_what_is_not_lazy(smollm, smollm_flp):
    """As llama.cpp does without tables. Fails if weights beside lazy tables wait for the first batch, page by page."""
    source, ours = (session(model, PATCHED, [["mapped", str(model)]])[0][0] for model in (smollm, smollm_flp["f32"]))
    assert abs(ours - source) < 2 << 20
    assert source > 0.9 * smollm.stat().st_size


def random(count: int, seed: int) -> dict[str, int]:
    return {"count": count, "seed": seed}


# more than one token of a sequence at a time: for a single one, F32 weights have a kernel of their own
SEQUENCES: list[Any] = [
    ["decode", [[0], random(40, 1), 7], [[1], random(9, 2), 3], [[2], random(70, 3), 9]],
    ["decode", [[1], random(17, 4)], [[2], random(2, 5)]],
    ["decode", [[0], random(2, 6)], [[2], random(2, 7)], [[1], random(2, 8)], [[3], random(2, 9)]],
]

# recurrent, hybrid, sliding window, latent, whole block in the table
MEMORIES = ["mamba-dense", "qwen35-dense", "falcon-h1-dense", "gemma3-dense", "deepseek2-moe", "falcon-dense", "arctic-moe"]


@pytest.mark.parametrize("name", MEMORIES)
def test_sequences_of_other_memories(name, archs, made):
    """Recurrent models get batches with an axis for sequences, which must be told apart from the token axis."""
    source = archs / f"{name}.gguf"
    context = {"n_seq_max": 4}
    job = {"run": "session", "steps": SEQUENCES}
    jobs = [job | {"context": context | {"kv_unified": unified, "n_ubatch": 32}} for unified in (True, False)]
    for stock, ours in compare(source, made(source), *jobs):
        assert same(stock, ours)


@pytest.mark.parametrize("name", ["smollm", "mamba-dense", "qwen35-dense", "gemma3-dense"])
def test_saved_state(name, archs, smollm, made, tmp_path):
    """A saved context or sequence holds the same bytes, and each model continues from what the other one saved.

    Fails if layer 0 writes other keys and values, or if anything that a state holds or is checked against depends on tables.
    """
    source = smollm if name == "smollm" else archs / f"{name}.gguf"
    sides = {"stock": (source, STOCK), "ours": (made(source), PATCHED)}
    context = {"n_seq_max": 4, "kv_unified": False}
    go_on = ["decode", [[0], random(25, 3), 2], [[1], random(7, 4), 3]]

    def file(side: str, what: str) -> str:
        return str(tmp_path / f"{side}-{what}")

    before = {}
    for side, (model, build) in sides.items():
        start = ["decode", [[0], random(50, 1), 9], [[1], random(20, 2), 5]]
        saves = [["save", file(side, "all")], ["save", file(side, "one"), 1]]
        before[side] = session(model, build, [start, *saves, go_on], context=context)
    assert same(before["stock"], before["ours"])
    for what in ("all", "one"):
        state = Path(file("stock", what)).read_bytes()
        assert len(state) > 1000
        assert state == Path(file("ours", what)).read_bytes()

    # a restored cache has another layout, which can round differently, so only sessions with restored caches are compared
    elsewhere = ["decode", [[2], random(7, 4), 3]]
    stock, ours = (
        session(model, build, [["load", file(other, "all")], go_on], context=context)
        + session(model, build, [["load", file(other, "one"), 2], elsewhere], context=context)
        for (model, build), other in [(sides["stock"], "ours"), (sides["ours"], "stock")]
    )
    assert same(stock, ours)
    assert np.allclose(stock[0], before["stock"][1], atol=0.05)
    assert np.allclose(stock[1], before["stock"][1][2:], atol=0.05)


CHAINS = {
    "greedy": [["greedy"]],
    "top-k": [["top_k", 40], ["temp", 0.9], ["dist", 7]],
    "grammar": [["grammar", 'root ::= ("yes" | "no" | "perhaps") (", " root)?'], ["greedy"]],
}


@pytest.mark.parametrize(("chain", "backend"), [("greedy", True), ("top-k", False), ("top-k", True), ("grammar", False)])
def test_samplers(chain, backend, smollm, ours):
    """Samplers draw the same tokens, including samplers that are part of the graph, which the rewrite must keep.

    Fails if the rewrite drops the nodes of samplers: then no token is drawn in the graph.
    """
    job = {"run": "sample", "chain": CHAINS[chain], "backend": backend, "prompt": "The answer is", "n_predict": 24}
    ((stock, found),) = compare(smollm, ours, job)
    assert stock == found
    assert found[1] == (24 if backend else 0)


#
# tools
#


def complete(model: Path, *arguments: object) -> str:
    return tool("llama-completion", "-m", model, "-t", 1, "-no-cnv", "-c", 1024, "-n", 32, "--temp", 0, *arguments)


def test_tools_tell_that_tables_are_used(smollm, smollm_flp):
    """Once, at their usual verbosity; not for a model without tables."""
    line = "the first layer comes from tables (3 of 3 sites)"
    options = ["-t", 1, "-no-cnv", "-c", 64, "-n", 1, "-p", "x"]
    logs = [tool("llama-completion", "-m", model, *options, log=True) for model in (smollm_flp["f32"], smollm)]
    assert [log.count(line) for log in logs] == [1, 0]


def test_tables_are_no_parameters(smollm, smollm_flp):
    """llama-bench, and any caller of llama_model_n_params, gets the source's number of parameters."""

    def parameters(model: Path) -> int:
        return json.loads(tool("llama-bench", "-m", model, "-p", 1, "-n", 0, "-r", 1, "-o", "json"))[0]["model_n_params"]

    expected = sum(int(np.prod(tensor.shape)) for tensor in GGUFReader(smollm).tensors)
    assert {parameters(model) for model in (smollm, *smollm_flp.values())} == {expected}


@pytest.fixture(scope="session")
def control_vector(tmp_path_factory) -> Path:
    """A random control vector for layers 1 to 29 of SmolLM2."""
    path = tmp_path_factory.mktemp("control") / "control.gguf"
    writer = GGUFWriter(path, "controlvector")
    generator = np.random.default_rng(1)
    for layer in range(1, 30):
        writer.add_tensor(f"direction.{layer}", generator.normal(0, 0.3, 576).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SCHEMA = '{"type": "object", "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}}}'

# options of llama-completion that change the text
TEXTS: dict[str, list[object]] = {
    "self-extend": ["-p", TEXT[:500], "-gan", 4, "-gaw", 32],
    "context shift": ["-p", "Once upon a time", "-c", 64, "-n", 100, "--context-shift", "--keep", 4],
    "grammar": ["-p", "Once upon a time", "--grammar", 'root ::= ([a-m]+ " ")+'],
    "json schema": ["-p", "A person:", "-j", SCHEMA],
    "backend sampling": ["-p", "Once upon a time", "--temp", 0.8, "--seed", 1, "-bs"],
    "control vector": ["-p", "Once upon a time"],
}


@pytest.mark.parametrize("name", TEXTS)
def test_completion(name, smollm, ours, control_vector):
    """Options of llama-completion have an effect, and it is the same."""
    options = TEXTS[name] + (["--control-vector", control_vector] if name == "control vector" else [])
    source, converted = both(lambda model: complete(model, *options), smollm, ours)
    assert source == converted
    assert source != complete(smollm, *TEXTS[name][:2])


def test_prompt_cache(smollm, ours, tmp_path):
    """llama-completion continues from a saved prompt, its own or the source's."""
    caches = {model: tmp_path / model.stem for model in (smollm, ours)}

    def start(model: Path) -> str:
        return complete(model, "-p", TEXT[:300], "-n", 16, "--prompt-cache", caches[model])

    def go_on(model: Path, cache: Path) -> str:
        return complete(model, "-p", TEXT[:380], "-n", 16, "--prompt-cache", cache, "--prompt-cache-ro")

    source, converted = both(start, *caches)
    assert source == converted
    first, second = (cache.read_bytes() for cache in caches.values())
    assert first == second
    for cache in caches.values():
        a, b = both(lambda model, cache=cache: go_on(model, cache), *caches)
        assert a == b != source


def test_chat(smollm, ours):
    """llama-cli gives the same answer; its output before that names the file."""
    options = ["-t", 1, "-st", "-p", "What is the capital of France?", "-n", 24, "--temp", 0, "-c", 512, "--no-show-timings"]
    printed = both(lambda model: tool("llama-cli", "-m", model, *options), smollm, ours)
    source, converted = (text.split("\n> ", 1)[1] for text in printed)
    assert source == converted
    assert len(source) > 60


def test_perplexity(smollm, ours, tmp_path):
    """Every digit of the perplexity is the same, and so are the probabilities that llama-perplexity saves."""

    def measure(model: Path) -> tuple[list[str], bytes]:
        saved = tmp_path / model.stem
        options = ["-m", model, "-t", 1, "-f", FILE, "-c", 128, "--chunks", 2, "--save-all-logits", saved]
        return re.findall("Final estimate: PPL = .*", tool("llama-perplexity", *options, log=True)), saved.read_bytes()

    source, converted = both(measure, smollm, ours)
    assert source == converted
    assert len(source[0]) == 1


def test_imatrix(smollm, ours, tmp_path):
    """An importance matrix has the source's values for all weights except the elided ones, which are not used.

    Fails if a weight is collected under another name or with other activations, or if an elided one is read after all.
    """

    def collect(model: Path) -> dict[str, bytes]:
        path = tmp_path / f"{model.stem}.imatrix.gguf"
        tool("llama-imatrix", "-m", model, "-t", 1, "-f", FILE, "-c", 128, "--chunks", 2, "-o", path, "--no-ppl")
        return {tensor.name: tensor.data.tobytes() for tensor in GGUFReader(path).tensors}

    source, converted = both(collect, smollm, ours)
    assert converted == {name: source[name] for name in converted}
    gone = {name.rsplit(".", 1)[0] for name in set(source) - set(converted)}
    assert gone == (set() if isinstance(ours, Optional) else {f"blk.0.attn_{which}.weight" for which in "qkv"})


@pytest.mark.parametrize("limit", [["--split-max-tensors", 10], ["--split-max-size", "60M"]], ids=["tensors", "size"])
def test_split_and_merge(limit, llama_flp, smollm_flp, tmp_path):
    """A converted file can be split, runs in parts, and is the same after merging.

    Fails if tables are looked for in the first part only, or if a part loses keys or tensors.
    """
    converted = smollm_flp["q8_0"] if "60M" in limit else llama_flp
    tool("llama-gguf-split", "--split", *limit, converted, tmp_path / "part")
    parts = sorted(tmp_path.glob("part-*.gguf"))
    assert len(parts) > 1
    steps = [["decode", [[0], random(50, 1)]]]
    assert same(session(converted, PATCHED, steps), session(parts[0], PATCHED, steps))

    merged = tmp_path / "merged.gguf"
    tool("llama-gguf-split", "--merge", parts[0], merged)
    before, after = GGUFReader(converted), GGUFReader(merged)
    assert [(t.name, t.tensor_type, t.data.tobytes()) for t in before.tensors] == [
        (t.name, t.tensor_type, t.data.tobytes()) for t in after.tensors
    ]
    values = {
        key: field.contents() for key, field in after.fields.items() if not key.startswith("split.") and key != "GGUF.kv_count"
    }
    assert values == {key: field.contents() for key, field in before.fields.items() if key != "GGUF.kv_count"}


def test_benchmarks(smollm_flp):
    """llama-bench and llama-batched-bench run to completion; their measurements differ every time."""
    model = smollm_flp["f32"]
    results = json.loads(tool("llama-bench", "-m", model, "-t", 1, "-p", 16, "-n", 4, "-r", 1, "-fa", "0,1", "-o", "json"))
    assert [(result["n_prompt"], result["n_gen"]) for result in results] == [(16, 0), (0, 4)] * 2
    assert all(result["avg_ts"] > 0 for result in results)
    options = ["-t", 1, "-c", 256, "-npp", 16, "-ntg", 4, "-npl", "1,4", "--output-format", "jsonl"]
    lines = tool("llama-batched-bench", "-m", model, *options).splitlines()
    results = [json.loads(line) for line in lines if line.startswith("{")]
    assert [(result["pl"], result["speed"] > 0) for result in results] == [(1, True), (4, True)]


#
# server
#


# of unequal length, more than there are slots; a list of prompts enters the queue at once, so batches are always the same
PROMPTS = [TEXT[:200], "def fibonacci(n):", TEXT[300:600], "Once", "The capital of France is", TEXT[900:1000]]
SLOTS = ["-np", 4, "-c", 4096]


def words(first: int, end: int) -> str:
    return "".join(re.findall(r"\s*\S+", TEXT)[first:end])


# name -> options of the server, requests
SERVED: dict[str, tuple[list[object], Requests]] = {
    "slots": (SLOTS, [prompt(PROMPTS), prompt(PROMPTS[::-1], 8, temperature=1)]),
    "slots with one cache": ([*SLOTS, "--kv-unified"], [prompt(PROMPTS)]),
    "prompt cache": (["-np", 1, "-c", 1024], [prompt(TEXT[:300]), prompt(TEXT[:400]), prompt(TEXT[:200] + TEXT[300:400])]),
    "reuse by shifting": (
        ["-np", 1, "-c", 1024, "--cache-reuse", 16],
        [prompt(words(0, 100)), prompt(words(0, 20) + words(50, 100))],
    ),
    "context shift": (["-np", 1, "-c", 256, "--context-shift"], [prompt(TEXT[:600], 120, ignore_eos=True)]),
    "schema, grammar and chat": (
        ["-np", 1, "-c", 1024],
        [
            prompt("A person:", 40, json_schema=json.loads(SCHEMA)),
            prompt("Is it raining?", grammar='root ::= ("yes" | "no" | "perhaps") (", " root)?'),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 16, "temperature": 0}),
        ],
    ),
    "backend sampling": (["-np", 2, "-c", 1024, "-bs"], [prompt(PROMPTS[:2], n_probs=0, temperature=0.8)]),
}


@pytest.mark.parametrize("name", SERVED)
def test_server(name, smollm, ours):
    """llama-server answers the same, to the last digit of the probabilities of each token."""
    options, requests = SERVED[name]
    options = options + getattr(ours, "EXACT", [])
    source, converted = both(lambda model: serve(model, requests, *options), smollm, ours)
    assert source == converted
    flat = [answer for answers in source for answer in (answers if isinstance(answers, list) else [answers])]
    assert all(answer.get("content") or answer.get("choices") for answer in flat)
    if name in ("prompt cache", "reuse by shifting"):
        assert all(answer["timings"]["cache_n"] > 20 for answer in source[1:])
    if name == "context shift":
        assert flat[0]["timings"]["predicted_n"] == 120


@pytest.mark.parametrize("kind", ["kept weights", "sidecar", "row cache"])
def test_pictures(kind, smollm, tmp_path):
    """Text comes from rows and pictures are computed, in one conversation, through a projector (mtmd).

    Fails if weights that pictures need are not there, or if a row is looked up for a picture's position.
    """
    options: list[object] = ["-np", 1, "-c", 1024, "--mmproj", write_projector(tmp_path, 576)]
    model: Path = Cached(smollm)
    if kind != "row cache":
        model = convert(smollm, tmp_path / "x.gguf", type="f32", keep_weights=True, sidecar=kind == "sidecar").output
    extra: list[object] = []
    if kind == "sidecar":
        model, extra = smollm, ["--firstlayer", model]

    def ask(*parts: str) -> tuple[str, Any]:
        content = [
            {"type": "image_url", "image_url": {"url": part}} if part.startswith("data:") else {"type": "text", "text": part}
            for part in parts
        ]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 12, "temperature": 0, "logprobs": True}
        return "/v1/chat/completions", body

    one, two = picture(1), picture(2)
    requests = [
        ask("Hello"),
        ask("What is it?", one, "Say it."),
        ask("What is it?", two, "Say it."),
        ask(one, two),
        ask("Hello"),
    ]
    source, ours = both(lambda side: serve(side[0], requests, *options, *side[1]), (smollm, []), (model, extra))
    assert source == ours
    assert source[1]["choices"] != source[2]["choices"]


def test_slots_join_and_leave(smollm, ours):
    """Requests that arrive while others are computed get the text that the source gives each of them alone.

    Batches are put together by chance here, which changes logits by rounding. So each token of these texts is at least half
    a nat ahead of all others. Fails if a token gets the row of another one, of the same or another slot.
    """
    texts = [", ".join(f"{word} {i}" for i in range(1, 8 + 4 * n)) for n, word in enumerate(["line", "page", "day", "room"])]
    requests = [prompt(text + ",", 16 + 4 * n) for n, text in enumerate(texts * 2)]
    alone = serve(smollm, requests[: len(texts)], "-np", 1, "-c", 1024) * 2
    for answer in alone:
        for token in answer["completion_probabilities"]:
            first, second = (top["logprob"] for top in token["top_logprobs"][:2])
            assert first - second > 0.5

    with server(ours, *SLOTS, "--metrics") as post, ThreadPoolExecutor(len(requests)) as pool:
        together = list(pool.map(lambda request: post(*request), requests))
        metrics = post("/metrics")
    for one, other in zip(alone, together, strict=True):
        assert other["content"].startswith(one["content"])
    assert float(re.search(r"^llamacpp:n_busy_slots_per_decode ([\d.]+)", metrics, re.M)[1]) > 1.5


def test_saved_slot(smollm, ours, tmp_path):
    """A slot that one model saved is restored by the other one, which continues with the same probabilities."""
    options = ["-np", 2, "-c", 1024, "--slot-save-path", f"{tmp_path}/"]
    others = {smollm: ours, ours: smollm}
    start, go_on = prompt(TEXT[:500], id_slot=0), prompt(TEXT[:560], id_slot=1)

    def exchange(model: Path) -> Any:
        saved = serve(model, [start, ("/slots/0?action=save", {"filename": model.stem})], *options)[1]
        assert saved["n_saved"] > 100
        restore = ("/slots/1?action=restore", {"filename": model.stem})
        restored, answer = serve(others[model], [restore, go_on], *options)
        assert restored["n_restored"] == saved["n_saved"]
        assert answer["timings"]["cache_n"] > 80
        return answer

    source, converted = both(exchange, *others)
    assert source == converted


@pytest.mark.parametrize("target", ["source", "faster"])
def test_draft_model(target, smollm, ours):
    """A draft model with tables or a cache proposes what the source proposes, so as many tokens are accepted.

    The text alone would say nothing about the draft model, since the target corrects it.
    """
    model = {"source": smollm, "faster": ours}[target]
    requests = [prompt(text, 32, n_probs=0) for text in PROMPTS[:2]]
    options = ["-np", 1, "-c", 1024, "-td", 1, "--spec-type", "draft-simple", "--spec-draft-n-max", 6]
    plain, found = both(lambda draft: serve(model, requests, *options, "-md", draft), smollm, ours)
    assert plain == found
    for answer in found:
        assert answer["timings"]["draft_n_accepted"] > 10
    assert serve(model, requests, "-np", 1, "-c", 1024)[1]["content"] == found[1]["content"]


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_embeddings(pooling, smollm, ours):
    """/v1/embeddings gives the same vectors."""
    texts = [TEXT[:300], "Once", TEXT[300:340], "The capital of France is"]
    request = ("/v1/embeddings", {"input": texts})
    options = ["--embeddings", "--pooling", pooling, "-np", 4, "-c", 2048]
    (source,), (converted,) = both(lambda model: serve(model, [request], *options), smollm, ours)
    assert source["data"] == converted["data"]
    vectors = np.array([entry["embedding"] for entry in source["data"]])
    assert vectors.shape == (4, 576)
    assert len(np.unique(vectors, axis=0)) == (3 if pooling == "cls" and np.array_equal(*vectors[[0, 3]]) else 4)


@pytest.fixture(scope="session")
def reranker(smollm, tmp_path_factory) -> Path:
    """A small random Qwen3 with a classifier and SmolLM2's vocabulary."""
    path = tmp_path_factory.mktemp("reranker") / "reranker.gguf"
    generator, width = np.random.default_rng(1), 64
    writer = GGUFWriter(path, "qwen3")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(128)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_key_length(32)
    writer.add_value_length(32)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_pooling_type(PoolingType.RANK)
    writer.add_classifier_output_labels(["yes", "no"])
    writer.add_string("tokenizer.chat_template.rerank", "{query} {document}")
    for name, field in GGUFReader(smollm).fields.items():
        if name.startswith("tokenizer."):
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    shapes = {"token_embd": (49152, width), "cls.output": (2, width)}
    layer = {"attn_q": (64, width), "attn_k": (32, width), "attn_v": (32, width), "attn_output": (width, 64)}
    layer |= {"ffn_gate": (128, width), "ffn_up": (128, width), "ffn_down": (width, 128)}
    norms = {"attn_norm": width, "ffn_norm": width, "attn_q_norm": 32, "attn_k_norm": 32}
    for i in range(2):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in (layer | {n: (size,) for n, size in norms.items()}).items()}
    shapes["output_norm"] = (width,)
    for name, shape in shapes.items():
        values = generator.normal(0, 0.2, shape) if len(shape) > 1 else np.ones(shape)
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_reranking(reranker, made):
    """A model with a classifier gives the same scores, in the library and over HTTP."""
    converted = made(reranker)
    context = {"embeddings": True, "pooling_type": PoolingType.RANK, "n_seq_max": 4, "kv_unified": True}
    context |= getattr(converted, "CONTEXT", {})
    stock, found = (
        session(model, build, EMBED[:1], context=context) for model, build in [(reranker, STOCK), (converted, PATCHED)]
    )
    assert same(stock, found)
    assert stock[0].shape == (3, 2)
    assert np.ptp(stock[0][:, 0]) > 1e-3

    body = {"query": "Which birds came?", "documents": [TEXT[:300], "starlings", TEXT[300:340]]}
    options = ["--rerank", "-np", 4, "-c", 2048]
    if exact := getattr(converted, "EXACT", []):
        # in caches of their own, documents are decoded in parts, the last part one document: demand leaves the last layer
        # one row then, for which F32 has kernels of its own
        options += ["--kv-unified", *exact]
    source, answer = both(lambda model: serve(model, [("/v1/rerank", body)], *options), reranker, converted)
    assert source == answer
    assert len({result["relevance_score"] for result in source[0]["results"]}) == 3
