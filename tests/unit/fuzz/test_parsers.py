"""Both parsers against the kept corpus, whole, cut off, and changed at random.

Whatever comes, a connection ends with the parser's own refusal or goes on; it never raises anything
else, and nothing that is not whole gets into the store.
"""

from __future__ import annotations

import asyncio
import json
import logging
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from umbra.peer import frames
from umbra.peer.connection import Connection, PeerError
from umbra.peer.frames import FrameType
from umbra.peer.identity import PeerIdentity
from umbra.peer.server import PeerServer
from umbra.transport import milter
from umbra.transport.milter import Conversation, Decoder, ProtocolError, Step, Transaction
from umbra.transport.service import ShadowService
from umbra.transport.store import ShadowStore, State

CORPUS = Path(__file__).parents[2] / "fuzz"
EXAMPLES = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def corpus(name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((CORPUS / name).iterdir())}


MILTER, FRAMES = corpus("milter"), corpus("frames")


@st.composite
def mutated(draw: st.DrawFn, samples: dict[str, bytes]) -> bytes:
    """One or two samples, with some pieces cut out, doubled, overwritten or put in."""
    data = b"".join(draw(st.lists(st.sampled_from(list(samples.values())), min_size=1, max_size=2)))
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 64)))
        piece = draw(
            st.one_of(
                st.just(b""),
                st.just(data[start:end] * 2),
                st.binary(min_size=end - start, max_size=end - start),
                st.binary(max_size=8),
            )
        )
        data = data[:start] + piece + data[end:]
    return data


# -- the milter


class Taken:
    """A message that counts what it is given."""

    def __init__(self) -> None:
        self.size = 0
        self.aborted = False

    def header(self, name: bytes, lines: bytes) -> None:
        self.size += len(lines)

    def body(self, data: bytes) -> None:
        self.size += len(data)

    def abort(self) -> None:
        self.aborted = True

    async def finish(self) -> bytes:
        return milter.ACCEPT


class Application:
    def __init__(self) -> None:
        self.messages: list[Taken] = []

    def mail(self, transaction: Transaction) -> bytes | None:
        return None

    def message(self, transaction: Transaction, flow: object) -> Taken:
        self.messages.append(Taken())
        return self.messages[-1]


def converse(stream: bytes, size: int) -> Application:
    """Feed a connection in pieces; a ProtocolError ends it, as it does in the server."""
    application = Application()
    decoder, conversation = Decoder(), Conversation(cast(Any, application), cast(Any, None))
    try:
        for start in range(0, len(stream), size):
            for command, data in decoder.feed(stream[start : start + size]):
                answer = conversation.receive(command, data)
                if answer is Step.FINISH:
                    conversation.finished()
                elif answer is Step.CLOSE:
                    return application
    except ProtocolError:
        pass
    conversation.abort()
    assert sum(item.size for item in application.messages) <= 3 * len(stream) + 1000
    return application


@pytest.mark.parametrize("name", MILTER)
def test_milter_samples_whole_and_cut_at_every_place(name: str) -> None:
    stream = MILTER[name]
    whole = converse(stream, len(stream))
    for size in (1, 3, 7):
        assert len(converse(stream, size).messages) == len(whole.messages)
    for end in range(len(stream)):
        converse(stream[:end], len(stream))


def test_the_good_samples_of_the_milter_are_understood() -> None:
    for name, count in (("whole_message", 1), ("two_messages_and_reuse", 3)):
        messages = converse(MILTER[name], 1000).messages
        assert [item.aborted for item in messages] == [False] * count


@EXAMPLES
@given(mutated(MILTER), st.integers(1, 200))
def test_milter_samples_changed_at_random(stream: bytes, size: int) -> None:
    converse(stream, size)


# -- the peer link, behind its TLS


class Transport:
    """The transport under a connection; keeps what was answered."""

    def __init__(self) -> None:
        self.sent = b""

    def write(self, data: bytes) -> None:
        self.sent += data

    def set_write_buffer_limits(self, high: int) -> None:
        pass

    def get_extra_info(self, name: str) -> Any:
        return Mock()

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        pass

    resume_reading = abort = pause_reading

    def answers(self) -> Iterator[tuple[FrameType, bytes]]:
        decoder = frames.Decoder()
        decoder.feed(self.sent)
        while (frame := decoder.next()) is not None:
            yield frame


