#!/usr/bin/python
# Copyright (c) umbra.mail contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: tree
short_description: Make a directory on the host exactly what it is on the controller
description:
  - Installs a directory of program files in one step, so that whoever starts the program finds
    the old files or the new ones and never a mixture, even when the power fails in between.
  - Files that are on the host and not on the controller vanish.
  - O(dest) becomes a symbolic link to a directory beside it that holds this version of the files.
  - The bytecode cache C(__pycache__) counts on neither side.
version_added: 0.1.0
author:
  - umbra.mail contributors (@umbra-mail)
options:
  src:
    description:
      - The directory on the controller; a relative one is looked for below the C(files) directory
        of the role.
    type: path
    required: true
  dest:
    description: Where the directory shall be on the host. What is above it must exist.
    type: path
    required: true
attributes:
  check_mode:
    description: Says what would change, and changes nothing.
    support: full
  diff_mode:
    description: Shows each file that is added, changed or removed.
    support: full
  idempotent:
    description: Changes nothing when the host has just these files with just these modes.
    support: full
"""

EXAMPLES = r"""
- name: Install the agent
  umbra.mail.tree:
    src: umbra
    dest: /usr/lib/umbra/umbra
"""

RETURN = r"""
added:
  description: Files that the host did not have.
  type: list
  elements: str
  returned: success
changed_files:
  description: Files that had another content or mode.
  type: list
  elements: str
  returned: success
removed:
  description: Files that the controller does not have.
  type: list
  elements: str
  returned: success
"""

import os
import shutil
import stat
import tarfile
import tempfile

from ansible.module_utils.basic import AnsibleModule

FILE_MODE = 0o644
DIRECTORY_MODE = 0o755

Files = dict[str, tuple[bytes, int]]
"""Relative path to (content, mode)."""


def wanted(archive: str) -> Files:
    """Return the files of an archive."""
    files: Files = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            stream = tar.extractfile(member)
            if stream is not None:
                files[member.name] = (stream.read(), FILE_MODE)
    return files


def found(directory: str) -> Files:
    """Return the files below a directory; none if there is no such directory."""
    files: Files = {}
    for parent, directories, names in os.walk(directory):
        directories[:] = [name for name in directories if name != "__pycache__"]
        for name in names:
            path = os.path.join(parent, name)
            with open(path, "rb") as stream:
                content = stream.read()
            mode = stat.S_IMODE(os.stat(path).st_mode)
            files[os.path.relpath(path, directory)] = (content, mode)
    return files


def changed_names(before: Files, after: Files) -> list[str]:
    """Return the files that both states have and that differ."""
    return sorted(name for name in before.keys() & after.keys() if before[name] != after[name])


def difference(dest: str, before: Files, after: Files) -> list[dict[str, str]]:
    """Return Ansible's diff of two states, one entry for each file that differs."""

    def text(state: Files, name: str) -> str:
        return state[name][0].decode("utf-8", "replace") if name in state else ""

    def header(state: Files, name: str) -> str:
        if name not in state:
            return "/dev/null"
        return f"{os.path.join(dest, name)} (mode {state[name][1]:04o})"

    return [
        {
            "before": text(before, name),
            "before_header": header(before, name),
            "after": text(after, name),
            "after_header": header(after, name),
        }
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def publish(dest: str, files: Files) -> None:
    """Write the files to a new directory and turn the link to it.

    A crash on the way leaves the old version in place, and a directory that the next run removes.
    """
    parent, name = os.path.split(dest)
    prefix = f".{name}-"
    fresh = tempfile.mkdtemp(prefix=prefix, dir=parent)
    os.chmod(fresh, DIRECTORY_MODE)
    for relative, (content, mode) in files.items():
        path = os.path.join(fresh, relative)
        os.makedirs(os.path.dirname(path), mode=DIRECTORY_MODE, exist_ok=True)
        with open(path, "wb") as stream:
            stream.write(content)
        os.chmod(path, mode)
    os.sync()
    link = os.path.join(fresh, ".link")
    os.symlink(os.path.basename(fresh), link)
    os.replace(link, dest)
    # Earlier versions, and what an interrupted run left.
    for entry in os.listdir(parent):
        if entry.startswith(prefix) and entry != os.path.basename(fresh):
            shutil.rmtree(os.path.join(parent, entry))


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "src": {"type": "path", "required": True},
            "dest": {"type": "path", "required": True},
        },
        supports_check_mode=True,
    )
    os.umask(0o022)
    dest = module.params["dest"].rstrip("/")
    if os.path.isdir(dest) and not os.path.islink(dest):
        module.fail_json(msg=f"{dest} is a directory that this module did not make; move it away.")
    before, after = found(dest), wanted(module.params["src"])
    if not after:
        module.fail_json(msg=f"There is no file to install; this would remove {dest}.")
    changed = before != after
    result = {
        "changed": changed,
        "added": sorted(after.keys() - before.keys()),
        "changed_files": changed_names(before, after),
        "removed": sorted(before.keys() - after.keys()),
    }
    if module._diff:
        result["diff"] = difference(dest, before, after)
    if changed and not module.check_mode:
        publish(dest, after)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
