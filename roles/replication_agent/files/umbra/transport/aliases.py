"""Which mailboxes an address leads to, by Postfix's virtual aliases.

The milter sees a message before aliases are expanded, and only mailboxes can tell what was
delivered. The rules are those of Postfix's virtual(5): the address, the address without its
extension, ``@domain``; the first that is found counts, and what it gives is looked up again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

from umbra.transport.once import plain

Lookup = Callable[[Sequence[str]], Awaitable[Mapping[str, str]]]

MAX_DEPTH = 50
PORTION = 500
"""Keys in one question."""


class Aliases:
    """Expands addresses.

    :param lookup: returns what the alias maps say of some keys; OSError if they cannot be read.
    """

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup
        self._members: dict[str, tuple[str, ...]] = {}

    def forget(self) -> None:
        """Forget what was looked up: the maps may have changed."""
        self._members.clear()

    async def targets(self, address: str) -> Sequence[str]:
        """Return where mail to ``address`` ends, in lower case; itself if it is no alias."""
        await self._learn([address])
        return self._ends(address)

    async def leading_to(self, mailbox: str, addresses: Iterable[str]) -> list[str]:
        """Return those of ``addresses`` whose mail comes to ``mailbox``, in lower case."""
        mailbox = mailbox.lower()
        candidates = {address.lower() for address in addresses}
        await self._learn(candidates)
        return sorted(
            address
            for address in candidates
            if any(plain(end) == mailbox or end == mailbox for end in self._ends(address))
        )

    async def _learn(self, addresses: Iterable[str]) -> None:
        level = {address.lower() for address in addresses}
        for _ in range(MAX_DEPTH):
            level -= self._members.keys()
            if not level:
                return
            keys = sorted({key for address in level for key in _keys(address)})
            found: dict[str, str] = {}
            for start in range(0, len(keys), PORTION):
                found |= await self._lookup(keys[start : start + PORTION])
            for address in level:
                text = next((found[key] for key in _keys(address) if key in found), "")
                self._members[address] = tuple(text.lower().replace(",", " ").split())
            level = {member for address in level for member in self._members[address]}

    def _ends(self, address: str) -> Sequence[str]:
        ends: dict[str, None] = {}
        seen = set()
        pending = [address.lower()]
        while pending:
            item = pending.pop()
            if item in seen:
                continue
            seen.add(item)
            members = self._members.get(item, ())
            if not members or item in members:
                ends[item] = None
            pending += members
        return sorted(ends)


def _keys(address: str) -> Sequence[str]:
    domain = address.rpartition("@")[2]
    return tuple(dict.fromkeys((address, plain(address), f"@{domain}")))
