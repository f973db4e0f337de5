"""Models for tests: converted ones, changed ones, and tiny ones of every architecture."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter

import gguf_firstlayer
from gguf_firstlayer import Conversion
from gguf_firstlayer.c_api import library
from support.builds import PATCHED, ROOT, STOCK


def convert(source: Path, output: Path | None = None, *, type: str = "q8_0", **options: Any) -> Conversion:
    """Convert a model without choosing types by measurement."""
    return gguf_firstlayer.convert(source, output, type=type, **options)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def rewrite(
    source: Path, target: Path, change_key=None, change_tensor=None, change_type=None, drop=frozenset(), keys=None, more=None
) -> Path:
    """Copy a GGUF file, changing values of keys and tensors: the callbacks take a name and a value and return the new value.

    change_type: ggml type of the bytes that `change_tensor` returns instead of numbers
    keys: values that replace those of the file or are added, with their types, and types of elements
    more: tensors that are added
    """
    keys = keys or {}
    reader = GGUFReader(source)
    writer = GGUFWriter(target, "unused")
    writer.kv_data[0].clear()
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in keys:
            continue
        value = field.contents()
        if value == []:
            continue  # GGUFWriter cannot write empty arrays
        value = change_key(name, value) if change_key else value
        writer.add_key_value(name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for name, value in keys.items():
        writer.add_key_value(name, *value)
    for tensor in reader.tensors:
        if tensor.name in drop:
            continue
        data = change_tensor(tensor.name, tensor.data) if change_tensor else tensor.data
        kind = tensor.tensor_type if data.dtype == tensor.data.dtype else change_type if data.dtype == np.uint8 else None
        writer.add_tensor(tensor.name, np.ascontiguousarray(data), raw_dtype=kind)
    for name, data in (more or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def write_archs(folder: Path) -> None:
    """Write tiny random models of every architecture: llama.cpp's own test writes some, random_models.py the others."""
    environment = os.environ | {"LLAMA_CPP_LIB_PATH": str(STOCK)}
    for command in (
        [PATCHED / "test-llama-archs", "-s", "1", "-o", folder],
        [sys.executable, ROOT / "tests" / "support" / "random_models.py", folder],
    ):
        done = subprocess.run(command, capture_output=True, check=False, env=environment)
        assert done.returncode == 0, f"{command}: {done.stderr[-1000:].decode(errors='replace')}"


def without_attention(path: Path, layers: int) -> Path:
    """A random model whose layers do not attend, but for the last one, so nearly all of it depends on the token alone."""
    width, vocabulary = 32, 64
    generator = np.random.default_rng(layers)
    writer = GGUFWriter(path, "deci")
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(vocabulary)
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length([width] * layers)
    writer.add_head_count([1] * layers)
    writer.add_head_count_kv([0] * (layers - 1) + [1])
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(f"{name}.weight", generator.normal(0, 0.1, shape).astype(np.float32))

    add("token_embd", vocabulary, width)
    add("output", vocabulary, width)
    add("output_norm", width)
    for layer in range(layers):
        for norm in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{norm}", width)
        attention = ("attn_q", "attn_k", "attn_v") if layer == layers - 1 else ()
        for product in ("attn_output", "ffn_gate", "ffn_up", "ffn_down", *attention):
            add(f"blk.{layer}.{product}", width, width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def lora(path: Path, tensor: str, rows: int, columns: int) -> Path:
    """A random rank-4 adapter for one weight [columns, rows]; for an embedding, which is looked up, [rows, columns]."""
    generator = np.random.default_rng(rows + columns + len(tensor))
    writer = GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    a = (columns, 4) if tensor == "token_embd.weight" else (4, columns)
    writer.add_tensor(f"{tensor}.lora_a", generator.normal(0, 0.1, a).astype(np.float32))
    writer.add_tensor(f"{tensor}.lora_b", generator.normal(0, 0.1, (rows, 4)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantized(source: Path, target: Path, kind: GGMLQuantizationType) -> Path:
    """A copy of an F32 model with its attention matrices in another type."""
    block, size = GGML_QUANT_SIZES[kind]
    quantize = library().ggml.ggml_quantize_chunk

    def convert_tensor(name: str, data: np.ndarray) -> np.ndarray:
        width = data.shape[-1]
        if data.ndim < 2 or ".attn_" not in name or width % block or kind == GGMLQuantizationType.F32:
            return data
        rows = np.ascontiguousarray(data.reshape(-1, width))
        out = np.empty((len(rows), width // block * size), dtype=np.uint8)
        importance = np.ones(width, dtype=np.float32)  # required by the smallest types
        quantize(int(kind), rows.ctypes.data, out.ctypes.data, 0, len(rows), width, importance.ctypes.data)
        return out.reshape(*data.shape[:-1], -1)

    return rewrite(source, target, change_tensor=convert_tensor, change_type=kind)
