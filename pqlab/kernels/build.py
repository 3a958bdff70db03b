"""Builds C++ and CUDA sources once through `torch.utils.cpp_extension.load` and keeps the result in a cache folder.

A finished build is a folder `<cache>/<name>-<key>/` with the library and `build.json`; it appears by one rename, so it
is whole or it is not there. What is being built lies in a folder of its own beside it, under a lock that the operating
system releases when the process dies: a build that was killed, an orphaned ninja or a stale lock file of
cpp_extension cannot be met by the next import. The key holds everything that changes the library: all sources,
flags, torch, Python, this CPU and the compiler. Environment:

    PQLAB_BUILD   background (default) | eager (import waits) | off (use what the cache has, build nothing)
    PQLAB_CACHE   cache folder of pqlab (`store.cache_dir`); libraries lie in its folder kernels/
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..compiler import build_environment, compiler_command
from ..errors import ConfigError
from ..store import cache_dir
from .backend import BuildStatus
from .progress import ProgressLine

MODES = ("background", "eager", "off")


def build_mode() -> str:
    mode = os.environ.get("PQLAB_BUILD", "") or "background"
    if mode not in MODES:
        raise ConfigError(f"PQLAB_BUILD = {mode!r} is unknown; set one of {', '.join(MODES)}")
    return mode


def cache_folder() -> Path:
    return cache_dir() / "kernels"


@dataclass(frozen=True)
class FinishedBuild:
    """A library in the cache folder, whole and unchanged since it was built."""

    name: str
    path: Path
    seconds: float
    torch: str
    flags: tuple[str, ...]


def finished_builds() -> list[FinishedBuild]:
    """Every whole library of the cache folder (and of the one that replaces it where it cannot be written)."""
    found = []
    for root in (cache_folder(), _fallback_folder()):
        for folder in sorted(root.glob("*/build.json")) if _is_ours(root) else ():
            library, info = _read_build(folder.parent)
            if library is not None:
                seconds, flags = float(info.get("seconds", 0)), tuple(info.get("flags", ()))
                found.append(FinishedBuild(library.stem, library, seconds, info.get("torch", "unknown"), flags))
    return found


class Extension:
    """A library that is built when it is first needed and loaded from the cache afterwards.

    Args:
        name: of the library, e.g. "pqlab_cpu"; letters, digits and underscores.
        sources: files to compile. Headers beside them (any file of the same folders) take part in the key.
        headers: those of other folders, which take part in it, too.
        load: called with the path once there is a library; what it raises makes the build "failed".
        cflags, ldflags, cuda_cflags, with_cuda: as in `torch.utils.cpp_extension.load`.
        instead: what happens without the library, for reports; the default is that of `BuildStatus`.
        then: called with the mode of `start` once the library is loaded, e.g. to start the next build.
    """

    def __init__(
        self,
        name: str,
        sources: Sequence[Path],
        load: Callable[[Path], None],
        *,
        headers: Sequence[Path] = (),
        cflags: Sequence[str] = (),
        ldflags: Sequence[str] = (),
        cuda_cflags: Sequence[str] = (),
        with_cuda: bool = False,
        instead: str = BuildStatus.instead,
        then: Callable[[str], None] = lambda mode: None,
    ) -> None:
        self.name = name
        self.sources, self.headers = [Path(source) for source in sources], [Path(header) for header in headers]
        self.cflags, self.ldflags, self.cuda_cflags = list(cflags), list(ldflags), list(cuda_cflags)
        self.with_cuda = with_cuda
        flags = [*cflags, *cuda_cflags, *ldflags]
        self.status = BuildStatus("off", "nothing has started a build", flags=flags, instead=instead)
        self._load, self._then = load, then
        self._finished = threading.Event()
        self._finished.set()

    def start(self, mode: str | None = None) -> None:
        """Load the cached library, else build it as `mode` says (default: PQLAB_BUILD). Never raises for a build."""
        mode = mode or build_mode()
        begin = time.perf_counter()
        self.status.error = ""
        key = self._key()
        for folder in (cache_folder(), _fallback_folder()):
            if _is_ours(folder) and self._use_cached(folder, key, begin):
                self._then(mode)
                return
        if mode == "off":
            self._set("off", "building is turned off (PQLAB_BUILD=off) and the cache has no build that fits")
            return
        missing = _missing_tools()
        if missing:
            self._set("failed", missing, error=missing)
            return
        self._finished.clear()
        self._set("building", f"{self.name} is still being built; pqlab.kernels.wait() blocks until it is ready")
        line = ProgressLine(f"pqlab: building {self.name} (once; cached afterwards)")
        if mode == "eager":
            self._build(key, line, mode)
        else:
            threading.Thread(target=self._build, args=(key, line, mode), daemon=True, name=f"build-{self.name}").start()

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the build has ended, well or badly; False when `timeout` seconds ran out first."""
        return self._finished.wait(timeout)

    # -- the cache ---------------------------------------------------------------------------------------------------

    def _key(self) -> str:
        """Two hashes: of what makes a library unfit to load here, and of the compiler, which may be gone later."""
        beside = {file for source in self.sources for file in source.parent.iterdir() if file.is_file()}
        files = sorted(beside.union(self.headers))
        here = hashlib.sha256()
        for part in (
            torch.__version__, os.path.dirname(torch.__file__), sys.implementation.cache_tag, _cpu_flags(),
            repr((self.cflags, self.ldflags, self.cuda_cflags, [source.name for source in self.sources])),
        ):  # fmt: skip
            here.update(part.encode() + b"\0")
        for file in files:
            here.update(file.name.encode() + b"\0" + file.read_bytes())
        return f"{here.hexdigest()[:16]}-{hashlib.sha256(_compiler_identity().encode()).hexdigest()[:8]}"

    def _use_cached(self, root: Path, key: str, begin: float) -> bool:
        names = [f"{self.name}-{key}"]
        if not _compiler_identity():  # any compiler's build will do where there is none to make another
            names = sorted(p.name for p in root.glob(f"{self.name}-{key.rpartition('-')[0]}-*") if p.is_dir())
        for name in names:
            library, info = _read_build(root / name)
            if library is None:
                continue
            try:
                self._load(library)
            except Exception as error:  # a library that cannot be loaded is rebuilt
                self.status.error = f"{library}: {error}"
                continue
            self._set("ready", "loaded from the cache", path=str(library), cached=True)
            self.status.seconds = time.perf_counter() - begin
            self.status.flags = info.get("flags", self.status.flags)
            return True
        return False

    # -- building ----------------------------------------------------------------------------------------------------

    def _build(self, key: str, line: ProgressLine, mode: str) -> None:
        begin = time.perf_counter()
        try:
            root, remark = _writable_folder()
            with _lock(root / f"{self.name}-{key}.lock"):
                if not self._use_cached(root, key, begin):  # another process may have built it meanwhile
                    library = self._compile(root, key, begin)
                    self._load(library)
                    self._set("ready", remark or "built", path=str(library), cached=False)
                    self.status.seconds = time.perf_counter() - begin
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
            self._set("failed", f"building {self.name} failed: {_first_error(text)}", error=text)
            if not isinstance(error, Exception):
                raise
        finally:
            ready = self.status.state == "ready"
            line.finish(f"ready in {time.perf_counter() - begin:.1f} s" if ready else self.status.detail)
            if ready:
                self._then(mode)
            self._finished.set()

    def _compile(self, root: Path, key: str, begin: float) -> Path:
        final = root / f"{self.name}-{key}"
        for left in root.glob(f".{self.name}-{key}-*"):  # we hold the lock: whoever made these is dead
            shutil.rmtree(left, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".{self.name}-{key}-", dir=root))
        try:
            from torch.utils import cpp_extension  # needs setuptools and 0.3 s: only when there is something to build

            with build_environment(root, _scripts_folder()):
                built = cpp_extension.load(
                    self.name,
                    [str(source) for source in self.sources],
                    extra_cflags=self.cflags,
                    extra_ldflags=self.ldflags,
                    extra_cuda_cflags=self.cuda_cflags or None,
                    build_directory=str(work),
                    with_cuda=self.with_cuda,
                    is_python_module=False,
                )
            library = Path(built)
            for file in work.iterdir():
                if file != library:
                    file.unlink()
            info = {
                "library": library.name,
                "sha256": hashlib.sha256(library.read_bytes()).hexdigest(),
                "flags": self.status.flags,
                "seconds": round(time.perf_counter() - begin, 2),
                "torch": torch.__version__,
                "compiler": _compiler_identity(),
            }
            (work / "build.json").write_text(json.dumps(info, indent=1))
            if final.exists() and _read_build(final)[0] is None:
                shutil.rmtree(final)  # damaged: not what a rename leaves behind
            with contextlib.suppress(OSError):  # without working locks somebody may have been first: theirs is as good
                os.replace(work, final)
            return final / library.name
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _set(self, state: str, detail: str, **changes: Any) -> None:
        self.status.detail = detail
        for name, value in changes.items():
            setattr(self.status, name, value)
        self.status.state = state


