"""Free memory as the machine and the container's limits tell it, read from made-up /proc and /sys trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from ayllu.machine_memory import available_memory

MEMINFO = "MemTotal:       16000000 kB\nMemFree:  100 kB\nMemAvailable:    8000000 kB\n"
MACHINE = 8_000_000 * 1024


def _tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="ascii")
    return root


def test_without_limits_it_is_what_the_machine_has(tmp_path: Path) -> None:
    assert available_memory(_tree(tmp_path, {"proc/meminfo": MEMINFO})) == MACHINE


def test_version_2_limits_of_every_group_above_count(tmp_path: Path) -> None:
    # The container's group has no limit of its own: the one above it has.
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/pod/container\n",
        "sys/fs/cgroup/pod/container/memory.max": "max\n",
        "sys/fs/cgroup/pod/container/memory.current": "1000\n",
        "sys/fs/cgroup/pod/memory.max": "5000000\n",
        "sys/fs/cgroup/pod/memory.current": "3000000\n",
        "sys/fs/cgroup/pod/memory.stat": "anon 1\ninactive_file 400000\nactive_file 50000\nfile_mapped 9\n",
    }
    assert available_memory(_tree(tmp_path, files)) == 5_000_000 - 3_000_000 + 450_000


def test_version_2_throttles_at_high_before_it_refuses_at_max(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": "9000\n",
        "sys/fs/cgroup/memory.high": "7000\n",
        "sys/fs/cgroup/memory.current": "1000\n",
    }
    assert available_memory(_tree(tmp_path, files)) == 6000


def test_version_1_container_that_sees_the_path_of_its_host(tmp_path: Path) -> None:
    # Without a cgroup namespace the path is the host's, which is not mounted here: the mount itself is ours.
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "5:cpu,cpuacct:/docker/1f\n4:memory:/docker/1f\n0::/docker/1f\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "2000000\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "1500000\n",
        "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 100000\ntotal_active_file 7\n",
    }
    assert available_memory(_tree(tmp_path, files)) == 600_007


def test_version_1_without_a_limit_writes_a_number_larger_than_any_memory(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "4:memory:/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "1500000\n",
    }
    assert available_memory(_tree(tmp_path, files)) == MACHINE


def test_a_group_outside_the_namespace_is_not_looked_for_elsewhere(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/../other\n",
        "sys/fs/other/memory.max": "9000\n",
        "sys/fs/other/memory.current": "1\n",
        "sys/fs/cgroup/memory.stat": "anon 1\n",
    }
    assert available_memory(_tree(tmp_path, files)) == MACHINE


def test_a_group_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": "9000\n",
        "sys/fs/cgroup/memory.current": "10000\n",
    }
    assert available_memory(_tree(tmp_path, files)) == 0


@pytest.mark.parametrize(
    "line", ["", "MemAvailable:", "MemAvailable: many kB", "\xff".encode().decode("latin1")]
)
def test_damaged_files_are_as_good_as_none(tmp_path: Path, line: str) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_bytes(line.encode("latin1"))
    (tmp_path / "proc/self/cgroup").write_bytes(b"\xff::\n\n:::::\n")
    free = available_memory(tmp_path)
    assert free is None or free > 0


def test_this_machine_has_memory() -> None:
    free = available_memory()
    assert free is None or free > 1 << 20


@pytest.mark.parametrize(("soft", "left"), [("9000000", 9_000_000 - 4_096_000), ("unlimited", MACHINE)])
def test_the_process_s_own_limit_counts(tmp_path: Path, soft: str, left: int) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/limits": f"Max stack size  8388608  unlimited\nMax data size  {soft}  unlimited\n",
        "proc/self/status": "Name:\tpython\nVmData:\t    4000 kB\n",
    }
    assert available_memory(_tree(tmp_path, files)) == left
