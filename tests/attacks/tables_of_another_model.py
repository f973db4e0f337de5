"""A sidecar with the tables of another model, and with all that tells whose they are from this one."""

from pathlib import Path

import numpy as np
from support.models import rewrite

MODEL = "sidecar"
EXPECTED = {"load": "the tables are not of this model", "verify": "not of this model"}


def forge(model: Path, output: Path) -> None:
    def change(name: str, data: np.ndarray) -> np.ndarray:
        return np.roll(data, 1, axis=0) if name.startswith("firstlayer.") else data

    rewrite(model, output, change_tensor=change)