class Shadow:
    """The server's side of connections of a peer, with a real store."""

    def __init__(self, path: Path) -> None:
        self.runner = asyncio.Runner()
        self.store = ShadowStore(path)
        self.runner.run(self.store.open())

        async def check_epoch(peer: str, op: str, epoch: int) -> None:
            if epoch < 1:
                raise PeerError("stale-epoch", "over")

        handlers = ShadowService(self.store, lambda: 1).handlers()
        self.server = PeerServer("", 0, cast(Any, None), {}, check_epoch, handlers)

    def close(self) -> None:
        self.runner.run(self.store.close())
        self.runner.close()

    def connect(self, stream: bytes) -> list[tuple[FrameType, bytes]]:
        return self.runner.run(self._connect(stream))

    async def _connect(self, stream: bytes) -> list[tuple[FrameType, bytes]]:
        transport, connection = Transport(), Connection()
        connection.connection_made(cast(Any, transport))
        connection.data_received(stream)
        serving = asyncio.create_task(self._serve(connection))
        while not serving.done():
            await asyncio.sleep(0.001)
            if connection._waiter is not None and not connection._out:  # it has read all
                connection.connection_lost(None)
        serving.result()
        return list(transport.answers())

    async def _serve(self, connection: Connection) -> None:
        try:
            while await self.server._serve(PeerIdentity("a", "s"), connection):
                pass
        except PeerError as error:
            if error.code not in ("protocol", "unreachable"):
                raise

    async def _sizes(self) -> list[tuple[str, int, int]]:
        found = []
        async for meta in self.store.in_order(State.HELD):
            pieces = [piece async for piece in self.store.content(meta)]
            found.append((meta.queue_id, meta.size, sum(map(len, pieces))))
        return found

    def check(self, answers: list[tuple[FrameType, bytes]]) -> None:
        for kind, payload in answers:
            # "failed" is what the server says of an exception that nobody expected.
            assert kind is not FrameType.ERROR or json.loads(payload)["code"] != "failed", payload
        for queue_id, size, found in self.runner.run(self._sizes()):
            assert queue_id.isalnum()
            assert size == found


@pytest.fixture
def shadow(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Shadow]:
    caplog.set_level(logging.CRITICAL)
    shadow = Shadow(tmp_path / "s")
    yield shadow
    shadow.close()


@pytest.mark.parametrize("name", FRAMES)
def test_frame_samples_whole_and_cut_off(shadow: Shadow, name: str) -> None:
    stream = FRAMES[name]
    shadow.check(shadow.connect(stream))
    step = max(1, len(stream) // 60)
    for end in range(0, len(stream), step):
        shadow.check(shadow.connect(stream[:end]))


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("store", [FrameType.RESPONSE]),
        ("replayed_store", [FrameType.RESPONSE] * 3),
        ("envelope_in_the_data", [FrameType.RESPONSE]),
        # Nobody is there any more to be told.
        ("no_end", []),
        ("cut_off_in_a_frame", []),
        ("envelope_size_lies", [FrameType.ERROR]),
        ("shadow_id_is_a_path", [FrameType.ERROR]),
        ("queue_id_has_a_newline", [FrameType.ERROR]),
        ("recipient_adds_a_command", [FrameType.ERROR]),
        ("argument_adds_a_command", [FrameType.ERROR]),
        ("received_is_no_number", [FrameType.ERROR]),
        ("unknown_operation", [FrameType.ERROR]),
        ("deep_json", []),
        ("length_huge", []),
    ],
)
def test_frame_samples_get_their_answer(shadow: Shadow, name: str, kinds: list[FrameType]) -> None:
    assert [kind for kind, _ in shadow.connect(FRAMES[name])][: len(kinds) + 1] == kinds
    stored = shadow.runner.run(shadow._sizes())
    assert len(stored) == (1 if kinds and kinds[0] is FrameType.RESPONSE else 0)


@EXAMPLES
@given(stream=mutated(FRAMES))
def test_frame_samples_changed_at_random(shadow: Shadow, stream: bytes) -> None:
    shadow.check(shadow.connect(stream))


def test_an_envelope_that_claims_to_be_huge_costs_no_memory(shadow: Shadow) -> None:
    tracemalloc.start()
    shadow.connect(FRAMES["envelope_size_lies"])
    shadow.connect(FRAMES["length_huge"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 1024 * 1024
