"""verify and bench: what they find, against llama.cpp's own tools, the plan, and counts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType
from gguf.quants import dequantize
from support.builds import ROOT
from support.command_line import cli, refusal
from support.counting import COUNTED, bytes_read, can_count, instructions
from support.models import convert, rewrite

from gguf_firstlayer import FirstLayerError, UsageError, bench, paths, verify
from gguf_firstlayer.auto import CANDIDATES, measure_again
from gguf_firstlayer.bench import (
    BUSY,
    FASTER,
    IMPOSSIBLE,
    LIMITED,
    SLOWER,
    UNKNOWN,
    _cell,
    _tokens,
    summary,
    verdict,
)
from gguf_firstlayer.c_api import library
from gguf_firstlayer.cost import of_file
from gguf_firstlayer.decoder import Decoder, InMemoryDecoder
from gguf_firstlayer.estimate import bound, estimate
from gguf_firstlayer.file_format import Measurement, fitting
from gguf_firstlayer.runtime import Analysis, analyse
from gguf_firstlayer.source import Source
from gguf_firstlayer.text import to_json
from gguf_firstlayer.timing import Load, Ratio, ratio
from gguf_firstlayer.verify import MAX_KLD
from gguf_firstlayer.verify import summary as verify_summary

# of ordinary words: llama-perplexity takes the least probable tokens for more probable than they are
TEXT = ROOT / "tests" / "prose.txt"
PATHS = os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT / 'scripts' / 'reports'}"}


#
# verify
#


def test_f32_tables_change_nothing(smollm, smollm_flp):
    result = verify(smollm, smollm_flp["f32"])
    assert result.problems == []
    assert (result.logit_max, result.kld_max, result.top1) == (0, 0, 1)
    assert result.rows_same == 1
    assert result.perplexity == result.perplexity_source
    assert set(result.greedy) == {None}
    assert (result.kld_added, result.kld_added_error) == (0, 0)
    assert result.kld_floor > 0  # otherwise something was compared with itself


def test_agrees_with_llama_perplexity(smollm, smollm_flp, short_continuations, tmp_path):
    tool = paths()["perplexity"]
    text = tmp_path / "text"
    text.write_text(TEXT.read_text()[:11000])
    common = ["-f", text, "-c", 512, "-b", 512, "-ub", 512, "-t", 2, "--no-warmup"]

    def perplexity(*options):
        command = [str(word) for word in (tool, *options, *common, "--kl-divergence-base", tmp_path / "base")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    perplexity("-m", smollm)
    printed = perplexity("-m", smollm_flp["q8_0"], "--kl-divergence")

    def figure(name: str) -> list[float]:
        line = next(line for line in printed.splitlines() if line.startswith(name))
        return [float(value) for value in re.findall(r"-?\d+\.\d+", line.split(":")[1])]

    result = verify(smollm, smollm_flp["q8_0"], text=text.read_text(), tokens=1 << 20)
    assert result.tokens // 512 * 255 == result.scored
    assert result.scored > 1000
    # the tool keeps logarithms of the source's probabilities in 16 bits
    assert figure("Mean    KLD") == pytest.approx([result.kld, result.kld_error], rel=0.01, abs=1e-5)
    assert figure("Median  KLD") == pytest.approx([result.kld_median], rel=0.02, abs=1e-5)
    assert figure("99.0%   KLD") == pytest.approx([result.kld_p99], rel=0.02)
    assert figure("Maximum KLD") == pytest.approx([result.kld_max], rel=0.02)
    assert figure("Mean PPL(Q)  ")[0] == pytest.approx(result.perplexity, rel=1e-4)
    assert figure("Mean PPL(base)")[0] == pytest.approx(result.perplexity_source, rel=1e-3)
    change, error = figure("Mean PPL(Q)-PPL(base)")
    assert change == pytest.approx(result.perplexity_change, abs=0.2 * error)
    assert error == pytest.approx(result.perplexity_change_error, rel=0.02)
    assert figure("Same top p")[0] == pytest.approx(100 * result.top1, abs=0.2)


def test_verify_from_the_command_line(smollm, smollm_flp, tmp_path):
    text = tmp_path / "text"
    text.write_text(TEXT.read_text()[:4000])
    done = cli("verify", smollm, smollm_flp["q8_0"], "--text", text, "--tokens", 256, "--json")
    result = json.loads(done.stdout)
    assert done.returncode == 0
    assert (result["tokens"], result["scored"]) == (256, 2 * 63)
    assert len(result["greedy"]) == 4


def test_verdict_does_not_rest_on_the_file(llama, tmp_path):
    """A forger chooses the bound in the file, and knows which rows were checked once."""
    known = np.unique(np.append(np.random.default_rng(0).integers(0, 128, 64), [0, 127]))
    honest = convert(llama, tmp_path / "honest.gguf").output
    claims = {f"firstlayer.measured.{field.name}": (1e9, GGUFValueType.FLOAT32) for field in dataclasses.fields(Measurement)}

    def forge(name, data):
        if not name.startswith("firstlayer"):
            return data
        forged = np.zeros_like(data)
        forged[known] = data[known]
        return forged

    result = verify(llama, rewrite(honest, tmp_path / "forged.gguf", change_tensor=forge, keys=claims))
    assert result.kld_bound == MAX_KLD
    assert "some differ from the tables" in result.problems[0]

    one = rewrite(honest, tmp_path / "one.gguf", change_tensor=lambda name, data: _without_row(name, data, 77))
    result = verify(llama, one, all_rows=True, max_kld=0.5)
    assert (result.rows_checked, result.kld_bound) == (128, 0.5)
    assert result.rows_same == 127 / 128
    assert re.search(r"of 128 rows recomputed, some differ from the tables: .* of 1 tokens, such as 77", result.problems[0])


def test_verify_compares_what_is_no_table(llama, tmp_path):
    """A forger leaves the tables as they are, and changes what no text shows."""
    honest = convert(llama, tmp_path / "honest.gguf").output
    assert verify(llama, honest).problems == []

    def forge(name, data):
        if name == "output.weight":
            data = data.copy()
            data[5, 7] *= 1 + 1e-6
        return data

    found = verify(llama, rewrite(honest, tmp_path / "weight.gguf", change_tensor=forge)).problems
    assert found[0].startswith("output.weight")
    (tmp_path / "key.gguf").write_bytes(honest.read_bytes().replace(b"tok_77", b"tok_7\n"))
    assert verify(llama, tmp_path / "key.gguf").problems == [
        "metadata of the converted file differ from the source's: convert it again"
    ]


def _without_row(name: str, data: np.ndarray, row: int) -> np.ndarray:
    if name.startswith("firstlayer"):
        data = data.copy()
        data[row] = 0
    return data


def test_tables_of_another_model(llama, tmp_path):
    # the shapes are the same, so only the fingerprint shows it
    other = rewrite(
        llama, tmp_path / "other.gguf", change_tensor=lambda name, data: data * 1.01 if "0.attn_q" in name else data
    )
    converted = convert(other, tmp_path / "other-flp.gguf").output
    done = cli("verify", llama, converted)
    assert done.returncode == 1
    assert "computed from other weights" in done.stdout
    assert "Qcur-0" in done.stdout
    assert "Kcur-0" not in done.stdout


@pytest.mark.parametrize("kind", ["f32", "q8_0", "q1_0"])  # gguf-py cannot read the last
def test_wrong_rows_are_found(kind, llama, tmp_path):
    converted = convert(llama, tmp_path / "right.gguf", type=kind).output
    wrong = Path(shutil.copy(converted, tmp_path / "wrong.gguf"))
    for tensor in GGUFReader(wrong, "r+").tensors:
        if tensor.name.startswith("firstlayer"):
            tensor.data[[0, 1]] = tensor.data[[1, 0]]
    assert verify(llama, converted).problems == []
    problems = verify(llama, wrong).problems
    assert len(problems) == 1
    assert "rows recomputed" in problems[0]
    assert "such as 0" in problems[0]


def test_coarse_tables_are_out_of_bounds(smollm, short_continuations, tmp_path, monkeypatch, measured):
    converted = convert(smollm, tmp_path / "q4_0.gguf", type="q4_0").output
    assert verify(smollm, converted, tokens=128).problems == []  # the bound for types that the user chose is wide
    monkeypatch.setattr(sys.modules["gguf_firstlayer.verify"], "MAX_KLD", 1e-4)
    result = verify(smollm, converted, tokens=128)
    assert result.kld_added + result.kld_added_error > 1e-4
    assert "wider types" in "".join(verify_summary(result))
    measured(f"verify: q4_0 tables of SmolLM2 add {result.kld_added:.1e} ± {result.kld_added_error:.1e} nats")


def test_verify_and_convert_tell_the_same(smollm, smollm_flp, short_continuations, tmp_path):
    """For the same file, on the built-in sample, both report the same part of the tables."""
    with analyse(smollm) as analysis:
        kinds = {site: fitting(_q8_0(), site.width) for site in analysis.sites}
        told = measure_again(Source(smollm), analysis, kinds, 1e-4)
    found = verify(smollm, smollm_flp["q8_0"])
    assert found.sample
    assert (found.kld_added, found.kld_added_error) == pytest.approx((told.kld_tables, told.kld_tables_error), rel=1e-6)
    assert told.tokens == found.tokens
    assert "254 tokens scored, of 512 of the built-in sample" in verify_summary(found)


def test_verdict_follows_from_the_figures(smollm, smollm_flp, short_continuations, monkeypatch):
    """The printed figure and its error are within the printed bound, or the verdict says that they are not."""
    first = verify(smollm, smollm_flp["q8_0"], tokens=128)
    figure = first.kld_added + first.kld_added_error
    for factor, within in ((1.01, True), (0.99, False)):
        monkeypatch.setattr(sys.modules["gguf_firstlayer.verify"], "MAX_KLD", factor * figure)
        result = verify(smollm, smollm_flp["q8_0"], tokens=128)
        assert verify_summary(result)[-1] == ("within bounds" if within else "outside of bounds")
        assert bool(result.problems) != within


def test_a_text_that_is_too_short_for_what_was_asked(smollm, smollm_flp, tmp_path):
    text = tmp_path / "text"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 5)
    words = ("verify", smollm, smollm_flp["q8_0"], "--text", text)
    done = cli(*words, "--tokens", 1024)
    assert "the text has 51 tokens, not 1,024: give a longer one with --text" in done.stderr
    assert "24 tokens scored, of 51 of the text" in done.stdout
    assert "not 4,096" not in cli(*words).stderr


def test_verify_of_embeddings(archs, tmp_path):
    """A model without logits: its rows and its embeddings. Fails if its output is not looked at."""
    source = archs / "gemma-embedding-dense.gguf"
    converted = convert(source, tmp_path / "x.gguf", type="q8_0").output
    result = verify(source, converted)
    assert (result.problems, result.pooling, result.rows_same) == ([], "mean", 1.0)
    assert 0.999 < result.cosine_min < 1
    coarse = convert(source, tmp_path / "y.gguf", type="q2_k").output
    assert "convert with wider types" in verify(source, coarse).problems[0]
    assert "there is no KL divergence" in refusal(cli("verify", source, converted, "--max-kld", "1e-3"))
    assert "put --cache after the model" in cli("verify", "--cache", source).stderr


def test_verify_refuses(llama, llama_flp, tmp_path):
    short, binary = tmp_path / "short", tmp_path / "binary"
    short.write_text("a")
    binary.write_bytes(b"\xff\xfe\xfd")
    for arguments, words in (
        ((llama, llama), "is not converted"),
        ((llama_flp, llama_flp), "is itself converted"),
        ((llama, tmp_path / "none.gguf"), "cannot be read"),
        ((llama, llama_flp, "--tokens", 3), "too few"),
        ((llama, llama_flp, "--tokens", -3), "not a valid number of tokens"),
        ((llama, llama_flp, "--text", binary), "UTF-8"),
        ((llama, llama_flp, "--text", tmp_path / "none"), "No such file"),
    ):
        done = cli("verify", *arguments)
        assert words in refusal(done)
        assert done.returncode == 2


#
# bench
#


def test_intervals_hold_the_truth():
    """Loads differ by 2 %, blocks of a load by 5 %: an interval that ignores the loads is right in half of the cases."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        result = ratio([1.03 * np.exp(rng.normal(0, 0.02) + rng.normal(0, 0.05, 30)) for _ in range(6)])
        held += result.low <= 1.03 <= result.high
    assert 0.91 <= held / 400 <= 0.985  # 95 %, give or take three standard errors


