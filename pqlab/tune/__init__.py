"""Search for settings: `python -m pqlab tune`.

    workload = Workload(model, tokenizer, text, context=2048)     # what every setting is measured on
    search = Search(workload.measure, Space.of(model), workload.about())
    search.run(trials=40)                                         # the report's grid first, then Optuna
    search.front()                                                # settings that no other beats in time and KL
    preset_of(workload, search.chosen()).save("tuned.json")       # Preset.load("tuned.json") reads it

Two objectives, time per token and divergence from the exact cache, under a limit of memory. A study lies in a storage
of Optuna, so that a search can go on where it was stopped, and several processes or machines can share one.
"""

from __future__ import annotations

from .command import configure, run
from .space import Setting, Space
from .study import Search
from .workload import Measurement, Workload, preset_of

__all__ = ["Measurement", "Search", "Setting", "Space", "Workload", "configure", "preset_of", "run"]
