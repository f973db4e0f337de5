"""The scripts in examples/ do what they say."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from support.builds import PATCHED, ROOT

from gguf_firstlayer.runtime import Analysis

EXAMPLES = ROOT / "examples"


def run(*command: object) -> str:
    return subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_convert_and_chat(smollm, tmp_path):
    model = tmp_path / "model.gguf"
    model.symlink_to(smollm)
    answers = [run(sys.executable, EXAMPLES / "convert_and_chat.py", model, "Name three colours.") for _ in range(2)]
    assert len(answers[0].split()) > 5
    assert answers[0] == answers[1]
    assert (tmp_path / "model-flp.gguf").exists()


def test_plan_many(llama, llama_flp, archs, tmp_path):
    for path in (llama, llama_flp, archs / "falcon-dense.gguf", archs / "gpt2-dense.gguf"):
        (tmp_path / path.name).symlink_to(path)
    done = subprocess.run(
        [sys.executable, EXAMPLES / "plan_many.py", tmp_path], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["model", "falcon-dense.gguf", "llama-dense.gguf"]
    assert "gpt2-dense.gguf: nothing to precompute" in done.stderr
    assert "already converted" in done.stderr


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_c_api(llama, tmp_path):
    """It compiles as C, and gives the rows that Python gets."""
    sources = ROOT / "build" / "llama.cpp"
    includes = [f"-I{sources / folder}" for folder in ("src", "include", "ggml/include")]
    links = [f"-L{PATCHED}", f"-Wl,-rpath,{PATCHED}", "-lllama", "-lggml", "-lggml-base"]
    run("cc", "-Wall", "-Werror", EXAMPLES / "rows.c", *includes, *links, "-o", tmp_path / "rows")
    printed = run(tmp_path / "rows", llama, 7).splitlines()
    with Analysis(llama) as analysis:
        values, offset = analysis.rows([7])[0], 0
        for site, line in zip(analysis.sites, printed, strict=True):
            assert line == f"{site.name}: {site.width} values, the first is {values[offset]:g}"
            offset += site.width
    done = subprocess.run([tmp_path / "rows", tmp_path / "none.gguf", "7"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
