"""README and ARCHITECTURE tell the truth: their tables are compared with the code."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import fields
from io import StringIO
from pathlib import Path

import pytest
from django.core.management import call_command

from deferred_sessions import conf, deployment, exceptions, schedule, topology
from deferred_sessions.conf import Settings
from deferred_sessions.management.commands.flushsessions import Command
from deferred_sessions.memory.counters import Counter
from deferred_sessions.memory.history import Gauge

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DIRECTOR = (ROOT / "docs" / "director.md").read_text()
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()
PACKAGE = ROOT / "deferred_sessions"


def rows(document: str, heading: str, table: int = 0) -> list[list[str]]:
    """Return the cells of a table under `heading`, the first unless told otherwise."""
    section = document.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    found = re.findall(r"(?:^\|.*\n)+", section, flags=re.MULTILINE)
    lines = found[table].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def code(cell: str) -> list[str]:
    """Return what stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def test_every_setting_with_its_default() -> None:
    documented = {
        code(name)[0]: ast.literal_eval(code(default)[0])
        for name, default, _ in rows(README, "Settings")
    }
    assert documented == {
        field.name.upper(): getattr(Settings(), field.name) for field in fields(Settings)
    }


def test_every_check() -> None:
    documented = [code(row[0])[0] for row in rows(README, "Checks")]
    sources = "".join(map(inspect.getsource, (conf, topology, deployment)))
    used = sorted(set(re.findall(r'"([EW]\d{3})"', sources)))
    assert documented == [f"deferred_sessions.{code}" for code in used]


def test_every_counter() -> None:
    assert [code(row[0])[0] for row in rows(README, "Figures")] == [c.name for c in Counter]


def test_every_gauge() -> None:
    documented = [code(row[0])[0] for row in rows(README, "Figures", table=1)]
    assert documented == [gauge.name for gauge in Gauge]


def test_every_log_event() -> None:
    documented = {code(row[0])[0] for row in rows(README, "Figures", table=2)}
    sources = [path.read_text() for path in PACKAGE.rglob("*.py")]
    assert documented == {name for s in sources for name in re.findall(r'"action": "(\w+)"', s)}


def test_every_message_has_an_action() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("logger."):
                assert "extra" in {keyword.arg for keyword in node.keywords}, ast.unparse(node)


def test_every_command_and_option() -> None:
    documented = " ".join(row[0] for row in rows(README, "Commands"))
    names = {path.stem for path in (PACKAGE / "management" / "commands").glob("[!_]*.py")}
    parser = Command().create_parser("manage.py", "flushsessions")
    ours = {"--all", "--loop", "--beat"}

    assert names <= set(re.findall(r"manage\.py (\w+)", documented))
    assert set(re.findall(r"--\w+", documented)) == ours | {"--watch"}
    assert ours <= {option for action in parser._actions for option in action.option_strings}


def test_every_task() -> None:
    documented = [code(row[0])[0] for row in rows(README, "Tasks")]
    assert documented == [schedule.FLUSH_TASK, schedule.CLEAR_TASK]


def test_every_error_stands_in_the_tree() -> None:
    leaves = {name for name, member in vars(exceptions).items() if inspect.isclass(member)}
    assert leaves <= set(re.findall(r"\w+Error|SessionBusy", exceptions.__doc__ or ""))


def test_every_module_is_on_the_map() -> None:
    documented = {name for row in rows(ARCHITECTURE, "Code map") for name in code(row[0])}
    modules = {
        str(path.relative_to(PACKAGE).with_suffix(""))
        for path in PACKAGE.rglob("*.py")
        if not path.name.startswith("__") and path.parent.name != "migrations"
    }
    assert documented - {"migrations", "static", "templates"} == modules


@pytest.mark.parametrize("row", rows(ARCHITECTURE, "Claims"), ids=lambda row: row[0])
def test_every_claim_has_its_tests(row: list[str]) -> None:
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    claim, modules, tests = row
    for name in code(tests):
        assert f"def {name}(" in sources
    for module in code(modules):
        assert (PACKAGE / f"{module.split('.')[0]}.py").exists()
    assert claim in sources


@pytest.mark.parametrize("kind", ["haproxy", "nginx"])
def test_the_director_is_configured_as_documented(kind: str) -> None:
    """The page shows what the command prints, to the letter."""
    command = rf"manage\.py sessionproxy ({kind} [^\n]+)\n\n```[a-z]*\n(.*?)```"
    found = re.search(command, DIRECTOR, re.DOTALL)
    assert found
    output = StringIO()
    call_command("sessionproxy", *found[1].split(), stdout=output)
    assert output.getvalue() == found[2]


def test_every_test_that_is_named_exists() -> None:
    for name in re.findall(
        r"`(?:tests/)?((?:unit|integration|processes|cluster|director|browser)/\w+\.py)`",
        ARCHITECTURE,
    ):
        assert (ROOT / "tests" / name).exists(), name
