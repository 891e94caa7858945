"""distjudge: train an LLM judge that answers with the distribution of human judgments, not with one verdict.

    items = distjudge.load_items("votes.jsonl")        # {"id", "prompt", "counts": {label: votes}} a line
    judge = distjudge.load_judge("Qwen/Qwen2.5-0.5B-Instruct", labels=distjudge.labels_of(items))
    distjudge.train(judge, items, distjudge.Config(out="runs/first"))
    judge.predict(["Is this summary fluent? ..."])     # (1, C) float32, one probability a label

The method is that of "Distributional LLM-as-a-Judge" (Chen et al., NeurIPS 2025, arXiv 2505.12301):

    min over theta of the mean over items of  max over p' in E(p) of  alpha KL(p' || q) + (1 - alpha) CE(r, q)

p is the human distribution of an item (votes as shares), r its majority label, E(p) what lies within eps of
p, and q the model's probabilities of the label tokens where its answer begins. Losses are in nats. The file
can be copied alone; it needs torch, and inside functions transformers, peft, accelerate and tyro.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import functools
import gzip
import hashlib
import inspect
import io
import itertools
import json
import logging
import math
import numbers
import operator
import os
import random
import re
import shutil
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

try:
    import torch
    import torch.nn.functional as F
except ModuleNotFoundError as error:
    if Path(sys.argv[0]).resolve().parents[1:2] != (Path(__file__).resolve().parent,):
        raise  # not a script of the kit
    remedy = "activate the environment that you installed requirements.txt into"
    sys.exit(f"error: {sys.executable} has no {error.name}: {remedy} (README.md, the first command)")

__version__ = "0.2.0"
log = logging.getLogger("distjudge")
logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)  # it asks all for a faster kernel


class InputError(ValueError):
    """What the user gave cannot be used. Each line of the message says what and where. Exit code 2."""


class Stopped(Exception):
    """A signal stopped training, after a checkpoint was saved. Exit code 128 + the signal's number."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


# ----------------------------------------------------------------------------------------------------------
# 1. Items: what was judged, and how people voted
# ----------------------------------------------------------------------------------------------------------
class Messages(str):
    """A prompt of several messages: as text, the JSON of [{"role": ..., "content": ...}, ...]."""

    def __eq__(self, other: Any) -> bool:  # not the same prompt as one message with this text
        return isinstance(other, Messages) and str.__eq__(self, other)

    def __ne__(self, other: Any) -> bool:
        return not self == other

    __hash__ = str.__hash__


def messages_of(prompt: str) -> list[dict[str, str]]:
    """The messages of a prompt, for a chat template or an API: one of the user's, or those it holds."""
    held = prompt_field(prompt)
    return [{"role": "user", "content": held}] if isinstance(held, str) else held


def prompt_field(prompt: str) -> str | list[dict[str, str]]:
    """A prompt as a line of items holds it, so that it is read back as the same: its text or its messages."""
    return json.loads(prompt) if isinstance(prompt, Messages) else prompt


@dataclasses.dataclass(frozen=True)
class Swap:
    """A pair in the other order. labels: for each label the index of the one that means the same there."""

    prompt: str
    labels: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Item:
    """One judged thing. counts: the votes of every label of the data set, 0 included, in label order.

    Votes are whole numbers, except those of a weighted panel, which are share times number of people. truth:
    what the votes of a simulated panel were drawn from. where: file and line.
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
            raise InputError(f"{item.named}: labels {listed(item.counts)} differ from {listed(labels)}")
    return labels


def check_voted(items: Sequence[Item]) -> None:
    """Raises InputError for an item without votes, see load_items(votes=False)."""
    if unjudged := [item for item in items if not item.votes > 0]:  # NaN is not
        raise InputError(f"{unjudged[0].named}: has no votes")


def counts_of(items: Sequence[Item]) -> torch.Tensor:
    """Votes as a float64 tensor (N, C)."""
    labels_of(items)
    return torch.tensor([list(item.counts.values()) for item in items], dtype=torch.float64)


def shares_of(items: Sequence[Item]) -> torch.Tensor:
    """The human distributions, votes as shares: float64 (N, C)."""
    counts = counts_of(items)
    return counts / counts.sum(1, keepdim=True)


def truths_of(items: Sequence[Item]) -> torch.Tensor | None:
    """The true distributions as a float64 tensor (N, C); None unless every item has one."""
    truths = [item.truth for item in items]
    return torch.tensor([list(t.values()) for t in truths], dtype=torch.float64) if all(truths) else None


def load_items(
    *sources: Any, labels: Sequence[str] | None = None, complete: bool = False, votes: bool = True
) -> list[Item]:
    """Reads items from .jsonl, .json or .gz files, lists of dicts, `datasets.Dataset`s or pandas DataFrames.

    A row holds "prompt", a text or a list of messages {"role": ..., "content": ...}, and the votes, as
    "counts": {label: votes} with every label, as "annotations": [label, ...], one a person, or as
    "distribution": {label: share} with "votes", the number of people. It may hold "id" (else a hash of the
    prompt), "group" (items that stay on one side of a split), "split" ("train" or "test"), "truth" ({label:
    probability}), for a pair "swap": {"prompt": the other order, "labels": {label: its like there}} and, for
    messages, "where" the row is from.

    Label order: `labels` where given (an item may then leave out labels without votes, unless `complete`);
    else numeric labels by value; else that of the first item with the commonest label set; else, with
    annotations only, alphabetical. With votes=False and `labels` items may have no votes: counts of 0.

    Raises InputError, one line a problem (file, line, id, field), at most 20.
    """
    flat: list[Any] = []
    for source in sources:
        paths = isinstance(source, (list, tuple)) and all(isinstance(s, (str, os.PathLike)) for s in source)
        flat += source if paths else [source]
    wrong: list[str] = []
    parsed: list[dict[str, Any]] = []
    seen: dict[str, str] = {}
    for where, row, problem in itertools.chain.from_iterable(map(read_rows, flat)):
        if problem:
            wrong.append(f"{where}: {problem}")
            continue
        fields, bad = parse_row(row, votes)
        if (name := fields["id"]) in seen:
            bad.append(("id", f"duplicate, first at {seen[name]}"))
        elif name:
            seen[name] = where
        head = f"{where}: item '{short(name)}'" if name else where
        wrong += [f"{head}: {field}: {text}" for field, text in bad]
        parsed += [] if bad else [fields | {"where": where, "head": head}]
    order, example = _label_order(parsed, labels)
    items = []
    for fields in parsed:
        head, swap = fields["head"], fields["swap"]
        for field in (fields["kind"], "truth"):
            given = fields.get(field) or {}
            must_match = field in ("counts", "distribution") and (labels is None or complete)
            if must_match and set(given) != set(order):
                differ = f"labels {listed(given)} differ from {listed(order)} of {example}"
                wrong.append(f"{head}: {field}: {differ} (write 0 where none voted so, or name the labels)")
            elif unknown := sorted(set(given) - set(order)):
                wrong.append(f"{head}: {field}: unknown label {listed(unknown)}, not of {listed(order)}")
        try:
            swap = swap and place_swap(*swap, order)
        except ValueError as error:
            wrong.append(f"{head}: swap: {error}")
        counts = {label: fields["counts"].get(label, 0) for label in order}
        truth = fields["truth"] and {label: fields["truth"].get(label, 0.0) for label in order}
        same = {key: fields[key] for key in ("id", "prompt", "group", "split", "where")}
        items.append(Item(**same, counts=counts, truth=truth, swap=swap))
    if not (items or wrong):
        wrong.append(f"{', '.join(map(short, flat)) or 'load_items'}: no items")
    if items and len(order) < 2:
        wrong.append(f"{items[0].where}: counts: a judge needs two labels or more, found {listed(order)}")
    if wrong:
        raise InputError(_first_20(wrong, "problems"))
    return items


def _label_order(parsed: list[dict], labels: Sequence[str] | None) -> tuple[list[str], str]:
    """The labels in the order load_items() promises, and where they are from. Raises InputError for twins."""
    full = [fields for fields in parsed if fields["kind"] != "annotations"]
    if labels is not None:
        order, example = [str(label) for label in labels], "the labels known"
        if len(set(order)) < len(order):
            raise InputError(f"labels: {listed(order)} names a label twice")
    elif full:
        times = collections.Counter(frozenset(fields["counts"]) for fields in full)
        first = max(full, key=lambda fields: times[frozenset(fields["counts"])])
        order, example = list(first["counts"]), first["where"]
    else:
        order, example = sorted({label for fields in parsed for label in fields["counts"]}), ""
    numeric, seen = are_numeric(order), {}
    for label in order if numeric or labels is None else ():
        plain = float(label) if numeric else unicodedata.normalize("NFC", label).casefold()
        if (other := seen.setdefault(plain, label)) != label:
            at = next((fields["where"] for fields in parsed if label in fields["counts"]), "labels")
            differ = "differ only in capitals or in how a letter is coded; name the labels if both are meant"
            why = "are a number in two spellings" if numeric else differ
            raise InputError(f"{at}: labels '{short(other, 20)}' and '{short(label, 20)}' {why}")
    if labels is None and order and not full and all(re.fullmatch(r"-?\d{1,15}", label) for label in order):
        values = sorted(map(int, order))
        if values[-1] - values[0] <= 100 and (missing := sorted({*range(values[0], values[-1])} - {*values})):
            text = "the labels are %s, as found in the votes: nobody chose %s; name all if the scale has it"
            log.warning(text, listed(values), listed(missing))
    return sorted(order, key=float) if numeric and labels is None else order, example


def are_numeric(labels: Iterable[str]) -> bool:
    """True if every label is a plain number ("1", "-2", "0.5") that a float holds: a scale."""
    return all(re.fullmatch(r"[+-]?\d{1,15}(\.\d+)?", label) for label in labels)


def _first_20(lines: Sequence[str], what: str) -> str:
    return "\n".join([*lines[:20], *([f"and {len(lines) - 20} more {what}"] if len(lines) > 20 else [])])


def printable(text: Any) -> str:
    """Text for a terminal: control characters, direction marks and lone surrogates become spaces."""
    marks = r"\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"
    return re.sub(rf"[\x00-\x1f\x7f-\x9f{marks}\ud800-\udfff]", " ", str(text))


def short(text: Any, width: int = 60) -> str:
    """Text as part of a line of a message: printable, cut at `width`."""
    text = printable(text)
    return text if len(text) <= width else text[: width - 3] + "..."


def listed(labels: Iterable[Any]) -> str:
    return "{" + ", ".join(short(label, 20) for label in labels) + "}"


def first_line(error: Exception) -> str:
    """The first line of an error that says something, for the end of a message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return short(" ".join(lines[: 2 if lines[0].endswith(":") else 1]), 300)


