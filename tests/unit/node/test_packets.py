"""Packets, byte for byte, against captures of what standard tools send."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest

from umbra.node import packets
from umbra.node.packets import Connection

MAC = bytes.fromhex("0200c0000220")
V4 = IPv4Address("192.0.2.20")
V6 = IPv6Address("2001:db8:a::20")


def test_arp_announcements_are_a_request_and_a_reply_to_everybody() -> None:
    request, reply = packets.arp_announcements(V4, MAC)
    assert request.hex() == (
        "ffffffffffff0200c0000220080600010800060400010200c0000220c0000214000000000000c0000214"
    )
    assert reply.hex() == (
        "ffffffffffff0200c0000220080600010800060400020200c0000220c00002140200c0000220c0000214"
    )
    assert packets.arp_sender(request) == packets.arp_sender(reply) == (V4, MAC)


@pytest.mark.parametrize("frame", [b"", bytes(13), bytes(60), b"\xff" * 60])
def test_what_is_no_arp_of_ipv4_says_nothing(frame: bytes) -> None:
    assert packets.arp_sender(frame) is None


def test_a_frame_that_was_padded_is_read() -> None:
    assert packets.arp_sender(packets.arp_announcements(V4, MAC)[0] + bytes(18)) == (V4, MAC)


def test_a_neighbour_advertisement_overrides_and_names_the_mac() -> None:
    message = packets.neighbour_advertisement(V6, MAC)
    assert message.hex() == (
        "8800000020000000"  # type 136, checksum for the kernel, override, neither router nor asked
        "20010db8000a00000000000000000020"
        "02010200c0000220"
    )
    assert packets.advertised(message) == (V6, MAC)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        packets.neighbour_advertisement(V6, MAC)[:24],  # without its option
        packets.neighbour_advertisement(V6, MAC)[:24] + bytes(8),  # an option without a length
        b"\x87" + packets.neighbour_advertisement(V6, MAC)[1:],  # a solicitation
    ],
)
def test_what_names_no_mac_says_nothing(message: bytes) -> None:
    assert packets.advertised(message) is None


def test_another_option_before_the_mac_is_passed_over() -> None:
    message = packets.neighbour_advertisement(V6, MAC)
    assert packets.advertised(message[:24] + b"\x0e\x01" + bytes(6) + message[24:]) == (V6, MAC)


def test_the_checksum_is_that_of_rfc_1071() -> None:
    assert packets.checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0x220D
    assert packets.checksum(b"\x01") == 0xFEFF


@pytest.mark.parametrize(
    ("local", "remote", "head"),
    [
        ("192.0.2.20", "192.0.2.140", "4500002800000000400600 00c0000214c000028c"),
        (
            "2001:db8:a::20",
            "2001:db8:a::140",
            "6000000000140640 20010db8000a00000000000000000020 20010db8000a00000000000000000140",
        ),
    ],
)
def test_a_tickle_is_a_bare_ack_with_a_right_checksum(local: str, remote: str, head: str) -> None:
    connection = Connection(ip_address(local), 993, ip_address(remote), 50000)
    packet = packets.tickle(connection)
    length = len(bytes.fromhex(head))
    assert packet[:length].hex() == head.replace(" ", "")
    segment = packet[length:]
    source, target, seq, ack, offset, flags, window, _, urgent = struct.unpack(
        "!HHIIBBHHH", segment
    )
    assert (source, target, seq, ack, urgent) == (993, 50000, 0, 0, 0)
    assert (offset >> 4, flags) == (5, 0x10)
    assert window > 0
    addresses = connection.local.packed + connection.remote.packed
    # Both pseudo headers sum up the same: addresses, length, protocol.
    assert packets.checksum(addresses + struct.pack("!II", len(segment), 6) + segment) == 0


def test_a_connection_goes_over_the_link_and_back() -> None:
    connection = Connection(V6, 143, IPv6Address("2001:db8:a::140"), 1)
    assert Connection.from_json(connection.to_json()) == connection


@pytest.mark.parametrize(
    "row",
    [
        None,
        {},
        ["192.0.2.20", 993, "192.0.2.140"],
        ["192.0.2.20", 0, "192.0.2.140", 50000],
        ["192.0.2.20", True, "192.0.2.140", 50000],
        ["192.0.2.20", 993, "192.0.2.140", 65536],
        ["192.0.2.20", "993", "192.0.2.140", 50000],
        ["192.0.2.20", 993, "2001:db8:a::140", 50000],
        ["192.0.2.20", 993, "224.0.0.1", 50000],
        ["192.0.2.20", 993, "0.0.0.0", 50000],
        ["192.0.2.20", 993, "client.example.org", 50000],
        [["192.0.2.20"], 993, "192.0.2.140", 50000],
    ],
)
def test_what_is_no_connection_is_refused(row: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        Connection.from_json(row)
