from __future__ import annotations

import os
import re
import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # the tests run side by side
os.environ.setdefault("OMP_NUM_THREADS", "1")  # and so do the processes they start
settings.register_profile(
    "vrm", deadline=None, derandomize=True, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("vrm")

HERE = Path(__file__).parent
KNOWN = {
    *(path.stem.removeprefix("test_") for path in HERE.glob("methods/own/test_*.py")),
    *(path.stem.rpartition("_")[0] for path in HERE.glob("goldens/*_[0-9]*.safetensors")),
    *re.findall(r"\[(\w+)\]\(\1\.md\)", (HERE.parent / "docs/methods/index.md").read_text(encoding="utf-8")),
}
"""Methods that are here or were: each of these tells of one, whatever else of it was taken away."""
LACKING = re.compile(r"unknown method \\?'(\w+)\\?'|No module named 'vrm\.methods\.(\w+)'")


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """A command ends in ignoring signals, as it is the last that its process does; here other tests follow."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``cuda`` need a GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and none is visible here"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A method may be taken away, file and case: a test of something else that goes by way of it is skipped."""
    report = yield
    if report.failed and call.excinfo is not None and "golden" not in item.name:  # these are never skipped
        from vrm import methods

        for name in {a or b for a, b in LACKING.findall(str(call.excinfo.value))} & KNOWN - {*methods.names()}:
            report.outcome = "skipped"
            report.longrepr = (str(item.path), item.location[1] or 0, f"Skipped: the method {name} is not here")
    return report
