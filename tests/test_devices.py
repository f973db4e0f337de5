"""Devices other than the CPU: over RPC, on Vulkan if it was built, and what llama.cpp's tables of its backends say."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from architectures import distance
from support.builds import PATCHED, ROOT, both, preload, run
from support.command_line import cli, refusal, run_tool
from support.models import convert
from support.rpc import counting_proxy, rpc_server

from gguf_firstlayer.file_format import TYPES

#
# offload
#


def offloaded(
    model: Path, servers: str, *options: object, prompt: str = "Once upon a time", **environment: str
) -> tuple[str, list[str]]:
    """Greedy text with all layers on RPC servers, and the scheduler's log of the last graph. Tables are read lazily."""
    arguments = ["-m", model, "--rpc", servers, "-ngl", 99, "-t", 1, "-c", 768, "-no-cnv", "--temp", 0, "-n", 24]
    variables = os.environ | {"GGML_SCHED_DEBUG": "2"} | environment
    del variables["LLAMA_ARG_DEVICE"]
    done = run_tool("llama-completion", *arguments, "-p", prompt, "-lv", 5, *options, env=variables)
    assert done.returncode == 0, done.stderr[-2000:]
    assert ("lazy read enabled" in done.stderr) == ("firstlayer.0.table" in done.stderr)
    assert ("this device cannot map" in done.stderr) == ("LD_PRELOAD" in environment)
    log = re.sub(r"\d+\.\d+\.\d+\.\d+ [A-Z] ", "", done.stderr)
    return done.stdout, log[log.rindex("## SPLIT #0") :].splitlines()


@pytest.mark.parametrize("n_servers", [1, 2])
def test_rpc(n_servers, smollm, smollm_flp):
    """The same text with all layers offloaded. The table stays on the host, its rows are copied to layer 0's device once, and
    the devices are not interrupted more often than without tables.
    """
    with ExitStack() as stack:
        servers = ",".join(stack.enter_context(rpc_server()) for _ in range(n_servers))
        (source, source_log), (converted, log) = both(lambda model: offloaded(model, servers), smollm, smollm_flp["f32"])
    assert len(source.split()) > 10
    assert source == converted

    splits = [line for line in log if line.startswith("## SPLIT")]
    assert len(splits) == len([line for line in source_log if line.startswith("## SPLIT")]) == 1 + n_servers
    lookup = next(line for line in log if "GET_ROWS" in line and "firstlayer.0.table" in line)
    assert re.search(r"firstlayer\.0 +\([^)]*\) \[ +CPU", lookup)
    assert re.search(r"firstlayer\.0\.table +\([^)]*\) \[ +CPU", lookup)
    inputs = re.findall(r"\[(\S+) +\(", splits[1])
    assert [name for name in inputs if name.startswith(("firstlayer", "Qcur", "Kcur", "Vcur"))] == ["firstlayer.0"]
    product = next(line for line in log if "MUL_MAT" in line and "blk.0.attn_output" in line)
    assert "RPC0" in product


@pytest.mark.parametrize("weights", [[], ["-ot", r"blk\.0\.attn_[qkv]\.=CPU"]], ids=["on the device", "on the host"])
def test_rpc_with_a_cache(weights, smollm):
    """Rows are kept where layer 0 computes, and looked up there, even if the weights that they are computed from are not."""
    with rpc_server() as address:
        (source, source_log), (cached, log) = both(
            lambda options: offloaded(smollm, address, *weights, *options), [], ["--firstlayer-cache", 8]
        )
        _, log_of_prompt = offloaded(smollm, address, *weights, "--firstlayer-cache", 8, "-n", 1, prompt=" once" * 512)
    assert source == cached
    assert len(source.split()) > 10
    for lines in (log, log_of_prompt):
        lookup = next(line for line in lines if "GET_ROWS" in line and "firstlayer.cache" in line)
        assert len(re.findall(r"\[RPC0", lookup)) >= 2
    # the slots go there, and no rows
    inputs = [name for line in log if line.startswith("## SPLIT") for name in re.findall(r"\[(\S+) +\(", line)]
    assert [name for name in inputs if name.startswith(("firstlayer", "Qcur", "Kcur", "Vcur"))] == ["firstlayer.slots"]
    splits, source_splits = (sum(line.startswith("## SPLIT") for line in lines) for lines in (log, source_log))
    assert splits == 2
    assert source_splits >= splits


