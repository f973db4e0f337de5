"""Tiny random GGUF models of the architectures that llama.cpp's own ``test-llama-archs -o`` leaves out.

llama.cpp itself reports which tensors a model has: ``llama_model_init_from_user`` makes a model from metadata alone and calls
back for each tensor, including optional ones. So the tables below hold only hyperparameters, and the optional tensors to
leave out.

The module needs llama-cpp-python (on any build of llama.cpp, see LLAMA_CPP_LIB_PATH), gguf and numpy.
"""

from __future__ import annotations

import ctypes
import re
import sys
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from numpy.typing import NDArray

from gguf_firstlayer.installation import library_name

Shape = tuple[int, ...]
Value = bool | int | float | str | list[int] | list[bool] | list[str]

VOCAB = 128
EMBD = 128
FF = 192
HEADS = 4
LAYERS = 3

# keys that almost every architecture reads; the names are relative to "<arch>."
DEFAULTS: dict[str, Value] = {
    "vocab_size": VOCAB,
    "context_length": 256,
    "embedding_length": EMBD,
    "block_count": LAYERS,
    "feed_forward_length": FF,
    "attention.head_count": HEADS,
    "attention.layer_norm_epsilon": 1e-5,
    "attention.layer_norm_rms_epsilon": 1e-5,
}

# encoders of whole texts: every token attends to every other one
ENCODER: dict[str, Value] = {"attention.causal": False, "pooling_type": int(gguf.PoolingType.MEAN)}
BERT: dict[str, Value] = ENCODER | {"tokenizer.ggml.token_type_count": 2}

EXPERTS: dict[str, Value] = {
    "expert_count": 4,
    "expert_used_count": 2,
    "expert_feed_forward_length": FF // 2,
    "expert_shared_count": 1,
    "expert_shared_feed_forward_length": FF // 2,
    "leading_dense_block_count": 1,
}

# Head count 0 is how real RWKV models say "no attention". Their head size is 64; smaller ones give wrong results,
# since ggml's wkv7 operator processes whole vectors of up to 64 elements, even beyond the end of a head.
RWKV: dict[str, Value] = {"attention.head_count": 0, "wkv.head_size": 64}
RWKV6: dict[str, Value] = RWKV | {"time_mix_extra_dim": 16, "time_decay_extra_dim": 32, "rescale_every_n_layers": 2}
RWKV7: dict[str, Value] = RWKV | {
    "attention.decay_lora_rank": 16,
    "attention.iclr_lora_rank": 16,
    "attention.value_residual_mix_lora_rank": 8,
    "attention.gate_lora_rank": 32,
}

T5: dict[str, Value] = {"attention.relative_buckets_count": 32, "attention.key_length": 32, "attention.value_length": 32}

# Local layers have their own head size and RoPE base.
GEMMA4: dict[str, Value] = {
    "block_count": 6,
    "attention.head_count_kv": 2,
    "attention.key_length": 64,
    "attention.value_length": 64,
    "attention.key_length_swa": 32,
    "attention.value_length_swa": 32,
    "attention.sliding_window": 16,
    "attention.sliding_window_pattern": [True, True, False, True, True, False],
    "embedding_length_per_layer_input": 32,
    "final_logit_softcapping": 30.0,
    "rope.dimension_count": 64,
    "rope.dimension_count_swa": 32,
    "rope.freq_base": 1e6,
    "rope.freq_base_swa": 1e4,
}

