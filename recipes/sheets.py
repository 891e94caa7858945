"""Spreadsheets for recipes/judge.py: prompts of their rows, and the same table with more columns."""

import codecs
import contextlib
import dataclasses
import gzip
import io
import itertools
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "data")]

import distjudge
from distjudge import InputError, short

SUFFIXES = (".csv", ".tsv", ".xlsx", ".parquet")  # what can be written
Row = tuple[str, dict[str, Any], str]  # where it stands, the row, and what is wrong with it


def rows_of(
    path: str, sheet: str | None = None, wanted: Sequence[str] = ()
) -> tuple[list[str], Iterable[Row]]:
    """Columns (of JSON lines none) and rows of a file, or of the standard input (-).

    wanted: columns that tell a table's header from lines above it.
    """
    kind = kind_of(path)
    if path != "-" and kind != ".jsonl":
        import sources  # slow to import, as is all of data/

        if kind in sources.READERS:
            columns, rows = sources.read_table(path, sheet=sheet, wanted=wanted)
            bare = lambda row: {x: None if distjudge.is_missing(y) else y for x, y in row.items()}  # noqa: E731
            return columns, ((where, bare(row), "") for where, row in rows)
    if sheet:
        raise InputError(f"{path}: sheet: only an Excel file has sheets")
    return [], distjudge.read_rows(path)


def kind_of(path: str) -> str:
    return Path(path.lower().removesuffix(".gz")).suffix


# --- prompts ----------------------------------------------------------------------------------------------
@dataclasses.dataclass(kw_only=True)
class Template:
    """Makes prompts of a row's cells, as data/prepare.py made them of the training table's."""

    template: str = "{prompt}"
    text: str | None = None  # the column for {text}
    item: str | None = None  # the column of the id
    optional: Sequence[str] = ()  # columns whose cells may be empty
    swap: Sequence[str] | None = None  # two columns; exchanged, they give a pair's other order
    shown: Sequence[str] = ()  # columns that the template shows
    swap_labels: dict[str, str] | None = None  # the labels that trade places then; else a and b
    named: bool = False  # on the command line: then a column "prompt" is not the whole prompt

    def columns(self, there: Iterable[str]) -> list[str]:
        """The columns it needs. {in two words} may be plain text: that counts if it is `there`, or was."""
        import tables

        named = [self.text if self.text and x == "text" else x for x in tables.placeholders(self.template)]
        known = {self.text, *self.shown, *there}
        return [x for x in dict.fromkeys(named) if x in known or re.fullmatch(r"\w+", x)]

    def applies(self, there: Iterable[str], table: bool) -> bool:
        """Whether prompts are made of the columns that are there; or else they stand in "prompt"."""
        needed, whole = self.columns(there), "prompt" in there and not self.named
        return not whole or (set(needed) <= set(there) and (table or "prompt" in needed))

    def filled(self, where: str, row: dict[str, Any], table: bool) -> dict[str, Any] | None:
        """What fill() makes of a row, or None where the template does not apply."""
        return self.fill(where, row) if self.applies(row, table) else None

    def fill(self, where: str, row: dict[str, Any]) -> dict[str, Any]:
        """id, prompt and swap of a row. Raises InputError for an empty cell, and for one that is no text."""
        import tables

        if self.template == "{prompt}" and isinstance(row.get("prompt"), list):  # of messages
            return {"id": row.get(self.item or "id"), "prompt": row["prompt"], "swap": row.get("swap")}
        for name in self.columns(row):
            if name not in self.optional and not tables.text_of(where, name, row.get(name)):
                raise InputError(f"{where}: {short(name)}: {'empty' if name in row else 'missing'}")
        prompt, *turned = tables.prompts_of(dataclasses.asdict(self), {*row, *self.optional})(where, row)
        swap = row.get("swap") if self.template == "{prompt}" else None
        if turned:
            swap = {"prompt": turned[0], "labels": self.swap_labels or {"a": "b", "b": "a"}}
        name = tables.cell(where, self.item or "id", row.get(self.item or "id"))
        return {"id": name or None, "prompt": prompt, "swap": swap if isinstance(swap, dict) else None}


