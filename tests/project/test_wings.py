"""The house: a wing imports only wings below it, and no two modules import each other, not even later."""

import ast

import pytest
from conftest import ROOT

BASE = {"errors", "plain_yaml", "config", "language"}
RECORDS = BASE | {"records"}
DATA = RECORDS | {"data"}
STRATEGY = RECORDS | {"strategy"}
REUSE = DATA | {"model", "runtime"}
DOORS = RECORDS | STRATEGY | {"checks", "flags", "runtime", "quiet", "settings"}
MAY_IMPORT = {
    "language": set(),
    "errors": {"language"},
    "plain_yaml": {"language"},
    "quiet": set(),
    "config": {"errors", "language"},
    "records": BASE,
    "runtime": RECORDS,
    "data": RECORDS,
    "model": DATA,
    "strategy": RECORDS,
    "settings": {"strategy"},
    "checks": STRATEGY | {"settings"},
    "flags": DOORS - {"flags", "quiet"},
    "reuse": REUSE,
    "training": REUSE | STRATEGY | {"reuse"},
    "evaluation": REUSE | {"checks", "reuse"},
    "bench": REUSE | DOORS | {"reuse", "training", "evaluation"},
    "report": RECORDS | STRATEGY,
    "study": DOORS | {"bench", "report"},
    "repeater": REUSE | STRATEGY | {"reuse", "training"},
    "integrations": REUSE | STRATEGY | {"reuse", "training"},
    "api": DOORS | {"bench", "cli", "study"},
    "cli": DOORS | {"bench", "evaluation", "report", "reuse", "study"},
}
FILES = {
    file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): file
    for file in (ROOT / "iterbatch").rglob("*.py")
}


def _imports(name):
    """Modules of the package that a module imports anywhere, types left out."""
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "iterbatch":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in FILES else node.module


def _wing(module):
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("name", [name for name in sorted(FILES) if _wing(name) not in ("", "__main__")])
def test_a_wing_imports_only_wings_below_it(name):
    others = {_wing(module) for module in _imports(name)} - {_wing(name), ""}
    assert others <= MAY_IMPORT[_wing(name)]


def test_what_a_wing_may_import_lies_below_it():
    seen = []

    def visit(wing, above=()):
        assert wing not in above, f"{' > '.join(above)} > {wing}"
        if wing not in seen:
            for below in MAY_IMPORT[wing]:
                visit(below, (*above, wing))
            seen.append(wing)

    for wing in MAY_IMPORT:
        visit(wing)


def test_no_circles():
    state = {}

    def visit(module, path):
        assert state.get(module) != "open", f"{' > '.join(path)} > {module}"
        if module not in state:
            state[module] = "open"
            for other in {*_imports(module)} - {module}:
                visit(other, (*path, module))
            state[module] = "closed"

    for module in FILES:
        visit(module, ())


def test_the_list_of_rooms_says_what_each_file_says_of_itself():
    page = " ".join((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split())
    for file in FILES.values():
        if not file.name.startswith("__"):
            first = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))).split("\n\n")[0]
            name = file.relative_to(ROOT / "iterbatch").as_posix()
            assert f"- `{name}`: {' '.join(first.split())}" in page, name
