"""recipes/judge.py: streaming, resuming, both orders, bad lines; and what predicted distributions say."""

import functools
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import types

import distjudge
from distjudge import InputError, load_judge, save_judge

import judge as recipe
import numpy
import pyarrow
import pytest
import torch

from recipes import judge_ray, sheets

LABELS = ["a", "b", "tie"]
FLOATS = ("predicted", "entropy", "label_mass")
load_once = functools.cache(load_judge)


@pytest.fixture(scope="module")
def run_folder(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge") / "run"
    save_judge(load_judge(tiny_model, LABELS, max_length=60), folder)
    return str(folder)


@pytest.fixture
def judged(run_folder, tmp_path, monkeypatch):
    """A function that runs the recipe on lines and returns the output rows; each judge is loaded once."""
    load = lambda path, labels=None, **_: load_once(path, labels)  # noqa: E731
    monkeypatch.setattr(distjudge, "load_judge", load)
    monkeypatch.chdir(tmp_path)

    def judge(lines, **settings):
        text = [line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines]
        (tmp_path / "in.jsonl").write_text("".join(text))
        usual = {"run": run_folder, "items": "in.jsonl", "out": "out.jsonl"}
        recipe.main(recipe.JudgeConfig(**usual | settings))
        return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]

    return judge


def soups(n, swapped=()):
    swap = lambda i: {"swap": {"prompt": f"Fine, is soup {i}?", "labels": {"a": "b", "b": "a"}}}  # noqa: E731
    rows = [{"id": f"i{i}", "prompt": f"Is soup {i} fine?"} for i in range(n)]
    return [row | (swap(i) if i in swapped else {}) for i, row in enumerate(rows)]


# --- what a prediction says ---
def test_entropy_and_credible_set_by_hand():
    q = torch.tensor([[0.5, 0.25, 0.25], [0.7, 0.2, 0.1], [0.0, 0.0, 1.0]])
    # 1.5 log 2; .7 log(1/.7) + .2 log 5 + .1 log 10
    assert distjudge.entropy(q).tolist() == pytest.approx([1.0397207708, 0.8018185525, 0.0])
    sets = recipe.label_sets
    assert sets(q, LABELS, 0.9) == [LABELS, ["a", "b"], ["tie"]]  # 0.7 + 0.2 is 0.89999998 in float32
    assert sets(q, LABELS, 0.5) == [["a"], ["a"], ["tie"]] and sets(q, LABELS, 1.0)[1] == LABELS
    assert sets([[0.1, 0.45, 0.45]], LABELS, 0.45) == [["b"]]
    for wrong in (0, 1.01, float("nan")):
        with pytest.raises(InputError, match="level"):
            sets(q, LABELS, wrong)
    many = torch.rand(50, 5, generator=torch.Generator().manual_seed(0)).double().pow(3)
    many = many / many.sum(1, keepdim=True)
    for row, found in zip(many.tolist(), sets(many, "01234", 0.8), strict=True):
        mass = lambda labels: sum(row[int(label)] for label in labels)  # noqa: B023, E731
        assert mass(found) >= 0.8 - 1e-6  # and no smaller set has as much
        assert all(mass(s) < 0.8 for n in range(len(found)) for s in itertools.combinations("01234", n))


# --- judging ---
def test_output_lines_are_the_judges_predictions_in_order(judged, run_folder, capsys, monkeypatch):
    monkeypatch.setattr(recipe, "WINDOW", 3)
    more = {"note": {"kept": 1}, "counts": {"a": 1, "b": 2, "tie": 0}, "mean": "stale", "predicted": {"a": 1}}
    rows = [*(row | more for row in soups(7)), {"prompt": "No id here"}]
    out = judged(rows, min_mass=0.0)
    logq, mass = load_once(run_folder, None).score([row["prompt"] for row in rows])
    for row, line, q, m in zip(rows, out, logq.exp().tolist(), mass.tolist(), strict=True):
        assert line["predicted"] == pytest.approx(dict(zip(LABELS, q, strict=True)), abs=1e-6)
        assert list(line["predicted"]) == LABELS and line["label_mass"] == pytest.approx(m, rel=1e-4)
        assert not {"low_mass", "prompt", "mean"} & set(line) and line["mode"] == LABELS[q.index(max(q))]
        assert line["entropy"] == pytest.approx(distjudge.entropy([q]).item(), abs=1e-5)
        assert line.get("note") == row.get("note") and line.get("counts") == row.get("counts")
    hashed = distjudge.load_items([rows[-1] | {"counts": {"a": 1, "b": 0}}])[0].id
    assert [line["id"] for line in out] == [*(f"i{i}" for i in range(7)), hashed]
    said = capsys.readouterr()
    head = "id p(a) p(b) p(tie) mode entropy credible_set label_mass"
    assert said.out.split("\n", 1)[0].split() == head.split()
    assert f"{out[0]['predicted']['b']:.3f}" in said.out.splitlines()[1] and len(said.out.splitlines()) == 9
    assert said.err.strip() == "judged 8 items"


