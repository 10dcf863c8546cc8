"""Who may import whom. The tables are the rule; a breach fails with the offending line."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
PACKAGES = ("migrate", "runtime", "transport")

# Which of our packages each one may import. runtime has never heard of a peer, transport never of a container.
PACKAGE_RULES = {
    "migrate": {"migrate", "runtime", "transport"},
    "runtime": {"runtime"},
    "transport": {"transport"},
}

# Inside migrate: a line imports only from lines below it, or from its own package. "" is migrate/__init__.py.
MIGRATE_LAYERS = (
    ("__main__",),
    ("cli",),
    ("", "lab", "experiment"),
    ("cluster", "probe"),
    ("serve", "probe_scatter"),
    ("wiring", "trust", "checkpoint", "resolve"),
    ("undo", "check"),
    ("answers",),
    ("recover", "course"),
    ("kept_copy", "giving_back"),
    ("arrivals",),
    ("agent", "source", "target"),
    ("refill",),
    ("asking", "health", "segment", "reconnect"),
    ("links", "survey"),
    ("direct",),
    ("session",),
    ("preflight", "departure", "filtering", "losses"),
    ("rounds", "postcopy_source", "postcopy_target", "leaving", "queues"),
    ("missing",),
    (
        "inventory",
        "journal",
        "observe",
        "reports",
        "incoming",
        "waiting",
        "memory_source",
        "frozen_state",
        "phases",
        "guards",
        "causes",
        "probing",
        "trees_source",
    ),
    ("verify_source", "verify_target", "shared_target"),
    ("shared_source",),
    ("outgoing", "memory_target"),
    ("packing", "parts"),
    ("target_machine",),
    ("machine",),
    ("precopy",),
    ("report",),
    ("messages_kept",),
    ("messages",),
    ("fields", "message"),
    ("plan", "wire", "probe_window"),
    ("errors", "costs", "deferral", "interrupts"),
)

# They decide, others act: nothing here may reach a descriptor, a process, a thread or a clock.
PURE_MODULES = (
    "migrate/machine.py",
    "migrate/target_machine.py",
    "migrate/costs.py",
    "migrate/deferral.py",
    "migrate/precopy.py",
    "migrate/plan.py",
    "migrate/messages.py",
    "migrate/messages_kept.py",
    "migrate/fields.py",
    "migrate/report.py",
    "transport/frames.py",
)
IMPURE = {
    "asyncio",
    "ctypes",
    "fcntl",
    "os",
    "select",
    "selectors",
    "signal",
    "socket",
    "subprocess",
    "threading",
    "time",
}

# Shipped fakes; only tests and other fakes use them.
TESTING = "testing"


@dataclass(frozen=True, kw_only=True)
class Import:
    path: Path
    line: int
    module: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(TOP)}:{self.line}: imports {self.module}"


def module_name(path: Path) -> str:
    parts = path.relative_to(TOP).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    path = TOP.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def type_checking_lines(tree: ast.Module) -> set[int]:
    """Lines of `if TYPE_CHECKING:` blocks. They bind the layers too, but not the pure modules' clockless rule."""
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            found.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return found


