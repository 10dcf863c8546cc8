"""Which CRIU is started: the named one, the prefix's, the host's, in this order."""

import json
from pathlib import Path

import pytest

from runtime.criu.binary import find_criu, parse_version
from runtime.errors import MissingFeature

VERSION_OUTPUT = "Version: 4.1.1\nGitID: v4.1.1\n"


def make_prefix(path: Path, version: str = "4.2.1") -> Path:
    for part in ("lib/ld-linux.so.2", "sbin/criu", "bin/criu"):
        file = path / part
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o755)
    manifest = {"loader": "lib/ld-linux.so.2", "library_path": ["lib", "lib2"], "criu": "sbin/criu", "version": version}
    (path / "criu.json").write_text(json.dumps(manifest))
    return path


def make_program(path: Path, output: str = VERSION_OUTPUT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\nprintf '{output}'\n")
    path.chmod(0o755)
    return path


def test_the_prefix_is_started_through_its_own_loader_without_a_shell(tmp_path: Path) -> None:
    prefix = make_prefix(tmp_path / ".criu")
    criu = find_criu({}, (tmp_path / "none", prefix))
    assert criu.argv == (
        f"{prefix}/lib/ld-linux.so.2",
        "--library-path",
        f"{prefix}/lib:{prefix}/lib2",
        f"{prefix}/sbin/criu",
    )
    assert (criu.version, criu.origin) == ((4, 2, 1), "prefix")


def test_without_a_prefix_the_one_on_the_path_is_asked_for_its_version(tmp_path: Path) -> None:
    program = make_program(tmp_path / "criu")
    criu = find_criu({"PATH": str(tmp_path)}, ())
    assert (criu.argv, criu.version, criu.origin) == ((str(program),), (4, 1, 1), "host")


def test_the_environment_wins_over_the_prefix(tmp_path: Path) -> None:
    program = make_program(tmp_path / "own" / "criu")
    criu = find_criu({"CMIGRATE_CRIU": str(program)}, (make_prefix(tmp_path / ".criu"),))
    assert (criu.argv, criu.origin) == ((str(program),), "env")


@pytest.mark.parametrize("named", [".", "bin/criu"])
def test_a_prefix_named_by_the_environment_is_not_started_through_its_script(tmp_path: Path, named: str) -> None:
    prefix = make_prefix(tmp_path / "elsewhere")
    criu = find_criu({"CMIGRATE_CRIU": str(prefix / named)}, ())
    assert criu.argv[0] == f"{prefix}/lib/ld-linux.so.2"
    assert criu.origin == "env"


def test_a_name_that_is_no_program_is_refused_instead_of_replaced(tmp_path: Path) -> None:
    with pytest.raises(MissingFeature, match="CMIGRATE_CRIU names .*gone, which is not a program"):
        find_criu({"CMIGRATE_CRIU": str(tmp_path / "gone")}, (make_prefix(tmp_path / ".criu"),))


def test_a_damaged_prefix_is_named_with_what_to_do(tmp_path: Path) -> None:
    prefix = make_prefix(tmp_path / ".criu")
    (prefix / "sbin" / "criu").unlink()
    with pytest.raises(MissingFeature, match="sbin/criu is missing") as caught:
        find_criu({}, (prefix,))
    assert "scripts/setup" in caught.value.hint
    (prefix / "criu.json").write_text("{")
    with pytest.raises(MissingFeature, match=r"criu\.json is not readable"):
        find_criu({}, (prefix,))


def test_a_program_that_answers_nonsense_is_not_criu(tmp_path: Path) -> None:
    make_program(tmp_path / "criu", "hello")
    with pytest.raises(MissingFeature, match="--version answered status 0: hello"):
        find_criu({"PATH": str(tmp_path)}, ())


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (VERSION_OUTPUT, (4, 1, 1)),
        ("Version: 4.2\nGitID: v4.2-15-gabc\n", (4, 2, 0)),
        ("4.2.1", (4, 2, 1)),
    ],
)
def test_versions_are_read_from_the_output_and_bare(text: str, version: tuple[int, int, int]) -> None:
    assert parse_version(text) == version


def test_the_criu_that_setup_chose_is_found() -> None:
    criu = find_criu({"PATH": "/usr/sbin:/usr/bin"})
    assert criu.version >= (3, 17, 0)
