"""What cannot be converted or loaded is refused with one sentence, and nothing is lost."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from attacks import negative_epsilon
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType
from support.builds import PATCHED, STOCK, compare, run
from support.command_line import cli, refusal
from support.models import convert, digest, rewrite

from gguf_firstlayer import FirstLayerError, isolation
from gguf_firstlayer.file_format import Measurement
from gguf_firstlayer.isolation import isolated
from gguf_firstlayer.output import _appear, replacing
from gguf_firstlayer.runtime import IsolatedAnalysis
from gguf_firstlayer.writer import _table_rows

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


def test_other_content(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    assert "is only a pointer of Git LFS" in refusal(cli("inspect", path))


def test_empty_names():
    """A variable of the shell that is not set. Fails if it is taken for the working directory."""
    done = cli("plan", "")
    assert done.returncode == 2
    assert "the name of a model is empty" in done.stderr


def test_random_damage(llama, tmp_path):
    """Damaged headers get an answer, and do not crash the converter's process."""
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


def test_a_model_that_aborts_while_it_computes(llama, llama_flp, archs, tmp_path):
    path, without_sites = tmp_path / "x.gguf", tmp_path / "y.gguf"
    negative_epsilon.forge(llama, path)
    rewrite(archs / "gpt2-dense.gguf", without_sites, lambda name, value: -1.0 if name.endswith("norm_epsilon") else value)
    for arguments in (
        (path, "--cache", "1"),
        (path, llama_flp),
        (without_sites, "--demand", "rows"),  # the analysis computes nothing of it
        (without_sites, "--demand", "embeddings"),
    ):
        for verb in ("verify", "bench"):
            assert "llama.cpp cannot run this model" in refusal(cli(verb, *arguments))


@pytest.mark.parametrize("function", ["writer._table_rows", "runtime._quantize", "auto._Trial"])
def test_llama_cpp_aborts_during_a_conversion(function, llama, tmp_path, monkeypatch):
    """While it computes, quantizes or measures, after everything that is tried first: this process goes on."""
    monkeypatch.setattr(f"gguf_firstlayer.{function}", abort)
    if function != "writer._table_rows":  # nothing is written before it is known
        monkeypatch.setattr("gguf_firstlayer.writer._write_tables", None)
    with pytest.raises(FirstLayerError, match=r"llama\.cpp cannot run this model \(it crashed\)"):
        convert(llama, tmp_path / "x.gguf", type="auto")
    assert not list(tmp_path.iterdir())


def abort(*_):
    os.abort()


def test_vocabulary_only(llama, tmp_path):
    names = {tensor.name for tensor in GGUFReader(llama).tensors}
    path = rewrite(llama, tmp_path / "x.gguf", drop=names)
    for verb in ("plan", "convert", "inspect"):
        assert "only a vocabulary" in refusal(cli(verb, path))


def test_output_exists(llama, tmp_path):
    output = tmp_path / "x.gguf"
    output.write_text("precious")
    assert "--force" in refusal(cli("convert", llama, "-o", output))
    assert output.read_text() == "precious"
    assert cli("convert", llama, "-o", output, "--force").returncode == 0
    assert output.stat().st_size > 1000


@pytest.mark.parametrize("lacks", ["nothing", "links", "links and renaming without replacement"])
def test_output_appears_meanwhile(lacks, tmp_path, monkeypatch):
    """Of two conversions to one name, one succeeds, also on file systems like FAT, or over a network."""

    def write(output: Path, *parts: str, appears: bool) -> None:
        with replacing(output, force=False) as temporary:
            for name in parts:
                temporary.with_name(name).write_text("ours")
            if appears:
                (tmp_path / parts[0]).write_text("of another conversion")

    def refuse(*_):
        raise PermissionError

    if "links" in lacks:
        monkeypatch.setattr(os, "link", refuse)
    if "renaming" in lacks:
        monkeypatch.setattr("gguf_firstlayer.output.ctypes.CDLL", lambda *_, **__: object())
    parts = "y-00001-of-00002.gguf", "y-00002-of-00002.gguf"
    for output, names in ((tmp_path / "x.gguf", ["x.gguf"]), (tmp_path / "y.gguf", parts)):
        with pytest.raises(FirstLayerError, match="exists; replace it with force=True"):
            write(output, *names, appears=True)
        assert (tmp_path / names[0]).read_text() == "of another conversion"
    assert sorted(os.listdir(tmp_path)) == ["x.gguf", parts[0]]
    write(tmp_path / "z.gguf", "z.gguf", appears=False)
    assert (tmp_path / "z.gguf").read_text() == "ours"
    assert sorted(os.listdir(tmp_path)) == ["x.gguf", parts[0], "z.gguf"]


