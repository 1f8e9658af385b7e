"""What the operator sees, computed once.

The same words in the command, the API, the metrics and the modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class NodeReport:
    """One node, as it says of itself, or as its peers remember it.

    :param lag_changes: mailbox changes that are not on this node yet; only the primary knows it.
    :param lag_s: age of the oldest of them, in seconds.
    :param shadow_messages: messages in transit that this node holds for others.
    """

    node: str
    site: str
    role: str
    state: str
    reachable: bool
    lag_changes: int
    lag_s: float
    shadow_messages: int
    shadow_bytes: int
    since: str
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Check:
    """One yes-or-no finding with its measure."""

    name: str
    passed: bool
    value: Any
    threshold: Any
    message: str


@dataclass(frozen=True)
class GroupReport:
    """The whole group, from the view of one node."""

    group: str
    node: str
    protected: bool
    reasons: tuple[str, ...]
    epoch: int
    primary: str | None
    mode: str
    inventory_role: str
    last_switchover: Mapping[str, Any] | None
    nodes: tuple[NodeReport, ...]
    checks: tuple[Check, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Return the body of ``GET /status``."""
        return asdict(self)

    def health(self) -> dict[str, Any]:
        """Return the body of ``GET /health``."""
        return {
            "status": "protected" if self.protected else "degraded",
            "reasons": list(self.reasons),
        }
