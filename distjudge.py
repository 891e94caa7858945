"""distjudge: train an LLM judge that answers with the distribution of human judgments, not with one verdict.

    items = distjudge.load_items("votes.jsonl")                       # {"id", "prompt", "counts": {label: votes}} a line
    judge = distjudge.load_judge("Qwen/Qwen2.5-0.5B-Instruct", labels=distjudge.labels_of(items))
    distjudge.train(judge, items, distjudge.Config(out="runs/first"))
    judge.predict(["Is this summary fluent? ..."])                    # (1, C) float32, one probability a label

The method is that of "Distributional LLM-as-a-Judge" (Chen et al., NeurIPS 2025, arXiv 2505.12301):

    min over theta of the mean over items of   max over p' in E(p) of   alpha KL(p' || q_theta) + (1 - alpha) CE(r, q_theta)

p is the human distribution of an item (counts / votes), r its majority label, q_theta the model's probabilities of the label
tokens where its answer begins, E(p) the part of the simplex within eps of p. All losses are in nats.

The file can be copied alone into another project: it needs torch at import, and transformers, peft, bitsandbytes or tyro only
inside the functions that use them. It reads from top to bottom, in nine sections. Those in half an hour: 5 (losses), 6 (the
adversary) and train() in 7 are the method, 600 lines; build_pack() in 3 and label_logprobs() in 4 are why it is fast. The rest
keeps it honest: every refused input has its line (1), no label is read at a wrong token (2), a saved judge comes back as it
was (4), a killed run goes on where it was (7), and numbers have intervals (8).
"""
from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import functools
import gzip
import hashlib
import itertools
import json
import logging
import math
import numbers
import os
import random
import re
import shutil
import signal
import sys
import threading
import types
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

__version__ = "0.1.0"
KL_FLOOR = 1e-6  # evaluate() raises model probabilities to this before it takes a logarithm
log = logging.getLogger("distjudge")


class Stopped(Exception):
    """Training was stopped by a signal, after saving a checkpoint to go on from. Commands exit with 128 + the signal's number."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


class ExportError(Exception):
    """A trained judge is saved, but what was to be made of it failed or judges otherwise. Commands exit with code 1."""


class InputError(ValueError):
    """What the user gave cannot be used. Each line of the message says what is wrong and where; commands exit with code 2."""


# ---------------------------------------------------------------------------------------------------------------------
# 1. Items: what was judged, and how people voted
# ---------------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Swap:
    """A pair shown in the other order. labels: for each label, in label order, the index of the one that means the same there."""

    prompt: str
    labels: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Item:
    """One judged thing. `counts` holds every label of the data set, in label order, also those without a vote.

    Votes are whole numbers, except where a `distribution` of a weighted panel was given: then share times votes.
    `truth` is the distribution the votes were drawn from, where it is known (simulated panels).
    """

    id: str
    prompt: str
    counts: dict[str, float]
    group: str | None = None
    split: str | None = None
    truth: dict[str, float] | None = None
    swap: Swap | None = None
    where: str = ""

    @property
    def prompts(self) -> list[str]:
        """The prompt, and that of the other order where there is one."""
        return [self.prompt, self.swap.prompt] if self.swap else [self.prompt]

    @property
    def votes(self) -> float:
        return sum(self.counts.values())

    @property
    def distribution(self) -> list[float]:
        return [c / self.votes for c in self.counts.values()]


def labels_of(items: Sequence[Item]) -> list[str]:
    """The labels of a data set, in order. Raises InputError if the items do not all have the same."""
    if not items:
        raise InputError("no items")
    labels = list(items[0].counts)
    for item in items:
        if list(item.counts) != labels:
            raise InputError(f"{item.where}: item '{short(item.id)}': counts: labels {listed(item.counts)} differ from {listed(labels)}")
    return labels


def counts_of(items: Sequence[Item]) -> torch.Tensor:
    """Votes as a float64 tensor (N, C)."""
    labels_of(items)
    return torch.tensor([list(item.counts.values()) for item in items], dtype=torch.float64)


def truths_of(items: Sequence[Item]) -> torch.Tensor | None:
    """The true distributions as a float64 tensor (N, C); None unless every item has one."""
    if not all(item.truth for item in items):
        return None
    return torch.tensor([list(item.truth.values()) for item in items], dtype=torch.float64)  # type: ignore[union-attr]


def load_items(*sources: Any, labels: Sequence[str] | None = None, complete: bool = False) -> list[Item]:
    """Reads items from `.jsonl` or `.jsonl.gz` files, lists of dicts, `datasets.Dataset`s or pandas DataFrames.

    A row holds "prompt" and the votes, given as one of
      "counts": {label: votes}                 every label, 0 where nobody chose it
      "annotations": [label, label, ...]       one entry a person
      "distribution": {label: share}, "votes": n   shares that add up to 1 (rounded ones to 0.02 are rescaled), and the number
                                               of people behind them
    and optionally "id" (without one, a hash of the prompt), "group" (items that must stay on one side of a split),
    "split" ("train" or "test"), "truth" ({label: probability}) and, for a pair, "swap": {"prompt": the pair in the other order,
    "labels": {label: the one that means the same there}}, where labels that keep their meaning may be left out. Other fields are
    ignored.

    Label order: `labels` where given (an item may then leave out labels without votes, unless `complete`); else numeric
    labels by value; else the order in which the first item with the commonest label set lists them; else, with
    annotations only, alphabetical.
    Raises InputError with one line a problem (file, line, id, field), at most 20 a source, for anything that is not so.
    """
    found: dict[str, list[str]] = {}  # by source
    parsed: list[tuple[str, str, dict[str, Any]]] = []
    seen: dict[str, str] = {}
    for source in _flatten(sources):
        name = _name(source)
        found.setdefault(name, [])
        for where, row, problem in read_rows(source):
            if problem:
                found[name].append(f"{where}: {problem}")
                continue
            item, bad = parse_row(row)
            if item["id"] in seen:
                bad.append(("id", f"duplicate, first at {seen[item['id']]}"))
            if item["id"]:
                seen.setdefault(item["id"], where)
            shown = f"item '{short(item['id'])}': " if item["id"] else ""
            found[name] += [f"{where}: {shown}{field}: {text}" for field, text in bad]
            if not bad:
                parsed.append((name, where, item))
    if labels is None:
        order, example = _label_order(parsed)
    else:
        order, example = [str(label) for label in labels], "the labels known"
        if len(set(order)) != len(order):
            raise InputError(f"labels: {order} names a label twice")
    if labels is None and (twins := look_alike(order)):
        at = next(where for _, where, item in parsed if twins[1] in item["counts"])
        raise InputError(f"{at}: labels '{short(twins[0], 20)}' and '{short(twins[1], 20)}' differ only in capitals or in how a letter "
                         "is coded; name the labels if both are meant")
    if are_numeric(order) and len(set(map(float, order))) != len(order):
        raise InputError(f"{parsed[0][1] if parsed else 'load_items'}: labels: {listed(order)} holds a number in two spellings")
    items, known = [], set(order)
    for name, where, item in parsed:
        head, got, field = f"{where}: item '{short(item['id'])}': ", set(item["counts"]), item["field"]
        if (labels is None or complete) and field != "annotations" and got != known:
            found[name].append(f"{head}{field}: labels {listed(item['counts'])} differ from {listed(order)} of {example} "
                               "(write 0 for labels without votes, or name the labels)")
        elif got - known:
            found[name].append(f"{head}{field}: unknown label {listed(sorted(got - known))}; the labels are {listed(order)}")
        if item["truth"] is not None and set(item["truth"]) - known:
            found[name].append(f"{head}truth: unknown label {listed(sorted(set(item['truth']) - known))}")
        truth = item["truth"] and {label: item["truth"].get(label, 0.0) for label in order}
        swap = None
        if item["swap"]:
            swap, problem = place_swap(*item["swap"], order)
            found[name] += [f"{head}swap: {problem}"] if problem else []
        items.append(Item(item["id"], item["prompt"], {label: item["counts"].get(label, 0) for label in order},
                          item["group"], item["split"], truth, swap, where))
    problems = [line for name, lines in found.items()
                for line in lines[:20] + ([f"{name}: and {len(lines) - 20} more problems"] if len(lines) > 20 else [])]
    if problems:
        raise InputError("\n".join(problems))
    if not items:
        raise InputError(f"{', '.join(found) or 'load_items'}: no items")
    if len(order) < 2:
        raise InputError(f"{items[0].where}: counts: a judge needs two labels or more, found {listed(order)}")
    return items


def _flatten(sources: Iterable[Any]) -> list[Any]:
    """A list of paths is as good as several paths; a list of dicts is one source."""
    flat: list[Any] = []
    for source in sources:
        is_paths = isinstance(source, (list, tuple)) and source and all(isinstance(s, (str, os.PathLike)) for s in source)
        flat += list(source) if is_paths else [source]
    return flat


def _name(source: Any) -> str:
    return str(source) if isinstance(source, (str, os.PathLike)) else "items"


def short(text: Any, width: int = 60) -> str:
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", " ", str(text))  # a message is one line, left to right
    return text if len(text) <= width else text[: width - 3] + "..."


def listed(labels: Iterable[str]) -> str:
    return "{" + ", ".join(short(label, 20) for label in labels) + "}"


class _Object(dict):
    """A JSON object that remembers which of its keys stood there twice."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        self.twice = [key for key, n in collections.Counter(key for key, _ in pairs).items() if n > 1]


