"""How unevenly experts are chosen, and what parts of an uneven batch cost against even ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmsys.core.errors import ConfigError, InputError
from llmsys.lancet.data import read_shipped

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSkew:
    """The load of each expert before the capacity cuts it, in units of the mean load; ``loads`` has mean 1.

    Every source rank and every stretch of the batch is taken to load the experts alike. ``experts_per_link``: that many
    neighbours are reached over one link: those of a device inside a node, those of a node between nodes that have one
    network for all their devices. ``capacity_factor``: the capacity over the mean load.
    """

    loads: tuple[float, ...]
    capacity_factor: float
    experts_per_link: int

    @classmethod
    def of(cls, loads: ArrayLike, *, capacity_factor: float, experts_per_link: int, seed: int = 0) -> LoadSkew:
        """Loads of any scale; which expert has which, so which link leads to the busy ones, is drawn by ``seed``."""
        values = np.asarray(loads, dtype=float)
        if values.ndim != 1 or not len(values) or not (values >= 0).all() or values.sum() <= 0:
            raise InputError(
                "expert loads are not counts",
                expected="a list of numbers of at least 0 with a positive sum",
                found=f"shape {values.shape}",
                fix="pass one number of selections for each expert",
            )
        if len(values) % experts_per_link or capacity_factor <= 0:
            raise ConfigError(
                "experts do not spread evenly over the links, or their capacity is not positive",
                expected=f"a multiple of experts_per_link = {experts_per_link} experts, capacity_factor above 0",
                found=f"{len(values)} experts, capacity_factor {capacity_factor}",
                fix="set experts_per_link and capacity_factor",
            )
        shuffled = np.random.default_rng(seed).permutation(values / values.mean())
        return cls(loads=tuple(shuffled.tolist()), capacity_factor=capacity_factor, experts_per_link=experts_per_link)

    def part_rows(self, num_parts: int) -> FloatArray:
        """Rows that each part brings to each expert, in units of the capacity; shape (num_parts, num_experts).

        Capacity passing: the first parts fill a busy expert, and what comes after is dropped, as unpartitioned.
        """
        steps = np.arange(num_parts + 1)[:, None] / num_parts
        filled = np.minimum(steps * np.asarray(self.loads) / self.capacity_factor, 1.0)
        return np.diff(filled, axis=0)

    def buffer_share(self, num_parts: int) -> float:
        """Rows of the dense buffers of one part over the capacity: of the fullest expert, mean over the parts."""
        return float(self.part_rows(num_parts).max(axis=1).mean())

    def sent_share(self, num_parts: int) -> float:
        """Rows that go over the busiest link in one part, over the capacity of its experts; mean over the parts."""
        by_link = self.part_rows(num_parts).reshape(num_parts, -1, self.experts_per_link).mean(axis=2)
        return float(by_link.max(axis=1).mean())

    @property
    def dropped_share(self) -> float:
        """Of all selections, those that find no place."""
        return 1.0 - float(np.minimum(self.loads, self.capacity_factor).sum() / len(self.loads))


def shipped_skew(
    profile: str, num_experts: int, *, capacity_factor: float, experts_per_link: int, seed: int = 0
) -> LoadSkew:
    """The shipped loads of a trained model, read at ``num_experts`` levels. ConfigError for an unknown ``profile``."""
    profiles = read_shipped("load_quantiles.json")["loads"]
    if profile not in profiles:
        raise ConfigError(
            "there are no loads of that name",
            expected="one of " + ", ".join(profiles),
            found=repr(profile),
            fix="choose one of these",
        )
    curve = profiles[profile]
    levels = (np.arange(len(curve)) + 0.5) / len(curve)
    loads = np.interp((np.arange(num_experts) + 0.5) / num_experts, levels, curve)
    return LoadSkew.of(loads, capacity_factor=capacity_factor, experts_per_link=experts_per_link, seed=seed)
