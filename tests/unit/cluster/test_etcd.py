"""The etcd client against a gateway that speaks as etcd 3.5 does."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from umbra.cluster.etcd import Etcd, EtcdError, Shown

KEY = "umbra/example/leader"


class Store:
    """One key of a cluster, shared by its members."""

    def __init__(self) -> None:
        self.head = 7  # other keys have been written before
        self.revision = 0
        self.value = b""
        self.writes = 0

    def transact(self, body: dict[str, Any]) -> dict[str, Any]:
        compare = body["compare"][0]
        assert base64.b64decode(compare["key"]).decode() == KEY
        match compare["target"]:
            case "MOD":
                holds = int(compare["mod_revision"]) == self.revision
            case "VERSION":
                assert (compare["result"], compare["version"]) == ("LESS", "0")
                holds = False
        header = {"cluster_id": "1", "member_id": "2", "raft_term": "3"}
        if holds:
            self.head += 1
            self.writes += 1
            self.revision = self.head
            self.value = base64.b64decode(body["success"][0]["request_put"]["value"])
            put = {"response_put": {"header": {"revision": str(self.head)}}}
            header["revision"] = str(self.head)
            return {"header": header, "succeeded": True, "responses": [put]}
        header["revision"] = str(self.head)
        found: dict[str, Any] = {"header": {"revision": str(self.head)}}
        if self.revision:
            value = base64.b64encode(self.value).decode()
            found["kvs"] = [{"mod_revision": str(self.revision), "value": value}]
        # As the gateway does, `succeeded` is left out when it is false.
        return {"header": header, "responses": [{"response_range": found}]}


Trouble = Callable[[], Awaitable[web.StreamResponse | None]]


class Member:
    """One member's gateway; ``trouble`` answers in its place, ``silent`` loses the answer."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.trouble: Trouble | None = None
        self.silent = asyncio.Event()
        self.asked = 0
        self.url = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked += 1
        if self.trouble is not None:
            answer = await self.trouble()
            if answer is not None:
                return answer
        result = self.store.transact(await request.json())
        if self.silent.is_set():
            await asyncio.sleep(60)
        return web.json_response(result)


@asynccontextmanager
async def cluster(count: int = 3, timeout: float = 0.3) -> AsyncIterator[tuple[Etcd, list[Member]]]:
    store = Store()
    async with AsyncExitStack() as stack:
        members = []
        for _ in range(count):
            member = Member(store)
            app = web.Application()
            app.router.add_post("/v3/kv/txn", member.handle)
            server = TestServer(app, shutdown_timeout=0.01)
            await server.start_server()
            stack.push_async_callback(server.close)
            member.url = str(server.make_url("")).rstrip("/")
            members.append(member)
        client = Etcd([m.url for m in members], tls=None, timeout=timeout)
        await stack.enter_async_context(client)
        yield client, members


async def hang() -> web.StreamResponse | None:
    await asyncio.sleep(60)
    return None


def raw(text: str) -> Trouble:
    async def answer() -> web.StreamResponse | None:
        return web.Response(text=text, content_type="application/json")

    return answer


def says(status: int, **body: object) -> Trouble:
    async def answer() -> web.StreamResponse | None:
        return web.Response(status=status, text=json.dumps(body), content_type="application/json")

    return answer


async def test_a_key_is_made_read_and_swapped() -> None:
    async with cluster() as (client, members):
        empty = await client.read(KEY)
        assert (empty.revision, empty.value, empty.swapped) == (0, None, False)
        made = await client.swap(KEY, 0, b"one")
        assert (made.revision, made.value, made.swapped) == (8, b"one", True)
        read = await client.read(KEY)
        assert (read.revision, read.value, read.swapped) == (8, b"one", False)
        assert read.sent >= made.sent >= empty.sent
        second = await client.swap(KEY, 8, b"two")
        assert (second.revision, second.swapped) == (9, True)
        # Nothing is shown twice as a write: the read wrote nothing.
        assert members[0].store.writes == 2


async def test_a_swap_of_an_old_revision_shows_what_is_there() -> None:
    async with cluster() as (client, _):
        await client.swap(KEY, 0, b"one")
        await client.swap(KEY, 8, b"two")
        late = await client.swap(KEY, 8, b"other")
        assert late == Shown(late.sent, 9, b"two", swapped=False, cluster="1")


async def test_who_is_late_is_not_waited_for_and_not_asked_again() -> None:
    async with cluster() as (client, members):
        members[0].trouble = hang
        began = asyncio.get_running_loop().time()
        await client.read(KEY)
        assert asyncio.get_running_loop().time() - began < 0.3
        assert client.endpoint == members[1].url
        await client.read(KEY)
        assert [m.asked for m in members] == [1, 2, 0]


async def test_a_call_to_members_that_all_hang_ends() -> None:
    async with cluster(timeout=0.2) as (client, members):
        for member in members:
            member.trouble = hang
        began = asyncio.get_running_loop().time()
        with pytest.raises(EtcdError, match=r"no answer within 0\.2 s.*; .*; ") as caught:
            await client.read(KEY)
        assert asyncio.get_running_loop().time() - began < 0.5
        assert all(m.url in str(caught.value) for m in members)
        assert [m.asked for m in members] == [1, 1, 1]


