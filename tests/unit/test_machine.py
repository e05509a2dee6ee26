"""What a container's limits leave of the machine."""

from pathlib import Path

import pytest

from realtime_serve import machine


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    return tmp_path


def test_without_a_limit_it_is_what_the_machine_has(cgroup: Path) -> None:
    (cgroup / "memory.max").write_text("max\n")
    (cgroup / "memory.current").write_text("1000\n")
    assert machine.free_memory() > 1 << 20


def test_a_containers_limit_counts_and_what_it_caches_of_files_is_free(cgroup: Path) -> None:
    (cgroup / "memory.max").write_text("5000000\n")
    (cgroup / "memory.current").write_text("3000000\n")
    assert machine.free_memory() == 2_000_000
    (cgroup / "memory.stat").write_text("anon 2500000\nfile 500000\n")
    assert machine.free_memory() == 2_500_000


def test_hardware_threads_of_a_core_count_once(cgroup: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_CPUS", cgroup)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    for cpu, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        topology = cgroup / f"cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{siblings}\n")
    assert machine.physical_cores() == 2


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", 4), ("150000 100000", 2), ("50000 100000", 1)])
def test_a_containers_share_of_processors_is_rounded_up(
    cgroup: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cores: int
) -> None:
    monkeypatch.setattr(machine, "_CPUS", cgroup)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    (cgroup / "cpu.max").write_text(f"{quota}\n")
    assert machine.physical_cores() == cores
