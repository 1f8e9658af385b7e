r"""Carries dsync over the peer link.

So that the epoch guards it and nobody reaches a node's mailboxes past its agent.

Primary: ``doveadm sync`` connects to the socket of the peer (destination
``tcp:/run/umbra-dsync/PEER.sock``) as it would to the other Dovecot.
With that client the handshake is (2.4.1, checked by experiment)::

    client  VERSION\tdoveadm-server\t1\t3
    server  VERSION\tdoveadm-client\t1\t3
    server  +
    client  \t\tOPTION\tlog-passthrough
    client  x\tproxy-ttl=1\tUSER\tdsync-server\t-uUSER

and after that the dsync stream both ways, multiplexed with the remote log. The carrier plays the
server of this handshake itself and opens an exchange ``dsync {user}``. The shadow's agent plays the
client's side towards its own Dovecot and writes the command itself, from the user's name. So the
link carries the bare stream, one round trip is saved, and no peer can run another command than
this one.

Most syncs of changed messages do not wait for each other's turns, see ``foretell``.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

from umbra.mailbox import metrics
from umbra.mailbox.disk import MailDisk
from umbra.mailbox.doveadm import (
    SOCKET,
    STALL_SECONDS,
    Doveadm,
    Outcome,
    SyncResult,
    escape,
    read_line,
    unescape,
)
from umbra.mailbox.expunged import Expunged
from umbra.mailbox.foretell import Foretelling, Guard, Mode, Surprise, Unsafe, Whole
from umbra.mailbox.seeding import Pacer
from umbra.mailbox.states import joined
from umbra.peer.exchange import PeerError
from umbra.peer.identity import PeerIdentity

log = logging.getLogger(__name__)

SERVER_HELLO = b"VERSION\tdoveadm-client\t1\t3\n+\n"
CLIENT_HELLO = b"VERSION\tdoveadm-server\t1\t3\n"
CLIENT_OPTION = b"\t\tOPTION\tlog-passthrough\n"
HANDSHAKE_LINES = 8
HANDSHAKE_TIMEOUT = 5.0
# What was broken off gets this long to end (seconds).
LINGER = 10.0
CHUNK = 64 * 1024
# Bounds for one sync and its stream (seconds). They are for the first copy of a huge mailbox; a
# sync that stalls ends long before.
SYNC_LIMIT = 6 * 3600.0
STREAM_LIMIT = SYNC_LIMIT + 60
MAX_STREAMS = 256
# The peer's word for what is one user's trouble.
BUSY = "busy"
# After so many surprises within so many seconds nothing is foretold of a user.
SURPRISES = 2
SURPRISED_SECONDS = 3600.0
# So long a mailbox that is being renamed or deleted may be in no list (seconds).
MISSING_PAUSE = 0.1
# Bytes of a state: with more, what dsync says of all mailboxes at first is too much to be held.
MAX_STATE = 512 * 1024
# Of so many users it is kept what their mailboxes were, of those who were synced last.
MAX_TREES = 10_000


class Exchange(Protocol):
    """The part of a peer link's exchange that is used here."""

    async def send(self, data: bytes) -> None:
        """Send data."""

    async def end(self) -> None:
        """Nothing more from this side."""

    async def receive(self) -> bytes | None:
        """Next data, None after the other side's end."""

    async def result(self) -> dict[str, Any]:
        """The server's answer."""


class Link(Protocol):
    """The part of ``PeerLink`` that is used here."""

    name: str

    def exchange(
        self, op: str, args: Mapping[str, Any], *, timeout: float
    ) -> AbstractAsyncContextManager[Any]:
        """Run an exchange."""


class Refused(Exception):
    """A connection or request that is not what it must be."""


def parse_command(lines: list[bytes]) -> str | None:
    """Read the lines that follow the version and return the user once the command is there.

    None if it is not yet.

    :raises Refused: for anything but options and then ``dsync-server`` for one user.
    """
    for line in lines:
        try:
            fields = [unescape(field) for field in line.decode().split("\t")]
        except UnicodeDecodeError:
            raise Refused("not UTF-8") from None
        flags = fields.pop(0)
        if "x" in flags and fields:
            fields.pop(0)
        if set(flags) - set("xvD") or len(fields) < 2:
            raise Refused(f"not a command: {line[:80]!r}")
        user, command, *arguments = fields
        if command == "OPTION":
            continue
        if (
            command != "dsync-server"
            or not valid_user(user)
            or arguments not in ([f"-u{user}"], ["-u", user])
        ):
            raise Refused(f"only dsync-server for one user passes here, not {line[:80]!r}")
        return user
    return None


