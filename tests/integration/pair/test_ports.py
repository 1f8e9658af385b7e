"""Who can reach what over the network."""

from __future__ import annotations

import json

import pytest
from tests.integration import lab

# Runs on the client: what becomes of a connection to each (address, port), and the first bytes.
PROBE = """
import json, socket, sys
from concurrent.futures import ThreadPoolExecutor

def tried(target):
    try:
        with socket.create_connection(target, timeout=5) as connection:
            connection.settimeout(5)
            try:
                return "open " + connection.recv(40).decode()
            except TimeoutError:
                return "open"
    except ConnectionRefusedError:
        return "reset"
    except OSError as error:
        return str(error)

targets = [tuple(target) for target in json.loads(sys.argv[1])]
with ThreadPoolExecutor(len(targets)) as pool:  # at once: silence takes five seconds
    answers = pool.map(tried, targets)
    print(json.dumps({f"{host} {port}": said for (host, port), said in zip(targets, answers)}))
"""


def probe(source: str, targets: list[tuple[str, int]]) -> dict[str, str]:
    """Try connections from a host."""
    return dict(json.loads(lab.run(source, "python3 -c %s %s", PROBE, json.dumps(targets))))


def test_primary_answers_clients(primary: str) -> None:
    address = lab.ADDRESSES[primary]
    found = probe("client", [(address, port) for port in (25, 587, 143, 993, 4190)])
    assert found[f"{address} 25"].startswith("open 220 ")
    assert found[f"{address} 587"].startswith("open 220 ")
    assert found[f"{address} 143"].startswith("open * OK")
    assert found[f"{address} 993"] == "open"  # speaks only after the client's first TLS message
    assert found[f"{address} 4190"].startswith("open ")


def test_shadow_resets_clients(shadow: str) -> None:
    """A reset, not silence: a client goes on to the next address at once."""
    targets = [(lab.ADDRESSES[shadow], port) for port in lab.SERVICE_PORTS]
    assert set(probe("client", targets).values()) == {"reset"}


def test_fence_is_the_kernels(primary: str, shadow: str) -> None:
    """Open ports run out by themselves; on the shadow there is none."""

    def opened(node: str) -> list[dict[str, int]]:
        out = lab.run(node, "nft -j list set inet umbra_fence open_ports")
        (found,) = [item["set"] for item in json.loads(out)["nftables"] if "set" in item]
        return [element["elem"] for element in found.get("elem", [])]

    assert {element["val"] for element in opened(primary)} == set(lab.SERVICE_PORTS)
    assert all(0 < element["expires"] <= element["timeout"] <= 60 for element in opened(primary))
    assert opened(shadow) == []


@pytest.mark.parametrize("node", lab.NODES)
def test_replication_ports_are_on_the_tunnel_only(node: str) -> None:
    address = lab.overlay_address(node)
    listening = lab.run(node, "ss -Hltn 'sport = :8686 or sport = :8687'").splitlines()
    assert {line.split()[3] for line in listening} == {f"{address}:8686", f"{address}:8687"}
    notify = lab.run(
        node, "ss -Hltn 'sport = :8688 or sport = :24 or sport = :26 or sport = :27'"
    ).splitlines()
    assert {line.split()[3].rsplit(":", 1)[0] for line in notify} <= {"127.0.0.1"}

    (peer,) = set(lab.NODES) - {node}
    ports = (8686, 8687, 8688, 24, 26, 27)
    outside = probe("client", [(lab.ADDRESSES[node], port) for port in ports])
    assert not [answer for answer in outside.values() if answer.startswith("open")]
    through = probe(peer, [(address, 8686), (address, 8687)])
    # After five seconds of silence the server hangs up and the probe gives up, either one first.
    assert {answer.strip() for answer in through.values()} == {"open"}


@pytest.mark.parametrize("node", lab.NODES)
def test_peer_link_wants_a_pinned_certificate(node: str) -> None:
    """On the tunnel too, a stranger's certificate is worth nothing."""
    (peer,) = set(lab.NODES) - {node}
    address = lab.overlay_address(node)
    lab.run(
        peer,
        "cd /tmp && openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc"
        " -days 1 -subj /CN=%s -keyout stranger.key -out stranger.crt 2>/dev/null",
        peer,
    )
    # In TLS 1.3 the refusal comes after the client's last word: it has to stay to hear it.
    command = "sleep 2 | timeout 5 openssl s_client -connect %s:8686 -cert %s -key %s 2>&1"
    stranger = lab.host(peer).run(command, address, "/tmp/stranger.crt", "/tmp/stranger.key")
    assert stranger.rc != 0
    assert "alert" in stranger.stdout or "unexpected eof" in stranger.stdout
    lab.run(peer, "rm /tmp/stranger.key /tmp/stranger.crt")
    known = lab.host(peer).run(
        command, address, "/etc/umbra/tls/node.crt", "/etc/umbra/tls/node.key"
    )
    assert known.rc == 0
    assert "TLSv1.3" in known.stdout
