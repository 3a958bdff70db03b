"""The probes: each looks at one thing and may raise whatever it likes."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..compiler import compiler_command
from .cache_memory import cache_memory
from .chromium import find_chromium
from .finding import Finding, Probe


def _run(command: Sequence[str], timeout: float = 20) -> tuple[int, str]:
    """Exit code of a command and the first line of what it prints; raises when it cannot run."""
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=timeout, stdin=subprocess.DEVNULL
    )
    text = (done.stdout or done.stderr).strip()
    return done.returncode, text.splitlines()[0] if text else f"exit code {done.returncode}"


def _output(*command: str, timeout: float = 20) -> str:
    return _run(command, timeout)[1]


def pqlab_itself() -> Finding:
    try:
        version = importlib.metadata.version("pqlab")
    except importlib.metadata.PackageNotFoundError:  # it can be used all the same
        version = "not installed"
    value = f"{version}, {Path(__file__).parents[1]}"
    try:
        from .. import PagedPQCache  # noqa: F401
    except Exception as error:
        cause = error.__cause__ or error
        said = " ".join(f"{type(cause).__name__}: {cause}".split())
        return Finding(value, f"it cannot be used here: {said}", "Mend what the message names")
    return Finding(value)


def python() -> Finding:
    place = sys.prefix if sys.prefix != sys.base_prefix else f"{sys.prefix} (no virtual environment)"
    return Finding(f"{platform.python_implementation()} {platform.python_version()}, {place}")


def system() -> Finding:
    return Finding(f"{platform.platform()}, {os.cpu_count()} CPUs")


def cpu() -> Finding:
    """Model name and the vector instructions that the kernels can use."""
    name, flags = platform.processor() or platform.machine(), set()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags |= set(value.split())
    known = "sse4_2 avx avx2 fma f16c avx512f avx512bw avx512vbmi amx_tile neon asimd sve".split()
    return Finding(f"{name}; {' '.join(flag for flag in known if flag in flags) or 'vector flags unknown'}")


def memory() -> Finding:
    from ..memory import free_memory

    free = free_memory()
    if free is None:
        return Finding("free memory unknown")
    if free < 3e9:
        return Finding(f"{free / 1e9:.1f} GB free", "the set-up needs about 3 GB", "End other programs first")
    return Finding(f"{free / 1e9:.1f} GB free")


def packages(extra: str = "", why: str = "") -> Probe:
    """A probe for the packages that pqlab, or one of its extras, asks for: which are missing or too old.

    Args:
        extra: name of the extra; "" stands for what pqlab itself needs.
        why: what does not work without them.
    """

    def probe() -> Finding:
        from packaging.requirements import Requirement

        found, missing = [], []
        try:
            lines = importlib.metadata.requires("pqlab") or []
        except importlib.metadata.PackageNotFoundError:
            return Finding("not known: pqlab is used from a folder, not installed")
        for line in lines:
            wanted = Requirement(line)
            needed_always = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
            if wanted.name == "pqlab" or (needed_always if extra else not needed_always):
                continue
            if extra and not wanted.marker.evaluate({"extra": extra}):
                continue
            try:
                version = importlib.metadata.version(wanted.name)
            except importlib.metadata.PackageNotFoundError:
                missing.append(f"{wanted.name} is not installed")
                continue
            found.append(f"{wanted.name} {version}")
            if not wanted.specifier.contains(version, prereleases=True):
                missing.append(f"{wanted.name} {version} is not {wanted.specifier}")
        target = f"'pqlab[{extra}]'" if extra else "pqlab"
        problem = "; ".join(missing) + (f" ({why})" if why else "") if missing else ""
        return Finding(", ".join(found) or "none", problem, f"Run make setup, or: pip install {target}")

    return probe


def torch_build() -> Finding:
    try:
        import torch
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        return Finding(
            f"cannot be imported ({said})",
            "nothing runs without torch",
            f"Install it anew: {sys.executable} -m pip install --force-reinstall torch, or: rm -r .venv; make setup",
        )
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return Finding(f"{torch.__version__}, {build}, {torch.get_num_threads()} threads")


def compiler() -> Finding:
    command = compiler_command()
    path = shutil.which(command[0])
    problem = "without a C++ compiler the slow plain torch backend runs"
    remedy = "Install one (Debian: apt-get install g++; conda: cxx-compiler), or set CXX"
    if path is None:
        return Finding(f"{command[0]} not found", problem, remedy)
    asked = [path, *command[1:], "--version"]  # of a wrapper with its compiler: that of the compiler
    status, said = _run(asked)
    value = f"{said}, {shlex.join(asked[:-1])}"
    return Finding(value, f"{shlex.join(asked)} fails; {problem}" if status else "", remedy)


def ninja() -> Finding:
    beside = Path(sys.executable).with_name("ninja")  # pip's lies there, on the PATH or not
    path = shutil.which("ninja") or (str(beside) if beside.exists() else None)
    if path is None:
        return Finding("not found", "kernels cannot be built without it", "pip install ninja")
    return Finding(f"{_output(path, '--version')}, {path}")


def _find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None)


def nvcc() -> Finding:
    """The CUDA toolkit, and whether it is of the version that torch was built with.

    torch refuses to build with a toolkit of another major version; another minor version works, and is said.
    """
    path = _find_nvcc()
    if path:
        lines = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout.splitlines()
        said = next((line for line in lines if "release" in line), "version unknown").strip()
        return _toolkit_beside_torch(f"{said}, {path}", re.search(r"release (\d+)\.(\d+)", said))
    import torch

    if torch.cuda.is_available():
        return Finding("not found", "CUDA kernels cannot be built", "Install the CUDA toolkit, or set CUDA_HOME to it")
    return Finding("not found (only needed with an NVIDIA GPU)")


def _toolkit_beside_torch(value: str, release: re.Match[str] | None) -> Finding:
    import torch

    wanted = torch.version.cuda
    if not torch.cuda.is_available():
        return Finding(f"{value}; not used here, torch sees no GPU")
    if release is None or wanted is None:
        return Finding(value)
    if release[1] != wanted.split(".")[0]:
        return Finding(
            value,
            f"torch was built with CUDA {wanted}, the toolkit is {release[1]}.{release[2]}: kernels cannot be built",
            f"Install the toolkit {wanted} and set CUDA_HOME to it, or install a torch for CUDA {release[1]}",
        )
    return Finding(value if f"{release[1]}.{release[2]}" == wanted else f"{value} (torch: {wanted}, which fits)")


def host_compiler() -> Finding:
    """Whether nvcc takes the C++ compiler that torch hands it, which is $CC, else its own choice: a toolkit knows
    compilers up to some version. Tried on an empty file."""
    import torch

    path = _find_nvcc()
    if path is None or not torch.cuda.is_available():
        return Finding("nvcc is not used here")
    host = os.environ.get("CC")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.cu"
        source.touch()
        command = [path, "-E", str(source), "-o", os.devnull, *(["-ccbin", host] if host else [])]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
    if done.returncode == 0:
        return Finding(f"{host or 'the default one'} fits {path}")
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines() or ["?"]
    return Finding(
        f"{host or 'the default one'} does not fit {path}",
        f"nvcc refuses it: {errors[0].strip()[:300]}",
        "Install a C++ compiler that this toolkit takes (its message names the versions) and set CC to it",
    )


def libraries() -> Finding:
    """torch's own libraries, whether LD_LIBRARY_PATH puts others before them, and what the built kernels still lack.

    Kernels are linked against torch's libraries, which torch has loaded before: nothing has to be set for that.
    """
    import torch

    own = Path(torch.__file__).parent / "lib"
    chosen = [Path(entry) for entry in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if entry]
    value = f"{own}; LD_LIBRARY_PATH {'is ' + os.pathsep.join(map(str, chosen)) if chosen else 'is not set'}"
    here = {path.name for path in own.glob("*.so*")}
    for entry in chosen:
        others = sorted({path.name for path in entry.glob("lib*.so*")} & here) if entry.is_dir() else []
        if others and entry.resolve() != own.resolve():
            return Finding(
                value,
                f"LD_LIBRARY_PATH loads {', '.join(others[:3])} from {entry} instead of from torch",
                f"Take {entry} out of LD_LIBRARY_PATH, or put torch's folder first: "
                f"export LD_LIBRARY_PATH={own}:$LD_LIBRARY_PATH",
            )
    lacking = _unresolved(here)
    if lacking:
        return Finding(
            value,
            f"built kernels need {', '.join(lacking)}, which no folder of the loader has",
            "Add the folder that has it to LD_LIBRARY_PATH (CUDA's lie in CUDA_HOME/lib64), or remove the folder "
            "kernels from pqlab's cache directory: the next import builds for the libraries of now",
        )
    return Finding(value)


def _unresolved(known: set[str]) -> list[str]:
    """Libraries that built kernels ask for and neither the loader nor torch (`known`) has."""
    from ..kernels.build import finished_builds

    ldd, missing = shutil.which("ldd"), set()
    for build in finished_builds() if ldd else ():
        said = subprocess.run([ldd, str(build.path)], capture_output=True, text=True, timeout=20).stdout
        missing |= {line.split()[0] for line in said.splitlines() if "not found" in line}
    return sorted(missing - known)


def gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        names = [torch.cuda.get_device_properties(i) for i in range(count)]
        return Finding(", ".join(f"{p.name} ({p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor})" for p in names))
    if shutil.which("nvidia-smi"):
        seen = _output("nvidia-smi", "-L")
        if "GPU" in seen:
            return Finding(
                f"{seen}, but torch cannot use it",
                "torch is a CPU build or its CUDA is newer than the driver",
                "pip install --force-reinstall a CUDA build of torch that fits the driver",
            )
    return Finding("none")


def backends() -> Finding:
    """Which backend every operation gets here and why: `pqlab.kernels.backend_report()`."""
    from .. import kernels

    report = kernels.backend_report().as_dict()
    chosen = {f"{choice['op']} on {choice['device']}": choice for choice in report["choices"]}
    details = {name: f"{choice['backend']} ({choice['reason']})" for name, choice in chosen.items()}
    failed = []
    for name, build in report["builds"].items():
        path = f", {build['path']}" if build["path"] else ""
        details[f"{name} build"] = f"{build['state']} {build['detail']}".strip() + path
        if build["state"] == "failed":
            failed.append(f"the build of {name} failed ({build['instead']}): {' '.join(build['error'].split())[-400:]}")
    value = f"setting {report['setting']}: {', '.join(sorted({choice['backend'] for choice in chosen.values()}))}"
    remedy = "The whole message: import pqlab; pqlab.kernels.wait(); pqlab.backend_report()"
    return Finding(value, "; ".join(failed), remedy if failed else "", details)


def caches() -> Finding:
    """The cache directory and the bytes in each of its folders."""
    from ..store import ENVIRONMENT, cache_dir

    root = cache_dir()
    chosen = f"set by {ENVIRONMENT}" if os.environ.get(ENVIRONMENT) else f"{ENVIRONMENT} moves it"
    details = {path.name: _size(path) for path in sorted(root.iterdir())} if root.is_dir() else {}
    parent = next(path for path in (root, *root.parents) if path.exists())
    free = shutil.disk_usage(parent).free
    value = f"{root} ({chosen}), {free / 1e9:,.1f} GB free"
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        return Finding(value, "it cannot be written", f"Set {ENVIRONMENT} to a folder that can", details)
    if free < 2e9 and "models" not in details:
        return Finding(value, "the default model needs 1 GB there", f"Set {ENVIRONMENT} to another disk", details)
    return Finding(value, details=details)


def _size(path: Path) -> str:
    files = [path] if path.is_file() else [entry for entry in path.rglob("*") if entry.is_file()]
    return f"{sum(file.stat().st_size for file in files) / 1e6:,.1f} MB in {len(files)} files"


def default_model() -> Finding:
    from ..models import PACKAGED

    model = PACKAGED["default"]
    if model.path.is_dir():
        return Finding(f"{model.name}, {model.path}")
    return Finding(
        f"{model.name} is not here yet (it is fetched on first use, {model.download_bytes / 1e6:.0f} MB)",
        "",
        "Run make setup to fetch it now",
    )


def chromium() -> Finding:
    path = find_chromium()
    if path is None:
        return Finding("not found", "the browser test needs one", "make test installs it, or set PQLAB_CHROMIUM")
    return Finding(f"{_output(path, '--version')}, {path}")


PROBES: dict[str, Probe] = {
    "pqlab": pqlab_itself,
    "python": python,
    "system": system,
    "cpu": cpu,
    "memory": memory,
    "cache memory": cache_memory(),
    "torch": torch_build,
    "libraries": libraries,
    "gpu": gpu,
    "compiler": compiler,
    "ninja": ninja,
    "nvcc": nvcc,
    "host compiler": host_compiler,
    "backends": backends,
    "caches": caches,
    "default model": default_model,
    "packages": packages(),
    "extra notebook": packages("notebook", "notebooks and panels need it"),
    "extra model": packages("model", "embedded models are converted with it"),
    "extra tune": packages("tune", "pqlab tune needs it"),
    "extra test": packages("test", "the tests need it"),
    "chromium": chromium,
}
"""In the order of the report."""
