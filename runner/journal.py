"""The journal of a batch: an SQLite file beside the outputs that knows every job, attempt and file.

One process at a time may write it. What it says is on disk before anything is done that depends on it: a job's run is
written down before the server hears of it, and a file's name, size and hash before the file gets its name.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .jobs import Job, hash_of_file
from .outputs import Fetched, is_there, leftovers, move_into_place
from .request import LocalFile

FILE = "journal.sqlite"
VERSION = "1"
WAITING, FETCHED, DONE, FAILED = "waiting", "fetched", "done", "failed"
SENT, LOST = "sent", "lost"

SCHEMA = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE jobs (
    key TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE COLLATE NOCASE, settings TEXT NOT NULL,
    state TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '', ended REAL);
CREATE TABLE attempts (
    prompt TEXT PRIMARY KEY, job TEXT NOT NULL REFERENCES jobs, server TEXT NOT NULL,
    state TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '', started REAL NOT NULL, ended REAL);
CREATE INDEX attempts_of_job ON attempts (job);
CREATE TABLE outputs (
    path TEXT PRIMARY KEY COLLATE NOCASE, job TEXT NOT NULL REFERENCES jobs, part TEXT NOT NULL,
    sha256 TEXT NOT NULL, size INTEGER NOT NULL);
CREATE INDEX outputs_of_job ON outputs (job);
CREATE TABLE files (path TEXT PRIMARY KEY, size INTEGER NOT NULL, changed INTEGER NOT NULL, sha256 TEXT NOT NULL);
"""


class JournalError(RuntimeError):
    """The journal cannot be used: another process has it, or it is none of ours."""


@dataclass(frozen=True)
class Attempt:
    """A run on a server that was not over when the journal heard of it last."""

    job: str
    server: str
    prompt: str


@dataclass(frozen=True)
class Row:
    """How a job ended, with the number of its runs and its files."""

    name: str
    state: str
    reason: str
    attempts: int
    server: str
    files: list[str]


