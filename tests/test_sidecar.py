"""Tables in a file of their own, beside a model that is not touched."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from support.builds import PATCHED, STOCK, run, session
from support.command_line import cli, refusal, run_tool, tool
from support.hub import hub
from support.models import convert, rewrite
from support.servers import prompt, serve, server

from gguf_firstlayer import FirstLayerError, bench, inspect, sidecar_overrides, verify
from gguf_firstlayer.c_api import library
from gguf_firstlayer.runtime import Analysis

TABLES = "the first layer comes from tables"

STEPS = [["decode", [[0], {"count": 40, "seed": 1}]], ["decode", [[0], [7, 8]]]]

# plain; parallel block; MLA; an SSM; hybrid with experts; per-layer embeddings, which llama.cpp itself may read lazily
ARCHITECTURES = ["llama-dense", "gptneox-dense", "deepseek2-moe", "mamba-dense", "jamba-dense", "gemma4-dense"]


@pytest.fixture(scope="module")
def sidecar(smollm, tmp_path_factory) -> Path:
    return convert(smollm, tmp_path_factory.mktemp("sidecar") / "smollm_firstlayer.gguf", type="f32", sidecar=True).output


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("load_mode", [0, 1], ids=["read", "mmap"])
def test_same_output_as_stock(name, load_mode, archs, tmp_path):
    """Fails if a table is looked for in the wrong file, or a weight that is not loaded is still read."""
    result = convert(archs / f"{name}.gguf", tmp_path / "x_firstlayer.gguf", type="f32", sidecar=True)
    assert result.elided
    assert {tensor.name for tensor in GGUFReader(result.output).tensors} == {table.name for table in result.tables}
    load = {"sidecar": str(result.output), "load_mode": load_mode}
    ours, theirs = session(result.source, PATCHED, STEPS, load=load), session(result.source, STOCK, STEPS)
    assert all(map(np.array_equal, ours, theirs))
    ((*uses,),) = run(PATCHED, {"run": "uses", "model": result.source, "load": load})
    assert all(used for *_, used in uses)
    assert len(uses) == len(result.sites)


def test_source_in_parts(smollm, tmp_path):
    """The number of the sidecar comes after those of the parts."""
    tool("llama-gguf-split", "--split", "--split-max-size", "60M", smollm, tmp_path / "x")
    (first, *others) = sorted(tmp_path.glob("x-*.gguf"))
    assert others
    result = convert(first, tmp_path / "x_firstlayer.gguf", type="f32", sidecar=True)
    ours = session(first, PATCHED, STEPS, load={"sidecar": str(result.output)})
    assert all(map(np.array_equal, ours, session(smollm, STOCK, STEPS)))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("blk.0.attn_q.bias", "has a tensor that is no table: 'blk.0.attn_q.bias'"),
        ("rope_freqs.weight", "has a tensor that is no table: 'rope_freqs.weight'"),
        ("firstlayer.1.table", "'firstlayer.1.table' is the table of no site"),
    ],
)
def test_only_tables_are_taken(tensor, message, smollm, sidecar, tmp_path):
    """A sidecar comes from somebody else than the model, perhaps: it must not add a bias, or change a rotation."""
    reader = GGUFReader(sidecar)
    (table,) = reader.tensors
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    for name, field in reader.fields.items():
        if name.startswith("firstlayer.") and field.contents() != []:
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    writer.add_tensor(table.name, table.data)
    writer.add_tensor(tensor, np.ones(576, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (error,) = run(PATCHED, {"run": "load", "model": smollm, "load": {"sidecar": str(tmp_path / "x.gguf")}})
    assert message in error


def test_source_is_not_touched(llama, tmp_path):
    source = Path(shutil.copy(llama, tmp_path / "some.model.gguf"))
    source.chmod(0o444)
    before = hashlib.sha256(source.read_bytes()).hexdigest(), source.stat().st_mtime_ns
    done = cli("convert", source, "--sidecar", "--type", "q8_0")
    assert done.returncode == 0, done.stderr
    assert (hashlib.sha256(source.read_bytes()).hexdigest(), source.stat().st_mtime_ns) == before
    output = tmp_path / "some.model_firstlayer.gguf"
    assert f"-m {source} --firstlayer {output}" in done.stdout
    seen = inspect(output)
    assert seen.sidecar
    assert seen.elided


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="asks Linux")
def test_unreachable_weights_are_not_loaded(tmp_path):
    """Oracle: Linux, which says how much of the file is in memory. Fails if unread weights are mapped with the rest."""
    import_module("gguf_firstlayer.llama_cpp")  # the next import runs on it
    from catalogue import CATALOGUE, write_model

    source = tmp_path / "pythia.gguf"
    write_model(CATALOGUE["pythia-70m"], source, GGMLQuantizationType.Q8_0)
    result = convert(source, tmp_path / "pythia_firstlayer.gguf", sidecar=True)
    elided = sum(weight.bytes for weight in result.elided)
    assert elided > 2 << 20
    steps = [["decode", [[0], [1, 2, 3]]], ["mapped", str(source)]]
    plain, without = (session(source, PATCHED, steps, load=load)[1][0] for load in ({}, {"sidecar": str(result.output)}))
    assert plain - without > 0.8 * elided


def test_verify_and_bench(smollm, sidecar, short_blocks, short_continuations):
    found = verify(smollm, sidecar, tokens=64)
    assert not found.problems
    assert found.logit_max == 0
    assert found.rows_same == 1
    result = bench(smollm, sidecar, batches=(1,), loads=2, seconds=0)
    if result.resources:
        assert result.resources.file == smollm.stat().st_size + sidecar.stat().st_size
        assert result.resources.tables_mapped > 0


def test_tools(smollm, sidecar, monkeypatch):
    """--firstlayer, and its environment variable. Fails if they are accepted and do nothing."""
    options = ["-m", smollm, "-t", 1, "-c", 64, "-n", 1, "-p", "x", "-no-cnv"]
    used = "the first layer comes from tables (3 of 3 sites)"
    assert tool("llama-completion", *options, "--firstlayer", sidecar, log=True).count(used) == 1
    assert used not in tool("llama-completion", *options, "-lv", 4, log=True)
    monkeypatch.setenv("LLAMA_ARG_FIRSTLAYER", str(sidecar))
    assert used in tool("llama-completion", *options, log=True)
    monkeypatch.setenv("LLAMA_ARG_FIRSTLAYER", "")  # none
    assert used not in tool("llama-completion", *options, log=True)
    monkeypatch.delenv("LLAMA_ARG_FIRSTLAYER")
    chat = [("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "max_tokens": 16})]
    assert serve(smollm, chat, "--firstlayer", sidecar) == serve(smollm, chat)


@pytest.mark.parametrize("converted", [False, True])
def test_draft_model_has_no_use_for_it(converted, smollm, sidecar, tmp_path):
    """llama.cpp gives the draft the same overrides as the model; the tables do not belong to the draft.

    Fails if the draft cannot be loaded, or takes them: then the model accepts other numbers of its tokens.
    """
    draft = _fine_tuned(smollm, tmp_path / "draft.gguf", "blk.0.attn_norm.weight")
    if converted:
        draft = convert(draft, tmp_path / "draft-flp.gguf", type="f32").output
    options = ["-md", draft, "--spec-type", "draft-simple", "-t", 1, "-c", 64]
    ask = [("/completion", {"prompt": "Once", "n_predict": 16, "temperature": 0})]
    ours, plain = (serve(smollm, ask, *options, *more) for more in (["--firstlayer", sidecar], []))
    assert ours == plain
    assert ours[0]["timings"]["draft_n"] > 0


def _fine_tuned(source: Path, target: Path, weight: str = "blk.0.attn_q.weight") -> Path:
    """A model with another weight, which is F32 in the source."""
    return rewrite(source, target, change_tensor=lambda name, data: data * np.float32(1.5) if name == weight else data)


def test_tables_of_another_model_are_not_used(llama, tmp_path):
    """A fine-tuned model has the same shapes: its output must be its own. Fails if only names and shapes are compared."""
    tables = convert(llama, tmp_path / "x_firstlayer.gguf", type="f32", sidecar=True).output
    other = _fine_tuned(llama, tmp_path / "other.gguf")
    ours, theirs = session(other, PATCHED, STEPS, load={"sidecar": str(tables)}), session(other, STOCK, STEPS)
    assert all(map(np.array_equal, ours, theirs))
    assert "other weights" in cli("verify", other, tables).stdout


@pytest.mark.parametrize("what", ["sidecar", "kept weights"])
def test_all_rows_are_checked_on_request(what, llama, llama_flp, tmp_path):
    """Fails if rows are not compared, or with the wrong ones."""
    option = {"sidecar": True} if what == "sidecar" else {"keep_weights": True}
    tables = convert(llama, tmp_path / "x_firstlayer.gguf", type="q8_0", **option).output

    def spoil(name: str, data: np.ndarray) -> np.ndarray:
        data = data.copy()
        if name == "firstlayer.0.table":
            data[100] = data[50]
        return data

    wrong = rewrite(tables, tmp_path / "wrong.gguf", change_tensor=spoil)

    def load(path: Path) -> str:
        job = {"model": llama, "load": {"sidecar": str(path)}} if what == "sidecar" else {"model": path, "load": {}}
        return run(PATCHED, {"run": "load", **job, "load": job["load"] | {"check": "all"}})[0]

    assert load(tables) == ""
    assert "of token 100 is another one than its weights give" in load(wrong)
    (message,) = run(PATCHED, {"run": "load", "model": llama_flp, "load": {"check": "all"}})
    assert "only be checked with the weights" in message


def test_what_is_no_sidecar(llama, llama_flp, tmp_path):
    """One sentence, and no crash."""
    broken = tmp_path / "broken.gguf"
    tables = convert(llama, tmp_path / "x_firstlayer.gguf", type="f32", sidecar=True).output
    broken.write_bytes(tables.read_bytes()[:-100])
    for file in (llama, llama_flp, broken):
        (failure,) = run(PATCHED, {"run": "load", "model": llama, "load": {"sidecar": str(file)}})
        assert "convert --sidecar wrote" in failure or "not within the file bounds" in failure
    absent = tmp_path / "absent.gguf"
    (failure,) = run(PATCHED, {"run": "load", "model": llama, "load": {"sidecar": str(absent)}})
    assert f"failed to open {absent}: No such file or directory" in failure
    kept = convert(llama, tmp_path / "kept.gguf", type="f32", keep_weights=True).output
    (failure,) = run(PATCHED, {"run": "load", "model": kept, "load": {"sidecar": str(tables)}})
    assert "tables of its own" in failure


def test_refusals(llama, tmp_path):
    tables = convert(llama, tmp_path / "x_firstlayer.gguf", type="f32", sidecar=True).output
    with library().loading(tables), Analysis(llama) as analysis:  # what this thread asks for is no concern of the analysis
        assert analysis.sites
    assert "already converted" in refusal(cli("convert", tables))
    assert "cannot be split" in refusal(cli("convert", llama, "--sidecar", "--split-max-size", "1G"))
    with pytest.raises(FirstLayerError, match="itself converted"):
        verify(tables, llama)
    assert json.loads(cli("inspect", tables, "--json").stdout)["sidecar"]


@pytest.mark.parametrize("tag", [":Q4_1", ""])
def test_from_the_hub(tag, smollm, sidecar, tmp_path):
    """-hf takes the model, not the sidecar beside it, which sorts before it, and then uses that: also from its cache."""
    with hub({"SmolLM2_firstlayer.gguf": sidecar, "SmolLM2.gguf": smollm, "SmolLM2-Q4_1_firstlayer.gguf": sidecar,
              "SmolLM2-Q4_1.gguf": smollm}) as server:  # fmt: skip
        environment = os.environ | {"HF_ENDPOINT": server.address, "LLAMA_CACHE": str(tmp_path), "HF_HOME": str(tmp_path)}
        options = ["-hf", f"user/SmolLM2{tag}", "-n", 8, "-p", "Once", "-no-cnv", "--temp", 0]
        first = run_tool("llama-completion", *options, env=environment)
        assert first.returncode == 0, first.stderr[-2000:]
        model = "SmolLM2-Q4_1" if tag else "SmolLM2"
        assert sorted(set(server.downloaded)) == sorted([f"{model}.gguf", f"{model}_firstlayer.gguf"])
    again = run_tool("llama-completion", *options, "--offline", env=environment)
    without = run_tool("llama-completion", *options, "--offline", "--firstlayer", "", env=environment)
    assert first.stdout == again.stdout == without.stdout
    assert [TABLES in done.stderr for done in (first, again, without)] == [True, True, False]


@pytest.mark.parametrize("options", [[], ["--demand", "rows"]], ids=["", "with another override"])
def test_a_server_from_the_hub(options, smollm, sidecar, tmp_path, monkeypatch):
    """It downloads after its overrides were closed. Fails if the sidecar's comes after that, or ends the process."""
    with hub({"SmolLM2-Q4_1_firstlayer.gguf": sidecar, "SmolLM2-Q4_1.gguf": smollm}) as files:
        for name, value in {"HF_ENDPOINT": files.address, "LLAMA_CACHE": str(tmp_path), "HF_HOME": str(tmp_path)}.items():
            monkeypatch.setenv(name, value)
        texts, logs = [], []
        for i, more in enumerate([options, [*options, "--firstlayer", ""]]):
            with server("user/SmolLM2:Q4_1", *more, log_path=tmp_path / f"log{i}") as post:
                texts.append(post(*prompt("Once upon a time"))["content"])
            logs.append((tmp_path / f"log{i}").read_text())
    assert texts[0] == texts[1] != ""
    assert [TABLES in log for log in logs] == [True, False]


def test_long_path(smollm, sidecar, tmp_path):
    """An override holds 127 bytes. Fails if a part of the path is lost, or cut within a character."""
    folder = tmp_path / ("ä" * 100) / ("Zoë" * 40)
    folder.mkdir(parents=True)
    path = Path(shutil.copy(sidecar, folder))
    parts = sidecar_overrides(path)
    assert len(parts) > 2
    assert all(len(part.encode()) <= 127 for part in parts.values())
    assert "".join(parts.values()) == str(path)
    done = run_tool("llama-completion", "-m", smollm, "--firstlayer", path, "-n", 1, "-p", "Once", "-no-cnv")
    assert done.returncode == 0, done.stderr[-2000:]
    assert TABLES in done.stderr
    module = import_module("gguf_firstlayer.llama_cpp")
    module.Llama(str(smollm), kv_overrides=parts, n_ctx=32, verbose=False).close()
    with pytest.raises(ValueError, match="Failed to load"):
        module.Llama(str(smollm), kv_overrides=dict(list(parts.items())[:-1]), n_ctx=32, verbose=False)
