r"""What the shadow's dsync is going to say, said by this agent at once and checked afterwards.

A one-way sync with a state takes six turns between the two dsyncs, nine for a MOVE, and all that
the receiving one says in them can be known here: it has what the state tells, and is about to have
what this node has. So the sending one is answered at once, its bytes go to the shadow in one piece,
and what the shadow says is compared with what was foretold. A sync counts only after that; any
difference is a ``Surprise``, and the next sync of that user is a plain one from scratch.

Pure: bytes in, bytes out. The dialogue of Dovecot 2.4.1 (dsync's protocol 3.5, checked by
experiment), after doveadm's handshake; what the shadow sends is multiplexed with its log::

    here    VERSION, names of fields, ".", H (settings)
    there   +, VERSION, names of fields, ".", H
    here    S (state of a mailbox)..., ".", N (name of a mailbox)..., ".", D (what was deleted)
    there   N..., ".", D
    for each mailbox that has changed:
    here    B (counters)
    there   B
    here    A (attribute)..., ".", C (change)..., "."
    there   R (request for a message)..., "."
    here    M (message)..., ".", S
    there   S
    and then:
    here    "."
    there   F (how it ended), X (closed)

A sync is foretold only if the last one of the user showed that both nodes have the same mailboxes,
and this node still has these. If not, it goes on as a plain one: until the names are there only the
shadow's hello was foretold, which is the same in all syncs.

A plain one may be guarded: the names wait here until the shadow has told its own, and the sync is
broken off (``Unsafe``) if by these names dsync would remove mailboxes from it that it is to have.

One of a single mailbox is foretold or not made at all (``Whole``): dsync would take a mailbox that
has another name on the shadow, or is gone here, for something else than it is.
"""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

# The names of the fields, as both nodes must tell them. Who tells of others may mean something by
# them that is not checked here.
VERSION = b"VERSION\tdsync\t3\t5"
FIELDS = {
    b"H": b"hostname sync_ns_prefix sync_box sync_box_guid sync_type debug sync_visible_namespaces"
    b" exclude_mailboxes send_mail_requests backup_send backup_recv lock_timeout no_mail_sync"
    b" no_backup_overwrite purge_remote no_notify sync_since_timestamp sync_max_size sync_flags"
    b" sync_until_timestamp virtual_all_box empty_hdr_workaround hashed_headers alt_char",
    b"S": b"mailbox_guid last_uidvalidity last_common_uid last_common_modseq"
    b" last_common_pvt_modseq last_messages_count changes_during_sync",
    b"N": b"name existence mailbox_guid uid_validity uid_next last_renamed_or_created subscribed"
    b" last_subscription_change",
    b"D": b"hierarchy_sep escape_char mailboxes dirs unsubscribes",
    b"B": b"mailbox_guid uid_validity uid_next messages_count first_recent_uid highest_modseq"
    b" highest_pvt_modseq mailbox_lost mailbox_ignore cache_fields have_guids have_save_guids"
    b" have_only_guid128",
    b"A": b"type key value stream deleted last_change modseq",
    b"C": b"type uid guid hdr_hash modseq pvt_modseq add_flags remove_flags final_flags"
    b" keywords_reset keyword_changes received_timestamp virtual_size",
    b"R": b"guid uid",
    b"M": b"guid uid pop3_uidl pop3_order received_date saved_date stream",
    b"F": b"error mail_error require_full_resync",
    b"c": b"name decision last_used",
}
GREETING = (
    VERSION,
    *(kind + names.replace(b" ", b"\t") for kind, names in FIELDS.items()),
    b".",
)
_NAMES = {kind: names.decode().split() for kind, names in FIELDS.items()}
ACCEPTED = b"\n+\n"
END = b"."
NOTHING = b"\x02"

