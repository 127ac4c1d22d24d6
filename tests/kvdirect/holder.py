"""A hold table with a pool, for tests that need no endpoints."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmsys.kvdirect.blocks import BlockPool, Blocks
from llmsys.kvdirect.config import KvConfig
from llmsys.kvdirect.holds import Access, Hold, HoldTable, Outcome

CONFIG = KvConfig(unclaimed_timeout_s=60.0, quarantine_s=30.0)


@dataclass
class Holder:
    """A table with a pool of ten blocks, and what it said had ended."""

    config: KvConfig = CONFIG
    ended: list[tuple[str, Outcome]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pool = BlockPool(10)
        self.table = HoldTable(self.config, self._ended)

    def _ended(self, hold: Hold, outcome: Outcome) -> None:
        # Whoever hears of the end may use the blocks at once, and may ask the table.
        assert self.table.outcome(hold.request_id) is outcome
        self.ended.append((hold.request_id, outcome))

    def open(
        self,
        request_id: str,
        *,
        peer: str = "decode",
        access: Access = Access.READ,
        num_blocks: int = 2,
        now_s: float = 0.0,
    ) -> Blocks:
        blocks = self.pool.allocate(num_blocks)
        self.table.open(request_id, self.pool, blocks, peer_name=peer, access=access, now_s=now_s)
        return blocks

    def complete(self, request_id: str, peer_id: int, blocks: Blocks) -> Outcome:
        outcome = self.table.complete(request_id, peer_id, blocks.digest())
        self.table.tell(answered=request_id)
        return outcome
