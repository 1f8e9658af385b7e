# Copyright: umbra.mail contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The filter umbra.mail.overlay_moves."""

from __future__ import annotations

DOCUMENTATION = r"""
name: overlay_moves
short_description: Says which hosts would get another address in the overlay
version_added: 0.1.0
author: umbra.mail contributors (@umbra-mail)
description:
  - Compares the plan of the filter P(umbra.mail.overlay_plan#filter) with what an earlier run wrote
    on a host.
  - Needs the Python library netaddr on the controller.
options:
  _input:
    description: The plan.
    type: dict
    required: true
  subnet:
    description: The overlay's subnet, from which the plan was made.
    type: str
    required: true
  host:
    description: The host that the two files are from.
    type: str
    required: true
  conf:
    description: Its file of the interface; empty when there is none.
    type: str
    required: true
  peers:
    description: Its file of the peers; empty when there is none.
    type: str
    required: true
positional: subnet, host, conf, peers
"""

EXAMPLES = r"""
- name: Say who would move
  ansible.builtin.debug:
    msg: "{{ plan | umbra.mail.overlay_moves('10.86.0.0/24', inventory_hostname, conf, peers) }}"
  # ["mail-a has 10.86.0.1 in the tunnel and would get 10.86.0.2; set vpn_number: 1 for mail-a."]
"""

RETURN = r"""
_value:
  description: One sentence for each host that would move, with the fix.
  type: list
  elements: str
"""

from collections.abc import Callable
from typing import Any

from ansible_collections.umbra.mail.plugins.plugin_utils._addresses import overlay_moves


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters of this file."""
        return {"overlay_moves": overlay_moves}
