"""Judge texts with a trained judge, from the command line: a spreadsheet, a file of any size, or a pipe.

    python recipes/judge.py --run runs/first --items new.csv --out judged.csv
    python recipes/judge.py --run runs/first --items in.jsonl --out out.jsonl
    cat in.jsonl | python recipes/judge.py --run runs/first --items - --out - | ...
    python recipes/judge.py --run runs/first --items five.jsonl --out five.out.jsonl --figure five.png

A table (CSV, TSV, Excel, Parquet) gets its prompts from the template that the judge was trained with, in
card.json of --run, or that you name with --template and --text. Without one they stand in its column
"prompt". A line of JSON needs a "prompt", or the template's columns; "swap" gives a pair in the other order,
{"prompt": ..., "labels": {"a": "b", "b": "a"}}, and both are judged and averaged.

--out has the same rows and columns, or the lines without their prompt, and what the judge says: probabilities
of the labels, mode, mean, entropy, a set, label mass. recipes/README.md names each field ("Judging").

Called again, the command goes on where it stopped. The lines of --out (for a table: of OUT.part.jsonl) are
compared with the first rows of the input and kept; a last one that was cut is redone. A file that holds
anything else is left alone, and so are a table that is there already and a symbolic link.
"""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends quietly
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import distjudge
from distjudge import InputError, Judge, Swap, short

import torch

from recipes import sheets
from recipes.calibrate import label_sets
from recipes.sheets import Row, Template

OURS = {"predicted", "mode", "mean", "entropy", "credible_set", "conformal_set", "label_mass", "low_mass"}
OURS |= {"to_people", "flipped", "key"}
SHOW = 20  # no more items than this are shown as a table; a figure shows the first so many
WINDOW = 2048  # prompts read ahead at a time, which share what they have in common; sets the memory


@dataclasses.dataclass(kw_only=True)
class Settings:  # what recipes/judge_ray.py has too
    run: str
    """The run folder of a trained judge; or a model (folder, hub id), with --labels, as it is."""
    labels: tuple[str, ...] = ()
    """Labels, for a model that is no run folder."""
    spellings: tuple[str, ...] = ()
    """More spellings of a label, as LABEL=TEXT,TEXT, for a model that is no run folder."""
    four_bit: bool = False
    """Load a model that is no run folder in 4 bits."""
    pack_tokens: int = 0
    """Tokens a forward pass, at most. 0: 1,024 on a CPU, 8,192 on CUDA."""
    min_mass: float = 0.5
    """Items whose label mass is less are flagged: the model would rather say something else than a label."""
    level: float = 0.9
    """Probability that a credible or conformal set holds at least."""
    route: float = 0.0
    """Mark about this share of items for people: where the entropy is as high as it was on that share of the
    items that the judge was calibrated on."""
    skip_bad: bool = False
    """Report rows that cannot be judged and go on, instead of stopping at the first."""

    def check(self) -> None:
        shares = (self.level, self.min_mass, self.route)
        if not all(0 <= share <= 1 for share in shares) or not self.level or self.pack_tokens < 0:
            more = "route and min_mass between 0 and 1, pack_tokens 0 or more"
            raise InputError(f"level must be above 0 and at most 1, {more}")


@dataclasses.dataclass(kw_only=True)
class JudgeConfig(Settings):
    items: str
    """What to judge: a table (CSV, TSV, Excel, Parquet), JSON lines, .gz too, or - for the standard input."""
    out: str = "-"
    """Where the judgments go: a .csv, .tsv, .xlsx or .parquet table, .jsonl, or - for the standard output."""
    template: str = ""
    """A file with the prompt and {columns} in it. Default: the template that the judge was trained with."""
    text: str = ""
    """The column for {text} in the template; without a template its cells are the prompts."""
    item: str = ""
    """The column with the id of each row."""
    sheet: str = ""
    """Which sheet of an Excel file. Default: the first."""
    figure: str = ""
    """Draw bars of the first 20 items into this file (.png, .svg, .pdf)."""


