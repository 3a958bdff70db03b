"""Arrows run down only: every room of the package imports rooms below it, also inside of functions."""

from __future__ import annotations

import ast
from importlib.resources import files
from pathlib import Path

ROOMS = (
    "errors config compiler memory transformers_api store memory_peak process_memory explain paging kernels models "
    "attention quantization shapes cost presets arguments prepare cache model_runs results trace doctor evaluation "
    "figures benchmarks selftest tune pipeline panels claims cli __init__ __main__"
).split()
"""From the lowest to the highest; a module of the package's top folder is a room, too."""

ALLOWED = {"doctor/probes.py imports __init__"}  # it asks whether the package can be imported at all


def imports(path: Path, inside: list[str]) -> set[str]:
    """Rooms that a module imports when it runs; what only type checkers read does not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unread = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    rooms = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in unread:
            base = inside[: len(inside) - node.level + 1] + (node.module.split(".") if node.module else [])
            rooms |= {base[0]} if base else {alias.name for alias in node.names}
    return {room if room in ROOMS else "__init__" for room in rooms}  # `from .. import PagedPQCache`


def test_arrows_run_down():
    root = Path(str(files("pqlab")))
    up, seen = [], set()
    for path in sorted(root.rglob("*.py")):
        parts = list(path.relative_to(root).with_suffix("").parts)
        room = parts[0]
        seen.add(room)
        for other in imports(path, parts[:-1]) - {room}:
            if ROOMS.index(other) >= ROOMS.index(room):
                up.append(f"{path.relative_to(root).as_posix()} imports {other}")
    assert set(up) == ALLOWED, "\n".join(sorted({*up} ^ ALLOWED))
    assert seen == set(ROOMS), "a room is new or gone: say where it stands"
