"""The agent's client of ``umbra-helper``."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from umbra.node.helper import MAX_REQUEST, MAX_TICKLES, STONITH_TIMEOUT, UNKNOWN, HelperError
from umbra.node.packets import Connection

BATCH = 5000
"""Queue ids in one request, which has a bound."""

UNCOMMITTED = ("arriving", "maildrop")
"""Queues whose files Postfix has not acknowledged yet."""


class NodeHelper:
    """Asks the helper for effects, each over a connection of its own.

    Requests do not wait for each other, but for those of the ports: an opening that was decided on
    before a closing must not come after it.

    Every method raises HelperError with one sentence if the effect did not happen. Its maker may
    set ``on_opened``, called after each opening of the ports with the service addresses that are
    new on this host, and what is wrong with any.
    """

    def __init__(self, socket: Path, timeout: float = 25.0) -> None:
        self._socket = socket
        self._timeout = timeout
        self._ports = asyncio.Lock()
        self._closings = 0
        self.on_opened: Callable[[Sequence[str], Sequence[str]], None] = lambda new, problems: None

    async def _ask(self, do: str, *, seconds: float = 0.0, **values: Any) -> dict[str, Any]:
        limit = seconds or self._timeout
        try:
            async with asyncio.timeout(limit):
                reader, writer = await asyncio.open_unix_connection(
                    self._socket, limit=64 * MAX_REQUEST
                )
                try:
                    writer.write(json.dumps({"do": do, **values}).encode() + b"\n")
                    answer = json.loads(await reader.readline() or b"{}")
                finally:
                    writer.close()
        except TimeoutError:
            raise HelperError(f"umbra-helper did not finish {do} in {limit:g} s") from None
        except (OSError, ValueError) as error:
            raise HelperError(
                f"umbra-helper does not answer ({error}); is umbra-helper.service running?"
            ) from None
        if not answer.get("ok"):
            raise HelperError(str(answer.get("error", f"umbra-helper ended during {do}")))
        return dict(answer)

    async def ports_open(self, ports: Sequence[int], hold: float) -> None:
        """Open the service ports, and have the service addresses, for ``hold`` seconds from now."""
        await self._open(ports, hold=hold)

    async def ports_open_until(
        self, ports: Sequence[int], until: float, postfix_until: float
    ) -> None:
        """The same until ``until`` on CLOCK_BOOTTIME, however late this arrives.

        Postfix is stopped at ``postfix_until`` unless this is asked again before.
        """
        await self._open(ports, until=until, postfix_until=postfix_until)

    async def _open(self, ports: Sequence[int], **values: float) -> None:
        closings = self._closings
        async with self._ports:
            if closings != self._closings:
                return  # they have been closed since this was asked for
            answer = await self._ask("ports-open", ports=list(ports), **values)
        self.on_opened(answer["new"], answer["problems"])

    async def tickle(self, connections: Sequence[Connection]) -> None:
        """Make clients of the service address's former owner notice that they are cut off."""
        for at in range(0, len(connections), MAX_TICKLES):
            rows = [connection.to_json() for connection in connections[at : at + MAX_TICKLES]]
            await self._ask("tickle", connections=rows)

    async def prove(self) -> None:
        """Return when the disks of mail and queue have taken a write."""
        await self._ask("prove")

    async def sync_mail(self) -> None:
        """Return when the disk has all that was written to mailboxes before."""
        await self._ask("sync-mail")

    async def mail_store(self, storage: str, *, claim: bool) -> str | None:
        """Return whose store the mailboxes' disk belongs to, "" for nobody's; see the helper.

        None if the helper is an older one, which the run that installs this one restarts.

        :param claim: it is that of ``storage`` from now on.
        """
        try:
            return str((await self._ask("mail-store", storage=storage, claim=claim))["storage"])
        except HelperError as error:
            if str(error) == UNKNOWN:
                return None
            raise

    async def ports_close(self) -> None:
        """Have no service address, and close the ports, for established connections too.

        An opening that hangs delays it by no more than the opening was to last.
        """
        self._closings += 1
        async with self._ports:
            await self._ask("ports-close")

    async def postfix_start(self) -> None:
        """Start Postfix."""
        await self._ask("postfix-start")

    async def postfix_stop(self) -> None:
        """Stop Postfix; what it was delivering stays in its queue."""
        await self._ask("postfix-stop")

    async def postfix_running(self) -> bool:
        """Tell whether Postfix runs."""
        return bool((await self._ask("postfix-running"))["running"])

    async def postfix_failed(self) -> bool:
        """Tell whether Postfix has crashed, which a stop is not."""
        return bool((await self._ask("postfix-failed"))["failed"])

    async def dovecot_restarts(self) -> int:
        """Tell how often systemd has started Dovecot again since somebody started it."""
        return int((await self._ask("dovecot-restarts"))["restarts"])

    async def reach(self, addresses: Sequence[str]) -> bool:
        """Tell whether any of the addresses answers an ICMP echo within a second."""
        return bool((await self._ask("reach", addresses=list(addresses)))["answers"])

    async def queue(self) -> Mapping[str, str]:
        """Return all queue files, {queue id: queue}."""
        return dict((await self._ask("queue-list"))["queue"])

    async def committed(self) -> set[str]:
        """Return the queue ids of the messages that Postfix has acknowledged."""
        return {key for key, queue in (await self.queue()).items() if queue not in UNCOMMITTED}

    async def remaining(self) -> Mapping[str, Sequence[str]]:
        """Return the recipients that are not delivered yet, {queue id: addresses}."""
        return dict((await self._ask("queue-remaining"))["remaining"])

    async def queue_delete(self, ids: Sequence[str]) -> None:
        """Delete queue files."""
        await self._ask_for_ids("queue-delete", ids)

    async def queue_hold(self, ids: Sequence[str]) -> None:
        """Put queue files on hold."""
        await self._ask_for_ids("queue-hold", ids)

    async def queue_release(self, ids: Sequence[str]) -> None:
        """Release queue files from hold."""
        await self._ask_for_ids("queue-release", ids)

    async def _ask_for_ids(self, do: str, ids: Sequence[str]) -> None:
        for start in range(0, len(ids), BATCH):
            await self._ask(do, ids=list(ids[start : start + BATCH]))

    async def aliases(self, keys: Sequence[str]) -> Mapping[str, str]:
        """Return what Postfix's virtual alias maps say of ``keys``."""
        # A key that no line of postmap can carry is in no map.
        fit = [key for key in keys if key.isprintable() and key.strip() == key != ""]
        return dict((await self._ask("aliases", keys=fit))["found"])

    async def stonith(self, node: str) -> str:
        """Have the administrator's hook switch ``node`` off; return what it said."""
        answer = await self._ask("stonith", seconds=STONITH_TIMEOUT + 5, node=node)
        return str(answer["said"])

    async def kick(self, ports: Sequence[int]) -> None:
        """Disconnect all IMAP, POP3 and ManageSieve users, and clients of these ports at once."""
        await self._ask("kick", ports=list(ports))
