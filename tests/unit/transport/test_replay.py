"""Replay from the safety net: only what is missing, to that mailbox alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from tests.unit.transport.support import ENVELOPE
from tests.unit.transport.test_resubmit import Smtpd
from tests.unit.transport.test_store import spoil

from umbra.transport import ids
from umbra.transport.envelope import Recipient
from umbra.transport.replay import Replayer, UnknownMailbox
from umbra.transport.resubmit import narrow
from umbra.transport.smtp import SmtpUnreachable
from umbra.transport.store import ShadowStore, State

BOB = "bob@example.com"


@dataclass
class Bench:
    store: ShadowStore
    smtpd: Smtpd
    replayer: Replayer
    queue: set[str] = field(default_factory=set)
    mailbox: set[str] = field(default_factory=set)

    async def delivered(self, name: str, *recipients: str, queue_id: str = "4old") -> str:
        shadow_id = ids.new()
        envelope = replace(
            ENVELOPE,
            message_id=f"<{name}@example.org>",
            received=time.time(),
            recipients=tuple(Recipient(r, ("NOTIFY=SUCCESS",)) for r in recipients or (BOB,)),
        )
        writer = self.store.begin(
            shadow_id, origin="a", queue_id=queue_id, envelope=envelope, epoch=1
        )
        await writer.write(f"Subject: {name}\r\n\r\n".encode())
        await writer.commit(delivered=True)
        return shadow_id

    async def present(self, user: str, shadow_id: str, message_id: str) -> bool | None:
        if user != BOB:
            return None
        return bool({shadow_id, message_id} & self.mailbox)

    async def leading_to(self, mailbox: str, addresses: Sequence[str]) -> Sequence[str]:
        return [item for item in addresses if item in (mailbox, "staff@example.com")]

    async def queue_ids(self) -> set[str]:
        return self.queue

    def subjects(self) -> list[str]:
        return [
            mail.content.split(b"Subject: ")[1].split()[0].decode() for mail in self.smtpd.mails
        ]


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    store = ShadowStore(tmp_path / "own", keep=True)
    await store.open()
    smtpd = Smtpd()
    server = await asyncio.start_server(smtpd.serve, "127.0.0.1", 0, limit=1 << 20)
    port = server.sockets[0].getsockname()[1]
    bench: Bench
    replayer = Replayer(
        "a", store,
        queue_ids=lambda: bench.queue_ids(),
        present=lambda *args: bench.present(*args),
        leading_to=lambda *args: bench.leading_to(*args),
        port=port,
    )  # fmt: skip
    bench = Bench(store, smtpd, replayer)
    yield bench
    server.close()
    await server.wait_closed()
    await store.close()


LONG_AGO, SOON = 0.0, time.time() + 3600


async def test_what_is_missing_is_sent_to_that_mailbox_alone(bench: Bench) -> None:
    first = await bench.delivered("one", "ann@example.com", "BOB@example.com")
    await bench.delivered("two", "ann@example.com")
    await bench.delivered("three", "staff@example.com")
    bench.mailbox = {await bench.delivered("four"), "<five@example.org>"}
    await bench.delivered("five")  # refused once and sent again: the mailbox has it by another id
    result = await bench.replayer.run(BOB, LONG_AGO, SOON)
    assert (result.found, result.present, result.queued, result.resubmitted) == (4, 2, 0, 2)
    assert result.failed == {}
    assert bench.subjects() == ["one", "three"]
    mail = bench.smtpd.mails[0]
    assert mail.content == f"X-Umbra-Id: {first}\r\nSubject: one\r\n\r\n".encode()
    assert b"RCPT TO:<bob@example.com> NOTIFY=NEVER" in mail.commands
    assert not any(b"ann" in command for command in mail.commands[2:])
    assert [row["message_id"] for row in result.messages] == [
        "<one@example.org>",
        "<three@example.org>",
    ]


async def test_a_dry_run_tells_the_same_and_sends_nothing(bench: Bench) -> None:
    await bench.delivered("one")
    dry = await bench.replayer.run(BOB, LONG_AGO, SOON, dry_run=True)
    assert bench.smtpd.sessions == 0
    assert dry == await bench.replayer.run(BOB, LONG_AGO, SOON)
    assert bench.subjects() == ["one"]


async def test_the_window_is_the_time_of_acceptance(bench: Bench) -> None:
    await bench.delivered("early")
    await asyncio.sleep(0.01)
    since = time.time()
    await bench.delivered("now")
    until = time.time() + 0.001
    await asyncio.sleep(0.01)
    await bench.delivered("late")
    result = await bench.replayer.run(BOB, since, until)
    assert (result.found, bench.subjects()) == (1, ["now"])


async def test_what_is_still_in_the_queue_waits_for_its_own_delivery(bench: Bench) -> None:
    await bench.delivered("one", queue_id="4here")
    bench.queue = {"4here"}
    result = await bench.replayer.run(BOB, LONG_AGO, SOON)
    assert (result.found, result.queued, result.resubmitted) == (1, 1, 0)


async def test_what_was_resubmitted_and_is_still_in_the_queue_waits_too(bench: Bench) -> None:
    shadow_id = ids.new()
    envelope = replace(ENVELOPE, received=time.time(), recipients=(Recipient(BOB, ()),))
    writer = bench.store.begin(shadow_id, origin="c", queue_id="4old", envelope=envelope, epoch=1)
    await writer.commit()
    await bench.store.claim("c", None, narrow)
    await bench.store.note_queue_id(shadow_id, "4new")
    await bench.store.discard([shadow_id], origin="c", state=State.RESUBMITTING)
    bench.queue = {"4new"}
    result = await bench.replayer.run(BOB, LONG_AGO, SOON)
    assert (result.found, result.queued, result.resubmitted) == (1, 1, 0)


async def test_a_refused_message_does_not_end_the_replay(bench: Bench) -> None:
    shadow_id = await bench.delivered("one")
    await bench.delivered("two")
    refusals = iter([b"451 4.3.0 not now"])
    bench.smtpd.refuse = lambda command: next(refusals, None) if b"RCPT" in command else None
    result = await bench.replayer.run(BOB, LONG_AGO, SOON)
    assert list(result.failed) == [shadow_id]
    assert bench.subjects() == ["two"]


async def test_more_messages_than_a_page(bench: Bench) -> None:
    for number in range(120):
        await bench.delivered(f"m{number}")
    result = await bench.replayer.run(BOB, LONG_AGO, SOON)
    assert result.resubmitted == 120
    assert bench.subjects() == [f"m{number}" for number in range(120)]


async def test_an_unknown_mailbox_is_named(bench: Bench) -> None:
    with pytest.raises(UnknownMailbox, match=r"eve@example\.com has no mailbox here"):
        await bench.replayer.run("eve@example.com", LONG_AGO, SOON)


async def test_without_a_postfix_it_ends(bench: Bench) -> None:
    await bench.delivered("one")
    bench.replayer._address = ("127.0.0.1", 1)
    with pytest.raises(SmtpUnreachable):
        await bench.replayer.run(BOB, LONG_AGO, SOON)


async def test_a_content_that_cannot_be_read_does_not_end_the_replay(bench: Bench) -> None:
    lost = await bench.delivered("one")
    await bench.delivered("two")
    await bench.store._write(
        lambda database: (
            database.execute(
                "DELETE FROM content WHERE number ="
                " (SELECT number FROM message WHERE shadow_id = ?)",
                (lost,),
            ).rowcount
        )
    )
    result = await bench.replayer.run(BOB, LONG_AGO, SOON)
    assert list(result.failed) == [lost]
    assert (result.found, result.resubmitted, bench.subjects()) == (2, 1, ["two"])


@pytest.mark.parametrize("dry_run", [True, False])
async def test_an_envelope_that_cannot_be_read_is_told_with_what_was_not_sent(
    bench: Bench, dry_run: bool
) -> None:
    lost = await bench.delivered("one")
    await bench.delivered("two")
    await spoil(bench.store, lost, b"{")
    result = await bench.replayer.run(BOB, LONG_AGO, SOON, dry_run=dry_run)
    assert list(result.failed) == [lost]
    assert (result.found, result.resubmitted) == (2, 1)
