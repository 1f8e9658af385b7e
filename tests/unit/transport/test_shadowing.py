"""Shadow before 250, through the real milter socket, store and shadow service; only the link and
the group are stand-ins."""

from __future__ import annotations

import asyncio
import os
import re
import resource
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.unit.transport.support import (
    FakeGroup,
    FakeLink,
    MilterClient,
    active,
    content,
    shadow_id_of,
)

from umbra.config import MAX_SHADOW_TIMEOUT, ShadowPolicy
from umbra.peer.exchange import PeerError
from umbra.transport import metrics
from umbra.transport import shadowing as module
from umbra.transport.discard import Copies, Discarder, LocalHolder, PeerHolder
from umbra.transport.milter_server import MilterServer
from umbra.transport.ports import NotPrimary, Refusal
from umbra.transport.resubmit import Resubmission
from umbra.transport.safety_net import SafetyNet
from umbra.transport.service import ShadowService
from umbra.transport.shadowing import RESUBMISSION, SIEVE, Shadowing
from umbra.transport.store import ShadowStore, State, StoreFull

HEADERS = ((b"Message-ID", b" <1@example.org>"), (b"Subject", b" hello"))
WHOLE = b"Message-ID: <1@example.org>\r\nSubject: hello\r\n\r\n"
LARGE = os.urandom(1_500_000)


@dataclass
class Bench:
    path: Path
    group: FakeGroup
    link: FakeLink
    own: ShadowStore
    shadow: ShadowStore
    shadowing: Shadowing
    discarder: Discarder
    epoch: int = 7
    resubmissions: dict[str, Resubmission] = field(default_factory=dict)

    async def deliver(
        self, body: bytes = b"text\r\n", **options: bytes
    ) -> list[tuple[bytes, bytes]]:
        client = await MilterClient.connect(self.path, **options)
        try:
            return await client.message(HEADERS, body)
        finally:
            await client.close()

    async def at_shadow(self, shadow_id: str) -> bytes:
        meta = await self.shadow.find(shadow_id)
        assert meta is not None
        return await content(self.shadow.content(meta))


@pytest.fixture
def policy() -> ShadowPolicy:
    return ShadowPolicy.ACCEPT


@pytest.fixture
async def bench(tmp_path: Path, policy: ShadowPolicy) -> AsyncIterator[Bench]:
    own, shadow = ShadowStore(tmp_path / "own"), ShadowStore(tmp_path / "shadow")
    await own.open()
    await shadow.open()
    bench: Bench
    link = FakeLink("b", ShadowService(shadow, lambda: bench.epoch, lambda node: True).handlers())
    group = FakeGroup(link)

    async def queue_ids() -> set[str]:
        return {"4abcDEF"}

    discarder = Discarder([LocalHolder(own, "a"), PeerHolder(link)], active(queue_ids))  # type: ignore[arg-type]
    resubmissions: dict[str, Resubmission] = {}
    shadowing = Shadowing("a", group, own, discarder, resubmissions, policy=policy, timeout=0.5)
    server = MilterServer(tmp_path / "milter.sock", shadowing)
    await server.start()
    bench = Bench(
        tmp_path / "milter.sock", group, link, own, shadow, shadowing, discarder, 7, resubmissions
    )
    yield bench
    await server.stop()
    assert group.in_flight == 0
    assert shadowing.storing_alone == 0
    await own.close()
    await shadow.close()


DEFER = pytest.mark.parametrize("policy", [ShadowPolicy.DEFER])
BOTH = pytest.mark.parametrize("policy", list(ShadowPolicy))
SIZES = pytest.mark.parametrize("body", [b"text\r\n", LARGE], ids=["small", "large"])


@BOTH
@SIZES
async def test_accepted_means_on_the_shadow(bench: Bench, body: bytes) -> None:
    shadow_id = shadow_id_of(await bench.deliver(body))
    meta = await bench.shadow.find(shadow_id)
    assert meta is not None
    assert (meta.origin, meta.queue_id, meta.state) == ("a", "4abcDEF", State.HELD)
    assert meta.envelope.sender == "ann@example.org"
    assert meta.envelope.message_id == "<1@example.org>"
    assert meta.envelope.client_address == "192.0.2.7"
    assert await bench.at_shadow(shadow_id) == WHOLE + body
    assert await bench.own.stats() == []
    assert os.listdir(bench.own._spool) == []
    assert bench.discarder.counts()["b"] == 1
    assert bench.group.failures == []


