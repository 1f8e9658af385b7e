"""Which addresses this host should have, and what it does about it; the kernel is a list here."""

from __future__ import annotations

import errno
import socket
import struct
from contextlib import closing
from ipaddress import ip_address
from typing import Any

import pytest

from umbra.node import addresses, netlink
from umbra.node.addresses import ServiceAddresses, plan
from umbra.node.netlink import Address, Entry
from umbra.node.packets import Connection

LO, ETH0, ETH1 = 1, 2, 3
V4, V6 = ip_address("192.0.2.20"), ip_address("2001:db8:a::20")


def entry(index: int, text: str) -> Entry:
    address, _, prefix = text.partition("/")
    return Entry(index, ip_address(address), int(prefix))


HOST = [
    entry(LO, "127.0.0.1/8"),
    entry(ETH0, "192.0.2.10/24"),
    entry(ETH0, "2001:db8:a::10/64"),
    entry(ETH0, "fe80::1/64"),
    entry(ETH1, "198.51.100.10/24"),
]
HERE = [entry(ETH0, "192.0.2.20/32"), entry(ETH0, "2001:db8:a::20/128")]


def test_each_address_belongs_to_the_interface_in_its_subnet() -> None:
    todo = plan(HOST, [V4, V6])
    assert todo.hold == todo.new == HERE
    assert (todo.stray, todo.problems) == ([], [])


def test_what_is_there_is_not_new() -> None:
    todo = plan([*HOST, *HERE], [V4, V6])
    assert todo.hold == HERE
    assert (todo.new, todo.stray) == ([], [])


def test_an_address_at_the_wrong_place_is_removed() -> None:
    wrong = [entry(ETH1, "192.0.2.20/32"), entry(ETH0, "192.0.2.20/24")]
    todo = plan([*HOST, *wrong], [V4])
    assert todo.stray == wrong
    assert todo.new == HERE[:1]


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ([HOST[0], HOST[4]], "no interface of this host has an address of its own in the subnet"),
        ([*HOST, entry(ETH1, "192.0.2.11/24")], "more than one interface of this host"),
        # It is the host's own: better no service address than no host.
        ([entry(ETH0, "192.0.2.20/24")], "no interface of this host has an address of its own"),
    ],
)
def test_what_cannot_be_had_is_said(host: list[Entry], words: str) -> None:
    todo = plan(host, [V4])
    assert todo.hold == todo.stray == []
    [problem] = todo.problems
    assert problem.startswith(words)
    assert problem.endswith("of the service address 192.0.2.20")


class Kernel:
    """What the helper asks of the kernel."""

    def __init__(self) -> None:
        self.had = list(HOST)
        self.lifetimes: list[int] = []
        self.refuses = False

    def entries(self) -> list[Entry]:
        return list(self.had)

    def hold(self, item: Entry, seconds: int) -> None:
        if self.refuses:
            raise OSError(1, "Operation not permitted")
        self.lifetimes.append(seconds)
        if item not in self.had:
            self.had.append(item)

    def delete(self, item: Entry) -> None:
        if self.refuses:
            raise OSError(1, "Operation not permitted")
        self.had.remove(item)


