"""A small client of etcd's v3 JSON gateway: one key, read and swapped by committed transactions.

Debian 13's etcd (3.5.16) may answer a plain linearizable read from a stale state while its leader
changes, its watches can be silent without an error, and a lease can be renewed after it was
revoked. So nothing of that is used: a read here is a transaction with a write that is never taken,
which makes it go through the log like a write and leaves the key's revision alone.

Every request has a short time-out, and who is late is not waited for: the next member is asked as
well, and the first answer counts. It may be the only member between this host and the leader, and
a right to act may not outlast the time-outs of the others. So a swap may reach the leader twice;
the second finds a greater revision of the key and changes nothing. One that failed may still be
committed later: only a greater revision proves that it will not be.
"""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import aiohttp


class EtcdError(Exception):
    """No usable answer; one sentence for people. Whether a swap is committed is not known."""


@dataclass(frozen=True)
class Shown:
    """What a committed transaction showed of the key.

    :param sent: when its request was sent, on this host's CLOCK_BOOTTIME, in seconds.
    :param revision: the key's modification revision; 0 if there is no such key.
    :param swapped: this transaction wrote ``value``.
    :param cluster: id of the cluster: another one after a restore from a snapshot.
    """

    sent: float
    revision: int
    value: bytes | None
    swapped: bool = False
    cluster: str = ""


def boottime() -> float:
    """Return the seconds since the boot, those asleep included; nobody can set this clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def client_tls(authority: Path, certificate: Path, key: Path) -> ssl.SSLContext:
    """Return what this host shows to the members, and whom it trusts: the pinned certificates.

    OSError or ssl.SSLError if a file is missing or is no certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(authority)
    context.load_cert_chain(certificate, key)
    return context


# A member that has not answered for this part of the time-out is late: two round trips of the
# longest that a profile allows (``Timing.round_trip``). While one is late, the next one is given
# half of it, so the third of three is asked after 0.75 of the time-out. So a primary that is cut
# off from the shadow, which leads, goes on alone in time: ``miss``, a tick of beat/4, this and two
# round trips are 1.08, 1.8 and 3.9 s after the last renewal that was answered (lan-fast, default,
# wan). Its right runs for 1.1, 1.9 and 4.5 s, and the shadow waits for 1.5, 2.5 and 6 s.
LATE = 0.5

MAX_ANSWER = 64 * 1024
"""Bytes; the key and what is around it are a few hundred."""