def test_verdicts():
    """No winner if the interval contains 1, and no gain beyond what is possible. The second to fourth cases were observed."""

    def found(low: float, value: float, high: float, bound: float) -> str:
        return verdict(Ratio(value, low, high), bound)

    assert found(0.98, 1.001, 1.02, 1.05) == UNKNOWN
    assert found(1.0091, 1.0168, 1.0239, 1.0036) == IMPOSSIBLE
    assert found(1.015, 1.157, 1.314, 1.036) == IMPOSSIBLE
    assert found(1.0479, 1.0682, 1.0872, 1.0556) == LIMITED
    assert found(1.01, 1.03, 1.05, 1.036) == FASTER
    assert found(0.93, 0.95, 0.97, 1.036) == SLOWER
    assert found(0.99, 1.2, 1.4, 1.036) == UNKNOWN


def loads(waited: Callable[[int, int], float], gain: float = 1.02) -> list[Load]:
    """6 loads of 20 rounds; waiting slows down the source's blocks, but by luck not the converted model's."""
    rng, made = np.random.default_rng(0), []
    for i in range(6):
        waits = np.array([waited(i, j) for j in range(20)])
        times = np.exp(rng.normal(0, 0.002, (20, 2))) * [1, 1 / gain]
        times[:, 0] *= 1 + 5 * waits
        made.append(Load(times, waits))
    return made


