"""llama-cpp-python on the patched libraries: `import gguf_firstlayer.llama_cpp`."""

from __future__ import annotations

import importlib.metadata
import os
import sys
import tarfile
from contextlib import AbstractContextManager
from pathlib import Path

import openai
import pytest
from support.builds import STOCK
from support.command_line import python
from support.servers import openai_client

from gguf_firstlayer import paths

MESSAGES = [{"role": "user", "content": "Name three colours."}]


TEXTS = """
import sys
{bindings}
llama = llama_cpp.Llama(model_path=sys.argv[1], n_ctx=256, n_threads=1, n_gpu_layers=0, verbose=False, embedding=False)
ask = dict(temperature=0, max_tokens=24)
messages = [{{"role": "user", "content": "Name three colours."}}]
print(llama("Once upon a time", **ask)["choices"][0]["text"])
print(llama.create_chat_completion(messages, **ask)["choices"][0]["message"]["content"])
parts = [part["choices"][0]["delta"].get("content", "") for part in llama.create_chat_completion(messages, stream=True, **ask)]
assert len(parts) > 4
print("".join(parts))
llama = llama_cpp.Llama(model_path=sys.argv[1], n_ctx=256, n_threads=1, n_gpu_layers=0, verbose=False, embedding=True)
print(llama.create_embedding("Hello world")["data"][0]["embedding"])
print("firstlayer" in str(llama.metadata))
"""


def test_same_as_stock(smollm, smollm_flp):
    """Completion, chat, streaming, embeddings. Oracle: the bindings on the stock library, with the source."""
    ours = python(TEXTS.format(bindings="import gguf_firstlayer.llama_cpp as llama_cpp"), smollm_flp["f32"])
    theirs = python(TEXTS.format(bindings="import llama_cpp"), smollm, LLAMA_CPP_LIB_PATH=str(STOCK))
    assert theirs.returncode == 0, theirs.stderr
    assert ours.returncode == 0, ours.stderr
    *texts, converted = ours.stdout.splitlines()
    *expected, plain = theirs.stdout.splitlines()
    assert texts == expected
    assert (converted, plain) == ("True", "False")


def test_row_cache(smollm):
    """An override of the model, with an int, a float or "auto"; the text is the same, and the package says what it did."""
    code = """
import gguf_firstlayer, sys
import gguf_firstlayer.llama_cpp as llama_cpp
for overrides in (None, {"firstlayer.cache": 1}, {"firstlayer.cache": 0.5}, {"firstlayer.cache": "auto"}):
    llama = llama_cpp.Llama(sys.argv[1], n_ctx=256, n_threads=1, n_gpu_layers=0, verbose=False, kv_overrides=overrides)
    print(llama("Once upon a time", temperature=0, max_tokens=24)["choices"][0]["text"])
    cache = gguf_firstlayer.row_cache(llama)
    print(cache and (cache.max_rows, cache.misses == cache.rows > 0, cache.hits > 0))
llama.close()
assert gguf_firstlayer.row_cache(llama) is None
"""
    done = python(code, smollm)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines[0]) > 40
    assert lines[::2] == lines[:1] * 4
    assert lines[1::2] == ["None", "(273, True, True)", "(136, True, True)", "(4096, True, True)"]


def test_log_after_row_cache(smollm):
    """llama-cpp-python goes on to log. Fails if the package takes over its callback to ask for the cache."""
    code = """
import gguf_firstlayer, sys
import gguf_firstlayer.llama_cpp as llama_cpp
lines = []
callback = llama_cpp.llama_log_callback(lambda level, text, _: lines.append(text))
llama_cpp.llama_log_set(callback, None)
for _ in range(2):
    lines.clear()
    llama = llama_cpp.Llama(sys.argv[1], n_ctx=64, n_gpu_layers=0, verbose=False)
    gguf_firstlayer.row_cache(llama)
    print(any(b"general.architecture" in line for line in lines))
"""
    done = python(code, smollm)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "True"]


def test_demand(smollm):
    """An override of the model: the same text, and embeddings without logits."""
    code = """
import sys
import numpy as np
import gguf_firstlayer.llama_cpp as llama_cpp
common = {"n_ctx": 256, "n_threads": 1, "n_gpu_layers": 0, "verbose": False, "flash_attn": False}
vectors = []
for demand in ("none", "rows", "embeddings"):
    overrides = {"firstlayer.demand": demand}
    llama = llama_cpp.Llama(sys.argv[1], kv_overrides=overrides, **common)
    print(llama("Once upon a time", temperature=0, max_tokens=24)["choices"][0]["text"])
    pooling = llama_cpp.LLAMA_POOLING_TYPE_LAST
    llama = llama_cpp.Llama(sys.argv[1], embedding=True, pooling_type=pooling, kv_overrides=overrides, **common)
    vectors.append(np.array(llama.embed(["Once upon a time", "The sea was calm that evening."])))
    print(bool(llama_cpp.llama_get_logits(llama.ctx)))
print(all(np.array_equal(vectors[0], other) for other in vectors))
"""
    done = python(code, smollm)
    assert done.returncode == 0, done.stderr
    *lines, same_vectors = done.stdout.splitlines()
    assert len(lines[0]) > 40
    assert lines[::2] == lines[:1] * 3
    assert lines[1::2] == ["True", "True", "False"]
    assert same_vectors == "True"


