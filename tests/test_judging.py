"""recipes/judge.py: streaming, resuming, both orders, bad lines; and what predicted distributions say."""
import io
import json
import sys
import types

import judge as recipe
import numpy
import pytest
import torch

import distjudge
from distjudge import InputError, load_judge, save_judge

LABELS = ["a", "b", "tie"]
LOADED = {}


def load_once(path, labels=None, **settings):
    if path not in LOADED:
        LOADED[path] = load_judge(path, labels, **settings)
    return LOADED[path]


@pytest.fixture(scope="module")
def run_folder(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge") / "run"
    save_judge(load_judge(tiny_model, LABELS, max_length=60), folder)
    return folder


@pytest.fixture
def judged(run_folder, tmp_path, monkeypatch):
    """A function that runs the recipe on lines, and returns the parsed output lines; each judge is loaded once."""
    monkeypatch.setattr(distjudge, "load_judge", load_once)
    def judge(lines, **settings):
        (tmp_path / "in.jsonl").write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
        recipe.main(recipe.JudgeConfig(**({"run": str(run_folder), "items": str(tmp_path / "in.jsonl"), "out": str(tmp_path / "out.jsonl")} | settings)))
        return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    return judge


# --- what a prediction says ----------------------------------------------------------------------------------------------
def test_mean_mode_entropy_and_credible_set_by_hand():
    q = torch.tensor([[0.5, 0.25, 0.25], [0.7, 0.2, 0.1], [0.0, 0.0, 1.0]])
    assert distjudge.entropy(q).tolist() == pytest.approx([1.0397207708, 0.8018185525, 0.0])  # 1.5 log 2; .7 log(1/.7) + .2 log 5 + .1 log 10
    assert distjudge.mean_rating(q, ["1", "2", "4"]).tolist() == pytest.approx([2.0, 1.5, 4.0])
    assert distjudge.modes(torch.tensor([[0.4, 0.4, 0.2], [0.1, 0.2, 0.7]]), LABELS) == ["a", "tie"]
    assert distjudge.credible_sets(q, LABELS, 0.9) == [["a", "b", "tie"], ["a", "b"], ["tie"]]  # 0.7 + 0.2 is 0.89999998 in float32
    assert distjudge.credible_sets(q, LABELS, 0.5) == [["a"], ["a"], ["tie"]]
    assert distjudge.credible_sets([[0.1, 0.45, 0.45]], LABELS, 0.45) == [["b"]] and distjudge.credible_sets(q, LABELS, 1.0)[1] == LABELS
    for wrong in (0, 1.01, float("nan")):
        with pytest.raises(InputError, match="level"):
            distjudge.credible_sets(q, LABELS, wrong)
    with pytest.raises(InputError, match="no numbers"):
        distjudge.mean_rating(q, LABELS)


def test_credible_sets_are_the_smallest_that_suffice():
    import itertools

    q = torch.rand(50, 5, generator=torch.Generator().manual_seed(0)).double().pow(3)
    q = q / q.sum(1, keepdim=True)
    for row, found in zip(q.tolist(), distjudge.credible_sets(q, list("12345"), 0.8), strict=True):
        mass = lambda labels: sum(row[int(label) - 1] for label in labels)  # noqa: B023, E731
        assert mass(found) >= 0.8 - 1e-6
        assert all(mass(other) < 0.8 for size in range(len(found)) for other in itertools.combinations("12345", size))


# --- judging ---------------------------------------------------------------------------------------------------------------
def test_output_lines_are_the_judges_predictions_in_order(judged, run_folder, capsys):
    rows = [{"prompt": f"Is soup {i} fine?", "id": i, "note": {"kept": i}, "counts": {"a": 1, "b": 2, "tie": 0}, "mean": "stale"} for i in range(7)]
    rows.append({"prompt": "No id here"})
    out = judged(rows, window=3, min_mass=0.0)
    judge = load_once(str(run_folder))
    logq, mass = judge.score([row["prompt"] for row in rows])
    for row, line, q, m in zip(rows, out, logq.exp().tolist(), mass.tolist(), strict=True):
        assert list(line["predicted"]) == LABELS and list(line["predicted"].values()) == pytest.approx(q, abs=1e-6)
        assert line["label_mass"] == pytest.approx(m, rel=1e-4) and "low_mass" not in line and "prompt" not in line and "mean" not in line
        assert line["entropy"] == pytest.approx(distjudge.entropy([q]).item(), abs=1e-5) and line["mode"] == LABELS[q.index(max(q))]
        assert line.get("note") == row.get("note") and line.get("counts") == row.get("counts")
    assert [line["id"] for line in out] == [*map(str, range(7)), distjudge.load_items([rows[-1] | {"counts": {"a": 1, "b": 0}}])[0].id]
    said = capsys.readouterr()
    assert said.out.splitlines()[0].split() == ["id", "a", "b", "tie", "mode", "entropy", "credible", "set", "label", "mass"] and len(said.out.splitlines()) == 9
    assert said.err.strip() == "judged 8 items"


def test_both_orders_are_averaged_after_mapping_labels_back(judged, run_folder, capsys):
    mapping = {"a": "b", "b": "a"}
    rows = [{"prompt": f"First {i} or second?", "swap": {"prompt": f"Second, or first {i}?", "labels": mapping}} for i in range(5)]
    rows.insert(2, {"prompt": "alone"})
    out = judged(rows, window=2, show=0)
    judge = load_once(str(run_folder))
    flips = 0
    for row, line in zip(rows, out, strict=True):
        q = judge.predict([row["prompt"]])[0]
        if "swap" in row:
            b, a, tie = judge.predict([row["swap"]["prompt"]])[0]
            assert line["flipped"] == (q.argmax() != [a, b, tie].index(max(a, b, tie)))
            flips += line["flipped"]
            q = (q + numpy.array([a, b, tie])) / 2
        assert list(line["predicted"].values()) == pytest.approx(list(q), abs=1e-5)
    assert "flipped" not in out[2] and f"flips with the order in {flips} of 5 pairs" in capsys.readouterr().err
    average, flipped = recipe.average_orders(torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.5, 0.2, 0.3]), [1, 0, 2])
    assert average.tolist() == pytest.approx([0.4, 0.4, 0.2]) and flipped  # mapped back, the second is .2 .5 .3


