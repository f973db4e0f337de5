"""What cannot be converted or loaded is refused with one sentence, and nothing is lost."""

from __future__ import annotations

import fcntl
import hashlib
import os
import pty
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import PATCHED, ROOT, STOCK, cli, compare, convert, refusal, rewrite, run
from gguf import GGUFReader

from gguf_firstlayer import FirstLayerError


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


#
# converter
#


def test_already_converted(llama_flp):
    assert "already converted" in refusal(cli("convert", llama_flp))


def test_no_site(archs, tmp_path):
    message = refusal(cli("convert", archs / "gpt2-dense.gguf", "-o", tmp_path / "x.gguf"))
    assert "inp_pos" in message
    assert "before any matrix product" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"GGUF", b"hello, this is no model\n" * 100, b"GGUF\0\0\0\3" + bytes(100)])
def test_not_a_gguf(content, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    for verb in ("convert", "inspect"):
        assert str(path) in refusal(cli(verb, path))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("share", [0.0005, 0.01, 0.5, 0.999])
def test_truncated(share, llama, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(llama.read_bytes()[: int(llama.stat().st_size * share)])
    assert "truncated" in refusal(cli("convert", path))
    assert list(tmp_path.iterdir()) == [path]


def test_random_damage(llama, tmp_path):
    """Damaged headers: an answer, and no crash of the converter's process."""
    data, rng = bytearray(llama.read_bytes()), random.Random(1)
    path = tmp_path / "x.gguf"
    n_header = GGUFReader(llama).data_offset
    for _ in range(8):
        damaged = bytearray(data)
        for _ in range(3):
            damaged[rng.randrange(4, n_header)] = rng.randrange(256)
        path.write_bytes(damaged)
        done = cli("convert", path, "--force")
        assert done.returncode in (0, 1), done
        assert "Traceback" not in done.stderr


def test_hyperparameters_that_make_llama_cpp_abort(llama, tmp_path):
    path = rewrite(llama, tmp_path / "x.gguf", change_key=lambda name, value: 3 if name == "llama.expert_used_count" else value)
    reader = GGUFReader(path)
    assert reader.get_field("llama.expert_used_count") is not None, "the random model no longer has this key"
    assert "llama.cpp cannot run this model" in refusal(cli("convert", path))


def test_vocabulary_only(llama, tmp_path):
    names = {tensor.name for tensor in GGUFReader(llama).tensors}
    path = rewrite(llama, tmp_path / "x.gguf", drop=names)
    assert "vocabulary only" in refusal(cli("convert", path))


def test_output_exists(llama, tmp_path):
    output = tmp_path / "x.gguf"
    output.write_text("precious")
    assert "--force" in refusal(cli("convert", llama, "-o", output))
    assert output.read_text() == "precious"
    assert cli("convert", llama, "-o", output, "--force").returncode == 0
    assert output.stat().st_size > 1000


def test_output_is_source(llama, tmp_path):
    source = tmp_path / "x.gguf"
    shutil.copy(llama, source)
    (tmp_path / "link.gguf").symlink_to(source)
    before = digest(source)
    assert "is the source" in refusal(cli("convert", source, "-o", tmp_path / "link.gguf", "--force"))
    assert digest(source) == before


def test_folders(llama, tmp_path):
    assert "cannot be written" in refusal(cli("convert", llama, "-o", tmp_path))
    assert "cannot be written" in refusal(cli("convert", llama, "-o", tmp_path / "missing" / "x.gguf"))
    assert "cannot be read" in refusal(cli("convert", tmp_path / "missing.gguf"))
    assert "cannot be read" in refusal(cli("inspect", tmp_path))


def test_no_permission(llama, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    assert "cannot be written" in refusal(cli("convert", llama, "-o", tmp_path / "x.gguf"))


def test_types(llama, tmp_path):
    assert "unknown table type" in refusal(cli("convert", llama, "-o", tmp_path / "x.gguf", "--type", "q9_9"))


def test_disk_is_checked_before_computing(llama, tmp_path, monkeypatch):
    def must_not_run(*_):
        raise AssertionError("computed before the disk was checked")

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    monkeypatch.setattr("gguf_firstlayer.runtime.Analysis.rows", must_not_run)
    with pytest.raises(FirstLayerError, match="free"):
        convert(llama, tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())


def test_disk_fills_up(llama, tmp_path):
    """A write that fails half-way, through a limit on the size of files."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    assert "cannot be written" in refusal(cli("convert", llama, "-o", tmp_path / "x.gguf", preexec_fn=limit))
    assert not list(tmp_path.iterdir())


def test_wrong_usage_exits_with_2():
    assert cli("convert").returncode == 2
    assert cli("frobnicate").returncode == 2


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted(sent, smollm, smollm_flp, tmp_path):
    """Killed at random moments: the source is intact, the destination absent or whole."""
    before, whole = digest(smollm), digest(smollm_flp["q8_0"])
    output, rng = tmp_path / "x.gguf", random.Random(int(sent))
    command = [
        sys.executable,
        "-m",
        "gguf_firstlayer",
        "convert",
        str(smollm),
        "-o",
        str(output),
        "--force",
        "--yes",
        "--type",
        "q8_0",
    ]
    cut_short = 0
    for _ in range(6):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        time.sleep(rng.uniform(1, 5))  # Python itself starts in the first second
        process.send_signal(sent)
        _, errors = process.communicate()
        assert "Traceback" not in errors
        cut_short += process.returncode != 0
        assert not output.exists() or digest(output) == whole
        if sent != signal.SIGKILL:  # nobody can clean up after that one
            assert {path.name for path in tmp_path.iterdir()} <= {"x.gguf"}
    assert cut_short > 0
    assert digest(smollm) == before


def test_interrupted_while_measuring(smollm, tmp_path):
    command = [sys.executable, "-m", "gguf_firstlayer", "convert", str(smollm), "-o", str(tmp_path / "x.gguf"), "--yes"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    time.sleep(5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert (process.returncode, errors) == (1, "gguf-firstlayer: interrupted, nothing was written\n")
    assert not list(tmp_path.iterdir())


def test_progress_bar_only_on_a_terminal(llama, tmp_path):
    assert cli("convert", llama, "-o", tmp_path / "x.gguf", "--yes").stderr == ""

    primary, secondary = pty.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [sys.executable, "-m", "gguf_firstlayer", "convert", str(llama), "-o", str(tmp_path / "y.gguf"), "--yes"]
    subprocess.run(command, cwd=ROOT, stderr=secondary, stdout=subprocess.DEVNULL, check=True)
    os.close(secondary)
    assert b"tables" in os.read(primary, 10000)
    os.close(primary)


#
# run time
#


def load_error(path: Path) -> str:
    (message,) = run(PATCHED, {"run": "load", "model": path})
    return message


def test_unmodified_copy_loads(llama_flp, tmp_path):
    assert load_error(rewrite(llama_flp, tmp_path / "x.gguf")) == ""


def first(values, value):
    return [value, *values[1:]]


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("firstlayer.version", lambda _: 2, "unknown firstlayer.version"),
        ("firstlayer.site.table", lambda values: first(values, 7), "is in table 7"),
        ("firstlayer.site.column", lambda values: first(values, 4000), "columns 4000 to"),
        ("firstlayer.site.width", lambda values: first(values, 0), "columns 0 to 0"),
        ("firstlayer.site.width", lambda values: first(values, 4), "no node of the graph matches the recipe"),
        ("firstlayer.site.width", lambda values: values[1:], "elements, expected"),
        ("firstlayer.site.recipe", lambda values: first(values, "mul_mat(a, b)"), "no node of the graph matches the recipe"),
        ("firstlayer.elided.type", lambda values: first(values, 9999), "invalid name, type or shape"),
        ("firstlayer.elided.dimension", lambda values: first(values, -1), "invalid name, type or shape"),
        ("firstlayer.elided.dimension", lambda values: first(values, 2**62), "invalid name, type or shape"),
        ("firstlayer.elided.dimension", lambda values: first(values, values[0] * 2), "has wrong shape"),
        ("firstlayer.elided.name", lambda values: first(values, "output_norm.weight"), "is said to be elided"),
    ],
)
def test_malformed_keys(key, change, message, llama_flp, tmp_path):
    path = rewrite(llama_flp, tmp_path / "x.gguf", change_key=lambda name, value: change(value) if name == key else value)
    assert message in load_error(path)


def test_missing_key(llama_flp, tmp_path):
    path = rewrite(
        llama_flp, tmp_path / "x.gguf", change_key=lambda name, value: [*value, "x"] if name.endswith("site.name") else value
    )
    assert "elements, expected" in load_error(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table[:-1], "one row for each of"),
        (lambda table: table[:, :100], "columns"),
        (lambda table: table.astype(np.int32), "has type i32"),
    ],
)
def test_malformed_table(change, message, llama_flp, tmp_path):
    path = rewrite(
        llama_flp, tmp_path / "x.gguf", change_tensor=lambda name, data: change(data) if name.startswith("firstlayer") else data
    )
    assert message in load_error(path)


def test_missing_table(llama_flp, tmp_path):
    assert "firstlayer.0.table" in load_error(rewrite(llama_flp, tmp_path / "x.gguf", drop={"firstlayer.0.table"}))


def test_elided_weight_that_is_needed(llama_flp, tmp_path):
    """A file that lacks a weight which no table replaces."""
    needed = "blk.1.attn_q.weight"
    tensor = next(t for t in GGUFReader(llama_flp).tensors if t.name == needed)
    shape = [*map(int, tensor.shape), 1, 1, 1][:4]
    more = {"name": [needed], "type": [int(tensor.tensor_type)], "dimension": shape}

    def change(name, value):
        group, _, kind = name.rpartition(".")
        return [*value, *more[kind]] if group == "firstlayer.elided" else value

    message = load_error(rewrite(llama_flp, tmp_path / "x.gguf", change_key=change, drop={needed}))
    assert needed in message
    assert "--keep-weights" in message


def test_kept_weights_are_used_where_recipes_differ(llama, tmp_path):
    """Weights kept: a table that does not match is left alone, and the model computes as ever."""
    kept = convert(llama, tmp_path / "kept.gguf", type="f32", keep_weights=True).output
    path = rewrite(
        kept,
        tmp_path / "x.gguf",
        change_key=lambda name, value: [f"not {recipe}" for recipe in value] if name == "firstlayer.site.recipe" else value,
        change_tensor=lambda name, data: data * 0 if name.startswith("firstlayer") else data,
    )
    job = {"run": "logits", "tokens": {"count": 20, "seed": 3}, "batches": [1, 20]}
    ((stock, ours),) = compare(llama, path, job)
    assert all(np.array_equal(stock[size], ours[size]) for size in (1, 20))


def test_model_tells_what_it_uses(llama, llama_flp, tmp_path):
    table = "firstlayer.0.table"
    expected = [("Qcur-0", 256, table, 0, True), ("Vcur-0", 256, table, 256, True), ("Kcur-0", 256, table, 512, True)]
    kept = convert(llama, tmp_path / "kept.gguf", keep_weights=True).output
    changed = rewrite(
        kept, tmp_path / "x.gguf", lambda name, value: first(value, "none") if name == "firstlayer.site.recipe" else value
    )
    jobs = [{"run": "uses", "model": path} for path in (llama, llama_flp, changed)]
    plain, converted, partly = run(PATCHED, *jobs)
    assert plain == []
    assert converted == expected
    assert [used for *_, used in partly] == [False, True, True]


def test_embeddings_as_input(llama, llama_flp, tmp_path):
    status, afterwards, messages = run(PATCHED, {"run": "embeddings", "model": llama_flp})[0]
    assert status < 0
    assert "--keep-weights" in messages
    assert afterwards == 0, "the context must stay usable"

    kept = convert(llama, tmp_path / "kept.gguf", type="f32", keep_weights=True).output
    assert run(PATCHED, {"run": "embeddings", "model": kept})[0][:2] == (0, 0)


def test_stock_library_names_the_missing_tensor(llama_flp):
    (message,) = run(STOCK, {"run": "load", "model": llama_flp})
    assert "blk.0.attn_norm.weight" in message
