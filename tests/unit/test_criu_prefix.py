"""Reading the host's apt sources, in both formats, to find Debian's mirror and key."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def load() -> ModuleType:
    # scripts/ is no package: the file runs on the bare system Python before anything is installed.
    path = Path(__file__).resolve().parents[2] / "scripts" / "criu_prefix.py"
    spec = importlib.util.spec_from_file_location("criu_prefix", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["criu_prefix"] = module
    spec.loader.exec_module(module)
    return module


prefix = load()

DEB822 = """\
# the mirror
Types: deb deb-src
URIs: http://mirror.example/debian
# a remark between two fields
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
"""


def test_stanzas_are_read_with_all_their_suites_and_remarks_are_not() -> None:
    first, second = prefix.parse_deb822(DEB822)
    assert first.uris == ("http://mirror.example/debian",)
    assert first.suites == ("bookworm", "bookworm-updates")
    assert first.components == ("main", "contrib")
    assert first.signed_by == "/usr/share/keyrings/debian-archive-keyring.gpg"
    assert second.signed_by == ""


def test_a_disabled_or_source_only_stanza_is_left_out() -> None:
    assert prefix.parse_deb822("Enabled: no\n" + DEB822.partition("\n\n")[0]) == []
    assert prefix.parse_deb822("Types: deb-src\nURIs: http://a/\nSuites: sid\nComponents: main\n") == []


def test_a_key_written_into_the_stanza_goes_on_as_it_is() -> None:
    key = "\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mQINBGPL\n -----END PGP PUBLIC KEY BLOCK-----"
    stanza = f"Types: deb\nURIs: http://a/debian\nSuites: trixie\nComponents: main\nSigned-By:{key}\n"
    (source,) = prefix.parse_deb822(stanza)
    assert source.signed_by == key
    assert prefix.parse_deb822(prefix.source_for(source, "sid"))[0].signed_by == key


def test_one_line_sources_are_read_with_and_without_options() -> None:
    text = (
        "# deb http://old/ bookworm main\n"
        "deb [arch=amd64 signed-by=/k.gpg] http://a/debian bookworm main contrib # remark\n"
        "deb-src http://a/debian bookworm main\n"
        "  deb http://b/debian trixie main\n"
    )
    first, second = prefix.parse_one_line(text)
    assert (first.uris, first.suites, first.components) == (("http://a/debian",), ("bookworm",), ("main", "contrib"))
    assert first.signed_by == "/k.gpg"
    assert (second.uris, second.suites, second.signed_by) == (("http://b/debian",), ("trixie",), "")


def test_the_mirror_is_the_one_that_has_the_hosts_own_suite() -> None:
    sources = [
        prefix.AptSource(uris=("http://vendor/",), suites=("nodistro",), components=("main",)),
        *prefix.parse_deb822(DEB822),
    ]
    assert prefix.choose_debian(sources, "bookworm").uris == ("http://mirror.example/debian",)


def test_a_host_without_debians_mirror_is_told_so() -> None:
    with pytest.raises(prefix.PrefixError, match="no apt source of this host offers Debian's suite 'bookworm'"):
        prefix.choose_debian([], "bookworm")


def test_sources_of_both_formats_are_found_and_switched_off_files_are_not(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text("deb http://a/debian trixie main\n")
    (tmp_path / "sources.list.d" / "debian.sources").write_text(DEB822)
    (tmp_path / "sources.list.d" / "vendor.list.disabled").write_text("deb http://vendor/ trixie main\n")
    assert [source.uris[0] for source in prefix.host_sources(tmp_path)] == [
        "http://a/debian",
        "http://mirror.example/debian",
        "http://mirror.example/debian-security",
    ]


def test_the_codename_is_read_quoted_or_not() -> None:
    assert prefix.os_codename('ID=debian\nVERSION_CODENAME=bookworm\nNAME="Debian"\n') == "bookworm"
    assert prefix.os_codename('VERSION_CODENAME="trixie"\n') == "trixie"
    assert prefix.os_codename("ID=debian\n") == ""
