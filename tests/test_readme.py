"""What README.md shows is what happens."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.builds import PATCHED, ROOT, STOCK

from gguf_firstlayer import bench
from gguf_firstlayer.bench import BUSY, FASTER, IMPOSSIBLE, LIMITED, SLOWER, UNKNOWN, summary

README = (ROOT / "README.md").read_text()
VERDICTS = "|".join(map(re.escape, (BUSY, LIMITED, FASTER, IMPOSSIBLE, SLOWER, UNKNOWN)))  # the longer of two comes first


def transcript() -> dict[str, list[str]]:
    """The commands that are shown with what they print."""
    shown: dict[str, list[str]] = {}
    printed: list[str] = []
    for line in README.splitlines():
        if line.startswith("    $ "):
            printed = shown.setdefault(line.removeprefix("    $ "), [])
        elif line.startswith("    "):
            printed.append(line.removeprefix("    "))
        else:
            printed = []
    return shown


@pytest.fixture(scope="module")
def pythia(tmp_path_factory) -> Path:
    """The folder in which these commands run."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "models").mkdir()
    command = [ROOT / "scripts" / "reports" / "catalogue.py", "pythia-160m", "models/pythia-160m.gguf", "Q8_0"]
    environment = os.environ | {"LLAMA_CPP_LIB_PATH": str(PATCHED), "PYTHONPATH": str(ROOT / "tests")}
    subprocess.run([sys.executable, *command], cwd=folder, env=environment, check=True, capture_output=True)
    return folder


def test_transcript(pythia, monkeypatch):
    """Sizes and bounds match to the last digit; measured figures match in form."""
    (plan_cache, planned_cache), (measure_cache, measured_cache), *rest = transcript().items()
    (plan, planned), (convert, converted), (measure, measured) = rest
    monkeypatch.chdir(pythia)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for command, printed in ((plan_cache, planned_cache), (plan, planned)):
        assert (
            subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout.splitlines() == printed
        )
    done = subprocess.run(shlex.split(convert), capture_output=True, text=True, check=True)
    said = (done.stderr + done.stdout).splitlines()
    assert [line for line in said if not line.startswith("tables: ")] == converted  # a bar at a terminal

    words, words_cache = (shlex.split(command.partition(" | ")[0]) for command in (measure, measure_cache))
    assert words[:2] + words[4:] == ["gguf-firstlayer", "bench", "--batch", "1,128"]
    assert words_cache == ["gguf-firstlayer", "bench", words[2], "--cache", "--batch", "1,128"]
    short = {"batches": (1, 128), "resources": False, "loads": 2, "seconds": 1}
    result, result_cache = bench(*words[2:4], **short), bench(words[2], cache="auto", **short)

    def form(lines: list[str]) -> list[str]:
        text = re.sub(VERDICTS, "VERDICT", "\n".join(lines))
        text = re.sub(r", \d+% of its gain realised", "", text).replace("1 thread,", "1 threads,")
        bounds = re.findall(r"bound by the plan [\d.]+", text)
        return [
            *re.sub(r"-?\d[\d,]*(\.\d+)?", "N", text).replace("not pinned", "each on a processor of its own").splitlines(),
            *bounds,
        ]

    assert form(summary(result)) == form(measured)
    assert form(summary(result_cache)) == form(measured_cache)


def test_langchain(smollm, smollm_flp):
    """The README's three lines. Oracle: the same with the stock library and the source."""
    code = re.search(r"    (import gguf_firstlayer.llama_cpp .*\n)    (from langchain.*\n)    llm = (.*)\n", README)
    assert code
    ask = code[3].replace('"model-flp.gguf"', "sys.argv[1], temperature=0, max_tokens=16, n_ctx=256, verbose=False")
    program = f"import sys\n{code[1]}{code[2]}print({ask}.invoke('The capital of France is'))"
    stock = program.replace("gguf_firstlayer.llama_cpp", "llama_cpp")
    texts = []
    for text, model, library in ((program, smollm_flp["f32"], PATCHED), (stock, smollm, STOCK)):
        command = [sys.executable, "-W", "ignore", "-c", text, model]
        environment = os.environ | ({"LLAMA_CPP_LIB_PATH": str(library)} if library == STOCK else {})
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout)
    assert "Paris" in texts[0]
    assert texts[0] == texts[1]


def test_table_of_models():
    """The figures are those of docs/gains.md."""
    gains = {}
    for line in (ROOT / "docs" / "gains.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        gains[cells[0]] = cells
    rows = [line.strip("|").split("|") for line in README.splitlines() if re.match(r"\| [\w.-]+ \| \+\d", line)]
    assert len(rows) == 12
    for name, prompt, decoding, prefill, memory, file, device in ([cell.strip() for cell in row] for row in rows):
        expected = gains[name]
        bounds = [expected[13], *expected[6:8]]
        assert [prompt, decoding, prefill] == [f"+{100 * (float(bound) - 1):.1f} %" for bound in bounds]
        assert [file.replace(" ", ""), device, memory] == [*expected[8:10], expected[12]]
