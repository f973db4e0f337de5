"""Figures that tests compare."""

from __future__ import annotations

import numpy as np


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def divergence(p: np.ndarray, q: np.ndarray) -> tuple[float, float, float]:
    """Mean and maximum KL divergence in nats, and top-1 agreement, of two sets of logits."""
    p, q = log_softmax(p), log_softmax(q)
    values = np.sum(np.exp(p) * (p - q), axis=1)
    return float(values.mean()), float(values.max()), float(np.mean(p.argmax(axis=1) == q.argmax(axis=1)))
