"""The operations that are drawn at random: what a client does, and what the user has after it.

Each is a function of the test's state and a random generator, and returns a ``Turn`` or None when
it makes no sense now. Everything that is random comes from that generator, so that one number
stands for the whole operation.
"""

from __future__ import annotations

import poplib
import random
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from tests.faults.field import PASSWORD
from tests.model.account import SEPARATOR, Account, Box, Effect, Message, Script, digest
from tests.model.wire import Answer, Broken, Refused, literal, quoted
from tests.model.world import Client, Pop3, Sieve, World

FLAGS = ("\\Seen", "\\Flagged", "\\Answered", "\\Draft", "\\Deleted", "$Label1", "$Forwarded")
# Names as IMAP writes them; the last is modified UTF-7 and needs quotes to be quoted.
NAMES = ("m0", "m1", "m0/c0", "m0/c0/d0", "m1/c1", "with space", '&AMQ-rger "x"')
PLAIN = NAMES[:5]
SYSTEM = ("INBOX", "Drafts", "Sent", "Junk", "Trash")
SCRIPTS = ("s0", "s1", "s2")
FULL = 25
# Sieve scripts are mirrored within this time (seconds), see docs/mirrored.md; so are rights.
SOON = 1.0
# A message arrives within this time on a busy machine.
ARRIVES = 20.0
DATES = ("01-Feb-2003 04:05:06 +0000", "31-Dec-2025 23:59:59 +0000", "29-Feb-2024 12:00:00 +0000")


@dataclass
class Turn:
    """One operation.

    :param act: does it; Refused or Broken if it could not be told that it was done.
    :param effect: what it makes of the account.
    :param half: what it may have made of it if nobody knows how far it got.
    :param bound: how long after its OK the shadow may lack it (seconds).
    :param also: more operations that were made at the same time, each one counted.
    """

    kind: str
    user: str
    act: Callable[[], object]
    effect: Effect
    half: Sequence[Effect] = ()
    bound: float = 0.0
    also: tuple[str, ...] = ()


class State(Protocol):
    """What an operation sees of the test."""

    world: World
    accounts: dict[str, Account]
    able: set[str]

    def mark(self) -> str:
        """A new message's mark."""


Operation = Callable[[State, random.Random], Turn | None]
OPERATIONS: dict[str, Operation] = {}


def operation(name: str) -> Callable[[Operation], Operation]:
    """Register an operation."""

    def register(function: Operation) -> Operation:
        OPERATIONS[name] = function
        return function

    return register


# -- what they are made of


def text(mark: str, chance: random.Random) -> bytes:
    """A small message, with lines that a mail store might stumble over."""
    body = chance.choice(["one line", ".\r\n..\r\nFrom here", "é ü\r\n" * 3, "x" * 3000, ""])
    return (
        f"From: a@example.com\r\nTo: b@example.org\r\nSubject: {mark}\r\nX-Model: {mark}\r\n"
        f"Message-ID: <{mark}@example.com>\r\n\r\n{body}\r\n"
    ).encode()


@dataclass
class Place:
    """A user's session, the user's account, and a mailbox."""

    client: Client
    account: Account
    name: str
    box: Box = field(init=False)

    def __post_init__(self) -> None:
        self.box = self.account.boxes[self.name]

    @property
    def user(self) -> str:
        """Whose it is."""
        return self.client.user


def somewhere(state: State, chance: random.Random, *, filled: bool = False) -> Place | None:
    """Some user's some mailbox; with ``filled`` one that has messages."""
    client = chance.choice(state.world.clients)
    account = state.accounts[client.user]
    names = [name for name, box in sorted(account.boxes.items()) if box.messages or not filled]
    return Place(client, account, chance.choice(names)) if names else None


def some(box: Box, chance: random.Random, most: int = 3) -> list[int]:
    """Some messages' UIDs, at least one."""
    uids = sorted(box.messages)
    return sorted(chance.sample(uids, chance.randint(1, min(most, len(uids)))))


def uid_set(uids: Iterable[int]) -> bytes:
    """As IMAP writes it."""
    return ",".join(map(str, uids)).encode()


def words(flags: Iterable[str]) -> bytes:
    """As IMAP writes it."""
    return b"(" + " ".join(sorted(flags)).encode() + b")"


