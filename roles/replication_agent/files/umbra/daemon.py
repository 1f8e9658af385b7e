"""``umbra-agent``: wires the parts together and runs them until it is told to stop.

Order of a start: state, store and ledger; then the peer link, so that the others see us; then the
entrances (milter, notifications), which
answer "not now" until this node is primary; last the tending loop, which alone opens ports. A crash
at any point leaves the ports
to the fence, which closes them when nobody renews it.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack, aclosing, closing, contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import uvloop
from prometheus_client import REGISTRY

from umbra.api.compose import Composer
from umbra.api.http import MAX_SWITCHOVER_S, Api
from umbra.api.metrics import ReportCollector
from umbra.cluster import heartbeat, words
from umbra.cluster.etcd import Etcd, client_tls
from umbra.cluster.group import Group, Protect
from umbra.cluster.handover import Handover
from umbra.cluster.machine import NotNow
from umbra.cluster.protocol import PROFILES
from umbra.cluster.quorum import QuorumGroup
from umbra.cluster.service_address import ServiceAddress
from umbra.cluster.static import StateError, StateFile
from umbra.cluster.switchover import Refused, Switchover
from umbra.config import Config, ConfigError, CoordinatorKind, load
from umbra.document import DocumentError
from umbra.mailbox.carrier import valid_user
from umbra.mailbox.doveadm import DoveadmError
from umbra.mailbox.part import Mailboxes
from umbra.mailbox.seeding import rate_of
from umbra.node.addresses import plan
from umbra.node.client import NodeHelper
from umbra.node.netlink import Netlink
from umbra.peer import frames
from umbra.peer.exchange import Exchange, PeerError
from umbra.peer.identity import Identity, PeerIdentity
from umbra.peer.link import PeerLink
from umbra.peer.server import Handler, PeerServer
from umbra.systemd import alive, notify, watchdog_interval
from umbra.transport import times
from umbra.transport.ids import valid
from umbra.transport.part import Messages
from umbra.transport.replay import UnknownMailbox
from umbra.transport.smtp import SmtpError
from umbra.transport.store import StoreError

log = logging.getLogger("umbra")

FAILOVER_TIMEOUT = 60.0
# How long a move takes at most once it has begun: its drain, two answers of the other node, and
# what is to be put in order afterwards (seconds).
MOVE_TIMEOUT = 60.0


@dataclass(frozen=True)
class Paths:
    """Where things are on the host; see docs/architecture.md."""

    config: Path = Path("/etc/umbra/agent.yml")
    tls: Path = Path("/etc/umbra/tls")
    state: Path = Path("/var/lib/umbra")
    run: Path = Path("/run/umbra")
    dsync: Path = Path("/run/umbra-dsync")
    delivery: Path = Path("/run/umbra-delivery")
    helper: Path = Path("/run/umbra-helper/helper.sock")
    missed: Path = Path("/var/lib/umbra-missed")
    events: Path = Path("/var/lib/umbra-events/sieve")
    milter: Path = Path("/var/spool/postfix/umbra/milter.sock")

    @property
    def token(self) -> Path:
        """The token of Dovecot's notifications, as a systemd credential where there is one."""
        directory = os.environ.get("CREDENTIALS_DIRECTORY")
        return Path(directory) / "notify-token" if directory else Path("/etc/umbra/notify.token")


