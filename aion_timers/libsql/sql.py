"""What a statement is, from its text alone: pure, and cached by the text.

SQLite tells neither the driver nor us whether a statement writes before it is run, so the first keyword decides.
"""

import re
from dataclasses import dataclass
from enum import Enum, auto
from functools import lru_cache
from typing import Final, TypeAlias

from aion_timers.libsql.errors import DataError, NotSupportedError, OperationalError, ProgrammingError

Value: TypeAlias = int | float | str | bytes | None
Parameters: TypeAlias = tuple[Value, ...]
Row: TypeAlias = tuple[Value, ...]
Rows: TypeAlias = list[Row]

# the driver binds integers beyond these as floating point numbers
INT32_MIN: Final = -(2**31)
INT32_MAX: Final = 2**31 - 1
# SQLite stores none beyond these
INT64_MIN: Final = -(2**63)
INT64_MAX: Final = 2**63 - 1

# names that a transaction must know: a PRAGMA that SQLite ignores in one, one that ends with it, one that would make
# SQLite wait, and a statement
FOREIGN_KEYS: Final = "foreign_keys"
DEFER_FOREIGN_KEYS: Final = "defer_foreign_keys"
BUSY_TIMEOUT: Final = "busy_timeout"
ATTACH: Final = "attach"


class Kind(Enum):
    """What a statement does to a transaction."""

    READ = auto()
    WRITE = auto()
    INSPECT = auto()
    """A PRAGMA that only looks: it begins no transaction, and can be repeated."""
    CONFIGURE = auto()
    """PRAGMA that sets something, ATTACH, DETACH, VACUUM: begins no transaction, and can't be repeated."""
    BEGIN = auto()
    COMMIT = auto()
    ROLLBACK = auto()
    SAVEPOINT = auto()
    RELEASE = auto()
    ROLLBACK_TO = auto()


@dataclass(frozen=True, slots=True)
class Table:
    """A table as a statement names it."""

    schema: str
    """Empty if the statement names none."""
    name: str


@dataclass(frozen=True, slots=True)
class Statement:
    """A parsed statement."""

    sql: str
    kind: Kind
    pieces: tuple[str, ...]
    """The text between the ``?`` marks: one more than there are marks."""
    parameter_count: int
    changes_rows: bool
    """INSERT, UPDATE, DELETE or REPLACE, also behind WITH."""
    name: str = ""
    """Of the savepoint, the PRAGMA or another statement that configures, in lower case; of BEGIN its mode."""
    drops: Table | None = None
    """The table of a DROP TABLE."""

    @property
    def begins_deferred(self) -> bool:
        """Whether it is a BEGIN that leaves it to the first statement which lock is taken."""
        return self.kind is Kind.BEGIN and self.name in ("", "transaction", "deferred")

    def inlined(self, parameters: Parameters) -> tuple[str, Parameters]:
        """The text and parameters with wide integers written into the text: a sign and digits, nothing to inject."""
        text: list[str] = []
        narrow: list[Value] = []
        for piece, value in zip(self.pieces, parameters, strict=False):
            text.append(piece)
            if type(value) is int and not INT32_MIN <= value <= INT32_MAX:
                text.append(f"({value})")
            else:
                text.append("?")
                narrow.append(value)
        text.append(self.pieces[-1])
        return "".join(text), tuple(narrow)


def bindable(value: object) -> Value:
    """The value as a type that the driver binds without loss.

    Raises:
        DataError: text that SQLite would cut or can't encode, or an integer of more than 64 bits.
        ProgrammingError: a type that SQLite doesn't know.
    """
    match value:
        case None | float() | bytes():
            return value
        case str():
            if "\0" in value:
                raise DataError("text with a NUL character can't be stored: SQLite would cut it there; store bytes")
            text = str.__str__(value)
            try:
                text.encode()
            except UnicodeEncodeError:
                raise DataError("text with a lone surrogate can't be stored: it has no UTF-8 form") from None
            return text
        case int():
            if not INT64_MIN <= value <= INT64_MAX:
                raise DataError("an integer of more than 64 bits can't be stored: use text or a float")
            return int(value)
        case bytearray() | memoryview():
            return bytes(value)
    raise ProgrammingError(
        f"a parameter of type {type(value).__name__} can't be stored: convert it to int, float, str, bytes or None"
    )


