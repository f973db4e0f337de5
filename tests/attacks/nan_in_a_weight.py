"""One weight of layer 0 that is not a number."""

from pathlib import Path

import numpy as np
from support.models import rewrite

MODEL = "source"
EXPECTED = {"load": "", "plan": "", "convert": "Kcur-0 is not finite"}


def forge(model: Path, output: Path) -> None:
    def spoil(name: str, data: np.ndarray) -> np.ndarray:
        data = data.copy()
        if name == "blk.0.attn_k.weight":
            data[3, 5] = np.nan
        return data

    rewrite(model, output, change_tensor=spoil)
