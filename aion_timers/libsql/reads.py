"""What a transaction has read, kept so that it can be read again and compared."""

from __future__ import annotations

import marshal
from hashlib import sha256
from typing import TYPE_CHECKING, Final

from aion_timers.libsql.errors import SnapshotError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aion_timers.libsql.sql import Parameters, Rows

MAX_REPEATED_ROWS: Final = 1_000
"""How many rows a transaction may have read for its reads to be repeated."""


class Reads:
    """The reads of one transaction: of each the text, the parameters and a digest of its rows."""

    __slots__ = ("_reads", "_rows_left", "unrepeatable")

    def __init__(self) -> None:
        self._reads: list[tuple[str, Parameters, bytes]] = []
        self.forget()

    def __iter__(self) -> Iterator[tuple[str, Parameters, bytes]]:
        return iter(self._reads)

    def remember(self, sql: str, parameters: Parameters, rows: Rows | None) -> None:
        """Keep a read, to run it again."""
        if rows is None or self.unrepeatable:
            return
        self._rows_left -= len(rows) + 1
        if self._rows_left >= 0:
            self._reads.append((sql, parameters, digest(rows)))
        else:
            self.give_up(f"more than {MAX_REPEATED_ROWS} rows had been read")

    def give_up(self, reason: str) -> None:
        """They can't be run again, for this reason."""
        self.unrepeatable = f"its reads can't be compared, since {reason}"
        self._reads.clear()

    def forget(self) -> None:
        """The transaction has ended, or need not be begun again."""
        self._reads.clear()
        self._rows_left = MAX_REPEATED_ROWS
        self.unrepeatable = ""


_SHORT: Final = 64  # bytes: most results of one row, for which the digest would cost more than it saves
CHANGED: Final = "a read that it made gives other rows now"


def digest(rows: Rows) -> bytes:
    """A few bytes that are the same only for the same values of the same types."""
    # version 2 writes equal values alike; later ones also write which objects are shared
    data = marshal.dumps(rows, 2)
    return data if len(data) <= _SHORT else sha256(data).digest()


def stale(reason: str) -> SnapshotError:
    """The error of a transaction that can't become one that is serializable."""
    return SnapshotError(
        f"the transaction can't write, because another connection has committed meanwhile or is about to: {reason};"
        " roll back and run it again, at isolation level IMMEDIATE if that shall not happen twice"
    )
