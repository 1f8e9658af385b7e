"""The durable store of shadow messages.

SQLite in WAL mode with ``synchronous=FULL``, large contents in files beside it.

A message is in the store when its row is committed, and gone when its row is deleted. Dying at any
point leaves at most a file that no row names, and the next start removes it. States:

``held``          a copy for another node, which has the message in its queue
``resubmitting``  the other node is gone and this one carries the message on
``unshadowed``    a copy of a message in this node's own queue that no shadow has yet
``parked``        it could not be carried on, and would fail again: kept until somebody looks
``delivered``     the message has left the queue; kept for the safety net, until it is purged
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from umbra.transport import metrics, spool
from umbra.transport.commit import Committer, ContentError, StoreError, StoreFull, translate
from umbra.transport.envelope import Envelope, EnvelopeError
from umbra.transport.ids import valid
from umbra.transport.remaining import FINISHED, Left, Remaining

__all__ = [
    "ContentError",
    "Copy",
    "Gone",
    "Holding",
    "Meta",
    "ShadowStore",
    "ShadowWriter",
    "State",
    "StoreError",
    "StoreFull",
]

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Narrow = Callable[[Envelope, Left], Envelope]

ROW_LIMIT = 256 * 1024
"""Contents up to this many bytes lie in the row itself."""

RESERVE = 64 * 1024 * 1024
"""Bytes that new messages leave free on the disk.

Deleting writes too (to the WAL): a store that filled its disk could never empty itself.
"""

PAGE = 500
PAGE_SIZE = 4096
VERSION = 2

_COUNT_NEW = """
INSERT INTO holding VALUES (NEW.origin, NEW.state, 1, NEW.size)
  ON CONFLICT DO UPDATE SET count = count + 1, bytes = bytes + excluded.bytes;
"""
_COUNT_OLD = """
UPDATE holding SET count = count - 1, bytes = bytes - OLD.size
  WHERE origin = OLD.origin AND state = OLD.state;
"""

# Contents lie apart from the rows, so that a change of state writes one small page only.
_CONTENT = (
    "CREATE TABLE content (number INTEGER PRIMARY KEY, data BLOB NOT NULL) STRICT",
    "CREATE INDEX net ON message (delivered) WHERE state = 'delivered'",
    f"CREATE TRIGGER went AFTER DELETE ON message BEGIN {_COUNT_OLD}"
    " DELETE FROM content WHERE number = OLD.number; END",
)

_FROM_1 = (
    "ALTER TABLE message ADD COLUMN delivered REAL NOT NULL DEFAULT 0",
    "DROP TRIGGER went",
    *_CONTENT,
    "INSERT INTO content SELECT number, content FROM message WHERE content IS NOT NULL",
    "ALTER TABLE message DROP COLUMN content",
)

_SCHEMA = (
    """
    CREATE TABLE message (
      number INTEGER PRIMARY KEY,
      shadow_id TEXT NOT NULL UNIQUE,
      origin TEXT NOT NULL,
      queue_id TEXT NOT NULL,
      state TEXT NOT NULL,
      epoch INTEGER NOT NULL,
      stored REAL NOT NULL,
      size INTEGER NOT NULL,
      new_queue_id TEXT NOT NULL DEFAULT '',
      file TEXT NOT NULL,
      envelope TEXT NOT NULL,
      delivered REAL NOT NULL DEFAULT 0
    ) STRICT
    """,
    "CREATE INDEX listing ON message (origin, state)",
    # The sums are kept, so that telling them costs the same for no message and for 100,000.
    """
    CREATE TABLE holding (
      origin TEXT NOT NULL,
      state TEXT NOT NULL,
      count INTEGER NOT NULL,
      bytes INTEGER NOT NULL,
      PRIMARY KEY (origin, state)
    ) STRICT, WITHOUT ROWID
    """,
    f"CREATE TRIGGER came AFTER INSERT ON message BEGIN {_COUNT_NEW} END",
    *_CONTENT,
    "CREATE TRIGGER moved AFTER UPDATE OF origin, state ON message"
    f" BEGIN {_COUNT_OLD} {_COUNT_NEW} END",
)

# SQLite ends a whole query for one envelope that is no JSON.
_SOUND = "iif(json_valid(envelope), envelope, '{}')"
_ADDRESS = "lower(iif(recipient.type = 'array', recipient.value ->> 0, NULL))"
_GONE = f"RETURNING shadow_id, queue_id, ifnull({_SOUND} ->> '$.message_id', '')"

_INSERT = """
INSERT INTO message (shadow_id, origin, queue_id, state, epoch, stored, size, file, envelope,
delivered) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""

