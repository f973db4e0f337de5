"""llama-server and other servers, and clients of them."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from support.builds import PATCHED, ROOT
from support.command_line import load_options, missing
from support.ports import free_port


@contextmanager
def serving(
    command: list[object], is_up: Callable[[], object], not_yet: tuple[type[Exception], ...], **options: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server during the context, which begins once the server answers. Yields its process.

    Args:
        is_up: sends it a request
        not_yet: what that raises while the server does not listen yet, or loads its model
    """
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([*map(str, command)], **(quiet | options)) as process:
        try:
            deadline = time.monotonic() + 120
            while True:
                assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
                assert time.monotonic() < deadline
                try:
                    is_up()
                    break
                except not_yet:
                    time.sleep(0.05)
            yield process
        finally:
            process.kill()


@contextmanager
def openai_client(command: list[object], environment: dict[str, str] | None = None) -> Iterator[Any]:
    """A client of a server, which gets the option --port and ends with the context."""
    import openai  # which not every platform has

    port = free_port()
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    not_yet = (openai.APIConnectionError, openai.InternalServerError)
    with serving([*command, "--port", port], client.models.list, not_yet, cwd=ROOT, env=os.environ | (environment or {})):
        yield client


Post = Callable[..., Any]


def whole(log: TextIO) -> str:
    log.seek(0)
    return log.read()


@contextmanager
def server(model: Path | str, *options: object, log_path: Path | None = None) -> Iterator[Post]:
    """A function that sends requests to a server: the body is sent as JSON, the answer returned likewise.

    After the requests, the server's log must say that it used what its model has on request.

    Args:
        model: a file, or a name on the Hub
        log_path: where its log stays
    """
    port = free_port()
    named = "-m" if isinstance(model, Path) else "-hf"
    command = [PATCHED / "llama-server", named, model, "--port", port, "-t", 1, "--no-webui", *options]
    command += load_options([model, *options])

    def post(path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as err:
            raise AssertionError(err.read().decode()) from err
        return json.loads(text) if text.startswith(("{", "[")) else text

    with (
        log_path.open("a+", errors="replace") if log_path else tempfile.TemporaryFile("a+", errors="replace") as log
    ):  # both share one position
        with serving(command, lambda: post("/health"), (AssertionError, OSError), stdout=log, stderr=log):
            yield post
            deadline = time.monotonic() + 10  # it is written by a thread of its own
            while (lacks := missing(whole(log), [model, *options])) and time.monotonic() < deadline:
                time.sleep(0.05)
        assert not lacks, whole(log)[-2000:]


def essence(answer: Any) -> Any:
    """An answer without names and times."""
    if isinstance(answer, list):
        return [essence(part) for part in answer]
    if not isinstance(answer, dict):
        return answer
    volatile = {"generation_settings", "model", "created", "id", "filename", "usage", "system_fingerprint"}
    return {
        key: essence(value) for key, value in answer.items() if key not in volatile and not key.endswith(("_ms", "_per_second"))
    }


Requests = list[tuple[str, Any]]


def serve(model: Path, requests: Requests, *options: object) -> list[Any]:
    """Answers to requests, sent one after the other to a new server."""
    with server(model, *options) as post:
        return [essence(post(path, body)) for path, body in requests]


def prompt(text: str | list[str], n_predict: int = 16, **options: Any) -> tuple[str, Any]:
    """A request for a greedy completion."""
    body = {"prompt": text, "n_predict": n_predict, "temperature": 0, "seed": 1, "n_probs": 3}
    return "/completion", body | options