def test_an_answer_comes_before_postfix_gives_up() -> None:
    settings = Path("roles/mail_server/templates/main.cf.j2").read_text(encoding="utf-8")
    match = re.search(r"umbra_milter.*content_timeout=(\d+)s", settings)
    assert match
    assert MAX_SHADOW_TIMEOUT < module.LIMIT < module.ANSWER_LIMIT < int(match[1])


@SIZES
@pytest.mark.parametrize("alone", [True, False])
async def test_whatever_hangs_postfix_gets_its_answer(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, body: bytes, alone: bool
) -> None:
    monkeypatch.setattr(module, "ANSWER_LIMIT", 0.1)

    async def hangs(*_: Any, **__: Any) -> None:
        await asyncio.sleep(3600)

    if alone:  # the disk
        bench.group.peers = []
        monkeypatch.setattr(bench.own, "_write", hangs)
    else:  # the coordinator, or the disk of the state
        bench.link.fail = lambda op: PeerError("unreachable", "gone")
        monkeypatch.setattr(bench.group, "shadow_failed", hangs)
    async with asyncio.timeout(5):
        [(kind, text)] = await bench.deliver(body)
    assert (kind, text[:9]) == (b"y", b"451 4.4.1")


@SIZES
@pytest.mark.parametrize("where", ["a", "b"])
async def test_a_message_that_is_cut_off_leaves_no_copy_that_nobody_knows(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, body: bytes, where: str
) -> None:
    """Its sender's connection ends while the answer is awaited; the copy comes to its end."""
    stored = asyncio.Event()
    store = bench.shadow if where == "b" else bench.own
    if where == "a":
        bench.group.peers = []
    write = store._write

    async def slow(*args: Any, **options: Any) -> Any:
        try:
            return await write(*args, **options)
        finally:
            stored.set()
            await asyncio.sleep(3600)

    monkeypatch.setattr(store, "_write", slow)
    client = await MilterClient.connect(bench.path)
    await client.mail()
    await client.rcpt()
    sending = asyncio.create_task(client.content(HEADERS, body, b"4abcDEF"))
    await stored.wait()
    sending.cancel()
    await client.close()
    async with asyncio.timeout(5):
        while bench.group.in_flight:  # noqa: ASYNC110 (the message has no event)
            await asyncio.sleep(0.01)
    monkeypatch.setattr(store, "_write", write)
    assert [meta async for meta in store.in_order(State.HELD)] or [
        meta async for meta in store.in_order(State.UNSHADOWED)
    ]
    assert bench.discarder.known(where).keys() == {"4abcDEF"}
    assert bench.discarder.covered(where) == {}


@DEFER
@SIZES
async def test_defer_answers_451_when_the_shadow_fails(bench: Bench, body: bytes) -> None:
    bench.link.fail = lambda op: PeerError("unreachable", "b cannot be reached")
    [(kind, text)] = await bench.deliver(body)
    assert kind == b"y"
    assert text.startswith(b"451 4.7.1 ")
    assert await bench.own.stats() == []
    assert bench.group.failures == []


@DEFER
async def test_defer_answers_451_at_mail_while_alone(bench: Bench) -> None:
    bench.group.peers = []
    client = await MilterClient.connect(bench.path)
    kind, text = await client.mail()
    assert kind == b"y"
    assert text.startswith(b"451 4.7.1 ")
    await client.close()


@SIZES
@pytest.mark.parametrize("how", ["unreachable", "hang"])
async def test_accept_makes_the_group_alone_first_and_keeps_the_message(
    bench: Bench, body: bytes, how: str
) -> None:
    if how == "hang":
        bench.link.hold = True
    else:
        bench.link.fail = lambda op: PeerError("unreachable", "b cannot be reached")
    real = bench.own._write

    async def note(*args: object, **named: object) -> object:
        bench.group.steps.append("stored")
        return await real(*args, **named)  # type: ignore[arg-type]

    bench.own._write = note  # type: ignore[method-assign, assignment]
    shadow_id = shadow_id_of(await bench.deliver(body))
    assert bench.group.steps == ["alone", "stored"]
    meta = await bench.own.find(shadow_id)
    assert meta is not None
    assert (meta.state, meta.origin) == (State.UNSHADOWED, "a")
    assert await content(bench.own.content(meta)) == WHOLE + body
    # What may have arrived after all is discarded when the message leaves the queue.
    assert bench.discarder.counts()["b"] == 1
    assert bench.discarder.counts()["a"] == 1


