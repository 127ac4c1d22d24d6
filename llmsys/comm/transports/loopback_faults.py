"""What may go wrong in the loopback transport, drawn from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from llmsys.core.errors import InputError

LossPoint = Literal["never", "connect", "mid_batch", "completion", "after"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Faults of the requests and messages that one endpoint sends. All are allowed by the contract in `base`.

    What is drawn depends on the seed, the peer's number and the request's, not on the timing of threads.

    max_delay_s: a request or message takes up to so much longer, so those of other peers overtake it.
    reorder: several batches of one peer are under way at once and end in any order; peers are served in any order.
    lose_at, loss_chance: with this chance for each batch (for "connect": for each connect), the peer is lost: before
        it is connected; after some bytes of a batch; after all bytes, before completion is known; or right after.
    duplicate_chance: a message is sent twice. It must be delivered once all the same.
    """

    seed: int = 0
    max_delay_s: float = 0.0
    reorder: bool = False
    lose_at: LossPoint = "never"
    loss_chance: float = 1.0
    duplicate_chance: float = 0.0

    def __post_init__(self) -> None:
        chances = (self.loss_chance, self.duplicate_chance)
        if self.max_delay_s < 0 or not all(0 <= chance <= 1 for chance in chances):
            raise InputError(
                "these faults cannot be drawn",
                expected="max_delay_s >= 0 and chances of 0 to 1",
                found=f"max_delay_s={self.max_delay_s}, loss_chance={chances[0]}, duplicate_chance={chances[1]}",
                fix="correct the value",
            )

    def draw(self, what: str, peer_id: int, number: int) -> float:
        """From [0, 1), the same for the same arguments and seed."""
        return random.Random(f"{self.seed}/{what}/{peer_id}/{number}").random()

    def delay_s(self, what: str, peer_id: int, number: int) -> float:
        return self.max_delay_s * self.draw(f"delay of {what}", peer_id, number) if self.max_delay_s else 0.0

    def loses(self, at: LossPoint, peer_id: int, number: int) -> bool:
        return self.lose_at == at and self.draw("loss", peer_id, number) < self.loss_chance

    def duplicates(self, peer_id: int, number: int) -> bool:
        return self.draw("duplicate", peer_id, number) < self.duplicate_chance