def valid_user(user: object) -> bool:
    """Return whether ``user`` can be a user's name.

    Printable, not empty, not an option, of bounded length.
    """
    return (
        isinstance(user, str)
        and 0 < len(user) <= 320
        and user.isprintable()
        and not user.startswith("-")
    )


async def copy(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    exchange: Exchange,
    moved: Callable[[], None] = lambda: None,
    pace: Callable[[int], Awaitable[None]] | None = None,
    settle: Callable[[], Awaitable[None]] | None = None,
    ended: Callable[[], None] = lambda: None,
    through: Callable[[bytes], bytes] = lambda data: data,
    told: Foretelling | None = None,
) -> tuple[int, int]:
    """Copy both ways until both sides have ended; call ``moved`` whenever data did.

    :param pace: returns when so many bytes may be sent.
    :param settle: awaited when the local side has ended, before the other side hears of that.
    :param ended: called when the other side has ended.
    :param through: returns what the local side gets of data that has come; ValueError for none.
    :param told: answers the local side for the other one; Surprise if that one says otherwise.
    :returns: the bytes sent and received over the exchange.

    Back pressure: each direction holds at most one chunk beside the transports' buffers. When one
    side has ended, the other gets ``STALL_SECONDS``: a disk may take its time to have all of it.
    Raises PeerError or OSError of the side that broke.
    """
    sent = received = 0
    over = asyncio.Event()

    async def upstream() -> None:
        nonlocal sent
        with suppress(OSError):
            # dsync closes with unread data at times, which reads as a reset. Its stream has an
            # end mark of its own, so a cut one is never taken for a whole one.
            while data := await reader.read(CHUNK):
                if told is not None:
                    back, data = told.feed_local(data)
                    if back:
                        writer.write(back)
                        await writer.drain()
                if pace is not None:
                    await pace(len(data))
                await exchange.send(data)
                sent += len(data)
                moved()
        if told is not None and told.mode is not Mode.PLAIN:
            if not told.said:
                raise EOFError("dsync here broke off")
            # It has closed long before the other side has read all of it.
            await over.wait()
        if settle is not None:
            await settle()
        await exchange.end()

    async def downstream() -> None:
        nonlocal received
        gone = False
        while (data := await exchange.receive()) is not None:
            received += len(data)
            moved()
            if told is not None:
                data = told.feed_remote(data)
            try:
                if not gone and data:
                    writer.write(through(data))
                    await writer.drain()
            except (OSError, RuntimeError):  # uvloop says the latter of a closed connection
                # The local side has all it wants. What still comes is dropped, so that the
                # exchange ends in order and its connection can carry the next one.
                gone = True
        if told is not None:
            told.end_remote()
        ended()
        over.set()
        with suppress(OSError, RuntimeError):
            writer.write_eof()

    tasks = [asyncio.create_task(upstream()), asyncio.create_task(downstream())]
    try:
        done, left = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if left and not any(task.exception() for task in done):
            await asyncio.wait(left, timeout=STALL_SECONDS)
        for task in tasks:
            if task.done():
                task.result()
        if not all(task.done() for task in tasks):
            raise OSError(f"one side ended, the other did not within {STALL_SECONDS:g} s")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return sent, received


@dataclass
class _Stream:
    """One sync under way: dsync's connection, once it is there, and the task that carries it."""

    local: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]]
    told: Foretelling
    moved: float
    task: asyncio.Task[None] = field(init=False)
    locks: bool = True  # the dsync here runs, and may hold locks of the user's mailboxes
    gives_way: bool = False

    def move(self) -> None:
        """Note that data moved now."""
        self.moved = monotonic()


