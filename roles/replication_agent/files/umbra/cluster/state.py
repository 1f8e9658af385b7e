"""What a node knows of its group. Plain values; ``machine`` decides on them, ``group`` acts.

What must survive a power cut is in ``Durable``; the rest is learned anew after each start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Role(StrEnum):
    """What a node is in its group."""

    PRIMARY = "primary"
    SHADOW = "shadow"


class Mode(StrEnum):
    """Whether what the primary acknowledges is on two nodes first."""

    PROTECTED = "protected"
    ALONE = "alone"


class Phase(StrEnum):
    """What a node is doing now."""

    STARTING = "starting"  # was primary; closed until a peer confirms that nobody has taken over
    PRIMARY = "primary"
    DRAINING = "draining"  # still primary; takes no new work
    HANDING_OVER = "handing-over"  # gave up its right; does not know yet whether the other took it
    SHADOW = "shadow"
    HELD = "held"  # closed until a person decides


@dataclass(frozen=True)
class Change:
    """A change of primary that has happened."""

    old: str
    new: str
    at: str  # ISO 8601, UTC
    planned: bool
    outage_s: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it with the words of the API."""
        return {
            "from": self.old,
            "to": self.new,
            "at": self.at,
            "planned": self.planned,
            "outage_s": self.outage_s,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Change:
        """Read what ``to_json`` wrote. KeyError if something is missing."""
        return cls(value["from"], value["to"], value["at"], value["planned"], value.get("outage_s"))


@dataclass(frozen=True)
class Durable:
    """What is on disk before it counts.

    :param epoch: the highest epoch seen. The primary's right to act is of exactly this epoch.
    :param handing_to: set while this node has given up its right to another and does not know the
        outcome.
    :param merged: this node's mailboxes hold nothing that the group's primary lacks. Not so for a
        node that is new, or that lost its role without handing it over.
    :param merged_under: only with a coordinator: the epoch under which ``merged`` became true. Whom
        a person has promoted since then may lack what this node has.
    :param unshared: what this node has and the primary lacks may have been acknowledged; without a
        meaning where ``merged``.
    :param offered: the epoch that was offered to ``handing_to``.
    :param acted: only with a coordinator: the last epoch under which this node opened its services,
        0 once reconciled. None in a state of the static coordinator, whose epochs count by
        themselves.
    :param marked: the mailboxes' disk has this store's mark; see ``Helper.do_mail_store``.
    :param silence: only with a coordinator: see ``protocol.Durable``; None if it is not known.
    """

    storage_id: str
    epoch: int
    role: Role
    mode: Mode
    since: str
    handing_to: str | None = None
    offered: int = 0
    merged: bool = False
    last_change: Change | None = None
    acted: int | None = None
    unshared: bool = True
    silence: float | None = None
    marked: bool = False
    merged_under: int = 0


@dataclass(frozen=True)
class PeerView:
    """What this node knows of a peer, from its last answer.

    :param synchronous: messages wait for this peer; only true on the primary.
    :param complete: it has every mailbox change too, and those that come wait for it.
    """

    reachable: bool = False
    epoch: int = 0
    role: Role = Role.SHADOW
    phase: Phase = Phase.SHADOW
    storage_id: str = ""
    synchronous: bool = False
    complete: bool = False
    reason: str = "not heard of yet"


@dataclass(frozen=True)
class State:
    """Everything that decisions are made of.

    :param copies: how many peers must be complete for the mode ``protected``.
    :param others: how many peers the group has.
    """

    node: str
    durable: Durable
    phase: Phase
    peers: Mapping[str, PeerView] = field(default_factory=dict)
    alone_reason: str = ""
    held_reason: str = ""
    copies: int = 1
    others: int = 1

    @property
    def serving(self) -> bool:
        """Whether the service ports are open."""
        return self.phase in (Phase.PRIMARY, Phase.DRAINING)

    @property
    def enough(self) -> bool:
        """Whether as many peers as must have every message and change."""
        return (
            sum(view.synchronous and view.complete for view in self.peers.values()) >= self.copies
        )

    @property
    def protected(self) -> bool:
        """Whether this node is a primary of which every acknowledged thing is on two nodes."""
        return self.serving and self.durable.mode is Mode.PROTECTED
