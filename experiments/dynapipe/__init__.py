"""DynaPipe's figures (EuroSys 2024): planner, simulator and, where it runs, the runtime.

The paper's text was not available to us: figures and settings are those of its public artifact.
"""