@pytest.mark.parametrize(("swap", "words"), [
    ("text", "must be {"), ({"prompt": "x"}, "must be {"), ({"prompt": " ", "labels": {}}, "prompt: empty"),
    ({"prompt": "x", "labels": {"a": "c"}}, "unknown label 'c'"), ({"prompt": "x", "labels": {"a": "b"}}, "do not trade places"),
    ({"prompt": "soup " * 100, "labels": {}}, "more than the judge's max_length 60"),
])
def test_a_wrong_swap_is_refused(judged, swap, words):
    with pytest.raises(InputError) as error:
        judged([{"prompt": "fine"}, {"id": "x", "prompt": "x", "swap": swap}])
    assert str(error.value).split(": ")[0].endswith("in.jsonl:2") and ": item 'x': swap: " in str(error.value) and words in str(error.value)


BAD = [("{broken\n", "broken JSON"), ('{"id": "e"}\n', "item 'e': prompt: missing"), ('{"prompt": " "}\n', "prompt: empty"), ("[1]\n", "not a JSON object"),
       (json.dumps({"prompt": "word " * 100}) + "\n", "prompt: "), ('{"prompt": "x", "counts": {"a": -1}}\n', "votes for 'a' are negative"),
       ('{"prompt": "x", "prompt": "y"}\n', "stands twice")]


def test_bad_lines_stop_the_run_or_are_skipped_on_request(judged, tmp_path, capsys):
    good = [{"id": f"g{i}", "prompt": f"Is {i} fine?"} for i in range(len(BAD))]
    for line, words in BAD:
        with pytest.raises(InputError, match=words) as error:
            judged([good[0], line])
        assert "in.jsonl:2: " in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "out.jsonl").unlink(missing_ok=True)
    mixed = [line for pair in zip(good, (line for line, _ in BAD), strict=True) for line in pair]
    out = judged(mixed, skip_bad=True, show=0)
    assert [row["id"] for row in out] == [row["id"] for row in good]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(BAD) + 1 and all(f"in.jsonl:{2 * k + 2}: " in said[k] and words in said[k] for k, (_, words) in enumerate(BAD))
    assert f"skipped {len(BAD)} bad lines" in said[-1]


def test_a_stopped_run_goes_on_and_ends_as_if_it_had_not_stopped(judged, tmp_path, monkeypatch, capsys):
    rows = [{"id": f"i{i}", "prompt": f"Is soup {i} fine?", **({"swap": {"prompt": f"soup {i}", "labels": {"a": "b", "b": "a"}}} if i % 2 else {})} for i in range(9)]
    rows.insert(3, "{broken\n")
    judged(rows, skip_bad=True, window=4)
    out = tmp_path / "out.jsonl"
    whole = out.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    asked = []
    real = distjudge.Judge.stream
    monkeypatch.setattr(distjudge.Judge, "stream", lambda self, prompts, *rest: real(self, (asked.append(p) or p for p in prompts), *rest))
    for cut, left in ((0, 9), (ends[3], 5), (ends[3] + 20, 5), (ends[4] - 1, 5), (len(whole), 0)):
        out.write_bytes(whole[:cut])
        asked.clear()
        capsys.readouterr()
        judged(rows, skip_bad=True, window=4)
        assert sum(p.startswith("Is") for p in asked) == left and out.read_bytes()[:cut][: ends[max(0, 8 - left)]] == whole[:cut][: ends[max(0, 8 - left)]]
        for line, before in zip(out.read_text().splitlines(), whole.decode().splitlines(), strict=True):
            line, before = json.loads(line), json.loads(before)
            assert line.pop("predicted") == pytest.approx(before.pop("predicted"), abs=1e-6)  # other neighbours in its window, other rounding
            assert {k: v for k, v in line.items() if not isinstance(v, float)} == {k: v for k, v in before.items() if not isinstance(v, float)}
        assert f"judged {left} items" in (said := capsys.readouterr().err) and (f"kept {9 - left} judged before" in said or left == 9)