class Tally:
    """Counts output rows and bad ones, and keeps the first rows to show."""

    def __init__(self, config: Settings):
        self.config, self.first, self.number = config, [], collections.Counter()
        self.prompts: list[str] = []  # those of self.first
        self.problems: dict[str, dict] = {}  # the table cells of rows that were skipped, by where they stand

    def add(self, row: dict[str, Any]) -> None:
        number = {name: int(row.get(name, False)) for name in ("low_mass", "flipped", "to_people")}
        self.number.update(number, items=1, pairs=int("flipped" in row))
        self.first += [row] if len(self.first) < SHOW else []

    def bad(self, problem: str, where: str = "") -> None:
        if not self.config.skip_bad:
            raise InputError(f"{problem} (--skip_bad goes on without such rows)")
        print(f"skipped: {problem}", file=sys.stderr)
        self.number["bad"] += 1
        self.problems[where] = {"judge_problem": problem.removeprefix(f"{where}: ")}

    def summary(self) -> list[str]:
        number, of = self.number, f"of {self.number['items']}"
        said = {
            "bad": f"skipped {number['bad']} bad rows",
            "to_people": f"{number['to_people']} {of} are for people to look at",
            "low_mass": f"{number['low_mass']} {of} have a label mass under {self.config.min_mass:g}",
            "pairs": f"the verdict flips with the order in {number['flipped']} of {number['pairs']} pairs",
        }
        return [words for name, words in said.items() if number[name]]


@dataclasses.dataclass(frozen=True)
class Ask:
    """A row to be judged."""

    where: str
    fields: dict[str, Any]
    prompt: str
    swap: Swap | None = None

    @property
    def prompts(self) -> dict[str, str]:
        return {"prompt": self.prompt} | ({"swap": self.swap.prompt} if self.swap else {})


