"""Both parsers as something that takes a stream of bytes and says what became of it.

Used by the unit tests (the corpus, and hypothesis) and by the coverage-guided fuzzer. Whatever
comes, a connection ends with the parser's own refusal or goes on; it never raises anything else,
and nothing that is not whole gets into the store.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

from umbra.peer import frames
from umbra.peer.connection import Connection, PeerError
from umbra.peer.frames import FrameType
from umbra.peer.identity import PeerIdentity
from umbra.peer.server import PeerServer
from umbra.transport import ids, shadowing, wire
from umbra.transport.envelope import Envelope
from umbra.transport.milter import Conversation, Decoder, ProtocolError, Step, Transaction
from umbra.transport.service import ShadowService
from umbra.transport.store import ShadowStore, State

CORPUS = Path(__file__).parent


def corpus(name: str) -> dict[str, bytes]:
    """Return the samples of a parser by their names."""
    return {path.name: path.read_bytes() for path in sorted((CORPUS / name).iterdir())}


# -- the milter


class Taken:
    """A message that counts what it is given."""

    def __init__(self, transaction: Transaction) -> None:
        self.transaction = transaction
        self.size = 0
        self.aborted = False

    def header(self, name: bytes, lines: bytes) -> None:
        """Count a header."""
        self.size += len(lines)

    def body(self, data: bytes) -> None:
        """Count a piece."""
        self.size += len(data)

    def abort(self) -> None:
        """Remember that it was dropped."""
        self.aborted = True

    async def finish(self) -> bytes:
        """Not called: nothing is sent anywhere."""
        raise NotImplementedError

    def envelope(self) -> Envelope | None:
        """Return the envelope that the agent makes of it, None if it refuses the message."""
        message = shadowing._Message(Mock(), self.transaction, Mock())
        message._shadow_id = ids.new()
        try:
            return message._checked_envelope()
        except shadowing._Refused:
            return None


class Application:
    """Takes all messages."""

    def __init__(self) -> None:
        self.messages: list[Taken] = []
        self.refused = False

    def mail(self, transaction: Transaction) -> bytes | None:
        """Go on."""
        return None

    def message(self, transaction: Transaction, flow: object) -> Taken:
        """Keep it for whoever looks."""
        self.messages.append(Taken(transaction))
        return self.messages[-1]


def converse(stream: bytes, size: int) -> Application:
    """Feed a connection in pieces of ``size``; a ProtocolError ends it, as in the server."""
    application = Application()
    decoder, conversation = Decoder(), Conversation(cast(Any, application), cast(Any, None))
    try:
        for start in range(0, len(stream), size):
            for command, data in decoder.feed(stream[start : start + size]):
                answer = conversation.receive(command, data)
                if answer is Step.FINISH:
                    _check_envelope(application.messages[-1].envelope())
                    conversation.finished()
                elif answer is Step.CLOSE:
                    return application
                elif isinstance(answer, bytes):
                    assert len(Decoder().feed(answer)) == 1
    except ProtocolError:
        application.refused = True
    conversation.abort()
    assert sum(item.size for item in application.messages) <= 3 * len(stream) + 1000
    return application


def _check_envelope(envelope: Envelope | None) -> None:
    """What goes to the shadow comes back as it was, and cannot add a line to an SMTP command."""
    if envelope is None:
        return
    args, head = wire.arguments(ids.new(), "4abc", envelope)
    sent = json.loads(json.dumps(args))
    assert (
        Envelope.from_json(head) if head else Envelope.from_object(sent["envelope"])
    ) == envelope
    for text in (envelope.sender, *envelope.sender_args, *(r.address for r in envelope.recipients)):
        assert "\r" not in text
        assert "\n" not in text
        text.encode("utf-8", "surrogateescape")


# -- the peer link, behind its TLS


class Transport:
    """The transport under a connection; keeps what was answered."""

    def __init__(self) -> None:
        self.sent = b""

    def write(self, data: bytes) -> None:
        """Keep it."""
        self.sent += data

    def set_write_buffer_limits(self, high: int) -> None:
        """Has no buffer."""

    def get_extra_info(self, name: str) -> Any:
        """Know nothing."""
        return Mock()

    def is_closing(self) -> bool:
        """Never."""
        return False

    def pause_reading(self) -> None:
        """Everything has come already."""

    resume_reading = abort = pause_reading

    def answers(self) -> Iterator[tuple[FrameType, bytes]]:
        """Give the frames that were sent."""
        decoder = frames.Decoder()
        decoder.feed(self.sent)
        while (frame := decoder.next()) is not None:
            yield frame


class Shadow:
    """The server's side of connections of a peer, with a real store."""

    def __init__(self, path: Path, *, keep: bool = False) -> None:
        self.runner = asyncio.Runner()
        self.store = ShadowStore(path, keep=keep)
        self.runner.run(self.store.open())

        async def check_epoch(peer: str, op: str, epoch: int) -> None:
            if epoch < 1:
                raise PeerError("stale-epoch", "over")

        handlers = ShadowService(self.store, lambda: 1, lambda node: True).handlers()
        hello = {"version": frames.VERSION, "group": "g", "node": "b", "storage_id": "t"}
        identity = Mock(name_of=lambda tls: "a")
        self.server = PeerServer("", 0, identity, hello, check_epoch, handlers)

    def close(self) -> None:
        """Close the store."""
        self.runner.run(self.store.close())
        self.runner.close()

    def connect(self, stream: bytes, *, greet: bool = False) -> list[tuple[FrameType, bytes]]:
        """Return the answers to a connection that sends ``stream`` and ends.

        :param greet: the stream begins with a HELLO; otherwise that is done already.
        """
        return self.runner.run(self._connect(stream, greet))

    async def _connect(self, stream: bytes, greet: bool) -> list[tuple[FrameType, bytes]]:
        transport, connection = Transport(), Connection()
        connection.connection_made(cast(Any, transport))
        connection.data_received(stream)
        serving = asyncio.create_task(self._serve(connection, greet))
        turns = 0
        while not serving.done():
            # Until the store's threads are asked, all is done within some turns of the loop.
            await asyncio.sleep(0 if turns < 20 else 0.0002)
            turns += 1
            if connection._waiter is not None and not connection._out:  # it has read all
                connection.connection_lost(None)
        serving.result()
        return list(transport.answers())

    async def _serve(self, connection: Connection, greet: bool) -> None:
        try:
            peer = await self.server._greet(connection) if greet else PeerIdentity("a", "s")
            while await self.server._serve(peer, connection):
                pass
        except PeerError as error:
            if error.code not in ("protocol", "unreachable") and not greet:
                raise

    async def sizes(self) -> list[tuple[str, int, int]]:
        """Return queue id, noted size and real size of what is held."""
        found = []
        async for meta in self.store.in_order(State.HELD):
            pieces = [piece async for piece in self.store.content(meta)]
            found.append((meta.queue_id, meta.size, sum(map(len, pieces))))
        return found

    def check(self, answers: list[tuple[FrameType, bytes]]) -> None:
        """Look at what was answered and at what is in the store."""
        for kind, payload in answers:
            # "failed" is what the server says of an exception that nobody expected, "store-failed"
            # of one in the store.
            assert kind is not FrameType.ERROR or json.loads(payload)["code"] not in (
                "failed",
                "store-failed",
            ), payload
        for queue_id, size, found in self.runner.run(self.sizes()):
            assert queue_id.isalnum()
            assert queue_id.isascii()
            assert size == found

    def empty(self) -> None:
        """Take everything through the rest of its life: discarded, looked for, purged."""
        self.runner.run(self._empty())

    async def _empty(self) -> None:
        held = [meta async for meta in self.store.in_order(State.HELD)]
        if held:
            gone = await self.store.discard([meta.shadow_id for meta in held], origin="a")
            assert len(gone) == len(held)
        addresses = await self.store.recipients("", "g")
        kept = [meta async for meta in self.store.delivered(addresses, "", "g")]
        assert len(kept) >= len(held)
        await self.store.purge(1e11, 0, 10_000)