def template_of(run: str, path: str = "", text: str = "", item: str = "") -> Template | None:
    """The template that a run folder's card.json holds, or the one at `path`; None if there is neither.

    text, item: columns that take the place of the card's. Raises InputError for a card of another form.
    """
    card, own = Path(run, "card.json"), {}
    if card.is_file():
        about, problem = distjudge.parse_json(card.read_bytes())
        own = about.get("own") or {}
        if problem or not isinstance(own, dict) or not isinstance(own.get("template", ""), str):
            raise InputError(f"{card}: {problem or 'own: is not what data/prepare.py writes'}")
    if path:
        import tables

        own |= {"template": tables.read_template(path, [], None)}
    if text:
        own = {"template": "{text}"} | own | {"text": text}
    if not own.get("template"):
        return Template(item=item) if item else None
    if text and "{text}" not in own["template"]:
        raise InputError("text: the template has no {text}")
    own |= {"item": item or own.get("item")}
    given = {field.name: own[field.name] for field in dataclasses.fields(Template) if own.get(field.name)}
    return Template(**given | {"named": bool(path or text)})


def for_columns(found: Template | None, path: str, columns: Sequence[str], item: str) -> Template:
    """The template for the table at `path`. Raises InputError, with the columns there, if one is missing."""
    template = found or Template()
    if not template.applies(columns, table=True):
        template = Template(item=template.item)
    needed = [*template.columns(columns), *(template.swap or ()), *filter(None, [item])]
    if missing := [name for name in needed if name not in columns]:
        why = "which the template needs" if found else "and no template: name one, or the text (--text)"
        why = "which --item names" if missing == [item] else why
        there = ", ".join(short(name, 30) for name in columns)
        raise InputError(f"{path}: no column '{short(missing[0])}', {why}; the columns are {there}")
    return template