class DsyncCarrier:
    """Primary side: the socket of one peer, and the syncs that go through it.

    The exchange is opened before dsync asks for it, so that both Dovecots prepare the user at the
    same time.

    :param directory: ``/run/umbra-dsync``.
    :param pacer: says when data may be sent.
    :param relied_on: whether the peer may have to take over from the copy as it is.
    """

    def __init__(
        self,
        directory: Path,
        link: Link,
        doveadm: Doveadm,
        pacer: Pacer | None = None,
        relied_on: Callable[[], bool] = lambda: True,
    ) -> None:
        self._path = directory / f"{link.name}.sock"
        self._link = link
        self._doveadm = doveadm
        self._pacer = pacer or Pacer(lambda: 0.0)
        self._relied_on = relied_on
        self._expected: dict[str, _Stream] = {}
        self._hello = b""  # what the peer's dsync says first
        self._trees: dict[str, bytes] = {}  # of users who had the same mailboxes on both nodes
        self._surprises: dict[str, list[float]] = {}
        self._missing: dict[str, frozenset[bytes]] = {}  # what the last sync did not see
        self._streams: set[asyncio.Task[None]] = set()
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen. OSError if the directory is not there."""
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._accept, self._path, limit=CHUNK)
        # The directory says who may connect; Dovecot's user is not this one.
        os.chmod(self._path, 0o666)

    async def stop(self) -> None:
        """Stop listening and break what runs."""
        if self._server is not None:
            self._server.close()
        self.cut()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._streams, *self._connections, return_exceptions=True)
        self._path.unlink(missing_ok=True)

    def progress(self, user: str) -> float:
        """Return when data of the running sync of ``user`` last moved (monotonic), 0 for none."""
        stream = self._expected.get(user)
        return stream.moved if stream else 0.0

    def tree(self, user: str) -> bytes:
        """Return what stands for the mailboxes that both nodes have of ``user``, or b""."""
        return self._trees.get(user, b"")

    def teach(self, user: str, tree: bytes) -> None:
        """Know from now on which mailboxes both nodes have, b"" for nothing.

        If it is wrong, it is a surprise.
        """
        self._trees.pop(user, None)
        if not tree:
            return
        self._trees[user] = tree
        if len(self._trees) > MAX_TREES:
            del self._trees[next(iter(self._trees))]

    def cut(self, user: str = "") -> None:
        """Break all streams: their syncs fail at once instead of hanging on a dead peer.

        Or that of ``user`` alone, so that the locks here are free: it ends as GAVE_WAY. One that
        has ended here, and waits only for the peer, goes on.
        """
        if not user:
            for task in self._streams:
                task.cancel()
            return
        stream = self._expected.get(user)
        if stream is not None and stream.locks and not stream.gives_way:
            stream.gives_way = True
            stream.task.cancel()

    async def sync(
        self, user: str, state: str, *, merge: bool = False, apart: Sequence[str] = ()
    ) -> SyncResult:
        """Sync ``user`` to the peer; never two at once for one user.

        ``merge`` and ``apart``: see ``Doveadm.sync``. LOST if the link is why it failed. UNSAFE if
        the copy would be without acknowledged messages, and is relied on.
        """
        guard = Guard.NOTHING
        if not merge:
            guard = Guard.ALL if self._relied_on() else Guard.INBOX if state else Guard.NOTHING
        told = self._foretelling(user, state, guard=guard)
        return await self._sync(user, state, told, merge=merge, apart=apart)

    async def sync_mailbox(self, user: str, state: str, mailbox: str) -> SyncResult | None:
        """Sync one mailbox, of which messages have changed; the others are not opened for that.

        Only as it was foretold, so that the name means the same mailbox on both nodes. Else None:
        nothing was done, and all of the user's mailboxes have to be synced. Also where dsync found
        nothing to do: it passes over a mailbox that is renamed between its list and its look.

        :param mailbox: a name for which ``listable`` holds.
        """
        if len(state) > MAX_STATE:
            return None
        try:
            told = self._foretelling(user, state, single=True)
            result = await self._sync(user, state, told, only=mailbox)
        except Whole:
            return None
        if result.outcome is Outcome.SYNCED and not told.changed:
            return None
        if result.state is None:
            return result
        try:
            return replace(result, state=joined(state, result.state))
        except ValueError as error:
            log.warning("the state of %s of %s: %s", mailbox, user, error)
            return replace(result, state=None)

    async def _sync(
        self,
        user: str,
        state: str,
        told: Foretelling,
        *,
        merge: bool = False,
        apart: Sequence[str] = (),
        only: str = "",
    ) -> SyncResult:
        loop = asyncio.get_running_loop()
        local, settled = loop.create_future(), loop.create_future()
        stream = self._expected[user] = _Stream(local, told, monotonic())
        stream.task = task = asyncio.create_task(
            self._carry(user, stream, settled), name=f"dsync {user}"
        )
        self._streams.add(task)
        task.add_done_callback(self._ended)
        try:
            result = await self._doveadm.sync(
                user, f"tcp:{self._path}", state, SYNC_LIMIT, merge=merge, apart=apart, only=only
            )
            stream.locks = False
            if result.outcome in (Outcome.SYNCED, Outcome.CHANGED):
                # The peer's disk has it, or the stream has ended without.
                await self._confirmed(stream, settled)
        finally:
            del self._expected[user]
            if not local.done():
                task.cancel()
        if result.outcome is not Outcome.SYNCED:
            # The stream ends with the connection of the dsync that has failed.
            heard = told.mode is Mode.PLAIN
            await asyncio.wait({task}, timeout=1.0 if heard else LINGER + 1.0)
        if not settled.done():
            if stream.gives_way:
                reason = "it gave way to a change that waits for another peer"
                return SyncResult(Outcome.GAVE_WAY, reason=reason, begun=told.begun)
            error = task.exception() if task.done() and not task.cancelled() else None
            if isinstance(error, PeerError):
                outcome = Outcome.FAILED if error.code == BUSY else Outcome.LOST
                return SyncResult(outcome, reason=error.text, begun=told.begun)
            if isinstance(error, Surprise):
                return replace(self._surprised(user, error), begun=told.begun and error.harmful)
            if isinstance(error, Unsafe):
                return await self._unsafe(user, state, error)
            if isinstance(error, Whole):
                raise error
            if result.outcome in (Outcome.SYNCED, Outcome.CHANGED):
                return SyncResult(Outcome.LOST, reason="the end of the sync was not confirmed")
        elif result.outcome in (Outcome.SYNCED, Outcome.CHANGED):
            self._learn(user, told, merge=merge)
            return replace(result, bare=told.bare)
        return replace(result, begun=told.begun)

    def _foretelling(
        self, user: str, state: str, *, single: bool = False, guard: Guard = Guard.NOTHING
    ) -> Foretelling:
        """Return what is foretold of a sync: without a state nothing, not even a hello.

        The answer that such a user does not exist comes in its place. Whole if a sync of a single
        mailbox cannot be foretold.
        """
        since = monotonic() - SURPRISED_SECONDS
        surprises = [at for at in self._surprises.pop(user, ()) if at > since]
        if surprises:
            self._surprises[user] = surprises
        hello = self._hello if state and len(surprises) < SURPRISES else b""
        tree, logged = self._trees.get(user, b""), functools.partial(self._logged, user)
        told = Foretelling(hello, tree, logged, single=single, guard=guard)
        self._trees.pop(user, None)
        return told

    def _logged(self, user: str, level: int, text: str) -> None:
        log.log(level, "dsync of %s at %s: %s", user, self._link.name, text)

    def _learn(self, user: str, told: Foretelling, *, merge: bool) -> None:
        self._hello = told.hello or self._hello
        self._missing.pop(user, None)
        if told.tree and not merge:
            self.teach(user, told.tree)
        foretold = "mailbox" if told.single else "whole"
        how = foretold if told.mode is Mode.FORETOLD else "hello" if told.greet() else "nothing"
        metrics.FORETOLD.labels(self._link.name, how).inc()

    async def _unsafe(self, user: str, state: str, error: Unsafe) -> SyncResult:
        """Say that nothing was done; what may pass is tried once more before that is unsafe."""
        again = bool(error.missing) and self._missing.get(user) != error.missing
        self._missing.pop(user, None)
        if again:
            self._missing[user] = error.missing
            await asyncio.sleep(MISSING_PAUSE)
            return SyncResult(Outcome.CHANGED, state or None, reason=f"{user}: {error}")
        return SyncResult(Outcome.UNSAFE, reason=f"{user} is copied anew: {error}")

    def _surprised(self, user: str, error: Surprise) -> SyncResult:
        """Whatever it was, the peer may have taken a part of the sync."""
        self._hello = b""
        self._surprises.setdefault(user, []).append(monotonic())
        metrics.FORETOLD.labels(self._link.name, "surprise").inc()
        return SyncResult(Outcome.SURPRISED, reason=f"not what was foretold: {error}")

    async def _confirmed(self, stream: _Stream, settled: asyncio.Future[None]) -> None:
        """Return when the peer has it on its disk or the stream has ended.

        dsync itself ends one that stalls, but one that was foretold has ended here already.
        """
        while not (stream.task.done() or settled.done()):
            left = stream.moved + STALL_SECONDS - monotonic() if stream.told.waits else None
            if left is not None and left <= 0:
                stream.task.cancel()
            await asyncio.wait(
                {stream.task, settled},
                timeout=STALL_SECONDS if left is None else max(left, 0.1),
                return_when=asyncio.FIRST_COMPLETED,
            )

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._streams.discard(task)
        if not task.cancelled():
            task.exception()  # logged where it came up; a sync that ended well does not ask for it

    async def _carry(
        self,
        user: str,
        stream: _Stream,
        settled: asyncio.Future[None],
    ) -> None:
        name = self._link.name
        try:
            async with self._link.exchange(
                "dsync", {"user": user}, timeout=STREAM_LIMIT
            ) as exchange:
                reader, writer = await stream.local
                writer.write(stream.told.greet())
                try:
                    sent, received = await copy(
                        reader,
                        writer,
                        exchange,
                        stream.move,
                        pace=self._pacer.spend,
                        ended=functools.partial(settled.set_result, None),
                        told=stream.told,
                    )
                except Surprise:
                    # The peer's dsync has all that it was to hear and may still be at it. The next
                    # sync must not come before its end.
                    with suppress(PeerError, OSError):
                        async with asyncio.timeout(LINGER):
                            await exchange.result()
                    raise
                metrics.CARRIED.labels(name, "sent").inc(sent)
                metrics.CARRIED.labels(name, "received").inc(received)
                await exchange.result()
        except PeerError as error:
            log.warning("dsync of %s to %s: %s", user, name, error)
            raise
        except Surprise as error:
            log.warning("dsync of %s: %s surprised us: %s", user, name, error)
            raise
        except (OSError, EOFError) as error:
            log.info("dsync of %s to %s: %s", user, name, error or type(error).__name__)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.current_task()
        assert connection is not None
        self._connections.add(connection)
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT):
                user = await self._handshake(reader, writer)
            stream = self._expected.get(user)
            if stream is None or stream.local.done():
                raise Refused(f"no sync of {user} was asked for")
            stream.local.set_result((reader, writer))
            await asyncio.wait({stream.task})
        except Refused as error:
            metrics.REFUSED.labels("primary").inc()
            log.warning("dsync connection refused: %s", error)
        except (OSError, EOFError, ValueError, TimeoutError) as error:
            log.info("a connection to %s ended: %s", self._path, error or type(error).__name__)
        except asyncio.CancelledError:
            pass  # only stop() cancels; the stream protocol's callback would log it as an error
        finally:
            self._connections.discard(connection)
            writer.transport.abort()

    async def _handshake(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        version = await read_line(reader)
        name, _, minor = version.rpartition(b"	")
        if name != b"VERSION	doveadm-server	1" or not minor.isdigit() or int(minor) < 3:
            raise Refused(f"not a doveadm client of version 1.3: {version[:80]!r}")
        writer.write(SERVER_HELLO)
        lines: list[bytes] = []
        while (user := parse_command(lines)) is None:
            if len(lines) > HANDSHAKE_LINES:
                raise Refused("no command")
            lines.append(await read_line(reader))
        return user


async def _until_ended(local: socket.socket) -> None:
    """Say that nothing more comes, and return when the other side has ended too."""
    loop = asyncio.get_running_loop()
    with local, suppress(OSError):
        local.setblocking(False)
        local.shutdown(socket.SHUT_WR)
        while await loop.sock_recv(local, CHUNK):
            pass


def _refuse_if(full: str) -> None:
    if full:
        raise PeerError("full", full)


class DsyncHandler:
    """Shadow side: the handler of the operation ``dsync``.

    A dsync whose stream is broken off goes on with what it was sent before; all of a sync, where
    the primary has foretold the answers. So the next one of that user waits for its end, and a node
    that becomes primary does before it opens: it would take back what users change from then on.

    :param disk: has what was synced before the primary hears of the end.
    :param seen: told of each user for whom a sync comes, also of one that will fail.
    """

    def __init__(
        self,
        is_primary: Callable[[], bool],
        disk: MailDisk,
        path: Path = SOCKET,
        *,
        seen: Callable[[str], None] = lambda user: None,
    ) -> None:
        self._is_primary = is_primary
        self._disk = disk
        self._socket = path
        self._seen = seen
        self._serving: dict[asyncio.Task[Any], str] = {}
        self._ending: dict[asyncio.Task[Any], str] = {}

    async def quiet(self, user: str | None = None) -> None:
        """Return when no dsync that was broken off writes to mailboxes (of ``user``) any more.

        OSError if one does not end within ``LINGER`` seconds.
        """
        # One that was broken off this moment has not come to ``_broken_off`` yet.
        breaking = {task: of for task, of in self._serving.items() if task.cancelling()}
        for tasks in breaking, self._ending:
            if ending := [task for task, of in tasks.items() if user in (None, of)]:
                _, left = await asyncio.wait(ending, timeout=LINGER)
                if left:
                    raise OSError(f"{len(left)} dsyncs that were broken off have not ended")

    async def __call__(
        self, peer: PeerIdentity, args: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Any]:
        """Connect the exchange to a ``dsync-server`` of the local Dovecot.

        PeerError ``refused`` if that must not be, ``busy`` if a dsync of this user still runs.
        """
        user = args.get("user")
        if self._is_primary():
            metrics.REFUSED.labels("shadow").inc()
            raise PeerError(
                "refused", "this node is primary; its mailboxes take no changes from others"
            )
        if not valid_user(user) or len(self._serving) >= MAX_STREAMS:
            metrics.REFUSED.labels("shadow").inc()
            raise PeerError(
                "refused", "no such user" if not valid_user(user) else "too many streams"
            )
        self._seen(str(user))
        task = asyncio.current_task()
        assert task is not None
        self._serving[task] = str(user)
        try:
            try:
                await self.quiet(str(user))
            except OSError as error:
                raise PeerError(BUSY, str(error)) from None
            _refuse_if(await self._disk.full())
            sent, received = await self._serve(str(user), exchange)
        except (OSError, EOFError, ValueError, TimeoutError) as error:
            raise PeerError(
                "dovecot", f"the local Dovecot broke off: {error or type(error).__name__}"
            ) from None
        finally:
            del self._serving[task]
        return {"sent": sent, "received": received}

    async def _settle(self) -> None:
        await self._disk.settle()
        _refuse_if(self._disk.full_now())  # it may have got so, and Dovecot would not say so

    async def _serve(self, user: str, exchange: Exchange) -> tuple[int, int]:
        reader, writer = await asyncio.open_unix_connection(self._socket, limit=CHUNK)
        try:
            command = f"\t{escape(user)}\tdsync-server\t-u{escape(user)}\n".encode()
            writer.write(CLIENT_HELLO + CLIENT_OPTION + b"x\tproxy-ttl=1" + command)
            async with asyncio.timeout(HANDSHAKE_TIMEOUT):
                answer = [await read_line(reader), await read_line(reader)]
            if answer != SERVER_HELLO.splitlines():
                raise OSError(f"unexpected handshake {answer!r}; is the socket's mode 0600?")
            expunged = Expunged()
            try:
                return await copy(
                    reader, writer, exchange, settle=self._settle, through=expunged.feed
                )
            finally:
                if expunged.left_out:
                    metrics.EXPUNGED.inc(expunged.left_out)
                    log.info("%d messages of %s were expunged while they were copied: the sync"
                             " is to be made again", expunged.left_out, user)  # fmt: skip
        finally:
            if not reader.at_eof():
                self._broken_off(user, writer)
            writer.transport.abort()

    def _broken_off(self, user: str, writer: asyncio.StreamWriter) -> None:
        """Note a dsync until it has ended; its connection is left to ``_until_ended``."""
        connection = writer.get_extra_info("socket")
        if connection is None or connection.fileno() < 0:
            return  # it has ended
        local = socket.socket(fileno=os.dup(connection.fileno()))
        task = asyncio.create_task(_until_ended(local), name=f"end of dsync {user}")
        self._ending[task] = user
        task.add_done_callback(self._ending.pop)
