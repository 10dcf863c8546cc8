"""What there is on a lab host that a container or a move may leave behind, as one JSON object. Runs on that host.

Arguments: cgroup parent, state and run directory; or none for the network alone.
"""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

# What stays on a host that once ran a container: directories of containers, moves and reports, the tables for
# masquerading and for ports of containers that went away (entries of the latter end by themselves).
STANDING = ("cache", "networks", "containers", "moves", "reports", "journal", "criu-features.json")
LOCKS = (".lock",)
STANDING_TABLES = ("table ip cmigrate", "table ip cmigrate-forward", "table ip cmigrate-back")
# Routes back to a host that a container came from: the next container's coming removes those that nothing needs.
# And the kernel's own link-local addresses and multicast routes, which come a second after a link is up.
STANDING_ROUTES = re.compile(r"fwmark 0x43|\b240\.\d+\.\d+\.\d+\b|\bfe80:|\bff00::/8")


def processes() -> list[str]:
    """Everything in this host's network namespace, but for what is about to end with this program."""
    mine = os.stat("/proc/self/ns/net").st_ino
    skipped = {os.getpid(), os.getppid()}
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) in skipped:
            continue
        try:
            if os.stat(f"/proc/{entry}/ns/net").st_ino == mine:
                command = Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found.append(f"{entry} {command.strip()}")
        except OSError:
            continue
    return found


def mounts() -> list[str]:
    lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [f"{fields[4]} ({fields[fields.index('-') + 1]})" for fields in lines]


def cgroups(parent: str) -> list[str]:
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[fields.index("-") + 1] in ("cgroup", "cgroup2"):
            top = os.path.join(fields[4], parent)
            found += [directory for directory, _names, _files in os.walk(top)]
    return found


def files(*tops: str) -> list[str]:
    """What lies in a top directory, and what lies in the standing ones there, but for the reports and journals."""
    found = []
    for top in map(Path, tops):
        for entry in top.iterdir() if top.exists() else ():
            if entry.name not in STANDING:
                found.append(str(entry))
            elif entry.name not in ("cache", "reports", "journal"):
                found += [str(inner) for inner in entry.iterdir() if inner.name not in LOCKS] if entry.is_dir() else []
    return found


def run(*argv: str) -> list[str]:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=10, check=False, stdin=subprocess.DEVNULL)
    return done.stdout.splitlines()


def links() -> list[str]:
    """Name, mtu, bridge and MAC of each."""
    found = []
    for line in run("ip", "-o", "link"):
        words = line.replace("\\", " ").split()
        named = dict(itertools.pairwise(words))
        kept = [named.get(key, "-") for key in ("mtu", "master", "link/ether")]
        found.append(" ".join([words[1].rstrip(":").partition("@")[0], *kept]))
    return found


def nft_rules() -> list[str]:
    """Every line of every table but elements of sets and maps; what stands on a host is marked."""
    found, table = [], ""
    text = re.sub(r"elements = \{[^}]*\}", "", "\n".join(run("nft", "-s", "list", "ruleset")))
    for line in text.splitlines():
        if line.startswith("table "):
            table = line.rstrip(" {")
        elif line.strip(" \t}"):
            found.append(f"{'standing ' if table in STANDING_TABLES else ''}{table}: {line.strip()}")
    return found


def network() -> dict[str, list[str]]:
    """What is set, not what was learned: dynamic neighbours and forwarding entries come and go by themselves."""
    addresses = [" ".join(line.split()[1:4]) for line in run("ip", "-o", "address")]
    picture = {
        "link": links(),
        "address": addresses,
        "route": [
            re.sub(r" (linkdown|dead)\b", "", line).strip()
            for family in ("-4", "-6")
            for line in run("ip", family, "route", "show", "table", "all")
            # Of a link's own address, which is in the picture: the kernel adds it when it has looked for duplicates.
            if not line.startswith("local fe80")
        ],
        "rule": run("ip", "-4", "rule") + run("ip", "-6", "rule"),
        "neighbour": run("ip", "neighbour", "show", "nud", "permanent") + run("ip", "neighbour", "show", "proxy"),
        # What stands behind the @ is the name that the other end's number happens to have here.
        "bridge port": [line.split()[1].partition("@")[0].rstrip(":") for line in run("bridge", "-o", "link")],
        "nft": nft_rules(),
    }
    return {kind: [line for line in lines if not STANDING_ROUTES.search(line)] for kind, lines in picture.items()}


def main() -> None:
    picture = network()
    if sys.argv[1:]:
        parent, state_dir, run_dir = sys.argv[1:4]
        picture |= {
            "process": processes(),
            "mount": mounts(),
            "cgroup": cgroups(parent),
            "directory": files(state_dir, run_dir),
        }
    print(json.dumps(picture))


if __name__ == "__main__":
    main()
