"""Files that the converter writes, and the commands around it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGUFReader
from support.builds import ROOT
from support.command_line import cli
from support.models import convert, rewrite

from gguf_firstlayer import FirstLayerError, file_format, inspect, paths
from gguf_firstlayer.c_api import library
from gguf_firstlayer.file_format import fitting, layout
from gguf_firstlayer.runtime import Analysis


def raw(reader: GGUFReader) -> dict[str, bytes]:
    """Bytes of each tensor's data."""
    return {t.name: reader.data[t.data_offset : t.data_offset + t.n_bytes].tobytes() for t in reader.tensors}


def keys(reader: GGUFReader) -> dict[str, bytes]:
    """Bytes of each key's value, type included."""
    return {
        name: b"".join(part.tobytes() for part in field.parts)
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }


@pytest.mark.parametrize("keep_weights", [False, True])
def test_everything_else_is_copied(keep_weights, smollm, tmp_path):
    result = convert(smollm, tmp_path / "x.gguf", keep_weights=keep_weights)
    source, output = GGUFReader(smollm), GGUFReader(result.output)

    before, after = keys(source), keys(output)
    assert {name: value for name, value in after.items() if not name.startswith("firstlayer.")} == before

    before, after = raw(source), raw(output)
    projections = {"blk.0.attn_norm.weight", "blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight"}
    assert {weight.name for weight in result.elided} == (set() if keep_weights else projections)
    assert set(before) - set(after) == {weight.name for weight in result.elided}
    assert {name: value for name, value in after.items() if not name.startswith("firstlayer.")} == {
        name: before[name] for name in after if name in before
    }
    assert result.output_bytes == result.output.stat().st_size


def test_default_output_and_json(llama, tmp_path):
    source = tmp_path / "some.model.gguf"
    source.write_bytes(llama.read_bytes())
    done = cli("convert", source, "--type", "q8_0", "--json")
    report = json.loads(done.stdout)
    assert Path(report["output"]) == tmp_path / "some.model-flp.gguf"
    assert report["tables"][0]["type"] == "q8_0"

    seen = json.loads(cli("inspect", report["output"], "--json").stdout)
    assert seen["sites"] == report["sites"]
    assert seen["tables"] == report["tables"]
    assert [weight["name"] for weight in seen["elided"]] == [weight["name"] for weight in report["elided"]]


def test_inspect_reads_what_convert_wrote(smollm_flp, smollm):
    plain, converted = inspect(smollm), inspect(smollm_flp["q8_0"])
    assert not plain.converted
    assert converted.converted
    assert [(s.name, s.recipe, s.width) for s in plain.sites] == [(s.name, s.recipe, s.width) for s in converted.sites]
    assert plain.elidable == sorted(weight.name for weight in converted.elided)
    assert [(t.type.name, t.width, t.rows) for t in converted.tables] == [("Q8_0", 960, 49152)]
    text = cli("inspect", smollm_flp["q8_0"]).stdout
    assert "mul_mat(blk.0.attn_q.weight, mul(rms_norm[eps=1e-05](get_rows(token_embd.weight, tokens))" in text


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q4_0", "q6_k"])
def test_table_types(kind, smollm, tmp_path):
    """A table holds the rows that the library computes, as gguf-py dequantizes them."""
    result = convert(smollm, tmp_path / "x.gguf", type=kind)
    ids = [0, 1, 777, 49151]
    with Analysis(smollm) as analysis:
        rows = dict(zip((site.name for site in analysis.sites), np.split(analysis.rows(ids), [576, 768], axis=1), strict=True))
    tensors = {t.name: t for t in GGUFReader(result.output).tensors}
    for site in result.sites:
        tensor = tensors[result.tables[site.table].name]
        stored = gguf.quants.dequantize(tensor.data[ids], tensor.tensor_type)[:, site.column : site.column + site.width]
        error = np.abs(stored - rows[site.name]).max() / np.abs(rows[site.name]).max()
        assert error < {"f32": 1e-30, "f16": 1e-3, "bf16": 1e-2, "q8_0": 1e-2, "q6_k": 5e-2, "q4_0": 2e-1}[kind]
    if kind == "q6_k":  # blocks of 256 do not fit any projection of this model
        assert {table.type.name for table in result.tables} == {"Q8_0"}


def test_rows_do_not_depend_on_their_batch(smollm):
    """Chunks of any size give the same bits, so a table does not depend on how it was cut."""
    ids = np.random.default_rng(0).integers(0, 49152, 700)
    with Analysis(smollm, n_batch=512) as big, Analysis(smollm, n_batch=3) as small:
        assert np.array_equal(big.rows(ids), small.rows(ids))
        assert np.array_equal(big.rows(ids)[100:101], big.rows(ids[100:101]))


