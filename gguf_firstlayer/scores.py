"""Two models compared over a text: what `verify` reports of their output."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from gguf_firstlayer.decoder import Decoder
from gguf_firstlayer.divergence import kl_divergence, log_softmax
from gguf_firstlayer.errors import FirstLayerError
from gguf_firstlayer.text import progress

# batch size in which the source is compared with itself, which shows what any change in the last bits does: attention over
# so few tokens uses another kernel
OTHER_BATCH = 32

N_PROMPTS, PROMPT, GREEDY = 4, 24, 64

# prompts of all lengths, or texts to embed
N_TEXTS, SHORTEST = 64, 8

Floats = npt.NDArray[np.float64]


class Scores:
    """Figures of the tokens of a text, collected chunk by chunk, and of continuations."""

    def __init__(self) -> None:
        self._klds: list[Floats] = []
        self._floors: list[Floats] = []
        self._losses_source: list[Floats] = []
        self._losses: list[Floats] = []
        self._top: list[npt.NDArray[np.bool_]] = []
        self._same: list[npt.NDArray[np.bool_]] = []
        self._logit_max = self._logit_squares = 0.0
        self._logit_count = self._n_greedy = 0
        self._greedy: list[int | None] = []

    @property
    def klds(self) -> Floats:
        """KL divergence from the source, F64 [tokens]."""
        return np.concatenate(self._klds)

    @property
    def floors(self) -> Floats:
        """KL divergence of the source from itself with another batch size, F64 [tokens]."""
        return np.concatenate(self._floors)

    def run(self, one: Decoder, other: Decoder, ids: npt.NDArray[np.int32], begin: npt.NDArray[np.int32], chunk: int) -> None:
        """Compare a model with the source over a text."""
        firsts = range(0, len(ids) - chunk + 1, chunk)
        with progress("comparing", len(firsts) + N_PROMPTS, "text") as done:
            for first in firsts:
                part = ids[first : first + chunk].copy()
                part[: len(begin)] = begin
                self._add(_logits(one, part), _logits(one, part, OTHER_BATCH), _logits(other, part), part[chunk // 2 + 1 :])
                done.update()
            self._continue(one, other, ids, begin, chunk, done)

    def run_prompts(
        self, one: Decoder, other: Decoder, ids: npt.NDArray[np.int32], begin: npt.NDArray[np.int32], longest: int
    ) -> None:
        """Compare a model with the source by the logits after prompts, which each of them gets whole."""
        with progress("comparing", N_TEXTS + N_PROMPTS, "text") as done:
            for prompt, following in pieces(ids, begin, longest):
                for run in (one, other):
                    run.keep(0)
                source, converted, again = one.last(prompt), other.last(prompt), _last_alone(one, prompt)
                self._add(source[None], again[None], converted[None], np.array([following], np.int32))
                done.update()
            self._continue(one, other, ids, begin, longest, done)

    def _continue(
        self,
        one: Decoder,
        other: Decoder,
        ids: npt.NDArray[np.int32],
        begin: npt.NDArray[np.int32],
        chunk: int,
        done: tqdm[Any],
    ) -> None:
        """Compare continuations."""
        starts = [len(ids) * i // N_PROMPTS for i in range(N_PROMPTS)]
        n_prompt = min(PROMPT, chunk // 2)
        n = self._n_greedy = min(GREEDY, chunk - n_prompt)
        prompts = [np.concatenate([begin, ids[start + len(begin) : start + n_prompt]]) for start in starts]
        for prompt in prompts:
            self._greedy.append(_first_difference(_greedy(one, prompt, n), _greedy(other, prompt, n)))
            done.update()

    def _add(
        self,
        source: npt.NDArray[np.float32],
        again: npt.NDArray[np.float32],
        converted: npt.NDArray[np.float32],
        following: npt.NDArray[np.int32],
    ) -> None:
        """Add logits F32 [n, vocabulary] (source, source with another batch size, converted) and the tokens that follow."""
        difference = converted - source
        self._logit_max = max(self._logit_max, float(np.abs(difference).max()))
        self._logit_squares += float(np.square(difference, dtype=np.float64).sum())
        self._logit_count += difference.size
        p, q = log_softmax(source), log_softmax(converted)
        if not np.isfinite(p).all():
            raise FirstLayerError("the model cannot be measured: the source's output is not finite")
        self._klds.append(kl_divergence(p, q))
        self._floors.append(kl_divergence(p, log_softmax(again)))
        self._top.append(p.argmax(axis=1) == q.argmax(axis=1))
        self._same.append((source == converted).all(axis=1))
        index = np.arange(len(following))
        self._losses_source.append(-p[index, following].astype(np.float64))
        self._losses.append(-q[index, following].astype(np.float64))

    def figures(self) -> dict[str, Any]:
        """The figures of the output, by their names in `Verification`."""
        klds, before, after = self.klds, np.concatenate(self._losses_source), np.concatenate(self._losses)
        kld, kld_error = mean_and_error(klds)
        p_source, p = float(np.exp(before.mean())), float(np.exp(after.mean()))
        return dict(
            scored=len(klds),
            logit_max=self._logit_max,
            logit_rms=math.sqrt(self._logit_squares / self._logit_count),
            kld=kld,
            kld_error=kld_error,
            kld_median=float(np.median(klds)),
            kld_p99=float(np.percentile(klds, 99)),
            kld_max=float(klds.max()),
            kld_floor=float(self.floors.mean()),
            top1=float(np.concatenate(self._top).mean()),
            perplexity_source=p_source,
            perplexity=p,
            perplexity_change=p - p_source,
            perplexity_change_error=mean_and_error(p * after - p_source * before)[1],  # to first order
            greedy=tuple(self._greedy),
            greedy_tokens=self._n_greedy,
            logits_same=float(np.concatenate(self._same).mean()),
        )


class Vectors:
    """Embeddings of two models compared."""

    def __init__(self) -> None:
        self._cosines: list[float] = []
        self._largest = self._squares = 0.0
        self._count = 0

    @property
    def n(self) -> int:
        """Number of texts."""
        return len(self._cosines)

    @property
    def cosine_min(self) -> float:
        """The lowest cosine similarity; NaN if one is."""
        return float(np.min(self._cosines))

    @property
    def largest(self) -> float:
        """The largest difference of a value, as a share of the RMS of all values."""
        return self._largest / math.sqrt(self._squares / self._count)

    def run(self, one: Decoder, other: Decoder, ids: npt.NDArray[np.int32], begin: npt.NDArray[np.int32], longest: int) -> None:
        """Embed texts with both."""
        with progress("comparing", N_TEXTS, "text") as done:
            for piece, _ in pieces(ids, begin, longest):
                a, b = one.last(piece).astype(np.float64), other.last(piece).astype(np.float64)
                if not (np.isfinite(a).all() and a.any()):
                    raise FirstLayerError("the model cannot be measured: the source's output is not finite, or zero")
                self._cosines.append(float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))))
                self._largest = max(self._largest, float(np.abs(a - b).max()))
                self._squares += float(a @ a)
                self._count += len(a)
                done.update()

    def figures(self) -> dict[str, Any]:
        """The figures, by their names in `Verification`."""
        return dict(
            cosine=float(np.mean(self._cosines)),
            cosine_min=self.cosine_min,
            embedding_max=self.largest,
        )


def pieces(
    ids: npt.NDArray[np.int32], begin: npt.NDArray[np.int32], longest: int
) -> Iterator[tuple[npt.NDArray[np.int32], int]]:
    """Pieces of a text that begin as the model wants it, of lengths from a few tokens to the longest, and what follows each."""
    shortest = min(len(begin) + SHORTEST, longest)
    for i in range(N_TEXTS):
        n = shortest + (longest - shortest) * i // (N_TEXTS - 1)
        first = (len(ids) - longest - 1) * i // (N_TEXTS - 1)
        piece = ids[first : first + n].copy()
        piece[: len(begin)] = begin
        yield piece, int(ids[first + n])


def _last_alone(run: Decoder, prompt: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """Logits after a prompt whose last token is decoded by itself, F32 [vocabulary]."""
    run.keep(0)
    run.last(prompt[:-1])
    return run.last(prompt[-1:])


def _logits(run: Decoder, tokens: npt.NDArray[np.int32], n_batch: int | None = None) -> npt.NDArray[np.float32]:
    """Logits of the scored tokens of a text, F32 [n, vocabulary]."""
    run.keep(0)
    first, done, parts = len(tokens) // 2, 0, []
    for logits in run.decode(tokens, n_batch):
        parts.append(logits[max(0, first - done) :].copy())
        done += len(logits)
    return np.concatenate(parts)[:-1]


def _greedy(run: Decoder, prompt: npt.NDArray[np.int32], n: int) -> list[int]:
    """The most probable continuation of a prompt."""
    run.keep(0)
    out: list[int] = []
    tokens = prompt
    while len(out) < n:
        out.append(int(run.last(tokens).argmax()))
        tokens = np.array(out[-1:], np.int32)
    return out


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)


def mean_and_error(values: Floats) -> tuple[float, float]:
    """The mean, and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))
