"""Ids, instants and entries: what they take, how they are written, and in which order they stand."""

from __future__ import annotations

import dataclasses
import json
import pickle
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from enum import Enum
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aion_timers import InvalidInputError, TimerEntry, TimerId
from aion_timers.values import (
    NotCanonicalError,
    decode_instant,
    decode_row,
    decode_timer_id,
    decode_workflow_id,
    encode_as_of,
    encode_instant,
    encode_timer_id,
    encode_workflow_id,
)

ALPHA = UUID("6f9619ff-8b86-d011-b42d-00cf4fc964ff")
NOW = datetime(2026, 6, 3, 2, 30, tzinfo=UTC)

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
timer_ids = st.builds(TimerId, names | st.integers(0, 2**64 - 1))
instants = st.datetimes(timezones=st.just(UTC))


@given(st.uuids())
def test_a_workflow_id_comes_back_from_its_text(workflow_id: UUID) -> None:
    assert decode_workflow_id(encode_workflow_id(workflow_id)) == workflow_id


@given(timer_ids)
def test_a_timer_id_comes_back_from_its_text(timer_id: TimerId) -> None:
    text = encode_timer_id(timer_id)
    assert decode_timer_id(text) == timer_id
    assert json.loads(text) == {"Named" if timer_id.is_named else "Anonymous": timer_id.value}


@given(instants)
def test_an_instant_comes_back_from_its_text(instant: datetime) -> None:
    assert decode_instant(encode_instant(instant)) == instant


@given(instants, instants)
def test_the_text_of_instants_sorts_as_they_do(one: datetime, other: datetime) -> None:
    assert (encode_instant(one) < encode_instant(other)) is (one < other)


@given(instants, st.integers(0, 999))
def test_a_finer_instant_is_never_read_early_nor_due_early(instant: datetime, nanoseconds: int) -> None:
    stored = f"{encode_instant(instant)[:26]}{nanoseconds:03}Z"
    read = decode_instant(stored)
    last = datetime.max.replace(tzinfo=UTC)
    expected = instant if nanoseconds == 0 or instant == last else instant + timedelta(microseconds=1)
    assert read == expected
    assert stored <= encode_as_of(read)
    assert read == datetime.min.replace(tzinfo=UTC) or stored > encode_as_of(read - timedelta(microseconds=1))


@given(timer_ids, timer_ids)
def test_timer_ids_sort_by_the_bytes_of_their_text(one: TimerId, other: TimerId) -> None:
    assert (one < other) is (encode_timer_id(one).encode() < encode_timer_id(other).encode())


@given(st.text() | st.text('{}"\\:,AnonymousNd0123456789u ', max_size=40))
def test_no_text_but_the_canonical_one_is_decoded(text: str) -> None:
    try:
        timer_id = decode_timer_id(text)
    except NotCanonicalError:
        return
    assert encode_timer_id(timer_id) == text


@pytest.mark.parametrize(
    "text",
    [
        '{"Named":"}',
        '{"Named": "a"}',
        '{"named":"a"}',
        '{"Named":"\\u0041"}',
        '{"Named":"\\/"}',
        '{"Named":"a","Named":"b"}',
        '{"Named":"a","x":1}',
        '{"Named":"\\u001F"}',
        '{"Named":"\\ud800"}',
        '{"Named":1}',
        '{"Named":null}',
        '{"Anonymous":"3"}',
        '{"Anonymous":-0}',
        '{"Anonymous":03}',
        '{"Anonymous":3.0}',
        '{"Anonymous":18446744073709551616}',
        '{"Anonymous":٣}',
        '["Named"]',
        '"Named"',
        "",
        "[" * 100_000,
    ],
)
def test_other_forms_of_a_timer_id_are_foreign(text: str) -> None:
    with pytest.raises(NotCanonicalError):
        decode_timer_id(text)


