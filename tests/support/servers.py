"""Servers that speak OpenAI's API."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai

from support.builds import ROOT


def free_port() -> int:
    """A port on the loopback device that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def openai_client(command: list[object], environment: dict[str, str] | None = None) -> Iterator[openai.OpenAI]:
    """A client of a server, which gets the option --port and ends with the context."""
    port = free_port()
    arguments = [*map(str, command), "--port", str(port)]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(arguments, cwd=ROOT, env=os.environ | (environment or {}), **quiet) as process:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        try:
            deadline = time.monotonic() + 120
            while True:
                assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
                assert time.monotonic() < deadline
                try:
                    client.models.list()
                    break
                except (openai.APIConnectionError, openai.InternalServerError):  # not listening yet, or loading
                    time.sleep(0.1)
            yield client
        finally:
            process.kill()
