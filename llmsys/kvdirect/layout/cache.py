"""A worker's KV cache: dimensions, strides and heads, and which source ranks a destination rank reads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from llmsys.core.errors import ConfigError

Dim = Literal["kv", "block", "token", "head", "dim"]
Order = tuple[Dim, ...]

VLLM_ORDER: Order = ("kv", "block", "token", "head", "dim")
FLOWKV_ORDER: Order = ("block", "kv", "token", "head", "dim")
HEAD_MAJOR_ORDER: Order = ("kv", "block", "head", "token", "dim")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRange:
    """KV heads [begin, end) in the numbering of the whole model; empty when begin == end."""

    begin: int
    end: int

    def __len__(self) -> int:
        return self.end - self.begin

    def common(self, other: HeadRange) -> HeadRange:
        begin = max(self.begin, other.begin)
        return HeadRange(begin=begin, end=max(begin, min(self.end, other.end)))


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """The KV cache of tensor-parallel rank ``tp_rank``: ``num_layers`` dense tensors of ``num_blocks`` blocks each.

    ``num_kv_heads`` counts the whole model's heads, and ``tp_size`` must divide it or be a multiple of it. In the
    second case heads are replicated, and rank r holds head r * num_kv_heads // tp_size alone. ``itemsize`` is in bytes.
    ``order`` names the five dimensions of a layer's tensor from outermost to innermost: "kv" (K is 0, V is 1),
    "block", "token" (in its block), "head" (of this rank) and "dim"; any permutation is valid. Raises ConfigError.
    """

    num_layers: int
    num_blocks: int
    block_tokens: int
    num_kv_heads: int
    head_dim: int
    itemsize: int
    tp_size: int = 1
    tp_rank: int = 0
    order: Order = VLLM_ORDER

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_blocks", "block_tokens", "num_kv_heads", "head_dim", "itemsize"):
            if getattr(self, name) < 1:
                raise out_of_range(name, getattr(self, name), "at least 1")
        _require_tp("tp_size", self.tp_size, self.num_kv_heads)
        if not 0 <= self.tp_rank < self.tp_size:
            raise out_of_range("tp_rank", self.tp_rank, f"in [0, {self.tp_size}), the ranks of tp_size")
        if sorted(self.order) != sorted(get_args(Dim)):
            raise out_of_range("order", self.order, f"a permutation of {get_args(Dim)}")

    @property
    def heads(self) -> HeadRange:
        """The heads of this rank."""
        begin = self.tp_rank * self.num_kv_heads // self.tp_size
        return HeadRange(begin=begin, end=begin + max(1, self.num_kv_heads // self.tp_size))

    @property
    def sizes(self) -> dict[Dim, int]:
        """Length of each dimension of a layer's tensor; the keys are in ``order``."""
        lengths: dict[Dim, int] = {"kv": 2, "block": self.num_blocks, "token": self.block_tokens}
        lengths |= {"head": len(self.heads), "dim": self.head_dim}
        return {dim: lengths[dim] for dim in self.order}

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a layer's tensor as it lies in memory (C order)."""
        return tuple(self.sizes.values())

    @property
    def strides_bytes(self) -> dict[Dim, int]:
        """Bytes from one index to the next along each dimension."""
        strides: dict[Dim, int] = {}
        stride = self.itemsize
        sizes = self.sizes
        for dim in reversed(self.order):
            strides[dim] = stride
            stride *= sizes[dim]
        return strides

    @property
    def layer_bytes(self) -> int:
        return math.prod(self.shape) * self.itemsize

    @property
    def token_bytes(self) -> int:
        """K and V of one token in one layer, on this rank."""
        return 2 * len(self.heads) * self.head_dim * self.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRank:
    """A source rank to read from, and the heads to read from it."""

    rank: int
    heads: HeadRange


def source_ranks(source_tp: int, destination_layout: KvLayout) -> tuple[SourceRank, ...]:
    """Which ranks of a source of ``source_tp`` ranks a destination rank reads, in order of heads, each head once.

    Where the source replicates heads, the readers of a head are spread over its replicas as evenly as possible, and
    equal sizes read rank from rank. ``transfer_segments`` with that rank's layout moves just these heads. Raises
    ConfigError when ``source_tp`` neither divides the number of heads nor is a multiple of it.
    """
    heads, num_kv_heads = destination_layout.heads, destination_layout.num_kv_heads
    _require_tp("source_tp", source_tp, num_kv_heads)
    if source_tp <= num_kv_heads:
        width = num_kv_heads // source_tp
        parts = {r: HeadRange(begin=r * width, end=(r + 1) * width) for r in range(source_tp)}
        return tuple(SourceRank(rank=r, heads=h.common(heads)) for r, h in parts.items() if h.common(heads))
    num_replicas = source_tp // num_kv_heads
    num_readers = max(1, destination_layout.tp_size // num_kv_heads)
    replica = destination_layout.tp_rank % num_readers * num_replicas // num_readers
    return tuple(
        SourceRank(rank=head * num_replicas + replica, heads=HeadRange(begin=head, end=head + 1))
        for head in range(heads.begin, heads.end)
    )


def _require_tp(name: str, tp_size: int, num_kv_heads: int) -> None:
    if tp_size < 1 or (num_kv_heads % tp_size and tp_size % num_kv_heads):
        raise out_of_range(name, tp_size, f"a divisor or a multiple of the {num_kv_heads} KV heads")


def out_of_range(name: str, value: object, expected: str) -> ConfigError:
    return ConfigError(
        f"{name} is out of range", expected=f"{name} {expected}", found=f"{name} = {value!r}", fix=f"set {name}"
    )
