from __future__ import annotations

from datetime import timedelta
from uuid import uuid4

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker

from aion_timers import Delivery, Dispatcher
from aion_timers.testing import FakeClock, run_due
from examples.debounce import NAME, QUIET, Base, Document, Documents

SECOND = timedelta(seconds=1)


@pytest.fixture(params=["libsql", "postgres"])
def engine(request: pytest.FixtureRequest) -> Engine:
    engine: Engine = request.getfixturevalue(f"timers_{request.param}_engine")
    Base.metadata.create_all(engine)
    return engine


def test_many_edits_are_indexed_once_after_the_last_one(engine: Engine, timers_clock: FakeClock) -> None:
    documents, document_id = Documents(timers_clock), uuid4()
    dispatcher = Dispatcher(sessionmaker(engine), {NAME: documents.index}, clock=timers_clock)
    with Session(engine) as session, session.begin():
        session.add(Document(id=document_id, text=""))
    for text in ("a", "ab", "abc"):
        with Session(engine) as session, session.begin():
            documents.edit(session, session.get_one(Document, document_id), text)
        assert run_due(dispatcher, until=timers_clock.now() + SECOND) == []

    (fired,) = run_due(dispatcher, until=timers_clock.now() + 60 * SECOND)

    assert fired.at == timers_clock.now() - 60 * SECOND - SECOND + QUIET
    with Session(engine) as session:
        document = session.get_one(Document, document_id)
        assert (document.indexed, document.times_indexed) == ("abc", 1)


def test_an_edit_while_the_document_is_indexed_is_indexed_later(engine: Engine, timers_clock: FakeClock) -> None:
    documents, document_id = Documents(timers_clock), uuid4()

    def index_slowly(delivery: Delivery) -> None:
        if delivery.attempt == 1 and not edits:
            with Session(engine) as session, session.begin():
                documents.edit(session, session.get_one(Document, document_id), "second")
            edits.append("second")
        documents.index(delivery)

    edits: list[str] = []
    with Session(engine) as session, session.begin():
        session.add(document := Document(id=document_id, text=""))
        documents.edit(session, document, "first")
    dispatcher = Dispatcher(sessionmaker(engine), {NAME: index_slowly}, clock=timers_clock)

    run_due(dispatcher, until=timers_clock.now() + 60 * SECOND)

    with Session(engine) as session:
        document = session.get_one(Document, document_id)
        assert (document.indexed, document.times_indexed) == ("second", 1)
