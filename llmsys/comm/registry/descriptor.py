"""Descriptors of registered tensors: what a peer needs to know to address any of their elements."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from llmsys.comm.registry.view import Addressable, View
from llmsys.comm.transports.base import Region, RemoteRegion
from llmsys.core.errors import DescriptorError

R = TypeVar("R", bound=Region | RemoteRegion | None)

DTYPE_BYTES: dict[str, int] = (
    dict.fromkeys(("bool", "uint8", "int8"), 1)
    | dict.fromkeys(("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"), 1)
    | dict.fromkeys(("float4_e2m1fn_x2",), 1)
    | dict.fromkeys(("uint16", "int16", "float16", "bfloat16"), 2)
    | dict.fromkeys(("uint32", "int32", "float32", "complex32"), 4)
    | dict.fromkeys(("uint64", "int64", "float64", "complex64"), 8)
    | dict.fromkeys(("complex128",), 16)
)
"""Bytes of one element, by the names of torch (without "torch."). `float4_e2m1fn_x2` holds two values in a byte."""

ADDRESS_END = 1 << 64
MAX_DIMS = 64
NO_REGION = -1
"""The region of a tensor that has no elements."""

_SIZE_END = 1 << 63


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDescriptor(Addressable[None]):
    """Where a registered tensor lies in the memory of the endpoint `owner`. Checked when it is made.

    name: unique at its owner. dims: names of the dimensions, or empty.
    address: of the element with all indices 0; strides may be 0 (expanded) or negative, so others can lie before it.
    dtype: a key of `DTYPE_BYTES`. device: "cpu" or "cuda:0".
    generation: the owner's; after a restart the addresses mean nothing.
    region_id, region_address, region_bytes: the registered memory that contains all elements. A tensor without elements
    has `NO_REGION`, and 0 for all addresses and bytes.

    Raises:
        DescriptorError: a field has the wrong type or value, or an element lies outside the region.
    """

    name: str
    address: int
    shape: tuple[int, ...]
    strides_bytes: tuple[int, ...]
    dtype: str
    itemsize: int
    device: str
    owner: str
    generation: int
    region_id: int
    region_address: int
    region_bytes: int
    dims: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problem = _type_problem(self) or _layout_problem(self) or _range_problem(self)
        if problem is not None:
            expected, found = problem
            raise DescriptorError(
                f"the descriptor of tensor {str(self.name)[:80]!r} is not usable",
                expected=expected,
                found=found[:200],
                fix="give shape, strides and address as they are in the tensor's memory, or let its owner export again",
            )

    @property
    def element_range(self) -> tuple[int, int]:
        """Addresses of the lowest byte of all elements, and one past the highest."""
        if self.region_id == NO_REGION:
            return self.address, self.address
        moves = [stride * (size - 1) for stride, size in zip(self.strides_bytes, self.shape, strict=True)]
        low, high = sum(m for m in moves if m < 0), sum(m for m in moves if m > 0)
        return self.address + low, self.address + high + self.itemsize

    def view(self) -> View[None]:
        return self.view_in(None)

    def view_in(self, region: R) -> View[R]:
        """All elements, in a region at hand."""
        return View(
            name=self.name,
            dtype=self.dtype,
            itemsize=self.itemsize,
            offset_bytes=self.address - self.region_address,
            shape=self.shape,
            strides_bytes=self.strides_bytes,
            dims=self.dims,
            indices=(None,) * len(self.shape),
            region=region,
        )


def contiguous_strides(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Strides in bytes of a tensor whose elements lie in C order without gaps."""
    strides = [itemsize] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * max(shape[dim + 1], 1)
    return tuple(strides)


def itemsize_of(dtype: str) -> int:
    """Bytes of one element. Raises DescriptorError: no such dtype."""
    try:
        return DTYPE_BYTES[dtype]
    except KeyError:
        raise DescriptorError(
            f"there is no dtype {dtype[:80]!r}",
            expected=f"one of {', '.join(DTYPE_BYTES)}",
            found=f"{dtype[:80]!r}",
            fix="name the dtype as torch does, without 'torch.'; quantised and sub-byte dtypes are not supported",
        ) from None


Problem = tuple[str, str]
"""What was expected and what was found."""


def _type_problem(d: TensorDescriptor) -> Problem | None:
    for field in ("name", "dtype", "device", "owner"):
        if type(value := getattr(d, field)) is not str or not value:
            return f"{field}: text", reprlib.repr(value)
    for field in ("address", "itemsize", "generation", "region_id", "region_address", "region_bytes"):
        if type(value := getattr(d, field)) is not int:
            return f"{field}: a whole number", reprlib.repr(value)
    for field, kind in (("shape", int), ("strides_bytes", int), ("dims", str)):
        value = getattr(d, field)
        if type(value) is not tuple or len(value) > MAX_DIMS or any(type(v) is not kind for v in value):
            return f"{field}: a tuple of at most {MAX_DIMS} {kind.__name__}", reprlib.repr(value)
    return None


def _layout_problem(d: TensorDescriptor) -> Problem | None:
    if d.dtype not in DTYPE_BYTES:
        return f"dtype: one of {', '.join(DTYPE_BYTES)}", d.dtype
    if d.itemsize != DTYPE_BYTES[d.dtype]:
        return f"itemsize {DTYPE_BYTES[d.dtype]} for {d.dtype}", f"{d.itemsize}"
    if len(d.strides_bytes) != len(d.shape):
        return f"one stride for each of {len(d.shape)} dimensions", f"{len(d.strides_bytes)} strides"
    if d.dims and (len(d.dims) != len(d.shape) or len(set(d.dims)) != len(d.dims) or not all(d.dims)):
        return f"dims: {len(d.shape)} different names, or none", reprlib.repr(d.dims)
    if any(size < 0 for size in d.shape):
        return "sizes of dimensions >= 0", f"shape {reprlib.repr(d.shape)}"
    if any(not -_SIZE_END < stride < _SIZE_END for stride in d.strides_bytes):
        return "strides within 63 bits", f"strides_bytes {reprlib.repr(d.strides_bytes)}"
    if math.prod(d.shape) * d.itemsize >= _SIZE_END:
        return "fewer than 2**63 bytes of elements", f"shape {reprlib.repr(d.shape)} of {d.itemsize} bytes each"
    return None


def _range_problem(d: TensorDescriptor) -> Problem | None:
    if d.generation < 0:
        return "generation >= 0", f"{d.generation}"
    if 0 in d.shape or d.region_id == NO_REGION:
        found = (d.region_id, d.address, d.region_address, d.region_bytes)
        if 0 in d.shape and found == (NO_REGION, 0, 0, 0):
            return None
        return "no region and no addresses for a tensor without elements, and only for such", f"{found}"
    if d.region_id < 0 or not 0 < d.region_bytes < _SIZE_END:
        return "region_id >= 0 and 0 < region_bytes < 2**63", f"{d.region_id}, {d.region_bytes}"
    region_end = d.region_address + d.region_bytes
    if d.region_address < 0 or region_end > ADDRESS_END:
        return "a region within 64-bit addresses", f"{d.region_bytes} bytes at {d.region_address:#x}"
    low, high = d.element_range
    if low < d.region_address or high > region_end:
        return (
            f"elements within the region {d.region_address:#x}..{region_end:#x}",
            f"elements at {low:#x}..{high:#x} (shape {reprlib.repr(d.shape)}, strides_bytes "
            f"{reprlib.repr(d.strides_bytes)})",
        )
    return None