def test_a_scale_has_a_mean(judged, tiny_model):
    for line in judged(soups(2), run=str(tiny_model), labels=("1", "2", "4"), pack_tokens=50):
        mean = sum(float(label) * q for label, q in line["predicted"].items())
        assert line["mean"] == pytest.approx(mean, abs=1e-5)
    assert load_once(str(tiny_model), ("1", "2", "4")).pack_tokens == 50


def test_both_orders_are_averaged_after_mapping_labels_back(judged, run_folder, capsys, monkeypatch):
    monkeypatch.setattr(recipe, "WINDOW", 2)
    rows = soups(6, swapped=(0, 1, 3, 4, 5))
    out, judge, flips = judged(rows), load_once(run_folder, None), 0
    for row, line in zip(rows, out, strict=True):
        q = judge.predict([row["prompt"]])[0]
        if "swap" in row:
            b, a, tie = judge.predict([row["swap"]["prompt"]])[0]
            assert line["flipped"] == (q.argmax() != [a, b, tie].index(max(a, b, tie)))
            flips += line["flipped"]
            q = (q + numpy.array([a, b, tie])) / 2
        assert list(line["predicted"].values()) == pytest.approx(list(q), abs=1e-5)
    said = capsys.readouterr()
    assert "flipped" not in out[2] and f"flips with the order in {flips} of 5 pairs" in said.err
    assert said.out.count("flipped") == flips
    second = torch.tensor([0.5, 0.2, 0.3])  # mapped back: .2 .5 .3
    average, flipped = distjudge.average_orders(torch.tensor([0.6, 0.3, 0.1]), second, [1, 0, 2])
    assert average.tolist() == pytest.approx([0.4, 0.4, 0.2]) and flipped


def swapped(swap):
    return json.dumps({"id": "x", "prompt": "x", "swap": swap})


BAD = {
    "{broken": "broken JSON",
    '{"id": "e"}': "item 'e': prompt: missing",
    '{"prompt": " "}': "prompt: empty",
    "[1]": "not a JSON object",
    json.dumps({"prompt": "word " * 100}): "prompt: ",
    '{"prompt": "x", "counts": {"a": -1}}': "counts: the value of 'a' must be",
    '{"prompt": "x", "prompt": "y"}': "stands twice",
    swapped("text"): "item 'x': swap: must be {",
    swapped({"prompt": "x", "labels": {"a": "c"}}): "item 'x': swap: unknown label {c}",
    swapped({"prompt": "soup " * 100, "labels": {}}): "more than the judge's max_length 60",
}


def test_bad_lines_stop_the_run_or_are_skipped_on_request(judged, tmp_path, capsys):
    good, bad = soups(len(BAD)), [line + "\n" for line in BAD]
    for line, words in zip(bad, BAD.values(), strict=True):
        with pytest.raises(InputError, match=words) as error:
            judged([good[0], line])
        assert str(error.value).startswith("in.jsonl:2: ") and "\n" not in str(error.value)
        assert str(error.value).endswith("(--skip_bad goes on without such rows)")
        assert (tmp_path / "out.jsonl").read_text().startswith('{"id": "i0"')  # the good row before it
    (tmp_path / "out.jsonl").unlink()
    out = judged(itertools.chain(*zip(good, bad, strict=True)), skip_bad=True)
    assert [row["id"] for row in out] == [row["id"] for row in good]
    *said, last = capsys.readouterr().err.splitlines()
    for k, (line, words) in enumerate(zip(said, BAD.values(), strict=True)):
        assert re.match(f"skipped: in.jsonl:{2 * k + 2}: .*{words}", line)
    assert f"judged {len(BAD)} items; skipped {len(BAD)} bad rows" in last
    (tmp_path / "out.jsonl").unlink()
    with pytest.raises(InputError, match=r"in.jsonl: none of its 2 rows can be judged$"):
        judged(bad[:2], skip_bad=True)
    assert not (tmp_path / "out.jsonl").exists()
    os.mkfifo(tmp_path / "pipe.jsonl")  # what is no file of ours stays
    held = os.open(tmp_path / "pipe.jsonl", os.O_RDWR)
    with pytest.raises(InputError, match="none of its 2 rows"):
        judged(bad[:2], skip_bad=True, out="pipe.jsonl")
    os.close(held)
    assert (tmp_path / "pipe.jsonl").exists()


