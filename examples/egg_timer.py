"""A plain script with timers in a libSQL file: ``egg_timer.py set NAME SECONDS`` sets one, ``egg_timer.py ring`` waits.

``egg_timer.py ring --once`` rings for what is due and ends, as cron would call it. Set timers from other terminals
while it waits, or kill it and start it again: nothing is forgotten.
"""

import argparse
import os
import signal
from datetime import timedelta
from uuid import UUID

from sqlalchemy import Engine, create_engine

from aion_timers import Delivery, Dispatcher, TimerRepository, migrate

KITCHEN = UUID("8f1e4a1c-7d0b-4c1e-9a53-2f6f5f0a6b11")


def set_timer(engine: Engine, name: str, seconds: float) -> None:
    """Set a timer, or set it anew."""
    with engine.begin() as connection:
        timers = TimerRepository(connection)
        fire_at = timers.now() + timedelta(seconds=seconds)
        timers.schedule(KITCHEN, name, fire_at)
    print(f"{name} at {fire_at:%H:%M:%S} UTC")


def ring(delivery: Delivery) -> None:
    """Ring; a bell that was rung twice after a crash does no harm."""
    print(f"{delivery.timer.timer_id.value}!", flush=True)


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", default=os.environ.get("EGG_TIMERS", "egg-timers.db"))
    commands = parser.add_subparsers(dest="command", required=True)
    setting = commands.add_parser("set")
    setting.add_argument("name")
    setting.add_argument("seconds", type=float)
    commands.add_parser("ring").add_argument("--once", action="store_true")
    arguments = parser.parse_args()

    engine = create_engine(f"sqlite+libsql:///{arguments.file}")
    migrate.upgrade(engine)
    if arguments.command == "set":
        set_timer(engine, arguments.name, arguments.seconds)
        return
    dispatcher = Dispatcher(engine, ring)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: dispatcher.stop())
    if arguments.once:
        dispatcher.run_due()
    else:
        dispatcher.run()


if __name__ == "__main__":
    main()