_ADOPT = """
UPDATE message SET origin = ?, queue_id = ?, state = ?, epoch = ?, envelope = ?, new_queue_id = ''
WHERE shadow_id = ?
"""

_DELETE = f"""
DELETE FROM message WHERE shadow_id = ? AND origin = ? AND state = ? {_GONE}, file
"""

# What stays keeps its file: the empty name says that there is none to remove.
_KEEP = f"""
UPDATE message SET state = 'delivered', delivered = ?
WHERE shadow_id = ? AND origin = ? AND state = ? {_GONE}, ''
"""

_OLDEST = """
SELECT number, size, delivered, queue_id, new_queue_id, shadow_id FROM message
WHERE state = 'delivered' ORDER BY delivered
"""

_PURGE = f"""
DELETE FROM message WHERE number = ? {_GONE}, file
"""

_META = "shadow_id, origin, queue_id, state, epoch, stored, size, new_queue_id, envelope, file"


class State(StrEnum):
    """Why a message is here."""

    HELD = "held"
    RESUBMITTING = "resubmitting"
    UNSHADOWED = "unshadowed"
    PARKED = "parked"
    DELIVERED = "delivered"


@dataclass(frozen=True, slots=True)
class Copy:
    """The names of a stored message.

    Its shadow id, the queue id at the node that has it in its queue, and whether it is on hold
    there.
    """

    shadow_id: str
    queue_id: str
    held: bool


@dataclass(frozen=True, slots=True)
class Gone:
    """A message that was deleted; ``message_id`` is that of its header."""

    shadow_id: str
    queue_id: str
    message_id: str
    file: str


@dataclass(frozen=True, slots=True)
class Meta:
    """What is known of a stored message.

    ``stored`` is in seconds since 1970; ``new_queue_id`` is the one of its resubmission. ``said``
    is the envelope, or what is wrong with it.
    """

    shadow_id: str
    origin: str
    queue_id: str
    state: State
    epoch: int
    stored: float
    size: int
    new_queue_id: str
    said: Envelope | EnvelopeError
    file: str

    @property
    def envelope(self) -> Envelope:
        """The envelope. ContentError if it cannot be read: one bad row stops no other."""
        if isinstance(self.said, EnvelopeError):
            raise ContentError(f"the envelope of {self.shadow_id} cannot be read: {self.said}")
        return self.said

    @property
    def message_id(self) -> str:
        """The Message-ID of its header; empty if it has none, or the envelope cannot be read."""
        return self.said.message_id if isinstance(self.said, Envelope) else ""


@dataclass(frozen=True, slots=True)
class Holding:
    """How much is stored of one origin in one state; ``oldest`` is in seconds since 1970."""

    origin: str
    state: State
    count: int
    bytes: int
    oldest: float


