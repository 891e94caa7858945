"""The notebooks: as small and clean as they should be in the repository, with pins that fit the kit, and running from top to bottom."""
import re
import types
from importlib.metadata import version
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "recipes").glob("*.ipynb"))
BRING_TORCH = {"unsloth", "unsloth_zoo", "bitsandbytes", "peft", "trl", "accelerate", "cut_cross_entropy", "xformers", "torchao", "diffusers", "torch", "torchvision"}


def tagged(notebook, tag):
    found = [k for k, cell in enumerate(notebook.cells) if tag in cell.metadata.get("tags", [])]
    assert len(found) == 1, f"one cell tagged {tag}"
    return found[0]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_clean(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 20_000
    for before, cell in zip([None, *notebook.cells], notebook.cells, strict=False):
        assert set(cell.metadata) <= {"tags"}
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, "strip it: jupyter nbconvert --clear-output --inplace"
            assert before.cell_type == "markdown" and len(cell.source.splitlines()) <= 15, "a sentence first, and a short cell"
    text = path.read_text(encoding="utf-8")
    assert "/home/" not in text and "/tmp/" not in text and "/root" not in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_install_cell_fits_the_kit_and_leaves_torch_alone(path):
    from packaging.requirements import Requirement

    notebook = nbformat.read(path, 4)
    lines = [line for line in notebook.cells[tagged(notebook, "install")].source.splitlines() if line.startswith("%pip install")]
    wanted = {r.name: r for r in map(Requirement, [line.split("#")[0].split(";")[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if line[0] != "#"])}
    named = set()
    for line in lines:
        for word in re.findall(r'"([^"]+)"|(\S+)', line.removeprefix("%pip install")):
            if not (text := "".join(word)).startswith("-"):
                requirement = Requirement(text)
                named.add(requirement.name)
                assert "--no-deps" in line or requirement.name not in BRING_TORCH, f"{requirement.name} would bring another torch"
                pin = re.fullmatch(r"==([\d.]+)", str(requirement.specifier))
                if requirement.name in wanted and pin:
                    assert wanted[requirement.name].specifier.contains(pin[1]), f"{text} is not within requirements.txt"
    assert set(wanted) - named == {"torch", "xformers"}  # the platform's own, and what is built for one torch only
    assert not named & {"torch", "torchvision", "xformers"}


def test_both_train_the_same_way():
    """Only what the two platforms differ in may differ: fetching, uploading, saving."""
    colab, kaggle = ([cell.source for cell in nbformat.read(ROOT / "recipes" / f"{name}.ipynb", 4).cells if cell.cell_type == "code"] for name in ("colab", "kaggle"))
    assert sum(a == b for a, b in zip(colab, kaggle, strict=True)) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_on_a_cpu(path, tiny_model, votes, tmp_path):
    """Every cell but the installation, in a kernel of its own, with a cell of other settings behind the one tagged "parameters"."""
    import json

    from nbclient import NotebookClient

    pytest.importorskip("ipykernel")
    notebook = nbformat.read(path, 4)
    votes_file = tmp_path / "votes.jsonl"
    votes_file.write_text("".join(json.dumps({"id": item.id, "prompt": item.prompt, "counts": item.counts}) + "\n" for item in votes(40)))
    settings = f"VOTES, MODEL, FOUR_BIT, EPOCHS, LEARNING_RATE, MIN_MASS, OUT = {str(votes_file)!r}, {str(tiny_model)!r}, False, 1.0, 1e-3, 0.0, {str(tmp_path / 'judge')!r}"
    notebook.cells.insert(tagged(notebook, "parameters") + 1, nbformat.v4.new_code_cell(settings))
    del notebook.cells[tagged(notebook, "install")]
    done = NotebookClient(notebook, timeout=1200, startup_timeout=300, resources={"metadata": {"path": str(ROOT / "recipes")}}).execute()
    shown = types.SimpleNamespace(text="".join(o.get("text", "") for cell in done.cells if cell.cell_type == "code" for o in cell.outputs),
                                  images=[o for cell in done.cells if cell.cell_type == "code" for o in cell.outputs if "image/png" in o.get("data", {})])
    assert "32 training items, 8 test items" in shown.text and "90 % of people say: [" in shown.text and len(shown.images) >= 3
    metrics = json.loads((tmp_path / "judge" / "metrics.json").read_text())
    assert f"kl              {metrics['kl']}" in shown.text and metrics["items"] == 8
    assert (tmp_path / "judge.zip").stat().st_size > 10_000 and not (tmp_path / "judge" / "checkpoints").exists()
    assert version("torch") in (tmp_path / "judge" / "README.md").read_text()
