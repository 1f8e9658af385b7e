"""A message's content between the milter and those who store it.

Kept while small, a bounded pipe when large.
"""

from __future__ import annotations

import asyncio
from collections import deque

from umbra.transport.milter import Flow

MEMORY_LIMIT = 64 * 1024
"""A content of up to this many bytes is kept whole and can be read again."""

HIGH = 256 * 1024
LOW = 64 * 1024


class Body:
    """The content of one message: one writer, any number of readers, each at its own pace.

    Once it is over MEMORY_LIMIT, what all readers have taken is dropped, and the milter's
    connection is braked while the slowest one lags.
    """

    def __init__(self, flow: Flow) -> None:
        self.size = 0
        self.large = False
        self._flow = flow
        self._chunks: deque[bytes] = deque()
        self._dropped = 0
        self._held = 0
        self._ended = False
        self._flowing = False
        self._paused = False
        self._readers: set[Reader] = set()

    def write(self, data: bytes) -> bool:
        """Append; True if this made the content a large one: its readers should start now."""
        self._chunks.append(data)
        self.size += len(data)
        self._held += len(data)
        if not self.large:
            if self.size <= MEMORY_LIMIT:
                return False
            self.large = True
            self._join()
            return True
        self._wake()
        self._trim()
        if self._held > HIGH and not self._paused:
            self._paused = True
            self._flow.pause()
        return False

    def end(self) -> None:
        """Nothing more comes."""
        self._ended = True
        if not self.large:
            self._join()
        self._wake()

    def reader(self) -> Reader:
        """Return a reader from the start; of a large content only before it flows."""
        reader = Reader(self)
        self._readers.add(reader)
        return reader

    def flow(self) -> None:
        """All readers are there, if any: what they have taken of a large content may be dropped."""
        self._flowing = True
        self._trim()

    def _join(self) -> None:
        self._chunks = deque([b"".join(self._chunks)])

    def _wake(self) -> None:
        for reader in self._readers:
            reader.wake.set()

    def _trim(self) -> None:
        if not (self.large and self._flowing):
            return
        # With no reader left, because all have failed, nothing is kept: the milter shall not stall.
        taken = min(
            (reader.position for reader in self._readers), default=self._dropped + len(self._chunks)
        )
        while self._dropped < taken:
            self._held -= len(self._chunks.popleft())
            self._dropped += 1
        if self._paused and self._held < LOW:
            self._paused = False
            self._flow.resume()


class Reader:
    """Reads a :class:`Body`; to be closed, or the writer is braked for ever."""

    def __init__(self, body: Body) -> None:
        self.position = 0
        self.wake = asyncio.Event()
        self._body = body

    async def read(self) -> bytes | None:
        """Return the next piece, None at the end."""
        body = self._body
        while (at := self.position - body._dropped) >= len(body._chunks):
            if body._ended:
                return None
            self.wake.clear()
            await self.wake.wait()
        chunk = body._chunks[at]
        self.position += 1
        body._trim()
        return chunk

    def close(self) -> None:
        """Read no more."""
        self._body._readers.discard(self)
        self._body._trim()