def imports_of(path: Path) -> Iterator[Import]:
    """Every import in the file, inside functions too; `from a import b` counts as a.b where that is a module."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(path=path, line=node.lineno, module=alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                ours = node.module.split(".")[0] in PACKAGES and is_module(full)
                yield Import(path=path, line=node.lineno, module=full if ours else node.module)


def sources(package: str) -> list[Path]:
    return sorted((TOP / package).rglob("*.py"))


def migrate_part(module: str) -> str:
    """`migrate.cli.move` is part `cli`; `migrate` itself is part ``."""
    return [*module.split("."), ""][1]


def layer_of(part: str) -> int | None:
    return next((index for index, layer in enumerate(MIGRATE_LAYERS) if part in layer), None)


def report(breaches: list[str]) -> None:
    if breaches:
        pytest.fail("\n".join(breaches), pytrace=False)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_the_packages_its_row_allows(package: str) -> None:
    report(
        [
            f"{found}; {package} may import only {', '.join(sorted(PACKAGE_RULES[package]))}"
            for path in sources(package)
            for found in imports_of(path)
            if found.module.split(".")[0] in {*PACKAGES, "tests", "scripts"} - PACKAGE_RULES[package]
        ]
    )


def test_every_part_of_migrate_has_a_place_in_the_table() -> None:
    parts = {migrate_part(module_name(path)): path for path in sources("migrate")}
    report(
        [
            f"{path.relative_to(TOP)}:1: {part!r} has no line in MIGRATE_LAYERS of {Path(__file__).relative_to(TOP)}"
            for part, path in parts.items()
            if layer_of(part) is None and part != TESTING
        ]
    )


def test_inside_migrate_nobody_imports_upward_or_sideways() -> None:
    breaches = []
    for path in sources("migrate"):
        part = migrate_part(module_name(path))
        own = layer_of(part)
        for found in imports_of(path):
            if own is None or found.module.split(".")[0] != "migrate":
                continue
            other_part = migrate_part(found.module)
            other = layer_of(other_part)
            if other is not None and other_part != part and other <= own:
                breaches.append(f"{found}; {part or 'migrate'} may import only what is below it")
    report(breaches)


def test_only_wiring_and_what_is_above_it_names_concrete_transports() -> None:
    """source and target work on Channel and Connector, whatever carries them.

    serve and links are where one becomes the other: at the door, and on the way out.
    """
    concrete = {f"transport.{name}" for name in ("ssh", "tls", "local", "channel", "pacing")}
    wiring = layer_of("wiring")
    assert wiring is not None
    breaches = []
    for path in sources("migrate"):
        part = migrate_part(module_name(path))
        layer = layer_of(part)
        if layer is not None and layer > wiring and part not in ("serve", "links"):
            breaches += [
                f"{found}; only wiring names concrete classes" for found in imports_of(path) if found.module in concrete
            ]
    report(breaches)


def test_shipped_fakes_are_imported_by_tests_and_fakes_only() -> None:
    report(
        [
            f"{found}; production code must not use a fake"
            for package in PACKAGES
            for path in sources(package)
            if TESTING not in path.relative_to(TOP).parts
            for found in imports_of(path)
            if found.module.split(".")[0] in PACKAGES and TESTING in found.module.split(".")
        ]
    )


@pytest.mark.parametrize("name", PURE_MODULES)
def test_a_pure_module_imports_nothing_that_acts(name: str) -> None:
    path = TOP / name
    if not path.exists():
        return  # the rule waits for the file
    typing_only = type_checking_lines(ast.parse(path.read_text()))
    report(
        [
            f"{found}; {name} is pure: time and input are parameters"
            for found in imports_of(path)
            if found.module.split(".")[0] in IMPURE and found.line not in typing_only
        ]
    )


def test_the_public_api_needs_neither_paramiko_nor_click() -> None:
    """A program that embeds `import migrate` pays for them only when it uses ssh:// or the command line."""
    reached: dict[str, Import] = {}
    waiting = [TOP / "migrate" / "__init__.py"]
    seen = set(waiting)
    while waiting:
        for found in top_level_imports(waiting.pop()):
            root = found.module.split(".")[0]
            if root in ("paramiko", "click"):
                reached[root] = found
            for target in files_of(found.module) if root in PACKAGES else ():
                if target not in seen:
                    seen.add(target)
                    waiting.append(target)
    report([f"{found}, which `import migrate` reaches" for found in reached.values()])


def top_level_imports(path: Path) -> Iterator[Import]:
    """Imports that run when the module is imported: not those inside functions or TYPE_CHECKING blocks."""
    tree = ast.parse(path.read_text(), str(path))
    later = type_checking_lines(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            later.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return (found for found in imports_of(path) if found.line not in later)


def files_of(module: str) -> list[Path]:
    """The file of the module, and the `__init__.py` of every package on the way to it."""
    parts = module.split(".")
    steps = [TOP.joinpath(*parts[: count + 1]) for count in range(len(parts))]
    candidates = [step / "__init__.py" for step in steps] + [steps[-1].with_suffix(".py")]
    return [path for path in candidates if path.is_file()]