def test_blocks_do_not_mix_sites(archs):
    """Sites whose width is not a multiple of the block get a table of their own."""
    with Analysis(archs / "falcon-h1-dense.gguf") as analysis:
        kinds = {site: fitting(gguf.GGMLQuantizationType.Q8_0, site.width) for site in analysis.sites}
        tables, placed = layout(analysis.sites, kinds, analysis.n_vocab)
    assert [(table.type.name, table.width) for table in tables] == [("Q8_0", 2304), ("F16", 4)]
    assert [(site.width, number, column) for site, number, column in placed][-2:] == [(512, 0, 1792), (2, 1, 0)]


def test_small_products_make_no_large_tables(archs, tmp_path):
    """A product with a head's key projection, which has 128 inputs, is worth its table for 128 tokens but not for 200,000."""
    n_vocab = 200_000
    lists = {"tokens": [str(i) for i in range(n_vocab)], "scores": [0.0] * n_vocab, "token_type": [1] * n_vocab}
    keys = {f"tokenizer.ggml.{name}": values for name, values in lists.items()} | {"deepseek2.vocab_size": n_vocab}

    def grown(name: str, data: np.ndarray) -> np.ndarray:
        if name == "blk.0.attn_k_b.weight":
            return data.astype(np.float16)
        return np.zeros((n_vocab, data.shape[1]), np.float16) if name in ("token_embd.weight", "output.weight") else data

    source = archs / "deepseek2-moe.gguf"
    large = rewrite(source, tmp_path / "large.gguf", lambda name, value: keys.get(name, value), grown)
    names = []
    for path in (source, large):
        with Analysis(path) as analysis:
            names.append([site.name for site in analysis.sites])
    assert "q_nope_absorbed-0" in names[0]
    assert "q_nope_absorbed-0" not in names[1]
    assert "q-0" in names[1]


def test_a_file_that_would_not_load_is_not_written(llama, tmp_path, monkeypatch):
    """If recipes ever differ between conversion and loading, the converter notices, not the user."""
    metadata = file_format.metadata

    def differing(sites, *others):
        return metadata([replace(site, recipe=f"not {site.recipe}") for site in sites], *others)

    monkeypatch.setattr(file_format, "metadata", differing)
    with pytest.raises(FirstLayerError, match=r"x\.gguf would not load, so it was not written.*no node of the graph matches"):
        convert(llama, tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())


def test_sites_are_aligned(archs):
    """Kernels read rows in vectors of four floats, so each site begins at a multiple of 16 bytes."""
    with Analysis(archs / "qwen35-dense.gguf") as analysis:
        kinds = dict.fromkeys(analysis.sites, gguf.GGMLQuantizationType.F32)
        tables, placed = layout(analysis.sites, kinds, analysis.n_vocab)
        assert [site.width for site in analysis.sites] == [768, 2, 2, 256]
    assert [column for _, _, column in placed] == [0, 768, 772, 776]
    assert tables[0].width == 1032


def test_fingerprint_changes_with_the_weights(llama, tmp_path):
    prints = {site.name: site.fingerprint for site in convert(llama, tmp_path / "a.gguf").sites}
    changed = tmp_path / "changed.gguf"
    data = bytearray(llama.read_bytes())
    tensor = next(t for t in GGUFReader(llama).tensors if t.name == "blk.0.attn_q.weight")
    data[tensor.data_offset] ^= 1
    changed.write_bytes(data)
    again = {site.name: site.fingerprint for site in convert(changed, tmp_path / "b.gguf").sites}
    assert again["Qcur-0"] != prints["Qcur-0"]
    assert again["Kcur-0"] == prints["Kcur-0"]


def test_conversion_is_deterministic(llama, tmp_path):
    a, b = (convert(llama, tmp_path / name).output.read_bytes() for name in ("a.gguf", "b.gguf"))
    assert a == b


def test_source_is_only_read(llama, tmp_path):
    source = tmp_path / "x.gguf"
    source.write_bytes(llama.read_bytes())
    source.chmod(0o400)
    before = source.stat()
    convert(source)
    assert source.stat().st_mtime_ns == before.st_mtime_ns
    assert source.read_bytes() == llama.read_bytes()


def test_paths():
    lines = dict(line.split(": ", 1) for line in cli("paths").stdout.splitlines())
    assert lines == json.loads(cli("paths", "--json").stdout) == {name: str(path) for name, path in paths().items()}
    assert {
        "libllama",
        "main",
        "cli",
        "server",
        "bench",
        "perplexity",
        "quantize",
        "gguf-split",
        "imatrix",
        "rpc-server",
    } <= set(lines)
    assert all(Path(path).exists() for path in lines.values())
    assert (ROOT / "main").samefile(lines["main"])


def test_quantizer_is_ggmls(smollm):
    rows = np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32)
    ours = library().quantize(rows, gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(ours, gguf.quants.quantize(rows, gguf.GGMLQuantizationType.Q8_0))