def test_disturbed_blocks_are_left_out():
    """Fails if the effect of other work on blocks is counted as a gain."""
    cell = _cell(1, 0, loads(lambda _, j: 0.1 if j % 2 else 0.0), 1.05)
    assert cell.disturbed == 0.5
    assert cell.rounds == 60
    assert cell.ratio.low < 1.02 < cell.ratio.high < 1.03
    assert cell.verdict == FASTER
    assert cell.realised == pytest.approx(0.4, abs=0.05)
    assert cell.converted / cell.source == pytest.approx(cell.ratio.value)

    one_load = _cell(1, 0, loads(lambda i, _: 0.5 if i == 3 else 0.0), 1.05)
    assert one_load.verdict == FASTER
    assert one_load.ratio.high < 1.03


def test_no_verdict_on_a_busy_machine():
    cell = _cell(1, 0, loads(lambda _, j: 0.0 if j == 7 else 0.1), 1.8)
    assert cell.verdict == BUSY
    assert cell.realised is None
    assert cell.rounds == 120


def test_busy_machine(smollm, smollm_flp):
    """Two busy loops per processor leave the models a third of the time at most."""
    with contextlib.ExitStack() as stack:
        for _ in range(2 * len(os.sched_getaffinity(0))):
            loop = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(loop.kill)
        result = bench(smollm, smollm_flp["q8_0"], batches=(1,), loads=2, seconds=1, resources=False)
    (cell,) = result.cells
    assert cell.disturbed > 0.9
    assert cell.verdict == BUSY
    assert "no verdict" in "".join(summary(result))


