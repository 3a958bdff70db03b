"""The search: the report's grid first, then Optuna, in a storage that survives the process and can be shared."""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..errors import ConfigError, PQCacheError
from ..memory import readable_bytes
from .choice import choose, finalists
from .space import Setting, Space
from .storage import need_optuna, open_storage
from .workload import Measurement

if TYPE_CHECKING:
    import optuna

TIRED = 60
"""So many repeated proposals in a row end a search: the sampler knows nothing new."""

Measure = Callable[[Setting], Measurement]

_TAKEN = "measured before, or another process is at it"  # why a trial was passed over


class Search:
    """A study of settings.

    Args:
        measure: what a setting costs.
        space: what may be tried.
        about: what has to be the same for measurements to be comparable; a study of something else is refused.
        storage: of Optuna, or what `open_storage` takes; None keeps it in this process.
        name: of the study in its storage.
        memory: most bytes a cache may take, or None; `needed` gives a setting's. Settings above it are told to the
            sampler as constraints that are not met, and are not measured.
        say: called with a line about every trial.

    Raises:
        ImportError: Optuna is not installed.
        ConfigError: the study in the storage is one of something else.
    """

    def __init__(
        self,
        measure: Measure,
        space: Space,
        about: Mapping[str, Any],
        *,
        storage: str | Path | optuna.storages.BaseStorage | None = None,
        name: str = "pqlab",
        memory: int | None = None,
        needed: Callable[[Setting], int] | None = None,
        seed: int | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        need_optuna()
        import optuna

        if memory is not None and needed is None:
            raise ConfigError("a limit of memory needs a function that gives a setting's bytes; set needed")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.measure, self.space, self.memory, self.needed, self.say = measure, space, memory, needed, say
        self._failed: dict[Setting, str] = {}  # in this process; another may be able to measure them
        about = {**about, "memory": memory, "space": {k: list(v) for k, v in asdict(space).items()}}
        if storage is None:
            kept = optuna.storages.InMemoryStorage()
        else:
            kept = open_storage(storage) if isinstance(storage, (str, Path)) else storage
        options = {"sampler": optuna.samplers.TPESampler(seed=seed, n_startup_trials=12), "study_name": name}
        try:
            self.study = optuna.create_study(storage=kept, directions=["minimize"] * 2, **options)
            self.study.set_user_attr("about", about)
            missing = list(space.report_grid())
        except optuna.exceptions.DuplicatedStudyError:
            self.study = optuna.load_study(storage=kept, **options)
            self._check(name, about)
            self._bury()
            missing = [s for s in space.report_grid() if s not in self._known()]
        for setting in missing:
            self.study.enqueue_trial(setting.params(), user_attrs={"grid": True})

    def run(self, *, trials: int = 40, timeout: float | None = None) -> None:
        """Go on until the study holds `trials` measured settings, over all processes and runs.

        Args:
            timeout: seconds after which no new trial is begun.
        """
        if trials < 1:
            raise ConfigError(f"trials = {trials} is out of range (at least 1); the nearest good value is 1")
        self._wanted, self._tired = trials, 0
        if not self._is_done():
            self.study.optimize(self._try, timeout=timeout, callbacks=[self._after])

    def frame(self) -> pd.DataFrame:
        """One row a measured setting: number, grid, its fields, those of `Measurement`, seconds, worker, best (on the
        front of settings that no other beats in time and KL, or bytes where there is no KL)."""
        from optuna.trial import TrialState

        best = {trial.number for trial in self.study.best_trials} if self._measured() else set()
        rows = []
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            rows.append(
                {
                    "number": trial.number,
                    "grid": trial.user_attrs.get("grid", False),
                    **trial.params,
                    **trial.user_attrs["measured"],
                    "seconds": trial.duration.total_seconds(),
                    "worker": trial.user_attrs.get("worker", ""),
                    "best": trial.number in best,
                }
            )
        names = [field.name for kind in (Setting, Measurement) for field in fields(kind)]
        return pd.DataFrame(rows, columns=["number", "grid", *names, "seconds", "worker", "best"])

    def front(self) -> pd.DataFrame:
        """The best rows of `frame`, the fastest first."""
        found = self.frame()
        return found[found.best.astype(bool)].sort_values("milliseconds").reset_index(drop=True)

    def finalists(self, max_kl: float | None = None) -> pd.DataFrame:
        """Rows of `frame` that are to be timed again in turns before one is taken (`choice.finalists`).

        Raises:
            ConfigError: nothing was measured, or nothing reaches `max_kl`.
        """
        return finalists(self._some(), max_kl)

    def chosen(self, max_kl: float | None = None) -> Setting:
        """The setting that the first timings speak for (`choice.choose`); what is raised is that of `finalists`."""
        return Setting.of_row(choose(self._some(), max_kl))

    def _some(self) -> pd.DataFrame:
        """`frame`, if there is anything in it."""
        found = self.frame()
        if not len(found):
            over = Counter(trial.user_attrs.get("why", "") for trial in self.study.get_trials(deepcopy=False))
            said = "; ".join(f"{count} trials: {why}" for why, count in over.most_common(3) if why)
            raise ConfigError(f"no setting was measured ({said or 'no trial ran'}); raise the limits")
        return found

    def pruned(self) -> pd.DataFrame:
        """What was not measured, and why: number, why."""
        from optuna.trial import TrialState

        states = (TrialState.PRUNED, TrialState.FAIL)
        found = self.study.get_trials(deepcopy=False, states=states)
        return pd.DataFrame(
            [(trial.number, trial.user_attrs.get("why", "")) for trial in found], columns=["number", "why"]
        )

    # -- a trial ----------------------------------------------------------------------------------------------------

    def _try(self, trial: optuna.Trial) -> tuple[float, float]:
        import optuna

        trial.set_user_attr("worker", _worker())
        given = {name: trial.suggest_categorical(name, values) for name, values in asdict(self.space).items()}
        setting = Setting(**given)
        if self.memory is not None and self.needed is not None:
            bytes_needed = self.needed(setting)
            trial.set_constraint("memory", bytes_needed - self.memory)
            if bytes_needed > self.memory:
                self._skip(trial, f"needs more than {readable_bytes(self.memory)}")
                raise optuna.TrialPruned
        if setting in self._failed or self._is_taken(setting, trial.number):
            self._skip(trial, self._failed.get(setting, _TAKEN))
            raise optuna.TrialPruned
        begin = time.perf_counter()
        try:
            found = self.measure(setting)
        except (PQCacheError, ConfigError) as error:
            self._failed[setting] = f"{type(error).__name__}: {error}"[:300]
            self._skip(trial, self._failed[setting])
            self.say(f"trial {trial.number}: {setting}: {error}")
            trial.set_constraint("measured", 1.0)  # a trial that only failed tells the sampler nothing
            raise optuna.TrialPruned from error
        trial.set_user_attr("measured", asdict(found))
        count = len(self._measured()) + 1
        kl = "" if isnan(found.kl) else f"KL {found.kl:.5f}, "
        self.say(
            f"[{count}/{self._wanted}] {setting}: {found.milliseconds:.2f} +- {found.milliseconds_error:.2f} ms, "
            f"{kl}{readable_bytes(found.bytes)} ({time.perf_counter() - begin:.1f} s)"
        )
        return found.milliseconds, found.bytes if isnan(found.kl) else found.kl

    def _skip(self, trial: optuna.Trial, why: str) -> None:
        trial.set_user_attr("why", why)

    def _after(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        from optuna.trial import TrialState

        self._tired = 0 if trial.state == TrialState.COMPLETE else self._tired + 1
        if self._tired >= TIRED:
            self.say(f"{TIRED} proposals in a row brought nothing new: the search ends")
        if self._tired >= TIRED or self._is_done():
            study.stop()

    def _is_done(self) -> bool:
        measured = self._measured()
        return len(measured) >= min(self._wanted, self.space.size)

    def _measured(self) -> set[Setting]:
        from optuna.trial import TrialState

        return {Setting(**t.params) for t in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))}

    def _is_taken(self, setting: Setting, number: int) -> bool:
        """Whether it was measured, or another process is at it and began earlier."""
        from optuna.trial import TrialState

        return any(
            trial.params == setting.params() and (trial.state == TrialState.COMPLETE or trial.number < number)
            for trial in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.RUNNING))
        )

    def _known(self) -> set[Setting]:
        """Settings that were measured, are being measured, wait, or cannot be measured.

        A trial that was passed over for another one of the same setting says nothing: the other may have failed since.
        """
        from optuna.trial import TrialState

        known = set()
        for trial in self.study.get_trials(deepcopy=False):
            given = trial.params or trial.system_attrs.get("fixed_params", {})
            gone = trial.state == TrialState.FAIL or trial.user_attrs.get("why") == _TAKEN
            if not gone and len(given) == len(fields(Setting)):
                known.add(Setting(**given))
        return known

    # -- a study of before -------------------------------------------------------------------------------------------

    def _check(self, name: str, about: Mapping[str, Any]) -> None:
        for _ in range(50):  # the process that makes a study names it a moment later
            if "about" in self.study.user_attrs:
                break
            time.sleep(0.1)
        kept = self.study.user_attrs.get("about", {})
        other = [f"{key} {kept.get(key)!r} there, {about.get(key)!r} here" for key in sorted({*kept, *about})
                 if kept.get(key) != about.get(key)]  # fmt: skip
        if other:
            raise ConfigError(f'the study "{name}" is one of something else: {"; ".join(other)}. Give this one another '
                              "name (--study)")  # fmt: skip

    def _bury(self) -> None:
        """Trials of processes of this machine that are no more count as failed; their settings are tried again."""
        from optuna.trial import TrialState

        host = socket.gethostname()
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            where, _, pid = trial.user_attrs.get("worker", "").rpartition(":")
            if where == host and pid.isdigit() and not _is_alive(int(pid)):
                self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
                self.say(f"trial {trial.number} was left by a process that ended; its setting can be tried again")


def _worker() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
