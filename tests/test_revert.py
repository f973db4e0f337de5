"""`revert`: the source comes back byte for byte, or not at all."""

from __future__ import annotations

import os

import pytest
from gguf import GGUFReader
from support.command_line import cli, refusal, split
from support.models import convert

from gguf_firstlayer import FirstLayerError, revert


def test_kept_weights(smollm, tmp_path):
    """All tensor types, alignments and keys of a real file; oracle: the file."""
    converted = convert(smollm, tmp_path / "x-flp.gguf", keep_weights=True).output
    result = revert(converted)
    assert result.output == tmp_path / "x.gguf"
    assert result.output.read_bytes() == smollm.read_bytes()


@pytest.mark.parametrize("place", ["after", "before"])
def test_more_than_tensors(place, llama, tmp_path):
    """Bytes that a converted file does not hold. Fails if whoever then deletes the source is not warned."""
    source, data = tmp_path / "x.gguf", bytearray(llama.read_bytes())
    if place == "after":
        data += b"more"
    else:
        data[GGUFReader(llama).data_offset - 1] = 1  # header and weights are apart
    source.write_bytes(data)
    for path, warned in ((source, True), (llama, False)):
        done = cli("convert", path, "-o", tmp_path / f"{warned}.gguf", "--type", "f32", "--keep-weights")
        assert done.returncode == 0, done.stderr
        assert ("revert cannot restore it, so keep it" in done.stderr) == warned
    assert "had more than its tensors" in refusal(cli("revert", tmp_path / "True.gguf", "-o", tmp_path / "y.gguf"))


def test_of_parts(smollm, tmp_path):
    """llama-gguf-split rewrites the keys, and lays the tensors out differently."""
    converted = convert(smollm, tmp_path / "x.gguf", keep_weights=True, split_max_size="60M").output
    assert revert(converted, tmp_path / "back.gguf").output.read_bytes() == smollm.read_bytes()


def test_to_parts(smollm, tmp_path):
    """Of a split model, all parts come back; oracle: those that llama.cpp's own tool wrote."""
    parts = split(smollm, tmp_path / "x", "--split-max-tensors", "100")
    converted = convert(parts[0], keep_weights=True).output
    folder = tmp_path / "back"
    folder.mkdir()
    result = revert(converted, folder / "y.gguf")
    names = [part.name.replace("x-", "y-") for part in parts]
    assert sorted(os.listdir(folder)) == names
    assert result.output.name == names[0]
    for part, name in zip(parts, names, strict=True):
        assert (folder / name).read_bytes() == part.read_bytes()
    assert result.output_bytes == sum(part.stat().st_size for part in parts)
    assert "exists" in refusal(cli("revert", converted, "-o", folder / "y.gguf"))


def test_elided_weights(llama, smollm, tmp_path):
    """Another file can supply them, but only the right ones."""
    converted = convert(llama, tmp_path / "x-flp.gguf").output
    assert "--source" in refusal(cli("revert", converted))
    assert "does not hold" in refusal(cli("revert", converted, "--source", smollm))
    donor = convert(llama, tmp_path / "donor.gguf", keep_weights=True).output
    done = cli("revert", converted, "--source", donor)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.gguf").read_bytes() == llama.read_bytes()
    assert "exists" in refusal(cli("revert", converted, "--source", donor))


def test_other_weights_of_the_same_shape(llama, tmp_path):
    """Only the checksum reveals these; the output must not appear."""
    converted = convert(llama, tmp_path / "x-flp.gguf").output
    data = bytearray(llama.read_bytes())
    tensor = next(tensor for tensor in GGUFReader(llama).tensors if tensor.name == "blk.0.attn_q.weight")
    data[tensor.data_offset] ^= 1
    (tmp_path / "other.gguf").write_bytes(data)
    assert "another model" in refusal(cli("revert", converted, "--source", tmp_path / "other.gguf"))
    assert sorted(os.listdir(tmp_path)) == ["other.gguf", "x-flp.gguf"]


def test_bytes_outside_of_tensors(llama, tmp_path):
    """A file with extra bytes at its end cannot be restored from its tensors: nothing is better than almost the source."""
    source = tmp_path / "tail.gguf"
    source.write_bytes(llama.read_bytes() + b"signature")
    converted = convert(source, tmp_path / "x-flp.gguf", keep_weights=True).output
    with pytest.raises(FirstLayerError, match="more than its tensors"):
        revert(converted)
    assert sorted(os.listdir(tmp_path)) == ["tail.gguf", "x-flp.gguf"]


def test_what_cannot_be_reverted(llama, tmp_path):
    assert "not converted" in refusal(cli("revert", llama))
    sidecar = convert(llama, tmp_path / "x_firstlayer.gguf", sidecar=True).output
    assert "was not changed" in refusal(cli("revert", sidecar))
    kept = convert(llama, tmp_path / "y.gguf", keep_weights=True).output
    assert "is an input" in refusal(cli("revert", kept, "-o", kept, "--force"))
