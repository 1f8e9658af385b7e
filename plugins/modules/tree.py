#!/usr/bin/python
# Copyright (c) umbra.mail contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: tree
short_description: Make a directory on the host exactly what it is on the controller
description:
  - Installs a directory of program files in one step, so that whoever starts the program finds the old files or the new
    ones and never a mixture, even when the power fails in between.
  - Files that are on the host and not on the controller vanish.
  - O(dest) becomes a symbolic link to a directory beside it that holds this version of the files.
  - The bytecode cache C(__pycache__) counts on neither side.
version_added: 0.1.0
author:
  - umbra.mail contributors (@umbra-mail)
options:
  src:
    description: The directory on the controller; a relative one is looked for below the C(files) directory of the role.
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


def wanted(archive):
    """Return the files of an archive: relative path to (content, mode)."""
    with tarfile.open(archive) as tar:
        return {member.name: (tar.extractfile(member).read(), FILE_MODE) for member in tar if member.isfile()}


def found(directory):
    """Return the files below a directory: relative path to (content, mode)."""
    files = {}
    for parent, directories, names in os.walk(directory):
        directories[:] = [name for name in directories if name != "__pycache__"]
        for name in names:
            path = os.path.join(parent, name)
            with open(path, "rb") as stream:
                content = stream.read()
            files[os.path.relpath(path, directory)] = (content, stat.S_IMODE(os.stat(path).st_mode))
    return files


def difference(dest, before, after):
    """Return Ansible's diff of two states, one entry for each file that differs."""
    def text(state, name):
        return state[name][0].decode("utf-8", "replace") if name in state else ""

    def header(state, name):
        return "%s (mode %04o)" % (os.path.join(dest, name), state[name][1]) if name in state else "/dev/null"

    return [
        {
            "before": text(before, name), "before_header": header(before, name),
            "after": text(after, name), "after_header": header(after, name),
        }
        for name in sorted(set(before) | set(after)) if before.get(name) != after.get(name)
    ]


def publish(dest, files):
    """Write the files to a new directory and turn the link to it; a crash on the way leaves the old version in place."""
    parent, name = os.path.split(dest)
    prefix = "." + name + "-"
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


def main():
    module = AnsibleModule(
        argument_spec={"src": {"type": "path", "required": True}, "dest": {"type": "path", "required": True}},
        supports_check_mode=True,
    )
    os.umask(0o022)
    dest = module.params["dest"].rstrip("/")
    if os.path.isdir(dest) and not os.path.islink(dest):
        module.fail_json(msg="%s is a directory that this module did not make; move it away." % dest)
    before, after = found(dest), wanted(module.params["src"])
    if not after:
        module.fail_json(msg="There is no file to install; this would remove %s." % dest)
    changed = before != after
    result = {
        "changed": changed,
        "added": sorted(set(after) - set(before)),
        "changed_files": sorted(name for name in set(after) & set(before) if after[name] != before[name]),
        "removed": sorted(set(before) - set(after)),
    }
    if module._diff:
        result["diff"] = difference(dest, before, after)
    if changed and not module.check_mode:
        publish(dest, after)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
