import subprocess
import sys

import pytest

import migrate


def test_importing_migrate_loads_next_to_nothing() -> None:
    program = (
        "import sys, time; begin = time.perf_counter(); import migrate; took = time.perf_counter() - begin\n"
        "ours = [n for n in sys.modules if n.split('.')[0] in ('migrate', 'runtime', 'transport')]\n"
        "assert ours == ['migrate'], ours\n"
        "migrate.RolledBack, migrate.MoveReport, migrate.load_host_config\n"
        "heavy = [n for n in ('paramiko', 'click', 'rich', 'cryptography', 'pycriu') if n in sys.modules]\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize("name", migrate.__all__)
def test_every_name_of_the_api_is_there(name: str) -> None:
    assert getattr(migrate, name) is not None
    assert name in dir(migrate)


def test_the_table_and_all_agree() -> None:
    assert sorted(migrate.__all__) == sorted(migrate._WHERE)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="teleport"):
        migrate.teleport  # noqa: B018


@pytest.mark.parametrize(
    "first", ["import migrate.checkpoint", "from migrate.checkpoint import restore", "migrate.restore"]
)
def test_the_function_checkpoint_is_not_hidden_by_the_module_of_that_name(first: str) -> None:
    program = f"import migrate\n{first}\nimport types; assert isinstance(migrate.checkpoint, types.FunctionType)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
