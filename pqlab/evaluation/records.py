"""Records of `Evaluation.record` from several runs, put together: many methods take hours on a small machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError

HOW = ("date", "commit", "versions", "device")
"""What a row says for itself, under "measured", where it differs from its table."""

SAME = ("model", "text", "calibration", "windows", "length", "stride", "skip", "prompt", "cache")
"""Settings in which records have to agree before their rows can stand in one table."""


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of both; those of a method that both have are the new ones, which say how they were measured where that is
    not as the table says.

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
    how = {name: new[name] for name in HOW if new.get(name) != old.get(name)}
    marked = {"measured": how} if how else {}
    rows |= {row["method"]: {**row, **marked} for row in new["methods"] if row["method"] != "exact"}
    return {**old, "codebooks": old["codebooks"] | new["codebooks"], "methods": list(rows.values())}
