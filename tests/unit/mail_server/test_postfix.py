"""Postfix's settings, as the templates make them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from ansible.plugins.filter.core import FilterModule

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


def test_what_is_resubmitted_passes_our_milter_alone() -> None:
    found = services()
    assert "smtpd_milters=$umbra_milter" in found["127.0.0.1:10026/inet"]
    others = [option for name in ("smtp/inet", "submission/inet") for option in found[name]]
    assert not [option for option in others if option.startswith("smtpd_milters")]
