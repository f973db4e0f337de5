"""Comparison of next-token distributions."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.float32]


def log_softmax(logits: Rows) -> Rows:
    """Log-probabilities of logits, F32 [n, vocabulary]."""
    shifted: Rows = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def kl_divergence(p: Rows, q: Rows) -> npt.NDArray[np.float64]:
    """KL divergence of each row of q from p in nats; both are log-probabilities, F32 [n, vocabulary]."""
    divergence: npt.NDArray[np.float64] = np.einsum("ij,ij->i", np.exp(p), p - q, dtype=np.float64)
    return divergence
