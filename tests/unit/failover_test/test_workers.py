"""The workers against servers that are played: what they note for each end of a request."""

import dataclasses
import imaplib
import json
import smtplib
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from roles.failover_test.files.failover_client import __main__, connect, imap, pace, reader, smtp
from roles.failover_test.files.failover_client.journal import Journal
from roles.failover_test.files.failover_client.messages import Message
from roles.failover_test.files.failover_client.settings import Settings, Target, User, load

MESSAGE = Message("r-1", "plain", b"X-Failover-Test-Id: r-1\r\n\r\n.dot\r\n")
A, B = Target("mail-a", "192.0.2.10"), Target("mail-b", "198.51.100.10")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    raw = {
        "run": "r",
        "targets": [{"node": "mail-a", "address": "x"}, {"node": "mail-b", "address": "y"}],
        "users": [{"address": "user01@example.org", "password": "p"}],
        "sender": "s@example.com",
        "smtp_port": 25,
        "imap_port": 993,
        "ca_file": "",
        "verify_tls": False,
        "server_name": "",
        "smtp_workers": 4,
        "imap_workers": 4,
        "messages_per_s": 100.0,
        "changes_per_s": 100.0,
        "samples": "",
        "big_message_bytes": 0,
        "min_messages": 0,
        "min_changes": 0,
        "max_s": 5.0,
        "connect_timeout_s": 0.1,
        "reply_timeout_s": 0.1,
    }
    (tmp_path / "settings.json").write_text(json.dumps(raw))
    return load(tmp_path / "settings.json")


@pytest.fixture
def journal(settings: Settings) -> Iterator[Journal]:
    it = Journal(settings.directory / "log.jsonl")
    yield it
    it.close()


def log(settings: Settings) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in (settings.directory / "log.jsonl").read_text().splitlines()
    ]


def stopped(settings: Settings) -> pace.Pace:
    """A pace whose run is over: nothing is tried again."""
    (settings.directory / "stop").touch()
    return pace.Pace(1000.0, pace.Stop(settings.directory / "stop", 5.0, lambda: True))


class Quiet:
    """Stands for a socket on which nothing has come."""

    def settimeout(self, seconds: float) -> None:
        """Do nothing."""


class Session:
    """Plays an SMTP session: gives the answers in turn; an exception among them is raised."""

    def __init__(self, *answers: Any, target: Target = A) -> None:
        self.answers = list(answers)
        self.target = target
        self.sock = Quiet()
        self.sent = 0
        self.said: list[Any] = []

    def docmd(self, verb: str, argument: str) -> tuple[int, bytes]:
        self.said.append(f"{verb} {argument}".strip())
        return self._next()

    def send(self, data: bytes) -> None:
        self.said.append(data)

    def getreply(self) -> tuple[int, bytes]:
        return self._next()

    def rset(self) -> None:
        self.said.append("RSET")

    def close(self) -> None:
        self.said.append("closed")

    def quit(self) -> None:
        self.said.append("QUIT")

    def _next(self) -> tuple[int, bytes]:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer, b"text"


