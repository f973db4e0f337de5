"""`verify`: whether a converted file belongs to a model, and what its tables, a row cache or demand do to its output."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from gguf_firstlayer import auto, file_format
from gguf_firstlayer.auto import sample_tokens
from gguf_firstlayer.c_api import RowCache
from gguf_firstlayer.decoder import TEXT_BYTES, Decoder, held
from gguf_firstlayer.demand import EMBEDDINGS, HELP, POOLINGS, ROWS, check_demand, own_pooling, saved
from gguf_firstlayer.errors import FirstLayerError, UsageError, option
from gguf_firstlayer.hub import ModelName, local, model_name
from gguf_firstlayer.isolation import isolated
from gguf_firstlayer.pair import (
    NO_CACHE,
    Files,
    cache_size,
    context_length,
    open_cached,
    open_pair,
    open_source,
    parse_cache,
    try_out,
)
from gguf_firstlayer.recompute import added, changed, check_rows, foreign
from gguf_firstlayer.runtime import IsolatedAnalysis, analyse
from gguf_firstlayer.scores import N_PROMPTS, Scores, Vectors, mean_and_error
from gguf_firstlayer.source import Source
from gguf_firstlayer.text import count, log, show

FAILURE = 2

N_TOKENS = 4096
# characters of a text that give as many tokens as wanted, or else all of it is taken
TOKEN_LENGTH = 64
# tokens of a chunk of the text; its second half is scored, as in llama-perplexity
CHUNK, LEAST_CHUNK = 512, 8

# nats that tables may add to the mean KL divergence, if the caller does not say, nor the file something stricter
MAX_KLD = 1e-2
# nats by which the output may differ in all, even by chance
MAX_EXCESS = 1e-2
# standard errors by which a run may differ more than its tables explain
CHANCE = 3

# of the embeddings of a text: a single row may be computed by another kernel, which rounds otherwise. Where they have few
# values, like scores, a cosine says nothing
MIN_COSINE, MAX_DIFFERENCE = 1 - 1e-3, 0.5

# rows of a cache that the distinct tokens of a chunk just fit in, so that each chunk evicts the rows of the one before
EVICTING = 300


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        source, converted: files
        problems: what is out of bounds, one sentence each; empty if nothing is
        rows_checked: number of rows of the tables that were recomputed from the source
        rows_same: share of them that are identical bit for bit
        sample: whether the text is the built-in sample
        tokens: length of the text
        scored: number of tokens whose distributions the figures below describe
        logit_max, logit_rms: largest and RMS difference of logits
        kld, kld_error: mean KL divergence in nats, and its standard error
        kld_median, kld_p99, kld_max: median, 99th percentile and maximum of the KL divergence
        kld_floor: mean KL divergence of the source from itself with another batch size
        kld_added, kld_added_error: the tables' part of the KL divergence, and its standard error, over the first tokens of the
            text, measured as in `convert`: with the errors of the tables enlarged, which separates them from noise
        kld_bound: bound on the sum of these two
        top1: share of the tokens whose most probable successor is the same
        perplexity_source, perplexity: of the text, for the source and for the converted model
        perplexity_change, perplexity_change_error: their difference, and its standard error
        greedy: for each of several prompts, how many tokens of the continuation are the same before the first that differs;
            None if none does
        greedy_tokens: length of each continuation
        logits_same: share of the tokens scored whose logits are the same bit for bit
        caches: of the source with a row cache instead of a converted file: the cache, and one so small that each chunk of the
            text evicts the rows of the one before, after the text has passed through each; both are scored
        demand: as given
        pooling: of the embeddings that were compared instead of logits; "" if they were not
        cosine, cosine_min: mean and lowest cosine similarity of these
        embedding_max: largest difference of a value, as a share of the RMS of all values
    """

    source: Path
    converted: Path
    problems: list[str]
    rows_checked: int = 0
    rows_same: float = math.nan
    sample: bool = False
    tokens: int = 0
    scored: int = 0
    logit_max: float = math.nan
    logit_rms: float = math.nan
    kld: float = math.nan
    kld_error: float = math.nan
    kld_median: float = math.nan
    kld_p99: float = math.nan
    kld_max: float = math.nan
    kld_floor: float = math.nan
    kld_added: float = math.nan
    kld_added_error: float = math.nan
    kld_bound: float = math.nan
    top1: float = math.nan
    perplexity_source: float = math.nan
    perplexity: float = math.nan
    perplexity_change: float = math.nan
    perplexity_change_error: float = math.nan
    greedy: tuple[int | None, ...] = ()
    greedy_tokens: int = 0
    logits_same: float = math.nan
    caches: tuple[RowCache, ...] = ()
    demand: str | None = None
    pooling: str = ""
    cosine: float = math.nan
    cosine_min: float = math.nan
    embedding_max: float = math.nan


