"""What the tests of the cluster share."""

from __future__ import annotations

from umbra.config import Config, Endpoint, Peer

CONFIG = Config(
    group="mail",
    node="a",
    site="alpha",
    role="primary",
    link=Endpoint("127.0.0.1", 1),
    api=Endpoint("127.0.0.1", 2),
    peers=(Peer("b", "beta", "127.0.0.2"),),
)
"""The primary of a pair, as its agent is configured."""
