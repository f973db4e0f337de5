"""Convert a model and chat with it through llama-cpp-python: `python examples/convert_and_chat.py MODEL.gguf QUESTION`."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf_firstlayer
import gguf_firstlayer.llama_cpp as llama_cpp  # before anything else imports llama_cpp


def main(model: str, question: str) -> None:
    """Convert the model if that was not done before, and print its answer."""
    source = Path(model)
    converted = source.with_name(f"{source.stem}-flp.gguf")
    if not converted.exists():
        print(f"at best {gguf_firstlayer.plan(source).decode_bound:.3f} times as fast in decoding", file=sys.stderr)
        gguf_firstlayer.convert(source, converted, type="q8_0")
    llama = llama_cpp.Llama(model_path=str(converted), n_ctx=512, verbose=False)
    messages = [{"role": "user", "content": question}]
    answer = llama.create_chat_completion(messages, max_tokens=64, temperature=0)
    print(answer["choices"][0]["message"]["content"])


if __name__ == "__main__":
    main(*sys.argv[1:])