@pytest.mark.parametrize(
    "text",
    [
        "2026-06-03T02:30:00Z",
        "2026-06-03T02:30:00.000000Z",
        "2026-06-03 02:30:00.000000000Z",
        "2026-06-03T02:30:00.000000000z",
        "2026-06-03T02:30:00.00000000+0",
        "2026-02-30T02:30:00.000000000Z",
        "2026-06-03T24:00:00.000000000Z",
        "2026-06-03T23:59:60.500000000Z",
        "0000-06-03T02:30:00.000000000Z",
        "+10000-01-01T00:00:00.0000000Z",
        "-0001-01-01T00:00:00.00000000Z",
        "٢٠٢٦-06-03T02:30:00.000000000Z",
        "2026-W23-3T02:30:00.00000000Z",
        "2026-06-03T02:30:00,000000000Z",
        "2026-06-03T02:30:00.000000000Z\n",
    ],
)
def test_other_forms_of_an_instant_are_foreign(text: str) -> None:
    with pytest.raises(NotCanonicalError):
        decode_instant(text)


@pytest.mark.parametrize(
    "row",
    [
        (b'"6F9619FF-8B86-D011-B42D-00CF4FC964FF"', b'{"Named":"a"}', b"2026-06-03T02:30:00.000000000Z"),
        (b"6f9619ff-8b86-d011-b42d-00cf4fc964ff", b'{"Named":"a"}', b"2026-06-03T02:30:00.000000000Z"),
        (b'"6f9619ff-8b86-d011-b42d-00cf4fc964ff"', b'{"Named":"\xff"}', b"2026-06-03T02:30:00.000000000Z"),
        (b'"6f9619ff-8b86-d011-b42d-00cf4fc964ff"', b'{"Named":"a"}', b"\xff"),
        (b"\xff", b'{"Named":"a"}', b"2026-06-03T02:30:00.000000000Z"),
    ],
)
def test_rows_in_other_forms_are_foreign(row: tuple[bytes, bytes, bytes]) -> None:
    with pytest.raises(NotCanonicalError):
        decode_row(*row)


def test_a_row_with_nanoseconds_sorts_by_them() -> None:
    rows = [
        (b'"6f9619ff-8b86-d011-b42d-00cf4fc964ff"', b'{"Named":"a"}', b"2026-06-03T02:30:00.00000000%dZ" % n)
        for n in range(3)
    ]
    entries = [decode_row(*row) for row in rows]
    assert sorted([entries[2], entries[0], entries[1]]) == entries
    assert [entry.fire_at.microsecond for entry in entries] == [0, 1, 1]
    assert min(entries[2], entries[1]) is entries[1]


@given(st.lists(st.builds(TimerEntry, st.uuids(), timer_ids, instants)))
def test_entries_sort_by_instant_workflow_and_timer(entries: list[TimerEntry]) -> None:
    expected = sorted(entries, key=lambda e: (e.fire_at, e.workflow_id.bytes, encode_timer_id(e.timer_id).encode()))
    assert sorted(entries) == expected


def test_ids_show_what_they_are() -> None:
    assert str(TimerId.named("wake-up")) == "timer:named:wake-up"
    assert str(TimerId.anonymous(3)) == "timer:anonymous:3"
    assert repr(TimerId("wake-up")) == "TimerId.named('wake-up')"
    assert repr(TimerId(3)) == "TimerId.anonymous(3)"
    assert len({TimerId("3"), TimerId(3), TimerId.named("3"), TimerId.anonymous(3)}) == 2


def test_an_entry_cannot_be_changed() -> None:
    entry = TimerEntry(ALPHA, "a", NOW)
    with pytest.raises(AttributeError):
        entry.fire_at = NOW  # type: ignore[misc] # what the test is about


class Exact(datetime):
    """A datetime that is finer than a microsecond, as libraries for nanoseconds have it."""

    nanosecond = 1


class Unknown(tzinfo):
    """A zone that knows no offset."""

    def utcoffset(self, _: datetime | None) -> None:
        """No offset."""


def test_a_finer_instant_is_rounded_up() -> None:
    fine = Exact(2026, 6, 3, 2, 30, tzinfo=UTC)
    assert TimerEntry(ALPHA, "a", fine).fire_at == NOW + timedelta(microseconds=1)
    assert type(TimerEntry(ALPHA, "a", fine).fire_at) is datetime


