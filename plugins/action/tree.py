# Copyright (c) umbra.mail contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
import tarfile
import tempfile
from typing import Any

from ansible import constants as C
from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase


class ActionModule(ActionBase):
    """Sends the directory to the host as one archive; the module of the same name installs it."""

    TRANSFERS_FILES = True
    _VALID_ARGS = frozenset(("src", "dest"))

    def run(
        self, tmp: str | None = None, task_vars: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        super().run(tmp, task_vars)
        args = dict(self._task.args)
        if not args.get("src"):
            raise AnsibleActionFail("src is missing: name the directory on the controller.")
        source = self._find_needle("files", args["src"])
        descriptor, archive = tempfile.mkstemp(suffix=".tar", dir=C.DEFAULT_LOCAL_TMP)
        os.close(descriptor)
        try:
            with tarfile.open(archive, "w") as tar:
                tar.add(source, arcname="", filter=_without_cache)
            remote = self._connection._shell.join_path(self._connection._shell.tmpdir, "tree.tar")
            self._transfer_file(archive, remote)
        finally:
            os.unlink(archive)
        self._fixup_perms2((self._connection._shell.tmpdir, remote))
        result: dict[str, Any] = self._execute_module(
            module_args={**args, "src": remote}, task_vars=task_vars
        )
        return result


def _without_cache(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if os.path.basename(member.name) == "__pycache__" else member
