# Copyright: umbra.mail contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The filter umbra.mail.overlay_plan."""

from __future__ import annotations

DOCUMENTATION = r"""
name: overlay_plan
short_description: Plans the addresses of the overlay
version_added: 0.1.0
author: umbra.mail contributors (@umbra-mail)
description:
  - Gives each host its address in the overlay, from the subnet and the host's C(vpn_number).
  - A host without C(vpn_number) gets its place in the list of hosts, counted from 1.
  - Fails when the overlay is too small, when two hosts have one number, and when a number is the
    network's, the broadcast address's or outside of the overlay. The error names each host and what
    to do.
  - Needs the Python library netaddr on the controller.
options:
  _input:
    description: The hosts of the overlay, in the order of the inventory.
    type: list
    elements: str
    required: true
  subnet:
    description: The subnet of the overlay, IPv4 or IPv6.
    type: str
    required: true
  hostvars:
    description:
      - The variables of the hosts.
      - C(vpn_number), C(vpn_endpoint), C(vpn_port) and C(ansible_host) are read.
    type: dict
    required: true
positional: subnet, hostvars
"""

EXAMPLES = r"""
- name: Say where each host is in the overlay
  ansible.builtin.debug:
    msg: "{{ groups['umbra_nodes'] | umbra.mail.overlay_plan('10.86.0.0/24', hostvars) }}"
  # mail-a: {address: 10.86.0.1, interface: 10.86.0.1/24, endpoint: "192.0.2.10:51820"}
"""

RETURN = r"""
_value:
  description:
    - For each host its C(address) in the overlay, C(interface), which is the same with the prefix
      length, and C(endpoint), the outside address and UDP port where its peers reach it.
  type: dict
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.umbra.mail.plugins.plugin_utils._addresses import (
    NETADDR_IMPORT_ERROR,
    NETADDR_MISSING,
    AddressPlanError,
    plan_overlay,
)


def overlay_plan(
    hosts: Iterable[str], subnet: Any, hostvars: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, str]]:
    """Plan, and report all problems in one error."""
    if NETADDR_IMPORT_ERROR is not None:
        raise AnsibleFilterError(NETADDR_MISSING) from NETADDR_IMPORT_ERROR
    try:
        plan: dict[str, dict[str, str]] = plan_overlay(hosts, subnet, hostvars)
    except AddressPlanError as error:
        raise AnsibleFilterError(str(error)) from error
    return plan


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters of this file."""
        return {"overlay_plan": overlay_plan}