class Journal:
    """The journal in `folder`, which is made if it is not there; use it in a `with` block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(folder / FILE, timeout=0, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise JournalError(f"{folder}: no outputs can be written there ({error})") from error
        try:
            # Held until the process ends, however it ends; and a file system without shared memory will do.
            self._base.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._base.execute("PRAGMA journal_mode = WAL")
            self._base.execute("PRAGMA synchronous = NORMAL")
            self._base.execute("BEGIN EXCLUSIVE")
            if not self._base.execute("SELECT 1 FROM sqlite_master WHERE name = 'about'").fetchone():
                for statement in filter(str.strip, SCHEMA.split(";")):
                    self._base.execute(statement)
                about = [("version", VERSION), ("client", uuid.uuid4().hex)]
                self._base.executemany("INSERT INTO about VALUES (?, ?)", about)
            version = self._about("version")
            self._base.execute("COMMIT")
        except sqlite3.Error as error:
            self._base.close()
            busy = "locked" in str(error)
            why = "another batch is writing it" if busy else f"{FILE} there is no journal of this program ({error})"
            raise JournalError(f"{folder}: {why}") from error
        if version != VERSION:
            self._base.close()
            raise JournalError(f"{folder / FILE} is of another version ({version}); use another folder")

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self._base.close()

    @property
    def client_id(self) -> str:
        """By which servers know this batch, in every call."""
        return self._about("client")

    def digest(self, path: Path) -> str:
        """The hash of a file's content; read again only if its size or time has changed."""
        path, stat = path.absolute(), path.stat()
        known = self._base.execute("SELECT size, changed, sha256 FROM files WHERE path = ?", [str(path)]).fetchone()
        if known and known[:2] == (stat.st_size, stat.st_mtime_ns):
            return known[2]
        sha256 = hash_of_file(path)
        row = (str(path), stat.st_size, stat.st_mtime_ns, sha256)
        self._base.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", row)
        return sha256

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What the block writes is written as a whole or not at all."""
        self._base.execute("BEGIN")
        try:
            yield
        except BaseException:
            self._base.execute("ROLLBACK")
            raise
        self._base.execute("COMMIT")

    def begin(self, jobs: Sequence[Job]) -> list[Job]:
        """Write down new jobs and give back those that are to do, with their names.

        Done are those whose files are all there. What was fetched as a whole when a run was killed gets its names now.
        """
        with self.together():
            for job in jobs:
                if not self._base.execute("SELECT 1 FROM jobs WHERE key = ?", [job.key]).fetchone():
                    settings = {f"{node}.{name}": _noted(value) for (node, name), value in job.values.items()}
                    row = (job.key, self._own_name(job), json.dumps(settings), WAITING)
                    self._base.execute("INSERT INTO jobs (key, name, settings, state) VALUES (?, ?, ?, ?)", row)
        for (key,) in self._base.execute("SELECT key FROM jobs WHERE state = ?", [FETCHED]).fetchall():
            self._finish(key)
        for file in leftovers(self.folder):
            file.unlink()
        names = dict(self._base.execute("SELECT key, name FROM jobs"))
        done = {key for (key,) in self._base.execute("SELECT key FROM jobs WHERE state = ?", [DONE])}
        gone = {
            job
            for job, path, size in self._base.execute("SELECT job, path, size FROM outputs")
            if job in done and not is_there(self.folder, path, size)
        }
        todo = [replace(job, name=names[job.key]) for job in jobs if job.key not in done or job.key in gone]
        with self.together():
            update = "UPDATE jobs SET state = ?, reason = '' WHERE key = ?"
            self._base.executemany(update, ((WAITING, job.key) for job in todo))
        return todo

    def open_attempts(self) -> list[Attempt]:
        """The runs of which nothing was heard since they were sent."""
        rows = self._base.execute("SELECT job, server, prompt FROM attempts WHERE state = ? ORDER BY started", [SENT])
        return [Attempt(*row) for row in rows]

    def sent(self, job: Job, server: str, prompt: str) -> None:
        row = (prompt, job.key, server, SENT, time.time())
        self._base.execute("INSERT INTO attempts (prompt, job, server, state, started) VALUES (?, ?, ?, ?, ?)", row)

    def renamed(self, prompt: str, new: str) -> None:
        """The server gave a run another id than was asked for."""
        self._base.execute("UPDATE attempts SET prompt = ? WHERE prompt = ?", [new, prompt])

    def ended(self, prompt: str, state: str, reason: str = "") -> None:
        """A run is over for us, with `state` "done", "failed", "lost" or "stopped"."""
        row = [state, reason, time.time(), prompt]
        self._base.execute("UPDATE attempts SET state = ?, reason = ?, ended = ? WHERE prompt = ?", row)

    def done(self, job: Job, files: Sequence[Fetched], prompt: str) -> list[str]:
        """A job's files are here as a whole: give them their names; gives those back."""
        with self.together():
            before = {path for (path,) in self._base.execute("SELECT path FROM outputs WHERE job = ?", [job.key])}
            self._base.execute("DELETE FROM outputs WHERE job = ?", [job.key])
            for file in files:
                row = (self._own_path(job, file.wanted, before), job.key, file.part, file.sha256, file.size)
                self._base.execute("INSERT INTO outputs VALUES (?, ?, ?, ?, ?)", row)
            self._base.execute("UPDATE jobs SET state = ?, reason = '' WHERE key = ?", [FETCHED, job.key])
            self.ended(prompt, DONE)
        names = self._finish(job.key)
        for path in before.difference(names):
            (self.folder / path).unlink(missing_ok=True)
        return names

    def failed(self, job: Job, reason: str) -> None:
        row = [FAILED, reason, time.time(), job.key]
        self._base.execute("UPDATE jobs SET state = ?, reason = ?, ended = ? WHERE key = ?", row)

    def rows(self, jobs: Iterable[Job]) -> Iterator[Row]:
        """How jobs stand, in their order."""
        for job in jobs:
            name, state, reason = self._base.execute(
                "SELECT name, state, reason FROM jobs WHERE key = ?", [job.key]
            ).fetchone()
            servers = self._base.execute("SELECT server FROM attempts WHERE job = ? ORDER BY started", [job.key])
            used = [server for (server,) in servers]
            paths = self._base.execute("SELECT path FROM outputs WHERE job = ? ORDER BY rowid", [job.key])
            yield Row(name, state, reason, len(used), used[-1] if used else "", [path for (path,) in paths])

    def _about(self, name: str) -> str:
        return self._base.execute("SELECT value FROM about WHERE name = ?", [name]).fetchone()[0]

    def _own_name(self, job: Job) -> str:
        """The job's name, with a part of its key where another job of this folder has the name."""
        taken = self._base.execute("SELECT 1 FROM jobs WHERE name = ?", [job.name]).fetchone()
        return f"{job.name}_{job.key[:8]}" if taken else job.name

    def _own_path(self, job: Job, wanted: str, before: set[str]) -> str:
        """A name for a file that is no other job's, and not of a file that was here `before` and is none of ours."""
        stem, dot, ending = wanted.rpartition(".")
        names = [wanted, *(f"{stem}_{job.key[:length]}{dot}{ending}" for length in (8, 24))]
        return next((name for name in names if self._is_free(name, before)), names[-1])

    def _is_free(self, path: str, before: set[str]) -> bool:
        if self._base.execute("SELECT 1 FROM outputs WHERE path = ?", [path]).fetchone():
            return False
        return path in before or not (self.folder / path).exists()

    def _finish(self, key: str) -> list[str]:
        """Rename a fetched job's files and call it done; if one is not whole, it is to be done again."""
        rows = self._base.execute("SELECT path, part, size FROM outputs WHERE job = ?", [key]).fetchall()
        for path, part, _ in rows:
            if (self.folder / part).exists():
                move_into_place(self.folder, part, path)
        whole = all(is_there(self.folder, path, size) for path, _, size in rows)
        row = [DONE if whole else WAITING, time.time(), key]
        self._base.execute("UPDATE jobs SET state = ?, ended = ? WHERE key = ?", row)
        return [path for path, _, _ in rows]


def _noted(value: object) -> object:
    return {"file": str(value.path)} if isinstance(value, LocalFile) else value
