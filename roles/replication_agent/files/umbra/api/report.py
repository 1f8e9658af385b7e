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
    :param cause: why it is in its state; only with a coordinator, like ``policy``.
    :param policy: whether it takes over by itself.
    :param service_addresses: which of the group's service addresses it has now.
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
    cause: str = ""
    policy: str = ""
    service_addresses: tuple[str, ...] = ()


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
    """The whole group, from the view of one node.

    :param coordinator: who decides which node is primary: ``static`` (a person) or ``etcd``.
    :param paused: automatic failover is off by an operator's wish.
    :param protected_set: the shadows that have all that was acknowledged, by the coordinator.
    :param service_addresses: the addresses that the primary has, and nobody else.
    """

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
    coordinator: str = "static"
    paused: bool = False
    protected_set: tuple[str, ...] = ()
    service_addresses: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the body of ``GET /status``."""
        return asdict(self)

    def health(self) -> dict[str, Any]:
        """Return the body of ``GET /health``."""
        return {
            "status": "protected" if self.protected else "degraded",
            "reasons": list(self.reasons),
        }
