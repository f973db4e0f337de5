"""Wrote the files in this folder, and writes those that are missing: `python tests/golden/make.py`.

What is there is a promise: files that were released load for ever, and recipes keep their spelling. So nothing is written over.
The converted files were made by version 0.1.0.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np

from gguf_firstlayer import convert, paths
from gguf_firstlayer.runtime import Analysis

FOLDER = Path(__file__).parent
VOCABULARY, WIDTH, HIDDEN, LAYERS = 48, 32, 64, 2

SERIAL = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
SERIAL |= {"ffn_gate": (HIDDEN, WIDTH), "ffn_up": (HIDDEN, WIDTH), "ffn_down": (WIDTH, HIDDEN)}
PARALLEL = {"attn_qkv": (96, 32), "attn_output": (32, 32), "ffn_up": (HIDDEN, WIDTH), "ffn_down": (WIDTH, HIDDEN)}


def write_source(path: Path, architecture: str, matrices: dict[str, tuple[int, ...]], biases: bool) -> None:
    """A model of two layers with random weights in Q8_0, for which ggml has one kernel for all batch sizes."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(2)
    writer.add_head_count_kv(2 if biases else 1)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    writer.add_layer_norm_eps(1e-5)
    writer.add_layer_norm_rms_eps(1e-5)
    if biases:
        writer.add_parallel_residual(True)
    rng = np.random.default_rng(1)
    shapes = {"token_embd": (VOCABULARY, WIDTH), "output": (VOCABULARY, WIDTH)}
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in matrices.items()}
        shapes |= {f"blk.{i}.{name}_norm": (WIDTH,) for name in ("attn", "ffn")}
    shapes["output_norm"] = (WIDTH,)
    for name, shape in shapes.items():
        values = rng.normal(0, 0.3, shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", 1 + values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
        if biases and name.startswith(("blk.", "output_norm")):
            writer.add_tensor(f"{name}.bias", rng.normal(0, 0.1, shape[0]).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def recipes(models: Path) -> Iterator[str]:
    """Lines that tell the sites of each model in a folder."""
    for path in sorted(models.glob("*.gguf")):
        with Analysis(path, load_vocab=False) as analysis:
            yield f"{path.stem}: {len(analysis.sites)} sites, {len(analysis.elidable)} elidable weights"
            for site in analysis.sites:
                yield f"    {site.name} {site.width} {site.recipe}"


def main() -> None:
    """Write what is missing."""
    serial, parallel = FOLDER / "serial.gguf", FOLDER / "parallel.gguf"
    if not serial.exists():
        write_source(serial, "llama", SERIAL, biases=False)
        write_source(parallel, "gptneox", PARALLEL, biases=True)
    for name, source, options in (
        ("serial-elided.gguf", serial, {}),
        ("serial-kept.gguf", serial, {"keep_weights": True}),
        ("serial.firstlayer.gguf", serial, {"sidecar": True}),
        ("serial-part.gguf", serial, {"max_growth": 9000}),
        ("parallel-elided.gguf", parallel, {}),
        ("parallel-kept.gguf", parallel, {"keep_weights": True}),
        ("parallel.firstlayer.gguf", parallel, {"sidecar": True}),
    ):
        if not (FOLDER / name).exists():
            convert(source, FOLDER / name, type="f32", **options)
    if not list(FOLDER.glob("serial-split-*")):
        command = [paths()["gguf-split"], "--split", "--split-max-tensors", "10"]
        subprocess.run([*command, FOLDER / "serial-elided.gguf", FOLDER / "serial-split"], check=True, capture_output=True)


if __name__ == "__main__":
    main()
