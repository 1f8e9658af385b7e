"""The doveadm-server protocol, against recorded answers of Dovecot 2.4.1."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbra.mailbox import doveadm as module
from umbra.mailbox.doveadm import Doveadm, DoveadmError, Outcome, escape, unescape

STATE = "AQAAAKAwhR0hwAJrcFkAABC/87ohwAJrAAAAAAEAAAAAAAAAAAAAAAAAAAAAAAAAIriDbQ=="


class Server:
    """Answers one command as Dovecot did; keeps what it was asked."""

    def __init__(self, answer: bytes, hello: bytes = b"+\n") -> None:
        self.answer, self.hello, self.asked = answer, hello, b""
        self.input = b""

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            assert await reader.readline() == b"VERSION\tdoveadm-server\t1\t0\n"
            writer.write(self.hello)
            self.asked = await reader.readline()
            if b"\tsieve put\t" in self.asked:
                self.input = await reader.readuntil(b"\r\n.\r\n")
            writer.write(self.answer)
            if not self.answer:
                await reader.read()
        except ConnectionError:
            pass
        finally:
            writer.close()


@asynccontextmanager
async def dovecot(path: Path, server: Server) -> AsyncIterator[Doveadm]:
    async with await asyncio.start_unix_server(server, path / "doveadm-server"):
        yield Doveadm(path / "doveadm-server")


@given(st.text())
def test_escape_is_reversible_and_safe(text: str) -> None:
    escaped = escape(text)
    assert unescape(escaped) == text
    assert not set("\0\t\r\n") & set(escaped)


def test_unescape_of_what_nobody_sends() -> None:
    assert unescape("a\x01xb") == "axb"
    assert unescape("a\x01") == "a\x01" or unescape("a\x01") == "a"


@pytest.mark.parametrize(
    ("answer", "outcome", "state"),
    [
        (f"{STATE}\t\n+\n".encode(), Outcome.SYNCED, STATE),
        (f"{STATE}\t\n-CHANGED\n".encode(), Outcome.CHANGED, STATE),
        (b"\n-NOUSER\n", Outcome.NO_USER, None),
        (b"\n-TEMPFAIL\n", Outcome.FAILED, None),
        (b"\n-\n", Outcome.FAILED, None),
        (b"\n", Outcome.FAILED, None),
        (b"what\nis this\n", Outcome.FAILED, None),
    ],
)
async def test_sync(tmp_path: Path, answer: bytes, outcome: Outcome, state: str | None) -> None:
    server = Server(answer)
    async with dovecot(tmp_path, server) as doveadm:
        result = await doveadm.sync("a@example.org", "tcp:/run/x.sock", "old", 5)
    assert (result.outcome, result.state) == (outcome, state)
    assert bool(result.reason) == (outcome is not Outcome.SYNCED)
    fields = server.asked.decode().rstrip("\n").split("\t")
    assert fields[:5] == ["", "a@example.org", "backup", "-u", "a@example.org"]
    assert fields[-3:] == ["-s", "old", "tcp:/run/x.sock"]


@pytest.mark.parametrize(
    ("state", "merge", "command"),
    [("old", False, "backup"), ("old", True, "sync"), ("", False, "backup")],
)
async def test_one_way_but_for_a_merge(
    tmp_path: Path, state: str, merge: bool, command: str
) -> None:
    """Two-way from scratch took what a copy lacked or had too much for newer (2.4.1)."""
    server = Server(f"{STATE}\t\n+\n".encode())
    async with dovecot(tmp_path, server) as doveadm:
        await doveadm.sync("a@example.org", "tcp:/run/x.sock", state, 5, merge=merge)
    fields = server.asked.decode().split("\t")
    assert (fields[2], "-f" in fields) == (command, not state), "from scratch: every mailbox"


async def test_mailboxes_that_a_merge_leaves_alone(tmp_path: Path) -> None:
    server = Server(f"{STATE}\t\n+\n".encode())
    async with dovecot(tmp_path, server) as doveadm:
        await doveadm.sync("a", "tcp:/run/x.sock", "", 5, merge=True, apart=["one", "-A"])
    fields = server.asked.decode().split("\t")
    at = fields.index("-x")
    assert fields[at : at + 4] == ["-x", "one", "-x", "-A"]


async def test_a_user_cannot_add_arguments(tmp_path: Path) -> None:
    server = Server(b"\n-NOUSER\n")
    async with dovecot(tmp_path, server) as doveadm:
        assert not await doveadm.exists("a\t-A\nx")
    assert server.asked == b"\ta\x01t-A\x01nx\tuser\ta\x01t-A\x01nx\n"


async def test_users(tmp_path: Path) -> None:
    answer = b'{"userList":["a@example.org","b@example.org"]}\n+\n'
    async with dovecot(tmp_path, Server(answer)) as doveadm:
        assert await doveadm.users() == ["a@example.org", "b@example.org"]


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (b"\n+\n", False),
        (b"a090290051c5026bdf4d000010bff3ba\t31\t\n+\n", True),
        (b"\n-NOUSER\n", None),
    ],
)
async def test_has_message(tmp_path: Path, answer: bytes, found: bool | None) -> None:
    async with dovecot(tmp_path, Server(answer)) as doveadm:
        assert await doveadm.has_message("a@example.org", "id") is found


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (b"\n+\n", False),
        (b"id\t\n+\n", True),
        (b"other\x01nid\t\n+\n", False),
        (b"other\x01nid\tid\x01nother\t\n+\n", True),
        (b"\n-NOUSER\n", None),
    ],
)
async def test_an_id_that_a_sender_wrote_below_is_no_delivery(
    tmp_path: Path, answer: bytes, found: bool | None
) -> None:
    """Who got the message too could else have another's copy of it dropped."""
    server = Server(answer)
    async with dovecot(tmp_path, server) as doveadm:
        assert await doveadm.has_delivery("a@example.org", "id") is found
    assert server.asked.endswith(b"\thdr.x-umbra-id\tHEADER\tX-Umbra-Id\tid\n")


