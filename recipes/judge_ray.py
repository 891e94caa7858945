"""Judge many items on many processes or machines, with Ray Data.

    pip install "ray[data]"
    python recipes/judge_ray.py --run runs/first --items in.jsonl --out out.jsonl --judges 2
    python recipes/judge_ray.py --run /nfs/first --items s3://b/in.parquet --out out.parquet --judges 16 \\
        --gpus 1 --address auto

Reads JSON lines or Parquet (files or folders; columns as the fields of recipes/judge.py). Blocks of rows go
to --judges actors that each hold the judge. The lines of recipes/judge.py are written in the order of the
input, as JSON lines or Parquet (by the name of --out). A block whose worker dies is judged again elsewhere;
its rows are written once, and --out appears when it is whole. On a cluster the run folder and its base
model must be readable at the same path on every machine; the code is sent along.
"""

import contextlib
import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import distjudge
from distjudge import InputError

from recipes import judge, sheets


@dataclasses.dataclass(kw_only=True)
class RayConfig(judge.Settings):
    items: tuple[str, ...]
    """What to judge: .jsonl, .jsonl.gz or .parquet files, or folders of them, anything that Ray can read."""
    out: str
    """A .jsonl or .parquet file, which is replaced."""
    judges: int = 1
    """Actors, each of which holds the judge."""
    gpus: float = 0
    """GPUs for each of them, beside one CPU; a fraction lets several share one."""
    address: str = ""
    """The Ray cluster (auto: the one of this machine). Default: Ray is started here, for this run."""
    batch_size: int = 256
    """Rows an actor gets at a time, which share what they have in common. Also what a dead worker costs."""
    blocks: int = 0
    """Blocks the input is divided into at least; 0: Ray chooses. For few, large files."""


class Actor:
    """Loads the judge once. A batch of rows in, a batch of output lines (or of what is wrong) out."""

    def __init__(self, config: RayConfig, lines: bool):
        import torch

        torch.set_num_threads(1)
        self.work, self.form, self.lines = judge.Judging(config), sheets.template_of(config.run), lines

    def __call__(self, batch: Any) -> Any:
        import pyarrow

        asks = [self.ask(row) for row in batch.to_pylist() if not self.lines or row["text"].strip()]
        answers = self.work.answers(ask for ask in asks if isinstance(ask, judge.Ask))
        found = [("", ask) if isinstance(ask, str) else (json.dumps(next(answers)), "") for ask in asks]
        columns = {name: [row[k] for row in found] for k, name in enumerate(("line", "problem"))}
        return pyarrow.table(columns, schema=pyarrow.schema(dict.fromkeys(columns, pyarrow.string())))

    def ask(self, row: dict[str, Any]) -> judge.Ask | str:
        """The row as an Ask, or what is wrong with it."""
        where = row.pop("path", None) or "input"
        where += f": '{distjudge.short(row.get('text') or row.get('prompt'), 40)}'"
        row, problem = distjudge.parse_json(row["text"]) if self.lines else (without_nulls(row), "")
        try:
            ((where, row, problem),) = judge.refuse_ours([(where, row, problem)])
            if problem:
                return f"{where}: {problem}"
            return self.work.ask(row, where, self.form and self.form.filled(where, row, table=False))
        except InputError as error:
            return str(error)


def without_nulls(value: Any) -> Any:
    """A row of Parquet without what a column of structs holds for keys that the row does not have."""
    if not isinstance(value, dict):
        return value
    return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}


def are_lines(paths: Iterable[str]) -> bool:
    """Whether files or folders hold JSON lines, and not Parquet."""
    kinds = {path.endswith((".parquet", ".pq")) or any(Path(path).rglob("*.parquet")) for path in paths}
    if len(kinds) != 1:
        raise InputError("items: JSON lines and Parquet cannot be mixed")
    return kinds == {False}


def read(config: RayConfig, ray: Any, lines: bool) -> Any:
    """The rows as a Ray Dataset: Parquet by column, JSON lines as text, which the actors parse."""
    paths = list(config.items)
    settings = {"include_paths": True, "override_num_blocks": config.blocks or None}
    try:
        if not lines:
            return ray.data.read_parquet(paths, **settings)
        return ray.data.read_text(paths, drop_empty_lines=True, **settings)
    except FileNotFoundError as error:
        raise InputError(f"items: {distjudge.first_line(error)}") from None


