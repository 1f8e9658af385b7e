"""The helper takes nothing from its client that could become a path, a program or an option."""

from __future__ import annotations

import asyncio
import errno
import grp
import json
import os
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from umbra.node import helper
from umbra.node.addresses import ServiceAddresses
from umbra.node.client import NodeHelper
from umbra.node.helper import Helper, HelperError
from umbra.node.netlink import Address
from umbra.node.packets import Connection
from umbra.node.queue import QUEUES

Ran = list[tuple[tuple[str, ...], str | None]]


def make_queues(spool: Path) -> None:
    for queue in QUEUES:
        (spool / queue).mkdir()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    calls: Ran = []

    async def run(
        *argv: str, stdin: str | None = None, silent: int = 0, timeout: float = 20
    ) -> str:
        calls.append((argv, stdin))
        return ""

    monkeypatch.setattr(helper, "run", run)
    return calls


async def ask(request: object, spool: Path = Path("/nonexistent")) -> dict[str, Any]:
    return await Helper(spool).answer(json.dumps(request).encode())


async def test_ports_are_opened_in_one_transaction(ran: Ran) -> None:
    opened = await ask({"do": "ports-open", "ports": [25, 993], "hold": 10})
    assert opened == {"ok": True, "new": [], "problems": []}
    [(argv, batch)] = ran
    assert argv == ("nft", "-f", "-")
    assert batch is not None
    assert batch.splitlines() == [
        "flush set inet umbra_fence open_ports",
        "add element inet umbra_fence open_ports { 25 timeout 10000ms, 993 timeout 10000ms }",
    ]


@pytest.mark.parametrize(
    "request_",
    [
        {"do": "ports-open", "ports": ["25; flush ruleset"], "hold": 10},
        {"do": "ports-open", "ports": [], "hold": 10},
        {"do": "kick"},
        {"do": "kick", "ports": ["25 or sport = :22"]},
        {"do": "ports-open", "ports": [25], "hold": 1e9},
        {"do": "ports-open", "ports": [25], "hold": "10"},
        {"do": "ports-open", "ports": [25], "until": "soon"},
        {"do": "ports-open", "ports": [25], "until": 0.0},
        {"do": "ports-open", "ports": [25], "until": 1e12},
        {"do": "queue-delete", "ids": ["ALL"]},
        {"do": "aliases", "keys": "a@example.org"},
        {"do": "aliases", "keys": ["a@example.org\nb@example.org"]},
        {"do": "aliases", "keys": [""]},
        {"do": "aliases", "keys": ["a"] * 2001},
        {"do": "queue-delete", "ids": ["-d"]},
        {"do": "queue-delete", "ids": ["4hK2\nALL"]},
        {"do": "queue-hold", "ids": "4hK2pl0Zzz"},
        {"do": "queue-hold", "ids": ["../../etc"]},
        {"do": "stonith", "node": "mail-a.service -f"},
        {"do": "stonith", "node": "../mail-a"},
        {"do": "stonith", "node": "-f"},
        {"do": "stonith", "node": ""},
        {"do": "stonith"},
        {"do": "reach"},
        {"do": "reach", "addresses": []},
        {"do": "reach", "addresses": ["192.0.2.1"] * 9},
        {"do": "reach", "addresses": ["-f"]},
        {"do": "reach", "addresses": ["mail.example.org"]},
        {"do": "reach", "addresses": ["fe80::1%eth0 -f"]},
        {"do": "reach", "addresses": [1]},
        {"do": "tickle", "connections": [["192.0.2.20", 993, "192.0.2.140", 50000]]},  # whose?
        {"do": "tickle", "connections": [[]]},
        {"do": "tickle", "connections": "all"},
        {"do": "tickle", "connections": [[]] * 2001},
        {"do": "__init__"},
        {"do": "answer"},
        {"do": 7},
        ["ports-close"],
        {},
    ],
)
async def test_anything_else_is_refused(ran: Ran, request_: object) -> None:
    answer = await ask(request_)
    assert answer["ok"] is False
    assert answer["error"]
    assert ran == []


def boottime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