def wait_for_all(extensions: Iterable[Extension], timeout: float | None = None) -> bool:
    """Block until all builds have ended, well or badly; False when `timeout` seconds for all together ran out."""
    end = None if timeout is None else time.monotonic() + timeout
    return all(one.wait(None if end is None else max(0.0, end - time.monotonic())) for one in extensions)


def _read_build(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """The library of a finished build, or None when the folder is missing or damaged."""
    try:
        info = json.loads((folder / "build.json").read_text())
        library = folder / info["library"]
        if hashlib.sha256(library.read_bytes()).hexdigest() == info["sha256"]:
            return library, info
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None, {}


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Exclusive between processes while the file system can; the lock ends with its owner, however that dies."""
    with open(path, "w") as file:
        with contextlib.suppress(ImportError, OSError):  # no flock here: unique folders and the rename still hold
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _writable_folder() -> tuple[Path, str]:
    """The cache folder, or one in the temporary directory and a remark about it when the cache cannot be written."""
    wanted = cache_folder()
    try:
        _probe(wanted)
        return wanted, ""
    except OSError as error:
        fallback = _fallback_folder()
        _probe(fallback)
        if not _is_ours(fallback):
            raise PermissionError(f"{fallback} belongs to somebody else") from error
        return fallback, f"built in {fallback}, because {wanted} cannot be written: {error}"


def _probe(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryFile(dir=folder):
        pass


def _is_ours(folder: Path) -> bool:
    """Libraries are loaded from folders that this user (or root) made, nobody else's."""
    try:
        return not hasattr(os, "getuid") or folder.stat().st_uid in (os.getuid(), 0)
    except OSError:
        return False


def _fallback_folder() -> Path:
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
    return Path(tempfile.gettempdir()) / f"pqlab-kernels-{user}"


def _scripts_folder() -> str:
    return sysconfig.get_path("scripts")


def _missing_tools() -> str:
    if shutil.which("ninja") is None and shutil.which("ninja", path=_scripts_folder()) is None:
        return "ninja was not found; pip install ninja"
    command = compiler_command()
    if shutil.which(command[0]) is None:
        return f"no C++ compiler ({' '.join(command)}) was found; install g++ or set CXX"
    return ""


def _compiler_identity() -> str:
    """Path, size and date of the compiler's binary (and of what wraps it, and options): as telling as its version,
    without the 10 ms of asking it. Empty where there is none."""
    command = compiler_command()
    paths = [shutil.which(word) for word in command]
    if paths[0] is None:
        return ""
    parts = []
    for word, path in zip(command, paths, strict=True):
        if path is not None:
            real = os.path.realpath(path)
            stat = os.stat(real)
            word = f"{real} {stat.st_size} {stat.st_mtime_ns}"
        parts.append(word)
    return " ".join(parts)


def _cpu_flags() -> str:
    """What -march=native depends on."""
    try:
        with open("/proc/cpuinfo") as file:
            lines = [
                line for line in file.read(8192).splitlines() if line.startswith(("model name", "flags", "Features"))
            ]
        return platform.machine() + "\n".join(lines[:2])
    except OSError:
        return f"{platform.machine()} {platform.processor()}"


def _first_error(text: str) -> str:
    """The line of a compiler's output that says what is wrong."""
    lines = text.splitlines()
    found = [line for line in lines if "error:" in line or "No space left" in line or "not found" in line]
    return (found or lines or [""])[0].strip()[:300]