class Writer:
    """Writes output rows to a .jsonl or .parquet file, under a temporary name until close(whole=True)."""

    def __init__(self, path: Path):
        self.path, self.part, self.file = path, path.with_name(path.name + ".part"), None
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, rows: list[dict[str, Any]]) -> None:
        if self.path.suffix == ".jsonl":
            if not self.file:
                self.file = open(self.part, "w", encoding="utf-8", errors="backslashreplace", newline="\n")
            self.file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            return
        import pyarrow
        import pyarrow.parquet

        ours, usual = judge.OURS | {"id"}, {"low_mass": False, "flipped": None}
        others = [{name: row[name] for name in row if name not in ours} for row in rows]
        rows = [usual | {name: row[name] for name in row if name in ours} for row in rows]
        rows = [row | {"fields": json.dumps(other)} for row, other in zip(rows, others, strict=True)]
        if not self.file:
            schema = pyarrow.Table.from_pylist([rows[0] | {"flipped": False}]).schema  # None has no type
            self.file = pyarrow.parquet.ParquetWriter(self.part, schema)
        self.file.write_table(pyarrow.Table.from_pylist(rows, self.file.schema))

    def close(self, whole: bool) -> None:
        if self.file:
            self.file.close()
        self.part.replace(self.path) if whole else self.part.unlink(missing_ok=True)


def start(config: RayConfig, ray: Any) -> None:
    """Connects to the cluster, or starts Ray here."""
    if config.address:
        kept = ["runs", "votes", ".git", ".venv", "tests"]  # these stay here
        ray.init(address=config.address, runtime_env={"working_dir": str(ROOT), "excludes": kept})
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        need = max(config.judges + 1, os.cpu_count() or 1)  # one to read
        path = {"env_vars": {"PYTHONPATH": str(ROOT)}}
        ray.init(num_cpus=need, include_dashboard=False, logging_level="ERROR", runtime_env=path)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = sys.stderr.isatty()


def main(config: RayConfig) -> None:
    try:
        import ray
    except ImportError:
        raise InputError('recipes/judge_ray.py needs Ray Data: pip install "ray[data]"') from None
    config.check()
    if not config.address:  # else the run folder may be elsewhere
        judge.find_run(config)
    if Path(config.out).suffix not in (".jsonl", ".parquet"):
        raise InputError(f"out: must end with .jsonl or .parquet, not '{config.out}'")
    if Path(config.out).resolve() in [Path(path).resolve() for path in config.items]:
        raise InputError("out: is the file of the items")
    if config.judges < 1 or config.batch_size < 1 or min(config.blocks, config.gpus) < 0:
        raise InputError("judges and batch_size must be 1 or more, blocks and gpus 0 or more")
    if Path(config.run).is_dir():
        config = dataclasses.replace(config, run=str(Path(config.run).resolve()))
    lines = are_lines(config.items)
    start(config, ray)
    tally, writer, first = judge.Tally(config), Writer(Path(config.out)), 0.0
    began, whole = time.perf_counter(), False
    try:
        pool = ray.data.ActorPoolStrategy(size=config.judges)
        needs = {"num_cpus": 1, "num_gpus": config.gpus, "compute": pool}
        needs |= {"batch_size": config.batch_size, "batch_format": "pyarrow"}
        judged = read(config, ray, lines).map_batches(Actor, fn_constructor_args=(config, lines), **needs)
        for batch in judged.iter_batches(batch_size=None, batch_format="pyarrow"):
            first = first or time.perf_counter()
            for problem in filter(None, batch["problem"].to_pylist()):
                tally.bad(problem)
            if rows := [json.loads(line) for line in batch["line"].to_pylist() if line]:
                writer.write(rows)
            for row in rows:
                tally.add(row)
        whole = tally.number["items"] > 0
    except ray.exceptions.RayError as error:  # what went wrong in an actor, without its traceback
        last = [line for line in str(error).splitlines() if line.strip()][-1]
        raise InputError(f"{config.run}: {distjudge.short(last, 300)}") from None
    finally:
        with contextlib.suppress(OSError):
            writer.close(whole)
        ray.shutdown()
    if not whole:
        raise InputError(f"{', '.join(config.items)}: no items")
    now = time.perf_counter()
    said = f"judged {tally.number['items']} items with {config.judges} judges in {now - began:.1f} s, "
    said += f"start included, {now - first:.1f} s of them after the first batch"
    print("; ".join([said, *tally.summary()]), file=sys.stderr)


if __name__ == "__main__":
    distjudge.cli(main, RayConfig)
