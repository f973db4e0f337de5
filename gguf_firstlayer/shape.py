"""Published shapes of transformers, in the paper's terms, and their cost by its formulas."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from gguf import GGMLQuantizationType

from gguf_firstlayer.cost import CostModel, Weight
from gguf_firstlayer.errors import UsageError
from gguf_firstlayer.runtime import Site, Use

MAX_NUMBER = 10_000_000


@dataclass(frozen=True)
class Shape:
    """The published shape of a transformer, in the terms of the paper.

    Attributes:
        vocab_size: entries of the vocabulary
        embedding_length: width of the layers, the paper's d
        block_count: layers
        head_count, head_count_kv: attention heads, for queries and for keys and values
        feed_forward_length: hidden width of the FFN
        feed_forward_matrices: 2, or 3 if it is gated
        expert_count: 1 if it is not a mixture of experts
        parallel: whether attention and FFN both read the layer's input
        expert_used_count: experts that a token is routed to
    """

    vocab_size: int
    embedding_length: int
    block_count: int
    head_count: int
    head_count_kv: int
    feed_forward_length: int
    feed_forward_matrices: int = 3
    expert_count: int = 1
    parallel: bool = False
    expert_used_count: int = 1

    def __post_init__(self) -> None:
        if any(value < 1 for value in dataclasses.astuple(self) if not isinstance(value, bool)):
            raise UsageError("the numbers of a shape must be positive")
        if self.embedding_length % self.head_count or self.feed_forward_matrices not in (2, 3):
            raise UsageError("head_count must divide embedding_length, and feed_forward_matrices must be 2 or 3")
        if not 1 <= self.expert_used_count <= self.expert_count:
            raise UsageError(f"a token uses {self.expert_used_count} experts, but the shape has {self.expert_count}")
        if self.block_count > 10_000:
            raise UsageError(f"{self.block_count} layers are more than any model has")

    def cost_model(self, kind: GGMLQuantizationType = GGMLQuantizationType.F16) -> CostModel:
        """The cost model with all weights of one type, without norms and biases.

        As in the paper, a model with parallel blocks no longer needs its embedding.
        """
        d, n_batch = self.embedding_length, 512
        e = d // self.head_count * self.head_count_kv
        attention = {"attn_q": (d, d), "attn_k": (d, e), "attn_v": (d, e)}
        matrices = {
            "gate": (d, self.feed_forward_length),
            "up": (d, self.feed_forward_length),
            "down": (self.feed_forward_length, d),
        }
        ffn = {f"ffn_{name}": shape for name, shape in matrices.items() if name != "gate" or self.feed_forward_matrices == 3}

        weights = {name: Weight(kind, (d, self.vocab_size)) for name in ("token_embd", "output")}
        uses = [Use("token_embd", self.vocab_size, 1, 0, self.parallel), Use("output", 1, 1, d * self.vocab_size, False)]
        for i in range(self.block_count):
            for name, shape in (attention | {"attn_output": (d, d)} | ffn).items():
                experts, used = (self.expert_count, self.expert_used_count) if name in ffn else (1, 1)
                weight = weights[f"blk.{i}.{name}"] = Weight(kind, (*shape, experts))
                replaced = i == 0 and (name in attention or (self.parallel and name in ffn))
                products = weight.values // experts * used * n_batch
                uses.append(Use(f"blk.{i}.{name}", experts, used, products, replaced))

        sites = [Site(name, "", shape[1], ("token_embd", f"blk.0.{name}")) for name, shape in attention.items()]
        if self.parallel:
            sites.append(Site("ffn + skip", "", d, ("token_embd", *(f"blk.0.{name}" for name in ffn))))
        elidable = tuple(dict.fromkeys(use.weight for use in uses if use.replaced))
        name = "parallel" if self.parallel else "serial"
        n_bytes = sum(weight.bytes for weight in weights.values())
        return CostModel("shape", name, n_bytes, self.vocab_size, n_batch, weights, tuple(sites), tuple(uses), elidable)


def parse_shape(value: str) -> Shape:
    """A `Shape` from `key=value,...`; `parallel` stands for `parallel=1`.

    Raises:
        UsageError: a key is unknown, missing, or not a positive number.
    """
    fields = {field.name: field for field in dataclasses.fields(Shape)}
    given: dict[str, int] = {}
    for item in value.split(","):
        key, _, number = item.strip().partition("=")
        if (
            key not in fields
            or not (number.isdecimal() or (key == "parallel" and not number))
            or len(number) > len(str(MAX_NUMBER))
        ):
            raise UsageError(f"'{item}' is not a part of a shape; give {','.join(f'{name}=N' for name in fields)}")
        given[key] = int(number or 1)
    missing = [name for name, field in fields.items() if field.default is dataclasses.MISSING and not given.get(name)]
    if given.get("expert_count", 1) > 1 and "expert_used_count" not in given:
        missing.append("expert_used_count")
    if missing:
        raise UsageError(f"the shape lacks {', '.join(missing)}")
    return Shape(**(given | {"parallel": bool(given.get("parallel"))}))  # type: ignore[arg-type]
