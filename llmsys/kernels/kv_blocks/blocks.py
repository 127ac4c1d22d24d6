"""Gather, scatter and re-layout, each by the Triton kernel or by its torch reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmsys.core.errors import InputError
from llmsys.kernels.kv_blocks.checks import (
    LOGICAL_DIMS,
    BlockIds,
    ids_on_device,
    require_alike,
    require_cache,
    require_writable,
)
from llmsys.kernels.kv_blocks.move import Implementation, as_units, block_first, launch, use_triton
from llmsys.kernels.kv_blocks.tokens import TokenMap


def logical_view(cache: torch.Tensor, order: Sequence[str]) -> torch.Tensor:
    """The view of a layer's tensor whose dimensions lie in memory as ``order`` says, outermost first.

    ``order`` is a permutation of LOGICAL_DIMS, and ``cache`` has these dimensions in that order.
    """
    if sorted(order) != sorted(LOGICAL_DIMS) or cache.ndim != len(LOGICAL_DIMS):
        raise InputError(
            "the order does not describe the cache",
            expected=f"a permutation of {LOGICAL_DIMS} and a tensor of five dimensions",
            found=f"order {tuple(order)}, shape {tuple(cache.shape)}",
            fix="pass the order of the cache's layout",
        )
    return cache.permute([list(order).index(dim) for dim in LOGICAL_DIMS])


def gather_blocks(
    cache: torch.Tensor,
    block_ids: BlockIds,
    out: torch.Tensor | None = None,
    *,
    implementation: Implementation = "auto",
    check_ids: bool = True,
) -> torch.Tensor:
    """Copy ``cache[:, block_ids]`` to a staging tensor of shape (kv, len(block_ids), token, head, dim), and return it.

    By default the staging tensor is new, and each of its blocks one contiguous run of memory, block after block, with
    the other dimensions in the cache's order; ``out`` may have any strides. Ids may repeat. They are always checked
    where they are on the host. Ids on the device are copied to the host for the check, which then waits for the stream;
    ``check_ids=False`` leaves that out, and an id out of range is undefined behaviour. Raises InputError.
    """
    require_cache("cache", cache)
    ids = ids_on_device(block_ids, cache, check=check_ids, unique=False)
    shape = (cache.shape[0], len(ids), *cache.shape[2:])
    staging = _new_staging(cache, len(ids)) if out is None else out
    require_alike("out", staging, cache, shape)
    require_writable("out", staging)
    units, staged = as_units(cache, staging)
    if use_triton(implementation, cache):
        launch(units, staged, ids, None, whole_blocks=True)
    elif staged.numel():
        order = block_first(units)
        torch.index_select(units.permute(order), 0, ids, out=staged.permute(order))
    return staging


def scatter_blocks(
    staging: torch.Tensor,
    cache: torch.Tensor,
    block_ids: BlockIds,
    *,
    implementation: Implementation = "auto",
    check_ids: bool = True,
) -> None:
    """Copy a staging tensor, of the shape that ``gather_blocks`` gives and any strides, to ``cache[:, block_ids]``.

    Ids must not repeat. They are checked as in ``gather_blocks``, at the same cost. Raises InputError, and then nothing
    has been written.
    """
    require_cache("cache", cache)
    require_writable("cache", cache)
    ids = ids_on_device(block_ids, cache, check=check_ids, unique=True)
    require_alike("staging", staging, cache, (cache.shape[0], len(ids), *cache.shape[2:]))
    staged, units = as_units(staging, cache)
    if use_triton(implementation, cache):
        launch(staged, units, None, ids, whole_blocks=True)
    elif staged.numel():
        order = block_first(units)
        units.permute(order)[ids] = staged.permute(order)


def relayout_blocks(
    source: torch.Tensor,
    destination: torch.Tensor,
    tokens: TokenMap,
    *,
    source_head: int = 0,
    destination_head: int = 0,
    num_heads: int | None = None,
    implementation: Implementation = "auto",
) -> None:
    """Copy the tokens of ``tokens`` from one cache to another of any block size, number of heads and strides.

    Heads [source_head, source_head + num_heads) of the source tensor become heads from ``destination_head`` on; by
    default all from ``source_head`` to the last. Nothing else in ``destination`` changes. Raises InputError before
    anything is written, also when ``tokens`` was made for caches of another size.
    """
    require_cache("source", source)
    require_alike("destination", destination, source, (source.shape[0], *destination.shape[1:4], source.shape[4]))
    require_writable("destination", destination)
    _require_map_of(tokens, source, destination)
    heads = source.shape[3] - source_head if num_heads is None else num_heads
    for name, cache, first in (("source", source, source_head), ("destination", destination, destination_head)):
        if not (heads >= 0 and first >= 0 and first + heads <= cache.shape[3]):
            raise InputError(
                f"the {name} does not have these heads",
                expected=f"heads in [0, {cache.shape[3]})",
                found=f"[{first}, {first + heads})",
                fix=f"set {name}_head and num_heads to heads of this tensor, not of the model",
            )
    ours, theirs = as_units(source.narrow(3, source_head, heads), destination.narrow(3, destination_head, heads))
    from_slots, to_slots = tokens.source_slots, tokens.destination_slots
    if use_triton(implementation, source):
        launch(ours, theirs, from_slots, to_slots, whole_blocks=False)
    elif ours.numel() and len(tokens):
        per_source, per_destination = tokens.source_block_tokens, tokens.destination_block_tokens
        moved = ours[:, from_slots // per_source, from_slots % per_source]
        theirs[:, to_slots // per_destination, to_slots % per_destination] = moved


def _new_staging(cache: torch.Tensor, num_blocks: int) -> torch.Tensor:
    order = block_first(cache)
    memory = cache.new_empty([num_blocks, *(cache.shape[dim] for dim in order[1:])])
    return memory.permute([order.index(dim) for dim in range(5)])


def _require_map_of(tokens: TokenMap, source: torch.Tensor, destination: torch.Tensor) -> None:
    made_for = [tokens.source_blocks, tokens.source_block_tokens]
    made_for += [tokens.destination_blocks, tokens.destination_block_tokens]
    found = [*source.shape[1:3], *destination.shape[1:3]]
    if made_for != found or tokens.source_slots.device != source.device:
        raise InputError(
            "the token map was made for other caches",
            expected=f"(blocks, block tokens) of source and destination {made_for} on {tokens.source_slots.device}",
            found=f"{found} on {source.device}",
            fix="make the map with map_tokens for these two caches",
        )
