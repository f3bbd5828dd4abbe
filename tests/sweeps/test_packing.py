"""How many runs a device should take, on runs whose speed is known."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.runs.small import small
from vrm.config import ConfigError
from vrm.sweeps import local as pool
from vrm.sweeps import packing
from vrm.sweeps.local import RunFailed
from vrm.sweeps.packing import WORTH, Throughput, measure, recommend

STUB = r"""
import json, select, sys, time
from pathlib import Path
task = json.loads(sys.stdin.readline())
run = Path(task["run"]["run"])
rates, kind, memory = json.loads(Path("%s").read_text())
count = int(run.name.partition("-")[0])
def end(code, report):
    print(json.dumps(report), flush=True)
    sys.exit(code)
if kind == "full" and count > 1: end(1, {"kind": "memory", "message": "out of memory"})
if kind == "broken": end(1, {"kind": "RunError", "message": "it is broken"})
run.mkdir(exist_ok=True)
assert count == 1 or (run / "teacher.json").read_text() == "known"
(run / "teacher.json").write_text("known")
seconds = 5 * task["run"]["batch_size"] / rates[str(count)]
for i in range(1, 6 if kind == "short" else 1000):
    if select.select([sys.stdin], [], [], 0.02)[0]: break
    with (run / "timings.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5 * i, "epoch": 1, "seconds": seconds if i > 2 else 99.0}) + "\n")
    if kind == "short" and i == 2: end(0, {"memory": 0, "total": 0})
end(75, {"kind": "stopped", "message": "", "memory": memory[0] * count, "total": memory[1]})
"""


def measured(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rates: list[float],
    *,
    kind: str = "good",
    memory: tuple[int, int] = (0, 0),
    device: str | None = "0",
    most: int = 8,
) -> list[tuple[int, int]]:
    """``(workers, images a second)`` as measured; ``rates`` are those of one of 1, 2, 3, .. runs at once."""
    import json

    file = tmp_path / "rates"
    file.write_text(json.dumps([dict(enumerate(rates, start=1)), kind, memory]))
    monkeypatch.setattr(pool, "PROGRAM", STUB % file)
    found = measure(small(tmp_path / "run", "method=ce"), device=device, most=most, seconds=0.2)
    return [(each.workers, round(each.images_per_second)) for each in found]


def test_it_goes_on_while_more_are_worth_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = [1000.0, 900, 0, 460, 0, 0, 0, 230]
    assert measured(tmp_path, monkeypatch, rates) == [(1, 1000), (2, 1800), (4, 1840)]
    assert not (tmp_path / "run").exists(), "the run itself is not touched"


def test_it_stops_at_the_most_that_are_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured(tmp_path, monkeypatch, [1000] * 3, most=3) == [(1, 1000), (2, 2000), (3, 3000)]


@pytest.mark.parametrize("kind", ["memory in use", "out of memory"])
def test_it_stops_where_memory_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Two runs use 60 of 100 bytes, so four are not tried; or two find no room at all."""
    if kind == "memory in use":
        found = measured(tmp_path, monkeypatch, [1000] * 8, memory=(30, 100))
        assert found == [(1, 1000), (2, 2000)]
    else:
        assert measured(tmp_path, monkeypatch, [1000] * 8, kind="full") == [(1, 1000)]


def test_runs_that_cannot_be_measured_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="ends before its speed can be measured; give workers=NUMBER"):
        measured(tmp_path, monkeypatch, [1000], kind="short")
    with pytest.raises(RunFailed, match="it is broken"):
        measured(tmp_path, monkeypatch, [1000], kind="broken")


@given(st.lists(st.floats(1, 1e6), min_size=1, max_size=8))
def test_the_recommendation_is_the_fewest_that_are_nearly_best(rates: list[float]) -> None:
    found = [Throughput(2**i, rate, 0) for i, rate in enumerate(rates)]
    chosen = recommend(found)
    assert max(rates) <= (1 + WORTH) * rates[chosen.bit_length() - 1]
    assert all((1 + WORTH) * each.images_per_second < max(rates) for each in found if each.workers < chosen)


def test_a_real_run_is_measured(tmp_path: Path) -> None:
    (found,) = measure(small(tmp_path / "run", "method=ce", "epochs=100000"), device=None, most=1, seconds=0.3)
    assert found.workers == 1
    assert found.images_per_second > 1
    assert packing.recommend([found]) == 1