async def test_has_message_by_either_id(tmp_path: Path) -> None:
    server = Server(b"\n+\n")
    async with dovecot(tmp_path, server) as doveadm:
        await doveadm.has_message("a@example.org", "id", "<1@example.org>")
    assert server.asked.endswith(
        b"\tHEADER\tX-Umbra-Id\tid\tOR\tHEADER\tMessage-ID\t<1@example.org>\n"
    )
    async with dovecot(tmp_path, server) as doveadm:
        await doveadm.has_message("a@example.org", "id", "1")
    assert server.asked.endswith(b"-u\ta@example.org\tHEADER\tX-Umbra-Id\tid\n")


async def test_no_socket(tmp_path: Path) -> None:
    with pytest.raises(DoveadmError, match="No such file"):
        await Doveadm(tmp_path / "none").users()


async def test_wrong_mode_of_the_socket_is_said(tmp_path: Path) -> None:
    async with dovecot(tmp_path, Server(b"", hello=b"-\n")) as doveadm:
        with pytest.raises(DoveadmError, match="0600"):
            await doveadm.users()


async def test_silence_is_bounded(tmp_path: Path) -> None:
    async with dovecot(tmp_path, Server(b"")) as doveadm:
        with pytest.raises(DoveadmError, match=r"over 0\.1 s"):
            await doveadm.run("", "user", "*", limit=0.1)


async def test_an_endless_line_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LINE", 1000)
    async with dovecot(tmp_path, Server(b"x" * 5000)) as doveadm:
        with pytest.raises(DoveadmError):
            await doveadm.users()


async def test_pieces_put_together_are_the_fields(tmp_path: Path) -> None:
    long = b"x" * (3 * module.CHUNK)
    server = Server(b"1\tguid\t\t" + long + b"\t2\ta\x01nb\t\n+\n")
    fields, rest = [], b""
    async with dovecot(tmp_path, server) as doveadm:
        async for piece, ends in doveadm.pieces("a@example.org", "fetch", "-u", "a@example.org"):
            assert len(piece) <= module.CHUNK
            rest += piece
            if ends:
                fields.append(rest)
                rest = b""
    assert fields == [b"1", b"guid", b"", long, b"2", b"a\x01nb"]
    assert server.asked == b"\ta@example.org\tfetch\t-u\ta@example.org\n"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"\n-NOUSER\n", "ended with NOUSER"),
        (b"\n-\n", "ended with UNKNOWN"),
        (b"1\tguid", "the connection ended"),
        (b"1\tguid\t\n", "the connection ended"),
    ],
)
async def test_pieces_of_what_fails(tmp_path: Path, answer: bytes, reason: str) -> None:
    class Hangup(Server):
        async def __call__(
            self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
        ) -> None:
            await reader.readline()
            await reader.readline()
            writer.write(self.hello + self.answer)
            await writer.drain()
            writer.close()

    async with dovecot(tmp_path, Hangup(answer)) as doveadm:
        with pytest.raises(DoveadmError, match=reason):
            async for _ in doveadm.pieces("a@example.org", "fetch"):
                pass


@pytest.mark.parametrize(
    ("data", "sent"),
    [
        (b"keep;\n", b"keep;\n\r\n.\r\n"),
        (b"", b"\r\n.\r\n"),
        (b".a\n.\n..", b"..a\n..\n...\r\n.\r\n"),
    ],
)
async def test_standard_input(tmp_path: Path, data: bytes, sent: bytes) -> None:
    server = Server(b"\n+\n")
    async with dovecot(tmp_path, server) as doveadm:
        await doveadm.run("a@example.org", "sieve put", "s", data=data)
    assert (server.asked, server.input) == (b"\ta@example.org\tsieve put\ts\n", sent)


async def test_an_address_that_is_no_utf8_has_no_mailbox(tmp_path: Path) -> None:
    server = Server(b"1\t2\t\n+\n")
    async with dovecot(tmp_path, server) as doveadm:
        assert await doveadm.has_message("b\udcff@x", "id", "") is None
        assert server.asked == b""
        # A Message-ID that cannot be looked for is left out.
        assert await doveadm.has_message("bob@x", "id", "<\udcff@x>") is True
        assert b"Message-ID" not in server.asked
        with pytest.raises(DoveadmError):
            await doveadm.exists("b\udcff@x")
