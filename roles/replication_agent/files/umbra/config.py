"""The agent's configuration, ``/etc/umbra/agent.yml``: read, checked, and frozen.

All findings are reported at once, one sentence each, so that an administrator mends the file in one
go.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, fields
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any, TypeVar

import yaml

from umbra.cluster.protocol import Policy
from umbra.transport.selection import ShadowPreference, counting

Section = TypeVar("Section")
MAX_SHADOW_TIMEOUT = 60.0
"""Seconds. Postfix waits 120 for the milter's answer, of which the shadow's time is only a part."""
MAX_PROBES = 8  # umbra-helper takes no more at once
LONGEST_HOLD = 3600.0  # and opens the ports for no longer (seconds)
# Syncs at once: as many as the cores ask for by themselves, and as a person may set.
MOST_BY_CORES, MOST_WORKERS = 32, 64


class ConfigError(Exception):
    """The configuration cannot be used; ``findings`` holds one sentence for each reason."""

    def __init__(self, findings: list[str]) -> None:
        super().__init__("\n".join(findings))
        self.findings = findings


class ShadowPolicy(StrEnum):
    """What happens to a message that no shadow can take."""

    DEFER = "defer"
    ACCEPT = "accept"


class MirrorMode(StrEnum):
    """Whether a mailbox change waits for the shadow."""

    SYNC = "sync"
    ASYNC = "async"


class CoordinatorKind(StrEnum):
    """Who decides which node is primary."""

    STATIC = "static"
    ETCD = "etcd"


class Profile(StrEnum):
    """All times of the protocol with a witness together; see ``cluster.protocol.PROFILES``."""

    LAN_FAST = "lan-fast"
    DEFAULT = "default"
    WAN = "wan"


class HandoverPolicy(StrEnum):
    """What an ailing primary does."""

    AUTOMATIC = "automatic"
    ALARM = "alarm"


class StonithUse(StrEnum):
    """When the administrator's hook that switches another node off is run."""

    NEVER = "never"
    FORCED = "forced"
    ALWAYS = "always"


@dataclass(frozen=True)
class Endpoint:
    """Where something listens."""

    address: str
    port: int


@dataclass(frozen=True)
class Peer:
    """Another node of the group."""

    name: str
    site: str
    address: str
    port: int = 8686
    api_port: int = 8687


@dataclass(frozen=True)
class Transport:
    """Messages in transit. Times in seconds.

    :param shadow_copies: how many shadows whose copies count must have a message.
    :param shadow_max_size: MiB of shadow messages that are held for others at most; 0 is no limit
        but the disk.
    :param resubmit_after: from a failover until resubmission begins.
    :param safety_net_hold: for which delivered messages are kept; 0 keeps none.
    :param safety_net_max_size: MiB of them that are kept at most.
    """

    shadow_policy: ShadowPolicy = ShadowPolicy.DEFER
    shadow_timeout: float = 5.0
    shadow_copies: int = 1
    shadow_preference: ShadowPreference = ShadowPreference.PREFER_REMOTE
    shadow_max_size: int = 0
    resubmit_after: float = 1.0
    safety_net_hold: float = 172_800.0
    safety_net_max_size: int = 10_240


@dataclass(frozen=True)
class Mailbox:
    """Mailbox changes. Times in seconds.

    :param mirror_copies: how many shadows a change waits for.
    :param mirror_workers: syncs at once; 0 means twice the cores, at most ``MOST_BY_CORES``.
    :param verify_period: in which all users are compared once, in the background; 0 for never.
    """

    mirror_mode: MirrorMode = MirrorMode.SYNC
    mirror_copies: int = 1
    mirror_timeout: float = 5.0
    mirror_workers: int = 0
    verify_period: float = 0.0

    @property
    def workers(self) -> int:
        """How many syncs run at once."""
        return self.mirror_workers or min(2 * (os.cpu_count() or 1), MOST_BY_CORES)


@dataclass(frozen=True)
class Heartbeat:
    """How soon a silent peer is noticed. Times in seconds."""

    interval: float = 0.5
    timeout: float = 2.0


@dataclass(frozen=True)
class Fence:
    """The service ports.

    :param hold: seconds for which the kernel keeps them open without hearing from the agent.
    """

    ports: tuple[int, ...] = (25, 465, 587, 143, 993, 110, 995, 4190)
    hold: float = 10.0


@dataclass(frozen=True)
class Service:
    """The service addresses, which the primary has and nobody else."""

    addresses: tuple[str, ...] = ()


