"""A model whose vocabulary is empty, and so are its tables."""

from pathlib import Path

import numpy as np
from gguf import GGUFValueType
from support.models import rewrite

EXPECTED = {"load": "a model without tokens"}


def forge(model: Path, output: Path) -> None:
    def change(name: str, data: np.ndarray) -> np.ndarray:
        return data[:0] if name.startswith(("firstlayer.", "token_embd", "output.")) else data

    keys = {"tokenizer.ggml.model": ("none", GGUFValueType.STRING), "llama.vocab_size": (0, GGUFValueType.UINT32)}
    rewrite(model, output, change_tensor=change, keys=keys)
