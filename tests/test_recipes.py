"""The command lines as users call them, on tiny settings; the embedded sample; the figures."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

import distjudge

ROOT = Path(__file__).resolve().parents[1]


def command(script, *arguments, cwd):
    return subprocess.run([sys.executable, ROOT / script, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=280)


def test_the_embedded_sample_is_what_its_generator_writes():
    import make_panel

    lines = (ROOT / "data" / "panel.jsonl").read_text().splitlines()
    assert lines == [json.dumps(row) for row in make_panel.make_panel(train=1200, test=300, votes=5, seed=1)]
    items = distjudge.load_items(ROOT / "data" / "panel.jsonl")
    train, test = distjudge.load_data(distjudge.Config(train=(str(ROOT / "data" / "panel.jsonl"),)))
    assert (len(train), len(test)) == (1200, 300) and all(item.votes == 5 for item in items)
    assert distjudge.labels_of(items) == list("12345") and len({item.prompt for item in items}) == 1500


def test_the_truth_of_the_sample_is_what_its_raters_do():
    """Simulate raters one by one, without the mixture formula, and compare."""
    import random

    import make_panel

    rng = random.Random(0)
    words, noise, n = ["spicy", "lovely", "loud"], make_panel.WIDE_NOISE, 100_000
    counts = [0] * 5
    for _ in range(n):
        leaning = 3.0
        for word in words:
            if word in make_panel.DISPUTED:
                share, liked, disliked = make_panel.DISPUTED[word]
                leaning += liked if rng.random() < share else disliked
            else:
                leaning += make_panel.CLEAR[word]
        counts[min(5, max(1, round(rng.gauss(leaning, noise)))) - 1] += 1
    assert [c / n for c in counts] == pytest.approx(make_panel.true_distribution(words, noise), abs=0.006)


def test_tiny_trains_four_ways_and_draws_its_figures(tmp_path):
    lines = (ROOT / "data" / "panel.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "some.jsonl").write_text("".join(lines[:400] + lines[1200:1280]))
    done = command("recipes/tiny.py", "--train", "some.jsonl", "--out", "out", "--epochs", 6, "--hidden", 32, "--layers", 1, "--seeds", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    methods = ["marginal", "untrained", "single_point", "no_adversary", "full", "teacher", "noise_floor"]
    assert [(row["method"], row["seed"]) for row in table] == [(m, s) for m in methods for s in (0, 1)]
    assert all(set(row) == {"method", "seed", "kl_votes", "kl_truth", "accuracy"} for row in table)
    mean = lambda method, column: sum(row[column] for row in table if row["method"] == method) / 2  # noqa: E731
    assert mean("full", "kl_truth") < min(mean(m, "kl_truth") for m in ("marginal", "untrained", "single_point"))
    assert mean("noise_floor", "kl_truth") < 1e-6 and mean("noise_floor", "kl_votes") < mean("full", "kl_votes")
    assert "| full |" in done.stdout and "| full |" in (tmp_path / "out" / "table.md").read_text()
    for name in ("bars", "calibration", "kl"):
        assert (tmp_path / "out" / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    judge = distjudge.load_judge(tmp_path / "out" / "full-1")
    rows = [json.loads(line) for line in (tmp_path / "out" / "full-1" / "predictions.jsonl").read_text().splitlines()]
    prompts = {item.id: item.prompt for item in distjudge.load_items(ROOT / "data" / "panel.jsonl")}
    again = judge.predict([prompts[row["id"]] for row in rows[:5]])
    assert again.tolist() == [pytest.approx(list(row["predicted"].values()), abs=1e-6) for row in rows[:5]]


def test_tiny_on_words_as_labels_without_truth(tmp_path):
    rows = [{"id": i, "prompt": f"Claim {i}: {'yes' if i % 2 else 'no'} it is", "counts": {"entailment": 3 * (i % 2), "entails not": 2, "neutral": 1}}
            for i in range(40)]
    (tmp_path / "v.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = command("recipes/tiny.py", "--train", "v.jsonl", "--out", "o", "--epochs", 1, "--hidden", 16, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = {row["method"]: row for row in json.loads((tmp_path / "o" / "table.json").read_text())}
    assert all(row["kl_truth"] is None for row in table.values()) and table["noise_floor"]["kl_votes"] > 0
    assert "8 test items" in done.stdout


@pytest.mark.parametrize(("arguments", "words"), [
    (["--alpha", "1.5"], "error: alpha: must be between 0 and 1, not 1.5"),
    (["--seeds", "0"], "error: seeds: must be 1 or more, not 0"),
    (["--export", "merged"], "error: export, push_to_hub: several judges are trained here"),
    (["--train", "none.jsonl"], "error: none.jsonl: no such file"),
    (["--labels", "1", "2"], "unknown label"),
    (["--hidden", "17"], "error: hidden: must be a multiple of 16, not 17"),
    (["--spellings", "six=6"], "unknown label {six}"),
    (["--model", "./nowhere"], "error: ./nowhere: model: no such folder"),
    (["--out", "/dev/null/x"], "error: "),
    (["--max_length", "12"], "1200 of 1200 training items are longer than max_length 12"),
    (["--no-such-flag"], "no-such-flag"),
])
def test_bad_input_ends_in_one_message_and_exit_code_2(arguments, words, tmp_path, monkeypatch, capsys):
    """In this process, which saves the seconds that each import takes; the first also as a user would call it."""
    import tiny

    if words.startswith("error: alpha"):
        done = command("recipes/tiny.py", *arguments, cwd=tmp_path)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tiny.py", *arguments])
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", tiny.__doc__)
    with pytest.raises(SystemExit) as caught:
        distjudge.cli(tiny.main, tiny.TinyConfig)
    shown = capsys.readouterr()
    assert caught.value.code == 2 and words in shown.err + shown.out


def test_figures_from_a_run_folder(tmp_path):
    rows = [{"id": f"item {i}", "counts": {"a": i % 4, "b": 3, "tie": 1}, "predicted": {"a": 0.3, "b": 0.4, "tie": 0.3}, "label_mass": 1.0} for i in range(9)]
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "metrics.json").write_text(json.dumps({"kl_noise_floor": None, "kl_marginal": 0.2}))
    done = command("plots/figures.py", tmp_path, "--show", "kl", "bars", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == ["bars.png", "bars.svg", "kl.png", "kl.svg"]
    done = command("plots/figures.py", tmp_path / "plots", cwd=tmp_path)
    assert done.returncode == 2 and "not a run folder" in done.stderr


def test_bars_choose_the_items_they_say(tmp_path):
    import torch

    from plots import figures

    q = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.01, 0.99]], dtype=torch.float64)
    run = figures.Run(["x", "y"], ["even", "sure", "wrong"], torch.tensor([[2.0, 2], [4, 0], [3, 1]], dtype=torch.float64), q, None, {})
    figure = figures.draw_bars(run, each=1)
    assert [axes.get_title().split("\n")[0] for axes in figure.axes] == ["sure", "even", "wrong"]
    heights = [bar.get_height() for bar in figure.axes[1].patches]
    assert heights == [0.5, 0.5, 0.5, 0.5]


@pytest.mark.slow
def test_bench_runs_every_part(tmp_path):
    done = command("recipes/bench.py", "--out", "b", "--backbone", "toy", "--tasks", "sample", "--batch_size", 4, "--judged", 4, "--stock_rows", 2, 4,
                   "--labels", 3, "--solved", 2, "--repeats", 1, "--parts", "train", "judge", "rate", "scaling", "projection", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "b" / "bench.json").read_text())
    assert set(found["train"][0]["seconds_a_step"]) == {"ours", "ours without packs", "stock SFTTrainer"} and found["train"][0]["shared_tokens"] > 0.3
    assert max(found["judge"][0]["largest_difference_nats"].values()) < 1e-4  # the other ways judge the same
    assert found["projection"][0]["labels"] == 3 and found["projection"][0]["largest_difference"] < 1e-4
    assert found["train"][0]["stock_rows"] in (2, 4) and set(found["train"][0]["stock_rows_tried"]) == {"2", "4"} and len(found["scaling"]) == 11
    assert 0 < found["rate"]["reached"]["median"] < 1.5
    table = (tmp_path / "b" / "bench.md").read_text()
    assert all(title in table for title in ("Training step", "Judging", "Matrix rate", "Forward and backward", "Projection"))


@pytest.mark.slow
def test_bench_measures_memory(tmp_path):
    done = command("recipes/bench.py", "--out", "b", "--backbone", "toy", "--tasks", "sample", "--batch_size", 4, "--stock_rows", 4, "--parts", "memory", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "b" / "bench.json").read_text())
    assert all(row["peak"] > row["before"] > 0 for row in found["memory"][0]["mib"].values())
    assert "Memory of training" in (tmp_path / "b" / "bench.md").read_text()


def test_importing_distjudge_needs_torch_alone():
    check = "import sys; sys.modules.update(dict.fromkeys(('numpy', 'transformers', 'peft', 'tyro', 'datasets', 'matplotlib', 'unsloth'))); import distjudge"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_a_model_that_would_not_say_the_labels_is_refused(tiny_model, tmp_path, monkeypatch):
    """Also in the comparisons, before anything is trained."""
    import study
    import tiny
    import tyro

    monkeypatch.chdir(tmp_path)
    short = ["--model", str(tiny_model), "--seeds", "1", "--epochs", "1", "--lora_rank", "2", "--min_mass", "0.9"]
    for recipe, settings, more in ((tiny, tiny.TinyConfig, []), (study, study.StudyConfig, ["methods", "--methods", "KL alone"])):
        with pytest.raises(distjudge.InputError, match=r"label mass: the labels hold 2\..*less than min_mass 0\.9"):
            recipe.main(tyro.cli(settings, args=[*more, *short]))
        assert not list(tmp_path.glob("runs/**/judge.json"))
