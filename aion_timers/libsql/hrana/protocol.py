"""Hrana over HTTP as data: what is sent, what comes back, and which exception an error of the server's is.

A request is a *pipeline*: a baton, which says what stream it continues, and a list of things to do. A *batch* among
these is a list of steps, each of which may depend on how an earlier one ended. Version 3 and version 2 of the protocol
are the same as far as they are used here.
"""

from __future__ import annotations

import json
import math
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from aion_timers.libsql.errors import (
    BusyError,
    DatabaseError,
    DataError,
    DisconnectError,
    Error,
    IntegrityError,
    InterfaceError,
    InternalError,
    NotSupportedError,
    OperationalError,
    ProgrammingError,
)
from aion_timers.libsql.sql import INT64_MAX, INT64_MIN

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from aion_timers.libsql.sql import Value

VERSIONS: Final = (3, 2)
"""The versions of the protocol that are tried, in this order."""

Request = dict[str, Any]
Step = dict[str, Any]

CLOSE: Final[Request] = {"type": "close"}


# -- what is sent ------------------------------------------------------------------------------------------------------


def statement(sql: str, parameters: Iterable[object] = (), *, want_rows: bool = True) -> dict[str, Any]:
    """A statement with its parameters.

    Raises:
        DataError: a value that the protocol can't carry.
        ProgrammingError: a value of a type that SQLite doesn't know.
    """
    encoded: dict[str, Any] = {"sql": sql}
    if arguments := [_encoded(value) for value in parameters]:
        encoded["args"] = arguments
    if not want_rows:
        encoded["want_rows"] = False
    return encoded


def _encoded(value: object) -> dict[str, Any]:
    match value:
        case None:
            return {"type": "null"}
        case str():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise DataError("text with a lone surrogate can't be stored: it has no UTF-8 form") from None
            return {"type": "text", "value": str.__str__(value)}
        case int():
            if not INT64_MIN <= value <= INT64_MAX:
                raise DataError("an integer of more than 64 bits can't be stored: use text or a float")
            return {"type": "integer", "value": str(int(value))}
        case float():
            if not math.isfinite(value):
                raise DataError(
                    f"{value!r} can't be sent to a server, whose protocol is JSON: store text, None or a finite number"
                )
            return {"type": "float", "value": float(value)}
        case bytes() | bytearray() | memoryview():
            return {"type": "blob", "base64": b64encode(value).decode()}
    raise ProgrammingError(
        f"a parameter of type {type(value).__name__} can't be stored: convert it to int, float, str, bytes or None"
    )


def step(one: dict[str, Any]) -> Step:
    """A step that is run in any case."""
    return {"stmt": one}


def chain(statements: Iterable[dict[str, Any]]) -> list[Step]:
    """Steps of a batch, each of which is run if the one before went well."""
    return [
        {"stmt": one, "condition": {"type": "ok", "step": number - 1}} if number else {"stmt": one}
        for number, one in enumerate(statements)
    ]


def unless_done(step: int, sql: str, *, after: int | None = None) -> Step:
    """A step that is run if this one failed or was left out, though the one before it, ``after``, went well."""
    condition: dict[str, Any] = {"type": "not", "cond": {"type": "ok", "step": step}}
    if after is not None:
        condition = {"type": "and", "conds": [{"type": "ok", "step": after}, condition]}
    return {"stmt": {"sql": sql}, "condition": condition}


def batch(steps: Sequence[Step]) -> Request:
    """Run steps, one after the other."""
    return {"type": "batch", "batch": {"steps": steps}}


def pipeline(baton: str | None, requests: Sequence[Request]) -> bytes:
    """The body of a request."""
    body = {"baton": baton, "requests": requests}
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


# -- what comes back ---------------------------------------------------------------------------------------------------


class MalformedError(InterfaceError):
    """An answer that no libSQL server gives."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a pipeline."""

    baton: str | None
    """Names the stream in the next request; None when it was closed."""
    base_url: str | None
    """Where that request has to go, if not to the same address."""
    results: list[Result]
    """One for each request."""


@dataclass(frozen=True, slots=True)
class ResultSet:
    """What a statement gave."""

    columns: tuple[str, ...]
    rows: list[tuple[Value, ...]]
    changed: int
    """How many rows it inserted, changed or deleted."""
    last_rowid: int | None


@dataclass(frozen=True, slots=True)
class Steps:
    """What the steps of a batch gave: each a result, an error, or None if it was left out."""

    outcomes: list[ResultSet | Error | None]


Result = Steps | Error | None
"""Of a batch its steps; an error if the request failed as a whole; None if there is nothing to tell."""


