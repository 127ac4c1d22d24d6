"""The RDMA tensor registry: where tensors lie in the memory of which endpoint, so that peers can address any block.

KVDirect's CONNECT step: endpoints exchange the addresses and keys of all their tensors once. From
then on any of them reads or writes any block of any other as base + offset, without asking its owner.

    exported = registry.export()                                    # at the owner; send it, once
    remote = RemoteRegistry.import_(peer, exported, transport)      # at the peer
    batch = block_copies([registry["k"]], [remote["k"]], local_ids, remote_ids)
    transport.read(peer, batch).wait(timeout_s=10)

Nothing here moves bytes. torch is loaded by `TensorRegistry.register` and `allocate` only.
"""

from llmsys.comm.registry.batches import block_copies, copies
from llmsys.comm.registry.chunks import Assembler
from llmsys.comm.registry.descriptor import DTYPE_BYTES, TensorDescriptor
from llmsys.comm.registry.local import LocalTensor, TensorRegistry
from llmsys.comm.registry.remote import RemoteRegistry, RemoteTensor
from llmsys.comm.registry.runs import Runs
from llmsys.comm.registry.view import Addressable, View

__all__ = [
    "DTYPE_BYTES",
    "Addressable",
    "Assembler",
    "LocalTensor",
    "RemoteRegistry",
    "RemoteTensor",
    "Runs",
    "TensorDescriptor",
    "TensorRegistry",
    "View",
    "block_copies",
    "copies",
]
