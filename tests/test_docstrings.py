"""Docstrings name what is there: every `module.name` and `Class.attribute` in backticks can be found."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path

import pytest

DOTTED = re.compile(r"(?<!`)`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)(?:\([^`]*\))?`")
FILES = (".py", ".md", ".json", ".jsonl", ".ipynb", ".js", ".cpp", ".h", ".cu", ".cuh")

VARIABLES = {  # what an argument of that name is
    "model": "transformers.LlamaForCausalLM",
    "codebooks": "pqlab.Codebooks",
    "config": "pqlab.CacheConfig",
    "cache": "pqlab.CacheConfig",
    "layout": "plotly.graph_objects.Layout",
}


@cache
def modules() -> dict[str, Path]:
    root = Path(str(files("pqlab")))
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = ("pqlab", *path.relative_to(root).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def dotted_names(path: Path) -> Iterator[tuple[int, str]]:
    """(line, name) of every one in the docstrings of a file, those under constants and fields included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            for match in DOTTED.finditer(node.value.value):
                if not match[1].endswith(FILES):
                    yield node.lineno + node.value.value[: match.start()].count("\n"), match[1]


def starts(name: str, module: str) -> Iterator[tuple[object, list[str]]]:
    """What the first words of a name may stand for, and the words that are left."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        head = ".".join(parts[:count])
        for other in modules():
            if other == head or other.endswith(f".{head}"):
                yield importlib.import_module(other), parts[count:]
    for other in (module, *modules()):  # a name of this module, or a class of any
        thing = getattr(importlib.import_module(other), parts[0], None)
        if thing is not None and (other == module or inspect.isclass(thing)):
            yield thing, parts[1:]
    if parts[0] in VARIABLES:
        owner, _, variable = VARIABLES[parts[0]].rpartition(".")
        yield getattr(importlib.import_module(owner), variable), parts[1:]
    if parts[0] == "torch":
        yield importlib.import_module(name.rpartition(".")[0]), parts[-1:]


def has(thing: object, rest: list[str]) -> bool:
    for i, word in enumerate(rest):
        if not hasattr(thing, word):
            return i == len(rest) - 1 and inspect.isclass(thing) and word in fields(thing)
        thing = getattr(thing, word)
    return True


def fields(cls: type) -> set[str]:
    """Of a class and those it inherits from: annotated ones, and what methods set."""
    found = {name for base in cls.__mro__ for name in getattr(base, "__annotations__", ())}
    for base in cls.__mro__:
        if base.__module__.startswith("pqlab"):
            found |= set(re.findall(r"\bself\.(\w+)", inspect.getsource(base)))
    return found


@pytest.mark.parametrize("module", modules())
def test_names_in_docstrings_are_those_of_something(module):
    lost = [
        f"{modules()[module].name}:{line} `{name}`"
        for line, name in dotted_names(modules()[module])
        if not any(has(thing, rest) for thing, rest in starts(name, module))
    ]
    assert not lost, ", ".join(lost)


def test_a_name_of_nothing_is_noticed():
    for name in ("cuda_config.Configuration.extension", "layout_access.PATTERNS", "Samples.metrics", "maps.unheard_of"):
        assert not any(has(thing, rest) for thing, rest in starts(name, "pqlab.kernels.cuda")), name
