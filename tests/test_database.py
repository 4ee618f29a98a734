"""A file of ours: whole transactions, clear errors, and who of those that use it is alive."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from shared import PATIENCE, in_threads

from qengine import database
from qengine.database import APPLICATION_ID, VERSION, WRITER, Database, boot_token
from qengine.errors import StorageError

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = "CREATE TABLE IF NOT EXISTS things (id INTEGER PRIMARY KEY, name TEXT);\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ours.db"


@pytest.fixture
def opened(path: Path) -> Iterator[Database]:
    made = Database(path, SCHEMA)
    yield made
    made.close()


def add(name: str) -> Any:
    return lambda connection: connection.execute("INSERT INTO things (name) VALUES (?)", (name,)).lastrowid


def names(connection: sqlite3.Connection) -> list[str]:
    return [name for (name,) in connection.execute("SELECT name FROM things ORDER BY id")]


def elsewhere(path: Path, *statements: str) -> list[Any]:
    """What another program does to the file."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return [connection.execute(statement).fetchall() for statement in statements]


# ---- transactions ----------------------------------------------------------------------------------------------------


def test_a_new_file_is_ours_in_wal_and_as_safe_as_was_asked_for(path: Path) -> None:
    for level, expected in (("FULL", 2), ("NORMAL", 1)):
        made = Database(path, SCHEMA, synchronous=level)
        assert made.transact(lambda c: c.execute("PRAGMA synchronous").fetchone()) == (expected,)
        assert made.transact(lambda c: c.execute("PRAGMA journal_mode").fetchone()) == ("wal",)
        made.close()
    assert elsewhere(path, "PRAGMA application_id", "PRAGMA user_version") == [[(APPLICATION_ID,)], [(VERSION,)]]
    assert path.read_bytes()[68:72].hex() == f"{APPLICATION_ID:08x}", "who reads only the header finds it ours"
    assert sorted(os.listdir(path.parent)) == ["ours.db"]


def test_what_was_committed_is_there_for_the_next(path: Path, opened: Database) -> None:
    assert [opened.transact(add(name)) for name in "ab"] == [1, 2]
    other = Database(path, SCHEMA)
    assert other.transact(names) == ["a", "b"]
    other.close()
    opened.close()
    opened.close()
    assert opened.transact(names) == ["a", "b"], "it is opened again when it is used"


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), sqlite3.IntegrityError("no")])
def test_work_that_raises_leaves_nothing(opened: Database, error: BaseException) -> None:
    def work(connection: sqlite3.Connection) -> None:
        add("a")(connection)
        raise error

    with pytest.raises(StorageError if isinstance(error, sqlite3.Error) else type(error)):
        opened.transact(work)
    assert opened.transact(names) == []


def test_threads_take_turns(opened: Database) -> None:
    def both(name: str) -> Any:
        return lambda connection: [add(f"{name}.{half}")(connection) for half in "ab"]

    def one(number: int) -> None:
        for turn in range(20):
            opened.transact(both(f"{number}.{turn}"))

    in_threads(4, one)
    found = opened.transact(names)
    assert len(found) == 160
    assert all(found[at][:-1] == found[at + 1][:-1] for at in range(0, 160, 2))


def test_who_only_reads_waits_for_nobody(path: Path, opened: Database) -> None:
    opened.transact(add("a"))
    reader = Database(path, SCHEMA)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("INSERT INTO things (name) VALUES ('b')")
        assert reader.transact(names, only_reads=True) == ["a"]
        other.execute("COMMIT")
    assert reader.transact(names, only_reads=True) == ["a", "b"]
    reader.close()


def test_a_handler_that_comes_back_to_it_in_a_transaction_is_refused_and_spoils_nothing(opened: Database) -> None:
    def work(connection: sqlite3.Connection) -> None:
        add("a")(connection)
        with pytest.raises(StorageError, match="a signal handler came back to it in a transaction"):
            opened.transact(add("inner"))
        add("b")(connection)

    opened.transact(work)
    assert opened.transact(names) == ["a", "b"]


# ---- what is wrong with a file ---------------------------------------------------------------------------------------


