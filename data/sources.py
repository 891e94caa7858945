"""Where the public data sets are published, how their files are fetched, and how tables are read.

A fetched file goes into a cache folder, DISTJUDGE_CACHE or ~/.cache/distjudge, under its task's name. A cut
download is taken up where it stopped, now or on the next run. read_table() is the one reader of tables.
"""

import contextlib
import csv
import gzip
import http.client
import io
import itertools
import os
import re
import shutil
import sys
import urllib.request
import zipfile
from collections import Counter, namedtuple
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import distjudge
from distjudge import InputError, listed, log, short

import pandas
import pyarrow.parquet
from tqdm import tqdm

HUB = "https://huggingface.co/datasets"
SUMMEVAL = "https://storage.googleapis.com/sfr-summarization-repo-research"
CNN = f"{HUB}/abisee/cnn_dailymail/resolve/96df5e686bee6baa90b8bee7c28b81fa3fa6223d/3.0.0"
MTBENCH = f"{HUB}/lmsys/mt_bench_human_judgments/resolve/f7d2896d2cc5d80f8b55c2bbc722613555233c25/data"
HELPSTEER2 = f"{HUB}/nvidia/HelpSteer2/resolve/990b2711a36180dd19d9c94b8627844866f8982a"
EMOBANK = "https://raw.githubusercontent.com/JULIELab/EmoBank/248ce2a43e165a66d31aeaed83cff9641d6654e0/corpus"
SOURCES = {  # task: {name in the cache: address}
    "snli": {"snli_1.0.zip": "https://nlp.stanford.edu/projects/snli/snli_1.0.zip"},
    "mnli": {"multinli_1.0.zip": "https://cims.nyu.edu/~sbowman/multinli/multinli_1.0.zip"},
    "chaosnli": {"chaosNLI_v1.0.zip": "https://www.dropbox.com/s/h4j7dqszmpt2679/chaosNLI_v1.0.zip?dl=1"},
    "summeval": {  # the annotations come without the articles: CNN/DailyMail's test split has them
        "model_annotations.aligned.jsonl": f"{SUMMEVAL}/model_annotations.aligned.jsonl",
        "cnn_dailymail_test.parquet": f"{CNN}/test-00000-of-00001.parquet",
    },
    "mtbench": {"mt_bench_human.parquet": f"{MTBENCH}/human-00000-of-00001-25f4910818759289.parquet"},
    "helpsteer2": {"disagreements.jsonl.gz": f"{HELPSTEER2}/disagreements/disagreements.jsonl.gz"},
    "helpsteer2_pref": {"preference.jsonl.gz": f"{HELPSTEER2}/preference/preference.jsonl.gz"},
    "emobank": {name: f"{EMOBANK}/{name}" for name in ("emobank.csv", "individual_reader_ratings.csv")},
}
SHA256 = {  # of the files for which several public records agree
    "snli_1.0.zip": "afb3d70a5af5d8de0d9d81e2637e0fb8c22d1235c2749d83125ca43dab0dbd3e",
    "multinli_1.0.zip": "049f507b9e36b1fcb756cfd5aeb3b7a0cfcb84bf023793652987f7e7e0957822",
    "model_annotations.aligned.jsonl": "f0d4166e0cdeb439b387c4449634b067b7e9f721b9ef4c2b722f6b7550d3d6ab",
    "cnn_dailymail_test.parquet": "04e322d2634a96dba76bf9a6294fbbe48e0b36abeae43f13d86ba2c3bebffe4e",
    "preference.jsonl.gz": "a5cd48600fb7a330cf0ccc8f59051e24e8f236907c379f42eff1ba18da55204b",
    "emobank.csv": "1ade4a4a453e880c0f39d0536d2b355e8a716e0cf88236c64cdb4d438cf9605b",
    "individual_reader_ratings.csv": "059bdadbdc1179b29c168b96f1e0c0a31fc2b0bab5e4103bf6cf3b3e6d53e7bf",
}
Row = tuple[str, dict[str, Any]]  # where it stands ("votes.csv: row 2"), and {column: cell}


