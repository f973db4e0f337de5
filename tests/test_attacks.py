"""Hostile files, with the library and with verbs: a sentence, no crash, no more memory than an honest file takes."""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from attacks.__main__ import NAMES
from attacks.faults import Bench, shim
from support.builds import PATCHED, ROOT, STOCK, preload, run
from support.command_line import cli, refusal
from support.models import convert

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the peak of memory")

# what a process may take beyond what it takes for an honest file: bytes, and times the size of the file
MEMORY, TIMES = 64 << 20, 4

# runs verbs one after the other: exit codes, what they print, and the peak of memory
VERBS = """
import contextlib, io, json, logging, resource, sys
from gguf_firstlayer.__main__ import main
results = {}
for verb, arguments in json.load(sys.stdin).items():
    logging.getLogger("gguf_firstlayer").handlers.clear()
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", "surrogateescape")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = main([verb, *arguments])
        except SystemExit as exit:
            code = exit.code
    out.flush()
    results[verb] = code or 0, out.buffer.getvalue().decode(errors="replace"), err.getvalue()
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
peak = max(int(status["VmHWM"].split()[0]), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
json.dump([results, peak * 1024], sys.stdout)
"""


def verbs(folder: Path, **arguments: list[object]) -> tuple[dict[str, tuple[int, str, str]], int]:
    """Run verbs in one process, in a folder. Returns exit codes and what they printed, and the peak of memory in bytes."""
    command = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-I", "-c", VERBS]
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    text = json.dumps(arguments, default=str)
    done = subprocess.run(command, cwd=folder, env=environment, input=text, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def honest(llama, llama_flp, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("honest")
    return {
        "source": llama,
        "converted": llama_flp,
        "sidecar": convert(llama, folder / "llama_firstlayer.gguf", type="f32", sidecar=True).output,
    }


@pytest.fixture(scope="module")
def memory(honest, tmp_path_factory) -> tuple[int, int]:
    """Bytes that the library takes, and that Python takes, for an honest file."""
    ((_, loading),) = run(PATCHED, {"run": "attacked", "model": honest["converted"]})
    converted, source = honest["converted"], honest["source"]
    _, python = verbs(tmp_path_factory.mktemp("memory"), inspect=[converted], verify=[source, converted])
    return loading, python


@pytest.mark.parametrize("name", NAMES)
def test_attack(name, honest, memory, tmp_path):
    attack = importlib.import_module(f"attacks.{name}")
    kind, source, path = getattr(attack, "MODEL", "converted"), honest["source"], tmp_path / "hostile.gguf"
    attack.forge(honest[kind], path)
    before = sorted(os.listdir(tmp_path))

    job = {"model": path} if kind != "sidecar" else {"model": source, "load": {"sidecar": str(path)}}
    if aborts := getattr(attack, "ABORTS", ""):
        with pytest.raises(AssertionError, match=re.escape(aborts)):
            run(STOCK, {"run": "attacked"} | job)
        message, loading = aborts, 0
    else:
        ((message, loading),) = run(PATCHED, {"run": "attacked"} | job)

    arguments = {
        "plan": [path],
        "convert": [path, "--type", "q8_0", "-o", tmp_path / "converted.gguf"],
        "inspect": [path],
        "revert": [path, "--source", source, "-o", tmp_path / "source.gguf"],
        "verify": [source, path, "--tokens", "256"],
        "card": [path, "--base-model", "user/repo"],
    }
    results, python = verbs(tmp_path, **arguments)
    printed = {verb: out + err for verb, (_, out, err) in results.items()}
    codes = {verb: code for verb, (code, *_) in results.items()}
    assert not [verb for verb, code in codes.items() if code not in (0, 1, 2)], results
    assert not re.search(r"Traceback|[\x00-\x08\x0b-\x1f\x7f-\x9f]", "".join(printed.values())), printed

    printed["load"], codes["load"] = message, int(message != "")
    for what, sentence in attack.EXPECTED.items():
        assert (codes[what] != 0) == (sentence != ""), (what, printed[what])
        assert sentence in printed[what], (what, printed[what])

    written = {"convert": "converted.gguf", "revert": "source.gguf"}
    assert sorted(os.listdir(tmp_path)) == sorted(before + [file for verb, file in written.items() if codes[verb] == 0])
    if "SANITIZER" not in os.environ:  # which takes memory for each allocation
        bound = MEMORY + TIMES * path.stat().st_size
        assert loading < memory[0] + bound
        assert python < memory[1] + bound


@pytest.mark.skipif(sys.platform != "linux", reason="preloads a library")
def test_faults(tmp_path):
    """A full disk, one that fails at the end, and file systems without links or new names; the program tries every call."""
    bench = Bench(tmp_path)
    for output, function, n, error, replace in [
        ("x-flp.gguf", "write", 3, errno.ENOSPC, True),
        ("x_firstlayer.gguf", "fsync", 1, errno.EIO, False),
        ("y.gguf", "link", 1, errno.EPERM, False),
        ("x-flp.gguf", "rename", 1, errno.EXDEV, True),
        ("parts", "link", 2, errno.EACCES, False),
        ("parts", "rename", 2, errno.EACCES, True),
    ]:
        assert bench.attack(output, function, n, error, replace) == (True, "")


@pytest.mark.skipif(sys.platform != "linux", reason="preloads a library")
def test_old_parts_survive(llama, tmp_path):
    """Parts that cannot be put back, since renaming goes on failing, are not removed, and the sentence says where they are."""
    library, folder = shim(tmp_path), tmp_path / "work"
    folder.mkdir()
    command = ["convert", llama, "-o", folder / "x.gguf", "--type", "f32", "--split-max-size", "1M"]
    assert cli(*command).returncode == 0
    for path in folder.iterdir():
        path.write_text(path.name)
    names = sorted(os.listdir(folder))
    fault = {"FAULT": f"rename:3:{errno.EACCES}", "FAULT_FOLDER": str(folder), "FAULT_FIRED": str(tmp_path / "fired")}
    said = refusal(cli(*command, "--force", env={**os.environ, **preload(library), **fault}))
    lost = [name for name in names if not (folder / name).exists()]
    assert len(lost) == 2
    assert all((folder / name).read_text() == name for name in names if name not in lost)
    (kept,) = folder.glob(".x.gguf.*")
    assert [(kept / f"{name}.old").read_text() for name in lost] == lost
    assert str(kept) in said
    assert all(f"{name}.old" in said for name in lost)
    assert cli(*command, "--force").returncode == 0
    assert [(kept / f"{name}.old").read_text() for name in lost] == lost


def test_fuzzer_of_headers(llama_flp, tmp_path, monkeypatch):
    """Fails if it no longer fits what it calls: then `scripts/fuzz` would find nothing but that."""
    instrument = SimpleNamespace(instrument_imports=lambda include: contextlib.nullcontext())
    monkeypatch.setitem(sys.modules, "atheris", instrument)
    target = importlib.import_module("fuzz.headers").Target(llama_flp, tmp_path)
    target(target.seed)
    target(target.seed[:-9])


def test_scripts_write_files(llama_flp, tmp_path):
    """As a person runs them."""
    command = [sys.executable, "-m", "attacks"]
    listed = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in listed.splitlines()] == NAMES
    subprocess.run([*command, "columns_overlap", llama_flp, tmp_path / "x.gguf"], cwd=ROOT / "tests", check=True)
    assert (tmp_path / "x.gguf").exists()
