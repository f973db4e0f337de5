"""Tables of another model, with the fingerprints of this one, and a file that allows itself any error."""

from pathlib import Path

import numpy as np
from gguf import GGUFValueType
from support.models import rewrite

EXPECTED = {"load": "", "inspect": "", "verify": "differ"}


def forge(model: Path, output: Path) -> None:
    def change(name: str, data: np.ndarray) -> np.ndarray:
        return np.roll(data, 1, axis=0) if name.startswith("firstlayer.") else data

    figures = "max_kld kld kld_floor kld_tables kld_tables_error top1 perplexity_source perplexity"
    keys = {f"firstlayer.measured.{key}": (1e9, GGUFValueType.FLOAT32) for key in figures.split()}
    keys["firstlayer.measured.tokens"] = (4096, GGUFValueType.UINT32)
    rewrite(model, output, change_tensor=change, keys=keys)
