#!/usr/bin/env python3
"""Unpack a newer Debian suite's CRIU into a private prefix, leaving the host's own packages alone.

    criu_prefix.py PREFIX --suites sid,trixie

Runs on the host's bare python3 (standard library only), because it runs before the virtual environment exists. apt does
the work with its state, cache, source list and status file inside PREFIX; the mirror and the key that signs it are the
host's own, read from its apt sources. CRIU is then started through the prefix's own dynamic loader, since it needs a
newer libc than the host may have. The first suite whose `criu check` passes on this kernel stays.

What PREFIX holds afterwards:
    criu.json       how to start it (loader, library path, binary: relative to PREFIX), its version and suite
    bin/criu        the same as a command
    root/           the unpacked packages
    python/pycriu   Debian's pycriu, alone in its directory, so that nothing else of Debian's is importable with it
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

KEYRING_DIR = Path("/usr/share/keyrings")
# Debian's names for the same suites, as hosts write them in their apt sources.
SUITE_ALIASES = ("stable", "oldstable", "testing", "unstable", "sid")


class PrefixError(Exception):
    """What went wrong, in words for the operator."""


@dataclass(frozen=True, kw_only=True)
class AptSource:
    """One source of binary packages, whatever the format it was written in."""

    uris: tuple[str, ...]
    suites: tuple[str, ...]
    components: tuple[str, ...]
    signed_by: str = ""


def parse_one_line(text: str) -> list[AptSource]:
    """Read the one-line format: `deb [signed-by=FILE] URI SUITE COMPONENT...`."""
    found = []
    for raw in text.splitlines():
        match = re.match(r"\s*deb\s+(?:\[(?P<options>[^\]]*)\]\s*)?(?P<rest>[^#]+)", raw)
        fields = match["rest"].split() if match else []
        if not match or len(fields) < 2:
            continue
        options = dict(option.split("=", 1) for option in (match["options"] or "").split() if "=" in option)
        found.append(
            AptSource(
                uris=(fields[0],),
                suites=(fields[1],),
                components=tuple(fields[2:]),
                signed_by=options.get("signed-by", ""),
            )
        )
    return found


def parse_deb822(text: str) -> list[AptSource]:
    """Read the stanza format of `.sources` files; an inline key is kept with its line breaks."""
    found = []
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for stanza in re.split(r"\n[ \t]*\n", "\n".join(lines)):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line[:1] in (" ", "\t") and name:
                fields[name] += "\n" + line
            elif ":" in line:
                name, _, value = line.partition(":")
                name = name.strip().lower()
                fields[name] = value.strip()
        enabled = fields.get("enabled", "yes").lower() not in ("no", "false", "0", "off", "disable")
        if enabled and "deb" in fields.get("types", "").split() and fields.get("uris"):
            found.append(
                AptSource(
                    uris=tuple(fields["uris"].split()),
                    suites=tuple(fields.get("suites", "").split()),
                    components=tuple(fields.get("components", "").split()),
                    signed_by=fields.get("signed-by", ""),
                )
            )
    return found


def host_sources(etc_apt: Path = Path("/etc/apt")) -> list[AptSource]:
    """Every source the host's apt knows, in the order apt reads them."""
    found = []
    main_list = etc_apt / "sources.list"
    if main_list.exists():
        found += parse_one_line(main_list.read_text())
    for path in sorted((etc_apt / "sources.list.d").glob("*")):
        if path.suffix == ".list":
            found += parse_one_line(path.read_text())
        elif path.suffix == ".sources":
            found += parse_deb822(path.read_text())
    return found


def choose_debian(sources: list[AptSource], codename: str) -> AptSource:
    """The source the host takes Debian itself from: the one that has its own suite's main component."""
    for source in sources:
        own_suite = set(source.suites) & {codename, *SUITE_ALIASES}
        if own_suite and "main" in source.components:
            return source
    raise PrefixError(
        f"no apt source of this host offers Debian's suite {codename!r} with component main; "
        "add Debian's mirror to /etc/apt/sources.list.d and try again"
    )


def os_codename(text: str) -> str:
    """VERSION_CODENAME of an os-release file ('' where it has none)."""
    match = re.search(r'^VERSION_CODENAME="?([^"\n]*)', text, re.MULTILINE)
    return match[1] if match else ""


def source_for(host: AptSource, suite: str) -> str:
    """The `.sources` stanza that has `suite` at the host's own mirror, verified with the host's own key."""
    signed_by = host.signed_by
    if not signed_by:
        keyrings = [KEYRING_DIR / f"debian-archive-keyring.{ending}" for ending in ("pgp", "gpg")]
        signed_by = next((str(path) for path in keyrings if path.exists()), "")
    stanza = f"Types: deb\nURIs: {host.uris[0]}\nSuites: {suite}\nComponents: main\n"
    return stanza + (f"Signed-By: {signed_by}\n" if signed_by else "")


def apt_config(apt_dir: Path) -> str:
    """An apt configuration whose every file lies in `apt_dir`; hooks of the host are not to run."""
    return "\n".join(
        [
            f'Dir::State "{apt_dir}/state";',
            f'Dir::State::status "{apt_dir}/status";',
            f'Dir::Cache "{apt_dir}/cache";',
            'Dir::Cache::pkgcache "";',
            'Dir::Cache::srcpkgcache "";',
            'Dir::Etc::sourcelist "/dev/null";',
            f'Dir::Etc::sourceparts "{apt_dir}/sources.d";',
            'Dir::Etc::preferences "/dev/null";',
            'Dir::Etc::preferencesparts "/dev/null";',
            f'Dir::Log "{apt_dir}/log";',
            'Acquire::Languages "none";',
            'APT::Install-Recommends "false";',
            'APT::Sandbox::User "root";',
            "#clear APT::Architectures;",
            "#clear APT::Update::Post-Invoke;",
            "#clear APT::Update::Post-Invoke-Success;",
            "#clear DPkg::Post-Invoke;",
            "#clear DPkg::Pre-Install-Pkgs;",
            "#clear Acquire::IndexTargets::deb::DEP-11;",
            "",
        ]
    )


