"""What docs/programs.md says of other programs on llama-cpp-python."""

from __future__ import annotations

import re

from support.builds import PATCHED, ROOT
from support.command_line import python

PAGE = (ROOT / "docs" / "programs.md").read_text()


def output(code: str, *arguments: object, **environment: str) -> str:
    done = python(code, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_langchain_passes_parameters_on(smollm):
    found = re.search(r"`(LlamaCpp\(model_path=\.\.\., model_kwargs=\{\"kv_overrides\": \{\.\.\.\}\})\)`", PAGE)
    assert found
    model = found[1].replace("model_path=...", "model_path=sys.argv[1]").replace("{...}", '{"firstlayer.cache": "auto"}')
    code = f"""
import sys
import gguf_firstlayer.llama_cpp
from langchain_community.llms import LlamaCpp
llm = {model}, temperature=0, max_tokens=16, n_ctx=256, verbose=False)
print(llm.invoke("The capital of France is"))
print(gguf_firstlayer.row_cache(llm.client).misses > 4)
"""
    *text, used = output(code, smollm).splitlines()
    assert "Paris" in "".join(text)
    assert used == "True"


def test_llm(smollm_flp, tmp_path):
    """A command of its own. Fails if its `llama_cpp` is not ours, which alone can load a converted file."""
    command = re.search(r'    python -c "(.*)" -m gguf/model "\.\.\."\n', PAGE)
    assert command
    home = {"LLM_USER_PATH": str(tmp_path)}
    output(command[1], "gguf", "register-model", "model", smollm_flp["q8_0"], **home)
    text = output(command[1], "-m", "gguf/model", "Name the capital of France.", **home)
    assert len(text.strip()) > 4


def test_llm_finds_the_libraries_by_a_variable(smollm_flp, tmp_path):
    assert "LLAMA_CPP_LIB_PATH=$PWD/build/bin llm -m gguf/model" in PAGE
    home = {"LLM_USER_PATH": str(tmp_path), "LLAMA_CPP_LIB_PATH": str(PATCHED)}
    command = "from llm.cli import cli; cli()"
    output(command, "gguf", "register-model", "model", smollm_flp["q8_0"], **home)
    assert output(command, "-m", "gguf/model", "Name the capital of France.", **home).strip()
