"""Who is at the other end: TLS 1.3 with pinned certificates, no certificate authority.

Each node trusts exactly the certificates of its peers. A certificate is looked up by its
fingerprint, so a peer that holds a
valid certificate of another node cannot speak for a third one, and host names play no part.
"""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PeerIdentity:
    """A peer whose certificate was verified, and what it said of itself in its HELLO."""

    node: str
    storage_id: str


class Identity:
    """The node's own key and certificate and the pinned certificates of its peers.

    :param directory: holds ``node.key``, ``node.crt`` and ``peers/NAME.crt``. A peer's file may
        hold several certificates,
        so that a new one can be trusted before the peer uses it.
    :raises OSError, ssl.SSLError: a file is missing or is no certificate.
    """

    def __init__(self, directory: Path, peers: Mapping[str, object]) -> None:
        self._fingerprints: dict[bytes, str] = {}
        trusted: list[str] = []
        for name in peers:
            text = (directory / "peers" / f"{name}.crt").read_text(encoding="ascii")
            trusted.append(text)
            for der in _certificates(text):
                self._fingerprints[hashlib.sha256(der).digest()] = name
        self.server = self._context(ssl.PROTOCOL_TLS_SERVER, directory, trusted)
        self.client = self._context(ssl.PROTOCOL_TLS_CLIENT, directory, trusted)

    @staticmethod
    def _context(protocol: int, directory: Path, trusted: list[str]) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.load_cert_chain(directory / "node.crt", directory / "node.key")
        if trusted:
            context.load_verify_locations(cadata="".join(trusted))
        return context

    def name_of(self, tls: ssl.SSLObject | ssl.SSLSocket) -> str | None:
        """Return the peer's node name by its certificate, or None if it is pinned to nobody."""
        der = tls.getpeercert(binary_form=True)
        return self._fingerprints.get(hashlib.sha256(der).digest()) if der else None


def _certificates(text: str) -> list[bytes]:
    end = "-----END CERTIFICATE-----"
    return [
        ssl.PEM_cert_to_DER_cert(part.strip() + "\n" + end)
        for part in text.split(end)
        if part.strip()
    ]
