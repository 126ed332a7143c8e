"""The live view: what is due, what is held, what comes next, how late the oldest is, how much gets done."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from rich.live import Live
from rich.table import Table

from aion_timers import inventory
from aion_timers.cli import output
from aion_timers.inventory import Criteria
from aion_timers.repository import TimerRepository

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection, Engine

_LOOKED_AHEAD = 3
"""How many intervals a sample looks ahead, so that the next one sees what fell due in between."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What one look has shown.

    Attributes:
        at: when, by the database's clock.
        due: how many timers are due and free.
        leased: how many a worker holds.
        next: when the next timer falls due, None if there is none.
        lag: how long the oldest due and free timer waits.
        throughput: how many timers a second have gone since the look before, None at the first one. Timers that are
            scheduled meanwhile for now or for the past hide as many.
    """

    at: datetime
    due: int
    leased: int
    next: datetime | None
    lag: timedelta
    throughput: float | None

    def as_json(self) -> dict[str, Any]:
        """It as a JSON object: instants in ISO 8601, lengths in seconds."""
        return {
            "at": self.at.isoformat(),
            "due": self.due,
            "leased": self.leased,
            "next": None if self.next is None else self.next.isoformat(),
            "lag": self.lag.total_seconds(),
            "throughput": None if self.throughput is None else round(self.throughput, 1),
        }

    def as_cells(self) -> dict[str, str]:
        """It as texts, each with its name."""
        coming = "none" if self.next is None else f"in {output.duration(self.next - self.at)}"
        rate = "" if self.throughput is None else f"{self.throughput:,.1f}/s"
        return {
            "time": self.at.strftime("%H:%M:%SZ"),
            "due": f"{self.due:,}",
            "leased": f"{self.leased:,}",
            "next": coming,
            "lag": output.duration(self.lag),
            "throughput": rate,
        }


def samples(engine: Engine, interval: float) -> Iterator[Sample]:
    """One look after the other, without end."""
    horizon: datetime | None = None
    count = 0
    began = time.monotonic()
    while True:
        with engine.connect() as connection:
            now = TimerRepository(connection).now()
            elapsed, began = time.monotonic() - began, time.monotonic()
            gone = None
            if horizon is not None:
                gone = max(count - inventory.tally(connection, now, horizon).all, 0) / max(elapsed, 1e-9)
            horizon = _later(now, interval)
            tally = inventory.tally(connection, now, horizon)
            count = tally.all
            sample = Sample(now, tally.due, tally.held, _next(connection, now), _lag(connection, now), gone)
        yield sample
        time.sleep(interval)


def _later(now: datetime, interval: float) -> datetime:
    return now + timedelta(seconds=_LOOKED_AHEAD * interval + 1)


def _next(connection: Connection, now: datetime) -> datetime | None:
    coming = inventory.page(connection, criteria=Criteria(since=now), limit=100).records
    return next((record.timer.fire_at for record in coming), None)


def _lag(connection: Connection, now: datetime) -> timedelta:
    waiting = inventory.page(connection, criteria=Criteria(until=now, held=False), limit=100).records
    oldest = next((record.timer.fire_at for record in waiting), now)
    return max(now - oldest, timedelta(0))


def watch(engine: Engine, name: str, interval: float, *, once: bool, as_json: bool) -> None:
    """Show samples until it is interrupted: a table that renews itself at a terminal, else a line each."""
    looks = samples(engine, interval)
    console = output.console()
    if as_json or once or not console.is_terminal or console.is_dumb_terminal:
        for sample in looks:
            _print(sample, as_json=as_json)
            if once:
                return
    with Live(console=console, auto_refresh=False) as live:
        recent: list[Sample] = []
        for sample in looks:
            recent = [*recent, sample][-_rows(console.height) :]
            live.update(_view(recent, name), refresh=True)


def _print(sample: Sample, *, as_json: bool) -> None:
    if as_json:
        output.as_json(sample.as_json())
    else:
        cells = sample.as_cells()
        output.line(" ".join(f"{name}={text.removeprefix('in ') or '-'}" for name, text in cells.items()), flush=True)


def _rows(height: int) -> int:
    return max(height - 7, 1)  # beside title, head, frame and caption


def _view(recent: list[Sample], name: str) -> Table:
    view = Table(title=name, caption="Ctrl-C ends", title_justify="left", caption_justify="left")
    for column in recent[-1].as_cells():
        view.add_column(column, justify="left" if column == "time" else "right", min_width=8)
    for sample in recent:
        view.add_row(*sample.as_cells().values(), style=None if sample is recent[-1] else "dim")
    return view
