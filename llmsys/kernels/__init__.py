"""Triton kernels, each with its torch reference: KV block moves, MoE dispatch and combine, paged attention.

`kv_blocks` gathers, scatters and re-lays out the blocks of paged KV caches. The others are not built yet.
"""
