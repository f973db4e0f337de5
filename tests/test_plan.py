"""Plans, compared with the paper, with conversions, and with the tensors of files."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import gains
import numpy as np
import pytest
from gguf import GGUFReader
from support.builds import ROOT, compare
from support.command_line import cli, refusal, split
from support.models import convert

from gguf_firstlayer import FirstLayerError, Shape, plan, plan_all
from gguf_firstlayer.cost import of_file
from gguf_firstlayer.device import GATHER, LAYER, LOOKUP
from gguf_firstlayer.errors import UsageError
from gguf_firstlayer.estimate import estimate
from gguf_firstlayer.file_format import TYPES
from gguf_firstlayer.runtime import Analysis
from gguf_firstlayer.selection import read_growth, select
from gguf_firstlayer.source import Source

# arXiv 2402.13388: shape; weights eliminated; reads of one token without and with; reductions for batches of 1, 16, 256, 1024;
# growth of the stored values; net change, also in per cent
PAPER = {
    "Pythia-6.9B": (
        Shape(50400, 4096, 32, 32, 32, 16384, feed_forward_matrices=2, parallel=True),
        (184_549_376, 184_553_472, 16_384, (11_264, 704, 44, 11), 619_315_200, 434_765_824, 6),
    ),
    "Mistral-7B": (
        Shape(32000, 4096, 32, 32, 8, 14336),
        (25_165_824, 25_169_920, 10_240, (2_458, 154, 10, 3), 196_608_000, 171_442_176, 2),
    ),
    "parallel Mixtral-8x7B": (
        Shape(32000, 4096, 32, 32, 8, 14336, expert_count=8, parallel=True),
        (1_434_451_968, 1_434_456_064, 10_240, (140_084, 8_756, 548, 137), 196_608_000, -1_237_843_968, -3),
    ),
}


@pytest.fixture(scope="session")
def headers(tmp_path_factory) -> dict[str, Path]:
    """Headers of published models, without data."""
    return {path.stem: path for path in gains.headers(tmp_path_factory.mktemp("headers"))}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_tables(name):
    shape, (eliminated, without, instead, reductions, growth, net, percent) = PAPER[name]
    result = plan(shape.cost_model(), type="f16")
    assert result.values_eliminated == eliminated
    assert (result.reads[0].values_without, result.reads[0].values_with) == (without, instead)
    assert [row.batch for row in result.reads] == [1, 16, 256, 1024]
    assert tuple(round(row.reduction) for row in result.reads) == reductions
    assert result.values_stored == growth
    assert result.values_stored - eliminated == net
    assert round(100 * net / result.parameters) == percent
    assert result.file_change == 2 * net  # F16, as the weights


SHAPE = (
    "vocab_size=50400,embedding_length=4096,block_count=32,head_count=32,head_count_kv=32,feed_forward_length=16384,"
    "feed_forward_matrices=2,PARALLEL"
)


def test_shape_on_the_command_line():
    parallel = SHAPE.replace("PARALLEL", "parallel")
    report = json.loads(cli("plan", "--shape", parallel, "--batch", "16", "--json").stdout)
    assert report["values_eliminated"] == 184_549_376
    assert [round(row["reduction"]) for row in report["reads"]] == [704]
    assert "704x" in cli("plan", "--shape", parallel).stdout


def test_reductions_below_one():
    """For large batches, tables read more than weights do."""
    done = cli("plan", "--shape", SHAPE.replace("PARALLEL", "parallel"), "--batch", "1,8192,32768,100000")
    column = [line.split()[3] for line in done.stdout.splitlines() if line.split()[:1] and line.split()[0][0].isdigit()]
    assert column == ["11,264x", "1.62x", "0.594x", "0.363x"]


def test_experts_that_a_token_uses():
    """Mixtral's shape; oracle: arithmetic."""
    shape = Shape(32000, 4096, 32, 32, 8, 14336, expert_count=8, expert_used_count=2)
    result = plan(shape.cost_model(), type="f16")
    attention = 4096 * (2 * 4096 + 2 * 1024)
    per_token = 32 * (attention + 2 * 3 * 4096 * 14336) + 32000 * 4096 + 4096
    assert result.decode_bytes_without == 2 * per_token
    assert result.parameters == 32 * (attention + 8 * 3 * 4096 * 14336) + 2 * 32000 * 4096


@pytest.mark.parametrize("name", ["head_count", "vocab_size", "expert_used_count"])
def test_shapes_of_nothing(name):
    """Fails if a zero becomes a division by it, or a plan."""
    good = {"vocab_size": 9, "embedding_length": 8, "block_count": 1, "head_count": 2, "head_count_kv": 2}
    with pytest.raises(UsageError, match="must be positive"):
        Shape(**(good | {"feed_forward_length": 8, name: 0}))