def expect_uids(answer: Answer, code: str, place: int, wanted: Sequence[int]) -> None:
    """The UIDs that the server told must be those that the model foretold."""
    told: list[int] = []
    found = answer.code(code)
    for part in found[place].split(",") if found else []:
        first, _, last = part.partition(":")
        told += range(int(first), int(last or first) + 1)
    assert told == list(wanted), f"{code} says {told}, the model {list(wanted)}"


def free(account: Account, names: Sequence[str]) -> list[str]:
    """Names that no mailbox has, nor stands above one."""
    return [
        name
        for name in names
        if name not in account.boxes
        and not any(other.startswith(name + SEPARATOR) for other in account.boxes)
    ]


def apart(names: Iterable[str], name: str) -> list[str]:
    """Those that are neither above nor below a name."""
    return [
        other
        for other in names
        if not other.startswith(name + SEPARATOR) and not name.startswith(other + SEPARATOR)
    ]


def leave_all(state: State, user: str, names: Iterable[str]) -> None:
    """Nobody has these mailboxes selected: Dovecot ends the session of who has."""
    for client in state.world.clients:
        if client.user == user and client.selected in set(names):
            client.leave()


# -- messages


@operation("APPEND")
def append(state: State, chance: random.Random) -> Turn | None:
    """APPEND with flags and a date."""
    place = somewhere(state, chance)
    if place is None or len(place.box.messages) >= FULL:
        return None
    message, content = new(state, chance)
    uid = place.box.uidnext

    def act() -> None:
        answer = place.client.run(
            b"APPEND", quoted(place.name.encode()), words(message.flags),
            quoted(str(message.date).encode()), literal(content),
        )  # fmt: skip
        expect_uids(answer, "APPENDUID", 1, [uid])

    return Turn("APPEND", place.user, act, lambda a: a.append(place.name, [message]))


def new(state: State, chance: random.Random) -> tuple[Message, bytes]:
    """A message to append, and its content."""
    mark = state.mark()
    content = text(mark, chance)
    flags = set(chance.sample(FLAGS, chance.randint(0, 2)))
    message = Message(mark, flags, chance.choice(DATES), len(content), digest(content))
    return message, content


@operation("APPEND (MULTIAPPEND)")
def multiappend(state: State, chance: random.Random) -> Turn | None:
    """Several messages by one APPEND: all or none."""
    place = somewhere(state, chance)
    if place is None or "MULTIAPPEND" not in state.able or len(place.box.messages) >= FULL:
        return None
    made = [new(state, chance) for _ in range(chance.randint(2, 4))]
    first = place.box.uidnext

    def act() -> None:
        parts = b" ".join(
            words(message.flags) + b" " + quoted(str(message.date).encode()) + b" "
            + literal(content)
            for message, content in made
        )  # fmt: skip
        answer = place.client.run(b"APPEND", quoted(place.name.encode()), parts)
        expect_uids(answer, "APPENDUID", 1, range(first, first + len(made)))

    return Turn(
        "APPEND (MULTIAPPEND)", place.user, act,
        lambda a: a.append(place.name, [message for message, _ in made]),
    )  # fmt: skip


@operation("APPEND (CATENATE)")
def catenate(state: State, chance: random.Random) -> Turn | None:
    """A message made of a new head and the whole of another message."""
    place = somewhere(state, chance, filled=True)
    if place is None or "CATENATE" not in state.able or place.name not in (*SYSTEM, *PLAIN):
        return None
    if len(place.box.messages) >= FULL:
        return None
    source = chance.choice(sorted(place.box.messages))
    mark = state.mark()
    head = f"Subject: {mark}\r\nX-Model: {mark}\r\nContent-Type: text/plain\r\n\r\n".encode()
    url = f"/{place.name};UIDVALIDITY={place.box.uidvalidity}/;UID={source}".encode()
    message = Message(mark, {"\\Seen"}, DATES[0])
    uid = place.box.uidnext

    def act() -> None:
        answer = place.client.run(
            b"APPEND", quoted(place.name.encode()), b"(\\Seen)", quoted(DATES[0].encode()),
            b"CATENATE (TEXT " + literal(head) + b" URL " + quoted(url) + b")",
        )  # fmt: skip
        expect_uids(answer, "APPENDUID", 1, [uid])

    return Turn("APPEND (CATENATE)", place.user, act, lambda a: a.append(place.name, [message]))