async def test_a_lease_ends_when_it_should_however_late_it_comes(ran: Ran) -> None:
    request = {"do": "ports-open", "ports": [25], "until": boottime() + 1.5}
    await asyncio.sleep(0.3)
    assert (await ask(request))["ok"]
    [(_, batch)] = ran
    assert batch is not None
    left = int(batch.split("timeout ")[1].split("ms")[0])
    assert 1000 < left <= 1200


class Addresses(ServiceAddresses):
    """Notes what is asked of it among what else the helper does."""

    def __init__(self, ran: Ran, wrong: str = "") -> None:
        super().__init__(())
        self._ran = ran
        self._wrong = wrong

    def __contains__(self, address: object) -> bool:
        return str(address) == "192.0.2.20"

    def __iter__(self) -> Iterator[Address]:
        return iter([ip_address("192.0.2.20")])

    def hold(self, seconds: float) -> tuple[list[str], list[str]]:
        self._ran.append((("hold", f"{seconds:.1f}"), None))
        return ["192.0.2.20"], ["no carrier"]

    def release(self) -> None:
        self._ran.append((("release",), None))
        if self._wrong:
            raise OSError(self._wrong)

    def tickle(self, connections: Iterable[Connection]) -> None:
        self._ran += [(("tickle", str(item.remote)), None) for item in connections]


async def test_the_addresses_come_after_the_ports_and_go_before_them(ran: Ran) -> None:
    host = Helper(addresses=Addresses(ran))
    at = boottime() + 1.5
    for request in ({"hold": 10}, {"until": at}):
        answer = await host.answer(
            json.dumps({"do": "ports-open", "ports": [25], **request}).encode()
        )
        assert answer == {"ok": True, "new": ["192.0.2.20"], "problems": ["no carrier"]}
    assert (await host.answer(b'{"do": "ports-close"}'))["ok"]
    assert [argv[:2] for argv, _ in ran] == [
        ("nft", "-f"), ("hold", "10.0"), ("nft", "-f"), ("hold", "1.5"),
        ("release",), ("nft", "flush"),
    ]  # fmt: skip


async def test_clients_of_the_service_ports_are_reset_but_for_those_whom_the_next_owner_tells(
    ran: Ran,
) -> None:
    host = Helper(addresses=Addresses(ran))
    answer = await host.answer(b'{"do": "kick", "ports": [25, 993]}')
    assert answer == {"ok": True}
    (ss, _), (kick, _) = ran
    assert ss[:2] == ("ss", "-K")
    assert ss[-1] == (
        "( sport = :25 or sport = :993 ) and not dst 127.0.0.0/8 and not dst [::1]"
        " and not src [192.0.2.20]"
    )
    assert kick == ("doveadm", "kick", "*")


async def test_ports_close_although_an_address_cannot_be_given_up(ran: Ran) -> None:
    answer = await Helper(addresses=Addresses(ran, "it stays")).answer(b'{"do": "ports-close"}')
    assert answer == {"ok": False, "error": "it stays"}
    assert ran[-1][0][:2] == ("nft", "flush")


FLUSH = ("nft", "flush", "set", "inet", "umbra_fence", "open_ports")


def slow_nft(ran: Ran, monkeypatch: pytest.MonkeyPatch, *seconds: float, error: str = "") -> None:
    """Each opening takes so long, and the last one fails with ``error``."""
    delays = list(seconds)

    async def run(*argv: str, stdin: str | None = None, silent: int = 0) -> str:
        ran.append((argv, stdin))
        if stdin is not None:
            await asyncio.sleep(delays.pop(0))
            if error and not delays:
                raise HelperError(error)
        return ""

    monkeypatch.setattr(helper, "run", run)


async def open_for(ran: Ran, seconds: float) -> dict[str, Any]:
    request = {"do": "ports-open", "ports": [25], "until": boottime() + seconds}
    return await Helper(addresses=Addresses(ran)).answer(json.dumps(request).encode())


def timeouts(ran: Ran) -> list[int]:
    return [int(batch.split("timeout ")[1].split("ms")[0]) for _, batch in ran if batch is not None]