DATA, LOG = 0, ord("L")
HEADER = 5
LEVELS = {
    1: logging.DEBUG,
    2: logging.INFO,
    3: logging.WARNING,
    4: logging.ERROR,
    5: logging.CRITICAL,
    6: logging.CRITICAL,
}
# So much of what is for the shadow is held back until all of it is there.
HOLD = 32 * 1024
# Bytes that stand for one mailbox of a tree. The agent keeps those of thousands of users.
DIGEST = 8
# What the shadow's log says of a message that was expunged here before it could be sent.
EXPUNGED = "Remote didn't send mail"
# Bounds: one line, and what is held until it is known whether the sync can be foretold.
MAX_LINE = 1024 * 1024
MAX_UNDECIDED = 1024 * 1024

Fields = dict[str, bytes]
Talk = Generator[None, bytes, None]
Logged = Callable[[int, str], None]


class Surprise(Exception):
    """The shadow did not say what was foretold.

    :ivar harmful: its copy may lack what it had.
    """

    def __init__(self, text: str, *, harmful: bool = True) -> None:
        super().__init__(text)
        self.harmful = harmful


class Unsafe(Exception):
    """The shadow would be without messages for a while; it was told no name and has all of them.

    :ivar missing: GUIDs of mailboxes that are neither among this node's nor told as deleted, if
        that is all. They may be there next time: dsync does not see one that is renamed while it
        lists them.
    """

    def __init__(self, reason: str, missing: frozenset[bytes] = frozenset()) -> None:
        super().__init__(reason)
        self.missing = missing


class Whole(Exception):
    """Not a single mailbox but all of the user's have to be synced; the shadow was told nothing."""


class Mode(Enum):
    """How far what the shadow says is foretold."""

    UNDECIDED = "undecided"  # its hello was
    FORETOLD = "foretold"  # all of it
    PLAIN = "plain"  # nothing more


class Guard(Enum):
    """What a sync may not take from the shadow, be it for a moment."""

    NOTHING = "nothing"
    INBOX = "inbox"  # its messages: with a state dsync would not bring them back
    ALL = "all"


class Step(NamedTuple):
    """What follows from bytes that have come: what goes back, and what goes on."""

    back: bytes
    on: bytes


def fields(line: bytes) -> Fields:
    """Return the fields of a line by name, escaped as they are; Surprise if it makes no sense."""
    names = _NAMES.get(line[:1])
    if names is None:
        raise Surprise(f"not a line of dsync: {line[:80]!r}")
    values = line[1:].split(b"\t") if len(line) > 1 else []
    if len(values) > len(names):
        raise Surprise(f"fields that are not known: {line[:80]!r}")
    return {name: value for name, value in zip(names, values, strict=False) if value != NOTHING}


def encode(kind: bytes, values: Fields) -> bytes:
    """Return a line with these fields, the reverse of :func:`fields`."""
    row = [values.get(name, NOTHING) for name in _NAMES[kind]]
    while row and row[-1] == NOTHING:
        row.pop()
    return kind + b"\t".join(row) + b"\n"


def packet(channel: int, data: bytes) -> bytes:
    """Return bytes as the shadow's doveadm-server sends them on a channel."""
    return bytes([channel]) + len(data).to_bytes(4, "big") + data


class Lines:
    """Cuts a stream into lines and passes over the contents of messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._at = 0  # what is before it has been given out
        self._seen = 0  # no end of a line is before it
        self._content = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the lines that are complete now, without their ends."""
        self._buffer += data
        while (line := self._next()) is not None:
            yield line
        del self._buffer[: self._at]
        self._at, self._seen = 0, len(self._buffer)
        if self._seen > MAX_LINE:
            raise Surprise(f"a line is over {MAX_LINE} bytes")

    @property
    def whole(self) -> bool:
        """Whether all that was begun has come."""
        return not self._buffer

    @property
    def left(self) -> int:
        """How many bytes have come that were not given out."""
        return len(self._buffer) - self._at

    def skip_content(self) -> None:
        """After the line that was given out last comes the content of a message."""
        self._content = True

    def _next(self) -> bytes | None:
        if self._content and not self._skipped():
            return None
        end = self._buffer.find(b"\n", max(self._at, self._seen))
        if end < 0:
            return None
        line = bytes(self._buffer[self._at : end])
        self._at = end + 1
        return line

    def _skipped(self) -> bool:
        # dsync ends a content with CR LF, dot, CR LF, and doubles a dot that follows an LF in it.
        end = self._buffer.find(b"\n.\r\n", self._at)
        if end < 0:
            self._at = max(self._at, len(self._buffer) - 3)
            return False
        self._at = end + 4
        self._content = False
        return True


