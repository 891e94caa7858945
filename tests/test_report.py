"""plots/report.py: the numbers, the escaping, several runs; and (slow) the page in a real browser."""

import base64
import dataclasses
import hashlib
import html.parser
import json
import math
import random
import re
import shutil
from functools import partial

import distjudge
from distjudge import InputError

import pytest
import torch

from plots import report

HOSTILE = (
    "<script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">'\"&amp;</script>"
    "{{data}}<!-- \u2028 ]]> \\ {% raw %}"
)
LABELS, MASSES = ["1", "2", "10"], (0.95, 0.99, 0.999, 0.97)  # so even that an interval would end above 1


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_run(folder, n=12, seed=0, labels=LABELS, skip=()):
    """A run folder with random predictions; votes depend on the item only. Item 1 is hostile everywhere."""
    folder.mkdir(parents=True, exist_ok=True)
    draw, rows = random.Random(seed), []
    for i in range(n):
        votes, q = random.Random(f"votes {i}"), [draw.random() + 0.05 for _ in labels]
        text = f"Rate soup {i}. " + "word " * (i % 40 * 20)
        row = {"id": f"item {i}", "prompt": text, "group": f"g{i // 3}", "label_mass": MASSES[i // 3 % 4]}
        truth = [0.5, *[0.5 / (len(labels) - 1)] * 2]
        row |= {"flipped": i % 2 == 0, "truth": dict(zip(labels, truth, strict=False))}
        row["counts"] = {label: votes.randint(0, 3) for label in labels}
        row["counts"][labels[i % len(labels)]] += 1
        row["predicted"] = {label: x / sum(q) for label, x in zip(labels, q, strict=True)}
        rows.append(row | ({"id": HOSTILE, "prompt": HOSTILE * 2, "group": HOSTILE} if i == 1 else {}))
    rows = [row for i, row in enumerate(rows) if i not in skip]
    write_lines(folder / "predictions.jsonl", rows)
    (folder / "metrics.json").write_text(json.dumps({"kl_noise_floor": 0.1 + seed, "kl_marginal": None}))
    settings = {"model": HOSTILE, "alpha": 0.8, "train": [HOSTILE], "versions": {"torch": "2"}}
    (folder / "config.json").write_text(json.dumps(settings))
    return rows


def scores_of(rows, ordered=None):
    q, items = [list(row["predicted"].values()) for row in rows], distjudge.load_items(rows)
    mass = torch.tensor([row["label_mass"] for row in rows], dtype=torch.float64)
    return distjudge.item_scores(q, items, ordered) | {"label_mass": mass}


def write_page(*folders, draws=50, **options):
    report.main(report.ReportConfig(tuple(map(str, folders)), draws=draws, **options))
    return (folders[0] / "report.html").read_text(encoding="utf-8")


def read_page(page):
    """The text of the tables' cells, and of the scripts; the first </script> ends one, as in a browser."""
    cells = re.findall("<t[hd]>(.*?)</t[hd]>", page, re.DOTALL)
    scripts = re.findall("<script[^>]*>(.*?)</script>", page, re.DOTALL)
    return [html.unescape(re.sub("<[^>]*>", "", cell)) for cell in cells], scripts


def elements_of(page):
    """The attributes of all elements of a page."""
    parser, found = html.parser.HTMLParser(), []
    parser.handle_starttag = lambda tag, attributes: found.append(dict(attributes))
    parser.feed(page)
    return found


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folders = [tmp_path_factory.mktemp("report") / name for name in ("full", HOSTILE.replace("/", "_"))]
    runs = [write_run(folders[0]), write_run(folders[1], seed=1, skip=(3,))]
    return write_page(*folders), runs


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(report, "pictures_of", lambda one: {})


def shown(scores, rows, other=None, sign="", metric=""):
    found = distjudge.bootstrap(scores[None], other, [row["group"] for row in rows], 50)
    low, high, both = found["low"], found["high"], "correlation" in metric
    if not sign:  # no difference, which has no bounds
        most = 1.0 if both or metric in ("accuracy", "total_variation", "label_mass") else math.inf
        low, high = max(low, -1.0 if both else 0.0), min(high, most)
    return f"{found['mean']:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def test_numbers_are_those_of_the_runs(compared):
    """Means, intervals over groups, floors, and differences on the items both runs have."""
    (cells, _), (ours, theirs) = read_page(compared[0]), compared[1]
    first, second = scores_of(ours), scores_of(theirs)
    common = [i for i in range(12) if i != 3]
    for metric, (title, hint) in report.METRICS.items():
        if metric not in first:
            assert title + hint not in cells
            continue
        at = cells.index(title + hint)
        assert cells[at + 1 : at + 3] == [
            shown(first[metric], ours, metric=metric),
            shown(second[metric], theirs, metric=metric),
        ], metric
        at = cells.index(title + hint, at + 1)
        assert cells[at + 1] == shown(second[metric], theirs, first[metric][None, common], "+"), metric
    at = cells.index("noise floor of KL: what the true distributions would score")
    assert cells[at : at + 6][1:] == ["0.100", "1.100", "KL of the training marginal", "–", "–"]
    assert cells[at - 3].startswith("KL to the votes")
    at = cells.index("worth, in people" + report.WORTH)
    for cell, rows in zip(cells[at + 1 : at + 3], (ours, theirs), strict=True):
        q, items = [list(row["predicted"].values()) for row in rows], distjudge.load_items(rows)
        worth = [f"{n:.1f}" for n in distjudge.survey_equivalence(q, items, 50).values()]
        assert cell == "{} [{}, {}]".format(*worth).replace("inf", "∞")
    at = cells.index("items (groups)")
    assert cells[at + 1 : at + 3] == ["12 (5)", "11 (5)"]
    assert cells[cells.index("items in common") + 1] == "11"


def test_a_difference_knows_the_groups_that_either_run_has(tmp_path):
    for seed, name in enumerate("ab"):
        write_run(tmp_path / name, seed=seed)
    both = tuple(str(tmp_path / name) for name in "ab")
    first, second = report.load(report.ReportConfig(both))
    wanted = report.mean_of(second, "kl", 50, first)
    second.items = [dataclasses.replace(item, group=None) for item in second.items]
    assert report.mean_of(second, "kl", 50, first) == wanted


def test_what_people_wrote_is_text_and_nothing_comes_from_elsewhere(compared):
    page, rows = compared[0], compared[1][0]
    elements, (cells, scripts) = elements_of(page), read_page(page)
    assert len(scripts) == 2 and "pwned" not in scripts[1] and "<" not in scripts[0]
    data = json.loads(scripts[0])
    assert [item["id"] for item in data["items"]] == [row["id"] for row in rows] and data["labels"] == LABELS
    assert data["items"][1]["text"] == HOSTILE * 2 and data["items"][1]["group"] == HOSTILE
    assert data["runs"][1] == HOSTILE.replace("/", "_") and data["items"][3]["q"][1] is None
    assert data["items"][2]["q"][0] == pytest.approx(list(rows[2]["predicted"].values()), abs=1e-5)
    assert data["items"][2]["truth"] == [0.5, 0.25, 0.25] and data["items"][2]["flipped"][0] is True
    assert data["items"][2]["mass"][0] == rows[2]["label_mass"]
    assert HOSTILE in cells and json.dumps([HOSTILE], ensure_ascii=False) in cells
    names = {name for attributes in elements for name in attributes}
    assert not {"action", "srcset", "onerror", "onload", "style"} & names
    links = {attributes["href"] for attributes in elements if "href" in attributes}
    places = {"#" + attributes["id"] for attributes in elements if "id" in attributes}
    assert links == {"#metrics", "#differences", "#items", "#figures", "#settings"} and links <= places
    images = [attributes["src"].split(",") for attributes in elements if "src" in attributes]
    assert len(images) == 8 and {kind for kind, _ in images} == {"data:image/png;base64"}
    assert all(base64.b64decode(image).startswith(b"\x89PNG") for _, image in images)
    policy = next(a["content"] for a in elements if a.get("http-equiv") == "Content-Security-Policy")
    hashed = base64.b64encode(hashlib.sha256(scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{hashed}'" in policy and policy.startswith("default-src 'none'")
    assert "http" not in policy


def test_settings_in_which_runs_differ_are_marked(tmp_path, no_figures):
    for name, alpha in (("a", 0.8), ("b", 1.0)):
        write_run(tmp_path / name, 3)
        settings = {"zeta": 1, "alpha": alpha, "out": name} | ({"more": 2} if name == "b" else {})
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
    page = write_page(tmp_path / "a", tmp_path / "b")
    rows = re.findall("<tr( class=differs)?><th>(alpha|zeta|more|out)<", page)
    assert rows == [(" class=differs", "alpha"), (" class=differs", "more"), ("", "zeta")]
    assert "class=differs>" not in write_page(tmp_path / "a")


def test_texts_from_item_files_and_their_cut(tmp_path, no_figures, monkeypatch):
    monkeypatch.setattr(report, "MAX_CHARS", 10)
    rows = write_run(tmp_path / "run", 3)
    kept = ("id", "counts", "predicted")
    bare = [{key: row[key] for key in kept} for row in rows]
    bare[2] |= {"prompt": "its own", "group": "own"}
    write_lines(tmp_path / "run" / "predictions.jsonl", bare)
    texts = [{key: row[key] for key in ("id", "prompt", "group")} for row in rows]
    write_lines(tmp_path / "items.jsonl", texts)
    files = (str(tmp_path / "items.jsonl"),)
    cells, scripts = read_page(write_page(tmp_path / "run", items=files))
    found = json.loads(scripts[0])["items"]
    cut = [(row["prompt"][:10], len(row["prompt"]) - 10, row["group"]) for row in rows[:2]]
    assert [(item["text"], item["cut"], item["group"]) for item in found] == [*cut, ("its own", 0, "own")]
    assert found[0]["mass"] == [None] and "".join(report.METRICS["label_mass"]) not in cells


def test_words_are_a_scale_where_the_user_says_so(tmp_path, no_figures):
    rows = write_run(tmp_path / "run", labels=["bad", "fair", "good"])
    title = "".join(report.METRICS["rps"])
    assert title not in read_page(write_page(tmp_path / "run"))[0]
    cells, _ = read_page(write_page(tmp_path / "run", ordered=True))
    assert cells[cells.index(title) + 1] == shown(scores_of(rows, True)["rps"], rows)


def test_runs_that_cannot_be_compared_are_refused(tmp_path, no_figures):
    write_run(tmp_path / "a", 3)
    write_run(tmp_path / "labels", 3, labels=["1", "2", "3"])
    for name in ("votes", "twice", "broken", "wrong"):
        rows = write_run(tmp_path / name, 3)
    rows[2]["counts"]["1"] += 1
    write_lines(tmp_path / "votes" / "predictions.jsonl", rows)
    write_lines(tmp_path / "twice" / "predictions.jsonl", [rows[0], rows[0]])
    own = rows[0]
    for name, field in {"nobody": dict.fromkeys(LABELS, 0), "more": own["counts"] | {"9": 1}}.items():
        write_run(tmp_path / name, 3)
        write_lines(tmp_path / name / "predictions.jsonl", [own | {"counts": field}])
    own["predicted"]["1"] = -1
    write_lines(tmp_path / "wrong" / "predictions.jsonl", rows)
    (tmp_path / "broken" / "config.json").write_text("{")
    refusals = {
        "labels": "are not those of",
        "votes": "item 'item 2': its votes are not those",
        "twice": "twice.predictions.jsonl: an id stands there twice",
        "broken": "config.json: broken JSON",
        "wrong": "wrong: no run folder that can be used: predicted: row 0 is no distribution",
        "nobody": "predictions.jsonl:1: item 'item 0': has no votes",
        "more": r"predictions.jsonl:1: counts: unknown label \{9\}",
        "gone": "gone: no run folder that can be used: .*: no such file",
    }
    for other, words in refusals.items():
        with pytest.raises(InputError, match=words):
            write_page(tmp_path / "a", tmp_path / other)
    with pytest.raises(InputError, match="names: 2 for 1"):
        write_page(tmp_path / "a", names=("x", "y"))
    with pytest.raises(InputError, match=r"names: \{x, x\} names a run twice"):
        write_page(tmp_path / "a", tmp_path / "twice", names=("x", "x"))
    with pytest.raises(InputError, match="runs: name a run folder, before --items"):
        report.main(report.ReportConfig((), items=("items.jsonl",)))
    write_lines(tmp_path / "others.jsonl", [{"id": "elsewhere", "prompt": "x"}])
    with pytest.raises(InputError, match=r"others.jsonl: items: no id is one of the runs'"):
        write_page(tmp_path / "a", items=(str(tmp_path / "others.jsonl"),))


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "ground"), [("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 23, 28)")])
def test_the_page_in_a_browser(tmp_path, scheme, ground):
    """10,000 items in Chromium: nothing hostile runs, nothing is fetched; sorting, filtering, paging work."""
    sync_api = pytest.importorskip("playwright.sync_api")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("needs chromium")
    rows = write_run(tmp_path / "full", 10_000)
    write_run(tmp_path / "single", 10_000, seed=1)
    write_page(tmp_path / "full", tmp_path / "single", draws=40)
    kl = dict(zip((row["id"] for row in rows), scores_of(rows)["kl"].tolist(), strict=True))
    with sync_api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_context(color_scheme=scheme, viewport={"width": 500, "height": 900}).new_page()
        asked, said = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto((tmp_path / "full" / "report.html").as_uri())
        page.wait_for_selector("article")

        ids = partial(page.eval_on_selector_all, "article", "nodes => nodes.map(node => node.dataset.id)")
        where = page.locator("#where").inner_text
        assert ids() == [row["id"] for row in rows[:25]] and where() == "1 to 25 of 10000 (10000 in all)"
        assert page.locator("article").nth(1).locator(".text").text_content().startswith(HOSTILE * 2)
        page.select_option("#sort", "kl")
        assert ids() == sorted(kl, key=lambda name: -round(kl[name], 5))[:25]
        page.select_option("#order", "1")
        assert ids()[0] == min(kl, key=kl.get)
        page.select_option("#sort", "place")
        page.click("#next")
        assert where().startswith("26 to 50")
        page.select_option("#human", index=3)
        page.select_option("#size", "100")
        expected = [row for row in rows if row["counts"]["10"] == max(row["counts"].values())]
        assert where() == f"1 to 100 of {len(expected)} (10000 in all)"
        page.select_option("#human", index=0)
        page.check("#wrong")
        tops = [row["counts"][max(row["predicted"], key=row["predicted"].get)] for row in rows]
        wrong = [top < max(row["counts"].values()) for top, row in zip(tops, rows, strict=True)]
        assert where() == f"1 to 100 of {sum(wrong)} (10000 in all)"
        page.uncheck("#wrong")
        page.fill("#search", "<SCRIPT>")
        page.wait_for_timeout(1000)  # the page's policy lets no test evaluate a condition in it
        assert ids() == [HOSTILE] and page.title() == "Judges and votes: full, single" and not said
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
        page.click("text=settings")
        assert page.evaluate("location.hash") == "#settings"
        assert page.evaluate("document.documentElement.scrollWidth") == 500  # nothing sticks out
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == ground
        chromium.close()
