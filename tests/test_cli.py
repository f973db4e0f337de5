"""The command line around the verbs, and its documentation."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import json_schema
import pytest
import study_page
from support.builds import PATCHED, ROOT
from support.command_line import cli, refusal, run_tool, whole_log

from gguf_firstlayer import __version__
from gguf_firstlayer.__main__ import VERBS
from gguf_firstlayer.text import size_text


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


def test_no_verb():
    done = cli()
    assert (done.returncode, done.stdout) == (2, "")
    assert all(f"\n    {verb} " in done.stderr for verb in VERBS)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(shell):
    script = cli("--print-completion", shell).stdout
    assert "--max-growth" in script
    if shell == "bash":  # zsh may not be installed
        wanted = 'COMP_WORDS=(gguf-firstlayer conv); COMP_CWORD=1; _shtab_gguf_firstlayer; echo "${COMPREPLY[@]}"'
        done = subprocess.run(["bash", "-c", f"{script}\n{wanted}"], capture_output=True, text=True, check=False)
        assert done.stdout.split() == ["convert"], done.stderr


def test_run_becomes_the_tool(smollm_flp):
    """Its options, output and exit code are the tool's own."""
    options = ["-m", smollm_flp["f32"], "-p", "Once upon a time", "-n", 4, "-t", 1, "--temp", 0, "-no-cnv"]
    ours = cli("run", "main", *options, stdin=subprocess.DEVNULL, env=os.environ | whole_log())
    assert ours.stdout == run_tool("llama-completion", *options).stdout
    assert ours.stdout.startswith("Once upon a time")
    assert cli("run", "main", "--no-such-option").returncode == 1
    assert "invalid choice" in cli("run", "nothing").stderr


def test_json_is_documented():
    """Fails if the keys or types of a result differ from the page; `scripts/docs json` rewrites it."""
    assert json_schema.PAGE.read_text() == json_schema.page()


def test_study_is_drawn_from_its_figures():
    """Works in a clone, without measuring; `scripts/docs study --draw` rewrites the page and plots."""
    figures = json.loads((ROOT / "docs" / "study.json").read_text())
    assert study_page.page(figures) == (ROOT / "docs" / "study.md").read_text()


def test_readme_commands_exist():
    """Every verb and option that the README and the page of commands show exists."""
    helps = {verb: cli(verb, "--help").stdout for verb in VERBS}
    pages = (ROOT / "README.md").read_text() + (ROOT / "docs" / "commands.md").read_text()
    lines = [line for line in pages.splitlines() if line.startswith("    ")]
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


def test_a_tool_ends_with_its_reader(smollm):
    """Fails if it ignores SIGPIPE, as Python does."""
    options = ["-no-cnv", "-t", "1", "-c", "64", "-n", "100000", "--context-shift", "-p", "Once"]
    command = [sys.executable, "-m", "gguf_firstlayer", "run", "main", "-m", smollm, *options]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=ROOT, **streams) as process:
        process.stdout.read(10)
        process.stdout.close()
        try:
            assert process.wait(300) == -signal.SIGPIPE
        finally:
            process.kill()


def test_sizes():
    """Fails if a size is rounded to 1024 of a unit."""
    sizes = (0, 1, 4, 1023, 1024, 2**20 - 1, 2**20, 2**30 - 1)
    texts = ["0.0 KiB", "1 byte", "4 bytes", "1023 bytes", "1.0 KiB", "1.0 MiB", "1.0 MiB", "1.00 GiB"]
    assert list(map(size_text, sizes)) == texts


#
# start
#

PROGRAMS = {
    "gguf-firstlayer": [str(Path(sys.executable).with_name("gguf-firstlayer"))],
    "python -m": [sys.executable, "-m", "gguf_firstlayer"],
}


