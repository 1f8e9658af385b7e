# Copyright: umbra.mail contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The filter umbra.mail.inventory_findings."""

from __future__ import annotations

DOCUMENTATION = r"""
name: inventory_findings
short_description: Says what is wrong with an inventory
version_added: 0.1.0
author: umbra.mail contributors (@umbra-mail)
description:
  - Looks at the groups C(umbra_nodes), C(umbra_witness) and C(umbra_outside) and at the
    variables of their hosts.
  - Connects to no host. Needs the Python library netaddr on the controller.
options:
  _input:
    description: The groups of the inventory.
    type: dict
    required: true
  hostvars:
    description: The variables of the hosts.
    type: dict
    required: true
  roles:
    description:
      - Directory of the collection's roles, whose argument specs are read.
      - A variable that begins with the name of one of these roles, or with C(umbra_), and that
        none of them defines is a finding.
    type: path
    required: true
  allowed:
    description: Variables with such a beginning that are right nevertheless.
    type: list
    elements: str
    default: []
positional: hostvars, roles, allowed
"""

EXAMPLES = r"""
- name: Say what is wrong
  ansible.builtin.debug:
    msg: "{{ groups | umbra.mail.inventory_findings(hostvars, role_path ~ '/..') }}"
  # ["Redundancy group mail has no primary; set umbra_role: primary on one of mail-a and mail-b."]
"""

RETURN = r"""
_value:
  description: One sentence for each finding; empty for a sound inventory.
  type: list
  elements: str
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from ansible.errors import AnsibleFilterError
from ansible_collections.umbra.mail.plugins.plugin_utils._addresses import (
    NETADDR_IMPORT_ERROR,
    NETADDR_MISSING,
)
from ansible_collections.umbra.mail.plugins.plugin_utils._inventory import (
    inventory_findings as judge,
)


def inventory_findings(
    groups: Mapping[str, list[str]],
    hostvars: Mapping[str, Mapping[str, Any]],
    roles: str,
    allowed: Iterable[str] = (),
) -> list[str]:
    """Judge the inventory, or say that netaddr is missing."""
    if NETADDR_IMPORT_ERROR is not None:
        raise AnsibleFilterError(NETADDR_MISSING) from NETADDR_IMPORT_ERROR
    specs = {
        path.parent.parent.name: yaml.safe_load(path.read_text(encoding="utf-8"))
        for path in sorted(Path(roles).glob("*/meta/argument_specs.yml"))
    }
    findings: list[str] = judge(groups, hostvars, specs, allowed)
    return findings


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters of this file."""
        return {"inventory_findings": inventory_findings}