def test_old_parts_that_stay(llama, tmp_path):
    """Fails if a model of an older conversion is left without a word."""
    for size, said in (("1M", ""), ("2M", "still there, of an older output: x-00001-of-"), ("1M", "x-00001-of-")):
        done = cli("convert", llama, "-o", tmp_path / "x.gguf", "--type", "q8_0", "--split-max-size", size, "--force")
        assert done.returncode == 0, done.stderr
        assert said in done.stderr
        assert said or "still there" not in done.stderr


def write_parts(folder: Path, names: list[str]) -> None:
    """A split model that replaces others."""
    with replacing(folder / "x.gguf", force=True) as temporary:
        for name in names:
            temporary.with_name(name).write_text("ours")


def test_old_parts_come_back(tmp_path):
    """If a folder has the name of the first part. Fails if it is removed, or the second part is another model's."""
    names = [f"x-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    first, second, _third = names
    (tmp_path / first).mkdir()
    (tmp_path / second).write_text("precious")
    with pytest.raises(FirstLayerError, match="cannot be written"):
        write_parts(tmp_path, names)
    assert sorted(os.listdir(tmp_path)) == [first, second]
    assert (tmp_path / second).read_text() == "precious"


def test_old_parts_come_back_when_new_ones_are_there(tmp_path, monkeypatch):
    """Fails if the error leaves a new part, or takes an old one with it."""
    names = [f"x-0000{i}-of-00003.gguf" for i in (1, 2, 3)]

    def refuse_the_first(part: Path, target: Path, force: bool) -> None:
        if target.name == names[0]:
            raise PermissionError
        _appear(part, target, force)

    monkeypatch.setattr("gguf_firstlayer.output._appear", refuse_the_first)
    for name in names[:2]:
        (tmp_path / name).write_text("precious")
    with pytest.raises(FirstLayerError, match="cannot be written"):
        write_parts(tmp_path, names)
    assert sorted(os.listdir(tmp_path)) == names[:2]
    assert [(tmp_path / name).read_text() for name in names[:2]] == ["precious"] * 2


# Windows does not let files that are open change so
NOT_WHILE_OPEN = pytest.mark.skipif(os.name == "nt", reason="the system forbids it")


@pytest.mark.parametrize(
    "how", ["written", "grown", *(pytest.param(how, marks=NOT_WHILE_OPEN) for how in ("replaced", "removed", "truncated"))]
)
def test_source_changes(how, smollm, tmp_path, monkeypatch):
    """While it is read: the output would be of neither model."""
    source = Path(shutil.copy(smollm, tmp_path / "x.gguf"))
    call = IsolatedAnalysis.call

    def change(analysis, function, *arguments):
        result = call(analysis, function, *arguments)
        if function is not _table_rows:
            return result
        monkeypatch.setattr(IsolatedAnalysis, "call", call)
        if how == "replaced":
            shutil.copy(source, tmp_path / "other")
            os.replace(tmp_path / "other", source)
        elif how == "removed":
            source.unlink()
        elif how == "truncated":
            os.truncate(source, source.stat().st_size - 4096)
        else:
            with source.open("r+b" if how == "written" else "ab") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"x")
        return result

    monkeypatch.setattr(IsolatedAnalysis, "call", change)
    with pytest.raises(FirstLayerError, match="changed while it was read"):
        convert(source, tmp_path / "x-flp.gguf", type="q8_0")
    assert sorted(os.listdir(tmp_path)) == ([] if how == "removed" else ["x.gguf"])


def run_out_of_memory(_path: Path) -> None:
    raise MemoryError


def find_no_folder(path: Path) -> None:
    raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))


def make_a_mistake(_path: Path) -> None:
    raise KeyError("of ours")


