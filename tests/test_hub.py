"""Models of the Hugging Face Hub, and behind URLs. The Hub is a server of our own; what asks it is the real huggingface_hub."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType, GGUFValueType
from huggingface_hub import ModelCard, constants
from support.builds import ROOT
from support.command_line import cli, refusal, run_tool, split
from support.hub import COMMIT, Hub, hub
from support.models import lora, rewrite

from gguf_firstlayer import auto, card, convert, plan
from gguf_firstlayer import hub as remote
from gguf_firstlayer.file_format import Measurement
from gguf_firstlayer.text import size_text

TOKEN = "hf_secret"


def asked(server: Hub, home: Path, *words: object, **environment: str):
    """Run a verb as a user of this Hub, whose downloads are kept in this folder."""
    return cli(*words, env=os.environ | {"HF_ENDPOINT": server.address.rstrip("/"), "HF_HOME": str(home)} | environment)


def test_sidecar(smollm, tmp_path):
    """Written beside a download of ours, it is used by -hf, which does not download the model again."""
    with hub({"x-Q4_1.gguf": smollm}) as server:
        assert asked(server, tmp_path, "convert", "hf:user/x", "--type", "f32", "--sidecar").returncode == 0
        environment = os.environ | {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path)}
        options = ["-hf", "user/x", "-n", 8, "-p", "Once", "-no-cnv", "--temp", 0]
        tables = run_tool("llama-completion", *options, env=environment)
        cache = run_tool("llama-completion", *options, "--firstlayer", "", "--firstlayer-cache", "auto", env=environment)
        assert "the first layer comes from tables" in tables.stderr
        assert "rows of the first layer are cached" in cache.stderr
        assert tables.stdout == cache.stdout != ""
        assert server.downloaded == ["x-Q4_1.gguf"]


def test_tools_without_https(smollm, tmp_path):
    """What -hf takes is downloaded for them, tables included. Fails if a tool asks the Hub itself."""
    tables = convert(smollm, tmp_path / "x-Q4_1_firstlayer.gguf", type="f32", sidecar=True).output
    code = "import sys; from gguf_firstlayer import __main__, installation, run; "
    code += "run.build = lambda: installation.Build('', '', False); sys.exit(__main__.main(sys.argv[1:]))"
    options = ["-n", 8, "-p", "Once", "-no-cnv", "--temp", 0, "--firstlayer-cache", "auto"]
    with hub({"x-Q4_1.gguf": smollm, tables.name: tables}) as server:
        environment = os.environ | {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-c", code, "run", "main", "-hf", "user/x:Q4_1", *map(str, options)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        assert done.returncode == 0, done.stderr
        assert server.downloaded == ["x-Q4_1.gguf", tables.name]
    assert "the first layer comes from tables" in done.stderr
    assert "get_repo" not in done.stderr
    assert done.stdout == run_tool("llama-completion", "-m", smollm, *options).stdout != ""


@pytest.fixture
def files(smollm, llama, archs, tmp_path) -> dict[str, Path]:
    """A repository, with files beside its models as people upload them."""
    folder = tmp_path / "split"
    folder.mkdir()
    parts = split(archs / "falcon-dense.gguf", folder / "falcon-F16", "--split-max-tensors", "20")
    assert len(parts) > 1
    tables = convert(llama, tmp_path / "llama-Q4_K_M_firstlayer.gguf", type="f32", sidecar=True).output
    return {
        "llama-Q4_K_M_firstlayer.gguf": tables,
        "llama-IQ4_XS.gguf": llama,
        "llama-Q4_K_M.gguf": llama,
        "mmproj-F16.gguf": llama,
        "README.md": ROOT / "README.md",
        **{f"F16/{part.name}": part for part in parts},
        "smollm-Q4_1.gguf": smollm,
    }


def test_plan_reads_the_header_only(smollm, files, tmp_path):
    """Fails if more than the header's megabytes are asked for, or asked for twice."""
    with hub(files) as server:
        done = asked(server, tmp_path, "plan", "hf:user/x:Q4_1", "--json")
        assert json.loads(done.stdout) == json.loads(cli("plan", smollm, "--json").stdout) | {"name": "smollm-Q4_1.gguf"}
        assert server.ranges == [(0, (2 << 20) - 1)]
        assert asked(server, tmp_path, "plan", "hf:user/x:Q4_1", "--json").stdout == done.stdout
        assert len(server.ranges) == 1
        files["smollm-Q4_1.gguf"] = files["llama-Q4_K_M.gguf"]  # another version
    with hub(files) as server:
        assert asked(server, tmp_path, "plan", "hf:user/x:Q4_1", "--json").stdout != done.stdout


