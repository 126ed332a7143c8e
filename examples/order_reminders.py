"""A shop that reminds its customers to pay: durable timers beside its own orders, in one libSQL file.

``make demo`` runs it. It checks itself: the exit code is 1 if a count in the summary is not what it has to be.
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, NoReturn
from uuid import UUID

from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress, TextColumn
from rich.table import Column, Table
from sqlalchemy import Engine, create_engine, exists, func, inspect, select, text
from sqlalchemy.orm import Session, sessionmaker

from aion_timers import Timer, TimerEntry, TimerRepository, migrate
from examples import worker
from examples.shop import REMINDER, Base, Letter, Order, give_more_time, place_order, receive_payment, send_reminders

ROOT = Path(__file__).parents[1]
CHILD = [sys.executable, "-m", "examples.order_reminders", "--as-child"]
OTHER_PROGRAMS_FILE = ROOT / "tests" / "data" / "aion-0.1.0.db"

APART = timedelta(seconds=1) / 300

console = Console(highlight=False)


Promises = dict[UUID, datetime]
"""When each order's reminder is due: the demo's own books, which it compares with the file."""


@dataclass(frozen=True)
class Check:
    """A line of the summary."""

    what: str
    expected: int
    found: int


def some_instant() -> datetime:
    """For one order in four within the last day, as if no worker had run since; for the others in the next days."""
    hours = random.uniform(1, 72) if random.randrange(4) else random.uniform(-24, 0)
    return datetime.now(UTC) + timedelta(hours=hours)


def all_timers(session: Session) -> Promises:
    """The model `Timer` is there for queries of one's own."""
    return {timer.workflow_id: timer.fire_at for timer in session.execute(select(Timer.workflow_id, Timer.fire_at))}


def create_tables(engine: Engine) -> list[Check]:
    """The host makes its own tables as it likes; those of the library come from Alembic scripts that travel with it."""
    console.rule("1. Migrate", align="left")
    Base.metadata.create_all(engine)
    migrate.upgrade(engine)  # on the command line: alembic -x url=sqlite+libsql:///shop.db upgrade head
    migrate.check(engine)
    tables = inspect(engine).get_table_names()
    console.print(f"Alembic is at revision {migrate.current(engine)}. Tables: {', '.join(tables)}.")
    return [Check("tables for orders and timers", 2, len({"orders", "timers"}.intersection(tables)))]


def place_orders(sessions: sessionmaker[Session], promised: Promises, count: int) -> list[Check]:
    """Many small transactions, each of up to 20 orders with their reminders."""
    console.rule(f"2. Place {count:,} orders, each with its reminder", align="left")
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as progress:
        bar = progress.add_task("orders", total=count)
        for first in range(0, count, 20):
            placed = {}
            with sessions.begin() as session:
                for number in range(first, min(first + 20, count)):
                    at = some_instant()
                    placed[place_order(session, f"customer {number}", at).id] = at
            promised |= placed
            progress.advance(bar, len(placed))
    with sessions() as session:
        joined = select(func.count()).select_from(Order).join(Timer, Timer.workflow_id == Order.id)
        return [Check("orders joined with their timers", count, session.scalars(joined).one())]


