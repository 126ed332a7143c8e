from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import URL, create_engine, func, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from aion_timers import Timer
from examples.fastapi_shop.app import create_app
from examples.fastapi_shop.models import Order

ROOT = Path(__file__).parents[2]


@contextmanager
def worker(url: str) -> Iterator[subprocess.Popen[str]]:
    """The example's worker, in a process of its own."""
    with subprocess.Popen(
        [sys.executable, "-m", "examples.fastapi_shop.worker"],
        cwd=ROOT,
        env=os.environ | {"DATABASE_URL": url},
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def asked_until(client: TestClient, path: str, **expected: Any) -> dict[str, Any]:
    """What the path shows, once it shows this."""
    deadline = time.monotonic() + 20
    while True:
        shown: dict[str, Any] = client.get(path).json()
        if all(shown[name] == value for name, value in expected.items()):
            return shown
        assert time.monotonic() < deadline, shown
        time.sleep(0.02)


def test_who_does_not_pay_is_reminded_by_another_process(timers_postgres_url: URL) -> None:
    url = timers_postgres_url.set(drivername="postgresql+asyncpg").render_as_string(hide_password=False)
    with TestClient(create_app(url)) as client, worker(url) as process:
        paid = client.post("/orders", json={"customer": "Ada", "remind_after": "PT1H"}).json()
        assert client.post(f"/orders/{paid['id']}/payment").json() == paid | {"paid": True, "next_reminder": None}

        placed = client.post("/orders", json={"customer": "Bob", "remind_after": "PT0.05S"})
        assert placed.status_code == 201
        path = f"/orders/{placed.json()['id']}"
        reminded = asked_until(client, path, reminders=1)
        assert reminded["next_reminder"] > placed.json()["next_reminder"]

        assert client.get(f"/orders/{uuid4()}").status_code == 404
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert client.get(path).json() == reminded


def test_an_order_that_fails_is_not_there_nor_is_its_timer(timers_postgres_url: URL) -> None:
    url = timers_postgres_url.set(drivername="postgresql+asyncpg").render_as_string(hide_password=False)
    engine = create_engine(timers_postgres_url.set(drivername="postgresql+psycopg"))
    with TestClient(create_app(url)) as client, engine.connect() as connection:
        connection.execute(text("ALTER TABLE orders ADD CHECK (customer <> '')"))
        connection.commit()
        with pytest.raises(IntegrityError):
            client.post("/orders", json={"customer": ""})
        with Session(connection) as session:
            assert session.scalar(select(func.count()).select_from(Order)) == 0
            assert session.scalar(select(func.count()).select_from(Timer)) == 0
    engine.dispose()
