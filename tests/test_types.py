"""Types of tables, and their choice by measurement."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from support.builds import PATCHED, ROOT, compare, run
from support.command_line import cli, refusal
from support.figures import divergence, log_softmax
from support.models import convert, rewrite

import gguf_firstlayer
from gguf_firstlayer import FirstLayerError, auto, inspect
from gguf_firstlayer.c_api import library
from gguf_firstlayer.file_format import TYPES, fitting
from gguf_firstlayer.memory import memory_limit
from gguf_firstlayer.runtime import Analysis, analyse
from gguf_firstlayer.source import Source


def quantize(source: Path, target: Path, kind: str, *options: str) -> Path:
    """Quantize with llama.cpp's own tool."""
    subprocess.run(
        [PATCHED / "llama-quantize", "--allow-requantize", *options, source, target, kind], check=True, capture_output=True
    )
    return target


@pytest.fixture(scope="session")
def smollm_f16(smollm, tmp_path_factory) -> Path:
    """The real model in F16, whose kernels do not round activations to 8 bits: small changes have small effects."""
    return quantize(smollm, tmp_path_factory.mktemp("f16") / "smollm.gguf", "f16")


@pytest.fixture(scope="session")
def effects(smollm_f16):
    with analyse(smollm_f16) as analysis, auto.Effects(smollm_f16, analysis) as effects:
        yield effects


@pytest.mark.parametrize("kind", TYPES)
def test_lookups_read_every_type(kind, llama, llama_flp, tmp_path):
    """With tables of any type, a model computes the same as with F32 tables of the rows that gguf-py reads from them."""
    stored = convert(llama, tmp_path / "stored.gguf", type=kind)
    assert [table.type.name.lower() for table in stored.tables] == [kind]
    (table,) = (t for t in GGUFReader(stored.output).tensors if t.name == "firstlayer.0.table")
    if kind == "q1_0":  # gguf-py does not know it: a scale, and a sign for each of 128 values
        blocks = table.data.reshape(-1, 18)
        signs = 2.0 * np.unpackbits(np.ascontiguousarray(blocks[:, 2:]), axis=1, bitorder="little") - 1
        rows = (np.ascontiguousarray(blocks[:, :2]).view(np.float16) * signs).reshape(128, -1).astype(np.float32)
    else:
        rows = gguf.quants.dequantize(table.data, table.tensor_type).reshape(128, -1).astype(np.float32)
    same = rewrite(llama_flp, tmp_path / "same.gguf", change_tensor=lambda name, data: rows if "table" in name else data)
    job = {"run": "logits", "tokens": {"count": 50, "seed": 1}, "batches": [50]}
    ours, theirs = (result[50] for result in run(PATCHED, job | {"model": stored.output}, job | {"model": same}))
    assert np.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    if kind != "f32":
        (exact,) = run(PATCHED, job | {"model": llama_flp})
        assert not np.array_equal(ours, exact[50])


@pytest.mark.parametrize("kind", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "tq1_0", "tq2_0"])
def test_fallback_is_llama_quantizes(kind, archs, tmp_path):
    """A type whose blocks do not divide the columns is replaced in the same way as by llama-quantize."""
    small = quantize(archs / "apertus-dense.gguf", tmp_path / "small.gguf", kind, "--pure")
    (tensor,) = (t for t in GGUFReader(small).tensors if t.name == "blk.1.attn_q.weight")
    assert int(tensor.shape[0]) == 128
    assert fitting(TYPES[kind], 128) == tensor.tensor_type
    assert fitting(TYPES[kind], 256) == TYPES[kind]
    assert fitting(TYPES[kind], 100) == GGMLQuantizationType.F16


def test_fallback_is_said(smollm, tmp_path):
    done = cli("convert", smollm, "-o", tmp_path / "x.gguf", "--type", "q6_k")
    assert "Qcur-0: q8_0, as the blocks of the requested type do not divide its width" in done.stdout
    assert {table.type.name for table in inspect(tmp_path / "x.gguf").tables} == {"Q8_0"}


@pytest.mark.parametrize("kind", ["q8_0", "q4_k", "iq2_xxs", "f16"])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_rows_are_quantized_alike_in_any_number(kind, n):
    """Threads share the rows; the bytes of a row do not depend on how."""
    rows = np.random.default_rng(0).standard_normal((n, 512), np.float32)
    together = library().quantize(rows, TYPES[kind])
    assert np.array_equal(together, np.concatenate([library().quantize(row[None], TYPES[kind]) for row in rows]))


def test_values_that_a_type_cannot_hold(llama, tmp_path):
    """F16 ends at 65504; a table must not hold infinities."""
    large = rewrite(
        llama, tmp_path / "large.gguf", change_tensor=lambda name, data: data * np.float32(1e8) if "0.attn_k" in name else data
    )
    with pytest.raises(FirstLayerError, match=r"has values that f16 cannot hold; convert with a wider type, like f32"):
        convert(large, tmp_path / "x.gguf", type="f16")
    assert {path.name for path in tmp_path.iterdir()} == {"large.gguf"}
    assert convert(large, tmp_path / "x.gguf", type="f32").output.exists()


