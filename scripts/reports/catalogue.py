"""Published shapes of well-known language models, as GGUF hyperparameters, and header-only GGUF files of them.

llama.cpp itself lists the tensors of a model with these hyperparameters, as in tests/support/random_models.py. This file adds
which optional ones the real model lacks, and the published number of parameters, which their sum must reproduce.

    python scripts/reports/catalogue.py FOLDER Q4_K             checks the sums, and writes all headers
    python scripts/reports/catalogue.py NAME OUT.gguf Q4_K      writes one of the models, with random weights
"""

from __future__ import annotations

import ctypes
import json
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

from gguf_firstlayer.c_api import library
from gguf_firstlayer.file_format import fitting

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
    """A model by its published shape: one object in shapes.json.

    Attributes:
        name: without the organisation
        arch: llama.cpp's name of the architecture
        keys: hyperparameters; the names are relative to "<arch>.". Where llama.cpp takes one number for all layers and the real
            model has one per layer (xIELU), any of them
        without: regular expression of the optional tensors that the model does not have; "" if it has them all
        parameters: their published number, of the language model if there are other parts; a float if it is rounded
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


_ENTRIES = json.loads(Path(__file__).with_name("shapes.json").read_text(encoding="utf-8"))
CATALOGUE: dict[str, Entry] = {entry["name"]: Entry(**entry) for entry in _ENTRIES}


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
