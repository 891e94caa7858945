"""Judge many items on many processes or machines, with Ray Data. Needs: pip install "ray[data]"

    python recipes/judge_ray.py --run runs/first --items in.jsonl --out out.jsonl --judges 2
    python recipes/judge_ray.py --run /nfs/runs/first --items s3://bucket/in.parquet --out out.parquet --judges 16 --gpus 1 --address auto

Reads JSON lines or Parquet (files or folders; columns as recipes/judge.py's fields), gives blocks of rows to --judges actors that each hold
the judge, and writes the lines of recipes/judge.py in the order of the input, as JSON lines or Parquet (by the name of --out). A block
whose worker dies is judged again elsewhere; its rows are written once, and --out appears when it is whole. On a cluster the run
folder (and its base model) must be readable at the same path on every machine; the code is sent along.
"""
import collections
import contextlib
import dataclasses
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]

import distjudge
from distjudge import InputError


@dataclasses.dataclass
class RayConfig:
    run: str
    """The run folder of a trained judge; or a model (folder, hub id), with --labels, as it is."""
    items: tuple[str, ...]
    """What to judge: .jsonl, .jsonl.gz or .parquet files, or folders of them, anything that Ray can read."""
    out: str
    """A .jsonl or .parquet file, which is replaced."""
    judges: int = 1
    """Actors, each of which holds the judge."""
    cpus: float = 1
    """CPUs for each of them."""
    gpus: float = 0
    """GPUs for each of them; a fraction lets several share one."""
    address: str = ""
    """The Ray cluster (auto: the one of this machine). Default: Ray is started here, for this run."""
    batch_size: int = 256
    """Rows an actor gets at a time; those of one batch share what they have in common. A worker that dies costs as much work."""
    blocks: int = 0
    """Blocks the input is divided into at least; 0 lets Ray choose. Set it where few large files would leave judges idle."""
    skip_bad: bool = False
    """Report rows that cannot be judged and go on, instead of stopping at the first."""
    min_mass: float = 0.5
    """Items whose label mass is less are flagged."""
    level: float = 0.9
    """Probability that a credible set holds at least."""
    labels: tuple[str, ...] = ()
    """Labels, for a model that is no run folder."""
    spellings: tuple[str, ...] = ()
    """More spellings of a label, as LABEL=TEXT,TEXT, for a model that is no run folder."""
    four_bit: bool = False
    """Load a model that is no run folder in 4 bits."""
    pack_tokens: int = 0
    """Tokens a forward pass, at most. 0: 1,024 on a CPU, 8,192 on CUDA."""


class Judging:
    """The actor: loads the judge once; a batch of rows in, a batch of output lines (or of what is wrong) out."""

    def __init__(self, settings: dict[str, Any]):
        sys.path[:0] = [os.getcwd(), os.path.join(os.getcwd(), "recipes")]  # where Ray unpacks the code on other machines
        import judge as recipe
        import torch

        self.config, self.recipe = RayConfig(**settings), recipe
        torch.set_num_threads(max(1, int(self.config.cpus)))
        self.judge = recipe.load(self.config)
        self.judged_by = recipe.judge_hash(self.judge, self.config.min_mass, self.config.level)

    def __call__(self, batch: Any) -> Any:
        import pyarrow

        rows, asks = batch.to_pylist(), []
        found: list[tuple[str, str]] = [("", "")] * len(rows)
        for i, row in enumerate(rows):
            asked = self._ask(row)
            if isinstance(asked, str):
                found[i] = ("", asked)
            elif asked:
                asks.append(dataclasses.replace(asked, where=str(i)))
        for ask, q, mass, flipped in self.recipe.judge_asks(self.judge, asks):
            said = self.recipe.describe(q, self.judge.labels, mass, flipped, self.config.min_mass, self.config.level)
            line = self.recipe.line_of(ask.fields | said | {"key": self.recipe.key_of(ask, self.judged_by)})
            found[int(ask.where)] = (line, "")
        found = [pair for pair in found if pair != ("", "")]  # blank lines
        return pyarrow.table({"line": pyarrow.array([line for line, _ in found], pyarrow.string()),
                              "problem": pyarrow.array([problem for _, problem in found], pyarrow.string())})

    def _ask(self, row: dict[str, Any]) -> Any:
        """The row as recipes/judge.py's Ask, None for a blank line, or what is wrong with it."""
        where = row.pop("path", None) or "input"
        if "text" in row and set(row) == {"text"}:
            if not row["text"].strip():
                return None
            try:
                row = json.loads(row["text"], object_pairs_hook=distjudge._Object)
            except (ValueError, RecursionError) as error:
                return f"{where}: '{distjudge.short(row['text'], 40)}': broken JSON: {distjudge.short(error, 100)}"
            if not isinstance(row, dict):
                return f"{where}: not a JSON object but {type(row).__name__}"
        else:
            row = without_nulls(row)
        ask, problems = self.recipe.check_row(row, self.judge.labels)
        if ask:
            problems = self.recipe.prompt_problems(ask, self.recipe.too_long(self.judge))
        if problems:
            name = distjudge.short(ask.fields["id"] if ask else row.get("id") or row.get("prompt") or "")
            return f"{where}: item '{name}': " + "; ".join(f"{field}: {text}" for field, text in problems)
        return ask


