"""Shared communication: tensor registry, transports, all-to-all, point-to-point, plan store, rank launch."""
