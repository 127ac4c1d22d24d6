"""Models that runtimes execute: transformer, mixture of experts, checkpoint folders, megatron-core modules.

Not built yet.
"""
