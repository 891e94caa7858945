"""recipes/trust.py: measures by hand, on simulated panels whose truth is known, and the command."""

import json
import math

import distjudge

import numpy as np
import pytest
import torch
import trust
from conftest import call, write_rows
from trust import TrustConfig, excess, left_out, measure, slices, slices_of


def named(row):
    return dict(zip("12345", row.tolist(), strict=True))


def distances(*given):
    return [x.numpy() for x in distjudge.squared_distance(*map(torch.tensor, given))]


def items_of(counts, groups):
    rows = zip(counts, groups, strict=True)
    return [distjudge.Item(f"i{i}", "Rate.", named(votes), f"g{g}") for i, (votes, g) in enumerate(rows)]


def panel(rng, groups=60, each=4, judge=0.5, bias=0.0, votes=4):
    """Votes, predictions, groups, truth: a judge whose logits err by group and by item."""
    group = np.repeat(np.arange(groups), each)
    normal = lambda n: rng.standard_normal((n, 5))  # noqa: E731
    logits = normal(groups)[group] + normal(len(group))
    error = judge * (0.5 * normal(groups)[group] + normal(len(group))) + bias * np.arange(5)
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (logits, logits + error))
    return rng.multinomial(rng.integers(2, votes + 1, len(p)), p), q, group, p


def test_measures_by_hand():
    counts, q = np.array([[2.0, 1], [1, 0], [0, 4]]), np.array([[0.6, 0.4], [1, 0], [0.25, 0.75]])
    distance, apart = distances(q, counts)
    # the pairs of two votes that agree: 1 of 3, none there is, 6 of 6
    assert apart == pytest.approx([2 / 3, math.nan, 0], nan_ok=True)
    assert distance == pytest.approx([0.52 - 3.2 / 3 + 1 / 3, math.nan, 0.625 - 1.5 + 1], nan_ok=True)
    # of 2 and 1 votes: without a voter of two the others tie, without the other one both say the first
    expected = [[(2 * 0.5 + 1) / 3, (2 * 0.5 + 0) / 3], [math.nan] * 2, [1, 1]]
    assert left_out(q, counts) == pytest.approx(np.array(expected), nan_ok=True)
    for parts in (distances(q, counts * 1.5)[0], *left_out(q, counts * 1.5).T):
        assert np.isnan(parts).tolist() == [True, True, False]  # people do not come in halves


def test_one_person_is_worth_one():
    """A judge that says one more person's vote is worth one, and scores as one person does."""
    rng = np.random.default_rng(0)
    counts, _, group, p = panel(rng, groups=3000, each=1)
    one = np.array([rng.multinomial(1, row) for row in p])
    found = measure(one.astype(float), items_of(counts, group), {}, draws=100)
    assert found["people"]["mean"] == pytest.approx(1, abs=0.06)
    assert found["brier"]["judge"]["mean"] == pytest.approx(found["brier"]["one person"]["mean"], rel=0.04)
    assert found["brier"]["everybody"]["mean"] == pytest.approx((1 - (p**2).sum(1)).mean(), abs=0.01)
    hits, ends = found["accuracy"], found["accuracy"]["gain"]
    assert hits["judge"]["mean"] == pytest.approx(hits["one person"]["mean"], abs=0.03)
    assert ends["low"] < 0 < ends["high"]