class TestSender:
    @pytest.fixture
    def send(self, settings: Settings, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.setattr(smtp, "spoken", lambda sock: False)

        def start(*sessions: Session | Exception, kept: bool = False) -> dict[str, Any]:
            given = list(sessions)

            def dial(*_: Any) -> Session:
                session = given.pop(0)
                if isinstance(session, Exception):
                    raise session
                return session

            monkeypatch.setattr(smtp, "Smtp", dial)
            sender = smtp.Sender(settings, journal, ssl.create_default_context(), 0)
            if kept:
                sender._session = given.pop(0)  # type: ignore[assignment]
            sender.send(MESSAGE, ["user01@example.org"], stopped(settings))
            return log(settings)[-1]

        return start

    def test_acknowledged(self, send: Any) -> None:
        session = Session(250, 250, 354, 250)
        record = send(session)
        assert (record["outcome"], record["node"]) == ("ok", "mail-a")
        assert session.said[0] == "MAIL FROM:<s@example.com> BODY=8BITMIME"
        assert session.said[-1] == b"X-Failover-Test-Id: r-1\r\n\r\n..dot\r\n.\r\n"

    @pytest.mark.parametrize("answers", [(451,), (250, 450), (250, 250, 451), (250, 250, 354, 451)])
    def test_refused(self, send: Any, answers: tuple[int, ...]) -> None:
        assert send(Session(*answers))["outcome"] == "refused"

    def test_no_answer_to_the_content_is_unknown(self, send: Any) -> None:
        session = Session(250, 250, 354, TimeoutError("timed out"))
        assert send(session)["outcome"] == "unknown"
        assert session.said[-1] == "closed"

    @pytest.mark.parametrize("position", [0, 1, 2])
    def test_lost_before_the_content_was_not_attempted(self, send: Any, position: int) -> None:
        answers = [250, 250, 354][:position]
        record = send(Session(*answers, smtplib.SMTPServerDisconnected("gone")))
        assert (record["outcome"], record["node"]) == ("unreached", None)

    def test_shutting_down_is_not_a_refusal_of_the_message(self, send: Any) -> None:
        assert send(Session(421))["outcome"] == "unreached"

    def test_kept_connection_that_died_is_replaced(self, send: Any) -> None:
        dead = Session(smtplib.SMTPServerDisconnected("gone"))
        record = send(dead, Session(250, 250, 354, 250, target=B), kept=True)
        assert (record["outcome"], record["node"]) == ("ok", "mail-b")

    def test_next_node_when_the_first_takes_no_connection(self, send: Any) -> None:
        refused = ConnectionRefusedError("refused")
        assert send(refused, Session(250, 250, 354, 250))["outcome"] == "ok"

    def test_no_node(self, send: Any) -> None:
        record = send(ConnectionRefusedError("x"), TimeoutError("y"))
        assert record["outcome"] == "unreached"
        assert "mail-b" in record["answer"]


class Mailbox:
    """Plays an IMAP session with mailboxes of messages; can be told to fail at a command."""

    def __init__(self, fail: dict[str, Any] | None = None) -> None:
        self.target = A
        self.sock = None
        self.fail = fail or {}
        self.untagged_responses: dict[str, Any] = {}
        self.codes: dict[str, list[bytes | None]] = {}
        self.names: set[str] = set()
        self.uid_next = 1
        self.commands: list[str] = []

    def _run(self, name: str, codes: dict[str, bytes] | None = None) -> tuple[str, list[Any]]:
        self.commands.append(name)
        failure = self.fail.get(name)
        if isinstance(failure, Exception):
            raise failure
        self.codes = {key: [value] for key, value in (codes or {}).items()}
        return (failure or "OK"), [b"done"]

    def create(self, name: str) -> tuple[str, list[Any]]:
        return self._run("create")

    def delete(self, name: str) -> tuple[str, list[Any]]:
        return self._run("delete")

    def rename(self, old: str, new: str) -> tuple[str, list[Any]]:
        return self._run("rename")

    def select(self, name: str, readonly: bool = False) -> tuple[str, list[Any]]:
        return self._run("select", {"UIDVALIDITY": b"7"})

    def append(self, *_: Any) -> tuple[str, list[Any]]:
        self.uid_next += 1
        return self._run("append", {"APPENDUID": b"7 %d" % self.uid_next})

    def uid(self, verb: str, *_: Any) -> tuple[str, list[Any]]:
        if verb in ("COPY", "MOVE"):
            self.uid_next += 1
            codes = {"COPYUID": b"7 1 %d" % self.uid_next}
        else:
            codes = {"EXPUNGE": b"1"} if verb == "EXPUNGE" else {}
        return self._run(verb.lower(), {} if self.fail.get("empty") == verb.lower() else codes)

    def response(self, code: str) -> tuple[str, list[Any]]:
        return code, self.codes.pop(code, [None])

    def shutdown(self) -> None:
        self.commands.append("shutdown")


class TestChanger:
    @pytest.fixture
    def changer(
        self, settings: Settings, journal: Journal, monkeypatch: pytest.MonkeyPatch
    ) -> imap.Changer:
        monkeypatch.setattr(imap, "spoken", lambda sock: False)
        context = ssl.create_default_context()
        return imap.Changer(settings, journal, context, 0, User("user01@example.org", "p"))

    def work(self, changer: imap.Changer, session: Mailbox, settings: Settings, steps: int) -> None:
        for _ in range(steps):
            changer._session = session  # type: ignore[assignment]
            changer.step(stopped(settings))

    def test_makes_every_kind_of_change(self, changer: imap.Changer, settings: Settings) -> None:
        session = Mailbox()
        self.work(changer, session, settings, 400)
        records = log(settings)
        assert {record["outcome"] for record in records} == {"ok"}
        kinds = {record["kind"] for record in records}
        assert kinds == {
            "create", "select", "append", "store", "copy", "move", "expunge", "rename", "delete",
        }  # fmt: skip
        assert len(changer._flags) <= imap.FULL

    def test_asks_for_nothing_that_is_so_already(
        self, changer: imap.Changer, settings: Settings
    ) -> None:
        self.work(changer, Mailbox(), settings, 400)
        held: dict[str, set[str]] = {}
        for record in log(settings):
            if record["kind"] == "store":
                flags = held.setdefault(record["message"], set())
                assert (record["flag"] in flags) is not record["add"]
                (flags.add if record["add"] else flags.discard)(record["flag"])

    def test_no_answer_is_unknown_and_starts_afresh(
        self, changer: imap.Changer, settings: Settings
    ) -> None:
        session = Mailbox()
        self.work(changer, session, settings, 2)
        session.fail = {"append": imaplib.IMAP4.abort("connection closed")}
        self.work(changer, session, settings, 30)
        records = log(settings)
        place = next(at for at, record in enumerate(records) if record["kind"] == "append")
        assert records[place]["outcome"] == "unknown"
        assert [record["generation"] for record in records[place : place + 2]] == ["0-0", "0-1"]
        assert "shutdown" in session.commands

    def test_a_node_that_takes_no_connection_is_tried_again_before_the_next_turn(
        self, changer: imap.Changer, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answers = iter([(None, "refused"), (None, "refused"), (Mailbox(), "")])
        monkeypatch.setattr(changer._nodes, "connect", lambda attempt: next(answers))
        changer.step(pace.Pace(1000.0, pace.Stop(settings.directory / "stop", 5.0, lambda: True)))
        kinds = [(record["kind"], record["outcome"]) for record in log(settings)]
        assert kinds == [("connect", "unreached")] * 2 + [("create", "ok")]

    def test_a_change_that_broke_off_is_followed_by_another_at_once(
        self, changer: imap.Changer, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        changer._session = Mailbox({"create": imaplib.IMAP4.abort("reset")})  # type: ignore[assignment]
        monkeypatch.setattr(changer._nodes, "connect", lambda attempt: (Mailbox(), ""))
        changer.step(pace.Pace(1000.0, pace.Stop(settings.directory / "stop", 5.0, lambda: True)))
        assert [record["outcome"] for record in log(settings)] == ["unknown", "ok"]

    def test_a_run_that_is_over_ends_it(
        self, changer: imap.Changer, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(changer._nodes, "connect", lambda attempt: (None, "refused"))
        changer.step(stopped(settings))
        assert [record["kind"] for record in log(settings)] == ["connect"]

    def test_refusal_is_noted_and_work_goes_on(
        self, changer: imap.Changer, settings: Settings
    ) -> None:
        session = Mailbox()
        self.work(changer, session, settings, 2)
        session.fail = {"append": "NO"}
        self.work(changer, session, settings, 30)
        appends = [record for record in log(settings) if record["kind"] == "append"]
        assert len(appends) > 1
        assert {(item["outcome"], item["generation"]) for item in appends} == {("refused", "0-0")}
        assert changer._flags == {}

    def test_created_although_it_exists_is_unknown(
        self, changer: imap.Changer, settings: Settings
    ) -> None:
        session = Mailbox()
        session.fail = {"create": imap.Refused("NO [ALREADYEXISTS] Mailbox already exists")}
        self.work(changer, session, settings, 2)
        records = log(settings)
        assert {record["outcome"] for record in records} == {"unknown"}
        assert [record["generation"] for record in records] == ["0-0", "0-1"]

    @pytest.mark.parametrize("verb", ["copy", "move", "expunge"])
    def test_ok_without_effect_is_no_acknowledgement(
        self, changer: imap.Changer, settings: Settings, verb: str
    ) -> None:
        session = Mailbox({"empty": verb})
        self.work(changer, session, settings, 400)
        found = [record for record in log(settings) if record["kind"] == verb]
        assert found
        assert {record["outcome"] for record in found} == {"refused"}

    def test_mailbox_that_is_gone_is_noted(self, changer: imap.Changer, settings: Settings) -> None:
        session = Mailbox({"select": "NO"})
        self.work(changer, session, settings, 3)
        records = log(settings)
        assert ("select", "refused") in {(item["kind"], item["outcome"]) for item in records}
        assert records[-1]["generation"] == "0-1"


class TestNodes:
    def test_last_good_node_is_tried_first(self) -> None:
        nodes = connect.Nodes((A, B))
        tried: list[str] = []

        def attempt(target: Target) -> str:
            tried.append(target.node)
            if target is A:
                raise ConnectionRefusedError("refused")
            return target.node

        assert nodes.connect(attempt) == ("mail-b", "")
        assert nodes.connect(attempt) == ("mail-b", "")
        assert tried == ["mail-a", "mail-b", "mail-b"]

    def test_no_node_tells_why(self) -> None:
        def attempt(target: Target) -> str:
            raise TimeoutError("timed out")

        assert connect.Nodes((A, B)).connect(attempt) == (None, "mail-b: timed out")

    def test_spoken(self) -> None:
        one, other = socket.socketpair()
        with one, other:
            assert not connect.spoken(one)
            other.sendall(b"* BYE\r\n")
            assert connect.spoken(one)
        assert connect.spoken(one)
        assert connect.spoken(None)

    def test_spoken_when_the_other_side_has_closed(self) -> None:
        one, other = socket.socketpair()
        with one:
            other.close()
            assert connect.spoken(one)


class TestRun:
    def test_a_worker_that_dies_ends_the_run_with_its_error(
        self, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def steady(*common: Any) -> None:
            while not common[3]():
                time.sleep(0.01)

        def dies(*_: Any) -> None:
            raise TypeError("unsupported operand")

        monkeypatch.setattr(__main__, "send_steadily", steady)
        monkeypatch.setattr(__main__, "change_steadily", dies)
        began = time.monotonic()
        with pytest.raises(TypeError, match="unsupported operand"):
            __main__.run(settings)
        assert time.monotonic() - began < settings.max_s / 2
        assert [record["type"] for record in log(settings)] == ["begin"]

    @pytest.mark.parametrize("told", [False, True])
    def test_a_load_whose_time_is_up_has_no_end(
        self, settings: Settings, monkeypatch: pytest.MonkeyPatch, told: bool
    ) -> None:
        def steady(*common: Any) -> None:
            while not common[3]():
                time.sleep(0.01)

        monkeypatch.setattr(__main__, "send_steadily", steady)
        monkeypatch.setattr(__main__, "change_steadily", steady)
        if told:
            (settings.directory / "stop").touch()
        __main__.run(dataclasses.replace(settings, max_s=0.1))
        assert [record["type"] for record in log(settings)] == ["begin", "end"][: 1 + told]


class TestPace:
    def test_stops_at_the_file(self, tmp_path: Path) -> None:
        it = pace.Pace(1000.0, pace.Stop(tmp_path / "stop", 5.0, lambda: True))
        assert it.wait()
        (tmp_path / "stop").touch()
        assert not it.wait()
        assert not it.pause()

    def test_goes_on_until_it_has_enough(self, tmp_path: Path) -> None:
        (tmp_path / "stop").touch()
        enough = [False]
        it = pace.Pace(1000.0, pace.Stop(tmp_path / "stop", 5.0, lambda: enough[0]))
        assert it.wait()
        enough[0] = True
        assert not it.wait()

    def test_journal_counts_what_was_acknowledged(self, journal: Journal) -> None:
        for kind in ("send", "append", "move", "select"):
            for outcome in ("ok", "refused", "unknown"):
                journal.write({"kind": kind, "outcome": outcome})
        assert (journal.messages, journal.changes) == (1, 2)

    def test_stops_by_itself(self, tmp_path: Path) -> None:
        assert not pace.Pace(1000.0, pace.Stop(tmp_path / "stop", 0.0, lambda: False)).wait()

    def test_missed_turns_are_not_caught_up_with(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = [0.0]
        slept: list[float] = []

        def sleep(seconds: float) -> None:
            slept.append(seconds)
            now[0] += seconds

        monkeypatch.setattr("time.monotonic", lambda: now[0])
        monkeypatch.setattr("time.sleep", sleep)
        it = pace.Pace(10.0, pace.Stop(tmp_path / "stop", 1000.0, lambda: True))
        it.wait()
        now[0] += 50.0
        slept.clear()
        for _ in range(4):
            it.wait()
        assert len(slept) == 3, "one turn at once, then the usual rate"
        assert slept[1:] == pytest.approx([0.1, 0.1])


class TestReader:
    class Server:
        """Plays the answers of an IMAP server."""

        def __init__(self, fetched: list[Any]) -> None:
            self.fetched = fetched

        def list(self, *_: Any) -> tuple[str, Any]:
            return "OK", [
                b'(\\HasNoChildren) "." failover-test-r-0-0-b',
                b'(\\HasNoChildren) "." "failover-test-r-0-0-a"',
                b'(\\Noselect) "." failover-test-r-x',
                None,
            ]

        def select(self, *_: Any, **__: Any) -> tuple[str, Any]:
            return "OK", [b"1"]

        def response(self, _code: str) -> tuple[str, Any]:
            return "UIDVALIDITY", [b"77"]

        def uid(self, verb: str, *_: Any) -> tuple[str, Any]:
            return ("OK", [b"5"]) if verb == "SEARCH" else ("OK", self.fetched)

    RAW = b"Received: x\r\nX-Failover-Test-Id: r-1\r\n\r\nbody\r\n"

    def test_mailboxes(self) -> None:
        names = reader.mailboxes(self.Server([]), "failover-test-r-")  # type: ignore[arg-type]
        assert names == ["INBOX", "failover-test-r-0-0-a", "failover-test-r-0-0-b"]

    @pytest.mark.parametrize(
        "fetched",
        [
            [(b"1 (UID 5 FLAGS (\\Seen \\Recent) BODY[] {50}", RAW), b")"],
            [(b"1 (UID 5 BODY[] {50}", RAW), b" FLAGS (\\Seen))"],
        ],
    )
    def test_user(self, fetched: list[Any]) -> None:
        found = reader.read_user(self.Server(fetched), "r", "failover-test-r-")  # type: ignore[arg-type]
        message = found["INBOX"]["messages"][0]
        assert found["INBOX"]["uidvalidity"] == 77
        assert (message["uid"], message["id"], message["flags"]) == (5, "r-1", ["\\Seen"])

    def test_message_that_does_not_come_is_an_error(self) -> None:
        with pytest.raises(reader.ReadError, match="asked for 1 messages and got 0"):
            reader.read_user(self.Server([None]), "r", "failover-test-r-")  # type: ignore[arg-type]

    def test_half_an_answer_is_an_error(self) -> None:
        with pytest.raises(reader.ReadError, match="cannot read"):
            reader.read_user(self.Server([(b"1 (UID 5 BODY[] {1}", b"x"), b")"]), "r", "")  # type: ignore[arg-type]