def decode(body: bytes) -> Answer:
    """The answer in a body.

    Raises:
        MalformedError: it isn't an answer.
    """
    try:
        answer = json.loads(body)
        results = [_result(one) for one in answer["results"]]
        return Answer(_text_or_none(answer["baton"]), _text_or_none(answer.get("base_url")), results)
    except (AttributeError, Base64Error, KeyError, TypeError, ValueError, RecursionError) as error:
        raise MalformedError(f"the answer isn't one of a libSQL server ({type(error).__name__})") from None


def _text_or_none(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise TypeError


def _result(one: dict[str, Any]) -> Result:
    if one["type"] == "error":
        return failure(one["error"])
    response = one["response"]
    if response["type"] != "batch":
        return None
    result = response["result"]
    return Steps([_outcome(*step) for step in zip(result["step_results"], result["step_errors"], strict=True)])


def _outcome(gave: dict[str, Any] | None, error: dict[str, Any] | None) -> ResultSet | Error | None:
    if error is not None:
        return failure(error)
    try:
        return None if gave is None else _result_set(gave)
    except DataError as unreadable:  # of this step alone: the others and the stream are fine
        return unreadable


def _result_set(gave: dict[str, Any]) -> ResultSet:
    last = gave.get("last_insert_rowid")
    return ResultSet(
        tuple([column["name"] or "" for column in gave["cols"]]),
        [tuple([_DECODERS[value["type"]](value) for value in row]) for row in gave["rows"]],
        gave["affected_row_count"],
        None if last is None else int(last),
    )


def _float(value: dict[str, Any]) -> float:
    number = value["value"]
    if number is None:
        raise DataError(
            "an infinite number can't be read from a server, whose protocol is JSON: select CAST(column AS TEXT)"
        )
    return float(number)


def _blob(value: dict[str, Any]) -> bytes:
    text = value["base64"]
    return b64decode(text + "=" * (-len(text) % 4), validate=True)


_DECODERS: Final = {
    "null": lambda _: None,
    "integer": lambda value: int(value["value"]),
    "float": _float,
    "text": lambda value: value["value"],
    "blob": _blob,
}


# -- errors ------------------------------------------------------------------------------------------------------------

# a code of SQLite's may be an extended one, as in SQLITE_CONSTRAINT_UNIQUE: the longest that is the beginning counts
_CODES: Final[dict[str, type[Error]]] = {
    "SQLITE_BUSY": BusyError,
    "SQLITE_LOCKED": BusyError,
    "TRANSACTION_BUSY": BusyError,
    "SQLITE_CONSTRAINT": IntegrityError,
    "SQLITE_MISMATCH": IntegrityError,
    "SQLITE_TOOBIG": DataError,
    "SQLITE_CORRUPT": DatabaseError,
    "SQLITE_NOTADB": DatabaseError,
    "SQLITE_INTERNAL": InternalError,
    "SQLITE_NOLFS": NotSupportedError,
    "SQLITE_MISUSE": ProgrammingError,
    "SQLITE_RANGE": ProgrammingError,
    "SQL_NO_STATEMENT": ProgrammingError,
    "SQL_MANY_STATEMENTS": ProgrammingError,
    "ARGS_INVALID": ProgrammingError,
    "ARGS_BOTH_POSITIONAL_AND_NAMED": ProgrammingError,
    "STREAM_EXPIRED": DisconnectError,
    "TRANSACTION_TIMEOUT": DisconnectError,
}
REFUSED_UNREAD: Final = (
    "SQL_PARSE_ERROR",
    "SQL_NO_STATEMENT",
    "SQL_MANY_STATEMENTS",
    "ARGS_INVALID",
    "ARGS_BOTH_POSITIONAL_AND_NAMED",
)
"""The codes by which a server refuses a whole batch before it has run any of it."""

_ADVICE: Final = {
    "RESPONSE_TOO_LARGE": "read fewer rows at a time, or run the server with a larger --max-response-size",
    "SQL_NO_STATEMENT": "the statement is empty",
    "STREAM_EXPIRED": "a transaction may not pause for longer than the server allows, which is 10 s",
    "TRANSACTION_TIMEOUT": "a transaction that writes is ended after 5 s if others wait; keep it shorter",
}
_PREFIX: Final = "SQLite error: "


def failure(error: dict[str, Any]) -> Error:
    """The exception for an error of the server's, with its code in ``code``."""
    message, code = error["message"], error.get("code")
    if not isinstance(message, str) or not (code is None or isinstance(code, str)):
        raise TypeError
    text = message.removeprefix(_PREFIX)
    if code in _ADVICE:
        text = f"{text}: {_ADVICE[code]}"
    made = _error_class(code)(text)
    made.code = code
    return made


def _error_class(code: str | None) -> type[Error]:
    rest = code or ""
    while rest:
        if rest in _CODES:
            return _CODES[rest]
        rest = rest.rpartition("_")[0] if rest.startswith("SQLITE_") else ""
    return OperationalError
