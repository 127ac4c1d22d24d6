"""Lancet: overlap of all-to-all with computation in whole training graphs of mixture-of-experts models.

Not built yet.
"""
