"""Published shapes of well-known language models, as GGUF hyperparameters, and header-only GGUF files of them.

llama.cpp itself lists the tensors of a model with these hyperparameters, as in tests/support/random_models.py. This file adds
which optional ones the real model lacks, and the published number of parameters, which their sum must reproduce.

    python scripts/reports/catalogue.py FOLDER Q4_K             checks the sums, and writes all headers
    python scripts/reports/catalogue.py NAME OUT.gguf Q4_K      writes one of the models, with random weights
"""

from __future__ import annotations

import ctypes
import math
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from support.random_models import InitParams, Shape, Value, add_keys, fuse, ggml, name_and_shape

from gguf_firstlayer.file_format import fitting
from gguf_firstlayer.runtime import library

Keys = dict[str, Value]

# Relative differences: exact numbers may lack a few scalars (xIELU's); rounded ones are correct to two or three digits.
EXACT = 1e-7
ROUNDED = 6e-3

# keys that almost every architecture reads; no shape depends on them
DEFAULTS: Keys = {"attention.layer_norm_epsilon": 1e-5, "attention.layer_norm_rms_epsilon": 1e-5}

# llama.cpp accepts three projections, but files of these architectures have one fused projection
FUSED = {"phi3", "chatglm"}

# Not counted, since the converter adds them: RoPE factors, and in RWKV 7's first layer, matrices that only later layers need.
DERIVED = re.compile(r"^(blk\.\d+\.)?rope_(freqs|factors_(long|short))\.|^blk\.0\.time_mix_v[012]\.")

# factors of quantized weights; only Gemma 4's experts have real ones
SCALE = re.compile(r"\.(input_)?scale$")
REAL_SCALE = re.compile(r"ffn_(gate_inp|down_exps)\.scale$")

# matrices that llama-quantize leaves alone: the converter writes some in F32, and the rest in F16
FULL = re.compile(
    r"norm\w*\.weight$|ffn_gate_inp|ssm_conv1d|shortconv\.conv\b|position_embd|altup_(correct|predict)|time_mix_(first|\w*\d\.|lerp_fused)"
)
HALF = re.compile(r"altup|laurel|per_layer_model_proj")


@dataclass(frozen=True)
class Entry:
    """A model described by its published shape.

    Attributes:
        name: without the organisation
        arch: the architecture as llama.cpp names it
        keys: hyperparameters; the names are relative to "<arch>."
        without: regular expression for the optional tensors that the model lacks; "" if it has them all
        parameters: the published number, of the language model only if there are other parts; a float if it is rounded
        source: where the shape was published
    """

    name: str
    arch: str
    keys: Keys
    without: str
    parameters: int | float
    source: str

    @property
    def tolerance(self) -> float:
        """The accepted relative difference between `parameters` and the sum of the tensors."""
        return EXACT if isinstance(self.parameters, int) else ROUNDED


def _metadata(entry: Entry) -> Keys:
    # without a list of tokens, which would be most of the file
    return DEFAULTS | entry.keys | {"tokenizer.ggml.model": "no_vocab"}


def _write(path: Path, entry: Entry, shapes: dict[str, Shape], kind: gguf.GGMLQuantizationType) -> int:
    """Write a file without its data, and return the size that it would have with them."""
    writer = gguf.GGUFWriter(path, entry.arch)
    writer.add_name(entry.name)
    add_keys(writer, entry.arch, _metadata(entry))

    n_data = 0
    for tensor, shape in shapes.items():
        stored = storage(tensor, shape, kind)
        block, block_size = gguf.GGML_QUANT_SIZES[stored]
        n_bytes = math.prod(shape) // block * block_size
        writer.add_tensor_info(tensor, shape, np.dtype(np.float32), n_bytes, raw_dtype=stored)
        n_data += gguf.GGUFWriter.ggml_pad(n_bytes, writer.data_alignment)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    alignment = writer.data_alignment
    writer.close()
    with path.open("r+b") as file:
        n_header = gguf.GGUFWriter.ggml_pad(file.seek(0, 2), alignment)
        file.truncate(n_header)
    return n_header + n_data


