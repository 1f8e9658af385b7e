# Copyright: umbra.mail contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The filter umbra.mail.health_table."""

from __future__ import annotations

DOCUMENTATION = r"""
name: health_table
short_description: Shows the health of a group as a table
version_added: 0.1.0
author: umbra.mail contributors
description:
  - Makes the lines of a table from what M(umbra.mail.group_health_info) returned on each node.
  - A node without checks gave no answer and is shown so.
options:
  _input:
    description: What the module returned, by node.
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Show the health
  ansible.builtin.debug:
    msg: "{{ {'mail-a': health_a, 'mail-b': health_b} | umbra.mail.health_table }}"
"""

RETURN = r"""
_value:
  description: The lines.
  type: list
  elements: str
"""

from collections.abc import Callable, Mapping
from typing import Any

from ansible_collections.umbra.mail.plugins.module_utils._tables import health_lines, status_lines


def health_table(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Show the group as the first node that answered sees it, then every check of every node."""
    status = next((health["status"] for health in results.values() if health.get("status")), None)
    lines: list[str] = [*status_lines(status), ""] if status else []
    lines += health_lines(results)
    return lines


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters of this file."""
        return {"health_table": health_table}