@operation("REPLACE")
def replace(state: State, chance: random.Random) -> Turn | None:
    """UID REPLACE: a new message in place of an old one."""
    place = somewhere(state, chance, filled=True)
    if place is None or "REPLACE" not in state.able:
        return None
    old = chance.choice(sorted(place.box.messages))
    message, content = new(state, chance)

    def act() -> None:
        place.client.open(place.name)
        place.client.run(
            b"UID REPLACE %d" % old, quoted(place.name.encode()), words(message.flags),
            quoted(str(message.date).encode()), literal(content),
        )  # fmt: skip

    def effect(account: Account) -> None:
        account.append(place.name, [message])
        account.remove(place.name, [old])

    return Turn(
        "REPLACE", place.user, act, effect, [lambda a: a.append(place.name, [message])]
    )  # fmt: skip


@operation("STORE")
def store(state: State, chance: random.Random) -> Turn | None:
    """Set, add or remove flags and keywords of some messages."""
    place = somewhere(state, chance, filled=True)
    if place is None:
        return None
    uids = some(place.box, chance)
    flags = set(chance.sample(FLAGS, chance.randint(1, 3)))
    sign = chance.choice(["+", "-", ""])

    def act() -> None:
        place.client.open(place.name)
        place.client.run(b"UID STORE", uid_set(uids), f"{sign}FLAGS.SILENT".encode(), words(flags))

    def effect(account: Account) -> None:
        account.flag(place.name, uids, sign, flags)

    return Turn("STORE", place.user, act, effect)


@operation("FETCH BODY[] (\\Seen)")
def read(state: State, chance: random.Random) -> Turn | None:
    """Reading a message marks it as seen."""
    place = somewhere(state, chance, filled=True)
    if place is None:
        return None
    (uid,) = some(place.box, chance, 1)

    def act() -> None:
        place.client.open(place.name)
        place.client.run(b"UID FETCH %d BODY[]" % uid)

    return Turn(
        "FETCH BODY[] (\\Seen)", place.user, act,
        lambda a: a.flag(place.name, [uid], "+", {"\\Seen"}),
    )  # fmt: skip


def _transfer(state: State, chance: random.Random, verb: str) -> Turn | None:
    place = somewhere(state, chance, filled=True)
    if place is None:
        return None
    others = [name for name, box in sorted(place.account.boxes.items()) if len(box.messages) < FULL]
    if verb == "MOVE":
        others = [name for name in others if name != place.name]
    if not others:
        return None
    target = chance.choice(others)
    uids = some(place.box, chance)
    first = place.account.boxes[target].uidnext

    def act() -> None:
        place.client.open(place.name)
        answer = place.client.run(f"UID {verb}".encode(), uid_set(uids), quoted(target.encode()))
        expect_uids(answer, "COPYUID", 2, range(first, first + len(uids)))

    def copied(account: Account) -> None:
        account.copy(place.name, uids, target)

    def moved(account: Account) -> None:
        copied(account)
        account.remove(place.name, uids)

    if verb == "MOVE":
        # Two transactions: who is interrupted between them has both.
        return Turn(verb, place.user, act, moved, [copied])
    return Turn(verb, place.user, act, copied)


@operation("COPY")
def copy(state: State, chance: random.Random) -> Turn | None:
    """UID COPY."""
    return _transfer(state, chance, "COPY")


@operation("MOVE")
def move(state: State, chance: random.Random) -> Turn | None:
    """UID MOVE."""
    return _transfer(state, chance, "MOVE")


def _removal(
    state: State, chance: random.Random, kind: str, end: Callable[[Client, list[int]], object]
) -> Turn | None:
    """Mark messages as deleted, and have those removed, or all that are so marked."""
    place = somewhere(state, chance, filled=True)
    if place is None:
        return None
    uids = some(place.box, chance)

    def act() -> None:
        place.client.open(place.name)
        place.client.run(b"UID STORE", uid_set(uids), b"+FLAGS.SILENT (\\Deleted)")
        end(place.client, uids)

    def marked(account: Account) -> None:
        account.flag(place.name, uids, "+", {"\\Deleted"})

    def effect(account: Account) -> None:
        marked(account)
        messages = account.boxes[place.name].messages
        gone = [uid for uid, one in messages.items() if "\\Deleted" in one.flags]
        account.remove(place.name, uids if kind == "UID EXPUNGE" else gone)

    return Turn(kind, place.user, act, effect, [marked])


