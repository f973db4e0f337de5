"""Ports of the loopback device."""

from __future__ import annotations

import socket


def free_port() -> int:
    """A port on the loopback device on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
