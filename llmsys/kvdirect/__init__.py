"""KVDirect: disaggregated serving in which the decode worker pulls KV blocks from the prefill worker.

Not built yet.
"""
