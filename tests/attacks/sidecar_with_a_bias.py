"""A sidecar that brings another tensor along, which llama.cpp would find and use."""

from pathlib import Path

import numpy as np
from support.models import rewrite

MODEL = "sidecar"
EXPECTED = {"load": "has a tensor that is no table"}


def forge(model: Path, output: Path) -> None:
    rewrite(model, output, more={"blk.1.attn_q.bias": np.full(256, 100, np.float32)})