# name of the file: metadata beyond DEFAULTS; the architecture is the name without "-dense" or "-moe"
MODELS: dict[str, dict[str, Value]] = {
    "apertus-dense": {"xielu.alpha_n": 0.5, "xielu.alpha_p": 0.5, "xielu.beta": 0.5, "xielu.eps": -1e-6},
    "arwkv7-dense": RWKV7 | {"token_shift_count": 1},
    "bert-dense": BERT,
    "bitnet-dense": {},
    # the graph overwrites the logits of 8192 image tokens
    "chameleon-dense": {"vocab_size": 8320},
    "deepseek2-ocr-moe": EXPERTS,
    # draft models: with their own embeddings and output, they run without their target model
    "dflash-dense": {"target_layers": [0, 1, 2], "attention.key_length": 32, "attention.value_length": 32},
    "eagle3-dense": {"block_count": 1, "target_layers": [0, 1, 2], "target_hidden_size": EMBD},
    "eurobert-dense": ENCODER,
    "gemma-embedding-dense": {
        **ENCODER,
        "attention.head_count_kv": 2,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "attention.sliding_window": 16,
        "attention.sliding_window_pattern": 2,
        "dense_2_feat_in": EMBD,
        "dense_2_feat_out": 2 * EMBD,
        "dense_3_feat_in": 2 * EMBD,
        "dense_3_feat_out": EMBD,
    },
    # 20 layers have keys and values of their own (hard-coded in llama.cpp); the others, local and global, reuse those
    "gemma3n-dense": {
        "block_count": 25,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "attention.sliding_window": 16,
        "attention.sliding_window_pattern": 5,
    },
    # the second half of the layers reuses the keys and values of the last local and the last global layer before it
    "gemma4-dense": GEMMA4 | {"attention.shared_kv_layers": 3},
    "gemma4-moe": GEMMA4 | EXPERTS | {"embedding_length_per_layer_input": 0},
    "graniteswitch-dense": {
        "attention.head_count_kv": 2,
        "logit_scale": 4.0,
        "residual_scale": 0.5,
        "embedding_scale": 2.0,
        "attention.scale": 0.125,
        "adapters.count": 2,
        "adapters.lora_rank": 8,
        "adapters.token_ids_activate": [5, 6],
        "adapters.token_ids_substitute": [7, 8],
    },
    "jina-bert-v2-dense": BERT,
    "jina-bert-v3-dense": BERT,
    "llama-embed-dense": ENCODER | {"attention.head_count_kv": 2},
    "llama-embed-moe": ENCODER | EXPERTS,
    "modern-bert-dense": {
        **ENCODER,
        "attention.sliding_window": 16,
        "attention.sliding_window_pattern": 3,
        "rope.freq_base": 160000.0,
        "rope.freq_base_swa": 1e4,
    },
    "neo-bert-dense": ENCODER,
    "nomic-bert-dense": BERT,
    "nomic-bert-moe-moe": BERT | {"expert_count": 4, "expert_used_count": 2, "moe_every_n_layers": 2},
    "plm-dense": {
        "attention.kv_lora_rank": 64,
        "attention.key_length": 48,
        "attention.value_length": 32,
        "rope.dimension_count": 16,
    },
    "rwkv6-dense": RWKV6,
    "rwkv6qwen2-dense": RWKV6 | {"token_shift_count": 1, "attention.head_count_kv": 1},
    "rwkv7-dense": RWKV7,
    "step35-moe": {
        **EXPERTS,
        "attention.head_count_kv": 2,
        "attention.sliding_window": 16,
        "attention.sliding_window_pattern": [False, True, True],
    },
    "t5-dense": T5 | {"decoder_block_count": LAYERS, "decoder_start_token_id": 0},
    "t5encoder-dense": T5 | {"pooling_type": int(gguf.PoolingType.MEAN)},
    "wavtokenizer-dec-dense": {
        "block_count": 6,
        "features_length": EMBD,
        "attention.group_norm_epsilon": 1e-6,
        "attention.group_norm_groups": 8,
        "attention.causal": False,
        "posnet.embedding_length": EMBD,
        "posnet.block_count": 6,
        "convnext.embedding_length": EMBD,
        "convnext.block_count": 3,
    },
}

