"""Triton kernels, each with its torch reference: KV block moves, MoE routing, dispatch and combine.

`kv_blocks` gathers, scatters and re-lays out the blocks of paged KV caches. `moe` has the custom ops of
mixture-of-experts layers. Paged attention is not built yet.
"""
