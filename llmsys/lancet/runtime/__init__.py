"""What executes a plan on devices: the irregular all-to-all of parts, measuring, and the profiler of operations."""