@operation("EXPUNGE")
def expunge(state: State, chance: random.Random) -> Turn | None:
    """STORE and EXPUNGE."""
    return _removal(state, chance, "EXPUNGE", lambda client, uids: client.run(b"EXPUNGE"))


@operation("UID EXPUNGE")
def uid_expunge(state: State, chance: random.Random) -> Turn | None:
    """STORE and UID EXPUNGE."""
    return _removal(
        state, chance, "UID EXPUNGE", lambda client, uids: client.run(b"UID EXPUNGE", uid_set(uids))
    )


@operation("CLOSE")
def close(state: State, chance: random.Random) -> Turn | None:
    """STORE and CLOSE."""

    def end(client: Client, uids: list[int]) -> None:
        client.selected = None
        client.run(b"CLOSE")

    return _removal(state, chance, "CLOSE", end)


@operation("POP3 DELE")
def pop3(state: State, chance: random.Random) -> Turn | None:
    """DELE some messages of the INBOX, QUIT."""
    user = chance.choice(state.world.users)
    box = state.accounts[user].boxes["INBOX"]
    if not box.messages:
        return None
    uids = some(box, chance)
    order = sorted(box.messages)

    def act() -> None:
        try:
            session = Pop3(state.world.dial(995))
            session.user(user)
            session.pass_(PASSWORD)
            for uid in uids:
                session.dele(order.index(uid) + 1)
            session.quit()
        except (OSError, poplib.error_proto) as error:
            raise Broken(str(error)) from None

    return Turn("POP3 DELE", user, act, lambda a: a.remove("INBOX", uids))


# -- mailboxes


@operation("CREATE")
def create(state: State, chance: random.Random) -> Turn | None:
    """CREATE, also of one whose parent is none, or which is the parent of others."""
    client = chance.choice(state.world.clients)
    account = state.accounts[client.user]
    names = [name for name in NAMES if name not in account.boxes]
    if not names:
        return None
    name = chance.choice(names)
    return Turn(
        "CREATE", client.user, lambda: client.run(b"CREATE", quoted(name.encode())),
        lambda a: a.create(name),
    )  # fmt: skip


@operation("RENAME")
def rename(state: State, chance: random.Random) -> Turn | None:
    """RENAME, with all that is below."""
    client = chance.choice(state.world.clients)
    account = state.accounts[client.user]
    olds = sorted(set(NAMES) & account.boxes.keys())
    pairs = [(old, name) for old in olds for name in apart(free(account, NAMES), old)]
    if not pairs:
        return None
    old, name = chance.choice(pairs)

    def act() -> None:
        leave_all(state, client.user, [box for box in account.boxes if box.startswith(old)])
        client.run(b"RENAME", quoted(old.encode()), quoted(name.encode()))

    return Turn("RENAME", client.user, act, lambda a: a.rename(old, name))


@operation("DELETE")
def delete(state: State, chance: random.Random) -> Turn | None:
    """DELETE, also of a full mailbox, also of one that has others below it."""
    client = chance.choice(state.world.clients)
    names = sorted(set(NAMES) & state.accounts[client.user].boxes.keys())
    if not names:
        return None
    name = chance.choice(names)

    def act() -> None:
        leave_all(state, client.user, [name])
        client.run(b"DELETE", quoted(name.encode()))

    return Turn("DELETE", client.user, act, lambda a: a.boxes.pop(name))


def _subscription(state: State, chance: random.Random, verb: str) -> Turn | None:
    client = chance.choice(state.world.clients)
    account = state.accounts[client.user]
    add_it = verb == "SUBSCRIBE"
    # The system's own mailboxes are subscribed by the server's settings, whatever a client says.
    have = account.subscriptions - set(SYSTEM)
    names = account.boxes.keys() - account.subscriptions if add_it else have
    if not names:
        return None
    name = chance.choice(sorted(names))
    return Turn(
        verb, client.user, lambda: client.run(verb.encode(), quoted(name.encode())),
        lambda a: (a.subscriptions.add if add_it else a.subscriptions.remove)(name),
    )  # fmt: skip


@operation("SUBSCRIBE")
def subscribe(state: State, chance: random.Random) -> Turn | None:
    """SUBSCRIBE."""
    return _subscription(state, chance, "SUBSCRIBE")