def test_measurement_is_that_of_the_file(smollm_f16, effects, tmp_path):
    """A measurement with rows in memory is the difference of the stock library on the source and ours on a converted file."""
    converted = convert(smollm_f16, tmp_path / "flp.gguf", type="q4_0")
    with Analysis(smollm_f16) as analysis:
        kinds = dict.fromkeys(analysis.sites, GGMLQuantizationType.Q4_0)
        told = auto.measure(effects, kinds, 1e-4)
    job = {"run": "logits", "tokens": effects.tokens.tolist(), "batches": [128], "flash_attn": 0}
    ((stock, ours),) = compare(smollm_f16, converted.output, job)
    mean, _, agreement = divergence(stock[128], ours[128])
    assert told.kld == pytest.approx(mean, rel=0.01)
    assert told.top1 == pytest.approx(agreement, abs=0.005)
    for logits, perplexity in ((stock[128], told.perplexity_source), (ours[128], told.perplexity)):
        loss = -log_softmax(logits)[np.arange(len(logits) - 1), effects.tokens[1:]].mean()
        assert perplexity == pytest.approx(np.exp(loss), rel=1e-4)


def test_enlarged_errors_tell_the_true_effect(effects):
    """Where the model's own noise is small, the effect can be measured directly: enlarged errors give the same."""
    for kind in (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q5_1):
        errors = auto.table_errors(effects, dict.fromkeys(effects.exact, kind))
        direct, _ = effects.rise(errors, 1)
        enlarged, error = effects.rise(errors, auto.ENLARGED)
        assert enlarged == pytest.approx(direct, rel=0.25)
        assert error < 0.2 * enlarged


def test_no_error_has_no_effect(effects):
    result = auto.measure(effects, dict.fromkeys(effects.exact, GGMLQuantizationType.F32), 1e-4)
    assert (result.kld, result.kld_tables, result.kld_tables_error, result.top1) == (0, 0, 0, 1)
    assert result.perplexity == result.perplexity_source


def reference(trial):
    return np.concatenate(trial._reference)


def test_the_model_in_memory_is_the_source(smollm, smollm_f16, effects):
    """The reference is the stock library's output, bit for bit."""
    job = {"run": "logits", "tokens": effects.tokens.tolist(), "batches": [128], "flash_attn": 0}
    ((stock, _),) = compare(smollm_f16, smollm_f16, job)
    shifted = stock[128] - stock[128].max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    assert np.array_equal(effects._trial.call(reference), shifted)


def test_cheapest_is_the_best():
    """Compared with all combinations."""
    rng = np.random.default_rng(1)
    for _ in range(50):
        ladders = {}
        for site in range(4):
            width, sensitivity = int(rng.integers(1, 20)), 10 ** rng.uniform(-3, 1)
            bits = (4, 5, 6, 8, 16, 32)
            steps = [auto._Step(f"{site}/{n}", width * n, sensitivity * 4.0**-n) for n in bits[:-1]]
            ladders[site] = [*steps, auto._Step(f"{site}/32", width * 32, 0.0)]
        bound = 10 ** rng.uniform(-6, -2)
        steps = {step.kind: step for ladder in ladders.values() for step in ladder}
        chosen = [steps[kind] for kind in auto._cheapest(ladders, bound).values()]
        assert sum(step.kld for step in chosen) <= bound
        best = min(
            sum(step.row_bytes for step in combination)
            for combination in itertools.product(*ladders.values())
            if sum(step.kld for step in combination) <= bound
        )
        assert sum(step.row_bytes for step in chosen) == best


def test_auto_is_the_default(smollm, tmp_path):
    """Types are chosen by measurement, and the file records it. The growth is announced before anything is measured."""
    output = tmp_path / "x.gguf"
    done = cli("convert", smollm, "-o", output, "--json")
    announced, measuring, _ = done.stderr.splitlines()
    match = re.fullmatch(r"x.gguf: size \+([\d.]+) MiB .* to \+([\d.]+) MiB .*, with q8_0 tables \+47.5 MiB .*", announced)
    assert match, announced
    assert measuring.startswith("measuring on 512 tokens: ")
    grown = (output.stat().st_size - smollm.stat().st_size) / 2**20
    assert float(match[1]) <= grown <= float(match[2]) + 0.1
    report = json.loads(done.stdout)
    assert report["measurement"]["max_kld"] == 1e-4
    assert report["measurement"]["kld_tables"] + report["measurement"]["kld_tables_error"] <= 1e-4
    assert sum(table["rows"] * table["width"] for table in report["tables"]) == 960 * 49152
    told = json.loads(cli("inspect", output, "--json").stdout)["measurement"]
    assert told == pytest.approx(report["measurement"], rel=1e-6)
    text = cli("inspect", output).stdout
    words = "KL divergence over the 512 tokens of the built-in sample: .* nats, of which .* from the tables"
    assert re.search(rf"{words} \(bound 0.0001\)", text)