BAD_INSTANTS: list[Any] = [
    datetime(2026, 6, 3),  # noqa: DTZ001 - naive on purpose
    datetime(2026, 6, 3, tzinfo=Unknown()),
    date(2026, 6, 3),
    "2026-06-03T02:30:00Z",
    1_780_453_800,
    None,
    datetime(9999, 12, 31, 23, tzinfo=timezone(-timedelta(hours=2))),
    datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=2))),
    Exact(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
]


@pytest.mark.parametrize("instant", BAD_INSTANTS, ids=range(len(BAD_INSTANTS)))
def test_a_bad_instant_is_named_with_the_cure(instant: Any) -> None:
    with pytest.raises(InvalidInputError, match="fire_at") as caught:
        TimerEntry(ALPHA, "a", instant)
    assert caught.value.value is instant
    assert caught.value.cure in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("timer_id", ["", "\ud800", -1, 2**64, True, False, None, 1.0, b"a", ["a"]], ids=repr)
def test_a_bad_timer_id_is_named_with_the_cure(timer_id: Any) -> None:
    with pytest.raises(InvalidInputError, match="timer_id") as caught:
        TimerEntry(ALPHA, timer_id, NOW)
    assert caught.value.value is timer_id


@pytest.mark.parametrize(("make", "value"), [(TimerId.named, 3), (TimerId.anonymous, "a"), (TimerId.anonymous, True)])
def test_each_kind_of_id_takes_its_own_kind_of_value(make: Any, value: Any) -> None:
    with pytest.raises(InvalidInputError):
        make(value)


@pytest.mark.parametrize("workflow_id", [str(ALPHA), 1, None, b"x"], ids=repr)
def test_a_bad_workflow_id_is_named_with_the_cure(workflow_id: Any) -> None:
    with pytest.raises(InvalidInputError, match="workflow_id"):
        TimerEntry(workflow_id, "a", NOW)


def test_a_long_value_is_cut_in_the_message() -> None:
    with pytest.raises(InvalidInputError) as caught:
        TimerEntry("x" * 10_000, "a", NOW)  # type: ignore[arg-type] # what the test is about
    assert len(str(caught.value)) < 300


class Kind(str, Enum):  # noqa: UP042 - a StrEnum shows its value, this one does not
    """Names that an application keeps in one place."""

    PAY = "pay"


class Place(int, Enum):
    """Positions that an application keeps in one place."""

    THIRD = 3


class OrderId(UUID):
    """An id that shows itself in another form."""

    def __str__(self) -> str:
        return f"order_{self.hex}"


def test_members_of_enumerations_and_other_subclasses_are_what_they_stand_for() -> None:
    assert encode_timer_id(TimerId(Place.THIRD)) == '{"Anonymous":3}'
    assert str(TimerId(Kind.PAY)) == "timer:named:pay"
    assert type(TimerId(Kind.PAY).value) is str
    entry = TimerEntry(OrderId(int=1), Kind.PAY, NOW)
    assert entry == TimerEntry(UUID(int=1), "pay", NOW)
    assert type(entry.workflow_id) is UUID


def test_values_are_copied_pickled_and_changed_into_others() -> None:
    entry = decode_row(b'"6f9619ff-8b86-d011-b42d-00cf4fc964ff"', b'{"Named":"a"}', b"2026-06-03T02:30:00.000000001Z")
    assert pickle.loads(pickle.dumps(entry)).stored_instant == entry.stored_instant  # noqa: S301 - our own
    assert dataclasses.replace(entry, fire_at=NOW) == TimerEntry(ALPHA, "a", NOW)
    assert pickle.loads(pickle.dumps(TimerId(3))) == TimerId(3)  # noqa: S301 - our own


def test_values_are_not_compared_with_others() -> None:
    with pytest.raises(TypeError):
        sorted([TimerId("a"), "b"])  # type: ignore[list-item] # what the test is about
    with pytest.raises(TypeError):
        sorted([TimerEntry(ALPHA, "a", NOW), 1])  # type: ignore[list-item] # what the test is about


def test_an_id_that_is_not_there_yet_says_what_to_do() -> None:
    with pytest.raises(InvalidInputError, match="flush"):
        TimerEntry(None, "a", NOW)  # type: ignore[arg-type] # what the test is about