@operation("UNSUBSCRIBE")
def unsubscribe(state: State, chance: random.Random) -> Turn | None:
    """UNSUBSCRIBE."""
    return _subscription(state, chance, "UNSUBSCRIBE")


@operation("SETACL")
def set_acl(state: State, chance: random.Random) -> Turn | None:
    """Give everybody rights to a mailbox, or take them back."""
    place = somewhere(state, chance)
    if place is None or "ACL" not in state.able:
        return None
    rights = chance.choice(["lr", "lrs", "lrsti"])
    name = quoted(place.name.encode())
    if "anyone" in place.box.rights and chance.random() < 0.4:
        return Turn(
            "DELETEACL", place.user, lambda: place.client.run(b"DELETEACL", name, b"anyone"),
            lambda a: a.boxes[place.name].rights.clear(), bound=SOON,
        )  # fmt: skip
    return Turn(
        "SETACL", place.user, lambda: place.client.run(b"SETACL", name, b"anyone", rights.encode()),
        lambda a: a.boxes[place.name].rights.update(anyone=rights), bound=SOON,
    )  # fmt: skip


@operation("SETMETADATA")
def set_metadata(state: State, chance: random.Random) -> Turn | None:
    """Set or remove an annotation of a mailbox."""
    place = somewhere(state, chance)
    if place is None or "METADATA" not in state.able:
        return None
    key = chance.choice(["/private/comment", "/shared/comment"])
    value = None if key in place.box.notes and chance.random() < 0.4 else state.mark()

    def effect(account: Account) -> None:
        notes = account.boxes[place.name].notes
        if value is None:
            notes.pop(key, None)
        else:
            notes[key] = value

    return Turn(
        "SETMETADATA", place.user,
        lambda: place.client.run(
            b"SETMETADATA", quoted(place.name.encode()),
            b"(" + key.encode() + b" " + (quoted(value.encode()) if value else b"NIL") + b")",
        ),
        effect, bound=SOON,
    )  # fmt: skip


# -- Sieve


def _sieve(user: str, state: State, command: str) -> Callable[[], None]:
    def act() -> None:
        with Sieve(state.world, user) as session:
            session.run(command)

    return act


@operation("PUTSCRIPT")
def put_script(state: State, chance: random.Random) -> Turn | None:
    """Put a script that keeps, files, creates, flags or discards."""
    user = chance.choice(state.world.users)
    name = chance.choice(SCRIPTS)
    does = chance.choice(["keep", "file", "create", "flag", "discard"])
    target = chance.choice(PLAIN)
    script = {
        "keep": "keep;",
        "file": f'require ["fileinto"];\r\nfileinto "{target}";',
        "create": f'require ["fileinto", "mailbox"];\r\nfileinto :create "{target}";',
        "flag": 'require ["imap4flags"];\r\naddflag "\\\\Flagged";',
        "discard": "discard;",
    }[does] + f"\r\n# {state.mark()}\r\n"
    content = script.encode()
    made = Script(digest(content), does, target)
    return Turn(
        "PUTSCRIPT", user,
        _sieve(user, state, f'PUTSCRIPT "{name}" {{{len(content)}+}}\r\n{script}'),
        lambda a: a.scripts.__setitem__(name, made), bound=SOON,
    )  # fmt: skip


@operation("SETACTIVE")
def set_active(state: State, chance: random.Random) -> Turn | None:
    """Make another script the active one, or none."""
    user = chance.choice(state.world.users)
    account = state.accounts[user]
    names = sorted({"", *account.scripts} - {account.active})
    if not names:
        return None
    name = chance.choice(names)
    return Turn(
        "SETACTIVE", user, _sieve(user, state, f'SETACTIVE "{name}"'),
        lambda a: setattr(a, "active", name), bound=SOON,
    )  # fmt: skip


@operation("DELETESCRIPT")
def delete_script(state: State, chance: random.Random) -> Turn | None:
    """Delete a script that is not active."""
    user = chance.choice(state.world.users)
    account = state.accounts[user]
    names = sorted(account.scripts.keys() - {account.active})
    if not names:
        return None
    name = chance.choice(names)
    return Turn(
        "DELETESCRIPT", user, _sieve(user, state, f'DELETESCRIPT "{name}"'),
        lambda a: a.scripts.pop(name), bound=SOON,
    )  # fmt: skip


