"""What gives the tunnel its peers, when one of their names has no address."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "roles/vpn/files/vpn-sync"
PEERS = """\
ListenPort = 51820

[Peer]
PublicKey = one
Endpoint = {first}:51820
AllowedIPs = 10.86.0.2/32

[Peer]
PublicKey = two
Endpoint = [2001:db8::3]:51820
AllowedIPs = 10.86.0.3/32
"""


@pytest.mark.parametrize("first", ["vpn-b.example.org", "gone.example.org"])
def test_one_name_without_an_address_keeps_no_other_peer_away(tmp_path: Path, first: str) -> None:
    for name, body in {
        "wg": f"cat > {tmp_path}/given",
        "getent": '[ "$1" = ahosts ] && [ "$2" != gone.example.org ]',
        "systemd-run": f'echo "$@" > {tmp_path}/again',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "umbra0.key").write_text("secret\n")
    (tmp_path / "umbra0.peers").write_text(PEERS.format(first=first))
    script = tmp_path / "vpn-sync"
    script.write_text(SCRIPT.read_text().replace("/etc/wireguard", str(tmp_path)))
    path = f"{tmp_path}:{os.environ['PATH']}"
    run = subprocess.run(
        ["bash", script, "umbra0"],
        check=True, capture_output=True, text=True, env={"PATH": path},
    )  # fmt: skip
    given = (tmp_path / "given").read_text()
    assert given.startswith("[Interface]\nPrivateKey = secret\nListenPort = 51820\n")
    assert "Endpoint = [2001:db8::3]:51820" in given
    assert given.count("[Peer]") == 2
    if first == "gone.example.org":
        assert first not in given
        assert first in run.stderr
        assert "reload wg-quick@umbra0" in (tmp_path / "again").read_text()
    else:
        assert f"Endpoint = {first}:51820" in given
        assert not (tmp_path / "again").exists()
