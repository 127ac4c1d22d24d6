"""torch tensors as memory and memory as torch tensors. The only file here that needs torch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmsys.comm.registry.descriptor import DTYPE_BYTES
from llmsys.core.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorMemory:
    """Where a tensor's elements are, and the storage around them. Strides in bytes; `storage` keeps the memory."""

    address: int
    shape: tuple[int, ...]
    strides_bytes: tuple[int, ...]
    dtype: str
    device: str
    storage_address: int
    storage_bytes: int
    storage: object


def dtype_name(dtype: torch.dtype | str) -> str:
    """The name by which descriptors call it. Raises InputError: quantised, below a byte, or unknown."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise InputError(
            f"tensors of dtype {name} cannot be registered",
            expected=f"one of {', '.join(DTYPE_BYTES)}",
            found=name,
            fix="register a uint8 view of its bytes",
        )
    return name


def memory_of(name: str, tensor: torch.Tensor) -> TensorMemory:
    """What `tensor` occupies. Whether it requires gradients does not matter.

    Raises:
        InputError: it is no tensor, has no plain memory (sparse, meta, distributed, ...), or is a lazy conjugate or
            negation, whose bytes are not its values.
    """
    if not isinstance(tensor, torch.Tensor):
        raise _unusable(name, f"a {type(tensor).__name__}", "give a torch tensor, or use register_memory")
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
        kind = "nested" if tensor.is_nested else "quantised" if tensor.is_quantized else str(tensor.layout)
        raise _unusable(name, f"a {kind} tensor", "register the dense tensors that it consists of")
    if tensor.is_conj() or tensor.is_neg():
        raise _unusable(name, "a lazy conjugate or negation", "register tensor.resolve_conj().resolve_neg()")
    try:
        storage = tensor.untyped_storage()
        address, storage_address, storage_bytes = tensor.data_ptr(), storage.data_ptr(), storage.nbytes()
    except (RuntimeError, NotImplementedError) as error:
        fix = "register the local tensor on a real device"
        raise _unusable(name, f"a {type(tensor).__name__} without memory of its own", fix) from error
    if tensor.numel() and not storage_address:
        raise _unusable(name, f"a tensor on {tensor.device} without memory", "register a tensor on a real device")
    return TensorMemory(
        address=address,
        shape=tuple(tensor.shape),
        strides_bytes=tuple(stride * tensor.element_size() for stride in tensor.stride()),
        dtype=dtype_name(tensor.dtype),
        device=str(tensor.device),
        storage_address=storage_address,
        storage_bytes=storage_bytes,
        storage=storage,
    )


def tensor_at(address: int, size_bytes: int, shape: Sequence[int], dtype: torch.dtype | str) -> torch.Tensor:
    """A contiguous tensor in memory that the caller keeps, without a copy. Its storage is exactly `size_bytes`."""
    memory = (ctypes.c_uint8 * size_bytes).from_address(address)
    return torch.frombuffer(memory, dtype=torch.uint8).view(_dtype(dtype)).view(tuple(shape))


def empty_tensor(shape: Sequence[int], dtype: torch.dtype | str) -> torch.Tensor:
    """A tensor without elements."""
    return torch.empty(tuple(shape), dtype=_dtype(dtype))


def detach_from(tensor: torch.Tensor, address: int) -> None:
    """Makes `tensor` empty if its memory is still the one at `address`, so that using it is an error, not a crash."""
    if tensor.untyped_storage().data_ptr() == address:
        with torch.no_grad():
            tensor.set_(torch.UntypedStorage(0), 0, (0,), (1,))  # type: ignore[no-untyped-call]


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype_name(dtype))
    assert isinstance(found, torch.dtype)
    return found


def _unusable(name: str, found: str, fix: str) -> InputError:
    return InputError(f"{name!r} cannot be registered", expected="a dense torch tensor in memory", found=found, fix=fix)