def test_a_long_header(llama, tmp_path):
    """As that of a model with hundreds of thousands of tokens: more is asked for than at first."""
    model = rewrite(llama, tmp_path / "x.gguf", keys={"general.description": ("x" * (3 << 20), GGUFValueType.STRING)})
    with hub({"x.gguf": model}) as server:
        done = asked(server, tmp_path, "plan", "hf:user/x/x.gguf", "--json")
        assert server.ranges == [(0, (2 << 20) - 1), (2 << 20, model.stat().st_size - 1)]
    assert json.loads(done.stdout)["decode_bound"] == plan(llama).decode_bound


def test_plan_of_a_repository(files, tmp_path):
    """One line for each model, of a split one too, and none for what is no model."""
    with hub(files) as server:
        done = asked(server, tmp_path, "plan", "hf:user/x", "--csv")
        assert done.returncode == 0, done.stderr
        rows = list(csv.DictReader(done.stdout.splitlines()))
        names = [f"llama-{kind}.gguf" for kind in ("IQ4_XS", "Q4_K_M")]
        first = next(name for name in files if "00001-of" in name)
        assert sorted(row["name"] for row in rows) == sorted([*names, "smollm-Q4_1.gguf", Path(first).name])
        bounds = [float(row["decode_bound"]) for row in rows]
        assert bounds == sorted(bounds, reverse=True)
        assert sum(end - begin for begin, end in server.ranges) < 12 << 20
        table = asked(server, tmp_path, "plan", "hf:user/x").stdout.splitlines()
        assert [line.split()[0] for line in table] == ["model", *(row["name"] for row in rows)]


