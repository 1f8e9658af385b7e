"""The certificate authority of the role mail_server: made once, asked when it is needed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from .conftest import ROOT, Play, Run

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="files of root are written")

# In a loop over hosts the path is that of the host which is asked.
OWN_CA = f"""\
- name: Certificates
  hosts: umbra_nodes
  gather_facts: false
  vars_files: [{ROOT}/roles/mail_server/defaults/main.yml, {ROOT}/roles/mail_server/vars/main.yml]
  handlers:
    - {{name: Dovecot settings changed, ansible.builtin.debug: {{msg: reloaded}}}}
    - {{name: Postfix settings changed, ansible.builtin.debug: {{msg: reloaded}}}}
  tasks:
    - ansible.builtin.import_tasks: {ROOT}/roles/mail_server/tasks/own_ca.yml
"""
LOCAL, DOWN = "{ansible_connection: local}", "{ansible_host: 127.0.0.1, ansible_port: 1}"


class World:
    """Two hosts whose files are in two directories."""

    def __init__(self, play: Play, path: Path) -> None:
        self.play, self.path = play, path
        self.hosts = {"mail-a": LOCAL, "mail-b": LOCAL}

    def place(self, host: str) -> Path:
        place = self.path / host / "tls"
        place.mkdir(parents=True, exist_ok=True)
        return place

    def certificate(self, host: str) -> str:
        return (self.place(host) / "mail.crt").read_text()

    def run(self, *arguments: str, names: str = "mail.example.org") -> Run:
        settings = {
            "__mail_server_tls_dir": "{{ place }}/{{ item | default(inventory_hostname) }}/tls",
            "__mail_server_ca_dir": "{{ place }}/{{ mail_server_tls_ca_host }}/ca",
            "mail_server_hostname": "{{ inventory_hostname }}.example.org",
            "place": str(self.path),
        }
        variables = ", ".join(f"{key}: '{value}'" for key, value in settings.items())
        hosts = ", ".join(f"{name}: {how}" for name, how in self.hosts.items())
        extra = f"{{{variables}, mail_server_domains: [example.org]}}"
        return self.play(
            *(OWN_CA, "-e", extra, "-e", f"{{mail_server_service_names: [{names}]}}", *arguments),
            inventory=f"umbra_nodes: {{hosts: {{{hosts}}}, vars: {{umbra_group: mail}}}}",
        )


@pytest.fixture
def world(
    play: Play, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, made: list[Path]
) -> World:
    """A copy of what the first run made; that run is made once for all tests."""
    if not made:
        first = World(play, tmp_path_factory.mktemp("first"))
        first.place("mail-a"), first.place("mail-b")
        run = first.run("--check")
        assert run.code == 0, run.output
        assert not (first.path / "mail-a" / "ca").exists()
        run = first.run()
        assert run.code == 0, run.output
        made.append(first.path)
    return World(play, shutil.copytree(made[0], tmp_path / "hosts"))


@pytest.fixture(scope="module")
def made() -> list[Path]:
    """Where the first run has made its files; empty before it."""
    return []


def test_the_authority_is_not_needed_while_all_is_well(world: World) -> None:
    world.hosts["mail-a"] = DOWN
    run = world.run("--limit", "mail-b")
    assert (run.code, run.changed) == (0, False), run.output


def test_a_new_certificate_needs_it(world: World) -> None:
    before = world.certificate("mail-b")
    names = "imap.example.org"
    world.hosts["mail-a"] = DOWN
    run = world.run("--limit", "mail-b", names=names)
    assert run.code != 0
    assert "mail-a (mail_server_tls_ca_host), which keeps the authority, cannot be" in run.words
    assert "The one that is here has other names." in run.words
    assert world.certificate("mail-b") == before
    world.hosts["mail-a"] = LOCAL
    assert world.run("--limit", "mail-b", names=names).code == 0
    assert world.certificate("mail-b") != before


def test_a_key_that_is_lost(world: World) -> None:
    before = world.certificate("mail-b")
    (world.place("mail-b") / "mail.key").unlink()
    run = world.run("--limit", "mail-b")
    assert run.code == 0, run.output
    assert world.certificate("mail-b") != before
    run = world.run("--limit", "mail-b")
    assert (run.code, run.changed) == (0, False), run.output


def test_another_first_host_makes_no_second_authority(world: World) -> None:
    world.hosts = {"mail-c": LOCAL, **world.hosts}
    world.place("mail-c")
    run = world.run("--limit", "mail-c")
    assert run.code != 0
    assert "mail-c (mail_server_tls_ca_host) has no" in run.words
    assert "but mail-a, mail-b has an authority's certificate" in run.words
    assert not (world.path / "mail-c" / "ca").exists()


def test_a_lost_authority(world: World) -> None:
    shutil.rmtree(world.path / "mail-a")
    world.place("mail-a")
    before = world.certificate("mail-b")
    assert "mail_server_tls_new_ca=true" in world.run("--limit", "mail-a").words
    # On one host alone first: the other does not follow without being told.
    said = ("-e", "mail_server_tls_new_ca=true")
    assert world.run("--limit", "mail-a", *said).code == 0
    run = world.run("--limit", "mail-b")
    assert run.code != 0
    assert "mail-b has the certificate of another authority than that on mail-a" in run.words
    assert world.certificate("mail-b") == before
    assert world.run("--limit", "mail-b", *said).code == 0
    assert world.certificate("mail-b") != before


def test_a_run_that_is_cut_leaves_no_half_of_a_key(
    play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(play, tmp_path / "hosts")
    world.hosts = {"mail-a": LOCAL}
    world.place("mail-a")
    program = tmp_path / "bin" / "openssl"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nfor last; do :; done\n: > "$last"\nexit 1\n')
    program.chmod(0o755)
    with monkeypatch.context() as cut:
        cut.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        assert world.run().code != 0
    assert not (world.path / "mail-a" / "ca" / "ca.key").exists()
    assert world.run().code == 0


def test_two_groups_with_an_authority_each(play: Play, tmp_path: Path) -> None:
    world = World(play, tmp_path / "hosts")
    for name in world.hosts:
        world.hosts[name] = f"{{ansible_connection: local, authority: {name}}}"
        world.place(name)
    run = world.run("-e", "mail_server_tls_ca_host='{{ authority }}'")
    assert run.code == 0, run.output
    a, b = ((world.place(name) / "ca.crt").read_text() for name in world.hosts)
    assert a != b
