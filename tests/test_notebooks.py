"""The notebooks: clean and small, pins that fit the kit, and running from top to bottom."""

import json
import re
import shutil
import subprocess
from importlib.metadata import version

import pandas
import pytest
from conftest import ROOT
from packaging.requirements import Requirement

nbformat = pytest.importorskip("nbformat")
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
            assert "--no-deps" in line or wanted.name not in BRING_TORCH, f"{wanted} brings another torch"
            pin = re.fullmatch(r"==([\d.]+)", str(wanted.specifier))
            assert not pin or wanted.name not in kit or kit[wanted.name].specifier.contains(pin[1])
    assert tagged(notebook, "check") < tagged(notebook, "install")
    # the platform's own stays, and what is built for one torch only is left out
    own = {"torch", "torchvision", "xformers", "scipy"}
    assert set(kit) - named == own - {"torchvision"} and not named & own


def test_both_train_the_same_way():
    """Only what the two platforms differ in may differ: fetching, uploading, saving."""
    cells = [[cell.source for cell in code(nbformat.read(path, 4))] for path in NOTEBOOKS.values()]
    assert sum(a == b for a, b in zip(*cells, strict=True)) >= 4


def executed(notebook, folder, settings=""):
    """The notebook run in a folder, without its installation, with other settings behind the parameters."""
    from nbclient import NotebookClient

    pytest.importorskip("ipykernel")
    notebook.cells.insert(tagged(notebook, "parameters") + 1, nbformat.v4.new_code_cell(settings))
    del notebook.cells[tagged(notebook, "install")]
    where = {"metadata": {"path": str(folder)}}
    return NotebookClient(notebook, timeout=1200, startup_timeout=300, resources=where).execute()


LOST = {"": "distjudge is not here: name REPOSITORY above"}
LOST["VOTES = 'v.csv'"] = "VOTES: there is no file v.csv"


@pytest.mark.slow
@pytest.mark.parametrize("settings", LOST)
def test_what_is_missing_is_said_before_anything_is_installed(notebook, tmp_path, settings):
    """From the .ipynb alone, and with a file of votes that is not there; in a line, without a traceback."""
    from nbclient.exceptions import CellExecutionError

    del notebook.cells[tagged(notebook, "install") + 1 :]
    with pytest.raises(CellExecutionError) as stopped:
        executed(notebook, ROOT / "recipes" if settings else tmp_path, settings)
    said = re.sub("\x1b[^m]*m", "", str(stopped.value).split("-" * 18)[-1]).strip()
    assert said.startswith(f"AssertionError: {LOST[settings]}") and "\n" not in said


@pytest.mark.slow
def test_a_notebook_runs_from_the_ipynb_alone(request, notebook, tiny_model, votes, tmp_path):
    """On a CPU: colab.ipynb with the repository's zip file and a CSV, the other with git and JSON lines."""
    parts, where = tmp_path / "distjudge-main", tmp_path / "notebook"
    for part in ("data", "plots", "recipes"):
        shutil.copytree(ROOT / part, parts / part, ignore=shutil.ignore_patterns("results", "__pycache__"))
    shutil.copy(ROOT / "distjudge.py", parts)
    where.mkdir()
    items, settings = votes(40), f"MODEL, OUT = {str(tiny_model)!r}, {str(where / 'judge')!r}\n"
    settings += "FOUR_BIT, EPOCHS, LEARNING_RATE = False, 1.0, 1e-3\n"
    if "colab" in request.node.name:
        shutil.make_archive(str(where / "distjudge-main"), "zip", tmp_path, "distjudge-main")
        rows = [(i.id, i.prompt, label) for i in items for label, n in i.counts.items() for _ in range(n)]
        pandas.DataFrame(rows, columns=["id", "answer", "rating"]).to_csv(where / "votes.csv", index=False)
        new = [("b", "=good soup", 7), ("a", "bad service", 8)]
        pandas.DataFrame(new, columns=["id", "answer", "mine"]).to_csv(where / "new.csv", index=False)
        settings += "VOTES, NEW = 'votes.csv', 'new.csv'"
    else:
        git = ["git", "-c", "user.name=x", "-c", "user.email=x", "-C", str(parts)]
        for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
            subprocess.run([*git, *command], check=True)
        turned = {"1": "3", "3": "1"}
        rows = [{"id": item.id, "prompt": item.prompt, "counts": item.counts} for item in items]
        rows = [row | {"swap": {"prompt": f"{row['prompt']}!", "labels": turned}} for row in rows]
        (where / "votes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings += f"VOTES, REPOSITORY = 'votes.jsonl', 'file://{parts}'"
    done = executed(notebook, where, settings)
    outputs = [output for cell in code(done) for output in cell.outputs]
    text = "".join(output.get("text", "") for output in outputs)
    assert "32 training items, 8 test items, labels ['1', '2', '3']" in text
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    out, judged = where / "judge", pandas.read_csv(where / "judge_judged.csv")
    metrics = json.loads((out / "metrics.json").read_text())
    assert f"kl              {metrics['kl']}" in text and metrics["items"] == 8
    assert judged.filter(like="judge_p(").sum(axis=1).tolist() == pytest.approx([1.0] * len(judged))
    if "colab" in request.node.name:
        rows = [["b", "'=good soup", 7], ["a", "bad service", 8]]
        assert judged[["id", "answer", "mine"]].values.tolist() == rows
        assert json.loads((out / "card.json").read_text())["own"]["template"].endswith("Answer: {answer}")
    else:
        tested = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
        assert judged["id"].tolist() == [row["id"] for row in tested] and "judge_flipped" in judged
        assert judged["judge_p(1)"].tolist() == pytest.approx([row["predicted"]["1"] for row in tested])
    assert (where / "judge.zip").stat().st_size > 10_000 and not (out / "checkpoints").exists()
    assert version("torch") in (out / "README.md").read_text()