# --- fetching ----------------------------------------------------------------------------------------------
def fetch_all(task: str) -> tuple[str, ...]:
    """The files of a task, in the cache."""
    folder = Path(os.environ.get("DISTJUDGE_CACHE") or Path.home() / ".cache" / "distjudge") / task
    return tuple(str(fetch(name, url, folder, SHA256.get(name, ""))) for name, url in SOURCES[task].items())


def sha256_of(path: str | Path) -> str:
    with open(path, "rb") as file:
        return distjudge.hash_file(file)


def fetch(name: str, url: str, folder: Path, sha256: str = "", tries: int = 3) -> Path:
    """The file in the cache folder, downloaded if it is not there yet.

    Raises InputError, with the file's address and place, if it cannot be had or has another checksum.
    """
    path, part = folder / name, folder / f"{name}.part"
    file, remedy = path, "delete it to fetch it again, or name it with --raw"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        file, remedy = part, "it was thrown away"
        if all((reason := _download(url, part)) for _ in range(tries)):  # until there is none
            problem = f"{name}: could not be downloaded ({short(reason, 120)})"
            copy = f"put it at {path} and run again, or name your copy with --raw"
            raise InputError(f"{problem}. Fetch {url} by other means, {copy}")
    if sha256 and (found := sha256_of(file)) != sha256:
        if file == part:
            part.unlink()
        raise InputError(f"{file}: has the checksum {found}, not {sha256}, that of {url}; {remedy}")
    return path if file == path else part.replace(path)


def _download(url: str, part: Path) -> str:
    """Fetches what `part` lacks of the file. Returns why that did not work, or "" if the file is whole."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "distjudge"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
            have = have if answer.status == 206 else 0  # a server that knows no ranges sends everything again
            length = answer.headers.get("Content-Length")
            total = have + int(length) if length else None
            shown = {"total": total, "initial": have, "desc": part.stem, "disable": None}
            with open(part, "ab" if have else "wb") as file, tqdm.wrapattr(answer, "read", **shown) as body:
                shutil.copyfileobj(body, file)
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "code", 0) == 416:  # there is nothing behind what we have: start again
            part.unlink()
        return str(error) or type(error).__name__
    size = part.stat().st_size
    return f"the connection ended after {size} of {total} bytes" if size < (total or 0) else ""


# --- reading -----------------------------------------------------------------------------------------------
How = namedtuple("How", "split sheet wanted", defaults=("train", None, ()))


def read_table(path: str, split="train", sheet=None, wanted=()) -> tuple[list[str], Iterable[Row]]:
    """Columns and rows of a table; every row has every column.

    path: a file of a kind in READERS (.gz too), or a folder or hub id of Hugging Face datasets (its `split`).
    sheet: of an Excel file, by default the first. wanted: columns that are looked for, which tell the header
    from lines above it, and the delimiter. Raises InputError for what cannot be read.
    """
    rows = _read(path, How(split, sheet, frozenset(map(tidy, wanted))))
    columns = next(rows)
    if columns is None:
        rows = list(rows)
        columns = list(dict.fromkeys(column for _, row in rows for column in row))
        rows = [(where, dict.fromkeys(columns) | row) for where, row in rows]
    if twice := [column for column, number in Counter(columns).items() if number > 1]:
        raise InputError(f"{path}: column '{short(twice[0])}' stands there twice")
    return columns, rows


def read_rows(paths: Iterable[str]) -> Iterator[Row]:
    """The rows of tables, as they are read: published files are large. Raises InputError as read_table()."""
    return (row for path in paths for row in itertools.islice(_read(path, How()), 1, None))


NAMED_MARK = re.compile(r'"?sep=(.)"?\s*', re.I)  # a first line with which Excel names the delimiter
UNSEEN = "[\u00ad\u200b\u200e\u200f\u2060\ufeff]"


def tidy(name: Any) -> str:
    """A column's name as it is looked for: without line breaks, doubled and invisible spaces."""
    return " ".join(re.sub(UNSEEN, "", str(name)).split())


