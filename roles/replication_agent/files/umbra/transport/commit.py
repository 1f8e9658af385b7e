"""Group commit: one thread writes to the database.

All that waits goes into one transaction and one fsync.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import queue
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from umbra.transport import metrics

log = logging.getLogger(__name__)

Result = TypeVar("Result")

MAX_JOBS = 1000
MAX_BYTES = 8 * 1024 * 1024


class StoreError(Exception):
    """The store cannot do this; nothing was changed by the operation that failed."""


class ContentError(StoreError):
    """The content of one message cannot be read; that says nothing about the others."""


class StoreFull(StoreError):
    """There is no room on the disk; nothing was stored, and what was there before is intact."""


@dataclass(slots=True)
class _Job:
    run: Callable[[sqlite3.Connection], Any]
    before: Callable[[], None] | None
    settled: Callable[[Any], None] | None
    size: int
    future: asyncio.Future[Any]
    result: Any = None
    error: Exception | None = None


class Committer:
    """Owns the writing connection and its thread.

    Of one event loop; the loop never waits for the disk.
    """

    def __init__(self, connect: Callable[[], sqlite3.Connection]) -> None:
        self._connect = connect
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._open = True
        self._batch: list[_Job] = []
        self._error: StoreError | None = None
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._work, name="umbra-store", daemon=True)
        self._thread.start()

    async def submit(
        self,
        run: Callable[[sqlite3.Connection], Result],
        *,
        before: Callable[[], None] | None = None,
        settled: Callable[[Result | None], None] | None = None,
        size: int = 0,
    ) -> Result:
        """Run ``run`` in the writer's next transaction.

        Return its result once that is on stable storage.

        ``run`` runs again, in a transaction of its own, when the common one failed.

        :param before: runs in the writer's thread before the transaction that holds this job is
            committed; the same function of several jobs runs once.
        :param settled: runs in the writer's thread when the job's fate is known, also if the caller
            was cancelled meanwhile: with the result after the commit, with None if it failed. May
            raise OSError only.
        :param size: bytes that the job writes, to bound a transaction.
        :raises StoreFull, StoreError: the job's changes are not in the store. A caller that is
            cancelled while it waits does not know.
        """
        if not self._open:
            raise StoreError("the store is closed")
        future: asyncio.Future[Result] = self._loop.create_future()
        self._jobs.put(_Job(run, before, cast(Callable[[Any], None] | None, settled), size, future))
        return await future

    async def watch(self) -> None:
        """Return never; StoreError if the writer has ended by a fault, after which nothing works.

        Whoever waits for it has been told by then.
        """
        while self._error is None:
            await self._ended.wait()
        raise self._error

    async def close(self) -> None:
        """Commit what waits, then end the thread."""
        if self._open:
            self._open = False
            self._jobs.put(None)
        await asyncio.to_thread(self._thread.join)

    def _work(self) -> None:
        try:
            self._serve()
        except Exception as error:  # nobody joins a thread to hear of it
            self._loop.call_soon_threadsafe(self._fail, error)

    def _fail(self, error: Exception) -> None:
        """In the loop, as ``submit``: so nobody waits for a thread that has ended."""
        log.critical("the store's writer has ended", exc_info=error)
        self._open = False
        self._error = StoreError(f"the store's writer has ended: {error!r}")
        left = self._batch
        with contextlib.suppress(queue.Empty):
            while True:
                if (job := self._jobs.get_nowait()) is not None:
                    left.append(job)
        for job in left:
            job.error = self._error
        _settle(left)
        self._ended.set()

    def _serve(self) -> None:
        database = self._connect()
        try:
            going = True
            while going:
                job = self._jobs.get()
                if job is None:
                    return
                batch, size = [job], job.size
                while len(batch) < MAX_JOBS and size < MAX_BYTES:
                    try:
                        job = self._jobs.get_nowait()
                    except queue.Empty:
                        break
                    if job is None:
                        going = False
                        break
                    batch.append(job)
                    size += job.size
                self._batch = batch
                self._commit(database, batch)
                self._loop.call_soon_threadsafe(_settle, batch)
                self._batch = []
                del job, batch  # holds contents; the next may be long in coming
        finally:
            database.close()

    def _commit(self, database: sqlite3.Connection, batch: list[_Job]) -> None:
        try:
            for before in {job.before for job in batch if job.before}:
                before()
            database.execute("BEGIN IMMEDIATE")
            for job in batch:
                job.result = job.run(database)
            database.execute("COMMIT")
            metrics.COMMITS.inc()
        except (
            Exception
        ) as error:  # whatever it was, the waiting tasks must hear of it and the thread must live
            if database.in_transaction:
                database.rollback()
            if len(batch) > 1:
                # One job must not take the others down, and a deletion may succeed where a message
                # finds no room.
                for job in batch:
                    self._commit(database, [job])
                return
            batch[0].result, batch[0].error = None, translate(error)
        for job in batch:
            if job.settled:
                try:
                    job.settled(job.result)
                except OSError as error:
                    log.warning("store: %s", error)


def _settle(batch: list[_Job]) -> None:
    for job in batch:
        if job.future.done():  # cancelled meanwhile
            continue
        if job.error is not None:
            job.future.set_exception(job.error)
        else:
            job.future.set_result(job.result)


def translate(error: Exception) -> Exception:
    """Return ``error`` as what callers of the store know.

    What is no failure of the disk or the database stays as it is.
    """
    if isinstance(error, StoreError):
        return error
    if (
        isinstance(error, sqlite3.Error)
        and getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    ):
        return StoreFull("no room on the disk of the shadow store")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreFull("no room on the disk of the shadow store")
    if isinstance(error, sqlite3.Error | OSError):
        return StoreError(f"the shadow store failed: {error}")
    return error
