"""The command line around the verbs, and what is written about it."""

from __future__ import annotations

import json
import subprocess

import json_schema
import pytest
from conftest import PATCHED, ROOT, cli

from gguf_firstlayer import __version__
from gguf_firstlayer.__main__ import VERBS


def test_version():
    done = cli("--version")
    commit = json.loads((PATCHED / "build.json").read_text())["llama.cpp"]
    assert done.stdout == f"gguf-firstlayer {__version__}, llama.cpp {commit}\n"
    tool = subprocess.run([PATCHED / "llama-completion", "--version"], capture_output=True, text=True, check=True)
    assert commit in tool.stdout + tool.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(verb):
    done = cli(verb, "--help")
    assert done.returncode == 0
    assert f"example: gguf-firstlayer {verb} " in " ".join(done.stdout.split())


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(shell):
    script = cli("--print-completion", shell).stdout
    assert "--max-growth" in script
    if shell == "bash":  # the other may not be installed
        wanted = 'COMP_WORDS=(gguf-firstlayer conv); COMP_CWORD=1; _shtab_gguf_firstlayer; echo "${COMPREPLY[@]}"'
        done = subprocess.run(["bash", "-c", f"{script}\n{wanted}"], capture_output=True, text=True, check=False)
        assert done.stdout.split() == ["convert"], done.stderr


def test_run_becomes_the_tool(smollm_flp):
    """Its options, output and exit code are the tool's own."""
    options = ["-m", smollm_flp["f32"], "-p", "Once upon a time", "-n", 4, "-t", 1, "--temp", 0, "-no-cnv"]
    ours = cli("run", "main", *options, stdin=subprocess.DEVNULL)
    command = [PATCHED / "llama-completion", *map(str, options)]
    theirs = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    assert ours.stdout == theirs.stdout
    assert ours.stdout.startswith("Once upon a time")
    assert cli("run", "main", "--no-such-option").returncode == 1
    assert "invalid choice" in cli("run", "nothing").stderr


def test_json_is_documented():
    """Fails if a result has other keys or types than the page says; `python tests/json_schema.py` writes it anew."""
    assert json_schema.PAGE.read_text() == json_schema.page()


def test_readme_commands_exist():
    """Every verb and option that the README shows is one."""
    helps = {verb: cli(verb, "--help").stdout for verb in VERBS}
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("    ")]
    shown = 0
    for line in lines:
        for program in ("gguf-firstlayer ", "python -m gguf_firstlayer "):
            words = line.split("#")[0].strip().removeprefix(program).replace("[", " ").replace("]", " ").split()
            if not line.strip().startswith(program) or not words or words[0].startswith("-"):
                continue
            shown += 1
            assert words[0] in VERBS, line
            if words[0] != "run":
                assert not [word for word in words if word.startswith("--") and word not in helps[words[0]]], line
    assert shown > 8