_TOKEN = re.compile(
    r"""
      '(?:[^']|'')*' | --[^\n]* | /\*.*?(?:\*/|\Z) | \d[\w.]*
    | (?P<quoted>"(?:[^"]|"")*" | `(?:[^`]|``)*` | \[[^\]]*\])
    | (?P<word>[^\W\d][\w$]*)
    | (?P<parameter>\?\d* | [:@$]\w+)
    | (?P<parenthesis>[()])
    | (?P<end>;)
    """,
    re.VERBOSE | re.DOTALL,
)
_NOTHING = re.compile(r"(?:[\s;\ufeff]|--[^\n]*(?:\n|\Z)|/\*.*?(?:\*/|\Z))*", re.DOTALL)

_CHANGES_ROWS = frozenset(("INSERT", "UPDATE", "DELETE", "REPLACE"))
_MAIN_VERBS = _CHANGES_ROWS | {"SELECT", "VALUES"}
_KINDS = {
    "SELECT": Kind.READ,
    "VALUES": Kind.READ,
    "EXPLAIN": Kind.READ,
    "ATTACH": Kind.CONFIGURE,
    "DETACH": Kind.CONFIGURE,
    "VACUUM": Kind.CONFIGURE,
    "BEGIN": Kind.BEGIN,
    "COMMIT": Kind.COMMIT,
    "END": Kind.COMMIT,
    "ROLLBACK": Kind.ROLLBACK,
    "SAVEPOINT": Kind.SAVEPOINT,
    "RELEASE": Kind.RELEASE,
}

_BLANK = r"(?:\s|--[^\n]*\n|/\*.*?\*/)"
_NAME = r"""(?:\w+|"(?:[^"]|"")*"|`(?:[^`]|``)*`|\[[^\]]*\]|'(?:[^']|'')*')"""
_PRAGMA = re.compile(
    rf"PRAGMA{_BLANK}+(?:{_NAME}{_BLANK}*\.{_BLANK}*)?(?P<name>{_NAME}){_BLANK}*(?P<argument>[=(]?)",
    re.IGNORECASE | re.DOTALL,
)
# these take an argument and yet only look
_LOOKS = frozenset(
    (
        "foreign_key_check",
        "foreign_key_list",
        "index_info",
        "index_list",
        "index_xinfo",
        "integrity_check",
        "quick_check",
        "table_info",
        "table_list",
        "table_xinfo",
    )
)
# these do something without an argument
_ACTS = frozenset(("incremental_vacuum", "optimize", "shrink_memory", "wal_checkpoint"))


def parse(sql: str) -> Statement:
    """Parse one statement.

    Raises:
        NotSupportedError: parameters in another form than ``?``.
        ProgrammingError: more than one statement, or a NUL character in the text.
    """
    if not isinstance(sql, str):
        raise ProgrammingError(f"a statement is a str, not {type(sql).__name__}")
    # a text of many rows is long, and seldom sent twice
    return _parse_cached(sql) if len(sql) <= _LONGEST_CACHED else _parse(sql)


def _parse(sql: str) -> Statement:
    if "\0" in sql:
        raise ProgrammingError("the statement has a NUL character in it: SQLite would stop reading there")
    start = _end_of_nothing(sql, 0)
    pieces: list[str] = []
    piece_start = depth = 0
    words: list[str] = []  # outside parentheses; only the first few matter
    verb = ""
    for token in _TOKEN.finditer(sql, start):
        match token.lastgroup:
            case "word" if depth == 0:
                word = token.group().upper()
                if not verb or (verb == "WITH" and word in _MAIN_VERBS):
                    verb = word
                words += [token.group()][: _WORDS_KEPT - len(words)]
            case "quoted" if depth == 0:
                words += [token.group()][: _WORDS_KEPT - len(words)]
            case "parameter":
                pieces.append(sql[piece_start : token.start()])
                piece_start = _end_of_parameter(token)
            case "parenthesis":
                depth += 1 if token.group() == "(" else -1
            case "end" if _end_of_nothing(sql, token.end()) < len(sql) and not _makes_trigger(words):
                raise ProgrammingError("one statement at a time: there is more text after the ';'")
    pieces.append(sql[piece_start:])
    if verb == "PRAGMA":
        kind, name = _pragma(sql, start)
    else:
        kind, name = _transaction_control(_KINDS.get(verb, Kind.WRITE), words)
    drops = _dropped_table(sql, start) if verb == "DROP" else None
    return Statement(sql, kind, tuple(pieces), len(pieces) - 1, verb in _CHANGES_ROWS, name, drops)


