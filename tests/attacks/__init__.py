"""Hostile files, one script each, and programs that attack at random.

A script has `forge(model, output)`, which writes a hostile file, and says what must come of it:

MODEL     what it starts from: "converted" (the default), "sidecar" or "source"
ABORTS    the assertion with which llama.cpp aborts, tables or not, when it loads or runs the file
EXPECTED  for "load" and for verbs, a part of the sentence with which the file is refused, or "" if it is not

Whatever a script does not name may end either way, but with a sentence, without a crash, and within a bound on memory.
tests/test_attacks.py runs all of them; `python -m attacks NAME MODEL OUTPUT` writes one file.
"""