def refused(path: Path, words: str, **options: Any) -> None:
    """It cannot be opened for that reason, and no byte of it has changed."""
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(StorageError) as caught:
        Database(path, SCHEMA, **options)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)
    assert (path.read_bytes() if path.is_file() else None) == before


def test_a_file_of_another_kind_is_refused(path: Path) -> None:
    path.write_text("not a database, but more than a header of one: " + "x" * 200)
    refused(path, "it is no file of qengine's")


def test_a_database_of_another_program_is_refused(path: Path) -> None:
    elsewhere(path, "CREATE TABLE things (name TEXT)")
    refused(path, "it is no file of qengine's; nothing in it was changed")


def test_a_version_from_the_future_is_refused(path: Path, opened: Database) -> None:
    opened.close()
    elsewhere(path, f"PRAGMA user_version = {VERSION + 1}")
    refused(path, f"tables of version {VERSION + 1}, known here are those up to {VERSION}")


@pytest.mark.parametrize("where", ["the end is missing", "a page is overwritten"])
def test_a_damaged_file_is_refused(path: Path, opened: Database, where: str) -> None:
    opened.transact(lambda c: [add("x" * 500)(c) for _ in range(200)])
    opened.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:40_000] if "end" in where else whole[:12_288] + b"\xff" * 4096 + whole[16_384:])
    refused(path, "it is damaged")


def test_a_folder_that_is_not_there_and_one_that_is_the_file(path: Path) -> None:
    refused(path / "not" / "there.db", "is its folder there, and may it be written to?")
    path.mkdir()
    refused(path, "it cannot be opened")


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to(path: Path) -> None:
    path.parent.chmod(0o500)
    try:
        refused(path, "may it be written to?")
    finally:
        path.parent.chmod(0o700)


def test_a_full_disk_is_said_and_what_was_committed_stays(opened: Database) -> None:
    opened.transact(add("a"))
    pages = opened.transact(lambda c: c.execute("PRAGMA page_count").fetchone())[0]
    opened.transact(lambda c: c.execute(f"PRAGMA max_page_count = {pages}").fetchone())
    with pytest.raises(StorageError, match=r"ours\.db: the disk is full; what it held before is untouched"):
        opened.transact(lambda c: [add("x" * 1000)(c) for _ in range(50)])
    assert opened.transact(names) == ["a"]


def test_a_file_that_another_program_has_locked(path: Path, opened: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)
    opened.close()
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageError, match="another program has locked it for more than"):
            opened.transact(add("a"))
        other.execute("ROLLBACK")
    opened.transact(add("a"))


def test_one_that_is_only_to_be_read_must_be_there_and_stays_as_it_is(path: Path) -> None:
    refused(path, "it is not there", read_only=True)
    path.touch()
    refused(path, "it is empty", read_only=True)
    path.unlink()
    made = Database(path, SCHEMA)
    made.transact(add("a"))
    reader = Database(path, "", read_only=True)
    assert reader.transact(names) == ["a"]
    with pytest.raises(StorageError, match="it may not be written to"):
        reader.transact(add("b"))
    reader.close()
    made.close()


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"path": 7}, TypeError, "path is 7 (int), allowed is the name of a file"),
        ({"path": b"ours.db"}, TypeError, "allowed is the name of a file"),
        ({"synchronous": "OFF"}, ValueError, "synchronous is 'OFF', allowed is 'FULL' or 'NORMAL'"),
    ],
)
def test_bad_arguments_are_refused(path: Path, options: dict[str, Any], kind: type[Exception], words: str) -> None:
    given: dict[str, Any] = {"path": path, "schema": SCHEMA} | options
    with pytest.raises(kind) as caught:
        Database(**given)
    assert words in str(caught.value)
    assert not path.exists()


# ---- who is alive ----------------------------------------------------------------------------------------------------


HOLDER = """
import sys, time
from qengine.database import Database
made = Database(sys.argv[1], "")
number = made.process
print(number, made.claim(int(sys.argv[2])), flush=True)
time.sleep(60)
"""


