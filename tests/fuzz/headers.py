"""Headers of converted files with random damage, for the Python side: `python -m fuzz.headers MODEL -runs=100000`.

From this folder's parent, with atheris installed. Other options are libFuzzer's. A finding is whatever ends in an exception
other than FirstLayerError; llama.cpp's own reader, which is asked first, runs in this process.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["gguf", "gguf_firstlayer"]):
    from gguf_firstlayer import file_format
    from gguf_firstlayer.errors import FirstLayerError
    from gguf_firstlayer.inspect import inspect, text
    from gguf_firstlayer.pair import context_length
    from gguf_firstlayer.source import Source, without_data
    from gguf_firstlayer.text import printable, to_json

# bytes that mean something in a header: lengths, numbers of elements, types
NUMBERS = [0, 1, 2, 4, 8, 9, 255, 4097, 2**31, 2**32, 2**62, 2**63, 2**64 - 1]


class Target:
    """Feeds inputs, which are headers, to whatever reads them; the data of the tensors stay as they are."""

    def __init__(self, model: Path, folder: Path) -> None:
        source = Source(model)
        size = int(source.parts[0].data_offset)
        self.path, self.data = folder / "x.gguf", model.read_bytes()[size:]
        self.seed = model.read_bytes()[:size]

    def __call__(self, header: bytes) -> None:
        self.path.write_bytes(header + self.data)
        try:
            with without_data(self.path) as path:
                source = Source(path)
            source.headers()
            source.keys()
            context_length(source)
            file_format.is_sidecar(source)
            file_format.read_spares(source)
            file_format.read_measurement(source)
            file_format.read_origin(source)
            if file_format.read(source)[0]:  # others are analysed in a process of their own
                found = inspect(self.path)
                to_json(found)
                for line in text(found):
                    printable(line)
        except FirstLayerError as err:
            str(err)


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """A byte or a number of a header is another one; or libFuzzer changes something."""
    rng = random.Random(seed)
    if not data or rng.random() < 0.3:
        return atheris.Mutate(data, max_size)
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        place = rng.randrange(len(changed))
        if rng.random() < 0.5:
            changed[place] = rng.randrange(256)
        else:
            width = rng.choice([1, 4, 8])
            changed[place : place + width] = (rng.choice(NUMBERS) % 2 ** (8 * width)).to_bytes(width, "little")
    return bytes(changed[:max_size])


if __name__ == "__main__":
    model, *options = sys.argv[1:]
    folder = Path(os.environ.get("FUZZ_FOLDER", "/dev/shm"))
    target = Target(Path(model), folder)
    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    (corpus / "seed").write_bytes(target.seed)
    atheris.Setup([sys.argv[0], *options, f"-max_len={2 * len(target.seed)}", str(corpus)], target, custom_mutator=mutate)
    atheris.Fuzz()