class Judging:
    """A judge at work: rows become Asks, Asks become output rows."""

    def __init__(self, config: Settings):
        import transformers

        transformers.utils.logging.disable_progress_bar()  # of loading weights; judging has its own
        given = [name for name in ("spellings", "four_bit") if getattr(config, name)]
        if given and (Path(config.run) / "judge.json").is_file():
            raise InputError(f"{given[0]}: a run folder has its own")
        spellings, labels = distjudge.parse_spellings(config.spellings), config.labels or None
        self.judge = distjudge.load_judge(config.run, labels, spellings=spellings, four_bit=config.four_bit)
        self.judge.pack_tokens = config.pack_tokens or self.judge.pack_tokens
        fitted = self.judge.calibration
        if config.route and not fitted:
            raise InputError(f"route: {config.run} is not calibrated; recipes/calibrate.py does that")
        self.route = config.route and fitted["entropies"][round(100 * (1 - config.route))]
        self.hash = judge_hash(self.judge, config.min_mass, config.level, config.route, fitted)
        self.config = config

    def ask(self, row: dict[str, Any], where: str, filled: dict[str, Any] | None = None) -> Ask:
        """The row as an Ask. InputError, in a line, for what is wrong with it; votes may be missing.

        filled: id, prompt and swap as Template.fill() makes them; then no field of the row means anything.
        """
        parsed, problems = distjudge.parse_row(filled or row, votes=False)
        swap, ours = None, OURS | ({"id"} if filled else {"id", "prompt", "swap"})
        if parsed["swap"]:
            try:
                swap = distjudge.place_swap(*parsed["swap"], self.judge.labels)
            except ValueError as error:
                problems.append(("swap", str(error)))
        fields = {"id": parsed["id"]} | {name: value for name, value in row.items() if name not in ours}
        if not problems:
            ask = Ask(where, fields, parsed["prompt"], swap)
            problems = [(name, wrong) for name, text in ask.prompts.items() if (wrong := self.too_long(text))]
        if not problems:
            return ask
        named = f"item '{short(parsed['id'])}': " if parsed["id"] else ""
        raise InputError(f"{where}: {named}" + "; ".join(f"{field}: {wrong}" for field, wrong in problems))

    def too_long(self, prompt: str) -> str:
        """What is wrong with a prompt's length, "" for nothing."""
        try:
            length = len(self.judge.encoder(prompt))
        except InputError as error:
            return str(error)
        most = self.judge.max_length
        return f"{length} tokens, more than the judge's max_length {most}" if length > most else ""

    def read(
        self, rows: Iterable[Row], tally: Tally, form: Template | None, table: bool, item: str = ""
    ) -> Iterator[Ask]:
        """The rows as Asks. Bad ones go to the tally. item: of JSON lines, the field that is the id."""
        if item:
            import tables  # slow, as is all of data/

        for where, row, problem in rows:
            try:
                if item and not problem:
                    row |= {"id": tables.cell(where, item, row.get(item))}
                    problem = "" if row["id"] else f"{item}: missing or empty, and --item names it"
                if problem:
                    raise InputError(f"{where}: {problem}")
                ask = self.ask(row, where, form and form.filled(where, row, table))
            except InputError as error:
                tally.bad(str(error), where)
                continue
            tally.prompts += [ask.prompt] if len(tally.prompts) < SHOW else []
            yield ask

    def answers(self, asks: Iterable[Ask]) -> Iterator[dict[str, Any]]:
        """Output rows in the asks' order, WINDOW prompts read ahead. Their InputError is raised last."""
        waiting: collections.deque[Ask] = collections.deque()
        stopped = []

        def prompts() -> Iterator[str]:
            try:
                for ask in asks:
                    waiting.append(ask)
                    yield from ask.prompts.values()
            except InputError as error:
                stopped.append(error)

        judged = self.judge.stream(prompts(), sys.stderr.isatty(), WINDOW)
        for logq, mass in judged:
            ask, q, flipped = waiting.popleft(), logq.exp(), None
            if ask.swap:
                other, other_mass = next(judged)
                q, flipped = distjudge.average_orders(q, other.exp(), ask.swap.labels)
                mass = (mass + other_mass) / 2
            yield ask.fields | self.describe(q, mass, flipped) | {"key": self.key(ask)}
        for error in stopped:
            raise error

    def describe(self, q: torch.Tensor, mass: float, flipped: bool | None) -> dict[str, Any]:
        """What an output line says about a prediction (C,); numbers have the seven digits of float32."""
        digits = lambda x: float(f"{float(x):.7g}")  # noqa: E731
        labels, q, entropy = self.judge.labels, q[None], distjudge.entropy(q).item()
        row: dict[str, Any] = {
            "predicted": {label: digits(x) for label, x in zip(labels, q[0], strict=True)},
            "mode": labels[q.argmax()],
            "entropy": digits(entropy),
            "label_mass": digits(mass),
        }
        limits = (self.judge.calibration or {}).get("conformal", ())
        (held,) = label_sets(q, labels, self.config.level, limits)
        row["conformal_set" if limits else "credible_set"] = held
        row |= {"to_people": entropy >= self.route} if self.config.route else {}
        if distjudge.are_numeric(labels):
            pairs = zip(map(float, labels), q[0].tolist(), strict=True)
            row["mean"] = digits(sum(rating * x for rating, x in pairs))
        row |= {"low_mass": True} if mass < self.config.min_mass else {}
        return row | ({"flipped": flipped} if flipped is not None else {})

    def key(self, ask: Ask) -> str:
        swap = ask.swap and [ask.swap.prompt, ask.swap.labels]
        asked = json.dumps([self.hash, ask.fields["id"], ask.prompt, swap])
        return hashlib.sha256(asked.encode()).hexdigest()[:16]

    def resume(self, out: Path, asks: Iterator[Ask], tally: Tally) -> Iterator[Ask]:
        """The asks without those a file holds judgments of, which are counted; a cut last line is cut off.

        Raises InputError for another line that is not what this judge said of its input with these settings.
        A cut line counts as one if it begins as its judgment would, behind a whole one.
        """
        end = 0
        with open(out, "r+b") as file:
            for number, raw in enumerate(file, 1):
                ask, (row, _) = next(asks, None), distjudge.parse_json(raw)
                good = ask is not None and row.get("key") == self.key(ask)
                if ask and not raw.endswith(b"\n"):
                    begins = line_of(ask.fields).encode(errors="backslashreplace")[:-2] + b', "predicted": {'
                    if good or (end and raw[: len(begins)] == begins[: len(raw)]):
                        file.truncate(end)
                        return itertools.chain([ask], asks)
                if not good:
                    what = f"is not the judgment of {ask.where if ask else 'any input'}"
                    by = "by this judge with these settings (--level, --min_mass, --route, template, ids)"
                    raise InputError(f"{out}:{number}: {what} {by}; name another --out, or remove the file")
                end += len(raw)
                tally.add(row)
        return asks


