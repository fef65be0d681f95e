"""The import contract: no import runs upward, and modules on one floor do not import each other."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = [
    {"launcher", "messages"},
    {
        "attributes",
        "auto_classes",
        "bootstrap",
        "canvas",
        "deepspeed_internals",
        "errors",
        "ranges",
        "seeds",
        "signals",
        "tables",
        "versions",
    },
    {"boxes", "devices", "files", "guard", "hear_signals", "inputs", "locks"},
    {"images", "outputs", "processes", "rle", "settings", "vocabulary"},
    {"arguments", "pictures", "tokenizers"},
    {"pages", "sequence"},
    {"tasks"},
    {"batch", "recipe"},
    {"data", "model"},
    {"inference", "optim"},
    {"evaluation", "labelling", "web"},
    {"baselines", "training"},
    {"stages"},
    {"demo", "reproduce"},
    {"commands"},
    {"cli"},
]
"""The modules and packages of icl_moe, from the ground up."""


def rooms(package: str) -> set[str]:
    found = {path.stem for path in (ROOT / package).glob("*.py")}
    found |= {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
    return found - {"__init__", "__main__"}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """The modules that a file imports anywhere, except those needed only for types."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def test_every_room_has_its_floor():
    assert rooms("icl_moe") == set().union(*FLOORS)
    assert sum(map(len, FLOORS)) == len(set().union(*FLOORS))


@pytest.mark.parametrize("room", sorted(set().union(*FLOORS)))
def test_no_import_runs_upward_or_to_a_neighbour(room):
    floor = next(number for number, rooms in enumerate(FLOORS) if room in rooms)
    below = set().union(*FLOORS[:floor])
    home = ROOT / "icl_moe" / room
    files = home.rglob("*.py") if home.is_dir() else [home.with_suffix(".py")]
    for path in (file for file in files if file.name != "__main__.py"):
        for line, name in imports(path):
            if name.startswith("icl_moe."):
                needed = name.split(".")[1]
                if needed == "__version__":
                    continue  # It is defined in icl_moe/__init__.py, which loads nothing.
                assert needed == room or needed in below, (
                    f"{path.relative_to(ROOT)}:{line} imports {name}, which is not below it"
                )


def test_the_online_half_does_not_import_the_offline_half():
    """Only the commands load it, by name and on demand."""
    for path in (ROOT / "icl_moe").rglob("*.py"):
        if path.parent.name != "commands":
            assert not any(name.startswith("preprocessing") for _, name in imports(path)), path


@pytest.mark.parametrize("package", ["icl_moe", "preprocessing"])
def test_what_is_said_to_the_user_is_said_in_one_place(package):
    for path in (ROOT / package).rglob("*.py"):
        if path != ROOT / "icl_moe/messages.py":
            text = path.read_text(encoding="utf-8")
            assert '"icl-moe: ' not in text, path
            assert "print" not in text or "file=sys.stderr" not in text, path
