# Copyright: umbra.mail contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The filter umbra.mail.mailbox_findings."""

from __future__ import annotations

DOCUMENTATION = r"""
name: mailbox_findings
short_description: Says what is wrong with mailboxes and aliases
version_added: 0.1.0
author: umbra.mail contributors (@umbra-mail)
description:
  - Looks at the mailboxes and aliases of the role C(mail_server).
  - The sentences name addresses and hold no password hash, so they may be shown.
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
- name: Say what is wrong
  ansible.builtin.debug:
    msg: "{{ mailboxes | umbra.mail.mailbox_findings([], ['example.org']) }}"
  vars:
    mailboxes: [{address: ann+x@example.org, password_hash: $6$x}]
  # ["Mailbox ann+x@example.org has a +, after which users put words of their own."]
"""

RETURN = r"""
_value:
  description: One sentence for each bad mailbox and alias.
  type: list
  elements: str
"""

from collections.abc import Callable
from typing import Any

from ansible_collections.umbra.mail.plugins.plugin_utils._mailboxes import mailbox_findings


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters of this file."""
        return {"mailbox_findings": mailbox_findings}