class Field:
    """A host with its clock and what it has announced."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kernel = Kernel()
        self.now = 100.0
        self.said: list[tuple[float, str]] = []
        self.timers: list[tuple[float, Any]] = []
        self.carrier = True
        self.mute = False
        field = self

        class Speaker:
            def __init__(self, index: int, claimed: Any) -> None:
                assert index == ETH0
                field.claimed = claimed

            def announce(self, address: Address) -> None:
                if field.mute:
                    raise OSError(1, "Operation not permitted")
                field.said.append((field.now, str(address)))

            def close(self) -> None:
                pass

        class Timer:
            def __init__(self, item: tuple[float, Any]) -> None:
                self.item = item

            def cancel(self) -> None:
                if self.item in field.timers:
                    field.timers.remove(self.item)

        class Loop:
            def call_later(self, pause: float, work: Any) -> Timer:
                field.timers.append((field.now + pause, work))
                return Timer(field.timers[-1])

        self.claimed: Any = None
        monkeypatch.setattr(addresses, "Speaker", Speaker)
        monkeypatch.setattr(addresses, "_carrier", lambda index: self.carrier)
        monkeypatch.setattr("umbra.node.addresses.asyncio.get_running_loop", Loop)
        self.host = ServiceAddresses([V4, V6], lambda: self.kernel, lambda: self.now)  # type: ignore[arg-type,return-value]

    def until(self, at: float) -> None:
        """Let the time pass."""
        for item in sorted(self.timers, key=lambda item: item[0]):
            if item[0] <= at:
                self.timers.remove(item)
                self.now = item[0]
                item[1]()
        self.now = at


@pytest.fixture
def field(monkeypatch: pytest.MonkeyPatch) -> Field:
    return Field(monkeypatch)


def test_a_lease_adds_renews_and_a_release_removes(field: Field) -> None:
    assert field.host.hold(1.87) == ([str(V4), str(V6)], [])
    assert field.kernel.had == [*HOST, *HERE]
    field.now += 0.4
    assert field.host.hold(1.87) == ([], [])
    assert field.kernel.lifetimes == [2] * 4
    field.host.release()
    assert field.kernel.had == HOST
    field.host.release()  # at every look of a shadow


@pytest.mark.parametrize(
    ("seconds", "lifetime"), [(0.8, 1), (1.09, 1), (1.7, 1), (1.87, 2), (4.45, 4), (10.0, 10)]
)
def test_the_lifetime_is_that_of_the_ports_in_whole_seconds(
    field: Field, seconds: float, lifetime: int
) -> None:
    field.host.hold(seconds)
    assert set(field.kernel.lifetimes) == {lifetime}


def test_an_address_never_outlives_its_lease_by_much(field: Field) -> None:
    """Nobody answers any more: the lease is asked for again and again, and is less each time."""
    end = field.now + 1.87
    while field.now < end:
        field.kernel.lifetimes.clear()
        field.host.hold(end - field.now)
        assert all(field.now + seconds <= end + 0.25 for seconds in field.kernel.lifetimes)
        field.now += 0.1
    field.host.release()
    # Too little is left to have it at all; the next renewal brings it.
    assert field.host.hold(0.7) == ([], [])
    assert field.kernel.had == HOST


def test_a_new_address_is_announced_at_once_and_three_times_more(field: Field) -> None:
    field.host.hold(10)
    field.now += 0.1
    field.host.hold(10)  # a renewal says nothing
    field.until(120)
    assert [round(at - 100, 3) for at, text in field.said if text == str(V4)] == [0, 0.2, 1, 3]
    assert [text for _, text in field.said].count(str(V6)) == 4


def test_nothing_is_announced_after_the_lease(field: Field) -> None:
    """The agent died just after the takeover; another node may have the address by now."""
    field.host.hold(1.87)
    field.until(120)
    assert [round(at - 100, 3) for at, text in field.said if text == str(V4)] == [0, 0.2, 1]


def test_nothing_is_announced_after_a_release(field: Field) -> None:
    field.host.hold(10)
    field.host.release()
    field.until(120)
    assert len(field.said) == 2


def test_an_address_that_has_lapsed_or_was_taken_is_announced_anew(field: Field) -> None:
    field.host.hold(2)
    field.until(110)
    field.said.clear()
    assert field.host.hold(2) == ([], [])  # the kernel was slow to remove it
    assert [text for _, text in field.said] == [str(V4), str(V6)]
    field.until(111)
    field.said.clear()
    field.kernel.had.remove(HERE[0])
    assert field.host.hold(2)[0] == [str(V4)]
    assert str(V4) in [text for _, text in field.said]


def test_a_restarted_helper_announces_what_it_finds(field: Field) -> None:
    field.kernel.had += HERE
    assert field.host.hold(2) == ([], [])
    assert len(field.said) == 2


def test_another_host_with_the_address_is_answered_and_shown(field: Field) -> None:
    field.host.hold(10)
    field.until(105)
    field.said.clear()
    for _ in range(3):  # whoever floods gets one answer a second
        field.claimed(V4, bytes.fromhex("020000000066"))
    assert field.said == [(105, str(V4))]
    shown = "another host, 02:00:00:00:00:66, speaks for the service address 192.0.2.20"
    assert field.host.hold(10) == ([], [shown])
    field.claimed(ip_address("192.0.2.99"), bytes(6))  # none of ours
    field.until(170)
    assert field.host.hold(10) == ([], [])


def test_who_has_no_lease_does_not_contradict(field: Field) -> None:
    field.host.hold(2)
    field.until(110)
    field.said.clear()
    field.claimed(V4, bytes.fromhex("020000000066"))
    assert field.said == []


def test_what_goes_wrong_is_told_and_the_rest_is_done(field: Field) -> None:
    field.kernel.refuses = True
    new, problems = field.host.hold(2)
    assert new == []
    assert problems == [
        f"hold the service address {address}: Operation not permitted" for address in (V4, V6)
    ]
    field.kernel.refuses = False
    field.carrier = False
    assert [text for text in field.host.hold(2)[1] if "no carrier" in text]
    field.kernel.refuses = True
    with pytest.raises(OSError, match="delete the service address"):
        field.host.release()


def test_an_announcement_that_failed_is_told_until_one_is_made(field: Field) -> None:
    field.mute = True
    field.host.hold(2)
    problems = field.host.hold(2)[1]
    assert "the service address 192.0.2.20 is not announced: [Errno 1]" in problems[0]
    field.mute = False
    field.until(100.3)
    assert field.host.hold(2)[1] == []


def test_the_kernel_tells_of_a_link() -> None:
    loopback = 1
    assert addresses._carrier(loopback)
    assert addresses._link(loopback, addresses._GET_MAC, 8)[2:] == bytes(6)
    assert not addresses._carrier(9999999)


def test_a_host_without_service_addresses_does_nothing() -> None:
    def never() -> Any:
        raise AssertionError

    host = ServiceAddresses([], never)
    assert host.hold(2) == ([], [])
    host.release()


def test_only_an_owner_tells_clients(field: Field) -> None:
    with pytest.raises(OSError, match="no service address now"):
        field.host.tickle([Connection(V4, 993, ip_address("192.0.2.140"), 50000)])


# -- the codec


def test_a_request_is_what_the_kernel_reads() -> None:
    data = netlink.encode_hold(HERE[0], 2, 7)
    [(kind, sequence, payload)] = netlink.messages(data)
    assert (kind, sequence) == (20, 7)
    assert netlink.decode_entry(payload) == HERE[0]
    assert struct.unpack_from("=I", data)[0] == len(data)
    cache = payload.index(struct.pack("=HH", 20, 6)) + 4
    assert struct.unpack_from("=II", payload, cache) == (0, 2)  # preferred, valid
    flags = payload.index(struct.pack("=HH", 8, 8)) + 4
    assert struct.unpack_from("=I", payload, flags) == (0x202,)  # no DAD, no prefix route
    [(kind, _, payload)] = netlink.messages(netlink.encode_delete(HERE[1], 8))
    assert (kind, netlink.decode_entry(payload)) == (21, HERE[1])


def test_a_damaged_answer_ends() -> None:
    assert list(netlink.messages(bytes(16))) == []
    assert list(netlink.messages(b"\x10")) == []
    [(_, _, payload)] = netlink.messages(netlink.encode_delete(HERE[0], 8))
    assert netlink.decode_entry(payload[:8] + bytes(4)) is None


def test_the_real_kernel_lists_its_addresses() -> None:
    with closing(netlink.Netlink()) as kernel:
        assert entry(LO, "127.0.0.1/8") in kernel.entries()


@pytest.mark.parametrize("channel", ["arp", "icmp"])
def test_an_interface_that_goes_down_is_nothing_to_hear(channel: str) -> None:
    class Down:
        def recv(self, size: int) -> bytes:
            raise OSError(errno.ENETDOWN, "Network is down")

    speaker = addresses.Speaker(socket.if_nametoindex("lo"), lambda *_: pytest.fail("heard"))
    setattr(speaker, f"_{channel}", Down())
    getattr(speaker, f"_hear_{channel}")()