class Channels:
    """Takes apart what a doveadm-server sends on several channels."""

    def __init__(self) -> None:
        self._header = b""
        self._left = 0

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Yield what has come, with the channel."""
        at = 0
        while at < len(data):
            if not self._left:
                missing = HEADER - len(self._header)
                self._header += data[at : at + missing]
                at += missing
                if len(self._header) < HEADER:
                    return
                self._left = int.from_bytes(self._header[1:], "big")
                if not self._left:
                    self._header = b""
                continue
            piece = data[at : at + self._left]
            at += len(piece)
            self._left -= len(piece)
            channel = self._header[0]
            if not self._left:
                self._header = b""
            yield channel, piece

    @property
    def whole(self) -> bool:
        """Whether all that was begun has come."""
        return not self._header


@dataclass
class _Box:
    """What was foretold of one mailbox."""

    counters: Fields
    requested: dict[bytes, bytes] = field(default_factory=dict)  # GUID: UID
    told: bool = False  # all changes are known
    contents: bool = False  # all new messages were sent
    expunged: bool = False  # before it could be sent was one of them
    state: Fields | None = None
    state_there: Fields | None = None

    def compare(self) -> None:
        """Compare the states. The shadow's may come first: it follows the messages."""
        if self.state is None or self.state_there is None:
            return
        if self.state_there != self.state or "changes_during_sync" in self.state:
            unlike = _differences(self.state_there, self.state)
            raise Surprise(f"another state: {unlike}", harmful=not self.expunged)


# Name, existence, GUID, UIDVALIDITY, and whether it is subscribed.
Node = tuple[bytes, bytes, bytes, bytes, bool]
_PLACES = len(_NAMES[b"N"])


def _node(line: bytes) -> tuple[Node, bytes]:
    """Return what has to be the same on both nodes of a mailbox's name, and UIDNEXT.

    By place, for a user may have thousands.
    """
    values = _is(b"N", line)[1:].split(b"\t")
    if len(values) > _PLACES:
        raise Surprise(f"fields that are not known: {line[:80]!r}")
    values += [NOTHING] * (_PLACES - len(values))
    name, existence, guid, uidvalidity, uid_next, _, subscribed, _ = values
    return (name, existence, guid, uidvalidity, subscribed != NOTHING), uid_next


def _separators(deleted: Fields) -> bytes:
    """Return the same line without what was deleted."""
    kept = ("hierarchy_sep", "escape_char")
    return encode(b"D", {name: value for name, value in deleted.items() if name in kept})


def _digest(node: Node) -> bytes:
    return hashlib.blake2b(repr(node).encode(), digest_size=DIGEST).digest()


def _tree(nodes: list[Node]) -> bytes:
    return b"".join(sorted(map(_digest, nodes)))


def _has(tree: bytes, node: Node) -> bool:
    """Return whether this node is one of those of ``tree``."""
    digest = _digest(node)
    return any(tree[at : at + DIGEST] == digest for at in range(0, len(tree), DIGEST))


