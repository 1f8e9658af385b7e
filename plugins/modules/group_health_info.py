#!/usr/bin/python
# Copyright (c) umbra.mail contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: group_health_info
short_description: Check the health of a redundancy group from one of its nodes
version_added: 0.1.0
description:
  - Runs named checks on a mail host and returns for each whether it passed, the value, the
    threshold and a sentence.
  - It reads only. A failed check does not make the module fail; the playbook decides what to do
    with it.
  - The agent's own checks are part of the result.
author:
  - umbra.mail contributors (@umbra-mail)
attributes:
  check_mode:
    support: full
    description: The module never changes anything.
  diff_mode:
    support: N/A
    description: Nothing changes, so there is nothing to show.
  idempotent:
    support: full
    description: The module never changes anything.
options:
  socket:
    description: The agent's API socket.
    type: path
    default: /run/umbra/api.sock
  lag_threshold:
    description: How many seconds a shadow may be behind.
    type: float
    default: 5
  shadow_age_threshold:
    description:
      - How old in seconds a shadow message held on this node may be. It lives as long as the
        message is in the
        primary's queue, so an old one means mail that the primary cannot get rid of.
    type: float
    default: 14400
  disk_paths:
    description: Paths whose file systems need room.
    type: list
    elements: path
    default: [/var/vmail, /var/spool/postfix, /var/lib/umbra]
  disk_free_percent:
    description: How many percent of each of these file systems must be free.
    type: float
    default: 10
  certificates:
    description: PEM certificates that must not expire soon.
    type: list
    elements: path
    default: [/etc/umbra/tls/node.crt]
  certificate_days:
    description: For how many more days they must be valid.
    type: float
    default: 14
  clock_threshold:
    description: By how many seconds the clocks of two nodes may differ.
    type: float
    default: 2
  service_addresses:
    description:
      - Address at which clients reach each node, by the node's name. The service ports must be open
        on the primary only.
        A node that is not named here is not probed, and no node probes itself, because a host
        reaches itself past its own fence.
    type: dict
    default: {}
  api_addresses:
    description:
      - Tunnel address of each node's agent, by the node's name. The agent there tells the node's
        clock.
    type: dict
    default: {}
  service_ports:
    description: Ports that clients use.
    type: list
    elements: int
    default: [25, 465, 587, 143, 993, 110, 995, 4190]
  api_port:
    description: Port of the agents' API on the tunnel.
    type: int
    default: 8687
  probe_timeout:
    description: How many seconds to wait for one connection, and for the agent's answer.
    type: float
    default: 2
seealso:
  - module: umbra.mail.switchover
"""

EXAMPLES = r"""
- name: Check the group
  umbra.mail.group_health_info:
    service_addresses: {mail-a: 192.0.2.10, mail-b: 198.51.100.10}
    api_addresses: {mail-a: 10.86.0.1, mail-b: 10.86.0.2}
  register: health

- name: Stop when a check failed
  ansible.builtin.assert:
    that: health.healthy
    fail_msg: "{{ health.failed_checks | join(', ') }}"
"""

RETURN = r"""
healthy:
  description: Whether every check passed.
  returned: always
  type: bool
failed_checks:
  description: Names of the checks that did not pass.
  returned: always
  type: list
  elements: str
