"""Where the public data sets are published, and how their files are fetched and read. Used by data/prepare.py.

A fetched file goes into a cache folder, DISTJUDGE_CACHE or ~/.cache/distjudge, under its task's name; a cut download is taken up
where it stopped, now or on the next run. Checksums stand where several public records of the same file agree.
"""
import csv
import dataclasses
import gzip
import hashlib
import http.client
import io
import json
import os
import re
import sys
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from distjudge import InputError, _Object, _short


@dataclasses.dataclass(frozen=True)
class Source:
    """One published file."""

    name: str
    url: str
    sha256: str = ""


HUB = "https://huggingface.co/datasets"
HELPSTEER2 = f"{HUB}/nvidia/HelpSteer2/resolve/990b2711a36180dd19d9c94b8627844866f8982a"
EMOBANK = "https://raw.githubusercontent.com/JULIELab/EmoBank/248ce2a43e165a66d31aeaed83cff9641d6654e0/corpus"
SOURCES = {
    "snli": (Source("snli_1.0.zip", "https://nlp.stanford.edu/projects/snli/snli_1.0.zip",
                    "afb3d70a5af5d8de0d9d81e2637e0fb8c22d1235c2749d83125ca43dab0dbd3e"),),
    "mnli": (Source("multinli_1.0.zip", "https://cims.nyu.edu/~sbowman/multinli/multinli_1.0.zip",
                    "049f507b9e36b1fcb756cfd5aeb3b7a0cfcb84bf023793652987f7e7e0957822"),),
    "chaosnli": (Source("chaosNLI_v1.0.zip", "https://www.dropbox.com/s/h4j7dqszmpt2679/chaosNLI_v1.0.zip?dl=1"),),
    "summeval": (  # the annotations are published without the articles; those of CNN/DailyMail's test split are joined by id
        Source("model_annotations.aligned.jsonl",
               "https://storage.googleapis.com/sfr-summarization-repo-research/model_annotations.aligned.jsonl",
               "f0d4166e0cdeb439b387c4449634b067b7e9f721b9ef4c2b722f6b7550d3d6ab"),
        Source("cnn_dailymail_test.parquet",
               f"{HUB}/abisee/cnn_dailymail/resolve/96df5e686bee6baa90b8bee7c28b81fa3fa6223d/3.0.0/test-00000-of-00001.parquet",
               "04e322d2634a96dba76bf9a6294fbbe48e0b36abeae43f13d86ba2c3bebffe4e")),
    "mtbench": (Source("mt_bench_human.parquet",
                       f"{HUB}/lmsys/mt_bench_human_judgments/resolve/f7d2896d2cc5d80f8b55c2bbc722613555233c25/data/"
                       "human-00000-of-00001-25f4910818759289.parquet"),),
    "helpsteer2": (Source("disagreements.jsonl.gz", f"{HELPSTEER2}/disagreements/disagreements.jsonl.gz"),),
    "helpsteer2_pref": (Source("preference.jsonl.gz", f"{HELPSTEER2}/preference/preference.jsonl.gz",
                               "a5cd48600fb7a330cf0ccc8f59051e24e8f236907c379f42eff1ba18da55204b"),),
    "emobank": (Source("emobank.csv", f"{EMOBANK}/emobank.csv", "1ade4a4a453e880c0f39d0536d2b355e8a716e0cf88236c64cdb4d438cf9605b"),
                Source("individual_reader_ratings.csv", f"{EMOBANK}/individual_reader_ratings.csv",
                       "059bdadbdc1179b29c168b96f1e0c0a31fc2b0bab5e4103bf6cf3b3e6d53e7bf")),
}


# --- fetching ---------------------------------------------------------------------------------------------------------
def cache_folder(task: str) -> Path:
    return Path(os.environ.get("DISTJUDGE_CACHE") or Path.home() / ".cache" / "distjudge") / task


def sha256_of(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else hashlib.sha256(file.read()).hexdigest()


def fetch(source: Source, folder: Path, tries: int = 3) -> Path:
    """The file in the cache folder, downloaded if it is not there yet.

    Raises InputError that names the file, its address and its place if it cannot be had, or if its checksum is wrong.
    """
    path = folder / source.name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part, reason = path.with_name(path.name + ".part"), ""
        for _ in range(tries):
            reason = _download(source.url, part)
            if not reason:
                break
        if reason:
            raise InputError(f"{source.name}: could not be downloaded ({_short(reason, 120)}). Fetch {source.url} by other means, put it "
                             f"at {path} and run again, or name your copy with --raw")
        if not source.sha256 or sha256_of(part) == source.sha256:
            part.replace(path)
            return path
        found = sha256_of(part)
        part.unlink()
        raise InputError(f"{source.name}: the download from {source.url} has the checksum {found}, not {source.sha256}; it was thrown away")
    if source.sha256 and (found := sha256_of(path)) != source.sha256:
        raise InputError(f"{path}: has the checksum {found}, not {source.sha256}: delete it to fetch it again, or name it with --raw")
    return path


def _download(url: str, part: Path) -> str:
    """Fetches what `part` lacks of the file; returns why that did not work, or nothing."""
    from tqdm import tqdm

    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "distjudge"} | ({"Range": f"bytes={have}-"} if have else {}))
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            have = have if answer.status == 206 else 0  # a server that knows no ranges sends everything again
            length = answer.headers.get("Content-Length")
            total = have + int(length) if length else None
            with open(part, "ab" if have else "wb") as file, \
                    tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.stem, disable=None) as bar:
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
    return f"the connection ended after {size} of {total} bytes" if total is not None and size < total else ""