class Foretelling:
    """One sync.

    :param hello: what the shadow's dsync says first, b"" if that is not known or shall be heard.
    :param tree: of the last sync that showed the same mailboxes on both nodes, see ``tree``.
    :param logged: called with each line of the shadow's log (level, text) that dsync here will
        not see.
    :param single: it is of one mailbox; ``feed_local`` raises Whole unless it can be foretold.
    :param guard: ``feed_local`` raises Unsafe rather than let the shadow hear of names by which it
        would take that away.
    """

    def __init__(
        self,
        hello: bytes,
        tree: bytes,
        logged: Logged,
        *,
        single: bool = False,
        guard: Guard = Guard.NOTHING,
    ) -> None:
        if single and not (hello and tree):
            raise Whole
        self.mode = Mode.UNDECIDED if hello else Mode.PLAIN
        self.said = False  # dsync here has said all
        self.changed = False  # and something of a mailbox
        self._hello = hello
        self._rest = hello  # of it, what the shadow has not said yet
        self._confirmed = tree
        self.single = single
        self._guard = guard
        self._names_at: int | None = None  # the names begin there in what is held
        self.begun = False  # the shadow may have changed something
        self._logged = logged
        self._back = bytearray()
        self._held = bytearray()
        self._channels = Channels()
        self._log = Lines()
        self._here, self._there = Lines(), Lines()
        self._learned = bytearray()
        self._settings: Fields = {}
        self._states: dict[bytes, bytes] = {}  # the other fields by GUID
        self._nodes: list[Node] = []
        self._deleted: frozenset[bytes] = frozenset()  # GUIDs
        self._listed = False  # these are all
        self._nodes_there: list[Node] | None = None
        self._uid_next: dict[bytes, bytes] = {}  # by GUID
        self._uid_next_there: dict[bytes, bytes] = {}
        self._separators = b""
        self._boxes: deque[_Box] = deque()
        self.confirmed = False  # the shadow has said all that was foretold
        self._local: Talk | None = self._speak()
        self._remote: Talk | None = self._listen()
        next(self._local)
        next(self._remote)

    # what a later sync can know

    @property
    def hello(self) -> bytes:
        """What the shadow's dsync said first, b"" if it cannot be foretold."""
        return bytes(self._learned)

    @property
    def tree(self) -> bytes:
        """What stands for the user's mailboxes if both nodes have the same, else b""."""
        if self.single:
            return self._confirmed
        if self._nodes_there is None or sorted(self._nodes_there) != sorted(self._nodes):
            return b""
        return _tree(self._nodes)

    @property
    def bare(self) -> bool:
        """Whether a name without a mailbox holds others here, or it is not known whether."""
        return not self._listed or any(guid == NOTHING for _, _, guid, _, _ in self._nodes)

    # bytes

    def greet(self) -> bytes:
        """Return what dsync here is told when it comes."""
        return packet(DATA, self._hello) if self._hello else b""

    def feed_local(self, data: bytes) -> Step:
        """Take what dsync here says; ``back`` is for it, ``on`` for the shadow."""
        if self._local is None and self.mode is Mode.PLAIN and not self._held:
            return Step(b"", data)
        self._held += data
        if self._local is not None:
            try:
                for line in self._here.feed(data):
                    self._local.send(line)
            except StopIteration:
                self._local = None
            except Surprise:
                if self.mode is Mode.FORETOLD:
                    raise
                self._local = None
                self.mode = Mode.PLAIN
        if self.mode is Mode.UNDECIDED and len(self._held) > MAX_UNDECIDED:
            self.mode = Mode.PLAIN
        if self.single and self.mode is Mode.PLAIN:
            raise Whole
        back = packet(DATA, bytes(self._back)) if self._back else b""
        self._back.clear()
        if self.mode is Mode.UNDECIDED or not (
            self.mode is Mode.PLAIN or self.said or len(self._held) >= HOLD
        ):
            return Step(back, b"")
        return Step(back, self._release())

    def _release(self) -> bytes:
        """Return what of all that is held may go on to the shadow."""
        end = len(self._held)
        if self.mode is Mode.PLAIN and self._names_at is not None and not self.begun:
            if self._guard is not Guard.NOTHING and self._names_awaited:
                end, self._names_at = self._names_at, 0
            else:
                self._check()
                self.begun = True
        else:
            self.begun |= self.mode is Mode.FORETOLD or self._local is None
        on = bytes(self._held[:end])
        del self._held[:end]
        return on

    @property
    def _names_awaited(self) -> bool:
        """Whether the names of both nodes will be known; before, dsync here says no more than them.

        What is not understood is not waited for.
        """
        if not self._listed:
            return self._local is not None
        return self._nodes_there is None and self._remote is not None

    def _check(self) -> None:
        """Compare the names of both nodes as the guard wants it."""
        if self._guard is Guard.NOTHING or not self._listed or self._nodes_there is None:
            return
        here = {guid: (name, validity) for name, _, guid, validity, _ in self._nodes}
        missing = set()
        for name, existence, guid, validity, _ in self._nodes_there:
            if guid == NOTHING or existence != b"y":
                continue
            if guid not in here:
                # One that never had a message is dsync's own, see ``parents``.
                if guid not in self._deleted and _uid(self._uid_next_there[guid]) > 1:
                    missing.add(guid)
                continue
            mine, validity_here = here[guid]
            if name == b"INBOX" and mine != b"INBOX":
                raise Unsafe("INBOX was renamed")
            # By these dsync takes it for another mailbox, and removes the shadow's.
            there = _uid(self._uid_next_there[guid])
            if (
                self._guard is Guard.ALL
                and there > 1
                and (validity != validity_here or there > _uid(self._uid_next[guid]))
            ):
                raise Unsafe(f"{mine.decode(errors='replace')} was made anew")
        if missing and self._guard is Guard.ALL:
            raise Unsafe(f"{len(missing)} mailboxes are not in the list", frozenset(missing))

    @property
    def waits(self) -> bool:
        """Whether only the shadow knows how the sync ends, and has not said it yet."""
        return self.said and not self.confirmed

    def feed_remote(self, data: bytes) -> bytes:
        """Take what the shadow says; return what dsync here has to hear of it."""
        heard = not self._hello  # then dsync here hears all as it is
        if heard and self._remote is None:
            return data
        on = bytearray()
        for channel, piece in self._channels.feed(data):
            if channel == LOG:
                if self.mode is Mode.PLAIN:
                    on += packet(channel, piece)
                else:
                    self._note(piece)
            elif channel == DATA:
                new = self._greeted(piece)
                if self.mode is Mode.PLAIN and new:
                    on += packet(channel, new)
                self._follow(piece)
            elif self.mode is not Mode.PLAIN:
                raise Surprise(f"the shadow speaks on channel {channel}")
            else:
                on += packet(channel, piece)
        return data if heard else bytes(on)

    def end_remote(self) -> None:
        """The shadow has ended; Surprise if it has not said all that was foretold."""
        if self._rest or (self.mode is not Mode.PLAIN and not self.confirmed):
            raise Surprise("the shadow broke off")
        whole = self._channels.whole and self._log.whole and self._there.whole
        if self.mode is not Mode.PLAIN and not whole:
            raise Surprise("the shadow broke off within a line")

    def _greeted(self, piece: bytes) -> bytes:
        """Compare with the hello that was foretold; return what comes after it."""
        same = piece[: len(self._rest)]
        if not self._rest.startswith(same):
            raise Surprise(f"another hello: {piece[:80]!r}")
        self._rest = self._rest[len(same) :]
        return piece[len(same) :]

    def _follow(self, piece: bytes) -> None:
        if self._remote is None:
            return
        try:
            for line in self._there.feed(piece):
                self._remote.send(line)
        except StopIteration:
            self._remote = None
        except Surprise:
            if self.mode is Mode.FORETOLD:
                raise
            self._remote = None

    def _note(self, piece: bytes) -> None:
        for line in self._log.feed(piece):
            level = LEVELS.get(line[0], logging.ERROR) if line else logging.DEBUG
            text = line[1:].decode(errors="replace")
            if text:
                self._logged(level, text)
            if level >= logging.ERROR:
                harmful = EXPUNGED not in text
                raise Surprise(f"the shadow's log: {text[:200]}", harmful=harmful)

    # what dsync here says, line by line

    def _speak(self) -> Talk:
        for expected in GREETING:
            if (yield) != expected:
                raise Surprise("dsync here speaks another protocol")
        self._settings = yield from _record(b"H")
        while self._settings.get("sync_type") == b"s" and (line := (yield)) != END:
            guid, _, rest = _is(b"S", line)[1:].partition(b"\t")
            self._states[guid] = rest
        self._names_at = len(self._held) - self._here.left
        names = bytearray()
        while (line := (yield)) != END:
            node, self._uid_next[node[2]] = _node(line)
            self._nodes.append(node)
            names += line + b"\n"
        deleted = yield from _record(b"D")
        self._deleted = frozenset(deleted.get("mailboxes", b"").split(b" ")[::2])
        self._listed = True
        if self.mode is not Mode.UNDECIDED:
            return
        if not self._foretellable():
            self.mode = Mode.PLAIN
            return
        self.mode = Mode.FORETOLD
        self._separators = _separators(deleted)
        self._back += names + b".\n" + self._separators
        while (line := (yield)) != END:
            yield from self._speak_of(_of(b"B", line))
        self._back += b"F\n"
        self.said = True
        yield  # nothing may follow
        raise Surprise("dsync here says more than was to come")

    def _foretellable(self) -> bool:
        """Whether the rest can be foretold: only messages may have changed since the state."""
        settings = self._settings
        if (
            settings.get("sync_type") != b"s"
            or not {"backup_recv", "send_mail_requests"} <= settings.keys()
            or not _PLAIN_SETTINGS.isdisjoint(settings)
            or self.single != ("sync_box" in settings)
            or not self._confirmed
            or not self._known()
        ):
            return False
        return all(map(self._lasts, self._nodes))

    def _known(self) -> bool:
        """Whether these are the mailboxes that both nodes had, or the single one is one of them."""
        if not self.single:
            return _tree(self._nodes) == self._confirmed
        # The names above it in the hierarchy come without their mailboxes.
        found = [node for node in self._nodes if node[1] != b"n"]
        return len(found) == 1 and found[0][2] != NOTHING and _has(self._confirmed, found[0])

    def _lasts(self, node: Node) -> bool:
        """Whether this is a mailbox that the state tells of, or a name that only holds others."""
        _, existence, guid, uidvalidity, _ = node
        if guid == NOTHING:
            return existence in (b"y", b"n")
        return existence == b"y" and self._states.get(guid, b"").startswith(uidvalidity + b"\t")

    def _speak_of(self, counters: Fields) -> Talk:
        guid = counters.get("mailbox_guid", b"")
        if guid not in self._states:
            raise Surprise("a mailbox that the state does not tell of")
        state = fields(b"S" + guid + b"\t" + self._states[guid])
        if counters.get("uid_validity") != state.get("last_uidvalidity"):
            raise Surprise("a mailbox with another UIDVALIDITY than the state tells of")
        if not {"have_guids", "have_save_guids"} <= counters.keys():
            raise Surprise("a mailbox whose messages have no GUIDs")
        # The fields of the cache are left out: this node does not take the shadow's.
        box = _Box({name: counters[name] for name in _LASTING if name in counters})
        box.counters |= {
            "uid_next": b"%d" % (_number(state, "last_common_uid") + 1),
            "messages_count": state.get("last_messages_count", b"0"),
            "highest_modseq": state.get("last_common_modseq", b""),
            "highest_pvt_modseq": state.get("last_common_pvt_modseq", b""),
        }
        self._boxes.append(box)
        self.changed = True
        self._back += encode(b"B", box.counters)
        while (line := (yield)) != END:
            self._content(_of(b"A", line))
        while (line := (yield)) != END:
            change = _of(b"C", line)
            if change.get("type", b"")[:1] != b"s":
                continue
            if not (message := change.get("guid")):
                raise Surprise("a message without a GUID")
            box.requested.setdefault(message, change.get("uid", b""))
        box.told = True
        for message, uid in box.requested.items():
            self._back += encode(b"R", {"guid": message, "uid": uid})
        self._back += b".\n"
        while (line := (yield)) != END:
            record = _of(b"M", line)
            box.expunged |= "stream" not in record
            self._content(record)
        box.contents = True
        box.state = yield from _record(b"S")
        box.compare()
        self._back += encode(b"S", box.state)

    def _content(self, record: Fields) -> None:
        if "stream" in record:
            self._here.skip_content()

    # what the shadow says, line by line

    def _listen(self) -> Talk:
        learned = bytearray()
        for expected in (b"", b"+", *GREETING):
            line = yield
            if line != expected:
                raise Surprise(f"another hello: {line[:80]!r}")
            learned += line + b"\n"
        line = _is(b"H", (yield))
        fields(line)
        self._learned = learned + line + b"\n"
        nodes = []
        while (line := (yield)) != END:
            node, self._uid_next_there[node[2]] = _node(line)
            nodes.append(node)
        deleted = yield from _record(b"D")
        self._nodes_there = nodes
        if self.mode is not Mode.FORETOLD:
            return
        if sorted(nodes) != sorted(self._nodes):
            raise Surprise("the shadow has other mailboxes")
        if _separators(deleted) != self._separators:
            raise Surprise("the shadow separates names by another character")
        while (line := (yield))[:1] != b"F":
            if not self._boxes:
                raise Surprise(f"the shadow says what it was not asked: {line[:80]!r}")
            yield from self._listen_of(self._boxes.popleft(), _of(b"B", line))
        if fields(line) or self._boxes or not self.said:
            raise Surprise(f"the shadow ends with {line[:200]!r}")
        self.confirmed = True
        if (yield) != b"X":
            raise Surprise("the shadow says more after its end")
        yield
        raise Surprise("the shadow says more after its end")

    def _listen_of(self, box: _Box, counters: Fields) -> Talk:
        # dsync's receiving side counts on by itself as it takes changes.
        if _number(counters, "highest_modseq") < _number(box.counters, "highest_modseq"):
            raise Surprise(
                "an older mailbox than the state tells of: " + _differences(counters, {})
            )
        if unlike := _differences(counters, box.counters):
            raise Surprise(f"another mailbox than the state tells of: {unlike}")
        line = yield
        if not box.told:
            raise Surprise(f"the shadow does not wait for all changes: {line[:80]!r}")
        left = box.requested
        while line != END:
            request = _of(b"R", line)
            if request.get("uid") != left.pop(request.get("guid", b""), None):
                raise Surprise(f"another request: {line[:80]!r}")
            line = yield
        if left:
            raise Surprise("the shadow does not ask for all new messages")
        line = yield
        if not box.contents:
            raise Surprise(f"the shadow does not wait for all messages: {line[:80]!r}")
        box.state_there = _of(b"S", line)
        box.compare()


