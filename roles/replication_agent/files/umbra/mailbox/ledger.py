"""What must outlive the agent: users whose changes a peer lacks, and where their last syncs ended.

The argument that no change is forgotten:

* A change is answered when a sync that started after it has ended well, or when the user's
  ``changed`` flag is on disk. There is no third way.
* A flag is removed only after a sync that started after the flag was last asked for has ended
  well. The process may die anywhere in between: the flag is then still there and costs one sync.
* What was not answered yet when the agent died, and what Dovecot committed while there was no
  agent to ask, is in no ledger. So an agent that starts does not know, compares all users, and
  the group is not called protected before that is done.
* A state ("the last sync ended here") may be lost or old: then dsync compares more than it needs
  to. It must never be newer than the peer's mailboxes, so states hold for one binding only: a
  text made of everything that makes them void when it changes (both storage ids, both boot ids,
  the epoch). Another binding drops them all. One that is dropped for a reason of its own is noted
  in memory that outlives this process (``dropped``) before anything is done without it.

SQLite runs in one thread of its own. All that waits is written in one transaction: one sync to
disk serves all changes that came meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from umbra.mailbox.dropped import Dropped, Key

log = logging.getLogger(__name__)
Result = TypeVar("Result")

SCHEMA = """
CREATE TABLE IF NOT EXISTS binding
    (peer TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS changed
    (peer TEXT, user TEXT, PRIMARY KEY (peer, user)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS state
    (peer TEXT, user TEXT, value TEXT NOT NULL, PRIMARY KEY (peer, user)) WITHOUT ROWID;
"""
# States kept in memory; the others are read when they are needed. At most about 8 MB for users
# with a dozen mailboxes.
CACHED_STATES = 8192
# States wait this long (seconds) to be written together; losing them is harmless.
STATE_DELAY = 1.0


class Ledger:
    """The durable ledger. All methods are called in the event loop.

    :param directory: ``/var/lib/umbra/mirror``; made if it is missing.
    :param memory: ``/run/umbra``, a directory that is empty after a boot.
    """

    def __init__(self, directory: Path, memory: Path) -> None:
        self._path = directory / "ledger.sqlite"
        self._dropped = Dropped(memory)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self._db: sqlite3.Connection | None = None
        self._flagged: set[Key] = set()  # as on disk
        self._writing: dict[Key, bool] = {}  # flags in the transaction that runs
        self._flags: dict[Key, bool] = {}  # flags of the next one
        self._waiting: list[asyncio.Future[None]] = []  # for the next one
        self._written: list[asyncio.Future[None]] = []  # for the one that runs
        self._states: OrderedDict[Key, str] = OrderedDict()
        self._dirty: dict[Key, str | None] = {}  # states of the next one
        self._leaving: dict[Key, str | None] = {}  # states in the one that runs
        self._bindings: dict[str, str] = {}
        self._writer: asyncio.Task[None] | None = None
        self._closing = False
        self._wake = asyncio.Event()
        self._urgent = asyncio.Event()

    async def open(self) -> None:
        """Open the database; sqlite3.Error or OSError if it cannot be used.

        A damaged one is set aside: all users are compared after a start anyway.
        """
        try:
            rows, bindings = await self._call(self._open)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            log.error("%s is damaged (%s) and set aside", self._path, error)
            await self._call(self._set_aside)
            rows, bindings = await self._call(self._open)
        self._flagged = set(rows)
        self._bindings = dict(bindings)
        self._writer = asyncio.create_task(self._write_loop(), name="mirror ledger")

    def _open(self) -> tuple[list[Key], list[tuple[str, str]]]:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.executescript(SCHEMA)
        if (found := self._db.execute("PRAGMA quick_check(1)").fetchone()) != ("ok",):
            raise sqlite3.DatabaseError(str(found[0]))
        self._drop(self._dropped.open())
        self._dropped.clear()
        rows = self._db.execute("SELECT peer, user FROM changed").fetchall()
        return rows, self._db.execute("SELECT peer, value FROM binding").fetchall()

    def _drop(self, keys: set[Key] | None) -> None:
        """Drop what a process that died had no more time to drop here."""
        assert self._db is not None
        if keys is None:
            log.error("it is not known whose states hold, so none does")
            self._db.execute("DELETE FROM state")
        elif keys:
            self._commit({}, dict.fromkeys(keys), durable=False)

    def _set_aside(self) -> None:
        if self._db is not None:
            self._db.close()
        for suffix in ("", "-wal", "-shm"):
            path = self._path.with_name(self._path.name + suffix)
            if path.exists():
                path.rename(path.with_name(path.name + ".damaged"))

    async def close(self) -> None:
        """Write what waits and close."""
        if self._writer is not None:
            self._closing = True
            self._wake.set()
            self._urgent.set()
            await self._writer
        if self._db is not None:
            await self._call(self._db.close)
            self._dropped.close()
        self._thread.shutdown()

    # changed users

    def changed(self, peer: str) -> list[str]:
        """Return the users whose changes ``peer`` lacks."""
        keys = self._flagged | self._writing.keys() | self._flags.keys()
        return [key[1] for key in keys if key[0] == peer and self._flag(key)]

    def _flag(self, key: Key) -> bool:
        """What the flag will be when all is written."""
        return self._flags.get(key, self._writing.get(key, key in self._flagged))

    async def flag(self, peer: str, users: Iterable[str]) -> None:
        """Note that ``peer`` lacks changes of ``users``; returns when that is on disk.

        Costs nothing for a user who is noted already.
        """
        wait_next = wait_running = False
        for key in ((peer, user) for user in users):
            if not self._flag(key):
                self._flags[key] = True
            wait_next |= key in self._flags
            wait_running |= key in self._writing
        futures = []
        for wanted, waiters in ((wait_next, self._waiting), (wait_running, self._written)):
            if wanted:
                futures.append(asyncio.get_running_loop().create_future())
                waiters.append(futures[-1])
        if wait_next:
            self._wake.set()
            self._urgent.set()
        for future in futures:
            await future

    def unflag(self, peer: str, user: str) -> None:
        """Note that ``peer`` has all of ``user``.

        Not waited for: a flag that stays costs one sync.
        """
        if self._flag((peer, user)):
            self._flags[(peer, user)] = False
            self._wake.set()

    # states

    async def bind(self, peer: str, value: str) -> bool:
        """Say what the states of ``peer`` hold for.

        Returns False, and drops them durably, if they were for something else.
        """
        if self._bindings.get(peer) == value:
            return True
        for key in [key for key in self._states if key[0] == peer]:
            del self._states[key]
        for key in [key for key in self._dirty if key[0] == peer]:
            del self._dirty[key]
        await self._call(lambda: self._rebind(peer, value))
        self._bindings[peer] = value
        return False

    def _rebind(self, peer: str, value: str) -> None:
        assert self._db is not None
        self._db.execute("BEGIN IMMEDIATE")
        self._db.execute("DELETE FROM state WHERE peer = ?", (peer,))
        self._db.execute("INSERT OR REPLACE INTO binding VALUES (?, ?)", (peer, value))
        self._db.execute("COMMIT")

    def binding(self, peer: str) -> str:
        """Return what the states of ``peer`` hold for, "" if there are none."""
        return self._bindings.get(peer, "")

    async def state(self, peer: str, user: str) -> str:
        """Return the state of the last sync, "" if there is none."""
        key = (peer, user)
        if key in self._states:
            self._states.move_to_end(key)
            return self._states[key]
        for states in self._dirty, self._leaving:
            if key in states:
                return states[key] or ""
        return await self._call(lambda: self._read_state(key))

    def _read_state(self, key: Key) -> str:
        assert self._db is not None
        row = self._db.execute(
            "SELECT value FROM state WHERE peer = ? AND user = ?", key
        ).fetchone()
        return str(row[0]) if row else ""

    def keep(self, peer: str, user: str, state: str | None) -> None:
        """Keep the state of a sync, or drop it (None), so that no later process finds it."""
        key = (peer, user)
        self._dirty[key] = state
        if state is None and not self._dropped.note(key):
            self._urgent.set()  # a process that dies within the next milliseconds leaves it
        self._states.pop(key, None)
        if state is not None:
            self._states[key] = state
            if len(self._states) > CACHED_STATES:
                self._states.popitem(last=False)
        self._wake.set()

    # writing

    async def _write_loop(self) -> None:
        while not self._closing:
            await self._wake.wait()
            # Flags that somebody waits for are written at once, the rest may gather.
            with suppress(TimeoutError):
                async with asyncio.timeout(STATE_DELAY):
                    await self._urgent.wait()
            try:
                await self._write()
            except Exception as error:
                # Nobody is told OK meanwhile: whoever waits for a flag goes on waiting until it is
                # on disk.
                log.error("the mirror ledger cannot be written, trying again: %r", error)
                await asyncio.sleep(1)

    async def _write(self) -> None:
        self._wake.clear()
        self._urgent.clear()
        self._writing, self._flags = self._flags, {}
        self._written, self._waiting = self._waiting, []
        flags, states = self._writing, self._dirty
        self._leaving, self._dirty = states, {}
        self._dropped.turn()
        durable = bool(self._written)
        try:
            await self._call(lambda: self._commit(flags, states, durable))
        except BaseException:
            self._flags = {**flags, **self._flags}
            # A state may have been dropped or bound to something else meanwhile; without one the
            # next sync is from scratch.
            self._dirty = {**dict.fromkeys(states), **self._dirty}
            self._waiting = self._written + self._waiting
            self._writing, self._written, self._leaving = {}, [], {}
            self._wake.set()
            raise
        self._dropped.written()
        self._flagged |= {key for key, value in flags.items() if value}
        self._flagged -= {key for key, value in flags.items() if not value}
        for future in self._written:
            if not future.done():
                future.set_result(None)
        self._writing, self._written, self._leaving = {}, [], {}

    def _commit(self, flags: dict[Key, bool], states: dict[Key, str | None], durable: bool) -> None:
        assert self._db is not None
        # What nobody waits for need not be synced to disk; a later synced commit covers it (one
        # log, in order).
        self._db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        self._db.execute("BEGIN IMMEDIATE")
        try:
            for key, value in flags.items():
                if value:
                    self._db.execute("INSERT OR IGNORE INTO changed VALUES (?, ?)", key)
                else:
                    self._db.execute("DELETE FROM changed WHERE peer = ? AND user = ?", key)
            for key, state in states.items():
                if state is None:
                    self._db.execute("DELETE FROM state WHERE peer = ? AND user = ?", key)
                else:
                    self._db.execute("INSERT OR REPLACE INTO state VALUES (?, ?, ?)", (*key, state))
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise

    async def _call(self, function: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)
