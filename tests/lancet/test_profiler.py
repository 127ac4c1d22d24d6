"""The caching profiler: its file, its keys, and the measured costs of a captured step."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import pytest
import torch

from llmsys.core.errors import InputError, LlmsysError
from llmsys.lancet.runtime.profile_cache import ProfileCache
from llmsys.lancet.runtime.profiler import Bench, BenchSettings, Operand, Prepared, Values

QUICK = BenchSettings(num_warmup=0, min_repeats=1, max_repeats=3, budget_ms=0.0, evict_mb=0.0)


def test_what_was_saved_is_read(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "costs.json"
    cache = ProfileCache(path)
    cache.put("a", 1.25)
    cache.put("b", 0.1 + 0.2)
    cache.save()
    again = ProfileCache(path)
    assert (again.get("a"), again.get("b"), again.get("c")) == (1.25, 0.1 + 0.2, None)
    assert [entry.name for entry in path.parent.iterdir()] == ["costs.json"]


def test_what_others_saved_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    first, second = ProfileCache(path), ProfileCache(path)
    first.put("a", 1.0)
    second.put("b", 2.0)
    first.save()
    second.save()
    assert ProfileCache(path).get("a") == 1.0 and ProfileCache(path).get("b") == 2.0


@pytest.mark.parametrize("damage", ["cut", "number", "version", "text", "list"])
def test_a_damaged_file_is_measured_again_and_kept_aside(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "costs.json"
    cache = ProfileCache(path)
    cache.put("a", 1.0)
    cache.save()
    text = path.read_text()
    content = json.loads(text)
    damaged = {
        "cut": text[: len(text) // 2],
        "number": text.replace("1.0", "7.0"),
        "version": json.dumps(content | {"version": 0}),
        "text": "not JSON",
        "list": "[]",
    }[damage]
    assert damaged != text
    path.write_text(damaged)
    with caplog.at_level(logging.WARNING):
        reader = ProfileCache(path)
    assert len(reader) == 0 and "measured again" in caplog.text
    assert (tmp_path / "costs.json.unusable").read_text() == damaged
    reader.put("a", 3.0)
    reader.save()
    assert ProfileCache(path).get("a") == 3.0


def test_a_path_that_is_no_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be used"):
        ProfileCache(tmp_path)
    (tmp_path / "file").touch()
    cache = ProfileCache(None)
    cache.path = tmp_path / "file" / "costs.json"
    cache.put("a", 1.0)
    with pytest.raises(InputError, match="cannot be used"):
        cache.save()


def test_no_time_is_refused() -> None:
    for ms in (float("nan"), float("inf"), -1.0):
        with pytest.raises(InputError, match="no time"):
            ProfileCache().put("a", ms)


def test_a_call_is_measured_once_and_then_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def make() -> Prepared:
        return Prepared(run=lambda: calls.append(time.sleep(0.01)))

    monkeypatch.setattr(Bench, "_reference_ms", lambda self: 1.0)
    first = Bench(ProfileCache(tmp_path / "costs.json"), settings=QUICK)
    ms = first.time_ms("sleep", make)
    assert 10 <= ms < 1000 and len(calls) == 1
    assert first.time_ms("sleep", make) == ms and len(calls) == 1
    first.cache.save()
    second = Bench(ProfileCache(tmp_path / "costs.json"), settings=QUICK)
    assert second.time_ms("sleep", make) == ms and len(calls) == 1 and second.num_measured == 0


@pytest.mark.parametrize(("now_ms", "is_kept"), [(1.4, True), (0.7, True), (1.6, False), (0.6, False)])
def test_times_of_a_machine_that_was_slower_or_faster_are_measured_again(
    now_ms: float, is_kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "costs.json"
    monkeypatch.setattr(Bench, "_reference_ms", lambda self: 1.0)
    first = Bench(ProfileCache(path), settings=QUICK)
    first.time_ms("old", lambda: Prepared(run=lambda: None))
    first.cache.put(f"{first.environment}: call", 123.0)
    first.cache.put("another machine: call", 5.0)
    first.cache.save()
    monkeypatch.setattr(Bench, "_reference_ms", lambda self: now_ms)
    second = Bench(ProfileCache(path), settings=QUICK)
    with caplog.at_level(logging.WARNING):
        found = second.time_ms("call", lambda: Prepared(run=lambda: None))
    assert (found == 123.0) == is_kept == ("measured again" not in caplog.text)
    second.cache.put("something: new", 1.0)
    second.cache.save()
    saved = ProfileCache(path)
    assert saved.get("another machine: call") == 5.0
    assert (saved.get(f"{first.environment}: call") == 123.0) == is_kept
    assert (saved.get(f"{first.environment}: old") is not None) == is_kept


def test_threads_and_settings_are_part_of_the_key() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = Bench(settings=QUICK).environment
        torch.set_num_threads(2)
        two = Bench(settings=QUICK).environment
    finally:
        torch.set_num_threads(threads)
    cold = Bench(settings=BenchSettings(evict_mb=1.0)).environment
    assert len({one, two, cold}) == 3
    assert str(torch.__version__) in one


def test_a_call_that_fails_is_named() -> None:
    with pytest.raises(LlmsysError, match="could not be measured: divide"):
        Bench(settings=QUICK).time_ms("divide", lambda: Prepared(run=lambda: 1 // 0))


def test_a_resized_operand_keeps_its_order_of_strides() -> None:
    transposed = Operand(shape=(4, 6), stride=(1, 4), dtype=torch.float32)
    part = transposed.resized(1, 3)
    assert (part.shape, part.stride) == ((4, 3), (1, 4))
    assert transposed.resized(0, 2).stride == (1, 2)
    expanded = Operand(shape=(4, 6), stride=(1, 0), dtype=torch.float32).resized(0, 2)
    assert (expanded.shape, expanded.stride) == ((2, 6), (1, 0))
    assert part.make(torch.device("cpu")).stride() == (1, 4)


@pytest.mark.parametrize("what", ["any", "below", "experts", "slots"])
def test_what_is_repeated_is_stored_once(what: Values) -> None:
    """Backward passes of means and sums have inputs of stride 0; writing to such a tensor is an error in torch."""
    for dtype in (torch.float32, torch.int64) if what == "any" else (torch.int64,):
        limits = (5,) if what == "below" else (4, 3)
        operand = Operand(shape=(6, 2), stride=(0, 1), dtype=dtype, values=what, limits=limits)
        made = operand.make(torch.device("cpu"))
        assert (made.shape, made.stride(), made.dtype) == ((6, 2), (0, 1), dtype)
        assert made.untyped_storage().nbytes() == 2 * made.itemsize
        assert torch.equal(made, made[:1].expand(6, 2))
        if what == "below":
            assert int(made.min()) >= 0 and int(made.max()) < 5
    scalar = Operand(shape=(3, 4), stride=(0, 0), dtype=torch.float32).make(torch.device("cpu"))
    assert scalar.stride() == (0, 0) and scalar.untyped_storage().nbytes() == 4 and scalar.isfinite().all()


def test_choices_have_slots_of_their_own() -> None:
    both = [
        Operand(shape=(10, 2), stride=(2, 1), dtype=torch.int64, values=what, limits=(4, 3))  # type: ignore[arg-type]
        for what in ("experts", "slots")
    ]
    experts, slots = (operand.make(torch.device("cpu")).flatten().tolist() for operand in both)
    taken = [(e, s) for e, s in zip(experts, slots, strict=True) if s >= 0]
    assert len(set(taken)) == len(taken) == 12
    assert max(experts) == 3 and max(slots) == 2
