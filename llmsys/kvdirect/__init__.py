"""KVDirect: disaggregated serving in which the decode worker pulls KV blocks from the prefill worker.

`runtime.KvEndpoint` is the way in; the README of this folder has the protocol and what it guarantees. Planning and
simulation of the paper's serving experiments are not built yet.
"""
