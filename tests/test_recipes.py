"""The command lines as users call them, on tiny settings; the embedded sample; the figures."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import distjudge
from distjudge import InputError

import bench
import make_panel
import pandas as pd
import pytest
import tiny
import torch
from conftest import ROOT, call

from plots import figures


def test_the_embedded_sample_is_what_its_generator_writes():
    lines = Path(tiny.SAMPLE).read_text().splitlines()
    assert lines == [json.dumps(row) for row in make_panel.make_panel(train=1200, test=300, votes=5, seed=1)]
    train, test = distjudge.load_data(distjudge.Config(train=(tiny.SAMPLE,)))
    assert (len(train), len(test)) == (1200, 300) and all(item.votes == 5 for item in train + test)
    assert distjudge.labels_of(train) == list("12345") and len({item.prompt for item in train + test}) == 1500


def test_tiny_trains_four_ways_and_draws_its_figures(tmp_path):
    lines = Path(tiny.SAMPLE).read_text().splitlines(keepends=True)
    (tmp_path / "some.jsonl").write_text("".join(lines[:400] + lines[1200:1280]))
    settings = "--train some.jsonl --out out --epochs 6 --hidden 32 --layers 1 --seeds 2"
    done, out = call("recipes/tiny.py", *settings.split(), cwd=tmp_path), tmp_path / "out"
    table = json.loads((out / "table.json").read_text())
    methods = ["marginal", "untrained", "single_point", "no_adversary", "full", "teacher", "noise_floor"]
    assert [(row["method"], row["seed"]) for row in table] == [(m, s) for m in methods for s in (0, 1)]
    names = "method seed people people_low people_high kl_votes kl_truth accuracy".split()
    assert all(set(row) == set(names) for row in table)
    mean = pd.DataFrame(table).groupby("method").mean()
    assert mean.kl_truth["full"] < mean.kl_truth[["marginal", "untrained", "single_point"]].min()
    assert mean.kl_truth["noise_floor"] < 1e-6 and mean.kl_votes["noise_floor"] < mean.kl_votes["full"]
    assert mean.people["full"] > mean.people["single_point"] > 0
    written = (out / "table.md").read_text()
    assert written in done.stdout and len({len(line) for line in written.splitlines()}) == 1
    assert f"worth {mean.people['full']:.1f} ± " in done.stdout and "-0.000" not in done.stdout
    assert "2 of 4: the votes' shares, without the adversary (no_adversary, seed 1)" in done.stdout
    assert "next: python recipes/judge.py --run out/full-0 --items some.jsonl --out" in done.stdout
    for name in ("compare", "bars", "calibration", "kl"):
        assert (out / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (out / "full-1" / "predictions.jsonl").read_text().splitlines()]
    again = distjudge.load_judge(out / "full-1").predict([row["prompt"] for row in rows[:5]])
    assert again.tolist() == [pytest.approx(list(row["predicted"].values()), abs=1e-6) for row in rows[:5]]


def test_tiny_on_words_as_labels_without_truth(tmp_path):
    counts = [{"entailment": 3 * (i % 2), "entails not": 2, "neutral": 1} for i in range(40)]
    rows = [{"prompt": f"{i}: {['no', 'yes'][i % 2]} it is", "counts": n} for i, n in enumerate(counts)]
    distjudge.write_lines(tmp_path / "v.jsonl", map(json.dumps, rows))
    settings = "--train v.jsonl --out o --epochs 1 --hidden 16"
    assert "8 to test on" in call("recipes/tiny.py", *settings.split(), cwd=tmp_path).stdout
    table = {row["method"]: row for row in json.loads((tmp_path / "o" / "table.json").read_text())}
    assert all(row["kl_truth"] is None for row in table.values()) and table["noise_floor"]["kl_votes"] > 0


SCRIPT = """
import dataclasses, sys
sys.path.insert(0, %r)
import distjudge
def main(config):
    for number in range(100_000):
        print(number, flush=number == 0)
    raise KeyboardInterrupt
