"""Instructions an operation of each C++ stage, counted by callgrind, against benchmarks/instructions.json.

What it counts depends on no other load, so this is the gate for a shared machine. It exits with 1 where a stage takes
over 2 % more than the baseline, and with 2 where nothing could be compared: valgrind is missing, or the baseline is of
another compiler, C library or instruction set.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

from core_stages import CoreStages, build, run

_BASELINE = Path(__file__).with_suffix(".json")
_TOLERANCE = 0.02
# The first runs warm up what allocates once; the last one counts.
_RUNS = 3


def count(folder: Path, stage: str) -> tuple[str, float]:
    """What the count depends on, and the instructions of one operation."""
    with tempfile.TemporaryDirectory() as scratch:
        output = run(
            "valgrind",
            "--tool=callgrind",
            "-q",
            "--toggle-collect=rts_stage_run",
            "--dump-after=rts_stage_run",
            f"--callgrind-out-file={scratch}/out",
            folder / "stages",
            stage,
            str(_RUNS),
        )
        environment, operations = output.splitlines()[-2:]
        totals = re.search(r"^(?:summary|totals): (\d+)", Path(scratch, f"out.{_RUNS}").read_text(), re.MULTILINE)
    if totals is None:
        raise RuntimeError(f"callgrind wrote no total for {stage}")
    return environment, int(totals[1]) / int(operations)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="which to count (default: all)")
    parser.add_argument("--update", action="store_true", help="make what is counted the baseline")
    arguments = parser.parse_args()
    if shutil.which("valgrind") is None:
        print("instructions.py needs valgrind: install the package of that name", file=sys.stderr)
        return 2
    folder = build()
    names = CoreStages(folder).names
    if unknown := set(arguments.stages) - set(names):
        parser.error(f"no stage {sorted(unknown)[0]!r}; there are {', '.join(names)}")

    baseline = json.loads(_BASELINE.read_text()) if _BASELINE.exists() else {"environment": "", "instructions": {}}
    counted: dict[str, float] = {}
    regressed: list[str] = []
    environment = ""
    print(f"{'instructions an operation':26} {'baseline':>12} {'now':>12}")
    for stage in arguments.stages or names:
        environment, now = count(folder, stage)
        counted[stage] = round(now, 1)
        before = baseline["instructions"].get(stage) if environment == baseline["environment"] else None
        change = "" if before is None else f"{now / before - 1:+8.1%}"
        if before is not None and now > before * (1 + _TOLERANCE):
            regressed.append(stage)
            change += "  more"
        print(
            f"{stage:26} {'' if before is None else f'{before:,.1f}':>12} {now:>12,.1f} {change}".rstrip(), flush=True
        )

    if arguments.update:
        kept = baseline["instructions"] if environment == baseline["environment"] else {}
        instructions = {name: (kept | counted)[name] for name in names if name in kept | counted}
        _BASELINE.write_text(json.dumps({"environment": environment, "instructions": instructions}, indent=2) + "\n")
        return 0
    if environment != baseline["environment"]:
        print(f"not compared: the baseline is of {baseline['environment'] or 'nothing'}, this is {environment}")
        return 2
    if regressed:
        print(f"over {_TOLERANCE:.0%} more than the baseline: {', '.join(regressed)}")
    return 1 if regressed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RuntimeError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
