"""Models that runtimes execute: transformer parts, mixture of experts, megatron-core modules, and text to train on.

Checkpoint folders are not built yet.
"""
