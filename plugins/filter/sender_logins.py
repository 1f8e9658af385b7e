# Copyright: umbra.mail contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The filter umbra.mail.sender_logins."""

from __future__ import annotations

DOCUMENTATION = r"""
name: sender_logins
short_description: Says which mailboxes may send as which address
version_added: 0.1.0
author: umbra.mail contributors (@umbra-mail)
description:
  - Takes the mailboxes and aliases of the role C(mail_server).
  - A user sends as the own address and as each alias that leads to it, over other aliases too,
    whatever stands after a C(+).
options:
  _input:
    description: The mailboxes.
    type: list
    elements: dict
    required: true
  aliases:
    description: The aliases.
    type: list
    elements: dict
    required: true
  domains:
    description: The mail domains.
    type: list
    elements: str
    required: true
  postmaster:
    description: Who gets mail to postmaster, abuse and root of each domain; empty for nobody.
    type: str
    default: ""
positional: aliases, domains, postmaster
"""

EXAMPLES = r"""
- name: Say who may send as what
  ansible.builtin.debug:
    msg: "{{ mailboxes | umbra.mail.sender_logins(aliases, ['example.org']) }}"
  vars:
    mailboxes: [{address: ann@example.org}]
    aliases: [{address: sales@example.org, destinations: [ann+sales@example.org]}]
  # {"ann@example.org": ["ann@example.org"], "sales@example.org": ["ann@example.org"]}
"""

RETURN = r"""
_value:
  description: The logins of each address, mailboxes first.
  type: dict
"""

from collections.abc import Callable
from typing import Any

from ansible_collections.umbra.mail.plugins.plugin_utils._mailboxes import sender_logins


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters of this file."""
        return {"sender_logins": sender_logins}