def print_something(_path: Path) -> str:
    print("of a library")
    os.write(1, b"of another")
    return "the result"


class TooMuch:
    def __reduce__(self):
        raise MemoryError


def return_too_much(_path: Path) -> TooMuch:
    return TooMuch()


def test_errors_of_a_child_process(tmp_path, monkeypatch):
    """Fails if they are taken for llama.cpp's, with a line of our own code as the reason."""
    with pytest.raises(FirstLayerError, match="out of memory"):
        isolated(run_out_of_memory, tmp_path)
    with pytest.raises(FirstLayerError, match=re.escape(f"{tmp_path}: No such file")):
        isolated(find_no_folder, tmp_path)
    with pytest.raises(FirstLayerError, match=r"cannot be analysed \(KeyError: 'of ours'\); please report this"):
        isolated(make_a_mistake, tmp_path)
    assert isolated(print_something, tmp_path) == "the result"
    with pytest.raises(FirstLayerError, match="out of memory"):
        isolated(return_too_much, tmp_path)
    # something that Python runs when it starts may print
    monkeypatch.setattr(isolation, "_CHILD", f"print('hello', flush=True)\n{isolation._CHILD}")
    with pytest.raises(FirstLayerError, match="cannot run this model"):
        isolated(print_something, tmp_path)


def test_keywords_of_an_isolated_call(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"\xe9")
    with isolation.Process(path) as process:
        assert isolation.Isolated(process, 0).call(Path.read_text, encoding="latin-1") == "\u00e9"


@pytest.mark.parametrize("kind", ["adapter", "mmproj", "imatrix"])
def test_what_is_no_model(kind, llama, tmp_path):
    """It comes with models, in files of the same format."""
    path = rewrite(llama, tmp_path / "x.gguf", keys={"general.type": (kind, GGUFValueType.STRING)})
    for verb in ("plan", "convert", "inspect"):
        assert f"is no model, but has the type '{kind}'" in refusal(cli(verb, path))


def test_output_is_source(llama, tmp_path):
    source = tmp_path / "x.gguf"
    shutil.copy(llama, source)
    before = digest(source)
    assert "is an input" in refusal(cli("convert", source, "-o", source, "--force"))
    assert digest(source) == before


def test_folders(llama, tmp_path):
    assert "cannot be written" in refusal(cli("convert", llama, "-o", tmp_path))
    assert "cannot be written" in refusal(cli("convert", llama, "-o", tmp_path / "missing" / "x.gguf"))
    assert "cannot be read" in refusal(cli("convert", tmp_path / "missing.gguf"))
    assert "cannot be read" in refusal(cli("inspect", tmp_path))
    assert "cannot be read" in refusal(cli("plan", "x" * 300))


def test_types(llama, tmp_path):
    assert "unknown table type" in refusal(cli("convert", llama, "-o", tmp_path / "x.gguf", "--type", "q9_9"))


def test_disk_is_checked_before_computing(llama, tmp_path, monkeypatch):
    def must_not_run(*_):
        raise AssertionError("computed before the disk was checked")

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    monkeypatch.setattr("gguf_firstlayer.writer._write_tables", must_not_run)
    monkeypatch.setattr("gguf_firstlayer.auto.choose", must_not_run)
    for kind in ("q8_0", "auto"):
        with pytest.raises(FirstLayerError, match="free"):
            convert(llama, tmp_path / "x.gguf", type=kind)
    assert not list(tmp_path.iterdir())


def test_values_that_cannot_be_quantized(llama, tmp_path):
    """For some types, ggml aborts on values that are finite but large."""

    def spoil(name, data):
        if name != "blk.0.attn_k.weight":
            return data
        data = data.copy()
        data[3] = 1e20
        return data

    source = rewrite(llama, tmp_path / "large.gguf", change_tensor=spoil)
    for kind in ("iq3_s", "iq2_s"):
        done = cli("convert", source, "-o", tmp_path / "x.gguf", "--type", kind)
        assert f"the first layer has values that {kind} cannot hold; convert with a wider type" in refusal(done)
    assert os.listdir(tmp_path) == ["large.gguf"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["f32", "q8_0", "iq2_xs", "auto"])