def test_excess_is_a_t_test():
    error = np.array([0.0, 1, 2, 3, 10, 12, 11, 13])
    inside = np.arange(8) > 3
    gap, p = excess(error, inside, np.arange(8))
    se = (2 * (5 / 4) / 4 * 4 / 3) ** 0.5  # both sides have variance 5 / 4 (over n) and four items
    assert gap == 10 and p == pytest.approx(trust.stdtr(3, -10 / se))
    assert excess(-error, inside, np.arange(8))[1] > 0.99  # smaller errors are no failure
    few = excess(error, inside, np.array([0, 0, 1, 1, 2, 3, 4, 5]))[1]  # two clusters against four
    assert few == pytest.approx(trust.stdtr(1, -10 / (2 * (0.5 + 0.3125)) ** 0.5))
    paired = excess(error, inside, np.arange(8) // 2)
    assert paired[1] > p and excess(error, inside, inside.astype(int))[1] == 1


def test_slices_are_quarters_or_values():
    numbers = slices_of([*range(20), None])
    assert list(numbers) == ["0 to 4", "5 to 9", "10 to 14", "15 to 19"]
    assert [int(inside.sum()) for inside in numbers.values()] == [5] * 4
    assert len(slices_of([2010 + k / 4 for k in range(40)])) == len(slices_of(range(100_000, 100_200))) == 4
    assert [*slices_of([str(k) for k in range(40)])] == ["0 to 9", "10 to 19", "20 to 29", "30 to 39"]
    assert [*slices_of(["1", "2", None])] == ["1", "2"]
    values = slices_of(["a", None, 2, True])
    assert {name: inside.argmax() for name, inside in values.items()} == {"a": 0, "2": 2, "True": 3}


def test_slices_by_hand():
    """Seven groups of twelve items: errors of a group hang together, but in slices by group items count."""
    group, found, told = np.repeat(np.arange(7), 12), [], np.arange(84) != 5
    distance = np.where(told, np.random.default_rng(0).random(84) + group % 3, math.nan)
    fields = {"half": np.arange(84) % 2, "group": group, "few": np.arange(84) < 11, "all": ["same"] * 84}
    rows = slices(distance, group, fields)
    for row in rows:
        inside = (fields[row["field"]].astype(str) == row["slice"])[told]
        at = (np.arange(84) if row["field"] == "group" else group)[told]
        gap, p = excess(distance[told], inside, at)
        assert row["items"] == inside.sum() >= 10 and row["excess"] == gap
        assert row["distance"] == distance[told][inside].mean()
        found.append(p)
    assert [row["p_holm"] for row in rows] == pytest.approx(trust.holm(found))
    names = [(row["field"], row["slice"]) for row in rows]
    assert len(rows) == 2 + 7 + 2 and ("few", "True") in names  # eleven items, one of them unknown
    for field in ("half", "group"):
        errors = [row["distance"] for row in rows if row["field"] == field]
        assert errors == sorted(errors, reverse=True)


@pytest.fixture
def judged(tmp_path, capsys):
    """What trust.py says, trust.json and the page, of items with a prediction (one each) and votes."""

    def run(predicted, votes, group=""):
        each = predicted if isinstance(predicted, list) else [predicted] * len(votes)
        rows = [{"id": str(i), "predicted": each[i], "annotations": said} for i, said in enumerate(votes)]
        rows = [row | ({"group": group[i % len(group)]} if group else {}) for i, row in enumerate(rows)]
        write_rows(tmp_path / "judged.jsonl", rows)
        trust.main(TrustConfig(str(tmp_path / "judged.jsonl"), str(tmp_path / "out")))
        return json.loads((tmp_path / "out" / "trust.json").read_text()), capsys.readouterr().out

    return run


def test_a_worth_beyond_what_votes_can_tell(judged):
    """Two people of an item never agree: votes cannot tell such a judge from the truth."""
    found, said = judged({"yes": 0.5, "no": 0.5}, [["yes", "no"]] * 20)
    assert found["people"] == dict.fromkeys(("mean", "low", "high"), "no end")
    assert "Worth in people: no end [no end, no end]" in said
    found, _ = judged({"yes": 0.9, "no": 0.1}, [["yes", "yes"]] * 19 + [["no", "no"]])
    assert found["accuracy"]["judge"]["high"] == 1  # a share; the bootstrap alone goes beyond
    assert trust.said({"mean": 2.0, "low": None, "high": None, "p": None}, ".1f") == "2.0"
    assert trust.said({"mean": 2.0, "low": 1.0, "high": "no end"}, ".1f") == "2.0 [1.0, no end]"


@pytest.mark.parametrize("judge", [0, 0.5])
@pytest.mark.parametrize("panels", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_nothing_is_flagged_where_nothing_is_wrong(judge, panels):
    """Slices that know nothing of the errors: flagged in one panel of twenty at most. A bad one is seen."""
    rng, flagged, seen = np.random.default_rng(0), 0, 0
    for _ in range(panels):
        counts, q, group, _ = panel(rng, judge=judge)
        distance, by_group = distances(q, counts)[0], rng.integers(5, size=60)[group]
        fields = {"a": by_group, "b": rng.integers(8, size=240), "c": rng.random(240)}
        fields |= {"group": rng.permutation(240) // 12}
        flagged += any(row["p_holm"] < 0.05 for row in slices(distance, group, fields))
        q = np.where((by_group == 2)[:, None], np.eye(5)[0], q)
        rows = slices(distances(q, counts)[0], group, fields)
        seen += (rows[0]["slice"], rows[0]["p_holm"] < 0.05) == ("2", True)
    assert flagged <= 0.05 * panels + 2 * (0.05 * 0.95 * panels) ** 0.5
    assert seen > 0.8 * panels


def test_the_command_on_a_closed_models_file(tmp_path):
    """Predictions as api.py writes them, votes in another file; one item unrated, one not asked."""
    counts, q, group, _ = panel(np.random.default_rng(0), bias=0.5)
    items, judged = [], []
    for i in range(len(q)):
        own = {"id": f"i{i}", "prompt": f"Rate {i}."}
        items.append(own | {"group": f"g{group[i]}", "source": "xy"[i % 2]})
        items[-1] |= {"counts": named(counts[i])} if i else {}
        judged.append(own | {"predicted": named(q[i]), "label_mass": 0.9})
    (tmp_path / "gpt").mkdir()
    write_rows(tmp_path / "items.jsonl", items)
    write_rows(tmp_path / "gpt" / "predictions.jsonl", judged[:0:-1][:-1] + judged[:1])
    given = ["--predictions", "gpt", "--items", "items.jsonl", "--by", "source", "--out", "out"]
    done = call(trust.__file__, *given, cwd=tmp_path)
    assert (tmp_path / "out" / "trust.txt").read_text() == done.stdout
    assert (tmp_path / "out" / "trust.png").stat().st_size > 10_000
    found = json.loads((tmp_path / "out" / "trust.json").read_text())
    q, rated = q[2:], items_of(counts[2:], group[2:])
    assert found["people"] == pytest.approx(distjudge.survey_equivalence(q, rated))
    means = [torch.tensor(x @ np.arange(1, 6))[None] for x in (q, distjudge.shares_of(rated).numpy())]
    expected = distjudge.bootstrap(*means, groups=[item.group for item in rated])
    assert found["shifts"]["mean rating"]["shift"] == pytest.approx(expected)
    assert found["left_out"] == 2 and "2 items without votes or without a prediction" in done.stdout
    assert "the judge is too lenient" in done.stdout
    assert {row["slice"] for row in found["slices"] if row["field"] == "source"} == {"x", "y"}


def test_equal_entropies_are_in_one_quarter(judged):
    turned = [{"1": 0.1, "2": 0.2, "3": 0.7}, {"1": 0.7, "2": 0.2, "3": 0.1}, {"1": 0.2, "2": 0.1, "3": 0.7}]
    found, _ = judged([turned[i % 3] for i in range(90)], [["1", "2", "3"]] * 90)
    assert not [row["slice"] for row in found["slices"] if row["field"] == "judge's entropy"]


def test_the_verdict_goes_by_the_p_beside_it(judged):
    """Each mean is off by itself (t is 6.7 or 2.2), the last one not among four tests."""
    cases = {"too lenient": [0, 0.7, 0.3], "too strict": [0.3, 0.7, 0], "neither": [0.05, 0.8, 0.15]}
    for words, q in cases.items():
        found, said = judged(dict(zip("123", q, strict=True)), [["1"]] * 10 + [["2"]] * 80 + [["3"]] * 10)
        row = found["shifts"]["mean rating"]
        assert row["shift"]["p"] < 0.05 and (row["p_holm"] < 0.05) == (words != "neither")
        assert f"the judge is {words}" in said
    found, said = judged({"1": 0, "2": 0.7, "3": 0.3}, [["1"]] * 10 + [["2"]] * 90, group="ab")
    row = found["shifts"]["mean rating"]  # two groups can be alike by chance
    assert row["shift"]["p"] < 0.01 and row["p_holm"] == 1 and "so few groups cannot tell" in said
    assert "These are 2 groups: intervals are too narrow" in said


def test_words_as_labels_and_one_vote_an_item(judged):
    found, said = judged({"yes": 0.9, "no": 0.1}, [["no"], ["yes"], ["yes"], ["yes"]] * 10)
    assert found["people"]["mean"] is None and "Worth in people: unknown" in said and "lenient" not in said
    assert found["shifts"]["share of yes"]["shift"]["mean"] == pytest.approx(0.15)
    assert found["slices"] == [] and list(found["shifts"]) == ["share of yes", "share of no"]


BAD = [
    ({"counts": {"7": 1}}, {}, r"judged.jsonl:2: item 'b': counts: unknown label \{7\}"),
    ({"id": "a"}, {}, "judged.jsonl:2: item 'a': id: duplicate, first at .*judged.jsonl:1"),
    ({}, {"by": ("place",)}, "judged.jsonl: by: no item has a field 'place'"),
    ({}, {"predictions": "none"}, "none: no such file"),
    ({}, {"items": "other.jsonl"}, "other.jsonl: no item has both votes and a prediction"),
]


@pytest.mark.parametrize(("fields", "given", "message"), BAD)
def test_bad_input(tmp_path, monkeypatch, fields, given, message):
    monkeypatch.chdir(tmp_path)
    rows = [{"id": name, "predicted": {"1": 0.5, "2": 0.5}, "counts": {"1": 1, "2": 2}} for name in "ab"]
    rows[1] |= fields
    write_rows(tmp_path / "judged.jsonl", rows)
    write_rows(tmp_path / "other.jsonl", [{"id": "c", "prompt": "Rate c.", "counts": {"1": 1}}])
    with pytest.raises(distjudge.InputError, match=message):
        trust.main(TrustConfig(**{"predictions": "judged.jsonl", "out": "out"} | given))
    assert not (tmp_path / "out").exists()
