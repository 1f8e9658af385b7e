"""What the transport asks of the cluster; the cluster implements it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from umbra.peer.link import PeerLink


class NotPrimary(Exception):
    """The node may not act as primary any more; the text says why."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An SMTP answer in place of an acceptance.

    ``code``, enhanced status and one plain sentence.
    """

    code: int
    enhanced: str
    text: str


class Group(Protocol):
    """The redundancy group as the transport sees it."""

    @property
    def epoch(self) -> int:
        """The epoch under which this node acts."""
        ...

    def accepting(self) -> Refusal | None:
        """None while mail may be accepted.

        421 while draining, 451 when this node is not primary.
        """
        ...

    def shadows(self) -> Sequence[PeerLink]:
        """The peers each of which must have a message before it is acknowledged.

        Empty while alone.
        """
        ...

    async def shadow_failed(self, peer: str, reason: str) -> None:
        """Take ``peer`` out of :meth:`shadows`, durably, before returning. Raises NotPrimary."""
        ...

    def may_acknowledge(self, epoch: int, holders: Collection[str]) -> bool:
        """Return whether what ``holders`` have stored under ``epoch`` may be acknowledged."""
        ...

    def begin_work(self) -> AbstractContextManager[None]:
        """Count the work in the ``with`` block as in flight: a drain waits for it."""
        ...
