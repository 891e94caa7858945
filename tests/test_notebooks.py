"""The notebooks: clean and small, pins that fit the kit, and running from top to bottom."""

import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

nbformat = pytest.importorskip("nbformat")
ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.ipynb"))}
BRING_TORCH = {"unsloth", "unsloth_zoo", "bitsandbytes", "peft", "trl", "accelerate", "cut_cross_entropy"}
BRING_TORCH |= {"xformers", "torchao", "diffusers", "torch", "torchvision"}


@pytest.fixture(params=NOTEBOOKS)
def notebook(request):
    return nbformat.read(NOTEBOOKS[request.param], 4)


def tagged(notebook, tag):
    (found,) = [k for k, cell in enumerate(notebook.cells) if tag in cell.metadata.get("tags", [])]
    return found


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_a_notebook_is_clean(notebook):
    nbformat.validate(notebook)
    text = nbformat.writes(notebook)
    assert len(text) < 20_000 and not re.search("/home/|/tmp/|/root", text)
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)
    for cell in code(notebook):  # strip what is left: jupyter nbconvert --clear-output --inplace
        before = notebook.cells[notebook.cells.index(cell) - 1]
        assert cell.outputs == [] and cell.execution_count is None
        assert before.cell_type == "markdown" and len(cell.source.splitlines()) <= 15


def test_the_install_cell_fits_the_kit_and_leaves_torch_alone(notebook):
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    kit = {one.name: one for one in (Requirement(line.split(";")[0]) for line in lines if line[0] != "#")}
    named = set()
    for line in notebook.cells[tagged(notebook, "install")].source.splitlines():
        words = re.findall(r'[^\s"]+', line.removeprefix("%pip install")) if line.startswith("%pip") else []
        for wanted in (Requirement(word) for word in words if not word.startswith("-")):
            named.add(wanted.name)
            assert "--no-deps" in line or wanted.name not in BRING_TORCH, (
                f"{wanted} would bring another torch"
            )
            pin = re.fullmatch(r"==([\d.]+)", str(wanted.specifier))
            assert not pin or wanted.name not in kit or kit[wanted.name].specifier.contains(pin[1])
    # the platform's own stays, and what is built for one torch only is left out
    own = {"torch", "torchvision", "xformers", "scipy"}
    assert set(kit) - named == own - {"torchvision"} and not named & own


def test_both_train_the_same_way():
    """Only what the two platforms differ in may differ: fetching, uploading, saving."""
    cells = [[cell.source for cell in code(nbformat.read(path, 4))] for path in NOTEBOOKS.values()]
    assert sum(a == b for a, b in zip(*cells, strict=True)) >= 4


@pytest.mark.slow
def test_a_notebook_runs_on_a_cpu(notebook, tiny_model, votes, tmp_path):
    """Every cell but the installation, in a kernel of its own, with other settings behind the parameters."""
    from nbclient import NotebookClient

    pytest.importorskip("ipykernel")
    file, out = tmp_path / "votes.jsonl", tmp_path / "judge"
    rows = [{"id": item.id, "prompt": item.prompt, "counts": item.counts} for item in votes(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = f"VOTES, MODEL, OUT = {str(file)!r}, {str(tiny_model)!r}, {str(out)!r}\n"
    settings += "FOUR_BIT, EPOCHS, LEARNING_RATE = False, 1.0, 1e-3"
    notebook.cells.insert(tagged(notebook, "parameters") + 1, nbformat.v4.new_code_cell(settings))
    del notebook.cells[tagged(notebook, "install")]
    where = {"metadata": {"path": str(ROOT / "recipes")}}
    done = NotebookClient(notebook, timeout=1200, startup_timeout=300, resources=where).execute()
    outputs = [output for cell in code(done) for output in cell.outputs]
    text = "".join(output.get("text", "") for output in outputs)
    assert "32 training items, 8 test items" in text and "90 % of people say: [" in text
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    metrics = json.loads((out / "metrics.json").read_text())
    assert f"kl              {metrics['kl']}" in text and metrics["items"] == 8
    assert (tmp_path / "judge.zip").stat().st_size > 10_000 and not (out / "checkpoints").exists()
    assert version("torch") in (out / "README.md").read_text()