# Settings of a sync that leave something out, or have it otherwise than ``Doveadm.sync`` asks.
_PLAIN_SETTINGS = frozenset(
    {
        "sync_ns_prefix", "sync_box_guid", "exclude_mailboxes", "backup_send",
        "no_mail_sync", "no_backup_overwrite", "purge_remote", "sync_since_timestamp",
        "sync_max_size", "sync_flags", "sync_until_timestamp", "virtual_all_box",
        "empty_hdr_workaround",
    }
)  # fmt: skip
# What of a mailbox's counters does not change with its messages.
_LASTING = (
    "mailbox_guid", "uid_validity", "first_recent_uid", "have_guids", "have_save_guids",
    "have_only_guid128",
)  # fmt: skip

# Counters that each node has for itself.
_OWN = frozenset({"first_recent_uid", "highest_modseq", "cache_fields"})


def _differences(there: Fields, here: Fields) -> str:
    """Return what differs, "" if nothing does: for people."""
    names = (there.keys() | here.keys()) - _OWN
    return ", ".join(
        f"{name} {there.get(name)!r}, not {here.get(name)!r}"
        for name in sorted(names)
        if there.get(name) != here.get(name)
    )


def _record(kind: bytes) -> Generator[None, bytes, Fields]:
    return _of(kind, (yield))


def _is(kind: bytes, line: bytes) -> bytes:
    if line[:1] != kind:
        raise Surprise(f"{line[:80]!r} where {kind.decode()} was to come")
    return line


def _of(kind: bytes, line: bytes) -> Fields:
    return fields(_is(kind, line))


def _uid(value: bytes) -> int:
    return int(value) if value.isdigit() else 0


def _number(record: Fields, name: str) -> int:
    try:
        return int(record[name])
    except (KeyError, ValueError):
        raise Surprise(f"no number {name}: {record}"[:200]) from None