# Optional tensors that real models lack: those that match are not written.
QKV_BIAS = r"attn_[qkv]\.bias"
NO_BIAS = r"(attn|ffn)_\w+\.bias"
WITHOUT: dict[str, str] = {
    "apertus-dense": NO_BIAS,
    "arwkv7-dense": r"time_mix_ln",
    "bert-dense": r"^cls",
    "chameleon-dense": QKV_BIAS,
    "deepseek2-ocr-moe": NO_BIAS + "|exp_probs_b",
    "dflash-dense": r"post_\w*norm|layer_output_scale|sinks|rope_freqs",
    "eagle3-dense": r"rope_freqs",
    "eurobert-dense": QKV_BIAS,
    "gemma-embedding-dense": QKV_BIAS + r"|^output\.",
    "gemma3n-dense": QKV_BIAS + r"|^output\.",
    "gemma4-dense": r"^output\.",
    # keys serve as values in the layers of global attention
    "gemma4-moe": r"^output\.|blk\.[25]\.attn_v",
    "graniteswitch-dense": r"^output\.",
    "jina-bert-v2-dense": r"^cls|attn_norm_2|ffn_up\.bias",
    "llama-embed-dense": NO_BIAS + r"|^output\.",
    "llama-embed-moe": NO_BIAS + r"|^output\.",
    "modern-bert-dense": r"^cls|blk\.0\.attn_norm",
    "neo-bert-dense": r"^cls",
    "nomic-bert-dense": r"(attn_[qkv]|attn_output|ffn_\w+)\.bias",
    # the five mixing vectors are stored as one
    "rwkv6-dense": r"time_mix_lerp_[wkvrg]\.",
    # without it, llama.cpp selects gated linear attention
    "rwkv6qwen2-dense": r"time_mix_first|output_norm\.bias",
    "step35-moe": QKV_BIAS + r"|blk\.0\.(ffn_gate_inp|ffn_\w+exps?\.|exp_probs)|blk\.[12]\.ffn_(gate|up|down)\.weight",
    # all layers use the relative positions of the first
    "t5-dense": r"blk\.[12]\.attn_rel_b",
    "t5encoder-dense": r"blk\.[12]\.attn_rel_b|^output\.",
}

# scales are for quantized weights, except in these
SCALES: dict[str, str] = {"bitnet-dense": r"\.scale$", "gemma4-moe": r"(ffn_gate_inp|ffn_down_exps)\.scale$"}

# what llama.cpp creates only if the file has it
EXTRA: dict[str, dict[str, Shape]] = {"eagle3-dense": {"token_embd.weight": (VOCAB, EMBD)}}

# real models have one matrix for queries, keys and values
FUSED = {"jina-bert-v3-dense", "nomic-bert-dense", "nomic-bert-moe-moe"}