def read_rows(source: Any) -> Iterator[tuple[str, dict, str]]:
    """Yields (where, row, ""), or (where, {}, what is wrong) for what is no row. "-" is standard input."""
    if hasattr(source, "to_dict") and hasattr(source, "columns"):  # a pandas DataFrame
        source = source.to_dict("records")
    if not isinstance(source, (str, os.PathLike)):
        if isinstance(source, (dict, bytes)) or not isinstance(source, Iterable):
            raise InputError(f"load_items: expected paths, rows or a table, got {type(source).__name__}")
        for i, (row, wrong) in enumerate(map(_as_row, class_named(source))):
            where = f"items[{i}]" if is_missing(row.get("where")) else short(row["where"], 1000)
            yield where, row, wrong
        return
    shown = "stdin" if source == "-" else short(source, 1000)
    if Path(source).suffix.lower() in (".csv", ".tsv", ".xlsx", ".xls", ".ods", ".parquet"):
        raise InputError(f"{shown}: is a table, not JSON lines: data/prepare.py own makes items of it")
    reader = gzip.open if Path(source).suffix == ".gz" else open
    try:
        with contextlib.nullcontext(sys.stdin.buffer) if source == "-" else reader(source, "rb") as file:
            yield from json_rows(file, shown)
    except FileNotFoundError:
        raise InputError(f"{shown}: no such file") from None
    except InputError:
        raise
    except (OSError, EOFError, zlib.error, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(f"{shown}: cannot be read: {error}") from None


def rows_of(path: str | os.PathLike, **default: Any) -> list[dict[str, Any]]:
    """The rows of a file, with "where" they stand. default: fields that a row may lack."""
    found = list(read_rows(path))
    if wrong := [f"{where}: {problem}" for where, _, problem in found if problem]:
        raise InputError(wrong[0])
    return [default | row | {"where": where} for where, row, _ in found]


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds."""
    content, problem = parse_json(path.read_bytes())
    if problem:
        raise InputError(f"{path}: {problem}")
    return content


LONGEST = 1 << 28  # bytes of a line, or of one JSON document


def read_lines(file: Any, shown: str, start: int = 1) -> Iterator[tuple[int, bytes]]:
    """(number, line) of a file opened as bytes. Raises InputError for a line of more than 256 MiB."""
    for number, raw in enumerate(iter(lambda: file.readline(LONGEST + 1), b""), start):
        if len(raw) > LONGEST:
            raise InputError(f"{shown}:{number}: is longer than {LONGEST >> 20} MiB, too long for a line")
        yield number, raw


def json_rows(file: Any, shown: str) -> Iterator[tuple[str, dict, str]]:
    """What read_rows() yields, of a file opened as bytes: an object a line, or one document of objects."""

    def full(lines: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
        for number, raw in lines:
            if number == 1 and (raw[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in raw[:4]):
                raise InputError(f"{shown}: is UTF-16 or no text at all; save it as UTF-8")
            if raw := raw.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").strip():
                yield number, raw

    lines = full(read_lines(file, shown))
    first = number, raw = next(lines, (0, b""))
    value, problem = load_json(raw)
    is_row = shown.endswith((".jsonl", ".jsonl.gz")) and raw[:1] == b"{" and not problem
    if raw[:1] in (b"[", b"{") and (problem or _objects_in(value)) and not is_row and shown != "stdin":
        if len(rest := file.read(LONGEST + 1)) > LONGEST:
            raise InputError(f"{shown}: is a JSON document over {LONGEST >> 20} MiB; use JSON lines")
        if objects := _objects_in(load_json(raw + b"\n" + rest)[0]):
            yield from ((f"{shown}[{i}]", *_as_row(value)) for i, value in enumerate(objects))
            return
        if raw[-1:] == b"," and not load_json(raw[:-1])[1]:
            raise InputError(f"{shown}: its lines end in commas: take them away, or put [ ] around the rows")
        lines = full(read_lines(io.BytesIO(rest), shown, number + 1))
    for at, line in itertools.chain([first] if raw else [], lines):
        yield f"{shown}:{at}", *parse_json(line)


def _objects_in(document: Any) -> list:
    """The rows of a JSON document: an array of objects, one alone in an object, or objects by their ids."""
    if isinstance(document, dict) and document:
        if all(isinstance(value, dict) for value in document.values()):
            return [{"id": key} | value for key, value in document.items()]
        return _objects_in(next((document[key] for key in ("data", "rows", "items") if key in document), 0))
    return document if isinstance(document, list) and isinstance((document or [0])[0], dict) else []


def load_json(text: str | bytes) -> tuple[Any, str]:
    """(what a JSON text says, ""), or ({}, what is wrong)."""

    def unique(pairs: list[tuple[str, Any]]) -> dict:
        times = collections.Counter(key for key, _ in pairs)
        if twice := [key for key, n in times.items() if n > 1]:
            raise ValueError(f"'{short(twice[0])}' stands twice in an object")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique), ""
    except UnicodeDecodeError as error:
        return {}, f"not UTF-8 (byte {error.start + 1} of the line)"
    except (ValueError, RecursionError) as error:
        return {}, f"broken JSON: {short(error, 100)}"


def _as_row(value: Any) -> tuple[dict, str]:
    return (value, "") if isinstance(value, dict) else ({}, f"not a JSON object but {type(value).__name__}")


def parse_json(line: str | bytes) -> tuple[dict, str]:
    """(JSON object, ""), or ({}, what is wrong). A key that stands twice in one object is refused."""
    value, problem = load_json(line)
    return ({}, problem) if problem else _as_row(value)


def class_named(rows: Iterable) -> Iterator:
    """The rows; of a `datasets.Dataset` with names in place of the numbers of classes, None for -1."""
    features = getattr(rows, "features", None) or {}
    kinds = {name: getattr(kind, "feature", kind) for name, kind in features.items()}
    classes = {name: kind for name, kind in kinds.items() if hasattr(kind, "int2str")}

    def named(value: Any, kind: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [named(one, kind) for one in value]
        return None if value in (None, -1) else kind.int2str(value)

    for row in rows:
        yield row | {name: named(row[name], kind) for name, kind in classes.items()} if classes else row


def is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))  # NaN: an empty cell of pandas


def is_text(value: Any) -> bool:
    """A string, and without lone surrogates, which no tokenizer takes."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


# The parsers of a row's fields. Each raises ValueError with what is wrong.
def as_label(value: Any) -> str:
    """A label as text: strings as they are, whole numbers in digits."""
    if isinstance(value, str) and value and value == value.strip() and is_text(value):
        return value
    if _is_number(value, -1e300, 1e300):
        return str(int(value))
    raise ValueError(f"must be text without spaces around it, or a whole number, not {short(repr(value))}")


def prompt_text(value: Any) -> str:
    """The prompt as it is; a list of messages as Messages."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, (list, tuple)):
        turns = []
        for turn in value:
            fields = turn.items() if isinstance(turn, dict) else ()
            given = {key: text for key, text in fields if text is not None}
            if set(given) != {"role", "content"} or not all(isinstance(text, str) for text in given.values()):
                form = '{"role": text, "content": text}'
                raise ValueError(f"not text but list, not of messages {form}: {short(repr(turn))}")
            turns.append({"role": given["role"], "content": prompt_text(given["content"])})
        if not turns or turns[-1]["role"] != "user":
            raise ValueError("the last message must be the user's, whom the judge answers")
        return Messages(json.dumps(turns, ensure_ascii=False))
    if not isinstance(value, str):
        raise ValueError("missing" if is_missing(value) else f"not text but {type(value).__name__}")
    if not value.strip() or not is_text(value):
        raise ValueError("holds a lone surrogate, which is no character" if value.strip() else "empty")
    return value


def _is_number(value: Any, least: float, most: float, whole: bool = True) -> bool:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and least <= value <= most and not (whole and value % 1)


def _votes(value: Any, shares: bool = False) -> dict[str, float]:
    """{label: votes}, or {label: share}, which then add up to 1."""
    wanted = "a number of 0 or more" if shares else "a whole number from 0 to a billion"
    out: dict[str, float] = {}
    for key, number in value.items() if isinstance(value, dict) else ():
        if number is not None:  # None: left out; `datasets` fills its rows up so
            if (label := as_label(key)) in out:
                raise ValueError(f"duplicate label '{short(label)}'")
            if not _is_number(number, 0, 10**9, whole=not shares):
                raise ValueError(f"the value of '{short(label)}' must be {wanted}, not {short(repr(number))}")
            out[label] = float(number) if shares else int(number)
    total = sum(out.values())
    if not total:
        raise ValueError("no votes at all" if out else "must be an object {label: number}")
    if shares and abs(total - 1) > 0.02:
        raise ValueError(f"shares must add up to 1, not to {total:.4g}")
    return {label: share / total for label, share in out.items()} if shares else out


def _annotations(value: Any) -> dict[str, int]:
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"must be a list of one label or more, not {short(repr(value))}")
    return dict(collections.Counter(map(as_label, value)))


def _other_order(value: Any) -> tuple[str, dict[str, str]]:
    if not isinstance(value, dict) or not isinstance(value.get("labels"), dict):
        form = '{"prompt": ..., "labels": {label: label in the other order}}'
        raise ValueError(f"must be {form}, not {short(repr(value))}")
    part = "prompt"
    try:
        prompt, part = prompt_text(value.get(part)), "labels"
        return prompt, {as_label(a): as_label(b) for a, b in value[part].items() if not is_missing(b)}
    except ValueError as error:
        raise ValueError(f"{part}: {error}") from None


_SHARES = functools.partial(_votes, shares=True)
_VOTES = {"counts": _votes, "annotations": _annotations, "distribution": _SHARES}
_PARSERS = {"prompt": prompt_text, "id": as_label, "group": as_label, "split": as_label, "swap": _other_order}
_PARSERS |= {"truth": _SHARES, **_VOTES}


def parse_row(row: dict[str, Any], votes: bool = True) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """A row's fields and its problems, as (field, text); with votes=False a row may have no votes.

    Fields: id, prompt, kind (the field the votes stood in, or ""), counts, group, split, truth, and swap as
    (prompt, {label: label}). What has a problem, or is not there, is None; counts are then {}.
    """
    there = [field for field in _PARSERS if not is_missing(row.get(field))]
    fields, bad = dict.fromkeys(_PARSERS), []
    for field in dict.fromkeys(["prompt", *there]):
        try:
            fields[field] = _PARSERS[field](row.get(field))
        except ValueError as error:
            bad.append((field, str(error)))
    if fields["split"] not in (None, "train", "test"):
        bad.append(("split", f"must be train or test, not {short(repr(fields['split']))}"))
    if "id" not in there and fields["prompt"]:
        fields["id"] = prompt_id(fields["prompt"])
    given = [field for field in _VOTES if field in there]
    if len(given) > 1 or (votes and not given):
        bad.append(("counts", f"give one of {', '.join(_VOTES)}; found {' and '.join(given) or 'none'}"))
    counts = fields["counts"] or fields["annotations"] or {}
    if given == ["distribution"]:
        people, shares = row.get("votes"), fields["distribution"]
        if not _is_number(people, 1, 10**9):
            bad.append(("votes", f"must be the number of people, a whole number, not {short(repr(people))}"))
        elif shares:
            exact = {label: share * people for label, share in shares.items()}
            whole = {label: round(count) for label, count in exact.items()}
            near = all(abs(exact[label] - whole[label]) <= 0.05 for label in exact)  # shares may be rounded
            counts = whole if near and sum(whole.values()) == people else exact
    return fields | {"counts": counts, "kind": given[0] if len(given) == 1 else ""}, bad


def prompt_id(prompt: str) -> str:
    """The id of an item that was given none: a hash of its prompt."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def place_swap(prompt: str, other: dict[str, str], labels: Sequence[str]) -> Swap:
    """The Swap of a row. other: {label: label}, one not named is its own. Raises ValueError if it is none."""
    if unknown := sorted({*other, *other.values()} - set(labels)):
        raise ValueError(f"unknown label {listed(unknown)}; the labels are {listed(labels)}")
    there = [other.get(label, label) for label in labels]
    if [other.get(label, label) for label in there] != list(labels):
        raise ValueError(f"labels {short(other)} do not trade places: swapped twice, each must be itself")
    return Swap(prompt, tuple(map(list(labels).index, there)))


def split_items(items: Sequence[Item], test_share: float = 0.2, seed: int = 0) -> tuple[list[Item], ...]:
    """Train and test items, in their order; those that share a group, prompt or id stay together.

    Whole groups are taken in random order, each that brings the test side nearer to `test_share` of the
    items; if none does, the smallest. Raises InputError if everything is one group.
    """
    from networkx import Graph, connected_components  # torch brings it

    graph = Graph((i, key) for i, item in enumerate(items) for key in _keys(item))
    groups = [[i for i in group if isinstance(i, int)] for group in connected_components(graph)]
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


def _keys(item: Item, plain: Callable[[str], str] = str) -> list[tuple[str, str]]:
    """What an item can share with another one, as (field, value): its prompts, its group and its id."""
    group = [] if item.group is None else [("group", item.group)]
    return [*(("prompt", plain(prompt)) for prompt in item.prompts), *group, ("id", item.id)]


def keep_apart(
    train_items: Sequence[Item], test_items: Sequence[Item], overlap: str = "refuse", plain: Callable = str
) -> tuple[list[Item], dict[str, int]]:
    """Training items that share nothing with a test item, and how many do, by what they share first.

    They may share a prompt (to the letter, or as `plain` makes it; a pair's in either order), a group (one
    premise, article or question) or an id. overlap: "remove" leaves them out, "refuse" raises InputError.
    """
    test = {key: item for item in reversed(test_items) for key in _keys(item, plain)}
    kept, lines, shared = [], [], {"prompt": 0, "group": 0, "id": 0}
    for item in train_items:
        if key := next((key for key in _keys(item, plain) if key in test), None):
            shared[key[0]] += 1
            lines.append(f"{test[key].named}: {key[0]}: also in the training items, at {item.where}")
        else:
            kept.append(item)
    if lines and overlap == "refuse":
        raise InputError(_first_20(lines, "items"))
    return kept, shared


# ----------------------------------------------------------------------------------------------------------
# 2. Prompts and label tokens
# ----------------------------------------------------------------------------------------------------------
_MARK = "XQZPROMPTXQZ"
_STRIPS = {"": str, "l": str.lstrip, "r": str.rstrip, "lr": str.strip}  # sides of a message
_PROBE = "Is 2 + 2 = 4? One\n\ntwo, three: I'M 12345 -- don't."


@functools.lru_cache(2)
def _tokenizer_of(spec: str) -> Any:
    """One tokenizer a process for equal ones: the library never frees the words that BPE has seen."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(spec)


class PromptEncoder:
    """Turns prompts into token ids: the chat template around messages, and what people wrote as text only.

    A control token written in a message ("<|im_end|>") is encoded as its characters, by a copy of the
    tokenizer that has no control tokens. `frame` keeps what the template puts before and after one message
    and behind an answer, and whether it strips messages; without a template, a line break follows the
    message. Raises InputError if the template changes harmless messages in other ways, or if they are not
    encoded exactly as the tokenizer would. What it does to certain words only is not done: Qwen3's drops what
    stands before "</think>" in an assistant's message, and the judge reads it all.
    """

    memo: dict[str, list[int]] | None = None  # while it is a dict, what was encoded is kept there

    def __init__(self, tokenizer: Any, frame: dict[str, Any] | None = None):
        self.tokenizer, self.name = tokenizer, tokenizer.name_or_path
        self._ids = functools.lru_cache(256)(lambda text: tokenizer.encode(text, add_special_tokens=False))
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(f"{self.name}: tokenizer: a fast tokenizer (tokenizer.json) is needed")
        # control tokens mean something beyond their characters: special ones, and tags such as <think>
        added = [(i, token) for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()]
        control = {i for i, token in added if token.special or re.search(r"[^\w\s]", token.content)}
        self.control_ids = control - {tokenizer.unk_token_id}
        self.frame = frame or self._render()
        spans, self._end = self._control_spans(self.frame["after"]), ""
        if spans:
            self._end = self.frame["after"][spans[0][0] :]
        elif tokenizer.chat_template:
            log.warning("%s: its template ends a turn in plain words, which texts can imitate", self.name)
        final = self._ids(self.frame["end"].lstrip())[:1]
        self.end_is_known = not self.control_ids.isdisjoint(final)
        self.end_id = final[0] if self.end_is_known else tokenizer.eos_token_id

        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        spec |= {"post_processor": None, "truncation": None, "padding": None}
        spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] not in control]
        plain = json.dumps(spec)
        if self._control_spans(self.frame["before"]):  # then it is not the message that begins the text
            plain = plain.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
        begin = [] if tokenizer.chat_template else tokenizer("a")["input_ids"][:1]
        self._begin = begin if begin == [tokenizer.bos_token_id] else []
        self._plain, self._forms = _tokenizer_of(plain), {}
        self._runs("")

    def _apply(self, turns: list[dict[str, str]]) -> str:
        """What the chat template makes of messages, up to where the judge answers the last of the user's.

        A template is a program: it can raise what its author chose, and loop; then its thread is left behind.
        """
        fixed = datetime.date(2024, 7, 26).strftime  # a prompt does not change with the day
        options = {"tokenize": False, "strftime_now": fixed, "enable_thinking": False}
        options["add_generation_prompt"], shown = turns[-1]["role"] != "assistant", []

        def work() -> None:
            try:
                shown.append(self.tokenizer.apply_chat_template(turns, **options))
            except Exception as error:
                shown.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(5.0)
        if not shown or not isinstance(shown[0], str):
            fault = short(shown[0], 200) if shown else "takes more than 5 seconds"
            raise InputError(f"{self.name}: chat template: {fault}")
        return shown[0]

    def _around(self, roles: Sequence[str]) -> tuple[list[str], list[tuple[int, str]]]:
        """What the chat template puts around messages of these roles, and which stands between, how stripped.

        It is seen with stand-ins; (number of a message, key of _STRIPS).
        """
        head = f"{self.name}: chat template:"
        if not self.tokenizer.chat_template:
            raise InputError(f"{self.name}: has no chat template for a prompt of several messages")

        def show(*contents: str) -> str:
            pairs = zip(roles, contents, strict=True)
            return self._apply([{"role": role, "content": content} for role, content in pairs])

        marks = [f"{_MARK}{i}{_MARK}" for i in range(len(roles))]
        plain = show(*marks)
        parts = re.split(rf"{_MARK}(\d+){_MARK}", plain)
        parts, order = parts[::2], [int(i) for i in parts[1::2]]
        if sorted(order) != list(range(len(roles))):
            raise InputError(f"{head} shows {len(order)} messages in place of {len(roles)}, {listed(roles)}")
        same = lambda i, text: show(*marks[:i], text, *marks[i + 1 :]) == plain  # noqa: E731
        between = [(i, "l" * same(i, f" {marks[i]}") + "r" * same(i, f"{marks[i]} ")) for i in order]
        for probe in (_PROBE, f"\n {_PROBE}", f"{_PROBE} \n", f"<b> & '{_PROBE}'"):
            pairs = zip(parts, [*(_STRIPS[sides](probe) for _, sides in between), ""], strict=True)
            half = roles == ["user"] and len(between[0][1]) == 1  # of one message both sides or none
            if half or show(*[probe] * len(roles)) != "".join(itertools.chain(*pairs)):
                raise InputError(f"{head} changes the message, so text cannot be told from template")
        return parts, between

    def _render(self) -> dict[str, Any]:
        """The frame: what the chat template puts around one message and behind an answer to it."""
        if not self.tokenizer.chat_template:
            return {"before": "", "after": "\n", "end": "", "trim": False}
        (before, after), ((_, sides),) = self._around(["user"])
        answered = self._apply([{"role": role, "content": _MARK} for role in ("user", "assistant")])
        plain, end, head = before + _MARK + after, "", f"{self.name}: chat template:"
        common = common_length(plain, answered)
        if answered.count(_MARK) == 2:
            gap, *_, end = answered[common:].split(_MARK)
            if common == len(plain) and gap.strip():
                lost = f"ends a prompt without {short(repr(gap))}, which it puts before an answer"
                raise InputError(f"{head} {lost}: it ignores add_generation_prompt")
        if plain[common:].strip():
            log.warning("%s ends a prompt with %r: labels are read behind it", head, short(plain[common:]))
        return {"before": before, "after": after, "end": end, "trim": sides == "lr"}

    def _control_spans(self, text: str) -> list[tuple[int, int]]:
        code = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = zip(code["input_ids"], code["offset_mapping"], strict=True)
        return [span for token, span in spans if token in self.control_ids]

    def _form(self, roles: tuple[str, ...]) -> list[list]:
        """How a prompt of these roles is encoded: runs of text, every second one the template's alone.

        A run is a list of texts and, for messages, pairs as in _around(). Control tokens alone never merge
        with a message: what stands between them and it is encoded with it.
        """
        frame, runs = self.frame, [[]]
        one = [frame["before"], frame["after"]], [(0, "lr" if frame["trim"] else "")]
        parts, between = one if roles == ("user",) else self._around(roles)
        for k, part in enumerate(parts):
            if spans := self._control_spans(part):
                start, stop = spans[0][0] if k else 0, spans[-1][1] if k < len(between) else len(part)
                runs[-1].append(part[:start])
                runs += [part[start:stop]], []
                part = part[stop:]
            runs[-1] += part, *between[k : k + 1]
        return runs[:-1] if runs[-1] == [""] else runs

    def _runs(self, prompt: str) -> list[str]:
        """The prompt as runs of text, see _form()."""
        if not is_text(prompt):
            raise InputError(f"prompt '{short(prompt)}' is not text that can be encoded")
        turns = messages_of(prompt)
        roles = tuple(turn["role"] for turn in turns)
        if roles not in self._forms:
            self._forms[roles] = self._form(roles)
            probe = self._runs(Messages(json.dumps([turn | {"content": _PROBE} for turn in turns])))
            whole = [*self._begin, *self._ids("".join(probe))]
            if self._encode([probe]) != [whole] or not probe[-1].endswith(self._end):
                del self._forms[roles]
                raise InputError(f"{self.name}: tokenizer: {listed(roles)} cannot be encoded as text only")
        text = lambda x: x if isinstance(x, str) else _STRIPS[x[1]](turns[x[0]]["content"])  # noqa: E731
        return ["".join(map(text, run)) for run in self._forms[roles]]

    def _encode(self, prompts: Sequence[list[str]]) -> list[list[int]]:
        texts = [text for runs in prompts for text in runs[::2]]
        found = [code.ids for code in self._plain.encode_batch_fast(texts, add_special_tokens=False)]
        for text, ids in zip(texts, found, strict=True):
            if not self.control_ids.isdisjoint(ids):
                raise InputError(f"prompt '{short(text)}': would be encoded with a control token")
        rest = iter(found)
        each = [[self._ids(text) if k % 2 else next(rest) for k, text in enumerate(runs)] for runs in prompts]
        return [[*self._begin, *itertools.chain(*some)] for some in each]

    def __call__(self, prompt: str, answer: str = "") -> list[int]:
        """Token ids of the rendered prompt, with `answer` written where the judge's answer begins."""
        *runs, last = self._runs(prompt)
        return self._encode([[*runs, last + answer]])[0]

    def many(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of each rendered prompt, on all cores (with TOKENIZERS_PARALLELISM=false on one)."""
        memo = {} if self.memo is None else self.memo
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in memo]
        for start in range(0, len(new), 2048):
            chunk = new[start : start + 2048]
            memo |= zip(chunk, self._encode(list(map(self._runs, chunk))), strict=True)
        return [list(memo[prompt]) for prompt in prompts]

    def render(self, prompt: str) -> str:
        """The prompt as text. Only token ids tell its control tokens from those that people wrote."""
        return "".join(self._runs(prompt))


@dataclasses.dataclass(frozen=True)
class LabelTokens:
    """How labels are read off the model. `sequences` holds (label index, token ids) for every spelling.

    whole = False: labels differ in their first tokens, one token a sequence, scored at the answer position.
    whole = True: some begin alike; whole spellings are scored, each closed by the end-of-turn token.
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
        """What must stand behind a prompt to read its labels: spellings without their last token, sorted."""
        return sorted({ids[:-1] for _, ids in self.sequences})


def label_tokens(
    tokenizer: Any, labels: Sequence[str], spellings: dict[str, Any] | None = None, encoder: Any = None
) -> LabelTokens:
    """Finds the tokens with which each label begins in context, right after the rendered prompt.

    spellings: {label: [text, ...]}, by default the label itself; the probabilities of a label's spellings add
    up. Raises InputError for equal labels or spellings, an unknown label, a spelling that is empty, a control
    token or merges with the prompt's end, and if whole labels have no end-of-turn token to close them.
    """
    encoder = encoder or PromptEncoder(tokenizer)
    labels = [str(label) for label in labels]
    spellings = {str(label): texts for label, texts in (spellings or {}).items()}
    if unknown := sorted(set(spellings) - set(labels)):
        raise InputError(f"spellings: unknown label {listed(unknown)}; the labels are {listed(labels)}")
    if len(set(labels)) != len(labels) or len(labels) < 2:
        way = "name each: 1 2 3"
        raise InputError(f"labels: two different labels or more are needed, not {listed(labels)}; {way}")
    question, found = "Is this so?", []
    prompt = encoder(question)
    for i, label in enumerate(labels):
        if isinstance(spellings.get(label), str):
            raise InputError(f"spellings: label '{short(label)}': a list of texts is needed, not one text")
        for text in spellings.get(label, [label]) or [""]:
            ids = encoder(question, text) if is_text(text) else []
            answer, fault = tuple(ids[len(prompt) :]), ""
            if not is_text(text) or not text:
                fault = "is empty" if not text else "is not text that can be encoded"
            elif ids[: len(prompt)] != prompt or not answer:
                fault = "merges with the end of the prompt"
            elif not encoder.control_ids.isdisjoint(answer):
                fault = "is a control token of the tokenizer"
            if fault:
                raise InputError(f"spellings: label '{short(label)}': '{short(text)}' {fault}")
            found.append((i, answer))
    # two spellings of a label that begin alike are read once
    firsts = list(dict.fromkeys((i, answer[:1]) for i, answer in found))
    if len({first for _, first in firsts}) == len(firsts):
        return LabelTokens(labels, firsts, whole=False)
    if encoder.end_id is None:
        raise InputError("labels: some begin with the same token, and no end-of-turn token closes them")
    if not encoder.end_is_known:
        text = "%s: the chat template does not show how a turn ends; whole labels are closed by %r"
        log.warning(text, encoder.name, tokenizer.decode([encoder.end_id]))
    closed = list(dict.fromkeys((i, (*answer, encoder.end_id)) for i, answer in found))
    if len({ids for _, ids in closed}) != len(closed):
        raise InputError(f"spellings: two labels have the same tokens: {listed(labels)}")
    return LabelTokens(labels, closed, whole=True)


# ----------------------------------------------------------------------------------------------------------
# 3. Packs: every shared token is computed once
# ----------------------------------------------------------------------------------------------------------
TokenLists = Sequence[Sequence[int]]


@dataclasses.dataclass
class Pack:
    """Prompts in one row of tokens, a tree in depth-first order: a beginning that several share stands once.

    ids, positions (L,): tokens and their positions in their own prompt. ends (L,): token i sees token j if
    j <= i < ends[j]. members: indices of the prompts. paths: where the tokens of each prompt stand, a list
    for every prompt and branch (inner tokens of whole labels).
    """

    ids: list[int]
    positions: list[int]
    ends: list[int]
    members: list[int]
    paths: list[list[int]]


def common_length(a: Sequence, b: Sequence) -> int:
    """The length of the beginning that two lists share."""
    return sum(itertools.takewhile(bool, map(operator.eq, a, b)))  # runs in C


def _cheapest(length: int, cost: Callable[[int], Iterable[tuple[int, int]]]) -> list[tuple[int, int]]:
    """Divides 0 .. length into runs (start, stop) of the least total cost, and of these into the fewest.

    cost(stop) yields (start, cost of the run start .. stop) for each start that a run may have.
    """
    best = [(0, 0, 0)]  # for each stop: the cost up to it, the number of runs, the start of the last
    for stop in range(1, length + 1):
        best.append(min((best[start][0] + c, best[start][1] + 1, start) for start, c in cost(stop)))
    cuts = [length]
    while cuts[-1]:
        cuts.append(best[cuts[-1]][2])
    return list(itertools.pairwise(cuts[::-1]))


def _in_two_levels(lists: TokenLists, shared: Sequence[int]) -> list[int]:
    """What each list may share with the one before it if lists fall into groups of one common beginning."""

    def cost(stop: int) -> Iterator[tuple[int, int]]:
        tokens, common = 0, len(lists[stop - 1])
        for start in range(stop - 1, -1, -1):
            tokens += len(lists[start])
            yield start, tokens - (stop - start - 1) * common
            common = min(common, shared[start])

    kept = [0] * len(lists)
    for start, stop in _cheapest(len(lists), cost):
        kept[start + 1 : stop] = [min(shared[start + 1 : stop], default=0)] * (stop - start - 1)
    return kept


def build_pack(
    token_lists: TokenLists, members: Sequence[int], branches: TokenLists = ((),), two_levels: bool = False
) -> Pack:
    """Lays out prompts in the order of `members`, each with its branches; each shares with the one before it.

    two_levels: only groups of one common beginning and what follows it, as Unsloth's kernel knows them.
    """
    lists = [[*token_lists[member], *branch] for member in members for branch in sorted(map(list, branches))]
    shared = [0] + [common_length(a, b) for a, b in itertools.pairwise(lists)]
    shared = _in_two_levels(lists, shared) if two_levels else shared
    pack, path, total = Pack([], [], [], list(members), []), [], sum(map(len, lists)) - sum(shared)
    for tokens, kept in zip(lists, shared, strict=True):
        start = len(pack.ids)
        for closed in path[kept:]:
            pack.ends[closed] = start
        pack.ids += tokens[kept:]
        pack.positions += range(kept, len(tokens))
        pack.ends += [total] * (len(tokens) - kept)
        path = [*path[:kept], *range(start, len(pack.ids))]
        pack.paths.append(path)
    return pack


def pack_prompts(
    token_lists: TokenLists, max_tokens: int, branches: TokenLists = ((),), two_levels: bool = False
) -> list[Pack]:
    """Divides prompts into packs of at most max_tokens tokens: the fewest tokens in all, then fewest packs.

    Of sorted prompts, neighbours share most; dynamic programming over the cuts finds the cheapest division. A
    prompt of more than max_tokens gets a pack of its own; packs that two_levels makes too large are halved.
    """
    order = sorted(range(len(token_lists)), key=token_lists.__getitem__)
    inner = len({tuple(branch[:k]) for branch in branches for k in range(1, len(branch) + 1)})
    sizes = [len(token_lists[i]) + inner for i in order]
    shared = [0] + [common_length(token_lists[a], token_lists[b]) for a, b in itertools.pairwise(order)]

    def cost(stop: int) -> Iterator[tuple[int, int]]:
        rest = 0
        for start in range(stop - 1, -1, -1):
            if start < stop - 1 and sizes[start] + rest > max_tokens:
                return
            yield start, sizes[start] + rest
            rest += sizes[start] - shared[start]

    def packs(start: int, stop: int) -> list[Pack]:
        pack, middle = build_pack(token_lists, order[start:stop], branches, two_levels), (start + stop) // 2
        fits = len(pack.ids) <= max_tokens or stop - start == 1
        return [pack] if fits else packs(start, middle) + packs(middle, stop)

    return [pack for run in _cheapest(len(order), cost) for pack in packs(*run)]


def shuffled(token_lists: TokenLists, seed: int, keep_together: int = 16, chunk: int = 8) -> list[int]:
    """A random order of prompts; those that share a beginning come in chunks, so that steps share more.

    Prompts form a tree of groups: those that share keep_together (1 or more) tokens more than all of their
    group do are a group within it. One of at most `chunk` prompts stays whole; what a larger one holds beside
    its groups is dealt into chunks. Chunks, and prompts in no group, stand in uniformly random order.
    """
    draw = random.Random(seed)
    order = sorted(range(len(token_lists)), key=token_lists.__getitem__)
    shared = [0] + [common_length(token_lists[a], token_lists[b]) for a, b in itertools.pairwise(order)]
    chunks, todo = [], [(0, len(order), 1)]  # a group, and the size of the chunks of its single prompts
    while todo:
        start, stop, size = todo.pop()
        least = min(shared[start + 1 : stop], default=0) + keep_together
        cuts = [start, *(k for k in range(start + 1, stop) if shared[k] < least), stop]
        parts = list(itertools.pairwise(cuts))
        single = [order[a] for a, b in parts if b - a == 1]
        draw.shuffle(single)
        chunks += [single[k : k + size] for k in range(0, len(single), size)]
        chunks += [order[a:b] for a, b in parts if 1 < b - a <= chunk]
        todo += [(a, b, chunk) for a, b in parts if b - a > chunk]
    draw.shuffle(chunks)
    return [i for some in chunks for i in some]


def unsloth_segments(ends: torch.Tensor, positions: torch.Tensor) -> Any:
    """The prefixes and suffixes of a two-level pack, as Unsloth's forward takes them in a mask's place."""
    from unsloth.utils.prefix_grouper_kernel import build_seg_info_multigroup

    device, ends, positions = ends.device, ends.tolist(), positions.tolist()
    groups: list[tuple[int, list[int]]] = []  # tokens of each prefix, and of the suffixes behind it
    for _, run in itertools.groupby(range(len(ends)), key=lambda i: (ends[i], positions[i] - i)):
        first, *more = run
        if positions[first] == 0:
            groups.append((1 + len(more), []))
        else:
            groups[-1][1].append(1 + len(more))
    return build_seg_info_multigroup(groups, device)[0]


BLOCKS = "distjudge_blocks"


def block_length(device: str | torch.device) -> int:
    """Queries that attention in blocks takes at a time, see block_attention()."""
    return 128 if torch.device(device).type == "cpu" else 512


def tree_mask(config: Any, dtype: torch.dtype, ends: torch.Tensor, positions: torch.Tensor) -> Any:
    """The attention mask of a pack in the form the model takes: ends and positions (L,), see Pack.

    Boolean (1, 1, L, L) for SDPA, or in blocks for block_attention(); additive for eager attention; else a
    BlockMask. For several kinds of layers a dict by kind; NotImplementedError for kinds unknown to us.
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


def block_attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
    """transformers' SDPA; for a pack, one block of queries at a time against the keys that any of them sees.

    query, key, value (1, heads, L, D) -> (1, L, heads, D), None. One call would compute all L x L pairs.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa

    blocks = getattr(attention_mask, "blocks", None)
    if blocks is None:
        return sdpa(module, query, key, value, attention_mask, **kwargs)
    out, parts = [], query.split([rows for rows, _, _ in blocks], dim=2)
    for part, (_, columns, seen) in zip(parts, blocks, strict=True):
        keys, values = key.index_select(2, columns), value.index_select(2, columns)
        out.append(sdpa(module, part, keys, values, seen, **kwargs)[0])
    return torch.cat(out, dim=1), None


# ----------------------------------------------------------------------------------------------------------
# 4. The judge: a causal LM that is read at the label tokens only
# ----------------------------------------------------------------------------------------------------------
SLICE, SLICE_LOGITS = 16_384, 2**24  # tokens of the vocabulary, and logits, at a time at most


class Recomputed(torch.autograd.Function):
    """function(*tensors), computed again in the backward pass, as torch.utils.checkpoint does.

    Unsloth puts another in that one's place, which drops the gradients of what is no argument.
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[..., torch.Tensor], *tensors: Any) -> torch.Tensor:
        ctx.function = function
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        pairs = zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        tensors = [t.detach().requires_grad_(need) for t, need in pairs]
        with torch.enable_grad(), torch.autocast(gradient.device.type, enabled=False):
            ctx.function(*tensors).backward(gradient)
        return None, *(t.grad for t in tensors)


def half_products(x: Any, weight: Any, bias: Any, a: Any, b: Any, scale: float) -> torch.Tensor:
    """A frozen linear layer with its adapter, x W' + b + s (x A') B': float32 but for products in bfloat16.

    x (..., H), W (O, H) in bfloat16, b (O,) or None, A (r, H) and B (O, r) -> (..., O).
    """
    rows = x.flatten(0, -2).bfloat16()
    low = F.linear(rows, a.bfloat16()).float()
    # the adapter's part is added in float32, where it is not lost beside the other while it is small
    out = F.linear(rows, weight).float().addmm_(low, b.T, alpha=scale)
    return (out if bias is None else out.add_(bias)).view(*x.shape[:-1], -1)


def multiplies_bf16(device: str | torch.device) -> bool:
    """Whether a device is a CPU that multiplies bfloat16 faster than float32, by AMX or AVX512-BF16."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.device(device).type == "cpu" and bool(known.get("amx_bf16") or known.get("avx512_bf16"))


def _halve_products(model: Any) -> None:
    """Holds what carries an adapter in bfloat16, and computes with it as half_products() does."""
    from peft.tuners.lora import Linear

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        (name,), base = self.active_adapters, self.base_layer
        scale = 0.0 if self.disable_adapters or self.merged else self.scaling[name]
        own = self.lora_A[name].weight, self.lora_B[name].weight, scale
        return half_products(x, base.weight, base.bias, *own)

    for layer in model.modules():
        if isinstance(layer, Linear):
            layer.base_layer.weight.data = layer.base_layer.weight.data.bfloat16()
            layer.forward = types.MethodType(forward, layer)


def add_label_readout(model: Any) -> None:
    """Teaches a causal LM's forward more arguments: `answer_at`, `token_ids`, `vocabulary` and `ends`.

    `ends` (1, L) says that the row is a pack (see Pack) and makes its attention mask. With `answer_at` (M,
    2), rows and columns, it returns the hidden states there, (M, H); with `token_ids` (T,) too, their logits,
    (M, T) float32; with `vocabulary` a pair of these and the logsumexp over the whole vocabulary, (M,). No
    (positions, vocabulary) tensor is made. PEFT and autocast wrap the model's own forward like any other.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    plain_forward, decoder, head = model.forward, model.get_decoder(), model.get_output_embeddings()
    if not head.weight.is_floating_point():
        raise InputError(f"{type(model).__name__}: its output layer is quantized: no label can be read")
    config = model.config.get_text_config()
    model.two_levels = type(decoder).forward.__module__.startswith("unsloth.")
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    if not model.two_levels and config._attn_implementation == "sdpa":
        AttentionInterface.register(BLOCKS, block_attention)
        AttentionMaskInterface.register(BLOCKS, sdpa_mask)
        with contextlib.suppress(ValueError, AttributeError):  # some older architectures keep a dense mask
            model.set_attn_implementation(BLOCKS)

    def logits_of(hidden: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        logits = F.linear(hidden, weight.float(), None if bias is None else bias.float()) * scale
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def over_vocabulary(hidden: torch.Tensor) -> torch.Tensor:
        """In slices that are computed again in the backward pass; a float32 layer would be 2 GB at 7B."""
        width = min(SLICE, max(256, SLICE_LOGITS // max(1, len(hidden))))
        norm = lambda *tensors: logits_of(*tensors).logsumexp(1)  # noqa: E731
        slices = zip(*(w.split(width) for w in (head.weight, head.bias) if w is not None), strict=True)
        return torch.stack([Recomputed.apply(norm, hidden, *some) for some in slices], dim=1).logsumexp(1)

    def forward(self, *args, answer_at=None, token_ids=None, vocabulary=False, ends=None, **kwargs):
        if ends is not None and self.two_levels:  # Unsloth drops masks in training, but takes this
            kwargs["prefix_seg_info"] = unsloth_segments(ends[0], kwargs["position_ids"][0])
        elif ends is not None:
            kwargs["attention_mask"] = tree_mask(config, self.dtype, ends[0], kwargs["position_ids"][0])
        if answer_at is None:
            return plain_forward(*args, **kwargs)
        unused = ("logits_to_keep", "num_logits_to_keep")  # of Unsloth's PeftModel; no logits are made here
        kwargs = {k: v for k, v in kwargs.items() if v is not None and k not in unused}
        kwargs |= {"use_cache": False, "return_dict": True}
        hidden = decoder(*args, **kwargs).last_hidden_state[answer_at[:, 0], answer_at[:, 1]]
        # in 16 bits logits near 20 would be off by 4e-4 nats
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.float()
            if token_ids is None:
                return hidden
            bias = None if head.bias is None else head.bias[token_ids]
            logits = logits_of(hidden, head.weight[token_ids], bias)
            return (logits, over_vocabulary(hidden)) if vocabulary else logits

    model.forward = types.MethodType(forward, model)  # bound, as those who wrap it and unwrap it expect


def label_logprobs(
    model: Any, batch: dict[str, torch.Tensor], tokens: LabelTokens, with_mass: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities of the labels, (B, C) float32, and, with_mass, the log of their full sum, (B,).

    First-token reading: softmax over the labels' tokens, a label's spellings added up. Whole labels: each
    spelling's log-probability summed over its tokens and the end of the turn, normalised over the labels.
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


def corrected(logq: torch.Tensor, calibration: dict[str, Any]) -> torch.Tensor:
    """Log-probabilities (..., C) of the model -> those of the calibrated judge, float64."""
    bias = torch.tensor(calibration["bias"], dtype=torch.float64)
    return (logq.double() / calibration["temperature"] + bias).log_softmax(-1)


class Judge:
    """A model, its tokenizer and its labels. Made by load_judge(); `predict` is the judge at work."""

    packs: bool = True
    """Whether prompts that share a beginning are computed together; check_model() decides."""
    pack_tokens: int
    """Tokens a forward pass, at most; halved when CUDA runs out of memory."""
    bf16: bool = False
    """Whether products may be in bfloat16, see load_judge()."""
    calibration: dict[str, Any] | None = None
    """The temperature and bias that answers are corrected by, see recipes/calibrate.py; None: by nothing."""

    def __init__(
        self, model: Any, encoder: PromptEncoder, tokens: Any, base="", max_length=None, spellings=None
    ):
        """base: the model's folder or hub id; max_length: tokens of a prompt, 2048 by default."""
        self.model, self.encoder, self.tokens, self.base = model, encoder, tokens, base
        self.spellings, max_length = dict(spellings or {}), max_length or 2048
        config = model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None) or max_length
        if (getattr(config, "rope_parameters", None) or {}).get("rope_type") in ("dynamic", "longrope"):
            positions = config.rope_parameters.get("original_max_position_embeddings", positions)
            if positions < max_length:
                text = "%s: prompts may have about %d tokens, not %d: longer ones change its position codes"
                log.warning(text, self.base or type(model).__name__, positions, max_length)
        self.longest = positions - max(len(ids) for _, ids in tokens.sequences) + 1
        self.max_length = min(max_length, self.longest)
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
        """Token ids of each rendered prompt, from number `start` on. InputError for one over max_length."""
        texts = []
        for i, prompt in enumerate([prompts] if isinstance(prompts, str) else prompts, start):
            try:
                texts.append(prompt_text(prompt))
            except ValueError as error:
                raise InputError(f"prompts[{i}]: prompt: {error}") from None
        encoded = self.encoder.many(texts)
        if over := [i for i, ids in enumerate(encoded) if len(ids) > self.max_length]:
            longest = max(map(len, encoded))
            first = f"the first is number {start + over[0] + 1}, '{short(texts[over[0]], 40)}'"
            limit = f"longer than max_length {self.max_length} tokens (the longest has {longest}; {first})"
            raise InputError(f"prompts: {len(over)} of {len(texts)} are {limit}")
        return encoded

    def plan(self, encoded: Sequence[list[int]]) -> list[list[int]]:
        """Divides prompts into forward passes of at most pack_tokens tokens, as packs or as padded rows."""
        if self.packs:
            packs = pack_prompts(encoded, self.pack_tokens, self.tokens.branches, self.model.two_levels)
            return [pack.members for pack in packs]
        groups, start, rows = [], 0, len(self.tokens.branches)
        order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
        while start < len(order):
            size = max(1, self.pack_tokens // (rows * len(encoded[order[start]])))
            groups.append(order[start : start + size])
            start += size
        return groups

    def batch(self, encoded: Sequence[list[int]], device: Any = None) -> dict[str, torch.Tensor]:
        """One forward pass, as one pack or as right-padded rows, a row a prompt and branch.

        Returns, on the judge's device or another, input_ids with position_ids and ends (1, L), or with
        attention_mask (R, L); answer_at (M, 2), the positions to read; token_ids (T,), the tokens to read
        there; and reads (B * S, 2): for every prompt the rows of answer_at and the columns of token_ids whose
        log-probabilities make up its labels', in the order of `tokens.sequences`. For label_logprobs().
        """
        tokens, branches = self.tokens, self.tokens.branches
        if self.packs:
            pack = build_pack(encoded, range(len(encoded)), branches, self.model.two_levels)
            batch = {"input_ids": [pack.ids], "position_ids": [pack.positions], "ends": [pack.ends]}
        else:
            known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
            pad_id = next(i for i in known if i is not None)
            rows = [[*ids, *branch] for ids in encoded for branch in branches]
            width = max(map(len, rows))
            batch = {"input_ids": [row + [pad_id] * (width - len(row)) for row in rows]}
            batch["attention_mask"] = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        reads, at, column = [], {}, {token: k for k, token in enumerate(tokens.token_ids)}
        spelled = [(branches.index(sequence[:-1]), sequence) for _, sequence in tokens.sequences]
        for i, ids in enumerate(encoded):
            for branch, sequence in spelled:
                row = i * len(branches) + branch
                for k, token in enumerate(sequence, len(ids) - 1):
                    place = (0, pack.paths[row][k]) if self.packs else (row, k)
                    reads.append((at.setdefault(place, len(at)), column[token]))
        batch |= {"answer_at": list(at), "token_ids": tokens.token_ids, "reads": reads}
        return {name: torch.tensor(value, device=device or self.device) for name, value in batch.items()}

    def shrink(self, members: Sequence[int], tokens: int) -> None:
        """After a pass over the members, of so many tokens, ran out of memory: from here on half as many.

        Raises torch.OutOfMemoryError if it was one prompt alone. To be called outside the `except` block, for
        while an error is handled the pass that failed is still in memory.
        """
        if len(members) < 2:
            raise torch.OutOfMemoryError(f"one prompt alone, of {tokens} tokens, does not fit into memory")
        self.pack_tokens = max(1, min(self.pack_tokens, tokens) // 2)
        log.warning("out of memory: from here on at most %d tokens a pass; no item is lost", self.pack_tokens)
        torch.cuda.empty_cache()  # without CUDA it does nothing

    @torch.no_grad()
    def judge_encoded(
        self, encoded: list[list[int]], tick: Callable[[int], Any] = lambda n: None, with_mass: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities (N, C) and label masses (N,), all 1 without with_mass; float32 on the CPU."""
        logq, mass = torch.empty(len(encoded), len(self.labels)), torch.ones(len(encoded))
        todo = self.plan(encoded)[::-1]
        while todo:
            members = todo.pop()
            batch = self.batch([encoded[i] for i in members])
            with contextlib.suppress(torch.OutOfMemoryError):
                q, m = label_logprobs(self.model, batch, self.tokens, with_mass)
                logq[members], mass[members] = q.float().cpu(), 1.0 if m is None else m.exp().float().cpu()
                tick(len(members))
                continue
            self.shrink(members, batch["input_ids"].numel())  # the passes still waiting are too large as well
            left = [i for group in (*todo, members) for i in group]
            todo = [[left[i] for i in group] for group in self.plan([encoded[i] for i in left])][::-1]
        return logq, mass

    def stream(
        self, prompts: Iterable[str], progress: bool = False, window: int = 2048
    ) -> Iterator[tuple[torch.Tensor, float]]:
        """Judges any number of prompts in constant memory: yields (log-probabilities, label mass) in order.

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
                logq = corrected(logq, self.calibration).float() if self.calibration else logq
                yield from zip(logq, mass.tolist(), strict=True)

    def score(self, prompts: Sequence[str], progress: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Label log-probabilities (N, C) and label mass (N,), float32 on the CPU, in the prompts' order.

        Label mass is the probability that the model, free to say anything, answers with one of the labels.
        All prompts are checked before the first is judged.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        for k in range(2048, len(prompts), 2048):  # the first ones stream() checks before it judges
            self.encode(prompts[k : k + 2048], k)
        rows = list(self.stream(prompts, progress))
        if not rows:
            return torch.empty(0, len(self.labels)), torch.empty(0)
        return torch.stack([logq for logq, _ in rows]), torch.tensor([mass for _, mass in rows])

    def predict(self, prompts: Sequence[str], progress: bool = False) -> Any:
        """Probabilities of the labels, a float32 numpy array (N, C), columns in the order of `labels`.

        prompts: user messages as text, or lists of {"role", "content"}. Raises InputError for an empty prompt
        or one longer than max_length tokens.
        """
        return self.score(prompts, progress)[0].exp().numpy()


@torch.no_grad()
def check_model(judge: Judge) -> None:
    """Compares label scores with the model's own, and packs with single prompts, which decides judge.packs.

    Raises InputError where scores are not finite, or differ: then the model changes its logits in a way that
    add_label_readout does not know. Probes are longer than a window of up to 1,024 tokens, on CUDA of any.
    """
    model, name = judge.model, type(judge.model).__name__
    dtype = min((w.dtype for w in model.parameters()), key=lambda kind: kind.itemsize)
    if hasattr(model, "meant_for"):  # an outline has no weights to check with
        return
    tolerance, settings = 1e-4 if dtype == torch.float32 else 0.05, model.config.get_text_config().to_dict()
    windows = {key: n for key, n in settings.items() if "window" in key and isinstance(n, int) and n > 1}
    probes = ["Is this so?", "Is this so? Yes.", "Is this it, then?", "Other words, and a few more of them."]
    if sizes := [n for n in windows.values() if n <= 1024 or judge.device.type == "cuda"]:
        words = "word " * min(max(sizes) + 8, max(1, judge.max_length - 64))
        probes += [words + "one", words + "two"]
    encoded = sorted(judge.encoder(probe)[: judge.max_length] for probe in probes)

    model.eval()
    judge.packs = False
    batch = judge.batch(encoded[:1])
    del batch["reads"]
    logits, norm = model(**batch, vocabulary=True)
    columns, (row, place) = batch.pop("token_ids"), batch.pop("answer_at").T
    own = model(**batch).logits[row, place].float()
    own = torch.cat([own[:, columns], own.logsumexp(1, keepdim=True)], dim=1)
    if not torch.isfinite(own).all():
        raise InputError(f"{model.name_or_path or name}: model: its scores are not finite, in {dtype}")
    off = (torch.cat([logits, norm[:, None]], dim=1) - own).abs()
    if not (off <= tolerance * (own.abs() + own.abs().max())).all():
        raise InputError(f"{name}: its label scores cannot be read exactly: off by {off.max():.2g}")

    def hidden(prompts: Sequence[list[int]], packed: bool) -> torch.Tensor:
        judge.packs = packed
        batch = judge.batch(prompts)
        rows = batch.pop("reads")[:, 0]
        del batch["token_ids"]
        return model(**batch)[rows]

    known = {"sliding_window", "max_window_layers", "_sliding_window_pattern"}
    try:
        if unknown := sorted(windows.keys() - known):
            raise NotImplementedError(f"its {unknown[0]} is unknown to us")
        for training in (False, True) if judge.backend == "unsloth" else (False,):  # its masks differ
            model.train(training)
            single = torch.cat([hidden([ids], False) for ids in encoded])
            packed, padded = (hidden(encoded, way) - single for way in (True, False))
            gap, noise = ((off.norm(dim=1) / single.norm(dim=1)).max() for off in (packed, padded))
            # deep models round more: packs may be off by twice what padded rows, the other way, are
            if not gap <= (2 * noise).clamp(tolerance, 4 * tolerance):  # NaN is not
                raise ValueError(f"hidden states are off by {gap:.1%}, padded rows by {noise:.1%}")
            if training:  # backward is a kernel of its own, which can fail where the forward did not
                with torch.enable_grad():
                    hidden(sorted(encoded, key=len)[:4], True).sum().backward()
        judge.packs = True
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # an architecture can refuse the mask in ways of its own
        judge.packs, text = False, "%s cannot be run on packed prompts (%s): they are run as padded rows"
        log.warning(text, name, first_line(error))
    model.zero_grad()
    model.eval()


def load_judge(
    path: str | os.PathLike,
    labels: Sequence[str] | None = None,
    *,
    spellings: dict[str, Sequence[str]] | None = None,
    lora_rank: int = 16,
    four_bit: bool = False,
    max_length: int | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    backend: str = "auto",
    gradient_checkpointing: bool = False,
    weights: bool = True,
    bf16: bool | None = None,
) -> Judge:
    """A judge from a run folder of save_judge() or run(), or from a model (folder or hub id) and its labels.

    Weights are float32 on a CPU, 16-bit on CUDA, or with four_bit NF4. LoRA adapters go on all linear layers
    of the decoder; with lora_rank=0 all weights are trained, in float32. bf16: on a CPU with AMX or
    AVX512-BF16, products with what carries an adapter are in bfloat16. max_length, bf16: 2048 tokens and
    False, or as a saved judge was trained. Only safetensors are read, no code of a repository is run.
    weights=False: an outline on PyTorch's meta device, for dry runs. Raises InputError for what is no model,
    labels other than a saved judge's, changed files of it, and where check_model() does.
    """
    folder, path, base, adapter, saved = Path(path), str(path), str(path), None, {}
    labels = None if labels is None else [str(label) for label in labels]
    if (folder / "judge.json").is_file():
        if not weights:
            raise InputError(f"{path}: model: an outline is made of a model, not of a trained judge")
        saved = read_saved(folder, labels)
        labels, spellings, four_bit = saved["labels"], saved["spellings"], saved["four_bit"]
        max_length, lora_rank = max_length or saved["max_length"], 0
        bf16 = saved.get("bf16") if bf16 is None else bf16
        adapter = folder / "adapter" if saved["adapter"] else None
        base = saved["base"] if adapter else str(folder / "model")
    elif not labels:
        raise InputError(f"{path}: labels: a model that is not a saved judge needs labels=[...]")
    elif four_bit and not lora_rank:
        raise InputError("four_bit: 4-bit weights cannot be trained themselves; set lora_rank to 1 or more")
    check_there(base)
    trained = not (adapter or lora_rank)
    use, why = choose_backend(backend, device, trained)  # before transformers is imported
    tokenizer = load_tokenizer(str(folder / "tokenizer") if saved else path)
    encoder = PromptEncoder(tokenizer, saved.get("frame"))
    tokens = label_tokens(tokenizer, labels, spellings, encoder)  # refuses them before the weights are loaded
    if saved and [[label, list(ids)] for label, ids in tokens.sequences] != saved["sequences"]:
        raise InputError(f"{path}: labels: their tokens are not those the judge was trained on")
    options = {"four_bit": four_bit, "device": device, "dtype": torch.float32 if trained else None}
    model = load_model(base, **options, backend=use, max_length=max_length or 2048, weights=weights)
    model.backend_reason = why
    if len(tokenizer) > (rows := model.get_input_embeddings().weight.shape[0]):
        raise InputError(f"{path}: model: has {rows} tokens, its tokenizer {len(tokenizer)}")
    if adapter and saved.get("base_sample") not in (None, model.fingerprint):
        raise InputError(f"{path}: base: the weights of {base} are not those the judge was trained on")
    about = {"base": base, "max_length": max_length, "spellings": spellings, "bf16": bool(bf16)}
    made = {"lora_rank": lora_rank, "seed": seed, "gradient_checkpointing": gradient_checkpointing}
    known = {"encoder": encoder, "tokens": tokens, "adapter": adapter}
    judge = make_judge(model, tokenizer, labels, **known, **made, **about)
    judge.calibration = saved.get("calibration")
    if fitted := judge.calibration:
        log.warning("%s: calibrated on %g votes on %d items", path, fitted["votes"], fitted["items"])
    return judge


def make_judge(
    model: Any,
    tokenizer: Any,
    labels: Sequence[str],
    *,
    lora_rank: int = 16,
    seed: int = 0,
    gradient_checkpointing: bool = False,
    encoder: PromptEncoder | None = None,
    tokens: LabelTokens | None = None,
    adapter: Path | None = None,
    bf16: bool = False,
    **about: Any,
) -> Judge:
    """load_judge() of a causal LM in memory, which is changed in place; adapter: a trained one's folder.

    encoder, tokens: of this tokenizer and these labels, where they are known.
    about: base (by default what the model says it was loaded from), max_length and spellings, see Judge;
    bf16: see load_judge().
    """
    base = about.get("base") or model.name_or_path
    about["base"] = str(Path(base).resolve()) if base and Path(base).is_dir() else base
    encoder = encoder or PromptEncoder(tokenizer)
    tokens = tokens or label_tokens(tokenizer, labels, about.get("spellings"), encoder)
    add_label_readout(model)
    if adapter or lora_rank:
        model = _with_adapters(model, lora_rank, seed, gradient_checkpointing, adapter)
    elif not hasattr(model, "meant_for"):  # rounded to 16 bits, small steps of its own weights would be lost
        model.float()
    judge = Judge(model, encoder, tokens, **about)
    judge.bf16 = bf16
    if bf16 and judge.backend == "transformers" and multiplies_bf16(judge.device):
        _halve_products(model)
    check_model(judge)
    return judge


def check_there(path: str) -> None:
    """Raises InputError if a path names something else than a folder with a model, or a hub id.

    One try to reach the model hub, where libraries make many; without it, what was fetched is used.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    folder, fault = Path(path), ""
    if folder.is_file():
        fault = "is a file, not a folder"
    elif (folder / "adapter_config.json").is_file():  # transformers would load what lies beneath, pickles too
        fault = "holds a PEFT adapter, not a model by itself; merge it into its base first"
    elif folder.is_dir() and not (folder / "config.json").is_file():
        fault = "cannot be loaded: there is no config.json in it"
    elif not folder.is_dir() and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path):
        fault = "no such folder"
    if fault or not path.strip():
        raise InputError(f"{path}: model: {fault}" if path.strip() else "model: name a folder or a hub id")
    try:
        if not folder.is_dir() and not constants.HF_HUB_OFFLINE:
            HfApi().model_info(path, timeout=10)
    except HfHubHTTPError:  # it answers: loading will say what is wrong
        pass
    except Exception as error:  # of whatever carries the request
        constants.HF_HUB_OFFLINE, text = True, "no model hub (%s): only what was fetched before can be used"
        log.warning(text, first_line(error))


def weights_fingerprint(path: str) -> str:
    """A hash of 64 numbers of each stored weight, rounded to bfloat16, whatever they are loaded as.

    ValueError if the list of a model's weight files names one that is no safetensors file beside it.
    """
    from safetensors import safe_open
    from transformers.utils import cached_file

    names, samples = ["model.safetensors"], {}
    with contextlib.suppress(OSError):  # there is no list: the weights are in one file
        listing = Path(cached_file(path, "model.safetensors.index.json")).read_text(encoding="utf-8")
        names = sorted(set(json.loads(listing)["weight_map"].values()))
    if wrong := [name for name in names if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", str(name))]:
        raise ValueError(f"model.safetensors.index.json names '{short(wrong[0])}'; only safetensors are read")
    for name in names:
        with safe_open(cached_file(path, name), "pt") as file:
            for key in file.keys():
                some = file.get_tensor(key).flatten()[:64]  # the rest is not read
                samples[key] = some.to(torch.bfloat16).float().tolist()
    return digest_of(sorted(samples.items()))


def choose_backend(wanted: str = "auto", device: Any = None, trained: bool = False) -> tuple[str, str]:
    """Which library loads and runs the model, and why: ("unsloth" or "transformers", reason).

    Unsloth patches what it imports, so it is imported here, before transformers. Raises InputError where it
    is asked for and cannot be had. trained: all weights are, not adapters.
    """
    if wanted not in ("auto", "unsloth", "transformers"):
        raise InputError(f"backend: must be auto, unsloth or transformers, not {wanted}")
    if wanted == "transformers":
        return wanted, "asked for"
    nowhere = f"the model goes to {device}" if torch.cuda.is_available() else "no CUDA device"
    why_not = "all weights are trained, not adapters" if trained else nowhere
    if not trained and torch.cuda.is_available() and str(device or "cuda").startswith("cuda"):
        try:
            os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
            import unsloth  # noqa: F401

            return "unsloth", "asked for" if wanted == "unsloth" else "CUDA, and Unsloth is installed"
        except Exception as error:  # it raises what its many dependencies raise
            why_not = f"Unsloth cannot be imported: {type(error).__name__}: {first_line(error)}"
    if wanted == "unsloth":
        raise InputError(f"backend: Unsloth cannot be used: {why_not}")
    return "transformers", why_not


def _with_adapters(model: Any, rank: int, seed: int, gradient_checkpointing: bool, saved: Path | None) -> Any:
    """The model with adapters, in float32: a folder's, or fresh ones on its decoder's linear layers.

    A vision tower gets none. Raises InputError for a folder whose adapter does not load.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    decoder = set(model.get_decoder().modules())
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    targets = sorted({name.rsplit(".", 1)[-1] for name, module in linear.items() if module in decoder})
    lora = {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0, "bias": "none", "target_modules": targets}
    # Unsloth's way of recomputing activations keeps what it must keep in main memory, through CUDA
    recompute = "unsloth" if gradient_checkpointing and torch.cuda.is_available() else gradient_checkpointing
    unsloth = getattr(model, "backend", "") == "unsloth" and not hasattr(model, "meant_for")
    if unsloth:
        from unsloth import FastLanguageModel
        from unsloth.models.vision import FastBaseModel
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if saved:
            try:
                model = PeftModel.from_pretrained(model, str(saved), is_trainable=True)
            except Exception as error:  # a damaged file can fail in any way
                raise InputError(f"{saved}: the adapter cannot be loaded: {first_line(error)}") from error
            if unsloth and model.two_levels:  # its fused layers, as its own loader puts them over an adapter
                model = FastLanguageModel.patch_peft_model(model, use_gradient_checkpointing=recompute)
            elif unsloth:  # a model that runs transformers' forward
                model = FastBaseModel.post_patch_model(model, use_gradient_checkpointing=recompute)
        elif unsloth:
            options = {"random_state": seed, "use_gradient_checkpointing": recompute}
            model = FastLanguageModel.get_peft_model(model, **lora, **options)
        else:
            outside = "|".join(re.escape(name) for name, module in linear.items() if module not in decoder)
            config = LoraConfig(**lora, task_type="CAUSAL_LM", exclude_modules=outside or None)
            model = get_peft_model(model, config)
    for weight in model.parameters():
        if weight.requires_grad:  # rounded to 16 bits, small steps would be lost
            weight.data = weight.data.float()
    return model


def half_precision(device: str | torch.device) -> torch.dtype:
    """The 16-bit type of a device: bfloat16, or float16 on cards that lack it (T4, V100)."""
    on_cuda = torch.device(device).type == "cuda" and torch.cuda.is_available()
    lacking = on_cuda and not torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.float16 if lacking else torch.bfloat16


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a folder or hub id, as its tokenizer.json has it. Raises InputError where it has none.

    AutoTokenizer, for folders without that file, gives every Qwen2 model Qwen2's own splitting rule.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    here, hub = "its tokenizer cannot be loaded", "no such folder, and it cannot be loaded from a model hub"
    try:
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        except (OSError, ValueError):
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if not set(tokenizer(_PROBE, add_special_tokens=False)["input_ids"]) - {tokenizer.unk_token_id}:
            raise ValueError("it has no vocabulary (tokenizer.json is missing)")  # one was made up, empty
    except Exception as error:  # a damaged or contradictory folder can fail in any way
        what = here if Path(path).is_dir() else hub
        raise InputError(f"{path}: model: {what}: {first_line(error)}") from error
    return tokenizer


def load_model(
    path: str,
    *,
    four_bit: bool = False,
    device: str | torch.device | None = None,
    backend: str = "transformers",
    max_length: int = 2048,
    weights: bool = True,
    dtype: torch.dtype | None = None,
) -> Any:
    """A causal LM as load_judge() takes it, before adapters. Raises InputError if it does not load whole."""
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    if four_bit and not weights:
        device = "cuda"  # 4-bit runs are planned for a card, also without one
    elif not device:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    device = str(torch.device(device))
    dtype = dtype or (torch.float32 if device.startswith("cpu") else half_precision(device))
    try:
        fingerprint = weights_fingerprint(path) if weights else ""
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        # a folder may name one, with code to fetch: the model's own is taken
        config._attn_implementation = None
        options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False}
        if not weights:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            model.meant_for, model.is_loaded_in_4bit = torch.device(device), four_bit
        elif backend == "unsloth":
            from unsloth import FastLanguageModel

            # longer inputs would be cut where the answer is read, positions beyond the model's own rescaled
            room = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
            options |= {"max_seq_length": min(max_length + 64, room), "load_in_4bit": four_bit}
            options |= {"use_gradient_checkpointing": False, "device_map": {"": device}}
            options |= {"use_exact_model_name": True}  # not another repository that Unsloth knows for it
            options |= {"offload_embedding": False}  # else small cards train from main memory
            model, _ = FastLanguageModel.from_pretrained(path, **options)
        else:
            if dtype == torch.float16 and "gemma" in config.model_type:
                options["dtype"] = dtype = torch.float32  # its activations do not fit into float16
            if four_bit:
                nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
                quantized = BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=dtype)
                options |= {"quantization_config": quantized, "device_map": {"": device}}
            options |= {"config": config, "output_loading_info": True, "ignore_mismatched_sizes": True}
            model, report = AutoModelForCausalLM.from_pretrained(path, **options)
            lost = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
            if lost:  # transformers would go on with random numbers in their place
                raise ValueError(f"{len(lost)} of its weights are missing or of another shape: {min(lost)}")
        if four_bit and not getattr(model, "is_loaded_in_4bit", False):  # Unsloth would go on in 16 bits
            raise ValueError("it was not loaded in 4 bits; bitsandbytes does not work here")
        if getattr(model, "_hf_peft_config_loaded", False):  # of a hub's repository
            raise ValueError("it holds a PEFT adapter, not a model by itself; merge it into its base first")
        model = model.to(device) if weights and not four_bit else model
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a damaged or contradictory folder can fail in any way
        raise InputError(f"{path}: model: cannot be loaded: {first_line(error)}") from error
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes") and type(module.weight) is torch.nn.Parameter:
            plain = "config.json has a quantization_config, but the weights are not quantized; take it out"
            raise InputError(f"{path}: model: {plain}")
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # such a CPU would pack 4-bit weights, when judging, into a form that no gradient flows through
            module.support_avx512bf16_for_cpu = False
    model.backend, model.fingerprint = backend, fingerprint
    return model


def save_judge(judge: Judge, folder: str | os.PathLike) -> None:
    """Writes judge.json, tokenizer/, adapter/ (or model/, when all weights were trained).

    What another judge left there goes first, for it would be taken for this one's. InputError for an adapter
    to a model that has no name.
    """
    folder, adapter = Path(folder), hasattr(judge.model, "peft_config")
    if adapter and not judge.base:
        remedy = "set judge.base to its folder or hub id"
        raise InputError(f"{folder}: base: an adapter needs its model; {remedy}")
    check_out(folder, *RUN_FILES)
    for name in ("judge.json", "config.json", "metrics.json", "predictions.jsonl"):
        (folder / name).unlink(missing_ok=True)
    for part in ("tokenizer", "adapter", "model"):
        if (folder / part).resolve() != Path(judge.base).resolve():
            shutil.rmtree(folder / part, ignore_errors=True)
    options = {"save_embedding_layers": False} if adapter else {}
    judge.model.save_pretrained(folder / ("adapter" if adapter else "model"), **options)
    judge.tokenizer.save_pretrained(folder / "tokenizer")
    about = {"distjudge": __version__, "base": judge.base, "adapter": adapter, "labels": judge.labels}
    about |= {"spellings": judge.spellings, "max_length": judge.max_length, "frame": judge.encoder.frame}
    about |= {"four_bit": bool(getattr(judge.model, "is_loaded_in_4bit", False)), "bf16": judge.bf16}
    about |= {"sequences": judge.tokens.sequences, "base_sample": getattr(judge.model, "fingerprint", None)}
    about |= {"sha256": checksums(folder)}
    write_saved(folder, about | ({"calibration": judge.calibration} if judge.calibration else {}))


def write_saved(folder: Path, about: dict[str, Any]) -> None:
    """Writes judge.json, with a digest by which read_saved() knows that nothing has changed."""
    write_json(folder / "judge.json", about | {"digest": digest_of(about)})


def digest_of(value: Any) -> str:
    """SHA-256 of plain values."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def hash_file(file: Any) -> str:
    """SHA-256 of what a file opened as bytes still holds, read in blocks."""
    digest = hashlib.sha256()
    while block := file.read(1 << 22):
        digest.update(block)
    return digest.hexdigest()


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of a judge's files, by their path in its folder; not of what else may lie there."""
    found, kinds = {}, (".json", ".jinja", ".safetensors")
    paths = (path for part in ("adapter", "model", "tokenizer") for path in (folder / part).rglob("*"))
    for path in sorted(path for path in paths if path.suffix in kinds and path.is_file()):
        with open(path, "rb") as file:
            found[path.relative_to(folder).as_posix()] = hash_file(file)
    return found


def read_saved(folder: Path, labels: list[str] | None = None) -> dict[str, Any]:
    """judge.json of a saved judge. Raises InputError, a line for each file that is not as it was saved."""
    about, since, wrong = folder / "judge.json", "compared with when the judge was saved", []
    saved, fault = parse_json(about.read_bytes())
    if not (digest := saved.pop("digest", None)):
        raise InputError(f"{about}: not a judge written by distjudge ({fault or 'no digest'})")
    if digest != digest_of(saved):
        raise InputError(f"{about}: has changed, {since}")
    here, then = checksums(folder), saved["sha256"]
    for name in sorted({**here, **then}):
        if here.get(name) != then.get(name):
            change = "is missing" if name not in here else "has changed" if name in then else "was not there"
            wrong.append(f"{folder / name}: {change}, {since}")
    if wrong:
        raise InputError("\n".join(wrong))
    if labels and labels != saved["labels"]:
        raise InputError(f"{folder}: labels: trained for {listed(saved['labels'])}, not {listed(labels)}")
    return saved


# ----------------------------------------------------------------------------------------------------------
# 5. Losses: (B, C), (B, C) -> (B,), in nats. Each is checked: see check_distributions
# ----------------------------------------------------------------------------------------------------------
def check_distributions(logq: torch.Tensor, p: torch.Tensor) -> None:
    """ValueError unless the rows of logq (..., C) are log-probabilities and of p probabilities, to 1e-2."""
    if logq.shape != p.shape or not logq.dim():
        raise ValueError(f"logq and p must be (B, C) both, not {tuple(logq.shape)} and {tuple(p.shape)}")
    wanted = {"logq": "log-probabilities (of scores: .log_softmax(-1))", "p": "probabilities (votes / sum)"}
    for name, rows in (("logq", logq.detach().double().exp()), ("p", p.detach().double())):
        wrong = ~((rows.sum(-1) - 1).abs() <= 1e-2) | (rows < 0).any(-1)
        if bool(wrong.any()):
            row = [round(x, 4) for x in (logq if name == "logq" else p)[wrong][0].tolist()]
            given = f"given is a row {row}; the order is (logq, p)"
            raise ValueError(f"{name}: wanted are {wanted[name]}, {given}")


def _checked(kernel: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Adds the check of (logq, p), which waits for the device: training calls inspect.unwrap(loss)."""

    @functools.wraps(kernel)
    def loss(logq: torch.Tensor, p: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        check_distributions(logq, p)
        return kernel(logq, p, *args, **kwargs)

    return loss


def majority(p: torch.Tensor) -> torch.Tensor:
    """The majority label r of each row, one-hot (B, C). Labels that tie (to 1e-6) share it."""
    top = (p >= p.max(-1, keepdim=True).values - 1e-6).to(p.dtype)
    return top / top.sum(-1, keepdim=True)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _cross(logq: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """-sum_c p_c log q_c with 0 log 0 = 0, at least in float32."""
    return -torch.where(p > 0, _wide(p) * _wide(logq), 0.0).sum(-1)


@_checked
def kl_loss(logq: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """KL(p || q) = sum_c p_c (log p_c - log q_c) in nats; terms with p_c = 0 are 0.

    >>> kl_loss(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]))
    tensor([0.6931])
    """
    return _cross(logq, p) + torch.xlogy(_wide(p), _wide(p)).sum(-1)


@_checked
def ce_loss(logq: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """CE(r, q) = -sum_c r_c log q_c in nats, r the majority label of p.

    >>> ce_loss(torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.6, 0.4]]))
    tensor([1.3863])
    """
    return _cross(logq, majority(p))


@_checked
def rps_loss(logq: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Ranked probability score of ordered labels, less its least: sum_{k<C} (Q_k - P_k)^2, cumulative Q, P.

    From 0 to C - 1; columns from the lowest label to the highest. Being wrong by two labels costs more than
    by one, which KL does not know. Source: Epstein (1969); Gneiting and Raftery (2007).

    >>> rps_loss(torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[1.0, 0.0, 0.0]]))    # 0.5^2 + 0.25^2
    tensor([0.3125])
    """
    return ((_wide(logq).exp() - _wide(p)).cumsum(-1)[..., :-1] ** 2).sum(-1)


