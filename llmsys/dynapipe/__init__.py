"""DynaPipe: micro-batching and pipeline schedules for multi-task training with varying sequence lengths."""
