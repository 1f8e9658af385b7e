"""The agent's client of ``umbra-helper``."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from umbra.node.helper import MAX_REQUEST, MAX_TICKLES, STONITH_TIMEOUT, UNKNOWN, HelperError
from umbra.node.packets import Connection

BATCH = 5000
"""Queue ids in one request, which has a bound."""

UNCOMMITTED = ("arriving", "maildrop")
"""Queues whose files Postfix has not acknowledged yet."""


class _Line:
    """A connection to the helper, for one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, socket: Path) -> _Line:
        """Connect. OSError if the helper does not run."""
        return cls(*await asyncio.open_unix_connection(socket, limit=64 * MAX_REQUEST))

    async def ask(self, request: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the answer, None if the helper has ended. OSError, or ValueError if it is none.

        A line that was left before it answered must be closed: the answer may still come.
        """
        self._writer.write(json.dumps(request).encode() + b"\n")
        text = await self._reader.readline()
        return dict(json.loads(text)) if text.endswith(b"\n") else None

    def close(self) -> None:
        """Leave; the helper drops an answer that it still has."""
        self._writer.close()


class NodeHelper:
    """Asks the helper for effects, each over a connection of its own.

    That of :meth:`sync_mail`, for which each change of a mailbox waits, is kept.

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
        self._kept: _Line | None = None
        self.on_opened: Callable[[Sequence[str], Sequence[str]], None] = lambda new, problems: None

    async def _ask(
        self, do: str, *, seconds: float = 0.0, keep: bool = False, **values: Any
    ) -> dict[str, Any]:
        limit = seconds or self._timeout
        try:
            async with asyncio.timeout(limit):
                answer = await self._answer({"do": do, **values}, keep)
        except TimeoutError:
            raise HelperError(f"umbra-helper did not finish {do} in {limit:g} s") from None
        except (OSError, ValueError) as error:
            raise HelperError(
                f"umbra-helper does not answer ({error}); is umbra-helper.service running?"
            ) from None
        if not answer.get("ok"):
            raise HelperError(str(answer.get("error", f"umbra-helper ended during {do}")))
        return answer

    async def _answer(self, request: Mapping[str, Any], keep: bool) -> dict[str, Any]:
        """Return the helper's answer, {} if it ended; with ``keep`` over the kept connection."""
        line = None
        if keep:
            line, self._kept = self._kept, None
        if line is not None:
            with suppress(OSError):
                if (answer := await self._over(line, request, keep)) is not None:
                    return answer
            # The helper has been restarted, before it answered or since the last answer.
        return await self._over(await _Line.open(self._socket), request, keep) or {}

    async def _over(
        self, line: _Line, request: Mapping[str, Any], keep: bool
    ) -> dict[str, Any] | None:
        answer = None
        try:
            answer = await line.ask(request)
        finally:
            # None also after a time-out: the answer to it must not be taken for the next one.
            if keep and answer is not None and self._kept is None:
                self._kept = line
            else:
                line.close()
        return answer

    def close(self) -> None:
        """Close the connection that is kept; the next request opens another."""
        if self._kept is not None:
            self._kept.close()
            self._kept = None

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

    async def _open(self, ports: Sequence[int], **values: Any) -> None:
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
        await self._ask("sync-mail", keep=True)

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

    async def shadow_ids(self, ids: Sequence[str]) -> Mapping[str, str]:
        """Return the shadow ids that queue files bear, "" for none, {queue id: shadow id}."""
        return dict((await self._ask("queue-shadow-ids", ids=list(ids)))["shadow_ids"])

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
