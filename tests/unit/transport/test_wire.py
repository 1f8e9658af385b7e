"""What ``shadow-store`` carries fits its frame."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from tests.unit.transport.support import ENVELOPE

from umbra.peer import frames
from umbra.peer.frames import FrameType
from umbra.transport import wire
from umbra.transport.envelope import Envelope, Recipient


@pytest.mark.parametrize("length", [100, 1000, 1500, 1600, 1700])
@pytest.mark.parametrize("letter", ["x", "\u00fc", "\udcff"])
def test_few_recipients_with_long_arguments_fit(length: int, letter: str) -> None:
    recipients = [Recipient(f"r{n}@x.org", (f"ORCPT=rfc822;{letter * length}",)) for n in range(20)]
    envelope = replace(ENVELOPE, recipients=tuple(recipients))
    args, head = wire.arguments("0" * 30, "4abc", envelope)
    frames.encode_json(FrameType.REQUEST, {"op": "shadow-store", "epoch": 1, "args": args})
    assert wire.envelope_size(args) == len(head)
    if head:
        assert Envelope.from_json(head.decode("ascii")) == envelope
    else:
        assert Envelope.from_json(json.dumps(args["envelope"])) == envelope
        assert len(envelope.to_json()) <= wire.INLINE_LIMIT