async def test_accept_survives_a_shadow_that_dies_in_the_middle_of_a_large_message(
    bench: Bench,
) -> None:
    """What had streamed past cannot be read again from the milter; the spare copy has it."""
    inner = bench.link.handlers["shadow-store"]

    async def die(peer: object, args: object, exchange: object) -> dict[str, object]:
        for _ in range(5):
            await exchange.receive()  # type: ignore[attr-defined]
        await asyncio.sleep(3600)
        return await inner(peer, args, exchange)  # type: ignore[arg-type]

    bench.link.handlers = {"shadow-store": die}
    shadow_id = shadow_id_of(await bench.deliver(LARGE))
    meta = await bench.own.find(shadow_id)
    assert meta is not None
    assert await content(bench.own.content(meta)) == WHOLE + LARGE


@SIZES
async def test_accept_while_alone_stores_here(bench: Bench, body: bytes) -> None:
    bench.group.peers = []
    shadow_id = shadow_id_of(await bench.deliver(body))
    meta = await bench.own.find(shadow_id)
    assert meta is not None
    assert meta.state is State.UNSHADOWED
    assert bench.link.ops == []


async def test_alone_without_room_is_451(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.group.peers = []

    async def full(*args: object, **named: object) -> None:
        raise StoreFull("no room")

    monkeypatch.setattr(bench.own, "_write", full)
    [(kind, text)] = await bench.deliver()
    assert (kind, text[:9]) == (b"y", b"451 4.3.1")


async def test_who_may_not_be_alone_accepts_nothing(bench: Bench) -> None:
    bench.link.fail = lambda op: PeerError("unreachable", "gone")
    bench.group.demoted = NotPrimary("another node is primary")
    [(kind, text)] = await bench.deliver()
    assert (kind, text[:3]) == (b"y", b"451")
    assert await bench.own.stats() == []


@BOTH
async def test_a_stale_epoch_is_never_answered_with_acceptance(bench: Bench) -> None:
    bench.link.fail = lambda op: PeerError("stale-epoch", "epoch 8 was seen")
    [(kind, _)] = await bench.deliver()
    assert kind == b"y"
    assert bench.group.failures == []
    assert await bench.own.stats() == []


@BOTH
@pytest.mark.parametrize("change", ["epoch", "role"])
async def test_an_answer_that_comes_too_late_acknowledges_nothing(
    bench: Bench, change: str
) -> None:
    inner = bench.link.handlers["shadow-store"]

    async def late(peer: object, args: object, exchange: object) -> dict[str, object]:
        answer = await inner(peer, args, exchange)  # type: ignore[arg-type]
        if change == "epoch":
            bench.group.epoch += 1
        else:
            bench.group.refusal = Refusal(451, "4.3.2", "not primary")
        return answer

    bench.link.handlers = {"shadow-store": late}
    [(kind, text)] = await bench.deliver()
    assert (kind, text[:3]) == (b"y", b"451")


async def test_a_drain_lets_what_has_begun_finish_and_refuses_what_comes(bench: Bench) -> None:
    inner = bench.link.handlers["shadow-store"]
    draining = Refusal(421, "4.3.2", "handing over")

    async def drain(peer: object, args: object, exchange: object) -> dict[str, object]:
        bench.group.refusal = draining
        assert bench.group.in_flight == 1
        return await inner(peer, args, exchange)  # type: ignore[arg-type]

    bench.link.handlers = {"shadow-store": drain}
    shadow_id_of(await bench.deliver())
    [(kind, text)] = await bench.deliver()
    assert (kind, text) == (b"y", b"421 4.3.2 handing over\0")


async def test_promoted_while_it_stored_the_shadow_does_not_acknowledge(bench: Bench) -> None:
    real = bench.shadow._write

    async def promoted(*args: object, **named: object) -> object:
        bench.epoch += 1
        return await real(*args, **named)  # type: ignore[arg-type]

    bench.shadow._write = promoted  # type: ignore[method-assign, assignment]
    [(kind, _)] = await bench.deliver()
    assert kind == b"y"
    assert await bench.shadow.stats() == []


async def test_every_shadow_must_have_it(bench: Bench, tmp_path: Path) -> None:
    third = ShadowStore(tmp_path / "third")
    await third.open()
    other = FakeLink("c", ShadowService(third, lambda: 7, lambda node: True).handlers())
    bench.discarder = bench.shadowing.discarder = Discarder(
        [LocalHolder(bench.own, "a"), PeerHolder(bench.link), PeerHolder(other)],  # type: ignore[arg-type]
        bench.discarder._queue,
    )
    bench.group.peers = [bench.link, other]
    shadow_id = shadow_id_of(await bench.deliver())
    assert await bench.shadow.find(shadow_id)
    assert await third.find(shadow_id)
    other.fail = lambda op: PeerError("unreachable", "gone")
    shadow_id = shadow_id_of(await bench.deliver())
    assert bench.group.failures == [("c", "gone")]
    assert await bench.shadow.find(shadow_id)
    assert await bench.own.find(shadow_id) is None
    await third.close()


@BOTH
@pytest.mark.parametrize("fault", ["sender", "queue id"])
async def test_a_message_that_no_shadow_could_take_is_no_failure_of_a_shadow(
    bench: Bench, fault: str
) -> None:
    client = await MilterClient.connect(bench.path)
    await client.mail(b'<"a\tb"@example.org>' if fault == "sender" else b"<a@example.org>")
    await client.rcpt()
    queue_id = b"" if fault == "queue id" else b"4abcDEF"
    [(kind, text)] = await client.content(HEADERS, b"text\r\n", queue_id)
    await client.close()
    assert (kind, text[:9]) == (b"y", b"550 5.1.7")
    assert bench.group.failures == []
    assert bench.link.ops == []


# -- resubmission


@BOTH
async def test_a_resubmitted_message_keeps_its_id(bench: Bench) -> None:
    shadow_id = "0" * 31 + "1"
    progress = bench.resubmissions[shadow_id] = Resubmission()
    bench.shadowing.resubmissions = bench.resubmissions
    client = await MilterClient.connect(bench.path, RESUBMISSION)
    headers = ((b"X-Umbra-Id", b" " + shadow_id.encode()), *HEADERS)
    assert await client.message(headers) == [(b"a", b"")]
    await client.close()
    assert await bench.at_shadow(shadow_id) == WHOLE + b"text\r\n"
    assert progress == Resubmission("4abcDEF", True)


@pytest.mark.parametrize("shadowed", [True, False])
async def test_what_was_on_hold_is_put_on_hold_again(bench: Bench, shadowed: bool) -> None:
    shadow_id = "0" * 31 + "7"
    bench.resubmissions[shadow_id] = Resubmission(held=True)
    if not shadowed:
        bench.group.peers = []
    client = await MilterClient.connect(bench.path, RESUBMISSION)
    headers = ((b"X-Umbra-Id", b" " + shadow_id.encode()), *HEADERS)
    assert await client.message(headers) == [(b"q", b"\0"), (b"a", b"")]
    await client.close()


SIGNATURE = (b"DKIM-Signature", b" v=1")


@pytest.mark.parametrize("policy", [ShadowPolicy.DEFER])
async def test_a_header_that_another_milter_puts_first_does_not_hide_the_id(bench: Bench) -> None:
    shadow_id, other = "0" * 31 + "1", "0" * 31 + "2"
    progress = bench.resubmissions[shadow_id] = Resubmission()
    bench.resubmissions[other] = Resubmission()  # its id came with the message
    bench.group.peers = []
    client = await MilterClient.connect(bench.path, RESUBMISSION)
    marks = [(b"X-Umbra-Id", b" " + name.encode()) for name in (shadow_id, other)]
    assert await client.message((SIGNATURE, *marks, *HEADERS)) == [(b"a", b"")]
    await client.close()
    assert progress == Resubmission("4abcDEF", False)
    assert bench.resubmissions[other] == Resubmission()


async def test_only_the_id_header_is_left_out(bench: Bench) -> None:
    shadow_id = "0" * 31 + "1"
    bench.resubmissions[shadow_id] = Resubmission()
    client = await MilterClient.connect(bench.path, RESUBMISSION)
    mark = (b"X-Umbra-Id", b" " + shadow_id.encode())
    assert await client.message((SIGNATURE, mark, *HEADERS)) == [(b"a", b"")]
    await client.close()
    assert await bench.at_shadow(shadow_id) == b"DKIM-Signature: v=1\r\n" + WHOLE + b"text\r\n"


async def test_a_message_that_is_on_its_way_has_its_id(bench: Bench) -> None:
    shadow_id = "0" * 31 + "1"
    progress = bench.resubmissions[shadow_id] = Resubmission()
    long = tuple((b"X-Long", b" " + b"a" * 30_000) for _ in range(3))
    client = await MilterClient.connect(bench.path, RESUBMISSION)
    mark = (b"X-Umbra-Id", b" " + shadow_id.encode())
    assert shadow_id_of(await client.message((*long, mark, *HEADERS))) != shadow_id
    await client.close()
    assert progress == Resubmission()


async def test_a_resubmission_that_is_refused_deletes_no_copy(bench: Bench) -> None:
    """The message was acknowledged once, and another node may have to carry it on."""
    bench.shadow._keep = True
    shadow_id = "0" * 31 + "1"
    bench.resubmissions[shadow_id] = Resubmission()
    bench.group.may_acknowledge = lambda epoch, holders: False  # type: ignore[method-assign]
    client = await MilterClient.connect(bench.path, RESUBMISSION)
    [(kind, _)] = await client.message(((b"X-Umbra-Id", b" " + shadow_id.encode()), *HEADERS))
    assert kind == b"y"
    await client.close()

    async def none() -> dict[str, str]:
        return {}

    bench.discarder._queue = none
    for _ in range(3):
        await bench.discarder.discard()
    assert bench.discarder.counts()["b"] == 0
    assert await bench.at_shadow(shadow_id) == WHOLE + b"text\r\n"


@BOTH
@pytest.mark.parametrize("alone", [True, False])
async def test_a_resubmitted_message_goes_on_without_a_shadow(bench: Bench, alone: bool) -> None:
    shadow_id = "0" * 31 + "1"
    progress = bench.resubmissions[shadow_id] = Resubmission()
    bench.shadowing.resubmissions = bench.resubmissions
    if alone:
        bench.group.peers = []
    bench.link.fail = lambda op: PeerError("unreachable", "gone")
    client = await MilterClient.connect(bench.path, RESUBMISSION)
    headers = ((b"X-Umbra-Id", b" " + shadow_id.encode()), *HEADERS)
    assert await client.message(headers) == [(b"a", b"")]
    await client.close()
    assert progress == Resubmission("4abcDEF", False)
    assert bench.group.peers == []


async def test_a_resubmission_that_nobody_waits_for_is_no_new_message(bench: Bench) -> None:
    """Its client was cancelled, or was the agent of before: the message is sent once more."""
    shadow_id = "0" * 31 + "1"
    client = await MilterClient.connect(bench.path, RESUBMISSION)
    headers = ((b"X-Umbra-Id", b" " + shadow_id.encode()), *HEADERS)
    [(kind, text)] = await client.message(headers)
    assert (kind, text[:9]) == (b"y", b"451 4.4.2")
    await client.close()
    assert await bench.shadow.stats() == []


@pytest.mark.parametrize(
    ("daemon", "known"),
    [(b"mx.example.com", True), (RESUBMISSION, False)],
    ids=["port 25", "replayed"],
)
async def test_an_id_from_outside_is_content(bench: Bench, daemon: bytes, known: bool) -> None:
    shadow_id = "0" * 31 + "1"
    if known:
        bench.shadowing.resubmissions[shadow_id] = Resubmission()
    else:
        bench.shadowing.replays = {shadow_id}
    client = await MilterClient.connect(bench.path, daemon)
    own = shadow_id_of(await client.message(((b"X-Umbra-Id", b" " + shadow_id.encode()), *HEADERS)))
    await client.close()
    assert own != shadow_id
    assert (await bench.at_shadow(own)).startswith(b"X-Umbra-Id: " + shadow_id.encode())


async def test_many_recipients_do_not_fit_a_request_and_still_arrive(bench: Bench) -> None:
    client = await MilterClient.connect(bench.path)
    await client.mail()
    for number in range(3000):
        await client.rcpt(b"<somebody%d@example.com>" % number, b"NOTIFY=NEVER")
    shadow_id = shadow_id_of(await client.content(HEADERS, b"text\r\n", b"4abcDEF"))
    await client.close()
    meta = await bench.shadow.find(shadow_id)
    assert meta is not None
    assert len(meta.envelope.recipients) == 3000
    assert await bench.at_shadow(shadow_id) == WHOLE + b"text\r\n"


async def test_no_message_waits_behind_another(bench: Bench) -> None:
    inner = bench.link.handlers["shadow-store"]

    async def slow(peer: object, args: object, exchange: object) -> dict[str, object]:
        await asyncio.sleep(0.2)
        return await inner(peer, args, exchange)  # type: ignore[arg-type]

    bench.link.handlers = {"shadow-store": slow}
    loop = asyncio.get_running_loop()
    started = loop.time()
    answers = await asyncio.gather(*(bench.deliver() for _ in range(50)))
    assert len({shadow_id_of(answer) for answer in answers}) == 50
    assert loop.time() - started < 2.0


async def test_ten_large_messages_at_once_need_little_memory(bench: Bench) -> None:
    """Both sides in this one process, with spare copies, 10 times 20 MB."""
    bench.shadowing.timeout = 30.0
    body = b"x" * 78 + b"\r\n"
    whole = body * (20_000_000 // len(body))
    shadow_id_of(await bench.deliver(LARGE))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answers = await asyncio.gather(*(bench.deliver(whole) for _ in range(10)))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for answer in answers:
        meta = await bench.shadow.find(shadow_id_of(answer))
        assert meta is not None
        assert meta.size == len(WHOLE) + len(whole)
    assert after - before < 64 * 1024  # KiB


# -- several shadows, too much load


@pytest.fixture
async def second(tmp_path: Path, bench: Bench) -> AsyncIterator[FakeLink]:
    store = ShadowStore(tmp_path / "second")
    await store.open()
    link = FakeLink("c", ShadowService(store, lambda: bench.epoch, lambda node: True).handlers())
    bench.group.peers.append(link)
    bench.discarder._holders["c"] = PeerHolder(link)  # type: ignore[arg-type]
    bench.discarder._copies["c"] = Copies()
    yield link
    await store.close()


@DEFER
@SIZES
async def test_a_message_that_enough_shadows_have_is_accepted_without_the_others(
    bench: Bench, second: FakeLink, body: bytes
) -> None:
    bench.link.fail = lambda op: PeerError("unreachable", "b cannot be reached")
    shadow_id_of(await bench.deliver(body))
    # Durably, before the 250: b must not be promoted without it.
    assert bench.group.failures == [("b", "b cannot be reached")]
    assert bench.discarder.counts() == {"a": 0, "b": 1, "c": 1}


@SIZES
async def test_what_one_shadow_did_not_take_is_kept_for_its_return(
    bench: Bench, second: FakeLink, body: bytes
) -> None:
    net = bench.shadowing.net = SafetyNet(bench.own, hold=3600, max_size=1 << 30)
    bench.link.fail = lambda op: PeerError("unreachable", "b cannot be reached")
    shadow_id = shadow_id_of(await bench.deliver(body))
    await net.flush()
    [meta] = [meta async for meta in bench.own.kept({"4abcDEF"})]
    assert meta.shadow_id == shadow_id
    assert await content(bench.own.content(meta)) == WHOLE + body
    assert os.listdir(bench.own._spool) == ([meta.file] if meta.file else [])


async def test_what_is_not_kept_is_counted(bench: Bench) -> None:
    net = bench.shadowing.net = SafetyNet(bench.own, hold=3600, max_size=1 << 30)
    before = metrics.NET_MISSED._value.get()
    net._tight = True
    for body in (b"text\r\n", LARGE):
        shadow_id_of(await bench.deliver(body))
    assert metrics.NET_MISSED._value.get() == before + 2
    bench.shadowing.net = SafetyNet(bench.own, hold=0, max_size=1 << 30)
    shadow_id_of(await bench.deliver())
    assert metrics.NET_MISSED._value.get() == before + 2, "nothing is to be kept"


@DEFER
async def test_a_message_that_too_few_shadows_have_is_refused(
    bench: Bench, second: FakeLink
) -> None:
    bench.shadowing.enough = lambda holders: len(holders) >= 2
    shadow_id_of(await bench.deliver())
    bench.link.fail = lambda op: PeerError("unreachable", "b cannot be reached")
    [(kind, text)] = await bench.deliver()
    assert (kind, text[:4]) == (b"y", b"451 ")
    assert bench.group.failures == [], "it was refused, so nobody lacks anything"


@DEFER
async def test_too_few_shadows_are_told_at_mail(bench: Bench) -> None:
    bench.shadowing.enough = lambda holders: len(holders) >= 2
    client = await MilterClient.connect(bench.path)
    assert (await client.mail())[1].startswith(b"451 4.7.1")
    await client.close()
    client = await MilterClient.connect(bench.path, RESUBMISSION)
    assert (await client.mail())[0] == b"c"
    await client.close()


async def test_pressure_is_told_at_mail_and_not_to_what_was_accepted_once(bench: Bench) -> None:
    full = Refusal(452, "4.3.1", "No room")
    bench.shadowing.pressure = lambda: full
    client = await MilterClient.connect(bench.path)
    assert await client.mail() == (b"y", b"452 4.3.1 No room\0")
    await client.close()
    client = await MilterClient.connect(bench.path, RESUBMISSION)
    assert (await client.mail())[0] == b"c"
    await client.close()


async def test_too_many_messages_at_once_are_refused_at_mail(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_IN_FLIGHT", 1)
    bench.link.hold = True
    client = await MilterClient.connect(bench.path)
    first = asyncio.create_task(client.message(HEADERS))
    async with asyncio.timeout(5):
        while not bench.shadowing.in_flight:  # noqa: ASYNC110 (a counter, no event)
            await asyncio.sleep(0.01)
    other = await MilterClient.connect(bench.path)
    assert (await other.mail())[1].startswith(b"451 4.3.2")
    await first  # times out, and the count goes back
    assert bench.shadowing.in_flight == 0
    assert (await other.mail())[0] == b"c"
    await other.close()
    await client.close()


async def test_a_shadow_that_joins_counts_on_what_is_acknowledged_from_then_on(
    bench: Bench, second: FakeLink
) -> None:
    """What was under way to the others is refused, and its sender comes again."""
    bench.group.peers.remove(second)
    inner = bench.link.handlers["shadow-store"]

    async def joined(peer: object, args: object, exchange: object) -> dict[str, object]:
        bench.group.peers = [bench.link, second]
        return await inner(peer, args, exchange)  # type: ignore[arg-type]

    bench.link.handlers = {"shadow-store": joined}
    [(kind, text)] = await bench.deliver()
    assert (kind, text[:3]) == (b"y", b"451")
    shadow_id_of(await bench.deliver())


async def test_a_message_counts_as_on_its_way_from_before_the_group_is_alone(bench: Bench) -> None:
    """Else a shadow that is back at once is proven to have everything, and lacks it."""
    bench.link.fail = lambda op: PeerError("unreachable", "gone")
    counted = []
    failed, write = bench.group.shadow_failed, bench.own._write

    async def alone(peer: str, reason: str) -> None:
        counted.append(bench.shadowing.storing_alone)
        await failed(peer, reason)

    async def stored(*args: object, **named: object) -> object:
        counted.append(bench.shadowing.storing_alone)
        return await write(*args, **named)  # type: ignore[arg-type]

    bench.group.shadow_failed = alone  # type: ignore[method-assign]
    bench.own._write = stored  # type: ignore[method-assign, assignment]
    shadow_id_of(await bench.deliver())
    assert len(counted) == 2
    assert all(counted)


async def test_what_sieve_sends_belongs_to_a_delivery_and_goes_on_in_a_drain(bench: Bench) -> None:
    """Refused, it would be lost where Sieve has filed the message already."""
    bench.group.refusal = Refusal(421, "4.3.2", "This host hands its mail over")
    bench.shadowing.pressure = lambda: module.FULL
    client = await MilterClient.connect(bench.path, SIEVE)
    shadow_id_of(await client.message(HEADERS))
    bench.group.peers = []  # alone, as after a failover: the delivery goes on, too
    shadow_id_of(await client.message(HEADERS))
    bench.group.refusal = Refusal(451, "4.3.2", "not primary")
    [(kind, text)] = await client.message(HEADERS)
    assert (kind, text[:3]) == (b"y", b"451")
    await client.close()
