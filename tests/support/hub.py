"""The Hugging Face Hub on the loopback device, as llama.cpp's -hf and huggingface_hub ask for it."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "1" * 40


@dataclass
class Hub:
    """A server with some files in every repository, and what was asked of it.

    Files are where large ones of the Hub are: another host, here `localhost`, to which a redirection leads.

    Attributes:
        port: of the server
        token: needed to read the repositories
        refusals: status and headers of the answers to the next requests for files
        waits: seconds from each of these answers until the next request
        breaks: after how many bytes the next downloads end
        downloaded: names of the files that were sent, whole or in parts
        ranges: first and last byte of each part that was asked for
        tokens: those that were sent, by host
        has_etags: whether files are told from other versions of them
        answer: what is said of a repository's files, if not the truth
        meeting: where clients that ask about a file wait for one another
        sends_parts: whether a part of a file can be asked for
        has_xet: whether files are said to be in a storage (Xet) that has none of them
    """

    port: int = 0
    token: str | None = None
    refusals: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    breaks: list[int] = field(default_factory=list)
    downloaded: list[str] = field(default_factory=list)
    ranges: list[tuple[int, int]] = field(default_factory=list)
    tokens: dict[str, set[str | None]] = field(default_factory=dict)
    has_etags: bool = True
    answer: bytes | None = None
    meeting: threading.Barrier | None = None
    sends_parts: bool = True
    has_xet: bool = False

    @property
    def address(self) -> str:
        """Of the Hub, for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.port}/"

    @property
    def elsewhere(self) -> str:
        """Of the other host, where each file has its name."""
        return f"http://localhost:{self.port}/files/"


@contextmanager
def hub(files: dict[str, Path], token: str | None = None) -> Iterator[Hub]:
    """Serve these files, by their paths in a repository."""
    known = Hub(token=token)
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    listing = [
        {"type": "file", "path": name, "size": path.stat().st_size, "oid": digests[name], "lfs": {"oid": digests[name]}}
        for name, path in files.items()
    ]
    for entry in listing:
        entry["lfs"] |= {"size": entry["size"], "pointerSize": 100}

    refused_at: list[float] = []

    class Handler(BaseHTTPRequestHandler):
        def reply(self, data: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def send(self, name: str) -> None:
            data = files[name].read_bytes()
            etag = f'"{hashlib.sha256(data).hexdigest()}"'  # a test may have replaced the file
            status, headers = 200, {"ETag": etag, "Accept_Ranges": "bytes"} if known.has_etags else {}
            if self.command == "GET":
                known.downloaded.append(name)
                if known.sends_parts and (wanted := self.headers.get("Range")) is not None:
                    first, _, last = wanted.removeprefix("bytes=").partition("-")
                    begin, end = int(first), min(int(last or len(data) - 1), len(data) - 1)
                    known.ranges.append((begin, end))
                    headers["Content_Range"] = f"bytes {begin}-{end}/{len(data)}"
                    data, status = data[begin : end + 1], 206
                if known.breaks and known.breaks[0] < len(data):
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data[: known.breaks.pop(0)])
                    self.close_connection = True
                    return
            self.reply(data, status, **headers)

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            sent = self.headers.get("Authorization")
            host = self.headers["Host"].partition(":")[0]
            known.tokens.setdefault(host, set()).add(sent)
            known.waits += [time.monotonic() - refused_at.pop()] if refused_at else []
            if known.refusals and (path.startswith("/files/") or "/resolve/" in path):
                status, refusal = known.refusals.pop(0)
                refused_at.append(time.monotonic())
                self.reply(b"", status, **refusal)
            elif path.startswith("/files/"):
                name = path.removeprefix("/files/")
                self.send(name) if name in files else self.reply(b"", 404)
            elif path.startswith("/releases/"):
                self.reply(b"", 302, Location=f"{known.elsewhere}{path.removeprefix('/releases/')}")
            elif known.token is not None and sent != f"Bearer {known.token}":
                self.reply(b"", 401, X_Error_Code="GatedRepo", X_Error_Message="gated")
            elif path == "/xet":
                expires = str(int(time.time()) + 3600)
                about = {"X_Xet_Access_Token": "x", "X_Xet_Token_Expiration": expires}
                self.reply(b"{}", X_Xet_Cas_Url=f"{known.address}storage", **about)
            elif path.startswith("/storage"):
                self.reply(b"no", 416)
            elif path.startswith("/api/models/nobody/"):
                self.reply(b"", 404, X_Error_Code="RepoNotFound")
            elif path.endswith("/refs"):
                branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": COMMIT}
                self.reply(json.dumps({"branches": [branch]}).encode())
            elif "/tree/" in path:
                self.reply(json.dumps(listing).encode() if known.answer is None else known.answer)
            elif "/resolve/" in path:
                name = path.partition("/resolve/")[2].partition("/")[2]
                if name not in files:
                    self.reply(b"", 404, X_Error_Code="EntryNotFound")
                    return
                size = str(files[name].stat().st_size)
                about = {"X_Repo_Commit": COMMIT, "X_Linked_Size": size, "X_Linked_ETag": f'"{digests[name]}"'}
                if known.has_xet:
                    about |= {"X_Xet_Hash": digests[name], "X_Xet_Refresh_Route": f"{known.address}xet"}
                self.reply(b"", 302, Location=f"{known.elsewhere}{name}", **about)
            else:
                self.reply(b"", 404)

        def do_HEAD(self) -> None:
            if known.meeting is not None:
                known.meeting.wait(120)
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        known.port = server.server_address[1]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield known
        finally:
            server.shutdown()
