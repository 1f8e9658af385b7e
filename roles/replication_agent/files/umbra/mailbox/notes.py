"""Users whose change Dovecot's script noted by itself: it leaves an empty file of the user's name.

It does so in two cases:

* The agent did not confirm the change. Its client was told OK all the same.
* The agent had permitted it: no change waits for a peer now, and asking would cost several times
  what the change itself does.

A permit is a file with the time up to which it holds, in seconds since the boot. It is renewed
while this node may act, and ends by itself soon after the agent does.

No name gets lost between the two of them. The script leaves the name first and looks at the clock
after that; the agent renews the permit no more, waits until it has ended and takes the names after
that. So a change that went unasked is among those names, and any other one is asked for.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

log = logging.getLogger(__name__)

# The script reads the same file; a container may have one that differs from the kernel's clock.
UPTIME = Path("/proc/uptime")
# A permit holds for so long (seconds), and is renewed so often.
PERMIT, RENEWAL = 1.0, 0.25
# Copying what nobody waits for rests for so many times as long as it has taken,
REST = 9.0
# but at least so long; and the names are taken at least so often (seconds).
SHORTEST, LONGEST = 0.1, 2.0


def rest(took: float) -> float:
    """Return how long to leave the names alone (seconds), when copying the last took so long.

    One change now and then is copied at once. Where many users make many, more of them share a
    sync, so that copying takes a tenth of the time and not all of it.
    """
    return max(SHORTEST, min(REST * took, LONGEST - took))


class Notes:
    """The names and the permit.

    :param names: the directory of the names.
    :param permit: the file of the permit, in memory: a boot ends it.
    """

    def __init__(self, names: Path, permit: Path) -> None:
        self._names = names
        self._permit = permit
        self._till = 0.0
        self._taken: list[str] = []
        self._stuck: dict[str, tuple[str, int]] = {}  # user and length by name

    @property
    def stuck(self) -> Sequence[str]:
        """Users whose name cannot be removed."""
        return sorted(user for user, _ in self._stuck.values() if user)

    def permit(self) -> None:
        """Let changes go unasked for a while; OSError if that cannot be written."""
        till = _since_boot() + PERMIT
        new = self._permit.with_suffix(".new")
        new.write_text(f"{till:.2f}\n", encoding="ascii")
        new.chmod(0o644)  # Dovecot's processes read it
        self._till = till
        new.replace(self._permit)

    def forbid(self) -> float:
        """Have changes asked for again; return for how long they may still go unasked (seconds)."""
        self._permit.unlink(missing_ok=True)
        return max(0.0, self._till - _since_boot())

    def take(self) -> list[str]:
        """Remove the names and return them. A change that is noted meanwhile leaves a new one.

        One that cannot be removed is ``stuck``, and returned again when it has grown: each change
        makes it longer. OSError if the names cannot be read; what was removed by then is returned
        the next time.
        """
        stuck: dict[str, tuple[str, int]] = {}
        with os.scandir(self._names) as entries:
            for entry in entries:
                # Dovecot's script writes no other; one that is odd is told all the same.
                user = unquote(entry.name) if entry.name.isascii() else ""
                if entry.is_dir(follow_symlinks=False):
                    user = ""
                try:
                    os.unlink(entry.path)
                except FileNotFoundError:
                    continue
                except OSError as error:
                    stuck[entry.name] = user, entry.stat(follow_symlinks=False).st_size
                    if self._stuck.get(entry.name) == stuck[entry.name]:
                        continue
                    log.error("%r in %s stays there: %s", entry.name, self._names, error.strerror)
                if user:
                    self._taken.append(user)
                else:
                    log.error("%r in %s is no user's name", entry.name, self._names)
        names, self._taken, self._stuck = self._taken, [], stuck
        return names


def _since_boot() -> float:
    return float(UPTIME.read_text(encoding="ascii").split()[0])