def test_rpc_with_demand(smollm):
    """Rows of a prompt are selected on the device, which is not interrupted for it. Fails if they go over the network."""
    with rpc_server() as address:
        (source, _), (ours, _) = both(lambda options: offloaded(smollm, address, *options), [], ["--demand", "rows"])
        _, source_log = offloaded(smollm, address, "-n", 1)  # the last graph is the prompt's
        _, log = offloaded(smollm, address, "-n", 1, "--demand", "rows")
    assert source == ours
    assert len(source.split()) > 10
    selected = [line for line in log if "GET_ROWS" in line and "(row" in line]  # names are cut off
    assert any("attn_norm-29" in line and "[RPC0" in line for line in selected), selected
    splits, source_splits = (sum(line.startswith("## SPLIT") for line in lines) for lines in (log, source_log))
    assert splits <= source_splits


# bytes of a row of SmolLM2's tables, as they are stored or, where devices cannot turn a type into F32, as F32
ROWS = {"q8_0": 960 // 32 * 34, "q4_0": 960 // 32 * 18, "f16": 960 * 2, "iq4_nl": 960 * 4}


@pytest.mark.parametrize(("kind", "n_predict"), [("q8_0", 1), ("q8_0", 9), ("q4_0", 9), ("f16", 1), ("iq4_nl", 9)])
def test_bytes_to_a_device(kind, n_predict, smollm, tmp_path):
    """What goes over the network for each token: the row of the tables and that of the embedding, both as stored. With Q8_0
    tables, that is less than the embedding's row alone in the source, where it is F32.
    """

    def sent(model: Path) -> dict[str, float]:
        with rpc_server() as server, counting_proxy(server) as (address, counted):
            offloaded(model, address, "-n", n_predict, "--no-warmup", prompt=" once" * 512)
        n_tokens = counted["inp_pos"] / 4
        return {name: n_bytes / n_tokens for name, n_bytes in counted.items() if "embd" in name or "firstlayer" in name}

    embedding = 576 // 32 * 34
    ours = sent(convert(smollm, tmp_path / "flp.gguf", type=kind).output)
    assert sum(ours.values()) == ROWS[kind] + embedding, ours
    source = sent(smollm)
    assert sum(source.values()) == 576 * 4, source
    assert (sum(ours.values()) <= sum(source.values())) == (kind in ("q8_0", "q4_0"))


@pytest.mark.skipif(sys.platform != "linux", reason="preloads a library")
def test_device_that_cannot_map(smollm_flp, tmp_path):
    """Beside it, llama.cpp reads nothing lazily; but tables are on the host. Fails if they are loaded whole."""
    preloaded = tmp_path / "no_mapping.so"
    include = f"-I{ROOT / 'build' / 'llama.cpp' / 'ggml' / 'include'}"
    source = Path(__file__).with_name("support") / "no_mapping.cpp"
    subprocess.run(["c++", "-shared", "-fPIC", include, source, "-o", preloaded], check=True)
    with rpc_server() as address:
        texts = [offloaded(smollm_flp["f32"], address, **more)[0] for more in ({}, preload(preloaded))]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", ["smollm", "falcon-dense", "mamba-dense", "t5-dense"])
def test_rows_of_a_device(name, archs, smollm, tmp_path):
    """An RPC server computes rows with the CPU's kernels, so the file is the same. Fails if rows come from here instead: then
    nothing goes there.
    """
    source = smollm if name == "smollm" else archs / f"{name}.gguf"
    here = convert(source, tmp_path / "here.gguf", type="f32").output
    with rpc_server() as server, counting_proxy(server) as (address, counted):
        done = cli("convert", source, "-o", tmp_path / "there.gguf", "--type", "f32", "--device", address)
    assert done.returncode == 0, done.stderr
    assert here.read_bytes() == (tmp_path / "there.gguf").read_bytes()
    assert sum(counted.values()) > 0


def test_unknown_device(llama, tmp_path):
    for name in ("CUDA9", "127.0.0.1:1", ":1", ":"):
        assert f"there is no device '{name}'" in refusal(cli("convert", llama, "-o", tmp_path / "x.gguf", "--device", name))
    assert not list(tmp_path.iterdir())


@pytest.fixture(params=["patched", "vulkan"])
def device_build(request, monkeypatch) -> Path:
    """A build that has a device: Metal on macOS, or what scripts/test-vulkan builds."""
    monkeypatch.setenv("GGML_VK_VISIBLE_DEVICES", "0")  # otherwise llama.cpp leaves out software devices
    monkeypatch.setenv("GALLIVM_PERF", "nopt")  # faster for kernels that run only once
    build = PATCHED if request.param == "patched" else ROOT / "build" / "vulkan" / "bin"
    if not build.exists() or run(build, {"run": "devices"})[0] == ["CPU"]:
        if os.environ.get("FIRSTLAYER_NEEDS_DEVICE") == request.param:
            pytest.fail("there is no device")
        pytest.skip("no device")
    return build


@pytest.mark.parametrize("name", ["llama-dense", "falcon-dense", "command-r-dense", "gemma3-dense", "mamba-dense"])
def test_device(name, device_build, archs, tmp_path):
    """With layer 0 on the CPU, where rows were computed, logits equal the source's on the same devices bit for bit.
    With all layers on the device, where the source rounds differently, the greedy text is the same.
    """
    source = archs / f"{name}.gguf"
    converted = convert(source, tmp_path / "flp.gguf", type="f32").output
    prompts = [{"count": 24, "seed": seed} for seed in (1, 2)]
    jobs = [
        {"run": "logits", "tokens": prompts[0], "batches": [7], "load": {"n_gpu_layers": 2}},
        {"run": "greedy", "prompts": prompts, "n_predict": 24, "load": {"n_gpu_layers": 99}},
    ]
    (stock, stock_text), (ours, our_text) = (
        run(device_build, *(job | {"model": model} for job in jobs)) for model in (source, converted)
    )
    assert np.array_equal(stock[7], ours[7])
    assert stock_text == our_text


@pytest.mark.parametrize("name", ["llama-dense", "falcon-dense", "mamba-dense"])
def test_device_with_own_rows(name, device_build, archs, tmp_path):
    """With all layers on the device that computed the rows, logits differ from the source's there by no more than batch sizes
    do, and the greedy text is the same.
    """
    source = archs / f"{name}.gguf"
    logits = {"run": "logits", "tokens": {"count": 96, "seed": 1}, "batches": [1, 7, 64], "load": {"n_gpu_layers": 99}}
    greedy = {"run": "greedy", "prompts": [{"count": 24, "seed": 1}], "n_predict": 24, "load": {"n_gpu_layers": 99}}
    (devices,) = run(device_build, {"run": "devices"})
    device = next(found for found in devices if found != "CPU")
    job = {"run": "converted_on", "model": source, "output": tmp_path / "x.gguf", "device": device}
    run(device_build, job)
    (stock, text), (ours, our_text) = (
        run(device_build, *(job | {"model": model} for job in (logits, greedy))) for model in (source, tmp_path / "x.gguf")
    )
    own = max(distance(stock[64], stock[size]) for size in (1, 7))
    assert all(distance(stock[size], ours[size]) <= 1.5 * own for size in (1, 7, 64))
    assert text == our_text


@pytest.mark.parametrize("name", ["llama-dense", "falcon-dense", "command-r-dense", "gemma3-dense", "mamba-dense"])
def test_device_with_a_cache(name, device_build, archs):
    """Rows come from the device's own kernels, so logits differ by no more than batch sizes do there; also where rows are
    evicted, and where layer 0 is on the CPU.
    """
    job = {"run": "logits", "model": archs / f"{name}.gguf", "tokens": {"count": 96, "seed": 1}, "batches": [1, 7, 64]}
    for layers in (2, 99):
        loads = [{"n_gpu_layers": layers} | cache for cache in ({}, {"cache": 8}, {"cache_rows": 70})]
        stock, *cached = run(device_build, *(job | {"load": load} for load in loads))
        own = max(distance(stock[64], stock[size]) for size in (1, 7))
        for found in cached:
            assert found["cache"]["n_hits"] > 0
            for size in job["batches"]:
                assert distance(stock[size], found[size]) <= 1.5 * own


@pytest.mark.parametrize("name", ["llama-dense", "falcon-dense", "gemma3-dense", "gemma4-dense", "mamba-dense"])
def test_device_with_demand(name, device_build, archs):
    """The greedy text after a prompt is that of the same device without."""
    job = {"run": "greedy", "model": archs / f"{name}.gguf", "prompts": [{"count": 40, "seed": 1}], "n_predict": 24}
    stock, ours = run(device_build, *(job | {"load": {"n_gpu_layers": 99} | more} for more in ({}, {"demand": "rows"})))
    assert stock == ours


#
# backends that this machine does not have
#


# tests/test_architectures.py shows that a rewritten graph has only operations that the stock graph has for the same types,
# except for lookups on the host and copies of F32
def supported(backend: str, operation: str, pattern: str) -> list[bool]:
    """What llama.cpp's table of a backend says about an operation with matching parameters; tables come from supports_op."""
    with (ROOT / "build" / "llama.cpp" / "docs" / "ops" / f"{backend}.csv").open() as file:
        return [
            row["supported"] == "1"
            for row in csv.DictReader(file)
            if row["op_name"] == operation and re.search(pattern, row["op_params"])
        ]


def test_types_of_tables():
    """Lookups run on the CPU, which has one for every type; llama.cpp's table of the CPU leaves out four."""
    assert all(supported("CPU", "GET_ROWS", ""))
    listed = {kind for kind in TYPES if supported("CPU", "GET_ROWS", f"(?i)type={kind},")}
    assert set(TYPES) - listed == {"tq1_0", "tq2_0", "nvfp4", "q1_0"}


@pytest.mark.parametrize("backend", ["CUDA", "Metal", "Vulkan", "SYCL", "OpenCL", "WebGPU", "CANN"])
def test_backend_support(backend):
    """The rewrite adds copies of F32, and gives operations rows with gaps between them: every backend supports both."""
    cases = [
        ("CONT", "type=f32"),
        ("ROPE", "type=f32.*,v=1"),
        ("NORM", "type=f32.*,v=1"),
        ("RMS_NORM", "type=f32.*,v=1"),
        ("SET_ROWS", "^(type=f32|type_src=f32,type_dst=f(32|16)),.*,v=1"),
        ("CPY", "type_src=f32,type_dst=f32,.*permute_src=(?!.0,0,0,0.)"),
    ]
    for operation, pattern in cases:
        answers = supported(backend, operation, pattern)
        assert answers, (operation, pattern)
        assert all(answers), (operation, pattern)


def test_gpu_report_needs_little():
    """scripts/test-gpu packs few packages, for machines without a network. Fails if the report imports another one."""
    words = re.search(r"cp -r (llama_cpp.*?) \.\./", (ROOT / "scripts" / "test-gpu").read_text(), re.DOTALL)[1].split()
    packed = {word.rstrip("*").removesuffix(".py") for word in words}
    code = f"""
import importlib.abc, sys
class Packed(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if path is None and name not in {packed!r} | sys.stdlib_module_names | {{"gpu", "gpu_page", "gguf_firstlayer"}}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Packed())
import gpu
"""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "scripts" / "reports")))
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
