"""Resubmission against a real TCP SMTP server of the test's own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.transport.support import ENVELOPE, active
from tests.unit.transport.test_store import spoil

from umbra.transport import ids, view
from umbra.transport import resubmit as module
from umbra.transport.discard import Discarder, LocalHolder
from umbra.transport.envelope import Recipient
from umbra.transport.remaining import Left
from umbra.transport.resubmit import Resubmission, Resubmitter
from umbra.transport.smtp import SmtpUnreachable, Stuffer
from umbra.transport.store import ShadowStore, State

CONTENT = b"Subject: x\r\n\r\n.dot\r\n..two\r\n\r\n.\r\nbare \r CR\r\n\x00\xff\r\n"


@dataclass
class Mail:
    commands: list[bytes]
    content: bytes


@dataclass
class Smtpd:
    """A small SMTP server that keeps what it was given, as Postfix would read it."""

    mails: list[Mail] = field(default_factory=list)
    commands: list[bytes] = field(default_factory=list)
    extensions: tuple[str, ...] = (
        "PIPELINING", "8BITMIME", "SMTPUTF8", "DSN", "XFORWARD NAME ADDR PROTO HELO",
    )  # fmt: skip
    refuse: Callable[[bytes], bytes | None] = lambda command: None
    on_data: Callable[[Mail], None] = lambda mail: None
    drop_after_data: bool = False
    sessions: int = 0
    port: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.sessions += 1
        try:
            await self.session(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def session(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mx ESMTP\r\n")
        commands: list[bytes] = []
        while line := await reader.readline():
            command = line.removesuffix(b"\r\n")
            self.commands.append(command)
            verb = command.split(b" ")[0].upper()
            if refusal := self.refuse(command):
                writer.write(refusal + b"\r\n")
            elif verb == b"EHLO":
                said = ["mx", *self.extensions]
                text = "".join(f"250-{item}\r\n" for item in said[:-1]) + f"250 {said[-1]}\r\n"
                writer.write(text.encode())
            elif verb == b"DATA":
                writer.write(b"354 go\r\n")
                lines = []
                while (line := await reader.readuntil(b"\r\n")) != b".\r\n":
                    lines.append(line.removeprefix(b"."))
                mail = Mail(commands, b"".join(lines))
                self.on_data(mail)
                if self.drop_after_data:
                    return
                self.mails.append(mail)
                commands = []
                writer.write(b"250 2.0.0 Ok: queued as 4postfix\r\n")
            elif verb == b"RSET":
                commands = []
                writer.write(b"250 ok\r\n")
            else:
                commands.append(command)
                writer.write(b"250 ok\r\n")


@dataclass
class Bench:
    store: ShadowStore
    smtpd: Smtpd
    discarder: Discarder
    resubmitter: Resubmitter
    resubmissions: dict[str, Resubmission]
    queue: set[str] = field(default_factory=set)
    committed: set[str] = field(default_factory=set)
    mailboxes: set[tuple[str, str]] = field(default_factory=set)

    async def held(self, content: bytes = CONTENT, queue_id: str = "4old", **change: object) -> str:
        shadow_id = ids.new()
        envelope = replace(ENVELOPE, **change)  # type: ignore[arg-type]
        writer = self.store.begin(
            shadow_id, origin="a", queue_id=queue_id, envelope=envelope, epoch=1
        )
        await writer.write(content)
        await writer.commit()
        return shadow_id

    def milter(self, *, shadowed: bool) -> Callable[[Mail], None]:
        """What our milter does at the end of a resubmitted message."""

        def act(mail: Mail) -> None:
            shadow_id = mail.content.split(b"\r\n")[0].removeprefix(b"X-Umbra-Id: ").decode()
            self.resubmissions[shadow_id].queue_id = "4new"
            self.resubmissions[shadow_id].shadowed = shadowed

        return act

    def watch_holds(self, *, shadowed: bool) -> list[bool]:
        """Return a list that gets, of each message in its turn, whether it is to be on hold."""
        held: list[bool] = []

        def act(mail: Mail) -> None:
            held.append(next(iter(self.resubmissions.values())).held)
            self.milter(shadowed=shadowed)(mail)

        self.smtpd.on_data = act
        self.resubmitter._concurrency = 1
        return held


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    store = ShadowStore(tmp_path / "own")
    await store.open()
    smtpd = Smtpd()
    server = await asyncio.start_server(smtpd.serve, "127.0.0.1", 0, limit=1 << 20)
    smtpd.port = server.sockets[0].getsockname()[1]
    bench: Bench

    async def queue_ids() -> set[str]:
        return bench.queue

    async def committed_ids() -> set[str]:
        return bench.committed

    async def delivered(address: str, shadow_id: str) -> bool:
        return (address, shadow_id) in bench.mailboxes

    discarder = Discarder([LocalHolder(store, "b")], active(queue_ids))
    resubmissions: dict[str, Resubmission] = {}
    resubmitter = Resubmitter(
        "b", store, discarder, resubmissions,
        queue_ids=queue_ids, committed_ids=committed_ids, delivered=delivered, port=smtpd.port,
    )  # fmt: skip
    bench = Bench(store, smtpd, discarder, resubmitter, resubmissions)
    smtpd.on_data = bench.milter(shadowed=True)
    yield bench
    server.close()
    await server.wait_closed()
    await store.close()
    assert resubmissions == {}


async def test_the_message_arrives_byte_for_byte_with_its_envelope(bench: Bench) -> None:
    shadow_id = await bench.held(
        sender="b\udcfcro@example.org",
        sender_args=("SIZE=99", "BODY=8BITMIME", "RET=HDRS", "ENVID=x+3D", "SMTPUTF8", "AUTH=<>"),
        recipients=(
            Recipient("bob@example.com", ("NOTIFY=FAILURE", "ORCPT=rfc822;bob")),
            Recipient("eve@example.com"),
        ),
        client_address="2001:db8::7",
        client_name="[2001:db8::7]",
        helo="odd+name",
    )
    await bench.resubmitter.claim("a")
    report = await bench.resubmitter.step()
    assert (report.resubmitted, report.failed) == (1, {})
    [mail] = bench.smtpd.mails
    assert mail.content == f"X-Umbra-Id: {shadow_id}\r\n".encode() + CONTENT
    assert mail.commands == [
        b"XFORWARD NAME=[UNAVAILABLE] ADDR=IPV6:2001:db8::7 HELO=odd+2Bname",
        b"MAIL FROM:<b\xfcro@example.org> BODY=8BITMIME RET=HDRS ENVID=x+3D SMTPUTF8",
        b"RCPT TO:<bob@example.com> NOTIFY=FAILURE ORCPT=rfc822;bob",
        b"RCPT TO:<eve@example.com>",
    ]
    # A shadow has it, and our queue: the copy here has done its duty.
    assert await bench.store.stats() == []


async def test_of_an_alias_only_those_who_lack_it_get_it(bench: Bench) -> None:
    members = {
        "staff@example.com": ["ann@example.com", "bob@example.com"],
        "none@example.com": ["ann@example.com"],
        "new@example.com": ["eve@example.com", "dan@example.com"],
    }

    async def targets(address: str) -> list[str]:
        return members.get(address, [address])

    bench.resubmitter._targets = targets
    shadow_id = await bench.held(
        recipients=tuple(Recipient(address, ("NOTIFY=NEVER",)) for address in members)
    )
    bench.mailboxes = {("ann@example.com", shadow_id)}
    await bench.resubmitter.claim("a")
    report = await bench.resubmitter.step()
    assert report.duplicates == 2
    # An alias that nobody has it of stays one: its members may have changed.
    assert bench.smtpd.mails[0].commands[-2:] == [
        b"RCPT TO:<bob@example.com> NOTIFY=NEVER",
        b"RCPT TO:<new@example.com> NOTIFY=NEVER",
    ]


async def test_the_null_sender_goes_as_it_came(bench: Bench) -> None:
    await bench.held(sender="", sender_args=())
    await bench.resubmitter.claim("a")
    await bench.resubmitter.step()
    assert b"MAIL FROM:<>" in bench.smtpd.mails[0].commands


async def test_without_a_shadow_the_copy_stays_for_the_back_fill(bench: Bench) -> None:
    bench.smtpd.on_data = bench.milter(shadowed=False)
    shadow_id = await bench.held()
    await bench.resubmitter.claim("a")
    await bench.resubmitter.step()
    meta = await bench.store.find(shadow_id)
    assert meta is not None
    assert (meta.state, meta.origin, meta.queue_id) == (State.UNSHADOWED, "b", "4new")
    assert bench.discarder.counts()["b"] == 1


async def test_order_is_the_order_of_acceptance(bench: Bench) -> None:
    made = [await bench.held(b"%d\r\n" % number) for number in range(30)]
    bench.resubmitter._concurrency = 1
    await bench.resubmitter.claim("a")
    await bench.resubmitter.step()
    got = [mail.content.split(b"\r\n")[0][12:].decode() for mail in bench.smtpd.mails]
    assert got == made
    assert bench.smtpd.sessions == 1


async def test_concurrency_is_bounded(bench: Bench) -> None:
    for number in range(50):
        await bench.held(b"%d\r\n" % number)
    await bench.resubmitter.claim("a")
    report = await bench.resubmitter.step()
    assert report.resubmitted == 50
    assert bench.smtpd.sessions <= module.CONCURRENCY


async def test_recipients_that_have_it_are_left_out(bench: Bench) -> None:
    two = (Recipient("bob@example.com"), Recipient("eve@example.com"))
    one = await bench.held(recipients=two)
    other = await bench.held(recipients=two)
    bench.mailboxes = {
        ("bob@example.com", one),
        ("bob@example.com", other),
        ("eve@example.com", other),
    }
    await bench.resubmitter.claim("a")
    report = await bench.resubmitter.step()
    assert (report.resubmitted, report.duplicates) == (1, 3)
    [mail] = bench.smtpd.mails
    assert [line for line in mail.commands if line.startswith(b"RCPT")] == [
        b"RCPT TO:<eve@example.com>"
    ]
    assert await bench.store.stats() == []


async def test_a_file_that_postfix_cannot_read_is_carried_on_to_all(bench: Bench) -> None:
    await bench.held(
        queue_id="4one", recipients=(Recipient("bob@example.com"), Recipient("eve@example.com"))
    )
    assert await bench.resubmitter.claim("a", {"4one": Left(None)}) == 0
    await bench.resubmitter.step()
    [mail] = bench.smtpd.mails
    assert [line for line in mail.commands if line.startswith(b"RCPT")] == [
        b"RCPT TO:<bob@example.com>",
        b"RCPT TO:<eve@example.com>",
    ]


async def test_a_handover_says_who_is_left(bench: Bench) -> None:
    await bench.held(
        queue_id="4one", recipients=(Recipient("bob@example.com"), Recipient("eve@example.com"))
    )
    await bench.held(queue_id="4two")
    assert await bench.resubmitter.claim("a", {"4one": Left(("eve@example.com",))}) == 1
    await bench.resubmitter.step()
    [mail] = bench.smtpd.mails
    assert [line for line in mail.commands if line.startswith(b"RCPT")] == [
        b"RCPT TO:<eve@example.com>"
    ]


@pytest.mark.parametrize("shadowed", [True, False])
async def test_what_a_handover_tells_to_be_on_hold_is_to_be_on_hold_here(
    bench: Bench, shadowed: bool
) -> None:
    held = bench.watch_holds(shadowed=shadowed)
    for queue_id in ("4one", "4two", "4all"):
        await bench.held(queue_id=queue_id)
    to = ("bob@example.com",)
    left = {"4one": Left(to, held=True), "4two": Left(to), "4all": Left(None, held=True)}
    await bench.resubmitter.claim("a", left)
    await bench.resubmitter.claim("a", left)  # dying in between changes nothing
    await bench.resubmitter.step()
    assert held == [True, False, True]
    # From then on its queue file says so, which somebody may have released.
    async for meta in bench.store.in_order(State.UNSHADOWED):
        assert not meta.envelope.held


async def test_what_a_lost_primary_has_told_to_be_on_hold_is_to_be_on_hold_here(
    bench: Bench,
) -> None:
    held = bench.watch_holds(shadowed=True)
    names = [await bench.held(queue_id=queue_id) for queue_id in ("4one", "4two", "4six")]
    await bench.store.hold(names[:2], True, origin="a")
    await bench.store.hold(names[1:2], False, origin="a")
    await bench.resubmitter.claim("a")
    await bench.resubmitter.step()
    assert held == [True, False, False]


@pytest.mark.parametrize("verb", [b"MAIL", b"RCPT", b"DATA"])
async def test_a_refusal_keeps_the_message_and_the_connection(bench: Bench, verb: bytes) -> None:
    shadow_id = await bench.held()
    await bench.resubmitter.claim("a")
    bench.smtpd.refuse = lambda command: b"451 4.3.0 not now" if command.startswith(verb) else None
    report = await bench.resubmitter.step()
    assert report.failed == {shadow_id: "451 4.3.0 not now"}
    bench.smtpd.refuse = lambda command: None
    assert (await bench.resubmitter.step()).resubmitted == 1
    assert len(bench.smtpd.mails) == 1


async def test_one_refused_recipient_never_makes_a_part_of_a_message(bench: Bench) -> None:
    await bench.held(recipients=(Recipient("bob@example.com"), Recipient("eve@example.com")))
    await bench.resubmitter.claim("a")
    bench.smtpd.refuse = lambda command: b"450 4.1.1 no" if b"eve" in command else None
    assert len((await bench.resubmitter.step()).failed) == 1
    assert bench.smtpd.mails == []
    assert b"RSET" in bench.smtpd.commands


@pytest.mark.parametrize("verb", [b"MAIL", b"RCPT", b"DATA"])
async def test_what_is_refused_for_good_is_set_aside_and_nothing_waits_for_it(
    bench: Bench, verb: bytes
) -> None:
    refused, other = await bench.held(sender="bad@example.org"), await bench.held(b"other\r\n")
    await bench.resubmitter.claim("a")
    bench.resubmitter._concurrency = 1
    bad = False

    def refuse(command: bytes) -> bytes | None:
        nonlocal bad
        if command.startswith(b"MAIL"):
            bad = b"bad@" in command
        return b"554 5.7.1 no" if bad and command.startswith(verb) else None

    bench.smtpd.refuse = refuse
    async with asyncio.timeout(5):
        report = await bench.resubmitter.run()
    assert (report.resubmitted, report.parked, report.failed) == (1, 1, {})
    assert bench.resubmitter.reasons == {refused: "554 5.7.1 no"}
    await bench.store.give_back()  # whoever is primary then would take it for delivered
    [meta] = [meta async for meta in bench.store.in_order(State.PARKED)]
    assert meta.shadow_id == refused
    assert await bench.store.find(other) is None
    bench.smtpd.refuse = lambda command: None
    assert await bench.store.unpark() == 1
    assert (await bench.resubmitter.run()).resubmitted == 1
    assert await bench.store.stats() == []


async def test_a_refusal_that_may_end_sets_nothing_aside(bench: Bench) -> None:
    await bench.held(recipients=(Recipient("bob@example.com"), Recipient("eve@example.com")))
    await bench.resubmitter.claim("a")
    answers = {b"bob": b"550 5.1.1 no", b"eve": b"451 4.3.0 later"}
    bench.smtpd.refuse = lambda command: next(
        (text for name, text in answers.items() if name in command), None
    )
    report = await bench.resubmitter.step()
    assert (report.parked, len(report.failed)) == (0, 1)


async def test_a_mailbox_that_cannot_tell_holds_nobody_up(bench: Bench) -> None:
    """His delivery asks again, and only that waits."""

    async def delivered(address: str, shadow_id: str) -> bool:
        if address.startswith("eve"):
            raise OSError("the mailbox is corrupt")
        return address.startswith("dan")

    bench.resubmitter._delivered = delivered
    names = ("bob@example.com", "eve@example.com", "dan@example.com")
    await bench.held(recipients=tuple(map(Recipient, names)))
    await bench.resubmitter.claim("a")
    report = await bench.resubmitter.step()
    assert (report.resubmitted, report.duplicates, report.failed) == (1, 1, {})
    assert bench.smtpd.mails[0].commands[-2:] == [
        b"RCPT TO:<bob@example.com>",
        b"RCPT TO:<eve@example.com>",
    ]


async def test_no_server_ends_the_pass(bench: Bench) -> None:
    await bench.held()
    await bench.resubmitter.claim("a")
    bench.resubmitter._address = ("127.0.0.1", 1)
    with pytest.raises(SmtpUnreachable):
        await bench.resubmitter.step()
    assert [holding.state for holding in await bench.store.stats()] == [State.RESUBMITTING]


async def test_run_tries_again_until_nothing_is_left(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)
    for number in range(5):
        await bench.held(b"%d\r\n" % number)
    await bench.resubmitter.claim("a")
    refusals = iter([True] * 7)
    bench.smtpd.refuse = lambda command: (
        b"451 later" if command.startswith(b"DATA") and next(refusals, False) else None
    )
    report = await bench.resubmitter.run()
    assert (report.resubmitted, report.failed) == (5, {})
    assert len({mail.content for mail in bench.smtpd.mails}) == 5


# -- a crash at each step: another Resubmitter on the same store stands for the next process


async def test_crash_after_the_claim(bench: Bench) -> None:
    await bench.held()
    await bench.resubmitter.claim("a")
    await bench.resubmitter.claim("a")
    assert (await bench.resubmitter.step()).resubmitted == 1


async def crashed_at_the_end_of_the_message(bench: Bench) -> str:
    shadow_id = await bench.held()
    await bench.resubmitter.claim("a")
    await bench.store.note_queue_id(shadow_id, "4new")
    return shadow_id


async def test_crash_after_postfix_had_accepted(bench: Bench) -> None:
    shadow_id = await crashed_at_the_end_of_the_message(bench)
    bench.queue = bench.committed = {"4new"}
    report = await bench.resubmitter.step()
    assert (report.resubmitted, report.finished_before) == (0, 1)
    assert bench.smtpd.mails == []
    meta = await bench.store.find(shadow_id)
    assert meta is not None
    assert (meta.state, meta.queue_id) == (State.UNSHADOWED, "4new")


async def test_crash_while_postfix_had_not_decided(bench: Bench) -> None:
    await crashed_at_the_end_of_the_message(bench)
    bench.queue = {"4new"}
    assert len((await bench.resubmitter.step()).failed) == 1
    assert bench.smtpd.mails == []
    # Postfix removes what it has not committed: now it is sent.
    bench.queue = set()
    assert (await bench.resubmitter.step()).resubmitted == 1


async def test_crash_after_the_delivery(bench: Bench) -> None:
    shadow_id = await crashed_at_the_end_of_the_message(bench)
    bench.mailboxes = {("bob@example.com", shadow_id)}
    report = await bench.resubmitter.step()
    assert (report.resubmitted, report.duplicates) == (0, 1)
    assert bench.smtpd.mails == []
    assert await bench.store.stats() == []


async def test_a_connection_that_breaks_after_the_content(bench: Bench) -> None:
    bench.smtpd.drop_after_data = True
    await bench.held()
    await bench.resubmitter.claim("a")
    assert len((await bench.resubmitter.step()).failed) == 1
    bench.smtpd.drop_after_data = False
    assert (await bench.resubmitter.step()).resubmitted == 1
    assert len(bench.smtpd.mails) == 1


async def test_a_large_message_is_streamed(bench: Bench) -> None:
    body = (os.urandom(300).hex().encode() + b"\r\n.\r\n") * 4000
    await bench.held(body)
    await bench.resubmitter.claim("a")
    await bench.resubmitter.step()
    assert bench.smtpd.mails[0].content.split(b"\r\n", 1)[1] == body


async def test_arguments_that_are_not_offered_are_left_out(bench: Bench) -> None:
    bench.smtpd.extensions = ("HELP",)
    await bench.held(sender_args=("BODY=8BITMIME", "RET=FULL"))
    await bench.resubmitter.claim("a")
    await bench.resubmitter.step()
    assert bench.smtpd.mails[0].commands == [
        b"MAIL FROM:<ann@example.org>",
        b"RCPT TO:<bob@example.com>",
    ]


# -- dot-stuffing

lines = st.lists(st.sampled_from([b".", b"a", b"\r\n", b"\n", b"\r", b"..", b"\x00"]), max_size=40)


@settings(deadline=None)
@given(lines, st.integers(1, 7))
def test_stuffing_does_not_depend_on_the_pieces(parts: list[bytes], size: int) -> None:
    whole = b"".join(parts)
    stuffer = Stuffer()
    pieces = b"".join(
        stuffer.feed(whole[start : start + size]) for start in range(0, len(whole), size)
    )
    ended = pieces + stuffer.end()
    once = Stuffer()
    assert ended == once.feed(whole) + once.end()
    # The end is where it should be and nowhere before, also for one who takes a bare LF for a line
    # end.
    rows = ended.replace(b"\r\n", b"\n").split(b"\n")
    assert rows[-2:] == [b".", b""]
    assert b"." not in rows[:-2]
    back = b"\n".join(row.removeprefix(b".") for row in rows[:-2])
    expected = whole.replace(b"\r\n", b"\n")
    assert back + b"\n" in (expected, expected + b"\n")


async def test_a_content_that_cannot_be_read_stops_no_other_message(
    bench: Bench, tmp_path: Path
) -> None:
    big = b"Subject: x\r\n\r\n" + b"x" * 500_000 + b"\r\n"
    lost, *others = [await bench.held(big) for _ in range(3)]
    [path] = (tmp_path / "own" / "spool").glob(f"*{lost}*")
    path.unlink()
    await bench.resubmitter.claim("a")
    bench.resubmitter._concurrency = 1  # so that they meet it first
    report = await bench.resubmitter.run()
    assert list(bench.resubmitter.reasons) == [lost]
    assert [meta.shadow_id async for meta in bench.store.in_order(State.PARKED)] == [lost]
    assert report.resubmitted == len(bench.smtpd.mails) == 2
    for shadow_id, mail in zip(others, bench.smtpd.mails, strict=True):
        assert mail.content == f"X-Umbra-Id: {shadow_id}\r\n".encode() + big


async def test_an_envelope_that_cannot_be_read_stops_no_other_message(bench: Bench) -> None:
    """Whoever looks finds it set aside, and why; a file that Postfix has of it goes on."""
    odd, accepted, good = [await bench.held(queue_id=f"4{number}") for number in range(3)]
    await bench.resubmitter.claim("a")
    await bench.store.note_queue_id(accepted, "4there")
    for shadow_id in (odd, accepted):
        await spoil(bench.store, shadow_id, b"{")
    bench.queue = bench.committed = {"4there"}
    report = await bench.resubmitter.run()
    assert (report.parked, report.resubmitted, report.finished_before) == (1, 1, 1)
    [meta] = [meta async for meta in bench.store.in_order(State.PARKED)]
    [row] = view.parked([meta], bench.resubmitter.reasons)
    assert row == {
        "shadow_id": odd, "message_id": "", "origin": "a", "queue_id": "40",
        "reason": f"the envelope of {odd} cannot be read: the envelope is not JSON",
    }  # fmt: skip
    assert good in bench.smtpd.mails[0].content.decode("latin-1")
    gone = await bench.store.discard([odd], origin="a", state=State.PARKED, delivered=False)
    assert [item.shadow_id for item in gone] == [odd]
