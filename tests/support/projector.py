"""A vision tower and projector of random weights, for `--mmproj`, and a picture."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from support.builds import ROOT

WIDTH, FFN, HEADS = 64, 128, 2
LAYERS = 4  # the script maps "mlp1.3" as if 3 were one
IMAGE, PATCH, MERGE = 64, 16, 2


def write_projector(folder: Path, n_embd: int) -> Path:
    """A tiny InternVL, which needs no special tokens, for a text model of this width; converted by llama.cpp's own script."""
    model = folder / "model"
    model.mkdir()
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "image_size": IMAGE,
        "patch_size": PATCH,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
    }
    config = {
        "architectures": ["InternVisionModel"],
        "downsample_ratio": 1 / MERGE,
        "max_dynamic_patch": 1,
        "min_dynamic_patch": 1,
        "vision_config": vision,
        "text_config": {"hidden_size": n_embd},
    }
    (model / "config.json").write_text(json.dumps(config))
    (model / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))

    shapes: dict[str, tuple[int, ...]] = {
        "vision_model.embeddings.class_embedding": (1, 1, WIDTH),
        "vision_model.embeddings.position_embedding": (1, (IMAGE // PATCH) ** 2 + 1, WIDTH),
        "vision_model.embeddings.patch_embedding.weight": (WIDTH, 3, PATCH, PATCH),
        "vision_model.embeddings.patch_embedding.bias": (WIDTH,),
        "mlp1.0.weight": (WIDTH * MERGE**2,),
        "mlp1.0.bias": (WIDTH * MERGE**2,),
    }

    def add_linear(name: str, rows: int, columns: int) -> None:
        shapes.update({f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)})

    add_linear("mlp1.1", n_embd, WIDTH * MERGE**2)
    add_linear("mlp1.3", n_embd, n_embd)
    for i in range(LAYERS):
        layer = f"vision_model.encoder.layers.{i}"
        add_linear(f"{layer}.attn.qkv", 3 * WIDTH, WIDTH)
        add_linear(f"{layer}.attn.proj", WIDTH, WIDTH)
        add_linear(f"{layer}.mlp.fc1", FFN, WIDTH)
        add_linear(f"{layer}.mlp.fc2", WIDTH, FFN)
        vectors = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1", "ls2")
        shapes.update({f"{layer}.{name}": (WIDTH,) for name in vectors})

    random = np.random.default_rng(1)
    tensors = {name: random.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, model / "model.safetensors")
    projector = folder / "mmproj.gguf"
    script = ROOT / "build" / "llama.cpp" / "convert_hf_to_gguf.py"
    subprocess.run([sys.executable, script, model, "--mmproj", "--outfile", projector], check=True, capture_output=True)
    return projector


def picture(seed: int) -> str:
    """A random picture, as a data URL."""
    pixels = np.random.default_rng(seed).integers(0, 255, (48, 80, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