def verify(
    source: ModelName,
    converted: ModelName | None = None,
    *,
    cache: float | str | None = None,
    demand: str | None = None,
    pooling: str | None = None,
    text: str | None = None,
    tokens: int | None = None,
    max_kld: float | None = None,
    all_rows: bool = False,
) -> Verification:
    """Compare a converted file with the model it was made from, or a model with a row cache, or demand, with itself without.

    Args:
        source: GGUF file, or what `hub.local` takes; of a split model, the first part
        converted: likewise; or a sidecar, which is run with the source
        cache: instead of a converted file: MiB for a row cache of the source, or "auto"
        demand: instead: what is read, "rows" or "embeddings": the rest is left out. With "rows", prompts of the text are scored
            by the logits of their last tokens; with "embeddings", texts are embedded
        pooling: of these embeddings, one of `demand.POOLINGS`; by default the model's own, or "last"
        text: the text to run both models over; a built-in sample by default
        tokens: how many tokens of the text to use at most; N_TOKENS by default
        max_kld: nats that tables may add to the mean KL divergence; by default MAX_KLD, or what the file states if that is less
        all_rows: recompute all rows of the tables, not only some at random

    Raises:
        UsageError: the number of tokens, or of nats, is not positive.
        FirstLayerError: a file cannot be read or run, or is of the wrong kind; or the text is too short.
    """
    if tokens is not None and tokens < 1:
        raise UsageError(f"{tokens} is not a valid number of tokens; give at least 1")
    if max_kld is not None and not 0 < max_kld < math.inf:
        raise UsageError(f"{max_kld} is not a bound on the KL divergence; give a number of nats like 1e-4")
    check_demand(demand, pooling)
    if sum(choice is not None for choice in (converted, cache, demand)) != 1:
        raise UsageError(f"give either a converted file, or {option('cache')}, or {option('demand')}")
    if converted is None and (all_rows or max_kld is not None):
        raise UsageError("recomputing all rows, and a bound on what they add, are for converted files; leave it out")
    if demand is not None:
        return _verify_demand(local(source), demand, pooling, text, tokens)
    if converted is None:
        return _verify_cache(local(source), parse_cache(str(cache)), text, tokens)
    path = local(source)
    pooling = own_pooling(Source(path)) if isolated(_gives_no_logits, path) else None
    if pooling and max_kld is not None:
        raise UsageError(f"{path} gives no logits, so there is no KL divergence; leave out {option('max_kld')}")
    model, tables, files = open_pair(path, local(converted), pooling)
    sites, _, _ = file_format.read(tables)
    with analyse(model.path) as analysis:
        by_recipe = {site.recipe: site for site in analysis.sites}
        problems = foreign(model, sites, by_recipe)
        if problems:
            return Verification(model.path, tables.path, problems)
        ids, begin = _text_tokens(analysis, text, tokens)
        n_rows, same, problems = check_rows(analysis, tables, all_rows)
        problems += [] if file_format.is_sidecar(tables) else changed(model, tables)
        found = Verification(
            model.path, tables.path, problems, rows_checked=n_rows, rows_same=same, sample=text is None, tokens=len(ids)
        )
        if pooling:
            return _verify_embeddings(replace(found, pooling=pooling), files, ids, begin, _chunk(model, analysis, ids))
        kld_of_tables = added(model.path, analysis, tables, ids[: auto.N_TOKENS])

    measurement = file_format.read_measurement(tables)
    stated = measurement.max_kld if measurement and measurement.max_kld > 0 else MAX_KLD
    bound = max_kld or min(stated, MAX_KLD)
    chunk = _chunk(model, analysis, ids)
    with Files((model,)).open(chunk, chunk) as one, files.open(chunk, chunk) as other:
        scores = Scores()
        scores.run(one, other, ids, begin, chunk)

    excess, excess_error = mean_and_error(scores.klds - scores.floors)
    kld_added, kld_added_error = (excess, excess_error) if kld_of_tables is None else kld_of_tables
    if not math.isfinite(excess + kld_added):
        problems.append("the output of the converted model is not finite")
    elif kld_added + kld_added_error > bound:
        problems.append("the tables add more to the KL divergence than their bound: convert with wider types")
    elif excess - CHANCE * excess_error > bound:
        problems.append(
            f"the output differs by {excess:.1e} ± {excess_error:.1e} nats more than the tables explain: please report this"
        )
    elif excess > max(bound, MAX_EXCESS):
        problems.append(
            f"the output differs by {excess:.1e} ± {excess_error:.1e} nats: give a longer text, to tell whether by chance"
        )
    return replace(found, kld_added=kld_added, kld_added_error=kld_added_error, kld_bound=bound, **scores.figures())


