"""Uses llama-server for a long time: `python -m attacks.soak MINUTES MODE [PAUSE]`, from this folder's parent.

Clients of four slots ask for completions, streams, and streams that they cancel; send requests that are wrong; save, restore
and erase slots. A client waits up to PAUSE seconds before it asks again. Oracle of the answers: a server without tables, cache
or demand.
"""

from __future__ import annotations

import http.client
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.builds import PATCHED, ROOT
from support.models import convert
from support.ports import free_port
from support.servers import serving

MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = (ROOT / "tests" / "text.txt").read_text()
N_CLIENTS, N_PROMPTS, N_PREDICT = 6, 48, 16
# without flash attention, SmolLM2 has the same bits in batches of any size, so what others ask does not change an answer
OPTIONS: list[object] = ["-np", 4, "-c", 4096, "-fa", "off", "-t", 1, "--no-webui", "--cache-ram", 16]
# the cache is so small that rows are replaced all the time
MODES: dict[str, list[object]] = {
    "source": [],
    "tables": [],
    "cache": ["--firstlayer-cache", 1],
    "demand": ["--demand", "rows"],
}


class Server:
    """A running llama-server."""

    def __init__(self, port: int, pid: int) -> None:
        self.port, self.pid = port, pid

    def ask(self, path: str, body: Any = None, stop_after: int | None = None) -> tuple[int, str]:
        """Status and answer; of a stream, all of it, or what came until it was cancelled."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request("POST" if data else "GET", path, data, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if stop_after is not None:
                return answer.status, answer.read(stop_after).decode(errors="replace")
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def complete(self, prompt: str, stream: bool = False) -> str:
        """The greedy completion of a prompt."""
        body = {"prompt": prompt, "n_predict": N_PREDICT, "temperature": 0, "cache_prompt": False, "stream": stream}
        status, text = self.ask("/completion", body)
        assert status == 200, text
        if not stream:
            return str(json.loads(text)["content"])
        return "".join(json.loads(line[6:])["content"] for line in text.splitlines() if line.startswith("data: {"))

    def resident(self) -> int:
        """Bytes of its memory that no file holds."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


@contextmanager
def serve(mode: str, folder: Path) -> Iterator[Server]:
    """A server in one of the modes."""
    model = MODEL if mode != "tables" else convert(MODEL, folder / "model-flp.gguf", type="f32").output
    port = free_port()
    command = [PATCHED / "llama-server", "-m", model, "--port", port, "--slot-save-path", folder, *OPTIONS, *MODES[mode]]

    def is_up() -> None:
        assert Server(port, 0).ask("/health")[0] == 200

    with serving(command, is_up, (AssertionError, OSError)) as process:
        yield Server(port, process.pid)


def attack(server: Server, expected: dict[str, str], counts: Counter[str], until: float, pause: float, seed: int) -> None:
    """One client: what it asks for, at random, until the time is up."""
    rng = random.Random(seed)
    wrong: list[tuple[str, Any, int]] = [
        ("/completion", b"{", 500),
        ("/completion", {"prompt": TEXT * 10, "n_predict": 1}, 400),
        ("/completion", {"prompt": {"text": 1}}, 400),
        ("/slots/0?action=save", {"filename": "../x"}, 400),
        ("/nothing", None, 404),
    ]
    while time.monotonic() < until:
        prompt = rng.choice(list(expected))
        kind = rng.choices(["complete", "stream", "cancel", "wrong", "slot"], [4, 3, 3, 2, 1])[0]
        try:
            if kind in ("complete", "stream"):
                good = server.complete(prompt, stream=kind == "stream") == expected[prompt]
            elif kind == "cancel":
                body = {"prompt": prompt, "n_predict": 200, "temperature": 0, "stream": True}
                good = server.ask("/completion", body, stop_after=rng.randrange(400))[0] == 200
            elif kind == "wrong":
                path, body, status = rng.choice(wrong)
                good = server.ask(path, body)[0] == status
            else:
                slot, name = rng.randrange(4), f"slot-{seed}"
                actions = ["save", "restore", "erase"]
                good = all(server.ask(f"/slots/{slot}?action={what}", {"filename": name})[0] == 200 for what in actions)
            counts[kind if good else f"wrong answers to {kind}"] += 1
        except (OSError, http.client.HTTPException, AssertionError, ValueError) as err:
            counts[f"lost {kind}: {err!r}"[:100]] += 1
        time.sleep(rng.uniform(0, pause))


def main(minutes: float, mode: str, pause: float = 2) -> int:
    """Returns how many answers were wrong or lost."""
    rng = random.Random(1)
    starts = [rng.randrange(len(TEXT) - 700) for _ in range(N_PROMPTS)]
    prompts = [TEXT[start : start + rng.randrange(20, 700)] for start in starts]
    with tempfile.TemporaryDirectory() as name:
        with serve("source", Path(name)) as source:
            expected = {prompt: source.complete(prompt) for prompt in prompts}
        with serve(mode, Path(name)) as server:
            counts, sizes, start = Counter[str](), list[int](), time.monotonic()
            clients = [
                threading.Thread(target=attack, args=(server, expected, counts, start + 60 * minutes, pause, seed))
                for seed in range(N_CLIENTS)
            ]
            for client in clients:
                client.start()
            while any(client.is_alive() for client in clients):
                time.sleep(6 * minutes)
                sizes.append(server.resident())
            for client in clients:
                client.join()
            alive = {prompt: server.complete(prompt) for prompt in prompts} == expected
    print(f"{mode}, {minutes:.0f} minutes: {dict(sorted(counts.items()))}")
    print("memory after each tenth of the time, MiB:", *(f"{size / 2**20:.1f}" for size in sizes))
    print(f"all answers are right at the end: {alive}")
    return sum(count for kind, count in counts.items() if kind.startswith(("wrong answers", "lost"))) + (
        not alive or not counts
    )


if __name__ == "__main__":
    sys.exit(bool(main(float(sys.argv[1]), sys.argv[2], *map(float, sys.argv[3:]))))
