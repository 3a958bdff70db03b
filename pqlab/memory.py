"""How much memory a device has left, and the check that comes before every large allocation (PQC004)."""

from __future__ import annotations

from pathlib import Path

import torch

from .errors import OutOfMemoryError

MIB = 2**20


def free_memory(device: str | torch.device = "cpu") -> int | None:
    """Bytes that can still be allocated on `device`; None where the system does not say.

    On a CPU this is the kernel's estimate of available memory, or what the process' control group leaves of its
    limit (containers) when that is less. On CUDA it includes what torch's caching allocator holds but does not use.
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
    """What the control group leaves of its limit; page cache of files counts as free, the kernel can drop it."""
    for root, limit, used, cached in (
        ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            bound = int((Path(root) / limit).read_text())  # "max": no limit, a ValueError
            current = int((Path(root) / used).read_text())
            stat = dict(line.split() for line in (Path(root) / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        return max(0, bound - current + int(stat.get(cached, 0)))
    return None


def _psutil_available() -> int | None:
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.virtual_memory().available)