def read_rows(source: Any) -> Iterator[tuple[str, dict, str]]:
    """Yields (where, row, ""), or (where, {}, what is wrong) for a line that is no JSON object."""
    if hasattr(source, "to_dict") and hasattr(source, "columns"):  # a pandas DataFrame
        source = source.to_dict("records")
    if not isinstance(source, (str, os.PathLike)):
        if isinstance(source, (dict, bytes)) or not isinstance(source, Iterable):
            raise InputError(f"load_items: expected paths, a list of dicts, a Dataset or a DataFrame, got {type(source).__name__}")
        for i, row in enumerate(source):
            yield (f"items[{i}]", row, "") if isinstance(row, dict) else (f"items[{i}]", {}, f"not a dict but {type(row).__name__}")
        return
    path = Path(source)
    shown = "stdin" if source == "-" else short(path, 1000)
    try:
        with (contextlib.nullcontext(sys.stdin.buffer) if source == "-" else
              gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")) as file:
            for number, raw in enumerate(file, 1):
                row, problem = {}, ""
                if number == 1 and (raw[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in raw[:4]):
                    raise InputError(f"{shown}: is UTF-16 or no text at all; save it as UTF-8")
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                    if not line:
                        continue
                    row = json.loads(line, object_pairs_hook=_Object)
                    problem = "" if isinstance(row, dict) else f"not a JSON object but {type(row).__name__}"
                except UnicodeDecodeError as error:
                    problem = f"not UTF-8 (byte {error.start + 1} of the line)"
                except json.JSONDecodeError as error:
                    problem = f"broken JSON: {error.msg} (column {error.colno})"
                except (ValueError, RecursionError) as error:
                    problem = f"broken JSON: {short(error, 100)}"
                yield f"{shown}:{number}", row, problem
    except FileNotFoundError:
        raise InputError(f"{shown}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{shown}: cannot be read: {error}") from None
    except ValueError as error:  # a NUL in the name
        raise error if isinstance(error, InputError) else InputError(f"{shown}: cannot be read: {error}") from None


def _is_number(value: Any) -> bool:
    """A real number, not a truth value; integers that no float holds are none."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


def is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))  # NaN: how pandas writes an empty cell


def as_label(value: Any) -> str | None:
    """A label as text: strings as they are, whole numbers in digits, None for anything else."""
    if isinstance(value, str):
        return value if value and value == value.strip() and is_text(value) else None
    if _is_number(value) and math.isfinite(value) and float(value).is_integer():
        return str(int(value))
    return None


def is_text(value: str) -> bool:
    """False for lone surrogates, which no tokenizer takes."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _prompt_problem(prompt: Any) -> str:
    if is_missing(prompt):
        return "missing"
    if not isinstance(prompt, str):
        return f"not text but {type(prompt).__name__}"
    if not prompt.strip():
        return "empty"
    return "" if is_text(prompt) else "holds a lone surrogate, which is no character"


def _parse_swap(value: Any, bad: list[tuple[str, str]]) -> tuple[str, dict[str, str]] | None:
    if not isinstance(value, dict) or not isinstance(value.get("labels"), dict):
        bad.append(("swap", 'must be {"prompt": ..., "labels": {label: label in the other order}}, not ' + short(repr(value))))
        return None
    if problem := _prompt_problem(value.get("prompt")):
        bad.append(("swap", f"prompt: {problem}"))
        return None
    pairs = {as_label(a): as_label(b) for a, b in value["labels"].items() if not is_missing(b)}
    if None in pairs or None in pairs.values():
        bad.append(("swap", f"labels: must be text without spaces around it, or whole numbers, not {short(repr(value['labels']))}"))
        return None
    return value["prompt"], pairs  # type: ignore[return-value]


def place_swap(prompt: str, other: dict[str, str], labels: Sequence[str]) -> tuple[Swap | None, str]:
    """The Swap of what _parse_swap found, or what is wrong with it among these labels."""
    if unknown := sorted({*other, *other.values()} - set(labels)):
        return None, f"unknown label {listed(unknown)}; the labels are {listed(labels)}"
    target = [other.get(label, label) for label in labels]
    if any(other.get(there, there) != label for label, there in zip(labels, target, strict=True)):
        return None, f"labels {other} do not trade places: swapped twice, every label must be itself again"
    return Swap(prompt, tuple(list(labels).index(label) for label in target)), ""


def parse_row(row: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """One row as {"id", "prompt", "counts", "field", "group", "split", "truth", "swap"}, and its problems as (field, text)."""
    bad = [(short(key), "stands twice in the row") for key in getattr(row, "twice", ())]
    item: dict[str, Any] = {"id": None, "counts": {}, "truth": None, "swap": None}
    item["prompt"] = prompt = row.get("prompt")
    if problem := _prompt_problem(prompt):
        bad.append(("prompt", problem))
    if not is_missing(row.get("swap")):
        item["swap"] = _parse_swap(row["swap"], bad)
    for field in ("id", "group", "split"):
        value = row.get(field)
        item[field] = None if is_missing(value) else as_label(value)
        if not is_missing(value) and item[field] is None:
            bad.append((field, f"must be text without spaces around it, or a whole number, not {short(repr(value))}"))
    if item["split"] not in (None, "train", "test"):
        bad.append(("split", f"must be train or test, not '{short(item['split'])}'"))
    if item["id"] is None and is_missing(row.get("id")) and isinstance(prompt, str):
        item["id"] = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    given = [field for field in ("counts", "annotations", "distribution") if not is_missing(row.get(field))]
    if len(given) != 1:
        bad.append(("counts", f"one of counts, annotations, distribution is needed, found {' and '.join(given) or 'none'}"))
        return item, bad
    item["field"] = field = given[0]
    if field == "annotations":
        item["counts"] = _tally(row[field], bad)
    else:
        votes, problems_before = {}, len(bad)
        item["counts"] = _parse_labels(row[field], field, bad)
        if field == "counts":
            for label, count in item["counts"].items():
                if math.isnan(count) or math.isinf(count):
                    bad.append((field, f"votes for '{short(label)}' are {count}"))
                elif count < 0 or not float(count).is_integer():
                    bad.append((field, f"votes for '{short(label)}' are {'negative' if count < 0 else 'fractional'}: {count}"))
                elif count > 10**9:
                    bad.append((field, f"votes for '{short(label)}' are more than a billion"))
                else:
                    votes[label] = int(count)
            if len(bad) == problems_before and not sum(votes.values()):
                bad.append((field, "no votes at all"))
            item["counts"] = votes
        else:
            number = row.get("votes")
            if is_missing(number) or not _is_number(number) or not 1 <= number <= 10**9 or not float(number).is_integer():
                bad.append(("votes", "a distribution needs the number of people behind it, a whole number of 1 or more, "
                            f"not {short(repr(number))}"))
            elif _check_shares(item["counts"], field, bad):
                item["counts"] = _votes_from_shares(item["counts"], int(number))
    if not is_missing(row.get("truth")):
        problems_before = len(bad)
        shares = _parse_labels(row["truth"], "truth", bad)
        if len(bad) == problems_before and _check_shares(shares, "truth", bad):
            item["truth"] = {label: share / sum(shares.values()) for label, share in shares.items()}
    return item, bad


def _tally(annotations: Any, bad: list[tuple[str, str]]) -> dict[str, int]:
    annotations = annotations.tolist() if hasattr(annotations, "tolist") else annotations
    counts: dict[str, int] = {}
    if not isinstance(annotations, (list, tuple)) or not annotations:
        bad.append(("annotations", "must be a list of one label or more"))
        return counts
    for value in annotations:
        label = as_label(value)
        if label is None:
            bad.append(("annotations", f"a label must be text without spaces around it, or a whole number, not {short(repr(value))}"))
            return counts
        counts[label] = counts.get(label, 0) + 1
    return counts


def _parse_labels(value: Any, field: str, bad: list[tuple[str, str]]) -> dict[str, float]:
    """{label: number} with labels as text; a label whose value is None (an empty struct field) counts as left out."""
    if not isinstance(value, dict) or not value:
        bad.append((field, "must be an object {label: number}"))
        return {}
    out: dict[str, float] = {}
    for key, number in value.items():
        label = as_label(key)
        if label is None:
            bad.append((field, f"a label must be text without spaces around it, or a whole number, not {short(repr(key))}"))
        elif label in out:
            bad.append((field, f"duplicate label '{short(label)}'"))
        elif number is not None and not _is_number(number):
            bad.append((field, f"the value of '{short(label)}' must be a number, not {short(repr(number))}"))
        elif number is not None:
            out[label] = number
    bad += [(field, f"duplicate label '{short(key)}'") for key in getattr(value, "twice", ())]
    return out


def _check_shares(shares: dict[str, float], field: str, bad: list[tuple[str, str]]) -> bool:
    if any(not math.isfinite(share) or share < 0 for share in shares.values()):
        bad.append((field, "shares must be numbers of 0 or more"))
    elif abs(sum(shares.values()) - 1) > 0.02:
        bad.append((field, f"shares must add up to 1, not to {sum(shares.values()):.4g}"))
    else:
        return True
    return False


def _votes_from_shares(shares: dict[str, float], votes: int) -> dict[str, float]:
    """Whole votes where every share is a multiple of 1/votes (to 0.05 votes, for rounded shares); else share x votes."""
    total = sum(shares.values())
    exact = {label: share / total * votes for label, share in shares.items()}
    whole = {label: round(count) for label, count in exact.items()}
    near = all(abs(exact[label] - whole[label]) <= 0.05 for label in exact) and sum(whole.values()) == votes
    return whole if near else exact


def _label_order(parsed: list[tuple[str, str, dict[str, Any]]]) -> tuple[list[str], str]:
    """Labels in order, and an item that lists them all: the first with the label set that most items have."""
    full = [(where, item) for _, where, item in parsed if item["field"] != "annotations"]
    if full:
        commonest = collections.Counter(frozenset(item["counts"]) for _, item in full).most_common(1)[0][0]
        where, item = next((where, item) for where, item in full if set(item["counts"]) == commonest)
        order = list(item["counts"])
    else:
        order, where = sorted({label for _, _, item in parsed for label in item["counts"]}), ""
    return sorted(order, key=float) if are_numeric(order) else order, where


def look_alike(labels: Iterable[str]) -> tuple[str, str] | None:
    """Two labels that differ only in capitals, or in whether an accent is a character of its own (Unicode's NFC)."""
    seen: dict[str, str] = {}
    for label in labels:
        other = seen.setdefault(unicodedata.normalize("NFC", label).casefold(), label)
        if other != label:
            return other, label
    return None


def are_numeric(labels: Iterable[str]) -> bool:
    """True if every label is a plain number ("1", "-2", "0.5") of at most 15 digits before the point, which a float holds: such labels
    are taken as ordered."""
    return all(re.fullmatch(r"[+-]?\d{1,15}(\.\d+)?", label) for label in labels)


def split_items(items: Sequence[Item], test_share: float = 0.2, seed: int = 0) -> tuple[list[Item], list[Item]]:
    """Train and test items, 8:2 by default. Items of one group, or of one prompt, stay together; order is kept.

    Whole groups are taken in random order, each that brings the test side nearer to `test_share` of the items; if none does,
    the smallest. Raises InputError if everything is one group.
    """
    parent = list(range(len(items)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first: dict[tuple[str, str], int] = {}
    for i, item in enumerate(items):
        for key in [*(("prompt", prompt) for prompt in item.prompts), *([("group", item.group)] if item.group is not None else [])]:
            parent[root(i)] = root(first.setdefault(key, i))
    members: dict[int, list[int]] = {}
    for i in range(len(items)):
        members.setdefault(root(i), []).append(i)
    groups = list(members.values())
    if len(groups) < 2:
        raise InputError(f"{len(items)} items in {len(groups)} group cannot be split")
    random.Random(seed).shuffle(groups)
    test: set[int] = set()
    for group in groups:
        wanted = test_share * len(items) - len(test)
        if abs(wanted - len(group)) < abs(wanted):
            test.update(group)
    if not test or len(test) == len(items):
        test = set(min(groups, key=len))
    return [item for i, item in enumerate(items) if i not in test], [item for i, item in enumerate(items) if i in test]


def check_apart(train_items: Sequence[Item], test_items: Sequence[Item]) -> None:
    """Raises InputError if an item (its id, or its prompt to the letter) or a group is on both sides."""
    keys = lambda item: [("id", item.id), *(("prompt", p) for p in item.prompts), ("group", item.group)]  # noqa: E731
    where = {key: item.where for item in train_items for key in keys(item)}
    lines = []
    for item in test_items:
        for field, value in keys(item):
            if value is not None and (field, value) in where:
                lines.append(f"{item.where}: item '{short(item.id)}': {field}: also in the training items, at {where[field, value]}")
                break
    if lines:
        raise InputError("\n".join(lines[:20] + ([f"and {len(lines) - 20} more test items"] if len(lines) > 20 else [])))


def keep_apart(train_items: Sequence[Item], test_items: Sequence[Item], overlap: Literal["refuse", "remove"] = "refuse",
               plain: Callable[[str], str] = str) -> tuple[list[Item], dict[str, int]]:
    """Training items of which none also stands in the test items, and how many were left out, by reason.

    An item stands in both if they share its prompt (to the letter, or as `plain` makes it; a pair's in either order), its
    group (one premise, article or question, which data/prepare.py names alike in every data set) or its id; the first of these
    counts. "refuse" raises InputError instead.
    """
    if overlap == "refuse":
        check_apart(train_items, test_items)
    keys = lambda item: [*(("prompt", plain(p)) for p in item.prompts), ("group", item.group), ("id", item.id)]  # noqa: E731
    taken = {(field, value) for item in test_items for field, value in keys(item) if value is not None}
    why = [next((key[0] for key in keys(item) if key in taken), None) for item in train_items]
    kept = [item for item, field in zip(train_items, why, strict=True) if field is None]
    return kept, {field: why.count(field) for field in ("prompt", "group", "id")}


# ---------------------------------------------------------------------------------------------------------------------
# 2. Prompts and label tokens
# ---------------------------------------------------------------------------------------------------------------------
_SENTINEL = "XQZPROMPTXQZ"
_TEMPLATE_DATE = datetime.date(2024, 7, 26)  # "today" in templates that tell it (Llama 3.2, SmolLM3): a prompt does not change with the day
_PROBE = "Is 2 + 2 = 4? One\n\ntwo, three: I'M 12345 -- don't."


def _is_control(token: str, special: bool) -> bool:
    """Whether an added token means something to the model beyond its characters: special ones, and tags such as <think>."""
    return bool(token.strip()) and (special or re.fullmatch(r"[\w\s]+", token) is None)


@functools.lru_cache(2)
def _tokenizer_of(spec: str) -> Any:
    """One tokenizer a process for equal ones: the library never frees the words that a BPE tokenizer has seen, 50 kB and more each."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(spec)


class PromptEncoder:
    """Turns user messages into token ids: the chat template around them, what people wrote as text only.

    The template is rendered once, with a stand-in for the message; `before` and `after` are what it puts around it, `end`
    what it puts after the answer. Without a chat template the message is followed by a line break. A control token
    written in a message ("<|im_end|>", "<tool_call>") is encoded as the characters it is made of, for the message goes
    through a copy of the tokenizer without its special tokens and other added tokens that are not plain words or space.
    Raises InputError if the template does more to a message than to strip it, or if the tokenizer's own encoding of a
    harmless message is not reproduced exactly.
    """

    memo: dict[str, list[int]] | None = None  # while it is a dict, what was encoded is kept there and not encoded again

    def __init__(self, tokenizer: Any, frame: dict[str, Any] | None = None):
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(f"{tokenizer.name_or_path}: tokenizer: a fast tokenizer (tokenizer.json) is needed")
        self.tokenizer = tokenizer
        self.frame = frame or self._render()
        added = {t.content: t for t in tokenizer.added_tokens_decoder.values() if _is_control(t.content, t.special)}
        self.control_ids = {tokenizer.convert_tokens_to_ids(content) for content in added} - {tokenizer.unk_token_id}
        pattern = "|".join(re.escape(c) for c in sorted(added, key=len, reverse=True))
        marks = lambda text: list(re.finditer(pattern, text)) if pattern else []  # noqa: E731
        before, after, end = self.frame["before"], self.frame["after"], self.frame["end"]
        cut = marks(before)[-1].end() if marks(before) else 0
        self._lead, head = before[cut:], before[:cut]
        first = marks(after)[0].start() if marks(after) else len(after)
        self._trail, self._tail = after[:first], after[first:]
        if cut and added[marks(before)[-1].group()].rstrip:
            self._lead = self._lead.lstrip()
        if self._tail and added[marks(after)[0].group()].lstrip:
            self._trail = self._trail.rstrip()
        self._head_ids, self._tail_ids = self._ids(head), self._ids(self._tail)
        if tokenizer.chat_template and not self._tail:
            log.warning("%s: the chat template ends a turn in plain words, not in a control token: a text that is judged can imitate it",
                        tokenizer.name_or_path)
        if not tokenizer.chat_template and tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
            self._head_ids = [tokenizer.bos_token_id]
        closing = marks(end)
        self.end_is_known = bool(closing) and not end[: closing[0].start()].strip()
        self.end_id = self._ids(closing[0].group())[0] if self.end_is_known else tokenizer.eos_token_id
        self._plain = self._plain_tokenizer()

    def _render(self) -> dict[str, Any]:
        if not self.tokenizer.chat_template:
            return {"before": "", "after": "\n", "end": "", "trim": False}

        def render(content: str, answer: str | None = None) -> str:
            turns = [{"role": "user", "content": content}]
            turns += [{"role": "assistant", "content": answer}] if answer else []
            return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer is None,
                                                      enable_thinking=False, strftime_now=_TEMPLATE_DATE.strftime)
        try:
            plain, spaced = render(_SENTINEL), render(f" {_SENTINEL} ")
            answered = render(_SENTINEL, _SENTINEL)
        except Exception as error:  # a template raises whatever its author chose to raise
            raise InputError(f"{self.tokenizer.name_or_path}: chat template: {short(error, 200)}") from None
        if plain.count(_SENTINEL) != 1:
            raise InputError(f"{self.tokenizer.name_or_path}: chat template: shows the message {plain.count(_SENTINEL)} times, not once")
        before, after = plain.split(_SENTINEL)
        for probe in (_PROBE, f"\n {_PROBE}", f"{_PROBE} \n", f"<b> & '{_PROBE}'"):
            if render(probe) != before + (probe.strip() if plain == spaced else probe) + after:
                raise InputError(f"{self.tokenizer.name_or_path}: chat template: changes the message, so text cannot be told from template")
        end = answered.rsplit(_SENTINEL, 1)[1] if answered.count(_SENTINEL) == 2 else ""
        common = common_length(plain, answered)
        if answered.count(_SENTINEL) == 2 and common == len(plain) and (gap := answered[common:].split(_SENTINEL)[0]).strip():
            raise InputError(f"{self.tokenizer.name_or_path}: chat template: ends a prompt without {short(repr(gap))}, which it puts "
                             "before an answer (add_generation_prompt does nothing in it): labels would be read at the wrong place")
        if plain[common:].strip():
            log.warning("%s: the chat template ends a prompt with %r, which it does not put before a given answer; labels are read "
                        "behind it", self.tokenizer.name_or_path, short(plain[common:]))
        return {"before": before, "after": after, "end": end, "trim": plain == spaced}

    def _plain_tokenizer(self) -> Any:
        """The tokenizer without control tokens, in the variant that encodes a harmless message as the tokenizer does."""
        spec = json.loads(self.tokenizer.backend_tokenizer.to_str())
        spec["added_tokens"] = [t for t in spec["added_tokens"] if not _is_control(t["content"], t["special"])]
        spec["post_processor"] = spec["truncation"] = spec["padding"] = None
        whole = self._ids(self.frame["before"] + _PROBE + self.frame["after"])
        whole = self._head_ids + whole if not self.tokenizer.chat_template else whole
        text = json.dumps(spec)
        for variant in (text, text.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')):
            self._plain = _tokenizer_of(variant)
            if self(_PROBE) == whole:
                return self._plain
        raise InputError(f"{self.tokenizer.name_or_path}: tokenizer: a message cannot be encoded as text only")

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def __call__(self, message: str, answer: str = "") -> list[int]:
        """Token ids of the rendered prompt, with `answer` written where the judge's answer begins."""
        if not answer:
            return self.many([message])[0]
        written = self._text(message) + (answer if not self._tail else "")
        return self._around(message, self._plain.encode(written, add_special_tokens=False).ids, answer)

    def many(self, messages: Sequence[str]) -> list[list[int]]:
        """Token ids of each rendered prompt; the tokenizer uses all cores (TOKENIZERS_PARALLELISM=false: one)."""
        memo = {} if self.memo is None else self.memo
        new = [message for message in dict.fromkeys(messages) if message not in memo]
        for start in range(0, len(new), 2048):
            chunk = new[start : start + 2048]
            try:
                found = self._plain.encode_batch_fast([self._text(message) for message in chunk], add_special_tokens=False)
            except (TypeError, UnicodeEncodeError):
                wrong = next((message for message in chunk if not is_text(message)), chunk[0])
                raise InputError(f"prompt '{short(wrong)!r}' is not text that can be encoded") from None
            memo |= {message: self._around(message, encoding.ids) for message, encoding in zip(chunk, found, strict=True)}
        return [list(memo[message]) for message in messages]

    def render(self, message: str) -> str:
        """The prompt as text. Only token ids tell its control tokens from those that people wrote."""
        return self.frame["before"] + self._trimmed(message) + self.frame["after"]

    def _trimmed(self, message: str) -> str:
        return message.strip() if self.frame["trim"] else message

    def _text(self, message: str) -> str:
        return self._lead + self._trimmed(message) + self._trail

    def _around(self, message: str, ids: list[int], answer: str = "") -> list[int]:
        if not self.control_ids.isdisjoint(ids):
            raise InputError(f"prompt '{short(message)}': would be encoded with a control token of the tokenizer")
        return self._head_ids + ids + (self._ids(self._tail + answer) if self._tail and answer else self._tail_ids)


@dataclasses.dataclass(frozen=True)
class LabelTokens:
    """How the labels are read off the model. `sequences` holds (label index, token ids) for every spelling.

    whole = False: every label has its own first token(s); one token a sequence, scored at the answer position.
    whole = True: some labels begin alike; whole spellings are scored, each closed by the end-of-turn token.
    """

    labels: list[str]
    sequences: list[tuple[int, tuple[int, ...]]]
    whole: bool

    @property
    def owner(self) -> list[int]:
        return [label for label, _ in self.sequences]

    @property
    def token_ids(self) -> list[int]:
        """Every token that is read, once, in ascending order."""
        return sorted({token for _, ids in self.sequences for token in ids})

    @property
    def branches(self) -> list[tuple[int, ...]]:
        """What must stand behind a prompt for its labels to be read: all but the last token of each spelling, sorted."""
        return sorted({ids[:-1] for _, ids in self.sequences})

    def describe(self, tokenizer: Any) -> str:
        lines = ["labels are read " + ("as whole words, closed by the end of the turn (some begin with the same token)"
                                       if self.whole else "by the first token of the answer")]
        for i, label in enumerate(self.labels):
            piece = lambda t: repr(tokenizer.decode([t]) or tokenizer.convert_ids_to_tokens(t))  # noqa: E731 - "▁" alone decodes to nothing
            shown = [" ".join(map(piece, ids)) for owner, ids in self.sequences if owner == i]
            lines.append(f"  {label}: {' or '.join(shown)}")
        return "\n".join(lines)


def label_tokens(tokenizer: Any, labels: Sequence[str], spellings: dict[str, Sequence[str]] | None = None,
                 encoder: PromptEncoder | None = None) -> LabelTokens:
    """Finds the tokens with which each label begins in context, right after the rendered prompt.

    spellings: {label: [text, ...]}, by default the label itself; the probabilities of a label's spellings add up.
    Raises InputError if two labels have the same spelling, a spelling is empty or for an unknown label, merges with the
    prompt's end, or if whole labels are needed and the tokenizer has no end-of-turn token.
    """
    encoder = encoder or PromptEncoder(tokenizer)
    labels, spellings = [str(label) for label in labels], dict(spellings or {})
    if set(spellings) - set(labels):
        raise InputError(f"spellings: unknown label {listed(sorted(set(spellings) - set(labels)))}; the labels are {listed(labels)}")
    if len(set(labels)) != len(labels) or len(labels) < 2:
        raise InputError(f"labels: two different labels or more are needed, not {listed(labels)}")
    prompt = encoder("Is this so?")
    found: list[tuple[int, tuple[int, ...]]] = []
    for i, label in enumerate(labels):
        for text in spellings.get(label, [label]) or [""]:
            if not is_text(text):
                raise InputError(f"spellings: label {short(repr(label))}: {short(repr(text))} is not text that can be encoded")
            ids = encoder("Is this so?", text)
            if not text or ids[: len(prompt)] != prompt or len(ids) == len(prompt):
                raise InputError(f"spellings: label '{label}': '{text}' " + ("merges with the end of the prompt" if text else "is empty"))
            if not encoder.control_ids.isdisjoint(ids[len(prompt):]):
                raise InputError(f"spellings: label '{label}': '{text}' is a control token of the tokenizer")
            found.append((i, tuple(ids[len(prompt):])))
    firsts = dict.fromkeys((i, ids[:1]) for i, ids in found)  # two spellings that begin alike are read once
    if len({ids for _, ids in firsts}) == len(firsts):
        return LabelTokens(labels, list(firsts), whole=False)
    if encoder.end_id is None:
        raise InputError("labels: some begin with the same token, so whole labels must be read, but the tokenizer has no "
                         "end-of-turn or end-of-sequence token to close them")
    if not encoder.end_is_known:
        log.warning("%s: the chat template does not show how a turn ends; whole labels are closed by %r", tokenizer.name_or_path,
                    tokenizer.decode([encoder.end_id]))
    closed = list(dict.fromkeys((i, (*ids, encoder.end_id)) for i, ids in found))
    if len({ids for _, ids in closed}) != len(closed):
        raise InputError(f"spellings: two labels have the same tokens: {listed(labels)}")
    return LabelTokens(labels, closed, whole=True)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Packs: every shared token is computed once
# ---------------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Pack:
    """Prompts in one row of tokens, laid out as a tree in depth-first order: a beginning that several share stands once.

    ids (L,), positions (L,): tokens and their positions in their own prompt. ends (L,): token j is seen by the tokens from j to
    ends[j] - 1, those of the prompts that go through it, and by no others. So token i sees j if j <= i < ends[j], which
    is a causal mask within each prompt, whatever the nesting. members: indices of the prompts. paths: where the tokens of each
    prompt stand, one after another, a list for every prompt and branch (the inner tokens of whole labels, sorted).
    """

    ids: list[int]
    positions: list[int]
    ends: list[int]
    members: list[int]
    paths: list[list[int]]

    def answers(self, token_lists: Sequence[Sequence[int]]) -> list[int]:
        """Where the answers of the members are read: at the last token of each prompt."""
        each = len(self.paths) // len(self.members)
        return [self.paths[k * each][len(token_lists[member]) - 1] for k, member in enumerate(self.members)]

    @property
    def segments(self) -> list[tuple[int, int, int]]:
        """The same tree as a table of runs of tokens: (parent segment or -1, first token, one past the last)."""
        return segment_table(self.ends, self.positions)


def segment_table(ends: Sequence[int], positions: Sequence[int]) -> list[tuple[int, int, int]]:
    """See Pack.segments."""
    starts = [i for i in range(len(ends)) if i == 0 or ends[i] != ends[i - 1] or positions[i] != positions[i - 1] + 1]
    table: list[tuple[int, int, int]] = []
    for start, stop in itertools.pairwise([*starts, len(ends)]):
        parent = len(table) - 1
        while parent >= 0 and ends[table[parent][1]] <= start:
            parent = table[parent][0]
        table.append((parent, start, stop))
    return table


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the beginning that two token lists share."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # bisection on slices: comparing them runs in C
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def build_pack(token_lists: Sequence[Sequence[int]], members: Sequence[int], branches: Sequence[Sequence[int]] = ((),),
               two_levels: bool = False) -> Pack:
    """Lays out the prompts in the order of `members`, each with its branches; each path shares what it can with the one before.

    two_levels: only groups of one common beginning and what follows it, as Unsloth's kernel knows them, not trees of any depth.
    """
    lists = [[*token_lists[member], *branch] for member in members for branch in sorted(map(list, branches))]
    shared = [0] + [common_length(a, b) for a, b in itertools.pairwise(lists)]
    shared = _in_two_levels(lists, shared) if two_levels else shared
    ids: list[int] = []
    positions: list[int] = []
    ends: list[int] = []
    paths: list[list[int]] = []
    path: list[int] = []
    for tokens, kept in zip(lists, shared, strict=True):
        for closed in path[kept:]:
            ends[closed] = len(ids)
        path = [*path[:kept], *range(len(ids), len(ids) + len(tokens) - kept)]
        ids += tokens[kept:]
        positions += range(kept, len(tokens))
        ends += [-1] * (len(tokens) - kept)
        paths.append(path)
    for closed in path:
        ends[closed] = len(ids)
    return Pack(ids, positions, ends, list(members), paths)


def _in_two_levels(lists: Sequence[Sequence[int]], shared: Sequence[int]) -> list[int]:
    """What each list may share with the one before it if lists fall into groups of one common beginning: the cheapest division."""
    best: list[tuple[int, int, int]] = [(0, 0, 0)]  # for the first n lists: tokens, where the last group starts, its common beginning
    for stop in range(1, len(lists) + 1):
        found, common, rest = None, len(lists[stop - 1]), 0
        for start in range(stop - 1, -1, -1):
            rest += len(lists[start])
            common = min(common, len(lists[start]))
            candidate = (best[start][0] + rest - (stop - start - 1) * common, start, common)
            found = min(found, candidate) if found else candidate
            common = min(common, shared[start])
        best.append(found)  # type: ignore[arg-type]
    kept, stop = [0] * len(lists), len(lists)
    while stop:
        _, start, common = best[stop]
        kept[start + 1 : stop] = [common] * (stop - start - 1)
        stop = start
    return kept


def pack_prompts(token_lists: Sequence[Sequence[int]], max_tokens: int, branches: Sequence[Sequence[int]] = ((),),
                 two_levels: bool = False) -> list[Pack]:
    """Divides prompts into packs of at most max_tokens tokens, with as few tokens altogether as can be, then as few packs.

    Prompts are sorted, so that those that share a beginning stand together; what a pack saves is then the sum of the
    beginnings that neighbours share, and a cut between two neighbours loses theirs. Dynamic programming over the cuts finds
    the cheapest division. Deterministic; a prompt is never split, and one of more than max_tokens gets a pack of its own.
    branches: continuations (of whole labels) that every prompt carries with it, see LabelTokens.branches.
    two_levels: see build_pack(); packs that then are too large are halved, so that the division is not always the cheapest.
    """
    order = sorted(range(len(token_lists)), key=token_lists.__getitem__)
    extra = len({tuple(branch[:k]) for branch in branches for k in range(1, len(branch) + 1)})
    new = [len(token_lists[i]) + extra - (common_length(token_lists[order[k - 1]], token_lists[i]) if k else 0) for k, i in enumerate(order)]
    best: list[tuple[int, int, int]] = [(0, 0, 0)]  # for the first n prompts: tokens, packs, where the last pack starts
    for stop in range(1, len(order) + 1):
        start, rest, found = stop - 1, 0, None
        while start >= 0:
            size = len(token_lists[order[start]]) + extra + rest
            if size > max_tokens and found:
                break
            candidate = (best[start][0] + size, best[start][1] + 1, start)
            found = min(found, candidate) if found else candidate
            rest += new[start]
            start -= 1
        best.append(found)  # type: ignore[arg-type]
    cuts = [len(order)]
    while cuts[-1] > 0:
        cuts.append(best[cuts[-1]][2])
    todo, packs = list(itertools.pairwise(reversed(cuts)))[::-1], []
    while todo:
        start, stop = todo.pop()
        pack = build_pack(token_lists, order[start:stop], branches, two_levels)
        if len(pack.ids) > max_tokens and stop - start > 1:
            middle = (start + stop) // 2
            todo += [(middle, stop), (start, middle)]
        else:
            packs.append(pack)
    return packs


def shuffled(token_lists: Sequence[Sequence[int]], seed: int, keep_together: int = 0, chunk: int = 8) -> list[int]:
    """A random order of the prompts; with keep_together > 0, one in which prompts that share a beginning come in chunks.

    Prompts are divided by their beginnings, as a tree: those that share keep_together tokens more than all of their group do
    form a group within it. A group of at most `chunk` prompts stays whole; what a larger one holds beside its own groups is
    dealt at random into chunks of `chunk`. All chunks, and the prompts that are in no group, then stand in uniformly random
    order, so that a large group (a rubric, say) is spread over the whole epoch. With keep_together = 0 the order is uniform.
    """
    draw = random.Random(seed)
    order = list(range(len(token_lists)))
    if not keep_together:
        draw.shuffle(order)
        return order
    order.sort(key=token_lists.__getitem__)
    shared = [0] + [common_length(token_lists[a], token_lists[b]) for a, b in itertools.pairwise(order)]  # with the one before
    chunks, todo = [], [(0, len(order), 1)]
    while todo:
        start, stop, size = todo.pop()  # size: what prompts of this group that are in no group within it are dealt into
        least = min(shared[start + 1 : stop], default=0)
        cuts = [start, *(k for k in range(start + 1, stop) if shared[k] < least + keep_together), stop]
        groups = [(a, b) for a, b in itertools.pairwise(cuts) if b - a > 1]
        single = [order[a] for a, b in itertools.pairwise(cuts) if b - a == 1]
        draw.shuffle(single)
        chunks += [single[k : k + size] for k in range(0, len(single), size)]
        chunks += [order[a:b] for a, b in groups if b - a <= chunk]
        todo += [(a, b, chunk) for a, b in groups if b - a > chunk]
    draw.shuffle(chunks)
    return [i for some in chunks for i in some]


def unsloth_segments(ends: torch.Tensor, positions: torch.Tensor) -> Any:
    """The table of prefixes and suffixes that Unsloth's forward takes in the place of a mask; for packs of two levels."""
    from unsloth.utils.prefix_grouper_kernel import build_seg_info_multigroup

    groups: list[tuple[int, list[int]]] = []
    for parent, start, stop in segment_table(ends.tolist(), positions.tolist()):
        if parent < 0:
            groups.append((stop - start, []))
        else:
            groups[-1][1].append(stop - start)
    return build_seg_info_multigroup(groups, ends.device)[0]


def block_length(device: str | torch.device) -> int:
    """Queries that attention in blocks takes at a time, see block_attention()."""
    return 128 if torch.device(device).type == "cpu" else 512


def tree_mask(config: Any, dtype: torch.dtype, ends: torch.Tensor, positions: torch.Tensor) -> Any:
    """The attention mask of a pack in the form the model takes: ends and positions (L,), see Pack.

    For SDPA in blocks (see block_attention), boolean (1, 1, L, L) where a model would not take those, additive for eager
    attention, a BlockMask for flex_attention; for models that mix full and sliding attention a dict of the two by layer type.
    Raises NotImplementedError for other kinds of layers.
    """
    implementation, length, device = config._attn_implementation, len(ends), ends.device
    at = torch.arange(length, device=device)

    def mask(window: int | None) -> Any:
        def sees(batch: Any, head: Any, q: Any, kv: Any) -> Any:
            seen = (kv <= q) & (q < ends[kv])
            return seen if window is None else seen & (positions[q] - positions[kv] < window)

        if implementation == "flex_attention":
            from torch.nn.attention.flex_attention import create_block_mask

            return create_block_mask(sees, None, None, length, length, device=device)
        if implementation == BLOCKS:
            carrier = torch.empty(1, 1, 1, 1, dtype=torch.bool, device=device)  # what models hand through to their attention
            carrier.blocks = []
            for rows in at.split(block_length(device)):
                seen = sees(None, None, rows[:, None], at[None, : int(rows[-1]) + 1])
                columns = seen.any(0).nonzero()[:, 0]
                carrier.blocks.append((len(rows), columns, seen[:, columns][None, None]))
            return carrier
        seen = sees(None, None, at[:, None], at[None, :])[None, None]
        if implementation == "sdpa":
            return seen
        return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, torch.finfo(dtype).min)

    window, kinds = getattr(config, "sliding_window", None), set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention", "sliding_attention"}:
        raise NotImplementedError(f"layers of type {', '.join(sorted(kinds))}")
    return {kind: mask(window if kind == "sliding_attention" else None) for kind in kinds} if kinds else mask(window)


BLOCKS = "distjudge_blocks"


def block_attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
                    **kwargs: Any) -> tuple[torch.Tensor, None]:
    """transformers' SDPA; for a pack, one block of queries at a time against the keys that any of them sees.

    query, key, value (1, heads, L, D); returns (1, L, heads, D). In one call, SDPA would compute all L x L pairs and throw most
    away: half the time of a step at L = 1,000.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    blocks = getattr(attention_mask, "blocks", None)
    if blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    out = []
    for rows, (_, columns, seen) in zip(query.split([rows for rows, _, _ in blocks], dim=2), blocks, strict=True):
        out.append(sdpa_attention_forward(module, rows, key.index_select(2, columns), value.index_select(2, columns), seen, **kwargs)[0])
    return torch.cat(out, dim=1), None


def use_block_attention(model: Any) -> None:
    """Switches a model that runs SDPA to block_attention, where its architecture lets the attention function be chosen."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(BLOCKS, block_attention)
    AttentionMaskInterface.register(BLOCKS, sdpa_mask)
    if model.config.get_text_config()._attn_implementation == "sdpa":
        with contextlib.suppress(ValueError, AttributeError):  # some older architectures choose by name, and keep SDPA's dense mask
            model.set_attn_implementation(BLOCKS)


# ---------------------------------------------------------------------------------------------------------------------
# 4. The judge: a causal LM that is read at the label tokens only
# ---------------------------------------------------------------------------------------------------------------------
SLICE, SLICE_LOGITS = 16_384, 2**24  # tokens of the vocabulary and logits that are computed at a time, at most


def add_label_readout(model: Any) -> None:
    """Teaches a causal LM's forward more arguments: `answer_at`, `token_ids`, `vocabulary`, `top_k` and `ends`.

    `ends` (1, L) says that the row is a pack (see Pack) and makes its attention mask. With `answer_at`, (M, 2) rows and columns,
    and `token_ids`, (T,), it returns the float32 logits (M, T) of those positions and tokens; with `vocabulary` a tuple of
    them, the logsumexp over the whole vocabulary, (M,), and the top_k-th largest logit, (M,), or None; with no token_ids at all
    the hidden states, (M, H). It never makes a (positions, vocabulary) tensor, forward or backward. The patch sits in the
    model's own forward, so that PEFT, autocast and DistributedDataParallel wrap it like any other. The architecture's logit
    scale and soft cap apply.
    """
    plain_forward, decoder, head = model.forward, model.get_decoder(), model.get_output_embeddings()
    if not head.weight.is_floating_point():
        raise InputError(f"{type(model).__name__}: its output layer is quantized; label rows cannot be read from it")
    config, model.two_levels = model.config.get_text_config(), type(decoder).forward.__module__.startswith("unsloth.")
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    if not model.two_levels:
        use_block_attention(model)

    def logits_of(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        logits = F.linear(hidden, weight.float(), None if bias is None else bias.float()) * scale
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def over_vocabulary(hidden: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """In slices that are computed again in the backward pass; a float32 copy of the whole layer would be 2 GB at 7B."""
        from torch.utils.checkpoint import checkpoint

        width = min(SLICE, max(256, SLICE_LOGITS // max(1, len(hidden))))
        biases = itertools.repeat(None) if head.bias is None else head.bias.split(width)
        norms, top = [], None
        for weight, bias in zip(head.weight.split(width), biases, strict=False):
            if top_k:
                logits = logits_of(hidden, weight, bias)
                norms.append(logits.logsumexp(1))
                best = logits.topk(min(top_k, len(weight)), dim=1).values
                top = best if top is None else torch.cat([top, best], 1).topk(min(top_k, top.shape[1] + best.shape[1]), dim=1).values
            elif torch.is_grad_enabled():
                norms.append(checkpoint(lambda *x: logits_of(*x).logsumexp(1), hidden, weight, bias, use_reentrant=False))
            else:
                norms.append(logits_of(hidden, weight, bias).logsumexp(1))
        return torch.stack(norms, dim=1).logsumexp(1), None if top is None else top[:, -1]

    def forward(self: Any, *args: Any, answer_at: torch.Tensor | None = None, token_ids: torch.Tensor | None = None,
                vocabulary: bool = False, top_k: int = 0, ends: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if ends is not None:
            positions = kwargs["position_ids"][0]
            if self.two_levels:  # Unsloth drops masks in training, but takes this
                kwargs["prefix_seg_info"] = unsloth_segments(ends[0], positions)
            else:
                kwargs["attention_mask"] = tree_mask(config, self.dtype, ends[0], positions)
        if answer_at is None:
            return plain_forward(*args, **kwargs)
        for unused in ("logits_to_keep", "num_logits_to_keep"):  # what Unsloth's PeftModel adds; none are made here
            kwargs.pop(unused, None)
        kwargs = {k: v for k, v in kwargs.items() if v is not None} | {"use_cache": False, "return_dict": True}
        hidden = decoder(*args, **kwargs).last_hidden_state[answer_at[:, 0], answer_at[:, 1]]
        with torch.autocast(hidden.device.type, enabled=False):  # bf16 logits near 20 would be off by 4e-4 nats
            hidden = hidden.float()
            if token_ids is None:
                return hidden
            logits = logits_of(hidden, head.weight[token_ids], None if head.bias is None else head.bias[token_ids])
            return (logits, *over_vocabulary(hidden, top_k)) if vocabulary else logits

    model.forward = types.MethodType(forward, model)  # bound, as those who wrap it and unwrap it expect


def collate(prompts: Sequence[list[int]], tokens: LabelTokens, pad_id: int) -> dict[str, torch.Tensor]:
    """Right-padded rows and the positions to read: one row a prompt, or, for whole labels, a row a prompt and spelling.

    Returns input_ids and attention_mask (R, L); answer_at (M, 2), the positions to read; token_ids (T,), the tokens to read there;
    and reads (B * S, 2): for every prompt the rows of answer_at and the columns of token_ids whose log-probabilities make
    up its labels', in the order of `tokens.sequences`.
    """
    rows, at, reads, column = [], [], [], {token: k for k, token in enumerate(tokens.token_ids)}
    for ids in prompts:
        for n, (_, sequence) in enumerate(tokens.sequences):
            if n == 0 or tokens.whole:
                first = len(at)
                at += [(len(rows), len(ids) - 1 + k) for k in range(len(sequence))]
                rows.append([*ids, *sequence[:-1]])
            reads += [(first + k, column[token]) for k, token in enumerate(sequence)]
    length = max(map(len, rows))
    return {"input_ids": torch.tensor([r + [pad_id] * (length - len(r)) for r in rows]),
            "attention_mask": torch.tensor([[1] * len(r) + [0] * (length - len(r)) for r in rows]),
            "answer_at": torch.tensor(at), "token_ids": torch.tensor(tokens.token_ids), "reads": torch.tensor(reads)}


def collate_pack(prompts: Sequence[list[int]], tokens: LabelTokens, two_levels: bool = False) -> dict[str, torch.Tensor]:
    """The same for prompts laid out as one pack, in the order given: input_ids, position_ids, ends (1, L), and what to read."""
    pack = build_pack(prompts, range(len(prompts)), tokens.branches, two_levels)
    each, branch_of = len(tokens.branches), {branch: k for k, branch in enumerate(tokens.branches)}
    at: dict[int, int] = {}  # place in the pack -> row of answer_at
    reads, column = [], {token: k for k, token in enumerate(tokens.token_ids)}
    for i, ids in enumerate(prompts):
        for _, sequence in tokens.sequences:
            path = pack.paths[i * each + branch_of[sequence[:-1]]]
            reads += [(at.setdefault(path[len(ids) - 1 + k], len(at)), column[token]) for k, token in enumerate(sequence)]
    return {"input_ids": torch.tensor([pack.ids]), "position_ids": torch.tensor([pack.positions]), "ends": torch.tensor([pack.ends]),
            "answer_at": torch.tensor([(0, place) for place in at]), "token_ids": torch.tensor(tokens.token_ids),
            "reads": torch.tensor(reads)}


def label_logprobs(model: Any, batch: dict[str, torch.Tensor], tokens: LabelTokens, with_mass: bool = False,
                   top_k: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities of the labels, (B, C) float32, and with `with_mass` the log of their full-vocabulary sum, (B,).

    First-token reading: softmax over the labels' tokens, a label's spellings added up. Whole labels: each spelling's
    log-probability summed over its tokens and the end of the turn, normalised over the labels.
    top_k > 0 (the paper reads closed models so): tokens outside the k most probable count as probability 0; an item
    without any label among them gets a uniform distribution and a log mass of -inf.
    """
    wanted = ("input_ids", "attention_mask", "position_ids", "ends", "answer_at", "token_ids")
    inputs = {name: batch[name] for name in wanted if name in batch}
    place, column = batch["reads"].T
    if tokens.whole or with_mass or top_k:
        logits, log_norm, least = model(**inputs, vocabulary=True, top_k=top_k)
        if top_k:
            logits = logits.masked_fill(logits < least[:, None], -math.inf)
        scores = (logits - log_norm[:, None])[place, column]
    else:
        scores = model(**inputs)[place, column]
    lengths = [len(ids) for _, ids in tokens.sequences]
    scores = torch.stack([part.sum(1) for part in scores.view(-1, sum(lengths)).split(lengths, dim=1)], dim=1)
    owner = torch.tensor(tokens.owner, device=scores.device)
    label_scores = torch.stack([scores[:, owner == c].logsumexp(1) for c in range(len(tokens.labels))], dim=1)
    total = label_scores.logsumexp(1)
    logq = label_scores.log_softmax(1).masked_fill(total.isneginf()[:, None], -math.log(len(tokens.labels)))
    return logq, total if with_mass else None


class Judge:
    """A model, its tokenizer and its labels. Made by load_judge(); `predict` is the judge at work."""

    packs: bool = True
    """Whether prompts that share a beginning are computed together. Set by check_packs() at load; may be switched off."""
    pack_tokens: int
    """Tokens a forward pass, at most; halved when CUDA runs out of memory."""

    def __init__(self, model: Any, encoder: PromptEncoder, tokens: LabelTokens, base: str, max_length: int = 2048,
                 top_k: int = 0, spellings: dict[str, Sequence[str]] | None = None):
        if top_k and tokens.whole:
            raise InputError("top_k: reading the top k tokens needs labels that differ in their first token")
        self.model, self.encoder, self.tokens, self.base = model, encoder, tokens, base
        config = model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None) or max_length
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") in ("dynamic", "longrope"):
            positions = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", positions)
            if positions < max_length:
                log.warning("%s: prompts may have about %d tokens, not %d: its position codes change for everything in a pass with a "
                            "longer one", base or type(model).__name__, positions, max_length)
        room = positions - max(len(ids) for _, ids in tokens.sequences) + 1
        self.max_length, self.top_k, self.spellings = min(max_length, room), top_k, dict(spellings or {})
        self.pack_tokens = 1024 if self.device.type == "cpu" else 8192
        self.packs = check_packs(self)

    @property
    def labels(self) -> list[str]:
        return self.tokens.labels

    @property
    def tokenizer(self) -> Any:
        return self.encoder.tokenizer

    @property
    def device(self) -> torch.device:
        """Where the weights are; of an outline (see load_judge), where they would be."""
        return getattr(self.model, "meant_for", None) or next(self.model.parameters()).device

    @property
    def backend(self) -> str:
        return getattr(self.model, "backend", "transformers")

    @property
    def pad_id(self) -> int:
        return next(i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0) if i is not None)

    def encode(self, prompts: Sequence[str], start: int = 0) -> list[list[int]]:
        """Token ids of each rendered prompt. Raises InputError, never cuts, if one is longer than max_length.

        start: the number of the first prompt, for messages.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        _check_prompts(prompts, start)
        encoded = self.encoder.many(prompts)
        longest = max(map(len, encoded), default=0)
        if longest > self.max_length:
            over = [i for i, ids in enumerate(encoded) if len(ids) > self.max_length]
            raise InputError(f"prompts: {len(over)} of {len(prompts)} are longer than max_length {self.max_length} tokens (the "
                             f"longest has {longest}; the first is number {start + over[0] + 1}, '{short(prompts[over[0]], 40)!r}')")
        return encoded

    def plan(self, encoded: Sequence[list[int]]) -> list[list[int]]:
        """Divides prompts into forward passes of at most pack_tokens tokens, as packs or, without them, as padded rows."""
        if self.packs:
            two_levels = getattr(self.model, "two_levels", False)
            return [pack.members for pack in pack_prompts(encoded, self.pack_tokens, self.tokens.branches, two_levels)]
        groups: list[list[int]] = []
        rows = len(self.tokens.sequences) if self.tokens.whole else 1
        for i in sorted(range(len(encoded)), key=lambda i: -len(encoded[i])):
            if groups and (len(groups[-1]) + 1) * rows * len(encoded[groups[-1][0]]) <= self.pack_tokens:
                groups[-1].append(i)
            else:
                groups.append([i])
        return groups

    def batch(self, encoded: Sequence[list[int]], device: str | torch.device | None = None) -> dict[str, torch.Tensor]:
        """The tensors of one forward pass over the prompts, for label_logprobs(); on the judge's device or another."""
        if self.packs:
            batch = collate_pack(encoded, self.tokens, getattr(self.model, "two_levels", False))
        else:
            batch = collate(encoded, self.tokens, self.pad_id)
        return {name: tensor.to(device or self.device) for name, tensor in batch.items()}

    def shrink(self, members: Sequence[int], tokens: int) -> None:
        """After a pass over the members, of so many tokens, ran out of memory: from here on half as many a pass, at most.

        Raises torch.OutOfMemoryError if it was one prompt alone. To be called outside the `except` block, for while an error is
        handled the pass that failed is still in memory.
        """
        if len(members) < 2:
            raise torch.OutOfMemoryError(f"one prompt alone, of {tokens} tokens, does not fit into memory")
        self.pack_tokens = max(1, min(self.pack_tokens, tokens) // 2)
        log.warning("out of memory with %d prompts in a pass: from here on at most %d tokens; no item is lost",
                    len(members), self.pack_tokens)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @torch.no_grad()
    def _score(self, encoded: list[list[int]], tick: Callable[[int], Any] = lambda _: None, plain: bool = False,
               ) -> tuple[torch.Tensor, torch.Tensor]:
        """See score(). plain: as in training, without top_k and label mass (it is 1 for all)."""
        logq, mass = torch.empty(len(encoded), len(self.labels)), torch.ones(len(encoded))
        todo = self.plan(encoded)[::-1]
        while todo:
            members = todo.pop()
            batch, fits = self.batch([encoded[i] for i in members]), True
            try:
                q, m = label_logprobs(self.model, batch, self.tokens, with_mass=not plain, top_k=0 if plain else self.top_k)
                logq[members] = q.float().cpu()
                if m is not None:
                    mass[members] = m.exp().float().cpu()
            except torch.OutOfMemoryError:
                fits = False
            if not fits:
                self.shrink(members, batch["input_ids"].numel())
                left = [i for group in (*todo, members) for i in group]  # those still waiting are too large as well
                todo = [[left[i] for i in group] for group in self.plan([encoded[i] for i in left])][::-1]
                continue
            tick(len(members))
        if not torch.isfinite(mass).all() or torch.isnan(logq).any():
            raise FloatingPointError(f"the model gives NaN for {int(logq.isnan().any(1).sum())} of {len(encoded)} prompts")
        if self.top_k and (mass == 0).any():
            log.warning("top_k=%d: %d of %d prompts have no label among the top tokens; they get a uniform distribution",
                        self.top_k, int((mass == 0).sum()), len(encoded))
        return logq, mass

    def stream(self, prompts: Iterable[str], progress: bool = False, window: int = 2048) -> Iterator[tuple[torch.Tensor, float]]:
        """Judges any number of prompts in constant memory: yields (log-probabilities (C,), label mass) in their order.

        Prompts are read `window` at a time; those of one window share what they have in common.
        """
        from tqdm.auto import tqdm

        prompts = iter([prompts] if isinstance(prompts, str) else prompts)
        with tqdm(desc="judging", unit="item", disable=not progress) as bar:
            for start in itertools.count(0, window):
                chunk = list(itertools.islice(prompts, window))
                if not chunk:
                    return
                was_training = self.model.training
                self.model.eval()
                try:
                    logq, mass = self._score(self.encode(chunk, start), bar.update)
                finally:
                    self.model.train(was_training)
                yield from zip(logq, mass.tolist(), strict=True)

    def score(self, prompts: Sequence[str], progress: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Label log-probabilities (N, C) and label mass (N,), float32 on the CPU, in the order of the prompts.

        Label mass is the probability that the model, free to say anything, begins with (or is) one of the labels. All prompts are
        checked before the first is judged.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        _check_prompts(prompts)
        if len(prompts) > 2048:  # what stream() would find out only when it gets there; a token is hardly less than a byte
            for k, text in enumerate(prompts):
                if len(text.encode("utf-8", "replace")) > self.max_length // 2:
                    self.encode([text], k)
        rows = list(self.stream(prompts, progress))
        if not rows:
            return torch.empty(0, len(self.labels)), torch.empty(0)
        return torch.stack([logq for logq, _ in rows]), torch.tensor([mass for _, mass in rows])

    def predict(self, prompts: Sequence[str], progress: bool = False) -> Any:
        """Probabilities of the labels, a float32 numpy array (N, C), columns in the order of `labels`.

        prompts: user messages, as text. Raises InputError for an empty prompt or one longer than max_length tokens.
        """
        return self.score(prompts, progress)[0].exp().numpy()


def _check_prompts(prompts: Sequence[Any], start: int = 0) -> None:
    for i, prompt in enumerate(prompts, start):
        if not isinstance(prompt, str) or not prompt.strip():
            wrong = "empty" if isinstance(prompt, str) else f"not text but {type(prompt).__name__}"
            raise InputError(f"prompts[{i}]: prompt: {wrong}")


@torch.no_grad()
def check_packs(judge: Judge) -> bool:
    """Whether the model's last hidden states from a pack are those of one prompt at a time; says so where they are not.

    Packs rest on a causal mask and position ids that the model honours; where an architecture has other ideas (recurrent
    layers, masks of its own), prompts are run as padded rows instead. The probes are longer than a sliding window of up to 1,024
    tokens (on CUDA of any length). An architecture with another kind of window is not packed at all. Unsloth, which treats
    masks otherwise in training, is checked in both modes.
    """
    if hasattr(judge.model, "meant_for"):  # an outline has no weights to check with
        return True
    config = judge.model.config.get_text_config()
    windows = {name: value for name, value in config.to_dict().items() if "window" in name and isinstance(value, int) and value > 1}
    longest = max([0, *(w for w in windows.values() if w <= 1024 or judge.device.type == "cuda")])
    probes = ["Is this so?", "Is this so? Yes.", "Is this it, then?", "Other words altogether, and a few more of them."]
    if longest:
        probes += ["word " * min(longest + 8, max(1, judge.max_length - 64)) + ending for ending in ("one", "two")]
    encoded = sorted(judge.encoder(probe)[: judge.max_length] for probe in probes)

    def states(prompts: Sequence[list[int]]) -> torch.Tensor:
        batch = judge.batch(prompts)
        rows = batch.pop("reads")[:, 0]
        return judge.model(**{name: tensor for name, tensor in batch.items() if name != "token_ids"})[rows]

    off, why = 0.0, ""
    if unknown := [name for name in sorted(windows) if name not in ("sliding_window", "max_window_layers", "_sliding_window_pattern")]:
        off, why = math.inf, f"its {unknown[0]} is unknown to us"
    else:
        try:
            for training in (False, True) if judge.backend == "unsloth" else (False,):
                judge.model.train(training)
                judge.packs = True
                packed = states(encoded)
                judge.packs = False
                single = torch.cat([states([ids]) for ids in encoded])
                off = max(off, ((packed - single).norm(dim=1) / single.norm(dim=1)).max().item())
            why = f"hidden states are off by {off:.1%}"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # an architecture can refuse the mask in ways of its own
            off, why = math.inf, first_line(error)
    judge.model.eval()
    if off <= (1e-4 if next(judge.model.parameters()).dtype == torch.float32 else 0.05):
        return True
    log.warning("%s cannot be run on packed prompts (%s): they are run as padded rows", type(judge.model).__name__, why)
    return False


def load_judge(path: str | os.PathLike, labels: Sequence[str] | None = None, *, spellings: dict[str, Sequence[str]] | None = None,
               lora_rank: int = 16, lora_alpha: int = 32, four_bit: bool = False, max_length: int | None = None, top_k: int = 0,
               device: str | None = None, seed: int = 0, backend: str = "auto", gradient_checkpointing: bool = False,
               weights: bool = True) -> Judge:
    """Loads a judge: from a run folder made by save_judge() or run(), or a model (a folder, a hub id) given its labels.

    A model is loaded with Unsloth or transformers (see choose_backend), in float32 on a CPU and bfloat16 on CUDA (float16 on cards
    without it), 4-bit (NF4) on request, and it gets fresh LoRA adapters on all its linear layers (which change nothing until
    trained), or none with lora_rank = 0, when all weights, then in float32, are trained. Prompts may have max_length tokens
    (2048), or what a saved judge was trained with. Only safetensors are read, and no code from the model's repository is run.
    gradient_checkpointing: Unsloth's own, which must be known here; transformers' is a matter of train().
    weights=False: an outline for dry runs, the real architecture on PyTorch's meta device, which can be counted but cannot judge.
    Raises InputError for a path that holds no model, labels that contradict the run folder's, or a model whose label
    scores differ from those of its own forward.
    """
    path = str(path)
    if (Path(path) / "judge.json").is_file():
        if not weights:
            raise InputError(f"{path}: model: an outline is made of a model, not of a trained judge")
        return _load_saved(Path(path), labels, max_length, top_k, device, backend, gradient_checkpointing)
    _check_folder(path)
    if not labels:
        raise InputError(f"{path}: labels: a model that is not a saved judge needs labels=[...]")
    if four_bit and not lora_rank:
        raise InputError("four_bit: 4-bit weights cannot be trained themselves; set lora_rank to 1 or more")
    length = 2048 if max_length is None else max_length
    use, why = choose_backend(backend, device, trained=not lora_rank)  # before transformers is imported
    tokenizer = load_tokenizer(path)
    encoder = PromptEncoder(tokenizer)
    label_tokens(tokenizer, labels, spellings, encoder)  # what is wrong with them is said before the weights are loaded
    model = load_model(path, four_bit, device, len(tokenizer), not lora_rank, use, why, length, weights)
    base = str(Path(path).resolve()) if Path(path).is_dir() else path
    return make_judge(model, tokenizer, labels, base=base, spellings=spellings, lora_rank=lora_rank, lora_alpha=lora_alpha,
                      max_length=length, top_k=top_k, seed=seed, gradient_checkpointing=gradient_checkpointing, encoder=encoder)


def _check_folder(path: str) -> None:
    """Raises InputError if a path names something else than a folder with a model; a hub id passes."""
    folder = Path(path)
    if not path.strip():
        raise InputError("model: name a folder or a hub id")
    if folder.is_file():
        raise InputError(f"{path}: model: is a file, not a folder")
    if (folder / "adapter_config.json").is_file():  # transformers would load another model beneath it, and pickled adapters too
        raise InputError(f"{path}: model: holds a PEFT adapter, not a model by itself; merge it into its base first")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(f"{path}: model: cannot be loaded: there is no config.json in it")


def choose_backend(wanted: str = "auto", device: str | None = None, trained: bool = False) -> tuple[str, str]:
    """Which library loads and runs the model, and why: ("unsloth" or "transformers", reason). Imports Unsloth to see if it works.

    "auto" is Unsloth on CUDA where it is installed, imports, and adapters are trained, not the weights (trained). Raises
    InputError where Unsloth is asked for and cannot be had. Unsloth patches what it imports, so it is imported here, before
    transformers; without its download statistics unless UNSLOTH_DISABLE_STATISTICS says otherwise.
    """
    import importlib.util

    why_not = ""
    if wanted == "transformers":
        return wanted, "asked for"
    if wanted not in ("auto", "unsloth"):
        raise InputError(f"backend: must be auto, unsloth or transformers, not {wanted}")
    if trained:
        why_not = "all weights are trained, not adapters"
    elif not torch.cuda.is_available() or not str(device or "cuda").startswith("cuda"):
        why_not = "no CUDA device" if not torch.cuda.is_available() else f"the model goes to {device}"
    elif importlib.util.find_spec("unsloth") is None:
        why_not = "Unsloth is not installed"
    else:
        os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
        try:
            import unsloth  # noqa: F401
        except Exception as error:  # it raises what its many dependencies raise
            why_not = f"Unsloth cannot be imported: {type(error).__name__}: {first_line(error)}"
    if not why_not:
        return "unsloth", "asked for" if wanted == "unsloth" else "CUDA, and Unsloth is installed"
    if wanted == "unsloth":
        raise InputError(f"backend: Unsloth cannot be used: {why_not}")
    return "transformers", why_not


def make_judge(model: Any, tokenizer: Any, labels: Sequence[str], *, base: str = "", spellings: dict[str, Sequence[str]] | None = None,
               lora_rank: int = 16, lora_alpha: int = 32, max_length: int = 2048, top_k: int = 0, seed: int = 0,
               gradient_checkpointing: bool = False, encoder: PromptEncoder | None = None) -> Judge:
    """A judge from a causal LM and a tokenizer that are loaded already, as load_judge() makes it. The model is changed in place."""
    add_label_readout(model)
    encoder = encoder or PromptEncoder(tokenizer)
    tokens = label_tokens(tokenizer, labels, spellings, encoder)
    check_readout(model, encoder, tokens)
    if lora_rank:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = add_adapters(model, lora_rank, lora_alpha, seed, gradient_checkpointing)
    return Judge(model, encoder, tokens, base, max_length, top_k, spellings)


def add_adapters(model: Any, rank: int, alpha: int, seed: int = 0, gradient_checkpointing: bool = False) -> Any:
    """Fresh LoRA adapters, in float32, on every linear layer of the decoder (not on a vision tower beside it). Returns the PEFT model."""
    decoder = model.get_decoder()
    inside = {id(module) for module in decoder.modules()}
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    settings: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "target_modules": sorted(
        {name.rsplit(".", 1)[-1] for name, module in linear.items() if id(module) in inside})}
    if getattr(model, "backend", "") == "unsloth" and not hasattr(model, "meant_for"):
        from unsloth import FastLanguageModel

        model = FastLanguageModel.get_peft_model(model, random_state=seed, **settings, use_gradient_checkpointing=_checkpointing(
            gradient_checkpointing))
    else:
        from peft import LoraConfig, get_peft_model

        outside = [re.escape(name) for name, module in linear.items() if id(module) not in inside]
        model = get_peft_model(model, LoraConfig(**settings, task_type="CAUSAL_LM", exclude_modules="|".join(outside) or None))
    for weight in model.parameters():
        if weight.requires_grad and weight.dtype != torch.float32:  # rounded to 16 bits, small steps would be lost
            weight.data = weight.data.float()
    return model


def _checkpointing(wanted: bool) -> Any:
    """Unsloth's way of recomputing activations, which keeps what it must keep in main memory, through CUDA."""
    return "unsloth" if wanted and torch.cuda.is_available() else wanted


def half_precision(device: str | torch.device) -> torch.dtype:
    """The 16-bit type of a device: bfloat16, or float16 on cards that lack it (T4, V100)."""
    here = torch.device(device).type == "cuda" and torch.cuda.is_available()
    return torch.float16 if here and not torch.cuda.is_bf16_supported(including_emulation=False) else torch.bfloat16


def load_tokenizer(path: str) -> Any:
    import transformers

    is_hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path) is not None
    if not is_hub_id and not Path(path).is_dir():
        raise InputError(f"{path}: model: no such folder")
    try:
        if (Path(path) / "config.json").is_file():  # a fault in it is not the tokenizer's
            what = "config.json cannot be used"
            transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        what = "its tokenizer cannot be loaded" if Path(path).is_dir() else "no such folder, and it cannot be loaded from a model hub"
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if not set(tokenizer(_PROBE, add_special_tokens=False)["input_ids"]) - {tokenizer.unk_token_id}:
            raise InputError("it has no vocabulary (tokenizer.json is missing)")  # transformers makes an empty one up
    except Exception as error:  # a damaged or contradictory folder can fail in any way
        raise InputError(f"{path}: model: {what}: {first_line(error)}") from error
    try:
        as_saved = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    except (OSError, ValueError):  # no tokenizer.json: it was converted from another format, and there is nothing to compare
        return tokenizer
    # AutoTokenizer rebuilds some tokenizers by the model's type (a Qwen2 model always gets Qwen2's splitting rule and end of text)
    if as_saved.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str():
        return tokenizer
    if len(as_saved) == len(tokenizer) and as_saved(_PROBE)["input_ids"] == tokenizer(_PROBE)["input_ids"]:
        return tokenizer
    log.warning("%s: transformers would load the tokenizer as %s, which differs from its tokenizer.json; the file is used",
                path, type(tokenizer).__name__)
    return as_saved


def load_model(path: str, four_bit: bool, device: str | None, tokens: int, trained: bool, backend: str, why: str, max_length: int,
                weights: bool = True, dtype: torch.dtype | None = None) -> Any:
    import transformers

    device = device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    device = "cuda" if not weights and four_bit and device == "cpu" else device  # 4-bit runs are planned for a card, also without one
    if dtype is None:
        dtype = torch.float32 if device == "cpu" or trained else half_precision(device)  # weights that are trained need float32
    try:
        if not weights:
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(path), dtype=dtype)
            model.meant_for, model.is_loaded_in_4bit = torch.device(device), four_bit
        elif backend == "unsloth":
            model = _load_unsloth(path, four_bit, device, dtype, max_length)
        else:
            options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False}
            if dtype == torch.float16 and "gemma" in transformers.AutoConfig.from_pretrained(path).model_type:
                options["dtype"] = dtype = torch.float32  # its activations do not fit into float16
            if four_bit:
                options["quantization_config"] = transformers.BitsAndBytesConfig(
                    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
                options["device_map"] = {"": device}
            options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
            model, report = transformers.AutoModelForCausalLM.from_pretrained(path, **options)
            lost = sorted([*report["missing_keys"], *(key if isinstance(key, str) else key[0] for key in report["mismatched_keys"])])
            if lost:  # transformers would go on with random numbers in their place
                raise InputError(f"{len(lost)} of its weights are missing or of another shape, the first {lost[0]}")
    except torch.OutOfMemoryError:
        raise
    except InputError as error:
        raise InputError(f"{path}: model: {error}") from None
    except Exception as error:  # a damaged or contradictory folder can fail in any way
        raise InputError(f"{path}: model: cannot be loaded: {first_line(error)}") from error
    if four_bit and not getattr(model, "is_loaded_in_4bit", False):  # Unsloth goes on in 16 bits where bitsandbytes does not work
        raise InputError(f"{path}: model: was not loaded in 4 bits; bitsandbytes does not work here")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # else, on such a CPU, the first look at a judge packs its weights in place
            module.support_avx512bf16_for_cpu = False  # into a form that rounds to bfloat16 and through which no gradient flows
    if weights and not four_bit:
        model.to(device)
    rows = model.get_input_embeddings().weight.shape[0]
    if tokens > rows:
        raise InputError(f"{path}: model: has {rows} tokens, its tokenizer {tokens}")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise InputError(f"{path}: model: holds a PEFT adapter, not a model by itself; merge it into its base first")
    model.backend, model.backend_reason = backend, why
    return model


def _load_unsloth(path: str, four_bit: bool, device: str, dtype: torch.dtype, max_length: int) -> Any:
    """The model as Unsloth patches it; exactly the weights named, not those of another repository that Unsloth knows for them."""
    from unsloth import FastLanguageModel  # first
    from transformers import AutoConfig  # isort: skip

    # inputs longer than max_seq_length would be cut at the end, where the answer is read, and positions beyond the model's own
    # rescaled: label tokens fit in the extra room, and prompts are checked against max_length before they get there
    positions = getattr(AutoConfig.from_pretrained(path).get_text_config(), "max_position_embeddings", None) or max_length + 64
    model, _ = FastLanguageModel.from_pretrained(
        path, max_seq_length=min(max_length + 64, positions), dtype=dtype, load_in_4bit=four_bit, device_map={"": device},
        use_exact_model_name=True, use_gradient_checkpointing=False, trust_remote_code=False, use_safetensors=True)
    return model


def _fingerprint(model: Any) -> str:
    """A hash of a sample of the base weights that are not quantized, rounded to bfloat16: loading in another precision keeps it."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and "lora_" not in name:
            name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            sample = weight.detach().flatten()[:64].to("cpu", torch.bfloat16).view(torch.uint8)
            digest.update(name.encode() + bytes(sample.tolist()))
    return digest.hexdigest()


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return short(" ".join(lines[: 2 if lines[0].endswith(":") else 1]), 300)


@torch.no_grad()
def check_readout(model: Any, encoder: PromptEncoder, tokens: LabelTokens) -> None:
    """Compares label logits with the model's own forward, on one prompt; raises InputError where they differ."""
    model.eval()
    if hasattr(model, "meant_for"):  # an outline
        return
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in collate([encoder("Is this so?")], tokens, 0).items()}
    ours, norm, _ = model(**{k: batch[k] for k in ("input_ids", "attention_mask", "answer_at", "token_ids")}, vocabulary=True)
    at = batch["answer_at"]
    stock = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[at[:, 0], at[:, 1]].float()
    ours = torch.cat([ours, norm[:, None]], dim=1)
    stock = torch.cat([stock[:, batch["token_ids"]], stock.logsumexp(1)[:, None]], dim=1)
    if not torch.isfinite(stock).all():
        raise InputError(f"{model.name_or_path or type(model).__name__}: model: its scores are not finite numbers: its weights are "
                         f"damaged, or do not fit into {str(next(model.parameters()).dtype).removeprefix('torch.')}")
    tolerance = 1e-4 if next(model.parameters()).dtype == torch.float32 else 0.05
    if not torch.allclose(ours, stock, rtol=tolerance, atol=tolerance * float(stock.abs().max())):
        raise InputError(f"{type(model).__name__}: its label scores cannot be read exactly (off by {(ours - stock).abs().max():.2g} "
                         "in a logit): this architecture changes its logits in a way that add_label_readout does not know")


def save_judge(judge: Judge, folder: str | os.PathLike) -> None:
    """Writes judge.json, tokenizer/ and adapter/ (or model/, when all weights were trained). safetensors and JSON only.

    A config.json and metrics.json that another judge left in the folder go, for they would speak of this one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "metrics.json"):
        (folder / name).unlink(missing_ok=True)
    is_adapter = hasattr(judge.model, "peft_config")
    if is_adapter:
        judge.model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    else:
        judge.model.save_pretrained(folder / "model")
    judge.tokenizer.save_pretrained(folder / "tokenizer")
    write_json(folder / "judge.json", {
        "distjudge": __version__, "base": judge.base, "weights": "adapter" if is_adapter else "model",
        "four_bit": bool(getattr(judge.model, "is_loaded_in_4bit", False)), "labels": judge.labels, "spellings": judge.spellings,
        "base_fingerprint": _fingerprint(judge.model) if is_adapter else None, "top_k": judge.top_k,
        "frame": judge.encoder.frame, "sequences": judge.tokens.sequences, "whole": judge.tokens.whole, "max_length": judge.max_length,
        "prompt_hash": _prompt_hash(judge.encoder.frame, judge.tokens.sequences), "sha256": checksums(folder)})


def _prompt_hash(frame: dict[str, Any], sequences: Sequence[Any]) -> str:
    """A hash of what stands around a message and of the tokens its labels are read at; config.json and judge.json hold it."""
    return hashlib.sha256(json.dumps([frame, sequences]).encode()).hexdigest()


def checksums(folder: Path) -> dict[str, str]:
    """Of a judge's files, by their path in its folder; not of what else may lie there."""
    found = {}
    for path in sorted(path for part in ("tokenizer", "adapter", "model") for path in (folder / part).rglob("*")):
        if path.suffix in (".json", ".jinja", ".safetensors") and path.is_file():
            digest = hashlib.sha256()
            with open(path, "rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
            found[path.relative_to(folder).as_posix()] = digest.hexdigest()
    return found


def _check_saved(folder: Path, saved: dict[str, Any]) -> None:
    """Raises InputError, a line for each, if files of a judge are not those that were saved, or its prompts not those it knows."""
    if "sha256" not in saved:
        log.warning("%s: an older distjudge wrote no checksums into it: whether files were changed is not checked", folder / "judge.json")
        return
    here, then = checksums(folder), saved["sha256"]
    what = lambda name: "is missing" if name not in here else "has changed" if name in then else "was not there"  # noqa: E731
    lines = [f"{folder / name}: {what(name)}, compared with when the judge was saved"
             for name in sorted({*here, *then}) if here.get(name) != then.get(name)]
    prompt_hash = _prompt_hash(saved["frame"], saved["sequences"])
    if saved.get("prompt_hash") != prompt_hash:
        lines.append(f"{folder / 'judge.json'}: prompt_hash: its template or label tokens are not those the judge was trained with")
    try:
        written = json.loads((folder / "config.json").read_text(encoding="utf-8"))["prompt_hash"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # a judge that was saved by itself has none
        written = prompt_hash
    if written != prompt_hash:
        lines.append(f"{folder / 'config.json'}: prompt_hash: is that of another judge than the one in judge.json")
    if lines:
        raise InputError("\n".join(lines))


def _load_saved(folder: Path, labels: Sequence[str] | None, max_length: int | None, top_k: int, device: str | None,
                backend: str, gradient_checkpointing: bool) -> Judge:
    try:
        saved = json.loads((folder / "judge.json").read_text(encoding="utf-8"))
        base, spellings, sequences = saved["base"], saved["spellings"], [(i, tuple(ids)) for i, ids in saved["sequences"]]
        is_adapter, four_bit, frame = saved["weights"] == "adapter", saved["four_bit"], saved["frame"]
        fingerprint = saved["base_fingerprint"]
        trained_labels, trained_length, trained_top_k = saved["labels"], saved["max_length"], saved["top_k"]
        whole = lambda value, least: isinstance(value, int) and not isinstance(value, bool) and value >= least  # noqa: E731
        words = lambda value: isinstance(value, list) and all(isinstance(word, str) for word in value)  # noqa: E731
        right = {"base": isinstance(base, str), "weights": saved["weights"] in ("adapter", "model"), "four_bit": isinstance(four_bit, bool),
                 "labels": words(trained_labels), "max_length": whole(trained_length, 1), "top_k": whole(trained_top_k, 0),
                 "spellings": isinstance(spellings, dict) and all(map(words, spellings.values())),
                 "sha256": isinstance(saved.get("sha256", {}), dict), "prompt_hash": isinstance(saved.get("prompt_hash", ""), str),
                 "frame": isinstance(frame, dict) and all(isinstance(frame[key], kind) for key, kind in
                                                          (("before", str), ("after", str), ("end", str), ("trim", bool)))}
        if wrong := [key for key, is_right in right.items() if not is_right]:
            raise ValueError(f"{wrong[0]}: {short(repr(saved[wrong[0]]))}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{folder / 'judge.json'}: not a judge written by distjudge ({why})") from None
    if labels and [str(label) for label in labels] != trained_labels:
        raise InputError(f"{folder}: labels: this judge was trained for {listed(trained_labels)}, not {listed(map(str, labels))}")
    weights = folder / ("adapter/adapter_model.safetensors" if is_adapter else "model")
    for needed in (folder / "tokenizer", weights):  # or the path might be taken for a hub id
        if not needed.exists():
            raise InputError(f"{folder}: {needed.relative_to(folder)} is missing")
    _check_saved(folder, saved)
    if is_adapter and Path(base).is_absolute() and not Path(base).is_dir():
        raise InputError(f"{folder}: base: {base}, the model that the judge was trained on, is not there")
    use, why = choose_backend(backend, device, trained=not is_adapter)
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    encoder = PromptEncoder(tokenizer, frame)
    tokens = label_tokens(tokenizer, trained_labels, spellings, encoder)
    if tokens.sequences != sequences:
        raise InputError(f"{folder}: labels: their tokens are not those the judge was trained on")
    length = trained_length if max_length is None else max_length
    model = load_model(base if is_adapter else str(folder / "model"), four_bit, device, len(tokenizer), not is_adapter, use, why, length)
    add_label_readout(model)
    check_readout(model, encoder, tokens)
    if is_adapter:
        if _fingerprint(model) != fingerprint:
            raise InputError(f"{folder}: base: the weights of {base} are not those the judge was trained on")
        model = _load_adapter(model, folder / "adapter", gradient_checkpointing)
    return Judge(model, encoder, tokens, base, length, top_k or trained_top_k, spellings)


def _load_adapter(model: Any, folder: Path, gradient_checkpointing: bool = False) -> Any:
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    try:
        model = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            there = set(file.keys())
    except Exception as error:  # as above
        raise InputError(f"{folder}: the adapter cannot be loaded: {first_line(error)}") from error
    if lost := sorted(set(get_peft_model_state_dict(model)) ^ there):
        raise InputError(f"{folder}: the adapter's weights are not those of its model: {len(lost)} differ, the first {lost[0]}")
    if getattr(model, "backend", "") == "unsloth":  # its fused layers, as its own loader puts them over an adapter
        from unsloth import FastLanguageModel

        model = FastLanguageModel.patch_peft_model(model, use_gradient_checkpointing=_checkpointing(gradient_checkpointing))
    return model


# ---------------------------------------------------------------------------------------------------------------------
# 5. Losses: (B, C) -> (B,), in nats
# ---------------------------------------------------------------------------------------------------------------------
def majority(p: torch.Tensor) -> torch.Tensor:
    """The majority label r of each row, one-hot (B, C). Labels that tie (to 1e-6) share it equally: order decides nothing."""
    top = (p >= p.max(-1, keepdim=True).values - 1e-6).to(p.dtype)
    return top / top.sum(-1, keepdim=True)


def _cross(p: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    """-sum_c p_c log q_c with 0 log 0 = 0, at least in float32."""
    p, logq = p.to(torch.promote_types(p.dtype, torch.float32)), logq.to(torch.promote_types(logq.dtype, torch.float32))
    return -torch.where(p > 0, p * logq, 0.0).sum(-1)


def kl_loss(logq: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """KL(p || q) = sum_c p_c (log p_c - log q_c) in nats; terms with p_c = 0 are 0. (B, C), (B, C) -> (B,).

    >>> kl_loss(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]))
    tensor([0.6931])
    """
    p = p.to(torch.promote_types(p.dtype, torch.float32))
    return _cross(p, logq) + torch.xlogy(p, p).sum(-1)


def ce_loss(logq: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """CE(r, q) = -sum_c r_c log q_c in nats, r the majority label of p; tied labels share it. (B, C), (B, C) -> (B,).

    >>> ce_loss(torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.6, 0.4]]))
    tensor([1.3863])
    """
    return _cross(majority(p), logq)


def rps_loss(logq: torch.Tensor, p: torch.Tensor, order: Sequence[int] | None = None) -> torch.Tensor:
    """Ranked probability score of ordered labels, less its least value: sum_{k<C} (Q_k - P_k)^2, Q and P the cumulative
    probabilities. (B, C), (B, C) -> (B,), no units, from 0 to C - 1.

    Being wrong by two labels costs more than by one, which KL does not know. Its mean over single votes is evaluate()'s "rps",
    which stands sum_k P_k (1 - P_k) higher. Finite, with a finite gradient, wherever p or q are zero. `order` names the columns
    from the lowest label to the highest; by default they are in order. Source: Epstein (1969); Gneiting and Raftery (2007).

    >>> rps_loss(torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[1.0, 0.0, 0.0]]))    # 0.5^2 + 0.25^2
    tensor([0.3125])
    """
    wide = torch.promote_types(logq.dtype, torch.float32)
    gap = logq.to(wide).exp() - p.to(wide)
    return ((gap if order is None else gap[..., list(order)]).cumsum(-1)[..., :-1] ** 2).sum(-1)


def hybrid_loss(logq: torch.Tensor, p: torch.Tensor, alpha: float, worst: torch.Tensor | None = None, rps: float = 0.0,
                order: Sequence[int] | None = None) -> torch.Tensor:
    """alpha KL(p' || q) + (1 - alpha) CE(r, q), p' being `worst` or, without it, p; r is always that of p. -> (B,), nats.

    alpha = 0 is single-point training, alpha = 1 drops the cross-entropy. Source: arXiv 2505.12301, section 3.
    rps > 0 (our addition) puts (1 - rps) KL(p' || q) + rps rps_loss(p', q) in the place of KL. A term of weight 0 is left out, also
    where it is infinite.
    """
    if alpha == 0:
        return ce_loss(logq, p)
    aim = p if worst is None else worst
    distance = kl_loss(logq, aim) if rps < 1 else 0.0
    if rps:
        distance = (1 - rps) * distance + rps * rps_loss(logq, aim, order)
    return alpha * distance + (1 - alpha) * ce_loss(logq, p) if alpha < 1 else distance


def shrink_votes(counts: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
    """(counts + prior) / (N + k): the mean of a Dirichlet posterior, prior = k m with k = prior.sum(-1). (B, C) -> (B, C).

    One vote moves it 1 / (1 + k) of the way from m to that vote, a hundred 100 / (100 + k): see fit_concentration for k.
    Note what it is as a loss. The gradient of KL to it, in the logits, is w (q - counts / N) + (1 - w) (q - m) with w =
    N / (N + k): votes as they are, plus a pull toward m. With endless items the judge learns w pi + (1 - w) m, not the truth pi: a
    judge that pools votes over items anyway may lose more by the pull than it gains (the README has such a case). With m the judge's
    own earlier predictions there is nothing to be pulled to but what it learnt: the pull slows down learning one item's votes by heart.

    >>> shrink_votes(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]]))
    tensor([[0.7500, 0.2500]])
    """
    total = counts + prior
    wide = total.to(torch.promote_types(total.dtype, torch.float32))  # a float16 sum ends at 65,504 votes
    return (wide / wide.sum(-1, keepdim=True)).to(total.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# 6. The adversary: the worst distribution near the human one
# ---------------------------------------------------------------------------------------------------------------------
def _working(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """float64 where the device has it: projections then add no error of their own to float32 inputs."""
    return [t.to(torch.float32 if t.device.type == "mps" else torch.float64) for t in tensors]


def project_simplex(y: torch.Tensor) -> torch.Tensor:
    """The nearest point to y (in l2) with entries >= 0 that add up to 1, along the last dimension: (..., C) -> (..., C).

    It is max(y - tau, 0); tau comes from one sort (Held, Wolfe and Crowder 1974; Duchi et al. 2008).
    """
    return _project_simplex(*_working(y)).to(y.dtype)


def _project_simplex(y: torch.Tensor) -> torch.Tensor:
    y = y - y.max(-1, keepdim=True).values  # a shift changes nothing but the rounding
    u = y.sort(-1, descending=True).values
    excess = u.cumsum(-1) - 1
    rank = torch.arange(1, y.shape[-1] + 1, device=y.device, dtype=y.dtype)
    size = (u * rank > excess).sum(-1, keepdim=True).clamp_min(1)  # 0 only for NaN, which then comes out as NaN
    return (y - excess.gather(-1, size - 1) / size).clamp_min(0)


def _radius(eps: float | torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    eps = torch.as_tensor(eps, dtype=p.dtype, device=p.device)
    if not bool((eps >= 0).all()):
        raise ValueError("eps must be 0 or more")
    return eps.expand(p.shape[:-1])[..., None]


def project_ball(y: torch.Tensor, p: torch.Tensor, eps: float | torch.Tensor) -> torch.Tensor:
    """The nearest point to y in E(p) = {x in the simplex: ||x - p||_2 <= eps}; y and p (B, C), p in the simplex -> (B, C).

    eps is a number or (B,). Exact: by the KKT conditions the point is x(t) = project_simplex(p + t (y - p)) for the
    largest t in [0, 1] that keeps it within eps of p. On the coordinates where x(t) > 0 the squared distance to p is
    a + V t^2, and coordinates that reach zero stay there as t grows, so as a function of t^2 the squared distance is
    increasing, concave and piecewise linear in at most C pieces: Newton's method from below lands on the root in at most
    C steps. Raises ValueError for a negative eps.
    """
    y_, p_ = _working(y, p)
    return _project_ball(y_, p_, _radius(eps, p_)).to(y.dtype)


def _project_ball(y: torch.Tensor, p: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    u = y - p
    u = u - u.mean(-1, keepdim=True)
    steepest = (u**2).sum(-1, keepdim=True).clamp_min(1e-30)
    t = (eps / steepest.sqrt()).clamp_max(1)  # no piece is steeper than ||u||^2
    for _ in range(y.shape[-1]):
        inside = _project_simplex(p + t * u) > 0
        size = inside.sum(-1, keepdim=True)
        mean = (u * inside).sum(-1, keepdim=True) / size
        slope = (inside * (u - mean) ** 2).sum(-1, keepdim=True)
        fixed = (1 - (p * inside).sum(-1, keepdim=True)) ** 2 / size + (~inside * p**2).sum(-1, keepdim=True)
        root = ((eps**2 - fixed).clamp_min(0) / slope.clamp_min(1e-30)).sqrt().clamp_max(1)
        t = torch.where(slope > 1e-18 * steepest, torch.maximum(t, root), t)  # at a corner of the simplex x no longer moves
    return _project_simplex(p + t * u)


def worst_case(logq: torch.Tensor, p: torch.Tensor, eps: float | torch.Tensor, steps: int = 5, step_size: float = 0.05) -> torch.Tensor:
    """The paper's adversary: projected gradient ascent on KL(p' || q) over E(p), from p' = p. (B, C), (B, C) -> (B, C).

        p' <- project_ball(p' + step_size * (log(p' / q) + 1), p, eps)

    q is a constant: no gradient flows through the result. At a zero of p' the gradient is -inf; it is taken as
    log(1e-12 / q) + 1, so that a zero stays zero unless q is about 1e-12 or less there. A one-hot p therefore does not move: there
    the ascent finds no worse point than p itself, though one may exist elsewhere in the ball. KL is convex in p', so no
    step lowers it; what rounding might take away is given back (p is returned where it is worse).
    eps: a number or (B,). Raises ValueError for a negative eps.
    """
    p_, logq_ = _working(p.detach(), logq.detach())
    radius = _radius(eps, p_)
    if not bool((radius > 0).any()):
        return p.detach()
    pull = 1 - logq_.clamp_min(-1e4)  # a label the model rules out (-inf) pulls hard, but not to NaN
    x = p_
    for _ in range(steps):
        x = _project_ball(x + step_size * (x.clamp_min(1e-12).log() + pull), p_, radius)
    gained = (kl_loss(logq_, x) >= kl_loss(logq_, p_)) & (radius[..., 0] > 0)
    return torch.where(gained[..., None], x, p_).to(p.dtype)


EXACT_LABELS = 10  # worst_case_exact tries every subset of labels


def worst_case_exact(p: torch.Tensor, logq: torch.Tensor, eps: float | torch.Tensor, ball: str = "l2") -> torch.Tensor:
    """The p' that maximises KL(p' || q) over the whole ball around p, with no step size. (B, C), (B, C) -> (B, C).

    ball: "l2"  ||p' - p||_2 <= eps, the paper's; "tv"  ||p' - p||_1 / 2 <= eps; "kl"  KL(p' || p) <= eps, in nats.
    KL is convex in p', so the maximum is at an extreme point. For "tv" these are the vertices of a polytope: all mass that may
    move goes to one label, and labels give all they have but one. For "kl" an extreme point is a corner of the simplex or lies
    on the sphere, where the objective is linear up to a constant: on each face the best is an exponential tilt of p by
    log(p / q), and on faces of two labels either of two points. Both lists are complete, so the result is the maximum.
    For "l2" we climb, without a step size, from points in all 2^C directions: x <- the point of the ball furthest along the
    gradient at x, which never lowers a convex objective. That is not a proof: worst_case_bound gives one, and the tests hold it
    against this function to 1e-6 nats. For one-hot p the ball is left too: this is where the paper's five steps find nothing.
    No gradient flows through. eps: a number or (B,). Raises ValueError for a negative eps, an unknown ball, more than ten labels.
    """
    if p.shape[-1] > EXACT_LABELS:
        raise ValueError(f"the exact worst case tries all subsets of labels: {EXACT_LABELS} labels at most, not {p.shape[-1]}")
    p_, logq_ = _working(p.detach(), logq.detach())
    p_, logq_, radius = p_ / p_.sum(-1, keepdim=True), logq_.clamp_min(-1e4), _radius(eps, p_)
    if ball not in _EXTREMES:
        raise ValueError(f"ball must be one of {', '.join(_EXTREMES)}, not {ball}")
    x = torch.cat([p_[:, None], _EXTREMES[ball](p_, logq_, radius)], 1)
    found = kl_loss(logq_[:, None].expand_as(x), x)
    best = found.nan_to_num(-math.inf).argmax(1)  # NaN marks what is not in the ball
    return torch.where(radius > 0, x[torch.arange(len(x), device=x.device), best].to(p.dtype), p.detach())


def _extremes_l2(p: torch.Tensor, logq: torch.Tensor, eps: torch.Tensor, keep: int = 24, climb: int = 3, turns: int = 31) -> torch.Tensor:
    """Local maxima over the l2 ball, (B, 2 keep, C)."""
    labels = p.shape[-1]
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=labels))[1:-1], dtype=p.dtype, device=p.device)
    ways = torch.cat([signs, torch.eye(labels, dtype=p.dtype, device=p.device), -torch.eye(labels, dtype=p.dtype, device=p.device)])

    def furthest(way: torch.Tensor) -> torch.Tensor:
        here = p[:, None].expand_as(way)
        return _project_ball(here + 1e3 * way, here, eps[:, None].expand(*way.shape[:-1], 1))

    x, logq = furthest(ways.expand(len(p), -1, -1)), logq[:, None]
    best = kl_loss(logq.expand_as(x), x).topk(min(keep, x.shape[1]), 1).indices
    x = x.gather(1, best[..., None].expand(-1, -1, labels))
    for _ in range(climb):
        x = furthest(x.clamp_min(1e-12).log() - logq)
    y, on, before = x, x > 0, [x, x]
    for turn in range(turns):  # the same without a search where no label reaches zero: a sphere around `middle` in the labels still on
        size = on.sum(-1, keepdim=True).clamp_min(1)
        middle = torch.where(on, p[:, None] + (1 - (p[:, None] * on).sum(-1, keepdim=True)) / size, 0.0)
        left = (eps[:, None] ** 2 - ((middle - p[:, None]) ** 2).sum(-1, keepdim=True)).clamp_min(0).sqrt()
        way = torch.where(on, y.clamp_min(1e-12).log() - logq, 0.0)
        if turn % 4 == 3:  # the steps shrink by one factor in the end: go on to where they lead
            last, former = y - before[-1], before[-1] - before[-2]
            factor = ((last * former).sum(-1, keepdim=True) / (former**2).sum(-1, keepdim=True).clamp_min(1e-300)).clamp(0, 0.97)
            way = torch.where(on, y + factor / (1 - factor) * last - middle, 0.0)
        before = [before[-1], y]
        way = torch.where(on, way - way.sum(-1, keepdim=True) / size, 0.0)
        y = middle + left * way / way.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        on, y = y > 0, y.clamp_min(0)
    here = p[:, None].expand_as(y)
    return torch.cat([x, _project_ball(y, here, eps[:, None].expand(*y.shape[:-1], 1))], 1)


def _extremes_tv(p: torch.Tensor, logq: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """The best vertex of the total-variation ball for each label that receives, (B, C, C)."""
    labels, found = p.shape[-1], []
    for to in range(labels):
        rest = [c for c in range(labels) if c != to]
        table = torch.zeros((labels - 1) * 2 ** (labels - 2), labels, dtype=p.dtype, device=p.device)  # 1: gives all, 2: gives what is left
        kinds = itertools.product(range(labels - 1), itertools.product((0.0, 1.0), repeat=labels - 2))
        for row, (last, emptied) in enumerate(kinds):
            table[row, rest] = torch.tensor([*emptied[:last], 2.0, *emptied[last:]], dtype=p.dtype, device=p.device)
        moved = torch.minimum(eps, 1 - p[:, [to]])
        p_ = p[:, None].expand(-1, len(table), -1)
        missing = moved - (p_ * (table == 1)).sum(-1)
        last = (p_ * (table == 2)).sum(-1)
        x = torch.where(table == 1, 0.0, torch.where(table == 2, (last - missing)[..., None].clamp_min(0), p_)).clone()
        x[..., to] = p[:, [to]] + moved
        x[(missing < -1e-12) | (missing > last + 1e-12)] = math.nan
        best = kl_loss(logq[:, None].expand_as(x), x).nan_to_num(-math.inf).argmax(1)
        found.append(x[torch.arange(len(p), device=p.device), best])
    return torch.stack(found, 1)


def _extremes_kl(p: torch.Tensor, logq: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """Tilts of p, both ways, on every face of the simplex where KL(. || p) = eps, and its corners: (B, 2 (2^C - 1), C)."""
    faces = torch.tensor(list(itertools.product((False, True), repeat=p.shape[-1]))[1:], device=p.device)
    on = faces.repeat(2, 1) & (p > 0)[:, None]
    logp = p.clamp_min(1e-300).log()[:, None]
    way = torch.tensor([1.0, -1.0], dtype=p.dtype, device=p.device).repeat_interleave(len(faces))[:, None]
    pull = way * (logp - logq[:, None])
    pull = pull - torch.where(on, pull, -math.inf).amax(-1, keepdim=True).nan_to_num(neginf=0.0)  # so that large tilts stay finite

    def tilt(t: torch.Tensor) -> torch.Tensor:
        return torch.where(on, logp + t * pull, -math.inf).softmax(-1)

    low, high = torch.zeros_like(pull[..., :1]), torch.full_like(pull[..., :1], 80.0)  # t = exp(s) - 1, by bisection in s
    for _ in range(60):
        s = (low + high) / 2
        inside = kl_loss(logp.expand_as(pull), tilt(s.exp() - 1))[..., None] <= eps[:, None]
        low, high = torch.where(inside, s, low), torch.where(inside, high, s)
    x = tilt(low.exp() - 1)
    outside = ~on.any(-1) | (on != faces.repeat(2, 1)).any(-1) | (kl_loss(logp.expand_as(x), x) > eps + 1e-9)
    return torch.where(outside[..., None], math.nan, x)


_EXTREMES: dict[str, Callable[..., torch.Tensor]] = {"l2": _extremes_l2, "tv": _extremes_tv, "kl": _extremes_kl}


def worst_case_bound(p: torch.Tensor, logq: torch.Tensor, eps: float | torch.Tensor, attained: torch.Tensor, tol: float = 1e-6,
                     rounds: int = 400) -> torch.Tensor:
    """An upper bound on max KL(p' || q) over the l2 ball, (B,) in nats: the proof that `attained` (B,) is the maximum.

    It is at most attained + tol where that is true to tol. For checks and studies; training does not need it. By branch and
    bound over boxes lo <= x <= hi. In a box, for any mu and any lam >= 0,

        max f  <=  mu + lam eps^2 + sum_i max_{lo_i <= x <= hi_i} ( x log x - x log q_i - mu x - lam (x - p_i)^2 )

    and each of the inner maxima is at lo_i, at hi_i or at the larger root of a derivative that rises to x = 1 / (2 lam) and falls
    from there. The bound is convex in (mu, lam); the ellipsoid method minimises it, and says how near the minimum is. What
    the bound loses is in labels below 1 / (2 lam), at most two of which matter at a maximum (the Lagrangian's Hessian is diagonal and
    no positive direction may lie in the tangent space of two constraints): boxes are cut there. NaN where `rounds` did not do.
    """
    p, logq = p.double().cpu(), logq.double().cpu().clamp_min(-1e4)
    eps, goal = _radius(eps, p)[..., 0], attained.double().cpu() + tol
    reach = eps[:, None] * math.sqrt(1 - 1 / p.shape[-1])
    item, lo, hi = torch.arange(len(p)), (p - reach).clamp_min(0), (p + reach).clamp_max(1)
    span = (logq.amax(1) - logq.amin(1)) / 2  # mu and lam eps grow with it
    bound, dual = attained.double().cpu().clone(), torch.stack([span, (1.5 + span) / eps.clamp_min(1e-9)], 1)
    for turn in range(rounds):
        spread = torch.stack([30 + span if turn == 0 else torch.full_like(dual[:, 0], 4.0), dual[:, 1] * (10 if turn == 0 else 2) + 1], 1)
        best, at = _dual_bound(p[item], logq[item], eps[item], lo, hi, dual, spread, goal[item])
        closed = best <= goal[item]
        bound = bound.scatter_reduce(0, item[closed], best[closed], "amax")
        item, lo, hi, dual = item[~closed], lo[~closed], hi[~closed], at[~closed]
        if not len(item):
            return bound
        if len(item) > 100_000:
            break
        # cut the label whose concave envelope from `lo` on is furthest above x log x - lam x^2, and there
        knee = torch.minimum(hi, lo + 4 * (0.5 / dual[:, 1:] - lo).clamp_min(0))
        share = torch.linspace(0, 1, 17, dtype=p.dtype)
        x = lo[..., None] + (knee - lo)[..., None] * share
        f = torch.xlogy(x, x) - dual[:, 1:, None] * x**2
        slope, end = ((f[..., 1:] - f[..., :1]) / (x[..., 1:] - x[..., :1]).clamp_min(1e-300)).max(-1, keepdim=True)
        loss = torch.where(torch.arange(17) <= end + 1, f[..., :1] + slope * (x - x[..., :1]) - f, 0.0)
        most, place = loss.max(-1)
        row, label = torch.arange(len(item)), most.argmax(1)
        cut = x[row, label, place[row, label].clamp(1, 15)]
        cut = torch.where((knee > lo)[row, label], cut, (lo + hi)[row, label] / 2)
        lower, upper = hi.clone(), lo.clone()
        lower[row, label], upper[row, label] = cut, cut
        item, lo, hi, dual = item.repeat(2), torch.cat([lo, upper]), torch.cat([lower, hi]), dual.repeat(2, 1)
        for _ in range(2):
            hi = torch.minimum(hi, 1 - (lo.sum(1, keepdim=True) - lo))
            lo = torch.maximum(lo, 1 - (hi.sum(1, keepdim=True) - hi))
        nearest = torch.minimum(torch.maximum(p[item], lo), hi)
        there = (lo <= hi + 1e-15).all(1) & (((nearest - p[item]) ** 2).sum(1) <= eps[item] ** 2 + 1e-12)
        item, lo, hi, dual = item[there], lo[there], torch.maximum(hi, lo)[there], dual[there]
        if not len(item):
            return bound
    return bound.index_fill(0, item, math.nan)


def _dual_bound(p: torch.Tensor, logq: torch.Tensor, eps: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, start: torch.Tensor,
                spread: torch.Tensor, goal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The least bound found for each box (N,) and its (mu, lam) (N, 2): to below `goal`, or until that cannot be reached."""
    centre, shape = start.clone(), torch.diag_embed(spread**2)
    best, at, left = torch.full_like(eps, math.inf), start.clone(), torch.arange(len(p))
    for _ in range(200):
        mu, lam, p_, logq_, lo_, hi_ = centre[left, :1], centre[left, 1:].clamp_min(1e-9), p[left], logq[left], lo[left], hi[left]
        root, floor = hi_, torch.minimum(torch.maximum(lo_, 0.5 / lam), hi_)
        for _ in range(10):  # Newton from the right of a concave function's root stays to the right of it
            rise = root.clamp_min(1e-300).log() + 1 - logq_ - mu - 2 * lam * (root - p_)
            bend = 1 / root.clamp_min(1e-300) - 2 * lam
            root = torch.maximum(root - torch.where((rise < 0) & (bend < 0), rise / bend, 0.0), floor)
        places = torch.stack([lo_, hi_, root])
        value, which = (torch.xlogy(places, places) - places * (logq_ + mu) - lam * (places - p_) ** 2).max(0)
        x, found = places.gather(0, which[None])[0], value.sum(1) + mu[:, 0] + lam[:, 0] * eps[left] ** 2
        slope = torch.stack([1 - x.sum(1), eps[left] ** 2 - ((x - p_) ** 2).sum(1)], 1)
        slope = torch.where(centre[left, 1:] <= 1e-9, torch.tensor([0.0, -1.0], dtype=p.dtype), slope)
        better = found < best[left]
        best[left[better]], at[left[better]] = found[better], torch.cat([mu, lam], 1)[better]
        step = (shape[left] @ slope[..., None])[..., 0]
        size = (slope * step).sum(1).clamp_min(1e-300).sqrt()
        step = step / size[:, None]
        centre[left] -= step / 3
        shape[left] = 4 / 3 * (shape[left] - 2 / 3 * step[:, :, None] * step[:, None, :])
        left = left[(best[left] > goal[left]) & (found - size <= goal[left]) & (size > 1e-9)]
        if not len(left):
            break
    return best, at


def annotator_radius(counts: torch.Tensor, eps: float, prior: torch.Tensor | None = None) -> torch.Tensor:
    """The radius of each item's ball when it follows from the item's number of votes: (B, C) -> (B,).

    min(eps, s), s^2 = E ||pi - p||^2, the expected squared distance between the true distribution pi and the observed p
    = counts / N under the posterior pi ~ Dirichlet(counts + 1). For many votes s^2 is near (1 - ||p||^2) / N; for few, and
    for unanimous panels, the flat prior keeps it from being 0. So eps is what an item with few votes gets.
    With `prior` = k m (B, C) or (C,), the target is the posterior mean (see shrink_votes) and s the standard error around that:
    pi ~ Dirichlet(counts + prior), s^2 = sum_c v_c (1 - v_c) / (N + k + 1) for the mean v.
    """
    (counts,) = _working(counts)
    a = counts + (1 if prior is None else prior.to(counts))
    total = a.sum(-1, keepdim=True)
    mean = a / total
    variance = mean * (1 - mean) / (total + 1)
    centre = counts / counts.sum(-1, keepdim=True) if prior is None else mean
    return (variance + (mean - centre) ** 2).sum(-1).sqrt().clamp_max(eps)


# ---------------------------------------------------------------------------------------------------------------------
# 7. Training
# ---------------------------------------------------------------------------------------------------------------------
PRESETS: dict[str, dict[str, Any]] = {  # settings of the method by name; on a command line, flags beside --preset win
    "paper": {"alpha": 0.8, "eps": 0.25, "radius": "fixed", "adversary": "pgd", "ball": "l2", "steps": 5, "step_size": 0.05,
              "prior": "none", "loss": "kl"},
    "single": {"alpha": 0.0, "eps": 0.0, "prior": "none", "loss": "kl"},
    "kl": {"alpha": 1.0, "eps": 0.0, "prior": "none", "loss": "kl"},
    "teacher": {"alpha": 1.0, "eps": 0.0, "prior": "teacher", "schedule": "constant", "average": 0.0, "loss": "kl"},
    "few": {"alpha": 1.0, "eps": 0.25, "radius": "fixed", "adversary": "pgd", "ball": "l2", "prior": "model", "average": 0.3, "loss": "kl"},
}


@dataclasses.dataclass
class Config:
    """Settings of a run. The defaults of the method are the paper's."""

    preset: Literal["", "paper", "single", "kl", "teacher", "few"] = ""
    """The method's settings by name, see PRESETS; flags given beside it win. (In Python: Config(**PRESETS["kl"], ...).)"""
    train: tuple[str, ...] = ()
    """Training items: one or more .jsonl or .jsonl.gz files."""
    test: tuple[str, ...] = ()
    """Test items. Without any, the training file's "split" field decides, or else an 8:2 split by group."""
    out: str = "runs/last"
    """The run folder; what is in it is overwritten."""
    labels: tuple[str, ...] = ()
    """Label order. Default: numeric order, or the order of the first item's counts."""
    ordered: bool | None = None
    """Whether the labels are a scale (adds earth mover's distance, RPS, means). Default: they are if all are numbers."""
    spellings: tuple[str, ...] = ()
    """More spellings of a label, as LABEL=TEXT,TEXT (for example contradiction=contradiction,contra); they add up."""

    model: str = "Qwen/Qwen2.5-0.5B-Instruct"
    """Model folder or hub id."""
    four_bit: bool = False
    """Load the weights in 4 bits (NF4)."""
    backend: Literal["auto", "unsloth", "transformers"] = "auto"
    """What loads and runs the model: Unsloth on CUDA where it works, transformers + PEFT elsewhere ("auto"), or one of the two."""
    lora_rank: int = 16
    """Rank of the LoRA adapters; 0 trains all weights."""
    lora_alpha: int = 32
    """LoRA scale: adapters are multiplied by lora_alpha / lora_rank."""
    max_length: int = 2048
    """Longest prompt in tokens, chat template included."""
    overlong: Literal["error", "drop"] = "error"
    """What to do with longer prompts: stop and count them, or drop the items and say how many."""
    top_k: int = 0
    """Judge from the k most probable tokens only, as the paper does (5); 0 reads all."""
    min_mass: float = 0.01
    """Refuse a model whose labels hold less of its probability than this before training, on the first items: its prompt or labels are
    wrong for it. 0 takes any, such as a model with random weights."""

    alpha: float = 0.8
    """Weight of KL to the human distribution; the rest is cross-entropy with the majority label. 0 is single-point."""
    eps: float = 0.25
    """Radius of the l2 ball in which the adversary moves the human distribution; 0 is no adversary."""
    radius: Literal["fixed", "annotators"] = "fixed"
    """The same eps for every item, or one that shrinks with the item's votes, eps at most."""
    adversary: Literal["pgd", "exact"] = "pgd"
    """How the worst case is found: the paper's projected gradient ascent, or exactly (up to ten labels)."""
    ball: Literal["l2", "tv", "kl"] = "l2"
    """What eps is a distance in: l2, the paper's; total variation or KL(p' || p) in nats with the exact adversary."""
    steps: int = 5
    """Steps of the adversary."""
    step_size: float = 0.05
    """Step size of the adversary."""
    prior: Literal["none", "marginal", "group", "model", "teacher", "crossfit"] = "none"
    """Shrink each item's votes toward: the training marginal, its group's mean, the judge's own earlier predictions for the item
    (their running mean, see remember), the prediction of a teacher, which is a running mean of the judge's weights and gives the
    answers in the end (see running_rate; up to half more computing), or the prediction of a judge trained on the other half of the items
    (twice the training). The adversary then starts from there, with the posterior's radius if radius is "annotators"; for "model" and
    "teacher" it moves the votes, and the predictions are added after that."""
    concentration: float = 0.0
    """How many votes the prior is worth; 0 is 1 for "model", 5 for "teacher", and else fits it to the training votes, or takes 2 where no
    item has two."""
    loss: Literal["kl", "rps", "mixed"] = "kl"
    """Distance to the (worst) distribution: KL, for ordered labels the ranked probability score, or a mixture of both."""
    rps_weight: float = 0.5
    """With loss "mixed": the weight of the ranked probability score; KL has the rest."""

    learning_rate: float = 5e-5
    """Peak learning rate of AdamW."""
    epochs: float = 2.0
    """Passes over the training items."""
    batch_size: int = 8
    """Items an optimizer step, times grad_accum. How many go through the model at once is pack_tokens' affair."""
    grad_accum: int = 1
    """Multiplies batch_size, for settings taken over from elsewhere: a step is always one mean over all its items."""
    pack_tokens: int = 0
    """Tokens a forward pass, at most; what sets the memory needed. 0: 1,024 on a CPU, 8,192 on CUDA."""
    swap: bool = True
    """Train on both orders of items that are pairs (see load_items), each an item of its own. Judging averages both in any case."""
    packs: bool = True
    """Compute a beginning that several prompts of a step share once. The mathematics is the same without."""
    shuffle: Literal["packs", "items"] = "packs"
    """Order of the items in an epoch: prompts that share 16 tokens or more beyond what all share come in chunks of at most one
    step, so that steps share more ("packs"), or every item by itself ("items"); chunks and items in uniformly random order."""
    warmup: float = 0.03
    """Linear warm-up: a share of all steps if below 1, else a number of steps. Schedule "constant" has none."""
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """Learning-rate schedule, by its transformers name."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    optimizer: Literal["auto", "adamw_torch", "adamw_8bit"] = "auto"
    """AdamW with its state in 32 or, by bitsandbytes, in 8 bits; "auto": 8 where the weights are 4-bit on CUDA."""
    max_grad_norm: float = 1.0
    """Gradient clipping; 0 is none."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    average: float = 0.0
    """Answer with the mean of the trained weights over this share of the steps, the last ones; 0 takes the last weights. Costs
    nothing to speak of, and takes out some of the noise that few votes bring in (Polyak and Juditsky 1992)."""
    seed: int = 0
    """Seed of LoRA weights, data order and split."""
    eval_every: float = 0.0
    """Evaluate on the test items every so many steps (below 1: a share of all steps); 0 is only at the end. For watching:
    nothing is selected by it."""
    log_every: int = 10
    """Log the training loss every so many steps."""
    save_every: float = 0.1
    """Write a checkpoint every so many steps (below 1: a share of all steps), and keep the two newest; 0 is never."""
    resume: bool = False
    """Go on from the newest whole checkpoint of a run that was stopped. Data, model and settings must be the same."""
    report_to: tuple[str, ...] = ()
    """Loggers known to transformers: tensorboard, wandb, trackio, ..."""
    dry_run: bool = False
    """Everything but the weights: items, tokenizer, label tokens, packs and an estimate of memory for the real architecture. Needs the
    model's config.json and tokenizer only."""

    export: Literal["none", "merged", "gguf", "gguf-unchecked"] = "none"
    """What to make of the trained judge beside its adapter (see recipes/export.py): a model folder in 16 bits, out/merged, or a GGUF
    file, out/gguf, through Unsloth. Both are compared with the judge; "gguf-unchecked" does without llama-cpp-python, which that needs."""
    push_to_hub: str = ""
    """Upload the run folder, but for checkpoints and the test items' texts and votes, to this repository (NAME or OWNER/NAME) of the
    model hub; a new one is private. The token is that of `hf auth login` or HF_TOKEN."""

    def check(self) -> None:
        """Raises InputError naming the field for a value outside its range."""
        at_least = dict.fromkeys(("eps", "steps", "step_size", "learning_rate", "epochs", "warmup", "lora_rank", "top_k", "eval_every",
                                  "save_every", "pack_tokens", "weight_decay", "max_grad_norm", "concentration"), 0)
        at_least |= dict.fromkeys(("batch_size", "grad_accum", "lora_alpha", "max_length", "log_every"), 1)
        for name in ("alpha", "rps_weight", "average", "min_mass"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}: must be between 0 and 1, not {getattr(self, name)}")
        if self.prior == "teacher" and self.average:
            raise InputError("average: with --prior teacher it must be 0: the teacher gives the answers, and is a mean already")
        if self.ball != "l2" and self.adversary == "pgd" and self.eps:
            raise InputError(f"ball: the {self.ball} ball needs --adversary exact")
        if self.ball != "l2" and self.radius == "annotators":
            raise InputError(f"radius: the annotators' radius is a distance in l2, ball is {self.ball}")
        choices = {"radius": ("fixed", "annotators"), "adversary": ("pgd", "exact"), "ball": tuple(_EXTREMES),
                   "loss": ("kl", "rps", "mixed"), "prior": ("none", "marginal", "group", "model", "teacher", "crossfit"),
                   "export": ("none", "merged", "gguf", "gguf-unchecked")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}: must be one of {', '.join(allowed)}, not {getattr(self, name)}")
        for name, low in at_least.items():
            value = getattr(self, name)
            if not low <= value < math.inf:
                raise InputError(f"{name}: must be {low} or more, not {value}")
        if not self.out.strip():
            raise InputError("out: name a folder")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed: must be between 0 and 4294967295, not {self.seed}")
        if self.epochs == 0:
            raise InputError("epochs: must be more than 0")
        schedules = ("linear", "cosine", "constant", "constant_with_warmup")
        if self.schedule not in schedules:
            raise InputError(f"schedule: must be one of {', '.join(schedules)}, not {self.schedule}")


@dataclasses.dataclass
class FourBitConfig(Config):
    """What the recipes of real backbones share: a 4-bit model on one consumer GPU."""

    four_bit: bool = True
    """Load the weights in 4 bits (NF4, quantized twice); --no-four-bit takes 16 bits, and four times the memory for weights."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, about a third more time."""
    max_length: int = 4096
    """Longest prompt in tokens, chat template included."""
    pack_tokens: int = 4096
    """Tokens a forward pass, at most; what sets the memory needed beside the weights. A longer prompt gets a pass of its own."""
    batch_size: int = 16
    """Items an optimizer step, times grad_accum. How many go through the model at once is pack_tokens' affair."""


TEACHER_POWER = 10  # the teacher spans the last tenth of all steps
SINGLE_VOTE_CONCENTRATION = 2.0  # a prior's weight in votes where no item has two votes and the data say nothing of it
OWN_CONCENTRATION = {"model": 1.0, "teacher": 5.0}  # of the judge's own predictions, which come with the steps


def prior_votes(items: Sequence[Item], config: Config, means: torch.Tensor | None = None) -> torch.Tensor:
    """The pseudo-votes k m that config.prior adds to each training item, (N, C) float64; zeros for prior "none".

    m is the training marginal, for "group" the group's votes shrunk toward that in the same way (a group is then one panel), or
    `means` (N, C) where given ("crossfit"). For "model" and "teacher" only k counts: train() puts predictions in m's place.
    k is config.concentration or, if that is 0, fitted (see fit_concentration) and printed.
    """
    counts = counts_of(items)
    if config.prior == "none":
        return torch.zeros_like(counts)
    marginal = marginal_distribution(items).expand_as(counts)
    if config.prior == "group":
        names = [item.group if item.group is not None else f"item {i}" for i, item in enumerate(items)]
        place = {name: g for g, name in enumerate(dict.fromkeys(names))}
        at = torch.tensor([place[name] for name in names])
        pooled = torch.zeros(len(place), counts.shape[1], dtype=counts.dtype).index_add(0, at, counts)
        spread = fit_concentration(pooled)
        means = shrink_votes(pooled, (SINGLE_VOTE_CONCENTRATION if spread is None else spread) * marginal[:1])[at]
    means = (marginal if means is None else means).clamp_min(1e-9)
    k, how = config.concentration, "given"
    if not k and config.prior in OWN_CONCENTRATION:
        k, how = OWN_CONCENTRATION[config.prior], "the default"
    if not k:
        k, how = fit_concentration(counts, means), "fitted"
        if k is None:
            k, how = SINGLE_VOTE_CONCENTRATION, "the default, for no item has two votes to fit it to"
    print(f"prior {config.prior}: worth {k:.3g} votes ({how})")
    return k * means


def remember(memory: torch.Tensor, rows: Sequence[int], q: torch.Tensor, keep: float = 0.6) -> None:
    """Takes predictions q (B, C) for the items `rows` into their running means: memory (M, C + 1), in place.

    An item's memory is (1 - keep) sum_j keep^j q_j over its predictions, the newest first, and in the last column the same sum of
    ones; their quotient is the mean, 0 / 0 before the first. As targets such means are less noisy than a few votes, since items
    alike have been learnt together. Source: temporal ensembling, Laine and Aila 2017; as a prior worth k votes it is ours.
    """
    memory[rows] = keep * memory[rows] + (1 - keep) * torch.cat([q, torch.ones_like(q[:, :1])], 1)


def running_rate(steps: int, power: int) -> float:
    """How much of the newest weights a running mean takes in that holds those of so many steps: mean += rate * (new - mean).

    power 1 is the plain mean. A larger one weighs step t of T by about (t / T)^(power - 1), so that the mean spans the last
    1 / power of all steps, however many these are. Source: mean teachers, Tarvainen and Valpola 2017; weights that are a power of t,
    Karras et al. 2024.
    """
    return power / (power + steps)


def crossfit_means(judge: Judge, items: Sequence[Item], config: Config) -> torch.Tensor:
    """Predictions (N, C) for the training items, each from a judge trained on the half that does not hold it (by group).

    Both halves start from the judge's present weights, which are put back at the end.
    """
    start = {name: weight.detach().clone() for name, weight in judge.model.named_parameters() if weight.requires_grad}
    place, means = {id(item): i for i, item in enumerate(items)}, torch.zeros_like(counts_of(items))
    halves = split_items(items, 0.5, config.seed)
    for fold, (learn, answer) in enumerate((halves, halves[::-1])):
        settings = dataclasses.replace(config, prior="none", out=str(Path(config.out) / f"fold-{fold}"), eval_every=0.0)
        try:
            train(judge, learn, settings)
            means[[place[id(item)] for item in answer]] = judge_items(judge, answer)[0].double().cpu()
        finally:
            with torch.no_grad():
                for name, weight in judge.model.named_parameters():
                    if name in start:
                        weight.copy_(start[name])
    return means


def optimizer_for(judge: Judge, config: Config) -> str:
    if config.optimizer != "auto":
        return config.optimizer
    return "adamw_8bit" if judge.device.type == "cuda" and getattr(judge.model, "is_loaded_in_4bit", False) else "adamw_torch"


def autocast_type(judge: Judge) -> torch.dtype | None:
    """The 16-bit type that training computes in; None: in float32, as the weights are."""
    held = judge.model.get_input_embeddings().weight.dtype
    if held == torch.float32 and (judge.device.type == "cpu" or hasattr(judge.model, "peft_config")):
        return None
    return half_precision(judge.device) if held == torch.float32 else held


def epoch_order(encoded: Sequence[Sequence[int]], config: Config, epoch: int) -> list[int]:
    """The order of the prompts in an epoch: see shuffled()."""
    keep_together = 16 if config.shuffle == "packs" else 0
    return shuffled(encoded, config.seed * 1_000_003 + epoch, keep_together, config.batch_size * config.grad_accum)


def train(judge: Judge, items: Sequence[Item], config: Config, eval_items: Sequence[Item] = (),
          on_step: Callable[[int], Any] | None = None) -> list[dict[str, float]]:
    """Trains the judge in place with the method's objective; returns the log: one dict a logged step, losses in nats.

    The loss is the mean over items, whatever the batches: an optimizer step has the gradient of one batch of
    batch_size * grad_accum items. Two runs with one seed on one machine give the same weights.
    on_step: called after each optimizer step with its number. Raises InputError if the items' labels are not the judge's, or a prompt
    is longer than judge.max_length (dropping such items is run()'s affair, see keep_short), or if config.resume finds
    checkpoints of another run or damaged ones only, FloatingPointError when the loss or the weights are no longer finite, OSError when a
    checkpoint cannot be written, Stopped after SIGINT or SIGTERM.
    """
    import transformers

    config.check()
    if config.dry_run:
        raise InputError("dry_run: there is none of this command: run() and the recipes of one backbone have it")
    for some in filter(None, (items, eval_items)):
        if labels_of(some) != judge.labels:
            raise InputError(f"{some[0].where}: labels {listed(labels_of(some))} are not the judge's {listed(judge.labels)}")
    counts = counts_of(items)
    if config.adversary == "exact" and config.eps and counts.shape[1] > EXACT_LABELS:
        raise InputError(f"adversary: the exact one takes {EXACT_LABELS} labels at most, not {counts.shape[1]}")
    if config.loss != "kl" and not (config.ordered or are_numeric(judge.labels)):
        raise InputError(f"loss: {config.loss} needs ordered labels, and {listed(judge.labels)} are none (--ordered says they are)")
    scale = sorted(range(counts.shape[1]), key=lambda c: float(judge.labels[c]) if are_numeric(judge.labels) else c)
    rps = {"kl": 0.0, "rps": 1.0, "mixed": config.rps_weight}[config.loss]
    means = crossfit_means(judge, items, config) if config.prior == "crossfit" else None
    prior, counts = prior_votes(items, config, means).float(), counts.float()
    encoded, ids = judge.encode([item.prompt for item in items]), [item.id for item in items]
    if pairs := [i for i, item in enumerate(items) if item.swap and config.swap]:  # in the other order they are items of their own
        encoded += judge.encode([items[i].swap.prompt for i in pairs])  # type: ignore[union-attr]
        ids += [items[i].id for i in pairs]
        turned = torch.tensor([items[i].swap.labels for i in pairs])  # type: ignore[union-attr]
        counts, prior = (torch.cat([x, x[pairs].gather(1, turned)]) for x in (counts, prior))
    own = config.prior in OWN_CONCENTRATION
    if config.prior == "model" and config.epochs <= 1:
        log.warning("prior: the model's earlier predictions count from the second epoch on; epochs is %g: there is none", config.epochs)
    memory = torch.zeros(len(encoded) if own else 0, counts.shape[1] + 1, device=judge.device)
    before = judge.packs, judge.pack_tokens
    judge.packs, judge.pack_tokens = judge.packs and config.packs, config.pack_tokens or judge.pack_tokens

    class Order(torch.utils.data.Sampler):
        """The order of the items, another one each epoch: see shuffled()."""

        epoch = 0

        def __len__(self) -> int:
            return len(encoded)

        def __iter__(self) -> Iterator[int]:
            return iter(epoch_order(encoded, config, self.epoch))

    class Trainer(transformers.Trainer):
        """One of its batches is the items of a whole optimizer step; training_step divides them into forward passes.

        Of several processes each reads the whole step and takes its share, so that no item is repeated to make shares equal.
        """

        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(self.train_dataset, config.batch_size * config.grad_accum, sampler=order,
                                               collate_fn=self.data_collator)

        def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
            if self.state.global_step < self.state.max_steps:  # of a finished run that is resumed nothing is left of its last epoch
                super()._run_epoch(*args, **kwargs)

        def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: Any) -> tuple[list, torch.Tensor]:
            batches = [b for _, b in zip(range(num_batches), epoch_iterator, strict=False)]
            return batches, torch.tensor(sum(len(b["chosen"]) for b in batches), device=device)

        def training_step(self, model: Any, inputs: dict, num_items_in_batch: Any = None) -> torch.Tensor:
            step, rank, processes = inputs["chosen"].tolist(), self.args.process_index, self.args.world_size
            self.step_items = step
            chosen = step[rank * len(step) // processes : (rank + 1) * len(step) // processes]
            counts_here = float(len(chosen) > 0)  # a process without a share must exchange gradients all the same, of zero
            chosen = chosen or step[:1]
            if config.prior == "teacher" and average.means:
                try:
                    with average.in_place():
                        said = judge._score([encoded[i] for i in chosen], plain=True)[0].exp()
                except FloatingPointError:
                    raise self.diverged(f"the loss is not finite at step {self.state.global_step + 1}, for", chosen) from None
                remember(memory, chosen, said.to(memory), keep=0.0)
            while True:
                passes, self.said = judge.plan([encoded[i] for i in chosen]), []
                total = torch.zeros((), device=self.args.device)
                fits = True
                for n, members in enumerate(passes):
                    rows = self.rows = [chosen[k] for k in members]
                    batch = judge.batch([encoded[i] for i in rows]) | {"votes": counts[rows], "prior": prior[rows], "weight": counts_here}
                    batch |= {"memory": memory[rows]} if own else {}
                    tokens = batch["input_ids"].numel()
                    try:  # processes exchange their gradients with the last pass only
                        with self.accelerator.no_sync(model) if n < len(passes) - 1 else contextlib.nullcontext():
                            total += super().training_step(model, batch, num_items_in_batch)
                    except torch.OutOfMemoryError:
                        fits = False
                        break
                if fits:
                    if config.prior == "model":
                        self.remember_step(step, counts_here)
                    return total
                model.zero_grad()  # the backward pass may have stopped half way: the whole step starts again
                judge.shrink(members, tokens)

        def remember_step(self, step: list[int], counts_here: float) -> None:
            """Every process remembers what all of them predicted for the items of this step."""
            place, q = {i: k for k, i in enumerate(step)}, memory.new_zeros(len(step), memory.shape[1] - 1)
            for rows, said in self.said:
                q[[place[i] for i in rows]] = counts_here * said.to(q)
            if self.args.world_size > 1:
                torch.distributed.all_reduce(q)
            remember(memory, step, q)

        def compute_loss(self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None) -> torch.Tensor:
            logq, _ = label_logprobs(model, inputs, judge.tokens)
            if not torch.isfinite(logq).all():
                bad = [self.rows[k] for k in (~torch.isfinite(logq)).any(1).nonzero()[:, 0].tolist()]
                raise self.diverged(f"the loss is not finite at step {self.state.global_step + 1}, for", bad)
            votes, pseudo = inputs["votes"], inputs["prior"]
            if config.prior == "model":
                self.said.append((self.rows, logq.detach().exp()))
            if own:  # none in the first epoch, or before the teacher's first step
                past = inputs["memory"]
                pseudo = pseudo.sum(-1, keepdim=True) * past[:, :-1] / past[:, -1:].clamp_min(1e-9)
            p, eps = votes / votes.sum(-1, keepdim=True), torch.full_like(votes[:, 0], config.eps)
            centre = p if own else shrink_votes(votes, pseudo)
            if config.radius == "annotators":
                eps = annotator_radius(votes, config.eps, None if own or config.prior == "none" else pseudo).to(eps.dtype)
            if config.adversary == "exact" and config.eps:
                worst = worst_case_exact(centre, logq, eps, config.ball)
            else:
                worst = worst_case(logq, centre, eps, config.steps, config.step_size)
            if own:  # the votes are moved, and what was predicted of them is added then
                worst = shrink_votes(votes.sum(-1, keepdim=True) * worst, pseudo)
            loss = inputs["weight"] * hybrid_loss(logq, p, config.alpha, worst, rps, scale).sum()
            return loss / num_items_in_batch * self.accelerator.num_processes  # processes average their gradients

        def diverged(self, what: str, rows: Sequence[int]) -> FloatingPointError:
            """Good is a checkpoint whose weights a later step has used, with a finite loss."""
            names = list(dict.fromkeys(short(ids[i]) for i in rows))
            good = [path for path in checkpoints_in(checkpoints) if int(path.name[5:]) < self.state.global_step]
            return FloatingPointError(f"{what} item{'s' * (len(names) > 1)} {', '.join(names[:8])}{', ...' * (len(names) > 8)}; "
                                      f"last good checkpoint: {good[0] if good else 'none'}")

        def check_weights(self) -> None:
            if not all(bool(torch.isfinite(w).all()) for w in self.model.parameters() if w.requires_grad):
                raise self.diverged(f"the weights are not finite after step {self.state.global_step}, of", self.step_items)

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            self.check_weights()
            if self.args.should_save:
                weights = {name: p for name, p in self.accelerator.unwrap_model(self.model).named_parameters() if p.requires_grad}
                progress = {"loss": self._tr_loss.item(), "logged": self._globalstep_last_logged, "pack_tokens": judge.pack_tokens}
                state = {"optimizer": self.optimizer.state_dict(), "schedule": self.lr_scheduler.state_dict(), "random": _random_states(),
                         "progress": progress, "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
                         "average": [average.number, *average.means], "memory": memory}
                save_checkpoint(checkpoints / f"step-{self.state.global_step:09d}", weights, state,
                                {"made_from": made_from, "trainer": dataclasses.asdict(self.state)})
                for old in checkpoints_in(checkpoints)[2:]:
                    shutil.rmtree(old)

        def _load_from_checkpoint(self, folder: str, model: Any = None) -> None:
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    if parameter.requires_grad:
                        parameter.copy_(weights[name])

        def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
            if folder:
                self.optimizer.load_state_dict(found["optimizer"])
                self.lr_scheduler.load_state_dict(found["schedule"])

        def _load_scaler(self, folder: str | None) -> None:
            if folder and self.accelerator.scaler:
                self.accelerator.scaler.load_state_dict(found["scaler"])

        def _load_rng_state(self, folder: str | None) -> None:
            if folder:
                _set_random_states(found["random"])

        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            with average.in_place() if config.prior == "teacher" else contextlib.nullcontext():
                q, mass, orders = judge_items(judge, eval_items)
            scores = evaluate(q, eval_items, train_items=items, label_mass=mass, ordered=config.ordered, floor_draws=0) | orders
            metrics = {f"eval_{name}": value for name, value in scores.items() if value is not None}
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    class Steps(transformers.TrainerCallback):
        """Tells the sampler its epoch, goes on counting where a checkpoint stopped, and stops after a step when a signal came."""

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            order.epoch = int((state.epoch or 0) + 1e-9)

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if resumed:
                trainer._tr_loss.fill_(found["progress"]["loss"])
                trainer._globalstep_last_logged = found["progress"]["logged"]
                judge.pack_tokens = found["progress"]["pack_tokens"]
                average.number, *means = found["average"]
                average.means = [mean.to(judge.device) for mean in means]
                memory.copy_(found["memory"])

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if on_step is not None:
                on_step(state.global_step)
            if signals:
                control.should_save, control.should_training_stop = bool(config.save_every), True

    class Log(transformers.TrainerCallback):
        """log.jsonl, a line a logged step."""

        def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                with open(Path(config.out) / "log.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")

    class Average(transformers.TrainerCallback):
        """A running mean of the trained weights, float32, over the last steps or as a teacher; in their place when training ends."""

        number, means = 0, ()

        def weights(self) -> list[torch.Tensor]:
            return [w.detach() for w in judge.model.parameters() if w.requires_grad]

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            share = 1.0 if config.prior == "teacher" else config.average
            if not share or state.global_step <= (1 - share) * state.max_steps:
                return
            weights = self.weights()
            self.means = self.means or [torch.zeros_like(w, dtype=torch.float32) for w in weights]
            rate = running_rate(self.number, TEACHER_POWER if config.prior == "teacher" else 1)
            for mean, weight in zip(self.means, weights, strict=True):
                mean += rate * (weight.float() - mean)
            self.number += 1

        def put(self, values: Sequence[torch.Tensor]) -> None:
            for weight, value in zip(self.weights(), values, strict=True):
                weight.copy_(value)

        @contextlib.contextmanager
        def in_place(self) -> Iterator[None]:
            """The mean in the weights' place while this is open, without dropout."""
            held, was_training = [w.clone() for w in self.weights()], judge.model.training
            self.put(self.means or held)
            judge.model.eval()
            try:
                yield
            finally:
                self.put(held)
                judge.model.train(was_training)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            early = state.global_step < state.max_steps
            if self.means and not (early and (signals or config.prior != "teacher")):  # a teacher can answer at any step
                self.put(self.means)

    class Progress(transformers.ProgressCallback):
        """The usual bar, with the loss in it and not a line under it."""

        def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
            if self.training_bar is not None and "loss" in (logs or {}):
                self.training_bar.set_postfix(loss=f"{logs['loss']:.4f}")

    on_cpu, amp = judge.device.type == "cpu", autocast_type(judge)
    order, average, signals, checkpoints = Order(), Average(), [], Path(config.out) / "checkpoints"
    made_from = _made_from(judge, items, eval_items, config)
    resumed, weights, found = (_newest_checkpoint(checkpoints, made_from) if config.resume else None) or (None, {}, {})
    settings = dict(
        output_dir=str(checkpoints), save_strategy="steps" if config.save_every else "no", save_steps=config.save_every or 1,
        report_to=list(config.report_to) or "none",
        per_device_train_batch_size=config.batch_size * config.grad_accum, gradient_accumulation_steps=1, num_train_epochs=config.epochs,
        optim=optimizer_for(judge, config), learning_rate=config.learning_rate, weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        lr_scheduler_type=config.schedule, warmup_steps=config.warmup, seed=config.seed, data_seed=config.seed,
        eval_strategy="steps" if config.eval_every and eval_items else "no", eval_steps=config.eval_every or None,
        logging_strategy="steps", logging_steps=config.log_every, logging_nan_inf_filter=False, use_cpu=on_cpu, bf16=amp == torch.bfloat16,
        fp16=amp == torch.float16, gradient_checkpointing_kwargs={"use_reentrant": False},
        gradient_checkpointing=config.gradient_checkpointing and judge.backend != "unsloth",  # Unsloth's is in its layers already
        remove_unused_columns=False, label_names=[], dataloader_num_workers=0, dataloader_pin_memory=False,
        ddp_find_unused_parameters=False, disable_tqdm=False)
    try:
        arguments = transformers.TrainingArguments(**settings)
        arguments._n_gpu = min(1, arguments.n_gpu)  # nn.DataParallel would split a pack's row numbers; torchrun is the way to more GPUs
        trainer = Trainer(model=judge.model, args=arguments, callbacks=[Steps(), Log(), average],
                          train_dataset=list(range(len(encoded))), eval_dataset=list(eval_items) or None,
                          data_collator=lambda chosen: {"chosen": torch.tensor(chosen)})
    except (ValueError, RuntimeError, ImportError) as error:  # an unknown schedule, a logger that is not installed
        raise InputError(f"training settings: {first_line(error)}") from error
    Path(config.out).mkdir(parents=True, exist_ok=True)
    if os.environ.get("RANK", "0") == "0":
        _start_log(Path(config.out) / "log.jsonl", resumed)
        if not config.resume:
            shutil.rmtree(checkpoints, ignore_errors=True)
    if trainer.pop_callback(transformers.ProgressCallback):  # notebooks have another, which stays
        trainer.add_callback(Progress)
    trainer.model_accepts_loss_kwargs = True  # compute_loss divides by the items of the whole step, so Trainer must not
    if threading.current_thread() is threading.main_thread():
        def note(number: int, frame: Any) -> None:
            signals.append(number)
            signal.signal(number, plain[number])  # a second one stops at once

        plain = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    else:
        plain = {}
    try:
        trainer.train(resume_from_checkpoint=resumed and str(resumed))
        trainer.check_weights()
    finally:  # takes off the wrapper that runs every forward in bfloat16, or judgments would differ after loading
        trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
        judge.packs, judge.pack_tokens = before
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, Progress) and callback.training_bar is not None:  # or an error's line would begin behind the bar
                callback.training_bar.close()
        for number, handler in plain.items():
            signal.signal(number, handler)
    judge.model.eval()
    if signals and trainer.state.global_step < trainer.state.max_steps:
        saved = f"a checkpoint is saved, --resume goes on from it ({config.out})" if config.save_every else "no checkpoint: save_every is 0"
        raise Stopped(f"stopped by {signal.Signals(signals[0]).name} after step {trainer.state.global_step} of "
                      f"{trainer.state.max_steps}; {saved}", signals[0])
    return trainer.state.log_history


# Checkpoints hold numbers only: tensors in safetensors, the rest in JSON. transformers' own would unpickle random states and more.
def _pack_state(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """A state of dicts, lists, numbers and tensors as JSON; its tensors go into `tensors` by number."""
    if isinstance(value, torch.Tensor):
        tensors[str(len(tensors))] = value.detach().cpu().contiguous()
        return {"tensor": len(tensors) - 1}
    if isinstance(value, dict):
        return {"dict": [[key, _pack_state(v, tensors)] for key, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_pack_state(v, tensors) for v in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")


def _unpack_state(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    (kind, content), = value.items()
    if kind == "tensor":
        return tensors[str(content)]
    if kind == "dict":
        return {key: _unpack_state(v, tensors) for key, v in content}
    return (tuple if kind == "tuple" else list)(_unpack_state(v, tensors) for v in content)


def _random_states() -> dict[str, Any]:
    import numpy

    name, keys, *rest = numpy.random.get_state()
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "numpy": (name, torch.from_numpy(keys.astype("int64")), *rest),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def _set_random_states(states: dict[str, Any]) -> None:
    import numpy

    name, keys, *rest = states["numpy"]
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    numpy.random.set_state((name, keys.numpy().astype("uint32"), *rest))
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _made_from(judge: Judge, items: Sequence[Item], eval_items: Sequence[Item], config: Config) -> dict[str, Any]:
    """What a run depends on, by name: resuming with anything else is refused."""
    rows = lambda some: _digest([(item.id, item.prompts, list(item.counts.values())) for item in some])  # noqa: E731
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(Config)
                if f.name not in ("out", "resume", "report_to", "save_every", "min_mass", "dry_run", "export", "push_to_hub")}
    named = {"labels": judge.labels, "label tokens": judge.tokens.sequences, "prompt template": judge.encoder.frame,
             "base model": judge.base, "base weights": _fingerprint(judge.model) if hasattr(judge.model, "peft_config") else None,
             "training items": rows(items), "test items": rows(eval_items), "processes": int(os.environ.get("WORLD_SIZE", 1)),
             "device": judge.device.type, "versions": versions()}
    named |= {name: value for name, value in settings.items() if name not in named}  # the labels are the judge's
    return json.loads(json.dumps(named))


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_checkpoint(folder: Path, weights: dict[str, torch.Tensor], state: dict[str, Any], about: dict[str, Any]) -> None:
    """Writes a checkpoint under a temporary name, makes sure it is on the disk, and renames it. Raises OSError, leaving nothing."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    part, tensors = folder.with_name(folder.name + ".part"), {}
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        (part / "state.json").write_text(json.dumps(_pack_state(state, tensors)), encoding="utf-8")
        save_file(tensors, part / "state.safetensors")
        save_file({name: w.detach().cpu().contiguous() for name, w in weights.items()}, part / "weights.safetensors")
        (part / "about.json").write_text(json.dumps(about["made_from"]), encoding="utf-8")
        (part / "trainer_state.json").write_text(json.dumps(about["trainer"], sort_keys=True), encoding="utf-8")
        sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(part.iterdir())}
        (part / "sha256.json").write_text(json.dumps(sums), encoding="utf-8")
        for path in (*part.iterdir(), part):
            _sync(path)
        shutil.rmtree(folder, ignore_errors=True)  # of the same step, when a run was stopped right after it
        part.rename(folder)
        _sync(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(f"{folder}: the checkpoint cannot be written: {first_line(error)}; earlier ones are whole") from None


def load_checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, Any]]:
    """(weights, state, what it was made from). Raises InputError for a file that is missing, cut or changed."""
    from safetensors.torch import load_file

    try:
        sums = json.loads((folder / "sha256.json").read_text(encoding="utf-8"))
        for name in ("state.json", "state.safetensors", "weights.safetensors", "about.json", "trainer_state.json"):
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != sums[name]:
                raise InputError(f"{folder / name}: is damaged: its checksum is another")
        state = _unpack_state(json.loads((folder / "state.json").read_text(encoding="utf-8")), load_file(folder / "state.safetensors"))
        return load_file(folder / "weights.safetensors"), state, json.loads((folder / "about.json").read_text(encoding="utf-8"))
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: is no whole checkpoint: {first_line(error)}") from None


def checkpoints_in(folder: Path) -> list[Path]:
    """Finished checkpoints, the newest first."""
    return sorted((path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{9}", path.name)), reverse=True)


def _newest_checkpoint(folder: Path, made_from: dict[str, Any]) -> tuple[Path, dict[str, torch.Tensor], dict[str, Any]] | None:
    """(folder, weights, state) of the newest whole checkpoint of this very run, None where there are no checkpoints.

    Raises InputError if none is whole, or if it is another run's.
    """
    found = checkpoints_in(folder)
    if not found:
        log.warning("%s: no checkpoint yet: starting from the beginning", folder)
        return None
    for path in found:
        try:
            weights, state, then = load_checkpoint(path)
        except InputError as error:
            log.warning("%s; trying the one before", error)
            continue
        if different := [name for name in {**then, **made_from} if then.get(name) != made_from.get(name)]:
            name = different[0]
            raise InputError(f"resume: {path}: {name} differs: {short(then.get(name))} then, {short(made_from.get(name))} now"
                             + (f"; so do {', '.join(different[1:])}" if different[1:] else ""))
        return path, weights, state
    raise InputError(f"{folder}: resume: none of its checkpoints is whole")


def _start_log(path: Path, resumed: Path | None) -> None:
    """Empties the log, or takes off what was logged after the checkpoint."""
    kept = []
    if resumed and path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, KeyError):
                if json.loads(line)["step"] <= int(resumed.name[5:]):
                    kept.append(line)
    write_lines(path, kept)


# ---------------------------------------------------------------------------------------------------------------------
# 8. Metrics
# ---------------------------------------------------------------------------------------------------------------------
def _moments(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(N, 5): what a correlation of a and b needs of each item. Centred first, for rounding's sake."""
    a, b = a - a.mean(), b - b.mean()
    return torch.stack([a, b, a * a, b * b, a * b], -1)


def correlation(mean: torch.Tensor) -> torch.Tensor:
    """Pearson's correlation from mean moments (..., 5) -> (...). NaN for a constant, which correlates with nothing."""
    a, b, aa, bb, ab = mean.unbind(-1)
    spread = ((aa - a * a).clamp_min(0) * (bb - b * b).clamp_min(0)).sqrt()
    return torch.where(spread > 1e-14, (ab - a * b) / spread, math.nan)


def kl_divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats a row, q raised to KL_FLOOR first, so that a label ruled out costs at most 13.8 nats a vote."""
    return kl_loss(q.clamp_min(KL_FLOOR).log(), p)


def marginal_distribution(items: Sequence[Item]) -> torch.Tensor:
    """The mean human distribution over items, (C,): the best constant prediction for the mean KL over those items."""
    counts = counts_of(items)
    return (counts / counts.sum(1, keepdim=True)).mean(0)


def golden_section(cost: Callable[[float], float], low: float, high: float, steps: int = 40) -> float:
    """Where a function of one number with a single minimum between low and high has it, to (high - low) * 0.618^steps."""
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(steps):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if cost(left) < cost(right) else (left, high)
    return (low + high) / 2


def fit_concentration(counts: torch.Tensor, means: torch.Tensor | None = None) -> float | None:
    """The concentration k of a Dirichlet prior k m, m the pooled vote shares, by the Dirichlet-multinomial likelihood.

    counts (N, C). Maximum over 0.01 <= k <= 10,000 by golden-section search in log k. None where votes say nothing of k:
    no item has two votes. `means` (N, C), positive, gives each item an m of its own.
    Source: Minka, "Estimating a Dirichlet distribution" (2000), without its Newton steps.
    """
    several = counts.sum(1) > 1.5
    counts = counts[several]
    if not len(counts):
        return None
    mean = (counts.sum(0) + 1e-3) / (counts.sum() + 1e-3 * counts.shape[1]) if means is None else means[several].to(counts)

    def likelihood(log_k: float) -> float:
        k = math.exp(log_k)
        n = counts.sum(1)
        total = k * mean.sum(-1)
        by_item = (torch.lgamma(counts + k * mean) - torch.lgamma(k * mean)).sum(1) + torch.lgamma(total) - torch.lgamma(n + total)
        return by_item.sum().item()

    return math.exp(golden_section(lambda log_k: -likelihood(log_k), math.log(1e-2), math.log(1e4)))


def noise_floor(items: Sequence[Item], draws: int = 200, seed: int = 0) -> float | None:
    """What the true distributions themselves would score: the mean KL(panel || truth) of panels of the items' sizes, nats.

    By simulation, `draws` panels an item. The truth is an item's `truth` where known. Where not, each draw takes one from
    the posterior Dirichlet(counts + k m) (see fit_concentration) and a second panel from that: the item's own votes taken
    as truth would put the floor too low, for few votes look more certain than people are. About (C - 1) / (2 n) for many
    votes n. None if truths are unknown and no item has two votes.
    """
    counts = counts_of(items)
    k, truth = None, truths_of(items)
    if truth is None:
        k = fit_concentration(counts)
        if k is None:
            return None
        shape = counts + k * marginal_distribution(items).clamp_min(1e-9)
    total = 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(draws):
            pi = truth if k is None else torch.distributions.Dirichlet(shape).sample()
            panel, left, rest = torch.zeros_like(pi), counts.sum(1).round(), torch.ones(len(pi), dtype=torch.float64)
            for c in range(pi.shape[1]):  # a multinomial draw as a chain of binomial ones: its time does not grow with the votes
                share = (pi[:, c] / rest.clamp_min(1e-300)).clamp(0, 1) if c < pi.shape[1] - 1 else torch.ones_like(rest)
                panel[:, c] = torch.binomial(left, share)
                left, rest = left - panel[:, c], rest - pi[:, c]
            panel = panel / panel.sum(1, keepdim=True)
            total += kl_loss(pi.clamp_min(1e-30).log(), panel).mean().item()
    return total / draws


def item_scores(predicted: Any, items: Sequence[Item], ordered: bool | None = None) -> dict[str, torch.Tensor]:
    """What evaluate() averages, an item at a time: (N,) float64, or (N, 5) moments for the correlations (see bootstrap).

    Raises InputError for a wrong shape, negative or NaN probabilities, or rows that do not add up to 1 within 1e-3.
    """
    labels = labels_of(items)
    q = torch.as_tensor(predicted).detach().double().cpu()
    if q.shape != (len(items), len(labels)):
        raise InputError(f"predicted: shape {tuple(q.shape)}, expected {(len(items), len(labels))}: items, labels")
    off = torch.isnan(q).any(1) | (q < 0).any(1) | ((q.sum(1) - 1).abs() > 1e-3)
    if off.any():
        raise InputError(f"predicted: row {int(off.nonzero()[0])} is no distribution: {q[off][0].tolist()}")
    q = q / q.sum(1, keepdim=True)
    counts = counts_of(items)
    p = counts / counts.sum(1, keepdim=True)
    middle = (p + q) / 2
    out = {"kl": kl_divergence(p, q)}
    truth = truths_of(items)
    if truth is not None:
        out["kl_truth"] = kl_divergence(truth, q)
    out |= {"accuracy": (majority(p) * majority(q)).sum(1),
            "js_divergence": entropy(middle) - (entropy(p) + entropy(q)) / 2,
            "total_variation": (p - q).abs().sum(1) / 2,
            "brier": 1 - 2 * (p * q).sum(1) + (q**2).sum(1),
            "entropy_correlation": _moments(entropy(p), entropy(q))}
    if are_numeric(labels) if ordered is None else ordered:
        values = torch.tensor([float(label) for label in labels] if are_numeric(labels) else list(range(len(labels))), dtype=torch.float64)
        values, along = values.sort()  # the scale's order, whatever that of the columns
        p, q = p[:, along], q[:, along]
        below_p, below_q = p.cumsum(1)[:, :-1], q.cumsum(1)[:, :-1]
        out["emd"] = (below_p - below_q).abs() @ values.diff().abs()
        out["rps"] = ((below_q - below_p) ** 2 + below_p * (1 - below_p)).sum(1)
        out["mean_correlation"] = _moments(p @ values, q @ values)
    return out


def entropy(q: Any) -> torch.Tensor:
    """-sum_c q_c log q_c in nats: (N, C) -> (N,), float64. 0 for a sure judge, log C for one that knows nothing."""
    q = torch.as_tensor(q).double()
    return -torch.xlogy(q, q).sum(-1)


def mean_rating(q: Any, labels: Sequence[str]) -> torch.Tensor:
    """sum_c q_c value_c, the value of a label being its number: (N, C) -> (N,), float64. Raises InputError for other labels.

    >>> mean_rating([[0.5, 0.0, 0.5]], ["1", "2", "5"])
    tensor([3.], dtype=torch.float64)
    """
    if not are_numeric(labels):
        raise InputError(f"labels: {listed(labels)} are no numbers, so they have no mean")
    return torch.as_tensor(q).double() @ torch.tensor([float(label) for label in labels], dtype=torch.float64)


def modes(q: Any, labels: Sequence[str]) -> list[str]:
    """The most probable label of each row, (N, C) -> N labels; of labels that tie, the first."""
    return [labels[c] for c in torch.as_tensor(q).argmax(-1).tolist()]


def credible_sets(q: Any, labels: Sequence[str], level: float = 0.9) -> list[list[str]]:
    """For each row the smallest set of labels that hold at least `level` of the probability: (N, C) -> N lists, in label order.

    Labels are taken from the most probable down (of those that tie, the first ones), until their sum reaches level - 1e-6: float32
    probabilities of 0.7 and 0.2 make 0.9. Raises InputError unless 0 < level <= 1.

    >>> credible_sets([[0.3, 0.1, 0.6]], ["a", "b", "c"], 0.9)
    [['a', 'c']]
    """
    if not 0 < level <= 1:
        raise InputError(f"level: must be above 0 and at most 1, not {level}")
    ranked, order = torch.as_tensor(q).double().sort(dim=-1, descending=True, stable=True)
    needed = (ranked.cumsum(-1) < level - 1e-6).sum(-1) + 1
    return [[labels[c] for c in sorted(row[:n])] for row, n in zip(order.tolist(), needed.tolist(), strict=True)]


def bootstrap(scores: torch.Tensor, other: torch.Tensor | None = None, groups: Sequence[Any] | None = None, draws: int = 2000,
              seed: int = 0, level: float = 0.95) -> dict[str, float | None]:
    """A mean over items with its confidence interval; with `other`, the difference of two methods, scores - other.

    scores, other: (S, N), S training runs on the same N items in the same order, one metric of item_scores; for its correlations
    (S, N, 5). groups: N names; items of one group are drawn together, those with None alone.
    -> mean, low, high (at `level`) and p, two-sided, for a true value of zero; None with fewer than two groups.

    Groups of items are drawn with replacement, the same ones for both methods, and the draws spread out by sqrt(G / (G - 1)),
    for samples of a few groups vary too little. Where there are several runs, each draw adds Student's t with S - 1 degrees of
    freedom times the standard error over runs (runs paired: the i-th of both share a seed), for five seeds are too few to be drawn
    from. So the interval speaks of new items and new seeds, or with one run of new items only. Source: Efron and Tibshirani
    (1993), chapters 6, 13 and 16. Raises ValueError for unequal shapes.
    """
    if scores.dim() not in (2, 3) or (other is not None and other.shape != scores.shape):
        raise ValueError(f"scores: (S, N) or (S, N, 5), two methods alike, not {[list(s.shape) for s in (scores, other) if s is not None]}")
    both = [s.double() if s.dim() == 3 else s.double()[..., None] for s in (scores, other) if s is not None]
    runs, items = scores.shape[:2]
    names = [i if g is None else ("group", g) for i, g in enumerate(groups or [None] * items)]
    place = {name: g for g, name in enumerate(dict.fromkeys(names))}
    at, size = torch.tensor([place[name] for name in names]), len(place)
    weight = torch.zeros(size, dtype=torch.float64).index_add(0, at, torch.ones(items, dtype=torch.float64))
    sums = [torch.zeros(size, *s.movedim(1, 0).shape[1:], dtype=torch.float64).index_add(0, at, s.movedim(1, 0)) for s in both]

    def value(times: torch.Tensor) -> torch.Tensor:
        """(draws, G): how often each group was drawn -> (draws, S)."""
        means = [torch.einsum("dg,gsk->dsk", times, s) / (times @ weight)[:, None, None] for s in sums]
        found = [correlation(m) if scores.dim() == 3 else m[..., 0] for m in means]
        return found[0] - (found[1] if len(found) > 1 else 0.0)

    by_run = value(torch.ones(1, size, dtype=torch.float64))[0]
    mean = by_run.mean().item()
    if size < 2 or math.isnan(mean):
        return {"mean": None if math.isnan(mean) else mean, "low": None, "high": None, "p": None}
    draw, drawn = torch.Generator().manual_seed(seed), []
    for _ in range(0, draws, 100):
        chosen = torch.randint(size, (min(100, draws - len(drawn) * 100), size), generator=draw)
        times = torch.zeros(len(chosen), size, dtype=torch.float64).scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.float64))
        drawn.append(value(times).mean(1))
    found = mean + (torch.cat(drawn).nan_to_num(mean) - mean) * math.sqrt(size / (size - 1))
    if runs > 1:
        normal = torch.randn(runs, draws, generator=draw, dtype=torch.float64)
        found = found + by_run.std() / math.sqrt(runs) * normal[0] / (normal[1:] ** 2).mean(0).sqrt()
    low, high = found.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    tail = min((found <= 0).sum().item(), (found >= 0).sum().item())
    return {"mean": mean, "low": low, "high": high, "p": min(1.0, 2 * (tail + 1) / (draws + 1))}


def evaluate(predicted: Any, items: Sequence[Item], *, train_items: Sequence[Item] | None = None, label_mass: Any = None,
             ordered: bool | None = None, floor_draws: int = 200, seed: int = 0) -> dict[str, float | None]:
    """Compares predicted distributions (N, C), columns in label order, with the votes. Plain numbers; None: undefined.

    Means over items (p: votes as shares, q: predicted):
      kl                  KL(p || q) in nats, q raised to KL_FLOOR = 1e-6
      kl_noise_floor      what the true distributions would score (see noise_floor), with floor_draws > 0
      kl_corrected        kl - kl_noise_floor, an estimate of KL(truth || q): few votes look more certain than people are, and what
                          that adds to kl is the same for every q, so differences between judges need no correction
      kl_marginal         what the training marginal would score (of these items, an oracle, without train_items)
      kl_truth            KL(truth || q), where every item's truth is known
      accuracy            top label = majority label; a k-fold tie on either side counts 1/k for each label that agrees
      js_divergence       Jensen-Shannon divergence in nats (0 .. log 2; SciPy's jensenshannon is its root)
      total_variation     sum |p - q| / 2
      brier               mean over single votes of sum_c (q_c - [vote = c])^2
      entropy_correlation Pearson, entropies of p and q over items
      label_mass, label_mass_min   full-vocabulary probability of the labels together, mean and minimum
    and for ordered labels (by default: if all are numbers; distances then follow their values, else 1 a step)
      emd                 earth mover's (Wasserstein-1) distance
      rps                 ranked probability score, mean over single votes of sum_k (Q_k - [vote <= k])^2, k < C
      mean_correlation    Pearson, mean ratings over items
    Raises InputError for a wrong shape, negative or NaN probabilities, or rows that do not add up to 1 within 1e-3.
    """
    scores = item_scores(predicted, items, ordered)
    counts = counts_of(items)
    p = counts / counts.sum(1, keepdim=True)
    value = lambda x: (correlation(x.mean(0)) if x.dim() == 2 else x.mean()).item()  # noqa: E731
    means = {name: None if math.isnan(value(score)) else value(score) for name, score in scores.items()}
    floor = noise_floor(items, floor_draws, seed) if floor_draws else None
    out: dict[str, float | None] = {
        "items": len(items),
        "kl": means["kl"],
        "kl_noise_floor": floor,
        "kl_corrected": None if floor is None else means["kl"] - floor,
        "kl_marginal": kl_divergence(p, marginal_distribution(train_items or items).expand_as(p)).mean().item(),
        "kl_truth": None,
    }
    if label_mass is not None:
        mass = torch.as_tensor(label_mass).double()
        out |= {"label_mass": mass.mean().item(), "label_mass_min": mass.min().item()}
    return out | means


# ---------------------------------------------------------------------------------------------------------------------
# 9. A run: from files to a folder that holds everything
# ---------------------------------------------------------------------------------------------------------------------
def write_json(path: Path, content: Any) -> None:
    """Writes to a temporary name and renames, so that a file is whole or not there."""
    write_lines(path, [json.dumps(content, indent=1, ensure_ascii=False)])


def write_lines(path: Path, lines: Iterable[str]) -> None:
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "w", encoding="utf-8") as file:
        for line in lines:
            file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_data(config: Config) -> tuple[list[Item], list[Item]]:
    """Training and test items of a run, with one label order, apart from each other."""
    if not config.train:
        raise InputError("train: name a file of training items")
    labels = list(config.labels) or None
    items = load_items(*config.train, labels=labels)
    if config.test:
        test = load_items(*config.test, labels=labels or labels_of(items), complete=labels is None)
        for side, other, wrong in ((items, "test", "--test names the test items"), (test, "train", "--train names the training items")):
            if misplaced := [item for item in side if item.split == other]:
                raise InputError(f"{misplaced[0].where}: item '{short(misplaced[0].id)}': split: is {other}, but {wrong}")
        check_apart(items, test)
        return items, test
    if any(item.split for item in items):
        unplaced = [item for item in items if not item.split]
        if unplaced:
            raise InputError(f"{unplaced[0].where}: item '{short(unplaced[0].id)}': split: missing, though other items have one")
        items, test = [i for i in items if i.split == "train"], [i for i in items if i.split == "test"]
        if not items or not test:
            raise InputError(f"{config.train[0]}: split: there must be both train and test items")
        check_apart(items, test)
        return items, test
    try:
        return split_items(items, seed=config.seed)
    except InputError as error:
        raise InputError(f"{', '.join(config.train)}: {error}") from None


def parse_spellings(pairs: Sequence[str]) -> dict[str, list[str]]:
    """["contradiction=contra,contradict"] -> {"contradiction": ["contra", "contradict"]}."""
    wrong = [pair for pair in pairs if "=" not in pair]
    if wrong:
        raise InputError(f"spellings: '{wrong[0]}' is not LABEL=TEXT,TEXT")
    return {pair.split("=", 1)[0]: pair.split("=", 1)[1].split(",") for pair in pairs}


def keep_short(judge: Judge, items: Sequence[Item], overlong: str, what: str) -> list[Item]:
    """The items whose prompts fit judge.max_length; with overlong = "error" raises InputError if any does not."""
    lengths: list[int] = []
    for start in range(0, len(items), 2048):
        encoded = iter(judge.encoder.many([prompt for item in items[start : start + 2048] for prompt in item.prompts]))
        lengths += [max(len(next(encoded)) for _ in item.prompts) for item in items[start : start + 2048]]
    over = [i for i, length in enumerate(lengths) if length > judge.max_length]
    if over and overlong == "error":
        first = items[over[0]]
        raise InputError(f"{first.where}: item '{short(first.id)}': prompt: {lengths[over[0]]} tokens; {len(over)} of {len(items)} {what} "
                         f"items are longer than max_length {judge.max_length} (the longest has {max(lengths)}); raise --max_length "
                         "or use --overlong drop")
    if over:
        print(f"dropped {len(over)} of {len(items)} {what} items longer than {judge.max_length} tokens")
    kept = [item for i, item in enumerate(items) if lengths[i] <= judge.max_length]
    if not kept:
        raise InputError(f"no {what} items are left within max_length {judge.max_length}")
    return kept


def versions() -> dict[str, str]:
    from importlib import metadata

    found = {"distjudge": __version__, "python": sys.version.split()[0]}
    for name in ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "unsloth", "trl", "datasets"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def average_orders(first: torch.Tensor, second: torch.Tensor, back: Sequence[int]) -> tuple[torch.Tensor, bool]:
    """The mean of a pair's predictions (C,) in both orders, the second one's labels mapped back (Swap.labels), and whether the top
    labels differ."""
    second = second[list(back)]
    return (first + second) / 2, bool(first.argmax() != second.argmax())


def judge_items(judge: Judge, items: Sequence[Item], progress: bool = False) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """Probabilities (N, C), label masses (N,) and what the order of pairs did: {} where no item is a pair.

    A pair is judged in both orders and gets the mean, of the masses too. order_flips: the share of pairs whose top label
    changes with the order; order_variation: the mean total variation between the two.
    """
    logq, mass = judge.score([prompt for item in items for prompt in item.prompts], progress)
    q, masses, flips, apart, k = [], [], [], [], 0
    for item in items:
        one = logq[k].exp()
        if item.swap:
            first = one
            one, flipped = average_orders(first, logq[k + 1].exp(), item.swap.labels)
            flips.append(flipped)
            apart.append((first - one).abs().sum().item())  # half of what lies between the orders
        q.append(one)
        masses.append(mass[k : k + len(item.prompts)].mean())
        k += len(item.prompts)
    found = {"order_flips": sum(flips) / len(flips), "order_variation": sum(apart) / len(apart)} if flips else {}
    return torch.stack(q), torch.stack(masses), found


def write_results(judge: Judge, items: Sequence[Item], train_items: Sequence[Item], config: Config, folder: str | os.PathLike) -> dict:
    """Judges the items and writes predictions.jsonl, metrics.json and config.json into the folder; returns the metrics."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    probabilities, mass, orders = judge_items(judge, items, progress=True)
    rows = []
    for item, q, m in zip(items, probabilities.tolist(), mass.tolist(), strict=True):
        row = {"id": item.id, "counts": item.counts, "predicted": dict(zip(judge.labels, q, strict=True)), "label_mass": m}
        row |= {"prompt": item.prompt} | ({"group": item.group} if item.group is not None else {})
        rows.append(json.dumps(row | ({"truth": item.truth} if item.truth else {}), ensure_ascii=False))
    write_lines(folder / "predictions.jsonl", rows)
    metrics = evaluate(probabilities, items, train_items=train_items, label_mass=mass, ordered=config.ordered, seed=config.seed) | orders
    write_json(folder / "metrics.json", metrics)
    prompt_hash = _prompt_hash(judge.encoder.frame, judge.tokens.sequences)
    resolved = {"labels": judge.labels, "prompt_hash": prompt_hash, "versions": versions(), "items": {"train": len(train_items),
                "test": len(items)}, "votes": {"train": sum(i.votes for i in train_items), "test": sum(i.votes for i in items)}}
    write_json(folder / "config.json", dataclasses.asdict(config) | resolved)
    return metrics


ASSUMED_RATES = {"cuda": 50e12, "cpu": 0.1e12}  # FLOP/s, for a first idea of how long a run takes


def _sizes(model: Any) -> dict[int, int]:
    """The number of weights of each parameter, by its id; 4-bit matrices are held packed and count as what they stand for."""
    sizes = {id(p): p.numel() for p in model.parameters()}
    return sizes | {id(m.weight): m.in_features * m.out_features for m in model.modules() if isinstance(m, torch.nn.Linear)}


def estimate_memory(judge: Judge, config: Config, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """An estimate of the most memory that training takes, in bytes by what takes it; batch: its largest pass, see Judge.batch().

    For decoders of Llama's kind. With b bytes a number computed with (2 in 16 bits, 4 in float32) and L tokens in the pass:
      weights      4-bit matrices n/2 and, quantized twice, a byte for 64 weights and a float32 for 256 of those; all others, embeddings
                   and the output layer among them, as they are held
      training     trained weights, their gradients and AdamW's two moments, in float32 or, the moments, 8 bits; a mean of the weights;
                   where all weights are trained in 16 bits, autocast's copies of the matrices
      activations  what layers keep for the backward pass, all of them or, recomputed, one beside every layer's input: b L (inputs of
                   the matrices, once for each where adapters cast them to 16 bits, + 3 widths of the MLP + queries and outputs of
                   attention + ranks of the adapters) + 4 L (inputs of the norms) + for each block of queries its mask and the keys and
                   values it sees (see block_attention); and the gradients of one MLP
      label rows   the answers' hidden states, and one slice of the output layer with its logits (see add_label_readout), float32
      the rest     the largest matrix in b bytes (4-bit ones are unpacked one by one), and 1 GiB for CUDA's context, for workspaces and
                   fragmentation: a guess
    Unsloth keeps less. Weights are exact and what layers keep is what autograd saves on a CPU; nothing was measured on a GPU.
    """
    model, half, sizes = judge.model, autocast_type(judge) is not None, _sizes(judge.model)
    shape, adapters, b = model.config.get_text_config(), hasattr(model, "peft_config"), 2 if half else 4
    own = [m for m in model.get_decoder().modules() if isinstance(m, torch.nn.Linear) and m.weight.requires_grad is not adapters]
    packed = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not model.get_output_embeddings()}
    packed = packed if getattr(model, "is_loaded_in_4bit", False) else set()
    weights = sum(sizes[id(p)] * (0.5 + 1 / 64 + 4 / 64 / 256 if id(p) in packed else p.element_size())
                  for p in model.parameters() if not p.requires_grad)
    moments = 2 if "8bit" in optimizer_for(judge, config) else 8
    mean = 4 * bool(config.average or config.prior == "teacher")
    training = sum(p.numel() for p in model.parameters() if p.requires_grad) * (8 + moments + mean)
    training += 2 * sum(sizes[id(m.weight)] for m in own) * (half and not adapters)
    hidden, layers, heads = shape.hidden_size, shape.num_hidden_layers, shape.num_attention_heads
    mlp, kv_heads = getattr(shape, "intermediate_size", None) or 4 * hidden, getattr(shape, "num_key_value_heads", None) or heads
    width = heads * (getattr(shape, "head_dim", None) or hidden // heads)
    inputs = sum(m.in_features for m in own) / layers if half else 2 * hidden + width + mlp
    ranks = sum(p.shape[0] for name, p in model.named_parameters() if "lora_A" in name) / layers
    times = {"q_norm": heads, "k_norm": kv_heads}  # these are of one head's width
    norms = sum(p.numel() * times.get(name.split(".")[-2], 1) for name, p in model.named_parameters() if name.endswith("norm.weight"))
    rows, length = batch["input_ids"].shape
    tokens, keys, mask = rows * length, rows * length, rows * length**2
    if "ends" in batch:
        size, ends = block_length(judge.device), batch["ends"][0]
        blocks = [(min(size, length - s), min(size, length - s) + int((ends[:s] > s).sum())) for s in range(0, length, size)]
        keys, mask = sum(seen for _, seen in blocks), sum(queries * seen for queries, seen in blocks)
    layer = b * (tokens * (inputs + 3 * mlp + 2 * width + ranks) + 2 * width * keys + mask) + 4 * tokens * norms / layers
    kept = layer + layers * b * tokens * hidden if config.gradient_checkpointing else layers * layer
    answers = len(batch["answer_at"])
    return {"weights": weights, "training": training, "activations": kept + 3 * b * tokens * mlp,
            "label rows": 4 * (3 * answers * hidden + SLICE * hidden + 3 * min(SLICE_LOGITS, answers * SLICE)),
            "the rest": b * max((sizes[id(m.weight)] for m in own), default=0) + 2**30}


def plan_lines(judge: Judge, items: Sequence[Item], test: Sequence[Item], config: Config) -> dict[str, str]:
    """What run() prints before the first step, a text a name: settings with their reasons, labels, tokens, memory, time.

    Goes through the first epoch as train() will, pass for pass, of several processes (torchrun) for the share of the first; counts are
    exact but for Unsloth's packs, which a dry run plans like the others. Memory and time are estimates.
    """
    model, on, adapters = judge.model, judge.device.type, hasattr(judge.model, "peft_config")
    encoded = judge.encode([item.prompt for item in items] + [item.swap.prompt for item in items if item.swap and config.swap])
    order, step, sizes, largest = epoch_order(encoded, config, 0), config.batch_size * config.grad_accum, [], {}
    for start in range(0, len(order), step):
        chosen = [encoded[i] for i in order[start : start + step]]
        chosen = chosen[: -(-len(chosen) // int(os.environ.get("WORLD_SIZE", 1)))]
        for members in judge.plan(chosen):
            batch = judge.batch([chosen[i] for i in members], "cpu")
            sizes.append(batch["input_ids"].numel())
            largest = batch if not largest or sizes[-1] > largest["input_ids"].numel() else largest
    computed, steps = sum(sizes), math.ceil(math.ceil(len(order) / step) * config.epochs)
    four_bit, implementation = getattr(model, "is_loaded_in_4bit", False), model.config.get_text_config()._attn_implementation
    held = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    card, flop_rate = on == "cuda" and torch.cuda.is_available(), ASSUMED_RATES[on]
    why = {"bfloat16": f"the card {'has it' if card else 'is assumed to have it'}", "float16": "the card has no bfloat16"}.get(
        held, "on a CPU" if on == "cpu" else "all weights are trained" if not adapters else "float16 is too narrow for this model")
    why_optimizer = "asked for" if config.optimizer != "auto" else f"weights are {'' if four_bit and on == 'cuda' else 'not '}4-bit on CUDA"
    trained, total = sum(p.numel() for p in model.parameters() if p.requires_grad), sum(_sizes(model).values())
    memory = estimate_memory(judge, config, largest)
    needed, there, place = sum(memory.values()) / 2**30, math.inf, "no card here to compare with"
    if card:
        there, place = torch.cuda.get_device_properties(judge.device).total_memory / 2**30, torch.cuda.get_device_name(judge.device)
    elif on == "cpu":
        import psutil

        there, place = psutil.virtual_memory().total / 2**30, "main memory"
    if needed > there:
        log.warning("the estimate of memory is more than there is: try a lower --pack_tokens, --gradient_checkpointing or --four_bit")
    turns = (2 if adapters else 3) + config.gradient_checkpointing  # forward, backward to activations, to weights, forward again
    turns += config.prior == "teacher"  # its forward
    flop = 2.0 * turns * computed * config.epochs * (1 + (config.prior == "crossfit")) * sum(
        m.in_features * m.out_features for m in model.get_decoder().modules() if isinstance(m, torch.nn.Linear))
    head, *labels = judge.tokens.describe(judge.tokenizer).removeprefix("labels are ").split("\n  ")
    return {
        "backend": f"{judge.backend} ({model.backend_reason})",
        "model": f"{config.model}: {(total - trained * adapters) / 1e9:.3g} billion weights" + (
            f", none of them loaded, planned for {'CUDA' if on == 'cuda' else 'a CPU'}" if hasattr(model, "meant_for") else ""),
        "weights": ("4-bit (NF4, quantized twice); embeddings, output layer and norms " if four_bit else "") + f"{held} ({why})",
        "trained": f"{trained:,} weights in float32: " + (f"LoRA of rank {config.lora_rank} on " + ", ".join(sorted(
            model.peft_config["default"].target_modules)) if adapters else "all"),
        "optimizer": f"{optimizer_for(judge, config)} ({why_optimizer}), learning rate {config.learning_rate:g}, {config.schedule}",
        "passes": f"{'packs' if judge.packs else 'padded rows'} of at most {judge.pack_tokens:,} tokens ("
                  f"{'asked for' if config.pack_tokens else 'the default on ' + on}), attention by "
                  + ("Unsloth" if getattr(model, "two_levels", False) else {BLOCKS: "SDPA in blocks"}.get(implementation, implementation))
                  + ", layers recomputed in the backward pass" * config.gradient_checkpointing,
        "labels": f"{head}: {', '.join(labels)}",
        "items": f"{len(items):,} to train on{f' (and {len(encoded) - len(items):,} turned round)' * (len(encoded) > len(items))}, "
                 f"{len(test):,} to test on, prompts of up to {max(map(len, encoded)):,} tokens",
        "tokens": f"{sum(map(len, encoded)):,} an epoch, {computed:,} after packing, in {len(sizes):,} passes of up to {max(sizes):,}",
        "memory": f"about {needed:.1f} GiB by estimate, {place if there == math.inf else f'of {there:.1f} ({place})'}: "
                  + ", ".join(f"{name} {size / 2**30:.2f}" for name, size in memory.items()),
        "time": f"{steps:,} steps of {step} items, {flop / 1e15:.2g} PFLOP: {datetime.timedelta(seconds=math.ceil(flop / flop_rate))} at "
                f"{flop_rate / 1e12:g} TFLOP/s, an assumption: the progress bar will know better"}


def check_mass(judge: Judge, items: Sequence[Item], least: float) -> str:
    """Says how much of the untrained model's probability the labels hold on the first 16 items, and warns under 50 %.

    Raises InputError under `least`: the model has something else to say, and training, which moves the labels only against each
    other, does not teach it otherwise.
    """
    mass = judge.score([item.prompt for item in items[:16]])[1]
    said = f"{mass.mean():.2%} of the model's probability on the first {len(mass)} items ({mass.min():.2%} to {mass.max():.2%})"
    if mass.mean() < least:
        raise InputError(f"label mass: the labels hold {said}, less than min_mass {least:g}: it would say something else. Does the prompt "
                         "ask for the label alone, and is that split as above? Name other --spellings; --min_mass 0 trains all the same")
    if mass.mean() < 0.5 and least:
        log.warning("label mass: under a half: the model would rather say something else; see the prompt, and name other --spellings")
    return said


def run(config: Config) -> dict[str, float | None]:
    """Loads, trains, judges the test items and fills the run folder; returns the metrics.

    The folder then holds config.json (resolved, with versions), judge.json, adapter/ or model/, tokenizer/, predictions.jsonl,
    metrics.json, log.jsonl, README.md (a model card) and what config.export asks for; load_judge(folder) brings the judge back. Under
    torchrun the first process does the writing, and the others return {}. Before the first step it prints what it is about to do (see
    plan_lines), with config.dry_run nothing else: then it needs no weights, writes nothing and returns {}. Raises InputError before
    training for what cannot be used, exports and uploads included, ExportError for those that fail after all.
    """
    config.check()
    items, test = load_data(config)
    after = after_training(needed=config.export != "none" or bool(config.push_to_hub))
    if config.dry_run and (config.export != "none" or config.push_to_hub):
        print("export, push_to_hub: whether they can be done is not looked at in a dry run")
    elif after and os.environ.get("LOCAL_RANK", "0") == "0":
        after.check(config.export, config.push_to_hub, config.model, config.lora_rank > 0, config.backend)
    judge = load_judge(config.model, labels_of(items), spellings=parse_spellings(config.spellings), lora_rank=config.lora_rank,
                       lora_alpha=config.lora_alpha, four_bit=config.four_bit, max_length=config.max_length, top_k=config.top_k,
                       seed=config.seed, backend=config.backend, gradient_checkpointing=config.gradient_checkpointing,
                       weights=not config.dry_run)
    judge.packs, judge.pack_tokens = judge.packs and config.packs, config.pack_tokens or judge.pack_tokens
    judge.encoder.memo = {}  # every prompt is tokenized once, for its length, the plan and training
    items, test = keep_short(judge, items, config.overlong, "training"), keep_short(judge, test, config.overlong, "test")
    lines, first = plan_lines(judge, items, test, config), os.environ.get("RANK", "0") == "0"
    if first:  # of several processes (torchrun) the first does the talking and writes the folder
        print("\n".join(f"{name:<11} {text}" for name, text in lines.items()), flush=True)
    if config.dry_run:
        return {}
    mass = check_mass(judge, items, config.min_mass)
    if first:
        print(f"{'label mass':<11} {mass}", flush=True)
    train(judge, items, config, eval_items=test)
    judge.encoder.memo = None
    if not first:
        return {}
    save_judge(judge, config.out)
    metrics = write_results(judge, test, items, config, config.out)
    if after:
        after.finish(judge, Path(config.out), config.export, config.push_to_hub, trained=True)
    return metrics


def after_training(needed: bool = False) -> Any:
    """recipes/export.py, which lies beside this file: exports, model card, upload. None where it does not; InputError if it is needed."""
    import importlib.util

    path = Path(__file__).resolve().parent / "recipes" / "export.py"
    if not path.is_file():
        if needed:
            raise InputError(f"export, push_to_hub: need {path}, which is not there: take the file from distjudge's repository")
        return None
    spec = importlib.util.spec_from_file_location("distjudge_export", path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules[spec.name] = module  # type: ignore[union-attr]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def cli(main: Callable[[Any], Any], config: type) -> None:
    """A recipe's command line: tyro reads `config`; what the user got wrong ends in one line a problem and exit code 2.

    A run that diverges and an export that fails end in exit code 1, a run that a signal stops in 128 and the signal's number.
    """
    import tyro

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    preset = re.findall(r"(?:^|\0)--preset(?:=|\0)([^\0]*)", "\0".join(sys.argv[1:]))
    chosen = PRESETS.get(preset[-1], {}) if preset else {}
    try:
        main(tyro.cli(config, description=sys.modules["__main__"].__doc__, default=config(**chosen, preset=preset[-1]) if chosen else None))
    except (InputError, OSError, FloatingPointError, ExportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, (FloatingPointError, ExportError)) else 2)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.number)
