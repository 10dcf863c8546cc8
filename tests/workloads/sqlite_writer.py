"""Two processes that write to one SQLite database in WAL mode without a pause.

    python3 sqlite_writer.py DIRECTORY

Each transaction takes from one account and gives to another, and notes it under the next number: all accounts together
hold nothing, and no number is left out. DIRECTORY/ready is there when both write.
"""

import os
import random
import sqlite3
import sys
import time
from pathlib import Path

ACCOUNTS = 500


def write(path: Path, ready: Path) -> None:
    database = sqlite3.connect(path, timeout=600, isolation_level=None)
    chance = random.Random(os.getpid())
    while True:
        giver, taker, amount = chance.randrange(ACCOUNTS), chance.randrange(ACCOUNTS), chance.randrange(100)
        database.execute("BEGIN IMMEDIATE")
        database.execute("UPDATE account SET balance = balance - ? WHERE id = ?", (amount, giver))
        database.execute("UPDATE account SET balance = balance + ? WHERE id = ?", (amount, taker))
        database.execute(
            "INSERT INTO transfer SELECT coalesce(max(n), 0) + 1, ? FROM transfer", (chance.randbytes(100),)
        )
        database.execute("COMMIT")
        ready.touch()
        time.sleep(0.002)


def main(directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    path = directory / "db"
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("CREATE TABLE account (id INTEGER PRIMARY KEY, balance INTEGER)")
    database.execute("CREATE TABLE transfer (n INTEGER PRIMARY KEY, note BLOB)")
    database.executemany("INSERT INTO account VALUES (?, 0)", [(n,) for n in range(ACCOUNTS)])
    database.close()
    os.fork()
    write(path, directory / "ready")


main(Path(sys.argv[1]))
