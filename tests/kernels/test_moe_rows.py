"""The Triton kernels of dispatch and combine against their torch reference.

They run in Triton's interpreter here, in a second copy of their module, since Triton decides when it decorates. They
are also compiled for a GPU, with the arguments of real launches, and run where there is one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from llmsys.kernels.moe import moe_route, reference, rows

KERNELS = ("_dispatch_kernel", "_combine_kernel", "_weights_grad_kernel")
TOLERANCES = {torch.float16: 2e-3, torch.float32: 1e-6, torch.float64: 1e-14}


def copy_of_rows(*, interpret: bool) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        if interpret:
            patch.setenv("TRITON_INTERPRET", "1")
        else:
            patch.delenv("TRITON_INTERPRET", raising=False)
        spec = importlib.util.spec_from_file_location(f"rows_interpreted_{interpret}", rows.__file__)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def interpreted() -> ModuleType:
    module = copy_of_rows(interpret=True)
    assert module.INTERPRETED
    return module


def case(
    num_tokens: int, top_k: int, capacity: int, hidden: int, dtype: torch.dtype, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(num_tokens * 7 + hidden)
    scores = torch.randn(num_tokens, 5, generator=rng)
    experts, slots, _ = moe_route(scores, torch.zeros(5, dtype=torch.int64), "top_k", top_k, capacity)
    found = {
        "x": torch.randn(num_tokens, hidden, generator=rng).to(dtype),
        "buffer": torch.randn(5, capacity, hidden, generator=rng).to(dtype),
        "weights": torch.rand(num_tokens, top_k, generator=rng),
        "experts": experts,
        "slots": slots,
    }
    return {name: tensor.to(device) for name, tensor in found.items()}


def assert_equal_to_reference(kernels: ModuleType, given: dict[str, torch.Tensor], *, exact: bool) -> None:
    x, buffer, weights, *choices = given.values()
    sizes = buffer.shape[:2]
    tolerance = 0.0 if exact else TOLERANCES[x.dtype]
    for factor in (None, weights, weights.to(x.dtype)):
        found, wanted = (module.dispatch(x, factor, *choices, *sizes) for module in (kernels, reference))
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
        found, wanted = (module.combine(buffer, factor, *choices) for module in (kernels, reference))
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    found, wanted = (module.combine_weights_grad(x, buffer, *choices) for module in (kernels, reference))
    # Dot products are added in another order.
    tolerance = 1e-12 if x.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "capacity", "hidden"),
    [(0, 2, 3, 8), (1, 1, 1, 1), (13, 1, 2, 48), (21, 2, 4, 100), (9, 5, 9, 33), (70, 3, 20, 64), (5, 3, 2, 1500)],
)
def test_kernels_equal_the_reference(
    interpreted: ModuleType, num_tokens: int, top_k: int, capacity: int, hidden: int, dtype: torch.dtype
) -> None:
    given = case(num_tokens, top_k, capacity, hidden, dtype)
    assert_equal_to_reference(interpreted, given, exact=True)


def test_all_dropped(interpreted: ModuleType) -> None:
    given = case(9, 2, 3, 20, torch.float32)
    given["slots"].fill_(-1)
    given["buffer"].fill_(torch.nan)
    given["weights"].fill_(torch.nan)
    assert_equal_to_reference(interpreted, given, exact=True)
    assert not interpreted.combine(given["buffer"], given["weights"], given["experts"], given["slots"]).any()


def test_tensors_that_are_views(interpreted: ModuleType) -> None:
    given = case(12, 2, 4, 40, torch.float32)
    plain = {name: tensor.clone() for name, tensor in given.items()}
    for name in ("x", "buffer", "weights", "experts", "slots"):
        # Every other column of a wider tensor, whose other columns are out of range.
        wide = torch.full((*given[name].shape, 2), 99, dtype=given[name].dtype)
        wide[..., 0] = given[name]
        given[name] = wide[..., 0]
        assert not given[name].is_contiguous()
    x, buffer, weights, *choices = given.values()
    assert torch.equal(
        interpreted.dispatch(x, weights, *choices, 5, 4),
        reference.dispatch(plain["x"], plain["weights"], plain["experts"], plain["slots"], 5, 4),
    )
    assert torch.equal(
        interpreted.combine(buffer, weights, *choices),
        reference.combine(plain["buffer"], plain["weights"], plain["experts"], plain["slots"]),
    )


def test_ids_out_of_range_touch_no_memory(interpreted: ModuleType) -> None:
    given = case(8, 2, 3, 16, torch.float32)
    x, buffer, weights, experts, slots = given.values()
    wrong = slots.clone()
    wrong[0], wrong[1] = 3, -7
    experts[2], experts[3] = 5, -1
    dropped = slots.clone()
    dropped[:4] = -1
    expected = reference.dispatch(x, weights, experts.clamp(0, 4), dropped, 5, 3)
    assert torch.equal(interpreted.dispatch(x, weights, experts, wrong, 5, 3), expected)
    expected = reference.combine(buffer, weights, experts.clamp(0, 4), dropped)
    assert torch.equal(interpreted.combine(buffer, weights, experts, wrong), expected)


class NoGpu:
    """Stands for a Hopper GPU, which compiling does not need."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


class CompileOnly:
    """Takes a kernel's place: compiles for the arguments of a launch, as a launch would, and stops there."""

    def __init__(self, kernel: Any, ptx: list[str]) -> None:
        self.kernel = kernel
        self.ptx = ptx

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            self.ptx.append(self.kernel.warmup(*arguments, grid=grid, **options).asm["ptx"])

        return launch


def test_the_kernels_compile_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        assert triton.knobs.nvidia.ptxas.path
    except RuntimeError as missing:
        pytest.skip(f"this triton has no ptxas: {missing}")
    compiled = copy_of_rows(interpret=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", NoGpu())
    ptx: list[str] = []
    for name in KERNELS:
        monkeypatch.setattr(compiled, name, CompileOnly(getattr(compiled, name), ptx))
    x, buffer, weights, *choices = case(64, 2, 16, 768, torch.bfloat16).values()
    compiled.dispatch(x, None, *choices, 5, 16)
    compiled.dispatch(x, weights, *choices, 5, 16)
    compiled.combine(buffer, None, *choices)
    compiled.combine(buffer, weights, *choices)
    compiled.combine_weights_grad(x, buffer, *choices)
    assert len(ptx) == 5 and all(".target sm_90" in text for text in ptx)
    assert "v4.b32" in ptx[0]  # 16 bytes a thread at a time


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    for sizes in ((0, 2, 3, 8), (21, 2, 4, 100), (4096, 4, 1500, 1024)):
        assert_equal_to_reference(copy_of_rows(interpret=False), case(*sizes, dtype, "cuda"), exact=False)
