"""The text and binary forms of plans: whole ones read back equal, damaged ones are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llmsys.core.errors import PlanError
from llmsys.core.specs import Architecture
from llmsys.dynapipe.plan import Plan, check_plan, from_bytes, from_text, to_bytes, to_text
from llmsys.dynapipe.plan.instructions import LoadInput
from tests.dynapipe.synthetic import toy_plan


def test_text_of_a_small_plan_is_readable() -> None:
    text = to_text(toy_plan("decoder_only", 7, data=3, pipeline=4))
    assert text.startswith("llmsys dynapipe plan, version 1\nplanner dynapipe\nsamples 7\n")
    assert "parallelism data=3 pipeline=4 tensor=1 num_chunks=1 zero_stage=0" in text
    assert "stages 0+2 0+2 0+2 0+2+head" in text and max(map(len, text.splitlines())) < 250


@pytest.mark.parametrize(
    "choice",
    [
        {"architecture": "decoder_only"},
        {"architecture": "encoder_decoder"},
        {"architecture": "decoder_only", "pipeline": 1},
        {"architecture": "encoder_decoder", "pipeline": 2, "num_chunks": 2},
        {"architecture": "decoder_only", "num_samples": 7, "data": 3, "pipeline": 4},
    ],
)
def test_forms_round_trip(choice: dict[str, Any]) -> None:
    plan = toy_plan(**choice)
    assert from_text(to_text(plan)) == plan and from_bytes(to_bytes(plan)) == plan
    assert to_text(from_bytes(to_bytes(plan))) == to_text(plan)
    assert hash(from_text(to_text(plan))) == hash(plan)


def test_bytes_are_few() -> None:
    plan = toy_plan("decoder_only", 400, pipeline=4)
    assert plan.num_micro_batches >= 40
    per_micro_batch = len(to_bytes(plan)) / plan.num_micro_batches
    assert per_micro_batch * 40 < 10_000


def all_samples(plan: Plan) -> list[int]:
    return sorted(sample for r in plan.replicas for m in r.micro_batches for sample in m.samples)


def accepted(read: Callable[[], Plan]) -> Plan | None:
    """What a reader makes of damaged input: a plan, or a PlanError. Any other exception fails the test."""
    try:
        return read()
    except PlanError as error:
        assert error.expected and error.found and error.fix
        return None


def test_truncated_text_is_refused(architecture: Architecture) -> None:
    text = to_text(toy_plan(architecture))
    for length in [*range(0, len(text.rstrip()), 7), *range(len(text) - 30, len(text.rstrip()))]:
        with pytest.raises(PlanError):
            from_text(text[:length])


def test_truncated_bytes_are_refused(architecture: Architecture) -> None:
    data = to_bytes(toy_plan(architecture))
    for length in range(len(data)):
        with pytest.raises(PlanError):
            from_bytes(data[:length])
    for extra in (b"\0", data):
        with pytest.raises(PlanError):
            from_bytes(data + extra)


def test_damaged_bytes_are_refused(architecture: Architecture) -> None:
    data = to_bytes(toy_plan(architecture, 14))
    rng = np.random.default_rng(0)
    for position in range(len(data)):
        for value in rng.integers(0, 256, 3).tolist():
            if value != data[position]:
                with pytest.raises(PlanError):
                    from_bytes(data[:position] + bytes([value]) + data[position + 1 :])
    for _ in range(200):
        with pytest.raises(PlanError):
            from_bytes(rng.bytes(int(rng.integers(0, 60))))


def test_damaged_text_is_refused_or_keeps_every_sample(architecture: Architecture) -> None:
    plan = toy_plan(architecture, 14)
    text = to_text(plan)
    rng = np.random.default_rng(0)
    num_refused = 0
    for number in range(1500):
        at = int(rng.integers(len(text)))
        sign = str(rng.integers(10)) if number % 3 else chr(rng.integers(32, 127))
        found = accepted(lambda at=at, sign=sign: from_text(text[:at] + sign + text[at + 1 :]))  # type: ignore[misc]
        num_refused += found is None
        if found is not None:
            assert_same_work(found, plan)
    assert num_refused > 1000


def assert_same_work(found: Plan, plan: Plan) -> None:
    """Numbers that describe the plan may be other ones; the samples and what is done with them may not."""
    check_plan(found)
    assert all_samples(found) == all_samples(plan)
    for mine, theirs in zip(found.replicas, plan.replicas, strict=True):
        for device in range(plan.parallelism.pipeline):
            assert mine.compute_order(device) == theirs.compute_order(device)
            loads = [[op.micro_batch for op in r.instructions[device] if type(op) is LoadInput] for r in (mine, theirs)]
            assert loads[0] == loads[1]


def test_text_with_tokens_lost_repeated_or_exchanged_is_refused(architecture: Architecture) -> None:
    plan = toy_plan(architecture, 14)
    lines = to_text(plan).splitlines()
    for number, line in enumerate(lines):
        tokens = line.split(" ")
        for i, token in enumerate(tokens):
            if token in ("planner", "dynapipe") or not token:
                continue
            lost, repeated = tokens[:i] + tokens[i + 1 :], [*tokens[:i], token, *tokens[i:]]
            for changed in (lost, repeated):
                text = "\n".join([*lines[:number], " ".join(changed), *lines[number + 1 :]])
                found = accepted(lambda text=text: from_text(text))  # type: ignore[misc]
                assert found is None or (changed is repeated and found == plan), " ".join(changed)
        for text in (lines[:number] + lines[number + 1 :], [*lines[: number + 1], *lines[number:]]):
            if line:
                assert accepted(lambda text=text: from_text("\n".join(text))) is None, line  # type: ignore[misc]
    first = next(i for i, line in enumerate(lines) if line.startswith("micro_batch 0"))
    assert lines[first + 1].startswith("micro_batch 1")
    lines[first], lines[first + 1] = lines[first + 1], lines[first]
    assert accepted(lambda: from_text("\n".join(lines))) is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("version 1", "version 2", "line 1 of the plan's text"),
        ("recompute=none", "recompute=some", "unknown schedule or recompute kind"),
        ("data=2", "data=0", "at least 1"),
        ("data=2", "data=two", "invalid literal"),
        ("F0.0[", "Q0.0[", "unknown instruction"),
        ("samples 40", "samples 41", "sample 40 nowhere"),
        ("device 1", "device 2", "device"),
    ],
)
def test_text_errors_say_where(old: str, new: str, message: str) -> None:
    text = to_text(toy_plan("decoder_only"))
    assert old in text
    with pytest.raises(PlanError) as info:
        from_text(text.replace(old, new, 1))
    assert message in str(info.value)


def test_bytes_errors_say_what() -> None:
    with pytest.raises(PlanError, match="these bytes are no plan"):
        from_bytes(b"")
    with pytest.raises(PlanError, match="these bytes are no plan"):
        from_bytes(to_text(toy_plan("decoder_only")).encode())