@dataclass(frozen=True)
class Coordinator:
    """Who decides which node is primary; all but ``kind`` is for ``etcd`` only.

    :param endpoints: ``https://ADDRESS:2379`` of each voter, this host's own first.
    :param policy: whether this node may take over by itself.
    :param preference: 0 takes over first.
    :param limit: automatic changes within an hour; after so many a person decides.
    """

    kind: CoordinatorKind = CoordinatorKind.STATIC
    profile: Profile = Profile.DEFAULT
    policy: Policy = Policy.AUTOMATIC
    preference: int = 0
    limit: int = 3
    endpoints: tuple[str, ...] = ()


@dataclass(frozen=True)
class HandoverRules:
    """When a node is ailing, and what it does then if it is primary.

    :param policy: with a coordinator, whether it gives its role away by itself.
    :param crashes: so many crashes of Postfix, or of Dovecot, make it ailing; 0 counts none.
    :param window: in so many seconds.
    :param free: less free space on a disk, in MiB, makes it ailing; 0 does not look.
    :param client_probes: addresses on the clients' side; when none answers, it is ailing.
    """

    policy: HandoverPolicy = HandoverPolicy.AUTOMATIC
    crashes: int = 2
    window: float = 600.0
    free: int = 32
    client_probes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stonith:
    """The hook that switches the former primary off; ``umbra-stonith@NODE.service`` runs it."""

    use: StonithUse = StonithUse.NEVER


@dataclass(frozen=True)
class Config:
    """What ``agent.yml`` says.

    ``role`` is the initial one: it counts only while there is no state.
    """

    group: str
    node: str
    site: str
    role: str
    link: Endpoint
    api: Endpoint
    peers: tuple[Peer, ...]
    transport: Transport = Transport()
    mailbox: Mailbox = Mailbox()
    heartbeat: Heartbeat = Heartbeat()
    fence: Fence = Fence()
    service: Service = Service()
    coordinator: Coordinator = Coordinator()
    handover: HandoverRules = HandoverRules()
    stonith: Stonith = Stonith()


