"""The caching operator profiler (Fig. 7 of the paper): what one call takes on this device, measured once.

A `Bench` times calls; what it has measured before, also in an earlier process, comes from its cache. A time is the
median of repeats after a warm-up. Before each repeat the processor's caches are emptied and then filled with the
inputs that the step has just made, since a call on inputs that are all in the cache is too fast: in a step, weights
come from memory and activations from the cache.
"""

from __future__ import annotations

import logging
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from llmsys.core.errors import ConfigError, LlmsysError
from llmsys.lancet.runtime.profile_cache import ProfileCache

REFERENCE_FACTOR = 1.5
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    """A call is repeated ``num_warmup`` times untimed, then until both ``min_repeats`` and ``budget_ms`` are reached,
    but not more than ``max_repeats`` times. ``evict_mb``: the memory read to empty the processor's caches, 0 for none.
    """

    num_warmup: int = 2
    min_repeats: int = 5
    max_repeats: int = 30
    budget_ms: float = 20.0
    evict_mb: float = 16.0

    def __post_init__(self) -> None:
        if (
            not 1 <= self.min_repeats <= self.max_repeats
            or self.num_warmup < 0
            or min(self.budget_ms, self.evict_mb) < 0
        ):
            raise ConfigError(
                "the bench's settings are out of range",
                expected="1 <= min_repeats <= max_repeats, and nothing below 0",
                found=str(self),
                fix="set min_repeats, max_repeats, num_warmup, budget_ms and evict_mb",
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """A call that is ready to be timed, and the tensors that shall be in the processor's cache before it."""

    run: Callable[[], object]
    hot: tuple[torch.Tensor, ...] = ()


class Bench:
    """Times calls on one device, on the calling thread and with torch's current number of threads.

    ``environment`` is part of every key: torch's version, the device's name, the threads, and the settings that change
    what is measured. So one file serves several machines and versions. With the first time of an environment goes that
    of a fixed call. If this now takes another time by more than `REFERENCE_FACTOR`, the machine was not then what it is
    now (other programs, another clock): what was measured then is forgotten and measured again, and a warning says so.
    """

    def __init__(
        self, cache: ProfileCache | None = None, *, device: str = "cpu", settings: BenchSettings | None = None
    ) -> None:
        self.cache = cache if cache is not None else ProfileCache()
        self.device = torch.device(device)
        self.settings = settings or BenchSettings()
        self.num_measured = 0
        self._is_checked = False
        threads = torch.get_num_threads()
        self.environment = (
            f"torch {torch.__version__}, {device_name(self.device)}, {threads} threads, {self.settings.evict_mb:g} MB"
        )
        num_floats = int(self.settings.evict_mb * 1e6) // 4
        self._evicting = torch.zeros(num_floats) if self.device.type == "cpu" else None

    def time_ms(self, key: str, make: Callable[[], Prepared]) -> float:
        """What the call takes: from the cache, or by making and timing it. ``key`` says all that it depends on.

        Raises LlmsysError that names the key if the call fails.
        """
        if not self._is_checked:
            self._check_reference()
        full_key = f"{self.environment}: {key}"
        found = self.cache.get(full_key)
        if found is None:
            try:
                with torch.no_grad():
                    found = self._measure(make())
            except LlmsysError:
                raise
            except Exception as error:
                raise LlmsysError(
                    f"a call could not be measured: {key}",
                    expected="an operation that runs on random inputs of these shapes",
                    found=f"{type(error).__name__}: {error}",
                    fix="give this operation's time by hand, in llmsys.lancet.costs.TableCosts",
                ) from error
            self.num_measured += 1
            self.cache.put(full_key, found)
        return found

    def _check_reference(self) -> None:
        self._is_checked = True
        key = f"{self.environment}: reference"
        before = self.cache.get(key)
        now = self._reference_ms()
        if before is None:
            self.cache.put(key, now)
        elif not 1 / REFERENCE_FACTOR <= now / before <= REFERENCE_FACTOR:
            number = self.cache.drop(f"{self.environment}: ") - 1
            self.cache.put(key, now)
            text = "a fixed call takes %.3g ms, and took %.3g ms when %d times were measured; these are measured again"
            _log.warning(text, now, before, number)

    def _reference_ms(self) -> float:
        a = torch.ones(256, 256, device=self.device)
        return self._measure(Prepared(run=lambda: [a @ a for _ in range(4)], hot=(a,)))

    def _measure(self, prepared: Prepared) -> float:
        settings = self.settings
        for _ in range(settings.num_warmup):
            prepared.run()
        times: list[float] = []
        while len(times) < settings.max_repeats:
            if len(times) >= settings.min_repeats and sum(times) >= settings.budget_ms:
                break
            if self._evicting is not None:
                self._evicting.add_(1.0)
            for tensor in prepared.hot:
                tensor.clone()
            self._synchronize()
            start_s = time.perf_counter()
            prepared.run()
            self._synchronize()
            times.append((time.perf_counter() - start_s) * 1e3)
        return statistics.median(times)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def device_name(device: torch.device) -> str:
    """The processor's or the GPU's name."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


Values = Literal["any", "below", "experts", "slots"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operand:
    """A tensor argument: what its time depends on, and what may be in it.

    ``values``: "any"; "below" for indices, with ``limits`` (n,); "experts" and "slots", with ``limits`` (E, C), for the
    choices of a gate, of which no two have the same slot. ``is_hot``: the step has just made it.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    values: Values = "any"
    limits: tuple[int, ...] = ()
    is_hot: bool = False

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        values = "" if self.values == "any" else f",{self.values}{list(self.limits)}"
        return f"{dtype}{list(self.shape)}{list(self.stride)}{values}{',hot' if self.is_hot else ''}".replace(" ", "")

    def make(self, device: torch.device, seed: int = 0) -> torch.Tensor:
        rng = torch.Generator().manual_seed(seed)
        # What is repeated along a dimension of stride 0 is stored once.
        stored = tuple(1 if stride == 0 else size for size, stride in zip(self.shape, self.stride, strict=True))
        dense = torch.empty_strided(stored, self.stride, dtype=self.dtype)
        if self.values == "any":
            if self.dtype.is_floating_point:
                dense.copy_(torch.randn(stored, generator=rng))
            else:
                dense.zero_()
        elif self.values == "below":
            dense.copy_(torch.randint(0, max(1, self.limits[0]), stored, generator=rng))
        else:
            dense.copy_(_choices(self, rng)[tuple(slice(size) for size in stored)])
        return dense.to(device).expand(self.shape)

    def resized(self, axis: int, length: int) -> Operand:
        """With another length of a dimension, dense, in the same order of strides."""
        shape = tuple(length if dim == axis else size for dim, size in enumerate(self.shape))
        order = sorted(range(len(shape)), key=lambda dim: -self.stride[dim])
        stride, step = [0] * len(shape), 1
        for dim in reversed(order):
            stride[dim] = step if self.stride[dim] or self.shape[dim] == 1 else 0
            step *= shape[dim] if stride[dim] else 1
        return replace(self, shape=shape, stride=tuple(stride))


def _choices(operand: Operand, rng: torch.Generator) -> torch.Tensor:
    """Choices spread evenly over the experts in random order; of equal seeds, experts and slots belong together."""
    num_experts, capacity = operand.limits
    order = torch.randperm(math.prod(operand.shape), generator=rng).reshape(operand.shape)
    if operand.values == "experts":
        return order % num_experts
    slots = order // num_experts
    return torch.where(slots < capacity, slots, -1)
