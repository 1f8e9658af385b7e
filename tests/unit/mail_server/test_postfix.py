"""Postfix's settings, as the templates make them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from ansible.plugins.filter.core import FilterModule
from tests.unit.roles.stage import Stage

ROLE = Path(__file__).parents[3] / "roles" / "mail_server"
SIGNER = "inet:localhost:11332"


def rendered(name: str, **changes: Any) -> str:
    values = {
        **yaml.safe_load((ROLE / "defaults" / "main.yml").read_text()),
        "ansible_managed": "managed",
        "mail_server_hostname": "mail.example.org",
        "mail_server_domains": ["example.org"],
        "mail_server_milters": [SIGNER],
        "__mail_server_tls_key": "/etc/key",
        "__mail_server_tls_certificate": "/etc/certificate",
        **changes,
    }
    # As Ansible's template module does.
    environment = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True)
    environment.filters.update(FilterModule().filters())
    return environment.from_string((ROLE / "templates" / name).read_text()).render(values)


def parameters(**changes: Any) -> dict[str, str]:
    lines = (line.partition(" =") for line in rendered("main.cf.j2", **changes).splitlines()[1:])
    return {name: value.strip() for name, _equals, value in lines}


def services() -> dict[str, list[str]]:
    """Return the options of each service of a replicated server."""
    found: dict[str, list[str]] = {}
    for line in rendered("master.cf.j2", mail_server_replicated=True).splitlines():
        if line.startswith("  -o "):
            found[next(reversed(found))].append(line.removeprefix("  -o "))
        elif not line.startswith("#"):
            found["/".join(line.split()[:2])] = []
    return found


@pytest.mark.parametrize("name", ["smtpd_milters", "non_smtpd_milters"])
def test_our_milter_is_the_last(name: str) -> None:
    found = parameters(mail_server_replicated=True)
    assert found[name] == f"{SIGNER} $umbra_milter"
    assert found["umbra_milter"].startswith("{ unix:umbra/milter.sock, default_action=shutdown,")
    alone = parameters(mail_server_replicated=False)
    assert alone[name] == SIGNER
    assert "umbra_milter" not in alone


def test_booleans_are_yes_and_no() -> None:
    found = parameters(mail_server_postfix_conf={"a": True, "b": False, "c": 1, "d": ""})
    assert [found[name] for name in "abcd"] == ["yes", "no", "1", ""]


def test_what_postfix_refuses_does_not_replace_what_works(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "mail_server")
    stage.program(
        "bin/postfix",
        'test -e "${2-etc/postfix}/master.cf" && ! grep refused "${2-etc/postfix}/main.cf"',
    )
    stage.program("bin/systemctl", "")
    live = stage.write("etc/postfix/main.cf", "works")
    stage.write("etc/postfix/master.cf", "works")
    variables = {
        "mail_server_domains": ["example.org"],
        "mail_server_hostname": "mail.example.org",
        "mail_server_postfix_conf": {"relayhost": "refused"},
    }
    code, text = stage.play(["a"], ["postfix"], variables)
    assert code != 0, text
    assert live.read_text() == "works"
    variables["mail_server_postfix_conf"] = {"relayhost": "taken"}
    code, text = stage.play(["a"], ["postfix"], variables)
    assert code == 0, text
    assert "relayhost = taken" in live.read_text()
    assert "qmgr" in (live.parent / "master.cf").read_text()


def test_what_is_resubmitted_passes_our_milter_alone() -> None:
    found = services()
    assert "smtpd_milters=$umbra_milter" in found["127.0.0.1:24/inet"]
    others = [option for name in ("smtp/inet", "submission/inet") for option in found[name]]
    assert not [option for option in others if option.startswith("smtpd_milters")]


@pytest.mark.parametrize(
    ("name", "pauses"), [("lmtp", 50), ("smtp", 50), ("smtpd", 0), ("qmgr", 0)]
)
def test_a_stop_waits_for_deliveries_and_not_for_ever(
    tmp_path: Path, name: str, pauses: int
) -> None:
    script, processes, slept = tmp_path / "drain", tmp_path / "cgroup.procs", tmp_path / "slept"
    script.write_text(rendered("umbra-postfix-drain.j2"))
    (tmp_path / "sleep").write_text(f"#!/bin/sh\necho >> {slept}\n")
    (tmp_path / "sleep").chmod(0o755)
    slept.touch()
    (tmp_path / name).symlink_to("/bin/sh")  # the kernel names a process by the file it runs
    with (
        subprocess.Popen(["/bin/sh", "-c", "read line"], stdin=subprocess.PIPE) as master,
        subprocess.Popen([tmp_path / name, "-c", "read line"], stdin=subprocess.PIPE) as agent,
    ):
        processes.write_text(f"{master.pid}\n{agent.pid}\n")
        environment = {
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "MAINPID": str(master.pid),
            "PROCESSES": str(processes),
        }
        subprocess.run(["/bin/sh", script], env=environment, check=True, timeout=30)
        assert master.wait(10) == -9
        assert agent.poll() is None
        agent.kill()
    assert len(slept.read_text().splitlines()) == pauses
