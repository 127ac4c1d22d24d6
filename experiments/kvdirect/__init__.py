"""Figures of KVDirect: what its transfers achieve on this machine, and where their time goes."""