def _verify_embeddings(
    found: Verification,
    files: Files,
    ids: npt.NDArray[np.int32],
    begin: npt.NDArray[np.int32],
    longest: int,
) -> Verification:
    """Compare what a model without logits gives instead."""
    vectors, source = Vectors(), Files((Source(found.source),), pooling=found.pooling)
    with source.open(longest, longest) as one, files.open(longest, longest) as other:
        vectors.run(one, other, ids, begin, longest)
    if not vectors.cosine_min >= MIN_COSINE:
        found.problems.append(f"an embedding has a cosine similarity of {vectors.cosine_min:.6f}: convert with wider types")
    if not vectors.largest <= MAX_DIFFERENCE:
        found.problems.append(f"a value differs by {vectors.largest:.1e} of the RMS of all values: convert with wider types")
    return replace(found, scored=vectors.n, **vectors.figures())


def _chunk(model: Source, analysis: IsolatedAnalysis, ids: npt.NDArray[np.int32]) -> int:
    """Tokens that are decoded together."""
    chunk = min(CHUNK, len(ids) // 2, context_length(model), held(TEXT_BYTES, analysis.n_vocab))
    if chunk < LEAST_CHUNK:
        raise FirstLayerError(f"{model.path} takes at most {chunk} at once, too few to measure")
    return chunk


def _verify_cache(source: Path, cache: float, text: str | None, tokens: int | None) -> Verification:
    model, files = open_cached(source, cache)
    with analyse(model.path) as analysis:
        ids, begin = _text_tokens(analysis, text, tokens)
    chunk = _chunk(model, analysis, ids)
    scores, caches, problems = Scores(), list[RowCache](), list[str]()
    with Files((model,)).open(chunk, chunk) as one:
        while len(caches) < 2:
            with files.open(chunk, chunk) as other:
                if other.row_cache() is None:
                    raise FirstLayerError(NO_CACHE.format(source))
                scores.run(one, other, ids, begin, chunk)
                used = cast(RowCache, other.row_cache())
            caches.append(used)
            files = files._replace(cache=EVICTING / used.rows * used.bytes / 2**20)
    problems += _excess(scores)
    return Verification(
        model.path,
        model.path,
        problems,
        sample=text is None,
        tokens=len(ids),
        caches=tuple(caches),
        **scores.figures(),
    )


def _verify_demand(path: Path, demand: str, pooling: str | None, text: str | None, tokens: int | None) -> Verification:
    model, problems = open_source(path), list[str]()
    with analyse(model.path) as analysis:
        ids, begin = _text_tokens(analysis, text, tokens)
    if demand == ROWS and isolated(_gives_no_logits, model.path):
        isolated(partial(saved, 2, 0, own_pooling(model)), model.path)  # some give no embeddings either
        raise FirstLayerError(f"{path} gives no logits; use {option('demand', EMBEDDINGS)}")
    longest = _chunk(model, analysis, ids)
    found = Verification(model.path, model.path, problems, sample=text is None, tokens=len(ids), demand=demand)
    if demand == EMBEDDINGS:
        pooling = pooling or own_pooling(model)
    plain = Files((model,), pooling=pooling)
    try_out(plain)
    scores, vectors = Scores(), Vectors()
    with plain.open(longest, longest) as one, plain._replace(demand=demand).open(longest, longest) as other:
        if pooling:
            vectors.run(one, other, ids, begin, longest)
        else:
            scores.run_prompts(one, other, ids, begin, longest)
        _check_left_out(other)
    if not pooling:
        problems += _excess(scores)
        return replace(found, **scores.figures())
    if not vectors.cosine_min >= MIN_COSINE:
        problems.append(f"an embedding has a cosine similarity of {vectors.cosine_min:.6f}: please report this")
    if not vectors.largest <= MAX_DIFFERENCE:
        problems.append(f"a value differs by {vectors.largest:.1e} of the RMS of all values: please report this")
    return replace(found, pooling=pooling, scored=vectors.n, **vectors.figures())


def _gives_no_logits(path: Path) -> bool:
    try:
        saved(2, 0, None, path)
    except FirstLayerError:
        return True
    return False


def _check_left_out(run: Decoder) -> None:
    if not run.left_out:
        raise FirstLayerError(
            f"nothing was left out of this model's graphs, so there is nothing to verify: see what plan says of demand, or give"
            f" a longer text with {option('text')}"
        )


def _excess(scores: Scores) -> list[str]:
    """The problem that two models differ by more than batch sizes make a difference, if they do."""
    excess, error = mean_and_error(scores.klds - scores.floors)
    if math.isfinite(excess) and excess <= min(CHANCE * error, MAX_EXCESS):
        return []
    return [f"the output differs by {excess:.1e} ± {error:.1e} nats more than between batch sizes: please report this"]


def _text_tokens(
    analysis: IsolatedAnalysis, text: str | None, tokens: int | None
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Tokens of a text, and the one that begins it, if the model wants such a token."""
    wanted = tokens or N_TOKENS
    ids = sample_tokens(analysis) if text is None else analysis.tokenize(text[: TOKEN_LENGTH * wanted])
    if text and len(ids) <= wanted and len(text) > TOKEN_LENGTH * wanted:
        ids = analysis.tokenize(text)
    if not len(ids) and text:
        raise FirstLayerError(f"the model has no tokenizer; leave out {option('text')} to use random tokens")
    ids = ids[:wanted]
    if len(ids) < 4 * N_PROMPTS:
        raise FirstLayerError(f"too few tokens to measure: {len(ids):,}, and {4 * N_PROMPTS} are needed; give more text")
    if tokens is not None and len(ids) < tokens:
        log.warning(
            "the text has %s, not %s: give a longer one with %s", count(len(ids), "token"), f"{tokens:,}", option("text")
        )
    return ids, analysis.tokenize("")[:1]


def summary(result: Verification) -> list[str]:
    """The result as lines of readable text."""
    verdict = [*result.problems, "outside of bounds" if result.problems else "within bounds"]
    if not result.scored:
        return result.problems
    rows = (
        "the tables were computed from this source's weights;"
        f" of {result.rows_checked} rows recomputed, {result.rows_same:.0%} are the same bit for bit"
    )
    if result.pooling:
        return [
            *([rows] if result.rows_checked else []),
            f"{result.scored} texts embedded with pooling {result.pooling}",
            f"cosine similarity: mean {result.cosine:.8f}, lowest {result.cosine_min:.8f}",
            f"largest difference of a value: {result.embedding_max:.1e} of the RMS of all values",
            *verdict,
        ]
    differs = ["none" if n is None else str(n + 1) for n in result.greedy]
    if result.caches:
        origin = [
            f"row cache of {cache.max_rows:,} rows: {cache.misses:,} computed, {cache.misses - cache.rows:,} replaced others"
            for cache in result.caches
        ]
    elif result.source == result.converted:
        origin = ["prompts, of which the last token's logits are read"]
    else:
        origin = [rows]
    lines = [
        *origin,
        f"{result.scored // max(1, len(result.caches))} {'prompts' if result.demand else 'tokens'} scored"
        f"{' with each' if result.caches else ''}, of {result.tokens}"
        f"{' tokens' if result.demand else ''} of {'the built-in sample' if result.sample else 'the text'}",
        f"logits: the same bit for bit for {result.logits_same:.2%} of them; max difference {result.logit_max:.3g},"
        f" RMS {result.logit_rms:.3g}",
        f"KL divergence: mean {result.kld:.2e} ± {result.kld_error:.1e} nats, median {result.kld_median:.1e},"
        f" 99 % {result.kld_p99:.1e}, max {result.kld_max:.1e}",
        f"    the source differs from itself by {result.kld_floor:.2e} when the batch size changes",
        *(
            []
            if result.source == result.converted
            else [
                f"    the tables' part is {result.kld_added:.1e} ± {result.kld_added_error:.1e} nats"
                f" (bound on the sum {result.kld_bound:g})"
            ]
        ),
        f"most probable token the same: {result.top1:.2%}",
        f"perplexity: {result.perplexity_source:.4f} -> {result.perplexity:.4f}"
        f" (difference {result.perplexity_change:+.4f} ± {result.perplexity_change_error:.4f})",
        f"first of {result.greedy_tokens} greedy tokens that differs for each of {len(differs)} prompts: {', '.join(differs)}",
        *verdict,
    ]
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `verify`."""
    parser.add_argument("source", type=model_name, metavar="SOURCE.gguf")
    parser.add_argument("converted", type=model_name, nargs="?", metavar="CONVERTED.gguf")
    parser.add_argument(
        "--cache", type=cache_size, nargs="?", const="auto", metavar="MIB", help="instead, a row cache of the source"
    )
    parser.add_argument("--demand", metavar="WHAT", help=f"instead, {HELP}")
    parser.add_argument("--pooling", metavar="TYPE", help=f"of the embeddings: {', '.join(POOLINGS)}")
    parser.add_argument("--text", type=Path, metavar="FILE", help="text to run both models over (default: a built-in sample)")
    parser.add_argument("--tokens", type=int, metavar="N", help=f"use at most N tokens of the text (default: {N_TOKENS})")
    parser.add_argument(
        "--max-kld", type=float, metavar="NATS", help=f"KL divergence that tables may add (default: {MAX_KLD:g}, or the file's)"
    )
    parser.add_argument("--all", action="store_true", help="recompute all rows of the tables, not only some at random")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    """Run `verify` from the command line. Returns 0 within bounds, 1 outside."""
    text = None
    if args.text is not None:
        try:
            text = cast(str, args.text.read_text(encoding="utf-8"))
        except UnicodeDecodeError as err:
            raise FirstLayerError(f"{args.text} is not a text in UTF-8; give another with {option('text')}") from err
        except OSError as err:
            raise FirstLayerError(f"{args.text} cannot be read: {err.strerror}") from err
    result = verify(
        args.source,
        args.converted,
        cache=args.cache,
        demand=args.demand,
        pooling=args.pooling,
        text=text,
        tokens=args.tokens,
        max_kld=args.max_kld,
        all_rows=args.all,
    )
    show(result, args.json, summary)
    return 1 if result.problems else 0