def test_tokens_are_those_of_a_text(smollm):
    """Tokens repeat as often as in a text; random ids are used only on request."""
    tokens = _tokens(False, smollm)
    with analyse(smollm) as analysis:
        text = analysis.tokenize((ROOT / "gguf_firstlayer" / "sample.txt").read_text())
    assert np.array_equal(tokens, text[: len(tokens)])
    assert len(np.unique(tokens)) < 0.7 * len(tokens)
    chance = _tokens(True, smollm)[:512]
    assert len(np.unique(chance)) > 500


def test_constants_instead_of_lookups(llama, llama_flp):
    """With constants, the model computes what it would if the token at place i had the sites of token i."""
    token = 100
    with Analysis(llama) as analysis:
        exact = analysis.rows([0, token])
        with InMemoryDecoder(llama, analysis, 16) as trial:
            starts = np.cumsum([0] + [-(-site.width // 4) * 4 for site in analysis.sites])
            ends = np.cumsum([site.width for site in analysis.sites])

            def logits(rows):
                for site, start, end in zip(analysis.sites, starts, ends, strict=False):
                    trial.rows[token, start : start + site.width] = rows[end - site.width : end]
                trial.keep(0)
                return next(trial.decode([token])).copy()

            replaced, right = logits(exact[0]), logits(exact[1])
    with Decoder(llama_flp, 16, 16, constants=True) as run:
        limit = next(run.decode([token])).copy()
    assert np.abs(limit - replaced).max() < 1e-4 < np.abs(limit - right).max()


def test_bench(smollm, smollm_flp, short_blocks):
    processors = os.sched_getaffinity(0)
    result = bench(smollm, smollm_flp["q8_0"], batches=(1, 8), contexts=(0, 64), limit=True, loads=2, seconds=0)
    assert [(cell.batch, cell.context) for cell in result.cells] == [(1, 0), (8, 0), (1, 64), (8, 64)]
    outline = of_file(smollm)
    kinds = {site: fitting(_q8_0(), site.width) for site in outline.sites}
    for cell in result.cells:
        assert cell.bound == bound(outline, kinds, cell.batch)
        assert cell.limit.low < cell.limit.value < cell.limit.high
        assert 0 < cell.of_limit.value < 2
        assert cell.source > 1
    assert os.sched_getaffinity(0) == processors  # pinning is undone
    if sys.platform == "linux":
        taken = result.resources
        assert result.resources_source.tables == 0
        assert taken.tables > 40e6
        assert taken.rows_touched <= taken.tables_mapped
        assert taken.resident <= taken.peak
        # of the tables, only the rows looked up are read
        weights = taken.file - taken.tables
        assert weights < taken.resident_files < weights + taken.tables_mapped + 16e6
    assert "of that" in "".join(summary(result))


def _q8_0():
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType.Q8_0


def test_bounds_of_batches(smollm):
    outline = of_file(smollm)
    kinds = {site: _q8_0() for site in outline.sites}
    plan = estimate(outline, kinds)
    assert bound(outline, kinds, 1) == plan.decode_bound
    assert bound(outline, kinds, outline.n_batch) == pytest.approx(plan.prefill_bound)


def test_bench_from_the_command_line(llama, llama_flp, tmp_path):
    done = cli(
        "bench",
        llama,
        llama_flp,
        "--batch",
        "1,4",
        "--context",
        "8",
        "--threads",
        1,
        "--json",
        "--limit",
        "--plot",
        tmp_path / "plots",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [cell["batch"] for cell in result["cells"]] == [1, 4]
    assert result["threads"] == 1
    assert result["cells"][0]["limit"]  # --limit is the former name of --ceiling
    (plot,) = (tmp_path / "plots").iterdir()
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", CANDIDATES)
def test_candidates_can_be_measured(kind):
    """Fails if `auto` announces a type that it cannot choose, since nothing reads it back."""
    rows = np.random.default_rng(1).normal(0, 1, (4, 256)).astype(np.float32)
    assert 0 <= np.abs(dequantize(library().quantize(rows, kind), kind) - rows).mean() < 1


def test_each_size_is_measured_once(llama, llama_flp, short_blocks, monkeypatch):
    """Fails if what is given twice counts as more loads."""
    module, measured = sys.modules["gguf_firstlayer.bench"], []
    take_turns = module.take_turns
    monkeypatch.setattr(module, "take_turns", lambda *arguments: measured.append(arguments[2:4]) or take_turns(*arguments))
    result = bench(llama, llama_flp, batches=np.array([1, 2, 1]), contexts=[0, 0], loads=2, seconds=0.01, resources=False)
    assert [(cell.batch, cell.context) for cell in result.cells] == [(1, 0), (2, 0)]
    assert measured == 2 * [(1, 0), (2, 0)]
    assert json.loads(to_json(result))["cells"][0]["batch"] == 1


def test_bench_of_no_cache(archs, llama):
    """Fails if a model is compared with itself."""
    for source, cache in ((archs / "gpt2-dense.gguf", "auto"), (llama, 0.0001)):
        with pytest.raises(FirstLayerError, match="has no row cache of this size"):
            bench(source, cache=cache, batches=[1], loads=2, seconds=0.1, resources=False)


def test_bench_refuses(llama, llama_flp, smollm, tmp_path):
    for arguments, words in (
        ((llama, llama), "is not converted"),
        ((smollm, llama_flp), "not converted from this source"),
        ((llama, llama_flp, "--batch", "0"), "at least one token"),
        ((llama, llama_flp, "--threads", "-1"), "not a valid number of threads"),
        ((llama, llama_flp, "--context", "2000000"), "is too long for a batch or a context"),
        ((llama, llama_flp, "--context", "1000000"), "has a context of"),
    ):
        assert words in refusal(cli("bench", *arguments))
    for arguments in ({"threads": 100_000}, {"threads": -1}, {"seconds": math.nan}, {"batches": []}, {"contexts": []}):
        with pytest.raises(UsageError):
            bench(llama, llama_flp, **arguments)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells which pages are mapped")
def test_loading_reads_no_tables(smollm_flp):
    """By default llama.cpp maps all of a file that has no tensor above 4 GiB."""
    code = (
        "import sys; from pathlib import Path; from gguf_firstlayer.resources import mapped;"
        "from gguf_firstlayer.decoder import Decoder; from gguf_firstlayer.source import Source;"
        "path = Path(sys.argv[1]); place = Source(path).place('firstlayer.0.table');"
        "run = Decoder(path, 16, 16); before = mapped(*place); run.time([7], 1); print(before, mapped(*place))"
    )
    done = subprocess.run([sys.executable, "-c", code, smollm_flp["f32"]], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    # with a touched page, Linux also maps those around it, up to 2 MiB
    assert before == 0 < after <= 2 * 2**21


#
# counts
#


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells which pages were accessed")
def test_decoding_reads_what_the_plan_says(smollm, smollm_flp, measured):
    outline = of_file(smollm)
    plan = estimate(outline, {site: _q8_0() for site in outline.sites})
    before, after = bytes_read(smollm), bytes_read(smollm_flp["q8_0"])
    # pages count as a whole, and norms are next to matrices
    assert before == pytest.approx(plan.decode_bytes_without, abs=16 * 4096)
    assert after == pytest.approx(plan.decode_bytes_with, abs=16 * 4096)
    assert before - after == pytest.approx(plan.decode_bytes_without - plan.decode_bytes_with, abs=4 * 4096)
    measured(f"SmolLM2 reads {before:,} bytes per token, converted {after:,}")


@pytest.mark.skipif(platform.machine() != "x86_64" or not COUNTED.exists() or not can_count(), reason="needs valgrind, x86-64")
@pytest.mark.parametrize("parallel", [False, True])
def test_instructions_fall_as_the_plan_says(parallel, tmp_path, measured):
    code = (
        "import sys, study; from pathlib import Path;"
        f"entry = study.synthetic(2, 512, 256, {parallel});"
        "study.write_model(entry, Path(sys.argv[1]), study.Type.Q4_K)"
    )
    source = tmp_path / "model.gguf"
    subprocess.run([sys.executable, "-c", code, source], env=PATHS, check=True, capture_output=True)
    converted = convert(source, tmp_path / "model-flp.gguf").output
    outline = of_file(source)
    total = sum(outline.products(use) for use in outline.uses)
    gone = sum(outline.products(use) for use in outline.replaced(outline.sites))
    before, after = instructions(source), instructions(converted)
    # the other instructions, for attention, norms and rounding of activations, stay
    assert 0.75 * gone / total < 1 - after / before < 1.05 * gone / total
    name = "parallel" if parallel else "serial"
    measured(
        f"2 {name} layers: {before:,.0f} instructions per token become {after:,.0f} ({after / before - 1:.1%}),"
        f" products {-gone / total:.1%}"
    )