def test_values_that_are_not_finite(kind, value, llama, tmp_path):
    """Some quantizers abort on them, others write tables of NaN. The message names the weight."""

    def spoil(name, data):
        if name != "blk.0.attn_k.weight":
            return data
        data = data.copy()
        data[3, 5] = value
        return data

    source = rewrite(llama, tmp_path / "nan.gguf", change_tensor=spoil)
    done = cli("convert", source, "-o", tmp_path / "x.gguf", "--type", kind)
    assert re.search(r"Kcur-0 is not finite for \d+ tokens?, such as \d+: .*blk.0.attn_k.weight", refusal(done))
    assert os.listdir(tmp_path) == ["nan.gguf"]


T = GGUFValueType


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("split.count", (float("nan"), T.FLOAT32)),
        ("split.count", ([2, 3], T.ARRAY, T.UINT16)),
        ("split.no", ("one", T.STRING)),
        ("general.architecture", (b"ll\xffma", T.STRING)),
        ("firstlayer.site.width", (["256", "256", "256"], T.ARRAY, T.STRING)),
        ("firstlayer.site.recipe", ([1, 2, 3], T.ARRAY, T.UINT32)),
        ("firstlayer.version", ([1], T.ARRAY, T.UINT32)),
    ],
)
def test_keys_of_other_types(key, value, llama_flp, tmp_path):
    path = rewrite(llama_flp, tmp_path / "x.gguf", keys={key: value})
    for verb in ("inspect", "revert"):
        message = refusal(cli(verb, path))
        assert "malformed" in message or "no whole number" in message or "update it" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("firstlayer.origin.bytes", ("many", T.STRING)),
        ("firstlayer.origin.bytes", (float("inf"), T.FLOAT32)),
        ("firstlayer.origin.part.bytes", ([30, -1], T.ARRAY, T.INT64)),
        ("firstlayer.origin.part.header", ([1 << 40], T.ARRAY, T.INT64)),
    ],
)
def test_origin_of_other_types(key, value, llama, llama_flp, tmp_path):
    path = rewrite(llama_flp, tmp_path / "x.gguf", keys={key: value})
    assert "malformed" in refusal(cli("revert", path, "--source", llama, "-o", tmp_path / "y.gguf"))
    assert os.listdir(tmp_path) == ["x.gguf"]


def test_control_characters_do_not_reach_the_terminal(llama, llama_flp, tmp_path):
    names = ["\x1b]0;owned\x07", "\x9b31m", "plain\nwithin bounds"]
    path = rewrite(llama_flp, tmp_path / "x.gguf", keys={"firstlayer.site.name": (names, T.ARRAY, T.STRING)})
    done = cli("inspect", path)
    assert done.returncode == 0, done.stderr
    assert r"\x1b]0;owned\x07" in done.stdout
    assert r"plain\x0awithin bounds" in done.stdout  # not a line of its own
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", done.stdout + done.stderr)
    other = rewrite(llama, tmp_path / "y.gguf", keys={"general.architecture": ("\x1b[31mred", T.STRING)})
    assert r"\x1b[31mred" in refusal(cli("convert", other))


def test_numbers_that_are_not_finite_are_null_in_json(llama_flp, tmp_path):
    keys = {f"firstlayer.measured.{field.name}": (math.nan, T.FLOAT32) for field in dataclasses.fields(Measurement)}
    done = cli("inspect", rewrite(llama_flp, tmp_path / "x.gguf", keys=keys), "--json")
    assert json.loads(done.stdout, parse_constant=pytest.fail)["measurement"]["kld"] is None


def test_wrong_usage_exits_with_2():
    assert cli("convert").returncode == 2
    assert cli("frobnicate").returncode == 2
    assert cli("plan").returncode == 2
    assert cli("convert", "x.gguf", "--type", "q9_9").returncode == 2
    assert cli("bench", "x.gguf", "y.gguf", "--threads", 0).returncode == 2


