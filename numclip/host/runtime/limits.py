"""The default number of threads: by cores, control groups' quotas and environment variables."""

import os
from pathlib import Path

CGROUPS = "/proc/self/cgroup"
MOUNTS = "/proc/self/mountinfo"


def default_threads() -> int:
    """Return NUMCLIP_NUM_THREADS, else the cores this process may use.

    OMP_NUM_THREADS, which launchers of several processes on one machine set, bounds the latter.
    """
    wish = _count("NUMCLIP_NUM_THREADS")
    if wish is not None:
        return wish
    bounds = [_cores(), _quota(), _count("OMP_NUM_THREADS")]
    return min(bound for bound in bounds if bound is not None)


def _count(variable: str) -> int | None:
    """Return the positive integer in a variable, or first in its list; else None."""
    text = os.environ.get(variable, "").split(",")[0].strip()
    return int(text) if text.isascii() and text.isdecimal() and int(text) > 0 else None


def _cores() -> int:
    """Return the cores that this process is bound to, else those of the machine."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _quota() -> int | None:
    """Return the cores that the control groups of this process may use, rounded down.

    The quotas of the groups above its own apply, too. None if there is no quota.
    """
    quotas = [quota for folder in _groups() if (quota := _quota_of(folder)) is not None]
    return max(1, int(min(quotas))) if quotas else None


def _groups() -> list[Path]:
    """Return the folders of this process's groups and of those above them, as far as mounted."""
    try:
        memberships = Path(CGROUPS).read_text().splitlines()
        mounts = [line.split() for line in Path(MOUNTS).read_text().splitlines()]
    except (OSError, ValueError):
        return []
    folders: list[Path] = []
    for line in memberships:  # number:controllers:path; version 2 names no controllers
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for mount in mounts:
            if _holds(mount, controllers):
                folders += _up(Path(_unescaped(mount[4])), mount[3], path)
    return folders


def _holds(mount: list[str], controllers: str) -> bool:
    """Tell whether a line of mountinfo mounts the groups with these controllers."""
    described = mount[mount.index("-") + 1 :] if "-" in mount else []
    if len(described) < 3:
        return False
    kind, _, options = described[:3]
    if not controllers:
        return kind == "cgroup2"
    return kind == "cgroup" and "cpu" in controllers.split(",") and "cpu" in options.split(",")


def _up(mounted: Path, root: str, path: str) -> list[Path]:
    """Return the folder of a group, and those above it, under where `root` is mounted.

    In a container the path can be that of the host, or begin above what is mounted (``/..``).
    """
    parts = [part for part in Path(_unescaped(path)).parts if part not in ("/", "..")]
    above = [part for part in Path(_unescaped(root)).parts if part not in ("/", "..")]
    if parts[: len(above)] == above:
        parts = parts[len(above) :]
    return [mounted.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def _unescaped(text: str) -> str:
    """Return a path of mountinfo, which writes spaces in octal."""
    return text.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")


def _quota_of(folder: Path) -> float | None:
    """Return how many cores a group may use at most, None where it has no quota."""
    try:
        if (folder / "cpu.max").exists():  # version 2: quota and period in one file
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        cores = int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # "max" is no number
        return None
    return cores if cores > 0 else None  # version 1 writes -1 for no quota
