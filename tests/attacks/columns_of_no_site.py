"""A table with columns that no site has, all of which a lookup would turn into numbers."""

from pathlib import Path

import numpy as np
from support.models import rewrite

EXPECTED = {"load": "columns that belong to no site"}


def forge(model: Path, output: Path) -> None:
    def change(name: str, data: np.ndarray) -> np.ndarray:
        return np.pad(data, ((0, 0), (0, 1 << 16))) if name.startswith("firstlayer.") else data

    rewrite(model, output, change_tensor=change)
