from ipaddress import IPv4Network, IPv6Network, ip_address
from itertools import combinations

import pytest
from tests.lab.umbra_lab import plan
from tests.lab.umbra_lab.paths import Lab
from tests.lab.umbra_lab.shell import LabError

MEMBERS = (*plan.ALL_HOSTS, plan.CONTROL)


def test_every_address_is_in_its_site_and_no_two_are_the_same() -> None:
    addresses = [a for m in MEMBERS for a in (m.v4, m.v6)]
    addresses += [a for s in plan.SITES for a in (s.router_v4, s.router_v6)]
    assert len(addresses) == len(set(addresses))
    for member in MEMBERS:
        assert member.v4 in member.site.v4
        assert member.v6 in member.site.v6


def test_sites_do_not_overlap() -> None:
    for a, b in combinations((*plan.SITES, plan.LAN), 2):
        assert not a.v4.overlaps(b.v4)
        assert not a.v6.overlaps(b.v6)


def test_all_networks_are_reserved_for_documentation() -> None:
    rfc5737 = [IPv4Network(f"{n}/24") for n in ("192.0.2.0", "198.51.100.0", "203.0.113.0")]
    rfc3849 = IPv6Network("2001:db8::/32")
    for site in (*plan.SITES, plan.LAN):
        assert any(site.v4.subnet_of(network) for network in rfc5737)
        assert site.v6.subnet_of(rfc3849)


@pytest.mark.parametrize(
    ("address", "site"),
    [
        ("192.0.2.10", "alpha"),
        ("198.51.100.255", "beta"),
        ("203.0.113.63", "gamma"),
        ("203.0.113.128", "outside"),
        ("2001:db8:c::10", "gamma"),
        ("2001:db8:e::1", None),
        ("10.0.0.1", None),
        ("ff02::16", None),
    ],
)
def test_destination_site(address: str, site: str | None) -> None:
    found = plan.destination_site(ip_address(address).packed)
    assert (found.name if found else None) == site


def test_hosts_file_names_every_host_by_both_names_and_versions() -> None:
    lines = plan.hosts_file(own="machine").splitlines()
    assert lines[0] == "127.0.0.1 localhost machine"
    for host in plan.ALL_HOSTS:
        assert f"{host.v4} {host.name}.example.org {host.name}" in lines
        assert f"{host.v6} {host.name}.example.org {host.name}" in lines


def test_a_site_is_found_by_its_name_or_a_host_of_it() -> None:
    assert plan.site_of("beta") is plan.site_of("mail-b") is plan.BETA
    with pytest.raises(LabError, match="mail-d"):
        plan.site_of("mail-d")
    with pytest.raises(LabError, match="alpha"):
        plan.host("alpha")


def test_a_lab_has_debian_13_only_unless_more_is_asked_for() -> None:
    assert {member.release for member in plan.HOSTS} == {"trixie"}
    assert plan.host("old-a").release == plan.host("old-b").release == "bookworm"
    assert not set(plan.HOSTS) & set(plan.EXTRA_HOSTS)


@pytest.mark.parametrize("name", ["demo", "lab1", "a-b", "x" * 20])
def test_lab_names(name: str) -> None:
    assert plan.check_lab_name(name) == name


@pytest.mark.parametrize("name", ["", "a.b", "../x", "A", "-a", "x" * 21, "a b"])
def test_refused_lab_names(name: str) -> None:
    with pytest.raises(LabError):
        plan.check_lab_name(name)


def test_labs_never_share_a_name_even_if_one_is_the_others_beginning() -> None:
    a, b = Lab("one"), Lab("one-more")
    assert not b.netns(plan.CONTROL).startswith(a.netns_prefix)
    assert a.netns(plan.ALPHA) != a.netns(plan.HOSTS[0])


def test_socket_paths_fit_into_a_socket_address() -> None:
    lab = Lab("x" * 20)
    # ssh makes the path of a kept connection of 40 digits and a temporary ending of 17.
    assert len(str(lab.ssh_dir / "cp")) + 1 + 40 + 17 < 108
    assert len(str(lab.wan_socket)) < 108
