"""Where the public data sets are published, how their files are fetched, and how tables are read.

A fetched file goes into a cache folder, DISTJUDGE_CACHE or ~/.cache/distjudge, under its task's name. A cut
download is taken up where it stopped, now or on the next run. read_table() is the one reader of tables.
"""

import csv
import gzip
import hashlib
import http.client
import io
import itertools
import json
import os
import re
import sys
import urllib.error
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas
import pyarrow.parquet
from tqdm import tqdm

from distjudge import InputError, short

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
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def fetch(name: str, url: str, folder: Path, sha256: str = "", tries: int = 3) -> Path:
    """The file in the cache folder, downloaded if it is not there yet.

    Raises InputError, with the file's address and place, if it cannot be had or has another checksum.
    """
    path, part = folder / name, folder / f"{name}.part"
    if path.exists():
        if sha256 and (found := sha256_of(path)) != sha256:
            remedy = "delete it to fetch it again, or name it with --raw"
            raise InputError(f"{path}: has the checksum {found}, not {sha256}: {remedy}")
        return path
    folder.mkdir(parents=True, exist_ok=True)
    for _ in range(tries):
        if not (reason := _download(url, part)):
            break
    else:
        remedy = f"Fetch {url} by other means, put it at {path} and run again, or name your copy with --raw"
        raise InputError(f"{name}: could not be downloaded ({short(reason, 120)}). {remedy}")
    if sha256 and (found := sha256_of(part)) != sha256:
        part.unlink()
        problem = f"the download from {url} has the checksum {found}, not {sha256}; it was thrown away"
        raise InputError(f"{name}: {problem}")
    return part.replace(path)