def test_it_is_the_module_itself():
    done = python(
        "import gguf_firstlayer.llama_cpp as ours, llama_cpp, gguf_firstlayer\n"
        "from gguf_firstlayer.llama_cpp import Llama\n"
        "assert ours is llama_cpp is gguf_firstlayer.llama_cpp and Llama is llama_cpp.Llama\n"
        "print(llama_cpp.llama_cpp._lib._name)"
    )
    assert done.stdout.strip() == str(paths()["libllama"]), done.stderr


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ("import importlib.metadata; importlib.metadata.version = lambda name: '0.3.35'", "0.3.35 does not fit"),
        (
            "import importlib.metadata as m\ndef version(name): raise m.PackageNotFoundError(name)\nm.version = version",
            "is not installed",
        ),
        ("import llama_cpp", "already imported"),
        (
            "import gguf_firstlayer, sys\n"
            "paths = sys.modules['gguf_firstlayer.installation']\n"
            "paths.build = lambda: paths.Build('of a checkout', '', True)",
            "another llama.cpp",
        ),
    ],
    ids=["version", "missing", "too late", "other llama.cpp"],
)
def test_what_does_not_fit(before, reason):
    """One clear error instead of a crash on a structure that has changed."""
    code = (
        f"{before}\nfrom gguf_firstlayer import FirstLayerError\n"
        "try:\n    import gguf_firstlayer.llama_cpp\nexcept FirstLayerError as err:\n    print(err)"
    )
    done = python(code, LLAMA_CPP_LIB_PATH=str(STOCK))
    assert reason in done.stdout, done.stderr
    assert len(done.stdout.splitlines()) == 1


def test_its_server_says_what_is_wrong():
    """One sentence, no traceback."""
    code = (
        "import importlib.metadata as m, runpy, sys\n"
        "def version(name): raise m.PackageNotFoundError(name)\n"
        "m.version = version\n"
        "runpy.run_module('gguf_firstlayer.llama_cpp', run_name='__main__', alter_sys=True)"
    )
    done = python(code)
    assert done.returncode == 1
    assert done.stderr.startswith("gguf-firstlayer: llama-cpp-python is not installed: ")
    assert "pip install --no-cache-dir llama-cpp-python==" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def server(module: str, model: Path, **environment: str) -> AbstractContextManager[openai.OpenAI]:
    """An OpenAI client for a server of the bindings."""
    options = ["--n_ctx", 256, "--n_threads", 1]
    return openai_client([sys.executable, "-m", module, "--model", model, *options], environment)


def answers(client: openai.OpenAI) -> list[str | None]:
    """The answers to a chat, whole and streamed."""
    ask = {"model": "any", "messages": MESSAGES, "temperature": 0, "max_tokens": 24}
    parts = [part.choices[0].delta.content or "" for part in client.chat.completions.create(stream=True, **ask)]
    assert len(parts) > 4
    return [client.chat.completions.create(**ask).choices[0].message.content, "".join(parts)]


def test_its_server(smollm, smollm_flp):
    """Oracle: its server on the stock library, with the source."""
    with (
        server("gguf_firstlayer.llama_cpp", smollm_flp["f32"]) as ours,
        server("llama_cpp.server", smollm, LLAMA_CPP_LIB_PATH=str(STOCK)) as theirs,
    ):
        assert answers(ours) == answers(theirs)


def test_tests_of_llama_cpp_python(tmp_path):
    """Run its tests that download nothing, on our libraries."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gguf-firstlayer"
    folder = f"llama_cpp_python-{importlib.metadata.version('llama-cpp-python')}"  # other releases may be there too
    with tarfile.open(cache / f"{folder}.tar.gz") as archive:
        wanted = (f"{folder}/tests/", f"{folder}/vendor/llama.cpp/models/ggml-vocab-llama")
        for member in archive:
            if member.name.startswith(wanted):
                archive.extract(member, tmp_path)
    code = (
        "import gguf_firstlayer.llama_cpp, huggingface_hub, os, pytest, sys\n"
        "huggingface_hub.hf_hub_download = lambda *_: pytest.skip('downloads')\n"
        "os.chdir(sys.argv[1])\n"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', 'tests']))"
    )
    done = python(code, tmp_path / folder)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(done.stdout.split(" passed")[0].split()[-1]) >= 8  # a release may add some
