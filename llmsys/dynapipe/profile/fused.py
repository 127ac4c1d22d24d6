"""The same model with fused attention: what padded micro-batches would cost with the kernels that varlen packing uses.

The authors' profile has unfused attention, which keeps a score matrix of quadratic size. To compare DynaPipe with
variable-length packing under one kind of kernel, its layers are priced by the formulas of ``varlen`` on the profile's
own grid.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from llmsys.core.costs import GridTable
from llmsys.dynapipe.profile.tables import LayerProfile, LayerTables
from llmsys.dynapipe.profile.varlen import VarlenLayer, varlen_terms


def fused_profile(profile: LayerProfile, *, attention_speedup: float = 1.0) -> LayerProfile:
    """``profile`` with memory-efficient attention that is ``attention_speedup`` times as fast (some seconds).

    Every grid point is filled: without score matrices memory limits decide what fits. Raises as ``varlen_terms``.
    """
    tables = {}
    for (tp, recompute), measured in profile.tables.items():
        terms = varlen_terms(profile, tp, recompute, attention_speedup=attention_speedup)
        encoder = None
        if measured.encoder is not None and terms.encoder is not None:
            encoder = _priced(measured.encoder, terms.encoder)
        tables[tp, recompute] = LayerTables(
            encoder=encoder,
            decoder=_priced(measured.decoder, terms.decoder),
            head=_priced(measured.head, terms.head),
        )
    origin = f"{profile.origin}, attention as if fused and {attention_speedup:g} times as fast"
    return dataclasses.replace(profile, tables=tables, origin=origin)


def _priced(measured: GridTable, layer: VarlenLayer) -> GridTable:
    grid = np.meshgrid(*measured.axes, indexing="ij")
    points = np.stack([axis.reshape(-1) for axis in grid], axis=1)
    columns = {name: values.reshape(measured.shape) for name, values in layer.padded_costs(points).items()}
    return GridTable(measured.axes, columns, axis_names=measured.axis_names)