def test_a_stopped_run_goes_on_and_ends_as_if_it_had_not_stopped(judged, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipe, "WINDOW", 4)
    rows = [*soups(9, swapped=(1, 3, 5, 7)), {"prompt": "x", "odd": "é"}]
    rows.insert(3, "{broken\n")
    before, out = judged(rows, skip_bad=True), tmp_path / "out.jsonl"
    whole, asked, real = out.read_bytes(), [], distjudge.Judge.stream
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]

    def stream(self, prompts, *rest):
        return real(self, (asked.append(p) or p for p in prompts), *rest)

    monkeypatch.setattr(distjudge.Judge, "stream", stream)
    cuts = {0: 0, ends[0] - 1: 0, ends[3]: 4, ends[3] + 20: 4, ends[4] - 1: 4, len(whole): 10}
    for cut, kept in cuts.items():
        out.write_bytes(whole[:cut])
        asked.clear()
        capsys.readouterr()
        after = judged(rows, skip_bad=True)
        assert sum(not p.startswith("Fine") for p in asked) == 10 - kept
        assert out.read_bytes().startswith(whole[: ends[kept - 1] if kept else 0])
        for line, old in zip(after, before, strict=True):  # other neighbours in its window, other rounding
            close = {name: pytest.approx(value, abs=5e-6) for name, value in old.items() if name in FLOATS}
            assert line == old | close and list(line) == list(old)
        said = capsys.readouterr().err
        assert f"judged {10 - kept} items" in said and (f"kept {kept} judged before" in said) == bool(kept)


def test_output_of_other_items_judges_or_settings_is_not_continued(judged, tmp_path, tiny_model):
    rows, out = soups(4), tmp_path / "out.jsonl"
    judged(rows)
    before = out.read_bytes()
    other = load_judge(tiny_model, LABELS, max_length=60)
    with torch.no_grad():
        next(p for name, p in other.model.named_parameters() if "lora_B" in name).add_(0.01)
    save_judge(other, tmp_path / "other")
    changed = [*rows[:2], {"id": "i2", "prompt": "Is soup 2 fine!"}, rows[3]]
    cases = [(changed, {}, 3), (rows[1:], {}, 1), (rows[:3], {}, 4), (rows, {"level": 0.5}, 1)]
    for lines, settings, number in [*cases, (rows, {"run": str(tmp_path / "other")}, 1)]:
        with pytest.raises(InputError, match=rf"^out.jsonl:{number}: is not .*; name another --out"):
            judged(lines, **settings)
        assert out.read_bytes() == before
    line = before.splitlines(keepends=True)[0]
    foreign = [b"[" + before[1:], b"a text of mine, without a line break", b'{"id": "i0", "mine": [1, 2]}']
    foreign += [b'{"id"', line[:40], line + b'{"id": "i1", "predictions": 1}', line + b'{"id": "x']
    for content in foreign:  # also what could be the beginning of a judgment, if no judgment stands before it
        out.write_bytes(content)
        with pytest.raises(InputError, match=r"out.jsonl:[12]: is not the judgment of in.jsonl:[12]"):
            judged(rows)
        assert out.read_bytes() == content


