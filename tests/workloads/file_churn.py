"""Changes a directory's files without rest, in every way that programs do, until it is told to end by SIGTERM.

    file_churn.py DIRECTORY SEED

Stores through shared mappings are among them: three mappings stay open all the time, as a database's do.
"""

import contextlib
import mmap
import os
import random
import shutil
import signal
import sys
from pathlib import Path

MAPPED_BYTES = 300_000
NAMES = ("a", "b", "c", "d", "e", "f")


def one_step(root: Path, chance: random.Random) -> None:
    path = root.joinpath(*(chance.choice(NAMES) for _ in range(chance.randint(1, 3))))
    match chance.randrange(12):
        case 0 | 1:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(chance.randbytes(chance.choice((0, 10, 5000, 70_000, 400_000))))
        case 2 | 3:
            with open(path, "ab") as file:
                file.write(chance.randbytes(chance.choice((1, 5000, 70_000))))
        case 4 | 5:
            with open(path, "r+b") as file:
                file.seek(chance.randrange(500_000))
                file.write(b"here")
        case 6:
            os.truncate(path, chance.randrange(300_000))
        case 7:
            path.rename(root / chance.choice(NAMES) / chance.choice(NAMES))
        case 8:
            os.link(path, root / chance.choice(NAMES) / chance.choice(NAMES))
        case 9:
            path.unlink()
        case 10:
            path.chmod(chance.choice((0o644, 0o600, 0o4755)))
            os.setxattr(path, "user.one", chance.randbytes(5))
        case 11:
            if chance.randrange(10):
                path.symlink_to(chance.choice(NAMES))
            else:
                shutil.rmtree(path)


def main(root: Path, seed: int) -> None:
    running = True

    def stop(_number: int, _frame: object) -> None:
        nonlocal running
        running = False

    signal.signal(signal.SIGTERM, stop)
    chance = random.Random(seed)
    mappings = []
    for number in range(3):
        with open(root / f"mapped-{number}", "w+b") as file:
            file.truncate(MAPPED_BYTES)
            mappings.append(mmap.mmap(file.fileno(), MAPPED_BYTES))
    print("ready", flush=True)
    while running:
        with contextlib.suppress(OSError):
            one_step(root, chance)
        mappings[chance.randrange(3)][chance.randrange(MAPPED_BYTES)] = chance.randrange(256)


main(Path(sys.argv[1]), int(sys.argv[2]))
