"""recipes/probe.py: what it measures, on judges whose behaviour is known, and its command line."""

import json

import distjudge

import probe as probe_recipe
import pytest
import torch
from conftest import call
from probe import CHANGES, CLAIMS, changed, compare, probe

CONTROL = "nothing (a control: the noise of computing twice)"


def test_measures_by_hand():
    before = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]])
    after = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.2, 0.3]])
    moved, target = {"moved": 0.2, "flips": 0.5}, {"target_before": 0.15, "target_after": 0.35, "taken": 0.5}
    assert compare(before, after, torch.tensor([2, 0])) == pytest.approx(moved | target)
    assert compare(before, after) == pytest.approx(moved)
    assert changed("One. {label}\nTwo", "the last sentence said twice", "x") == "One. {label}\nTwo Two"
    assert changed("{last}", "experts agree", "5") == "{last}\n\nAll experts who read this agreed on 5."


class Gullible:
    """Answers what the last line asks for; even-handed otherwise but for its last label."""

    labels = ("yes", "no")

    def predict(self, prompts, progress=False):
        rows = []
        for prompt in prompts:
            asked = [label for label in self.labels if f" {label}" in prompt.partition("\n\n")[2]]
            rows.append({("yes",): [0.9, 0.1], ("no",): [0.1, 0.9]}.get(tuple(asked), [0.6, 0.4]))
        return torch.tensor(rows).numpy()


def test_a_gullible_judge_is_caught():
    rows = [{"id": i, "prompt": f"Is it {i}?", "counts": {"yes": 1, "no": 1}} for i in range(4)]
    found = probe(Gullible(), distjudge.load_items(rows))
    assert set(found) == {*CHANGES, *CLAIMS}
    told = {"moved": 0.5, "flips": 1.0, "target_before": 0.4, "target_after": 0.9, "taken": 1.0}
    assert found["the correct label is"] == pytest.approx(told)
    assert found[CONTROL]["moved"] == 0 and found["flattery"]["flips"] == 0


def test_a_conversation_is_probed_in_its_last_message():
    turns = [{"role": "system", "content": "Be fair."}, {"role": "user", "content": "Good soup?"}]
    prompt = distjudge.prompt_text(turns)
    assert distjudge.messages_of(changed(prompt, "the correct label is", "yes"))[0] == turns[0]
    last = distjudge.messages_of(changed(prompt, "the correct label is", "yes"))[1]["content"]
    assert last == changed("Good soup?", "the correct label is", "yes") != "Good soup?"


def test_the_command(saved_run, tmp_path):
    swap = {"labels": {"yes": "no", "no": "yes"}}
    rows = [{"prompt": f"soup {i}", "swap": swap | {"prompt": f"{i} soup"}} for i in range(3)]
    rows = [row | {"counts": {"yes": 1, "no": 2}} for row in (*rows, {"prompt": "word " * 400})]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--run", saved_run, "--items", "items.jsonl", "--out", "probed"]
    done = call(probe_recipe.__file__, *given, cwd=tmp_path)
    found = json.loads((tmp_path / "probed" / "probe.json").read_text())
    assert found["items"] == 3 and "left out 1 of 4 items" in done.stdout
    assert found["probes"][CONTROL]["moved"] < 1e-6 < found["probes"]["longer: five of them"]["moved"]
    assert "the pair in the other order" in found["probes"]
    # the labels are the judge's own, also where nobody chose one of them
    some = [{"prompt": f"soup {i}"} | ({"annotations": ["yes"]} if i else {}) for i in range(3)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    places = (saved_run, tmp_path / "items.jsonl", tmp_path / "again")
    probe_recipe.main(probe_recipe.ProbeConfig(*map(str, places)))
    assert json.loads((tmp_path / "again" / "probe.json").read_text())["labels"] == ["yes", "no"]
    assert "| flattery |" in (tmp_path / "probed" / "probe.md").read_text()