def run(*argv: str, cwd: Path | None = None, timeout_s: float = 300) -> str:
    """Run one program to its end; its output is in the error when it fails."""
    done = subprocess.run(
        argv,
        cwd=cwd,
        timeout=timeout_s,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"},
    )
    if done.returncode != 0:
        tail = "\n".join(done.stdout.strip().splitlines()[-12:])
        raise PrefixError(f"`{' '.join(argv)}` failed with status {done.returncode}:\n{tail}")
    return done.stdout


def unpack(prefix: Path, host: AptSource, suite: str) -> None:
    """Download CRIU, what it depends on, and pycriu of `suite`, and unpack them into `prefix`/root."""
    apt_dir = prefix / "apt"
    for part in ("state/lists/partial", "cache/archives/partial", "sources.d", "log"):
        (apt_dir / part).mkdir(parents=True)
    (apt_dir / "status").touch()
    (apt_dir / "sources.d" / "debian.sources").write_text(source_for(host, suite))
    config = apt_dir / "apt.conf"
    config.write_text(apt_config(apt_dir))
    apt = ("apt-get", "-c", str(config), "-q", "-y")
    archives = apt_dir / "cache" / "archives"
    run(*apt, "update")
    run(*apt, "install", "--download-only", "criu")
    run(*apt, "download", "python3-pycriu", cwd=archives)
    for package in sorted(archives.glob("*.deb")):
        run("dpkg-deb", "-x", str(package), str(prefix / "root"))
    shutil.rmtree(apt_dir)


def describe(prefix: Path, suite: str) -> dict[str, object]:
    """Find the loader, libraries and binary among the unpacked files; all paths are relative to `prefix`."""
    root = prefix / "root"
    loaders = sorted(path for path in root.rglob("ld-linux*.so.*") if path.is_file())
    binaries = sorted(path for path in root.rglob("sbin/criu") if path.is_file())
    if not loaders or not binaries:
        raise PrefixError(f"the packages of {suite} hold no criu or no dynamic loader under {root}")
    libraries = sorted({path.parent for path in root.rglob("lib*.so*") if path.parent.parent.name in ("lib", "usr")})
    return {
        "suite": suite,
        "loader": str(loaders[0].relative_to(prefix)),
        "library_path": [str(path.relative_to(prefix)) for path in libraries],
        "criu": str(binaries[0].relative_to(prefix)),
    }


def write_wrapper(prefix: Path, found: dict[str, object]) -> Path:
    """Make bin/criu, for people and shell scripts; programs read criu.json and start the loader themselves."""
    libraries = ":".join(f"$prefix/{path}" for path in found["library_path"])  # type: ignore[attr-defined]
    wrapper = prefix / "bin" / "criu"
    wrapper.parent.mkdir(exist_ok=True)
    wrapper.write_text(
        "#!/bin/sh\n"
        'prefix=$(cd "$(dirname "$(readlink -f "$0")")/.." && pwd)\n'
        f'exec "$prefix/{found["loader"]}" --library-path "{libraries}" "$prefix/{found["criu"]}" "$@"\n'
    )
    wrapper.chmod(0o755)
    return wrapper


def isolate_pycriu(prefix: Path) -> None:
    """Copy pycriu out of the unpacked dist-packages, where Debian's protobuf lies beside it."""
    packages = sorted((prefix / "root").rglob("dist-packages/pycriu"))
    if not packages:
        raise PrefixError("python3-pycriu holds no pycriu package")
    shutil.copytree(packages[0], prefix / "python" / "pycriu")


def build(prefix: Path, host: AptSource, suite: str) -> str:
    """Make `prefix` from `suite`; it appears whole or not at all. Returns the version that passed `criu check`."""
    scratch = prefix.with_name(f"{prefix.name}.new")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        unpack(scratch, host, suite)
        found = describe(scratch, suite)
        isolate_pycriu(scratch)
        criu = str(write_wrapper(scratch, found))
        run(criu, "check", timeout_s=60)
        match = re.search(r"Version:\s*(\S+)", run(criu, "--version", timeout_s=60))
        found["version"] = match[1] if match else ""
        (scratch / "criu.json").write_text(json.dumps(found, indent=2) + "\n")
        shutil.rmtree(prefix, ignore_errors=True)
        scratch.rename(prefix)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return str(found["version"])


def main() -> int:
    parser = argparse.ArgumentParser(description="unpack a newer Debian suite's CRIU into a private prefix")
    parser.add_argument("prefix", type=Path)
    parser.add_argument("--suites", default="sid,trixie", help="in the order they are tried (default: sid,trixie)")
    args = parser.parse_args()
    problems = []
    for suite in args.suites.split(","):
        try:
            host = choose_debian(host_sources(), os_codename(Path("/etc/os-release").read_text()))
            version = build(args.prefix.absolute(), host, suite)
        except (PrefixError, OSError, subprocess.TimeoutExpired) as error:
            problems.append(f"{suite}: {error}")
            print(f"criu of {suite} does not serve here, trying the next: {error}", file=sys.stderr)
        else:
            print(f"CRIU {version} of Debian {suite} passes `criu check` on this kernel")
            return 0
    print(f"no suite's CRIU works here:\n{chr(10).join(problems)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
