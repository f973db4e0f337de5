"""Demand: what is left out of a model's graphs since nobody reads it, and what that saves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gguf_firstlayer.c_api import library
from gguf_firstlayer.errors import FirstLayerError, UsageError, option
from gguf_firstlayer.source import Source

# what is read, as llama.cpp's option --demand takes it: rows of the last layers that outputs need; these, and no logits beside
# embeddings
ROWS, EMBEDDINGS = "rows", "embeddings"
HELP = "what is read, rows (for the last token's logits) or embeddings (no logits): the rest is not computed"

# enum llama_pooling_type, from 0
POOLINGS = ("none", "mean", "cls", "last", "rank")

# tokens of the prompt, or of the text to embed
N_TOKENS = 512


@dataclass(frozen=True)
class DemandPlan:
    """What computing only what is read would save of all products, attention included: ratios of multiply-adds.

    Attributes:
        prompt: for a prompt of 512 tokens, of which only the last one's logits are read; None for a model without logits
        embedding: for the embedding of such a text, without logits; None where llama.cpp cannot embed with the model
        pooling: of this embedding: the model's own, or "last"
    """

    prompt: float | None
    embedding: float | None
    pooling: str


def demand_plan(path: Path, source: Source) -> DemandPlan:
    """The plan for a model, of which only the metadata is needed."""
    pooling = own_pooling(source)
    return DemandPlan(_ratio(path, None), _ratio(path, pooling), pooling)


def saved(n_tokens: int, n_past: int, pooling: str | None, path: Path) -> float:
    """The highest possible speed-up of a text in a single batch.

    Args:
        n_tokens: its length
        n_past: tokens before it
        pooling: for an embedding; None for logits of the last token
        path: of the model

    Raises:
        FirstLayerError: llama.cpp cannot build such a graph.
    """
    products = library().count_products(path, n_tokens, n_past, pooling_number(pooling))
    return products.all / products.read


def _ratio(path: Path, pooling: str | None) -> float | None:
    try:
        return saved(N_TOKENS, 0, pooling, path)
    except FirstLayerError:
        return None


def own_pooling(source: Source) -> str:
    """The pooling that a model was made for, or "last"."""
    number = source.value(f"{source.architecture}.pooling_type")
    return POOLINGS[number] if isinstance(number, int) and 0 < number < len(POOLINGS) else "last"


def pooling_number(pooling: str | None) -> int:
    """The value of `enum llama_pooling_type`; that of LLAMA_POOLING_TYPE_UNSPECIFIED for None."""
    return -1 if pooling is None else POOLINGS.index(pooling)


def check_demand(demand: str | None, pooling: str | None) -> None:
    """Check arguments.

    Raises:
        UsageError: there is no such demand, or no such pooling, or they do not go together.
    """
    if demand not in (None, ROWS, EMBEDDINGS):
        raise UsageError(f"'{demand}' is not a kind of demand; give {ROWS} or {EMBEDDINGS}")
    if pooling is not None and demand != EMBEDDINGS:
        raise UsageError(f"{option('pooling')} needs {option('demand', EMBEDDINGS)}")
    if pooling not in (None, *POOLINGS):
        raise UsageError(f"'{pooling}' is not a type of pooling; give one of {', '.join(POOLINGS)}")