class Process:
    """Another process that uses the file, and claims a number."""

    def __init__(self, path: Path, claims: int) -> None:
        command = [sys.executable, "-c", HOLDER, str(path), str(claims)]
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        number, has_it = self._process.stdout.readline().split()
        self.number, self.has_it = int(number), has_it == "True"

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.mark.not_under_coverage
def test_a_process_is_alive_until_it_ends_however_it_does(path: Path, opened: Database) -> None:
    mine = opened.process
    other = Process(path, WRITER)
    try:
        assert other.has_it
        assert other.number != mine
        assert opened.is_alive(other.number)
        assert opened.is_alive(mine)
        assert not opened.claim(WRITER), "the other has it"
        assert not opened.is_alive(99)
    finally:
        other.kill()
    assert not opened.is_alive(other.number)
    assert opened.claim(WRITER)
    second = Process(path, WRITER)
    second.kill()
    assert not second.has_it, "now this one has it"
    assert second.number not in (mine, other.number), "no number is given twice"
    opened.yield_claim(WRITER)


def test_a_claim_is_held_once_also_within_a_process(path: Path, opened: Database) -> None:
    other = Database(path, SCHEMA)
    assert opened.claim(WRITER)
    assert not other.claim(WRITER)
    assert other.is_alive(WRITER)
    opened.yield_claim(WRITER)
    assert not other.is_alive(WRITER)
    assert other.claim(WRITER)
    other.close()
    assert not opened.claim(WRITER), "to close the connection does not give it up"
    other.yield_claim(WRITER)
    other.yield_claim(WRITER)


def test_another_name_of_the_file_is_the_same_file(path: Path, opened: Database) -> None:
    link = path.with_name("link.db")
    link.symlink_to(path)
    other = Database(link, SCHEMA)
    assert opened.claim(WRITER)
    assert not other.claim(WRITER)
    other.close()
    opened.yield_claim(WRITER)


def test_a_process_that_closes_it_is_another_when_it_comes_again(opened: Database) -> None:
    first = opened.process
    assert opened.process == first
    opened.close()
    assert not opened.is_alive(first)
    assert opened.process != first


@pytest.mark.not_under_coverage
@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
def test_a_child_made_by_a_fork_is_a_process_of_its_own(path: Path, opened: Database) -> None:
    mine = opened.process
    assert opened.claim(WRITER)
    opened.transact(add("parent"))
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            said = [opened.process != mine, opened.is_alive(mine), opened.claim(WRITER)]
            opened.transact(add("child"))
            opened.yield_claim(WRITER)
            opened.close()
            os.write(writing, repr(said).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert pipe.read() == "[True, True, False]"
    os.waitpid(pid, 0)
    assert opened.transact(names) == ["parent", "child"]
    assert not claimed_by_another(path), "the child had nothing to give up"
    opened.yield_claim(WRITER)


def claimed_by_another(path: Path) -> bool:
    other = Process(path, WRITER)
    other.kill()
    return other.has_it


def test_the_boot_token_is_the_same_until_the_next_boot() -> None:
    assert boot_token() == boot_token()


@pytest.mark.not_under_coverage
def test_a_process_that_is_killed_in_a_transaction_leaves_none_of_it(path: Path, opened: Database) -> None:
    opened.transact(add("before"))
    script = (
        "import os, signal, sys\n"
        "from qengine.database import Database\n"
        "def work(c):\n"
        "    c.execute(\"INSERT INTO things (name) VALUES ('half')\")\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "Database(sys.argv[1], '').transact(work)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(path)], cwd=ROOT, timeout=PATIENCE)
    assert ended.returncode == -signal.SIGKILL
    assert opened.transact(names) == ["before"]


def test_one_thread_waits_for_the_transaction_of_another(opened: Database) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def slow(connection: sqlite3.Connection) -> None:
        inside.set()
        assert go_on.wait(PATIENCE)
        add("slow")(connection)

    first = threading.Thread(target=opened.transact, args=(slow,))
    first.start()
    assert inside.wait(PATIENCE)
    second = threading.Thread(target=opened.transact, args=(add("second"),))
    second.start()
    go_on.set()
    for thread in (first, second):
        thread.join()
    assert opened.transact(names) == ["slow", "second"]