_LONGEST_CACHED = 32_768  # characters
_WORDS_KEPT = 6
_parse_cached = lru_cache(maxsize=1024)(_parse)


def _end_of_parameter(token: re.Match[str]) -> int:
    if token.group() != "?":
        raise NotSupportedError(f"parameters are written '?', not {token.group()!r}")
    return token.end()


def _end_of_nothing(sql: str, start: int) -> int:
    """Where the blanks, comments and empty statements that begin at ``start`` end."""
    nothing = _NOTHING.match(sql, start)
    return nothing.end() if nothing else start


def _makes_trigger(words: list[str]) -> bool:
    """Whether it is CREATE TRIGGER, whose body holds statements that end with a semicolon."""
    first = [word.upper() for word in words[:3]]
    return first[:1] == ["CREATE"] and "TRIGGER" in first[1:]


def _pragma(sql: str, start: int) -> tuple[Kind, str]:
    match = _PRAGMA.match(sql, start)
    name = _name(match["name"]).lower() if match else ""
    looks = name in _LOOKS or bool(match and not match["argument"] and name not in _ACTS)
    return Kind.INSPECT if looks else Kind.CONFIGURE, name


def milliseconds(pragma: str) -> int:
    """What a ``PRAGMA busy_timeout`` sets.

    Raises:
        ProgrammingError: no number.
    """
    match = _NUMBER.search(pragma)
    if match is None:
        raise ProgrammingError(f"busy_timeout is a number of milliseconds: {pragma}")
    return max(0, int(match[1]))


_NUMBER = re.compile(r"[=(]\s*'?([+-]?\d+)'?\s*\)?[\s;]*\Z")


_DROP_TABLE = re.compile(
    rf"DROP{_BLANK}+TABLE{_BLANK}+(?:IF{_BLANK}+EXISTS{_BLANK}*)?"
    rf"(?:(?P<schema>{_NAME}){_BLANK}*\.{_BLANK}*)?(?P<name>{_NAME})",
    re.IGNORECASE | re.DOTALL,
)


def _dropped_table(sql: str, start: int) -> Table | None:
    match = _DROP_TABLE.match(sql, start)
    return Table(_name(match["schema"] or ""), _name(match["name"])) if match else None


def _name(text: str) -> str:
    """The name that an identifier stands for."""
    if text[:1] == "[":
        return text[1:-1]
    quote = text[:1]
    return text[1:-1].replace(quote * 2, quote) if quote in ('"', "'", "`") else text


def quoted(name: str) -> str:
    """The name as an identifier."""
    escaped = name.replace('"', '""')
    return f'"{escaped}"'


def move_savepoint(savepoints: list[str], kind: Kind, name: str) -> None:
    """Do to a list of open savepoints what SQLite does to its own.

    Raises:
        OperationalError: there is none of this name.
    """
    if kind is Kind.SAVEPOINT:
        savepoints.append(name)
        return
    for position in reversed(range(len(savepoints))):
        if savepoints[position] == name:
            del savepoints[position + (kind is Kind.ROLLBACK_TO) :]
            return
    raise OperationalError(f"no such savepoint: {name}")


def _transaction_control(kind: Kind, words: list[str]) -> tuple[Kind, str]:
    rest = words[1:]
    if kind is Kind.ROLLBACK and any(word.upper() == "TO" for word in rest[:2]):
        kind = Kind.ROLLBACK_TO
        rest = rest[rest.index(next(word for word in rest if word.upper() == "TO")) + 1 :]
    if kind in (Kind.RELEASE, Kind.ROLLBACK_TO) and len(rest) > 1 and rest[0].upper() == "SAVEPOINT":
        rest = rest[1:]
    if kind in (Kind.SAVEPOINT, Kind.RELEASE, Kind.ROLLBACK_TO):
        return kind, _unquoted(rest[0]) if rest else ""
    if kind is Kind.BEGIN:
        return kind, rest[0].lower() if rest else ""
    return kind, words[0].lower() if kind is Kind.CONFIGURE else ""


def _unquoted(word: str) -> str:
    return word.strip('"`[]').lower()
