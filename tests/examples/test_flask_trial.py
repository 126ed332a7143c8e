from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

import pytest
from flask import Flask

from aion_timers import Dispatcher, TimerRepository
from aion_timers.testing import FakeClock, run_due
from examples.flask_trial import create_app, db, end_trial

if TYPE_CHECKING:
    from sqlalchemy import URL

ROOT = Path(__file__).parents[2]


@pytest.fixture
def app(timers_libsql_url: URL) -> Iterator[Flask]:
    app = create_app(timers_libsql_url.render_as_string(hide_password=False))
    yield app
    with app.app_context():
        db.engine.dispose()


def test_a_trial_ends_unless_it_is_paid_for(app: Flask) -> None:
    client = app.test_client()
    paying, other = (client.post("/accounts", json={"email": f"{who}@example.org"}).json["id"] for who in "ab")
    assert client.get(f"/accounts/{paying}").json == {"state": "trial", "timers": ["trial-end"]}
    assert client.post(f"/accounts/{paying}/payment").json == {"state": "paid"}
    assert client.get(f"/accounts/{paying}").json == {"state": "paid", "timers": []}

    with app.app_context():
        clock = FakeClock(datetime.now(UTC))
        fired = run_due(Dispatcher(db.engine, {"trial-end": end_trial}, clock=clock), until=clock.now() + timedelta(20))
    assert [str(one.timer.workflow_id) for one in fired] == [other]
    assert client.get(f"/accounts/{other}").json == {"state": "expired", "timers": []}
    assert client.get(f"/accounts/{paying}").json == {"state": "paid", "timers": []}


def test_the_worker_is_a_command_of_the_application(app: Flask, timers_libsql_url: URL) -> None:
    url = timers_libsql_url.render_as_string(hide_password=False)
    client = app.test_client()
    account_id = client.post("/accounts", json={"email": "ada@example.org"}).json["id"]
    with app.app_context():
        timers = TimerRepository(db.session)
        timers.schedule(UUID(account_id), "trial-end", timers.now())
        db.session.commit()
    with subprocess.Popen(
        [sys.executable, "-m", "flask", "--app", "examples.flask_trial", "timers"],
        cwd=ROOT,
        env=os.environ | {"DATABASE_URL": url},
    ) as worker:
        try:
            deadline = time.monotonic() + 20
            while client.get(f"/accounts/{account_id}").json["state"] != "expired":
                assert time.monotonic() < deadline
                time.sleep(0.02)
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(20) == 0
        finally:
            worker.kill()
