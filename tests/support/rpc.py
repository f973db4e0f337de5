"""RPC servers on the loopback device, and a proxy that counts what a client sends to one."""

from __future__ import annotations

import socket
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from support.builds import PATCHED
from support.ports import free_port

# of ggml-rpc.cpp: a request is its command, its size and its data; that of SET_TENSOR is a struct, an offset and the values
SET_TENSOR = 6
HEADER = struct.Struct("<BQ")
NAME, VALUES = slice(228, 292), 305


@contextmanager
def rpc_server() -> Iterator[str]:
    """Address of an RPC server."""
    port = free_port()
    command = [PATCHED / "ggml-rpc-server", "-p", str(port), "-t", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(300):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            yield f"127.0.0.1:{port}"
        finally:
            process.kill()


@contextmanager
def counting_proxy(address: str) -> Iterator[tuple[str, Counter[str]]]:
    """Address of a proxy of an RPC server, and the bytes that graphs got as inputs through it, by the name of the tensor."""
    host, port = address.split(":")
    counted: Counter[str] = Counter()

    def read(client: socket.socket, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = client.recv(size - len(data))
            if not part:
                raise ConnectionError
            data += part
        return bytes(data)

    def requests(client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while True:
                header = read(client, HEADER.size)
                command, size = HEADER.unpack(header)
                data = read(client, size)
                if command == SET_TENSOR:
                    name = data[NAME].split(b"\0")[0].decode()
                    if name.count("#") == 2:  # what the scheduler calls copies for a device: DEVICE#NAME#NUMBER
                        counted[name.split("#")[1]] += size - VALUES
                server.sendall(header + data)
        server.shutdown(socket.SHUT_RDWR)  # a server has one client at a time

    def responses(client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(1 << 16):
                client.sendall(data)

    def accept() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection((host, int(port)))
                for side in (client, server):
                    side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for work in (requests, responses):
                    threading.Thread(target=work, args=(client, server), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}", counted
