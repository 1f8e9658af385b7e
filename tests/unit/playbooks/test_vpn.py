"""The role vpn: no host gets another address than its tunnel has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import ROOT, Play, Run

PREFLIGHT = """\
- name: Preflight
  hosts: umbra_nodes
  connection: local
  gather_facts: false
  tasks:
    - ansible.builtin.import_role: {name: umbra.mail.vpn, tasks_from: preflight}
    - ansible.builtin.debug:
        msg: "{{ inventory_hostname }} goes on as {{ __vpn_plan[inventory_hostname].address }}"
    - ansible.builtin.debug:
        msg: "Closed: {{ vpn_protected_tcp_ports | sort | join(' ') }}"
"""
INVENTORY = """\
all: {vars: {vpn_overlay_subnet: SUBNET}}
umbra_nodes: {hosts: {HOSTS}}
"""


DIRECTORY = "{{ playbook_dir }}/{{ inventory_hostname }}"
Preflight = Callable[..., Run]


@pytest.fixture
def preflight(play: Play) -> Preflight:
    def run(hosts: str, *arguments: str) -> Run:
        return play(
            PREFLIGHT, "-e", f'{{"__vpn_directory": "{DIRECTORY}"}}', *arguments, inventory=hosts
        )

    return run


def inventory(*hosts: str, subnet: str = "10.86.0.0/24") -> str:
    text = ", ".join(host if ":" in host else f"{host}: {{}}" for host in hosts)
    return INVENTORY.replace("SUBNET", subnet).replace("HOSTS", text)


def peer(name: str, address: str) -> str:
    return f"\n[Peer]\n# {name}\nPublicKey = {name}=\nAllowedIPs = {address}\n"


@pytest.fixture
def pair(tmp_path: Path) -> None:
    """What a run left on two hosts."""
    own = {"mail-a": "10.86.0.1", "mail-b": "10.86.0.2"}
    for host, address in own.items():
        (tmp_path / host).mkdir()
        (tmp_path / host / "umbra0.conf").write_text(f"[Interface]\nAddress = {address}/24\n")
        peers = "".join(peer(name, other) for name, other in own.items() if name != host)
        (tmp_path / host / "umbra0.peers").write_text(f"ListenPort = 51820\n{peers}")


def test_new_hosts(preflight: Preflight) -> None:
    run = preflight(inventory("mail-a", "mail-b"))
    assert run.code == 0
    assert "mail-b goes on as 10.86.0.2" in run.words
    assert "Closed: 2379 2380 8686 8687" in run.words


@pytest.mark.usefixtures("pair")
def test_hosts_that_stay(preflight: Preflight) -> None:
    assert preflight(inventory("mail-a", "mail-b", "mail-c")).code == 0
    pinned = inventory("mail-c", "mail-b: {vpn_number: 2}", "mail-a: {vpn_number: 1}")
    assert "as is that of" in preflight(pinned).words
    pinned = pinned.replace("mail-c: {}", "mail-c: {vpn_number: 3}")
    assert preflight(pinned, "--limit", "mail-a").code == 0


@pytest.mark.usefixtures("pair")
@pytest.mark.parametrize("arguments", [[], ["--check"], ["--limit", "mail-b"]])
def test_hosts_in_another_order(preflight: Preflight, arguments: list[str]) -> None:
    run = preflight(inventory("mail-b", "mail-a"), *arguments)
    assert run.code != 0
    assert (
        "mail-b has 10.86.0.2 in the tunnel and would get 10.86.0.1; set vpn_number: 2 for mail-b."
        in run.words
    )
    assert "goes on" not in run.words


@pytest.mark.usefixtures("pair")
def test_a_new_host_in_front_takes_no_address(preflight: Preflight) -> None:
    run = preflight(inventory("mail-c", "mail-a", "mail-b"))
    assert run.code != 0
    assert "set vpn_number: 1 for mail-a" in run.words
    assert "goes on" not in run.words


@pytest.mark.usefixtures("pair")
def test_a_host_in_between_moves_a_peer_that_is_not_in_the_run(preflight: Preflight) -> None:
    hosts = inventory("mail-a", "mail-c", "mail-b")
    run = preflight(hosts, "--limit", "mail-a")
    assert run.code != 0
    assert "mail-b has 10.86.0.2 in the tunnel and would get 10.86.0.3" in run.words


@pytest.mark.usefixtures("pair")
def test_another_subnet(preflight: Preflight) -> None:
    run = preflight(inventory("mail-a", "mail-b", subnet="10.87.0.0/24"))
    assert run.code != 0
    assert "10.86.0.1 is not in vpn_overlay_subnet 10.87.0.0/24, so set back that one" in run.words
    wider = inventory("mail-a", "mail-b", subnet="10.86.0.0/16")
    assert preflight(wider).code == 0


FIREWALL = f"""\
- name: Firewall
  hosts: mail-a
  connection: local
  gather_facts: false
  vars: {{__vpn_interface: umbra0, template: {ROOT}/roles/vpn/templates/firewall.nft.j2}}
  tasks:
    - ansible.builtin.debug:
        msg: "{{{{ lookup('ansible.builtin.template', template) }}}}"
"""


@pytest.mark.parametrize(
    ("ports", "words"),
    [("[]", "policy accept;"), ("[2379, 22]", "dport { 22, 2379 } counter drop")],
)
def test_what_the_firewall_closes(play: Play, ports: str, words: str) -> None:
    run = play(FIREWALL, "-e", f'{{"vpn_protected_tcp_ports": {ports}}}')
    assert words in run.output
    assert ("dport" in run.output) is (ports != "[]")


def test_ports_that_the_inventory_moves_stay_closed(preflight: Preflight) -> None:
    hosts = inventory("mail-a: {replication_agent_link_port: 9686}")
    run = preflight(hosts)
    assert "Closed: 2379 2380 8687 9686" in run.words