# --- reading ----------------------------------------------------------------------------------------------------------
def read_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) for each row of a .jsonl file, plain, .gz or within a .zip, or of a .parquet file."""
    path = Path(path)
    try:
        if path.suffix == ".parquet":
            yield from read_parquet(path)
        elif path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                members = [n for n in archive.namelist() if n.endswith(".jsonl") and "__MACOSX" not in n]
                if not members:
                    raise InputError(f"{path}: no .jsonl file in it")
                for member in members:
                    with archive.open(member) as file:
                        yield from _read_lines(file, f"{path}/{Path(member).name}")
        else:
            with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
                yield from _read_lines(file, str(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: cannot be read: {_short(error, 100)}") from None


def _read_lines(file: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"), object_pairs_hook=_Object)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{name}:{number}: broken JSON: {_short(error, 100)}") from None
        if not isinstance(row, dict):
            raise InputError(f"{name}:{number}: not a JSON object but {type(row).__name__}")
        if row.twice:
            raise InputError(f"{name}:{number}: {_short(row.twice[0])}: stands twice in the row")
        yield f"{name}:{number}", row


def read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read as Parquet: {'no such file' if not path.exists() else _short(error, 100)}") from None


def read_csv(path: str | Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of a CSV file; its delimiter is the comma, semicolon or tab that its first line holds most of."""
    csv.field_size_limit(1 << 30)  # Python's own limit, 131,072 characters, is less than a long text
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
        first = text[: text.find("\n") + 1] or text
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=max(",;\t", key=first.count))
        rows = list(reader)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read as CSV: byte {error.start + 1} is not UTF-8; save the sheet as 'CSV UTF-8'") from None
    except (OSError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as CSV: {_short(error, 100)}") from None
    columns = list(reader.fieldnames or ())
    for line, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise InputError(f"{path}: row {line}: {'more' if None in row else 'fewer'} fields than columns")
    return columns, rows


def read_table(path: str, split: str = "train") -> tuple[list[str], Iterator[tuple[str, dict[str, Any]]]]:
    """Columns and (where, row) of a table: .csv, .tsv, .xlsx, .parquet, .jsonl, a datasets folder or a hub id."""
    kind = Path(path).suffix.lower()
    if kind in (".csv", ".tsv", ".txt"):
        columns, rows = read_csv(path)
        if twice := sorted({c for c in columns if columns.count(c) > 1}):
            raise InputError(f"{path}: column '{_short(twice[0])}' stands there twice")
        return columns, ((f"{path}: row {n}", row) for n, row in enumerate(rows, 2))
    if kind in (".xlsx", ".xls", ".ods"):
        return _read_excel(path)
    if kind in (".parquet", ".jsonl", ".zip") or path.lower().endswith(".jsonl.gz"):
        rows = list(read_rows(path))
        return list(dict.fromkeys(column for _, row in rows for column in row)), iter(rows)
    if Path(path).is_file():
        raise InputError(f"{path}: is not a table that can be read: CSV, Excel, Parquet and .jsonl can")
    if not Path(path).is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):  # a hub id is OWNER/NAME
        raise InputError(f"{path}: no such file")
    return _read_datasets(path, split)


def _read_excel(path: str) -> tuple[list[str], Iterator[tuple[str, dict[str, Any]]]]:
    try:
        import pandas
    except ImportError:
        raise InputError(f"{path}: reading Excel needs pandas: pip install pandas openpyxl, or save the sheet as CSV") from None
    try:
        table = pandas.read_excel(path, keep_default_na=False, dtype=object)
    except ImportError as error:
        raise InputError(f"{path}: {_short(error, 100)} (or save the sheet as CSV)") from None
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # a damaged workbook fails in many ways
        raise InputError(f"{path}: cannot be read as Excel: {_short(error, 100)}") from None
    columns = [str(column) for column in table.columns]
    rows = [dict(zip(columns, values, strict=True)) for values in table.itertuples(index=False, name=None)]
    return columns, ((f"{path}: row {n}", row) for n, row in enumerate(rows, 2))


def _read_datasets(path: str, split: str) -> tuple[list[str], Iterator[tuple[str, dict[str, Any]]]]:
    try:
        import datasets
    except ImportError:
        raise InputError(f"{path}: reading it needs datasets: pip install datasets") from None
    try:
        saved = Path(path, "state.json").exists() or Path(path, "dataset_dict.json").exists()
        table = datasets.load_from_disk(path) if saved else datasets.load_dataset(path)
    except Exception as error:  # the hub, its cache and its many file formats each raise their own
        raise InputError(f"{path}: no file here, and not to be had as a Hugging Face data set: {_short(error, 150)}") from None
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise InputError(f"{path}: hub_split: there is no '{split}'; there are {', '.join(table)}")
        table = table[split]
    named = {column: kind for column, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)}

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        for number, row in enumerate(table, 1):
            names = {c: kind.int2str(row[c]) for c, kind in named.items() if row[c] is not None and row[c] >= 0}
            yield f"{path}: row {number}", row | names

    return table.column_names, rows()