def test_plans_of_a_single_name(llama):
    """Fails if its characters are taken for names, or an option is ignored."""
    assert plan_all(str(llama)).plans[0].name == llama.name
    assert "--batch is for a single file" in refusal(cli("plan", llama, llama, "--batch", 7))


def test_plans_of_files_with_one_name(llama, tmp_path):
    """Fails if nobody can tell which line is of which file."""
    others = [tmp_path / folder / llama.name for folder in ("a", "b")]
    for path in others:
        path.parent.mkdir()
        path.symlink_to(llama)
    named = {each.name for each in plan_all(tmp_path).plans}
    assert named == {str(path) for path in others}


def test_kept_weights_stay_on_a_device(llama, tmp_path):
    """Fails if they count as freed."""
    freed = [plan(llama, keep_weights=keep, device="h100").device.freed for keep in (False, True)]
    assert freed[0] > freed[1] == 0
    assert convert(llama, tmp_path / "x.gguf", type="q8_0", keep_weights=True).devices[0].freed == 0


def test_plan_of_auto(smollm):
    assert plan(smollm, type="auto") == plan(smollm, type="q8_0")
    assert cli("plan", smollm, "--type", "auto").returncode == 0


@pytest.mark.parametrize(("name", "of_paper"), [("mistral-7b-v0.1", "Mistral-7B"), ("pythia-6.9b", "Pythia-6.9B")])
def test_header_of_a_published_model(name, of_paper, headers):
    """llama.cpp's graph of the published shape gives the paper's numbers, although the file is only a header."""
    _, (eliminated, without, instead, reductions, *_) = PAPER[of_paper]
    result = plan(headers[name])
    assert result.values_eliminated == eliminated
    assert (result.reads[0].values_without, result.reads[0].values_with) == (without, instead)
    assert tuple(round(row.reduction) for row in result.reads) == reductions