def test_memory_is_bounded_by_the_window(run_folder, monkeypatch):
    """Of an endless input only a window is read ahead of what comes out."""
    monkeypatch.setattr(recipe, "WINDOW", 8)
    work, read = recipe.Judging(recipe.Settings(run=run_folder)), []

    def endless():
        while True:
            read.append(1)
            yield recipe.Ask("", {"id": "x"}, f"Is {len(read)} fine?")

    stream = work.answers(endless())
    for n in range(20):
        next(stream)
        assert len(read) == 8 * (n // 8 + 1)


def test_pipes_flags_and_the_figure(judged, run_folder, tmp_path, monkeypatch, capsys):
    votes = [{"counts": {"a": 2, "b": 1, "tie": None}}, {"counts": {"other": 1}}, {}, {}, {}]
    rows = [row | {"id": f"$x$ <b> {i}", "odd": "\ud800"} | votes[i] for i, row in enumerate(soups(5))]
    config = recipe.JudgeConfig(run=run_folder, items="-", min_mass=1.0, figure="f.png")

    def pipe(text):
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(text.encode())))
        recipe.main(config)

    pipe("".join(json.dumps(row) + "\n" for row in rows))
    said = capsys.readouterr()
    out = [json.loads(line) for line in said.out.splitlines()]
    assert [(row["id"], row["odd"]) for row in out] == [(row["id"], "\ud800") for row in rows]
    assert all(row["low_mass"] is True for row in out) and "low mass" in said.err.splitlines()[1]
    assert "5 of 5 have a label mass under 1" in said.err
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    work, rows[0]["id"] = recipe.Tally(config), "1"
    work.first, work.prompts = out[:2], ["Rate it: good soup", "Rate it: bad tea"]
    recipe.draw(work, LABELS, "f.svg")
    assert "good soup" in (drawn := (tmp_path / "f.svg").read_text()) and "Rate it" not in drawn
    with pytest.raises(InputError, match="stdin:2: broken JSON"):
        pipe('{"prompt": "x"}\n{broken\n')
    with pytest.raises(InputError, match="stdin:1: mode: judging adds a field of this name; rename yours"):
        pipe('{"prompt": "x", "mode": "mine"}\n')


IMPOSSIBLE = [
    ({"items": "gone.jsonl"}, "gone.jsonl: no such file"),
    ({"level": 0.0}, "level must be above 0"),
    ({"min_mass": 2.0}, "min_mass between 0 and 1"),
    ({"out": "x.jsonl.gz"}, "must end with .jsonl, .csv"),
    ({"out": "."}, "is a folder"),
    ({"out": "in.jsonl"}, "is the file of the items"),
    ({"figure": "f.xyz"}, "f.xyz: must end with .png"),
    ({"figure": "gone/f.png"}, "gone/f.png: its folder is not there"),
    ({"run": "nowhere"}, "^nowhere: no such folder; judges here: none"),
    ({"labels": ("x", "y")}, "trained for"),
    ({"spellings": ("a=A",)}, "a run folder has its own"),
]


@pytest.mark.parametrize(("settings", "words"), IMPOSSIBLE)
def test_settings_that_cannot_be(judged, tmp_path, settings, words):
    with pytest.raises(InputError, match=words):
        judged(soups(1), **settings)
    assert json.loads((tmp_path / "in.jsonl").read_text()) == soups(1)[0]