class ShadowStore:
    """Shadow messages in ``directory``, which is made if it is missing. One process at a time.

    :param keep: what is discarded because it was delivered stays, ``delivered``, until
        :meth:`purge`.
    """

    def __init__(self, directory: Path, *, reserve: int = RESERVE, keep: bool = False) -> None:
        self._directory = directory
        self._reserve = reserve
        self._keep = keep
        self._spool = directory / "spool"
        self._committer: Committer | None = None
        self._reader: sqlite3.Connection | None = None
        # One thread reads the database, a few write and read files; none of them ever holds up the
        # event loop.
        self._reading = ThreadPoolExecutor(1, "umbra-store-read")
        self._files = ThreadPoolExecutor(4, "umbra-spool")

    async def open(self) -> None:
        """Open, check and clean up. StoreError if what is on the disk cannot be trusted."""
        await self._in(self._reading, self._prepare)
        self._committer = Committer(lambda: self._connect(write=True))

    async def close(self) -> None:
        """Finish what was begun and close."""
        if self._committer is not None:
            await self._committer.close()
            self._committer = None
        if self._reader is not None:
            await self._in(self._reading, self._reader.close)
            self._reader = None
        self._files.shutdown()
        self._reading.shutdown()

    async def watch(self) -> None:
        """Return never; StoreError when nothing can be written any more, for want of a writer."""
        if self._committer is None:
            raise StoreError("the store is not open")
        await self._committer.watch()

    # -- writing

    def begin(
        self,
        shadow_id: str,
        *,
        origin: str,
        queue_id: str,
        envelope: Envelope,
        epoch: int,
        state: State = State.HELD,
    ) -> ShadowWriter:
        """Begin to store a message of ``origin``'s queue.

        ValueError for a bad id, which would end in a file name.
        """
        if not valid(shadow_id):
            raise ValueError("not a shadow id")
        row = (shadow_id, origin, queue_id, str(state), epoch, time.time())
        return ShadowWriter(self, row, envelope.to_json())

    async def discard(
        self,
        shadow_ids: Sequence[str],
        *,
        origin: str,
        state: State = State.HELD,
        delivered: bool = True,
    ) -> list[Gone]:
        """Discard those of ``shadow_ids`` that are there for ``origin`` in ``state``.

        Return what they were.

        :param delivered: they may be kept for the safety net; if not, they are deleted.
        """
        now = time.time()

        def run(database: sqlite3.Connection) -> list[Gone]:
            gone: list[Gone] = []
            for shadow_id in shadow_ids:
                gone += self._discard(database, shadow_id, origin, state, delivered, now)
            return gone

        return await self._write(run, settled=self._unlink)

    def _discard(
        self,
        database: sqlite3.Connection,
        shadow_id: str,
        origin: str,
        state: State,
        delivered: bool,
        now: float,
    ) -> list[Gone]:
        if self._keep and delivered:
            rows = database.execute(_KEEP, (now, shadow_id, origin, state))
        else:
            rows = database.execute(_DELETE, (shadow_id, origin, state))
        return [Gone(*row) for row in rows]

    async def purge(
        self, before: float, max_bytes: int, limit: int, spared: Set[str] = frozenset()
    ) -> int:
        """Delete of what is ``delivered`` the oldest; return how many, ``limit`` at most.

        :param before: what was delivered before this time (seconds since 1970) goes.
        :param max_bytes: so much content may stay.
        :param spared: queue ids and shadow ids of what stays in any case.
        """

        def run(database: sqlite3.Connection) -> list[Gone]:
            (held,) = database.execute(
                "SELECT COALESCE(SUM(bytes), 0) FROM holding WHERE state = 'delivered'"
            ).fetchone()
            rows = database.execute(_OLDEST)
            oldest = [row[:3] for row in islice((r for r in rows if not spared & {*r[3:]}), limit)]
            rows.close()
            gone: list[Gone] = []
            for number, size, delivered in oldest:
                if delivered >= before and held <= max_bytes:
                    break
                gone += [Gone(*row) for row in database.execute(_PURGE, (number,))]
                held -= size
            return gone

        gone = await self._write(run, settled=self._unlink)
        return len(gone)

    async def room(self) -> int:
        """Return how many bytes new messages still have; under 0, none is taken."""
        [(pages,)] = await self._read("PRAGMA freelist_count", ())
        return await self._in(self._files, lambda: self._left(int(pages) * PAGE_SIZE))

    async def claim(self, origin: str, remaining: Remaining | None, narrow: Narrow) -> list[Gone]:
        """Make what is held for ``origin`` this node's to resubmit, in one transaction.

        Repeating it is harmless.

        :param remaining: what was left when the origin gave it up; a message that is not named
            there is deleted. None if unknown.
        :param narrow: returns the envelope of what is left.
        :returns: what was discarded.
        """
        now = time.time()

        def run(database: sqlite3.Connection) -> list[Gone]:
            gone: list[Gone] = []
            if remaining is not None:
                names = database.execute(
                    "SELECT shadow_id, queue_id FROM message WHERE origin = ? AND state = ?",
                    (origin, State.HELD),
                ).fetchall()
                # One envelope at a time: there may be 100,000.
                for shadow_id, queue_id in names:
                    left = remaining.get(queue_id, FINISHED)
                    if left.recipients == ():
                        gone += self._discard(database, shadow_id, origin, State.HELD, True, now)
                        continue
                    if (envelope := _envelope(database, shadow_id)) is not None:
                        _change(database, shadow_id, narrow(envelope, left))
            database.execute(
                "UPDATE message SET state = ? WHERE origin = ? AND state = ?",
                (State.RESUBMITTING, origin, State.HELD),
            )
            return gone

        return await self._write(run, settled=self._unlink)

    async def hold(self, shadow_ids: Sequence[str], held: bool, *, origin: str) -> list[str]:
        """Note of what is held for ``origin`` whether it is on hold in that node's queue.

        Return which of them are here.
        """

        def run(database: sqlite3.Connection) -> list[str]:
            found = []
            for shadow_id in shadow_ids:
                if (
                    database.execute(
                        "SELECT 1 FROM message WHERE shadow_id = ? AND origin = ? AND state = ?",
                        (shadow_id, origin, State.HELD),
                    ).fetchone()
                    and (envelope := _envelope(database, shadow_id)) is not None
                ):
                    _change(database, shadow_id, replace(envelope, held=held))
                    found.append(shadow_id)
            return found

        return await self._write(run)

    async def give_back(self) -> int:
        """Take ``claim`` back: hold for its origin what is not resubmitted yet; return how much.

        A file that Postfix has made of it already is forgotten: on a shadow it is on hold.
        """
        return await self._write(
            lambda database: (
                database.execute(
                    "UPDATE message SET state = ?, new_queue_id = '' WHERE state = ?",
                    (State.HELD, State.RESUBMITTING),
                ).rowcount
            )
        )

    async def park(self, shadow_id: str) -> None:
        """Set aside a message that cannot be carried on."""
        await self._move(State.RESUBMITTING, State.PARKED, "shadow_id = ?", shadow_id)

    async def unpark(self) -> int:
        """Have all that was set aside resubmitted; return how many."""
        return await self._move(State.PARKED, State.RESUBMITTING, "TRUE")

    async def _move(self, old: State, new: State, where: str, *values: str) -> int:
        return await self._write(
            lambda database: (
                database.execute(
                    f"UPDATE message SET state = ? WHERE state = ? AND {where}",
                    (new, old, *values),
                ).rowcount
            )
        )

    async def settle(self, origin: str, shadow_ids: Sequence[str]) -> list[Gone]:
        """Discard those of ``shadow_ids`` that are held for others than ``origin``.

        Return what they were. They were delivered, or ``origin`` has them.
        """
        now = time.time()

        def run(database: sqlite3.Connection) -> list[Gone]:
            rows = database.execute(
                "SELECT shadow_id, origin FROM message"
                " WHERE state = ? AND origin <> ?"
                " AND shadow_id IN (SELECT value FROM json_each(?))",
                (State.HELD, origin, json.dumps(list(shadow_ids))),
            ).fetchall()
            gone: list[Gone] = []
            for shadow_id, other in rows:
                gone += self._discard(database, shadow_id, other, State.HELD, True, now)
            return gone

        return await self._write(run, settled=self._unlink)

    async def note_queue_id(self, shadow_id: str, new_queue_id: str) -> None:
        """Note the queue id under which a resubmitted message is offered to Postfix."""
        await self._write(
            lambda database: (
                database.execute(
                    "UPDATE message SET new_queue_id = ? WHERE shadow_id = ? AND state = ?",
                    (new_queue_id, shadow_id, State.RESUBMITTING),
                ).rowcount
            )
        )

    async def keep_unshadowed(self, meta: Meta, queue_id: str, *, origin: str) -> None:
        """Turn a resubmitted message into one of this node's own queue that no shadow has yet."""
        # Whether it is on hold is its queue file's matter from now on.
        readable = isinstance(meta.said, Envelope)
        envelope = replace(meta.envelope, held=False).to_json() if readable else None
        await self._write(
            lambda database: (
                database.execute(
                    "UPDATE message SET state = ?, origin = ?, queue_id = ?,"
                    " envelope = COALESCE(?, envelope), new_queue_id = ''"
                    " WHERE shadow_id = ? AND state = ?",
                    (
                        State.UNSHADOWED,
                        origin,
                        queue_id,
                        envelope,
                        meta.shadow_id,
                        State.RESUBMITTING,
                    ),
                ).rowcount
            )
        )

    # -- reading

    async def copies(self, origin: str, state: State = State.HELD) -> AsyncIterator[list[Copy]]:
        """Give the names of what is stored for ``origin``.

        In order of arrival, some hundred at a time.
        """
        async for page in self._pages(
            f"shadow_id, queue_id, {_SOUND} ->> '$.held' IS TRUE",
            "origin = ? AND state = ?", origin, state,
        ):  # fmt: skip
            yield [Copy(shadow_id, queue_id, bool(held)) for shadow_id, queue_id, held in page]

    async def left(self, origin: str) -> AsyncIterator[list[tuple[str, int]]]:
        """Give what is held for others than ``origin``: shadow ids, and epochs of their storing.

        In order of arrival, some hundred at a time.
        """
        async for page in self._pages(
            "shadow_id, epoch", "origin <> ? AND state = ?", origin, State.HELD
        ):
            yield [(shadow_id, epoch) for shadow_id, epoch in page]

    async def _pages(
        self, columns: str, where: str, *values: str
    ) -> AsyncIterator[list[tuple[Any, ...]]]:
        """Give these columns of what fits, in order of arrival, a page at a time."""
        last = 0
        while True:
            rows = await self._read(
                f"SELECT number, {columns} FROM message"
                f" WHERE number > ? AND {where} ORDER BY number LIMIT ?",
                (last, *values, PAGE),
            )
            if not rows:
                return
            last = rows[-1][0]
            yield [tuple(row[1:]) for row in rows]

    async def carried_on(self, epochs: Mapping[str, int]) -> set[str]:
        """Return of which messages nothing is to be done for a copy elsewhere.

        Such a one is this node's to carry on, or was finished after that copy was made. If the copy
        was made under a later epoch, another primary had it still when it was finished here.

        :param epochs: by shadow id, under which epoch the other copy was stored.
        """
        rows = await self._read(
            "SELECT shadow_id, state, epoch FROM message"
            " WHERE shadow_id IN (SELECT value FROM json_each(?))",
            (json.dumps(list(epochs)),),
        )
        return {
            shadow_id
            for shadow_id, state, epoch in rows
            if state != State.DELIVERED or epoch >= epochs[shadow_id]
        }

    async def in_order(self, state: State, origin: str | None = None) -> AsyncIterator[Meta]:
        """Give what is in ``state``.

        Of one origin or of all, in the order in which the messages were accepted.
        """
        last = ""
        while True:
            rows = await self._read(
                f"SELECT {_META} FROM message"
                " WHERE shadow_id > ? AND state = ? AND (? IS NULL OR origin = ?)"
                " ORDER BY shadow_id LIMIT ?",
                (last, state, origin, origin, 50),
            )
            if not rows:
                return
            last = rows[-1][0]
            for row in rows:
                yield _meta(row)

    async def kept(self, queue_ids: Set[str]) -> AsyncIterator[Meta]:
        """Give what the safety net has of these queue files; ``queue_id`` is the one asked for."""
        async for page in self._pages(
            "shadow_id, queue_id, new_queue_id", "state = ?", State.DELIVERED
        ):
            for shadow_id, *names in page:
                for queue_id in queue_ids & set(names):
                    if meta := await self.find(shadow_id):
                        yield replace(meta, queue_id=queue_id)

    async def delivered(
        self, addresses: Sequence[str], since: str, until: str
    ) -> AsyncIterator[Meta]:
        """Give what is ``delivered`` and had one of the recipients ``addresses``, in lower case.

        In the order in which it was accepted; with what nobody can tell the recipients of.

        :param since, until: shadow ids, which are ordered by time; ``until`` itself is left out.
        """
        last = since
        wanted = json.dumps(list(addresses))
        while True:
            rows = await self._read(
                f"SELECT {_META} FROM message"
                " WHERE shadow_id > ? AND shadow_id < ? AND state = 'delivered'"
                " AND (NOT json_valid(envelope) OR EXISTS"
                f" (SELECT 1 FROM json_each({_SOUND}, '$.recipients') AS recipient"
                f"  WHERE {_ADDRESS} IN (SELECT value FROM json_each(?))))"
                " ORDER BY shadow_id LIMIT 50",
                (last, until, wanted),
            )
            if not rows:
                return
            last = rows[-1][0]
            for row in rows:
                yield _meta(row)

    async def recipients(self, since: str, until: str) -> list[str]:
        """Return who had something of what is ``delivered``, in lower case; ids as before."""
        rows = await self._read(
            f"SELECT DISTINCT {_ADDRESS}"
            f" FROM message, json_each({_SOUND}, '$.recipients') AS recipient"
            " WHERE shadow_id > ? AND shadow_id < ? AND state = 'delivered'",
            (since, until),
        )
        return [address for (address,) in rows if address]

    async def find(self, shadow_id: str) -> Meta | None:
        """Return what is known of a message, None if it is not here."""
        rows = await self._read(f"SELECT {_META} FROM message WHERE shadow_id = ?", (shadow_id,))
        return _meta(rows[0]) if rows else None

    async def content(self, meta: Meta) -> AsyncIterator[bytes]:
        """Give a message's content piece by piece. ContentError if it is gone or cannot be read."""
        if not meta.file:
            try:
                rows = await self._read(
                    "SELECT data FROM message JOIN content USING (number) WHERE shadow_id = ?",
                    (meta.shadow_id,),
                )
            except StoreError as error:
                raise ContentError(
                    f"the content of {meta.shadow_id} cannot be read: {error}"
                ) from None
            if not rows:
                raise ContentError(f"{meta.shadow_id} is not here any more")
            yield rows[0][0]
            return
        pieces = spool.read(self._spool / meta.file)
        try:
            size = 0
            while piece := await self._in(self._files, lambda: next(pieces, b"")):
                size += len(piece)
                yield piece
        except OSError as error:
            raise ContentError(f"the content of {meta.shadow_id} cannot be read: {error}") from None
        if size != meta.size:
            raise ContentError(f"the content of {meta.shadow_id} has {size} bytes, not {meta.size}")

    async def to_carry_on(self, shadow_ids: Set[str]) -> Set[str]:
        """Return which of them this node has taken over and not carried on yet."""
        rows = await self._read(
            "SELECT shadow_id FROM message WHERE state IN (?, ?)"
            " AND shadow_id IN (SELECT value FROM json_each(?))",
            (State.RESUBMITTING, State.PARKED, json.dumps(list(shadow_ids))),
        )
        return {str(shadow_id) for (shadow_id,) in rows}

    async def stats(self) -> list[Holding]:
        """Return how much is stored, by origin and state."""
        rows = await self._read(
            "SELECT origin, state, count, bytes,"
            " (SELECT stored FROM message WHERE message.origin = holding.origin"
            "  AND message.state = holding.state ORDER BY number LIMIT 1)"
            " FROM holding WHERE count > 0",
            (),
        )
        return [
            Holding(origin, State(state), count, size, oldest)
            for origin, state, count, size, oldest in rows
        ]

    # -- within

    async def _write(
        self,
        run: Callable[[sqlite3.Connection], Result],
        *,
        before: Callable[[], None] | None = None,
        settled: Callable[[Result | None], None] | None = None,
        size: int = 0,
    ) -> Result:
        if self._committer is None:
            raise StoreError("the store is not open")
        return await self._committer.submit(run, before=before, settled=settled, size=size)

    async def _read(self, query: str, values: tuple[Any, ...]) -> list[Any]:
        reader = self._reader
        if reader is None:
            raise StoreError("the store is not open")
        try:
            return await self._in(self._reading, lambda: reader.execute(query, values).fetchall())
        except sqlite3.Error as error:
            raise translate(error) from None

    async def _in_files(self, function: Callable[[], None]) -> None:
        try:
            await self._in(self._files, function)
        except OSError as error:
            raise translate(error) from None

    async def _in(self, pool: ThreadPoolExecutor, function: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(pool, function)

    def _left(self, reusable: int) -> int:
        """Return how many bytes there are beside the reserve.

        Of that, what is reusable within the database is half at most: deleting needs room outside
        it, for the database's log.
        """
        disk = os.statvfs(self._directory)
        free = disk.f_bavail * disk.f_frsize
        return min(free + reusable - self._reserve, free - self._reserve // 2)

    def _check_room(self, reusable: int = 0) -> None:
        if self._left(reusable) < 0:
            raise StoreFull(
                f"less than {self._reserve >> 20} MiB are free on the disk of the shadow store"
            )

    def _sync_spool(self) -> None:
        spool.sync_directory(self._spool)

    def _unlink(self, gone: list[Gone] | None) -> None:
        # Only after the commit: dying in between leaves a file that the next start removes, never a
        # row without its file.
        for item in gone or ():
            if item.file:
                (self._spool / item.file).unlink(missing_ok=True)

    def _connect(self, *, write: bool) -> sqlite3.Connection:
        database = sqlite3.connect(
            self._directory / "shadow.db", isolation_level=None, check_same_thread=False, timeout=30
        )
        database.text_factory = _decode
        database.execute("PRAGMA synchronous = FULL")
        if write:
            database.execute("PRAGMA secure_delete = OFF")
            database.execute("PRAGMA wal_autocheckpoint = 2000")
            database.execute("PRAGMA journal_size_limit = 67108864")
        else:
            database.execute("PRAGMA query_only = ON")
        return database

    def _prepare(self) -> None:
        try:
            self._spool.mkdir(mode=0o700, parents=True, exist_ok=True)
            database = self._connect(write=True)
            try:
                self._check(database)
            finally:
                database.close()
            # The directories' entries too, or the first acknowledged messages could vanish with
            # them.
            for directory in (self._spool, self._directory, self._directory.parent):
                spool.sync_directory(directory)
            self._reader = self._connect(write=False)
        except (sqlite3.Error, OSError) as error:
            raise StoreError(
                f"the shadow store in {self._directory} cannot be opened: {error}"
            ) from None

    def _check(self, database: sqlite3.Connection) -> None:
        database.execute(f"PRAGMA page_size = {PAGE_SIZE}")
        database.execute("PRAGMA journal_mode = WAL")
        version = database.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            self._make(database, _SCHEMA)
        elif version == 1:
            self._make(database, _FROM_1)
        elif version != VERSION:
            raise StoreError(
                f"the shadow store in {self._directory} is of version {version},"
                f" this agent's is {VERSION}"
            )
        # Which messages there are must be certain. The contents, which may be 10 GiB, are not read:
        # that would keep the service closed for minutes. A damaged one is told when it is read.
        for table in ("sqlite_schema", "message", "holding"):
            finding = database.execute(f"PRAGMA quick_check('{table}')").fetchone()[0]
            if finding != "ok":
                raise StoreError(f"the shadow store in {self._directory} is damaged: {finding}")
        files = {
            row[0]: row[1]
            for row in database.execute("SELECT file, size FROM message WHERE file <> ''")
        }
        if removed := spool.sweep(self._spool, set(files)):
            log.info(
                "shadow store: removed %d files of messages that were never acknowledged", removed
            )
        for name, size in files.items():
            path = self._spool / name
            # Both were synced before the row: only a damaged disk explains this. The other messages
            # are still good.
            if not path.exists() or path.stat().st_size != size:
                log.error("shadow store: the content of %s is damaged", name)

    @staticmethod
    def _make(database: sqlite3.Connection, statements: Sequence[str]) -> None:
        # All or nothing: dying on the way leaves the old version.
        database.execute("BEGIN IMMEDIATE")
        for statement in statements:
            database.execute(statement)
        database.execute(f"PRAGMA user_version = {VERSION}")
        database.execute("COMMIT")


class ShadowWriter:
    """A message on its way into the store.

    Nothing of it is there until :meth:`commit` has returned.
    """

    def __init__(self, store: ShadowStore, row: tuple[Any, ...], envelope: str) -> None:
        self._store = store
        self._row = row
        self._envelope = envelope
        self._parts: list[bytes] = []
        self.shadow_id: str = row[0]
        self._buffered = 0
        self._size = 0
        self._file: spool.SpoolFile | None = None
        self._failed: StoreError | None = None

    async def write(self, data: bytes) -> None:
        """Take the next piece; holds at most 256 KiB in memory. StoreFull if there is no room."""
        self._parts.append(data)
        self._buffered += len(data)
        self._size += len(data)
        if self._buffered > ROW_LIMIT:
            await self._flush()

    @property
    def buffered(self) -> int:
        """How many bytes it holds in memory."""
        return self._buffered

    async def commit(self, *, delivered: bool = False) -> None:
        """Make the message durable.

        A message that is here already stays and takes this origin, queue id and state.

        :param delivered: store it for the safety net; then one that is here stays as it is.

        The shadow id stands for the content: both nodes got it from the same primary, so it is not
        compared. StoreFull or StoreError: it is not here. Cancelled: unknown.
        """
        if self._failed is not None:
            raise self._failed
        if self._file is not None:
            await self._flush()
            await self._store._in_files(self._file.sync)
        # From here on the writer's thread decides what becomes of the file: it knows, whatever
        # becomes of this task.
        file, self._file = self._file, None
        parts, self._parts = self._parts, []
        before = self._store._sync_spool if file else None
        at = time.time() if delivered else 0.0
        row = (*self._row, self._size, file.path.name if file else "", self._envelope, at)
        if delivered:
            row = (*row[:3], str(State.DELIVERED), *row[4:])

        def insert(database: sqlite3.Connection) -> bool:
            if file is None:
                # The database does not shrink: room in it is as good as room on the disk.
                (pages,) = database.execute("PRAGMA freelist_count").fetchone()
                self._store._check_room(pages * PAGE_SIZE)
            try:
                number = database.execute(_INSERT, row).lastrowid
                if file is None:
                    database.execute("INSERT INTO content VALUES (?, ?)", (number, b"".join(parts)))
            except sqlite3.IntegrityError:
                if delivered:
                    return False
                shadow_id, origin, queue_id, state, epoch, *_ = row
                database.execute(
                    _ADOPT, (origin, queue_id, state, epoch, self._envelope, shadow_id)
                )
                return False
            return True

        def settled(inserted: bool | None) -> None:
            if file is not None and not inserted:
                file.drop()

        try:
            await self._store._write(
                insert, before=before, settled=settled, size=0 if file else self._size
            )
        except StoreFull:
            metrics.STORE_FULL.inc()
            raise
        metrics.STORED.inc()

    def abort(self) -> None:
        """Drop what is not committed. Harmless when repeated or after :meth:`commit`."""
        self._parts = []
        if self._file is not None:
            # In a thread, behind a write that may still run there after its task was cancelled.
            self._store._files.submit(self._file.drop)
            self._file = None

    async def _flush(self) -> None:
        parts, self._parts, self._buffered = self._parts, [], 0
        file = self._file
        if file is None:
            # Made without its file: a task that is cancelled while the thread opens it must still
            # know it.
            file = self._file = spool.SpoolFile(self._store._spool, self._row[0])

        def write() -> None:
            self._store._check_room()
            file.write(parts)

        try:
            await self._store._in_files(write)
        except StoreError as error:
            self._failed = error
            raise


def _envelope(database: sqlite3.Connection, shadow_id: str) -> Envelope | None:
    """Return the envelope of a row; None if it cannot be read, which whoever needs it tells."""
    [(text,)] = database.execute("SELECT envelope FROM message WHERE shadow_id = ?", (shadow_id,))
    return envelope if isinstance(envelope := _parsed(text), Envelope) else None


def _change(database: sqlite3.Connection, shadow_id: str, envelope: Envelope) -> None:
    database.execute(
        "UPDATE message SET envelope = ? WHERE shadow_id = ?", (envelope.to_json(), shadow_id)
    )


def _meta(row: tuple[Any, ...]) -> Meta:
    shadow_id, origin, queue_id, state, epoch, stored, size, new_queue_id, envelope, file = row
    return Meta(
        shadow_id,
        origin,
        queue_id,
        State(state),
        epoch,
        stored,
        size,
        new_queue_id,
        _parsed(envelope),
        file,
    )


def _parsed(text: str) -> Envelope | EnvelopeError:
    """Return the envelope of a row, or what is wrong with it."""
    try:
        if not text.isascii():  # it was written so
            raise EnvelopeError("the envelope is not ASCII")
        return Envelope.from_json(text)
    except EnvelopeError as error:
        return error


def _decode(data: bytes) -> str:
    # An address may hold bytes that are no UTF-8: lone surrogates, which SQLite gives as such.
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:  # a damaged row; who reads it has to see it beside the others
        return data.decode("utf-8", "replace")