def test_device(smollm):
    """What goes over the bus is what tests/test_devices.py counts; oracle of the rest: arithmetic."""
    given = "memory=100,bus=10,compute=20"
    result = plan(smollm, type="q8_0", device=given).device
    assert (result.bus_without, result.bus_with) == (4 * 576, 576 // 32 * 34 + 960 // 32 * 34)
    gone = {"blk.0.attn_norm.weight", "blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight"}
    assert result.freed == sum(tensor.n_bytes for name, tensor in Source(smollm).tensors.items() if name in gone)
    assert result.memory_without - result.memory_with == result.freed

    def seconds(read: float, sent: list[int]) -> float:
        return read / 100e9 + 30 * LAYER + sum(LOOKUP + size / GATHER + size / 10e9 for size in sent)

    without, instead = seconds(result.memory_without, [2304]), seconds(result.memory_with, [612, 1020])
    assert result.decode == pytest.approx(without / instead)
    assert result.decode < 1 < plan(smollm, type="q8_0").decode_bound
    assert plan(smollm, type="iq4_nl", device="h100").device.bus_with == 612 + 4 * 960
    assert "decoding 0.9" in cli("plan", smollm, "--device", given).stdout
    for wrong in ("gtx", "memory=1", "memory=1,bus=0,compute=1", "memory=1,bus=1,compute=x"):
        assert "is not a device" in refusal(cli("plan", smollm, "--device", wrong))


def test_gains_document_is_current(headers):
    """It also has to reproduce every model's number of parameters."""
    assert gains.DOC.read_text(encoding="utf-8") == gains.page(headers.values()), "run scripts/docs gains"


def test_header_only_is_for_plans(headers):
    assert "is truncated" in refusal(cli("convert", headers["llama-3.1-70b"]))
    lines = cli("plan", headers["llama-3.1-70b"]).stdout.splitlines()
    assert lines[0].startswith("llama-3.1-70b.gguf: llama, ")
    assert "70,553.7 M parameters" in lines[0]


def read_per_token(path: Path, tied: bool, experts: float = 1.0) -> float:
    """Bytes that a token reads of a model's weights: all, except for the embedding (one row) and experts (some)."""
    total = 0.0
    for tensor in Source(path).tensors.values():
        share = experts if "_exps" in tensor.name else 1
        if tensor.name == "token_embd.weight":
            share = 1 / int(tensor.shape[1]) + tied
        total += share * int(tensor.n_bytes)
    return total


def test_bytes_per_token(smollm, headers):
    small = plan(smollm)
    assert small.decode_bytes_without == pytest.approx(read_per_token(smollm, tied=True))
    projections = sum(int(Source(smollm).tensors[f"blk.0.attn_{which}.weight"].n_bytes) for which in ("norm", "q", "k", "v"))
    row = 960 // 32 * 34
    assert small.decode_bytes_without - small.decode_bytes_with == pytest.approx(projections - row)
    assert small.decode_bound == pytest.approx(small.decode_bytes_without / small.decode_bytes_with)

    mixtral = of_file(headers["mixtral-8x7b"])
    active = sum(weight.bytes * (2 / 8 if "_exps" in name else 1) for name, weight in mixtral.weights.items())
    embedding = mixtral.weights["token_embd.weight"].bytes
    assert plan(mixtral).decode_bytes_without == pytest.approx(active - embedding * (1 - 1 / 32000))


def test_operations_of_prefill(headers):
    """Tokens are multiplied with every matrix, except that only the last token is with the head and the last layer's FFN."""
    outline = of_file(headers["llama-2-70b"])
    per_layer = sum(
        weight.values for name, weight in outline.weights.items() if name.startswith("blk.0.") and len(weight.shape) > 1
    )
    products = sum(use.multiply_adds for use in outline.uses)
    assert 79 * per_layer < products / outline.n_batch < 80 * per_layer
    replaced = sum(use.multiply_adds for use in outline.replaced(outline.sites))
    assert replaced / outline.n_batch == 8192 * (8192 + 2 * 1024)


@pytest.mark.parametrize("name", ["falcon-dense", "command-r-dense", "mamba2-dense", "arctic-moe", "gemma3n-dense", "t5-dense"])
@pytest.mark.parametrize("keep_weights", [False, True])
def test_a_conversion_does_what_the_plan_says(name, keep_weights, archs, tmp_path):
    source = archs / f"{name}.gguf"
    told = plan(source, type="q8_0", keep_weights=keep_weights)
    done = convert(source, tmp_path / "x.gguf", type="q8_0", keep_weights=keep_weights)
    assert told.file_change == sum(table.bytes for table in done.tables) - sum(weight.bytes for weight in done.elided)
    assert told.weights_eliminated == len(done.elided)
    assert {site.name for site in told.sites} == {site.name for site in done.sites}
    # the rest is recipes, names, and what `revert` needs
    added = done.output_bytes - done.source_bytes - told.file_change
    assert 0 < added - len(Source(source).headers()[0]) < 16384


def test_typical_text_touches_part_of_the_tables(smollm):
    """The rows of a text take more than their bytes, and less than the table."""
    result = plan(smollm)
    grown = result.resident_change + result.bytes_eliminated
    assert 2000 * 1020 < grown < result.table_bytes["q8_0"] / 4


@pytest.mark.parametrize("name", ["llama-dense", "falcon-dense", "arctic-moe", "mamba2-dense", "lfm2-dense", "falcon-h1-dense"])
def test_selection(name, archs):
    """Under every budget, no other sites that fit save more: sites that share a matrix are taken together or not at all."""
    outline = of_file(archs / f"{name}.gguf")
    kinds = dict.fromkeys(outline.sites, TYPES["f32"])

    def told(sites):
        result = estimate(outline, {site: kinds[site] for site in sites}, (1,))
        return result.file_change, result.decode_bytes_without - result.decode_bytes_with

    subsets = [[s for i, s in enumerate(outline.sites) if bits >> i & 1] for bits in range(2 ** len(outline.sites))]
    prices = [told(sites) for sites in subsets]
    for budget in np.linspace(min(growth for growth, _ in prices), max(growth for growth, _ in prices), 7):
        chosen, left_out, least = select(outline, kinds, budget, keep_weights=False)
        assert least <= min(growth for growth, _ in prices[1:]) or chosen == list(outline.sites)
        growth, saved = told(chosen)
        if chosen == list(outline.sites):
            assert growth <= budget
            continue
        assert growth <= budget or not chosen
        assert saved >= max((saving for size, saving in prices if size <= budget), default=0) - 1e-6
        assert {site.name for site in chosen} | {site.name for site in left_out} == {site.name for site in outline.sites}


def test_a_budget_in_bytes_is_kept(archs, tmp_path):
    """Keys count, too."""
    source = archs / "falcon-dense.gguf"
    told = plan(source, type="q8_0")
    done = convert(source, tmp_path / "x.gguf", max_growth=told.file_change + 10_000)
    assert done.output_bytes - done.source_bytes <= told.file_change + 10_000
    with pytest.raises(FirstLayerError, match=r"fits into max_growth=-\d+, which is"):
        convert(source, tmp_path / "y.gguf", max_growth=told.file_change)


def test_max_growth(smollm, tmp_path):
    """Within a budget, part of the tables is taken; the rest is computed as usual, with the same result."""
    done = cli("convert", smollm, "-o", tmp_path / "x.gguf", "--type", "f32", "--max-growth", "80%")
    assert done.returncode == 0, done.stderr
    assert "left out by --max-growth: Qcur-0 (576 values per token): 108.0 MiB of f32" in done.stdout
    output = tmp_path / "x.gguf"
    assert output.stat().st_size < 1.8 * smollm.stat().st_size
    names = {tensor for tensor in Source(smollm).tensors} - {tensor for tensor in Source(output).tensors}
    assert names == {"blk.0.attn_k.weight", "blk.0.attn_v.weight"}
    job = {"run": "logits", "tokens": "The harbour was quiet when the last boat came in.", "batches": [1, 32]}
    ((stock, ours),) = compare(smollm, output, job)
    assert all(np.array_equal(stock[size], ours[size]) for size in (1, 32))

    assert "no table of" in refusal(cli("convert", smollm, "-o", tmp_path / "y.gguf", "--type", "f32", "--max-growth", "1%"))
    for growth in ("much", "1e400", "-1e400"):
        assert "is not a growth" in refusal(cli("convert", smollm, "-o", tmp_path / "y.gguf", f"--max-growth={growth}"))
    assert {path.name for path in tmp_path.iterdir()} == {"x.gguf"}


@pytest.mark.parametrize(
    ("growth", "n_bytes"), [("1G", 10**9), ("500M", 5e8), ("80000K", 8e7), ("80e6", 8e7), (80_000_000, 8e7), ("50.5%", 0.505)]
)
def test_growth_in_units(growth, n_bytes, smollm, tmp_path):
    """All three tables take 192 %, the small ones 77 %."""
    allowed = n_bytes if n_bytes > 1 else n_bytes * smollm.stat().st_size
    done = convert(smollm, tmp_path / "x.gguf", type="f32", max_growth=growth)
    grown = done.output_bytes - done.source_bytes
    assert allowed / 3 < grown <= allowed if done.left_out else grown <= allowed
    assert bool(done.left_out) == (allowed < 1e8)
    assert read_growth(growth, smollm.stat().st_size).bytes == pytest.approx(allowed)


@pytest.mark.parametrize("growth", ["5", "0", "-1", "5K"])
def test_growth_that_is_too_small(growth, smollm, tmp_path):
    """The message says how it was read, and which growth is enough: `5` was meant to be `5%`."""
    arguments = ["convert", smollm, "-o", tmp_path / "x.gguf", "--type", "f32", "--max-growth"]
    message = refusal(cli(*arguments, growth))
    read = {"5": "5 bytes", "0": "0 bytes", "-1": "-1 bytes", "5K": "5,000 bytes"}[growth]
    spelled = f"--max-growth={growth}" if growth.startswith("-") else f"--max-growth {growth}"  # as argparse wants it
    assert f"fits into {spelled}, which is {read}; the least is " in message
    needed = int(message.split("the least is ")[1].split(", or ")[0].replace(",", ""))
    assert cli(*arguments, needed - 1).returncode == 1
    done = cli(*arguments, needed)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.gguf").stat().st_size - smollm.stat().st_size <= needed


def test_growth_in_percent(archs, tmp_path):
    """The percentage of a refusal is enough. Fails if it is rounded down."""
    for name in ("falcon-dense", "llama-dense"):
        for kind in ("q8_0", "f16"):
            arguments = ["convert", archs / f"{name}.gguf", "-o", tmp_path / "x.gguf", "--type", kind, "--force"]
            percent = re.search(r", or (-?[\d.]+%)", refusal(cli(*arguments, "--max-growth=-99%")))[1]
            done = cli(*arguments, f"--max-growth={percent}")
            assert done.returncode == 0, done.stderr


def test_growth_is_announced(smollm, tmp_path):
    """The file grows by what is announced."""
    output = tmp_path / "x.gguf"
    done = cli("convert", smollm, "-o", output, "--type", "q8_0")
    assert done.returncode == 0
    assert done.stderr.startswith("x.gguf: size +47.5 MiB (+51%); at best 1.004 times as fast in decoding")
    assert "smaller with --max-growth or --type" in done.stderr.splitlines()[0]
    assert (output.stat().st_size - smollm.stat().st_size) / 2**20 == pytest.approx(47.5, abs=0.1)
    assert "The file would grow a lot" in cli("plan", smollm).stdout


def test_yes_is_accepted(llama, tmp_path):
    """Earlier versions asked before they wrote, and --yes was the answer."""
    assert cli("convert", llama, "-o", tmp_path / "x.gguf", "--type", "f32", "--yes").returncode == 0


def test_plan_without_a_site(archs):
    done = cli("plan", archs / "gpt2-dense.gguf")
    assert done.returncode == 0
    assert "nothing to precompute: ADD 'inpL' mixes the embedding with inp_pos" in done.stdout
    report = json.loads(cli("plan", archs / "gpt2-dense.gguf", "--json").stdout)
    assert report["sites"] == []
    assert not math.isnan(report["decode_bound"])


def test_refusals(smollm, smollm_flp, llama, tmp_path):
    assert "already converted" in refusal(cli("plan", smollm_flp["q8_0"]))
    assert "give either a file, or a --shape" in refusal(cli("plan"))
    assert "give either a file, or a --shape" in refusal(cli("plan", smollm, "--shape", "vocab_size=1"))
    assert "the shape lacks embedding_length" in refusal(cli("plan", "--shape", "vocab_size=1"))
    assert "'width=3' is not a part of a shape" in refusal(cli("plan", "--shape", "vocab_size=1,width=3"))
    assert "the shape lacks expert_used_count" in refusal(cli("plan", "--shape", SHAPE.replace("PARALLEL", "expert_count=8")))
    wrong = SHAPE.replace("PARALLEL", "expert_count=2,expert_used_count=3")
    assert "a token uses 3 experts" in refusal(cli("plan", "--shape", wrong))
    assert "unknown table type" in refusal(cli("plan", smollm, "--type", "q9"))
    assert "not a list of numbers" in refusal(cli("plan", smollm, "--batch", "1,x"))
    assert "a batch has between" in refusal(cli("plan", smollm, "--batch", "0"))
    assert "not a list of numbers" in refusal(cli("plan", smollm, "--batch", "9" * 400))
    assert "is not a part of a shape" in refusal(cli("plan", "--shape", f"vocab_size={'9' * 400}"))
    assert "is not a part of a shape" in refusal(cli("plan", "--shape", ""))
    shape = "vocab_size=9,embedding_length=8,block_count=9999999,head_count=2,head_count_kv=2,feed_forward_length=8"
    assert "more than any model has" in refusal(cli("plan", "--shape", shape))
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(llama.read_bytes()[:1000])
    assert "malformed or truncated" in refusal(cli("plan", cut))


def test_headers_of_a_split_model(llama, tmp_path):
    """The header of each part is enough."""
    parts = split(llama, tmp_path / "part")
    for part in parts:
        os.truncate(part, GGUFReader(part).data_offset)
    whole, headers = plan(llama), plan(parts[0])
    assert headers.decode_bytes_with == whole.decode_bytes_with
    assert headers.file_change == whole.file_change
    parts[1].unlink()
    assert str(parts[1]) in refusal(cli("plan", parts[0]))


def test_headers_that_lie(headers, tmp_path):
    """Headers with sizes that no file can have, and a part of a split model whose other parts are missing."""
    header = headers["smollm2-135m"].read_bytes()
    name = b"blk.29.ffn_down.weight"
    at = header.index(name) + len(name) + 4
    huge = tmp_path / "huge.gguf"
    huge.write_bytes(header[:at] + (1 << 40).to_bytes(8, "little") + header[at + 8 :])
    message = refusal(cli("plan", huge))
    assert str(huge) in message
    alone = tmp_path / "x-00002-of-00003.gguf"
    alone.write_bytes(header)
    assert "x-00001-of-00003.gguf cannot be read: No such file" in refusal(cli("plan", tmp_path / "x-00001-of-00003.gguf"))
    assert cli("plan", alone).returncode == 0  # it is only named like a part


def test_the_vocabulary_makes_no_difference(smollm):
    """Plans leave it out, since it takes longer to load than everything else."""
    with Analysis(smollm) as whole, Analysis(smollm, load_vocab=False) as lean:
        assert lean.n_vocab == whole.n_vocab == 49152
        assert (lean.sites, lean.uses, lean.elidable) == (whole.sites, whole.uses, whole.elidable)
        assert len(lean.tokenize("text")) == 0


def test_output_that_nobody_reads(smollm):
    """As in `plan ... | head -1`."""
    command = [sys.executable, "-m", "gguf_firstlayer", "plan", str(smollm), "--json"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1


def test_uses_of_an_encoder_are_not_those_of_its_decoder(archs):
    with Analysis(archs / "t5-dense.gguf") as analysis:
        assert analysis.uses
        assert not any(use.weight.startswith("enc.") for use in analysis.uses if use.multiply_adds)