def change_orders(sessions: sessionmaker[Session], promised: Promises) -> list[Check]:
    """Some customers pay, some get another week."""
    chosen = random.sample(list(promised), k=len(promised) // 10)
    paid, later = chosen[::2], {order_id: promised[order_id] + timedelta(weeks=1) for order_id in chosen[1::2]}
    console.rule(f"3. {len(paid):,} customers pay, {len(later):,} get another week", align="left")
    with sessions.begin() as session:
        for order_id in paid:
            receive_payment(session, order_id)
        for order_id, at in later.items():
            give_more_time(session, order_id, at)
    promised |= later
    for order_id in paid:
        del promised[order_id]
    with sessions() as session:
        stored = all_timers(session)
    cancelled, moved = len(paid) - len(stored.keys() & paid), len(stored.items() & later.items())
    console.print(f"{cancelled:,} reminders are cancelled, {moved:,} stand at their new instant.")
    return [Check("timers cancelled", len(paid), cancelled), Check("timers moved", len(later), moved)]


def roll_back(sessions: sessionmaker[Session]) -> list[Check]:
    """An error of the application takes back its rows and their timers alike."""
    console.rule("4. A transaction is rolled back", align="left")
    try:
        with sessions.begin() as session:
            placed = {place_order(session, "nobody", some_instant()).id for _ in range(20)}
            inside = len(placed & all_timers(session).keys())
            raise ConnectionError("the card service is down")  # noqa: TRY301 - the application's error, in its place
    except ConnectionError as error:
        console.print(f"{inside} new timers were there inside the transaction, then: {error}.")
    with sessions() as session:
        timers = len(placed & all_timers(session).keys())
        orders = len(placed.intersection(session.scalars(select(Order.id))))
    console.print(f"Afterwards there are {timers} of the timers and {orders} of the orders.")
    return [
        Check("timers inside the transaction", len(placed), inside),
        Check("timers and orders after its rollback", 0, timers + orders),
    ]


def place_orders_until_killed(sessions: sessionmaker[Session]) -> NoReturn:
    """What the child process does: it tells what it has written, and after each commit that it is committed."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # when nobody listens any more, this process ends too
    while True:
        with sessions.begin() as session:
            for _ in range(200):
                at = some_instant()
                sys.stdout.write(f"{place_order(session, 'customer of the child', at).id} {at.isoformat()}\n")
                sys.stdout.flush()
        sys.stdout.write("committed\n")
        sys.stdout.flush()


def run_and_kill(command: Sequence[str]) -> tuple[int, Promises, Promises]:
    """The killed child's return code, what it told to be committed, and what it had written since."""
    # in a session of its own: Ctrl-C reaches this process alone, which then ends the child
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as child:  # noqa: S603 - this script
        told = child.stdout or ()
        try:
            lines = list(islice(told, random.randint(1020, 1180)))  # five transactions and a part of the sixth
        finally:
            child.kill()
        lines += told
    committed: Promises = {}
    in_flight: Promises = {}
    for line in lines:
        match line.split():
            case ["committed"]:
                committed |= in_flight
                in_flight = {}
            case [order_id, at] if line.endswith("\n"):  # the kill may have cut the last line
                in_flight[UUID(order_id)] = datetime.fromisoformat(at)
    return child.returncode, committed, in_flight


def kill_a_process(sessions: sessionmaker[Session], promised: Promises, database: Path) -> list[Check]:
    """What a killed process had committed has to be there, whole; of the rest, nothing."""
    console.rule("5. A process that places orders is killed with SIGKILL", align="left")
    code, committed, in_flight = run_and_kill([*CHILD, str(database)])
    with sessions() as session:
        stored = all_timers(session)
        belong = exists().where(Timer.workflow_id == Order.id)
        bare_orders = session.scalars(select(func.count(Order.id)).where(~belong, ~Order.paid)).one()
        bare_timers = session.scalars(select(func.count(Timer.fire_at)).where(~belong)).one()
    kept, survived = len(committed.items() & stored.items()), len(in_flight.items() & stored.items())
    console.print(f"It had committed {len(committed):,} orders: {kept:,} of their timers are there.")
    console.print(f"In the next transaction it had written {len(in_flight)} timers: {survived} are there.")
    promised |= committed
    if survived == len(in_flight):  # the kill came after this commit, and before the child could tell
        promised |= in_flight
    return [
        Check("signal that ended the child", signal.SIGKILL, -code),
        Check("timers that it had committed", len(committed), kept),
        Check("transactions that the kill left half done", 0, int(0 < survived < len(in_flight))),
        Check("unpaid orders without timer, timers without order", 0, bare_orders + bare_timers),
        Check("timers in the file", len(promised), len(stored)),
    ]


def remind(sessions: sessionmaker[Session], promised: Promises) -> list[Check]:
    """Take all that is due, the earliest first."""
    console.rule("6. Take the reminders that are due", align="left")
    now = datetime.now(UTC)
    due = {order_id: at for order_id, at in promised.items() if at <= now}
    sent: list[TimerEntry] = []
    while True:
        with sessions.begin() as session:
            batch = send_reminders(session, limit=500)
        if not batch:
            break
        sent += batch
    table = Table("was due (UTC)", "late by", "customer")
    with sessions() as session:
        for timer in sent[:5]:
            late = str(now - timer.fire_at).partition(".")[0]
            table.add_row(f"{timer.fire_at:%d %b %H:%M:%S}", late, session.get_one(Order, timer.workflow_id).customer)
        reminded = session.scalars(select(func.count()).select_from(Order).where(Order.reminded)).one()
        left = all_timers(session)
        following = TimerRepository(session).next_fire_at()
    console.print(f"{len(sent):,} were due, the first of them:", table)
    console.print(f"{len(left):,} are left, the next one for {following:%d %b %H:%M:%S}.")
    taken = len(due.items() & {(timer.workflow_id, timer.fire_at) for timer in sent})
    order = [(timer.fire_at, str(timer.workflow_id)) for timer in sent]
    return [
        Check("due timers taken", len(due), taken),
        Check("timers taken early, or twice", 0, len(sent) - taken),
        Check("timers taken out of order", 0, sum(one > other for one, other in pairwise(order))),
        Check("orders marked as reminded", len(due), reminded),
        Check("timers left for later", len(promised) - len(due), len(left)),
    ]


def adopt_a_file(database: Path) -> list[Check]:
    """Migrating adopts the table of a Rust program, the crate aion-store-libsql 0.1.0, which can go on using it."""
    console.rule("7. Open a file that another program wrote", align="left")
    shutil.copyfile(OTHER_PROGRAMS_FILE, database)
    engine = create_engine(f"sqlite+libsql:///{database}")
    as_stored = text("SELECT workflow_id, timer_id, fire_at FROM timers")
    with Session(engine) as session:
        before = set(session.execute(as_stored))
    migrate.upgrade(engine)
    with Session(engine) as session:
        changed = before.symmetric_difference(session.execute(as_stored))
        timers = TimerRepository(session)
        expired = timers.expired(datetime(2026, 6, 3, 2, 30, tzinfo=UTC))
        everything = timers.expired(datetime.max.replace(tzinfo=UTC))
    engine.dispose()
    table = Table("due (UTC)", "timer")
    for timer in expired[-5:]:
        table.add_row(timer.fire_at.isoformat(" ", "microseconds")[:-6], escape(repr(timer.timer_id)))
    console.print(f"{len(expired)} of its {len(everything)} timers are due on 3 June 2026, 2:30; the last:", table)
    return [
        Check("timers in the other program's file", 120, len(everything)),
        Check("its rows that the migration changed", 0, len(changed)),
    ]


class Progressing(NamedTuple):
    """What the file of the two workers shows at a moment."""

    letters: int
    retried: int
    late: list[float]


def look(sessions: sessionmaker[Session]) -> Progressing:
    """Read what the workers have committed."""
    with sessions() as session:
        letters = session.execute(select(Letter.attempt, Letter.late_ms)).all()
    return Progressing(len(letters), sum(attempt > 1 for attempt, _ in letters), sorted(late for _, late in letters))


def quantile(late: Sequence[float], part: float) -> float:
    """The lateness, in ms, that this part of the letters stays below."""
    return late[min(len(late) - 1, int(part * len(late)))] if late else 0.0


def schedule_reminders(sessions: sessionmaker[Session], count: int) -> list[UUID]:
    """Orders whose reminders fall due one after the other, beginning very soon."""
    orders = [Order(f"customer {number}") for number in range(count)]
    with sessions.begin() as session:
        session.add_all(orders)
        timers = TimerRepository(session)
        first = timers.now() + timedelta(seconds=1)
        instants = (first + number * APART for number in range(count))
        timers.schedule_many(TimerEntry(order.id, REMINDER, at) for order, at in zip(orders, instants, strict=True))
        return [order.id for order in orders]


def let_two_workers_deliver(database: Path, count: int) -> list[Check]:
    """Two processes fire the timers of one file; in the middle one of them is killed, and the other one goes on."""
    console.rule(f"8. Two workers fire {count:,} timers, and one of them is killed", align="left")
    engine = worker.open_engine(str(database))
    migrate.upgrade(engine)
    Base.metadata.create_all(engine)
    sessions = sessionmaker(engine)
    command = [sys.executable, "-m", worker.__name__, str(database)]
    with ExitStack() as stack:
        workers = [
            stack.enter_context(subprocess.Popen(command, cwd=ROOT, start_new_session=True))  # noqa: S603 - this script's
            for _ in range(2)
        ]
        for process in workers:
            stack.callback(process.kill)
        order_ids = schedule_reminders(sessions, count)
        twice = sum(map(worker.is_reminded_twice, order_ids))
        watch(sessions, workers[0], count + twice)
        workers[1].terminate()
        codes = [process.wait() for process in workers]
    with sessions() as session:
        written = session.execute(select(Letter.order_id, Letter.reminder, Letter.worker, Letter.late_ms)).all()
        left = len(all_timers(session))
    engine.dispose()
    letters = Counter((order_id, name) for order_id, name, *_ in written)
    by_worker = Counter(process for *_, process, _ in written)
    killed, other = (by_worker[process.pid] for process in workers)
    console.print(f"The killed one had sent {killed:,} letters, the other one sent {other:,}.")
    late = sorted(late for *_, late in written)
    waited = sum(one >= worker.LEASE / timedelta(milliseconds=1) for one in late)
    console.print(
        f"Half of the letters were late by less than {quantile(late, 0.5):.1f} ms, and {waited} by"
        f" {worker.LEASE.total_seconds():g} s or more: what a killed worker holds waits for the end of its lease."
    )
    first = sum(1 for _, name in letters if name == REMINDER)
    return [
        Check("signals that ended the two workers: 9, and none", signal.SIGKILL, -codes[0] - codes[1]),
        Check("timers with an effect", count, first),
        Check("second reminders, scheduled by a handler", twice, len(letters) - first),
        Check("effects beyond one a timer", 0, letters.total() - len(letters)),
        Check("timers that fired early", 0, sum(one < 0 for one in late)),
        Check("workers that fired some", 2, len(by_worker)),
        Check("timers left in the file", 0, left),
    ]


def watch(sessions: sessionmaker[Session], doomed: subprocess.Popen[bytes], expected: int) -> None:
    """Show how the workers get on, until all is done; in the middle, kill one."""
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TextColumn("{task.fields[late]}"))
    deadline = time.monotonic() + 60
    with Progress(*columns, console=console) as progress:
        scheduled = progress.add_task("scheduled", total=expected, late="")
        fired = progress.add_task("fired", total=expected, late="")
        retried = progress.add_task("retried", total=None, late="")
        seen = look(sessions)
        while seen.letters < expected and time.monotonic() < deadline:
            time.sleep(0.1)
            seen = look(sessions)
            if seen.letters > 0.4 * expected and doomed.returncode is None:
                doomed.kill()
                doomed.wait()
                progress.console.print(f"One worker is killed with SIGKILL after {seen.letters:,} letters.")
            late = f"late p50 {quantile(seen.late, 0.5):.1f} ms, p99 {quantile(seen.late, 0.99):,.0f} ms"
            with sessions() as session:
                waiting = session.scalars(select(func.count()).select_from(Timer)).one()
            progress.update(scheduled, completed=min(expected, waiting + seen.letters))
            progress.update(fired, completed=seen.letters, late=late)
            progress.update(retried, completed=seen.retried)


