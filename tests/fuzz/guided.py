#!/usr/bin/env python3
"""One parser under the coverage-guided fuzzer, atheris. :mod:`tests.fuzz.run` starts it.

The arguments are libFuzzer's. It starts this file again with others of its own, so what is ours
comes in the environment: ``FUZZ_PARSER``, and ``FUZZ_STORE``, a directory for the store.
"""

from __future__ import annotations

import logging
import os
import struct
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["umbra.peer", "umbra.transport"]):
    from tests.fuzz import harness

    from umbra.peer.frames import FrameType

# Both protocols are a length of four bytes, then one byte that says what it is. On the peer link
# the length is that of what follows this byte, on the milter's it counts the byte too.
COUNTS_KIND = {"milter": 1, "frames": 0}


def split(stream: bytes, own: int) -> list[tuple[int, bytes]]:
    """Return the packets of a stream; what is no whole one is the last."""
    packets, at = [], 0
    while at + 5 <= len(stream):
        length, kind = struct.unpack_from(">IB", stream, at)
        end = at + 5 + max(0, length - own)
        packets.append((kind, stream[at + 5 : end]))
        at = end
    return packets


def join(packets: list[tuple[int, bytes]], own: int) -> bytes:
    """Return the stream of ``packets``, each with its right length."""
    return b"".join(struct.pack(">IB", len(data) + own, kind) + data for kind, data in packets)


def mutator(own: int):  # type: ignore[no-untyped-def]  # atheris has no types
    """Return a mutator that changes one packet and puts its length right, every other time."""

    def mutate(stream: bytes, max_size: int, seed: int) -> bytes:
        packets = split(stream, own)
        if seed % 2 or not packets:
            return bytes(atheris.Mutate(stream, max_size))
        at = seed // 8 % len(packets)
        kind, data = packets[at]
        match seed // 2 % 4:
            case 0:
                packets.insert(at, packets[seed // 64 % len(packets)])
            case 1:
                del packets[at]
            case _:
                packets[at] = kind, bytes(atheris.Mutate(data, max_size))
        return join(packets, own)[:max_size]

    return mutate


def milter(stream: bytes) -> None:
    """Whole and in pieces: the same, unless it is refused on the way."""
    whole, pieces = harness.converse(stream, max(1, len(stream))), harness.converse(stream, 7)
    if not whole.refused:
        assert not pieces.refused
        assert [m.size for m in whole.messages] == [m.size for m in pieces.messages]


def main() -> None:
    """Run libFuzzer; it ends the process."""
    parser, directory = os.environ["FUZZ_PARSER"], tempfile.mkdtemp(dir=os.environ["FUZZ_STORE"])
    logging.disable(logging.CRITICAL)
    if parser == "milter":
        one = milter
    else:
        shadow = harness.Shadow(Path(directory), keep=True)

        def one(stream: bytes) -> None:
            hello = stream[4:5] == b"\x01"
            answers = shadow.connect(stream, greet=hello)
            if any(kind is FrameType.RESPONSE for kind, _ in answers):
                shadow.check(answers)
                shadow.empty()

    atheris.Setup(sys.argv, one, custom_mutator=mutator(COUNTS_KIND[parser]))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