async def test_a_lease_that_ended_while_nft_worked_leaves_no_port_open_and_no_address(
    ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_nft(ran, monkeypatch, 0.2)
    answer = await open_for(ran, 0.1)
    assert "the right to open the ports ends" in answer["error"]
    assert [argv for argv, _ in ran] == [("nft", "-f", "-"), ("release",), FLUSH]


async def test_a_slow_host_opens_for_what_is_left_and_does_not_close(
    ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(helper, "SLOW", 0.2)
    slow_nft(ran, monkeypatch, 0.4, 0.4)
    assert (await open_for(ran, 5))["ok"]
    assert [argv[0] for argv, _ in ran] == ["nft", "nft", "hold"]
    first, second = timeouts(ran)
    assert 4900 < first <= 5000
    assert 4000 < second <= 4200  # and takes as long again, so it ends with the right


async def test_one_that_gets_slower_and_slower_is_closed(
    ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(helper, "SLOW", 0.05)
    slow_nft(ran, monkeypatch, 0.1, 0.4)
    answer = await open_for(ran, 5)
    assert "nft took" in answer["error"]
    assert ran[-1][0] == FLUSH


@pytest.mark.parametrize(("took", "closed"), [((0.0,), False), ((0.4,), True), ((0.4, 0.0), True)])
async def test_an_nft_that_may_have_committed_before_it_failed_is_undone(
    ran: Ran, monkeypatch: pytest.MonkeyPatch, took: tuple[float, ...], closed: bool
) -> None:
    slow_nft(ran, monkeypatch, *took, error="nft did not finish")
    assert await open_for(ran, 5) == {"ok": False, "error": "nft did not finish"}
    assert (ran[-1][0] == FLUSH) is closed


@pytest.mark.parametrize(
    "request_",
    [
        {"do": "ports-close"},
        {"do": "ports-open", "ports": [25], "hold": 10},
        {"do": "ports-open", "ports": [25], "until": None},
    ],
)
@pytest.mark.parametrize("error", ["No such file or directory", "Operation not permitted"])
async def test_a_fence_that_is_gone_is_loaded_again(
    ran: Ran, monkeypatch: pytest.MonkeyPatch, request_: dict[str, Any], error: str
) -> None:
    if "until" in request_:
        request_ = {**request_, "until": boottime() + 50}
    loaded: list[bool] = []

    async def run(*argv: str, stdin: str | None = None, silent: int = 0) -> str:
        ran.append((argv, stdin))
        if argv == ("nft", "-f", str(helper.FENCE)):
            loaded.append(True)
        elif not loaded:
            raise HelperError(f"nft failed (1): Error: {error}")
        return ""

    monkeypatch.setattr(helper, "run", run)
    answer = await ask(request_)
    if error.startswith("Operation"):
        assert not answer["ok"]
        assert len(ran) == 1
    else:
        assert answer["ok"]
        first, (load, _), last = ran
        assert load == ("nft", "-f", "/etc/umbra/fence.nft")
        assert first[0] == last[0]


async def test_clients_are_told_in_bounded_pieces(ran: Ran, tmp_path: Path) -> None:
    socket = tmp_path / "helper.sock"
    host = Helper(addresses=Addresses(ran))
    server = await asyncio.start_unix_server(host.serve, socket, limit=helper.MAX_REQUEST)
    clients = [
        Connection(ip_address("192.0.2.20"), 993, ip_address("192.0.2.140"), port)
        for port in range(10000, 14500)
    ]
    opened: list[tuple[list[str], list[str]]] = []
    async with server:
        client = NodeHelper(socket)
        client.on_opened = lambda new, problems: opened.append((list(new), list(problems)))
        await client.tickle(clients)
        assert len(ran) == len(clients)
        await client.ports_open([25], 10)
        assert opened == [(["192.0.2.20"], ["no carrier"])]
        with pytest.raises(HelperError, match="only clients of a service address"):
            await client.tickle([replace(clients[0], local=ip_address("192.0.2.21"))])


async def test_postfix_is_stopped_when_nobody_renews_the_lease(ran: Ran) -> None:
    host = Helper(Path("/nonexistent"))
    stop = (("systemctl", "stop", "postfix.service"), None)

    async def lease(seconds: float) -> None:
        at = boottime() + seconds
        request = {"do": "ports-open", "ports": [25], "until": at, "postfix_until": at + 0.1}
        assert (await host.answer(json.dumps(request).encode()))["ok"]

    for _ in range(4):
        await lease(0.3)
        await asyncio.sleep(0.2)
    assert stop not in ran
    await asyncio.sleep(0.4)
    assert ran.count(stop) == 1
    await lease(0.3)
    await host.answer(b'{"do": "ports-close"}')  # and the agent dies before it stops Postfix
    await asyncio.sleep(0.6)
    assert ran.count(stop) == 2
    await lease(0.3)
    await host.answer(b'{"do": "postfix-stop"}')
    await asyncio.sleep(0.6)
    assert ran.count(stop) == 3  # its own stop, and no other


@pytest.mark.parametrize("runs", [True, False])
async def test_a_helper_that_starts_stops_a_postfix_whose_agent_does_not_come_back(
    monkeypatch: pytest.MonkeyPatch, runs: bool
) -> None:
    said: list[str] = []

    async def run(*argv: str, **_: object) -> str:
        said.append(argv[1])
        if argv[1] == "is-active" and not runs:
            raise HelperError("systemctl is-active --quiet failed (3): ")
        return ""

    monkeypatch.setattr(helper, "run", run)
    monkeypatch.setattr(helper, "OPENING", 0.1)
    host = Helper(Path("/nonexistent"), lease=True)
    host.expect(0.1)
    await asyncio.sleep(0.3)
    assert said == ["is-active", "stop"]
    # An agent that has started Postfix may die before it renews, or before it opens.
    for expected in (True, False):
        if expected:
            host.expect(0.1)
        await host.answer(b'{"do": "postfix-start"}')
        said.clear()
        await asyncio.sleep(0.3)
        assert said == ["is-active", "stop"]
        await host.answer(b'{"do": "postfix-stop"}')
    for request in (
        {"do": "ports-open", "ports": [25], "hold": 10},
        {"do": "postfix-stop"},
    ):
        host.expect(0.1)
        await host.answer(json.dumps(request).encode())
        said.clear()
        await asyncio.sleep(0.2)
        assert said == []


async def test_a_helper_without_a_lease_stops_no_postfix(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    async def run(*argv: str, **_: object) -> str:
        said.append(argv[1])
        return ""

    monkeypatch.setattr(helper, "run", run)
    monkeypatch.setattr(helper, "OPENING", 0.05)
    host = Helper(Path("/nonexistent"))
    host.expect(0.05)
    await host.answer(b'{"do": "postfix-start"}')
    await asyncio.sleep(0.2)
    assert said == ["start"]


async def test_a_helper_tells_systemd_that_it_does_not_stand_still(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told: list[str] = []
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    monkeypatch.setattr(helper, "notify", told.append)
    monkeypatch.setattr(helper, "alive", lambda status: told.append("WATCHDOG=1"))
    group = grp.getgrgid(os.getgid()).gr_name
    task = asyncio.create_task(helper.serve(Helper(Path("/nonexistent")), tmp_path / "s", group))
    await asyncio.sleep(0.1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert told[0] == "READY=1"
    assert told.count("WATCHDOG=1") > 3


async def test_the_mail_disk_is_synced(tmp_path: Path) -> None:
    mail = tmp_path / "synced"
    mail.mkdir()
    host = Helper(tmp_path, mail, runtime=tmp_path)
    assert await host.answer(b'{"do": "sync-mail"}') == {"ok": True}
    mail.rmdir()
    answer = await host.answer(b'{"do": "sync-mail"}')
    assert not answer["ok"]
    assert "synced" in answer["error"]
    mail.mkdir()  # no disk has failed
    assert await host.answer(b'{"do": "sync-mail"}') == {"ok": True}


def failing_once(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    errors = [OSError(number, os.strerror(number))]

    def syncfs(directory: Path) -> None:
        if errors:
            raise errors.pop()

    monkeypatch.setattr(helper, "_syncfs", syncfs)


async def test_what_the_disk_has_lost_is_not_forgotten_before_a_boot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells it once; a restarted helper still knows."""
    failing_once(monkeypatch, errno.EIO)
    run = tmp_path / "run"
    run.mkdir()
    host = Helper(tmp_path, tmp_path, runtime=run)
    assert await host.answer(b'{"do": "prove"}') == {"ok": True}
    for restarted in (False, False, True):
        if restarted:
            host = Helper(tmp_path, tmp_path, runtime=run)
        for request in (b'{"do": "sync-mail"}', b'{"do": "prove"}'):
            answer = await host.answer(request)
            assert not answer["ok"]
            assert f"the disk of {tmp_path} has failed" in answer["error"]
            assert "Input/output error" in answer["error"]
            assert "reboot" in answer["error"]
    (run / helper.LOST).unlink()
    booted = Helper(tmp_path, tmp_path, runtime=run)
    assert await booted.answer(b'{"do": "sync-mail"}') == {"ok": True}
    assert await booted.answer(b'{"do": "prove"}') == {"ok": True}


async def test_what_the_disk_has_lost_is_known_although_it_cannot_be_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_once(monkeypatch, errno.EIO)
    host = Helper(tmp_path, tmp_path, runtime=tmp_path / "none")
    for _ in range(2):
        assert "has failed" in (await host.answer(b'{"do": "sync-mail"}'))["error"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
async def test_a_disk_that_was_full_is_well_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    failing_once(monkeypatch, number)
    host = Helper(tmp_path, tmp_path, runtime=tmp_path)
    assert os.strerror(number) in (await host.answer(b'{"do": "sync-mail"}'))["error"]
    assert await host.answer(b'{"do": "prove"}') == {"ok": True}
    assert await host.answer(b'{"do": "sync-mail"}') == {"ok": True}


def test_the_mark_of_a_failed_disk_outlives_a_restart_of_the_unit() -> None:
    role = Path(helper.__file__).parents[3]
    unit = (role / "templates" / "umbra-helper.service.j2").read_text().splitlines()
    assert f"RuntimeDirectory={helper.RUNTIME.name}" in unit
    assert "RuntimeDirectoryPreserve=yes" in unit


async def test_the_disks_are_proven_by_a_write_and_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool, mail = tmp_path / "spool", tmp_path / "mail"
    spool.mkdir()
    host = Helper(spool, mail)
    answer = await host.answer(b'{"do": "prove"}')
    assert not answer["ok"]  # no mail store
    mail.mkdir()
    assert await host.answer(b'{"do": "prove"}') == {"ok": True}
    for directory in (spool, mail):
        proof = directory / helper.PROOF
        assert proof.stat().st_mode & 0o777 == 0o600
        assert abs(float(proof.read_text()) - time.time()) < 5
    stalled = threading.Event()
    monkeypatch.setattr(helper, "_write", lambda files: stalled.wait(5))
    first = asyncio.create_task(host.answer(b'{"do": "prove"}'))
    await asyncio.sleep(0.05)
    second = await host.answer(b'{"do": "prove"}')
    assert "has not taken the last write" in second["error"]
    stalled.set()
    assert (await first)["ok"]


async def test_the_queue_is_listed(tmp_path: Path) -> None:
    make_queues(tmp_path)
    (tmp_path / "active" / "4hK2pl0Zzz").touch(0o700)
    assert (await ask({"do": "queue-list"}, tmp_path))["queue"] == {"4hK2pl0Zzz": "active"}


async def test_a_queue_that_cannot_be_read_is_an_error_not_an_empty_queue(tmp_path: Path) -> None:
    answer = await ask({"do": "queue-list"}, tmp_path)
    assert answer["ok"] is False


async def test_a_failing_program_is_quoted() -> None:
    with pytest.raises(HelperError, match=r"ls .* failed \(2\): .*No such file"):
        await helper.run("ls", "/nonexistent")


async def test_aliases_are_asked_of_the_maps_that_postfix_uses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: Ran = []

    async def run(*argv: str, stdin: str | None = None, silent: int = 0) -> str:
        asked.append((argv, stdin))
        if argv[0] == "postconf":
            return "texthash:/etc/postfix/virtual_aliases, ldap:/x\n"
        assert silent == 1
        return "a@example.org\tb@example.org, c@example.org\n" if "texthash" in argv[3] else ""

    monkeypatch.setattr(helper, "run", run)
    answer = await ask({"do": "aliases", "keys": ["a@example.org", "-x"]})
    assert answer == {"ok": True, "found": {"a@example.org": "b@example.org, c@example.org"}}
    assert asked[1:] == [
        (("postmap", "-q", "-", name), "a@example.org\n-x\n")
        for name in ("texthash:/etc/postfix/virtual_aliases", "ldap:/x")
    ]


async def test_nothing_found_is_no_failure_but_a_failure_is() -> None:
    assert await helper.run("false", silent=1) == ""
    with pytest.raises(HelperError):
        await helper.run("false")
    assert await helper.run("sh", "-c", "echo warning: no IPv6 >&2; exit 1", silent=1) == ""
    with pytest.raises(HelperError, match="query error"):
        await helper.run("sh", "-c", "echo fatal: query error >&2; exit 1", silent=1)


async def test_client_and_helper_talk(tmp_path: Path) -> None:
    socket = tmp_path / "helper.sock"
    make_queues(tmp_path)
    (tmp_path / "active" / "4hK2pl0Zzz").touch()
    server = await asyncio.start_unix_server(Helper(tmp_path).serve, socket)
    async with server:
        client = NodeHelper(socket)
        assert await client.queue() == {"4hK2pl0Zzz": "active"}
        with pytest.raises(HelperError, match="hold must be"):
            await client.ports_open([25], 0)


async def test_syncs_of_the_mailboxes_share_a_connection(tmp_path: Path) -> None:
    socket, mail, connections = tmp_path / "helper.sock", tmp_path / "mail", []
    mail.mkdir()
    host = Helper(tmp_path, mail, runtime=tmp_path)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        await host.serve(reader, writer)

    async with await asyncio.start_unix_server(serve, socket):
        client = NodeHelper(socket)
        await client.sync_mail()
        mail.rmdir()
        with pytest.raises(HelperError, match="No such file"):
            await client.sync_mail()
        mail.mkdir()
        await client.sync_mail()
        assert len(connections) == 1
        client.close()


async def test_a_missing_helper_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(HelperError, match=r"is umbra-helper\.service running"):
        await NodeHelper(tmp_path / "none.sock").ports_close()


@pytest.mark.parametrize(("fails", "failed"), [(False, True), (True, False)])
async def test_a_crashed_postfix_is_told_from_one_that_was_stopped(
    monkeypatch: pytest.MonkeyPatch, fails: bool, failed: bool
) -> None:
    async def run(*argv: str, **_: object) -> str:
        assert argv == ("systemctl", "is-failed", "--quiet", "postfix.service")
        if fails:
            raise HelperError("systemctl is-failed --quiet failed (3): ")
        return ""

    monkeypatch.setattr(helper, "run", run)
    assert await ask({"do": "postfix-failed"}) == {"ok": True, "failed": failed}


@pytest.mark.parametrize(("shown", "restarts"), [("0\n", 0), ("17\n", 17), ("\n", 0)])
async def test_systemd_counts_dovecot_s_restarts(
    monkeypatch: pytest.MonkeyPatch, shown: str, restarts: int
) -> None:
    async def run(*argv: str, **_: object) -> str:
        assert argv == ("systemctl", "show", "-p", "NRestarts", "--value", "dovecot.service")
        return shown

    monkeypatch.setattr(helper, "run", run)
    assert await ask({"do": "dovecot-restarts"}) == {"ok": True, "restarts": restarts}


async def test_this_host_answers_an_echo_and_no_address_that_cannot_be() -> None:
    """With the real ping; 240.0.0.0/4 is nobody's."""
    assert await ask({"do": "reach", "addresses": ["127.0.0.1"]}) == {"ok": True, "answers": True}
    began = time.monotonic()
    assert await ask({"do": "reach", "addresses": ["240.0.0.1"]}) == {"ok": True, "answers": False}
    both = await ask({"do": "reach", "addresses": ["240.0.0.1", "127.0.0.1"]})
    assert both["answers"] is True
    assert time.monotonic() - began < 5


@pytest.fixture
def ping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `ping` whose last argument is the script that it runs."""
    program = tmp_path / "ping"
    program.write_text('#!/bin/sh\neval "$(cat "${0%/*}/${7}")"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


@pytest.mark.parametrize(
    ("script", "answers"),
    [
        ("exit 0", True),
        ("echo '1 packets transmitted, 0 received'; exit 1", False),
        ("echo 'ping: connect: Network is unreachable' >&2; exit 2", False),
        ("echo 'ping: socket: Operation not permitted' >&2; exit 2", None),
        ("exit 127", None),
    ],
)
async def test_no_answer_is_told_from_no_question(
    ping: Path, script: str, answers: bool | None
) -> None:
    (ping / "192.0.2.1").write_text(script)
    answer = await ask({"do": "reach", "addresses": ["192.0.2.1"]})
    assert answer.get("answers") is answers
    assert answer["ok"] is (answers is not None)
    if answers is None:
        assert "ping" in answer["error"]
    (ping / "192.0.2.2").write_text("exit 0")
    answer = await ask({"do": "reach", "addresses": ["192.0.2.1", "192.0.2.2"]})
    assert answer == {"ok": True, "answers": True}


async def test_a_ping_that_hangs_is_ended(ping: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helper, "ECHO_TIMEOUT", 0.2)
    (ping / "192.0.2.1").write_text("exec sleep 60")
    began = time.monotonic()
    answer = await ask({"do": "reach", "addresses": ["192.0.2.1"]})
    assert "did not finish in 0.2 s" in answer["error"]
    assert time.monotonic() - began < 5


async def test_postfix_starts_although_systemd_counts_its_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []

    async def run(*argv: str, **_: object) -> str:
        said.append(argv[1])
        if said == ["start"]:
            raise HelperError("start of the service was attempted too often")
        return ""

    monkeypatch.setattr(helper, "run", run)
    assert await ask({"do": "postfix-start"}) == {"ok": True}
    assert said == ["start", "reset-failed", "start"]


@pytest.fixture
def systemd(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What systemd says of the hook's unit; with `error` its start fails so."""
    says = {"Result": "success", "journal": "off\nreally\n"}

    async def run(*argv: str, timeout: float = 20, **_: object) -> str:
        if argv[0] == "journalctl":
            return says["journal"] if "_SYSTEMD_UNIT=umbra-stonith@mail-a.service" in argv else ""
        if argv[:2] == ("systemctl", "show"):
            return f"{says['Result']}\n"
        if argv[:2] == ("systemctl", "reset-failed"):
            return ""
        assert argv == ("systemctl", "start", "umbra-stonith@mail-a.service")
        assert timeout > 30
        if "error" in says:
            raise HelperError(says["error"])
        return ""

    monkeypatch.setattr(helper, "run", run)
    return says


async def stonith(node: str) -> dict[str, Any]:
    host = Helper(Path("/nonexistent"), nodes=["mail-a"])
    return await host.answer(json.dumps({"do": "stonith", "node": node}).encode())


async def test_the_hook_that_switches_a_node_off_is_heard(systemd: dict[str, str]) -> None:
    assert await stonith("mail-a") == {"ok": True, "said": "off really"}


async def test_only_the_groups_other_nodes_are_switched_off(ran: Ran) -> None:
    for name in ("mail-b", "mail-a.service", "-f", ""):
        assert "another node of the group" in (await stonith(name))["error"]
    assert ran == []


@pytest.mark.parametrize("name", ["-f", "a/b", "a b", "", "a" * 234])
def test_a_node_has_a_name_that_fits_into_a_units(name: str) -> None:
    assert helper._node("mail-a." + "x" * 60 + ".example.org")
    with pytest.raises(ValueError):  # noqa: PT011 - argparse says which
        helper._node(name)


@pytest.mark.parametrize(
    ("result", "journal", "why"),
    [
        ("timeout", "", "it took too long"),
        ("exit-code", "no route to the switch\n", "no route to the switch"),
        ("exit-code", "", "unit not found"),
    ],
)
async def test_a_hook_that_fails_says_why(
    systemd: dict[str, str], result: str, journal: str, why: str
) -> None:
    systemd |= {"error": "unit not found", "Result": result, "journal": journal}
    answer = await stonith("mail-a")
    assert answer == {"ok": False, "error": f"umbra-stonith@mail-a.service: {why}"}


LOG = """<eve@remote>: host mx.remote[192.0.2.9] said: 550 5.1.1 recipient=nobody
recipient=eve@remote
original_recipient=eva@example.org
offset=588
dsn_orig_recipient=rfc822;eva@example.org
status=5.1.1
action=failed
reason=host mx.remote[192.0.2.9] said: 550 5.1.1 recipient=nobody

"""


@pytest.mark.parametrize("place", ["bounce/4/4abc", "bounce/4abc"])
@pytest.mark.parametrize("listed", [[], ["dan@remote"], ["eve@remote"]])
async def test_a_recipient_whose_bounce_is_owed_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, listed: list[str]
) -> None:
    async def run(*argv: str) -> str:
        rows = {"4abc": listed, "4other": []}
        return "\n".join(
            json.dumps({"queue_id": key, "recipients": [{"address": item} for item in left]})
            for key, left in rows.items()
        )

    monkeypatch.setattr(helper, "run", run)
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / place).write_text(LOG * 2)
    answer = await ask({"do": "queue-remaining"}, tmp_path)
    wanted = [*listed, *({"eve@remote"} - set(listed))]
    assert answer == {"ok": True, "remaining": {"4abc": wanted, "4other": []}}


async def test_of_a_message_only_its_shadow_id_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = "a" * 32, "b" * 32
    headers = {
        "4abcde": f"Received: x\nx-umbra-id: {ours}\nX-Umbra-Id: {theirs}\nSubject: secret\n",
        "4forged": f"X-Umbra-Id: not one\nX-Umbra-Id: {theirs}\n",
        "4plain": "Subject: x\n",
    }

    async def run(*argv: str) -> str:
        *command, queue_id = argv
        assert command == ["postcat", "-h", "-q"]
        if queue_id not in headers:
            raise HelperError("postcat: fatal: open queue file")
        return headers[queue_id]

    monkeypatch.setattr(helper, "run", run)
    answer = await ask({"do": "queue-shadow-ids", "ids": [*headers, "4gone0"]})
    assert answer == {"ok": True, "shadow_ids": {"4abcde": ours, "4forged": "", "4plain": ""}}
    for wrong in (["-q"], ["../x"], ["4abcde"] * (helper.MAX_NAMES + 1)):
        assert not (await ask({"do": "queue-shadow-ids", "ids": wrong}))["ok"]


async def test_bounces_that_cannot_be_read_are_not_none(ran: Ran, tmp_path: Path) -> None:
    answer = await ask({"do": "queue-remaining"}, tmp_path)
    assert answer["ok"] is False
    assert "bounce" in answer["error"]


async def test_the_mailboxes_disk_has_its_stores_mark(tmp_path: Path) -> None:
    host = Helper(tmp_path, tmp_path / "mail")

    async def ask(storage: object, claim: bool = False) -> dict[str, Any]:
        request = {"do": "mail-store", "storage": storage, "claim": claim}
        return await host.answer(json.dumps(request).encode())

    assert not (await ask("a1", claim=True))["ok"]  # no such directory
    (tmp_path / "mail").mkdir()
    assert await ask("a1") == {"ok": True, "storage": ""}
    assert await ask("a1", claim=True) == {"ok": True, "storage": "a1"}
    assert await ask("b2") == {"ok": True, "storage": "a1"}
    assert await ask("b2", claim=True) == {"ok": True, "storage": "b2"}
    for wrong in ("", "../x", "a1\n", 7, None):
        assert not (await ask(wrong, claim=True))["ok"]
    # The directory is another user's.
    (tmp_path / "mail" / helper.STORE).unlink()
    (tmp_path / "mail" / helper.STORE).symlink_to(tmp_path / "elsewhere")
    assert not (await ask("a1", claim=True))["ok"]
    assert not (await ask("a1"))["ok"]
    assert not (tmp_path / "elsewhere").exists()


async def test_what_another_user_has_put_in_the_files_place_holds_nobody_up(
    tmp_path: Path,
) -> None:
    spool, mail = tmp_path / "spool", tmp_path / "mail"
    spool.mkdir()
    mail.mkdir()
    host = Helper(spool, mail)
    for name in (helper.PROOF, helper.STORE):
        os.mkfifo(mail / name)
    for request in (
        {"do": "prove"},
        {"do": "mail-store", "storage": "a1", "claim": False},
        {"do": "mail-store", "storage": "a1", "claim": True},
    ):
        async with asyncio.timeout(5):
            answer = await host.answer(json.dumps(request).encode())
        assert not answer["ok"]
        with os.fdopen(os.open(mail / helper.PROOF, os.O_RDWR)):  # and where somebody reads it
            assert not (await host.answer(b'{"do": "prove"}'))["ok"]
