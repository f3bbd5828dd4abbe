"""What README.md and CONTRIBUTING.md promise, done."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", "NOTICE.md", *(f"docs/{path.name}" for path in sorted(ROOT.glob("docs/*.md")))]


def blocks(document: str, language: str) -> list[str]:
    """The fenced code blocks of a document."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def shell(command: list[str], folder: Path, source: Path = ROOT / "src") -> str:
    """Run a command; its output. A failure shows what it said."""
    environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


VRM = [sys.executable, "-c", "from vrm.cli import main; main()"]


def test_commands_of_the_readme(tmp_path: Path) -> None:
    """Each command of the first example, with one epoch instead of all."""
    lines = [line.partition("#")[0].split() for line in blocks("README.md", "bash")[1].splitlines() if line.strip()]
    assert [line[1] for line in lines] == ["train", "distill", "resume", "eval", "methods"]
    for _, verb, *words in lines:
        if verb in ("train", "distill"):
            words += ["epochs=3" if verb == "train" else "epochs=1", "threads=1"]
        shell([*VRM, verb, *words], tmp_path)
    assert (tmp_path / "runs" / "student" / "model.safetensors").is_file()


def test_python_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engineer's example with made-up data and networks, and the loop's."""

    class Small(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
            self.head = nn.Linear(width, 2)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(images).mean((2, 3)))

    def samples(count: int) -> list[tuple[torch.Tensor, int]]:
        """Dark images and bright ones."""
        generator = torch.Generator().manual_seed(count)
        noise = torch.randint(0, 120, (count, 3, 12, 12), dtype=torch.uint8, generator=generator)
        return [(noise[i] + 130 * (i % 2), i % 2) for i in range(count)]

    class Brightness(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((1, 2, 3))[:, None] * torch.tensor([-5.0, 5.0])

    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    engineer, loop = blocks("README.md", "python")
    scope = {
        "my_train_set": samples(40),
        "my_test_set": samples(20),
        "my_student": Small(4),
        "my_teacher": Brightness(),
    }
    exec(engineer, scope)
    from safetensors.torch import load_file

    assert load_file(tmp_path / "runs/parts/model.safetensors").keys() == Small(4).state_dict().keys()
    exec(loop, {})


def test_a_method_is_added_by_following_contributing(tmp_path: Path) -> None:
    """One file, one test entry; then its tests, its page and its runs are there. And gone with it."""
    for name in ("src", "tests", "docs", "pyproject.toml", "README.md"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, tmp_path / name)
    method, entry = blocks("CONTRIBUTING.md", "python")
    (tmp_path / "src/vrm/methods/logit_mse.py").write_text(method, encoding="utf-8")
    (tmp_path / "tests/methods/own/test_logit_mse.py").write_text(entry, encoding="utf-8")

    source = tmp_path / "src"
    shell([sys.executable, "docs/generate.py"], tmp_path, source)
    pytest_run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/methods", "-k"]
    assert re.search(r"\d+ passed", shell([*pytest_run, "logit_mse or every_method_has_a_case"], tmp_path, source))
    assert "Deep Nets" in shell([*VRM, "methods", "logit_mse"], tmp_path, source)
    small = ["data.labels_per_class=2", "epochs=2", "batch_size=10", "threads=1"]
    shell([*VRM, "train", "digits", "model=resnet8", *small, "run=t"], tmp_path, source)
    words = ["student=resnet8", "teacher=t/", "teacher.allow_weak=true", "method=logit_mse", "method.weight=0.5"]
    shell([*VRM, "distill", "digits", *words, *small, "run=s"], tmp_path, source)
    assert "loss/mse" in (tmp_path / "s" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("document", PAGES, ids=str)
def test_prose_is_wrapped(document: str) -> None:
    """Tables, images, code and what is generated may be wider."""
    text = (ROOT / document).read_text(encoding="utf-8")
    prose = re.sub(
        r"^(```.*?^```$|<!-- \w+ -->$.*?^<!-- end -->$|(\||!\[).*?$)", "", text, flags=re.MULTILINE | re.DOTALL
    )
    assert [line for line in prose.splitlines() if len(line) > 120] == []


def test_the_table_of_the_readme_is_the_record(tmp_path: Path) -> None:
    """So the numbers shown are those that were measured."""
    code = (
        "import json, sys; sys.path.insert(0, 'docs/figures'); import demo\n"
        "text = open('README.md', encoding='utf-8').read()\n"
        "assert demo.fill_in(text, json.loads(demo.RECORD.read_text(encoding='utf-8'))) == text\n"
    )
    shell([sys.executable, "-c", code], ROOT)


@pytest.mark.parametrize("document", ["docs/architecture.md", "docs/threat-model.md"])
def test_files_that_the_documents_name_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+(?:\.py|/))`", text))
    assert named
    assert [name for name in named if not any((ROOT / place / name).exists() for place in ("", "src/vrm"))] == []