LOSSES: dict[str, Callable[..., torch.Tensor]] = {"kl": kl_loss}
"""What alpha weighs, by the name that Config.loss takes. Yours: a function (logq, p) -> (B,) and an entry."""


@_checked
def hybrid_loss(
    logq: torch.Tensor, p: torch.Tensor, alpha: float, worst: torch.Tensor | None = None, loss: str = "kl"
) -> torch.Tensor:
    """alpha KL(p' || q) + (1 - alpha) CE(r, q), p' = `worst` or else p; r is that of p. -> (B,), nats.

    alpha = 0 is single-point training, alpha = 1 drops the cross-entropy; a term of weight 0 is left out,
    also where it is infinite. loss: another entry of LOSSES in KL's place. Source: arXiv 2505.12301, sec. 3.
    """
    cross_entropy = _cross(logq, majority(p)) if alpha < 1 else 0.0
    if alpha == 0:
        return cross_entropy
    distance = inspect.unwrap(LOSSES[loss])(logq, p if worst is None else worst)
    if distance.shape != p.shape[:-1]:
        raise InputError(f"loss: '{loss}' gives a tensor {tuple(distance.shape)}, not one number an item")
    return alpha * distance + (1 - alpha) * cross_entropy


def shrink_votes(counts: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
    """(counts + prior) / (N + k), (B, C): the mean of a Dirichlet posterior; prior = k m, k = prior.sum(-1).

    One vote moves it 1 / (1 + k) of the way from m to that vote, a hundred 100 / (100 + k).

    >>> shrink_votes(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]]))
    tensor([[0.7500, 0.2500]])
    """
    total = _wide(counts + prior)  # a float16 sum ends at 65,504 votes
    return (total / total.sum(-1, keepdim=True)).to(prior.dtype)


# ----------------------------------------------------------------------------------------------------------
# 6. The adversary: the worst distribution near the human one
# ----------------------------------------------------------------------------------------------------------
def _working(x: torch.Tensor) -> torch.Tensor:
    """float64 where the device has it: projections then add no error of their own to float32 inputs."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def project_simplex(y: torch.Tensor) -> torch.Tensor:
    """The nearest point to y (in l2) with entries >= 0 that add up to 1: (..., C) -> (..., C).

    It is max(y - tau, 0); tau comes from one sort (Held, Wolfe and Crowder 1974; Duchi et al. 2008).
    """
    x = _working(y)
    x = x - x.max(-1, keepdim=True).values  # a shift changes nothing but the rounding
    u = x.sort(-1, descending=True).values
    excess = u.cumsum(-1) - 1
    rank = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
    size = (u * rank > excess).sum(-1, keepdim=True).clamp_min(1)  # 0 only for NaN, which stays NaN
    return (x - excess.gather(-1, size - 1) / size).clamp_min(0).to(y.dtype)


def project_ball(y: torch.Tensor, p: torch.Tensor, eps: float | torch.Tensor) -> torch.Tensor:
    """The nearest point to y in E(p) = {x in the simplex: ||x - p||_2 <= eps}; y and p (B, C) -> (B, C).

    eps is a number or (B,). Exact: by the KKT conditions the point is x(t) = project_simplex(p + t (y - p))
    for the largest t in [0, 1] that keeps it within eps of p. On the coordinates where x(t) > 0 the squared
    distance to p is a + V t^2, and coordinates that reach zero stay there as t grows, so as a function of t^2
    the squared distance is increasing, concave and piecewise linear in at most C pieces: Newton's method from
    below lands on the root in at most C steps. Raises ValueError for a negative eps.
    """
    x, p, radius = _working(y), _working(p), torch.as_tensor(eps, dtype=_working(p).dtype)
    if not bool((radius >= 0).all()):
        raise ValueError("eps must be 0 or more")
    radius = radius.to(p.device)[..., None] if radius.dim() else radius
    u = x - p
    u = u - u.mean(-1, keepdim=True)
    steepest = (u**2).sum(-1, keepdim=True).clamp_min(1e-30)
    t = (radius / steepest.sqrt()).clamp_max(1)  # no piece is steeper than ||u||^2
    for _ in range(y.shape[-1]):
        inside = project_simplex(p + t * u) > 0
        size = inside.sum(-1, keepdim=True)
        mean = (u * inside).sum(-1, keepdim=True) / size
        slope = (inside * (u - mean) ** 2).sum(-1, keepdim=True)
        fixed = (1 - (p * inside).sum(-1, keepdim=True)) ** 2 / size + (~inside * p**2).sum(-1, keepdim=True)
        root = ((radius**2 - fixed).clamp_min(0) / slope.clamp_min(1e-30)).sqrt().clamp_max(1)
        t = torch.where(slope > 1e-18 * steepest, torch.maximum(t, root), t)  # at a corner x no longer moves
    return project_simplex(p + t * u).to(y.dtype)


@_checked
def worst_case(
    logq: torch.Tensor, p: torch.Tensor, eps: float | torch.Tensor, steps: int = 5, step_size: float = 0.05
) -> torch.Tensor:
    """The paper's adversary: projected gradient ascent on KL(p' || q) over E(p), from p' = p. -> (B, C).

        p' <- project_ball(p' + step_size * (log(p' / q) + 1), p, eps)

    q is a constant: no gradient flows through the result. At a zero of p' the gradient is -inf; it is taken
    as log(1e-12 / q) + 1, so that a zero stays zero unless q is about 1e-12 or less there. A one-hot p
    therefore does not move. KL is convex in p', so no step lowers it; p is returned where rounding makes it
    worse. eps: a number or (B,). Raises ValueError for a negative eps.

    Up to 4,096 numbers go to the CPU and back: a card takes longer to start a thousand small kernels.
    """
    kl, place = inspect.unwrap(kl_loss), p.device if p.numel() > 4096 else "cpu"
    eps = eps.to(place) if torch.is_tensor(eps) else eps
    radius = torch.as_tensor(eps)
    if not bool((radius != 0).any()):
        return p.detach()
    logq_, p_ = (_working(x.detach()).to(place) for x in (logq, p))
    pull, x = 1 - logq_.clamp_min(-1e4), p_  # a label the model rules out (-inf) pulls hard, but not to NaN
    for _ in range(steps):
        x = project_ball(x + step_size * (x.clamp_min(1e-12).log() + pull), p_, eps)
    gained = (kl(logq_, x) >= kl(logq_, p_)) & (radius > 0)
    return torch.where(gained[..., None], x, p_).to(p)


# ----------------------------------------------------------------------------------------------------------
# 7. Training
# ----------------------------------------------------------------------------------------------------------
# The method's settings by name. On a recipe's command line, flags beside --preset win.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"alpha": 0.8, "eps": 0.25, "steps": 5, "teacher": 0.0, "answer": 0.0},
    "single": {"alpha": 0.0, "eps": 0.0, "teacher": 0.0},
    "kl": {"alpha": 1.0, "eps": 0.0, "teacher": 0.0},
    "teacher": {"alpha": 1.0, "eps": 0.0, "teacher": 5.0, "schedule": "constant"},
}


@dataclasses.dataclass
class Config:
    """Settings of a run. The defaults of the method are the paper's, and the answer term beside it."""

    train: tuple[str, ...] = ()
    """Training items: one or more .jsonl or .jsonl.gz files."""
    test: tuple[str, ...] = ()
    """Test items. Without any, the training file's "split" field decides, or else an 8:2 split by group."""
    labels: tuple[str, ...] = ()
    """Label order, each by itself (1 2 3). Default: by number, or as in the first item that has the commonest
    set of labels."""
    spellings: tuple[str, ...] = ()
    """More spellings of a label, as LABEL=TEXT,TEXT (no=no,nope); their probabilities add up."""
    overlong: Literal["error", "drop"] = "error"
    """What to do with prompts over max_length: stop and count them, or drop the items and say how many."""

    model: str = "Qwen/Qwen2.5-0.5B-Instruct"
    """Model folder or hub id."""
    four_bit: bool = False
    """Load the weights in 4 bits (NF4)."""
    bf16: bool = True
    """On a CPU that multiplies bfloat16 faster (AMX, AVX512-BF16): hold what adapters are put on in it, and
    compute products with it so. The rest is float32."""
    lora_rank: int = 16
    """Rank of the LoRA adapters, whose scale is 2; 0 trains all weights."""
    max_length: int = 2048
    """Longest prompt in tokens, chat template included."""
    backend: Literal["auto", "unsloth", "transformers"] = "auto"
    """What loads and runs the model; "auto" is Unsloth on CUDA where it works, and transformers elsewhere."""

    alpha: float = 0.8
    """Weight of KL to the human distribution; the rest is cross-entropy with the majority label."""
    eps: float = 0.25
    """Radius of the l2 ball in which the adversary moves the human distribution; 0 is no adversary."""
    teacher: float = 0.0
    """How many votes a teacher's prediction counts as beside an item's own; 5 in the preset, 0 is none. The
    teacher is a running mean of the weights, and gives the answers in the end. Up to half more computing."""
    answer: float = 1.0
    """Weight of -log m, where m is the probability that the model answers with a label at all; the paper's
    loss has 0. With less a served judge may say something else."""
    loss: str = "kl"
    """What alpha weighs: an entry of LOSSES."""
    steps: int = 5
    """Steps of the adversary, each of size 0.05."""

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
    """What the learning rate does after its warm-up, 3% of all steps; "constant" has no warm-up."""
    weight_decay: float = 0.0
    """Weight decay of AdamW, on matrices only: norms and biases have none."""
    seed: int = 0
    """Seed of LoRA weights, data order and split."""

    out: str = "runs/last"
    """The run folder; what is in it is overwritten."""
    resume: bool = False
    """Go on from the newest whole checkpoint of a run that was stopped, with the same data and settings."""
    save_every: float = 0.1
    """Write a checkpoint every so many steps (below 1: a share of all), keep the newest two; 0 is never."""
    eval_every: float = 0.0
    """Evaluate on the test items every so many steps (below 1: a share of all); 0 is at the end only."""
    report_to: tuple[str, ...] = ()
    """Loggers that accelerate knows: tensorboard, wandb, trackio, ..."""

    def __post_init__(self) -> None:
        self.model, self.out = os.fspath(self.model), os.fspath(self.out)
        for name in ("train", "test"):
            if not isinstance(paths := getattr(self, name), str):  # which check() refuses
                setattr(self, name, tuple(map(os.fspath, paths)))

    def check(self) -> None:
        """Raises InputError naming the field for a value outside its range."""
        ranges = {"alpha": (0, 1, "between 0 and 1"), "epochs": (1e-9, math.inf, "more than 0")}
        ranges |= dict.fromkeys(("batch_size", "max_length"), (1, math.inf, "1 or more"))
        ranges["seed"] = 0, 2**32 - 1, "between 0 and 4294967295"
        hints = typing.get_type_hints(Config)
        for name in Config.__dataclass_fields__:
            value, (low, high, words) = getattr(self, name), ranges.get(name, (0, math.inf, "0 or more"))
            if isinstance(value, (int, float)) and not (low <= value <= high and value < math.inf):
                raise InputError(f"{name}: must be {words}, not {value}")
            if hints[name] is int and value % 1:
                raise InputError(f"{name}: must be a whole number, not {value}")
            if isinstance(value, str) and isinstance(Config.__dataclass_fields__[name].default, tuple):
                raise InputError(f"{name}: must be a tuple, ({value!r},)")
        if not self.out.strip() or not is_text(self.out):
            raise InputError("out: name a folder, in UTF-8")
        choices = {name: typing.get_args(hints[name]) for name in ("schedule", "overlong")} | {"loss": LOSSES}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}: must be one of {', '.join(allowed)}, not {getattr(self, name)}")


def autocast_type(judge: Judge) -> torch.dtype | None:
    """The 16-bit type that training computes in; None: in float32, as the weights are."""
    if getattr(judge.model, "_unsloth_forced_float32", False):  # Gemma 3 without bfloat16: as Unsloth does
        return None
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
    matrices, vectors = ([w for w in weights if (w.dim() > 1) == large] for large in (True, False))
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors}]
    adam = torch.optim.AdamW
    if optimizer_is_8bit(judge):
        from bitsandbytes.optim import AdamW8bit as adam
    return adam(groups, lr=config.learning_rate, weight_decay=0.0)