def test_folders_of_living_processes_stay(llama, tmp_path):
    """Only folders that nobody has locked are abandoned."""
    alive = replacing(tmp_path / "x.gguf", force=True)
    part = alive.__enter__()
    part.write_text("in the middle of it")
    (tmp_path / ".x.gguf.dead.part").mkdir()
    (tmp_path / ".x.gguf.dead.part" / "x.gguf").write_text("left")
    (tmp_path / ".other.gguf.dead.part").mkdir()
    (tmp_path / ".foreign.gguf.dead.part").mkdir()
    (tmp_path / ".foreign.gguf.dead.part" / "photo.jpg").write_text("of another program")
    assert cli("convert", llama, "-o", tmp_path / "x.gguf", "--type", "f32").returncode == 0
    assert part.exists()
    others = [path.name for path in tmp_path.iterdir() if path.stem != part.parent.stem]
    assert sorted(others) == [".foreign.gguf.dead.part", "x.gguf"]
    alive.__exit__(None, None, None)
    assert (tmp_path / "x.gguf").read_text() == "in the middle of it"


def test_messages_fit_the_caller(llama, tmp_path):
    """The same error in terms of the command line, and of Python."""
    output = tmp_path / "x.gguf"
    output.touch()
    assert "replace it with --force, or choose another name with -o" in refusal(cli("convert", llama, "-o", output))
    with pytest.raises(FirstLayerError, match=r"replace it with force=True, or choose another name with output=\.\.\."):
        convert(llama, output)


def test_progress(llama, tmp_path):
    """A line at the start, nothing in Python; test_posix.py has terminals."""
    lines = cli("convert", llama, "-o", tmp_path / "x.gguf", "--type", "f32").stderr.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("tables: ")
    code = "import gguf_firstlayer, sys; gguf_firstlayer.convert(*sys.argv[1:])"
    quiet = subprocess.run([sys.executable, "-c", code, llama, tmp_path / "z.gguf"], capture_output=True, check=True)
    assert quiet.stderr == b""

    assert "comparing: " in cli("verify", llama, "--cache", "--tokens", 64).stderr


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
        ("firstlayer.site.width", lambda values: first(values, 4), "overlap, or have gaps"),
        ("firstlayer.site.column", lambda values: first(values, values[1]), "overlap, or have gaps"),
        ("firstlayer.site.column", lambda values: first(values, 2), "overlap, or have gaps"),
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


def test_blocks_across_sites(archs, tmp_path):
    """Sites of 128, 64 and 64 values in blocks of 256. The check of rows would quantize each, which ggml asserts."""
    kept = convert(archs / "llama-embed-dense.gguf", tmp_path / "kept.gguf", type="f32", keep_weights=True).output
    blocks = np.random.default_rng(1).integers(0, 256, (128, 66), dtype=np.uint8)
    path = rewrite(
        kept,
        tmp_path / "x.gguf",
        change_tensor=lambda name, data: blocks if name == "firstlayer.0.table" else data,
        change_type=GGMLQuantizationType.IQ2_XXS,
    )
    assert "whose blocks have 256 values" in load_error(path)


def test_tables_before_the_first(llama_flp, tmp_path):
    keys = {"firstlayer.site.table": ([-1] * 3, GGUFValueType.ARRAY, GGUFValueType.INT32)}
    path = rewrite(llama_flp, tmp_path / "x.gguf", keys=keys)
    for verb in ("inspect", "card"):
        assert "keys of the file are malformed (a negative number)" in refusal(cli(verb, path))


def test_context_of_two_tokens(llama, tmp_path):
    path = rewrite(llama, tmp_path / "x.gguf", keys={"llama.context_length": (2, GGUFValueType.UINT32)})
    assert "too few to measure" in refusal(cli("verify", path, "--cache"))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e12])
def test_weights_that_no_table_can_be_of(value, llama, tmp_path):
    """Rows that are computed of them cannot be quantized: for IQ3_S, ggml asserts that they can."""
    kept = convert(llama, tmp_path / "kept.gguf", type="iq3_s", keep_weights=True).output

    def spoil(name: str, data: np.ndarray) -> np.ndarray:
        if name == "blk.0.attn_k.weight":
            data = data.copy()
            data[3] = value
        return data

    assert "the tables are not of this model" in load_error(rewrite(kept, tmp_path / "x.gguf", change_tensor=spoil))


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
    """With kept weights, a table that does not match is not used, and the model computes as usual."""
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
    # a table is used whole or not at all
    assert [used for *_, used in partly] == [False, False, False]


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
