"""The tensors that this endpoint lets its peers read and write."""

from __future__ import annotations

import math
import operator
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llmsys.comm.registry import chunks, table
from llmsys.comm.registry.descriptor import NO_REGION, TensorDescriptor, contiguous_strides, itemsize_of
from llmsys.comm.registry.remote import unknown_tensor
from llmsys.comm.registry.view import Addressable, View
from llmsys.comm.transports.base import Region, Transport
from llmsys.core.errors import DescriptorError, InputError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalTensor(Addressable[Region | None]):
    """A registered tensor. region: None if it has no elements."""

    descriptor: TensorDescriptor
    region: Region | None

    def view(self) -> View[Region | None]:
        return self.descriptor.view_in(self.region)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Memory:
    """What is to be registered, and the object that keeps it alive."""

    device: str
    address: int
    size_bytes: int
    owner: object


@dataclass(slots=True)
class _Shared:
    """A region and how many tensors are in it."""

    region: Region
    key: tuple[str, int, int]
    num_tensors: int = 0
    allocated: weakref.ref[torch.Tensor] | None = None


class TensorRegistry:
    """Registers tensors with a transport and exports where they are. Thread safe. A context manager: leaving it closes.

    A tensor's storage is registered once, whole, however many tensors are views of it, and stays alive until the last
    of them is unregistered. What cannot be noticed: a tensor that is resized, or given other memory (`set_`, `.data =`)
    after it was registered. Peers then still reach the old memory; unregister it first.

    Registering blocks while the transport pins the memory; other calls wait meanwhile.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._lock = threading.Lock()
        self._tensors: dict[str, LocalTensor] = {}
        self._owners: dict[str, object] = {}
        self._shared: dict[tuple[str, int, int], _Shared] = {}
        self._by_region: dict[int, _Shared] = {}

    @property
    def owner(self) -> str:
        """The endpoint's name, which every descriptor bears."""
        return self._transport.local.name

    @property
    def generation(self) -> int:
        """The endpoint's: another one after a restart, when old descriptors mean nothing."""
        return self._transport.local.generation

    def register(self, name: str, tensor: torch.Tensor, *, dims: Sequence[str] = ()) -> LocalTensor:
        """Makes `tensor` reachable as `name`. Any strides; its storage is kept alive, and nothing is copied.

        dims: names for its dimensions, say ("block", "token", "head", "size").

        Raises:
            InputError: the name is taken; see `tensors.memory_of`; the transport does not reach the tensor's device.
        """
        from llmsys.comm.registry import tensors

        memory = tensors.memory_of(name, tensor)
        kept = _Memory(
            device=memory.device,
            address=memory.storage_address,
            size_bytes=memory.storage_bytes,
            owner=memory.storage,
        )
        draft = self._draft(name, memory.address, memory.shape, memory.strides_bytes, memory.dtype, kept, dims)
        return self._add(draft, kept)

    def register_memory(
        self,
        name: str,
        address: int,
        size_bytes: int,
        *,
        shape: Sequence[int],
        dtype: str,
        strides_bytes: Sequence[int] | None = None,
        offset_bytes: int = 0,
        dims: Sequence[str] = (),
        device: str = "cpu",
        owner: object = None,
    ) -> LocalTensor:
        """Makes `size_bytes` at `address` reachable, with a tensor in it whose index 0 is at `offset_bytes`.

        strides_bytes: C order without it. dtype: a key of `descriptor.DTYPE_BYTES`. owner: kept alive; without one the
        caller must keep the memory until `unregister`.

        Raises:
            InputError: as `register`; or the elements do not fit into the memory.
        """
        try:
            itemsize = itemsize_of(dtype)
        except DescriptorError as error:
            raise _as_input(error) from error
        sizes = tuple(operator.index(size) for size in shape)
        if strides_bytes is None:
            strides_bytes = contiguous_strides(sizes, itemsize)
        strides = tuple(operator.index(stride) for stride in strides_bytes)
        memory = _Memory(
            device=device, address=operator.index(address), size_bytes=operator.index(size_bytes), owner=owner
        )
        draft = self._draft(name, memory.address + operator.index(offset_bytes), sizes, strides, dtype, memory, dims)
        return self._add(draft, memory)

    def allocate(
        self, name: str, shape: Sequence[int], dtype: torch.dtype | str, *, dims: Sequence[str] = ()
    ) -> torch.Tensor:
        """A zeroed, contiguous, registered CPU tensor in memory that peers on this host reach fastest.

        The registry owns the memory and frees it when the last tensor in it is unregistered. The returned tensor is
        empty afterwards; other tensors that view the memory must not be used any more.

        Raises:
            InputError: the name is taken, the transport cannot allocate, or a dtype or size is not usable.
        """
        from llmsys.comm.registry import tensors

        self._check_allocates(name)
        dtype_name = tensors.dtype_name(dtype)
        itemsize = itemsize_of(dtype_name)
        sizes = tuple(operator.index(size) for size in shape)
        size_bytes = math.prod(sizes) * itemsize
        # At a made-up address: everything but the address is checked before memory is taken.
        trial = _Memory(device="cpu", address=0, size_bytes=size_bytes, owner=None)
        draft = self._draft(name, 0, sizes, contiguous_strides(sizes, itemsize), dtype_name, trial, dims)
        if draft.region_id == NO_REGION:
            self._add(draft, trial)
            return tensors.empty_tensor(sizes, dtype)
        with self._lock:
            self._refuse_taken(name)
            region = self._transport.allocate(size_bytes)
            try:
                tensor = tensors.tensor_at(region.address, size_bytes, sizes, dtype)
            except BaseException:
                self._transport.release(region)
                raise
            shared = _Shared(region=region, key=("cpu", region.address, size_bytes), allocated=weakref.ref(tensor))
            self._enter(_placed(draft, region.address, region), shared, None)
        return tensor

    def unregister(self, name: str) -> None:
        """Ends peers' access to the tensor's memory, unless other registered tensors share it.

        Raises:
            InputError: there is no such tensor, or a request of ours still uses its memory. Nothing changes then.
        """
        with self._lock:
            tensor = self._get(name)
            if tensor.region is not None:
                self._leave(tensor.region)
            del self._tensors[name], self._owners[name]

    def __getitem__(self, name: str) -> LocalTensor:
        """Raises InputError: there is no such tensor."""
        with self._lock:
            return self._get(name)

    def __contains__(self, name: object) -> bool:
        with self._lock:
            return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        """Names, in the order of registration, as they are now."""
        with self._lock:
            return iter(tuple(self._tensors))

    def __len__(self) -> int:
        with self._lock:
            return len(self._tensors)

    def export(self, names: Iterable[str] | None = None) -> bytes:
        """The table of these tensors, or of all, for `RemoteRegistry.import_` at any peer. See `table` for its form.

        Raises:
            InputError: there is no such tensor, or a name comes twice.
        """
        wanted = None if names is None else list(names)
        with self._lock:
            chosen = list(self._tensors.values()) if wanted is None else [self._get(name) for name in wanted]
        if len({tensor.descriptor.name for tensor in chosen}) != len(chosen):
            raise InputError(
                "a tensor is exported twice in one table",
                expected="every name once",
                found=f"{len(chosen)} names, {len({tensor.descriptor.name for tensor in chosen})} different ones",
                fix="remove the repeated names",
            )
        return table.encode(
            owner=self.owner,
            generation=self.generation,
            regions={tensor.region.region_id: tensor.region for tensor in chosen if tensor.region is not None},
            tensors=[tensor.descriptor for tensor in chosen],
        )

    def export_chunks(self, max_bytes: int, names: Iterable[str] | None = None) -> list[bytes]:
        """The same table in messages of at most `max_bytes`, for an `Assembler` at the peer."""
        return chunks.split(self.export(names), max_bytes)

    def close(self) -> None:
        """Unregisters everything. Can be called again.

        Raises:
            InputError: a request still uses some memory; all other tensors are unregistered.
        """
        refused: InputError | None = None
        for name in self:
            try:
                self.unregister(name)
            except InputError as error:
                refused = refused or error
        if refused is not None:
            raise refused

    def __enter__(self) -> TensorRegistry:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _draft(
        self,
        name: str,
        address: int,
        shape: tuple[int, ...],
        strides_bytes: tuple[int, ...],
        dtype: str,
        memory: _Memory,
        dims: Sequence[str],
    ) -> TensorDescriptor:
        """The checked descriptor, before the region is there: in region 0, which will get its number."""
        empty = 0 in shape
        try:
            return TensorDescriptor(
                name=name,
                address=0 if empty else address,
                shape=shape,
                strides_bytes=strides_bytes,
                dtype=dtype,
                itemsize=itemsize_of(dtype),
                device=memory.device,
                owner=self.owner,
                generation=self.generation,
                region_id=NO_REGION if empty else 0,
                region_address=0 if empty else memory.address,
                region_bytes=0 if empty else memory.size_bytes,
                dims=tuple(dims),
            )
        except DescriptorError as error:
            raise _as_input(error) from error

    def _add(self, draft: TensorDescriptor, memory: _Memory) -> LocalTensor:
        with self._lock:
            self._refuse_taken(draft.name)
            if draft.region_id == NO_REGION:
                return self._enter(draft, None, None)
            key = (memory.device.partition(":")[0], memory.address, memory.size_bytes)
            shared = self._shared.get(key)
            if shared is None:
                shared = _Shared(region=self._register(draft.name, memory), key=key)
            return self._enter(_placed(draft, draft.address, shared.region), shared, memory.owner)

    def _check_allocates(self, name: str) -> None:
        if not self._transport.capabilities.allocates:
            raise InputError(
                f"transport {self._transport.name!r} cannot allocate tensor {name!r}",
                expected="a transport whose capabilities say allocates",
                found=f"{self._transport.capabilities}",
                fix="choose another transport, or make the tensor with torch and register it",
            )

    def _register(self, name: str, memory: _Memory) -> Region:
        kind = memory.device.partition(":")[0]
        devices = self._transport.capabilities.devices
        if kind not in devices:
            raise InputError(
                f"transport {self._transport.name!r} does not reach the memory of tensor {name!r}",
                expected=f"a tensor on {' or '.join(devices)}",
                found=f"a tensor on {memory.device}",
                fix=f"choose a transport built for {kind}, or register a copy on {devices[0]}",
            )
        return self._transport.register(memory.address, memory.size_bytes, device=kind, owner=memory.owner)

    def _enter(self, descriptor: TensorDescriptor, shared: _Shared | None, owner: object) -> LocalTensor:
        tensor = LocalTensor(descriptor=descriptor, region=None if shared is None else shared.region)
        self._tensors[descriptor.name] = tensor
        self._owners[descriptor.name] = owner
        if shared is not None:
            shared.num_tensors += 1
            self._shared[shared.key] = self._by_region[shared.region.region_id] = shared
        return tensor

    def _leave(self, region: Region) -> None:
        shared = self._by_region[region.region_id]
        if shared.num_tensors > 1:
            shared.num_tensors -= 1
            return
        self._transport.release(region)
        del self._by_region[region.region_id], self._shared[shared.key]
        tensor = None if shared.allocated is None else shared.allocated()
        if tensor is not None:
            from llmsys.comm.registry import tensors

            tensors.detach_from(tensor, region.address)

    def _get(self, name: str) -> LocalTensor:
        try:
            return self._tensors[name]
        except KeyError:
            known = {other: tensor.descriptor for other, tensor in self._tensors.items()}
            raise unknown_tensor(name, known, "this registry") from None

    def _refuse_taken(self, name: str) -> None:
        if name in self._tensors:
            raise InputError(
                f"there is a tensor {name!r} already",
                expected="a name for each tensor",
                found=f"{name!r} a second time",
                fix="unregister it first, or choose another name",
            )


def _placed(draft: TensorDescriptor, address: int, region: Region) -> TensorDescriptor:
    return replace(
        draft,
        address=address,
        region_id=region.region_id,
        region_address=region.address,
        region_bytes=region.size_bytes,
    )


def _as_input(error: DescriptorError) -> InputError:
    """The same complaint about arguments that the caller gave, not about what a peer sent."""
    return InputError(error.summary, expected=error.expected, found=error.found, fix=error.fix)
