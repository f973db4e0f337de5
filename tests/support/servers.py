"""Servers that speak OpenAI's API."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import openai

from support.builds import ROOT


def free_port() -> int:
    """A port on the loopback device on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(
    command: list[object], is_up: Callable[[], object], not_yet: tuple[type[Exception], ...], **options: Any
) -> Iterator[None]:
    """Run a server during the context, which begins once the server answers.

    Args:
        is_up: sends it a request
        not_yet: what that raises while the server does not listen yet, or loads its model
    """
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([*map(str, command)], **quiet, **options) as process:
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
            yield
        finally:
            process.kill()


@contextmanager
def openai_client(command: list[object], environment: dict[str, str] | None = None) -> Iterator[openai.OpenAI]:
    """A client of a server, which gets the option --port and ends with the context."""
    port = free_port()
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    not_yet = (openai.APIConnectionError, openai.InternalServerError)
    with serving([*command, "--port", port], client.models.list, not_yet, cwd=ROOT, env=os.environ | (environment or {})):
        yield client