class Agent:
    """One node's agent."""

    def __init__(self, config: Config, paths: Paths) -> None:
        self._config = config
        self._paths = paths
        identity = Identity(paths.tls, {peer.name: peer for peer in config.peers})
        self._helper = helper = NodeHelper(paths.helper)
        states = StateFile(paths.state / "state.json", config.group, config.node)
        settings = config.coordinator
        group: Group
        self._etcd: Etcd | None = None
        if settings.kind is CoordinatorKind.ETCD:
            tls = client_tls(
                paths.tls / "coordinator.crt", paths.tls / "node.crt", paths.tls / "node.key"
            )
            timeout = PROFILES[settings.profile].call
            self._etcd = Etcd(settings.endpoints, tls=tls, timeout=timeout)
            group = QuorumGroup(config, states, helper, self._etcd)
        else:
            group = Group(config, states, helper)
        self._group = group
        hello = {
            "version": frames.VERSION,
            "group": config.group,
            "node": config.node,
            "storage_id": group.state.durable.storage_id,
        }

        def links() -> dict[str, PeerLink]:
            return {
                peer.name: PeerLink(
                    peer.name, peer.address, peer.port, identity, hello, lambda: group.epoch
                )
                for peer in config.peers
            }

        group.links = links()
        self._mailboxes = Mailboxes(config, group, helper, paths)
        self._messages = Messages(config, group, helper, paths, self._mailboxes)
        parts = (helper, self._messages, self._mailboxes)
        if isinstance(group, QuorumGroup):
            group.control = links()
            self._switchover: Switchover = Handover(config, group, *parts)
        else:
            self._switchover = Switchover(config, group, *parts)
        group.catch_up = self._catch_up
        group.on_opening = self._messages.resubmit
        group.on_shadow = self._messages.give_back
        self._service = ServiceAddress(config, group, helper)
        self._mailboxes.being_delivered = self._messages.being_delivered
        self._composer = Composer(
            config,
            group,
            self._messages.held,
            self._messages.load,
            self._mailboxes.lag,
            self._notes,
            self._messages.alone,
            self._service.describe,
        )
        handlers: dict[str, Handler] = {
            **self._messages.handlers(),
            **self._mailboxes.handlers(),
            **self._service.handlers(),
            "status": heartbeat.answer(group, self._composer.node_status),
            "switchover": self._handle_switchover,
            "failover": self._handle_failover,
            **self._switchover.handlers(),
        }
        if isinstance(group, QuorumGroup):
            handlers.update(group.handlers())
        self._server = PeerServer(
            config.link.address, config.link.port, identity, hello, group.check_epoch, handlers
        )
        group.break_off = self._server.break_off
        self._api = Api(
            self._composer.report,
            {"queue": self._get_queue, "merged": self._get_merged},
            {
                "switchover": self._post_switchover,
                "failover": self._post_failover,
                "open": self._post_open,
                "pause": self._post_pause,
                "resubmit": self._post_resubmit,
                "parked": self._post_parked,
                "suspend": self._post_suspend,
                "resume": self._post_resume,
            },
            {"verify": self._post_verify, "seed": self._post_seed},
        )

    async def run(self) -> None:
        """Run until SIGTERM. Any part that fails ends the whole; systemd starts it anew."""
        group, config = self._group, self._config
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        REGISTRY.register(ReportCollector(self._composer.report))
        async with AsyncExitStack() as stack:
            if self._etcd is not None:
                await stack.enter_async_context(self._etcd)
            stack.callback(self._helper.close)
            await group.own_mail()
            for part in (self._messages, self._mailboxes):
                await part.open()
                stack.push_async_callback(part.close)
            await self._server.start()
            stack.push_async_callback(self._server.stop)
            await self._messages.listen()
            await self._mailboxes.listen()
            await self._api.start(self._paths.run / "api.sock", config.api.address, config.api.port)
            stack.push_async_callback(self._api.stop)
            async with asyncio.TaskGroup() as tasks:
                running = [
                    tasks.create_task(group.run()),
                    tasks.create_task(self._messages.run()),
                    tasks.create_task(self._mailboxes.run()),
                    tasks.create_task(self._service.run()),
                    tasks.create_task(self._switchover.left_behind.run()),
                    tasks.create_task(self._watchdog()),
                    *(
                        tasks.create_task(
                            heartbeat.watch(
                                link, group, self._composer.node_status, config.heartbeat
                            )
                        )
                        for link in group.links.values()
                    ),
                ]
                notify("READY=1")
                log.info(
                    "%s of group %s runs: %s, epoch %d",
                    config.node,
                    config.group,
                    self._composer.node_status()["state"],
                    group.epoch,
                )
                await stop.wait()
                notify("STOPPING=1")
                for task in running:
                    task.cancel()
            await group.stop()

    async def _watchdog(self) -> None:
        """Tell systemd that the loop turns, and what state it is in."""
        interval = watchdog_interval() or 5.0
        failed = ""
        while True:
            try:
                status, fault = self._state(), ""
            except Exception as error:
                # What is served does not depend on it, and the agent after this one would fail too.
                status = fault = f"no report can be made: {error!r}"
                if fault != failed:
                    log.exception("no report can be made")
            failed = fault
            try:
                alive(status)
            except OSError as error:
                log.warning("systemd does not hear that the agent is alive: %s", error)
            await asyncio.sleep(interval)

    def _state(self) -> str:
        report = self._composer.report()
        word = "protected" if report.protected else f"degraded: {'; '.join(report.reasons)}"
        return f"{self._composer.node_status()['state']}, {word}"

    async def _catch_up(self, peer: str, protect: Protect) -> None:
        async def all_there() -> None:
            # What came meanwhile went to the peer directly; this proves it.
            await self._messages.prove_caught_up(peer)
            await protect()

        await self._messages.catch_up(peer)
        await self._mailboxes.catch_up(peer, all_there)

    def _notes(self) -> Any:
        return [*self._messages.checks(), *self._mailboxes.checks(), *self._service.checks()]

    # -- operations of the API

    async def _get_queue(self) -> dict[str, Any]:
        try:
            return await self._messages.queue()
        except StoreError as error:
            raise Refused(f"{error}.") from None

    async def _get_merged(self) -> dict[str, Any]:
        try:
            return {"merged": await self._mailboxes.merged()}
        except OSError as error:
            raise Refused(f"the record cannot be read: {error}.") from None

    async def _post_switchover(self, body: dict[str, Any]) -> dict[str, Any]:
        to, dry_run, timeout_s = (
            body.get("to"),
            body.get("dry_run", False),
            body.get("timeout_s", 60.0),
        )
        if not isinstance(to, str) or not isinstance(dry_run, bool):
            raise ValueError("to must be a node's name and dry_run true or false")
        if not isinstance(timeout_s, (int, float)) or not 0 < timeout_s <= MAX_SWITCHOVER_S:
            raise ValueError(f"timeout_s must be from 0 to {MAX_SWITCHOVER_S:g} seconds")
        if self._group.is_primary():
            return await self._switchover.run(to, dry_run=dry_run, timeout_s=timeout_s)
        primary = self._composer.report().primary
        if primary is None or primary == self._config.node:
            raise Refused(
                f"no node serves as primary now: {'; '.join(self._composer.report().reasons)}."
            )
        try:
            return await self._group.links[primary].request(
                "switchover", body, timeout=timeout_s + MOVE_TIMEOUT
            )
        except PeerError as error:
            raise Refused(error.text) from None

    async def _handle_switchover(
        self, peer: PeerIdentity, args: Any, exchange: Exchange
    ) -> dict[str, Any]:
        if not self._group.is_primary():
            raise PeerError("refused", f"{self._config.node} is not the primary any more.")
        try:
            return await self._post_switchover(dict(args))
        except (Refused, ValueError) as error:
            raise PeerError("refused", str(error)) from None

    async def _post_failover(self, body: dict[str, Any]) -> dict[str, Any]:
        candidate = body.get("candidate") or self._config.node
        if candidate == self._config.node:
            if body.get("dry_run") is True:
                return self._switchover.loss()
            return await self._switchover.failover(
                accept_loss=body.get("accept_loss") is True,
                stonith=body.get("stonith", True) is not False,
            )
        if candidate not in self._group.links:
            raise Refused(f"{candidate} is no node of this group.")
        try:
            return await self._group.links[str(candidate)].request(
                "failover", body, timeout=FAILOVER_TIMEOUT
            )
        except PeerError as error:
            raise Refused(error.text) from None

    async def _handle_failover(
        self, peer: PeerIdentity, args: Any, exchange: Exchange
    ) -> dict[str, Any]:
        if args.get("candidate") != self._config.node:
            raise PeerError("protocol", "a failover of another node")
        try:
            return await self._post_failover(dict(args))
        except (Refused, ValueError) as error:
            raise PeerError("refused", str(error)) from None

    async def _post_pause(self, body: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(on := body.get("on"), bool):
            raise ValueError("on must be true or false")
        if not isinstance(self._group, QuorumGroup):
            raise Refused("this group has no coordinator, so there is no automatic failover.")
        try:
            return {"paused": on, "changed": await words.pause(self._group.driver, on)}
        except (NotNow, OSError) as error:
            raise Refused(f"{error}.") from None

    async def _post_resubmit(self, body: dict[str, Any]) -> dict[str, Any]:
        if not self._group.is_primary():
            raise Refused(
                f"{self._config.node} is not the primary;"
                f" messages are replayed on {self._composer.report().primary or 'the primary'}."
            )
        now = time.time()
        recipient, dry_run = body.get("recipient"), body.get("dry_run", False)
        if not isinstance(recipient, str) or "@" not in recipient or not recipient.isprintable():
            raise ValueError("recipient must be a mail address")
        if not isinstance(dry_run, bool):
            raise ValueError("dry_run must be true or false")
        hold = self._config.transport.safety_net_hold
        if not hold:
            raise Refused("safety_net_hold is 0, so nothing is kept that could be sent again.")
        since = times.parse(str(body.get("since") or f"{hold:.0f}s"), now)
        until = times.parse(str(body.get("until") or "0s"), now)
        if since >= until:
            raise ValueError(
                f"since ({times.shown(since)}) must be before until ({times.shown(until)})"
            )
        try:
            result = await self._messages.replay(recipient, since, until, dry_run=dry_run)
        except (UnknownMailbox, SmtpError, StoreError, OSError) as error:
            raise Refused(f"{error}.") from None
        return {
            "recipient": recipient,
            "since": times.shown(since),
            "until": times.shown(until),
            "dry_run": dry_run,
            **result,
        }

    async def _post_parked(self, body: dict[str, Any]) -> dict[str, Any]:
        """Drop one of the messages that were set aside, or have all tried again."""
        shadow_id = body.get("drop")
        if shadow_id is None:
            self._must_be_primary("Messages are carried on")
            self._messages.resubmit()
            return {"changed": True}
        if not valid(shadow_id):
            raise ValueError("drop must be a shadow id")
        try:
            if not await self._messages.drop(shadow_id):
                raise Refused(f"{shadow_id} is none of the messages that were set aside here.")
        except StoreError as error:
            raise Refused(f"{error}.") from None
        return {"changed": True}

    async def _post_suspend(self, body: dict[str, Any]) -> dict[str, Any]:
        user, reason = self._suspendable(body), body.get("reason")
        if not isinstance(reason, str) or not reason.isprintable() or not 0 < len(reason) <= 200:
            raise ValueError("reason must be a text of at most 200 characters")
        if user and not await self._mailboxes.knows(user):
            raise Refused(f"the user {user} is unknown.")
        try:
            await self._mailboxes.suspend(user, reason)
        except OSError as error:
            raise Refused(f"it could not be written down: {error}.") from None
        return {"user": user, "suspended": True}

    async def _post_resume(self, body: dict[str, Any]) -> dict[str, Any]:
        user = self._suspendable(body)
        try:
            return {"user": user, "changed": await self._mailboxes.unsuspend(user)}
        except OSError as error:
            raise Refused(f"it could not be written down: {error}.") from None

    def _suspendable(self, body: dict[str, Any]) -> str:
        user = body.get("user", "")
        if user != "" and not valid_user(user):
            raise ValueError("user must be a user's name, or nothing for all")
        self._must_be_primary("The mirror is suspended and resumed")
        return str(user)

    async def _post_verify(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        users = body.get("users", [])
        if not isinstance(users, list) or not all(valid_user(user) for user in users):
            raise ValueError("users must be a list of users' names")
        self._must_be_primary("Users are compared")
        try:
            async with aclosing(
                self._mailboxes.verify(
                    users,
                    bodies=body.get("bodies") is True,
                    repair=body.get("repair") is True,
                )
            ) as rows:
                async for row in rows:
                    yield row
        except DoveadmError as error:
            raise Refused(f"{error}.") from None
        yield {"done": True}

    async def _post_seed(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        node, rate = body.get("node"), rate_of(body.get("rate", 0))
        self._must_be_primary("Nodes are seeded")
        if node not in self._group.links:
            raise Refused(f"{node} is no other node of this group.")
        if not self._group.answers(str(node)):
            raise Refused(f"{node} does not answer.")
        if self._mailboxes.suspended:
            raise Refused("the mirror of all mailboxes is suspended: umbractl resume.")
        async with aclosing(self._mailboxes.seed(str(node), rate)) as rows:
            async for row in rows:
                yield row
        if not self._group.is_primary():
            yield {"done": False, "reasons": [f"{self._config.node} is not primary any more"]}
        else:
            yield {"done": True}

    def _must_be_primary(self, what: str) -> None:
        if not self._group.is_primary():
            primary = self._composer.report().primary
            raise Refused(f"{what} on the primary{f', {primary}' if primary else ''}.")

    async def _post_open(self, body: dict[str, Any]) -> dict[str, Any]:
        return await self._switchover.open_by_force()


def _check_host(config: Config) -> int:
    """Say what this host lacks for the configuration."""
    if not config.service.addresses:
        return 0
    with closing(Netlink()) as kernel:
        found = plan(kernel.entries(), map(ip_address, config.service.addresses))
    for problem in found.problems:
        print(f"{problem[0].upper()}{problem[1:]}.", file=sys.stderr)
    return 1 if found.problems else 0


@contextmanager
def sole(state: Path) -> Iterator[None]:
    """Have this directory to oneself; OSError while another agent's process has it.

    Two would share the node's ports. systemd starts the next one also when a disk that hangs keeps
    the one before from ending.
    """
    with (state / "lock").open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(error.errno, "another agent works with it", str(state)) from None
        yield


def main() -> int:
    """Entry point of ``umbra-agent``."""
    parser = argparse.ArgumentParser(
        prog="umbra-agent", description="The replication agent of umbra.mail."
    )
    parser.add_argument("--config", type=Path, default=Paths.config)
    parser.add_argument(
        "--check-config", type=Path, metavar="FILE",
        help="say what is wrong with FILE on this host, and end",
    )  # fmt: skip
    options = parser.parse_args()
    try:
        config = load(options.check_config or options.config)
    except ConfigError as error:
        for finding in error.findings:
            print(finding, file=sys.stderr)
        return 1
    if options.check_config:
        return _check_host(config)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # The format needs none of this, and each message in transit has its line.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    try:
        paths = Paths(config=options.config)
        with sole(paths.state):
            uvloop.run(Agent(config, paths).run())
    except (StateError, DocumentError, OSError, ExceptionGroup) as error:
        log.error("umbra-agent ends: %s", error, exc_info=isinstance(error, ExceptionGroup))
        return 1
    return 0
