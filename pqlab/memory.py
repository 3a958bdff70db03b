"""How much memory a device has left, and the check that comes before every large allocation (PQC004)."""

from __future__ import annotations

from pathlib import Path

import torch

from .errors import OutOfMemoryError

MIB = 2**20

_CGROUPS, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def free_memory(device: str | torch.device = "cpu") -> int | None:
    """Bytes that can still be allocated on `device`; None where the system does not say.

    On a CPU this is the kernel's estimate of available memory, or what the process' control groups leave of their
    limits (containers, Slurm, systemd-run) when that is less. On CUDA it includes what torch's caching allocator holds
    but does not use.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    known = [value for value in (_meminfo_available(), _cgroup_available()) if value is not None]
    return min(known) if known else _psutil_available()


def require_memory(num_bytes: int, page_bytes: int, device: str | torch.device = "cpu") -> None:
    """Raise `OutOfMemoryError` (PQC004) when a pool of `num_bytes` does not fit; names the `max_pages` that would."""
    free = free_memory(device)
    if free is None or num_bytes <= free:
        return
    pages, fitting = num_bytes // max(1, page_bytes), free // max(1, page_bytes)
    remedy = f"Set max_pages to at most {fitting}" if fitting else "Set a smaller page_size"
    raise OutOfMemoryError(
        f"A pool of {pages} pages of {page_bytes:,} bytes needs {num_bytes / MIB:,.1f} MiB, "
        f"{free / MIB:,.1f} MiB are free on {device}.",
        f"{remedy}, or lower M or nbits.",
    )


def readable_bytes(num_bytes: float) -> str:
    """A size for a person: "512 B", "1.5 KiB", "23.4 GiB"."""
    size, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:,.0f} B" if unit == "B" else f"{size:,.1f} {unit}"


def _meminfo_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _cgroup_available() -> int | None:
    """What the control groups of this process leave of their limits: the least, from the root down to its own group.

    A container sees its group as the root. Slurm and systemd-run set the limit on a group further down, or on one
    between: /proc/self/cgroup has the way. Page cache of files counts as free, the kernel can drop it.
    """
    two, one = _own_groups()
    found = [
        *(_left(group, "memory.max", "memory.current", "inactive_file") for group in two),
        *(_left(group, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file") for group in one),
    ]
    return min((left for left in found if left is not None), default=None)


def _own_groups() -> tuple[list[Path], list[Path]]:
    """Folders of the groups that this process is in, roots first, of cgroup v2 and of v1's memory controller.

    Some may not be there: a container without a namespace of its own is told the way outside of it.
    """
    ways = {"": "/", "memory": "/"}
    try:
        lines = _MEMBERSHIP.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:  # 0::/user.slice/run.scope in v2, 4:memory:/slurm/job in v1
        _, controllers, way = (line.split(":", 2) + ["", ""])[:3]
        ways |= {name: way for name in controllers.split(",") if name in ways}
    two = [group for root in (_CGROUPS, _CGROUPS / "unified") for group in _along(root, ways[""])]
    return two, _along(_CGROUPS / "memory", ways["memory"])


def _along(root: Path, way: str) -> list[Path]:
    """root, root/a, root/a/b of the way /a/b; the root alone for one that leaves it (/../a)."""
    groups = [root]
    for name in way.split("/"):
        if name == "..":
            return [root]
        if name:
            groups.append(groups[-1] / name)
    return groups


def _left(group: Path, limit: str, used: str, cached: str) -> int | None:
    """Bytes; None where the group is not there or has no limit."""
    try:
        bound = int((group / limit).read_text())  # "max": no limit, a ValueError
        current = int((group / used).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, bound - current + int(stat.get(cached, 0)))
    except (OSError, ValueError):
        return None


def _psutil_available() -> int | None:
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.virtual_memory().available)
