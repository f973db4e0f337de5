"""A model with which llama.cpp aborts when it computes."""

from pathlib import Path

from support.models import rewrite

MODEL = "source"
ABORTS = "GGML_ASSERT(eps >= 0.0f)"
EXPECTED = {"convert": "llama.cpp cannot run this model"}


def forge(model: Path, output: Path) -> None:
    key = "llama.attention.layer_norm_rms_epsilon"
    rewrite(model, output, change_key=lambda name, value: -1.0 if name == key else value)