def storage(tensor: str, shape: Shape, kind: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType:
    """The type that a tensor has in a file whose matrices are of some type."""
    f16, f32 = gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32
    if len(shape) == 1 or not tensor.endswith(".weight") or FULL.search(tensor):
        return f32
    quantized = gguf.GGML_QUANT_SIZES[kind][0] > 1
    if quantized and HALF.search(tensor):
        return f16
    return fitting(kind, shape[-1])


def _created(path: Path) -> dict[str, Shape]:
    """The tensors that llama.cpp can use with the metadata of a file, without memory for them.

    Its callback covers only tensors whose data it wants. So this reads its list of all tensors, as its own tests do: a C++
    `std::vector<std::pair<std::string, ggml_tensor *>>`, in the 64-bit layout of the system's C++ library.
    """
    metadata = ggml("gguf_init_from_file", ctypes.c_void_p, ctypes.c_char_p, InitParams)(
        str(path).encode(), InitParams(no_alloc=True)
    )
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    params.no_alloc = True
    # the default leaves out the MTP layers, which real files have
    params.load_mtp = True
    model = llama_cpp.llama_model_init_from_user(metadata, llama_cpp.llama_model_set_tensor_data_t(), None, params)
    if not model:
        raise RuntimeError(f"llama.cpp cannot make a model of {path.name}")

    # libc++ and libstdc++ differ in the name of the function, and in the size of a string, which the pointer follows
    tag, size = ("", 24) if sys.platform == "darwin" else ("B5cxx11", 32)
    get_list = ggml(f"_Z29llama_internal_get_tensor_map{tag}PK11llama_model", ctypes.POINTER(ctypes.c_size_t), ctypes.c_void_p)
    begin, end, _ = get_list(model)[:3]
    shapes = dict(name_and_shape(ctypes.c_size_t.from_address(pair + size).value) for pair in range(begin, end, size + 8))
    llama_cpp.llama_model_free(model)
    ggml("gguf_free", None, ctypes.c_void_p)(metadata)
    return shapes


def _wanted(entry: Entry, tensor: str) -> bool:
    """Whether a model has a tensor, required or optional."""
    if SCALE.search(tensor) and not (entry.arch == "gemma4" and REAL_SCALE.search(tensor)):
        return False
    return not entry.without or re.search(entry.without, tensor) is None


def _tensors(entry: Entry) -> dict[str, Shape]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{entry.name}.gguf"
        _write(path, entry, {}, gguf.GGMLQuantizationType.F16)
        created = _created(path)
    shapes: dict[str, Shape] = {}
    for tensor, shape in created.items():
        layer, _, part = tensor.partition(".ffn_")
        if not _wanted(entry, tensor):
            # llama.cpp looks for a router first: a layer without one has a single FFN of the experts' size
            if re.fullmatch(r"(gate|up|down)_exps\.weight", part):
                shapes[tensor.replace("_exps", "")] = shape[1:]
        elif part == "gate_up_exps.weight" and entry.arch != "gemma4":
            # llama.cpp accepts both halves as one, but its converter writes them separately
            experts, rows, width = shape
            shapes |= {f"{layer}.ffn_{half}_exps.weight": (experts, rows // 2, width) for half in ("gate", "up")}
        else:
            shapes[tensor] = shape
    return fuse(shapes) if entry.arch in FUSED else shapes


_known: dict[str, dict[str, Shape]] = {}


def tensors(entry: Entry) -> dict[str, Shape]:
    """The shapes of a model's tensors by their names in GGUF files, in numpy's order."""
    if entry.name not in _known:
        _known[entry.name] = _tensors(entry)
    return dict(_known[entry.name])


def write_header(entry: Entry, path: Path, kind: gguf.GGMLQuantizationType) -> int:
    """Write a GGUF file that ends where its tensor data would begin.

    Args:
        entry: the model
        path: the file to write
        kind: type of the matrices

    Returns:
        The size in bytes of the whole file.
    """
    return _write(path, entry, tensors(entry), kind)


def write_model(entry: Entry, path: Path, kind: gguf.GGMLQuantizationType) -> None:
    """Write a model with random weights: nonsense, but as fast as the real one.

    Matrices repeat a million normal values, so that models of some gigabytes are written in seconds.
    """
    n_bytes = write_header(entry, path, kind)
    rng = np.random.default_rng(0)
    shapes, data = tensors(entry), dict[gguf.GGMLQuantizationType, bytes]()
    with path.open("r+b") as file:
        file.seek(0, 2)
        for tensor, shape in shapes.items():
            stored = storage(tensor, shape, kind)
            if len(shape) == 1:
                values = np.full(shape, 1.0 if tensor.endswith("norm.weight") else 0.0, np.float32).tobytes()
            else:
                if stored not in data:
                    sample = rng.normal(0, 0.02, (4096, 256)).astype(np.float32)
                    data[stored] = library().quantize(sample, stored).tobytes()
                block, size = gguf.GGML_QUANT_SIZES[stored]
                length = math.prod(shape) // block * size
                # from another place in the sample each time, or all tensors would be the same
                start = rng.integers(0, 4096) * (256 // block * size)
                values = (data[stored][start:] + data[stored] * (length // len(data[stored]) + 1))[:length]
            file.write(values)
            file.write(bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))
    assert path.stat().st_size == n_bytes


def count(entry: Entry) -> int:
    """The number of parameters in all tensors."""
    return sum(math.prod(shape) for tensor, shape in tensors(entry).items() if not DERIVED.search(tensor))


# Optional tensors that many models do not have.
QKV = r"attn_[qkv]\.bias"
# the norms before attention and FFN keep theirs
BIAS = r"(attn|ffn)_(?!norm)\w+\.bias"
FREQS = r"rope_freqs"
FACTORS = r"rope_factors"
TIED = r"^output\."
LLAMA = f"{BIAS}|{FREQS}"
LLAMA3 = BIAS


def sizes(
    vocab: int, layers: int, width: int, ff: int | list[int], heads: int, heads_kv: int | list[int] | None = None, head: int = 0
) -> Keys:
    """The hyperparameters that all attention models have; the size of a head is width / heads unless it is given."""
    keys: Keys = {
        "vocab_size": vocab,
        "context_length": 8192,
        "block_count": layers,
        "embedding_length": width,
        "feed_forward_length": ff,
        "attention.head_count": heads,
        "attention.head_count_kv": heads if heads_kv is None else heads_kv,
    }
    if head:
        keys |= {"attention.key_length": head, "attention.value_length": head, "rope.dimension_count": head}
    return keys


def _experts(count: int, used: int, ff: int = 0, shared: int = 0, shared_ff: int = 0, dense: int = 0) -> Keys:
    """A mixture of experts; the first `dense` layers have no experts."""
    keys: Keys = {"expert_count": count, "expert_used_count": used}
    if ff:
        keys |= {"expert_feed_forward_length": ff}
    if shared:
        keys |= {"expert_shared_count": shared}
    if shared_ff:
        keys |= {"expert_shared_feed_forward_length": shared_ff}
    if dense:
        keys |= {"leading_dense_block_count": dense}
    return keys


def _ssm(inner: int, state: int, rank: int, groups: int | None = None) -> Keys:
    """Mamba; `rank` is the number of heads in Mamba 2."""
    keys: Keys = {"ssm.conv_kernel": 4, "ssm.inner_size": inner, "ssm.state_size": state, "ssm.time_step_rank": rank}
    return keys | ({} if groups is None else {"ssm.group_count": groups})


def _mla(q_rank: int, kv_rank: int = 512, nope: int = 128, rope: int = 64, value: int = 128) -> Keys:
    """DeepSeek's attention: to llama.cpp, one head of the compressed keys and values."""
    keys: Keys = {
        "attention.kv_lora_rank": kv_rank,
        "attention.key_length": kv_rank + rope,
        "attention.value_length": kv_rank,
        "attention.key_length_mla": nope + rope,
        "attention.value_length_mla": value,
        "rope.dimension_count": rope,
    }
    return keys | ({"attention.q_lora_rank": q_rank} if q_rank else {})


def _swa(window: int) -> Keys:
    return {"attention.sliding_window": window}


def rotated(size: int) -> Keys:
    """RoPE on a part of each head."""
    return {"rope.dimension_count": size}


def _granite(logits: float, attention: float) -> Keys:
    return {"embedding_scale": 12.0, "residual_scale": 0.22, "logit_scale": logits, "attention.scale": attention}


def _gemma4(
    layers: int,
    width: int,
    ff: int | list[int],
    heads: int,
    heads_kv: int | list[int],
    period: int,
    ple: int = 0,
    shared: int = 0,
) -> Keys:
    """The last layer of every period is global, with larger heads."""
    keys: Keys = {
        "attention.key_length_swa": 256,
        "attention.value_length_swa": 256,
        "rope.dimension_count_swa": 256,
        "attention.sliding_window": 512 if ple else 1024,
        "attention.sliding_window_pattern": [(i + 1) % period != 0 for i in range(layers)],
        "embedding_length_per_layer_input": ple,
        "attention.shared_kv_layers": shared,
    }
    return sizes(262144, layers, width, ff, heads, heads_kv, 512) | keys


def _nemotron_h(pattern: str, vocab: int, width: int, ff: int, heads: int, heads_kv: int, head: int) -> Keys:
    """Each layer is of one kind: M is Mamba, * attention, and - or E an FFN."""
    heads_kv_of = [heads_kv if layer == "*" else 0 for layer in pattern]
    ff_of = [ff if layer in "-E" else 0 for layer in pattern]
    return sizes(vocab, len(pattern), width, ff_of, heads, heads_kv_of, head)


def _rwkv7(decay: int, iclr: int, value: int, gate: int) -> Keys:
    return {
        "wkv.head_size": 64,
        "attention.decay_lora_rank": decay,
        "attention.iclr_lora_rank": iclr,
        "attention.value_residual_mix_lora_rank": value,
        "attention.gate_lora_rank": gate,
    }


GEMMA3 = f"{QKV}|{TIED}|^dense"

PARALLEL: Keys = {"use_parallel_residual": True}
MROPE: Keys = {"rope.dimension_sections": [11, 11, 10, 0]}
NOPE: Keys = {"rope.scaling.finetuned": False}
SIGMOID: Keys = {"expert_gating_func": int(gguf.ExpertGatingFuncType.SIGMOID)}

LFM2: Keys = {"shortconv.l_cache": 3}
LFM2_HEADS: list[int] = [8 * (i in (2, 5, 8, 10, 12, 14)) for i in range(16)]
LFM2_WITHOUT = f"{QKV}|{TIED}|^dense"

MINICPM3: Keys = {
    "attention.q_lora_rank": 768,
    "attention.kv_lora_rank": 256,
    "attention.key_length": 96,
    "attention.value_length": 64,
    "rope.dimension_count": 32,
}

# one number for all layers, where the real model has one for each
XIELU: Keys = {"xielu.alpha_n": 0.8, "xielu.alpha_p": 0.8, "xielu.beta": 0.5, "xielu.eps": -1e-6}


ENTRIES: tuple[Entry, ...] = (
    # Llama
    Entry(
        "llama-1-7b", "llama", sizes(32000, 32, 4096, 11008, 32), LLAMA, 6_738_415_616, "arXiv:2302.13971, huggyllama/llama-7b"
    ),
    Entry("llama-1-65b", "llama", sizes(32000, 80, 8192, 22016, 64), LLAMA, 65_285_660_672, "huggyllama/llama-65b"),
    Entry("llama-2-7b", "llama", sizes(32000, 32, 4096, 11008, 32), LLAMA, 6_738_415_616, "meta-llama/Llama-2-7b-hf"),
    Entry("llama-2-70b", "llama", sizes(32000, 80, 8192, 28672, 64, 8), LLAMA, 68_976_648_192, "meta-llama/Llama-2-70b-hf"),
    Entry("llama-3.1-8b", "llama", sizes(128256, 32, 4096, 14336, 32, 8), LLAMA3, 8_030_261_248, "meta-llama/Llama-3.1-8B"),
    Entry("llama-3.1-70b", "llama", sizes(128256, 80, 8192, 28672, 64, 8), LLAMA3, 70_553_706_496, "meta-llama/Llama-3.1-70B"),
    Entry(
        "llama-3.1-405b",
        "llama",
        sizes(128256, 126, 16384, 53248, 128, 8),
        LLAMA3,
        405_853_388_800,
        "meta-llama/Llama-3.1-405B",
    ),
    Entry(
        "llama-3.2-1b",
        "llama",
        sizes(128256, 16, 2048, 8192, 32, 8),
        f"{LLAMA3}|{TIED}",
        1_235_814_400,
        "meta-llama/Llama-3.2-1B",
    ),
    Entry(
        "llama-3.2-3b",
        "llama",
        sizes(128256, 28, 3072, 8192, 24, 8),
        f"{LLAMA3}|{TIED}",
        3_212_749_824,
        "meta-llama/Llama-3.2-3B",
    ),
    Entry(
        "llama-4-scout",
        "llama4",
        sizes(202048, 48, 5120, 16384, 40, 8, 128) | _experts(16, 1, 8192) | {"interleave_moe_layer_step": 1},
        QKV,
        107.77e9,
        "meta-llama/Llama-4-Scout-17B-16E, without vision",
    ),
    Entry(
        "llama-4-maverick",
        "llama4",
        sizes(202048, 48, 5120, 16384, 40, 8, 128) | _experts(128, 1, 8192) | {"interleave_moe_layer_step": 2},
        f"{QKV}|{FREQS}",
        400_711_848_960,
        "meta-llama/Llama-4-Maverick-17B-128E, without vision",
    ),
    Entry(
        "tinyllama-1.1b",
        "llama",
        sizes(32000, 22, 2048, 5632, 32, 4),
        LLAMA,
        1_100_048_384,
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    ),
    Entry("llama-68m", "llama", sizes(32000, 2, 768, 3072, 12), LLAMA, 68_030_208, "JackFram/llama-68m"),
    Entry("llama-160m", "llama", sizes(32000, 12, 768, 3072, 12), LLAMA, 162_417_408, "JackFram/llama-160m"),
    Entry(
        "smollm2-135m",
        "llama",
        sizes(49152, 30, 576, 1536, 9, 3),
        f"{LLAMA}|{TIED}",
        134_515_008,
        "HuggingFaceTB/SmolLM2-135M",
    ),
    Entry(
        "smollm2-360m",
        "llama",
        sizes(49152, 32, 960, 2560, 15, 5),
        f"{LLAMA}|{TIED}",
        361_821_120,
        "HuggingFaceTB/SmolLM2-360M",
    ),
    Entry(
        "smollm2-1.7b",
        "llama",
        sizes(49152, 24, 2048, 8192, 32),
        f"{LLAMA}|{TIED}",
        1_711_376_384,
        "HuggingFaceTB/SmolLM2-1.7B",
    ),
    Entry(
        "smollm3-3b",
        "smollm3",
        sizes(128256, 36, 2048, 11008, 16, 4),
        f"{QKV}|{TIED}",
        3_075_098_624,
        "HuggingFaceTB/SmolLM3-3B",
    ),
    Entry("yi-6b", "llama", sizes(64000, 32, 4096, 11008, 32, 4), LLAMA, 6_061_035_520, "01-ai/Yi-6B"),
    Entry("yi-34b", "llama", sizes(64000, 60, 7168, 20480, 56, 8), LLAMA, 34_388_917_248, "01-ai/Yi-34B"),
    Entry("solar-10.7b", "llama", sizes(32000, 48, 4096, 14336, 32, 8), LLAMA, 10_731_524_096, "upstage/SOLAR-10.7B-v1.0"),
    # Mistral
    Entry("mistral-7b-v0.1", "llama", sizes(32000, 32, 4096, 14336, 32, 8), LLAMA, 7_241_732_096, "mistralai/Mistral-7B-v0.1"),
    Entry(
        "mistral-nemo-12b",
        "llama",
        sizes(131072, 40, 5120, 14336, 32, 8, 128),
        LLAMA,
        12_247_782_400,
        "mistralai/Mistral-Nemo-Base-2407",
    ),
    Entry(
        "mistral-small-24b",
        "llama",
        sizes(131072, 40, 5120, 32768, 32, 8, 128),
        LLAMA,
        23_572_403_200,
        "mistralai/Mistral-Small-24B-Base-2501",
    ),
    Entry(
        "mistral-large-123b",
        "llama",
        sizes(32768, 88, 12288, 28672, 96, 8),
        LLAMA,
        122_610_069_504,
        "mistralai/Mistral-Large-Instruct-2407",
    ),
    Entry(
        "ministral-8b",
        "llama",
        sizes(131072, 36, 4096, 12288, 32, 8),
        LLAMA,
        8_019_808_256,
        "mistralai/Ministral-8B-Instruct-2410",
    ),
    Entry(
        "mixtral-8x7b",
        "llama",
        sizes(32000, 32, 4096, 14336, 32, 8) | _experts(8, 2),
        LLAMA,
        46_702_792_704,
        "mistralai/Mixtral-8x7B-v0.1",
    ),
    Entry(
        "mixtral-8x22b",
        "llama",
        sizes(32000, 56, 6144, 16384, 48, 8) | _experts(8, 2),
        LLAMA,
        140_620_634_112,
        "mistralai/Mixtral-8x22B-v0.1",
    ),
    # Qwen
    Entry("qwen2-0.5b", "qwen2", sizes(151936, 24, 896, 4864, 14, 2), TIED, 494_032_768, "Qwen/Qwen2-0.5B"),
    Entry("qwen2-7b", "qwen2", sizes(152064, 28, 3584, 18944, 28, 4), r"^output\.bias", 7_615_616_512, "Qwen/Qwen2-7B"),
    Entry("qwen2.5-0.5b", "qwen2", sizes(151936, 24, 896, 4864, 14, 2), TIED, 494_032_768, "Qwen/Qwen2.5-0.5B"),
    Entry("qwen2.5-1.5b", "qwen2", sizes(151936, 28, 1536, 8960, 12, 2), TIED, 1_543_714_304, "Qwen/Qwen2.5-1.5B"),
    Entry("qwen2.5-3b", "qwen2", sizes(151936, 36, 2048, 11008, 16, 2), TIED, 3_085_938_688, "Qwen/Qwen2.5-3B"),
    Entry("qwen2.5-7b", "qwen2", sizes(152064, 28, 3584, 18944, 28, 4), r"^output\.bias", 7_615_616_512, "Qwen/Qwen2.5-7B"),
    Entry("qwen2.5-32b", "qwen2", sizes(152064, 64, 5120, 27648, 40, 8), r"^output\.bias", 32_763_876_352, "Qwen/Qwen2.5-32B"),
    Entry("qwen2.5-72b", "qwen2", sizes(152064, 80, 8192, 29568, 64, 8), r"^output\.bias", 72_706_203_648, "Qwen/Qwen2.5-72B"),
    Entry(
        "qwen1.5-moe-a2.7b",
        "qwen2moe",
        sizes(151936, 24, 2048, 5632, 16) | _experts(60, 4, 1408, shared_ff=5632),
        "",
        14_315_784_192,
        "Qwen/Qwen1.5-MoE-A2.7B",
    ),
    Entry(
        "qwen2-57b-a14b",
        "qwen2moe",
        sizes(151936, 28, 3584, 18944, 28, 4) | _experts(64, 8, 2560, shared_ff=20480),
        "",
        57_408_658_944,
        "Qwen/Qwen2-57B-A14B",
    ),
    Entry(
        "qwen3-0.6b", "qwen3", sizes(151936, 28, 1024, 3072, 16, 8, 128), f"^cls|{QKV}|{TIED}", 596_049_920, "Qwen/Qwen3-0.6B"
    ),
    Entry(
        "qwen3-1.7b",
        "qwen3",
        sizes(151936, 28, 2048, 6144, 16, 8, 128),
        f"^cls|{QKV}|{TIED}",
        1_720_574_976,
        "Qwen/Qwen3-1.7B",
    ),
    Entry("qwen3-4b", "qwen3", sizes(151936, 36, 2560, 9728, 32, 8, 128), f"^cls|{QKV}|{TIED}", 4_022_468_096, "Qwen/Qwen3-4B"),
    Entry("qwen3-8b", "qwen3", sizes(151936, 36, 4096, 12288, 32, 8, 128), f"^cls|{QKV}", 8_190_735_360, "Qwen/Qwen3-8B"),
    Entry("qwen3-32b", "qwen3", sizes(151936, 64, 5120, 25600, 64, 8, 128), f"^cls|{QKV}", 32_762_123_264, "Qwen/Qwen3-32B"),
    Entry(
        "qwen3-30b-a3b",
        "qwen3moe",
        sizes(151936, 48, 2048, 6144, 32, 4, 128) | _experts(128, 8, 768),
        QKV,
        30_532_122_624,
        "Qwen/Qwen3-30B-A3B",
    ),
    Entry(
        "qwen3-235b-a22b",
        "qwen3moe",
        sizes(151936, 94, 4096, 12288, 64, 4, 128) | _experts(128, 8, 1536),
        QKV,
        235_093_634_560,
        "Qwen/Qwen3-235B-A22B",
    ),
    Entry(
        "qwen3-coder-480b-a35b",
        "qwen3moe",
        sizes(151936, 62, 6144, 8192, 96, 8, 128) | _experts(160, 8, 2560),
        QKV,
        480_154_875_392,
        "Qwen/Qwen3-Coder-480B-A35B-Instruct",
    ),
    Entry(
        "qwen3-next-80b-a3b",
        "qwen3next",
        sizes(151936, 48, 2048, 5120, 16, 2, 256)
        | _experts(512, 10, 512, shared_ff=512)
        | rotated(64)
        | _ssm(4096, 128, 32, 16),
        f"{QKV}|ssm_in",
        79_674_391_296,
        "Qwen/Qwen3-Next-80B-A3B-Instruct, without multi-token prediction",
    ),
    Entry(
        "qwen3.5-0.8b",
        "qwen35",
        sizes(248320, 24, 1024, 3584, 8, 2, 256) | rotated(64) | MROPE | _ssm(2048, 128, 16, 16),
        f"{QKV}|{TIED}",
        752_393_024,
        "Qwen/Qwen3.5-0.8B, without vision and multi-token prediction",
    ),
    Entry(
        "qwen3.5-4b",
        "qwen35",
        sizes(248320, 32, 2560, 9216, 16, 4, 256) | rotated(64) | MROPE | _ssm(4096, 128, 32, 16),
        f"{QKV}|{TIED}",
        4_205_751_296,
        "Qwen/Qwen3.5-4B, without vision and multi-token prediction",
    ),
    Entry(
        "qwen3.5-9b",
        "qwen35",
        sizes(248320, 32, 4096, 12288, 16, 4, 256) | rotated(64) | MROPE | _ssm(4096, 128, 32, 16),
        QKV,
        8_953_803_264,
        "Qwen/Qwen3.5-9B, without vision and multi-token prediction",
    ),
    Entry(
        "qwen3.5-27b",
        "qwen35",
        sizes(248320, 64, 5120, 17408, 24, 4, 256) | rotated(64) | MROPE | _ssm(6144, 128, 48, 16),
        QKV,
        26_895_998_464,
        "Qwen/Qwen3.5-27B, without vision and multi-token prediction",
    ),
    Entry(
        "qwen3.5-35b-a3b",
        "qwen35moe",
        sizes(248320, 40, 2048, 512, 16, 2, 256)
        | _experts(256, 8, 512, shared_ff=512)
        | rotated(64)
        | MROPE
        | _ssm(4096, 128, 32, 16),
        QKV,
        34_660_610_688,
        "Qwen/Qwen3.5-35B-A3B, without vision and multi-token prediction",
    ),
    Entry(
        "qwen3.5-122b-a10b",
        "qwen35moe",
        sizes(248320, 48, 3072, 1024, 32, 2, 256)
        | _experts(256, 8, 1024, shared_ff=1024)
        | rotated(64)
        | MROPE
        | _ssm(8192, 128, 64, 16),
        QKV,
        122.11e9,
        "Qwen/Qwen3.5-122B-A10B, without vision and multi-token prediction",
    ),
    Entry(
        "qwen3.5-397b-a17b",
        "qwen35moe",
        sizes(248320, 60, 4096, 1024, 32, 2, 256)
        | _experts(512, 10, 1024, shared_ff=1024)
        | rotated(64)
        | MROPE
        | _ssm(8192, 128, 64, 16),
        QKV,
        396.35e9,
        "Qwen/Qwen3.5-397B-A17B, without vision and multi-token prediction",
    ),
    # Gemma
    Entry("gemma-2b", "gemma", sizes(256000, 18, 2048, 16384, 8, 1, 256), QKV, 2_506_172_416, "google/gemma-2b"),
    Entry("gemma-7b", "gemma", sizes(256000, 28, 3072, 24576, 16, 16, 256), QKV, 8_537_680_896, "google/gemma-7b"),
    Entry("gemma-2-2b", "gemma2", sizes(256000, 26, 2304, 9216, 8, 4, 256), QKV, 2_614_341_888, "google/gemma-2-2b"),
    Entry("gemma-2-9b", "gemma2", sizes(256000, 42, 3584, 14336, 16, 8, 256), QKV, 9_241_705_984, "google/gemma-2-9b"),
    Entry("gemma-2-27b", "gemma2", sizes(256000, 46, 4608, 36864, 32, 16, 128), QKV, 27_227_128_320, "google/gemma-2-27b"),
    Entry(
        "gemma-3-270m",
        "gemma3",
        sizes(262144, 18, 640, 2048, 4, 1, 256) | _swa(512),
        GEMMA3,
        268_098_176,
        "google/gemma-3-270m",
    ),
    Entry(
        "gemma-3-1b",
        "gemma3",
        sizes(262144, 26, 1152, 6912, 4, 1, 256) | _swa(512),
        GEMMA3,
        999_885_952,
        "google/gemma-3-1b-pt",
    ),
    Entry(
        "gemma-3-4b",
        "gemma3",
        sizes(262208, 34, 2560, 10240, 8, 4, 256) | _swa(1024),
        GEMMA3,
        3_880_263_168,
        "google/gemma-3-4b-pt, without vision",
    ),
    Entry(
        "gemma-3-12b",
        "gemma3",
        sizes(262208, 48, 3840, 15360, 16, 8, 256) | _swa(1024),
        GEMMA3,
        11_766_034_176,
        "google/gemma-3-12b-pt, without vision",
    ),
    Entry(
        "gemma-3-27b",
        "gemma3",
        sizes(262208, 62, 5376, 21504, 32, 16, 128) | _swa(1024),
        GEMMA3,
        27_009_346_304,
        "google/gemma-3-27b-pt, without vision",
    ),
    Entry(
        "gemma-3n-e2b",
        "gemma3n",
        sizes(262400, 30, 2048, 8192, 8, 2, 256) | _swa(512),
        f"{QKV}|{TIED}",
        4.46e9,
        "google/gemma-3n-E2B, text",
    ),
    Entry(
        "gemma-3n-e4b",
        "gemma3n",
        sizes(262400, 35, 2048, 16384, 8, 2, 256) | _swa(512),
        f"{QKV}|{TIED}",
        6.87e9,
        "google/gemma-3n-E4B, text",
    ),
    Entry(
        "gemma-4-e2b",
        "gemma4",
        _gemma4(35, 1536, [6144] * 15 + [12288] * 20, 8, 1, 5, 256, 20),
        TIED,
        4_647_449_891,
        "google/gemma-4-E2B, text",
    ),
    Entry("gemma-4-e4b", "gemma4", _gemma4(42, 2560, 10240, 8, 2, 6, 256, 18), TIED, 7_518_069_034, "google/gemma-4-E4B, text"),
    Entry(
        "gemma-4-26b-a4b",
        "gemma4",
        _gemma4(30, 2816, 2112, 16, [8, 8, 8, 8, 8, 2] * 5, 6) | _experts(128, 8, 704),
        TIED + r"|blk\.(5|11|17|23|29)\.attn_v\.",
        25_233_141_790,
        "google/gemma-4-26B-A4B, text",
    ),
    Entry(
        "gemma-4-31b",
        "gemma4",
        _gemma4(60, 5376, 21504, 32, [16, 16, 16, 16, 16, 4] * 10, 6),
        TIED + r"|ffn_gate_inp|ffn_\w+exps|ffn_pre_norm_2|ffn_post_norm_[12]|blk\.(5|11|17|23|29|35|41|47|53|59)\.attn_v\.",
        30_697_345_340,
        "google/gemma-4-31B, text",
    ),
    # Phi
    Entry("phi-1", "phi2", sizes(51200, 24, 2048, 8192, 32) | rotated(32), "", 1_418_270_720, "microsoft/phi-1"),
    Entry("phi-1.5", "phi2", sizes(51200, 24, 2048, 8192, 32) | rotated(32), "", 1_418_270_720, "microsoft/phi-1_5"),
    Entry("phi-2", "phi2", sizes(51200, 32, 2560, 10240, 32) | rotated(32), "", 2_779_683_840, "microsoft/phi-2"),
    Entry(
        "phi-3-mini-4k",
        "phi3",
        sizes(32064, 32, 3072, 8192, 32),
        f"{QKV}|{FACTORS}",
        3_821_079_552,
        "microsoft/Phi-3-mini-4k-instruct",
    ),
    Entry(
        "phi-3-medium-4k",
        "phi3",
        sizes(32064, 40, 5120, 17920, 40, 10),
        f"{QKV}|{FACTORS}",
        13_960_238_080,
        "microsoft/Phi-3-medium-4k-instruct",
    ),
    Entry(
        "phi-3.5-moe",
        "phimoe",
        sizes(32064, 32, 4096, 6400, 32, 8) | _experts(16, 2),
        "",
        41_873_153_344,
        "microsoft/Phi-3.5-MoE-instruct",
    ),
    Entry("phi-4", "phi3", sizes(100352, 40, 5120, 17920, 40, 10), f"{QKV}|{FACTORS}", 14_659_507_200, "microsoft/phi-4"),
    Entry(
        "phi-4-mini",
        "phi3",
        sizes(200064, 32, 3072, 8192, 24, 8) | rotated(96),
        f"{QKV}|{TIED}",
        3_836_021_760,
        "microsoft/Phi-4-mini-instruct",
    ),
    # parallel residuals
    Entry("falcon-7b", "falcon", sizes(65024, 32, 4544, 18176, 71, 1), "attn_norm_2", 7_217_189_760, "tiiuae/falcon-7b"),
    Entry("falcon-40b", "falcon", sizes(65024, 60, 8192, 32768, 128, 8), "", 41_835_970_560, "tiiuae/falcon-40b"),
    Entry(
        "pythia-70m",
        "gptneox",
        sizes(50304, 6, 512, 2048, 8) | rotated(16) | PARALLEL,
        "",
        70_426_624,
        "EleutherAI/pythia-70m",
    ),
    Entry(
        "pythia-160m",
        "gptneox",
        sizes(50304, 12, 768, 3072, 12) | rotated(16) | PARALLEL,
        "",
        162_322_944,
        "EleutherAI/pythia-160m",
    ),
    Entry(
        "pythia-1b",
        "gptneox",
        sizes(50304, 16, 2048, 8192, 8) | rotated(64) | PARALLEL,
        "",
        1_011_781_632,
        "EleutherAI/pythia-1b",
    ),
    Entry(
        "pythia-6.9b",
        "gptneox",
        sizes(50432, 32, 4096, 16384, 32) | rotated(32) | PARALLEL,
        "",
        6_857_302_016,
        "EleutherAI/pythia-6.9b",
    ),
    Entry(
        "pythia-12b",
        "gptneox",
        sizes(50688, 36, 5120, 20480, 40) | rotated(32) | PARALLEL,
        "",
        11_846_072_320,
        "EleutherAI/pythia-12b",
    ),
    Entry(
        "gpt-neox-20b",
        "gptneox",
        sizes(50432, 44, 6144, 24576, 64) | rotated(24) | PARALLEL,
        "",
        20_554_567_680,
        "EleutherAI/gpt-neox-20b",
    ),
    Entry(
        "command-r-35b", "command-r", sizes(256000, 40, 8192, 22528, 64), QKV, 34_980_831_232, "CohereForAI/c4ai-command-r-v01"
    ),
    Entry(
        "command-r-plus-104b",
        "command-r",
        sizes(256000, 64, 12288, 33792, 96, 8),
        QKV,
        103_810_674_688,
        "CohereForAI/c4ai-command-r-plus",
    ),
    Entry(
        "command-r7b",
        "cohere2",
        sizes(256000, 32, 4096, 14336, 32, 8) | _swa(4096) | {"logit_scale": 0.25},
        QKV,
        8_028_033_024,
        "CohereForAI/c4ai-command-r7b-12-2024",
    ),
    Entry(
        "aya-expanse-8b", "command-r", sizes(256000, 32, 4096, 14336, 32, 8), QKV, 8_028_033_024, "CohereForAI/aya-expanse-8b"
    ),
    Entry(
        "aya-expanse-32b",
        "command-r",
        sizes(256000, 40, 8192, 24576, 64, 8),
        QKV,
        32_296_476_672,
        "CohereForAI/aya-expanse-32b",
    ),
    Entry(
        "stablelm-3b-4e1t",
        "stablelm",
        sizes(50304, 32, 2560, 6912, 32) | rotated(20),
        f"{QKV}|attn_[qk]_norm",
        2_795_443_200,
        "stabilityai/stablelm-3b-4e1t",
    ),
    Entry(
        "stablelm-2-1.6b",
        "stablelm",
        sizes(100352, 24, 2048, 5632, 32) | rotated(16),
        "attn_[qk]_norm",
        1_644_515_328,
        "stabilityai/stablelm-2-1_6b",
    ),
    Entry(
        "stablelm-2-12b",
        "stablelm",
        sizes(100352, 40, 5120, 13824, 32, 8) | rotated(40),
        f"{QKV}|ffn_norm",
        12_143_185_920,
        "stabilityai/stablelm-2-12b",
    ),
    # ALiBi, and positions as vectors
    Entry("bloom-560m", "bloom", sizes(250880, 24, 1024, 4096, 16), TIED, 559_214_592, "bigscience/bloom-560m"),
    Entry("bloom-7b1", "bloom", sizes(250880, 30, 4096, 16384, 32), TIED, 7_069_016_064, "bigscience/bloom-7b1"),
    Entry("bloom-176b", "bloom", sizes(250880, 70, 14336, 57344, 112), TIED, 176_247_271_424, "bigscience/bloom"),
    Entry(
        "mpt-7b",
        "mpt",
        sizes(50432, 32, 4096, 16384, 32) | {"context_length": 2048, "attention.max_alibi_bias": 8.0},
        rf"\.bias|attn_[qk]_norm|ffn\.act|position_embd|{TIED}",
        6_649_286_656,
        "mosaicml/mpt-7b",
    ),
    Entry(
        "gpt2", "gpt2", sizes(50257, 12, 768, 3072, 12) | {"context_length": 1024}, TIED, 124_439_808, "openai-community/gpt2"
    ),
    Entry(
        "gpt2-xl",
        "gpt2",
        sizes(50257, 48, 1600, 6400, 25) | {"context_length": 1024},
        TIED,
        1_557_611_200,
        "openai-community/gpt2-xl",
    ),
    Entry("starcoder2-3b", "starcoder2", sizes(49152, 30, 3072, 12288, 24, 2), TIED, 3_030_371_328, "bigcode/starcoder2-3b"),
    # recurrent and hybrid
    Entry(
        "mamba-130m",
        "mamba",
        sizes(50280, 24, 768, 0, 0) | _ssm(1536, 16, 48),
        TIED,
        129_135_360,
        "state-spaces/mamba-130m-hf",
    ),
    Entry(
        "mamba-2.8b",
        "mamba",
        sizes(50280, 64, 2560, 0, 0) | _ssm(5120, 16, 160),
        TIED,
        2_768_345_600,
        "state-spaces/mamba-2.8b-hf",
    ),
    Entry(
        "mamba2-130m",
        "mamba2",
        sizes(50288, 24, 768, 0, 0) | _ssm(1536, 128, 24, 1),
        TIED,
        128_989_632,
        "state-spaces/mamba2-130m",
    ),
    Entry(
        "mamba2-2.7b",
        "mamba2",
        sizes(50288, 64, 2560, 0, 0) | _ssm(5120, 128, 80, 1),
        TIED,
        2_702_599_680,
        "state-spaces/mamba2-2.7b",
    ),
    Entry(
        "falcon-mamba-7b",
        "mamba",
        sizes(65024, 64, 4096, 0, 0) | _ssm(8192, 16, 256) | {"ssm.dt_b_c_rms": True},
        "",
        7_272_665_088,
        "tiiuae/falcon-mamba-7b",
    ),
    Entry(
        "falcon-h1-0.5b",
        "falcon-h1",
        sizes(32784, 36, 1024, 2048, 8, 2, 64) | _ssm(1536, 128, 24, 1),
        f"{LLAMA}|ssm_norm",
        521_411_104,
        "tiiuae/Falcon-H1-0.5B-Base",
    ),
    Entry(
        "falcon-h1-7b",
        "falcon-h1",
        sizes(130048, 44, 3072, 12288, 12, 2, 128) | _ssm(3072, 256, 24, 1),
        LLAMA,
        7.59e9,
        "tiiuae/Falcon-H1-7B-Base",
    ),
    Entry(
        "falcon-h1-34b",
        "falcon-h1",
        sizes(261120, 72, 5120, 21504, 20, 4, 128) | _ssm(4096, 256, 32, 2),
        LLAMA,
        33_642_516_224,
        "tiiuae/Falcon-H1-34B-Base",
    ),
    Entry(
        "granite-4.0-h-tiny",
        "granitehybrid",
        sizes(100352, 40, 1536, 512, 12, [4 * (i in (5, 15, 25, 35)) for i in range(40)])
        | _experts(64, 6, shared_ff=1024)
        | _ssm(3072, 128, 48, 1)
        | _granite(6.0, 0.0078125)
        | NOPE,
        f"{LLAMA}|{TIED}",
        6_939_037_248,
        "ibm-granite/granite-4.0-h-tiny",
    ),
    Entry(
        "granite-4.0-h-small",
        "granitehybrid",
        sizes(100352, 40, 4096, 768, 32, [8 * (i in (5, 15, 25, 35)) for i in range(40)])
        | _experts(72, 10, shared_ff=1536)
        | _ssm(8192, 128, 128, 1)
        | _granite(16.0, 0.0078125)
        | NOPE,
        f"{LLAMA}|{TIED}",
        32_207_337_984,
        "ibm-granite/granite-4.0-h-small",
    ),
    Entry(
        "jamba-mini",
        "jamba",
        sizes(65536, 32, 4096, 14336, 32, [0, 0, 0, 0, 8, 0, 0, 0] * 4) | _experts(16, 2) | _ssm(8192, 16, 256),
        rf"{QKV}|blk\.\d*[02468]\.ffn_(gate_inp|\w+_exps)",
        51_570_323_328,
        "ai21labs/AI21-Jamba-1.5-Mini",
    ),
    Entry(
        "lfm2-350m",
        "lfm2",
        sizes(65536, 16, 1024, 4608, 16, LFM2_HEADS) | LFM2,
        LFM2_WITHOUT,
        354_483_968,
        "LiquidAI/LFM2-350M",
    ),
    Entry(
        "lfm2-1.2b",
        "lfm2",
        sizes(65536, 16, 2048, 8192, 32, LFM2_HEADS) | LFM2,
        LFM2_WITHOUT,
        1_170_340_608,
        "LiquidAI/LFM2-1.2B",
    ),
    Entry(
        "rwkv7-0.1b",
        "rwkv7",
        sizes(65536, 12, 768, 3072, 0) | _rwkv7(64, 64, 32, 128),
        "",
        191_034_624,
        "BlinkDL/rwkv-7-world",
    ),
    Entry(
        "rwkv7-2.9b",
        "rwkv7",
        sizes(65536, 32, 2560, 10240, 0) | _rwkv7(96, 96, 64, 320),
        "",
        2947.74e6,
        "BlinkDL/rwkv-7-world",
    ),
    Entry(
        "nemotron-h-8b",
        "nemotron_h",
        _nemotron_h("M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-", 131072, 4096, 21504, 32, 8, 128)
        | _ssm(8192, 128, 128, 8),
        BIAS,
        8.10e9,
        "nvidia/Nemotron-H-8B-Base-8K",
    ),
    # Granite
    Entry(
        "granite-3.1-8b",
        "granite",
        sizes(49155, 40, 4096, 12800, 32, 8) | _granite(16.0, 0.0078125),
        f"{LLAMA}|{TIED}",
        8_170_848_256,
        "ibm-granite/granite-3.1-8b-base",
    ),
    Entry(
        "granite-3.1-2b",
        "granite",
        sizes(49155, 40, 2048, 8192, 32, 8) | _granite(8.0, 0.015625),
        f"{LLAMA}|{TIED}",
        2_533_531_648,
        "ibm-granite/granite-3.1-2b-base",
    ),
    Entry(
        "granite-3.1-1b-a400m",
        "granitemoe",
        sizes(49155, 24, 1024, 512, 16, 8) | _experts(32, 8) | _granite(6.0, 0.015625),
        f"{LLAMA}|{TIED}",
        1_334_628_352,
        "ibm-granite/granite-3.1-1b-a400m-base",
    ),
    # mixtures of experts
    Entry(
        "deepseek-v2-lite",
        "deepseek2",
        sizes(102400, 27, 2048, 10944, 16, 1) | _mla(0) | _experts(64, 6, 1408, 2, dense=1),
        "exp_probs_b",
        15_706_484_224,
        "deepseek-ai/DeepSeek-V2-Lite",
    ),
    Entry(
        "deepseek-v2",
        "deepseek2",
        sizes(102400, 60, 5120, 12288, 128, 1) | _mla(1536) | _experts(160, 6, 1536, 2, dense=1),
        "exp_probs_b",
        235_741_434_880,
        "deepseek-ai/DeepSeek-V2",
    ),
    Entry(
        "deepseek-v3",
        "deepseek2",
        sizes(129280, 61, 7168, 18432, 128, 1) | _mla(1536) | _experts(256, 8, 2048, 1, dense=3) | SIGMOID,
        "",
        671_026_419_200,
        "deepseek-ai/DeepSeek-V3, without multi-token prediction",
    ),
    Entry(
        "kimi-k2",
        "deepseek2",
        sizes(163840, 61, 7168, 18432, 64, 1) | _mla(1536) | _experts(384, 8, 2048, 1, dense=1) | SIGMOID,
        "",
        1_026_408_232_448,
        "moonshotai/Kimi-K2-Instruct",
    ),
    Entry(
        "arctic-480b",
        "arctic",
        sizes(32000, 35, 7168, 4864, 56, 8) | _experts(128, 2),
        QKV,
        479e9,
        "Snowflake/snowflake-arctic-base",
    ),
    Entry(
        "olmoe-1b-7b",
        "olmoe",
        sizes(50304, 16, 2048, 1024, 16) | _experts(64, 8),
        QKV,
        6_919_161_856,
        "allenai/OLMoE-1B-7B-0924",
    ),
    Entry(
        "gpt-oss-20b",
        "gpt-oss",
        sizes(201088, 24, 2880, 2880, 64, 8, 64) | _experts(32, 4, 2880) | _swa(128),
        "",
        20_914_757_184,
        "openai/gpt-oss-20b",
    ),
    Entry(
        "gpt-oss-120b",
        "gpt-oss",
        sizes(201088, 36, 2880, 2880, 64, 8, 64) | _experts(128, 4, 2880) | _swa(128),
        "",
        116_829_156_672,
        "openai/gpt-oss-120b",
    ),
    Entry(
        "smallthinker-4b-a0.6b",
        "smallthinker",
        sizes(151936, 32, 1536, 768, 12, 2, 128) | _experts(32, 4, 768) | SIGMOID,
        QKV,
        4.27e9,
        "PowerInfer/SmallThinker-4BA0.6B-Instruct",
    ),
    Entry(
        "smallthinker-21b-a3b",
        "smallthinker",
        sizes(151936, 52, 2560, 768, 28, 4, 128) | _experts(64, 6, 768) | SIGMOID | _swa(4096),
        QKV,
        21.5e9,
        "PowerInfer/SmallThinker-21BA3B-Instruct",
    ),
    Entry(
        "glm-4.5-air",
        "glm4moe",
        sizes(151552, 47, 4096, 10944, 96, 8, 128)
        | _experts(128, 8, 1408, 1, dense=1)
        | rotated(64)
        | {"nextn_predict_layers": 1}
        | SIGMOID,
        "attn_[qk]_norm",
        110_468_824_832,
        "zai-org/GLM-4.5-Air",
    ),
    Entry(
        "glm-4.5",
        "glm4moe",
        sizes(151552, 93, 5120, 12288, 96, 8, 128)
        | _experts(160, 8, 1536, 1, dense=3)
        | rotated(64)
        | {"nextn_predict_layers": 1}
        | SIGMOID,
        "",
        358_337_791_296,
        "zai-org/GLM-4.5",
    ),
    Entry(
        "nemotron-3-nano-30b-a3b",
        "nemotron_h_moe",
        _nemotron_h("MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", 131072, 2688, 1856, 32, 2, 128)
        | _experts(128, 6, 1856, 1, 3712)
        | _ssm(4096, 128, 64, 8),
        f"{BIAS}|latent",
        31_577_937_344,
        "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    ),
    Entry(
        "dbrx-132b",
        "dbrx",
        sizes(100352, 40, 6144, 10752, 48, 8) | _experts(16, 4) | {"attention.clamp_kqv": 8.0},
        QKV,
        131_596_523_520,
        "databricks/dbrx-base",
    ),
    Entry(
        "grok-1",
        "grok",
        sizes(131072, 64, 6144, 32768, 48, 8, 128) | _experts(8, 2, 32768),
        rf"{QKV}|ffn_(gate|up|down)\.weight|{TIED}",
        314e9,
        "xai-org/grok-1",
    ),
    Entry(
        "hunyuan-a13b",
        "hunyuan-moe",
        sizes(128167, 32, 4096, 3072, 32, 8, 128) | _experts(64, 8, 3072, shared_ff=3072),
        f"{QKV}|{TIED}",
        80_393_183_232,
        "tencent/Hunyuan-A13B-Instruct",
    ),
    Entry(
        "minimax-m2",
        "minimax-m2",
        sizes(200064, 62, 3072, 1536, 48, 8, 128) | _experts(256, 8, 1536) | SIGMOID | rotated(64),
        QKV,
        228_689_764_864,
        "MiniMaxAI/MiniMax-M2",
    ),
    # others
    Entry("olmo-1b", "olmo", sizes(50304, 16, 2048, 8192, 16), f"{QKV}|{TIED}", 1_176_764_416, "allenai/OLMo-1B-hf"),
    Entry("olmo-7b", "olmo", sizes(50304, 32, 4096, 11008, 32), QKV, 6_888_095_744, "allenai/OLMo-7B-hf"),
    Entry("olmo-2-7b", "olmo2", sizes(100352, 32, 4096, 11008, 32), QKV, 7_298_617_344, "allenai/OLMo-2-1124-7B"),
    Entry(
        "minitron-4b", "nemotron", sizes(256000, 32, 3072, 9216, 24, 8) | rotated(64), BIAS, 4.19e9, "nvidia/Minitron-4B-Base"
    ),
    Entry(
        "minicpm3-4b",
        "minicpm3",
        sizes(73448, 62, 2560, 6400, 40) | MINICPM3,
        f"{TIED}|{FACTORS}",
        4.07e9,
        "openbmb/MiniCPM3-4B",
    ),
    Entry("glm-4-9b", "chatglm", sizes(151552, 40, 4096, 13696, 32, 2) | rotated(64), "", 9_399_951_360, "THUDM/glm-4-9b"),
    Entry(
        "glm-4-9b-0414", "glm4", sizes(151552, 40, 4096, 13696, 32, 2) | rotated(64), "", 9_400_279_040, "THUDM/GLM-4-9B-0414"
    ),
    Entry("baichuan-7b", "baichuan", sizes(64000, 32, 4096, 11008, 32), QKV, 7_000_559_616, "baichuan-inc/Baichuan-7B"),
    Entry(
        "baichuan2-13b", "baichuan", sizes(125696, 40, 5120, 13696, 40), QKV, 13_896_668_160, "baichuan-inc/Baichuan2-13B-Base"
    ),
    Entry("internlm2-7b", "internlm2", sizes(92544, 32, 4096, 14336, 32, 8), QKV, 7_737_708_544, "internlm/internlm2-7b"),
    Entry("internlm2-20b", "internlm2", sizes(92544, 48, 6144, 16384, 48, 8), QKV, 19_861_149_696, "internlm/internlm2-20b"),
    Entry(
        "ernie-4.5-0.3b",
        "ernie4_5",
        sizes(103424, 18, 1024, 3072, 16, 2, 128),
        f"{BIAS}|{TIED}",
        360_748_032,
        "baidu/ERNIE-4.5-0.3B-PT",
    ),
    Entry(
        "seed-oss-36b",
        "seed_oss",
        sizes(155136, 64, 5120, 27648, 80, 8, 128),
        "",
        36_151_104_512,
        "ByteDance-Seed/Seed-OSS-36B-Base",
    ),
    Entry(
        "apertus-8b",
        "apertus",
        sizes(131072, 32, 4096, 21504, 32, 8) | XIELU,
        BIAS + r"|attn_[qk]_norm\.bias",
        8_053_338_176,
        "swiss-ai/Apertus-8B-2509",
    ),
    Entry(
        "exaone-3.5-2.4b",
        "exaone",
        sizes(102400, 30, 2560, 7168, 32, 8),
        f"{QKV}|{TIED}",
        2_405_327_360,
        "LGAI-EXAONE/EXAONE-3.5-2.4B-Instruct",
    ),
    Entry(
        "exaone-3.5-7.8b",
        "exaone",
        sizes(102400, 32, 4096, 14336, 32, 8),
        QKV,
        7_818_448_896,
        "LGAI-EXAONE/EXAONE-3.5-7.8B-Instruct",
    ),
    Entry(
        "exaone-4.0-1.2b",
        "exaone4",
        sizes(102400, 30, 2048, 4096, 32, 8),
        f"{QKV}|{TIED}",
        1.28e9,
        "LGAI-EXAONE/EXAONE-4.0-1.2B",
    ),
    Entry("exaone-4.0-32b", "exaone4", sizes(102400, 64, 5120, 27392, 40, 8), QKV, 32.0e9, "LGAI-EXAONE/EXAONE-4.0-32B"),
)

CATALOGUE: dict[str, Entry] = {entry.name: entry for entry in ENTRIES}


def write_headers(folder: Path, kind: gguf.GGMLQuantizationType) -> None:
    """Check the number of parameters of all models, and write their headers."""
    for entry in CATALOGUE.values():
        difference = count(entry) / entry.parameters - 1
        if abs(difference) > entry.tolerance:
            sys.exit(f"{entry.name} has {count(entry):,} parameters, {entry.parameters:,} are published")
        write_header(entry, folder / f"{entry.name}.gguf", kind)


if __name__ == "__main__":
    *name, place, kind = sys.argv[1:]
    if name:
        write_model(CATALOGUE[name[0]], Path(place), gguf.GGMLQuantizationType[kind])
    else:
        write_headers(Path(place), gguf.GGMLQuantizationType[kind])
