"""The code of the README and of docs/ runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import smezo_pl
from smezo_pl.__main__ import main
from smezo_pl.tasks import TASKS
from smezo_pl.tasks.builtin import MASKED

ROOT = Path(__file__).parents[1]
FILES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
TEXT = "\n".join(PAGES.values())
BLOCKS = dict(re.findall(r"<!-- test: ([^>]+) -->\n```python\n(.*?)```", TEXT, re.DOTALL))


def test_every_block_has_a_name_of_its_own_and_is_run_here() -> None:
    names = re.findall(r"<!-- test: ([^>]+) -->", TEXT)
    files = [f"own task, {name}" for name in OWN]
    assert sorted(names) == sorted(
        ["plain loop", "Fabric loop", "another model", "trajectory", "a direction per row", *files]
    )


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 12_000


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_of_this_repository(page: str) -> None:
    text = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#]*)(#[^)]*)?\)", text):
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.is_file(), target
        headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor[1:] in {re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_paths_are_those_of_this_repository(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for path in re.findall(
        r"\b(?:benchmarks|configs|docs|notebooks|smezo_pl|tests)/[\w/.-]+\.(?:ipynb|md|png|py|yaml)\b", text
    ):
        assert (ROOT / path).is_file(), path


def test_pages_name_every_task() -> None:
    rows = re.findall(r"^\| (\w+) \|.*?\| `\w+\.yaml` \|", PAGES["docs/tasks.md"], re.MULTILINE)
    assert sorted(rows) == sorted(TASKS)
    listed = re.search(r"tasks have one:\s(.+?)\.", PAGES["docs/masked-lm.md"], re.DOTALL)
    assert listed is not None
    assert sorted(listed[1].replace(",", "").split()) == sorted(MASKED)


def test_the_api_page_names_what_is_public() -> None:
    named = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", PAGES["docs/api.md"], re.MULTILINE)}
    assert {*smezo_pl.__all__} - {"__version__"} <= named


def run(name: str) -> dict[str, Any]:
    scope: dict[str, Any] = {"__name__": "docs"}
    exec(compile(BLOCKS[name], f"docs ({name})", "exec"), scope)
    return scope


@pytest.mark.parametrize("name", ["plain loop", "Fabric loop", "a direction per row"])
def test_loops_train_a_model_in_under_25_lines(name: str) -> None:
    assert len([line for line in BLOCKS[name].splitlines() if line.strip()]) < 25
    scope = run(name)
    assert scope["accuracy"] > 0.85
    assert scope["optimizer"].last_step.loss < 0.6


def test_another_kind_of_model_in_under_30_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(BLOCKS["another model"].splitlines()) < 30
    monkeypatch.chdir(tmp_path)
    scope = run("another model")
    module, x, y = (scope[name] for name in ("module", "x", "y"))
    assert module.loss((x, y)).item() < 0.2 * y.square().mean().item()


def test_a_trajectory_of_any_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    scope = run("trajectory")
    assert capsys.readouterr().out.split()[1] == "True"
    trained, again, early = ([p.tolist() for p in scope[n].parameters()] for n in ("model", "again", "early"))
    assert trained == again != early


OWN = dict(re.findall(r"<!-- test: own task, (.+?) -->\n```\w+\n(.*?)```", TEXT, re.DOTALL))


@pytest.mark.parametrize("name", ["mine", "tickets"])
def test_your_own_task(
    name: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for file, text in OWN.items():
        Path(file).write_text(text, encoding="utf-8")
    words = [f"--config={name}.yaml", f"--model.pretrained={tiny_folder}"]
    main(["preview", *words])
    shown = capsys.readouterr().out
    if name == "mine":
        # What the page shows of it, whichever of the two rows is drawn for training.
        assert "Topic:⟦" in shown and "labels of train: 0 ' sports'" in shown
    else:
        assert "This is about⟦" in shown and "labels of train: billing ' billing' 1 (50%)" in shown
    main(["fit", *words, "--trainer.fast_dev_run=1", "--trainer.accelerator=cpu", "--model.optimizer.kernel=torch"])
