"""Source files: every type of weights, models in several parts, files over 4 GiB."""

from __future__ import annotations

import shutil
import tempfile

import numpy as np
import pytest
from architectures import differences
from gguf import GGUFReader, GGUFWriter
from support.builds import compare
from support.command_line import cli, refusal, split
from support.models import convert, quantized

from gguf_firstlayer import FirstLayerError, inspect
from gguf_firstlayer.file_format import TYPES


@pytest.mark.parametrize("kind", TYPES)
def test_source_type(kind, llama, tmp_path, measured):
    """Whatever the type of the weights, tables hold what its kernels compute.

    Fails if rows are not computed by the kernels of the run time, such as those for repacked weights.
    """
    source = quantized(llama, tmp_path / "source.gguf", TYPES[kind])
    types = {tensor.name: tensor.tensor_type for tensor in GGUFReader(source).tensors}
    assert types["blk.0.attn_q.weight"] == TYPES[kind]
    converted = convert(source, tmp_path / "flp.gguf", type="f32").output
    exact = [size for size, value in differences(source, converted, [1, 2, 7, 64]).items() if value == 0]
    measured(f"weights of {kind}: f32 tables give the stock library's bits in batches of {', '.join(map(str, exact))}")


@pytest.mark.parametrize("options", [[], ["--no-tensor-first-split"]], ids=["plain", "no tensor in the first part"])
def test_split_source(options, llama, llama_flp, tmp_path):
    """A split model converts to the same tensors and keys as the whole one, but cannot be restored."""
    parts = split(llama, tmp_path / "part", *options)
    assert len(parts) > 2
    result = convert(parts[0], type="f32")
    assert result.output == tmp_path / "part-flp.gguf"
    assert result.source_bytes == sum(part.stat().st_size for part in parts)
    a, b = GGUFReader(result.output), GGUFReader(llama_flp)
    assert {t.name: t.data.tobytes() for t in a.tensors} == {t.name: t.data.tobytes() for t in b.tensors}
    skip = ("GGUF.kv_count", "firstlayer.origin.")
    values = [{name: field.contents() for name, field in r.fields.items() if not name.startswith(skip)} for r in (a, b)]
    assert values[0] == values[1]
    assert len(inspect(parts[0]).sites) == 3


def test_split_output(llama, llama_flp, tmp_path):
    """The output can be written in parts, and these run."""
    done = cli("convert", llama, "-o", tmp_path / "x.gguf", "--type", "f32", "--split-max-size", "1M")
    assert done.returncode == 0, done.stderr
    parts = sorted(tmp_path.iterdir())
    assert len(parts) > 2
    assert parts[0].name == f"x-00001-of-{len(parts):05}.gguf"
    assert str(parts[0]) in done.stdout
    assert [site.recipe for site in inspect(parts[0]).sites] == [site.recipe for site in inspect(llama_flp).sites]
    ((stock, ours),) = compare(llama, parts[0], {"run": "logits", "tokens": {"count": 20, "seed": 1}, "batches": [20]})
    assert np.array_equal(stock[20], ours[20])

    again = cli("convert", llama, "-o", tmp_path / "x.gguf", "--type", "f32", "--split-max-size", "1M")
    assert "exists; replace it with --force" in refusal(again)
    assert sorted(tmp_path.iterdir()) == parts
    assert "not a size of parts" in refusal(cli("convert", llama, "--split-max-size", "1T", "-o", tmp_path / "y.gguf"))


def test_bad_parts(llama, tmp_path):
    parts = split(llama, tmp_path / "part")
    with pytest.raises(FirstLayerError, match=r"is part 2 of a split model; give the first, .*part-00001-of"):
        convert(parts[1])
    renamed = tmp_path / "renamed.gguf"
    parts[0].rename(renamed)
    with pytest.raises(FirstLayerError, match="is not named like"):
        convert(renamed)
    renamed.rename(parts[0])
    parts[1].unlink()
    with pytest.raises(FirstLayerError, match=r"part-00002-of.* cannot be read: No such file"):
        convert(parts[0])


BIG = 5 << 30


@pytest.mark.skipif(shutil.disk_usage(tempfile.gettempdir()).free < 3 * BIG, reason="needs 15 GiB on the disk")
def test_more_than_4_gib(tmp_path):
    """Offsets of tensors do not fit into 32 bits. The first layer comes last, after a hole of 4 GiB that is mostly zeros."""
    layers, width, hidden, vocab = 180, 256, 16384, 64
    shapes: dict[str, tuple[int, ...]] = {}
    for i in reversed(range(layers)):
        shapes |= {f"blk.{i}.attn_{which}": (width, width) for which in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.ffn_{which}": (hidden, width) for which in ("gate", "up")}
        shapes |= {f"blk.{i}.ffn_down": (width, hidden), f"blk.{i}.attn_norm": (width,), f"blk.{i}.ffn_norm": (width,)}
    shapes |= {"token_embd": (vocab, width), "output_norm": (width,)}

    writer = GGUFWriter(tmp_path / "big.gguf", "llama")
    writer.add_block_count(layers)
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("no_vocab")
    sizes = {name: int(np.prod(shape)) * (2 if len(shape) > 1 else 4) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        kind = np.dtype(np.float16 if len(shape) > 1 else np.float32)
        writer.add_tensor_info(f"{name}.weight", shape, kind, sizes[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()

    generator = np.random.default_rng(1)
    with (tmp_path / "big.gguf").open("r+b") as file:
        end = -(-file.seek(0, 2) // 32) * 32
        for name, shape in shapes.items():
            file.seek(end)
            if len(shape) == 1:
                file.write(np.ones(shape, np.float32).tobytes())
            elif name.startswith(("blk.0.attn", "token_embd")):
                file.write(generator.normal(0, 0.1, shape).astype(np.float16).tobytes())
            end += -(-sizes[name] // 32) * 32
        file.truncate(end)
    assert end > 4 << 30

    result = convert(tmp_path / "big.gguf", type="f32")
    offsets = {tensor.name: tensor.data_offset for tensor in GGUFReader(result.output).tensors}
    assert offsets["firstlayer.0.table"] > 4 << 30
    ((stock, ours),) = compare(result.source, result.output, {"run": "logits", "tokens": [1, 2, 3], "batches": [3]})
    assert np.array_equal(stock[3], ours[3])
    assert np.unique(stock[3], axis=0).shape[0] == 3
