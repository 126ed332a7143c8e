"""Where the migration scripts are found, and that they are complete."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.script import ScriptDirectory

from aion_timers import migrate
from tests.migrations.conftest import ROOT

scripts = migrate._scripts  # noqa: SLF001 - where they are is no part of the interface


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package that stands somewhere else."""
    package = tmp_path / "site-packages" / "aion_timers"
    package.mkdir(parents=True)
    monkeypatch.setattr(migrate, "__file__", str(package / "migrate.py"))
    scripts.cache_clear()
    yield package
    scripts.cache_clear()


def test_a_checkout_has_them_beside_the_package() -> None:
    assert scripts() == ROOT / "migrations"


def test_a_checkout_prefers_them_to_a_stale_copy(package: Path) -> None:
    shutil.copytree(ROOT / "migrations", package / "migrations")
    shutil.copytree(ROOT / "migrations", package.parent / "migrations")
    assert scripts() == package.parent / "migrations"


def test_the_folder_of_a_stranger_beside_the_package_is_not_ours(package: Path) -> None:
    shutil.copytree(ROOT / "migrations", package / "migrations")
    stranger = package.parent / "migrations" / "versions"
    stranger.mkdir(parents=True)
    (stranger / "0001_initial.py").write_text("raise AssertionError")
    assert scripts() == package / "migrations"


def test_every_revision_can_go_both_ways_and_says_what_it_does() -> None:
    revisions = list(ScriptDirectory(str(ROOT / "migrations")).walk_revisions())
    assert [script.revision for script in revisions] == ["aion0002", "aion0001"]
    for number, script in enumerate(reversed(revisions), start=1):
        assert script.revision == f"aion{number:04}"
        assert Path(script.path).name.startswith(f"{number:04}_")
        assert script.doc
        assert callable(script.module.upgrade)
        assert callable(script.module.downgrade)
    assert revisions[-1].branch_labels == {"aion_timers"}
