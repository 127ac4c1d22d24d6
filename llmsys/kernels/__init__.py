"""Triton kernels, each with its torch reference: KV block moves, MoE dispatch and combine, paged attention.

Not built yet.
"""
