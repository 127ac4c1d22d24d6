"""Figures of Lancet (MLSys 2024): simulated on the paper's clusters, and measured on this machine."""
