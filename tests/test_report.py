"""plots/report.py: the numbers, the escaping, several runs; and (slow) the page in a real browser."""
import base64
import hashlib
import html.parser
import json
import random
import shutil

import pytest
import torch

import distjudge
from distjudge import InputError
from plots import report

HOSTILE = "<script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">'\"&amp;</script>{{data}}<!-- \u2028 ]]> \\"
LABELS = ["1", "2", "10"]


def write_run(folder, n=12, seed=0, labels=LABELS, config=None, skip=()):
    """A run folder with random predictions; votes depend on the item only. Item 1 is hostile everywhere."""
    folder.mkdir(parents=True, exist_ok=True)
    draw, rows = random.Random(seed), []
    for i in range(n):
        votes, q = random.Random(f"votes {i}"), [draw.random() + 0.05 for _ in labels]
        counts = [votes.randint(0, 3) for _ in labels]
        counts[i % len(labels)] += 1
        name = HOSTILE if i == 1 else f"item {i}"
        rows.append({"id": name, "prompt": HOSTILE * 2 if i == 1 else f"Rate soup {i}. " + "word " * (i % 40 * 20), "group": HOSTILE if i == 1 else f"g{i // 3}",
                     "counts": dict(zip(labels, counts, strict=True)), "predicted": {label: x / sum(q) for label, x in zip(labels, q, strict=True)}, "label_mass": draw.random()})
    rows = [row for i, row in enumerate(rows) if i not in skip]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = distjudge.load_items(rows)
    metrics = distjudge.evaluate([list(row["predicted"].values()) for row in rows], items, label_mass=[row["label_mass"] for row in rows], floor_draws=5)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "config.json").write_text(json.dumps({"model": HOSTILE, "alpha": 0.8, "versions": {"torch": "2"}} | (config or {})))
    return rows, metrics


