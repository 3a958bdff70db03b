"""Where a study lies: a journal, an SQLite file, or a database server."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    import optuna
    from sqlalchemy import Engine


def need_optuna() -> None:
    """Raises ImportError with what to install."""
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ImportError("pqlab tune needs Optuna: pip install 'pqlab[tune]'") from error


def open_storage(place: str | Path) -> optuna.storages.BaseStorage:
    """An Optuna storage.

    Args:
        place: a URL as Optuna takes it (postgresql://..., sqlite:///...); a path that ends in .db or .sqlite, which is
            an SQLite file; or any other path, which is a journal: processes and machines append to it under a lock,
            on a network file system too, where SQLite's locks fail.

    Raises:
        ConfigError: it cannot be opened.
    """
    import optuna

    text, name = str(place), Path(place)
    if "://" in text:
        return _database(text)
    if not name.resolve().parent.is_dir():
        raise ConfigError(f"there is no folder for {text}; make it first")
    if name.is_dir():
        raise ConfigError(f"{text} is a folder; name a file for the study")
    if name.suffix in (".db", ".sqlite"):
        return _database(f"sqlite:///{text}")
    if name.is_file():
        with name.open("rb") as file:
            if file.read(1) not in (b"", b"{"):  # Optuna would append to it
                raise ConfigError(f"{text} is no journal of Optuna; name another file for the study")
    try:
        return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(text))
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{text} is no journal of Optuna ({error!r}); name another file for the study") from error


def _database(url: str, attempts: int = 6) -> optuna.storages.RDBStorage:
    """With a heartbeat, so that a trial of a machine that went away is given up after a while.

    Processes that start together all make the tables, and those that come second fail at it: they look again.
    """
    import optuna
    from sqlalchemy.exc import ArgumentError, DatabaseError

    is_sqlite = url.startswith("sqlite")
    engine = {"connect_args": {"timeout": 60}} if is_sqlite else {}  # another process may be writing
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            storage = optuna.storages.RDBStorage(url, engine_kwargs=engine, heartbeat_interval=60)
        if is_sqlite:
            _take_turns(storage.engine)
        return storage
    except (ArgumentError, ImportError) as error:
        raise ConfigError(f"the storage {url} cannot be opened ({error}); give a file, or another URL") from error
    except (optuna.exceptions.StorageInternalError, DatabaseError) as error:  # integrity, operation, program, content
        if attempts == 1:
            said = str(error).splitlines()[0]
            raise ConfigError(f"the storage {url} cannot be opened ({said}); give a file, or another URL") from error
    time.sleep(0.5)
    return _database(url, attempts - 1)


def _take_turns(engine: Engine) -> None:
    """One transaction at a time, from its first question on.

    SQLite knows no locked rows: two processes that ask for the next waiting trial would both be given it, and the
    second could not tell its result.
    """
    from sqlalchemy import event

    @event.listens_for(engine, "connect")
    def leave_transactions_to_us(connection: Any, _: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # connections of before
