"""JSON lines, however they are cut into pieces on their way."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbra.peer import rows
from umbra.peer.connection import PeerError
from umbra.peer.exchange import Exchange
from umbra.peer.rows import received_rows, send_rows


class Pipe:
    """Gives back what was sent, in pieces of ``size`` bytes."""

    def __init__(self, data: bytes = b"", size: int = 1000) -> None:
        self.data = data
        self.size = size

    async def send(self, data: bytes) -> None:
        self.data += data

    async def receive(self) -> bytes | None:
        piece, self.data = self.data[: self.size], self.data[self.size :]
        return piece or None


@given(st.lists(st.lists(st.text() | st.integers(), max_size=4), max_size=20), st.integers(1, 50))
async def test_rows_come_as_they_were_sent(sent: list[list[Any]], size: int) -> None:
    async def each() -> Any:
        for row in sent:
            yield row

    pipe = Pipe(size=size)
    await send_rows(pipe, each())
    assert [row async for row in received_rows(pipe)] == sent


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"{}\n{", "cut off"),
        (b"{}\nx\n", "not JSON"),
        (b"{}\n" + b"[" * 20_000 + b"\n", "not JSON"),
        (b"{}\n\xff\n", "not JSON"),
        (b"{}\n" + b"x" * (rows.MAX_LINE + 1000), "over"),
        (b"{}\n\n[]\n", "not a JSON object"),
    ],
)
async def test_what_are_no_objects_is_refused(data: bytes, why: str) -> None:
    pipe = Pipe(data)
    exchange = Exchange.__new__(Exchange)
    exchange.receive = pipe.receive  # type: ignore[method-assign]
    found = exchange.receive_lines()
    assert await anext(found) == {}
    with pytest.raises(PeerError, match=why) as caught:
        await anext(found)
    assert caught.value.code == "protocol"