def epoch_order(encoded: Sequence[Sequence[int]], config: Config, epoch: int) -> list[int]:
    """The order of the prompts in an epoch: see shuffled()."""
    return shuffled(encoded, config.seed * 1_000_003 + epoch, chunk=config.batch_size)


class Teacher:
    """A running mean of the trained weights, float32, over the last tenth of all steps so far.

    mean += rate * (new - mean), rate = 10 / (10 + n) with n the steps in it, weighs step t by about t^9.
    Sources: Tarvainen and Valpola 2017; weights that are a power of t, Karras et al. 2024.
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
        held = [w.detach().clone() for w in self.weights]
        self.put(self.means)
        self.judge.model.eval()
        try:
            yield
        finally:
            self.put(held)


def train(
    judge: Judge, items: Sequence[Item], config: Config, eval_items: Sequence[Item] = (), on_step: Any = None
) -> list[dict[str, float]]:
    """Trains the judge in place with the method's objective; returns the log, a dict a step, losses in nats.

    The loss of a step is the mean over its batch_size items, whatever the passes and processes (torchrun)
    they are divided into. on_step: called with each step's number after it. Raises InputError if the items'
    labels are not the judge's, a prompt is too long, or config.resume finds another run's checkpoints or
    damaged ones only; FloatingPointError when the loss or the weights are no longer finite; OSError when a
    checkpoint cannot be written; Stopped after SIGINT or SIGTERM.
    """
    from accelerate.utils import set_seed
    from transformers import get_scheduler

    config.check()
    check_out(config.out, *RUN_FILES)
    for some in filter(None, (items, eval_items)):
        _check_labels(judge, some)
        check_voted(some)
    encoded, votes, ids = training_rows(judge, items)
    per_epoch = math.ceil(len(encoded) / config.batch_size)
    last = math.ceil(per_epoch * config.epochs - 1e-9)
    save_every = whole_steps(config.save_every, last) or last + 1
    eval_every = whole_steps(config.eval_every, last) or last + 1
    set_seed(config.seed)
    accelerator = _accelerator(judge, config)
    rank, processes = accelerator.process_index, accelerator.num_processes
    half = autocast_type(judge)
    autocast = functools.partial(torch.autocast, judge.device.type, half, enabled=half is not None)
    scaler = torch.amp.GradScaler(judge.device.type, enabled=half == torch.float16)
    scaler.scale(torch.zeros((), device=judge.device))  # of several processes one may have no item in a step
    optimizer = make_optimizer(judge, config)
    warm_up = min(whole_steps(0.03, last), last - 1)  # it begins at 0, which must not be all there is
    schedule = get_scheduler(config.schedule, optimizer, warm_up, last)
    teacher = Teacher(judge) if config.teacher else None
    parts = {"optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    parts |= {"teacher": teacher} if teacher else {}
    made_from = _made_from(judge, items, eval_items, config) | {"processes": processes}
    progress = Progress(judge, config, accelerator, parts, made_from, last)
    order: list[int] = []
    adversary, hybrid = inspect.unwrap(worst_case), inspect.unwrap(hybrid_loss)  # without their checks

    def backward(rows: list[int], said: torch.Tensor | None, weight: float) -> torch.Tensor:
        """Adds the gradient of `weight` times the sum of these items' losses, and returns that sum."""
        total = torch.zeros((), device=judge.device)
        for members in judge.plan([encoded[i] for i in rows]):
            chosen = [rows[k] for k in members]
            batch, n = judge.batch([encoded[i] for i in chosen]), votes[chosen].to(judge.device)
            progress.last_pass = members, batch["input_ids"].numel()
            people = n.sum(1, keepdim=True)
            p = n / people
            with autocast():
                logq, log_mass = label_logprobs(judge.model, batch, judge.tokens, with_mass=config.answer > 0)
            progress.check_finite(logq, [ids[i] for i in chosen])
            target = adversary(logq, p, config.eps, config.steps)
            if said is not None:  # the votes are moved first, and the teacher's are added to them
                target = shrink_votes(people * target, config.teacher * said[members].to(n))
            losses = hybrid(logq, p, config.alpha, target, config.loss)
            if log_mass is not None:
                losses = losses - config.answer * log_mass
            loss = weight * losses.sum()
            scaler.scale(loss).backward()
            total += loss.detach()
        return total

    Path(config.out).mkdir(parents=True, exist_ok=True)
    with locked(config.out) if progress.writes else contextlib.nullcontext(), progress.running():
        judge.calibration = None  # it is that of other weights
        while progress.done < last:
            epoch, k = divmod(progress.done, per_epoch)
            if k == 0 or not order:
                order = epoch_order(encoded, config, epoch)
            step_items = order[k * config.batch_size : (k + 1) * config.batch_size]
            mine = step_items[rank * len(step_items) // processes : (rank + 1) * len(step_items) // processes]
            said, loss = None, None
            if teacher and teacher.number:
                with teacher.in_place(), autocast():
                    said = judge.judge_encoded([encoded[i] for i in mine], with_mass=False)[0].exp()
                progress.check_finite(said, [ids[i] for i in mine])
            judge.model.train()
            while loss is None:
                optimizer.zero_grad()
                with contextlib.suppress(torch.OutOfMemoryError):
                    loss = backward(mine, said, 1 / len(step_items))
                if loss is None:  # the whole step starts again, in smaller passes
                    judge.shrink(*progress.last_pass)
            loss, asked_to_stop = progress.exchange(loss)
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(progress.weights.values(), 1.0).item()
            scale, rate = scaler.get_scale(), schedule.get_last_lr()[0]
            scaler.step(optimizer)
            scaler.update()
            if scaler.get_scale() >= scale:  # else float16 could not hold the gradients: no step
                schedule.step()
            if teacher:
                teacher.update()
            progress.done += 1
            row = {"epoch": progress.done / per_epoch, "loss": loss, "learning_rate": rate, "grad_norm": norm}
            if eval_items and progress.done % eval_every == 0:
                with teacher.in_place() if teacher else contextlib.nullcontext():
                    q, mass, orders = judge_items(judge, eval_items)
                found = evaluate(q, eval_items, train_items=items, label_mass=mass, draws=0) | orders
                row |= {f"eval_{name}": value for name, value in found.items() if value is not None}
            progress.log(row)
            if on_step:
                on_step(progress.done)
            stopping = asked_to_stop and progress.done < last
            if stopping or progress.done % save_every == 0 or progress.done == last:
                progress.save([ids[i] for i in step_items])
            if stopping:
                raise progress.stopped()
        if teacher:
            teacher.put(teacher.means)
    return progress.rows


def whole_steps(value: float, last: int) -> int:
    """A setting that is a share of all steps if below 1, else a number of steps."""
    return math.ceil(last * value - 1e-9) if value < 1 else int(value)


def training_rows(judge: Judge, items: Sequence[Item]) -> tuple[list[list[int]], torch.Tensor, list[str]]:
    """Token ids, votes (M, C) and ids of what is trained on; a pair's other order is an item of its own."""
    votes, pairs = counts_of(items).float(), [i for i, item in enumerate(items) if item.swap]
    encoded = judge.encode([item.prompt for item in items] + [items[i].swap.prompt for i in pairs])
    if pairs:
        turned = torch.tensor([items[i].swap.labels for i in pairs])
        votes = torch.cat([votes, votes[pairs].gather(1, turned)])
    return encoded, votes, [item.id for item in items] + [items[i].id for i in pairs]


def _accelerator(judge: Judge, config: Config) -> Any:
    """accelerate's processes and loggers. Raises InputError for a logger that is not there."""
    from accelerate import Accelerator

    on_cpu, loggers = judge.device.type == "cpu" and "WORLD_SIZE" in os.environ, list(config.report_to)
    try:
        accelerator = Accelerator(cpu=on_cpu, log_with=loggers or None, project_dir=config.out)
        if lost := sorted({*loggers} - set(map(str, accelerator.log_with))):
            raise ValueError(f"{lost[0]} is not installed")
        accelerator.init_trackers("distjudge", {k: str(v) for k, v in dataclasses.asdict(config).items()})
    except (ValueError, ImportError) as error:
        raise InputError(f"report_to: {first_line(error)}") from error
    return accelerator


class Progress:
    """What training keeps beside its loop: log, checkpoints, signals, and what is put back at its end."""

    def __init__(self, judge: Judge, config: Config, accelerator: Any, parts: dict, made: dict, last: int):
        self.judge, self.config, self.accelerator, self.last = judge, config, accelerator, last
        self.parts, self.made_from = parts, made
        self.folder, self.log_file = Path(config.out) / "checkpoints", Path(config.out) / "log.jsonl"
        self.weights = {name: w for name, w in judge.model.named_parameters() if w.requires_grad}
        self.writes, self.done, self.rows = accelerator.is_main_process, 0, []
        self.signals, self.handlers = [], {}
        self.last_pass: tuple[Sequence[int], int] = [], 0  # members and tokens, for when memory runs out

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Takes up a checkpoint where asked, and puts back at the end what training changes."""
        from tqdm.auto import tqdm

        judge, config = self.judge, self.config
        with contextlib.ExitStack() as after:
            after.callback(judge.model.eval)
            after.callback(setattr, judge, "pack_tokens", judge.pack_tokens)
            for tracker in self.accelerator.trackers:
                after.callback(tracker.finish)
            state = newest_checkpoint(self.folder, self.made_from) if config.resume else None
            judge.pack_tokens = config.pack_tokens or judge.pack_tokens
            if state:
                self._take_up(state)
            if self.writes:
                write_lines(self.log_file, map(json.dumps, self.rows))
                for path in [] if config.resume else self.folder.glob("step-*"):
                    path.unlink()
            if config.gradient_checkpointing and judge.backend != "unsloth":  # its layers have their own way
                after.callback(judge.model.gradient_checkpointing_disable)
                judge.model.gradient_checkpointing_enable({"use_reentrant": False})
            if threading.current_thread() is threading.main_thread():
                for number in (signal.SIGINT, signal.SIGTERM):
                    self.handlers[number] = signal.signal(number, self._note)
                    after.callback(signal.signal, number, self.handlers[number])
            shown = {"total": self.last, "unit": "step", "desc": "training", "disable": not self.writes}
            self.bar = after.enter_context(tqdm(initial=self.done, **shown))
            yield

    def _note(self, number: int, frame: Any) -> None:
        self.signals.append(number)
        signal.signal(number, self.handlers[number])  # a second one stops at once

    def stopped(self) -> Stopped:
        saved = f"a checkpoint is saved, --resume goes on from it ({self.config.out})"
        saved = saved if self.config.save_every else "no checkpoint: save_every is 0"
        number = (self.signals or [signal.SIGTERM])[0]  # none: another process was asked to stop
        name = signal.Signals(number).name
        return Stopped(f"stopped by {name} after step {self.done} of {self.last}; {saved}", number)

    def exchange(self, loss: torch.Tensor) -> tuple[float, bool]:
        """Adds up all processes' gradients; -> the loss of the whole step, and whether one is to stop."""
        both = torch.stack([loss, torch.full_like(loss, len(self.signals))])
        if self.accelerator.num_processes > 1:
            weights = list(self.weights.values())
            parts = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
            whole = self.accelerator.reduce(torch.cat([part.flatten() for part in parts]), "sum")
            for weight, part in zip(weights, whole.split([w.numel() for w in weights]), strict=True):
                weight.grad = part.view_as(weight).to(weight.dtype)
            both = self.accelerator.reduce(both, "sum")
        return both[0].item(), both[1].item() > 0

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append({"step": self.done} | row)
        self.bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
        self.bar.update()
        if self.writes:
            with open(self.log_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")
        self.accelerator.log(row, step=self.done)

    def check_finite(self, logq: torch.Tensor, ids: Sequence[str]) -> None:
        bad = (~torch.isfinite(logq)).any(1)
        if bool(bad.any()):
            wrong = f"the loss is not finite at step {self.done + 1}, for"
            raise self._diverged(wrong, itertools.compress(ids, bad.tolist()))

    def _diverged(self, what: str, ids: Iterable[str]) -> FloatingPointError:
        """The error, with the newest checkpoint whose weights a later step has used, to a finite loss."""
        names = list(dict.fromkeys(map(short, ids)))
        items = f"item{'s' * (len(names) > 1)} {', '.join(names[:8])}{', ...' * (len(names) > 8)}"
        good = [path for path in checkpoints_in(self.folder) if step_of(path) < self.done]
        return FloatingPointError(f"{what} {items}; last good checkpoint: {good[0] if good else 'none'}")

    def save(self, ids: Sequence[str]) -> None:
        """Writes a checkpoint, keeps the newest two. FloatingPointError for weights that are not finite."""
        if not all(bool(torch.isfinite(w).all()) for w in self.weights.values()):
            raise self._diverged(f"the weights are not finite after step {self.done}, of", ids)
        if not self.writes or not self.config.save_every:
            return
        device = self.judge.device
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state["weights"] = {name: w.detach() for name, w in self.weights.items()}
        state |= {"made_from": self.made_from, "random": [random.getstate(), torch.get_rng_state(), cuda]}
        state |= {"step": self.done, "rows": self.rows, "pack_tokens": self.judge.pack_tokens}
        save_checkpoint(self.folder, self.done, state)
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
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, self.judge.device)
        self.done, self.rows, self.judge.pack_tokens = state["step"], state["rows"], state["pack_tokens"]


# A checkpoint is one file of tensors, numbers and text, named by its step and its SHA-256. It is read with
# torch.load(weights_only=True), which runs no code.
def checkpoints_in(folder: Path) -> list[Path]:
    """Finished checkpoints, the newest first."""
    named = [path for path in folder.glob("*") if re.fullmatch(r"step-\d{9}-\w{64}\.pt", path.name)]
    return sorted(named, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name[5:14])


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Writes under a temporary name, waits for the disk, and renames. Raises OSError, leaving nothing."""
    part = folder / f"step-{step:09d}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(part, "w+b") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            name = f"step-{step:09d}-{hash_file(file)}.pt"
        os.replace(part, folder / name)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        why = f"{first_line(error)}; earlier ones are whole"
        raise OSError(f"{folder / part.stem}: the checkpoint cannot be written: {why}") from None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, on the CPU. Raises InputError for a file that is cut, changed or planted."""
    try:
        with open(path, "rb") as file:
            if hash_file(file) != path.stem[15:]:
                raise ValueError("is damaged: its checksum is another")
            file.seek(0)
            if "made_from" not in (state := torch.load(file, map_location="cpu", weights_only=True)):
                raise ValueError("it is not of this kit")
            return state
    except Exception as error:  # what torch.load refuses can have any name
        raise InputError(f"{path}: is no whole checkpoint: {first_line(error)}") from None


def newest_checkpoint(folder: Path, made_from: dict[str, Any]) -> dict[str, Any] | None:
    """The newest whole checkpoint, None without any. InputError if none is whole, or it is another run's."""
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


def _made_from(judge: Judge, items: Sequence[Item], tested: Sequence[Item], config: Config) -> dict[str, Any]:
    """What a run depends on, by name: resuming with anything else is refused."""
    free = "train test labels model out resume report_to save_every eval_every".split()  # or named below
    named = {f.name: getattr(config, f.name) for f in dataclasses.fields(Config) if f.name not in free}
    named |= {"labels": judge.labels, "label tokens": judge.tokens.sequences, "base model": judge.base}
    named |= {"prompt template": judge.encoder.frame, "device": judge.device.type, "versions": versions()}
    named |= {"base weights": getattr(judge.model, "fingerprint", None)}
    weights = [(name, *w.shape, str(w.dtype), w.requires_grad) for name, w in judge.model.named_parameters()]
    named["kinds of weights"] = digest_of(weights)  # a judge need not be made with the settings of `config`
    for name, some in (("training items", items), ("test items", tested)):
        named[name] = digest_of([dataclasses.astuple(dataclasses.replace(item, where="")) for item in some])
    return json.loads(json.dumps(named))


# ----------------------------------------------------------------------------------------------------------
# 8. Metrics
# ----------------------------------------------------------------------------------------------------------
def _moments(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(N, 5): what a correlation of a and b needs of each item. Centred first, for rounding's sake."""
    a, b = a - a.mean(), b - b.mean()
    return torch.stack([a, b, a * a, b * b, a * b], -1)


def correlation(mean: torch.Tensor) -> torch.Tensor:
    """Pearson's correlation from mean moments, (..., 5) -> (...); NaN where one side is constant."""
    a, b, aa, bb, ab = mean.unbind(-1)
    spread = ((aa - a * a).clamp_min(0) * (bb - b * b).clamp_min(0)).sqrt()
    return torch.where(spread > 1e-14, (ab - a * b) / spread, math.nan)


def kl_divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats a row, q raised to 1e-6 first: a label ruled out costs at most 13.8 nats a vote."""
    return inspect.unwrap(kl_loss)(q.clamp_min(1e-6).log(), p)


def noise_floor(items: Sequence[Item]) -> float | None:
    """The mean KL(votes || truth) of these items, nats: what the truth itself would score on these votes.

    Exact where every item's `truth` is known. Else the mean entropy of the unknown truths less that of the
    votes. The former is estimated: for each label a mixture of 30 Beta distributions is fitted to its counts,
    and each item has its posterior mean of -p log p (empirical Bayes, Robbins 1956). None where no item has
    two votes: then nothing tells disagreement from noise. On simulated panels of up to five labels it was off
    by up to 0.15 nats with two votes an item, 0.06 with three, 0.025 with five, 0.01 with twenty; of ten
    labels by about twice that.
    """
    counts, p, truth = counts_of(items), shares_of(items), truths_of(items)
    if truth is not None:
        return kl_divergence(p, truth).mean().item()
    votes = counts.sum(1)
    if not (votes > 1.5).any():
        return None
    place = torch.linspace(0, math.pi / 2, 61, dtype=torch.float64)[1::2].sin() ** 2
    prior, floor = 100 * torch.stack([place, 1 - place]), -entropy(p).mean()  # as strong as 100 votes
    log_beta = lambda a: torch.lgamma(a).sum(-2) - torch.lgamma(a.sum(-2))  # noqa: E731
    for own in counts.T:
        pairs, times = torch.stack([own, votes - own], 1).unique(dim=0, return_counts=True)
        after = pairs[..., None] + prior  # (U, 2, 30)
        fit, share = (log_beta(after) - log_beta(prior)).softmax(1), times.double() / times.sum()
        weights = torch.ones(30, dtype=torch.float64)
        for _ in range(300):  # expectation maximization
            posterior = fit * weights
            posterior = posterior / posterior.sum(1, keepdim=True)
            weights = share @ posterior
        mine, whole = after[:, 0], after.sum(1)
        cost = mine / whole * (torch.digamma(whole + 1) - torch.digamma(mine + 1))  # E[-p log p] of a Beta
        floor = floor + share @ (posterior * cost).sum(1)
    return max(0.0, floor.item())


def _predictions(q: Any, p: torch.Tensor) -> torch.Tensor:
    """q as a float64 tensor (N, C) of distributions, checked: it has p's shape, and rows add up to 1."""
    q = torch.as_tensor(q, dtype=torch.float64).detach().cpu()
    if q.shape != p.shape:
        raise InputError(f"predicted: shape {tuple(q.shape)}, expected {tuple(p.shape)}: items, labels")
    off = (q < 0).any(1) | ~((q.sum(1) - 1).abs() <= 1e-3)  # NaN too
    if off.any():
        raise InputError(f"predicted: row {int(off.nonzero()[0])} is no distribution: {q[off][0].tolist()}")
    return q / q.sum(1, keepdim=True)


def item_scores(q: Any, items: Sequence[Item], ordered: bool | None = None) -> dict[str, torch.Tensor]:
    """What evaluate() averages, an item at a time: (N,) float64; for correlations (N, 5), see correlation().

    Raises InputError for a wrong shape, or a row that is no distribution to 1e-3.
    """
    labels, p, truth = labels_of(items), shares_of(items), truths_of(items)
    q = _predictions(q, p)
    out = {"kl": kl_divergence(p, q)}
    if truth is not None:
        out["kl_truth"] = kl_divergence(truth, q)
    out["accuracy"] = (majority(p) * majority(q)).sum(1)
    out["js_divergence"] = entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2
    out["total_variation"] = (p - q).abs().sum(1) / 2
    out["brier"] = 1 - 2 * (p * q).sum(1) + (q**2).sum(1)
    out["entropy_correlation"] = _moments(entropy(p), entropy(q))
    numeric = are_numeric(labels)
    if numeric if ordered is None else ordered:
        scale = [float(value) for value in (labels if numeric else range(len(labels)))]
        values, along = torch.tensor(scale, dtype=torch.float64).sort()  # columns may have another order
        p, q = p[:, along], q[:, along]
        below_p, below_q = p.cumsum(1)[:, :-1], q.cumsum(1)[:, :-1]
        out["emd"] = (below_p - below_q).abs() @ values.diff().abs()
        out["rps"] = ((below_q - below_p) ** 2 + below_p * (1 - below_p)).sum(1)
        out["mean_correlation"] = _moments(p @ values, q @ values)
    return out


BOUNDS = dict.fromkeys(("accuracy", "total_variation", "label_mass"), (0.0, 1.0))
BOUNDS |= dict.fromkeys(("mean_correlation", "entropy_correlation"), (-1.0, 1.0))


def within(metric: str, end: float) -> float:
    """An end of an interval, cut to what the metric can be: few items' can reach further."""
    least, most = BOUNDS.get(metric, (0.0, math.inf))
    return min(max(end, least), most)  # NaN stays NaN


def entropy(q: Any) -> torch.Tensor:
    """-sum_c q_c log q_c in nats, (N, C) -> (N,), float64: from 0 for a sure judge to log C for no idea."""
    q = torch.as_tensor(q).double()
    return -torch.xlogy(q, q).sum(-1)


def group_numbers(groups: Sequence[Any]) -> torch.Tensor:
    """The number of each one's group, from 0 (N,); those with None are groups of their own."""
    place: dict[Any, int] = {}
    names = [i if group is None else ("group", group) for i, group in enumerate(groups)]
    return torch.tensor([place.setdefault(name, len(place)) for name in names])


@torch.enable_grad()
def bootstrap(
    scores: torch.Tensor, other: torch.Tensor | None = None, groups: Sequence | None = None, draws: int = 2000
) -> dict[str, float | None]:
    """A mean over items with its 95 % interval; with `other`, the difference of two methods, scores - other.

    scores, other: (S, N), S training runs on the same N items, one metric of item_scores(); for correlations
    (S, N, 5), for a ratio of two means (S, N, 2). groups: N names; a group's items are drawn together, those
    with None alone. -> mean, low, high and p, two-sided, for a true value of zero; None with fewer than two
    groups. p < 0.05 exactly where the interval leaves out 0. ValueError for other shapes.

    The bootstrap-t: groups are drawn with replacement, the same for both methods, and a draw's distance from
    the mean is divided by its own standard error (infinitesimal jackknife, at least a fifth of the sample's).
    To it comes Student's t, S - 1 degrees of freedom, times the standard error over runs (paired by seed): so
    the interval speaks of new items and, with two runs or more, of new seeds. Groups all alike have no width.
    Coverage with few groups: plots/results/README.md. Source: Efron and Tibshirani (1993), chapter 12.
    """
    methods = [scores] if other is None else [scores, other]
    shapes = [list(method.shape) for method in methods]
    if scores.dim() < 2 or scores.shape[2:] not in ((), (2,), (5,)) or shapes[0] != shapes[-1]:
        raise ValueError(f"scores: (S, N), (S, N, 2) or (S, N, 5), two methods alike, not {shapes}")
    at = group_numbers([None] * scores.shape[1] if groups is None else groups)
    weight = at.bincount().double()
    runs, size = len(scores), len(weight)
    by_item = [torch.atleast_3d(method.double()).movedim(1, 0) for method in methods]  # (N, S, 1, 2 or 5)
    sums = [torch.zeros(size, *s.shape[1:], dtype=torch.float64).index_add(0, at, s) for s in by_item]
    statistic = {1: lambda m: m[..., 0], 2: lambda m: m[..., 0] / m[..., 1], 5: correlation}[sums[0].shape[2]]

    def value(times: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """How often each group was drawn, (draws, G) -> (draws, S); their mean; its standard error."""
        times.requires_grad_()
        part = times / (times @ weight)[:, None]
        found = [statistic(torch.einsum("dg,gsk->dsk", part, s)) for s in sums]
        by_run = found[0] if other is None else found[0] - found[1]
        (slope,) = torch.autograd.grad(by_run.mean(1).sum(), times)
        return by_run.detach(), by_run.mean(1).detach(), (times * slope**2).sum(1).sqrt().detach()

    by_run, middle, error = value(torch.ones(1, size, dtype=torch.float64))
    mean = middle.item()
    if size < 2 or not draws or not math.isfinite(mean):
        return {"mean": mean if math.isfinite(mean) else None, "low": None, "high": None, "p": None}
    draw, drawn, step = torch.Generator().manual_seed(0), [], max(1, min(100, 5_000_000 // size))
    for start in range(0, draws, step):
        chosen = torch.randint(size, (min(step, draws - start), size), generator=draw)
        ones = torch.ones(chosen.shape, dtype=torch.float64)
        drawn.append(torch.stack(value(torch.zeros_like(ones).scatter_add_(1, chosen, ones))[1:]))
    middles, errors = torch.cat(drawn, 1)
    away = torch.where(middles.isfinite(), middles - mean, 0) * error
    found = mean - away / torch.maximum(errors.nan_to_num(0, 0), error / 5).clamp_min(1e-300)
    if runs > 1:
        normal = torch.randn(runs, draws, generator=draw, dtype=torch.float64)
        found = found + by_run.std() / math.sqrt(runs) * normal[0] / (normal[1:] ** 2).mean(0).sqrt()
    found, cut = found.sort().values.tolist(), max(0, math.ceil(0.025 * (draws + 1)) - 2)
    p = 2 * (1 + min(sum(x <= 0 for x in found), sum(x >= 0 for x in found))) / (draws + 1)
    return {"mean": mean, "low": found[cut], "high": found[-1 - cut], "p": min(1.0, p)}


def squared_distance(q: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """||q - p||^2 (..., N) and 1 - sum p^2 (N,) of the true p, without bias from votes counts (N, C) of it.

    q: (..., N, C). NaN where an item has less than two votes, or parts. Source: Simpson (1949) for sum p^2.
    """
    votes = counts.sum(1, keepdim=True)
    p, told = counts / votes, (votes[:, 0] >= 2) & (counts == counts.round()).all(1)
    pairs = (p * (counts - 1)).sum(1) / (votes[:, 0] - 1)  # estimates sum p^2
    pairs = pairs.where(told, math.nan)
    return (q**2 - 2 * q * p).sum(-1) + pairs, 1 - pairs


def survey_equivalence(predicted: Any, items: Sequence[Item], draws: int = 2000) -> dict[str, float | None]:
    """How many people a judge is worth: mean, low, high (95 %). predicted: (N, C), or (S, N, C) of S runs.

    The vote shares of n people are (1 - sum p^2) / n from the true distribution p, in expected squared
    distance. So judge q is worth mean(1 - sum p^2) / mean ||q - p||^2 people. Counts c of N votes estimate
    sum p^2 without bias by sum c (c - 1) / (N (N - 1)), where N is two or more and votes are whole; other
    items are left out. None where none is left, or nobody disagrees. The interval is bootstrap()'s for the
    inverse, 1 / n; where that is 0 or less, votes cannot tell the judge from the truth, and n is math.inf.
    Source: Resnick et al., "Survey equivalence" (2021): as many people as have the same expected score.
    """
    counts, p, q = counts_of(items), shares_of(items), torch.as_tensor(predicted, dtype=torch.float64)
    runs = torch.stack([_predictions(one, p) for one in (q if q.dim() == 3 else q[None])])
    distance, apart = squared_distance(runs, counts)
    both, kept = torch.stack([distance, apart.expand_as(distance)], 2), apart.isfinite()
    groups = [item.group for item, keep in zip(items, kept.tolist(), strict=True) if keep]
    if not groups:
        return {"mean": None, "low": None, "high": None}
    found = bootstrap(both[:, kept], groups=groups, draws=draws)
    ends = zip(("mean", "low", "high"), (found["mean"], found["high"], found["low"]), strict=True)
    return {name: x if x is None else 1 / x if x > 0 else math.inf for name, x in ends}


def evaluate(
    predicted: Any,
    items: Sequence[Item],
    *,
    train_items: Sequence[Item] | None = None,
    label_mass: Any = None,
    ordered: bool | None = None,
    draws: int = 2000,
) -> dict[str, float | None]:
    """Compares predicted distributions (N, C), columns in label order, with the votes. None: undefined.

    Means over items (p: votes as shares, q: predicted), InputError as in item_scores():
      people, people_low, people_high   survey_equivalence(), the interval with draws > 0; infinity is None
      people_marginal     what the mean of train_items' votes is worth, see kl_marginal
      kl                  KL(p || q) in nats, q raised to 1e-6
      kl_noise_floor      what the true distributions would score (see noise_floor), with draws > 0
      kl_corrected        kl - kl_noise_floor, an estimate of KL(truth || q)
      kl_marginal         what the mean of train_items' votes would score (without them: of these items')
      kl_truth            KL(truth || q), where every item's truth is known
      accuracy            top label = majority label; k labels that tie, on either side, count 1/k each
      js_divergence       Jensen-Shannon divergence in nats (0 .. log 2; SciPy's jensenshannon is its root)
      total_variation     sum |p - q| / 2
      brier               mean over single votes of sum_c (q_c - [vote = c])^2
      entropy_correlation Pearson, entropies of p and q over items
      label_mass, label_mass_min   full-vocabulary probability of the labels together, mean and minimum
    and for ordered labels (by default: if all are numbers; distances then follow their values, else 1 a step)
      emd                 earth mover's (Wasserstein-1) distance
      rps                 ranked probability score, over single votes, of sum_k (Q_k - [vote <= k])^2, k < C
      mean_correlation    Pearson, mean ratings over items
    """
    if train_items and labels_of(train_items) != (labels := labels_of(items)):
        raise InputError(f"train_items: labels {listed(labels_of(train_items))} are not {listed(labels)}")
    check_voted([*items, *(train_items or ())])
    scores, p = item_scores(predicted, items, ordered), shares_of(items)
    mean = lambda s: (correlation(s.mean(0)) if s.dim() == 2 else s.mean()).item()  # noqa: E731
    means = {name: mean(s) for name, s in scores.items()}
    floor = noise_floor(items) if draws else None
    marginal = shares_of(train_items or items).mean(0).expand_as(p)
    worth = survey_equivalence(predicted, items, draws)
    out = {"items": len(items), "people": worth["mean"]}
    out |= {"people_low": worth["low"], "people_high": worth["high"]}
    out["people_marginal"] = survey_equivalence(marginal, items, 0)["mean"]
    out = {name: None if n == math.inf else n for name, n in out.items()}
    out |= {"kl": means["kl"], "kl_noise_floor": floor}
    out["kl_corrected"] = None if floor is None else means["kl"] - floor
    out |= {"kl_marginal": kl_divergence(p, marginal).mean().item(), "kl_truth": None}
    if label_mass is not None:
        mass = torch.as_tensor(label_mass, dtype=torch.float64)
        out |= {"label_mass": mass.mean().item(), "label_mass_min": mass.min().item()}
    return out | {name: None if math.isnan(value) else value for name, value in means.items()}


# ----------------------------------------------------------------------------------------------------------
# 9. A run: from files to a folder that holds everything
# ----------------------------------------------------------------------------------------------------------
def write_json(path: Path, content: Any) -> None:
    write_lines(path, [json.dumps(content, indent=1, ensure_ascii=False)])


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes to a temporary name and renames, so that a file is whole or not there; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            for line in lines:
                file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(path: str | os.PathLike) -> Iterator[None]:
    """Keeps other processes off a file, or a folder that is there, while this one writes to it.

    PATH.lock (of a folder: .lock in it) holds the process's number, for the InputError that others get. The
    system frees it when the process ends, killed or not.
    """
    from filelock import FileLock, Timeout  # torch brings it

    path, holder = Path(path), "?"
    place = path / ".lock" if path.is_dir() else path.with_name(path.name + ".lock")
    lock = FileLock(place, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        with contextlib.suppress(OSError):
            holder = place.read_text()
        raise InputError(f"{path}: process {holder} is writing to it: wait, or name another place") from None
    windows = contextlib.suppress(PermissionError)  # it lets nobody write to a locked file, or remove it
    try:
        with windows:
            place.write_text(str(os.getpid()))
        yield
    finally:
        with windows:
            place.unlink(missing_ok=True)
        lock.release()


def check_out(folder: str | os.PathLike, *ours: str) -> None:
    """InputError unless a folder is new, empty (but for .names), or an earlier run's: holds one of ours."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"out: {folder} is a file, not a folder")
    held = sorted(path.name for path in folder.glob("[!.]*"))
    if held and not set(ours) & set(held):
        raise InputError(f"out: {folder} holds other files, such as {short(held[0], 40)}: name a new folder")
    if links := [name for name in ours if (folder / name).is_symlink()]:
        raise InputError(f"out: {folder / links[0]} is a symbolic link, which is not followed; remove it")


# one of them is in every run folder
RUN_FILES = ("judge.json", "log.jsonl", "checkpoints", "predictions.jsonl", "adapter", "model", "tokenizer")


def load_data(config: Config) -> tuple[list[Item], list[Item]]:
    """Training and test items of a run, with one label order, apart from each other."""
    if not config.train:
        raise InputError("train: name a file of training items")
    labels = list(config.labels) or None
    items = load_items(*config.train, labels=labels)
    side = lambda some, name: [item for item in some if item.split == name]  # noqa: E731
    if config.test:
        test = load_items(*config.test, labels=labels or labels_of(items), complete=labels is None)
        if wrong := side(items, "test") + side(test, "train"):
            split = wrong[0].split
            raise InputError(f"{wrong[0].named}: split: is {split}, but --{split} names the {split} items")
    elif any(item.split for item in items):
        if unplaced := side(items, None):
            raise InputError(f"{unplaced[0].named}: split: missing, though other items have one")
        items, test = side(items, "train"), side(items, "test")
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
    found: dict[str, list[str]] = {}
    for pair in pairs:
        label, equals, texts = pair.partition("=")
        if not equals:
            raise InputError(f"spellings: '{pair}' is not LABEL=TEXT,TEXT")
        found.setdefault(label, []).extend(texts.split(","))
    return found


def keep_short(
    judge: Judge, items: Sequence[Item], overlong: str, what: str, remedy: str = "{longer}use --overlong drop"
) -> list[Item]:
    """The items whose prompts fit judge.max_length; InputError for the others unless overlong is "drop".

    remedy: the end of the error; {longer} in it names --max_length where the model takes more.
    """
    from tqdm.auto import tqdm

    lengths, most = [], judge.max_length
    chunks = range(0, len(items), 2048)  # not all of them at a time in memory
    for start in tqdm(chunks, desc=f"counting tokens of {what} items", disable=len(items) < 20_000):
        some = items[start : start + 2048]
        encoded = iter(judge.encoder.many([prompt for item in some for prompt in item.prompts]))
        lengths += [max(len(next(encoded)) for _ in item.prompts) for item in some]
    over = [i for i, length in enumerate(lengths) if length > most]
    found = f"{len(over)} of {len(items)} {what} items"
    if over and overlong == "error":
        first = f"{items[over[0]].named}: prompt: {lengths[over[0]]} tokens"
        limit = f"longer than max_length {most} (the longest has {max(lengths)})"
        longer = "raise --max_length or " if most < judge.longest else ""
        raise InputError(f"{first}; {found} are {limit}; {remedy.format(longer=longer)}")
    if len(over) == len(items):
        raise InputError(f"no {what} items are left within max_length {most}")
    if over:
        log.warning("dropped %s longer than %d tokens", found, most)
    return [item for item, length in zip(items, lengths, strict=True) if length <= most]


def versions() -> dict[str, str]:
    """Of this file, Python and the packages that are installed."""
    from importlib import metadata

    found = {"distjudge": __version__, "python": sys.version.split()[0]}
    for name in ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "unsloth", "trl", "datasets"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _check_labels(judge: Judge, items: Sequence[Item]) -> None:
    """Raises InputError unless the items' labels are the judge's, in its order, as the columns are."""
    if (labels := labels_of(items)) != judge.labels:
        raise InputError(f"{items[0].where}: {listed(labels)} are not the judge's {listed(judge.labels)}")


def average_orders(first: torch.Tensor, second: torch.Tensor, back: Sequence) -> tuple[torch.Tensor, bool]:
    """The mean of a pair's answers (C,) in both orders, and if their top labels differ. back: Swap.labels."""
    second = second[list(back)]
    return (first + second) / 2, bool(first.argmax() != second.argmax())


def average_items(items: Sequence[Item], logq: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
    """Probabilities (N, C) from log-probabilities (M, C) of all prompts; and what the order of pairs did.

    A pair gets the mean over both orders. order_flips: the share of pairs whose top label changes with the
    order; order_variation: their mean total variation. {} without pairs.
    """
    q, pairs, parts = [], [], logq.exp().split([len(item.prompts) for item in items])
    for item, (first, *other) in zip(items, parts, strict=True):
        q.append(first)
        if item.swap:
            q[-1], flipped = average_orders(first, *other, item.swap.labels)
            pairs.append((flipped, (first - q[-1]).abs().sum().item()))  # half of the orders' distance
    means = [sum(column) / len(pairs) for column in zip(*pairs, strict=True)]
    return torch.stack(q), dict(zip(("order_flips", "order_variation"), means, strict=False))


def judge_items(
    judge: Judge, items: Sequence[Item], progress: bool = False
) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """Probabilities (N, C), label masses (N,) and what the order of pairs did: see average_items().

    Raises InputError if the items' labels are not the judge's, in its order.
    """
    _check_labels(judge, items)
    logq, mass = judge.score([prompt for item in items for prompt in item.prompts], progress)
    q, orders = average_items(items, logq)
    return q, torch.stack([part.mean() for part in mass.split([len(item.prompts) for item in items])]), orders


def write_results(
    judge: Judge, items: Sequence[Item], train_items: Sequence[Item], config: Config, folder: str | Path
) -> dict:
    """Judges the items, writes predictions.jsonl, metrics.json and config.json, and returns the metrics."""
    folder, rows = Path(folder), []
    check_out(folder, *RUN_FILES)
    # how a table became prompts goes along
    card = Path(config.train[0]).with_name("card.json") if config.train else folder / "card.json"
    own = parse_json(card.read_bytes())[0].get("own") if card.is_file() else None
    (folder / "card.json").unlink(missing_ok=True)
    if own:
        write_json(folder / "card.json", {"own": own})
    q, mass, orders = judge_items(judge, items, progress=True)
    for item, predicted, m in zip(items, q.tolist(), mass.tolist(), strict=True):
        predicted = dict(zip(judge.labels, predicted, strict=True))
        row = {"id": item.id, "counts": item.counts, "predicted": predicted, "label_mass": m}
        row |= {"prompt": prompt_field(item.prompt), "group": item.group, "truth": item.truth}
        rows.append(json.dumps({k: v for k, v in row.items() if v is not None}, ensure_ascii=False))
    write_lines(folder / "predictions.jsonl", rows)
    metrics = evaluate(q, items, train_items=train_items, label_mass=mass) | orders
    write_json(folder / "metrics.json", metrics)
    about = {"labels": judge.labels, "versions": versions()}
    about |= {"prompt_hash": digest_of([judge.encoder.frame, judge.tokens.sequences])}
    about |= {"items": {"train": len(train_items), "test": len(items)}}
    about |= {"votes": {"train": sum(i.votes for i in train_items), "test": sum(i.votes for i in items)}}
    write_json(folder / "config.json", dataclasses.asdict(config) | about)
    return metrics


def judge_of(config: Config, labels: Sequence[str], **options: Any) -> Judge:
    """load_judge() of config.model, with the settings of a run and these options."""
    names = ("lora_rank", "four_bit", "bf16", "max_length", "seed", "backend", "gradient_checkpointing")
    settings = {name: getattr(config, name) for name in names}
    settings["spellings"] = parse_spellings(config.spellings)
    judge = load_judge(config.model, labels, **settings, **options)
    judge.pack_tokens = config.pack_tokens or judge.pack_tokens
    return judge


def run(
    config: Config, before_training: Callable[[Judge, list[Item], list[Item]], Any] | None = None
) -> dict[str, float | None]:
    """Loads, trains, judges the test items and fills the run folder; returns the metrics.

    before_training: called with the judge, training and test items before the first step. InputError, before
    training, for what cannot be used. Of torchrun's processes the first writes; the others return {}.
    """
    config.check()
    check_out(config.out, *RUN_FILES)
    items, test = load_data(config)
    judge = judge_of(config, labels_of(items))
    judge.encoder.memo = {}  # every prompt is tokenized once
    items = keep_short(judge, items, config.overlong, "training")
    test = keep_short(judge, test, config.overlong, "test")
    if before_training:
        before_training(judge, items, test)
    train(judge, items, config, eval_items=test)
    judge.encoder.memo = None
    if os.environ.get("RANK", "0") != "0":
        return {}
    with locked(config.out):
        save_judge(judge, config.out)
        return write_results(judge, test, items, config, config.out)


def cli(main: Callable[[Any], Any], config: type, failures: tuple[type[Exception], ...] = ()) -> None:
    """A script's command line: tyro reads `config` for main; an error ends in a line a problem on stderr.

    Exit codes: 2 for what the user got wrong, 1 for `failures` and a run that diverges, 128 + the number of
    the signal that stopped it. A reader that closes the output ends the script quietly.
    """
    import tyro

    if os.environ.get("RANK", "0") != "0":  # of torchrun's processes the first does the talking
        log.setLevel(logging.ERROR)
    handler = logging.StreamHandler()
    handler.format = lambda record: printable(record.getMessage())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    failures, about = (FloatingPointError, torch.OutOfMemoryError, *failures), sys.modules["__main__"].__doc__
    grouped = issubclass(config, Config)
    try:
        given = tyro.cli(_grouped(config) if grouped else config, description=about, use_underscores=True)
        main(config(**collections.ChainMap(*map(vars, vars(given).values()))) if grouped else given)
        print(end="", flush=True)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # who read the output, head say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InputError, OSError, *failures) as error:
        lines = map(printable, f"error: {error}".split("\n"))
        print(*lines, sep="\n", file=sys.stderr)
        sys.exit(1 if isinstance(error, failures) else 2)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.number)


def _grouped(config: type[Config]) -> type:
    """The same settings for --help, a dataclass a group: first what a script adds, then Config's in order."""
    from docstring_parser import parse_from_object  # tyro brings it
    from tyro.conf import OmitArgPrefixes, arg

    fields = [field for cls in config.__mro__[-2::-1] for field in parse_from_object(cls).params]
    texts = {field.arg_name: " ".join(field.description.split()) for field in fields}
    first = {"train": "data", "model": "model", "alpha": "method", "epochs": "training", "out": "output"}
    hints, group, groups = typing.get_type_hints(config, include_extras=True), "", {"command": []}
    for field in dataclasses.fields(config):  # Config's own come first
        group = first.get(field.name, group) if field.name in Config.__dataclass_fields__ else "command"
        kind = typing.Annotated[hints[field.name], arg(help=texts.get(field.name))]
        groups.setdefault(group, []).append((field.name, kind, field))
    made = [(name, dataclasses.make_dataclass(name, fields)) for name, fields in groups.items() if fields]
    return dataclasses.make_dataclass("Settings", [(name, OmitArgPrefixes[cls]) for name, cls in made])
