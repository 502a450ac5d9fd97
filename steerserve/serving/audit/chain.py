"""One line of the log, and what ties it to the line before.

A line is canonical JSON with its fields in this order:

    {"seq":7,"prev":"<hash>","key":"<id>","body":{...},"mac":"<hex>"}

``prev`` is the SHA-256 of the line before, its line feed left out; 64 zeros before the first. ``mac`` is HMAC-SHA256
over all bytes of the line before ``,"mac":``, so that a verifier in any language can cut the line and needs to print
no number. Canonical JSON: the keys of ``body`` sorted by code point, no white space, ASCII with ``\\u`` escapes,
integers and shortest round-trip decimals, no NaN or infinity.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from dataclasses import dataclass
from typing import Any

from steerserve.serving.audit.keys import AuditKey

GENESIS = "0" * 64
"""What the first line has for the hash of the one before."""

_MAC_FIELD = b',"mac":"'
_TAIL_BYTES = len(_MAC_FIELD) + 64 + len(b'"}')


class BrokenLineError(ValueError):
    """The bytes are no line of a log."""


@dataclass(frozen=True)
class Line:
    """What a line says; nothing of it is checked but its form."""

    seq: int
    prev: str
    key_id: str
    body: dict[str, Any]
    mac: str
    data: bytes

    @property
    def hash(self) -> str:
        """What the next line must have for ``prev``."""
        return line_hash(self.data)

    def is_authentic(self, key: AuditKey) -> bool:
        """The MAC was made with ``key``, over just this."""
        return hmac.compare_digest(key.mac(self.data[:-_TAIL_BYTES]), self.mac)


def canonical(value: object, sort_keys: bool = True) -> bytes:
    """The one serialisation.

    Raises:
        ValueError: a number is not finite.
    """
    return json.dumps(value, sort_keys=sort_keys, separators=(",", ":"), allow_nan=False).encode()


def line_hash(data: bytes) -> str:
    """SHA-256 of a line without its line feed, in hex."""
    return hashlib.sha256(data).hexdigest()


def seal(seq: int, prev: str, body: dict[str, Any], key: AuditKey) -> bytes:
    """The line that carries ``body``, without its line feed."""
    head = canonical({"seq": seq, "prev": prev, "key": key.id}, sort_keys=False)[:-1]
    content = head + b',"body":' + canonical(body)
    return content + _MAC_FIELD + key.mac(content).encode() + b'"}'


def parse(data: bytes) -> Line:
    """Read a line without its line feed; only the exact bytes that ``seal`` writes are one.

    Raises:
        BrokenLineError: they are not.
    """
    try:
        fields = json.loads(data)
        line = Line(fields["seq"], fields["prev"], fields["key"], fields["body"], fields["mac"], data)
        content = {"seq": line.seq, "prev": line.prev, "key": line.key_id}
        written = canonical(content, sort_keys=False)[:-1] + b',"body":' + canonical(line.body)
        written += _MAC_FIELD + line.mac.encode() + b'"}'
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BrokenLineError("not JSON with the fields of a line") from error
    if written != data or type(line.seq) is not int or not isinstance(line.body, dict) or len(line.mac) != 64:
        raise BrokenLineError("not in canonical form")
    return line
