"""The default number of threads: cores, quotas of control groups, the environment."""

import os

import pytest

from numclip.host.runtime import limits

VERSION_2 = "30 24 0:26 {root} {mounted} rw,nosuid shared:4 - cgroup2 cgroup rw"
VERSION_1 = "34 24 0:30 {root} {mounted} rw,nosuid shared:9 - cgroup cgroup rw,{controllers}"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine of 64 cores whose control groups a test makes up."""
    for variable in ("NUMCLIP_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(limits, "CGROUPS", str(tmp_path / "cgroup"))
    monkeypatch.setattr(limits, "MOUNTS", str(tmp_path / "mountinfo"))

    def make(memberships, mounts, files):
        (tmp_path / "cgroup").write_text("".join(f"{line}\n" for line in memberships))
        places = [line.format(mounted=tmp_path / "fs", **options) for line, options in mounts]
        (tmp_path / "mountinfo").write_text("".join(f"{slot}\n" for slot in places))
        for name, text in files.items():
            path = tmp_path / "fs" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return make


UNLIMITED = "max 100000\n"


@pytest.mark.parametrize(
    ("files", "threads"),
    [
        ({}, 64),
        ({"cpu.max": UNLIMITED}, 64),
        ({"a.slice/run.scope/cpu.max": "400000 100000\n"}, 4),
        ({"a.slice/run.scope/cpu.max": "250000 100000\n"}, 2),
        ({"a.slice/run.scope/cpu.max": "5 10\n"}, 1),
        ({"a.slice/run.scope/cpu.max": UNLIMITED, "a.slice/cpu.max": "300000 100000\n"}, 3),
        ({"a.slice/run.scope/cpu.max": "800000 100000", "cpu.max": "700000 100000"}, 7),
        ({"a.slice/run.scope/cpu.max": "900000 100000", "a.slice/cpu.max": UNLIMITED}, 9),
        ({"a.slice/run.scope/cpu.max": "100 nonsense"}, 64),
        ({"b.slice/cpu.max": "100000 100000"}, 64),
    ],
)
def test_quotas_of_version_2_hold_from_the_scope_up(machine, files, threads):
    machine(["0::/a.slice/run.scope"], [(VERSION_2, {"root": "/"})], files)
    assert limits.default_threads() == threads


@pytest.mark.parametrize(
    ("group", "root"),
    [("/docker/abc", "/docker/abc"), ("/", "/"), ("/../other", "/"), ("/docker/abc", "/docker")],
)
def test_a_container_sees_its_own_quota(machine, group, root):
    folder = {"/docker": "abc/cpu.max", "/": "cpu.max"}.get(root, "cpu.max")
    machine([f"0::{group}"], [(VERSION_2, {"root": root})], {folder: "200000 100000"})
    assert limits.default_threads() == 2


@pytest.mark.parametrize(
    ("files", "threads"),
    [
        ({"job/cpu.cfs_quota_us": "-1\n", "job/cpu.cfs_period_us": "100000\n"}, 64),
        ({"job/cpu.cfs_quota_us": "350000\n", "job/cpu.cfs_period_us": "100000\n"}, 3),
        (
            {
                "job/cpu.cfs_quota_us": "-1",
                "job/cpu.cfs_period_us": "100000",
                "cpu.cfs_quota_us": "500000",
                "cpu.cfs_period_us": "100000",
            },
            5,
        ),
        ({"job/cpu.cfs_quota_us": "300000", "job/cpu.cfs_period_us": "0"}, 64),
    ],
)
def test_quotas_of_version_1_hold_too(machine, files, threads):
    memberships = [
        "12:memory:/elsewhere",
        "4:cpu,cpuacct:/job",
        "1:name=systemd:/user.slice",
        "0::/",
    ]
    mounts = [
        (VERSION_1, {"root": "/", "controllers": "cpu,cpuacct"}),
        (VERSION_1.replace("{mounted}", "{mounted}/none"), {"root": "/", "controllers": "memory"}),
    ]
    machine(memberships, mounts, files)
    assert limits.default_threads() == threads


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "100"}, 6),
        ({"OMP_NUM_THREADS": "2,4"}, 2),
        ({"OMP_NUM_THREADS": "0"}, 6),
        ({"OMP_NUM_THREADS": "dynamic"}, 6),
        ({"OMP_NUM_THREADS": "2", "NUMCLIP_NUM_THREADS": "9"}, 9),
    ],
)
def test_openmp_bounds_the_default_but_not_a_wish(machine, monkeypatch, variables, threads):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    machine(["0::/"], [(VERSION_2, {"root": "/"})], {"cpu.max": "600000 100000"})
    assert limits.default_threads() == threads


def test_a_rank_that_is_bound_to_cores_uses_them(machine, monkeypatch):
    machine(["0::/"], [(VERSION_2, {"root": "/"})], {"cpu.max": UNLIMITED})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 9, 11}, raising=False)
    assert limits.default_threads() == 3


@pytest.mark.usefixtures("machine")
def test_without_control_groups_the_cores_count(monkeypatch, tmp_path):
    monkeypatch.setattr(limits, "CGROUPS", str(tmp_path / "none"))
    assert limits.default_threads() == 64


def test_lines_that_are_no_mounts_are_passed_over(machine):
    machine(["nonsense", "0::/"], [("36 25 - odd", {}), ("", {})], {"cpu.max": "100000 100000"})
    assert limits.default_threads() == 64
