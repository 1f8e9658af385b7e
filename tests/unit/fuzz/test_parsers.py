"""Both parsers against the kept corpus, whole, cut off, and changed at random."""

from __future__ import annotations

import logging
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fuzz.harness import Shadow, converse, corpus

from umbra.peer.frames import FrameType

EXAMPLES = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
MILTER, FRAMES = corpus("milter"), corpus("frames")


def named(samples: dict[str, bytes]) -> list[str]:
    """Those that a person has named; the guided fuzzer names what it keeps by its hash."""
    return [name for name in samples if len(name) < 40]


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


@pytest.mark.parametrize("name", named(MILTER))
def test_milter_samples_whole_and_cut_at_every_place(name: str) -> None:
    stream = MILTER[name]
    whole = converse(stream, len(stream))
    for size in (1, 3, 7):
        assert len(converse(stream, size).messages) == len(whole.messages)
    for end in range(len(stream)):
        converse(stream[:end], len(stream))


def test_what_the_guided_fuzzer_found_of_the_milter() -> None:
    for stream in MILTER.values():
        converse(stream, max(1, len(stream)))


def test_the_good_samples_of_the_milter_are_understood() -> None:
    for name, count in (("whole_message", 1), ("two_messages_and_reuse", 3)):
        messages = converse(MILTER[name], 1000).messages
        assert [item.aborted for item in messages] == [False] * count


@EXAMPLES
@given(mutated(MILTER), st.integers(1, 200))
def test_milter_samples_changed_at_random(stream: bytes, size: int) -> None:
    converse(stream, size)


# -- the peer link, behind its TLS


@pytest.fixture
def shadow(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Shadow]:
    caplog.set_level(logging.CRITICAL)
    shadow = Shadow(tmp_path / "s", keep=True)
    yield shadow
    shadow.close()


@pytest.mark.parametrize("name", named(FRAMES))
def test_frame_samples_whole_and_cut_off(shadow: Shadow, name: str) -> None:
    stream = FRAMES[name]
    shadow.check(shadow.connect(stream))
    step = max(1, len(stream) // 60)
    for end in range(0, len(stream), step):
        shadow.check(shadow.connect(stream[:end]))


def test_what_the_guided_fuzzer_found_of_the_frames(shadow: Shadow) -> None:
    for stream in FRAMES.values():
        shadow.check(shadow.connect(stream, greet=True))
        shadow.check(shadow.connect(stream))
        shadow.empty()


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
        ("queue_id_is_not_ascii", [FrameType.ERROR]),
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
    stored = shadow.runner.run(shadow.sizes())
    assert len(stored) == (1 if kinds and kinds[0] is FrameType.RESPONSE else 0)


def test_a_greeting_is_answered(shadow: Shadow) -> None:
    kinds = [kind for kind, _ in shadow.connect(FRAMES["hello_and_store"], greet=True)]
    assert kinds == [FrameType.HELLO, FrameType.RESPONSE]


def test_texts_that_are_no_utf_8_can_be_discarded_and_replayed(shadow: Shadow) -> None:
    shadow.connect(FRAMES["lone_surrogates"])
    assert len(shadow.runner.run(shadow.sizes())) == 1
    shadow.empty()


@EXAMPLES
@given(stream=mutated(FRAMES))
def test_frame_samples_changed_at_random(shadow: Shadow, stream: bytes) -> None:
    shadow.check(shadow.connect(stream))
    shadow.empty()


def test_an_envelope_that_claims_to_be_huge_costs_no_memory(shadow: Shadow) -> None:
    tracemalloc.start()
    shadow.connect(FRAMES["envelope_size_lies"])
    shadow.connect(FRAMES["length_huge"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 1024 * 1024