def without_nulls(value: Any) -> Any:
    """A row of Parquet without what a column of structs holds for keys that the row does not have."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return value


def read(config: RayConfig, ray: Any) -> Any:
    """The rows as a Ray Dataset: Parquet by column, JSON lines as text, which the actors parse."""
    kinds = {"parquet" if path.endswith((".parquet", ".pq")) else "jsonl" for path in config.items}
    paths, settings = list(config.items), {"include_paths": True, "override_num_blocks": config.blocks or None}
    if len(kinds) != 1:
        raise InputError("items: JSON lines and Parquet cannot be mixed")
    try:
        if kinds == {"parquet"} or all(Path(path).is_dir() and any(Path(path).rglob("*.parquet")) for path in paths):
            return ray.data.read_parquet(paths, **settings)
        return ray.data.read_text(paths, drop_empty_lines=True, **settings)
    except FileNotFoundError as error:
        raise InputError(f"items: {distjudge.first_line(error)}") from None


class Writer:
    """Writes output lines to a .jsonl or .parquet file under a temporary name."""

    def __init__(self, path: Path):
        self.path, self.part, self.table = path, path.with_name(path.name + ".part"), None
        path.parent.mkdir(parents=True, exist_ok=True)
        self.text = None if path.suffix == ".parquet" else open(self.part, "w", encoding="utf-8", newline="\n")

    def write(self, lines: list[str]) -> None:
        if self.text:
            self.text.writelines(lines)
            return
        import pyarrow
        import pyarrow.parquet

        rows = [json.loads(line) for line in lines]
        ours = ("id", "predicted", "mode", "mean", "entropy", "credible_set", "label_mass", "key")
        table = [{name: row[name] for name in ours if name in row}
                 | {"low_mass": row.get("low_mass", False), "flipped": row.get("flipped"),
                    "fields": json.dumps({k: v for k, v in row.items() if k not in (*ours, "low_mass", "flipped")})} for row in rows]
        if self.table is None:  # the schema from the first row; `flipped` may be empty in it
            known = pyarrow.Table.from_pylist(table[:1]).schema
            at = known.get_field_index("flipped")
            self.table = pyarrow.parquet.ParquetWriter(self.part, known.set(at, pyarrow.field("flipped", pyarrow.bool_())))
        self.table.write_table(pyarrow.Table.from_pylist(table, schema=self.table.schema))

    def close(self, whole: bool) -> None:
        for file in (self.text, self.table):
            if file is not None:
                file.close()
        if whole:
            self.part.replace(self.path)
        else:
            self.part.unlink(missing_ok=True)


def main(config: RayConfig) -> None:
    try:
        import ray
    except ImportError:
        raise InputError('recipes/judge_ray.py needs Ray Data: pip install "ray[data]"') from None
    if Path(config.out).suffix not in (".jsonl", ".parquet"):
        raise InputError(f"out: must end with .jsonl or .parquet, not '{config.out}'")
    if config.judges < 1 or config.batch_size < 1 or config.blocks < 0 or config.cpus < 0 or config.gpus < 0:
        raise InputError("judges and batch_size must be 1 or more, blocks, cpus and gpus 0 or more")
    if not 0 < config.level <= 1 or not 0 <= config.min_mass <= 1:
        raise InputError("level must be above 0 and at most 1, min_mass between 0 and 1")
    settings = dataclasses.asdict(config)
    if Path(config.run).is_dir():
        settings["run"] = str(Path(config.run).resolve())
    if config.address:  # `votes`, `runs` and the like stay here
        ray.init(address=config.address, runtime_env={"working_dir": str(ROOT), "excludes": ["runs", "votes", ".git", ".venv", "tests"]})
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        need = max(int(config.judges * config.cpus + 1.999), os.cpu_count() or 1)  # a judge each, and one to read
        ray.init(num_cpus=need, include_dashboard=False, logging_level="ERROR",
                 runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "recipes")])}})
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = sys.stderr.isatty()
    tally: collections.Counter[str] = collections.Counter()
    writer, began, whole = Writer(Path(config.out)), time.perf_counter(), False
    first = began
    try:
        judged = read(config, ray).map_batches(
            Judging, fn_constructor_args=(settings,), batch_size=config.batch_size, batch_format="pyarrow", num_cpus=config.cpus,
            num_gpus=config.gpus, compute=ray.data.ActorPoolStrategy(size=config.judges))
        for batch in judged.iter_batches(batch_size=None, batch_format="pyarrow"):
            first = time.perf_counter() if not tally else first
            for problem in filter(None, batch["problem"].to_pylist()):
                if not config.skip_bad:
                    raise InputError(problem)
                print(f"skipped: {problem}", file=sys.stderr)
                tally["problems"] += 1
            lines = [line for line in batch["line"].to_pylist() if line]
            if lines:
                writer.write(lines)
            rows = [json.loads(line) for line in lines]
            tally.update(items=len(rows), batches=1, low=sum(row.get("low_mass", False) for row in rows),
                         pairs=sum("flipped" in row for row in rows), flipped=sum(bool(row.get("flipped")) for row in rows))
        whole = tally["items"] > 0
    except ray.exceptions.RayError as error:  # what went wrong in an actor, without its traceback
        last = [line for line in str(error).splitlines() if line.strip()][-1]
        raise InputError(f"{config.run}: {distjudge.short(last, 300)}") from None
    finally:
        with contextlib.suppress(OSError):
            writer.close(whole)
        ray.shutdown()
    if not whole:
        raise InputError(f"{', '.join(config.items)}: no items")
    took, after_first = time.perf_counter() - began, time.perf_counter() - first
    words = [f"judged {tally['items']} items with {config.judges} judges in {took:.1f} s, start included, {after_first:.1f} s of them "
             "after the first batch"]
    words += [f"skipped {tally['problems']} bad rows"] * bool(tally["problems"])
    words += [f"{tally['low']} have a label mass under {config.min_mass:g}"] * bool(tally["low"])
    words += [f"the verdict flips with the order in {tally['flipped']} of {tally['pairs']} pairs"] * bool(tally["pairs"])
    print("; ".join(words), file=sys.stderr)


if __name__ == "__main__":
    distjudge.cli(main, RayConfig)
