"""Puts the report together: what this node knows of itself and what the others last said."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from umbra.api.report import Check, GroupReport, NodeReport
from umbra.cluster.group import Group, primary_of
from umbra.cluster.state import Role
from umbra.config import Config

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
Lag = tuple[int, float]


class Composer:
    """Reads the parts; computes nothing that they do not say.

    :param held: returns (messages, bytes) that this node holds for others.
    :param load: returns why this node should get no more messages to hold, or "".
    :param lag: returns {peer: (changes, seconds)} of what peers lack.
    :param notes: returns findings of the parts that do not make the group degraded.
    :param alone: returns how many messages no other node has.
    :param service: returns what the node says of the service addresses.
    """

    def __init__(
        self,
        config: Config,
        group: Group,
        held: Callable[[], tuple[int, int]],
        load: Callable[[], str],
        lag: Callable[[], Mapping[str, Lag]],
        notes: Callable[[], Sequence[Check]],
        alone: Callable[[], int] = lambda: 0,
        service: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self._config = config
        self._group = group
        self._held = held
        self._load = load
        self._lag = lag
        self._notes = notes
        self._alone = alone
        self._service = service
        self._boot_id = BOOT_ID.read_text(encoding="ascii").strip()

    def node_status(self) -> dict[str, Any]:
        """Return what this node tells its peers with each heartbeat."""
        state = self._group.state
        messages, size = self._held()
        change = state.durable.last_change
        return {
            "node": state.node,
            "site": self._config.site,
            "storage_id": state.durable.storage_id,
            "handing_to": state.durable.handing_to,
            "epoch": state.durable.epoch,
            "role": state.durable.role,
            "state": state.phase,
            "mode": state.durable.mode,
            "since": state.durable.since,
            "shadow_messages": messages,
            "shadow_bytes": size,
            "load": self._load(),
            "lag": self._lag(),
            "reasons": self._group.reasons(),
            "last_change": change.to_json() if change else None,
            "merged": state.durable.merged,
            "unshared": state.durable.unshared,
            "boot_id": self._boot_id,
            "clock": time.time(),
            "alone_messages": self._alone(),
            **self._group.describe(),
            **self._service(),
        }

    def report(self) -> GroupReport:
        """Return the group as this node sees it now."""
        own = self.node_status()
        statuses = {self._config.node: own}
        for peer in self._config.peers:
            statuses[peer.name] = self._group.statuses.get(peer.name, {"site": peer.site})
        primary = primary_of(statuses, self._reachable)
        leading = statuses[primary] if primary else {}
        reasons = list(leading.get("reasons", ()))
        if primary is None:
            reasons.append("no node is primary")
            gone = [name for name, status in statuses.items() if status.get("role") == Role.PRIMARY]
            reasons += [f"{name} was primary and does not answer" for name in gone]
            reasons += [r for status in statuses.values() for r in status.get("reasons", ())]
        serving = leading.get("state") in ("primary", "draining")
        protected = serving and leading.get("mode") == "protected" and not reasons
        if primary is not None and not serving and not reasons:
            reasons.append(f"{primary} does not serve: it is {leading.get('state')}")
        return GroupReport(
            group=self._config.group,
            node=self._config.node,
            protected=protected,
            reasons=tuple(dict.fromkeys(reasons)),
            epoch=int(leading.get("epoch", own["epoch"])),
            primary=primary,
            mode=str(leading.get("mode", "alone")),
            inventory_role=self._config.role,
            last_switchover=leading.get("last_change") or own["last_change"],
            nodes=tuple(self._node(name, statuses[name], leading) for name in sorted(statuses)),
            checks=(*self._checks(statuses), *self._group.checks(), *self._notes()),
            coordinator=str(own["coordinator"]),
            paused=bool(own.get("paused", False)),
            protected_set=tuple(own.get("protected_set", ())),
            service_addresses=self._config.service.addresses,
        )

    def _reachable(self, name: str) -> bool:
        return name == self._config.node or self._group.answers(name)

    def _node(self, name: str, status: Mapping[str, Any], leading: Mapping[str, Any]) -> NodeReport:
        changes, seconds = leading.get("lag", {}).get(name, (0, 0.0))
        return NodeReport(
            node=name,
            site=str(status.get("site", "")),
            role=str(status.get("role", "unknown")),
            state=str(status.get("state", "unknown")),
            reachable=self._reachable(name),
            lag_changes=int(changes),
            lag_s=round(float(seconds), 3),
            shadow_messages=int(status.get("shadow_messages", 0)),
            shadow_bytes=int(status.get("shadow_bytes", 0)),
            since=str(status.get("since", "")),
            reasons=tuple(status.get("reasons", ())),
            cause=str(status.get("cause", "")),
            policy=str(status.get("policy", "")),
            # What one had that does not answer now, nobody knows.
            service_addresses=tuple(status.get("service_addresses", ()))
            if self._reachable(name)
            else (),
        )

    def _checks(self, statuses: Mapping[str, Mapping[str, Any]]) -> Sequence[Check]:
        group, config = self._group, self._config
        checks = []
        for peer in config.peers:
            silent = group.silence(peer.name)
            text = (
                f"{peer.name} answered {silent:.1f} s ago"
                if silent is not None
                else f"{peer.name} has not answered yet"
            )
            bound = config.heartbeat.timeout
            checks.append(
                Check(f"peer {peer.name}", group.answers(peer.name), silent, bound, f"{text}.")
            )
        # A note, not a fault: the inventory's role counts on the first run only.
        checks.append(
            Check(
                "inventory role", True, group.state.durable.role, config.role,
                f"{config.node} is {group.state.durable.role}; the inventory says {config.role}.",
            )
        )  # fmt: skip
        return checks
