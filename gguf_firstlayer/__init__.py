"""llama.cpp without the work that need not be done: tables or a cache for the first layer (arXiv 2402.13388), and demand."""

import gguf_firstlayer.start  # noqa: F401 (first: it prepares the process for the other imports)
from gguf_firstlayer.bench import Bench, bench
from gguf_firstlayer.c_api import RowCache, row_cache, sidecar_overrides
from gguf_firstlayer.card import card
from gguf_firstlayer.convert import Conversion, convert
from gguf_firstlayer.errors import FirstLayerError, UsageError
from gguf_firstlayer.estimate import Plan
from gguf_firstlayer.inspect import Inspection, inspect
from gguf_firstlayer.paths import paths
from gguf_firstlayer.plan import Plans, plan, plan_all
from gguf_firstlayer.revert import Reversion, revert
from gguf_firstlayer.shape import Shape
from gguf_firstlayer.verify import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "Bench",
    "Conversion",
    "FirstLayerError",
    "Inspection",
    "Plan",
    "Plans",
    "Reversion",
    "RowCache",
    "Shape",
    "UsageError",
    "Verification",
    "bench",
    "card",
    "convert",
    "inspect",
    "paths",
    "plan",
    "plan_all",
    "revert",
    "row_cache",
    "sidecar_overrides",
    "verify",
]