# --- what is added ----------------------------------------------------------------------------------------
def added(row: dict[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    """What a table says of an output row, by column. None: nothing."""
    braced = lambda held: held and "{" + ", ".join(held) + "}"  # noqa: E731
    return {f"judge_p({label})": row["predicted"].get(label) for label in labels} | {
        "judge_mode": row["mode"],
        "judge_mean": row.get("mean"),
        "judge_entropy": row["entropy"],
        "judge_credible_set": braced(row.get("credible_set")),
        "judge_conformal_set": braced(row.get("conformal_set")),
        "judge_label_mass": row["label_mass"],
        "judge_to_people": row.get("to_people"),
        "judge_flipped": row.get("flipped"),
        "judge_problem": row.get("problem"),
    }


def shown(rows: Sequence[dict[str, Any]], labels: Sequence[str]) -> str:
    """One line an item: its probabilities and what they say."""
    import pandas

    cells = []
    for row in rows:
        marks = {"": "low mass " * ("low_mass" in row) + "flipped" * row.get("flipped", False)}
        cells.append({"id": row["id"]} | added(row | {"flipped": None}, labels) | marks)
    frame = pandas.DataFrame(cells).dropna(axis=1, how="all")
    frame = frame.map(lambda cell: short(cell, 24) if isinstance(cell, str) else cell)
    frame.columns = [short(name.removeprefix("judge_"), 14) for name in frame.columns]
    return frame.to_string(index=False, float_format="{:.3f}".format)


# --- writing ----------------------------------------------------------------------------------------------
def frame_of(rows: Sequence[Row], out: Path, added: Iterable[str]) -> Any:
    """The rows as a DataFrame of objects, to which columns are added later.

    Raises InputError for what `out` could not hold: a column that stands there already, and Excel's limits.
    """
    import pandas

    frame = pandas.DataFrame([row for _, row, _ in rows], dtype=object)
    if clash := [name for name in added if name in frame.columns]:
        raise InputError(f"column '{short(clash[0])}': judging adds one of this name; rename yours")
    if out.suffix.lower() != ".xlsx":
        return frame
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    if len(frame) >= 1 << 20:
        raise InputError(f"out: {len(frame)} rows are more than an Excel sheet holds; name a .csv file")
    for where, row, _ in rows:
        for name, cell in row.items():
            if len(str(cell)) > 32_767 or ILLEGAL_CHARACTERS_RE.search(f"{name}{cell}"):
                problem = "has more than 32,767 characters or a control character; name a .csv file"
                raise InputError(f"{where}: {short(name)}: {problem}, for Excel cannot hold it")
    return frame


def is_formula(cell: Any) -> bool:
    """Whether a spreadsheet would run a text. A number is none, nor is a dash alone."""
    number = r"-|[+-]?[\d.,]*\d[\d.,]*([eE][+-]?\d+)?%?"
    begins = isinstance(cell, str) and re.match("[=+@\t\r\n\uff1d\uff0b\uff0d\uff20-]", cell)
    return bool(begins) and not re.fullmatch(number, cell)


def csv_form(items: str, columns: Sequence[str], suffix: str) -> dict[str, Any]:
    """to_csv's settings: delimiter, byte order mark and line ends of the items' own file, if that is CSV too.

    Where semicolons stand between cells, commas stand in numbers.
    """
    import sources

    kind, head = kind_of(items), b""
    if kind in (".csv", ".tsv", ".txt"):
        with (gzip.open if items.lower().endswith(".gz") else open)(items, "rb") as file:
            head = file.read(1 << 16)
    text = head.decode("utf-8-sig", "replace")
    sep = "," if kind == ".tsv" else sources.delimiter(text.splitlines(), frozenset(columns))
    form = {"sep": "\t" if suffix == ".tsv" else sep, "decimal": "," if sep == ";" else "."}
    form["lineterminator"] = "\r\n" if b"\r\n" in head else "\n"
    marked = head.startswith(codecs.BOM_UTF8) or kind.startswith(".xls")
    return form | {"encoding": "utf-8-sig" if marked else "utf-8", "errors": "backslashreplace"}


def plain(cell: Any) -> Any:
    """A cell as a sheet or a text file can hold it: what is nested as JSON, Excel rounds no number."""
    if isinstance(cell, (list, dict)):
        return json.dumps(cell, ensure_ascii=False, default=str)
    is_odd = getattr(cell, "tzinfo", None) or (isinstance(cell, int) and abs(cell) >= 10**15)
    return str(cell) if is_odd else cell


def write_table(frame: Any, added: Sequence[dict[str, Any]], out: Path, form: dict[str, Any]) -> None:
    """Writes a table and the cells added to each row, under a temporary name, and renames it.

    form: settings of csv_form(). No text is run as a formula: in CSV it gets a ' in front, in Excel's files
    it is marked as text.
    """
    import pandas

    more = pandas.DataFrame(added).dropna(axis=1, how="all")
    with contextlib.suppress(ValueError, TypeError):  # labels that are numbers
        more["judge_mode"] = pandas.to_numeric(more["judge_mode"]).convert_dtypes()
    frame = pandas.concat([frame, more], axis=1)
    part, kind = out.with_name(out.name + ".part"), out.suffix.lower()
    part.unlink(missing_ok=True)
    with open(part, "xb") as file:
        if kind == ".parquet":  # a column has one type
            import pyarrow

            frame = frame.replace("", None)
            for name in frame.columns:
                kinds = {type(cell) for cell in frame[name].dropna()}
                is_mixed = len(kinds) > 1 and not kinds <= {int, float}
                try:
                    frame[[name]].to_parquet(io.BytesIO())
                except (pyarrow.ArrowException, OverflowError):  # what its lists or objects hold is mixed
                    is_mixed = True
                if is_mixed:
                    frame[name] = frame[name].map(lambda cell: str(plain(cell)), na_action="ignore")
            frame.to_parquet(file, index=False)
        elif kind == ".xlsx":
            with pandas.ExcelWriter(file, engine="openpyxl") as book:
                frame.map(plain).to_excel(book, index=False)
                for cell in itertools.chain(*book.book.active.iter_rows()):
                    if isinstance(cell.value, str):
                        cell.data_type, cell.quotePrefix = "s", is_formula(cell.value)
        else:
            # an int as text: in a column with an empty cell pandas would write it as 5.0
            text = lambda cell: str(cell) if type(cell) is int else plain(cell)  # noqa: E731
            guard = lambda cell: "'" + cell if is_formula(cell) else text(cell)  # noqa: E731
            frame.map(guard).rename(columns=guard).to_csv(file, index=False, **form)
    part.replace(out)
