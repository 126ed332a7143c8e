"""Flask with Flask-SQLAlchemy on a libSQL file: accounts whose trial ends after 14 days.

``db.session`` is a scoped_session, and a repository takes it as it is: the account and its timer are committed
together. ``flask --app examples.flask_trial run`` serves, ``flask --app examples.flask_trial timers`` is the worker, in
a process of its own.
"""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from uuid import UUID, uuid4

from flask import Flask, Response, jsonify, request
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from aion_timers import Delivery, Dispatcher, TimerRepository, migrate

TRIAL = timedelta(days=14)


class Base(DeclarativeBase):
    """The application's tables."""


db = SQLAlchemy(model_class=Base)


class Account(Base):
    """An account, on trial until it is paid for."""

    __tablename__ = "accounts"
    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    email: Mapped[str]
    state: Mapped[str] = mapped_column(default="trial")


def end_trial(delivery: Delivery) -> None:
    """Lock the account, and settle the timer in the same transaction."""
    with delivery.transaction() as session:
        session.get_one(Account, delivery.timer.workflow_id).state = "expired"


def dispatcher() -> Dispatcher:
    """The worker of the application that is current; its sessions are plain ones, bound to no request."""
    return Dispatcher(sessionmaker(db.engine, class_=Session), {"trial-end": end_trial})


def create_app(url: str | None = None) -> Flask:
    """The application.

    Args:
        url: the database's; by default what ``DATABASE_URL`` says, or a file in the current directory.
    """
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = url or os.environ.get("DATABASE_URL", "sqlite+libsql:///trial.db")
    db.init_app(app)
    with app.app_context():
        migrate.upgrade(db.engine)
        Base.metadata.create_all(db.engine)

    @app.post("/accounts")
    def sign_up() -> tuple[Response, int]:
        account = Account(id=uuid4(), email=request.get_json()["email"])
        db.session.add(account)
        timers = TimerRepository(db.session)
        timers.schedule(account.id, "trial-end", timers.now() + TRIAL)
        db.session.commit()
        return jsonify(id=str(account.id)), 201

    @app.post("/accounts/<uuid:account_id>/payment")
    def pay(account_id: UUID) -> Response:
        account = db.session.get_one(Account, account_id)
        account.state = "paid"
        TimerRepository(db.session).cancel(account_id, "trial-end")
        db.session.commit()
        return jsonify(state=account.state)

    @app.get("/accounts/<uuid:account_id>")
    def show(account_id: UUID) -> Response:
        account = db.session.get_one(Account, account_id)
        timers = TimerRepository(db.session).list_workflow(account_id)
        return jsonify(state=account.state, timers=[timer.timer_id.value for timer in timers])

    @app.cli.command("timers")
    def run_timers() -> None:
        """Fire timers until SIGTERM or Ctrl-C."""
        worker = dispatcher()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: worker.stop())
        worker.run()

    return app