def _read(path: str, how: How) -> Iterator[Any]:
    """Yields what the reader does: first the columns, or None if only the rows tell them, then the rows."""
    kind = Path(path.lower().removesuffix(".gz")).suffix
    name, reader = READERS.get(kind, ("a Hugging Face data set", _read_datasets))
    if not os.path.exists(path) and (kind in READERS or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path)):
        raise InputError(f"{path}: no such file")  # nor OWNER/NAME, which may be on a hub
    if kind not in READERS and Path(path).is_file():
        raise InputError(f"{path}: is not a table that can be read, as CSV, Excel, Parquet or JSON is")
    if how.sheet and name != "Excel":
        raise InputError(f"{path}: sheet: only an Excel file has sheets")
    try:
        yield from tqdm(reader(path, how), desc=Path(path).name, unit=" rows", disable=None, leave=False)
    except InputError:
        raise
    except Exception as error:  # damaged files fail in many ways, each library with its own errors
        problem = short(str(error) or type(error).__name__, 150)
        raise InputError(f"{path}: cannot be read as {name}: {problem}") from None


def _numbered(path: str, rows: Iterable[dict]) -> Iterator[Row]:
    return ((f"{path}: row {number}", row) for number, row in enumerate(rows, 1))


class Column(str):
    question = ""  # what Qualtrics writes below the column's name


SECOND_HEADERS = re.compile(r'\{["\']ImportId["\']:.*|(Open-Ended )?Response')  # Qualtrics, SurveyMonkey


def _from_grid(path: str, grid: Iterable[Iterable[Any]], how: How, reading: str = "") -> Iterator[Any]:
    """Columns and rows of a grid of cells. Left out are lines above the header and headers that come again.

    The header is, of the first 30 lines, the one with most of the wanted columns; by default the first.
    """
    lines = ((number, list(line)) for number, line in enumerate(grid, 1))
    top = [(number, line) for number, line in itertools.islice(lines, 30) if not all(map(is_empty, line))]
    found = [len(how.wanted.intersection(map(tidy, line))) for _, line in top]
    start = found.index(max(found)) if found else 0
    if start:
        log.warning("%s: the header is row %d; lines above it left out: %d", path, top[start][0], start)
    header = top[start][1] if top else []
    columns = ["" if is_empty(name) else tidy(name) for name in header]
    again, below = start, top[start + 1][1] if len(top) > start + 1 else []
    parts = [not is_empty(part) for name, part in zip(columns, below, strict=False) if not name]
    if parts and all(parts) and is_empty(below[0]) and len(below) == len(columns):
        again += 1  # the parts of a question stand below it, as SurveyMonkey writes them
        groups = pandas.Series(columns).mask(lambda names: names == "").ffill()
        below = ["" if is_empty(x) or SECOND_HEADERS.fullmatch(str(x)) else x for x in below]
        columns = [tidy(f"{one} {part}") for one, part in zip(groups, below, strict=True)]
    named = max((k for k, name in enumerate(columns, 1) if name), default=0)
    columns = [Column(name or f"(column {k})") for k, name in enumerate(columns, 1)]
    for k, (_, line) in enumerate(top[start + 1 : start + 3], start + 1):
        names = [str(cell) for cell in line if not is_empty(cell)]
        if names and all(SECOND_HEADERS.fullmatch(name) for name in names):
            again = k
    for column, question in zip(columns, top[start + 1][1] if again == start + 2 else (), strict=False):
        column.question = tidy(question)
    yield columns
    repeated = again - start
    for number, line in itertools.chain(top[again + 1 :], lines):
        if all(map(is_empty, line)) and len(line) <= 1:
            continue
        if line == header:
            repeated += 1
            continue
        more = any(not is_empty(cell) for cell in line[len(columns) :])
        if more or len(line) < named:
            shown = ", ".join(short(column, 30) for column in columns[:12])
            problem = f"{'more' if more else 'fewer'} fields than columns{reading}: {shown}"
            raise InputError(f"{path}: row {number}: {problem}")
        line += [None] * (len(columns) - len(line))
        yield f"{path}: row {number}", dict(zip(columns, line, strict=False))
    if repeated:
        log.warning("%s: further header rows left out: %d", path, repeated)