def judge_hash(judge: Judge, *settings: Any) -> str:
    """A hash of what decides a judgment: labels, tokens, template, a sample of every weight, settings."""
    about = [judge.labels, judge.tokens.sequences, judge.encoder.frame, settings]
    digest = hashlib.sha256(json.dumps(about).encode())
    for name, weight in judge.model.named_parameters():
        sample = weight.detach().flatten()[:64].cpu().contiguous().view(torch.uint8)
        digest.update(name.encode() + bytes(sample.tolist()))
    return digest.hexdigest()


def draw(tally: Tally, labels: Sequence[str], path: str) -> None:
    """Bars of the predictions, and of the votes beside them where an item has counts of these labels."""
    from plots import figures

    rows, wide, items = tally.first, min(4, len(tally.first)), []
    for row, prompt in zip(rows, tally.prompts, strict=False):
        counts = row.get("counts")
        known = isinstance(counts, dict) and set(counts) <= set(labels)
        votes = {label: (counts.get(label) or 0) if known else 0 for label in labels}
        items.append(distjudge.Item(row["id"], prompt, votes))
    q = torch.tensor([list(row["predicted"].values()) for row in rows], dtype=torch.float64)
    run = figures.Run(items, q)
    size = {"figsize": (2.4 * wide, 2.1 * -(-len(rows) // wide)), "squeeze": False, "sharey": True}
    figure, axes = figures.plt.subplots(-(-len(rows) // wide), wide, **size)
    for i, ax in enumerate(axes.flat):
        figures.draw_item(ax, run, i, {"judge": q}, "") if i < len(rows) else ax.remove()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower right", ncols=2, frameon=False)
    figure.savefig(path)
    figures.plt.close(figure)


def find_run(config: Settings) -> None:
    """Raises InputError, with the judges there are, if --run is no trained judge and no labels are given."""
    folder, found = Path(config.run), set()
    about = folder / "config.json"  # of a model, or of a run
    is_model = about.is_file() and "model_type" in distjudge.read_json(about)
    if config.labels or is_model or (folder / "judge.json").is_file():
        return
    near = next(place for place in folder.absolute().parents if place.exists())
    for place in {Path(os.path.relpath(near)), Path("runs")}:
        found |= {str(path.parent) for form in ("*", "*/*") for path in place.glob(f"{form}/judge.json")}
    there = ", ".join(sorted(found)[:5]) + ", ..." * (len(found) > 5) or "none; train one first"
    what = "no judge in this folder" if folder.exists() else "no such folder"
    what += "; its training was stopped, --resume goes on" if (folder / "checkpoints").is_dir() else ""
    raise InputError(f"{config.run}: {what}; judges here: {there} (a model that is no judge needs --labels)")


def refuse_ours(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows; a problem for a field that judging would replace, unless the line is a judgment itself."""
    for where, row, problem in rows:
        if "predicted" not in row and (clash := OURS & set(row)):
            problem = f"{min(clash)}: judging adds a field of this name; rename yours"
        yield where, row, problem


def line_of(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, default=str) + "\n"


def check(config: JudgeConfig, out: Path | None, journal: Path | None) -> None:
    """Raises InputError for settings that cannot be, and for an --out that is not ours to write."""
    config.check()
    find_run(config)
    if (config.items == "-" and sys.stdin is None) or (not out and sys.stdout is None):
        raise InputError("the standard input or output, named as -, is closed")
    if config.items != "-" and not Path(config.items).exists():
        raise InputError(f"{config.items}: no such file")
    if config.figure and Path(config.figure).suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"figure: {config.figure}: must end with .png, .svg or .pdf")
    if config.figure and not Path(config.figure).parent.is_dir():
        raise InputError(f"figure: {config.figure}: its folder is not there")
    for path in filter(None, {out, journal}):
        if path.is_symlink() and (path.is_file() or not path.exists()):
            raise InputError(f"out: {path}: is a symbolic link; name the file itself")
        if path.is_dir():
            raise InputError(f"out: {path}: is a folder; name a file in it")
        if config.items != "-" and path.exists() and path.samefile(config.items):
            raise InputError("out: is the file of the items")
    if out != journal and out.exists():
        raise InputError(f"out: {out}: is there already and is left as it is; remove it, or name another")
    if out and out == journal and out.suffix != ".jsonl" and (out.is_file() or not out.exists()):
        raise InputError(f"out: {out}: must end with .jsonl, {', '.join(sheets.SUFFIXES)}, or be -")


def judge_all(config: JudgeConfig, out: Path | None, journal: Path | None) -> None:
    """Judges what is not judged yet. journal: the file of JSON lines: `out`, or a table's beside it."""
    tally = Tally(config)
    template = sheets.template_of(config.run, config.template, config.text, config.item)
    wanted = ["prompt", *(template or sheets.Template()).columns(()), *filter(None, [config.item])]
    columns, rows = sheets.rows_of(config.items, config.sheet or None, wanted)
    if columns:
        template = sheets.for_columns(template, config.items, columns, config.item)
        if out == journal and (clash := OURS & set(columns)):
            raise InputError(f"{config.items}: column '{min(clash)}': judging adds a field of this name")
        told = f"'{short(template.template, 80)}' with {distjudge.listed(template.columns(columns))}"
        print(f"prompts: {told}", file=sys.stderr)
    work = Judging(config)
    labels, is_table = work.judge.labels, out != journal
    if is_table:
        rows = list(rows)
        frame = sheets.frame_of(rows, out, sheets.added(collections.defaultdict(dict), labels))
    elif not columns:  # those of a table were looked at
        rows = refuse_ours(rows)
    asks = work.read(rows, tally, template, bool(columns), "" if columns else config.item)
    if is_table:
        asks = (dataclasses.replace(ask, fields={"id": ask.fields["id"]}) for ask in asks)
    if journal and journal.is_file():
        asks = work.resume(journal, asks, tally)
    kept = tally.number["items"]
    text = {"encoding": "utf-8", "errors": "backslashreplace"}  # a lone surrogate, as JSON writes it
    if not out:
        sys.stdout.reconfigure(**text)
    with open(journal, "a", newline="\n", **text) if out else contextlib.nullcontext(sys.stdout) as file:
        for row in work.answers(asks):
            tally.add(row)
            file.write(line_of(row))
            file.flush()
    if not (items := tally.number["items"]):
        if journal and journal.is_file():  # no pipe, and no device
            journal.unlink()
        why = f"none of its {bad} rows can be judged" if (bad := tally.number["bad"]) else "no items"
        raise InputError(f"{config.items}: {why}")
    if is_table:
        with open(journal, encoding="utf-8", newline="\n") as file:  # a line for each row but the bad ones
            bad = tally.problems
            cells = [bad.get(at) or sheets.added(json.loads(next(file)), labels) for at, *_ in rows]
        form = sheets.csv_form(config.items, columns, out.suffix.lower())
        sheets.write_table(frame, cells, out, form)
        journal.unlink()
    if items <= SHOW:
        print(sheets.shown(tally.first, labels), file=sys.stdout if out else sys.stderr)
    if config.figure:
        draw(tally, labels, config.figure)
    said = [f"judged {items - kept} items"] + [f"kept {kept} judged before"] * bool(kept)
    print("; ".join(said + tally.summary()), file=sys.stderr)


def main(config: JudgeConfig) -> None:
    out = None if config.out == "-" else Path(config.out)
    is_table = out and out.suffix.lower() in sheets.SUFFIXES
    journal = out.with_name(out.name + ".part.jsonl") if is_table else out
    try:
        check(config, out, journal)
        if is_file := out and (out.is_file() or not out.exists()):
            out.parent.mkdir(parents=True, exist_ok=True)
        with distjudge.locked(out) if is_file else contextlib.nullcontext():
            judge_all(config, out, journal)
    except KeyboardInterrupt:
        more = f"; what {journal} holds is kept, and the same command goes on" if out else ""
        raise distjudge.Stopped(f"stopped{more}", signal.SIGINT) from None


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    distjudge.cli(main, JudgeConfig)
