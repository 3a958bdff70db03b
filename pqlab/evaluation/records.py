"""Records of `Evaluation.record` from several runs, put together: many methods take hours on a small machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError

SAME = ("model", "text", "calibration", "windows", "length", "stride", "skip", "prompt", "cache")
"""Settings in which records have to agree before their rows can stand in one table."""


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of both; those of a method that both have are the new ones. Everything else is `new`'s.

    Raises:
        ConfigError: the runs differ in something that the numbers depend on.
    """
    for name in SAME:
        if old.get(name) != new.get(name):
            raise ConfigError(
                f"the records differ in {name}: {old.get(name)} and {new.get(name)}; give another file, or the same "
                f"settings"
            )
    rows = {row["method"]: row for row in old["methods"]}
    rows |= {row["method"]: row for row in new["methods"]}
    return {**new, "codebooks": old["codebooks"] | new["codebooks"], "methods": list(rows.values())}
