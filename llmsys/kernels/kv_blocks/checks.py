"""Checks of caches, staging tensors and block ids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from llmsys.core.errors import InputError

BlockIds = torch.Tensor | NDArray[np.integer] | Sequence[int]
IntArray = NDArray[np.int64]

LOGICAL_DIMS = ("kv", "block", "token", "head", "dim")
MAX_ITEMSIZE = 8


def host_ids(name: str, block_ids: BlockIds) -> IntArray:
    ids = block_ids.detach().cpu().numpy() if isinstance(block_ids, torch.Tensor) else np.asarray(block_ids)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise _not_ids(name, ids.shape, ids.dtype)
    return ids.astype(np.int64)


def ids_on_device(block_ids: BlockIds, cache: torch.Tensor, *, check: bool, unique: bool) -> torch.Tensor:
    if not isinstance(block_ids, torch.Tensor) or block_ids.device.type == "cpu":
        ids = host_ids("block_ids", block_ids)
        require_in_range("block_ids", ids, cache.shape[1])
        if unique:
            require_unique("block_ids", ids)
        return torch.from_numpy(ids).to(cache.device)
    if block_ids.ndim != 1 or block_ids.is_floating_point():
        raise _not_ids("block_ids", tuple(block_ids.shape), block_ids.dtype)
    if check:
        ids_on_device(block_ids.cpu(), cache, check=True, unique=unique)
    return block_ids.to(cache.device, torch.int64)


def _not_ids(name: str, shape: tuple[int, ...], dtype: object) -> InputError:
    return InputError(
        f"{name} are no block ids",
        expected="a one-dimensional list of whole numbers",
        found=f"shape {tuple(shape)} of {dtype}",
        fix=f"pass one list of block ids as {name}",
    )


def require_in_range(name: str, ids: IntArray, num_blocks: int) -> None:
    bad = np.flatnonzero((ids < 0) | (ids >= num_blocks))
    if bad.size:
        raise InputError(
            f"{name} has ids out of range",
            expected=f"ids in [0, {num_blocks}), the blocks of the cache",
            found=f"{bad.size} others, the first is {ids[bad[0]]}",
            fix=f"correct {name}, or pass the cache that they belong to",
        )


def require_unique(name: str, ids: IntArray) -> None:
    values, counts = np.unique(ids, return_counts=True)
    if len(values) < len(ids):
        raise InputError(
            f"{name} would write a block twice",
            expected="every written block once",
            found=f"block {values[counts > 1][0]} {counts.max()} times",
            fix=f"give every entry of {name} a block of its own",
        )


def require_cache(name: str, tensor: torch.Tensor) -> None:
    if tensor.ndim != len(LOGICAL_DIMS) or tensor.dtype.itemsize > MAX_ITEMSIZE:
        raise InputError(
            f"{name} is not a KV cache",
            expected=f"dimensions {LOGICAL_DIMS} and elements of at most {MAX_ITEMSIZE} bytes",
            found=f"shape {tuple(tensor.shape)} of {tensor.dtype}",
            fix=f"pass {name} through logical_view",
        )


def require_alike(name: str, tensor: torch.Tensor, like: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != like.dtype or tensor.device != like.device:
        raise InputError(
            f"{name} does not fit the cache",
            expected=f"shape {shape} of {like.dtype} on {like.device}",
            found=f"shape {tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}",
            fix=f"pass another {name}, or convert it",
        )


def require_writable(name: str, tensor: torch.Tensor) -> None:
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        raise InputError(
            f"{name} holds several elements in one place",
            expected="a tensor that is not expanded",
            found=f"shape {tuple(tensor.shape)}, strides {tensor.stride()}",
            fix=f"pass {name}.contiguous() or the tensor behind it",
        )
