"""The suite itself; its name keeps it out of `make test`, whose settings are not its own."""

from sqlalchemy.testing.suite import *  # noqa: F403 - the classes are collected here
