"""34 layers, of which all but one are said to be elided: a graph of more than a thousand nodes for a few weights."""

from pathlib import Path

from gguf import GGUFReader, GGUFValueType
from support.models import rewrite

N = 34
EXPECTED = {"load": "which was replaced by a table", "inspect": ""}


def forge(model: Path, output: Path) -> None:
    reader = GGUFReader(model)
    elided = {key: reader.fields[f"firstlayer.elided.{key}"].contents() for key in ("name", "type", "dimension")}
    gone = [tensor for tensor in reader.tensors if tensor.name.startswith("blk.1.")]
    for layer in range(1, N):
        for tensor in gone:
            elided["name"].append(tensor.name.replace("blk.1.", f"blk.{layer}."))
            elided["type"].append(int(tensor.tensor_type))
            elided["dimension"] += (*map(int, tensor.shape), 1, 1, 1)[:4]

    types = {"name": GGUFValueType.STRING, "type": GGUFValueType.UINT32, "dimension": GGUFValueType.INT64}
    rewrite(
        model,
        output,
        change_key=lambda name, value: value * (N // 2) if isinstance(value, list) and "swiglu_clamp" in name else value,
        drop={tensor.name for tensor in gone},
        keys={f"firstlayer.elided.{key}": (value, GGUFValueType.ARRAY, types[key]) for key, value in elided.items()}
        | {"llama.block_count": (N, GGUFValueType.UINT32)},
    )
