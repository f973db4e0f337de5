"""llama-server with the OpenAI client, as applications use it: converted models answer like their sources."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from support.models import convert
from support.servers import openai_client

QUESTIONS = ["Name three colours.", "What is the capital of France?", "Write a line about the sea.", "Why is the sky blue?"]
# the cached part of a prompt changes its batches, and so the last bits
ASK: dict[str, Any] = {"model": "any", "temperature": 0, "max_tokens": 24, "extra_body": {"cache_prompt": False}}


def chat(client: openai.OpenAI, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(messages=messages, **ASK).choices[0].message.content or ""


def stream(client: openai.OpenAI, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    parts = [part.choices[0] for part in client.chat.completions.create(messages=messages, stream=True, **ASK) if part.choices]
    assert len(parts) > 4
    return "".join(part.delta.content or "" for part in parts)


def answers(client: openai.OpenAI) -> list[str]:
    """Answers one at a time, and streamed; several clients at once get answers too."""
    alone = [chat(client, question) for question in QUESTIONS]
    alone += [stream(client, QUESTIONS[0]), client.completions.create(prompt="Once upon a time", **ASK).choices[0].text]
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        # how tokens of several clients are batched is up to chance
        assert all(pool.map(lambda question: chat(client.copy(), question), QUESTIONS))
    return alone


@pytest.mark.parametrize("how", ["converted", "sidecar"])
def test_same_answers(how, smollm, smollm_flp, tmp_path):
    model = [smollm_flp["f32"]]
    if how == "sidecar":
        model = [smollm, "--firstlayer", convert(smollm, tmp_path / "x_firstlayer.gguf", type="f32", sidecar=True).output]
    server = [sys.executable, "-m", "gguf_firstlayer", "run", "server", "-t", 1, "-c", 2048, "--no-webui"]
    with openai_client([*server, "-m", smollm]) as source, openai_client([*server, "-m", *model]) as converted:
        assert answers(converted) == answers(source)