class Tensor(ctypes.Structure):
    """The start of ``struct ggml_tensor``."""

    _fields_ = (("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4))


class InitParams(ctypes.Structure):
    """``struct gguf_init_params``."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def ggml(name: str, result: Any, *arguments: Any) -> Any:
    """A function of ggml, or one of llama.cpp that the bindings leave out, in the libraries that they have loaded."""
    llama = llama_cpp.llama_cpp._lib
    # Windows does not look in the libraries that libllama depends on
    base = ctypes.CDLL(str(Path(llama._name).with_name(library_name("ggml-base"))))
    function = base[name] if hasattr(base, name) else llama[name]
    function.restype, function.argtypes = result, arguments
    return function


def add_keys(writer: gguf.GGUFWriter, arch: str, metadata: Mapping[str, Value]) -> None:
    """Add hyperparameters whose names are relative to "<arch>."."""
    for key, value in metadata.items():
        full = key if key.startswith(("tokenizer.", "xielu.")) else f"{arch}.{key}"
        if isinstance(value, bool):
            writer.add_bool(full, value)
        elif isinstance(value, int):
            writer.add_uint32(full, value)
        elif isinstance(value, float):
            writer.add_float32(full, value)
        elif isinstance(value, str):
            writer.add_string(full, value)
        else:
            writer.add_array(full, value)


def _write(path: Path, name: str, tensors: dict[str, NDArray[Any]]) -> None:
    """Write a model of the table with the given tensors."""
    arch = name.rpartition("-")[0]
    metadata = DEFAULTS | MODELS[name]
    vocab = metadata["vocab_size"]
    assert isinstance(vocab, int)
    # llama.cpp's tokenizer for its own tests; how the tokens are spelled does not matter
    metadata |= {"tokenizer.ggml.model": "test", "tokenizer.ggml.tokens": [f"tok_{i}" for i in range(vocab)]}

    writer = gguf.GGUFWriter(path, arch)
    add_keys(writer, arch, metadata)
    for tensor, data in tensors.items():
        writer.add_tensor(tensor, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def name_and_shape(tensor: int) -> tuple[str, Shape]:
    """Name and shape of the tensor at an address; the shape is in numpy's order."""
    ne = list(Tensor.from_address(tensor).ne)
    while len(ne) > 1 and ne[-1] == 1:
        ne.pop()
    return ggml("ggml_get_name", ctypes.c_char_p, ctypes.c_void_p)(tensor).decode(), tuple(reversed(ne))


def _shapes(path: Path) -> dict[str, Shape]:
    """The shapes of the tensors that llama.cpp can use with the metadata of a file, in numpy's order."""
    shapes: dict[str, Shape] = {}

    def collect(tensor: int, _: int | None) -> None:
        name, shape = name_and_shape(tensor)
        shapes[name] = shape

    read = ggml("gguf_init_from_file", ctypes.c_void_p, ctypes.c_char_p, InitParams)
    metadata = read(str(path).encode(), InitParams(no_alloc=True))
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    params.use_extra_bufts = False
    callback = llama_cpp.llama_model_set_tensor_data_t(collect)
    model = llama_cpp.llama_model_init_from_user(metadata, callback, None, params)
    if not model:
        raise RuntimeError(f"llama.cpp cannot make a model of {path.name}")
    llama_cpp.llama_model_free(model)
    ggml("gguf_free", None, ctypes.c_void_p)(metadata)
    return shapes


def _wanted(name: str, tensor: str) -> bool:
    """Whether a model has a tensor, required or optional."""
    if tensor.endswith("scale"):
        return name in SCALES and re.search(SCALES[name], tensor) is not None
    return name not in WITHOUT or re.search(WITHOUT[name], tensor) is None


def fuse(shapes: dict[str, Shape]) -> dict[str, Shape]:
    """Fuse queries, keys and values into one tensor."""
    fused: dict[str, Shape] = {}
    for tensor, (rows, *rest) in shapes.items():
        target = re.sub(r"attn_[qkv]\.", "attn_qkv.", tensor)
        fused[target] = (rows + fused[target][0] if target in fused else rows, *rest)
    return fused


def _data(tensor: str, shape: Shape) -> NDArray[Any]:
    """Random weights, always the same for a name and a shape."""
    mean, deviation, dtype = 0.0, 0.1, "float32"
    if re.search(r"norm\w*\.weight|time_mix_ln\.weight|scale|gamma|rope_freqs", tensor):
        mean = 1.0  # factors
    elif "lerp" in tensor:
        mean = 0.5  # mixing ratios
    elif "time_mix_decay.weight" in tensor:
        mean = -2.0  # logarithm of a rate
    elif re.search(r"(conv\w+|dw|posnet\.\d\.attn_\w+)\.weight", tensor):
        # kernels of convolutions: [out, in, width]; ggml's operator wants them in F16
        deviation, dtype = (shape[-1] * shape[-2]) ** -0.5, "float16"
    elif len(shape) > 1 and not tensor.endswith("bias"):
        deviation = shape[-1] ** -0.5  # keeps the magnitude of what the matrix multiplies
    normal = np.random.default_rng(zlib.crc32(tensor.encode())).standard_normal(shape)
    return (mean + deviation * normal).astype(dtype)


def generate(folder: Path, names: Iterable[str] = MODELS) -> list[Path]:
    """Write models of the table (by default all) to a folder, and return their paths."""
    paths = []
    for name in names:
        path = folder / f"{name}.gguf"
        _write(path, name, {})
        shapes = {tensor: shape for tensor, shape in _shapes(path).items() if _wanted(name, tensor)}
        if name in FUSED:
            shapes = fuse(shapes)
        shapes |= EXTRA.get(name, {})
        _write(path, name, {tensor: _data(tensor, shape) for tensor, shape in shapes.items()})
        paths.append(path)
    return paths


if __name__ == "__main__":
    generate(Path(sys.argv[1]), sys.argv[2:] or MODELS)