class Etcd:
    """A client of all members of one cluster, to be used as an async context manager.

    It asks the member that answered last, and the next one as soon as that one is late or fails.

    :param endpoints: ``https://ADDRESS:2379`` of each member, this host's own first.
    :param timeout: seconds for one request to a member, connecting included.
    """

    def __init__(
        self, endpoints: Sequence[str], *, tls: ssl.SSLContext | None, timeout: float
    ) -> None:
        if not endpoints:
            raise ValueError("a coordinator needs an endpoint")
        self._endpoints = list(endpoints)
        self._tls = tls
        self._timeout = timeout
        self._current = 0
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(ssl=self._tls if self._tls is not None else True)
        self._session = aiohttp.ClientSession(
            connector=connector,
            trust_env=False,
            # Else a small answer could be a large one.
            auto_decompress=False,
            headers={"Accept-Encoding": "identity"},
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    @property
    def endpoint(self) -> str:
        """The member that the next call goes to first."""
        return self._endpoints[self._current]

    async def read(self, key: str) -> Shown:
        """Return the key as a committed transaction shows it. EtcdError if no member answered."""
        never = {"target": "VERSION", "result": "LESS", "version": "0"}
        return await self._transact(key, never, b"")

    async def swap(self, key: str, revision: int, value: bytes) -> Shown:
        """Write ``value`` if the key's revision still is ``revision`` (0: there is no key).

        Return what a transaction showed: the new value, or what is there instead. EtcdError if the
        outcome is not known.
        """
        unchanged = {"target": "MOD", "result": "EQUAL", "mod_revision": str(revision)}
        return await self._transact(key, unchanged, value)

    async def silent(self) -> list[str]:
        """Return the members that do not say of themselves that they are healthy."""
        answers = await asyncio.gather(*(self._healthy(endpoint) for endpoint in self._endpoints))
        return [
            endpoint
            for endpoint, healthy in zip(self._endpoints, answers, strict=True)
            if not healthy
        ]

    async def _healthy(self, endpoint: str) -> bool:
        if self._session is None:
            return False
        try:
            async with (
                asyncio.timeout(2 * self._timeout),
                self._session.get(f"{endpoint}/health", allow_redirects=False) as response,
            ):
                answer = await _answer(response)
        except (EtcdError, TimeoutError, aiohttp.ClientError, OSError, ValueError):
            return False
        return answer.get("health") == "true"

    async def _transact(self, key: str, compare: Mapping[str, str], value: bytes) -> Shown:
        name = _encode(key.encode())
        body = {
            "compare": [{"key": name, **compare}],
            "success": [{"request_put": {"key": name, "value": _encode(value)}}],
            "failure": [{"request_range": {"key": name}}],
        }
        first, members = self._current, len(self._endpoints)
        left = deque((first + i) % members for i in range(members))
        asked: dict[asyncio.Task[Shown], int] = {}
        failures: list[str] = []
        try:
            while left or asked:
                if left:
                    member = left.popleft()
                    asked[asyncio.create_task(self._ask(member, body, value))] = member
                done, _ = await asyncio.wait(
                    asked,
                    timeout=LATE * self._timeout / len(asked) if left else None,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                for task in done:
                    member = asked.pop(task)
                    if (error := task.exception()) is None:
                        self._current = member
                        return task.result()
                    if not isinstance(error, EtcdError):
                        raise error
                    failures.append(f"{self._endpoints[member]}: {error}")
            raise EtcdError("; ".join(failures))
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    async def _ask(self, member: int, body: Mapping[str, Any], value: bytes) -> Shown:
        sent = boottime()
        return _shown(await self._post(f"{self._endpoints[member]}/v3/kv/txn", body), sent, value)

    async def _post(self, url: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        if self._session is None:
            raise EtcdError("the client is closed")
        try:
            async with (
                asyncio.timeout(self._timeout),
                self._session.post(url, json=body, allow_redirects=False) as response,
            ):
                answer = await _answer(response)
                status = response.status
        except TimeoutError:
            raise EtcdError(f"no answer within {self._timeout:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise EtcdError(str(error) or type(error).__name__) from None
        if status != 200:
            raise EtcdError(str(answer.get("message") or answer.get("error") or f"HTTP {status}"))
        return answer


async def _answer(response: aiohttp.ClientResponse) -> Mapping[str, Any]:
    """Return the JSON object of an answer. EtcdError if it is none, or too long."""
    data = bytearray()
    async for piece in response.content.iter_any():
        data += piece
        if len(data) > MAX_ANSWER:
            raise EtcdError(f"an answer of over {MAX_ANSWER} bytes")
    try:
        answer = json.loads(data)
    except RecursionError:
        answer = None
    if not isinstance(answer, dict):
        raise EtcdError("an answer that is no JSON object")
    return answer


def _shown(answer: Mapping[str, Any], sent: float, value: bytes) -> Shown:
    try:
        cluster = str(answer["header"]["cluster_id"])
        if answer.get("succeeded"):
            # A transaction's own revision is that of what it wrote.
            revision = int(answer["header"]["revision"])
            return Shown(sent, revision, value, swapped=True, cluster=cluster)
        found = answer["responses"][0]["response_range"].get("kvs", [])
        if not found:
            return Shown(sent, 0, None, cluster=cluster)
        return Shown(
            sent,
            int(found[0]["mod_revision"]),
            base64.b64decode(found[0].get("value", ""), validate=True),
            cluster=cluster,
        )
    except (
        KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError
    ) as error:  # fmt: skip
        raise EtcdError(f"an answer that makes no sense: {error!r}") from None


def _encode(value: bytes) -> str:
    return base64.b64encode(value).decode()
