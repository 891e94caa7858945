"""distjudge: train an LLM judge that answers with the distribution of human judgments, not with one verdict.

    items = distjudge.load_items("votes.jsonl")        # {"id", "prompt", "counts": {label: votes}} a line
    judge = distjudge.load_judge("Qwen/Qwen2.5-0.5B-Instruct", labels=distjudge.labels_of(items))
    distjudge.train(judge, items, distjudge.Config(out="runs/first"))
    judge.predict(["Is this summary fluent? ..."])     # (1, C) float32, one probability a label

The method is that of "Distributional LLM-as-a-Judge" (Chen et al., NeurIPS 2025, arXiv 2505.12301):

    min over theta of the mean over items of  max over p' in E(p) of  alpha KL(p' || q) + (1 - alpha) CE(r, q)

p is the human distribution of an item (votes as shares), r its majority label, E(p) what lies within eps of p, and q the
model's probabilities of the label tokens where its answer begins. Losses are in nats. The file can be copied alone. It
needs torch at import, and transformers, peft, accelerate and tyro only inside the functions that use them.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import dataclasses
import datetime
import functools
import gzip
import hashlib
import inspect
import itertools
import json
import logging
import math
import numbers
import os
import random
import re
import signal
import sys
import threading
import types
import typing
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

__version__ = "0.2.0"
log = logging.getLogger("distjudge")


class InputError(ValueError):
    """What the user gave cannot be used. Each line of the message says what is wrong and where. Exit code 2."""


class Stopped(Exception):
    """A signal stopped training, after a checkpoint was saved. Exit code 128 + the signal's number."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


# ---------------------------------------------------------------------------------------------------------------------
# 1. Items: what was judged, and how people voted
# ---------------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Swap:
    """A pair in the other order. labels: for each label the index of the one that means the same there."""

    prompt: str
    labels: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Item:
    """One judged thing. `counts` holds every label of the data set, in label order, also those without a vote.

    Votes are whole numbers, except where a weighted panel's `distribution` was given: then share times votes. `truth` is
    the distribution the votes were drawn from, where it is known (simulated panels).
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

    @property
    def named(self) -> str:
        """Where the item stands and what it is called, for messages."""
        return f"{self.where}: item '{short(self.id)}'"


def labels_of(items: Sequence[Item]) -> list[str]:
    """The labels of a data set, in order. Raises InputError if the items do not all have the same."""
    if not items:
        raise InputError("no items")
    labels = list(items[0].counts)
    for item in items:
        if list(item.counts) != labels:
            raise InputError(
                f"{item.named}: counts: labels {listed(item.counts)} differ from {listed(labels)}"
            )
    return labels


def counts_of(items: Sequence[Item]) -> torch.Tensor:
    """Votes as a float64 tensor (N, C)."""
    labels_of(items)
    return torch.tensor([list(item.counts.values()) for item in items], dtype=torch.float64)


def truths_of(items: Sequence[Item]) -> torch.Tensor | None:
    """The true distributions as a float64 tensor (N, C); None unless every item has one."""
    truths = [item.truth for item in items]
    return torch.tensor([list(t.values()) for t in truths], dtype=torch.float64) if all(truths) else None


def load_items(*sources: Any, labels: Sequence[str] | None = None, complete: bool = False) -> list[Item]:
    """Reads items from .jsonl or .jsonl.gz files, lists of dicts, `datasets.Dataset`s or pandas DataFrames.

    A row holds "prompt" and the votes, as "counts": {label: votes} with every label, as "annotations": [label, ...], one
    a person, or as "distribution": {label: share} with "votes", the number of people. It may hold "id" (by default a hash
    of the prompt), "group" (items that stay on one side of a split), "split" ("train" or "test"), "truth" ({label:
    probability}) and, for a pair, "swap": {"prompt": the pair in the other order, "labels": {label: the one that means
    the same there}}. Other fields are ignored.

    Label order: `labels` where given (an item may then leave out labels without votes, unless `complete`); else numeric
    labels by value; else that of the first item with the commonest label set; else, with annotations only, alphabetical.
    Raises InputError with one line a problem (file, line, id, field), at most 20.
    """
    wrong: list[str] = []
    parsed: list[dict[str, Any]] = []
    seen: dict[str, str] = {}
    is_path = lambda source: isinstance(source, (str, os.PathLike))  # noqa: E731
    several = lambda source: isinstance(source, (list, tuple)) and source and all(map(is_path, source))  # noqa: E731
    sources = [part for source in sources for part in (source if several(source) else [source])]
    for where, row, problem in itertools.chain.from_iterable(map(read_rows, sources)):
        fields, bad = ({"id": None}, [("", problem)]) if problem else parse_row(row)
        if fields["id"] and seen.setdefault(fields["id"], where) != where:
            bad.append(("id", f"duplicate, first at {seen[fields['id']]}"))
        head = f"{where}: item '{short(fields['id'])}': " if fields["id"] else f"{where}: "
        wrong += [head + f"{field}: " * bool(field) + text for field, text in bad]
        parsed += [] if bad else [fields | {"where": where, "head": head}]
    order, example = _label_order(parsed, labels)
    items, known = [], set(order)
    for fields in parsed:
        head, kind, counts, truth, swap = (fields[key] for key in ("head", "kind", "counts", "truth", "swap"))
        if (labels is None or complete) and kind != "annotations" and set(counts) != known:
            differ = f"labels {listed(counts)} differ from {listed(order)} of {example}"
            wrong.append(f"{head}{kind}: {differ} (write 0 for labels without votes, or name the labels)")
        elif unknown := sorted(set(counts) - known):
            wrong.append(f"{head}{kind}: unknown label {listed(unknown)}; the labels are {listed(order)}")
        if unknown := sorted(set(truth or ()) - known):
            wrong.append(f"{head}truth: unknown label {listed(unknown)}; the labels are {listed(order)}")
        try:
            swap = swap and place_swap(*swap, order)
        except ValueError as error:
            wrong.append(f"{head}swap: {error}")
        every = lambda values, none: values and {label: values.get(label, none) for label in order}  # noqa: E731
        rest = (fields["group"], fields["split"], every(truth, 0.0), swap, fields["where"])
        items.append(Item(fields["id"], fields["prompt"], every(counts, 0), *rest))
    if not (items or wrong):
        wrong = [f"{', '.join(short(s) for s in sources if is_path(s)) or 'load_items'}: no items"]
    if items and len(order) < 2:
        wrong.append(f"{items[0].where}: counts: a judge needs two labels or more, found {listed(order)}")
    if wrong:
        raise InputError("\n".join(at_most(wrong, "problems")))
    return items


def at_most(lines: Sequence[str], what: str) -> list[str]:
    """The first 20 lines, and how many more there are."""
    return [*lines[:20], *([f"and {len(lines) - 20} more {what}"] if len(lines) > 20 else [])]


def short(text: Any, width: int = 60) -> str:
    """Text of the user's for one line of a message, left to right, without control characters, cut at `width`."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", " ", str(text))
    return text if len(text) <= width else text[: width - 3] + "..."


def listed(labels: Iterable[str]) -> str:
    return "{" + ", ".join(short(label, 20) for label in labels) + "}"


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return short(" ".join(lines[: 2 if lines[0].endswith(":") else 1]), 300)


