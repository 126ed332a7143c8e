"""A process that is killed loses nothing that it had acknowledged, and leaves nothing half done."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from uuid import UUID

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session

from aion_timers import TimerRepository

NOW = datetime(2026, 6, 3, 2, 30, tzinfo=UTC)
PER_TRANSACTION = 5


def schedule_until_killed(path: str, victim: int, acknowledge: Connection) -> None:
    """Commit transactions of some timers and a row of the host's own, and tell after each commit."""
    engine = create_engine(f"sqlite+libsql:///{path}")
    number = 0
    while True:
        with Session(engine) as session, session.begin():
            session.execute(text("INSERT INTO orders VALUES (:victim, :number)"), {"victim": victim, "number": number})
            for timer in range(PER_TRANSACTION):
                TimerRepository(session).schedule(UUID(int=victim * 10**6 + number), timer, NOW)
        acknowledge.send(number)
        number += 1


@pytest.mark.parametrize("kills", [50, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.timeout(600)
def test_every_acknowledged_timer_survives_a_kill(libsql_template: Path, tmp_path: Path, kills: int) -> None:
    path = tmp_path / "timers.db"
    shutil.copy(libsql_template, path)
    engine = create_engine(f"sqlite+libsql:///{path}")
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE orders (victim INTEGER, number INTEGER)"))
    engine.dispose()

    # forked from a server that has imported everything and opened nothing, so that a victim starts at once
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    chance = random.Random(1)  # noqa: S311 - when to kill, no secret
    acknowledged: dict[int, int] = {}
    for victim in range(kills):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=schedule_until_killed, args=(str(path), victim, sender))
        process.start()
        sender.close()
        acknowledged[victim] = receiver.recv()
        time.sleep(chance.uniform(0, 0.03))
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        try:
            while True:
                acknowledged[victim] = receiver.recv()
        except EOFError:
            receiver.close()

    with Session(engine) as session:
        timers = TimerRepository(session).expired(NOW)
        orders = {(victim, number) for victim, number in session.execute(text("SELECT victim, number FROM orders"))}
        assert session.execute(text("PRAGMA integrity_check")).scalar() == "ok"
    engine.dispose()
    by_order: dict[tuple[int, int], set[object]] = {}
    for timer in timers:
        by_order.setdefault(divmod(timer.workflow_id.int, 10**6), set()).add(timer.timer_id.value)
    assert set(by_order) == orders
    assert all(found == set(range(PER_TRANSACTION)) for found in by_order.values())
    for victim, last in acknowledged.items():
        numbers = {number for other, number in orders if other == victim}
        # the commit that was under way may have been done, or not
        assert set(range(last + 1)) <= numbers <= set(range(last + 2))