def test_a_reader_that_has_enough_and_a_closed_input_end_in_no_traceback(run_folder, tmp_path):
    """The output of `| head` is more than a pipe holds, so that judging meets its end."""
    rows = [row | {"note": "x" * 5000} for row in soups(60)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = f"{sys.executable} {recipe.__file__} --run {run_folder} --items"
    for command, code, words in (
        (f"{script} in.jsonl | head -1 | wc -l; exit ${{PIPESTATUS[0]}}", 0, ""),
        (f"{script} - <&-", 2, "error: the standard input or output, named as -, is closed\n"),
    ):
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (code, words)
        assert done.stdout.strip() == "1" * (code == 0)


def test_ctrl_c_keeps_what_is_judged(judged, tmp_path, monkeypatch, capsys):
    real = distjudge.Judge.stream

    def stream(self, *rest):
        yield from itertools.islice(real(self, *rest), 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(distjudge.Judge, "stream", stream)
    with pytest.raises(distjudge.Stopped, match=r"out.jsonl holds is kept") as stopped:
        judged(soups(5))
    assert stopped.value.number == 2 and not list(tmp_path.glob("*.lock"))
    monkeypatch.setattr(distjudge.Judge, "stream", real)
    assert len(judged(soups(5))) == 5 and "kept 2 judged before" in capsys.readouterr().err


def test_outputs_that_are_no_files_of_ours(judged, tmp_path):
    """A link is not followed, a device not read, a table not overwritten; one process writes to a file."""
    (tmp_path / "mine.txt").write_text("mine")
    for name in ("link.jsonl", "link.csv", "part.csv.part.jsonl"):
        (tmp_path / name).symlink_to("mine.txt")
        with pytest.raises(InputError, match="is a symbolic link"):
            judged(soups(1), out=name.removesuffix(".part.jsonl"))
    (tmp_path / "there.csv").write_text("a,b")
    with pytest.raises(InputError, match=r"there.csv: is there already"):
        judged(soups(1), out="there.csv")
    with pytest.raises(OSError, match="No space left"):
        judged(soups(1), out="/dev/full")
    with distjudge.locked(tmp_path / "busy.jsonl"), pytest.raises(InputError, match=r"is writing to it"):
        judged(soups(1), out="busy.jsonl")
    assert (tmp_path / "mine.txt").read_text() == "mine" and (tmp_path / "there.csv").read_text() == "a,b"
    assert not (tmp_path / "busy.jsonl").exists()


def test_a_run_that_is_not_there_is_answered_with_those_that_are(judged, run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "runs" / "tiny" / "full-0")
    (tmp_path / "runs" / "api").mkdir()
    (tmp_path / "runs" / "api" / "config.json").write_text('{"items": "i.jsonl"}')  # api.py's, no model's
    none = "no judge in this folder"
    for run, words in (("runs/first", "no such folder"), ("runs/tiny", none), ("runs/api", none)):
        with pytest.raises(InputError, match=rf"^{run}: {words}; judges here: runs/tiny/full-0 \("):
            judged(soups(1), run=run)


def test_ids_of_another_field_and_options_that_do_not_fit(judged, tmp_path):
    asked = {"prompt": "Is it fine?", "uid": "u1", "id": "i"}
    (row,) = judged([asked], item="uid")
    assert row["id"] == row["uid"] == "u1"
    for more in ({}, {"uid": " "}):
        with pytest.raises(InputError, match=r"in.jsonl:1: uid: missing or empty, and --item names it"):
            judged([soups(1)[0] | more], item="uid", out="p.jsonl")
    turns = [{"role": "user", "content": "Is it fine?"}]
    judged([{"prompt": turns, "uid": "u2", "id": "i"}], item="uid", out="m.jsonl")
    assert json.loads((tmp_path / "m.jsonl").read_text())["id"] == "u2"
    with pytest.raises(InputError, match=r"in.jsonl: sheet: only an Excel file has sheets"):
        judged(soups(1), sheet="May", out="p.jsonl")
    for name, given in {"four_bit": True, "spellings": ("a=A",)}.items():
        with pytest.raises(InputError, match=f"{name}: a run folder has its own"):
            judged(soups(1), out="p.jsonl", **{name: given})


def test_ray_s_judges_refuse_what_would_be_lost(tmp_path, monkeypatch):
    """The rest of recipes/judge_ray.py is tested where Ray is."""
    actor = object.__new__(judge_ray.Actor)
    actor.form, actor.lines = sheets.Template(template="{text} {more}?", text="text", optional=["more"]), True
    actor.work = types.SimpleNamespace(ask=lambda row, where, filled: filled["prompt"] if filled else "asked")
    assert actor.ask({"text": '{"text": "Green"}'}) == "Green ?"
    assert "mean: judging adds a field of this name" in actor.ask({"text": '{"prompt": "x", "mean": 3}'})
    assert actor.ask({"text": '{"prompt": "x", "note": 3}'}) == "asked"
    actor.lines = False  # of Parquet: a column may be called text
    for row in ({"text": "Green", "more": None}, {"text": "Green"}):
        assert actor.ask(row) == "Green ?"
    actor.work.answers = lambda asks: iter(())
    assert actor(pyarrow.table({"text": [" "]}))["problem"].to_pylist() == ["input: ' ': text: empty"]
    monkeypatch.setitem(sys.modules, "ray", types.ModuleType("ray"))
    (tmp_path / "i.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="out: is the file of the items"):
        judge_ray.main(judge_ray.RayConfig(run="r", items=("i.jsonl",), out="./i.jsonl", address="auto"))