def read_rows(source: Any) -> Iterator[tuple[str, dict, str]]:
    """Yields (where, row, ""), or (where, {}, what is wrong) for a line that is no JSON object. "-" is standard input."""
    if hasattr(source, "to_dict") and hasattr(source, "columns"):  # a pandas DataFrame
        source = source.to_dict("records")
    if not isinstance(source, (str, os.PathLike)):
        if isinstance(source, (dict, bytes)) or not isinstance(source, Iterable):
            kinds = "paths, a list of dicts, a Dataset or a DataFrame"
            raise InputError(f"load_items: expected {kinds}, got {type(source).__name__}")
        for i, row in enumerate(source):
            wrong = "" if isinstance(row, dict) else f"not a dict but {type(row).__name__}"
            yield f"items[{i}]", {} if wrong else row, wrong
        return
    shown = "stdin" if source == "-" else short(source, 1000)
    try:
        with contextlib.ExitStack() as stack:
            reader = gzip.open if Path(source).suffix == ".gz" else open
            file = sys.stdin.buffer if source == "-" else stack.enter_context(reader(source, "rb"))
            for number, raw in enumerate(file, 1):
                if number == 1 and (raw[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in raw[:4]):
                    raise InputError(f"{shown}: is UTF-16 or no text at all; save it as UTF-8")
                if raw := raw.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").strip():
                    yield f"{shown}:{number}", *parse_json(raw)
    except (OSError, EOFError, zlib.error, ValueError) as error:  # ValueError: a NUL in the name
        why = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise error if isinstance(error, InputError) else InputError(f"{shown}: {why}") from None


def parse_json(line: str | bytes) -> tuple[dict, str]:
    """(JSON object, ""), or ({}, what is wrong). A key that stands twice in one object is refused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict:
        found: dict = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"'{short(key)}' stands twice in an object")
            found[key] = value
        return found

    try:
        row = json.loads(line, object_pairs_hook=unique)
        return (row, "") if isinstance(row, dict) else ({}, f"not a JSON object but {type(row).__name__}")
    except UnicodeDecodeError as error:
        return {}, f"not UTF-8 (byte {error.start + 1} of the line)"
    except (ValueError, RecursionError) as error:
        return {}, f"broken JSON: {short(error, 100)}"


def is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))  # NaN: an empty cell of pandas


def is_text(value: str) -> bool:
    """False for lone surrogates, which no tokenizer takes."""
    try:
        return value.encode("utf-8") is not None
    except UnicodeEncodeError:
        return False


def as_label(value: Any) -> str:
    """A label as text: strings as they are, whole numbers in digits. Raises ValueError for anything else."""
    if isinstance(value, str) and value and value == value.strip() and is_text(value):
        return value
    if _is_number(value) and value % 1 == 0:
        return str(int(value))
    raise ValueError(f"must be text without spaces around it, or a whole number, not {short(repr(value))}")


def prompt_text(value: Any) -> str:
    """The prompt itself. Raises ValueError for what is no text, or empty."""
    if not isinstance(value, str):
        raise ValueError("missing" if is_missing(value) else f"not text but {type(value).__name__}")
    if not value.strip() or not is_text(value):
        raise ValueError("holds a lone surrogate, which is no character" if value.strip() else "empty")
    return value


def _is_number(value: Any, most: float = 1e300) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and -most <= value <= most


def _votes(value: Any, whole: bool = True) -> dict[str, float]:
    """{label: number}, labels as text. A label whose value is None (an empty field of a struct) counts as left out."""
    wanted = "a whole number from 0 to a billion" if whole else "a number of 0 or more"
    out: dict[str, float] = {}
    for key, number in value.items() if isinstance(value, dict) else ():
        if number is not None:
            label = as_label(key)
            if label in out:
                raise ValueError(f"duplicate label '{short(label)}'")
            if not _is_number(number, 10**9) or number < 0 or (whole and number % 1):
                raise ValueError(f"the value of '{short(label)}' must be {wanted}, not {short(repr(number))}")
            out[label] = int(number) if whole else float(number)
    if not sum(out.values()):
        raise ValueError("no votes at all" if out else "must be an object {label: number}")
    return out


def _annotations(value: Any) -> dict[str, int]:
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError("must be a list of one label or more")
    return dict(collections.Counter(map(as_label, value)))


def _shares(value: Any) -> dict[str, float]:
    shares = _votes(value, whole=False)
    if abs((total := sum(shares.values())) - 1) > 0.02:
        raise ValueError(f"shares must add up to 1, not to {total:.4g}")
    return {label: share / total for label, share in shares.items()}


def _people(value: Any) -> int:
    if not _is_number(value, 10**9) or value < 1 or value % 1:
        raise ValueError(
            f"must be the number of people behind a distribution, a whole number, not {short(repr(value))}"
        )
    return int(value)


def _split(value: Any) -> str:
    if value not in ("train", "test"):
        raise ValueError(f"must be train or test, not {short(repr(value))}")
    return value


def _swap(value: Any) -> tuple[str, dict[str, str]]:
    if not isinstance(value, dict) or not isinstance(value.get("labels"), dict):
        form = '{"prompt": ..., "labels": {label: label in the other order}}'
        raise ValueError(f"must be {form}, not {short(repr(value))}")
    pairs = {as_label(a): as_label(b) for a, b in value["labels"].items() if not is_missing(b)}
    return prompt_text(value.get("prompt")), pairs


_FIELDS: dict[str, Callable[[Any], Any]] = {
    "prompt": prompt_text, "id": as_label, "group": as_label, "split": _split, "swap": _swap, "truth": _shares,
    "counts": _votes, "annotations": _annotations, "distribution": _shares, "votes": _people,
}  # fmt: skip


def parse_row(row: dict[str, Any], votes: bool = True) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """A row's fields and its problems, as (field, text); with votes=False a row may have no votes.

    Fields: id, prompt, kind (the field the votes stood in, or ""), counts, group, split, truth, and swap as (prompt,
    {label: label}). What has a problem, or is not there, is None; counts are then {}.
    """
    fields, bad = dict.fromkeys(_FIELDS), []
    given = [field for field in ("counts", "annotations", "distribution") if not is_missing(row.get(field))]
    needed = {"prompt"} | (
        {"votes"} if given == ["distribution"] else set()
    )  # beside counts, votes is not ours
    for field, parse in _FIELDS.items():
        if field in needed or (field != "votes" and not is_missing(row.get(field))):
            try:
                fields[field] = parse(row.get(field))
            except ValueError as error:
                bad.append((field, str(error)))
    if is_missing(row.get("id")) and fields["prompt"]:
        fields["id"] = hashlib.sha256(fields["prompt"].encode()).hexdigest()[:16]
    if len(given) > 1 or (votes and not given):
        found = " and ".join(given) or "none"
        bad.append(("counts", f"one of counts, annotations, distribution is needed, found {found}"))
    counts = fields["counts"] or fields["annotations"] or {}
    if (shares := fields["distribution"]) and (people := fields["votes"]):
        # whole votes where every share is a multiple of 1 / people (to 0.05 votes, for rounded shares)
        exact = {label: share * people for label, share in shares.items()}
        whole = {label: round(count) for label, count in exact.items()}
        near = (
            all(abs(exact[label] - whole[label]) <= 0.05 for label in exact) and sum(whole.values()) == people
        )
        counts = whole if near else exact
    return fields | {"counts": counts, "kind": given[0] if len(given) == 1 else ""}, bad


def place_swap(prompt: str, other: dict[str, str], labels: Sequence[str]) -> Swap:
    """The Swap of what stood in a row, among these labels. Raises ValueError where labels do not trade places."""
    if unknown := sorted({*other, *other.values()} - set(labels)):
        raise ValueError(f"unknown label {listed(unknown)}; the labels are {listed(labels)}")
    target = [other.get(label, label) for label in labels]
    if any(other.get(there, there) != label for label, there in zip(labels, target, strict=True)):
        raise ValueError(
            f"labels {other} do not trade places: swapped twice, every label must be itself again"
        )
    return Swap(prompt, tuple(map(list(labels).index, target)))


def _label_order(parsed: Sequence[dict], labels: Sequence[str] | None) -> tuple[list[str], str]:
    """The labels in order, and where they come from: see load_items(). Raises InputError for labels that are twins."""
    full = [fields for fields in parsed if fields["kind"] != "annotations"]
    if labels is not None:
        order, example = [str(label) for label in labels], "the labels known"
    elif full:
        commonest = collections.Counter(frozenset(fields["counts"]) for fields in full).most_common(1)[0][0]
        first = next(fields for fields in full if set(fields["counts"]) == commonest)
        order, example = list(first["counts"]), first["where"]
    else:
        order, example = sorted({label for fields in parsed for label in fields["counts"]}), ""
    at = parsed[0]["where"] if parsed else "load_items"
    if len(set(order)) != len(order):
        raise InputError(f"labels: {order} names a label twice")
    if are_numeric(order):
        order = sorted(order, key=float) if labels is None else order
        if len(set(map(float, order))) != len(order):
            raise InputError(f"{at}: labels: {listed(order)} holds a number in two spellings")
    elif labels is None and (twins := look_alike(order)):
        at = next(fields["where"] for fields in parsed if twins[1] in fields["counts"])
        differ = "differ only in capitals or in how a letter is coded; name the labels if both are meant"
        raise InputError(f"{at}: labels '{short(twins[0], 20)}' and '{short(twins[1], 20)}' {differ}")
    return order, example


def look_alike(labels: Iterable[str]) -> tuple[str, str] | None:
    """Two labels that differ only in capitals, or in whether an accent is a character of its own (Unicode's NFC)."""
    seen: dict[str, str] = {}
    for label in labels:
        other = seen.setdefault(unicodedata.normalize("NFC", label).casefold(), label)
        if other != label:
            return other, label
    return None


def are_numeric(labels: Iterable[str]) -> bool:
    """True if every label is a plain number ("1", "-2", "0.5") that a float holds: such labels are a scale."""
    return all(re.fullmatch(r"[+-]?\d{1,15}(\.\d+)?", label) for label in labels)


def split_items(
    items: Sequence[Item], test_share: float = 0.2, seed: int = 0
) -> tuple[list[Item], list[Item]]:
    """Train and test items, 8:2 by default. Items of one group, or of one prompt, stay together; order is kept.

    Whole groups are taken in random order, each that brings the test side nearer to `test_share` of the items; if none
    does, the smallest. Raises InputError if everything is one group.
    """
    parent = list(range(len(items)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first: dict[tuple[str, str], int] = {}
    for i, item in enumerate(items):
        for key in _keys(item, ("prompt", "group")):
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
    return [item for i, item in enumerate(items) if i not in test], [items[i] for i in sorted(test)]


def _keys(item: Item, fields: Sequence[str], plain: Callable[[str], str] = str) -> list[tuple[str, str]]:
    """What an item shares with another one: its prompts, group and id, as far as there are any."""
    values = {"prompt": [plain(p) for p in item.prompts], "group": [item.group], "id": [item.id]}
    return [(field, value) for field in fields for value in values[field] if value is not None]


def keep_apart(
    train_items: Sequence[Item],
    test_items: Sequence[Item],
    overlap: Literal["refuse", "remove"] = "refuse",
    plain: Callable[[str], str] = str,
) -> tuple[list[Item], dict[str, int]]:
    """Training items of which none also stands in the test items, and how many were left out, by reason.

    An item stands in both if they share its prompt (to the letter, or as `plain` makes it; a pair's in either order), its
    group (one premise, article or question, which data/prepare.py names alike in every data set) or its id. The first
    of these counts. "refuse" raises InputError instead.
    """
    fields = ("prompt", "group", "id")
    test = {key: item for item in reversed(test_items) for key in _keys(item, fields, plain)}
    why = [next((key for key in _keys(item, fields, plain) if key in test), None) for item in train_items]
    both = [(test[key], key[0], item) for item, key in zip(train_items, why, strict=True) if key]
    if both and overlap == "refuse":
        lines = [
            f"{one.named}: {field}: also in the training items, at {item.where}" for one, field, item in both
        ]
        raise InputError("\n".join(at_most(lines, "items")))
    kept = [item for item, key in zip(train_items, why, strict=True) if not key]
    return kept, {field: sum(found == field for _, found, _ in both) for field in fields}


# ---------------------------------------------------------------------------------------------------------------------
# 2. Prompts and label tokens
# ---------------------------------------------------------------------------------------------------------------------
_SENTINEL = "XQZPROMPTXQZ"
_TODAY = datetime.date(2024, 7, 26)  # for templates that tell the date: a prompt does not change with the day
_PROBE = "Is 2 + 2 = 4? One\n\ntwo, three: I'M 12345 -- don't."


def _is_control(token: str, special: bool) -> bool:
    """Whether an added token means something to the model beyond its characters: special ones, tags such as <think>."""
    return bool(token.strip()) and (special or re.fullmatch(r"[\w\s]+", token) is None)


@functools.lru_cache(2)
def _tokenizer_of(spec: str) -> Any:
    """One tokenizer a process for equal ones: the library never frees the words that a BPE tokenizer has seen."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(spec)


class PromptEncoder:
    """Turns user messages into token ids: the chat template around them, what people wrote as text only.

    The template is rendered once, with a stand-in for the message; `frame` keeps what it puts before and after it, what
    ends an answer, and whether it strips the message. Without a template the message is followed by a line break. A
    control token written in a message ("<|im_end|>") is encoded as its characters, for the message goes through a copy
    of the tokenizer that has no control tokens. Raises InputError if the template does more to a message than to strip
    it, or if the tokenizer's own encoding of a harmless message is not reproduced exactly.
    """

    memo: dict[str, list[int]] | None = None  # while it is a dict, what was encoded is kept there

    def __init__(self, tokenizer: Any, frame: dict[str, Any] | None = None):
        self.tokenizer, self.name = tokenizer, tokenizer.name_or_path
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(f"{self.name}: tokenizer: a fast tokenizer (tokenizer.json) is needed")
        self.frame = frame or self._render()
        added = {
            t.content: t for t in tokenizer.added_tokens_decoder.values() if _is_control(t.content, t.special)
        }
        self.control_ids = set(map(tokenizer.convert_tokens_to_ids, added)) - {tokenizer.unk_token_id}
        pattern = "|".join(re.escape(c) for c in sorted(added, key=len, reverse=True)) or "(?!)"
        before, after, end = self.frame["before"], self.frame["after"], self.frame["end"]
        # only control tokens are sure not to merge with a message: what stands between them and it is encoded with it
        opening, closing = list(re.finditer(pattern, before)), re.search(pattern, after)
        cut, first = opening[-1].end() if opening else 0, closing.start() if closing else len(after)
        self._lead, self._trail = before[cut:], after[:first]
        if opening and added[opening[-1].group()].rstrip:
            self._lead = self._lead.lstrip()
        if closing and added[closing.group()].lstrip:
            self._trail = self._trail.rstrip()
        self._tail, self._head_ids = after[first:], self._ids(before[:cut])
        self._tail_ids = self._ids(self._tail)
        if tokenizer.chat_template and not closing:
            imitable = (
                "ends a turn in plain words, not in a control token: a text that is judged can imitate it"
            )
            log.warning("%s: the chat template %s", self.name, imitable)
        bos = tokenizer.bos_token_id
        if not tokenizer.chat_template and bos is not None and tokenizer("a")["input_ids"][0] == bos:
            self._head_ids = [bos]
        final = re.match(rf"\s*({pattern})", end)
        self.end_is_known = final is not None
        self.end_id = self._ids(final[1])[0] if final else tokenizer.eos_token_id
        self._plain = self._plain_tokenizer()

    def _render(self) -> dict[str, Any]:
        if not self.tokenizer.chat_template:
            return {"before": "", "after": "\n", "end": "", "trim": False}
        head = f"{self.name}: chat template:"

        def render(content: str, answer: str | None = None) -> str:
            turns = [{"role": "user", "content": content}]
            turns += [{"role": "assistant", "content": answer}] if answer else []
            options = {"enable_thinking": False, "strftime_now": _TODAY.strftime}
            return self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=answer is None, **options
            )

        try:
            plain, spaced = render(_SENTINEL), render(f" {_SENTINEL} ")
            answered = render(_SENTINEL, _SENTINEL)
        except Exception as error:  # a template raises whatever its author chose to raise
            raise InputError(f"{head} {short(error, 200)}") from None
        if plain.count(_SENTINEL) != 1:
            raise InputError(f"{head} shows the message {plain.count(_SENTINEL)} times, not once")
        before, after = plain.split(_SENTINEL)
        trim = plain == spaced
        for probe in (_PROBE, f"\n {_PROBE}", f"{_PROBE} \n", f"<b> & '{_PROBE}'"):
            if render(probe) != before + (probe.strip() if trim else probe) + after:
                raise InputError(f"{head} changes the message, so text cannot be told from template")
        common, end = common_length(plain, answered), ""
        if answered.count(_SENTINEL) == 2:
            gap, end = answered[common:].split(_SENTINEL)[0], answered.rsplit(_SENTINEL, 1)[1]
            if common == len(plain) and gap.strip():
                lost = f"ends a prompt without {short(repr(gap))}, which it puts before an answer"
                why = "add_generation_prompt does nothing in it"
                raise InputError(f"{head} {lost} ({why}): labels would be read at the wrong place")
        if plain[common:].strip():
            behind = "ends a prompt with %r, which it does not put before a given answer; labels are read behind it"
            log.warning(f"%s {behind}", head, short(plain[common:]))
        return {"before": before, "after": after, "end": end, "trim": trim}

    def _plain_tokenizer(self) -> Any:
        """The tokenizer without control tokens, in the variant that encodes a harmless message as the tokenizer does."""
        spec = json.loads(self.tokenizer.backend_tokenizer.to_str())
        spec["added_tokens"] = [
            t for t in spec["added_tokens"] if not _is_control(t["content"], t["special"])
        ]
        spec["post_processor"] = spec["truncation"] = spec["padding"] = None
        whole = self._ids(self.frame["before"] + _PROBE + self.frame["after"])
        whole = self._head_ids + whole if not self.tokenizer.chat_template else whole
        text = json.dumps(spec)
        for variant in (text, text.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')):
            self._plain = _tokenizer_of(variant)
            if self(_PROBE) == whole:
                return self._plain
        raise InputError(f"{self.name}: tokenizer: a message cannot be encoded as text only")

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def __call__(self, message: str, answer: str = "") -> list[int]:
        """Token ids of the rendered prompt, with `answer` written where the judge's answer begins."""
        if not answer:
            return self.many([message])[0]
        written = self.render_parts(message) + (answer if not self._tail else "")
        return self._around(message, self._plain.encode(written, add_special_tokens=False).ids, answer)

    def many(self, messages: Sequence[str]) -> list[list[int]]:
        """Token ids of each rendered prompt; the tokenizer uses all cores (TOKENIZERS_PARALLELISM=false: one)."""
        memo = {} if self.memo is None else self.memo
        new = [message for message in dict.fromkeys(messages) if message not in memo]
        for start in range(0, len(new), 2048):
            chunk = new[start : start + 2048]
            try:
                texts = [self.render_parts(message) for message in chunk]
                found = self._plain.encode_batch_fast(texts, add_special_tokens=False)
            except (TypeError, UnicodeEncodeError):
                wrong = next((message for message in chunk if not is_text(message)), chunk[0])
                raise InputError(f"prompt '{short(wrong)!r}' is not text that can be encoded") from None
            memo |= {text: self._around(text, code.ids) for text, code in zip(chunk, found, strict=True)}
        return [list(memo[message]) for message in messages]

    def render(self, message: str) -> str:
        """The prompt as text. Only token ids tell its control tokens from those that people wrote."""
        return self.frame["before"] + self._trimmed(message) + self.frame["after"]

    def _trimmed(self, message: str) -> str:
        return message.strip() if self.frame["trim"] else message

    def render_parts(self, message: str) -> str:
        return self._lead + self._trimmed(message) + self._trail

    def _around(self, message: str, ids: list[int], answer: str = "") -> list[int]:
        if not self.control_ids.isdisjoint(ids):
            raise InputError(
                f"prompt '{short(message)}': would be encoded with a control token of the tokenizer"
            )
        return (
            self._head_ids
            + ids
            + (self._ids(self._tail + answer) if self._tail and answer else self._tail_ids)
        )


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
        """What must stand behind a prompt for its labels to be read: all but each spelling's last token, sorted."""
        return sorted({ids[:-1] for _, ids in self.sequences})

    def describe(self, tokenizer: Any) -> str:
        whole = "as whole words, closed by the end of the turn (some begin with the same token)"
        lines = [f"labels are read {whole if self.whole else 'by the first token of the answer'}"]
        for i, label in enumerate(self.labels):
            # "▁" alone decodes to nothing
            piece = lambda t: repr(tokenizer.decode([t]) or tokenizer.convert_ids_to_tokens(t))  # noqa: E731
            shown = [" ".join(map(piece, ids)) for owner, ids in self.sequences if owner == i]
            lines.append(f"  {label}: {' or '.join(shown)}")
        return "\n".join(lines)


def label_tokens(
    tokenizer: Any,
    labels: Sequence[str],
    spellings: dict[str, Sequence[str]] | None = None,
    encoder: Any = None,
) -> LabelTokens:
    """Finds the tokens with which each label begins in context, right after the rendered prompt.

    spellings: {label: [text, ...]}, by default the label itself; the probabilities of a label's spellings add up.
    Raises InputError if two labels have the same spelling, a spelling is empty, for an unknown label or merges with the
    prompt's end, or if whole labels are needed and the tokenizer has no end-of-turn token.
    """
    encoder = encoder or PromptEncoder(tokenizer)
    labels, spellings = [str(label) for label in labels], dict(spellings or {})
    if unknown := sorted(set(spellings) - set(labels)):
        raise InputError(f"spellings: unknown label {listed(unknown)}; the labels are {listed(labels)}")
    if len(set(labels)) != len(labels) or len(labels) < 2:
        raise InputError(f"labels: two different labels or more are needed, not {listed(labels)}")
    question = "Is this so?"
    prompt, found = encoder(question), []
    for i, label in enumerate(labels):
        for text in spellings.get(label, [label]) or [""]:
            head = f"spellings: label '{short(label)}': '{short(text)}'"
            if not is_text(text):
                raise InputError(f"{head} is not text that can be encoded")
            ids = encoder(question, text)
            if not text or ids[: len(prompt)] != prompt or len(ids) == len(prompt):
                raise InputError(f"{head} {'merges with the end of the prompt' if text else 'is empty'}")
            if not encoder.control_ids.isdisjoint(ids[len(prompt) :]):
                raise InputError(f"{head} is a control token of the tokenizer")
            found.append((i, tuple(ids[len(prompt) :])))
    firsts = list(
        dict.fromkeys((i, ids[:1]) for i, ids in found)
    )  # two spellings that begin alike are read once
    if len({ids for _, ids in firsts}) == len(firsts):
        return LabelTokens(labels, firsts, whole=False)
    if encoder.end_id is None:
        need = "the tokenizer has no end-of-turn or end-of-sequence token to close them"
        raise InputError(f"labels: some begin with the same token, so whole labels must be read, but {need}")
    if not encoder.end_is_known:
        text = "%s: the chat template does not show how a turn ends; whole labels are closed by %r"
        log.warning(text, encoder.name, tokenizer.decode([encoder.end_id]))
    closed = list(dict.fromkeys((i, (*ids, encoder.end_id)) for i, ids in found))
    if len({ids for _, ids in closed}) != len(closed):
        raise InputError(f"spellings: two labels have the same tokens: {listed(labels)}")
    return LabelTokens(labels, closed, whole=True)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Packs: every shared token is computed once
# ---------------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Pack:
    """Prompts in one row of tokens, a tree in depth-first order: a beginning that several share stands once.

    ids, positions (L,): tokens and their positions in their own prompt. ends (L,): token i sees token j if
    j <= i < ends[j], which is a causal mask within each prompt, whatever the nesting. members: indices of the prompts.
    paths: where the tokens of each prompt stand, a list for every prompt and branch (inner tokens of whole labels).
    """

    ids: list[int]
    positions: list[int]
    ends: list[int]
    members: list[int]
    paths: list[list[int]]


def common_length(a: Sequence, b: Sequence) -> int:
    """The length of the beginning that two lists share."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # bisection on slices: comparing them runs in C
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def build_pack(
    token_lists: Sequence[Sequence[int]],
    members: Sequence[int],
    branches: Sequence[Sequence[int]] = ((),),
    two_levels: bool = False,
) -> Pack:
    """Lays out the prompts in the order of `members`, each with its branches; each shares what it can with the one before.

    two_levels: only groups of one common beginning and what follows it, as Unsloth's kernel knows them.
    """
    lists = [[*token_lists[member], *branch] for member in members for branch in sorted(map(list, branches))]
    shared = [0] + [common_length(a, b) for a, b in itertools.pairwise(lists)]
    pack, path = Pack([], [], [], list(members), []), []
    for tokens, kept in zip(lists, _in_two_levels(lists, shared) if two_levels else shared, strict=True):
        for closed in path[kept:]:
            pack.ends[closed] = len(pack.ids)
        path = [*path[:kept], *range(len(pack.ids), len(pack.ids) + len(tokens) - kept)]
        pack.ids += tokens[kept:]
        pack.positions += range(kept, len(tokens))
        pack.ends += [-1] * (len(tokens) - kept)
        pack.paths.append(path)
    for closed in path:
        pack.ends[closed] = len(pack.ids)
    return pack


def _cheapest(length: int, cost: Callable[[int], Iterator[tuple[int, Any]]]) -> list[tuple[int, int, Any]]:
    """Divides 0 .. length into runs of the least total cost, then of the fewest: (start, stop, extra) of each, in order.

    cost(stop) yields (cost, extra) of the run start .. stop for start = stop - 1, stop - 2, ..., as far as it may go.
    """
    best: list[tuple[int, int, int, Any]] = [(0, 0, 0, None)]
    for stop in range(1, length + 1):
        runs = enumerate(cost(stop), 1)
        best.append(
            min((best[stop - n][0] + c, best[stop - n][1] + 1, stop - n, extra) for n, (c, extra) in runs)
        )
    runs, stop = [], length
    while stop:
        _, _, start, extra = best[stop]
        runs, stop = [(start, stop, extra), *runs], start
    return runs


def _in_two_levels(lists: Sequence[Sequence[int]], shared: Sequence[int]) -> list[int]:
    """What each list may share with the one before it if lists fall into groups of one common beginning."""

    def cost(stop: int) -> Iterator[tuple[int, int]]:
        rest, common = 0, len(lists[stop - 1])
        for start in range(stop - 1, -1, -1):
            rest, common = rest + len(lists[start]), min(common, len(lists[start]))
            yield rest - (stop - start - 1) * common, common
            common = min(common, shared[start])

    kept = [0] * len(lists)
    for start, stop, common in _cheapest(len(lists), cost):
        kept[start + 1 : stop] = [common] * (stop - start - 1)
    return kept


def pack_prompts(
    token_lists: Sequence[Sequence[int]],
    max_tokens: int,
    branches: Sequence[Sequence[int]] = ((),),
    two_levels: bool = False,
) -> list[Pack]:
    """Divides prompts into packs of at most max_tokens tokens, with as few tokens altogether, then packs, as can be.

    Prompts are sorted, so that those that share a beginning are neighbours; what a pack saves is the sum of what
    neighbours share, and dynamic programming over the cuts finds the cheapest division. Deterministic; a prompt is never
    split, and one of more than max_tokens gets a pack of its own. branches: see LabelTokens.branches. two_levels: see
    build_pack(); packs that are then too large are halved, so that the division is not always the cheapest.
    """
    order = sorted(range(len(token_lists)), key=token_lists.__getitem__)
    extra = len({tuple(branch[:k]) for branch in branches for k in range(1, len(branch) + 1)})
    sizes = [len(token_lists[i]) + extra for i in order]
    shared = [0] + [common_length(token_lists[a], token_lists[b]) for a, b in itertools.pairwise(order)]

    def cost(stop: int) -> Iterator[tuple[int, None]]:
        rest = 0
        for start in range(stop - 1, -1, -1):
            if sizes[start] + rest > max_tokens and start < stop - 1:
                return
            yield sizes[start] + rest, None
            rest += sizes[start] - shared[start]

    todo, packs = [(start, stop) for start, stop, _ in _cheapest(len(order), cost)][::-1], []
    while todo:
        start, stop = todo.pop()
        pack = build_pack(token_lists, order[start:stop], branches, two_levels)
        if len(pack.ids) > max_tokens and stop - start > 1:
            todo += [((start + stop) // 2, stop), (start, (start + stop) // 2)]
        else:
            packs.append(pack)
    return packs


def shuffled(
    token_lists: Sequence[Sequence[int]], seed: int, keep_together: int = 16, chunk: int = 8
) -> list[int]:
    """A random order of the prompts in which those that share a beginning come in chunks, so that steps share more.

    Prompts are divided by their beginnings, as a tree: those that share keep_together tokens more than all of their group
    do form a group within it. A group of at most `chunk` prompts stays whole; what a larger one holds beside its own
    groups is dealt at random into chunks. Chunks, and prompts that are in no group, then stand in uniformly random
    order, so that a large group (a rubric, say) is spread over the whole epoch.
    """
    draw = random.Random(seed)
    order = sorted(range(len(token_lists)), key=token_lists.__getitem__)
    shared = [0] + [common_length(token_lists[a], token_lists[b]) for a, b in itertools.pairwise(order)]
    chunks, todo = [], [(0, len(order), 1)]
    while todo:
        start, stop, size = (
            todo.pop()
        )  # size: what prompts of this group that are in no group within it are dealt into
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
    """The prefixes and suffixes of a two-level pack, as Unsloth's forward takes them in the place of a mask."""
    from unsloth.utils.prefix_grouper_kernel import build_seg_info_multigroup

    device, groups = ends.device, []
    ends, positions = ends.tolist(), positions.tolist()
    starts = [
        i for i in range(len(ends)) if not i or ends[i] != ends[i - 1] or positions[i] != positions[i - 1] + 1
    ]
    for start, stop in itertools.pairwise([*starts, len(ends)]):
        if positions[start] == 0:
            groups.append((stop - start, []))
        else:
            groups[-1][1].append(stop - start)
    return build_seg_info_multigroup(groups, device)[0]


def block_length(device: str | torch.device) -> int:
    """Queries that attention in blocks takes at a time, see block_attention()."""
    return 128 if torch.device(device).type == "cpu" else 512


def tree_mask(config: Any, dtype: torch.dtype, ends: torch.Tensor, positions: torch.Tensor) -> Any:
    """The attention mask of a pack in the form the model takes: ends and positions (L,), see Pack.

    For SDPA in blocks (see block_attention), boolean (1, 1, L, L) where a model would not take those, additive for eager
    attention, a BlockMask for flex_attention; for models with several kinds of layers a dict of masks by layer type.
    Raises NotImplementedError for kinds other than full and sliding attention.
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
            carrier = torch.empty(1, 1, 1, 1, dtype=torch.bool, device=device)  # what models hand through
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
    return {k: mask(window if k == "sliding_attention" else None) for k in kinds} if kinds else mask(window)


BLOCKS = "distjudge_blocks"


def block_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' SDPA; for a pack, one block of queries at a time against the keys that any of them sees.

    query, key, value (1, heads, L, D) -> (1, L, heads, D). In one call, SDPA would compute all L x L pairs and throw most
    away: half the time of a step at L = 1,000.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa

    blocks = getattr(attention_mask, "blocks", None)
    if blocks is None:
        return sdpa(module, query, key, value, attention_mask, **kwargs)
    out = []
    for part, (_, columns, seen) in zip(
        query.split([rows for rows, _, _ in blocks], dim=2), blocks, strict=True
    ):
        keys, values = key.index_select(2, columns), value.index_select(2, columns)
        out.append(sdpa(module, part, keys, values, seen, **kwargs)[0])
    return torch.cat(out, dim=1), None


def use_block_attention(model: Any) -> None:
    """Switches a model that runs SDPA to block_attention, where its architecture lets the attention be chosen."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(BLOCKS, block_attention)
    AttentionMaskInterface.register(BLOCKS, sdpa_mask)
    if model.config.get_text_config()._attn_implementation == "sdpa":
        with contextlib.suppress(
            ValueError, AttributeError
        ):  # some older architectures keep SDPA's dense mask
            model.set_attn_implementation(BLOCKS)


# ---------------------------------------------------------------------------------------------------------------------
# 4. The judge: a causal LM that is read at the label tokens only
# ---------------------------------------------------------------------------------------------------------------------
SLICE, SLICE_LOGITS = (
    16_384,
    2**24,
)  # tokens of the vocabulary and logits that are computed at a time, at most


def add_label_readout(model: Any) -> None:
    """Teaches a causal LM's forward more arguments: `answer_at`, `token_ids`, `vocabulary` and `ends`.

    `ends` (1, L) says that the row is a pack (see Pack) and makes its attention mask. With `answer_at` (M, 2), rows and
    columns, it returns the hidden states there, (M, H); with `token_ids` (T,) too, their logits, (M, T) float32; with
    `vocabulary` a pair of these and the logsumexp over the whole vocabulary, (M,). It never makes a (positions,
    vocabulary) tensor. The patch sits in the model's own forward, so that PEFT, autocast and DistributedDataParallel
    wrap it like any other. The architecture's logit scale and soft cap apply.
    """
    plain_forward, decoder, head = model.forward, model.get_decoder(), model.get_output_embeddings()
    if not head.weight.is_floating_point():
        raise InputError(
            f"{type(model).__name__}: its output layer is quantized; label rows cannot be read from it"
        )
    config = model.config.get_text_config()
    model.two_levels = type(decoder).forward.__module__.startswith("unsloth.")
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    if not model.two_levels:
        use_block_attention(model)

    def logits_of(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        logits = F.linear(hidden, weight.float(), None if bias is None else bias.float()) * scale
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def over_vocabulary(hidden: torch.Tensor) -> torch.Tensor:
        """In slices that are computed again in the backward pass; a float32 copy of the layer would be 2 GB at 7B."""
        from torch.utils.checkpoint import checkpoint

        width = min(SLICE, max(256, SLICE_LOGITS // max(1, len(hidden))))
        biases = itertools.repeat(None) if head.bias is None else head.bias.split(width)
        norm = lambda *rows: logits_of(hidden, *rows).logsumexp(1)  # noqa: E731
        rows = zip(head.weight.split(width), biases, strict=False)
        if not torch.is_grad_enabled():
            return torch.stack([norm(*some) for some in rows], dim=1).logsumexp(1)
        return torch.stack([checkpoint(norm, *some, use_reentrant=False) for some in rows], dim=1).logsumexp(
            1
        )

    def forward(self, *args, answer_at=None, token_ids=None, vocabulary=False, ends=None, **kwargs):
        if ends is not None and self.two_levels:  # Unsloth drops masks in training, but takes this
            kwargs["prefix_seg_info"] = unsloth_segments(ends[0], kwargs["position_ids"][0])
        elif ends is not None:
            kwargs["attention_mask"] = tree_mask(config, self.dtype, ends[0], kwargs["position_ids"][0])
        if answer_at is None:
            return plain_forward(*args, **kwargs)
        for unused in (
            "logits_to_keep",
            "num_logits_to_keep",
        ):  # what Unsloth's PeftModel adds; none are made here
            kwargs.pop(unused, None)
        kwargs = {k: v for k, v in kwargs.items() if v is not None} | {
            "use_cache": False,
            "return_dict": True,
        }
        hidden = decoder(*args, **kwargs).last_hidden_state[answer_at[:, 0], answer_at[:, 1]]
        with torch.autocast(
            hidden.device.type, enabled=False
        ):  # bf16 logits near 20 would be off by 4e-4 nats
            hidden = hidden.float()
            if token_ids is None:
                return hidden
            logits = logits_of(
                hidden, head.weight[token_ids], None if head.bias is None else head.bias[token_ids]
            )
            return (logits, over_vocabulary(hidden)) if vocabulary else logits

    model.forward = types.MethodType(forward, model)  # bound, as those who wrap it and unwrap it expect


def collate(prompts: Sequence[list[int]], tokens: LabelTokens, pad_id: int) -> dict[str, torch.Tensor]:
    """Right-padded rows and what to read: one row a prompt, or, for whole labels, a row a prompt and spelling.

    Returns input_ids, attention_mask (R, L); answer_at (M, 2), the positions to read; token_ids (T,), the tokens to read
    there; and reads (B * S, 2): for every prompt the rows of answer_at and the columns of token_ids whose
    log-probabilities make up its labels', in the order of `tokens.sequences`.
    """
    rows, at, reads = [], [], []
    column = {token: k for k, token in enumerate(tokens.token_ids)}
    for ids in prompts:
        for n, (_, sequence) in enumerate(tokens.sequences):
            if n == 0 or tokens.whole:
                first = len(at)
                at += [(len(rows), len(ids) - 1 + k) for k in range(len(sequence))]
                rows.append([*ids, *sequence[:-1]])
            reads += [(first + k, column[token]) for k, token in enumerate(sequence)]
    longest = max(map(len, rows))
    batch = {
        "input_ids": [row + [pad_id] * (longest - len(row)) for row in rows],
        "attention_mask": [[1] * len(row) + [0] * (longest - len(row)) for row in rows],
        "answer_at": at, "token_ids": tokens.token_ids, "reads": reads,
    }  # fmt: skip
    return {name: torch.tensor(value) for name, value in batch.items()}


def collate_pack(
    prompts: Sequence[list[int]], tokens: LabelTokens, two_levels: bool = False
) -> dict[str, torch.Tensor]:
    """The same for prompts laid out as one pack, in the order given: position_ids and ends (1, L) in the mask's place."""
    pack, at, reads = build_pack(prompts, range(len(prompts)), tokens.branches, two_levels), {}, []
    column = {token: k for k, token in enumerate(tokens.token_ids)}
    branch_of = {branch: k for k, branch in enumerate(tokens.branches)}
    for i, ids in enumerate(prompts):
        for _, sequence in tokens.sequences:
            path = pack.paths[i * len(branch_of) + branch_of[sequence[:-1]]][len(ids) - 1 :]
            reads += [(at.setdefault(path[k], len(at)), column[token]) for k, token in enumerate(sequence)]
    batch = {
        "input_ids": [pack.ids], "position_ids": [pack.positions], "ends": [pack.ends],
        "answer_at": [(0, place) for place in at], "token_ids": tokens.token_ids, "reads": reads,
    }  # fmt: skip
    return {name: torch.tensor(value) for name, value in batch.items()}


def label_logprobs(
    model: Any, batch: dict[str, torch.Tensor], tokens: LabelTokens, with_mass: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities of the labels, (B, C) float32; with_mass: and the log of their full-vocabulary sum, (B,).

    First-token reading: softmax over the labels' tokens, a label's spellings added up. Whole labels: each spelling's
    log-probability summed over its tokens and the end of the turn, normalised over the labels.
    """
    inputs, (place, column) = {k: v for k, v in batch.items() if k != "reads"}, batch["reads"].T
    if tokens.whole or with_mass:
        logits, log_norm = model(**inputs, vocabulary=True)
        scores = (logits - log_norm[:, None])[place, column]
    else:
        scores = model(**inputs)[place, column]
    lengths = [len(ids) for _, ids in tokens.sequences]
    parts = scores.view(-1, sum(lengths)).split(lengths, dim=1)
    spelled = torch.stack([part.sum(1) for part in parts], dim=1)
    columns = [[n for n, owner in enumerate(tokens.owner) if owner == c] for c in range(len(tokens.labels))]
    scores = torch.stack([spelled[:, some].logsumexp(1) for some in columns], dim=1)
    return scores.log_softmax(1), scores.logsumexp(1) if with_mass else None


class Judge:
    """A model, its tokenizer and its labels. Made by load_judge(); `predict` is the judge at work."""

    packs: bool = True
    """Whether prompts that share a beginning are computed together. Decided by check_model() at load; may be switched off."""
    pack_tokens: int
    """Tokens a forward pass, at most; halved when CUDA runs out of memory."""

    def __init__(
        self, model: Any, encoder: PromptEncoder, tokens: LabelTokens, base: str = "", **settings: Any
    ):
        """settings: max_length (tokens of a prompt, at most; 2048) and spellings, as they were given."""
        self.model, self.encoder, self.tokens, self.base = model, encoder, tokens, base
        max_length, config = settings.get("max_length") or 2048, model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None) or max_length
        if (getattr(config, "rope_parameters", None) or {}).get("rope_type") in ("dynamic", "longrope"):
            positions = config.rope_parameters.get("original_max_position_embeddings", positions)
            if positions < max_length:
                text = (
                    "%s: prompts may have about %d tokens, not %d: with longer ones its position codes change"
                )
                log.warning(text, base or type(model).__name__, positions, max_length)
        self.max_length = min(max_length, positions - max(len(ids) for _, ids in tokens.sequences) + 1)
        self.spellings = dict(settings.get("spellings") or {})
        self.pack_tokens = 1024 if self.device.type == "cpu" else 8192

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

    def encode(self, prompts: Sequence[str], start: int = 0) -> list[list[int]]:
        """Token ids of each rendered prompt. Raises InputError, never cuts, if one is longer than max_length.

        start: the number of the first prompt, for messages.
        """
        for i, prompt in enumerate(prompts, start):
            try:
                prompt_text(prompt)
            except ValueError as error:
                raise InputError(f"prompts[{i}]: prompt: {error}") from None
        encoded = self.encoder.many(prompts)
        over = [i for i, ids in enumerate(encoded) if len(ids) > self.max_length]
        if over:
            longest = max(map(len, encoded))
            first = f"the first is number {start + over[0] + 1}, '{short(prompts[over[0]], 40)!r}'"
            limit = f"longer than max_length {self.max_length} tokens (the longest has {longest}; {first})"
            raise InputError(f"prompts: {len(over)} of {len(prompts)} are {limit}")
        return encoded

    def plan(self, encoded: Sequence[list[int]]) -> list[list[int]]:
        """Divides prompts into forward passes of at most pack_tokens tokens, as packs or as padded rows."""
        if self.packs:
            packs = pack_prompts(encoded, self.pack_tokens, self.tokens.branches, self.model.two_levels)
            return [pack.members for pack in packs]
        groups: list[list[int]] = []
        rows = len(self.tokens.sequences) if self.tokens.whole else 1
        for i in sorted(range(len(encoded)), key=lambda i: -len(encoded[i])):
            if groups and (len(groups[-1]) + 1) * rows * len(encoded[groups[-1][0]]) <= self.pack_tokens:
                groups[-1].append(i)
            else:
                groups.append([i])
        return groups

    def batch(self, encoded: Sequence[list[int]], device: Any = None) -> dict[str, torch.Tensor]:
        """The tensors of one forward pass over the prompts, for label_logprobs(); on the judge's device or another."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        pad_id = next(i for i in ids if i is not None)
        packed = self.packs and collate_pack(encoded, self.tokens, self.model.two_levels)
        batch = packed or collate(encoded, self.tokens, pad_id)
        return {name: tensor.to(device or self.device) for name, tensor in batch.items()}

    def shrink(self, members: Sequence[int], tokens: int) -> None:
        """After a pass over the members, of so many tokens, ran out of memory: from here on half as many, at most.

        Raises torch.OutOfMemoryError if it was one prompt alone. To be called outside the `except` block, for while an
        error is handled the pass that failed is still in memory.
        """
        if len(members) < 2:
            raise torch.OutOfMemoryError(f"one prompt alone, of {tokens} tokens, does not fit into memory")
        self.pack_tokens = max(1, min(self.pack_tokens, tokens) // 2)
        text = "out of memory with %d prompts in a pass: from here on at most %d tokens; no item is lost"
        log.warning(text, len(members), self.pack_tokens)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @torch.no_grad()
    def judge_encoded(
        self, encoded: list[list[int]], tick: Callable[[int], Any] = lambda n: None, with_mass: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities (N, C) and label masses (N,), float32 on the CPU; without with_mass they are all 1."""
        logq, mass = torch.empty(len(encoded), len(self.labels)), torch.ones(len(encoded))
        todo = self.plan(encoded)[::-1]
        while todo:
            members = todo.pop()
            batch, fits = self.batch([encoded[i] for i in members]), True
            try:
                q, m = label_logprobs(self.model, batch, self.tokens, with_mass)
                logq[members], mass[members] = q.float().cpu(), 1.0 if m is None else m.exp().float().cpu()
            except torch.OutOfMemoryError:
                fits = False
            if fits:
                tick(len(members))
            else:
                self.shrink(members, batch["input_ids"].numel())
                left = [
                    i for group in (*todo, members) for i in group
                ]  # those still waiting are too large as well
                todo = [[left[i] for i in group] for group in self.plan([encoded[i] for i in left])][::-1]
        return logq, mass

    def stream(
        self, prompts: Iterable[str], progress: bool = False, window: int = 2048
    ) -> Iterator[tuple[torch.Tensor, float]]:
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
                    logq, mass = self.judge_encoded(self.encode(chunk, start), bar.update)
                finally:
                    self.model.train(was_training)
                if bad := int((logq.isnan().any(1) | ~mass.isfinite()).sum()):
                    raise FloatingPointError(f"the model gives NaN for {bad} of {len(chunk)} prompts")
                yield from zip(logq, mass.tolist(), strict=True)

    def score(self, prompts: Sequence[str], progress: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Label log-probabilities (N, C) and label mass (N,), float32 on the CPU, in the order of the prompts.

        Label mass is the probability that the model, free to say anything, begins with (or is) one of the labels. All
        prompts are checked before the first is judged.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        for start in range(0, len(prompts), 2048) if len(prompts) > 2048 else ():
            self.encode(prompts[start : start + 2048], start)
        rows = list(self.stream(prompts, progress))
        if not rows:
            return torch.empty(0, len(self.labels)), torch.empty(0)
        return torch.stack([logq for logq, _ in rows]), torch.tensor([mass for _, mass in rows])

    def predict(self, prompts: Sequence[str], progress: bool = False) -> Any:
        """Probabilities of the labels, a float32 numpy array (N, C), columns in the order of `labels`.

        prompts: user messages, as text. Raises InputError for an empty prompt or one longer than max_length tokens.
        """
        return self.score(prompts, progress)[0].exp().numpy()


@torch.no_grad()
def check_model(judge: Judge) -> None:
    """Holds label scores against the model's own forward, and packs against single prompts; decides judge.packs.

    Raises InputError where scores are not finite, or differ from the model's own: then it changes its logits in a way
    that add_label_readout does not know. Packs rest on a causal mask and position ids that the model honours; where an
    architecture has other ideas, a warning says so and prompts are run as padded rows. The probes are longer than a
    sliding window of up to 1,024 tokens (on CUDA of any length); an architecture with another kind of window is not
    packed. Unsloth, which treats masks otherwise in training, is checked in both modes.
    """
    model, name, dtype = judge.model, type(judge.model).__name__, next(judge.model.parameters()).dtype
    if hasattr(model, "meant_for"):  # an outline has no weights to check with
        return
    tolerance, settings = 1e-4 if dtype == torch.float32 else 0.05, model.config.get_text_config().to_dict()
    windows = {
        key: size for key, size in settings.items() if "window" in key and isinstance(size, int) and size > 1
    }
    longest = max([0, *(size for size in windows.values() if size <= 1024 or judge.device.type == "cuda")])
    probes = [
        "Is this so?",
        "Is this so? Yes.",
        "Is this it, then?",
        "Other words altogether, and a few more of them.",
    ]
    words = "word " * min(longest + 8, max(1, judge.max_length - 64))
    probes += [words + "one", words + "two"] if longest else []
    encoded = sorted(judge.encoder(probe)[: judge.max_length] for probe in probes)

    def hidden(prompts: Sequence[list[int]], packed: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        judge.packs = packed
        batch = judge.batch(prompts)
        rows = batch.pop("reads")[:, 0]
        return batch, model(**{key: tensor for key, tensor in batch.items() if key != "token_ids"})[rows]

    model.eval()
    batch, _ = hidden(encoded[:1], False)
    logits, norm = model(**batch, vocabulary=True)
    at, columns = batch["answer_at"], batch["token_ids"]
    own = (
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        .logits[at[:, 0], at[:, 1]]
        .float()
    )
    ours, own = (
        torch.cat([logits, norm[:, None]], 1),
        torch.cat([own[:, columns], own.logsumexp(1)[:, None]], 1),
    )
    if not torch.isfinite(own).all():
        why = f"its weights are damaged, or do not fit into {str(dtype).removeprefix('torch.')}"
        raise InputError(f"{model.name_or_path or name}: model: its scores are not finite numbers: {why}")
    if not torch.allclose(ours, own, rtol=tolerance, atol=tolerance * float(own.abs().max())):
        off = f"off by {(ours - own).abs().max():.2g} in a logit"
        raise InputError(
            f"{name}: its label scores cannot be read exactly ({off}): this architecture changes its logits"
        )
    off, why = 0.0, ""
    try:
        if unknown := sorted(
            set(windows) - {"sliding_window", "max_window_layers", "_sliding_window_pattern"}
        ):
            raise NotImplementedError(f"its {unknown[0]} is unknown to us")
        for training in (False, True) if judge.backend == "unsloth" else (False,):
            model.train(training)
            single = torch.cat([hidden([ids], False)[1] for ids in encoded])
            gap = (hidden(encoded, True)[1] - single).norm(dim=1) / single.norm(dim=1)
            off = max(off, gap.nan_to_num(math.inf).max().item())
        why = f"hidden states are off by {off:.1%}"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # an architecture can refuse the mask in ways of its own
        off, why = math.inf, first_line(error)
    model.eval()
    judge.packs = off <= tolerance
    if not judge.packs:
        log.warning("%s cannot be run on packed prompts (%s): they are run as padded rows", name, why)


def load_judge(
    path: str | os.PathLike,
    labels: Sequence[str] | None = None,
    *,
    spellings: dict[str, Sequence[str]] | None = None,
    lora_rank: int = 16,
    four_bit: bool = False,
    max_length: int | None = None,
    device: str | None = None,
    seed: int = 0,
    backend: str = "auto",
    gradient_checkpointing: bool = False,
    weights: bool = True,
) -> Judge:
    """Loads a judge: from a run folder of save_judge() or run(), or a model (a folder, a hub id) given its labels.

    A model is loaded with Unsloth or transformers (see choose_backend), in float32 on a CPU and bfloat16 on CUDA (float16
    on cards without it), 4-bit (NF4) on request. It gets fresh LoRA adapters on all linear layers of its decoder, or none
    with lora_rank = 0, when all weights, then in float32, are trained. Prompts may have max_length tokens (2048), or what
    a saved judge was trained with. Only safetensors are read, and no code from the model's repository is run.
    gradient_checkpointing: Unsloth's own, which must be known here; transformers' is train()'s. weights=False: an outline
    for dry runs, on PyTorch's meta device, which can be counted but cannot judge.
    Raises InputError for a path that holds no model, labels that contradict the run folder's, files of a judge that have
    changed, or a model whose label scores differ from those of its own forward.
    """
    folder, path, saved = Path(path), str(path), None
    if (folder / "judge.json").is_file():
        saved = _read_saved(folder, labels, weights)
        labels, spellings, four_bit, max_length = (
            saved["labels"], saved["spellings"], saved["four_bit"], max_length or saved["max_length"],
        )  # fmt: skip
        base, lora_rank = (saved["base"], 1) if saved["adapter"] else (str(folder / "model"), 0)
    else:
        base = path
        if not labels:
            raise InputError(f"{path}: labels: a model that is not a saved judge needs labels=[...]")
        if four_bit and not lora_rank:
            raise InputError(
                "four_bit: 4-bit weights cannot be trained themselves; set lora_rank to 1 or more"
            )
    _check_folder(base)
    use, why = choose_backend(backend, device, trained=not lora_rank)  # before transformers is imported
    tokenizer = load_tokenizer(str(folder / "tokenizer") if saved else path)
    encoder = PromptEncoder(tokenizer, saved and saved["frame"])
    label_tokens(
        tokenizer, labels, spellings, encoder
    )  # what is wrong with them is said before the weights are loaded
    options = {
        "four_bit": four_bit,
        "device": device,
        "trained": not lora_rank,
        "max_length": max_length or 2048,
    }
    model = load_model(base, **options, backend=use, weights=weights)
    model.backend_reason = why
    if len(tokenizer) > (rows := model.get_input_embeddings().weight.shape[0]):
        raise InputError(f"{path}: model: has {rows} tokens, its tokenizer {len(tokenizer)}")
    if saved and saved["adapter"] and _fingerprint(model) != saved["base_fingerprint"]:
        raise InputError(f"{path}: base: the weights of {base} are not those the judge was trained on")
    made = {"base": str(Path(base).resolve()) if Path(base).is_dir() else base, "spellings": spellings}
    made |= {"lora_rank": lora_rank, "max_length": max_length, "seed": seed, "encoder": encoder}
    adapter = folder / "adapter" if saved and saved["adapter"] else None
    return make_judge(
        model, tokenizer, labels, **made, gradient_checkpointing=gradient_checkpointing, adapter=adapter
    )


def make_judge(
    model: Any,
    tokenizer: Any,
    labels: Sequence[str],
    *,
    base: str = "",
    spellings: dict[str, Sequence[str]] | None = None,
    lora_rank: int = 16,
    max_length: int | None = None,
    seed: int = 0,
    gradient_checkpointing: bool = False,
    encoder: PromptEncoder | None = None,
    adapter: Path | None = None,
) -> Judge:
    """A judge from a causal LM and a tokenizer that are loaded already: see load_judge(). The model is changed in place.

    adapter: a folder with a trained adapter, in the place of fresh ones.
    """
    encoder = encoder or PromptEncoder(tokenizer)
    tokens = label_tokens(tokenizer, labels, spellings, encoder)
    add_label_readout(model)
    if adapter or lora_rank:
        model = _with_adapters(model, lora_rank, seed, gradient_checkpointing, adapter)
    judge = Judge(model, encoder, tokens, base, max_length=max_length, spellings=spellings)
    check_model(judge)
    return judge


def _check_folder(path: str) -> None:
    """Raises InputError if a path names something else than a folder with a model; a hub id passes."""
    folder, wrong = Path(path), ""
    if folder.is_file():
        wrong = "is a file, not a folder"
    elif (
        folder / "adapter_config.json"
    ).is_file():  # transformers would load another model beneath it, pickles too
        wrong = "holds a PEFT adapter, not a model by itself; merge it into its base first"
    elif folder.is_dir() and not (folder / "config.json").is_file():
        wrong = "cannot be loaded: there is no config.json in it"
    elif not folder.is_dir() and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path):
        wrong = "no such folder" if path.strip() else "name a folder or a hub id"
    if wrong:
        raise InputError(f"{path}: model: {wrong}")


def choose_backend(wanted: str = "auto", device: str | None = None, trained: bool = False) -> tuple[str, str]:
    """Which library loads and runs the model, and why: ("unsloth" or "transformers", reason).

    "auto" is Unsloth on CUDA where it imports, and adapters are trained, not the weights (trained). Unsloth patches what
    it imports, so it is imported here, before transformers, and without its download statistics. Raises InputError
    where Unsloth is asked for and cannot be had.
    """
    why_not = ""
    if wanted not in ("auto", "unsloth", "transformers"):
        raise InputError(f"backend: must be auto, unsloth or transformers, not {wanted}")
    if wanted == "transformers":
        why_not = "asked for"
    elif trained:
        why_not = "all weights are trained, not adapters"
    elif not torch.cuda.is_available() or not str(device or "cuda").startswith("cuda"):
        why_not = "no CUDA device" if not torch.cuda.is_available() else f"the model goes to {device}"
    else:
        os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
        try:
            import unsloth  # noqa: F401
        except ModuleNotFoundError as error:
            why_not = f"{error.name} is not installed"
        except Exception as error:  # it raises what its many dependencies raise
            why_not = f"Unsloth cannot be imported: {type(error).__name__}: {first_line(error)}"
    if why_not and wanted == "unsloth":
        raise InputError(f"backend: Unsloth cannot be used: {why_not}")
    if why_not:
        return "transformers", why_not
    return "unsloth", "asked for" if wanted == "unsloth" else "CUDA, and Unsloth is installed"


def _with_adapters(model: Any, rank: int, seed: int, gradient_checkpointing: bool, saved: Path | None) -> Any:
    """The model with adapters, in float32: those of a folder, or fresh ones on every linear layer of the decoder.

    A vision tower beside the decoder gets none. Raises InputError for a folder whose adapter does not load.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    inside = {id(module) for module in model.get_decoder().modules()}
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    targets = sorted({name.rsplit(".", 1)[-1] for name, module in linear.items() if id(module) in inside})
    settings = {
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets,
    }
    unsloth = getattr(model, "backend", "") == "unsloth" and not hasattr(model, "meant_for")
    # Unsloth's way of recomputing activations keeps what it must keep in main memory, through CUDA
    recompute = "unsloth" if gradient_checkpointing and torch.cuda.is_available() else gradient_checkpointing
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if saved:
            try:
                model = PeftModel.from_pretrained(model, str(saved), is_trainable=True)
            except Exception as error:  # a damaged file can fail in any way
                raise InputError(f"{saved}: the adapter cannot be loaded: {first_line(error)}") from error
            if unsloth:  # its fused layers, as its own loader puts them over an adapter
                from unsloth import FastLanguageModel

                model = FastLanguageModel.patch_peft_model(model, use_gradient_checkpointing=recompute)
        elif unsloth:
            from unsloth import FastLanguageModel

            options = {"random_state": seed, "use_gradient_checkpointing": recompute}
            model = FastLanguageModel.get_peft_model(model, **settings, **options)
        else:
            outside = "|".join(re.escape(name) for name, module in linear.items() if id(module) not in inside)
            lora = LoraConfig(**settings, task_type="CAUSAL_LM", exclude_modules=outside or None)
            model = get_peft_model(model, lora)
    for weight in model.parameters():
        if weight.requires_grad:  # rounded to 16 bits, small steps would be lost
            weight.data = weight.data.float()
    return model


def half_precision(device: str | torch.device) -> torch.dtype:
    """The 16-bit type of a device: bfloat16, or float16 on cards that lack it (T4, V100)."""
    here = torch.device(device).type == "cuda" and torch.cuda.is_available()
    return (
        torch.float16
        if here and not torch.cuda.is_bf16_supported(including_emulation=False)
        else torch.bfloat16
    )


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a folder or hub id, as its tokenizer.json has it. Raises InputError where it has none.

    AutoTokenizer, which is for folders without that file, rebuilds some tokenizers by the model's type: a Qwen2 model
    always gets Qwen2's splitting rule and end of text, whatever the file says.
    """
    from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

    what = "config.json cannot be used"
    try:
        if (Path(path) / "config.json").is_file():  # a fault in it is not the tokenizer's
            AutoConfig.from_pretrained(path, trust_remote_code=False)
        what = "its tokenizer cannot be loaded"
        if not Path(path).is_dir():
            what = "no such folder, and it cannot be loaded from a model hub"
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        except (OSError, ValueError):
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if not set(tokenizer(_PROBE, add_special_tokens=False)["input_ids"]) - {tokenizer.unk_token_id}:
            raise ValueError(
                "it has no vocabulary (tokenizer.json is missing)"
            )  # transformers makes an empty one up
    except Exception as error:  # a damaged or contradictory folder can fail in any way
        raise InputError(f"{path}: model: {what}: {first_line(error)}") from error
    return tokenizer


def load_model(
    path: str,
    *,
    four_bit: bool = False,
    device: str | None = None,
    trained: bool = False,
    backend: str = "transformers",
    max_length: int = 2048,
    weights: bool = True,
    dtype: torch.dtype | None = None,
) -> Any:
    """A causal LM as load_judge() takes it, before adapters; trained: its own weights will be, so they are float32."""
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    device = device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    device = (
        "cuda" if not weights and four_bit else device
    )  # 4-bit runs are planned for a card, also without one
    dtype = dtype or (torch.float32 if device == "cpu" or trained else half_precision(device))
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False}
        if not weights:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            model.meant_for, model.is_loaded_in_4bit = torch.device(device), four_bit
        elif backend == "unsloth":
            from unsloth import FastLanguageModel

            # longer inputs would be cut at their end, where the answer is read, and positions beyond the model's own
            # rescaled; exactly the weights named, not those of another repository that Unsloth knows for them
            room = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
            options |= {"max_seq_length": min(max_length + 64, room), "load_in_4bit": four_bit}
            options |= {
                "use_exact_model_name": True,
                "use_gradient_checkpointing": False,
                "device_map": {"": device},
            }
            model, _ = FastLanguageModel.from_pretrained(path, **options)
        else:
            if dtype == torch.float16 and "gemma" in config.model_type:
                options["dtype"] = dtype = torch.float32  # its activations do not fit into float16
            if four_bit:
                nf4 = {
                    "bnb_4bit_quant_type": "nf4",
                    "bnb_4bit_use_double_quant": True,
                    "bnb_4bit_compute_dtype": dtype,
                }
                options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, **nf4)
                options["device_map"] = {"": device}
            options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
            model, report = AutoModelForCausalLM.from_pretrained(path, **options)
            lost = [
                *report["missing_keys"],
                *(k if isinstance(k, str) else k[0] for k in report["mismatched_keys"]),
            ]
            if lost:  # transformers would go on with random numbers in their place
                shape = "of its weights are missing or of another shape"
                raise ValueError(f"{len(lost)} {shape}, the first {min(lost)}")
        if four_bit and not getattr(model, "is_loaded_in_4bit", False):  # Unsloth would go on in 16 bits
            raise ValueError("it was not loaded in 4 bits; bitsandbytes does not work here")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a damaged or contradictory folder can fail in any way
        raise InputError(f"{path}: model: cannot be loaded: {first_line(error)}") from error
    for module in model.modules():
        if hasattr(
            module, "support_avx512bf16_for_cpu"
        ):  # else, on such a CPU, judging packs the weights in place
            module.support_avx512bf16_for_cpu = False  # into a form through which no gradient flows
    if weights and not four_bit:
        model.to(device)
    model.backend, model.backend_reason = backend, "asked for"
    return model


def save_judge(judge: Judge, folder: str | os.PathLike) -> None:
    """Writes judge.json, tokenizer/ and adapter/ (or model/, when all weights were trained): safetensors and JSON.

    A config.json and metrics.json that another judge left in the folder go, for they would speak of this one.
    """
    folder, adapter = Path(folder), hasattr(judge.model, "peft_config")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "metrics.json"):
        (folder / name).unlink(missing_ok=True)
    options = {"save_embedding_layers": False} if adapter else {}
    judge.model.save_pretrained(folder / ("adapter" if adapter else "model"), **options)
    judge.tokenizer.save_pretrained(folder / "tokenizer")
    about = {"distjudge": __version__, "base": judge.base, "adapter": adapter, "labels": judge.labels}
    about |= {
        "four_bit": bool(getattr(judge.model, "is_loaded_in_4bit", False)),
        "spellings": judge.spellings,
    }
    about |= {
        "max_length": judge.max_length,
        "frame": judge.encoder.frame,
        "sequences": judge.tokens.sequences,
    }
    about |= {
        "base_fingerprint": _fingerprint(judge.model) if adapter else None,
        "prompt_hash": prompt_hash(judge),
    }
    about |= {"sha256": checksums(folder)}
    write_json(folder / "judge.json", about | {"digest": _digest(about)})


def prompt_hash(judge: Judge) -> str:
    """A hash of what stands around a message and of the tokens its labels are read at."""
    return _digest([judge.encoder.frame, judge.tokens.sequences])


def _digest(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _fingerprint(model: Any) -> str:
    """A hash of a sample of the base weights that are not quantized, rounded to bfloat16."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and "lora_" not in name:
            name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            sample = weight.detach().flatten()[:64].to("cpu", torch.bfloat16).view(torch.uint8)
            digest.update(name.encode() + bytes(sample.tolist()))
    return digest.hexdigest()


def _hash_file(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 22):
        digest.update(block)
    return digest.hexdigest()


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of a judge's files, by their path in its folder; not of what else may lie there."""
    found = {}
    for path in sorted(
        path for part in ("tokenizer", "adapter", "model") for path in (folder / part).rglob("*")
    ):
        if path.suffix in (".json", ".jinja", ".safetensors") and path.is_file():
            with open(path, "rb") as file:
                found[path.relative_to(folder).as_posix()] = _hash_file(file)
    return found


def _read_saved(folder: Path, labels: Sequence[str] | None, weights: bool) -> dict[str, Any]:
    """judge.json of a saved judge. Raises InputError, a line for each, if files of it are not those that were saved."""
    if not weights:
        raise InputError(f"{folder}: model: an outline is made of a model, not of a trained judge")
    about, since = folder / "judge.json", "compared with when the judge was saved"
    try:
        saved = json.loads(about.read_text(encoding="utf-8"))
        if saved.pop("digest") != _digest(saved):
            raise InputError(f"{about}: has changed, {since}")
    except (OSError, KeyError, TypeError, AttributeError, RecursionError, ValueError) as error:
        why = f"not a judge written by distjudge ({type(error).__name__}: {first_line(error)})"
        raise error if isinstance(error, InputError) else InputError(f"{about}: {why}") from None
    here, then = checksums(folder), saved["sha256"]
    kind = lambda name: (
        "is missing" if name not in here else "has changed" if name in then else "was not there"
    )  # noqa: E731
    wrong = [
        f"{folder / n}: {kind(n)}, {since}" for n in sorted({*here, *then}) if here.get(n) != then.get(n)
    ]
    with contextlib.suppress(
        OSError, ValueError, KeyError, TypeError
    ):  # a judge that was saved by itself has none
        if (
            json.loads((folder / "config.json").read_text(encoding="utf-8"))["prompt_hash"]
            != saved["prompt_hash"]
        ):
            wrong.append(
                f"{folder / 'config.json'}: prompt_hash: is that of another judge than the one in judge.json"
            )
    if wrong:
        raise InputError("\n".join(wrong))
    if labels and [str(label) for label in labels] != saved["labels"]:
        given = f"{listed(saved['labels'])}, not {listed(map(str, labels))}"
        raise InputError(f"{folder}: labels: this judge was trained for {given}")
    return saved


# ---------------------------------------------------------------------------------------------------------------------
# 5. Losses: (B, C) -> (B,), in nats
# ---------------------------------------------------------------------------------------------------------------------
def check_distributions(logq: torch.Tensor, p: torch.Tensor) -> None:
    """Raises ValueError unless rows of logq are log-probabilities and of p probabilities (to 1e-2), both (..., C)."""
    if logq.shape != p.shape or not logq.dim():
        raise ValueError(
            f"logq and p must be alike, (B, C): they are {tuple(logq.shape)} and {tuple(p.shape)}"
        )
    wanted = {
        "logq": "log-probabilities (.log_softmax(-1) makes them of scores)",
        "p": "probabilities (votes / their sum)",
    }
    for name, rows in (("logq", logq.detach().double().exp()), ("p", p.detach().double())):
        wrong = ~((rows.sum(-1) - 1).abs() <= 1e-2) | (rows < 0).any(-1)
        if bool(wrong.any()):
            row = [round(x, 4) for x in (logq if name == "logq" else p)[wrong][0].tolist()]
            raise ValueError(
                f"{name}: wanted are {wanted[name]}, given is a row {row}; the order is (logq, p)"
            )


def _checked(kernel: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A loss that checks (logq, p) first, which waits for the device; the training loop calls inspect.unwrap(loss)."""

    @functools.wraps(kernel)
    def loss(logq: torch.Tensor, p: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        check_distributions(logq, p)
        return kernel(logq, p, *args, **kwargs)

    return loss


def majority(p: torch.Tensor) -> torch.Tensor:
    """The majority label r of each row, one-hot (B, C). Labels that tie (to 1e-6) share it: order decides nothing."""
    top = (p >= p.max(-1, keepdim=True).values - 1e-6).to(p.dtype)
    return top / top.sum(-1, keepdim=True)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _cross(logq: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """-sum_c p_c log q_c with 0 log 0 = 0, at least in float32."""
    return -torch.where(p > 0, _wide(p) * _wide(logq), 0.0).sum(-1)


@_checked
def kl_loss(logq: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """KL(p || q) = sum_c p_c (log p_c - log q_c) in nats; terms with p_c = 0 are 0. (B, C), (B, C) -> (B,).

    Raises ValueError for what are no distributions (see check_distributions).

    >>> kl_loss(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]))
    tensor([0.6931])
    """
    return _cross(logq, p) + torch.xlogy(_wide(p), _wide(p)).sum(-1)


@_checked
def ce_loss(logq: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """CE(r, q) = -sum_c r_c log q_c in nats, r the majority label of p; tied labels share it. (B, C), (B, C) -> (B,).

    Raises ValueError for what are no distributions (see check_distributions).

    >>> ce_loss(torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.6, 0.4]]))
    tensor([1.3863])
    """
    return _cross(logq, majority(p))


@_checked
def rps_loss(logq: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Ranked probability score of ordered labels, less its least value: sum_{k<C} (Q_k - P_k)^2, Q and P cumulative.

    (B, C), (B, C) -> (B,), from 0 to C - 1; columns from the lowest label to the highest. Being wrong by two labels costs
    more than by one, which KL does not know. Source: Epstein (1969); Gneiting and Raftery (2007).
    Raises ValueError for what are no distributions (see check_distributions).

    >>> rps_loss(torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[1.0, 0.0, 0.0]]))    # 0.5^2 + 0.25^2
    tensor([0.3125])
    """
    return ((_wide(logq).exp() - _wide(p)).cumsum(-1)[..., :-1] ** 2).sum(-1)


LOSSES: dict[str, Callable[..., torch.Tensor]] = {"kl": kl_loss}
"""What alpha weighs, by the name that Config.loss takes. A new loss is a function (logq, p) -> (B,) and an entry here."""


@_checked
def hybrid_loss(
    logq: torch.Tensor, p: torch.Tensor, alpha: float, worst: torch.Tensor | None = None, loss: str = "kl"
) -> torch.Tensor:
    """alpha KL(p' || q) + (1 - alpha) CE(r, q), p' being `worst` or, without it, p; r is that of p. -> (B,), nats.

    alpha = 0 is single-point training, alpha = 1 drops the cross-entropy; a term of weight 0 is left out, also where it is
    infinite. loss: another entry of LOSSES in KL's place. Source: arXiv 2505.12301, section 3.
    Raises ValueError for what are no distributions (see check_distributions).
    """
    cross_entropy = _cross(logq, majority(p)) if alpha < 1 else 0.0
    if alpha == 0:
        return cross_entropy
    return (
        alpha * inspect.unwrap(LOSSES[loss])(logq, p if worst is None else worst)
        + (1 - alpha) * cross_entropy
    )


def shrink_votes(counts: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
    """(counts + prior) / (N + k): the mean of a Dirichlet posterior, prior = k m with k = prior.sum(-1). -> (B, C).

    One vote moves it 1 / (1 + k) of the way from m to that vote, a hundred 100 / (100 + k).

    >>> shrink_votes(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]]))
    tensor([[0.7500, 0.2500]])
    """
    total = _wide(counts + prior)  # a float16 sum ends at 65,504 votes
    return (total / total.sum(-1, keepdim=True)).to(counts.dtype)


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
    size = (
        (u * rank > excess).sum(-1, keepdim=True).clamp_min(1)
    )  # 0 only for NaN, which then comes out as NaN
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
        t = torch.where(slope > 1e-18 * steepest, torch.maximum(t, root), t)  # at a corner x no longer moves
    return _project_simplex(p + t * u)


@_checked
def worst_case(
    logq: torch.Tensor, p: torch.Tensor, eps: float | torch.Tensor, steps: int = 5, step_size: float = 0.05
) -> torch.Tensor:
    """The paper's adversary: projected gradient ascent on KL(p' || q) over E(p), from p' = p. (B, C), (B, C) -> (B, C).

        p' <- project_ball(p' + step_size * (log(p' / q) + 1), p, eps)

    q is a constant: no gradient flows through the result. At a zero of p' the gradient is -inf; it is taken as
    log(1e-12 / q) + 1, so that a zero stays zero unless q is about 1e-12 or less there. A one-hot p therefore does not
    move. KL is convex in p', so no step lowers it; p is returned where rounding makes it worse. eps: a number or (B,).
    Raises ValueError for a negative eps, and for what are no distributions (see check_distributions).
    """
    logq_, p_ = _working(logq.detach(), p.detach())
    radius, kl = _radius(eps, p_), inspect.unwrap(kl_loss)
    if not bool((radius > 0).any()):
        return p.detach()
    pull = 1 - logq_.clamp_min(-1e4)  # a label the model rules out (-inf) pulls hard, but not to NaN
    x = p_
    for _ in range(steps):
        x = _project_ball(x + step_size * (x.clamp_min(1e-12).log() + pull), p_, radius)
    gained = (kl(logq_, x) >= kl(logq_, p_)) & (radius[..., 0] > 0)
    return torch.where(gained[..., None], x, p_).to(p.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# 7. Training
# ---------------------------------------------------------------------------------------------------------------------
PRESETS: dict[
    str, dict[str, Any]
] = {  # the method's settings by name; on a recipe's command line, flags beside --preset win
    "paper": {"alpha": 0.8, "eps": 0.25, "steps": 5, "step_size": 0.05, "teacher": 0.0},
    "single": {"alpha": 0.0, "eps": 0.0, "teacher": 0.0},
    "kl": {"alpha": 1.0, "eps": 0.0, "teacher": 0.0},
    "teacher": {"alpha": 1.0, "eps": 0.0, "teacher": 5.0, "schedule": "constant"},
}


@dataclasses.dataclass
class Config:
    """Settings of a run. The defaults of the method are the paper's."""

    train: tuple[str, ...] = ()
    """Training items: one or more .jsonl or .jsonl.gz files."""
    test: tuple[str, ...] = ()
    """Test items. Without any, the training file's "split" field decides, or else an 8:2 split by group."""
    labels: tuple[str, ...] = ()
    """Label order. Default: numeric order, or the order of the first item's counts."""
    spellings: tuple[str, ...] = ()
    """More spellings of a label, as LABEL=TEXT,TEXT (contradiction=contradiction,contra); their probabilities add up."""
    overlong: Literal["error", "drop"] = "error"
    """What to do with prompts over max_length: stop and count them, or drop the items and say how many."""

    model: str = "Qwen/Qwen2.5-0.5B-Instruct"
    """Model folder or hub id."""
    four_bit: bool = False
    """Load the weights in 4 bits (NF4)."""
    lora_rank: int = 16
    """Rank of the LoRA adapters, whose scale is 2; 0 trains all weights."""
    max_length: int = 2048
    """Longest prompt in tokens, chat template included."""
    backend: Literal["auto", "unsloth", "transformers"] = "auto"
    """What loads and runs the model: Unsloth on CUDA where it works, transformers elsewhere ("auto"), or one of the two."""

    alpha: float = 0.8
    """Weight of the loss against the human distribution; the rest is cross-entropy with the majority label."""
    eps: float = 0.25
    """Radius of the l2 ball in which the adversary moves the human distribution; 0 is no adversary."""
    teacher: float = 0.0
    """How many votes an item a teacher's prediction counts as, beside the item's own. The teacher is a running mean of the
    weights, and gives the answers in the end. 0 is no teacher; 5 is what the preset takes. Up to half more computing."""
    loss: str = "kl"
    """What alpha weighs: an entry of LOSSES."""
    steps: int = 5
    """Steps of the adversary."""
    step_size: float = 0.05
    """Step size of the adversary."""

    epochs: float = 2.0
    """Passes over the training items."""
    learning_rate: float = 5e-5
    """Peak learning rate of AdamW."""
    batch_size: int = 8
    """Items an optimizer step. How many go through the model at once is pack_tokens' affair."""
    pack_tokens: int = 0
    """Tokens a forward pass, at most; sets the memory needed. 0: 1,024 on a CPU, 8,192 on CUDA."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """What the learning rate does after the warm-up."""
    warmup: float = 0.03
    """Linear warm-up: a share of all steps if below 1, else a number of steps. Schedule "constant" has none."""
    weight_decay: float = 0.0
    """Weight decay of AdamW, on matrices only."""
    seed: int = 0
    """Seed of LoRA weights, data order and split."""

    out: str = "runs/last"
    """The run folder; what is in it is overwritten."""
    resume: bool = False
    """Go on from the newest whole checkpoint of a run that was stopped. Data, model and settings must be the same."""
    save_every: float = 0.1
    """Write a checkpoint every so many steps (below 1: a share of all steps), and keep the two newest; 0 is never."""
    eval_every: float = 0.0
    """Evaluate on the test items every so many steps (below 1: a share of all); 0 is at the end only. Nothing is selected by it."""
    report_to: tuple[str, ...] = ()
    """Loggers that accelerate knows: tensorboard, wandb, trackio, ..."""

    def check(self) -> None:
        """Raises InputError naming the field for a value outside its range."""
        least = dict.fromkeys(
            "eps steps step_size teacher learning_rate epochs warmup lora_rank eval_every".split(), 0
        )
        least |= dict.fromkeys(("save_every", "pack_tokens", "weight_decay"), 0) | {
            "batch_size": 1,
            "max_length": 1,
        }
        for name, low in least.items():
            if not low <= (value := getattr(self, name)) < math.inf:
                raise InputError(f"{name}: must be {low} or more, not {value}")
        if not 0 <= self.alpha <= 1:
            raise InputError(f"alpha: must be between 0 and 1, not {self.alpha}")
        if self.epochs == 0:
            raise InputError("epochs: must be more than 0")
        if not self.out.strip():
            raise InputError("out: name a folder")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed: must be between 0 and 4294967295, not {self.seed}")
        for name, allowed in (("schedule", ("linear", "cosine", "constant")), ("loss", tuple(LOSSES))):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}: must be one of {', '.join(allowed)}, not {getattr(self, name)}")


def autocast_type(judge: Judge) -> torch.dtype | None:
    """The 16-bit type that training computes in; None: in float32, as the weights are."""
    held = judge.model.get_input_embeddings().weight.dtype
    if held == torch.float32 and (judge.device.type == "cpu" or hasattr(judge.model, "peft_config")):
        return None
    return half_precision(judge.device) if held == torch.float32 else held


def optimizer_is_8bit(judge: Judge) -> bool:
    """Whether AdamW keeps its moments in 8 bits: where the weights are 4-bit on CUDA."""
    return judge.device.type == "cuda" and bool(getattr(judge.model, "is_loaded_in_4bit", False))


def make_optimizer(judge: Judge, config: Config) -> torch.optim.Optimizer:
    """AdamW on what is trained; vectors (biases, norms) get no weight decay."""
    weights = [w for w in judge.model.parameters() if w.requires_grad]
    groups = [{"params": [w for w in weights if w.dim() > 1], "weight_decay": config.weight_decay}]
    groups += (
        [{"params": vectors, "weight_decay": 0.0}] if (vectors := [w for w in weights if w.dim() < 2]) else []
    )
    if optimizer_is_8bit(judge):
        from bitsandbytes.optim import AdamW8bit as AdamW
    else:
        from torch.optim import AdamW
    return AdamW(groups, lr=config.learning_rate)


def epoch_order(encoded: Sequence[Sequence[int]], config: Config, epoch: int) -> list[int]:
    """The order of the prompts in an epoch: see shuffled()."""
    return shuffled(encoded, config.seed * 1_000_003 + epoch, chunk=config.batch_size)


class Teacher:
    """A running mean of the trained weights, float32, over the last tenth of all steps so far.

    mean += rate * (new - mean), rate = 10 / (10 + n) with n the steps in it, weighs step t by about t^9. Source: mean
    teachers, Tarvainen and Valpola 2017; weights that are a power of t, Karras et al. 2024. That its predictions count
    as votes is ours.
    """

    def __init__(self, judge: Judge):
        self.judge, self.number, self.means = judge, 0, []
        self.weights = [w for w in judge.model.parameters() if w.requires_grad]

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number, "means": self.means}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number, self.means = state["number"], [mean.to(self.judge.device) for mean in state["means"]]

    @torch.no_grad()
    def update(self) -> None:
        self.means = self.means or [torch.zeros_like(w, dtype=torch.float32) for w in self.weights]
        for mean, weight in zip(self.means, self.weights, strict=True):
            mean += 10 / (10 + self.number) * (weight.float() - mean)
        self.number += 1

    @torch.no_grad()
    def put(self, values: Sequence[torch.Tensor]) -> None:
        for weight, value in zip(self.weights, values, strict=True):
            weight.copy_(value)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The mean in the weights' place while this is open, without dropout."""
        held, was_training = [w.detach().clone() for w in self.weights], self.judge.model.training
        self.put(self.means)
        self.judge.model.eval()
        try:
            yield
        finally:
            self.put(held)
            self.judge.model.train(was_training)


def train(
    judge: Judge,
    items: Sequence[Item],
    config: Config,
    eval_items: Sequence[Item] = (),
    on_step: Callable[[int], Any] | None = None,
) -> list[dict[str, float]]:
    """Trains the judge in place with the method's objective; returns the log, a dict a step, losses in nats.

    The loss of a step is the mean over its batch_size items, whatever the passes and processes (torchrun) they are
    divided into. Two runs with one seed on one machine give the same weights. on_step: called with each step's number
    after it. Raises InputError if the items' labels are not the judge's, a prompt is too long, or config.resume finds
    another run's checkpoints or damaged ones only; FloatingPointError when the loss or the weights are no longer
    finite; OSError when a checkpoint cannot be written; Stopped after SIGINT or SIGTERM.
    """
    from accelerate.utils import set_seed
    from transformers import get_scheduler

    config.check()
    for some in filter(None, (items, eval_items)):
        if (labels := labels_of(some)) != judge.labels:
            raise InputError(
                f"{some[0].where}: labels {listed(labels)} are not the judge's {listed(judge.labels)}"
            )
    encoded, votes, ids = training_rows(judge, items)
    per_epoch = math.ceil(len(encoded) / config.batch_size)
    last = math.ceil(per_epoch * config.epochs)
    save_every, eval_every = (
        whole_steps(n, last) or last + 1 for n in (config.save_every, config.eval_every)
    )
    set_seed(config.seed)
    accelerator = _accelerator(judge, config)
    rank, processes = accelerator.process_index, accelerator.num_processes
    model = accelerator.prepare(judge.model) if processes > 1 else judge.model
    half = autocast_type(judge)
    autocast = functools.partial(torch.autocast, judge.device.type, half, enabled=half is not None)
    scaler = torch.amp.GradScaler(judge.device.type, enabled=half == torch.float16)
    optimizer = make_optimizer(judge, config)
    schedule = get_scheduler(config.schedule, optimizer, whole_steps(config.warmup, last), last)
    teacher = Teacher(judge) if config.teacher else None
    parts = {"optimizer": optimizer, "schedule": schedule, "scaler": scaler} | (
        {"teacher": teacher} if teacher else {}
    )
    run = Run(judge, config, parts, _made_from(judge, items, eval_items, config), last)
    adversary, hybrid = inspect.unwrap(worst_case), inspect.unwrap(hybrid_loss)  # without their checks

    def backward(rows: list[int], said: torch.Tensor | None, share: float) -> torch.Tensor | None:
        """Adds the gradient of `share` times these items' losses; None where a pass does not fit into memory."""
        total, passes = torch.zeros((), device=judge.device), judge.plan([encoded[i] for i in rows])
        for members in passes:
            chosen = [rows[k] for k in members]
            batch, n = judge.batch([encoded[i] for i in chosen]), votes[chosen].to(judge.device)
            p = n / n.sum(1, keepdim=True)
            try:  # processes exchange their gradients with the last pass only
                with contextlib.nullcontext() if members is passes[-1] else accelerator.no_sync(model):
                    with autocast():
                        logq, _ = label_logprobs(model, batch, judge.tokens)
                    run.check_finite(logq, [ids[i] for i in chosen])
                    worst = adversary(logq, p, config.eps, config.steps, config.step_size)
                    if said is not None:  # the votes are moved first, and the teacher's are added to them
                        worst = shrink_votes(
                            n.sum(1, keepdim=True) * worst, config.teacher * said[members].to(n)
                        )
                    loss = share * hybrid(logq, p, config.alpha, worst, config.loss).sum()
                    scaler.scale(loss * processes).backward()  # processes average their gradients
                    total += loss.detach()
                    continue
            except torch.OutOfMemoryError:
                pass
            judge.shrink(members, batch["input_ids"].numel())
            return None
        return total

    with run:
        while run.done < last:
            epoch, k = divmod(run.done, per_epoch)
            if k == 0 or run.done == run.first:
                order = epoch_order(encoded, config, epoch)
            step_items = order[k * config.batch_size : (k + 1) * config.batch_size]
            mine = step_items[rank * len(step_items) // processes : (rank + 1) * len(step_items) // processes]
            share = (
                1 / len(step_items) if mine else 0.0
            )  # a process without items exchanges a gradient of zero
            mine, said, loss = mine or step_items[:1], None, None
            if teacher and teacher.number:
                with teacher.in_place(), autocast():
                    said = judge.judge_encoded([encoded[i] for i in mine], with_mass=False)[0].exp()
                run.check_finite(said, [ids[i] for i in mine])
            judge.model.train()
            while loss is None:  # out of memory: the whole step starts again, in smaller passes
                optimizer.zero_grad()
                loss = backward(mine, said, share)
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(run.weights.values(), 1.0).item()
            scale, rate = scaler.get_scale(), schedule.get_last_lr()[0]
            scaler.step(optimizer)
            scaler.update()
            if (
                scaler.get_scale() >= scale
            ):  # or the step was left out: its gradients did not fit into float16
                schedule.step()
            if teacher:
                teacher.update()
            run.done += 1
            row = {"epoch": run.done / per_epoch, "loss": accelerator.reduce(loss, "sum").item()}
            row |= {"learning_rate": rate, "grad_norm": norm}
            if eval_items and run.done % eval_every == 0:
                with teacher.in_place() if teacher else contextlib.nullcontext():
                    row |= evaluate_judge(judge, eval_items, items)
            run.log(row, accelerator)
            if on_step:
                on_step(run.done)
            stopping = bool(run.signals) and run.done < last
            if stopping or run.done % save_every == 0 or run.done == last:
                run.save([ids[i] for i in step_items])
            if stopping:
                raise run.stopped()
        if teacher:
            teacher.put(teacher.means)
    accelerator.end_training()
    return run.rows


def whole_steps(value: float, last: int) -> int:
    """A setting that is a share of all steps if below 1, else a number of steps."""
    return math.ceil(last * value) if value < 1 else int(value)


def training_rows(judge: Judge, items: Sequence[Item]) -> tuple[list[list[int]], torch.Tensor, list[str]]:
    """Token ids, votes (M, C) float32 and ids of what is trained on; a pair in the other order is an item of its own."""
    votes, pairs = counts_of(items).float(), [i for i, item in enumerate(items) if item.swap]
    encoded = judge.encode([item.prompt for item in items] + [items[i].swap.prompt for i in pairs])
    if pairs:
        turned = torch.tensor([items[i].swap.labels for i in pairs])
        votes = torch.cat([votes, votes[pairs].gather(1, turned)])
    return encoded, votes, [item.id for item in items] + [items[i].id for i in pairs]


def _accelerator(judge: Judge, config: Config) -> Any:
    """accelerate's processes and loggers; precision is train()'s own. Raises InputError for a logger that is not there."""
    from accelerate import Accelerator

    on_cpu, loggers = judge.device.type == "cpu" and "WORLD_SIZE" in os.environ, list(config.report_to)
    try:
        accelerator = Accelerator(
            mixed_precision="no", cpu=on_cpu, log_with=loggers or None, project_dir=config.out
        )
        if lost := sorted(
            set(loggers) - {str(getattr(name, "value", name)) for name in accelerator.log_with}
        ):
            raise ValueError(f"{lost[0]} is not installed")
        if loggers:
            accelerator.init_trackers("distjudge", {k: str(v) for k, v in dataclasses.asdict(config).items()})
    except (ValueError, ImportError) as error:
        raise InputError(f"report_to: {first_line(error)}") from error
    return accelerator


class Run:
    """What training keeps beside its loop: steps done, log, checkpoints, signals; and what must be put back at its end."""

    def __init__(
        self, judge: Judge, config: Config, parts: dict[str, Any], made_from: dict[str, Any], last: int
    ):
        self.judge, self.config, self.parts, self.made_from, self.last = judge, config, parts, made_from, last
        self.folder, self.log_file = Path(config.out) / "checkpoints", Path(config.out) / "log.jsonl"
        self.weights = {name: w for name, w in judge.model.named_parameters() if w.requires_grad}
        self.recompute = (
            config.gradient_checkpointing and judge.backend != "unsloth"
        )  # whose layers have their own
        self.writes, self.before = os.environ.get("RANK", "0") == "0", (judge.packs, judge.pack_tokens)
        self.first, self.rows, self.signals, self.handlers = 0, [], [], {}

    def __enter__(self) -> Run:
        from tqdm.auto import tqdm

        state = newest_checkpoint(self.folder, self.made_from) if self.config.resume else None
        if state:
            self._take_up(state)
        if self.writes:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            write_lines(self.log_file, map(json.dumps, self.rows))
            for path in [] if self.config.resume else checkpoints_in(self.folder):
                path.unlink()
        self.done = self.first
        self.judge.pack_tokens = (
            state["pack_tokens"] if state else self.config.pack_tokens or self.judge.pack_tokens
        )
        if self.recompute:
            self.judge.model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        if threading.current_thread() is threading.main_thread():
            self.handlers = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        self.bar = tqdm(
            total=self.last, initial=self.done, desc="training", unit="step", disable=not self.writes
        )
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.judge.packs, self.judge.pack_tokens = self.before
        self.judge.model.eval()
        if self.recompute:
            self.judge.model.gradient_checkpointing_disable()

    def _note(self, number: int, frame: Any) -> None:
        self.signals.append(number)
        signal.signal(number, self.handlers[number])  # a second one stops at once

    def stopped(self) -> Stopped:
        saved = f"a checkpoint is saved, --resume goes on from it ({self.config.out})"
        saved = saved if self.config.save_every else "no checkpoint: save_every is 0"
        name = signal.Signals(self.signals[0]).name
        return Stopped(f"stopped by {name} after step {self.done} of {self.last}; {saved}", self.signals[0])

    def log(self, row: dict[str, Any], accelerator: Any) -> None:
        self.rows.append({"step": self.done} | row)
        self.bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
        self.bar.update()
        if self.writes:
            with open(self.log_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")
        accelerator.log(row, step=self.done)

    def check_finite(self, logq: torch.Tensor, ids: Sequence[str]) -> None:
        bad = (~torch.isfinite(logq)).any(1)
        if bool(bad.any()):
            wrong = f"the loss is not finite at step {self.done + 1}, for"
            raise self._diverged(wrong, itertools.compress(ids, bad.tolist()))

    def _diverged(self, what: str, ids: Iterable[str]) -> FloatingPointError:
        """Good is a checkpoint whose weights a later step has used, with a finite loss."""
        names = list(dict.fromkeys(map(short, ids)))
        items = f"item{'s' * (len(names) > 1)} {', '.join(names[:8])}{', ...' * (len(names) > 8)}"
        good = [path for path in checkpoints_in(self.folder) if int(path.name[5:14]) < self.done]
        return FloatingPointError(f"{what} {items}; last good checkpoint: {good[0] if good else 'none'}")

    def save(self, ids: Sequence[str]) -> None:
        """Writes a checkpoint and keeps the newest two. Raises FloatingPointError for weights that are not finite."""
        if not all(bool(torch.isfinite(w).all()) for w in self.weights.values()):
            raise self._diverged(f"the weights are not finite after step {self.done}, of", ids)
        if not self.writes or not self.config.save_every:
            return
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {
            "weights": {name: w.detach() for name, w in self.weights.items()},
            "made_from": self.made_from,
        }
        state |= {"random": [random.getstate(), torch.get_rng_state(), cuda]}
        save_checkpoint(
            self.folder, self.done, state | {"step": self.done, "pack_tokens": self.judge.pack_tokens}
        )
        for old in checkpoints_in(self.folder)[2:]:
            old.unlink()

    @torch.no_grad()
    def _take_up(self, state: dict[str, Any]) -> None:
        for name, weight in self.weights.items():
            weight.copy_(state["weights"][name])
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        python, cpu, cuda = state["random"]
        random.setstate(python)
        torch.set_rng_state(cpu)
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(cuda)
        self.first = state["step"]
        for line in self.log_file.read_text(encoding="utf-8").splitlines() if self.log_file.exists() else ():
            with contextlib.suppress(ValueError, KeyError):  # a line that was cut
                self.rows += [row] if (row := json.loads(line))["step"] <= self.first else []


# A checkpoint is one file of tensors, numbers and text, named by its step and its SHA-256. It is read with
# torch.load(weights_only=True), which runs no code.
def checkpoints_in(folder: Path) -> list[Path]:
    """Finished checkpoints, the newest first."""
    return sorted(
        (p for p in folder.glob("*") if re.fullmatch(r"step-\d{9}-\w{64}\.pt", p.name)), reverse=True
    )


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Writes under a temporary name, makes sure it is on the disk, and renames it. Raises OSError, leaving nothing."""
    part = folder / f"step-{step:09d}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(part, "w+b") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            name = f"step-{step:09d}-{_hash_file(file)}.pt"
        os.replace(part, folder / name)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        why = f"{first_line(error)}; earlier ones are whole"
        raise OSError(f"{folder / part.stem}: the checkpoint cannot be written: {why}") from None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, tensors on the CPU. Raises InputError for a file that is cut, changed or planted."""
    try:
        with open(path, "rb") as file:
            if _hash_file(file) != path.stem[15:]:
                raise ValueError("is damaged: its checksum is another")
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch.load refuses can have any name
        raise InputError(f"{path}: is no whole checkpoint: {first_line(error)}") from None


def newest_checkpoint(folder: Path, made_from: dict[str, Any]) -> dict[str, Any] | None:
    """The newest whole checkpoint; None where there is none. Raises InputError if none is whole, or another run's."""
    for path in checkpoints_in(folder):
        try:
            state = load_checkpoint(path)
        except InputError as error:
            log.warning("%s; trying the one before", error)
            continue
        then = state["made_from"]
        if different := [name for name in {**then, **made_from} if then.get(name) != made_from.get(name)]:
            change = f"{short(then.get(different[0]))} then, {short(made_from.get(different[0]))} now"
            others = f"; so do {', '.join(different[1:])}" if different[1:] else ""
            raise InputError(f"resume: {path}: {different[0]} differs: {change}{others}")
        return state
    if checkpoints_in(folder):
        raise InputError(f"{folder}: resume: none of its checkpoints is whole")
    log.warning("%s: no checkpoint yet: starting from the beginning", folder)
    return None


def _made_from(
    judge: Judge, items: Sequence[Item], eval_items: Sequence[Item], config: Config
) -> dict[str, Any]:
    """What a run depends on, by name: resuming with anything else is refused."""
    free = "train test labels out resume report_to save_every eval_every".split()
    named = {f.name: getattr(config, f.name) for f in dataclasses.fields(Config) if f.name not in free}
    named |= {
        "labels": judge.labels,
        "label tokens": judge.tokens.sequences,
        "prompt template": judge.encoder.frame,
    }
    named |= {"base model": judge.base, "device": judge.device.type, "versions": versions()}
    named |= {"base weights": _fingerprint(judge.model) if hasattr(judge.model, "peft_config") else None}
    for name, some in (("training items", items), ("test items", eval_items)):
        named[name] = _digest([dataclasses.astuple(dataclasses.replace(item, where="")) for item in some])
    return json.loads(json.dumps(named | {"processes": int(os.environ.get("WORLD_SIZE", 1))}))


def evaluate_judge(judge: Judge, items: Sequence[Item], train_items: Sequence[Item]) -> dict[str, float]:
    """evaluate() of a judge in training, its names with eval_ before them; without the noise floor."""
    q, mass, orders = judge_items(judge, items)
    scores = evaluate(q, items, train_items=train_items, label_mass=mass, floor_draws=0) | orders
    return {f"eval_{name}": value for name, value in scores.items() if value is not None}


# ---------------------------------------------------------------------------------------------------------------------
# 8. Metrics
# ---------------------------------------------------------------------------------------------------------------------
KL_FLOOR = 1e-6  # evaluate() raises model probabilities to this before it takes a logarithm


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
    return inspect.unwrap(kl_loss)(q.clamp_min(KL_FLOOR).log(), p)


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


def fit_concentration(counts: torch.Tensor) -> float | None:
    """The concentration k of a Dirichlet prior k m, m the pooled vote shares, by the Dirichlet-multinomial likelihood.

    counts (N, C). Maximum over 0.01 <= k <= 10,000 by golden-section search in log k. None where votes say nothing of k:
    no item has two votes. Source: Minka, "Estimating a Dirichlet distribution" (2000), without its Newton steps.
    """
    counts = counts[counts.sum(1) > 1.5]
    if not len(counts):
        return None
    mean = (counts.sum(0) + 1e-3) / (counts.sum() + 1e-3 * counts.shape[1])

    def cost(log_k: float) -> float:
        a, n = math.exp(log_k) * mean, counts.sum(1)
        by_item = (
            (torch.lgamma(counts + a) - torch.lgamma(a)).sum(1)
            + torch.lgamma(a.sum())
            - torch.lgamma(n + a.sum())
        )
        return -by_item.sum().item()

    return math.exp(golden_section(cost, math.log(1e-2), math.log(1e4)))


def noise_floor(items: Sequence[Item], draws: int = 200, seed: int = 0) -> float | None:
    """What the true distributions themselves would score: the mean KL(panel || truth) of panels of the items' sizes, nats.

    By simulation, `draws` panels an item. The truth is an item's `truth` where known. Where not, each draw takes one from
    the posterior Dirichlet(counts + k m) (see fit_concentration) and a second panel from that: the item's own votes taken
    as truth would put the floor too low, for few votes look more certain than people are. About (C - 1) / (2 n) for many
    votes n. None if truths are unknown and no item has two votes.
    """
    counts, truth = counts_of(items), truths_of(items)
    k = fit_concentration(counts) if truth is None else 0.0
    if k is None:
        return None
    posterior = counts + k * marginal_distribution(items).clamp_min(1e-9)
    total = 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(draws):
            pi = torch.distributions.Dirichlet(posterior).sample() if truth is None else truth
            panel, left, rest = (
                torch.zeros_like(pi),
                counts.sum(1).round(),
                torch.ones(len(pi), dtype=torch.float64),
            )
            for c in range(
                pi.shape[1]
            ):  # a multinomial draw as binomial ones: its time does not grow with the votes
                share = (
                    (pi[:, c] / rest.clamp_min(1e-300)).clamp(0, 1)
                    if c < pi.shape[1] - 1
                    else torch.ones_like(rest)
                )
                panel[:, c] = torch.binomial(left, share)
                left, rest = left - panel[:, c], rest - pi[:, c]
            panel = panel / panel.sum(1, keepdim=True)
            total += inspect.unwrap(kl_loss)(pi.clamp_min(1e-30).log(), panel).mean().item()
    return total / draws


def item_scores(
    predicted: Any, items: Sequence[Item], ordered: bool | None = None
) -> dict[str, torch.Tensor]:
    """What evaluate() averages, an item at a time: (N,) float64, or (N, 5) moments for correlations (see bootstrap).

    Raises InputError for a wrong shape, negative or NaN probabilities, or rows that do not add up to 1 within 1e-3.
    """
    labels, counts = labels_of(items), counts_of(items)
    q = torch.as_tensor(predicted).detach().double().cpu()
    if q.shape != counts.shape:
        raise InputError(f"predicted: shape {tuple(q.shape)}, expected {tuple(counts.shape)}: items, labels")
    off = torch.isnan(q).any(1) | (q < 0).any(1) | ((q.sum(1) - 1).abs() > 1e-3)
    if off.any():
        raise InputError(f"predicted: row {int(off.nonzero()[0])} is no distribution: {q[off][0].tolist()}")
    q, p = q / q.sum(1, keepdim=True), counts / counts.sum(1, keepdim=True)
    truth = truths_of(items)
    out = {"kl": kl_divergence(p, q)} | ({} if truth is None else {"kl_truth": kl_divergence(truth, q)})
    out |= {
        "accuracy": (majority(p) * majority(q)).sum(1),
        "js_divergence": entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2,
        "total_variation": (p - q).abs().sum(1) / 2,
        "brier": 1 - 2 * (p * q).sum(1) + (q**2).sum(1),
        "entropy_correlation": _moments(entropy(p), entropy(q)),
    }
    if are_numeric(labels) if ordered is None else ordered:
        scale = [float(label) for label in labels] if are_numeric(labels) else range(len(labels))
        values, along = torch.tensor(
            list(scale), dtype=torch.float64
        ).sort()  # the scale's order, not the columns'
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
    """sum_c q_c value_c, the value of a label being its number: (N, C) -> (N,), float64. InputError for other labels.

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
    """For each row the smallest set of labels that hold `level` of the probability: (N, C) -> N lists, in label order.

    Labels are taken from the most probable down (of those that tie, the first ones), until their sum reaches level - 1e-6:
    float32 probabilities of 0.7 and 0.2 make 0.9. Raises InputError unless 0 < level <= 1.

    >>> credible_sets([[0.3, 0.1, 0.6]], ["a", "b", "c"], 0.9)
    [['a', 'c']]
    """
    if not 0 < level <= 1:
        raise InputError(f"level: must be above 0 and at most 1, not {level}")
    ranked, order = torch.as_tensor(q).double().sort(dim=-1, descending=True, stable=True)
    needed = (ranked.cumsum(-1) < level - 1e-6).sum(-1) + 1
    return [
        [labels[c] for c in sorted(row[:n])] for row, n in zip(order.tolist(), needed.tolist(), strict=True)
    ]


def bootstrap(
    scores: torch.Tensor,
    other: torch.Tensor | None = None,
    groups: Sequence[Any] | None = None,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, float | None]:
    """A mean over items with its confidence interval; with `other`, the difference of two methods, scores - other.

    scores, other: (S, N), S training runs on the same N items, one metric of item_scores; for its correlations (S, N, 5).
    groups: N names; items of one group are drawn together, those with None alone.
    -> mean, low, high (at `level`) and p, two-sided, for a true value of zero; None with fewer than two groups.

    Groups are drawn with replacement, the same ones for both methods, and the draws spread out by sqrt(G / (G - 1)), for
    samples of a few groups vary too little. Each draw adds Student's t with S - 1 degrees of freedom times the standard
    error over runs (paired by seed), for five seeds are too few to be drawn from. So the interval speaks of new items and
    new seeds, or with one run of new items only. Source: Efron and Tibshirani (1993), chapters 6, 13 and 16. Raises
    ValueError for unequal shapes.
    """
    if scores.dim() not in (2, 3) or (other is not None and other.shape != scores.shape):
        shapes = [list(s.shape) for s in (scores, other) if s is not None]
        raise ValueError(f"scores: (S, N) or (S, N, 5), two methods alike, not {shapes}")
    both = [s.double() if s.dim() == 3 else s.double()[..., None] for s in (scores, other) if s is not None]
    runs, items = scores.shape[:2]
    names = [i if g is None else ("group", g) for i, g in enumerate(groups or [None] * items)]
    place = {name: g for g, name in enumerate(dict.fromkeys(names))}
    at, size = torch.tensor([place[name] for name in names]), len(place)
    add = lambda values: torch.zeros(size, *values.shape[1:], dtype=torch.float64).index_add(0, at, values)  # noqa: E731
    weight, sums = add(torch.ones(items, dtype=torch.float64)), [add(s.movedim(1, 0)) for s in both]

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
    for start in range(0, draws, 100):
        chosen = torch.randint(size, (min(100, draws - start), size), generator=draw)
        times = torch.zeros(len(chosen), size, dtype=torch.float64)
        drawn.append(
            value(times.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.float64))).mean(1)
        )
    found = mean + (torch.cat(drawn).nan_to_num(mean) - mean) * math.sqrt(size / (size - 1))
    if runs > 1:
        normal = torch.randn(runs, draws, generator=draw, dtype=torch.float64)
        found = found + by_run.std() / math.sqrt(runs) * normal[0] / (normal[1:] ** 2).mean(0).sqrt()
    low, high = found.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    tail = min((found <= 0).sum().item(), (found >= 0).sum().item())
    return {"mean": mean, "low": low, "high": high, "p": min(1.0, 2 * (tail + 1) / (draws + 1))}


def evaluate(
    predicted: Any,
    items: Sequence[Item],
    *,
    train_items: Sequence[Item] | None = None,
    label_mass: Any = None,
    ordered: bool | None = None,
    floor_draws: int = 200,
    seed: int = 0,
) -> dict[str, float | None]:
    """Compares predicted distributions (N, C), columns in label order, with the votes. Plain numbers; None: undefined.

    Means over items (p: votes as shares, q: predicted):
      kl                  KL(p || q) in nats, q raised to KL_FLOOR = 1e-6
      kl_noise_floor      what the true distributions would score (see noise_floor), with floor_draws > 0
      kl_corrected        kl - kl_noise_floor, an estimate of KL(truth || q)
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
    scores, counts = item_scores(predicted, items, ordered), counts_of(items)
    means = {
        name: (correlation(s.mean(0)) if s.dim() == 2 else s.mean()).item() for name, s in scores.items()
    }
    floor = noise_floor(items, floor_draws, seed) if floor_draws else None
    p = counts / counts.sum(1, keepdim=True)
    marginal = marginal_distribution(train_items or items).expand_as(p)
    out: dict[str, float | None] = {"items": len(items), "kl": means["kl"], "kl_noise_floor": floor}
    out |= {"kl_corrected": None if floor is None else means["kl"] - floor}
    out |= {"kl_marginal": kl_divergence(p, marginal).mean().item(), "kl_truth": None}
    if label_mass is not None:
        mass = torch.as_tensor(label_mass).double()
        out |= {"label_mass": mass.mean().item(), "label_mass_min": mass.min().item()}
    return out | {name: None if math.isnan(value) else value for name, value in means.items()}


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
        for side, other, wrong in (
            (items, "test", "--test names the test items"),
            (test, "train", "--train names the training items"),
        ):
            if misplaced := [item for item in side if item.split == other]:
                raise InputError(f"{misplaced[0].named}: split: is {other}, but {wrong}")
    elif any(item.split for item in items):
        if unplaced := [item for item in items if not item.split]:
            raise InputError(f"{unplaced[0].named}: split: missing, though other items have one")
        items, test = [i for i in items if i.split == "train"], [i for i in items if i.split == "test"]
        if not items or not test:
            raise InputError(f"{config.train[0]}: split: there must be both train and test items")
    else:
        try:
            return split_items(items, seed=config.seed)
        except InputError as error:
            raise InputError(f"{', '.join(config.train)}: {error}") from None
    keep_apart(items, test)
    return items, test


def parse_spellings(pairs: Sequence[str]) -> dict[str, list[str]]:
    """["contradiction=contra,contradict"] -> {"contradiction": ["contra", "contradict"]}."""
    wrong = [pair for pair in pairs if "=" not in pair]
    if wrong:
        raise InputError(f"spellings: '{wrong[0]}' is not LABEL=TEXT,TEXT")
    return {label: texts.split(",") for label, texts in (pair.split("=", 1) for pair in pairs)}


def keep_short(judge: Judge, items: Sequence[Item], overlong: str, what: str) -> list[Item]:
    """The items whose prompts fit judge.max_length; with overlong = "error" raises InputError if any does not."""
    lengths: list[int] = []
    for start in range(0, len(items), 2048):
        some = items[start : start + 2048]
        encoded = iter(judge.encoder.many([prompt for item in some for prompt in item.prompts]))
        lengths += [max(len(next(encoded)) for _ in item.prompts) for item in some]
    over = [i for i, length in enumerate(lengths) if length > judge.max_length]
    if over and overlong == "error":
        limit = f"longer than max_length {judge.max_length} (the longest has {max(lengths)})"
        raise InputError(
            f"{items[over[0]].named}: prompt: {lengths[over[0]]} tokens; {len(over)} of {len(items)} {what} items are {limit}; "
            "raise --max_length or use --overlong drop"
        )
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
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def average_orders(
    first: torch.Tensor, second: torch.Tensor, back: Sequence[int]
) -> tuple[torch.Tensor, bool]:
    """The mean of a pair's predictions (C,) in both orders, and whether the top labels differ. back: Swap.labels."""
    second = second[list(back)]
    return (first + second) / 2, bool(first.argmax() != second.argmax())


def judge_items(
    judge: Judge, items: Sequence[Item], progress: bool = False
) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
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
    found = (
        {"order_flips": sum(flips) / len(flips), "order_variation": sum(apart) / len(apart)} if flips else {}
    )
    return torch.stack(q), torch.stack(masses), found


def write_results(
    judge: Judge,
    items: Sequence[Item],
    train_items: Sequence[Item],
    config: Config,
    folder: str | os.PathLike,
) -> dict:
    """Judges the items and writes predictions.jsonl, metrics.json and config.json into the folder; returns the metrics."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    probabilities, mass, orders = judge_items(judge, items, progress=True)
    rows = []
    for item, q, m in zip(items, probabilities.tolist(), mass.tolist(), strict=True):
        row = {"id": item.id, "counts": item.counts, "predicted": dict(zip(judge.labels, q, strict=True))}
        row |= {"label_mass": m, "prompt": item.prompt}
        row |= {name: value for name in ("group", "truth") if (value := getattr(item, name)) is not None}
        rows.append(json.dumps(row, ensure_ascii=False))
    write_lines(folder / "predictions.jsonl", rows)
    metrics = (
        evaluate(probabilities, items, train_items=train_items, label_mass=mass, seed=config.seed) | orders
    )
    write_json(folder / "metrics.json", metrics)
    about = {"labels": judge.labels, "prompt_hash": prompt_hash(judge), "versions": versions()}
    about |= {"items": {"train": len(train_items), "test": len(items)}}
    about |= {"votes": {"train": sum(i.votes for i in train_items), "test": sum(i.votes for i in items)}}
    write_json(folder / "config.json", dataclasses.asdict(config) | about)
    return metrics


def run(
    config: Config, before_training: Callable[[Judge, list[Item], list[Item]], Any] | None = None
) -> dict[str, float | None]:
    """Loads, trains, judges the test items and fills the run folder; returns the metrics.

    The folder then holds config.json (resolved, with versions), judge.json, adapter/ or model/, tokenizer/,
    predictions.jsonl, metrics.json and log.jsonl; load_judge(folder) brings the judge back. Under torchrun the first
    process does the writing, and the others return {}. before_training: called with the judge, training and test items
    before the first step. Raises InputError before training for what cannot be used.
    """
    config.check()
    items, test = load_data(config)
    judge = load_judge(
        config.model,
        labels_of(items),
        spellings=parse_spellings(config.spellings),
        lora_rank=config.lora_rank,
        four_bit=config.four_bit,
        max_length=config.max_length,
        seed=config.seed,
        backend=config.backend,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    judge.pack_tokens = config.pack_tokens or judge.pack_tokens
    judge.encoder.memo = {}  # every prompt is tokenized once
    items, test = (
        keep_short(judge, items, config.overlong, "training"),
        keep_short(judge, test, config.overlong, "test"),
    )
    if before_training:
        before_training(judge, items, test)
    train(judge, items, config, eval_items=test)
    judge.encoder.memo = None
    if os.environ.get("RANK", "0") != "0":
        return {}
    save_judge(judge, config.out)
    return write_results(judge, test, items, config, config.out)


def cli(main: Callable[[Any], Any], config: type, failures: tuple[type[Exception], ...] = ()) -> None:
    """A script's command line: tyro reads `config`; what the user got wrong ends in one line a problem and exit code 2.

    A run that diverges, and `failures`, end in exit code 1; a run that a signal stops in 128 and the signal's number.
    """
    import tyro

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    failures, about = (FloatingPointError, *failures), sys.modules["__main__"].__doc__
    try:
        given = tyro.cli(_grouped(config), description=about, use_underscores=True)
        if issubclass(config, Config):
            given = config(
                **{name: value for group in vars(given).values() for name, value in vars(group).items()}
            )
        main(given)
    except (InputError, OSError, *failures) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, failures) else 2)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.number)


def _grouped(config: type) -> type:
    """Config's settings as dataclasses by group, in Config's order, so that --help shows groups; what a script adds first."""
    from tyro.conf import OmitArgPrefixes, arg

    if not issubclass(config, Config):
        return config
    first = {"train": "data", "model": "model", "alpha": "method", "epochs": "training", "out": "output"}
    own = {field.name for field in dataclasses.fields(Config)}
    types, texts, group = typing.get_type_hints(config, include_extras=True), {}, ""
    sources = [
        cls for cls in config.__mro__[-2::-1] if cls.__module__ != "types"
    ]  # not those made by make_dataclass()
    for cls in sources:  # the texts under the fields
        for field, text in itertools.pairwise(ast.parse(inspect.getsource(cls)).body[0].body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                texts[field.target.id] = " ".join(text.value.value.split())
    groups: dict[str, list[tuple]] = {"command": [], **{name: [] for name in first.values()}}
    for field in dataclasses.fields(config):
        group = first.get(field.name, group)
        kind = typing.Annotated[types[field.name], arg(help=texts.get(field.name))]
        groups[group if field.name in own else "command"].append((field.name, kind, field))
    made = {name: dataclasses.make_dataclass(name, fields) for name, fields in groups.items() if fields}
    return dataclasses.make_dataclass(
        "Settings", [(name, OmitArgPrefixes[cls]) for name, cls in made.items()]
    )
