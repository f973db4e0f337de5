"""A repository on the loopback device, as llama.cpp's -hf asks for it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "1" * 40


@contextmanager
def hub(files: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Address of a server with these files in every repository, and the names of those that were downloaded."""
    downloaded: list[str] = []
    listing = [
        {"type": "file", "path": name, "lfs": {"oid": hashlib.sha256(path.read_bytes()).hexdigest()}}
        for name, path in files.items()
    ]

    class Handler(BaseHTTPRequestHandler):
        def reply(self, data: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path.endswith("/refs"):
                branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": COMMIT}
                self.reply(json.dumps({"branches": [branch]}).encode())
            elif f"/tree/{COMMIT}" in path:
                self.reply(json.dumps(listing).encode())
            elif f"/resolve/{COMMIT}/" in path:
                name = path.rpartition("/")[2]
                if self.command == "GET":
                    downloaded.append(name)
                self.reply(files[name].read_bytes())
            else:
                self.send_error(404)

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/", downloaded
        finally:
            server.shutdown()