def is_empty(cell: Any) -> bool:
    return distjudge.is_missing(cell) or (isinstance(cell, str) and not cell.strip())


def _read_csv(path: str, how: How) -> Iterator[Any]:
    csv.field_size_limit(distjudge.LONGEST)  # Python's own, 131,072 characters, is less than a long text
    for _, file in _files(path):
        lines = _text_lines(path, file)
        first = list(itertools.islice(lines, 200))
        mark = delimiter(first, how.wanted)
        if first and NAMED_MARK.fullmatch(first[0]):
            first[0] = "\n"
        grid = csv.reader(itertools.chain(first, lines), strict=True, delimiter=mark)
        try:
            yield from _from_grid(path, grid, how, f" (fields end at {mark!r})")
        except csv.Error as error:
            problem = f"{distjudge.first_line(error)}; within quotes a quote is written twice"
            raise InputError(f"{path}: line {grid.line_num}: {problem}") from None


def _text_lines(path: str, file: Any) -> Iterator[str]:
    for number, raw in distjudge.read_lines(file, path):
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            kind = "UTF-16 ('Unicode text'), " if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
            problem = f"byte {error.start + 1} of it is {kind}not UTF-8; save the sheet as 'CSV UTF-8'"
            raise InputError(f"{path}: line {number}: {problem}") from None
        yield from io.StringIO(text, newline="")  # a carriage return alone ends a line too


def delimiter(lines: list[str], wanted: frozenset[str]) -> str:
    """The one of , ; tab | that gives the first lines the wanted columns, and rows of one length."""
    if lines and (named := NAMED_MARK.fullmatch(lines[0])):
        return named[1]

    def merit(mark: str) -> tuple[int, float, int]:
        rows = []
        with contextlib.suppress(csv.Error):  # what was read before still counts
            rows.extend(row for row in csv.reader(lines, strict=True, delimiter=mark) if row)
        found = max((len(wanted.intersection(map(tidy, row))) for row in rows[:30]), default=0)
        size, times = max(Counter(map(len, rows)).items(), key=lambda pair: pair[1], default=(1, 0))
        return found, times / len(rows) if size > 1 else 0.0, size

    return max(",;\t|", key=merit)


def _read_excel(path: str, how: How) -> Iterator[Any]:
    kind = {"engine_kwargs": {"read_only": False}} if ".xlsx" in path.lower() else {}
    file = gzip.open(path) if path.lower().endswith(".gz") else open(path, "rb")
    with file, pandas.ExcelFile(file, **kind) as book:
        names = [str(name) for name in book.sheet_names]
        if how.sheet and how.sheet not in names:
            raise InputError(f"{path}: sheet: no '{short(how.sheet)}'; there are {listed(names)}")
        name = how.sheet or names[0]
        table = book.parse(name, header=None, keep_default_na=False, dtype=object)
        if kind:  # a carriage return stands there as _x000D_
            from openpyxl.utils.escape import unescape

            table = table.map(lambda cell: unescape(cell) if isinstance(cell, str) else cell)
        lines = book.book[name].row_dimensions if kind else {}
        filled = ~table.map(is_empty).all(axis=1).to_numpy()
        unseen = [k for k, line in lines.items() if line.hidden and filled[k - 1 : k].any()]
        for cells in book.book[name].merged_cells.ranges if kind else ():  # the first holds the value
            top, column = cells.min_row - 1, cells.min_col - 1
            if top < table.shape[0] and column < table.shape[1]:
                table.iloc[top : cells.max_row, column] = table.iat[top, column]
    if not how.sheet and len(names) > 1:
        there = {tidy(cell) for line in table.head(30).itertuples(index=False) for cell in line}
        if how.wanted and not how.wanted & there:
            remedy = f"the sheets are {listed(names)}, --sheet names another"
            raise InputError(f"{path}: sheet '{short(name)}': no column '{short(min(how.wanted))}'; {remedy}")
        log.warning("%s: reads the sheet '%s' of %s; --sheet names another", path, short(name), listed(names))
    if unseen:
        text = "%s: %d hidden rows of the sheet '%s' are read too, row %d first; delete what does not count"
        log.warning(text, path, len(unseen), short(name), min(unseen))
    yield from _from_grid(path, table.itertuples(index=False, name=None), how, f" of sheet '{short(name)}'")