def test_convert(files, llama, tmp_path):
    """Without a quantization, -hf takes Q4_K_M. The output is beside the file in the cache, where llama.cpp looks too."""
    with hub(files) as server:
        done = asked(server, tmp_path, "convert", "hf:user/x", "--type", "f32", "--json")
        assert done.returncode == 0, done.stderr
        written = Path(json.loads(done.stdout)["output"])
        assert written == tmp_path / f"hub/models--user--x/snapshots/{COMMIT}/llama-Q4_K_M-flp.gguf"
        assert written.read_bytes() == convert(llama, tmp_path / "x.gguf", type="f32").output.read_bytes()
        assert asked(server, tmp_path, "verify", "hf:user/x", written).returncode == 0
        assert asked(server, tmp_path, "revert", written, "--source", "hf:user/x", "-o", tmp_path / "y.gguf").returncode == 0
        assert server.downloaded == ["llama-Q4_K_M.gguf"]
    offline = asked(server, tmp_path, "inspect", "hf:user/x:q4_k_m", "--json", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert not json.loads(offline.stdout)["converted"]
    missing = refusal(asked(server, tmp_path, "inspect", "hf:user/x:Q4_1", HF_HUB_OFFLINE="1"))
    assert "hf:user/x:Q4_1 was not downloaded, as were llama-Q4_K_M.gguf" in missing
    for name in ("hf:user/y", f"{server.elsewhere}y.gguf"):
        refused = refusal(asked(server, tmp_path, "inspect", name, HF_HUB_OFFLINE="1"))
        assert "is not among what was downloaded from the Hub" in refused


def test_a_server_that_is_gone(files, tmp_path):
    """What was downloaded serves, as with -hf. Fails if a listing is asked for in vain, or the library's log is shown."""
    with hub(files) as server:
        assert asked(server, tmp_path, "inspect", "hf:user/x").returncode == 0
    names = "hf:user/x", "hf:user/x/llama-Q4_K_M.gguf"
    with ThreadPoolExecutor() as pool:  # huggingface_hub tries for a while
        runs = list(pool.map(lambda name: asked(server, tmp_path, "inspect", name), names))
    for name, done in zip(names, runs, strict=True):
        assert done.returncode == 0, done.stderr
        assert not re.search(r"Retry|Error", done.stderr), done.stderr
        assert ("only what was downloaded of user/x is known" in done.stderr) == (name == "hf:user/x")


def test_an_output_that_is_refused(files, llama, tmp_path):
    """Fails if a model is downloaded before that is found."""
    with hub(files) as server:
        for output in (llama, tmp_path / "none" / "x.gguf"):
            refusal(asked(server, tmp_path, "convert", "hf:user/x", "-o", output))
        assert server.downloaded == []


def test_a_storage_that_fails(files, tmp_path):
    """hf_xet's errors are no OSError. Fails with a traceback."""
    pytest.importorskip("hf_xet")  # not on every system; without it, files come from elsewhere
    with hub(files) as server:
        server.has_xet = True
        done = asked(server, tmp_path, "inspect", "hf:user/x")
        assert "hf:user/x cannot be downloaded" in refusal(done)


def test_plan_of_a_download(files, llama, tmp_path):
    """A server that sends no parts is no obstacle once the file is there. Fails if the header is asked for."""
    with hub(files) as server:
        server.sends_parts = False
        name = f"{server.elsewhere}smollm-Q4_1.gguf"
        assert "download the model first" in refusal(asked(server, tmp_path, "plan", name))
        assert asked(server, tmp_path, "inspect", name).returncode == 0
        done = asked(server, tmp_path, "plan", name)
        assert done.returncode == 0, done.stderr


def test_no_folder_for_downloads(llama, tmp_path):
    """A sentence from Python, too, whichever part of huggingface_hub meets it. Fails with its own errors."""
    home = tmp_path / "file"
    home.touch()
    code = """
import gguf_firstlayer, sys
try:
    gguf_firstlayer.inspect(sys.argv[1])
except gguf_firstlayer.FirstLayerError as err:
    print(err)
"""
    with hub({"x-Q4_1.gguf": llama}) as server:
        environment = os.environ | {"HF_ENDPOINT": server.address.rstrip("/"), "HF_HOME": str(home)}
        for name in ("hf:user/x", f"{server.address}files/x-Q4_1.gguf"):
            done = subprocess.run([sys.executable, "-c", code, name], env=environment, cwd=ROOT, capture_output=True, text=True)
            assert "cannot be kept" in done.stdout, done.stderr
            assert "set HF_HOME" in refusal(asked(server, home, "plan", name))


def test_a_split_model(files, archs, tmp_path):
    with hub(files) as server:
        done = asked(server, tmp_path, "convert", "hf:user/x:F16", "-o", tmp_path / "x.gguf", "--type", "f32")
        assert done.returncode == 0, done.stderr
        assert len(set(server.downloaded)) > 1
        again = asked(
            server, tmp_path / "2", "plan", f"{server.elsewhere}{next(name for name in files if '00001' in name)}", "--json"
        )
    assert json.loads(again.stdout)["decode_bound"] == plan(archs / "falcon-dense.gguf").decode_bound
    assert cli("verify", archs / "falcon-dense.gguf", tmp_path / "x.gguf").returncode == 0


def test_url(files, llama, tmp_path):
    """Of the Hub, or of any server, which gets no token."""
    with hub(files, TOKEN) as server:
        for url in (
            f"{server.address}user/x",
            f"{server.address}user/x/blob/main/llama-Q4_K_M.gguf",
            f"{server.elsewhere}llama-Q4_K_M.gguf?download=true",
        ):
            done = asked(server, tmp_path, "inspect", url, "--json", HF_TOKEN=TOKEN)
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout)["sites"] == json.loads(cli("inspect", llama, "--json").stdout)["sites"]
        assert f"Bearer {TOKEN}" in server.tokens["127.0.0.1"]
        assert server.tokens["localhost"] == {None}
        assert len(server.downloaded) == 2
        assert asked(server, tmp_path, "inspect", url).returncode == 0
        assert len(server.downloaded) == 2