def called(program: str, *words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line under one of its names."""
    command = [*PROGRAMS[program], *map(os.fsencode, map(str, words))]
    return subprocess.run(command, **{"capture_output": True, "text": True, "cwd": ROOT, "check": False} | options)


@pytest.mark.parametrize("program", PROGRAMS)
def test_nothing_is_imported_from_the_working_directory(program, llama, llama_flp, tmp_path):
    """A downloaded model may come with any files that its author likes: Python's modules, and backends of ggml."""
    for name in [
        "numpy",
        "tqdm",
        "rich",
        "huggingface_hub",
        "requests",
        "httpx",
        "gguf",
        "sentencepiece",
        "yaml",
        "shtab",
        "pickle",
        "subprocess",
        "argparse",
        "logging",
    ]:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'a').write({name!r})")
    library = tmp_path / "x.c"
    code = f'#include <stdio.h>\n__attribute__((constructor)) void f(void) {{ fopen("{tmp_path}/executed", "w"); }}'
    library.write_text(code)
    for name in ("libggml-cpu-x.so", "libggml-cuda.so"):
        subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / name, library], check=True)
    model = tmp_path / "x.gguf"
    model.symlink_to(llama)
    arguments = {
        "plan": [model, model],
        "inspect": [model],
        "convert": [model],
        "verify": [model, llama_flp],
        "bench": [model, llama_flp, "--batch", 1],
        "revert": [llama_flp, "--source", model, "-o", tmp_path / "back.gguf"],
        "card": [llama_flp, "--base-model", "user/repo"],
        "run": ["main", "--list-devices"],
        "paths": [],
    }
    assert set(arguments) == set(VERBS)
    if program == "gguf-firstlayer":
        del arguments["bench"]  # it takes a minute, and Python itself never looks into the working directory there
    for verb, words in arguments.items():
        done = called(program, verb, *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert not (tmp_path / "executed").exists(), (verb, (tmp_path / "executed").read_text())


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("closed", ["0", "1", "2", "0 1 2"])
def test_closed_streams(program, closed, llama, tmp_path):
    """As in a daemon. Fails if an opened file gets the number of a stream, so that the stream's text is written into it."""
    output = tmp_path / "x.gguf"
    redirections = " ".join(f"{number}>&-" for number in closed.split())
    words = [*PROGRAMS[program], "convert", str(llama), "-o", str(output), "--type", "q8_0"]
    done = subprocess.run(["bash", "-c", f'"$@" {redirections}', "bash", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert ("wrote" in done.stdout) == ("1" not in closed)
    assert cli("verify", llama, output).returncode == 0


def test_output_to_a_full_disk(llama):
    with open("/dev/full", "w") as full:
        done = cli("plan", llama, stdout=full, stderr=subprocess.PIPE, capture_output=False)
    assert done.returncode == 1
    assert done.stderr == "gguf-firstlayer: No space left on device\n"


@pytest.mark.parametrize("name", ["Modell für Füße.gguf", "bad \udcff name.gguf"])
def test_names_that_the_locale_cannot_spell(name, llama, tmp_path):
    """Names in UTF-8, and names that are not valid UTF-8."""
    source, output = tmp_path / name, tmp_path / name.replace(".gguf", "-flp.gguf")
    try:
        source.write_bytes(llama.read_bytes())
    except OSError:
        pytest.skip("the file system has no such names")  # that of macOS
    for words in (
        ["convert", source, "--type", "f32"],
        ["inspect", output],
        ["plan", source],
        ["verify", source, output],
        ["bench", source, output, "--batch", 1, "--threads", 1, "--plot", tmp_path],
    ):
        environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        done = called("python -m", *words, env=environment)
        assert done.returncode == 0, done.stderr
    assert output.exists()


@pytest.mark.parametrize("program", PROGRAMS)
def test_hints_are_spelled_like_the_call(program, llama, tmp_path):
    done = called(program, "convert", llama, "-o", tmp_path / "x.gguf", "--type", "f32")
    hint = {"gguf-firstlayer": "gguf-firstlayer", "python -m": f"{Path(sys.executable).stem} -m gguf_firstlayer"}[program]
    assert f"run it: {hint} run main -m " in done.stdout


def test_importing_changes_nothing():
    """In somebody else's program, Ctrl-C and the import path stay as they are."""
    code = (
        "import signal, sys; path, handlers = sys.path[:], [signal.getsignal(n) for n in (1, 2, 15)];"
        "import gguf_firstlayer; assert (sys.path, [signal.getsignal(n) for n in (1, 2, 15)]) == (path, handlers)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_verbs_stay_functions():
    """Modules have the same names, and the command line imports them."""
    code = (
        "import gguf_firstlayer, sys; from gguf_firstlayer.__main__ import main; main(['paths', '--json'])\n"
        f"assert all(callable(getattr(gguf_firstlayer, verb)) for verb in {list(VERBS)!r} if verb != 'run')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


@pytest.mark.parametrize("program", PROGRAMS)
def test_working_directory_that_is_gone(program, llama, tmp_path):
    words = [*PROGRAMS[program], "plan", str(llama)]
    gone = 'mkdir "$0/gone" && cd "$0/gone" && rmdir "$0/gone" && exec "$@"'
    done = subprocess.run(["bash", "-c", gone, str(tmp_path), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("llama-dense.gguf")


def test_missing_files_are_named(llama, llama_flp, tmp_path):
    for arguments in (("verify", llama, llama_flp, "--text", tmp_path / "none"), ("plan", tmp_path / "none")):
        assert refusal(cli(*arguments)) == f"gguf-firstlayer: {tmp_path / 'none'} cannot be read: No such file or directory"