def summary(checks: Sequence[Check]) -> int:
    """Print the checks; the exit code is 1 if one of them failed."""
    console.rule("Summary", align="left")
    table = Table("what", *(Column(heading, justify="right") for heading in ("expected", "found", "ok")))
    for check in checks:
        ok = "yes" if check.found == check.expected else "[bold red]NO[/]"
        table.add_row(check.what, f"{check.expected:,}", f"{check.found:,}", ok)
    console.print(table)
    return int(any(check.found != check.expected for check in checks))


def main() -> int:
    """Run the demo, or what its child process does."""
    parser = argparse.ArgumentParser(description="Order reminders: durable timers in a libSQL file.")
    parser.add_argument("--timers", type=int, default=10_000, help="how many to schedule (default: 10000)")
    parser.add_argument("--as-child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_child:
        place_orders_until_killed(sessionmaker(create_engine(f"sqlite+libsql:///{options.as_child}")))
    with TemporaryDirectory(prefix="order-reminders-") as directory:
        database = Path(directory, "shop.db")
        engine = create_engine(f"sqlite+libsql:///{database}")
        sessions = sessionmaker(engine)
        promised: Promises = {}
        checks = create_tables(engine)
        checks += place_orders(sessions, promised, options.timers)
        checks += change_orders(sessions, promised)
        checks += roll_back(sessions)
        checks += kill_a_process(sessions, promised, database)
        checks += remind(sessions, promised)
        checks += adopt_a_file(Path(directory, "aion.db"))
        checks += let_two_workers_deliver(Path(directory, "delivery.db"), options.timers)
        engine.dispose()
    return summary(checks)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        console.print("interrupted")
        sys.exit(128 + signal.SIGINT)
