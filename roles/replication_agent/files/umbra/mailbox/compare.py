"""The differences between two descriptions of a user, and between two lists of messages. Pure."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field

from umbra.mailbox.describe import Description, Mailbox, Message

# Differences that are told one by one, for each user; the rest is counted.
SHOWN = 50


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same on both nodes; "" stands for nothing there.

    :param uid: of the message that it is about, 0 for none.
    """

    mailbox: str
    what: str
    here: str
    there: str
    uid: int = 0

    @property
    def of_flags(self) -> bool:
        """Whether it is about the flags of a message that both nodes have."""
        return self.what.startswith("flags")


@dataclass
class Unlike:
    """A mailbox on both nodes whose messages differ.

    :param here: its GUID on this node; ``there``, on the other.
    :param flags: the UIDs of messages that both have, with other flags.
    :param brings: whether the other has a message that this one lacks, or is another mailbox.
    """

    here: str
    there: str
    flags: list[int] = field(default_factory=list)
    brings: bool = False


class Found:
    """Differences: how many, the first of them, and all mailboxes they are in, by name."""

    def __init__(self) -> None:
        self.count = 0
        self.shown: list[Difference] = []
        self.unlike: dict[str, Unlike] = {}
        self.missing: list[str] = []
        """Mailboxes that the other node has under no name."""
        self.brought: dict[str, Mailbox] = {}
        """Mailboxes that only the other node has, by name."""

    def lacking(self) -> list[str]:
        """Return the mailboxes to which the other node brings no message: it only lacks some."""
        same = (name for name, box in self.unlike.items() if box.here == box.there)
        return [*self.missing, *(name for name in same if not self.unlike[name].brings)]

    def add(self, difference: Difference) -> None:
        """Add one."""
        self.count += 1
        if len(self.shown) < SHOWN:
            self.shown.append(difference)


def of_descriptions(here: Description, there: Description) -> Iterator[Difference]:
    """Yield the differences, those inside of mailboxes left out (see ``to_look_into``)."""
    if here.exists != there.exists:
        yield Difference("", "user", _known(here), _known(there))
        return
    for name in sorted(here.mailboxes.keys() | there.mailboxes.keys()):
        mine, theirs = here.mailboxes.get(name), there.mailboxes.get(name)
        if mine is None or theirs is None:
            yield Difference(name, "mailbox", _mailbox(mine), _mailbox(theirs))
            continue
        for what in ("guid", "uidvalidity", "uidnext", "messages"):
            pair = getattr(mine, what), getattr(theirs, what)
            if pair[0] != pair[1]:
                yield Difference(name, what, *pair)
    for name in sorted(here.subscriptions ^ there.subscriptions):
        yield Difference(
            name, "subscription",
            "yes" if name in here.subscriptions else "",
            "yes" if name in there.subscriptions else "",
        )  # fmt: skip
    for what, mine_by, theirs_by in (
        ("script", here.scripts, there.scripts),
        ("acl", here.rights, there.rights),
    ):
        for name in sorted(mine_by.keys() | theirs_by.keys()):
            if mine_by.get(name) != theirs_by.get(name):
                yield Difference(name, what, mine_by.get(name, ""), theirs_by.get(name, ""))
    if here.active != there.active:
        yield Difference("", "active script", here.active, there.active)


def missing(here: Description, there: Description) -> list[str]:
    """Return the mailboxes that the other node has under no name.

    It may have a name that holds only others: what is left of a mailbox that was deleted there.
    """
    theirs = {mailbox.guid for mailbox in there.mailboxes.values()}
    taken = {name for name, mailbox in there.mailboxes.items() if mailbox.guid}
    return sorted(
        name
        for name, mailbox in here.mailboxes.items()
        if mailbox.guid and mailbox.guid not in theirs and name not in taken
    )


def to_look_into(here: Description, there: Description) -> list[tuple[str, Mailbox, Mailbox]]:
    """Return the mailboxes on both nodes whose messages differ."""
    return [
        (name, mine, theirs)
        for name, mine in sorted(here.mailboxes.items())
        if mine.guid
        and (theirs := there.mailboxes.get(name)) is not None
        and theirs.guid
        and theirs.digest != mine.digest
    ]


async def of_messages(
    mailbox: str, here: AsyncIterator[Message], there: AsyncIterator[Message]
) -> AsyncIterator[Difference]:
    """Yield the differences of two lists in the order of UIDs, each read once."""
    mine, theirs = await anext(here, None), await anext(there, None)
    while mine is not None or theirs is not None:
        if theirs is None or (mine is not None and mine.uid < theirs.uid):
            assert mine is not None
            yield Difference(mailbox, f"message {mine.uid}", mine.guid, "", mine.uid)
            mine = await anext(here, None)
        elif mine is None or theirs.uid < mine.uid:
            yield Difference(mailbox, f"message {theirs.uid}", "", theirs.guid, theirs.uid)
            theirs = await anext(there, None)
        else:
            # Two messages under one UID have nothing in common that would have to be the same.
            same = mine.guid == theirs.guid
            for what in ("flags", "size", "received", "body") if same else ("guid",):
                pair = getattr(mine, what), getattr(theirs, what)
                if pair[0] != pair[1]:
                    yield Difference(mailbox, f"{what} of message {mine.uid}", *pair, mine.uid)
            mine, theirs = await anext(here, None), await anext(there, None)


async def of_mailbox(
    mailbox: str,
    unlike: Unlike,
    here: AsyncGenerator[Message, None],
    there: AsyncGenerator[Message, None],
) -> AsyncIterator[Difference]:
    """Yield the same of one mailbox, note in ``unlike`` what it is, and close the lists."""
    async with aclosing(here), aclosing(there):
        async for difference in of_messages(mailbox, here, there):
            if difference.of_flags:
                unlike.flags.append(difference.uid)
            elif difference.there:
                unlike.brings = True
            yield difference


def _known(found: Description) -> str:
    return "known" if found.exists else ""


def _mailbox(found: Mailbox | None) -> str:
    return "" if found is None else f"{found.messages or 'no'} messages"
