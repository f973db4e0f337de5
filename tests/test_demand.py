"""Demand: what nobody reads is not computed, and what is read equals the stock library's."""

from __future__ import annotations

import architectures
import numpy as np
import pytest
from support.builds import PATCHED, STOCK, both, run

NAMES = sorted(architectures.read())

# whose output changes from run to run
RANDOM = {"eagle3-dense"}
# llama.cpp aborts if it is asked for no output of theirs, or for their embeddings, or gives NaN
ALWAYS_OUTPUT, NO_EMBEDDINGS = {"chameleon-dense"}, {"deepseek4-moe", "qwen4exp-moe", "t5-dense"}
# decoders whose graphs select no rows
ALL_ROWS = {"cogvlm-dense", "dflash-dense", "dream-dense", "llada-dense", "llada-moe-moe", "rnd1-moe", "wavtokenizer-dec-dense"}

# which only embed
EMBEDDERS = {name for name in NAMES if "bert" in name or "embed" in name or "t5encoder" in name}

NONE, MEAN, CLS, LAST, RANK = range(5)

N_PROMPTS = 4


def text(count: int, seed: int) -> dict[str, int]:
    return {"count": count, "seed": seed}


def decode(*parts: list) -> list:
    return ["decode", *parts]


def with_one_output(alone: bool) -> list:
    """Prompts with an output for their last token, which is in a batch of its own if `alone`."""
    steps = []
    for seed in range(N_PROMPTS):
        prompt = np.random.default_rng(seed).integers(0, 128, 40).tolist()
        if alone:
            steps += [decode([[0], prompt[:-1], 1]), decode([[0], prompt[-1:], 1])]
        else:
            steps.append(decode([[0], prompt, 1]))
        steps.append(["rm", 0, -1, -1])
    return steps


def rms(a: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(a, dtype=np.float64))))


def close(ours: np.ndarray, stock: np.ndarray, other: np.ndarray) -> bool:
    """Whether our result differs from stock's by no more than stock's between batch sizes, or by F32 rounding."""
    return architectures.distance(ours, stock) <= max(2 * architectures.distance(other, stock), 1e-6 * rms(stock))


@pytest.mark.parametrize("name", sorted(set(NAMES) - RANDOM - EMBEDDERS))
def test_prompts(name, archs):
    """With outputs for some tokens, one, or none: logits as stock's, bit for bit in batches of several rows, and so is all memory.

    Fails if a row is another token's, if a row that others need is left out, or if an architecture that selects rows is not
    narrowed.
    """
    nothing = 2 if name in ALWAYS_OUTPUT else 0
    begin = [["encode", text(20, 9)]] if name == "t5-dense" else []
    several = [decode([[0], text(30, 12), nothing]), decode([[0], text(40, 13), 9]), decode([[0], text(40, 14), 20])]
    job = {"run": "session", "model": archs / f"{name}.gguf", "context": {"flash_attn_type": 0, "kv_unified": True}}
    ones = job | {"steps": [*begin, *with_one_output(alone=False), *several, ["state"], ["log"]]}
    (stock, alone), (ours,) = both(
        lambda side: run(*side),
        (STOCK, ones, job | {"steps": [*begin, *with_one_output(alone=True)]}),
        (PATCHED, ones | {"load": {"demand": "rows"}}),
    )
    *_, state, log = ours
    assert np.array_equal(stock[-2], state)
    for expected, found in zip(stock[N_PROMPTS:-2], ours[N_PROMPTS:-2], strict=True):
        assert np.array_equal(expected, found)
    assert close(np.concatenate(ours[:N_PROMPTS]), np.concatenate(stock[:N_PROMPTS]), np.concatenate(alone[1::2]))
    assert ("nobody reads" in log[0]) == (name not in ALL_ROWS)


@pytest.mark.parametrize("name", sorted(set(NAMES) - RANDOM - NO_EMBEDDINGS))
def test_embeddings(name, archs):
    """With every kind of pooling, and without logits.

    Fails if pooling takes a row that was not computed, or if logits are computed after all.
    """
    parts = [[[i], text(count, i)] for i, count in enumerate((40, 30, 25))]
    job = {"run": "session", "model": archs / f"{name}.gguf"}
    context = {"flash_attn_type": 0, "kv_unified": True, "n_seq_max": 4, "embeddings": True}
    jobs = [
        job | {"steps": steps, "context": context | {"pooling_type": pooling}}
        for pooling in (NONE, MEAN, CLS, LAST, RANK)
        for steps in ([decode(*parts), ["logits"]], [decode(part) for part in parts])
    ]
    stock, ours = both(
        lambda side: run(*side), (STOCK, *jobs), (PATCHED, *(job | {"load": {"demand": "embeddings"}} for job in jobs[::2]))
    )
    for pooling, (found, has_logits) in enumerate(ours):
        (expected, _), alone = stock[2 * pooling : 2 * pooling + 2]
        if pooling in (NONE, MEAN):
            assert np.array_equal(expected, found)
        else:
            assert close(found, expected, np.concatenate(alone))
        assert not has_logits.any()
