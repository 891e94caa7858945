"""Convert a published data set of human judgments into items: train.jsonl, test.jsonl (and valid.jsonl) with a card.json.

    python data/prepare.py emobank --raw emobank.csv individual_reader_ratings.csv --out votes/valence
    python data/prepare.py emobank --raw ... --dimension arousal --out votes/arousal

emobank     EmoBank (Buechel and Hahn 2017; github.com/JULIELab/EmoBank, folder corpus/; CC BY-SA 4.0): how about five readers
            rated a sentence's valence, arousal or dominance from 1 to 5. The data set's own split. A sentence that stands
            in more than one split stays in test (before valid) only.
"""
import csv
import dataclasses
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

import distjudge
from distjudge import InputError

PROMPTS = Path(__file__).with_name("prompts")


@dataclasses.dataclass
class PrepareConfig:
    task: tyro.conf.Positional[Literal["emobank"]]
    """The data set."""
    raw: tuple[str, ...]
    """Its files, as published, in any order."""
    out: str
    """The folder for the items and card.json; files in it are replaced."""
    dimension: Literal["valence", "arousal", "dominance"] = "valence"
    """emobank: what the readers rated."""
    prompts: str | None = None
    """A template of your own, with the placeholders of the one in data/prompts/."""


def read_csv(path: str, columns: dict[str, set[str]]) -> tuple[str, list[dict[str, str]]]:
    """The rows of a CSV file, and which of the expected files it is: the one whose columns it has."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            rows = list(reader)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as CSV: {error}") from None
    kinds = [kind for kind, names in columns.items() if set(reader.fieldnames or ()) == names]
    if not kinds:
        expected = " or ".join(f"{kind} ({', '.join(sorted(names))})" for kind, names in columns.items())
        raise InputError(f"{path}: its columns {sorted(reader.fieldnames or ())} are not those of {expected}")
    for line, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise InputError(f"{path}: row {line}: {'more' if None in row else 'fewer'} fields than columns")
    return kinds[0], rows


def read_template(config: PrepareConfig, name: str, fields: dict[str, str]) -> str:
    """The task's prompt template, every placeholder but {text} filled in."""
    path = Path(config.prompts) if config.prompts else PROMPTS / f"{name}.txt"
    try:
        template = path.read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: the template cannot be read: {error}") from None
    for field, value in fields.items():
        template = template.replace("{" + field + "}", value)
    if unknown := set(re.findall(r"\{(\w+)\}", template)) - {"text"}:
        known = ", ".join("{" + field + "}" for field in ("text", *fields))
        raise InputError(f"{path}: unknown placeholder {{{min(unknown)}}}; there are {known}")
    if template.count("{text}") != 1:
        raise InputError(f"{path}: the placeholder {{text}} must stand in it once")
    return template


def emobank(config: PrepareConfig) -> tuple[dict[str, list[dict]], dict]:
    """Items by split, and what goes into the card."""
    letter, low, high = {"valence": ("V", "very unpleasant", "very pleasant"), "arousal": ("A", "very calm", "very excited"),
                         "dominance": ("D", "no control at all", "full control")}[config.dimension]
    template = read_template(config, "emobank", {"dimension": config.dimension, "low": low, "high": high})
    expected = {"emobank.csv": {"id", "split", "V", "A", "D", "text"}, "individual_reader_ratings.csv": {"id", "V", "A", "D"}}
    tables, paths = {}, {}
    for path in config.raw:
        kind, rows = read_csv(path, expected)
        if kind in tables:
            raise InputError(f"{path}: is {kind}, which {paths[kind]} is too")
        tables[kind], paths[kind] = rows, path
    if set(tables) != set(expected):
        raise InputError(f"raw: {' and '.join(sorted(set(expected) - set(tables)))} of EmoBank's folder corpus/ must be named too")
    counts: dict[str, dict[str, int]] = {}
    for line, rating in enumerate(tables["individual_reader_ratings.csv"], 2):
        if rating[letter] not in "12345" or len(rating[letter]) != 1:
            raise InputError(f"{paths['individual_reader_ratings.csv']}: row {line}: {letter}: '{rating[letter]}' is not 1 to 5")
        counts.setdefault(rating["id"], dict.fromkeys("12345", 0))[rating[letter]] += 1
    names = {"train": "train", "dev": "valid", "test": "test"}
    sentences = tables["emobank.csv"]
    for line, row in enumerate(sentences, 2):
        if row["split"] not in names:
            raise InputError(f"{paths['emobank.csv']}: row {line}: split: '{row['split']}' is not one of {', '.join(names)}")
    splits: dict[str, list[dict]] = {"train": [], "valid": [], "test": []}
    dropped = {"rated, without text": len(set(counts) - {row["id"] for row in sentences}), "text without ratings": 0, "empty text": 0,
               "also in test or valid": 0}
    taken: set[str] = set()
    for split in ("test", "dev", "train"):  # a sentence of two splits stays with the first of these
        here = [row for row in sentences if row["split"] == split]
        for row in here:
            text = row["text"].strip()
            if not text:
                dropped["empty text"] += 1
            elif row["id"] not in counts:
                dropped["text without ratings"] += 1
            elif text in taken:
                dropped["also in test or valid"] += 1
            else:
                splits[names[split]].append({"id": row["id"], "prompt": template.replace("{text}", text), "counts": counts[row["id"]]})
        taken |= {row["text"].strip() for row in here}
    return splits, {"labels": list("12345"), "ordered": True, "licence": "CC BY-SA 4.0", "source": "github.com/JULIELab/EmoBank, corpus/",
                    "read": {kind: len(rows) for kind, rows in tables.items()}, "dropped": dropped, "dimension": config.dimension}


def main(config: PrepareConfig) -> None:
    splits, card = {"emobank": emobank}[config.task](config)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        distjudge.write_lines(out / f"{split}.jsonl", [json.dumps(row, ensure_ascii=False) for row in rows])
    votes = [sum(row["counts"].values()) for rows in splits.values() for row in rows]
    card = {"task": config.task, **card, "items": {split: len(rows) for split, rows in splits.items()},
            "votes_an_item": {str(n): votes.count(n) for n in sorted(set(votes))},
            "sha256": {Path(path).name: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in config.raw}}
    distjudge.write_json(out / "card.json", card)
    print(f"read {card['read']}\nkept {card['items']}\ndropped {card['dropped']}\nwrote {out}")


if __name__ == "__main__":
    distjudge.cli(main, PrepareConfig)