def load(path: Path) -> Config:
    """Read and check ``path``. ConfigError with all findings if it cannot be used."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"{path} cannot be read: {error.strerror}."]) from None
    except yaml.YAMLError as error:
        raise ConfigError([f"{path} is not YAML: {' '.join(str(error).split())}."]) from None
    return parse(raw)


def parse(raw: object) -> Config:
    """Check a document that was read from YAML.

    ConfigError with all findings if it cannot be used.
    """
    reader = _Reader()
    top = reader.mapping("the file", raw)
    reader.unknown("the file", top, Config)
    names = {key: reader.text(key, top.get(key)) for key in ("group", "node", "site", "role")}
    if names["role"] not in ("primary", "shadow"):
        reader.findings.append(f"role is {names['role']!r}; it must be primary or shadow.")
    peers = tuple(
        reader.section(f"peers[{index}]", item, Peer)
        for index, item in enumerate(reader.sequence("peers", top.get("peers")))
    )
    link = reader.section("link", top.get("link"), Endpoint)
    api = reader.section("api", top.get("api"), Endpoint)
    transport = reader.section("transport", top.get("transport", {}), Transport)
    mailbox = reader.section("mailbox", top.get("mailbox", {}), Mailbox)
    heartbeat = reader.section("heartbeat", top.get("heartbeat", {}), Heartbeat)
    fence = reader.section("fence", top.get("fence", {}), Fence)
    service = reader.section("service", top.get("service", {}), Service)
    coordinator = reader.section("coordinator", top.get("coordinator", {}), Coordinator)
    handover = reader.section("handover", top.get("handover", {}), HandoverRules)
    stonith = reader.section("stonith", top.get("stonith", {}), Stonith)
    if reader.findings:
        raise ConfigError(reader.findings)
    assert stonith is not None
    assert handover is not None
    assert link is not None
    assert api is not None
    assert transport is not None
    assert mailbox is not None
    assert heartbeat is not None
    assert fence is not None
    assert service is not None
    assert coordinator is not None
    known = tuple(peer for peer in peers if peer)
    config = Config(**names, link=link, api=api, peers=known, transport=transport,
                    mailbox=mailbox, heartbeat=heartbeat, fence=fence,
                    service=service, coordinator=coordinator, handover=handover,
                    stonith=stonith)  # fmt: skip
    findings = list(_contradictions(config))
    if findings:
        raise ConfigError(findings)
    return config


def _contradictions(config: Config) -> list[str]:
    findings = []
    names = [config.node, *(peer.name for peer in config.peers)]
    findings += [
        f"the node name {name} is used twice."
        for name in sorted(set(names))
        if names.count(name) > 1
    ]
    addresses = [config.link.address, *(peer.address for peer in config.peers)]
    findings += [
        f"the address {item} is used twice."
        for item in sorted(set(addresses))
        if addresses.count(item) > 1
    ]
    findings += _copies(config)
    if not 0 <= config.mailbox.mirror_workers <= MOST_WORKERS:
        findings.append(
            f"mailbox.mirror_workers is {config.mailbox.mirror_workers}; it must be 0 to "
            f"{MOST_WORKERS}, since Dovecot has 100 processes for the syncs and all else."
        )
    if config.heartbeat.timeout <= config.heartbeat.interval:
        findings.append(
            f"heartbeat.timeout is {config.heartbeat.timeout:g} s; it must be over "
            f"heartbeat.interval, {config.heartbeat.interval:g} s."
        )
    if config.fence.hold < 2:
        findings.append(
            f"fence.hold is {config.fence.hold:g} s; "
            "under 2 s a busy agent would close its own ports."
        )
    if config.fence.hold > LONGEST_HOLD:
        findings.append(
            f"fence.hold is {config.fence.hold:g} s; it must be {LONGEST_HOLD:g} at most."
        )
    if config.link.port == config.api.port:
        findings.append(f"the peer link and the API have the same port, {config.link.port}.")
    findings += _service(config.service, addresses)
    findings += _voters(config)
    findings += _probes(config.handover, {*addresses, *config.service.addresses})
    return findings


def _service(service: Service, taken: list[str]) -> list[str]:
    found = []
    nodes = {ip_address(text) for text in taken}
    seen = set()
    for text in service.addresses:
        if not _is_address(text):
            found.append(
                f"service.addresses has {text!r}; write an IP address without a prefix length,"
                " for example 192.0.2.20."
            )
            continue
        address = ip_address(text)
        if address in seen:
            found.append(f"service.addresses has {address} twice.")
        if address in nodes:
            found.append(f"service.addresses has {address}, which is a node's own.")
        if not _usable(address):
            found.append(f"service.addresses has {address}, which no client can reach.")
        seen.add(address)
    return found


def _probes(rules: HandoverRules, own: Collection[str]) -> list[str]:
    found = []
    if len(rules.client_probes) > MAX_PROBES:
        found.append(f"handover.client_probes has over {MAX_PROBES} addresses; a few are enough.")
    mine = {ip_address(text) for text in own if _is_address(text)}
    for text in rules.client_probes:
        if not _is_address(text):
            found.append(f"handover.client_probes has {text!r}; it must be an IP address.")
        elif ip_address(text) in mine or not _usable(ip_address(text)):
            found.append(
                f"handover.client_probes has {text}, which says nothing of the clients' side; name"
                " a router or a server there."
            )
    return found


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _usable(address: IPv4Address | IPv6Address) -> bool:
    return not (
        address.is_multicast
        or address.is_loopback
        or address.is_link_local
        or address.is_unspecified
    )


def _voters(config: Config) -> list[str]:
    coordinator, nodes = config.coordinator, 1 + len(config.peers)
    if coordinator.kind is CoordinatorKind.STATIC:
        # A primary that comes back would take the third node, which may know as little as itself,
        # for the rest of the group.
        if nodes <= 2:
            return []
        return [
            f"coordinator.kind is static, which is for two mail hosts, and the group has {nodes};"
            " set etcd."
        ]
    count = len(coordinator.endpoints)
    found = []
    if count < 3 or count % 2 == 0:
        found.append(
            f"coordinator.endpoints names {count} voters; coordinator.kind etcd needs an odd number"
            " of them, three at least: name a host in umbra_witness, or set static."
        )
    if coordinator.limit < 1:
        found.append("coordinator.limit is 0; coordinator.policy blocked forbids every takeover.")
    found += [
        f"coordinator.endpoints has {item!r}; it must be https://ADDRESS:PORT."
        for item in coordinator.endpoints
        if not item.startswith("https://")
    ]
    return found


def _copies(config: Config) -> list[str]:
    return [*_shadow_copies(config), *_mirror_copies(config)]


def _mirror_copies(config: Config) -> list[str]:
    wanted = config.mailbox.mirror_copies
    if wanted < 1:
        return ["mailbox.mirror_copies is 0; a change needs at least one copy."]
    if config.peers and len(config.peers) < wanted:
        return [
            f"mailbox.mirror_copies is {wanted}, but only {len(config.peers)} of the group's nodes"
            " can be shadows; it would never be protected."
        ]
    return []


def _shadow_copies(config: Config) -> list[str]:
    if config.transport.shadow_timeout > MAX_SHADOW_TIMEOUT:
        return [
            f"transport.shadow_timeout is {config.transport.shadow_timeout:g} s; over"
            f" {MAX_SHADOW_TIMEOUT:g} s Postfix would give up on the agent before it has answered."
        ]
    wanted, preference = config.transport.shadow_copies, config.transport.shadow_preference
    if wanted < 1:
        return ["transport.shadow_copies is 0; a message needs at least one copy."]
    sites = {peer.name: peer.site for peer in config.peers}
    possible = len(counting(sites, sites, config.site, preference))
    if sites and possible < wanted:
        return [
            f"transport.shadow_copies is {wanted}, but only {possible} of the peers can count under"
            f" {preference} at site {config.site}; no message would be accepted."
        ]
    return []


class _Reader:
    """Takes values out of the document and notes what is wrong with each."""

    def __init__(self) -> None:
        self.findings: list[str] = []

    def mapping(self, name: str, value: object) -> Mapping[str, Any]:
        if isinstance(value, Mapping):
            return value
        self.findings.append(f"{name} must be a mapping of settings, not {_what(value)}.")
        return {}

    def sequence(self, name: str, value: object) -> list[Any]:
        if isinstance(value, list):
            return value
        self.findings.append(f"{name} must be a list, not {_what(value)}.")
        return []

    def unknown(self, name: str, value: Mapping[str, Any], schema: type) -> None:
        known = {field.name for field in fields(schema)}
        for key in sorted(set(map(str, value)) - known):
            self.findings.append(
                f"{name} has the unknown setting {key}; known are {', '.join(sorted(known))}."
            )

    def text(self, name: str, value: object) -> str:
        if isinstance(value, str) and value:
            return value
        self.findings.append(f"{name} must be a text, not {_what(value)}.")
        return ""

    def section(self, name: str, value: object, schema: type[Section]) -> Section | None:
        before = len(self.findings)
        source = self.mapping(name, value)
        self.unknown(name, source, schema)
        values: dict[str, Any] = {}
        for field in fields(schema):  # type: ignore[arg-type]
            label = f"{name}.{field.name}"
            if field.name in source:
                values[field.name] = self._value(label, str(field.type), source[field.name])
            elif field.default is MISSING:
                self.findings.append(f"{label} is missing.")
        return schema(**values) if len(self.findings) == before else None

    def _value(self, label: str, kind: str, value: object) -> object:
        match kind:
            case "int":
                return self._number(label, value, whole=True)
            case "float":
                return self._number(label, value, whole=False)
            case "tuple[int, ...]":
                return tuple(
                    self._number(label, item, whole=True) for item in self.sequence(label, value)
                )
            case "tuple[str, ...]":
                return tuple(self.text(label, item) for item in self.sequence(label, value))
            case "CoordinatorKind":
                return self._choice(label, value, CoordinatorKind)
            case "Profile":
                return self._choice(label, value, Profile)
            case "HandoverPolicy":
                return self._choice(label, value, HandoverPolicy)
            case "StonithUse":
                return self._choice(label, value, StonithUse)
            case "Policy":
                return self._choice(label, value, Policy)
            case "ShadowPolicy":
                return self._choice(label, value, ShadowPolicy)
            case "ShadowPreference":
                return self._choice(label, value, ShadowPreference)
            case "MirrorMode":
                return self._choice(label, value, MirrorMode)
        text = self.text(label, value)
        if label.endswith("address") and text:
            try:
                ip_address(text)
            except ValueError:
                self.findings.append(f"{label} is {text!r}; it must be an IP address.")
        return text

    def _choice(self, label: str, value: object, choices: type[StrEnum]) -> StrEnum | None:
        if value in list(choices):
            return choices(str(value))
        self.findings.append(f"{label} is {value!r}; it must be {' or '.join(choices)}.")
        return None

    def _number(self, label: str, value: object, *, whole: bool) -> float:
        if (
            isinstance(value, bool)
            or not isinstance(value, int if whole else (int, float))
            or value < 0
        ):
            self.findings.append(
                f"{label} must be a {'whole ' if whole else ''}number from 0, not {_what(value)}."
            )
            return 0
        if label.endswith(("port", "ports")) and not 0 < value < 65536:
            self.findings.append(f"{label} is {value}; a port is from 1 to 65535.")
        over = ("timeout", "interval", "fence.hold", "handover.window")
        if label.endswith(over) and value == 0:
            self.findings.append(f"{label} must be over 0 seconds.")
        return value


def _what(value: object) -> str:
    return "nothing" if value is None else repr(value)
