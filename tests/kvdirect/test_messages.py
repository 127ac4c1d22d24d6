"""Messages: round trips, and that nothing else is taken for one."""

from __future__ import annotations

import random
from dataclasses import fields

import msgpack
import pytest

from llmsys.core.errors import InputError
from llmsys.kvdirect import messages
from llmsys.kvdirect.holds import MAX_REQUEST_ID_BYTES, Outcome

LONGEST_ID = "é" * (MAX_REQUEST_ID_BYTES // 2)
MESSAGES: list[messages.Message] = [
    messages.TensorsAsked(exchange_id=7),
    messages.TensorsChunk(exchange_id=1 << 40, chunk=bytes(range(256))),
    messages.Complete(request_id="r", digest=b"0123456789abcdef"),
    messages.Complete(request_id=LONGEST_ID, digest=b""),
    messages.Abort(request_id="r"),
    *(messages.Ended(request_id="r", outcome=outcome.value) for outcome in Outcome),
    messages.Cancelled(request_id="a b\n"),
    messages.Application(payload=b""),
]
IDS = [f"{type(message).__name__}-{index}" for index, message in enumerate(MESSAGES)]


@pytest.mark.parametrize("message", MESSAGES, ids=IDS)
def test_round_trip(message: messages.Message) -> None:
    assert messages.decode(messages.encode(message)) == message


def test_every_kind_is_tried() -> None:
    assert {type(message) for message in MESSAGES} == set(messages._KINDS.values())


@pytest.mark.parametrize("message", MESSAGES, ids=IDS)
def test_every_truncation_is_refused(message: messages.Message) -> None:
    data = messages.encode(message)
    for size in range(len(data)):
        with pytest.raises(InputError):
            messages.decode(data[:size])
    with pytest.raises(InputError):
        messages.decode(data + b"\x00")


@pytest.mark.parametrize("message", MESSAGES, ids=IDS)
def test_fields_of_another_type_or_number_are_refused(message: messages.Message) -> None:
    version, kind, *values = msgpack.unpackb(messages.encode(message))
    names = [field.name for field in fields(message)]
    for index in range(len(names)):
        for other in (None, 1.5, True, [], {}, b"x" if isinstance(values[index], str) else "x"):
            changed = [*values[:index], other, *values[index + 1 :]]
            with pytest.raises(InputError):
                messages.decode(msgpack.packb([version, kind, *changed]))
    for changed in (values[:-1], [*values, 1]):
        with pytest.raises(InputError):
            messages.decode(msgpack.packb([version, kind, *changed]))


@pytest.mark.parametrize(
    "content",
    [
        None,
        1,
        "text",
        [],
        [1],
        {1: 2, 3: 4},
        [2, "Abort", "r"],
        [True, "Abort", "r"],
        [1, "Unheard", "r"],
        [1, b"Abort", "r"],
        [1, ["Abort"], "r"],
        [1, "Abort", LONGEST_ID + "x"],
        [1, "Ended", "r", "fine"],
        [1, "Message", "r"],
    ],
    ids=repr,
)
def test_other_content_is_refused(content: object) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        messages.decode(msgpack.packb(content))


def test_nothing_but_messages_and_refusals_comes_out_of_noise() -> None:
    rng = random.Random(3)
    num_read = 0
    for round_ in range(6000):
        data = bytearray(messages.encode(rng.choice(MESSAGES)) if round_ % 2 else rng.randbytes(rng.randint(0, 40)))
        for _ in range(rng.randint(1, 3) if data else 0):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            messages.decode(bytes(data))
            num_read += 1
        except InputError:
            pass
    assert 0 < num_read < 3000


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(InputError):
        messages.decode(b"\x91" * 100_000)
