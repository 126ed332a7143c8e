from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from aion_timers import TimerEntry, TimerRepository
from examples import order_reminders
from examples.order_reminders import REMINDER, Check, Order, summary

if TYPE_CHECKING:
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy.orm import Session


def facts(output: str) -> dict[str, tuple[str, ...]]:
    """The lines of the summary: what it is, expected, found, ok."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.partition("Summary")[2].splitlines()]
    return {row[0]: tuple(row[1:]) for row in rows if len(row) == 4}


def test_the_demo_shows_what_it_promises_and_leaves_nothing_behind(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if "COLOR" not in name and "TTY" not in name}
    done = subprocess.run(
        [sys.executable, "-m", "examples.order_reminders", "--timers", "500"],
        cwd=order_reminders.ROOT,
        env=environment | {"TMPDIR": str(tmp_path), "PYTHONUTF8": "1", "COLUMNS": "80"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []
    assert all(character.isprintable() or character == "\n" for character in done.stdout)
    assert "TimerId.named('wake-up')" in done.stdout
    found = facts(done.stdout)
    assert len(found) == 25
    assert {ok for _, _, ok in found.values()} == {"yes"}
    assert found["orders joined with their timers"][1] == "500"
    assert found["timers cancelled"][1] == "25"
    assert found["timers moved"][1] == "25"
    assert found["timers inside the transaction"][1] == "20"
    assert found["timers and orders after its rollback"][1] == "0"
    assert found["signal that ended the child"][1] == "9"
    assert int(found["timers that it had committed"][1].replace(",", "")) >= 1000
    assert int(found["due timers taken"][1]) > 100
    assert found["timers in the other program's file"][1] == "120"
    assert found["timers with an effect"][1] == "500"
    assert int(found["second reminders, scheduled by a handler"][1]) > 0
    assert found["workers that fired some"][1] == "2"


def test_a_wrong_count_fails_the_summary(capsys: pytest.CaptureFixture[str]) -> None:
    right, wrong = Check("apples", 1200, 1200), Check("pears", 1200, 1199)

    assert summary([right]) == 0
    assert summary([right, wrong, right]) == 1
    assert facts(capsys.readouterr().out)["pears"] == ("1,200", "1,199", "NO")


def forget_to_schedule(session: Session, customer: str, remind_at: datetime) -> Order:
    order = Order(customer)
    session.add(order)
    if customer != "customer 7":
        TimerRepository(session).schedule(order.id, REMINDER, remind_at)
    return order


def forget_to_cancel(session: Session, order_id: UUID) -> None:
    session.get_one(Order, order_id).paid = True


def lose_a_reminder(session: Session, limit: int) -> list[TimerEntry]:
    return TimerRepository(session).take(limit=limit)[1:]


@pytest.mark.parametrize(
    ("name", "faulty", "failed"),
    [
        ("place_order", forget_to_schedule, {"orders joined with their timers"}),
        ("receive_payment", forget_to_cancel, {"timers cancelled", "timers in the file"}),
        ("send_reminders", lose_a_reminder, {"due timers taken", "orders marked as reminded"}),
    ],
)
def test_the_demo_notices_a_faulty_application(
    name: str, faulty: object, failed: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(order_reminders, name, faulty)
    monkeypatch.setattr(sys, "argv", ["order_reminders.py", "--timers", "100"])

    assert order_reminders.main() == 1
    assert failed <= {what for what, (_, _, ok) in facts(capsys.readouterr().out).items() if ok == "NO"}