def test_output_of_other_items_judges_or_settings_is_not_continued(judged, tmp_path, run_folder, tiny_model):
    rows = [{"id": f"i{i}", "prompt": f"Is soup {i} fine?"} for i in range(4)]
    judged(rows)
    out = tmp_path / "out.jsonl"
    before = out.read_bytes()
    other = load_judge(tiny_model, LABELS, max_length=60)
    with torch.no_grad():
        for name, weight in other.model.named_parameters():
            if "lora_B" in name:
                weight.add_(0.01)
    save_judge(other, tmp_path / "other")
    changed = [*rows[:2], {"id": "i2", "prompt": "Is soup 2 fine!"}, rows[3]]
    for lines, settings, number in ((changed, {}, 3), (rows[1:], {}, 1), (rows, {"level": 0.5}, 1), (rows, {"run": str(tmp_path / "other")}, 1), (rows[:3], {}, 4)):
        with pytest.raises(InputError, match=rf"out.jsonl:{number}: is not ") as error:
            judged(lines, **settings)
        assert "name another --out" in str(error.value) and out.read_bytes() == before
    out.write_bytes(before.replace(b"{", b"[", 1))
    with pytest.raises(InputError, match=r"out.jsonl:1: is not the judgment of"):
        judged(rows)


def test_memory_is_bounded_by_the_window(run_folder, monkeypatch):
    """Of an endless input only a window is read ahead of what comes out."""
    judge, read = load_once(str(run_folder)), []

    def endless():
        while True:
            read.append(1)
            yield recipe.Ask("", {"id": "x"}, f"Is {len(read)} fine?")

    stream = recipe.judge_asks(judge, endless(), window=8)
    for n in range(20):
        next(stream)
        assert len(read) == 8 * (n // 8 + 1)


def test_pipes_flags_and_the_figure(run_folder, tmp_path, monkeypatch, capsys):
    rows = [{"id": f"i{i} $x$ <b>", "prompt": f"Is soup {i} fine?", "odd": "\ud800", "counts": {"a": 2, "b": i, "tie": 0}} for i in range(3)]
    piped = io.BytesIO("".join(json.dumps(row) + "\n" for row in rows).encode())
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=piped))
    recipe.main(recipe.JudgeConfig(run=str(run_folder), items="-", min_mass=1.0, figure=str(tmp_path / "f.png")))
    said = capsys.readouterr()
    out = [json.loads(line) for line in said.out.splitlines()]
    assert [row["id"] for row in out] == [row["id"] for row in rows] and all(row["low_mass"] is True for row in out)
    assert "3 of 3 have a label mass under 1" in said.err and "low mass" in said.err.splitlines()[1]
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(b'{"prompt": "x"}\n{broken\n')))
    with pytest.raises(InputError, match="stdin:2: broken JSON"):
        recipe.main(recipe.JudgeConfig(run=str(run_folder), items="-"))


@pytest.mark.parametrize(("settings", "words"), [
    ({"items": "gone.jsonl"}, "gone.jsonl: no such file"), ({"level": 0.0}, "level must be above 0"), ({"out": "x.jsonl.gz"}, "not compressed"),
    ({"run": "nowhere"}, "labels"), ({"window": 0}, "window"), ({"labels": ("x", "y")}, "trained for"), ({"spellings": ("a=A",)}, "a run folder has its own"),
    ({"out": "in.jsonl"}, "is the file of the items"),
])
def test_settings_that_cannot_be(run_folder, tmp_path, monkeypatch, settings, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(InputError, match=words):
        recipe.main(recipe.JudgeConfig(**({"run": str(run_folder), "items": "in.jsonl", "out": "out.jsonl"} | settings)))
    assert (tmp_path / "in.jsonl").read_text() == '{"prompt": "x"}\n'


def test_the_command_line(judged, run_folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "in.jsonl").write_text('{"id": "x", "prompt": "fine?"}\n{"prompt": 5}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["judge.py", "--run", str(run_folder), "--items", "in.jsonl", "--out", "o.jsonl"])
    with pytest.raises(SystemExit) as stopped:
        distjudge.cli(recipe.main, recipe.JudgeConfig)
    assert stopped.value.code == 2 and capsys.readouterr().err.splitlines()[-1] == "error: in.jsonl:2: prompt: not text but int"
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--skip_bad"])
    distjudge.cli(recipe.main, recipe.JudgeConfig)
    assert len((tmp_path / "o.jsonl").read_text().splitlines()) == 1
