"""Every architecture: converted models against the stock library, and docs/architectures.md against the code."""

from __future__ import annotations

import architectures
import pytest

DOCUMENTED = architectures.read()


@pytest.mark.parametrize("name", DOCUMENTED)
def test_architecture(name, archs, tmp_path):
    """A converted model is exact, or the conversion is refused with a reason, as the document says."""
    row = str(architectures.examine(archs / f"{name}.gguf", tmp_path))
    # which batch sizes are exact with F32 weights depends on the processor's kernels
    assert row.rsplit("|", 2)[0] == DOCUMENTED[name].rsplit("|", 2)[0]


def test_all_are_documented(archs):
    assert {path.stem for path in archs.glob("*.gguf")} == set(DOCUMENTED)
