"""Syncs that dsync does not finish at once.

A mailbox ``a/b`` may be there without a mailbox ``a``. On the peer dsync makes ``a`` too, as an
empty mailbox (2.4.1, checked by experiment), and takes it away with the user's next sync. So a sync
that may have made mailboxes is followed by another one before anybody is told that it is done,
where there are such names.

One from scratch always is: of two INBOXes that were made independently the first sync only makes
one mailbox.

And a sync passes over a mailbox that is renamed between its list and its look. So one during which
mailboxes were made or renamed is followed by another, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from umbra.mailbox.doveadm import Outcome, SyncResult
from umbra.mailbox.mirror import Carrier

# So many in a row at most.
MOST = 5


class ParentsCarrier:
    """A carrier whose syncs are whole when they end. See the module for which are not."""

    def __init__(self, carrier: Carrier) -> None:
        self._carrier = carrier
        self._restructured: set[str] = set()

    def restructured(self, user: str) -> None:
        """``user`` created or renamed mailboxes: the next sync shall see to it."""
        self._restructured.add(user)

    async def sync(
        self, user: str, state: str, *, merge: bool = False, apart: Sequence[str] = ()
    ) -> SyncResult:
        """See ``Carrier.sync``. If one of them failed, all are done again."""
        scratch = not state
        for number in range(MOST):
            noted = user in self._restructured
            self._restructured.discard(user)
            result = await self._carrier.sync(user, state, merge=merge, apart=apart)
            if result.outcome is not Outcome.SYNCED or merge:
                if noted:
                    self._restructured.add(user)
                return result
            meanwhile = user in self._restructured
            again = (scratch and number == 0) or meanwhile or (noted and result.bare)
            if not again:
                return result
            state = result.state or ""
        reason = "mailboxes were made or renamed again and again"
        return replace(result, outcome=Outcome.CHANGED, reason=reason)

    def progress(self, user: str) -> float:
        """See ``Carrier.progress``."""
        return self._carrier.progress(user)

    def cut(self, user: str = "") -> None:
        """See ``Carrier.cut``."""
        self._carrier.cut(user)