def test_the_same_types_are_chosen_twice(llama, tmp_path):
    outputs = [gguf_firstlayer.convert(llama, tmp_path / name).output for name in ("a.gguf", "b.gguf")]
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


@pytest.mark.parametrize(("max_kld", "expected"), [("1", 4.6), ("1e-9", 16)])
def test_bound_decides(max_kld, expected, smollm_f16, tmp_path):
    """A loose bound selects narrow types, a strict one wide types."""
    result = json.loads(cli("convert", smollm_f16, "-o", tmp_path / "x.gguf", "--max-kld", max_kld, "--json").stdout)
    bits = [8 * table.bytes / (table.width * table.rows) for table in inspect(result["output"]).tables]
    assert max(bits) <= expected if expected < 8 else min(bits) >= expected
    assert result["measurement"]["kld_tables"] + result["measurement"]["kld_tables_error"] <= float(max_kld)


@pytest.mark.parametrize("bound", ["-1", "nan", "inf"])
def test_bounds_that_are_none(bound, llama, tmp_path):
    done = cli("convert", llama, "-o", tmp_path / "x.gguf", f"--max-kld={bound}")
    assert "is not a bound on the KL divergence" in refusal(done)


def test_sites_have_types_of_their_own(archs, tmp_path, monkeypatch):
    """A file whose sites have different types runs, and differs little from its source."""
    source = archs / "llama-dense.gguf"
    with Analysis(source) as analysis:
        names = dict(zip(sorted(site.name for site in analysis.sites), ("q4_0", "q8_0", "f16"), strict=True))

    def choose(_model, analysis, _max_kld):
        return {site: TYPES[names[site.name]] for site in analysis.sites}, None, ""

    monkeypatch.setattr(auto, "choose", choose)
    result = convert(source, tmp_path / "x.gguf", type="auto")
    assert {site.name: result.tables[site.table].type.name.lower() for site in result.sites} == names
    job = {"run": "logits", "tokens": {"count": 100, "seed": 1}, "batches": [100]}
    ((stock, ours),) = compare(source, result.output, job)
    mean, _, _ = divergence(stock[100], ours[100])
    assert 0 < mean < 1e-3


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("t5-dense", "a model with an encoder has no next-token distribution of its own"),
        ("nomic-bert-dense", "has no next-token distribution"),
    ],
)
def test_what_cannot_be_measured(name, reason, archs, tmp_path):
    done = cli("convert", archs / f"{name}.gguf", "-o", tmp_path / "x.gguf")
    assert done.returncode == 0, done.stderr
    assert re.search(rf"types were not measured: .*{reason}", done.stdout)
    assert {table.type.name for table in inspect(tmp_path / "x.gguf").tables} == {"Q8_0"}


def test_large_vocabularies_are_measured_on_shorter_texts(llama, tmp_path, monkeypatch):
    """The logits of the text are held. Fails if they are for all of its tokens, however large the vocabulary."""
    monkeypatch.setattr(auto, "TEXT_BYTES", 100 * 4 * 128)  # of a model with 128 tokens
    measured = gguf_firstlayer.convert(llama, tmp_path / "x.gguf").measurement
    assert measured.tokens == 100


def test_a_model_larger_than_memory_is_not_measured(llama, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda _name: 100)
    with Analysis(llama) as analysis:
        kinds, measurement, reason = auto.choose(Source(llama), analysis, 1e-4)
    assert measurement is None
    assert "more memory than there is" in reason
    assert set(kinds.values()) == {GGMLQuantizationType.Q8_0}


@pytest.mark.parametrize(
    ("line", "files", "expected"),
    [
        ("0::/a/b", {"a/memory.max": "3000", "a/b/memory.max": "max"}, 3000),
        ("0::/", {"memory.max": "4000"}, 4000),
        ("5:cpu,memory:/x", {"memory/x/memory.limit_in_bytes": "2000"}, 2000),
        ("5:cpu:/x", {}, None),
        ("0::/../outside", {}, None),
    ],
)
def test_memory_of_a_container(line, files, expected, tmp_path):
    """A container may have less than the machine."""
    (tmp_path / "cgroup").write_text(line + "\n")
    for name, value in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(value + "\n")
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert memory_limit(tmp_path / "cgroup", tmp_path / "groups") == (expected or physical)


def test_sample_is_long_enough(smollm):
    with Analysis(smollm) as analysis:
        assert len(auto.sample_tokens(analysis)) == auto.N_TOKENS
    assert (ROOT / "gguf_firstlayer" / "sample.txt").exists()