@operation("RENAMESCRIPT")
def rename_script(state: State, chance: random.Random) -> Turn | None:
    """Rename a script, the active one too."""
    user = chance.choice(state.world.users)
    account = state.accounts[user]
    new_names = sorted(set(SCRIPTS) - account.scripts.keys())
    if not new_names or not account.scripts:
        return None
    old, name = chance.choice(sorted(account.scripts)), chance.choice(new_names)

    def effect(after: Account) -> None:
        after.scripts[name] = after.scripts.pop(old)
        if after.active == old:
            after.active = name

    return Turn(
        "RENAMESCRIPT", user, _sieve(user, state, f'RENAMESCRIPT "{old}" "{name}"'), effect,
        bound=SOON,
    )  # fmt: skip


# -- deliveries


def room(account: Account) -> bool:
    """Whether deliveries still fit."""
    script = account.scripts.get(account.active)
    target = account.boxes.get(script.target) if script and script.does != "keep" else None
    boxes = [account.boxes["INBOX"], *([target] if target else [])]
    return all(len(box.messages) < FULL for box in boxes)


@operation("LMTP delivery")
def lmtp(state: State, chance: random.Random) -> Turn | None:
    """One delivery by LMTP, or a burst to one user; the script decides where it goes."""
    user = chance.choice(state.world.users)
    if not room(state.accounts[user]):
        return None
    marks = [state.mark() for _ in range(chance.choice([1, 1, 1, 4]))]
    contents = [text(mark, chance) for mark in marks]

    def act() -> None:
        answers = state.world.nodes[state.world.primary].ask(
            "lmtp", to=[user] * len(marks), contents=[content.decode() for content in contents]
        )
        wrong = [answer for answer in answers if not answer.startswith("250")]
        if wrong:
            raise (Broken if len(marks) > 1 or "broken" in wrong[0] else Refused)(wrong[0])

    def effect(account: Account) -> None:
        for mark in marks:
            account.deliver(Message(mark))

    def part(number: int) -> Effect:
        def some_came(account: Account) -> None:
            for place, mark in enumerate(marks):
                if number >> place & 1:
                    account.deliver(Message(mark))

        return some_came

    parts = [part(number) for number in range(1, 2 ** len(marks) - 1)]
    others = ("LMTP delivery",) * (len(marks) - 1)
    return Turn("LMTP delivery", user, act, effect, parts, also=others)


@operation("SMTP delivery")
def smtp(state: State, chance: random.Random) -> Turn | None:
    """A message from outside, through Postfix and the milter; nobody is told when it arrives."""
    user = chance.choice(state.world.users)
    if not room(state.accounts[user]) or "SMTP" not in state.able:
        return None
    mark = state.mark()
    content = text(mark, chance)
    return Turn(
        "SMTP delivery", user, lambda: state.world.smtp(user, content),
        lambda a: a.deliver(Message(mark)), bound=ARRIVES,
    )  # fmt: skip


@operation("together")
def together(state: State, chance: random.Random) -> Turn | None:
    """Two clients and a delivery change one user's mail at the same moment."""
    user = chance.choice(state.world.users)
    one, two = (client for client in state.world.clients if client.user == user)
    account = state.accounts[user]
    if not room(account) or not account.boxes["INBOX"].messages:
        return None
    target = chance.choice(["Drafts", "Sent", "Junk"])
    if len(account.boxes[target].messages) >= FULL:
        return None
    message, content = new(state, chance)
    mark = state.mark()
    uids = some(account.boxes["INBOX"], chance)
    delivery = text(mark, chance).decode()

    def append_it() -> None:
        one.run(
            b"APPEND", quoted(target.encode()), words(message.flags),
            quoted(str(message.date).encode()), literal(content),
        )  # fmt: skip

    def store_it() -> None:
        two.open("INBOX")
        two.run(b"UID STORE", uid_set(uids), b"+FLAGS.SILENT", b"(\\Answered $Label1)")

    def deliver_it() -> None:
        (said,) = state.world.nodes[state.world.primary].ask("lmtp", to=[user], contents=[delivery])
        if not said.startswith("250"):
            raise (Broken if "broken" in said else Refused)(said)

    def act() -> None:
        with ThreadPoolExecutor(3) as pool:
            works = [pool.submit(work) for work in (append_it, store_it, deliver_it)]
        failed = [error for work in works if (error := work.exception()) is not None]
        if len(failed) > 1 or (failed and not isinstance(failed[0], Broken)):
            raise Broken(str(failed))
        if failed:
            raise failed[0]

    effects: list[Effect] = [
        lambda a: a.append(target, [message]),
        lambda a: a.flag("INBOX", uids, "+", {"\\Answered", "$Label1"}),
        lambda a: a.deliver(Message(mark)),
    ]

    def subset(number: int) -> Effect:
        def some_done(account: Account) -> None:
            for place, effect in enumerate(effects):
                if number >> place & 1:
                    effect(account)

        return some_done

    parts = [subset(number) for number in range(1, 7)]
    return Turn("APPEND", user, act, subset(7), parts, also=("STORE", "LMTP delivery"))


