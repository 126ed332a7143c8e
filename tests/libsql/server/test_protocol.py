import json
from typing import Any

import pytest

from aion_timers import libsql
from aion_timers.libsql.hrana import protocol
from aion_timers.libsql.hrana.address import Server, is_loopback


def answer(*results: dict[str, Any], **fields: Any) -> bytes:
    return json.dumps({"baton": "b", "base_url": None, "results": results} | fields).encode()


def batch(*steps: tuple[Any, Any]) -> dict[str, Any]:
    result = {"step_results": [step[0] for step in steps], "step_errors": [step[1] for step in steps]}
    return {"type": "ok", "response": {"type": "batch", "result": result}}


def rows(*values: dict[str, Any]) -> dict[str, Any]:
    return {"cols": [{"name": "a"}], "rows": [[value] for value in values], "affected_row_count": 0}


@pytest.mark.parametrize(
    ("sent", "value"),
    [
        ({"type": "null"}, None),
        ({"type": "integer", "value": "9223372036854775807"}, 2**63 - 1),
        ({"type": "integer", "value": "-9223372036854775808"}, -(2**63)),
        ({"type": "float", "value": 3}, 3.0),
        ({"type": "text", "value": "a\0é"}, "a\0é"),
        ({"type": "blob", "base64": "AP8"}, b"\x00\xff"),
        ({"type": "blob", "base64": "AP8="}, b"\x00\xff"),
    ],
)
def test_values_of_an_answer(sent: dict[str, Any], value: object) -> None:
    (steps,) = protocol.decode(answer(batch((rows(sent), None)))).results
    assert isinstance(steps, protocol.Steps)
    (result,) = steps.outcomes
    assert isinstance(result, protocol.ResultSet)
    assert result.rows == [(value,)]
    assert type(result.rows[0][0]) is type(value)


def test_a_value_that_cannot_be_read_spoils_its_step_only() -> None:
    infinite = rows({"type": "float", "value": None})
    (steps,) = protocol.decode(answer(batch((infinite, None), (rows(), None), (None, None)))).results
    assert isinstance(steps, protocol.Steps)
    first, second, third = steps.outcomes
    assert isinstance(first, libsql.DataError)
    assert isinstance(second, protocol.ResultSet)
    assert third is None


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("SQLITE_CONSTRAINT", libsql.IntegrityError),
        ("SQLITE_CONSTRAINT_UNIQUE", libsql.IntegrityError),
        ("SQLITE_MISMATCH", libsql.IntegrityError),
        ("SQLITE_BUSY", libsql.BusyError),
        ("SQLITE_BUSY_SNAPSHOT", libsql.BusyError),
        ("TRANSACTION_BUSY", libsql.BusyError),
        ("TRANSACTION_TIMEOUT", libsql.DisconnectError),
        ("STREAM_EXPIRED", libsql.DisconnectError),
        ("SQLITE_TOOBIG", libsql.DataError),
        ("SQLITE_CORRUPT", libsql.DatabaseError),
        ("SQLITE_IOERR", libsql.OperationalError),
        ("SQL_PARSE_ERROR", libsql.OperationalError),
        ("ARGS_INVALID", libsql.ProgrammingError),
        ("SOMETHING_NEW", libsql.OperationalError),
        (None, libsql.OperationalError),
    ],
)
def test_an_error_is_told_by_its_code(code: str | None, error: type[libsql.Error]) -> None:
    # the text says something else
    sent = {"message": "SQLite error: UNIQUE constraint failed, database is locked", "code": code}
    (result,) = protocol.decode(answer({"type": "error", "error": sent})).results
    assert type(result) is error
    assert result.code == code
    assert str(result).startswith("UNIQUE constraint failed")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b"{}",
        b'"text"',
        b"\xff",
        b"[" * 100_000,
        answer({"type": "ok"}),
        answer(batch(({"cols": 1}, None))),
        answer(batch((rows({"type": "integer", "value": "x"}), None))),
        answer(batch((rows({"type": "blob", "base64": "*"}), None))),
        answer(batch((rows({"type": "new"}), None))),
        answer({"type": "error", "error": {"message": 1}}),
        answer(baton=1),
    ],
)
def test_what_is_no_answer(body: bytes) -> None:
    with pytest.raises(protocol.MalformedError):
        protocol.decode(body)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 2**63, -(2**63) - 1, "\ud800"])
def test_values_that_cannot_be_sent(value: object) -> None:
    with pytest.raises(libsql.DataError):
        protocol.statement("SELECT ?", [value])


@pytest.mark.parametrize("value", [object(), 1j, [1], {"a": 1}])
def test_types_that_are_unknown(value: object) -> None:
    with pytest.raises(libsql.ProgrammingError, match=type(value).__name__):
        protocol.statement("SELECT ?", [value])


def test_what_is_sent_is_strict_json() -> None:
    sent = protocol.statement(
        "SELECT ?", [None, True, 2**63 - 1, 0.1, "a\0é", b"\0", bytearray(b"\1"), memoryview(b"\2")]
    )
    body = json.loads(protocol.pipeline("baton", [protocol.batch([protocol.step(sent)]), protocol.CLOSE]))
    assert body["baton"] == "baton"
    (arguments,) = [step["stmt"]["args"] for step in body["requests"][0]["batch"]["steps"]]
    assert arguments == [
        {"type": "null"},
        {"type": "integer", "value": "1"},
        {"type": "integer", "value": "9223372036854775807"},
        {"type": "float", "value": 0.1},
        {"type": "text", "value": "a\0é"},
        {"type": "blob", "base64": "AA=="},
        {"type": "blob", "base64": "AQ=="},
        {"type": "blob", "base64": "Ag=="},
    ]


@pytest.mark.parametrize(
    "base", ["", "host", "ftp://host", "http://", "http://a b", "http://u:p@host", "http://h?x=1", None]
)
def test_addresses_that_are_none(base: Any) -> None:
    with pytest.raises(libsql.ProgrammingError) as caught:
        Server(base, "secret-token")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("token", ["", "a b", "a\nb", "é", 1])
def test_tokens_that_are_none(token: Any) -> None:
    with pytest.raises(libsql.ProgrammingError, match="visible"):
        Server("http://host", token)


def test_a_stream_may_move_but_not_lose_its_tls() -> None:
    server = Server("https://one/path")
    assert server.continued(None) == "https://one/path"
    assert server.continued("https://two/") == "https://two"
    with pytest.raises(libsql.ProgrammingError, match="without TLS"):
        server.continued("http://one/path")
    with pytest.raises(libsql.ProgrammingError, match="address"):
        server.continued("file:///etc/passwd")


@pytest.mark.parametrize(
    ("base", "encoding"),
    [
        ("http://127.0.0.1:8080", "identity"),
        ("http://localhost/db", "identity"),
        ("http://[::1]:8080", "identity"),
        ("https://db.example", "gzip, deflate"),
        ("http://10.0.0.1:8080", "gzip, deflate"),
    ],
)
def test_answers_are_packed_where_they_go_over_a_network(base: str, encoding: str) -> None:
    assert Server(base).headers["accept-encoding"] == encoding


def test_a_token_is_hidden() -> None:
    server = Server("https://one", "secret-token")
    assert "secret" not in repr(server)
    assert server.scrub("Bearer secret-token?") == "Bearer ***?"


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *[(host, True) for host in ("localhost", "db.localhost", "127.0.0.1", "127.1.2.3", "::1")],
        *[(host, False) for host in ("10.0.0.1", "db", "localhost.example")],
    ],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