checks:
  description: All checks.
  returned: always
  type: list
  elements: dict
  contains:
    name: {description: The check's name., type: str, sample: lag}
    passed: {description: Whether it passed., type: bool}
    value: {description: What was measured., type: raw, sample: 0.2}
    threshold: {description: What it was held against., type: raw, sample: 5.0}
    message: {description: The same as a sentence., type: str, sample: No node is behind.}
status:
  description: The agent's status; empty when the agent does not answer.
  returned: always
  type: dict
"""

import concurrent.futures
import datetime
import email.utils
import http.client
import os
import socket
import time
import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.umbra.mail.plugins.module_utils import _checks as checks
from ansible_collections.umbra.mail.plugins.module_utils._agent import (
    DEFAULT_SOCKET,
    AgentClient,
    AgentError,
)


class Host:
    """What the checks read of this host. Each method answers None for what is not there."""

    def __init__(self, module: AnsibleModule) -> None:
        self._run = module.run_command
        self._timeout = module.params["probe_timeout"]
        self.name = os.uname().nodename

    def postfix_active(self) -> bool:
        """Whether systemd says that Postfix is active."""
        return bool(self._run(["systemctl", "is-active", "--quiet", "postfix.service"])[0] == 0)

    def postfix_settings(self) -> dict[str, str] | None:
        """What decides about Postfix's entrances; see ``checks.entrances``."""
        found: dict[str, str] = {}
        overridden = ("smtpd_milters", "receive_override_options")
        for command in (
            ["-x", *overridden, "non_smtpd_milters", "internal_mail_filter_classes"],
            ["-F", "*/*/command"],
            ["-Px", *(f"*/*/{name}" for name in overridden)],
        ):
            code, out, _err = self._run(["postconf", *command])
            if code != 0:
                return None
            for line in out.splitlines():
                name, _equals, value = line.partition(" =")
                found[name.strip()] = value.strip()
        return found

    def free_percent(self, path: str) -> float | None:
        """Percentage of the file system's blocks that unprivileged users may still use."""
        try:
            stats = os.statvfs(path)
        except OSError:
            return None
        return 100.0 * stats.f_bavail / stats.f_blocks if stats.f_blocks else 100.0

    def certificate_days(self, path: str) -> float | None:
        """Days until a certificate expires."""
        code, out, _err = self._run(["openssl", "x509", "-noout", "-enddate", "-in", path])
        if code != 0:
            return None
        try:
            left = checks.days_left(
                out.strip().partition("=")[2], datetime.datetime.now(datetime.UTC)
            )
        except ValueError:
            return None
        return float(left)

    def ports_open(self, address: str, ports: t.Sequence[int]) -> dict[int, bool]:
        """Whether each port accepts a TCP connection; all at once, as a fence answers nothing."""
        with concurrent.futures.ThreadPoolExecutor(max(1, len(ports))) as pool:
            return dict(
                zip(ports, pool.map(lambda port: self._accepts(address, port), ports), strict=False)
            )

    def _accepts(self, address: str, port: int) -> bool:
        try:
            socket.create_connection((address, port), timeout=self._timeout).close()
        except OSError:
            return False
        return True

    def clock_difference_s(self, address: str, port: int) -> float | None:
        """How far an agent's clock is from ours, in seconds, by its Date header."""
        connection = http.client.HTTPConnection(address, port, timeout=self._timeout)
        try:
            before = time.time()
            connection.request("GET", "/health")
            date = connection.getresponse().getheader("Date")
            after = time.time()
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()
        parsed = email.utils.parsedate_to_datetime(date) if date else None
        return (
            None if parsed is None else checks.clock_difference(parsed.timestamp(), before, after)
        )


def examine(client: AgentClient, host: Host, params: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    """Run every check and return the module's result."""
    status: dict[str, t.Any] = {}
    error = None
    try:
        client.health()
        status = client.status()
    except AgentError as problem:
        error = str(problem)
    found = [checks.agent_answers(error, host.name)]
    if error is None:
        found += [
            checks.one_primary(status),
            checks.protected(status),
            checks.peers_reachable(status),
            checks.lag(status, params["lag_threshold"]),
            checks.postfix_on_primary_only(host.postfix_active(), checks.own_role(status)),
            checks.inventory_role(status),
        ]
        found += examine_peers(host, status, params)
        found += checks.entrances(host.postfix_settings())
        found += checks.shadow_queue_age(status, params["shadow_age_threshold"])
    found += [
        checks.disk_space(path, host.free_percent(path), params["disk_free_percent"])
        for path in params["disk_paths"]
    ]
    found += [
        checks.certificate_expiry(path, host.certificate_days(path), params["certificate_days"])
        for path in params["certificates"]
    ]
    merged = checks.merge(found, status.get("checks") or [])
    failed = [item["name"] for item in merged if not item["passed"]]
    return {"healthy": not failed, "failed_checks": failed, "checks": merged, "status": status}


def examine_peers(
    host: Host, status: t.Mapping[str, t.Any], params: t.Mapping[str, t.Any]
) -> list[checks.Check]:
    """Look at the other nodes that are reachable.

    An unreachable one is reported by its own check, once.
    """
    found: list[checks.Check] = []
    for node in checks.nodes(status):
        name = node["node"]
        if name == status.get("node") or not node.get("reachable"):
            continue
        if name in params["service_addresses"]:
            opened = host.ports_open(
                params["service_addresses"][name] or name, params["service_ports"]
            )
            found.append(checks.service_ports(name, node.get("role"), opened))
        if name in params["api_addresses"]:
            difference = host.clock_difference_s(params["api_addresses"][name], params["api_port"])
            found.append(checks.clock(name, difference, params["clock_threshold"]))
    return found


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "socket": {"type": "path", "default": DEFAULT_SOCKET},
            "lag_threshold": {"type": "float", "default": 5},
            "shadow_age_threshold": {"type": "float", "default": 14400},
            "disk_paths": {
                "type": "list",
                "elements": "path",
                "default": ["/var/vmail", "/var/spool/postfix", "/var/lib/umbra"],
            },
            "disk_free_percent": {"type": "float", "default": 10},
            "certificates": {
                "type": "list",
                "elements": "path",
                "default": ["/etc/umbra/tls/node.crt"],
            },
            "certificate_days": {"type": "float", "default": 14},
            "clock_threshold": {"type": "float", "default": 2},
            "service_addresses": {"type": "dict", "default": {}},
            "api_addresses": {"type": "dict", "default": {}},
            "service_ports": {
                "type": "list",
                "elements": "int",
                "default": [25, 465, 587, 143, 993, 110, 995, 4190],
            },
            "api_port": {"type": "int", "default": 8687},
            "probe_timeout": {"type": "float", "default": 2},
        },
        supports_check_mode=True,
    )
    client = AgentClient(module.params["socket"], module.params["probe_timeout"])
    module.exit_json(changed=False, **examine(client, Host(module), module.params))


if __name__ == "__main__":
    main()