distjudge.cli(main, dataclasses.make_dataclass("Nothing", []))
"""


def test_a_closed_pipe_and_ctrl_c_end_a_script_without_a_traceback():
    command = [sys.executable, "-c", SCRIPT % str(ROOT)]
    script = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert script.stdout.readline() == "0\n"
    script.stdout.close()
    assert script.stderr.read() == "" and script.wait() == 0
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 130 and done.stderr == "stopped\n" and done.stdout.endswith("99999\n")


@pytest.mark.parametrize("script", ["recipes/tiny.py", "data/prepare.py", "plots/report.py"])
def test_a_python_without_the_environment_is_told_so(script):
    done = subprocess.run([sys.executable, "-S", "-E", ROOT / script], capture_output=True, text=True)
    assert done.returncode == 1 and "has no torch: activate the environment" in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_bars_choose_the_items_they_say():
    q = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.01, 0.99]], dtype=torch.float64)
    votes = {"even": {"x": 2, "y": 2}, "sure": {"x": 4, "y": 0}, "wrong": {"x": 3, "y": 1}}
    rows = [{"id": i, "prompt": f"Rate it: ${i}$", "counts": own} for i, own in votes.items()]
    figure = figures.draw_bars(figures.Run(distjudge.load_items(rows), q), each=1)
    titles = [axes.get_title().split(":")[0] for axes in figure.axes]
    assert titles == ["$sure$\nsure", "$even$\neven", "$wrong$\nwrong"]
    assert not figure.axes[0].title.get_parse_math()  # "$" is no formula
    assert [bar.get_height() for bar in figure.axes[0].patches] == [1.0, 0.0, 0.9, 0.1]


def test_calibration_and_kl_by_hand():
    """Fifty items that get 0.2 said and 0.4 voted, with a floor and a marginal beside their mean."""
    items = distjudge.load_items([{"prompt": str(n), "counts": {"x": 2, "y": 3}} for n in range(50)])
    q = torch.tensor([[0.2, 0.8]], dtype=torch.float64).expand(50, 2)
    run = figures.Run(items, q, {"kl_noise_floor": 0.1, "kl_marginal": 0.3})
    run.kl[0] += 50  # the mean is not the median
    points = figures.draw_calibration(run).axes[0].containers[0].lines[0].get_xydata()
    assert points.tolist() == [pytest.approx([0.2, 0.4]), pytest.approx([0.8, 0.6])]
    mean = 0.4 * math.log(2) + 0.6 * math.log(0.75) + 1
    (axes,) = figures.draw_kl(run).axes
    said = [line.get_label() for line in axes.lines]
    assert said == [f"judge: mean {mean:.3f}", "noise floor: mean 0.100", "training marginal: mean 0.300"]


def test_a_comparison_draws_intervals_over_groups_and_tells_long_names_apart():
    counts = torch.randint(1, 5, (24, 2), generator=torch.Generator().manual_seed(0)).tolist()
    more = {"truth": {"x": 0.3, "y": 0.7}}
    named = [dict(zip("xy", own, strict=True)) for own in counts]
    rows = [{"prompt": f"{i}", "counts": own, "group": f"{i // 6}"} for i, own in enumerate(named)]
    items, q = distjudge.load_items([row | more for row in rows]), torch.full((24, 2), 0.5).double()
    names = [f"experiments/with_a_name_of_many_letters/seed_{n}" for n in (0, 1)]
    votes, truth, below, *_ = figures.draw_compare({name: figures.Run(items, q) for name in names}).axes
    for axes, target in ((votes, distjudge.shares_of(items)), (truth, distjudge.truths_of(items))):
        kl = distjudge.kl_divergence(target, q)[None]
        found = distjudge.bootstrap(kl, groups=[item.group for item in items])
        assert axes.collections[0].get_segments()[1][:, 0].tolist() == [found["low"], found["high"]]
    ticks = [label.get_text() for label in votes.get_yticklabels()]
    assert [tick[-7:] for tick in ticks] == ["/seed_0", "/seed_1"]
    assert below.get_legend_handles_labels()[1] == ["truth", "votes", *ticks]
    # names that differ in the middle
    names = [f"experiments_of_november_2026/seed_{n}/with_a_name_of_many_letters" for n in (0, 1)]
    votes = figures.draw_compare({name: figures.Run(items, q) for name in names}).axes[0]
    assert [label.get_text()[:2] for label in votes.get_yticklabels()] == ["1:", "2:"]


def test_one_figure_compares_several_runs(tmp_path):
    """Means of KL by hand, the items on which judges differ most, bars of each; the command; refusals."""
    votes = {"sure": [4, 0], "even": [2, 2], "other": [3, 1], "some": [1, 3]}
    said = {"a": [0.5, 0.5, 0.5, 0.9], "b": [0.5, 0.5, 0.6, 0.1]}  # of label x
    for name, own in said.items():
        rows = [{"id": i, "counts": {"x": votes[i][0], "y": votes[i][1]}} for i in votes]
        for row, q in zip(rows, own, strict=True):
            row["predicted"] = {"x": q, "y": 1 - q}
        (tmp_path / name).mkdir()
        distjudge.write_lines(tmp_path / name / "predictions.jsonl", map(json.dumps, rows))
        (tmp_path / name / "metrics.json").write_text(json.dumps({"kl_noise_floor": 0.1}))
        (tmp_path / name / "config.json").write_text('{"train": ["t.jsonl"], "test": ["m/u.jsonl"]}')
    runs = {name: figures.load_run(tmp_path / name) for name in said}
    assert runs["a"].title == "a on 4 items of u.jsonl"
    means, *items = figures.draw_compare(runs).axes
    kl = lambda p, q: sum(a * math.log(a / b) for a, b in ((p, q), (1 - p, 1 - q)) if a)  # noqa: E731
    wanted = [sum(map(kl, (1, 0.5, 0.75, 0.25), own)) / 4 for own in said.values()]
    assert means.collections[1].get_offsets()[:, 0].tolist() == pytest.approx(wanted)
    assert [ax.get_title().split(":")[0] for ax in items] == ["sure", "even", "some", "other"]
    assert [bar.get_height() for bar in items[2].patches] == pytest.approx([0.25, 0.75, 0.9, 0.1, 0.1, 0.9])
    (tmp_path / "b" / "config.json").unlink()
    drawn = {"a b --format pdf": "plots/compare.p??", "b --show kl bars": "b/plots/*"}
    for arguments, files in drawn.items():
        call("plots/figures.py", *arguments.split(), cwd=tmp_path)
        assert len(list(tmp_path.glob(files))) == 2
    for runs, show, words in (("aa", (), "each named once"), ("ab", ("kl",), "show: is for one run")):
        with pytest.raises(InputError, match=words):
            figures.main(figures.FiguresConfig(tuple(runs), show=show or figures.FiguresConfig.show))
    assert "no run folder" in call("plots/figures.py", "plots", code=2, cwd=tmp_path).stderr
    for other in (rows[:3], [rows[0] | {"counts": {"x": 5, "y": 0}}, *rows[1:]]):
        distjudge.write_lines(tmp_path / "b" / "predictions.jsonl", map(json.dumps, other))
        words = "b: its items, in their order, labels or votes are not those of a"
        with pytest.raises(InputError, match=words):
            figures.compare({name: tmp_path / name for name in said}, tmp_path)


@pytest.mark.slow
def test_bench_runs_every_part(tmp_path):
    settings = "--out b --backbone toy --tasks sample --batch_size 4 --stock_rows 2 4 --repeats 1"
    call("recipes/bench.py", *settings.split(), cwd=tmp_path)
    found = json.loads((tmp_path / "b" / "bench.json").read_text())
    trained, judged = found["train"][0], found["judge"][0]
    assert set(trained["seconds_a_step"]) >= {"ours", "ours without packs", "stock SFTTrainer"}
    halved = "ours in bfloat16" in trained["seconds_a_step"], "ours in bfloat16" in judged["seconds"]
    assert set(halved) == {distjudge.multiplies_bf16("cpu")}
    assert trained["shared_tokens"] > 0.3 and trained["stock_rows"] in (2, 4)
    assert set(trained["stock_rows_tried"]) == {"2", "4"}
    assert judged["largest_difference_nats"] < 1e-4  # the other ways judge the same
    assert 0 < found["rate"][0]["reached"]["median"] < 1.5
    table = (tmp_path / "b" / "bench.md").read_text()
    assert all(f"**{title}**" in table for title in bench.PARTS.values())


def test_bench_of_a_model_and_items_of_ones_own(tiny_model, tmp_path):
    """Its weights, and whole groups of the file's items; another task is refused by name."""
    counts = lambda n: {"a": n, "b": 5 - n}  # noqa: E731
    rows = [{"id": n, "prompt": f"Soup {n}", "counts": counts(n), "group": n // 2} for n in range(6)]
    distjudge.write_lines(tmp_path / "own.jsonl", map(json.dumps, rows))
    items = bench.some_items(str(tmp_path / "own.jsonl"), 4, 0)
    assert len({item.group for item in items}) == 2 and items[0].prompt.startswith("Soup ")
    own, _ = bench.model_and_tokenizer(bench.BenchConfig(model=str(tiny_model)))
    saved = distjudge.load_model(str(tiny_model)).state_dict()
    assert all(torch.equal(weight, saved[name]) for name, weight in own.state_dict().items())
    config = bench.BenchConfig(batch_size=4, steps=2)
    with pytest.raises(InputError, match=r"own.jsonl has 6 different prompts, .* is 8: set one of them"):
        bench.step_items(str(tmp_path / "own.jsonl"), config)
    assert len(bench.step_items(str(tmp_path / "own.jsonl"), dataclasses.replace(config, steps=1))) == 4
    with pytest.raises(InputError, match="repeats, tasks: one or more of each"):
        bench.main(dataclasses.replace(config, parts=("judge",), stock_rows=(1,), repeats=0))
    with pytest.raises(InputError, match="tasks: nosuch: name a file of items"):
        bench.some_items("nosuch", 4, 0)


def test_importing_distjudge_needs_torch_alone():
    absent = ("numpy", "transformers", "peft", "tyro", "datasets", "matplotlib", "unsloth", "pydantic")
    check = f"import sys; sys.modules.update(dict.fromkeys({absent})); import distjudge"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
