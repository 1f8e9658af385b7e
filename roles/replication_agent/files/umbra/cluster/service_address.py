"""The group's service addresses, from the agent's side.

The helper has them for as long as it holds the ports open, so the decision who has them is none of
its own: it is the lease of the ports. Here is the rest: the primary tells the others which clients
it has on them; the next primary tells these clients that their connections are gone; and everybody
sees where the addresses are.

What a shadow knows of the clients is in its memory only. If its agent dies, the primary sees that
it knows none, and tells it again; if both die at once, clients notice by their own time-outs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from ipaddress import ip_address
from typing import Any

from prometheus_client import Counter, Gauge

from umbra.api.report import Check
from umbra.cluster.group import Group
from umbra.config import Config
from umbra.node import connections
from umbra.node.client import NodeHelper
from umbra.node.helper import HelperError
from umbra.node.packets import Connection
from umbra.peer.exchange import Exchange, PeerError
from umbra.peer.identity import PeerIdentity
from umbra.peer.server import Handler

log = logging.getLogger(__name__)

TELL_PAUSE = 1.0
TELL_TIMEOUT = 5.0
LAST_TELL_TIMEOUT = 0.5
TICKLE_PAUSES = (0.0, 0.3, 0.7)
"""When clients are told after an address has come here, in seconds from one time to the next."""
GRACE = 3.0
"""For how long an address may be at another place than the primary: as long as a change takes."""

_known = Gauge(
    "umbra_service_address_clients",
    "Connections of the primary that this node would tell of when it takes over",
)
_tickled = Counter(
    "umbra_service_address_tickled",
    "Connections of a former primary whose clients were told that they are gone",
)


class ServiceAddress:
    """Where the group's service addresses are, and who is connected to them."""

    def __init__(
        self,
        config: Config,
        group: Group,
        helper: NodeHelper,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._node = config.node
        self._group = group
        self._helper = helper
        self._clock = clock
        self._addresses = [ip_address(text) for text in config.service.addresses]
        self._ends = connections.endpoints(self._addresses, config.fence.ports)
        self._clients: list[Connection] = []
        self._told: dict[str, frozenset[connections.Row]] = {}
        # A list must not arrive after a newer one.
        self._telling: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._gone: asyncio.Queue[list[Connection]] = asyncio.Queue()
        self._problems: Sequence[str] = ()
        self._wrong_since: dict[str, float] = {}
        helper.on_opened = self._opened
        group.before_disconnect = self._tell_last

    def handlers(self) -> dict[str, Handler]:
        """Return the operation of the peer link."""
        return {"clients": self._handle_clients}

    def describe(self) -> dict[str, Any]:
        """Return what a node's status says of them; nothing where there are none."""
        if not self._addresses:
            return {}
        here = [str(address) for address in self._addresses if connections.is_here(address)]
        return {"service_addresses": here, "service_clients": len(self._clients)}

    def checks(self) -> Sequence[Check]:
        """Return one finding for each address: it is at the primary, and nowhere else."""
        found = []
        owner = self._owner()
        for address, nodes in self._places().items():
            since = self._wrong_since.get(address)
            lasting = since is not None and self._clock() - since >= GRACE
            where = " and ".join(nodes) if nodes else "nowhere"
            message = f"{address} is {'at ' if nodes else ''}{where}"
            if lasting:
                message += f"; it should be {f'at {owner}' if owner else 'nowhere'}"
            problems = [text for text in self._problems if owner == self._node]
            passed = not lasting and not problems
            text = "; ".join([message, *problems])
            found.append(Check(f"service address {address}", passed, nodes, owner, f"{text}."))
        return found

    async def run(self) -> None:
        """Tell, and watch; runs until cancelled."""
        if not self._addresses:
            return
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._tell(), name="clients of the service address")
            tasks.create_task(self._tickle(), name="clients of a former primary")

    # -- where they are

    def _statuses(self) -> Mapping[str, Mapping[str, Any]]:
        group = self._group
        theirs = {name: said for name, said in group.statuses.items() if group.answers(name)}
        return {self._node: {**self.describe(), "state": group.state.phase}, **theirs}

    def _owner(self) -> str | None:
        """Return the node that should have them: the one that serves."""
        for name, status in self._statuses().items():
            if status.get("state") == "primary" and "service_addresses" in status:
                return name
        return None

    def _places(self) -> dict[str, list[str]]:
        statuses = self._statuses()
        return {
            str(address): sorted(
                name
                for name, status in statuses.items()
                if str(address) in status.get("service_addresses", ())
            )
            for address in self._addresses
        }

    def _look(self) -> None:
        owner = self._owner()
        for address, nodes in self._places().items():
            if nodes == ([owner] if owner else []):
                self._wrong_since.pop(address, None)
            else:
                self._wrong_since.setdefault(address, self._clock())

    def _opened(self, new: Sequence[str], problems: Sequence[str]) -> None:
        """Note what the helper says: the ports are open here, and the addresses are."""
        for text in problems:
            if text not in self._problems:
                log.error("%s", text)
        self._problems = tuple(problems)
        if new and self._clients:
            self._gone.put_nowait(self._clients)
            self._know([])

    # -- who is connected

    async def _tell(self) -> None:
        while True:
            await self._turn()
            await asyncio.sleep(TELL_PAUSE)

    async def _turn(self) -> None:
        self._look()
        if self._group.is_primary():
            await self._tell_all()

    async def _tell_last(self, to: str) -> None:
        """Tell who is connected when a planned change has closed the ports."""
        if "service_clients" not in self._statuses().get(to, {}):
            return
        try:
            async with asyncio.timeout(LAST_TELL_TIMEOUT), self._telling[to]:
                await self._tell_one(to, LAST_TELL_TIMEOUT)
        except TimeoutError:
            log.info("%s does not take the last list of clients in time", to)

    async def _tell_all(self) -> None:
        """Tell every other node that could have the addresses."""
        statuses = self._statuses()
        peers = [name for name in self._group.links if "service_clients" in statuses.get(name, {})]
        await asyncio.gather(*map(self._tell_in_turn, peers))

    async def _tell_in_turn(self, name: str) -> None:
        async with self._telling[name]:
            # Not while clients are disconnected: who is told by the next primary is who was there.
            if not self._group.switching:
                await self._tell_one(name, TELL_TIMEOUT)

    async def _tell_one(self, name: str, timeout: float) -> None:
        try:
            rows = await asyncio.to_thread(connections.read, self._ends)
        except OSError as error:
            log.warning("the clients of the service address are not known: %s", error)
            return
        known = self._statuses().get(name, {}).get("service_clients")
        if self._told.get(name) == rows and known == len(rows):
            return
        self._told.pop(name, None)
        clients = await asyncio.to_thread(_to_json, rows)  # there may be many
        try:
            async with self._group.links[name].exchange("clients", {}, timeout=timeout) as exchange:
                await exchange.send_lines(clients)
                await exchange.result()
        except PeerError as error:
            # Told again in a second; until then it knows what it has heard before.
            log.info("%s does not take the list of clients: %s", name, error)
            return
        self._told[name] = rows

    async def _handle_clients(
        self, peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        """Handler of ``clients``: know who is connected to the primary."""
        clients: list[Connection] = []
        async for row in exchange.receive_lines():
            if len(clients) == connections.MAX_CLIENTS:
                raise PeerError("protocol", f"over {connections.MAX_CLIENTS} clients")
            try:
                clients.append(Connection.from_json(row.get("client")))
            except ValueError as error:
                raise PeerError("protocol", str(error)) from None
            if clients[-1].local not in self._addresses:
                raise PeerError("refused", f"{clients[-1].local} is no service address here")
        self._know(clients)
        return {}

    def _know(self, clients: list[Connection]) -> None:
        self._clients = clients
        _known.set(len(clients))

    async def _tickle(self) -> None:
        while True:
            clients = await self._gone.get()
            log.warning("%d clients of the former primary are told", len(clients))
            _tickled.inc(len(clients))
            for pause in TICKLE_PAUSES:
                await asyncio.sleep(pause)
                try:
                    await self._helper.tickle(clients)
                except HelperError as error:
                    log.warning("clients of the former primary are not told: %s", error)
                    break


def _to_json(rows: frozenset[connections.Row]) -> list[dict[str, Any]]:
    return [{"client": connections.decode(row).to_json()} for row in rows]
