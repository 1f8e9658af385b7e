r"""Messages that are expunged while they are copied: Dovecot must not end with one.

The sending dsync answers a request for a message that has just been expunged with the message's
line and no content. The receiving one (2.4.1) cancels that one save; and if it was the last of the
mailbox, sdbox takes the whole transaction for cancelled, after its commit: it removes the files of
all messages that were saved in it, keeps them in the index, and says that all is well. So the copy
had lost acknowledged messages and counted as whole (found by the failover benchmark, by messages
that had other UIDs after the repair).

So such a line goes on only before a content: the next save makes good what the cancelled one did.
One that comes last is left out. dsync then says that a message was not sent, the sync has failed,
and the next one goes by what is there. Where nothing was saved there is nothing to be removed, and
it goes on as it is, unless the sync is a merge, which may also have moved messages.

Pure: bytes in, bytes out. The stream (dsync's protocol 3.5): a line for each kind of item with the
names of its fields, ``.``, then the items; see ``doveadm/dsync/dsync-ibc-stream.c`` of Dovecot.
"""

from __future__ import annotations

from collections.abc import Iterator

MAIL, ATTRIBUTE, SETTINGS, END = b"M", b"A", b"H", b"."
NOTHING = b"\x02"
CONTENT_END = b"\n.\r\n"
"""dsync doubles a dot that follows an LF in a content."""
MAX_LINE = 8 * 1024 * 1024


class Expunged:
    """Takes the stream of one sync; ``left_out`` counts the lines that were left out."""

    def __init__(self) -> None:
        self.left_out = 0
        self._names: dict[bytes, list[bytes]] = {}
        self._buffer = bytearray()
        self._in_content = False
        self._greeted = False
        self._one_way = False
        self._saved = False
        self._held = bytearray()

    def feed(self, data: bytes) -> bytes:
        """Return what goes on of the stream, all of which has come so far.

        ValueError if it is none.
        """
        self._buffer += data
        return b"".join(self._pieces())

    def _pieces(self) -> Iterator[bytes]:
        at = 0
        while True:
            if self._in_content:
                end = self._buffer.find(CONTENT_END, at)
                if end < 0:
                    # What may be the begin of the end stays.
                    cut = max(at, len(self._buffer) - len(CONTENT_END) + 1)
                    yield bytes(self._buffer[at:cut])
                    at = cut
                    break
                yield bytes(self._buffer[at : end + len(CONTENT_END)])
                at = end + len(CONTENT_END)
                self._in_content = False
            end = self._buffer.find(b"\n", at)
            if end < 0:
                break
            line = bytes(self._buffer[at : end + 1])
            at = end + 1
            yield self._line(line)
        del self._buffer[:at]
        if len(self._buffer) > MAX_LINE:
            raise ValueError(f"a line of dsync is over {MAX_LINE} bytes")

    def _line(self, line: bytes) -> bytes:
        """Return what goes on now that this line has come."""
        kind, text = line[:1], line[1:-1]
        if not self._greeted:
            self._greeted = kind == END
            self._names[kind] = text.split(b"\t")
            return line
        if kind == END:
            self.left_out += self._held.count(b"\n")
            self._held.clear()
            self._saved = False
            return line
        if kind == SETTINGS:
            self._one_way = self._has(kind, text, b"backup_send")
            return line
        if kind not in (MAIL, ATTRIBUTE):
            return line
        self._in_content = self._has(kind, text, b"stream")
        if kind == ATTRIBUTE:
            return line
        if not self._in_content and (self._saved or not self._one_way):
            self._held += line
            return b""
        self._saved |= self._in_content
        line = bytes(self._held) + line
        self._held.clear()
        return line

    def _has(self, kind: bytes, text: bytes, name: bytes) -> bool:
        values = text.split(b"\t") if text else []
        names = self._names.get(kind, [])
        return any(
            known == name and value != NOTHING for known, value in zip(names, values, strict=False)
        )