# -- the administrator


def _doveadm(state: State, *arguments: str, text: str = "") -> Callable[[], None]:
    def act() -> None:
        code, said = state.world.nodes[state.world.primary].ask(
            "doveadm", words=arguments, text=text
        )
        if code:
            raise Refused(f"doveadm {arguments[0]} gave {code}: {said}")

    return act


@operation("doveadm (messages)")
def doveadm_messages(state: State, chance: random.Random) -> Turn | None:
    """Flags, expunge, move, copy and save by an administrator."""
    place = somewhere(state, chance, filled=True)
    if place is None or place.name not in (*SYSTEM, *PLAIN):
        return None
    (uid,) = some(place.box, chance, 1)
    query = ["mailbox", place.name, "uid", str(uid)]
    targets = [
        name
        for name in (*SYSTEM, *PLAIN)
        if name != place.name
        and name in place.account.boxes
        and len(place.account.boxes[name].messages) < FULL
    ]
    verb = chance.choice(["flags", "expunge", "move", "copy", "save"])
    target, user, mark = chance.choice(targets), place.user, state.mark()
    content = text(mark, chance).decode()
    flags = {"\\Answered", "$Label1"}

    def copied(account: Account) -> None:
        account.copy(place.name, [uid], target)

    def moved(account: Account) -> None:
        copied(account)
        account.remove(place.name, [uid])

    words_of: dict[str, list[str]] = {
        "flags": ["flags", "add", "-u", user, " ".join(sorted(flags)), *query],
        "expunge": ["expunge", "-u", user, *query],
        "move": ["move", "-u", user, target, *query],
        "copy": ["copy", "-u", user, target, *query],
        "save": ["save", "-u", user, "-m", target],
    }
    effects: dict[str, Effect] = {
        "flags": lambda a: a.flag(place.name, [uid], "+", flags),
        "expunge": lambda a: a.remove(place.name, [uid]),
        "move": moved,
        "copy": copied,
        "save": lambda a: a.append(target, [Message(mark)]),
    }
    act = _doveadm(state, *words_of[verb], text=content if verb == "save" else "")
    half = [copied] if verb == "move" else []
    return Turn(f"doveadm {verb}", user, act, effects[verb], half)


@operation("doveadm (mailboxes)")
def doveadm_mailboxes(state: State, chance: random.Random) -> Turn | None:
    """Create, rename, delete, subscribe by an administrator."""
    user = chance.choice(state.world.users)
    account = state.accounts[user]
    there = sorted(set(PLAIN) & account.boxes.keys())
    verb = chance.choice(["create", "rename", "delete", "subscribe"])
    names = {
        "create": [name for name in PLAIN if name not in account.boxes],
        "rename": there,
        "delete": there,
        "subscribe": sorted(account.boxes.keys() - account.subscriptions - set(NAMES[5:])),
    }[verb]
    if not names:
        return None
    name = chance.choice(names)
    others = apart(free(account, PLAIN), name)
    if verb == "rename" and not others:
        return None
    other = chance.choice(others) if verb == "rename" else ""
    effects: dict[str, Effect] = {
        "create": lambda a: a.create(name),
        "delete": lambda a: a.boxes.pop(name),
        "subscribe": lambda a: a.subscriptions.add(name),
        "rename": lambda a: a.rename(name, other),
    }
    run = _doveadm(state, "mailbox", verb, "-u", user, name, *([other] if other else []))

    def act() -> None:
        if verb in ("rename", "delete"):
            leave_all(state, user, [box for box in account.boxes if box.startswith(name)])
        run()

    return Turn(f"doveadm mailbox {verb}", user, act, effects[verb])
