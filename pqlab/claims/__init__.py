"""The report's claims beside what pqlab measured: `python -m pqlab claims`.

What the report says stands in `reported`; every figure of pqlab is read from the JSON files of measurements
(`results`), and a verdict is computed from both (`verdict`). Nothing measured is typed here.
"""

from __future__ import annotations

from .command import configure, run
from .reported import CLAIMS
from .results import Results
from .verdict import Claim, Measured, Row, judge, table

__all__ = ["CLAIMS", "Claim", "Measured", "Results", "Row", "configure", "judge", "run", "table"]