@pytest.mark.parametrize("calls", [1, 5])
async def test_a_swap_gets_through_the_one_member_that_can(calls: int) -> None:
    """A primary that is cut off from its shadow, where the leader is, has no time to lose.

    Many calls at a time must not lead each other away from the member that answers.
    """
    async with cluster() as (client, members):
        members[0].trouble = members[1].trouble = hang
        began = asyncio.get_running_loop().time()
        reads = [asyncio.create_task(client.read(KEY)) for _ in range(calls - 1)]
        assert (await client.swap(KEY, 0, b"one")).value == b"one"
        assert asyncio.get_running_loop().time() - began < 0.3
        await asyncio.gather(*reads)
        assert client.endpoint == members[2].url
        before = members[0].asked
        assert (await client.swap(KEY, 8, b"two")).value == b"two"
        assert members[0].asked == before


async def test_who_is_as_far_as_the_profile_allows_is_not_late() -> None:
    async def far() -> web.StreamResponse | None:
        await asyncio.sleep(0.5)
        return None

    async with cluster(timeout=1.5) as (client, members):
        members[0].trouble = far
        await client.read(KEY)
        assert [m.asked for m in members] == [1, 0, 0]


async def test_a_swap_that_reaches_the_leader_twice_is_made_once() -> None:
    async with cluster() as (client, members):
        members[0].silent.set()
        made = await client.swap(KEY, 0, b"mine")
        assert (made.value, made.revision) == (b"mine", 8)
        assert [m.asked for m in members] == [1, 1, 0]
        assert members[0].store.writes == 1


async def test_nothing_runs_on_when_who_asked_has_gone() -> None:
    async with cluster() as (client, members):
        for member in members:
            member.trouble = hang
        before = asyncio.all_tasks()
        call = asyncio.create_task(client.read(KEY))
        await asyncio.sleep(0.1)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert call.cancelled()
        assert not [t for t in asyncio.all_tasks() - before if "Etcd" in repr(t)]


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (503, "etcdserver: leader changed"),
        (503, "etcdserver: no leader"),
        (503, "etcdserver: request timed out"),
        (429, "etcdserver: too many requests"),
        (400, "etcdserver: mvcc: database space exceeded"),
    ],
)
async def test_an_error_of_etcd_is_named_and_another_member_asked(
    status: int, message: str
) -> None:
    async with cluster() as (client, members):
        members[0].trouble = says(status, error=message, code=14, message=message)
        assert (await client.read(KEY)).revision == 0
        assert [m.asked for m in members] == [1, 1, 0]
        for member in members:
            member.trouble = members[0].trouble
        with pytest.raises(EtcdError, match=message) as caught:
            await client.swap(KEY, 0, b"one")
        assert members[0].url in str(caught.value)


@pytest.mark.parametrize(
    "answer",
    [
        says(200),
        says(200, responses=[]),
        says(200, succeeded=True, header={}),
        says(200, responses=[{"response_range": {"kvs": [{"mod_revision": "x"}]}}]),
        says(200, responses=[{"response_range": {"kvs": [{"mod_revision": "3", "value": "?"}]}}]),
        says(502),
        says(200, header={"cluster_id": "1", "revision": 1e999}, succeeded=True),
        says(200, header={"cluster_id": "1"}, responses=["x" * 100_000]),
        raw("[" * 50_000),
    ],
)
async def test_an_answer_that_makes_no_sense_decides_nothing(answer: Trouble) -> None:
    async with cluster(count=1) as (client, members):
        members[0].trouble = answer
        with pytest.raises(EtcdError):
            await client.swap(KEY, 0, b"one")


async def test_an_answer_that_is_no_json() -> None:
    async def html() -> web.StreamResponse | None:
        return web.Response(status=200, text="<html>", content_type="text/html")

    async with cluster(count=1) as (client, members):
        members[0].trouble = html
        with pytest.raises(EtcdError):
            await client.read(KEY)


async def test_a_member_that_is_down_costs_no_time_out() -> None:
    async with cluster(timeout=5) as (client, members):
        client._endpoints[0] = "http://127.0.0.1:9"
        began = asyncio.get_running_loop().time()
        assert (await client.read(KEY)).revision == 0
        assert asyncio.get_running_loop().time() - began < 1
        assert members[1].asked == 1


async def test_an_answer_that_trickles_counts_as_silence() -> None:
    async def slow(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        for _ in range(20):
            await response.write(b" ")
            await asyncio.sleep(0.05)
        return response

    app = web.Application()
    app.router.add_post("/v3/kv/txn", slow)
    async with cluster(count=1) as (_, members), TestServer(app, shutdown_timeout=0.01) as server:
        url = str(server.make_url("")).rstrip("/")
        async with Etcd([url, members[0].url], tls=None, timeout=0.2) as client:
            assert (await client.read(KEY)).revision == 0
            assert members[0].asked == 1


async def test_no_endpoint_and_a_closed_client() -> None:
    with pytest.raises(ValueError, match="endpoint"):
        Etcd([], tls=None, timeout=1)
    with pytest.raises(EtcdError, match="closed"):
        await Etcd(["http://127.0.0.1:9"], tls=None, timeout=1).read(KEY)


async def test_a_voter_is_healthy_by_its_word_and_never_a_danger() -> None:
    answers = iter(
        ['{"health": "true"}', "[" * 50_000, "[]", '{"health": "true", "x": ' + "9" * 70_000]
    )

    async def health(_: web.Request) -> web.Response:
        return web.Response(text=next(answers))

    app = web.Application()
    app.router.add_get("/health", health)
    async with TestServer(app) as server:
        url = str(server.make_url("")).rstrip("/")
        async with Etcd([url], tls=None, timeout=1.0) as client:
            assert [await client.silent() for _ in range(4)] == [[], [url], [url], [url]]