class Page(html.parser.HTMLParser):
    """Elements with their attributes, the text of tables, and what stands in script elements."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.cells, self.scripts, self.inside = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.inside.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        if self.inside and self.inside[-1] == "script":
            self.scripts[-1] += data
        elif "td" in self.inside or "th" in self.inside:
            self.cells[-1] += data


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    runs = [write_run(folder / "full"), write_run(folder / HOSTILE.replace("/", "_"), seed=1, skip=(3,))]
    report.main(report.ReportConfig(runs=(str(folder / "full"), str(folder / HOSTILE.replace("/", "_"))), out=str(folder / "page.html"), draws=50))
    return folder / "page.html", runs


def test_numbers_are_those_of_the_runs(compared):
    path, runs = compared
    cells = Page(path.read_text()).cells
    for title, name in (("KL to the votes, natslower is better", "kl"), ("accuracytop label = majority label", "accuracy"), ("ranked probability scorelower is better", "rps"),
                        ("earth mover's distancelower is better", "emd"), ("Brier scorelower is better", "brier"), ("total variationlower is better", "total_variation"),
                        ("Jensen-Shannon divergence, natslower is better", "js_divergence"), ("label massprobability that the answer is a label at all", "label_mass")):
        at = cells.index(title)
        assert [cell.split(" [")[0] for cell in cells[at + 1 : at + 3]] == [f"{metrics[name]:.3f}" for _, metrics in runs]
    at = cells.index("noise floor of KL: what the true distributions would score")
    assert cells[at + 1 : at + 3] == [f"{metrics['kl_noise_floor']:.3f}" for _, metrics in runs]
    at = cells.index("items (groups)")
    assert cells[at + 1 : at + 3] == ["12 (5)", "11 (5)"]
    ours, theirs = ({row["id"]: distjudge.kl_divergence(*(torch.tensor([list(row[f].values())], dtype=torch.float64) / sum(row[f].values()) for f in ("counts", "predicted"))).item()
                     for row in rows} for rows, _ in runs)
    difference = sum(theirs[name] - ours[name] for name in theirs) / 11
    assert any(cell.startswith(f"{difference:+.3f} [") for cell in cells) and "11" in cells


def test_intervals_resample_groups():
    """Groups of one value each: resampling groups must show their spread, resampling items would show almost none. And against numpy."""
    import numpy

    groups = [i // 50 for i in range(200)]
    values = torch.tensor([[float(g), 1.0] for g in groups])
    (low, high), constant = report.intervals(values, groups, 4000, 0)
    assert constant == (1.0, 1.0)
    draws = numpy.random.default_rng(0).integers(0, 4, (200_000, 4)).mean(1)
    assert (low, high) == pytest.approx(tuple(numpy.quantile(draws, [0.025, 0.975])), abs=0.13) and high - low > 1.8
    uneven = report.intervals(torch.tensor([[0.0], [3.0], [3.0]]), ["a", "b", "b"], 400, 0)  # means 0, 2 or 3: items weigh the same, not groups
    assert uneven == [(0.0, 3.0)]


def test_what_people_wrote_is_text_and_nothing_comes_from_elsewhere(compared):
    path, runs = compared
    text = path.read_text()
    page = Page(text)
    assert len(page.scripts) == 2 and "pwned" not in page.scripts[1] and "</script" not in page.scripts[0] and "<" not in page.scripts[0]
    data = json.loads(page.scripts[0])
    assert [item["id"] for item in data["items"]] == [row["id"] for row in runs[0][0]] and data["items"][1]["text"] == HOSTILE * 2 and data["items"][1]["group"] == HOSTILE
    assert data["runs"][1] == HOSTILE.replace("/", "_") and data["items"][3]["q"][1] is None and data["labels"] == LABELS
    assert data["items"][2]["q"][0] == pytest.approx(list(runs[0][0][2]["predicted"].values()), abs=1e-5) and HOSTILE in page.cells
    assert {tag for tag, _ in page.elements} <= set("html head meta title style body main h1 h2 h3 p div table thead tbody tr th td small section details summary img label input select "
                                                    "option button span noscript script".split())
    for _, attributes in page.elements:
        assert not {"href", "action", "srcset", "onerror", "onload", "style"} & set(attributes)
        assert attributes.get("src", "data:").startswith("data:image/png;base64,") or "src" not in attributes
    assert sum(tag == "img" for tag, _ in page.elements) == 8 and all(base64.b64decode(a["src"].split(",")[1]).startswith(b"\x89PNG") for t, a in page.elements if t == "img")
    policy = next(a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    hashed = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{hashed}'" in policy and policy.startswith("default-src 'none'") and "http" not in policy


def test_texts_from_item_files_and_their_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "figures_part", lambda one: report.Markup(""))
    rows, _ = write_run(tmp_path / "run", 3)
    bare = [{k: v for k, v in row.items() if k not in ("prompt", "group", "label_mass")} for row in rows]
    (tmp_path / "run" / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare))
    (tmp_path / "items.jsonl").write_text("".join(json.dumps({k: row[k] for k in ("id", "prompt", "group", "counts")}) + "\n" for row in rows[:2]))
    report.main(report.ReportConfig(runs=(str(tmp_path / "run"),), items=(str(tmp_path / "items.jsonl"),), max_chars=10, draws=20))
    found = json.loads(Page((tmp_path / "run" / "report.html").read_text()).scripts[0])["items"]
    assert [(item["text"], item["cut"], item["group"]) for item in found] == [(rows[0]["prompt"][:10], len(rows[0]["prompt"]) - 10, "g0"), (HOSTILE[:10], 2 * len(HOSTILE) - 10, HOSTILE),
                                                                             ("", 0, None)]
    assert found[0]["mass"] == [None]


def test_runs_that_cannot_be_compared_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "figures_part", lambda one: report.Markup(""))
    write_run(tmp_path / "a", 3)
    write_run(tmp_path / "labels", 3, labels=["1", "2", "3"])
    rows, _ = write_run(tmp_path / "votes", 3)
    rows[2]["counts"]["1"] += 1
    (tmp_path / "votes" / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_run(tmp_path / "twice", 3)
    (tmp_path / "twice" / "predictions.jsonl").write_text(json.dumps(rows[0]) * 1 + "\n" + json.dumps(rows[0]) + "\n")
    write_run(tmp_path / "broken", 3)
    (tmp_path / "broken" / "config.json").write_text("{")
    for other, words in (("labels", "are not those of"), ("votes", "item 'item 2': its votes are not those"), ("twice", "an id stands there twice"), ("broken", "broken JSON"),
                         ("gone", "not a run folder")):
        with pytest.raises(InputError, match=words):
            report.main(report.ReportConfig(runs=(str(tmp_path / "a"), str(tmp_path / other)), draws=20))
    with pytest.raises(InputError, match="names: 2 for 1"):
        report.main(report.ReportConfig(runs=(str(tmp_path / "a"),), names=("x", "y")))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(tmp_path, scheme):
    """10,000 items in Chromium: nothing hostile runs, nothing is fetched, sorting, filtering and paging do what they say."""
    sync_api, browser = pytest.importorskip("playwright.sync_api"), shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("needs chromium")
    rows, _ = write_run(tmp_path / "full", 10_000)
    write_run(tmp_path / "single", 10_000, seed=1)
    report.main(report.ReportConfig(runs=(str(tmp_path / "full"), str(tmp_path / "single")), draws=20))
    kl = {row["id"]: distjudge.kl_divergence(*(torch.tensor([list(row[f].values())], dtype=torch.float64) / sum(row[f].values()) for f in ("counts", "predicted"))).item() for row in rows}
    with sync_api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_context(color_scheme=scheme).new_page()
        asked, said = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto((tmp_path / "full" / "report.html").as_uri())
        page.wait_for_selector("article")
        ids = lambda: page.eval_on_selector_all("article", "nodes => nodes.map(node => node.dataset.id)")  # noqa: E731
        assert ids() == [row["id"] for row in rows[:25]] and page.locator("#where").inner_text() == "1 to 25 of 10000 (10000 in all)"
        assert page.locator("article").nth(1).locator(".text").text_content().startswith(HOSTILE * 2)
        page.select_option("#sort", "kl")
        assert ids() == sorted(kl, key=lambda name: -round(kl[name], 5))[:25]
        page.select_option("#order", "1")
        assert ids()[0] == min(kl, key=kl.get)
        page.select_option("#sort", "place")
        page.click("#next")
        assert page.locator("#where").inner_text().startswith("26 to 50")
        page.select_option("#human", index=3)
        expected = [row for row in rows if row["counts"]["10"] == max(row["counts"].values())]
        page.select_option("#size", "100")
        assert page.locator("#where").inner_text() == f"1 to 100 of {len(expected)} (10000 in all)"
        page.select_option("#human", index=0)
        page.check("#wrong")
        wrong = [row for row in rows if row["counts"][max(row["predicted"], key=row["predicted"].get)] < max(row["counts"].values())]
        assert page.locator("#where").inner_text() == f"1 to 100 of {len(wrong)} (10000 in all)"
        page.uncheck("#wrong")
        page.fill("#search", "<SCRIPT>")
        page.wait_for_timeout(1000)  # the page's policy lets no test evaluate a condition in it
        assert ids() == [HOSTILE] and page.title() == "Judges and votes: full, single" and not said
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 28)")
        chromium.close()