def _download(url: str, part: Path) -> str:
    """Fetches what `part` lacks of the file. Returns why that did not work, or "" if the file is whole."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "distjudge"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
            have = have if answer.status == 206 else 0  # a server that knows no ranges sends everything again
            length = answer.headers.get("Content-Length")
            total = have + int(length) if length else None
            bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.stem, disable=None)
            with bar, open(part, "ab" if have else "wb") as file:
                while block := answer.read(1 << 18):
                    file.write(block)
                    bar.update(len(block))
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range", "").endswith(f"/{have}"):
            return ""  # everything was there already
        if error.code == 416:
            part.unlink()
        return f"HTTP {error.code} {error.reason}"
    except (OSError, http.client.HTTPException) as error:
        return str(getattr(error, "reason", error)) or type(error).__name__
    size = part.stat().st_size
    return f"the connection ended after {size} of {total} bytes" if size < (total or 0) else ""


# --- reading -----------------------------------------------------------------------------------------------
def read_table(path: str, split: str = "train") -> tuple[list[str], Iterable[Row]]:
    """Columns and rows of a table.

    path: a file of a kind in READERS (.gz too), or a folder or hub id of Hugging Face datasets (its `split`).
    Raises InputError, one line that names the file, and the row where there is one, for what cannot be read.
    """
    rows = _read(path, split)
    columns = next(rows)
    if columns is None:
        rows = list(rows)
        columns = list(dict.fromkeys(column for _, row in rows for column in row))
    if twice := [column for column in columns if columns.count(column) > 1]:
        raise InputError(f"{path}: column '{short(twice[0])}' stands there twice")
    return columns, rows


def read_rows(paths: Iterable[str]) -> Iterator[Row]:
    """The rows of tables, as they are read: published files are large. Raises InputError as read_table()."""
    return (row for path in paths for row in itertools.islice(_read(path, "train"), 1, None))


def _read(path: str, split: str) -> Iterator[Any]:
    """Yields what the reader does: first the columns, or None if only the rows tell them, then the rows."""
    kind = Path(path.lower().removesuffix(".gz")).suffix
    if kind not in READERS:
        kind = "datasets"
        if Path(path).is_file():
            raise InputError(f"{path}: is not a table that can be read: CSV, Excel, Parquet and .jsonl can")
        if not Path(path).is_dir() and not re.fullmatch(
            r"[\w-][\w.-]*/[\w.-]+", path
        ):  # a hub id is OWNER/NAME
            raise InputError(f"{path}: no such file")
    name, reader = READERS[kind]
    try:
        yield from tqdm(reader(path, split), desc=Path(path).name, unit=" rows", disable=None, leave=False)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # damaged files fail in many ways, each library with its own errors
        raise InputError(f"{path}: cannot be read as {name}: {short(error, 150)}") from None


def _numbered(path: str, rows: Iterable[dict], first: int) -> Iterator[Row]:
    return ((f"{path}: row {number}", row) for number, row in enumerate(rows, first))


def _read_csv(path: str, split: str) -> Iterator[Any]:
    """The delimiter is the comma, semicolon or tab that the first line holds most of."""
    csv.field_size_limit(1 << 30)  # Python's own limit, 131,072 characters, is less than a long text
    try:
        text = "".join(file.read().decode("utf-8-sig") for _, file in _files(path))
    except UnicodeDecodeError as error:
        problem = f"byte {error.start + 1} is not UTF-8; save the sheet as 'CSV UTF-8'"
        raise InputError(f"{path}: cannot be read as CSV: {problem}") from None
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    yield list(reader.fieldnames or ())
    for where, row in _numbered(path, reader, 2):
        if None in row or None in row.values():
            raise InputError(f"{where}: {'more' if None in row else 'fewer'} fields than columns")
        yield where, row


def _read_excel(path: str, split: str) -> Iterator[Any]:
    table = pandas.read_excel(path, keep_default_na=False, dtype=object)
    table.columns = [str(column) for column in table.columns]
    yield list(table.columns)
    yield from _numbered(path, table.to_dict("records"), 2)


def _read_parquet(path: str, split: str) -> Iterator[Any]:
    with pyarrow.parquet.ParquetFile(path) as file:
        yield file.schema_arrow.names
        yield from _numbered(path, (row for batch in file.iter_batches() for row in batch.to_pylist()), 1)


def _read_datasets(path: str, split: str) -> Iterator[Any]:
    import datasets  # slow to import

    saved = any(Path(path, name).exists() for name in ("state.json", "dataset_dict.json"))
    table = datasets.load_from_disk(path) if saved else datasets.load_dataset(path)
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise InputError(f"{path}: hub_split: there is no '{split}'; there are {', '.join(table)}")
        table = table[split]
    yield table.column_names
    named = {name: kind for name, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)}
    for where, row in _numbered(path, table, 1):
        for name, kind in named.items():  # -1 says that there is no label
            row[name] = None if row[name] in (None, -1) else kind.int2str(row[name])
        yield where, row


def _read_jsonl(path: str, split: str) -> Iterator[Any]:
    yield None
    for name, file in _files(path):
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{name}:{number}"
            try:
                row = read_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except KeyError as error:
                raise InputError(f"{where}: {short(error.args[0])}: stands twice in the row") from None
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: broken JSON: {short(error, 100)}") from None
            if not isinstance(row, dict):
                raise InputError(f"{where}: not a JSON object but {type(row).__name__}")
            yield where, row


def read_json(text: str) -> Any:
    """What a JSON text says. Raises KeyError for a key that stands twice, ValueError or RecursionError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise KeyError(Counter(key for key, _ in pairs).most_common(1)[0][0])
        return found

    return json.loads(text, object_pairs_hook=unique)


def _files(path: str) -> Iterator[tuple[str, Any]]:
    """(name, open binary file): the file itself, plain or .gz, or each .jsonl file in a .zip."""
    if not path.lower().endswith(".zip"):
        with gzip.open(path) if path.lower().endswith(".gz") else open(path, "rb") as file:
            yield path, file
        return
    with zipfile.ZipFile(path) as archive:
        members = [name for name in archive.namelist() if name.endswith(".jsonl") and "__MACOSX" not in name]
        if not members:
            raise InputError(f"{path}: no .jsonl file in it")
        for member in members:
            with archive.open(member) as file:
                yield f"{path}/{Path(member).name}", file


READERS = dict.fromkeys((".csv", ".tsv", ".txt"), ("CSV", _read_csv))
READERS |= dict.fromkeys((".xlsx", ".xls", ".ods"), ("Excel", _read_excel))
READERS |= dict.fromkeys((".jsonl", ".zip"), ("JSON lines", _read_jsonl))
READERS |= {".parquet": ("Parquet", _read_parquet), "datasets": ("a Hugging Face data set", _read_datasets)}
