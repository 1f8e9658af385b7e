"""``umbra-helper``: the few effects that need root, from a fixed list, and nothing else.

It listens on a unix socket that only the agent's group can open, and reads one JSON object a line:
``{"do": NAME, ...}``. Each
answer is ``{"ok": true, ...}`` or ``{"ok": false, "error": SENTENCE}``. No argument ever becomes a
path, a program or an option: queue ids, addresses
and numbers are checked. Which service addresses there are, and which nodes may be switched off, its
command line says, not its client. It keeps nothing that must last, so it may die at any point: the
agent's next request finds it restarted, and arms its timer again. But that the mailboxes' disk has
lost something, which the kernel tells once, lasts until the next boot.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import errno
import grp
import json
import logging
import os
import re
import signal
import stat
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from umbra.cluster.protocol import LONGEST
from umbra.node.addresses import ServiceAddresses
from umbra.node.packets import Connection
from umbra.node.queue import QUEUE_ID, owed_bounces, queue_files
from umbra.systemd import alive, notify, watchdog_interval

log = logging.getLogger("umbra.helper")

STORAGE = re.compile(r"[0-9a-f]{1,64}\Z")
NODE = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,232}\Z")  # systemd takes 255 characters of unit
STONITH_TIMEOUT = 35.0  # its unit's own is 30 s at most
ID_HEADER = re.compile(r"^X-Umbra-Id:[ \t]*(\S*)", re.MULTILINE | re.IGNORECASE)
SHADOW_ID = re.compile(r"[0-9a-f]{32}\Z")
MAX_NAMES = 500
MAX_REQUEST = 1024 * 1024
COMMAND_TIMEOUT = 20.0
MAX_KEYS = 2000
MAX_TICKLES = 2000
MAX_PROBES = 8
ECHO_TIMEOUT = 5.0  # ping's own is 1 s
NO_ANSWER = re.compile(r"\(1\)|unreachable|No route|Cannot assign")
PROOF = ".umbra-proof"
STORE = ".umbra-store"
UNKNOWN = "not a request that the helper knows"
FENCE = Path("/etc/umbra/fence.nft")
GONE = "No such file or directory"  # what nft says of a table that is not there
RUNTIME = Path("/run/umbra-helper")  # its unit has it stay over a restart; a boot empties it
LOST = "mail-lost"
OPENING = 60.0  # seconds for which Postfix may run before the agent opens
SLOW = 0.2  # seconds by which the ports may stay open past the right; nft takes a tenth of that
_LIBC = ctypes.CDLL(None, use_errno=True)
_ERROR = re.compile(rb"\b(error|fatal|panic)\b")


class HelperError(OSError):
    """The effect did not happen; one sentence for people."""


async def run(
    *argv: str, stdin: str | None = None, silent: int = 0, timeout: float = COMMAND_TIMEOUT
) -> str:
    """Run a program and return its output.

    HelperError with the program's own words if it fails or hangs.

    :param silent: a status that is no failure unless the program speaks of an error, as Postfix's
        do: warnings do not count, there is one for each address family that our sandbox lacks.
    """
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.PIPE if stdin is not None else asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(timeout):
            out, err = await process.communicate(stdin.encode() if stdin is not None else None)
    except TimeoutError:
        process.kill()
        await process.wait()
        raise HelperError(f"{argv[0]} did not finish in {timeout:g} s") from None
    if process.returncode and (process.returncode != silent or _ERROR.search(err)):
        words = " ".join((err or out).decode(errors="replace").split())
        raise HelperError(f"{' '.join(argv[:3])} failed ({process.returncode}): {words}")
    return out.decode(errors="replace")


class Helper:
    """The fixed list of effects. Each public ``do_`` method is one request.

    :param lease: the agent's right to act ends by itself, and what it has opened with it.
    """

    def __init__(
        self,
        spool: Path = Path("/var/spool/postfix"),
        mail: Path = Path("/var/vmail"),
        addresses: ServiceAddresses | None = None,
        runtime: Path = RUNTIME,
        nodes: Sequence[str] = (),
        *,
        lease: bool = False,
    ) -> None:
        self._spool = spool
        self._lease = lease
        self._nodes = frozenset(nodes)
        self._addresses = addresses or ServiceAddresses(())
        self._proofs = (spool / PROOF, mail / PROOF)
        self._mail = mail
        self._mark = runtime / LOST
        self._lost: str | None = None
        with contextlib.suppress(FileNotFoundError):
            self._lost = self._mark.read_text()
        self._syncing = asyncio.Lock()
        self._proving: asyncio.Future[None] | None = None
        self._dead_man: asyncio.TimerHandle | None = None
        self._silencing: asyncio.Future[None] | None = None

    async def do_ports_open(self, request: dict[str, Any]) -> dict[str, Any]:
        """Open the service ports, in one nftables transaction.

        For ``hold`` seconds from now, or until ``until`` on CLOCK_BOOTTIME: a request that was held
        up opens for as much less. With ``postfix_until`` Postfix is stopped then, unless there is
        another request before. Then the host has the service addresses, for as long: they never
        lead to a closed port. The answer has those that are ``new`` here, and ``problems`` with
        them.
        """
        ports = _ports(request)
        if "until" in request:
            await self._open_until(ports, request["until"])
        else:
            hold: Any = request.get("hold")
            if not isinstance(hold, (int, float)) or not 1 <= hold <= 3600:
                raise HelperError("hold must be from 1 to 3600 seconds")
            await _open(ports, hold)
        self._disarm()
        if "postfix_until" in request:
            self._arm(_left(request["postfix_until"]))
        if "until" in request:
            hold = _left(request["until"])  # less than before, if nft has taken long
        new, problems = self._addresses.hold(hold)
        return {"new": new, "problems": problems}

    async def _open_until(self, ports: Sequence[int], until: object) -> None:
        """Open the ports until ``until``, or close them and say why not: HelperError.

        The kernel counts from nft's commit. If all stood still before it, for as long as another
        node needs to take over, the ports would be open past the right.
        """
        late, began = 0.0, _clock()
        left = _left(until)  # nothing has been opened yet
        try:
            for _ in range(2):
                # A host that is always slow is so again: less is asked for, and none is closed.
                hold = left - min(late, left / 2)
                began = _clock()
                await _open(ports, hold)
                left = _left(until)
                late = hold - left
                if late <= SLOW:
                    return
            raise HelperError(f"nft took {_clock() - began:.1f} s to open the ports")
        except OSError:
            # One that has failed at once has changed nothing. One that was killed for taking too
            # long may have committed before, and so has the first if this was the second.
            if max(late, _clock() - began) > SLOW or not _runs(until):
                try:
                    await self.do_ports_close({})
                except OSError as error:
                    log.error("the ports may be open past the right: %s", error)
            raise

    def expect(self, seconds: float) -> None:
        """Have Postfix stopped unless the agent renews its lease within ``seconds``, if it has one.

        To be asked when Postfix may run and no timer: the helper before this one may have died
        together with the agent, and the agent may die before it opens.
        """
        if self._lease and self._dead_man is None:
            self._arm(seconds)

    def _arm(self, seconds: float) -> None:
        self._disarm()
        loop = asyncio.get_running_loop()
        self._dead_man = loop.call_later(seconds, self._begin_silence)

    def _disarm(self) -> None:
        if self._dead_man is not None:
            self._dead_man.cancel()
            self._dead_man = None

    def _begin_silence(self) -> None:
        self._dead_man = None
        self._silencing = asyncio.ensure_future(self._silence())

    async def _silence(self) -> None:
        """Stop Postfix: the agent that renews its right is gone, and another node may act now.

        So nothing goes out or into mailboxes from here. The ports have closed by themselves.
        """
        if await _postfix_is("active"):
            log.error("the agent has not renewed the lease of the ports; Postfix is stopped")
        # Also if it only seems not to run: it may be starting, or systemd may not have answered.
        with contextlib.suppress(HelperError):
            await run("systemctl", "stop", "postfix.service")

    async def do_ports_close(self, request: dict[str, Any]) -> dict[str, Any]:
        """Have no service address, then close the ports now, for established connections too."""
        # Who comes to an address that is nowhere tries again, and meets the next owner.
        try:
            self._addresses.release()
        finally:
            await _nft("flush", "set", "inet", "umbra_fence", "open_ports")
        return {}

    async def do_tickle(self, request: dict[str, Any]) -> dict[str, Any]:
        """Make clients of a former owner of the addresses notice that they are cut off."""
        rows = request.get("connections")
        if not isinstance(rows, list) or len(rows) > MAX_TICKLES:
            raise HelperError(f"connections must be a list of at most {MAX_TICKLES}")
        connections = [Connection.from_json(row) for row in rows]
        if not all(connection.local in self._addresses for connection in connections):
            raise HelperError("only clients of a service address are told")
        self._addresses.tickle(connections)
        return {}

    async def do_prove(self, request: dict[str, Any]) -> dict[str, Any]:
        """Write to the disks of mail and queue, and return when they have it.

        HelperError also if the mail disk has lost something since the boot.
        """
        self._refuse_lost()
        # One at a time: a disk that stalls must not take all the threads.
        if self._proving is not None and not self._proving.done():
            raise HelperError("a disk has not taken the last write yet")
        self._proving = asyncio.ensure_future(asyncio.to_thread(_write, self._proofs))
        await asyncio.shield(self._proving)
        return {}

    async def do_sync_mail(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return when the disk has all that was written to mailboxes before this request."""
        async with self._syncing:  # a disk that stalls must not take all the threads
            self._refuse_lost()
            await asyncio.to_thread(self._sync_mail)
        return {}

    def _sync_mail(self) -> None:
        """Sync the mailboxes' file system; what the disk has lost is noted until the next boot.

        The kernel tells a failed write once and takes its pages for clean then: the next syncfs
        has nothing to do and says that all is well. A full disk is no such failure. ext4 and XFS
        refuse the write itself then, as they reserve room before they take it, so Dovecot hears of
        it; and where syncfs does tell (a thin volume, a quota on a network's disk) somebody makes
        room, and the group is protected again by itself.
        """
        try:
            _syncfs(self._mail)
        except HelperError:
            raise  # it was not asked at all
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                self._lost = error.strerror or str(error)
                try:
                    self._mark.write_text(self._lost)
                except OSError as wrong:
                    log.error("a restart of umbra-helper will forget this: %s", wrong)
                self._refuse_lost()
            raise

    def _refuse_lost(self) -> None:
        if self._lost is not None:
            raise HelperError(
                f"the disk of {self._mail} has failed to write ({self._lost}), so this host's copy"
                " may lack something: look at the disk, then reboot the host"
            )

    async def do_mail_store(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return whose store the mailboxes' file system belongs to, "" for nobody's.

        With ``claim`` it is that of ``storage`` from now on, durably. A disk that was replaced, or
        is not mounted, has no mark or another's.
        """
        storage, claim = request.get("storage"), request.get("claim")
        if not isinstance(storage, str) or not STORAGE.match(storage):
            raise HelperError("storage must be the id of a store")
        mark = self._mail / STORE
        if claim is True:
            await asyncio.to_thread(_mark, mark, storage)
        return {"storage": await asyncio.to_thread(_marked, mark)}

    async def do_postfix_start(self, request: dict[str, Any]) -> dict[str, Any]:
        """Start Postfix; harmless if it runs."""
        self.expect(OPENING)
        try:
            await run("systemctl", "start", "postfix.service")
        except HelperError:
            # Several changes of role within seconds must not run into systemd's limit of starts.
            await run("systemctl", "reset-failed", "postfix.service")
            await run("systemctl", "start", "postfix.service")
        return {}

    async def do_postfix_stop(self, request: dict[str, Any]) -> dict[str, Any]:
        """Stop Postfix; harmless if it does not run."""
        await run("systemctl", "stop", "postfix.service")
        self._disarm()
        return {}

    async def do_postfix_running(self, request: dict[str, Any]) -> dict[str, Any]:
        """Tell whether Postfix runs."""
        return {"running": await _postfix_is("active")}

    async def do_postfix_failed(self, request: dict[str, Any]) -> dict[str, Any]:
        """Tell whether Postfix has crashed, which a stop is not."""
        return {"failed": await _postfix_is("failed")}

    async def do_dovecot_restarts(self, request: dict[str, Any]) -> dict[str, Any]:
        """Tell how often systemd has started Dovecot again since somebody started it."""
        shown = await run("systemctl", "show", "-p", "NRestarts", "--value", "dovecot.service")
        return {"restarts": int(shown.strip() or 0)}

    async def do_reach(self, request: dict[str, Any]) -> dict[str, Any]:
        """Tell whether any of ``addresses`` answers an ICMP echo within a second.

        HelperError if none does and one could not be asked.
        """
        addresses = _addresses(request)
        found = await asyncio.gather(*(_echo(item) for item in addresses), return_exceptions=True)
        errors = [item for item in found if isinstance(item, BaseException)]
        if errors and True not in found:
            raise errors[0]
        return {"answers": True in found}

    async def do_queue_list(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return all queue files as {queue id: queue}."""
        return {"queue": await asyncio.to_thread(queue_files, self._spool)}

    async def do_queue_remaining(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the recipients that are not finished yet, by queue id.

        That is those that Postfix lists, and those that failed while the sender has no bounce yet:
        who goes on with the message without them would never send one.
        """
        rows = [json.loads(line) for line in (await run("postqueue", "-j")).splitlines() if line]
        owed = await asyncio.to_thread(owed_bounces, self._spool)
        remaining = {row["queue_id"]: [r["address"] for r in row["recipients"]] for row in rows}
        for queue_id, left in remaining.items():
            left += [item for item in dict.fromkeys(owed.get(queue_id, ())) if item not in left]
        return {"remaining": remaining}

    async def do_queue_shadow_ids(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the shadow ids that the queue files ``ids`` bear, by queue id.

        That is what our milter has put into the header, "" for none; nothing else of a message
        leaves here. One that cannot be read is left out.
        """
        ids, found = _queue_ids(request), {}
        if len(ids) > MAX_NAMES:
            raise HelperError(f"ids must be a list of at most {MAX_NAMES}")
        for queue_id in ids:
            with contextlib.suppress(HelperError):
                # The first of its name is ours: others came with the message.
                headers = await run("postcat", "-h", "-q", queue_id)
                line = ID_HEADER.search(headers)
                found[queue_id] = line[1] if line and SHADOW_ID.match(line[1]) else ""
        return {"shadow_ids": found}

    async def do_queue_delete(self, request: dict[str, Any]) -> dict[str, Any]:
        """Delete the queue files ``ids``; one that is gone already is no error."""
        await run("postsuper", "-d", "-", stdin="\n".join(_queue_ids(request)) + "\n")
        return {}

    async def do_queue_hold(self, request: dict[str, Any]) -> dict[str, Any]:
        """Put the queue files ``ids`` on hold."""
        await run("postsuper", "-h", "-", stdin="\n".join(_queue_ids(request)) + "\n")
        return {}

    async def do_queue_release(self, request: dict[str, Any]) -> dict[str, Any]:
        """Release the queue files ``ids`` from hold."""
        await run("postsuper", "-H", "-", stdin="\n".join(_queue_ids(request)) + "\n")
        return {}

    async def do_aliases(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return what Postfix's virtual alias maps say of ``keys``, {key: value}."""
        keys = request.get("keys")
        if (
            not isinstance(keys, list)
            or len(keys) > MAX_KEYS
            or not all(
                isinstance(k, str) and k.isprintable() and k.strip() == k != "" for k in keys
            )
        ):
            raise HelperError(f"keys must be a list of at most {MAX_KEYS} addresses")
        maps = (await run("postconf", "-h", "virtual_alias_maps")).replace(",", " ").split()
        found: dict[str, str] = {}
        for name in maps if keys else ():
            # 1: none of them is there.
            out = await run("postmap", "-q", "-", name, stdin="\n".join(keys) + "\n", silent=1)
            for line in out.splitlines():
                key, _, value = line.partition("\t")
                found.setdefault(key, value)
        return {"found": found}

    async def do_stonith(self, request: dict[str, Any]) -> dict[str, Any]:
        """Have the administrator's hook switch ``node`` off; return its last words.

        The hook has a unit of its own, without our privileges: no root, but the network.
        """
        node = request.get("node")
        if not isinstance(node, str) or node not in self._nodes:
            raise HelperError("node must be the name of another node of the group")
        unit = f"umbra-stonith@{node}.service"
        began, failed, result = time.time(), "", ""
        try:
            await run("systemctl", "start", unit, timeout=STONITH_TIMEOUT)
        except HelperError as error:
            failed = str(error)
            with contextlib.suppress(HelperError):
                result = await run("systemctl", "show", unit, "-p", "Result", "--value")
                await run("systemctl", "reset-failed", unit)
        words = ""
        with contextlib.suppress(HelperError):
            await run("journalctl", "--sync")
            # Not by its invocation: systemd forgets a unit that has ended.
            words = await run(
                "journalctl", "-q", "-o", "cat", "-n", "5", f"--since=@{began:.6f}",
                "_TRANSPORT=stdout", f"_SYSTEMD_UNIT={unit}",
            )  # fmt: skip
        said = " ".join(words.split())[:400]
        if failed:
            why = "it took too long" if result.strip() == "timeout" else said or failed
            raise HelperError(f"{unit}: {why}")
        return {"said": said}

    async def do_kick(self, request: dict[str, Any]) -> dict[str, Any]:
        """Disconnect all users of Dovecot, and reset whoever is connected to one of ``ports``.

        But for clients of a service address: its next owner tells them, when there is one.
        """
        ports = " or ".join(f"sport = :{port}" for port in _ports(request))
        elsewhere = "".join(f" and not src [{address}]" for address in self._addresses)
        try:
            # The fence lets no other word of a closed port out.
            await run(
                "ss", "-K", "-H", "-n", "-t", "state", "connected",
                f"( {ports} ) and not dst 127.0.0.0/8 and not dst [::1]{elsewhere}",
            )  # fmt: skip
        except HelperError as error:
            log.warning("clients are not told that they are disconnected: %s", error)
        with contextlib.suppress(HelperError):  # exits 68 when nobody is connected
            await run("doveadm", "kick", "*")
        return {}

    async def answer(self, line: bytes) -> dict[str, Any]:
        """Carry out one request line and return the answer."""
        try:
            request = json.loads(line)
            name = request["do"].replace("-", "_")
            effect: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]] = getattr(
                self, f"do_{name}"
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            return {"ok": False, "error": UNKNOWN}
        try:
            return {"ok": True, **await effect(request)}
        except (HelperError, OSError, ValueError) as error:
            log.warning("%s: %s", name, error)
            return {"ok": False, "error": str(error)}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection, in order."""
        try:
            while line := await reader.readline():
                writer.write(json.dumps(await self.answer(line)).encode() + b"\n")
                await writer.drain()
        except (ValueError, OSError) as error:
            log.warning("connection closed: %s", error)
        finally:
            writer.close()


def _ports(request: Mapping[str, Any]) -> list[int]:
    ports = request.get("ports")
    if (
        not isinstance(ports, list)
        or not ports
        or not all(isinstance(port, int) and 0 < port < 65536 for port in ports)
    ):
        raise HelperError("ports must be a list of port numbers")
    return ports


async def _open(ports: Sequence[int], seconds: float) -> None:
    elements = ", ".join(f"{port} timeout {int(seconds * 1000)}ms" for port in ports)
    # An element that is there is not renewed by adding it again: flush and add, atomically.
    batch = (
        "flush set inet umbra_fence open_ports\n"
        f"add element inet umbra_fence open_ports {{ {elements} }}\n"
    )
    await _nft("-f", "-", batch=batch)


async def _nft(*words: str, batch: str | None = None) -> None:
    """Run nft on the fence. If that is gone, it is loaded first, which closes all service ports.

    Whoever loads rules of his own by hand may have removed it: Debian's file of them begins with
    ``flush ruleset``. Then every port is open until the agent next asks for something.
    """
    try:
        await run("nft", *words, stdin=batch)
    except HelperError as error:
        if GONE not in str(error):
            raise
        log.error("somebody has removed the fence from the kernel; it is loaded again")
        await run("nft", "-f", str(FENCE))
        await run("nft", *words, stdin=batch)


def _clock() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _runs(until: object) -> bool:
    try:
        return _left(until) > 0
    except HelperError:
        return False


def _left(until: object) -> float:
    """Return the seconds until ``until``; HelperError if there are none, or far too many."""
    if not isinstance(until, (int, float)):
        raise HelperError("until must be a time on CLOCK_BOOTTIME in seconds")
    left = until - _clock()
    if not 0.005 <= left <= 60:
        raise HelperError(f"the right to open the ports ends in {left:.3f} s")
    return left


def _file(path: Path, flags: int) -> int:
    """Open a file in a directory of another user's; OSError if something else stands there."""
    number = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "not a file", str(path))
    return number


def _write(files: Sequence[Path]) -> None:
    for path in files:
        number = _file(path, os.O_WRONLY | os.O_CREAT)
        try:
            os.pwrite(number, f"{time.time():.3f}\n".encode(), 0)
            os.fdatasync(number)
        finally:
            os.close(number)


def _mark(path: Path, storage: str) -> None:
    """Write a mark, durably."""
    number = _file(path, os.O_WRONLY | os.O_CREAT)
    try:
        os.ftruncate(number, 0)
        os.write(number, f"{storage}\n".encode())
        os.fsync(number)
    finally:
        os.close(number)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _marked(path: Path) -> str:
    try:
        number = _file(path, os.O_RDONLY)
    except FileNotFoundError:
        return ""
    try:
        return os.read(number, 100).decode(errors="replace").strip()
    finally:
        os.close(number)


def _syncfs(directory: Path) -> None:
    """Linux' syncfs(2), which Python has no name for. HelperError if there is no such directory."""
    try:
        number = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise HelperError(str(error)) from None
    try:
        if _LIBC.syncfs(number):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(number)


async def _postfix_is(state: str) -> bool:
    try:
        await run("systemctl", f"is-{state}", "--quiet", "postfix.service")
    except HelperError:
        return False
    return True


async def _echo(address: str) -> bool:
    """Send one ICMP echo; False if nothing comes back within a second, or no way leads there."""
    try:
        await run(
            "env",
            "LC_ALL=C",
            "ping",
            "-n",
            "-q",
            "-c",
            "1",
            "-W",
            "1",
            address,
            timeout=ECHO_TIMEOUT,
        )
    except HelperError as error:
        # 1: no answer; anything else can be an error of its own.
        if NO_ANSWER.search(str(error)):
            return False
        raise
    return True


def _addresses(request: dict[str, Any]) -> list[str]:
    texts = request.get("addresses")
    if not isinstance(texts, list) or not 0 < len(texts) <= MAX_PROBES:
        raise HelperError(f"addresses must be a list of at most {MAX_PROBES}")
    # A scope after % could be any text.
    if not all(isinstance(text, str) and "%" not in text for text in texts):
        raise HelperError("addresses must be IP addresses")
    return [str(ip_address(text)) for text in texts]


def _queue_ids(request: dict[str, Any]) -> Sequence[str]:
    ids = request.get("ids")
    if not isinstance(ids, list) or not all(isinstance(i, str) and QUEUE_ID.match(i) for i in ids):
        raise HelperError("ids must be a list of queue ids")
    return ids


def _node(name: str) -> str:
    """Return a name that can stand in the name of a unit; ValueError for another."""
    if not NODE.match(name):
        raise ValueError(name)
    return name


async def _tell_alive() -> None:
    """Say so for as long as requests are taken: who stands still is killed, and its successor acts.

    The agent can stop Postfix by it alone.
    """
    while (pause := watchdog_interval()) is not None:
        alive("")
        await asyncio.sleep(pause)


async def serve(helper: Helper, socket: Path, group: str) -> None:
    """Listen until cancelled."""
    helper.expect(LONGEST)
    with contextlib.suppress(FileNotFoundError):
        socket.unlink()
    server = await asyncio.start_unix_server(helper.serve, socket, limit=MAX_REQUEST)
    os.chown(socket, 0, grp.getgrnam(group).gr_gid)
    socket.chmod(0o660)
    notify("READY=1")
    async with server, asyncio.TaskGroup() as tasks:
        tasks.create_task(_tell_alive())
        await server.serve_forever()


def main() -> None:
    """Entry point of ``umbra-helper``."""
    parser = argparse.ArgumentParser(
        prog="umbra-helper", description="Effects that need root, for umbra-agent."
    )
    parser.add_argument("--socket", type=Path, default=Path("/run/umbra-helper/helper.sock"))
    parser.add_argument("--group", default="umbra")
    parser.add_argument(
        "--address", type=ip_address, action="append", default=[], metavar="ADDRESS",
        help="a service address, which the primary has",
    )  # fmt: skip
    parser.add_argument(
        "--lease", action="store_true",
        help="another node may act when the agent is silent: Postfix is stopped then",
    )  # fmt: skip
    parser.add_argument(
        "--node", type=_node, action="append", default=[], metavar="NAME",
        help="a node that the administrator's hook may switch off",
    )  # fmt: skip
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ["LC_ALL"] = "C"  # what programs say of an error is read
    os.umask(0o117)
    # Somebody opens a file while umbra.node.queue has its lease: the kernel tells by a signal.
    signal.signal(signal.SIGIO, signal.SIG_IGN)
    helper = Helper(
        addresses=ServiceAddresses(options.address),
        runtime=options.socket.parent,
        nodes=options.node,
        lease=options.lease,
    )
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(helper, options.socket, options.group))