@pytest.mark.parametrize(
    ("url", "file"),
    [
        ("https://huggingface.co/user/x/resolve/main/a/b.gguf", "a/b.gguf"),
        ("https://HuggingFace.co:443/user/x/blob/main/b.gguf?download=true", "b.gguf"),
        ("https://hf.co/user/x/resolve/main/b.gguf", "b.gguf"),
        ("http://mirror:81/hf/user/x/resolve/main/b.gguf", "b.gguf"),
        ("http://mirror:81/user/x/resolve/main/b.gguf", ""),
        ("http://mirror/hf/user/x/resolve/main/b.gguf", ""),
        ("https://huggingface.co/datasets/x", ""),
        ("https://huggingface.co.evil/user/x/resolve/main/b.gguf", ""),
    ],
)
def test_addresses(url, file, monkeypatch):
    """Fails if the token goes to another host, or an address of the Hub is not known as such."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://mirror:81/hf")
    found = remote._find(url)
    assert (found.repository, found.file) == (("user/x", file) if file else ("", url))


@pytest.mark.parametrize("name", ["hf:user/x:Q4_1", "elsewhere"])
def test_trouble_that_passes(name, files, smollm, tmp_path):
    """A busy server is asked again, not before the time that it said, and a download that breaks goes on where it ended."""
    with hub(files) as server:
        server.refusals = [(429, {"Retry_After": "1"}), (503, {"Retry_After": "0"})]
        server.breaks = [10 << 20, 20 << 20]
        name = f"{server.elsewhere}smollm-Q4_1.gguf" if name == "elsewhere" else name
        done = asked(server, tmp_path, "inspect", name, "--json")
        assert done.returncode == 0, done.stderr
        assert server.refusals == []
        assert server.waits[0] >= 0.9
        assert max(begin for begin, _ in server.ranges) > 20 << 20
        assert Path(json.loads(done.stdout)["path"]).read_bytes() == smollm.read_bytes()


def test_two_downloads_at_once(smollm, tmp_path):
    """The second one waits for the first, and finds its file. Fails without a lock: then both write the same file."""
    with hub({"x.gguf": smollm}) as server, ThreadPoolExecutor(2) as pool:
        server.meeting = threading.Barrier(2)
        both = list(pool.map(lambda _: asked(server, tmp_path, "inspect", f"{server.elsewhere}x.gguf", "--json"), range(2)))
        assert server.downloaded == ["x.gguf"]
    for done in both:
        assert done.returncode == 0, done.stderr
        assert Path(json.loads(done.stdout)["path"]).read_bytes() == smollm.read_bytes()


def test_a_server_that_tells_no_versions(files, smollm, tmp_path):
    """A download that breaks begins anew. Fails if the rest may come from another version."""
    with hub(files) as server:
        server.has_etags, server.breaks = False, [10 << 20]
        done = asked(server, tmp_path, "inspect", f"{server.elsewhere}smollm-Q4_1.gguf", "--json")
        assert done.returncode == 0, done.stderr
        assert server.breaks == server.ranges == []
        assert Path(json.loads(done.stdout)["path"]).read_bytes() == smollm.read_bytes()


def test_an_address_that_leads_to_another_server(files, smollm, tmp_path):
    """As those of releases do. Fails if the size and the version are taken from the answer that says where to go."""
    with hub(files) as server:
        name = f"{server.address}releases/smollm-Q4_1.gguf"
        done = asked(server, tmp_path, "plan", name, "--json")
        assert json.loads(done.stdout) == json.loads(cli("plan", smollm, "--json").stdout) | {"name": "smollm-Q4_1.gguf"}
        for version in ("llama-Q4_K_M.gguf", "llama-Q4_K_M_firstlayer.gguf"):
            files["smollm-Q4_1.gguf"] = files[version]
            done = asked(server, tmp_path, "inspect", name, "--json")
            assert Path(json.loads(done.stdout)["path"]).read_bytes() == files[version].read_bytes(), done.stderr


def test_a_download_that_lacks_its_name_only(files, llama, tmp_path):
    """The process was killed after the last byte. Fails if the server is asked for bytes after it, which it refuses."""
    with hub(files) as server:
        words = ["inspect", f"{server.elsewhere}llama-Q4_K_M.gguf", "--json"]
        path = Path(json.loads(asked(server, tmp_path, *words).stdout)["path"])
        path.rename(f"{path}.incomplete")
        done = asked(server, tmp_path, *words)
        assert done.returncode == 0, done.stderr
        assert path.read_bytes() == llama.read_bytes()
        assert len(server.downloaded) == 1


def test_answers_that_make_no_sense(files, llama, tmp_path):
    """Of several models, those that make sense are planned. A name cannot write to the terminal."""
    files = {"m-00001-of-00000.gguf": llama, "\x1b[2Jx.gguf": llama, "x-Q8_0.gguf": llama}
    with hub(files) as server:
        done = asked(server, tmp_path, "plan", "hf:user/x")
        assert done.returncode == 0, done.stderr
        assert "x-Q8_0" in done.stdout
        assert not re.search(r"\x1b|Traceback|00000", done.stdout + done.stderr)
        server.answer = b'[{"type": "file"}]'
        assert "the server's answer is malformed" in refusal(asked(server, tmp_path, "plan", "hf:user/x"))


def test_refusals(files, tmp_path):
    with hub(files, TOKEN) as server:
        assert "is gated; accept its terms" in refusal(asked(server, tmp_path, "plan", "hf:user/x"))
        wrong = refusal(asked(server, tmp_path, "convert", "hf:user/x/llama-Q4_K_M.gguf", HF_TOKEN="hf_wrong"))
        assert "is gated; accept its terms" in wrong
        known = {"HF_TOKEN": TOKEN}
        assert "does not exist, or is private" in refusal(asked(server, tmp_path, "plan", "hf:nobody/x", **known))
        missing = refusal(asked(server, tmp_path, "plan", "hf:user/x:Q8_0", **known))
        assert "no such GGUF model; it has falcon-F16-00001-of-" in missing
        assert "does not exist" in refusal(asked(server, tmp_path, "inspect", "hf:user/x/none.gguf", **known))
        assert "does not exist" in refusal(asked(server, tmp_path, "inspect", f"{server.elsewhere}none.gguf"))
        assert "is no model on the Hub" in refusal(asked(server, tmp_path, "plan", "hf:x", **known))
        assert "is not a GGUF file" in refusal(asked(server, tmp_path, "plan", f"{server.elsewhere}README.md"))
        server.refusals = [(403, {})] * 9
        forbidden = refusal(asked(server, tmp_path, "plan", "hf:user/x", **known))
        assert "cannot be read: the server answers 403; check its name, and HF_TOKEN" in forbidden
    # nothing listens any more
    gone = asked(server, tmp_path, "inspect", "hf:user/x/llama-Q4_K_M.gguf")
    assert "the server does not answer; trying again" in gone.stderr
    assert "cannot be reached" in refusal(gone)


def test_run(files, smollm, tmp_path):
    """A tool gets the file that a model is downloaded to; a prompt that looks like one stays as it is."""
    options = ["-n", 8, "-p", "hf:user/x", "-no-cnv", "--temp", 0]
    adapter = lora(tmp_path / "lora.gguf", "blk.0.attn_q.weight", 576, 576)
    with hub(files | {"lora.gguf": adapter}) as server:
        done = asked(server, tmp_path, "run", "main", "-m", "hf:user/x:Q4_1", *options)
        assert done.returncode == 0, done.stderr
        assert done.stdout == cli("run", "main", "-m", smollm, *options).stdout != ""
        assert server.downloaded == ["smollm-Q4_1.gguf"]
        adapted = asked(server, tmp_path, "run", "main", "-m", "hf:user/x:Q4_1", "--lora", "hf:user/x/lora.gguf", *options)
        assert adapted.stdout == cli("run", "main", "-m", smollm, "--lora", adapter, *options).stdout != ""
        assert server.downloaded == ["smollm-Q4_1.gguf", "lora.gguf"]
        assert "no such GGUF model" in refusal(asked(server, tmp_path, "run", "main", "-m", "hf:user/x:Q8_0"))


def test_a_folder(files, tmp_path):
    """Fails if models in it are missing, or one that cannot be planned ends all."""
    folder = tmp_path / "models" / "inner"
    folder.mkdir(parents=True)
    for name, path in files.items():
        shutil.copy(path, folder / Path(name).name)
    (folder / "broken.gguf").write_bytes(b"GGUF")
    done = cli("plan", folder.parent, "--json")
    result = json.loads(done.stdout)
    first = next(Path(name).name for name in files if "00001-of" in name)
    assert sorted(each["name"] for each in result["plans"]) == sorted(
        ["llama-IQ4_XS.gguf", "llama-Q4_K_M.gguf", "smollm-Q4_1.gguf", first]
    )
    assert list(result["refused"]) == [str(folder / "broken.gguf")]
    assert "broken.gguf is truncated" in cli("plan", folder.parent).stderr

    (folder / "again").symlink_to(folder.parent)  # a circle
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "link").symlink_to(folder.parent)
    assert len(json.loads(cli("plan", elsewhere, "--json").stdout)["plans"]) == len(result["plans"])
    for models, code in (([folder], 0), ([folder / "llama-Q4_K_M.gguf", "none.gguf"], 1)):
        assert cli("plan", *models).returncode == code


def test_card(smollm, llama, tmp_path, monkeypatch):
    """Its figures are those of the file. Oracle of its metadata: the Hub's own library."""
    measured = Measurement(500, 1e-4, 3.9e-3, 3.8e-3, 3.2e-5, 1.1e-5, 0.97, 12.5, 12.6)
    chosen = lambda _model, analysis, _bound: (dict.fromkeys(analysis.sites, GGMLQuantizationType.Q8_0), measured, "")  # noqa: E731
    monkeypatch.setattr(auto, "choose", chosen)
    convert(smollm, tmp_path / "x-flp.gguf", type="auto")
    plain = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}  # a card is a file, whatever the terminal takes
    command = [sys.executable, "-m", "gguf_firstlayer", "card", tmp_path / "x-flp.gguf", "--base-model", "user/x"]
    text = subprocess.run(command, cwd=ROOT, env=os.environ | plain, capture_output=True, check=True).stdout.decode()
    data = ModelCard(text).data
    assert (data.base_model, data.base_model_relation, data.license) == ("user/x", "quantized", "apache-2.0")
    assert "a mean KL divergence of 3.9e-03 nats from the source, of which 3.2e-05 ± 1.1e-05" in text
    assert "perplexity 12.500 without the tables, 12.600 with them" in text
    assert f"| its source | {size_text(smollm.stat().st_size)} |" in text
    assert "run server -m x-flp.gguf\n" in text

    cached = tmp_path / "models--other--name" / "snapshots" / "1"
    cached.mkdir(parents=True)
    sidecar = convert(smollm, cached / "x_firstlayer.gguf", type="f32", sidecar=True).output
    text = card(sidecar)
    assert ModelCard(text).data.base_model == "other/name"
    assert "run server -m x.gguf --firstlayer x_firstlayer.gguf\n" in text
    assert "The tables are not rounded." in text
    other = Path(shutil.copy(sidecar, cached / "tables.gguf"))
    assert "run server -m SOURCE.gguf --firstlayer tables.gguf\n" in card(other)
    assert "-hf" not in card(other)

    texts = {"general.source.repo_url": "https://huggingface.co/a/b/tree/main", "general.name": "<script>x"}
    keys = {key: (value, GGUFValueType.STRING) for key, value in texts.items()}
    renamed = rewrite(convert(llama, tmp_path / "y-flp.gguf", type="q8_0").output, tmp_path / "z.gguf", keys=keys)
    assert ModelCard(card(renamed)).data.base_model == "a/b"
    assert "<" not in card(renamed)
    assert "not converted" in refusal(cli("card", smollm))
    assert "give --base-model user/repo" in refusal(cli("card", tmp_path / "x-flp.gguf"))
    assert "is no repository" in refusal(cli("card", tmp_path / "x-flp.gguf", "--base-model", "x"))
