"""Builds the C++ stages, measures, and prints what one operation takes beside its budget."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from core_stages import CoreStages, build

# Set by compare.py: another source tree's build of the stages.
_BUILD_VARIABLE = "RTS_BENCHMARKS_BUILD"
_MEASURED = pytest.StashKey[list["Measured"]]()


@dataclass(frozen=True, slots=True)
class Measured:
    name: str
    min_ns: float
    median_ns: float
    iqr_ns: float
    budget_ns: float | None
    note: str


Measure = Callable[..., None]


@pytest.fixture(scope="session")
def core() -> CoreStages:
    built = os.environ.get(_BUILD_VARIABLE)
    return CoreStages(Path(built) if built else build())


@pytest.fixture
def measure(benchmark, request: pytest.FixtureRequest) -> Measure:
    """Measures `run`, a call of many operations, `rounds` times; `prepare` goes before each and is not measured.

    `note` is called at the end, for what the table is to say besides.
    """

    def measured(
        run: Callable[[], object],
        *,
        operations: int,
        prepare: Callable[[], object] | None = None,
        budget_ns: float | None = None,
        rounds: int = 50,
        note: Callable[[], str] = str,
    ) -> None:
        benchmark.extra_info |= {"operations": operations, "budget_ns": budget_ns}
        setup = None if prepare is None else lambda: prepare() and None
        benchmark.pedantic(run, setup=setup, rounds=rounds, warmup_rounds=2)
        if benchmark.stats is None:  # --benchmark-disable
            return
        stats, ns = benchmark.stats.stats, 1e9 / operations
        benchmark.extra_info["note"] = said = note()
        request.config.stash.setdefault(_MEASURED, []).append(
            Measured(benchmark.name, stats.min * ns, stats.median * ns, stats.iqr * ns, budget_ns, said)
        )

    return measured


@pytest.fixture
def measure_stage(core: CoreStages, measure: Measure) -> Iterator[Measure]:
    """Measures a C++ stage, by name."""
    made: list[int] = []

    def measured(stage: str, *, budget_ns: float | None = None) -> None:
        handle = core.new(stage)
        made.append(handle)
        measure(
            lambda: core.run(handle),
            prepare=lambda: core.prepare(handle),
            operations=core.operations(stage),
            budget_ns=budget_ns,
        )

    yield measured
    for handle in made:
        core.free(handle)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash.get(_MEASURED, [])
    if not rows:
        return
    terminalreporter.section("one operation")
    width = max(len(row.name) for row in rows)
    terminalreporter.line(f"{'':{width}}  {'min':>10}  {'median':>10}  {'IQR':>10}  {'budget':>10}")
    for row in rows:
        budget = "" if row.budget_ns is None else duration(row.budget_ns)
        over = "  over" if row.budget_ns is not None and row.median_ns > row.budget_ns else ""
        measured = (duration(ns) for ns in (row.min_ns, row.median_ns, row.iqr_ns))
        cells = "".join(f"  {cell:>10}" for cell in (*measured, budget))
        terminalreporter.line(f"{row.name:{width}}{cells}{over}  {row.note}".rstrip())


def duration(ns: float) -> str:
    for unit, size in (("ns", 1.0), ("µs", 1e3), ("ms", 1e6)):
        if ns < 1000 * size:
            return f"{ns / size:.3g} {unit}" if ns < 100 * size else f"{ns / size:.0f} {unit}"
    return f"{ns / 1e9:.3g} s"
