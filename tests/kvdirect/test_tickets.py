"""Tickets: round trips, and that a damaged one is always refused with the one error that says so."""

from __future__ import annotations

import contextlib
import random
from dataclasses import asdict, replace
from typing import Any

import msgpack
import numpy as np
import pytest

from llmsys.core.errors import DescriptorError, InputError
from llmsys.kvdirect import tickets
from llmsys.kvdirect.blocks import Blocks
from llmsys.kvdirect.holds import Access
from llmsys.kvdirect.layout import HEAD_MAJOR_ORDER, KvLayout
from llmsys.kvdirect.tickets import Ticket

LAYOUT = KvLayout(
    num_layers=2,
    num_blocks=9,
    block_tokens=4,
    num_kv_heads=4,
    head_dim=8,
    itemsize=2,
    tp_size=2,
    order=HEAD_MAJOR_ORDER,
)
TICKET = Ticket(
    request_id="request 1",
    address="127.0.0.1:1234",
    holder="prefill",
    generation=(1 << 63) - 1,
    peer_name="decode",
    access=Access.READ,
    tensors=("k", "v"),
    blocks=Blocks(ids=np.array([5, 0, 1 << 40]), tags=np.array([1, 1 << 50, 3])),
    block_dim=1,
    layout=LAYOUT,
)
EMPTY = Blocks(ids=np.array([], dtype=np.int64), tags=np.array([], dtype=np.int64))


def same(one: Ticket, other: Ticket) -> bool:
    def plain(ticket: Ticket) -> list[Any]:
        names = (
            "request_id",
            "address",
            "holder",
            "generation",
            "peer_name",
            "access",
            "tensors",
            "block_dim",
            "layout",
        )
        ids, tags = ticket.blocks.ids.tolist(), ticket.blocks.tags.tolist()
        return [*(getattr(ticket, name) for name in names), ids, tags]

    return plain(one) == plain(other)


@pytest.mark.parametrize(
    "ticket",
    [TICKET, replace(TICKET, access=Access.WRITE, layout=None, blocks=EMPTY, tensors=(), request_id="é")],
    ids=["full", "empty"],
)
def test_round_trip(ticket: Ticket) -> None:
    data = ticket.to_bytes()
    for form in (data, bytearray(data), memoryview(data)):
        read = Ticket.from_bytes(form)
        assert same(read, ticket) and isinstance(read.access, Access) and read.blocks.ids.dtype == np.int64


def test_every_truncation_and_every_changed_byte_is_refused() -> None:
    data = TICKET.to_bytes()
    for index in range(len(data)):
        with pytest.raises(DescriptorError):
            Ticket.from_bytes(data[:index])
        for flip in (1, 0x80, 0xFF):
            changed = bytearray(data)
            changed[index] ^= flip
            with pytest.raises(DescriptorError):
                Ticket.from_bytes(bytes(changed))
    with pytest.raises(DescriptorError):
        Ticket.from_bytes(data + b"\x00")


@pytest.mark.parametrize("data", [None, "text", 17, [1, 2, 3], b""], ids=repr)
def test_what_is_no_ticket_at_all(data: Any) -> None:
    with pytest.raises(DescriptorError, match="cannot be read"):
        Ticket.from_bytes(data)


def packed(values: object) -> bytes:
    """With a right checksum: as another version, or a program with a mistake, would send."""
    body = msgpack.packb(values)
    return tickets._HEAD.pack(tickets._MAGIC, tickets._VERSION, tickets._checksum(body)) + body


GOOD: list[Any] = ["r", "a:1", "prefill", 7, "decode", "read", ["k"], [1, 2], [3, 4], 0, None]
LAYOUT_VALUES: dict[str, Any] = asdict(LAYOUT)


def test_the_good_values_are_good() -> None:
    assert len(Ticket.from_bytes(packed(GOOD)).blocks) == 2
    assert Ticket.from_bytes(packed([*GOOD[:-1], LAYOUT_VALUES])).layout == LAYOUT


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (0, b"r"),
        (1, None),
        (2, 5),
        (3, "7"),
        (3, 7.5),
        (3, True),
        (4, None),
        (5, "append"),
        (5, ["read"]),
        (6, [1]),
        (6, None),
        (6, 5),
        (7, [1]),
        (7, [1, 1]),
        (7, [1, 2.5]),
        (7, [1, "2"]),
        (7, [1, None]),
        (7, [1, (1 << 63)]),
        (7, [[1], [2]]),
        (7, "12"),
        (7, None),
        (7, {1: 2, 3: 4}),
        (8, [3]),
        (8, [True, False]),
        (9, "0"),
        (10, []),
        (10, "layout"),
        (10, {}),
        (10, LAYOUT_VALUES | {"num_layers": 0}),
        (10, LAYOUT_VALUES | {"num_layers": "2"}),
        (10, LAYOUT_VALUES | {"num_layers": 2.0}),
        (10, LAYOUT_VALUES | {"tp_rank": 2}),
        (10, LAYOUT_VALUES | {"order": ["kv"]}),
        (10, LAYOUT_VALUES | {"order": 5}),
        (10, LAYOUT_VALUES | {"color": 5}),
        (10, {key: value for key, value in LAYOUT_VALUES.items() if key != "order"}),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_wrong_fields_are_refused(index: int, value: object) -> None:
    with pytest.raises(DescriptorError):
        Ticket.from_bytes(packed([*GOOD[:index], value, *GOOD[index + 1 :]]))


@pytest.mark.parametrize(
    "values", [None, 5, [], GOOD[:-1], [*GOOD, 1], dict.fromkeys(range(11))], ids=lambda v: repr(v)[:20]
)
def test_wrong_bodies_are_refused(values: object) -> None:
    with pytest.raises(DescriptorError):
        Ticket.from_bytes(packed(values))


def test_noise_with_a_right_checksum_is_refused_or_read() -> None:
    rng = random.Random(5)
    body = TICKET.to_bytes()[tickets._HEAD.size :]
    for _ in range(4000):
        changed = bytearray(body)
        for _ in range(rng.randint(1, 3)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        head = tickets._HEAD.pack(tickets._MAGIC, tickets._VERSION, tickets._checksum(changed))
        with contextlib.suppress(DescriptorError):
            Ticket.from_bytes(head + changed)


def test_pairs_of_local_and_remote_blocks() -> None:
    ids = TICKET.blocks.ids.tolist()
    local = Blocks(ids=np.array([7, 8, 9]), tags=np.ones(3, dtype=np.int64))
    assert TICKET.pairs_with(local).tolist() == [[7, ids[0]], [8, ids[1]], [9, ids[2]]]
    assert TICKET.pairs_with([(3, ids[2]), (4, ids[0])]).tolist() == [[3, ids[2]], [4, ids[0]]]
    assert TICKET.pairs_with(list(enumerate(TICKET.blocks.ids))).dtype == np.int64
    assert TICKET.pairs_with([]).shape == (0, 2)


@pytest.mark.parametrize(
    "blocks",
    [
        [5, 0],
        [[5, 0, 1]],
        [[[1, 5]]],
        [[1.0, 5.0]],
        [["1", "5"]],
        [[1, 6]],
        [[1, -1]],
        [[1, 1 << 70]],
        Blocks(ids=np.array([1]), tags=np.array([1])),
    ],
    ids=["flat", "three columns", "three dimensions", "not whole", "text", "a stranger", "negative", "huge", "too few"],
)
def test_what_are_no_pairs(blocks: Any) -> None:
    with pytest.raises(InputError):
        TICKET.pairs_with(blocks)