def _read_parquet(path: str, how: How) -> Iterator[Any]:
    with pyarrow.parquet.ParquetFile(path) as file:
        yield file.schema_arrow.names
        yield from _numbered(path, (row for batch in file.iter_batches() for row in batch.to_pylist()))


def _read_datasets(path: str, how: How) -> Iterator[Any]:
    import datasets  # slow to import

    saved = any(Path(path, name).exists() for name in ("state.json", "dataset_dict.json"))
    table = datasets.load_from_disk(path) if saved else datasets.load_dataset(path)
    if isinstance(table, datasets.DatasetDict):
        if how.split not in table:
            raise InputError(f"{path}: hub_split: there is no '{how.split}'; there are {', '.join(table)}")
        table = table[how.split]
    yield table.column_names
    yield from _numbered(path, distjudge.class_named(table))


def _read_json(path: str, how: How) -> Iterator[Any]:
    yield None
    tasks = []
    for name, file in _files(path):
        for where, row, problem in distjudge.json_rows(file, name):
            if problem:
                raise InputError(f"{where}: {problem}")
            done, data = row.get("annotations", row.get("completions")), row.get("data")
            is_done = isinstance(done, list) and all(isinstance(x, dict) and "result" in x for x in done)
            if isinstance(data, dict) and is_done:
                tasks.append((where, {"id": row.get("id")} | data, done))
            else:
                yield where, row
    yield from _annotations(tasks)


def _annotations(tasks: list[tuple[str, dict, list[dict]]]) -> Iterator[Row]:
    """Tasks of Label Studio's JSON as a row for each annotation; what the task's data say is no vote."""
    every = [result for _, _, done in tasks for one in done for result in one["result"]]
    names = dict.fromkeys(result["from_name"] for result in every if "from_name" in result)
    for where, data, done in tasks:
        for one in done or [{"result": []}]:  # a task that nobody has answered
            said = [(x["from_name"], x["value"]) for x in one["result"] if "from_name" in x]  # no relation
            votes = {name: [[value for key, value in said if key == name]] for name in names}
            if one.get("was_cancelled"):
                votes = {name: [{"status": "cancelled"}] for name in names}
            who = one.get("completed_by")
            who = who.get("email", who.get("id")) if isinstance(who, dict) else who
            yield where, data | {"completed_by": "" if who is None else str(who)} | votes


def _files(path: str) -> Iterator[tuple[str, Any]]:
    """(name, open binary file): the file itself, plain or .gz, or each .jsonl file in a .zip."""
    if not path.lower().endswith(".zip"):
        with gzip.open(path) if path.lower().endswith(".gz") else open(path, "rb") as file:
            yield path, file
        return
    with zipfile.ZipFile(path) as archive:
        members = [name for name in archive.namelist() if name.endswith(".jsonl") and "__MACOSX" not in name]
        if not members:
            there = listed(Path(name).name for name in archive.namelist()[:9])
            raise InputError(f"{path}: no .jsonl file in it; unpack it, and name one of {there}")
        for member in members:
            with archive.open(member) as file:
                yield f"{path}/{Path(member).name}", file


READERS = dict.fromkeys((".csv", ".tsv", ".txt"), ("CSV", _read_csv))
READERS |= dict.fromkeys((".xlsx", ".xls", ".ods"), ("Excel", _read_excel))
READERS |= dict.fromkeys((".jsonl", ".json", ".zip"), ("JSON", _read_json))
READERS[".parquet"] = ("Parquet", _read_parquet)
