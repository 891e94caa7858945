"""Judge items with a trained judge, from the command line: files of any size, or a pipe.

    python recipes/judge.py --run runs/first --items in.jsonl --out out.jsonl
    cat in.jsonl | python recipes/judge.py --run runs/first --items - --out - | ...
    python recipes/judge.py --run runs/first --items five.jsonl --out five.out.jsonl --figure five.png

Each input line needs a "prompt". "id", votes and any other field pass through. An output line holds them,
without the prompt, and these, which replace fields of the same name:

    predicted       {label: probability}
    mode            the most probable label; mean: the mean rating, where the labels are numbers
    entropy         in nats
    credible_set    the smallest set of labels with --level of the probability
    label_mass      probability of all labels over the vocabulary; low_mass: true if it is under --min_mass
    flipped         whether the two orders of a pair have another verdict
    key             a hash of judge, settings and prompt, by which a later call knows the line

Lines keep the order of the input. Called again, the command goes on where it stopped: lines that --out holds
already are compared with the first lines of the input and kept. A last line that was cut is redone.

"swap" gives a pair in the other order: {"prompt": ..., "labels": {"a": "b", "b": "a"}}. "labels" maps a label
to the one that means the same there; those that keep it may be left out. Both are judged and averaged.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import distjudge
from distjudge import InputError, Judge, Swap

OURS = {"predicted", "mode", "mean", "entropy", "credible_set", "label_mass", "low_mass", "flipped", "key"}
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
    """Probability that a credible set holds at least."""
    skip_bad: bool = False
    """Report rows that cannot be judged and go on, instead of stopping at the first."""

    def check(self) -> None:
        if not 0 < self.level <= 1 or not 0 <= self.min_mass <= 1 or self.pack_tokens < 0:
            raise InputError(
                "level must be above 0 and at most 1, min_mass between 0 and 1, pack_tokens 0 or more"
            )


@dataclasses.dataclass(kw_only=True)
class JudgeConfig(Settings):
    items: str
    """What to judge: a .jsonl or .jsonl.gz file, or - for the standard input."""
    out: str = "-"
    """Where the judgments go: a file, which is continued if it holds some, or - for the standard output."""
    figure: str = ""
    """Draw bars of the first 20 items into this file (.png, .svg, .pdf)."""


class Tally:
    """Counts output rows and bad ones, and keeps the first rows to show."""

    def __init__(self, config: Settings):
        self.config, self.first, self.number = config, [], collections.Counter()

    def add(self, row: dict[str, Any]) -> None:
        pairs, flipped = "flipped" in row, row.get("flipped", False)
        self.number.update(items=1, low="low_mass" in row, pairs=pairs, flipped=flipped)
        self.first += [row] if len(self.first) < SHOW else []

    def bad(self, problem: str) -> None:
        if not self.config.skip_bad:
            raise InputError(problem)
        print(f"skipped: {problem}", file=sys.stderr)
        self.number["bad"] += 1

    def summary(self) -> list[str]:
        number = self.number
        said = {
            "bad": f"skipped {number['bad']} bad rows",
            "low": f"{number['low']} of {number['items']} have a label mass under {self.config.min_mass:g}",
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
        if config.spellings and (Path(config.run) / "judge.json").is_file():
            raise InputError("spellings: a run folder has its own")
        spellings, labels = distjudge.parse_spellings(config.spellings), config.labels or None
        self.judge = distjudge.load_judge(config.run, labels, spellings=spellings, four_bit=config.four_bit)
        self.judge.pack_tokens = config.pack_tokens or self.judge.pack_tokens
        self.config, self.hash = config, judge_hash(self.judge, config.min_mass, config.level)

    def ask(self, row: dict[str, Any], where: str) -> Ask | str:
        """The row as an Ask, or a line about what is wrong with it. Votes may be missing, but not wrong."""
        parsed, problems = distjudge.parse_row(row, votes=False)
        swap, ours = None, OURS | {"id", "prompt", "swap"}
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
        named = f"item '{distjudge.short(parsed['id'])}': " if parsed["id"] else ""
        return f"{where}: {named}" + "; ".join(f"{field}: {wrong}" for field, wrong in problems)

    def too_long(self, prompt: str) -> str:
        """What is wrong with a prompt's length, "" for nothing."""
        try:
            length = len(self.judge.encoder(prompt))
        except InputError as error:
            return str(error)
        most = self.judge.max_length
        return f"{length} tokens, more than the judge's max_length {most}" if length > most else ""

    def read(self, path: str, tally: Tally) -> Iterator[Ask]:
        """The rows of a file (-: the standard input). Bad ones go to the tally."""
        for where, row, problem in distjudge.read_rows(path):
            ask = f"{where}: {problem}" if problem else self.ask(row, where)
            if isinstance(ask, Ask):
                yield ask
            else:
                tally.bad(ask)

    def answers(self, asks: Iterable[Ask]) -> Iterator[dict[str, Any]]:
        """Output rows in the order of the asks, WINDOW prompts read ahead."""
        waiting: collections.deque[Ask] = collections.deque()

        def prompts() -> Iterator[str]:
            for ask in asks:
                waiting.append(ask)
                yield from ask.prompts.values()

        judged = self.judge.stream(prompts(), sys.stderr.isatty(), WINDOW)
        for logq, mass in judged:
            ask, q, flipped = waiting.popleft(), logq.exp(), None
            if ask.swap:
                other, other_mass = next(judged)
                q, flipped = distjudge.average_orders(q, other.exp(), ask.swap.labels)
                mass = (mass + other_mass) / 2
            yield ask.fields | self.describe(q, mass, flipped) | {"key": self.key(ask)}

    def describe(self, q: torch.Tensor, mass: float, flipped: bool | None) -> dict[str, Any]:
        """What an output line says about a prediction (C,); numbers have the seven digits of float32."""
        digits = lambda x: float(f"{float(x):.7g}")  # noqa: E731
        labels, q = self.judge.labels, q[None]
        row: dict[str, Any] = {
            "predicted": {label: digits(x) for label, x in zip(labels, q[0], strict=True)},
            "mode": distjudge.modes(q, labels)[0],
            "entropy": digits(distjudge.entropy(q)[0]),
            "credible_set": distjudge.credible_sets(q, labels, self.config.level)[0],
            "label_mass": digits(mass),
        }
        if distjudge.are_numeric(labels):
            row["mean"] = digits(distjudge.mean_rating(q, labels)[0])
        row |= {"low_mass": True} if mass < self.config.min_mass else {}
        return row | ({"flipped": flipped} if flipped is not None else {})

    def key(self, ask: Ask) -> str:
        swap = ask.swap and [ask.swap.prompt, ask.swap.labels]
        asked = json.dumps([self.hash, ask.fields["id"], ask.prompt, swap])
        return hashlib.sha256(asked.encode()).hexdigest()[:16]

    def kept(self, out: Path, asks: Iterator[Ask]) -> Iterator[dict[str, Any]]:
        """The judgments that a file holds already, taken off `asks`; a last line that was cut is cut off.

        Raises InputError for another line that is not what this judge said of its input with these settings.
        """
        end = 0
        with open(out, "r+b") as file:
            for number, raw in enumerate(file, 1):
                if not raw.endswith(b"\n") and raw[:7] == b'{"id": '[: len(raw)]:
                    file.truncate(end)
                    return
                ask, row = next(asks, None), None
                with contextlib.suppress(ValueError):
                    row = json.loads(raw)
                if not isinstance(row, dict) or ask is None or row.get("key") != self.key(ask):
                    raise InputError(
                        f"{out}:{number}: is not the judgment of {ask.where if ask else 'any input'} by this "
                        "judge with these settings; name another --out, or remove the file"
                    )
                end += len(raw)
                yield row


def judge_hash(judge: Judge, *settings: Any) -> str:
    """A hash of what decides a judgment: labels, tokens, template, a sample of every weight, settings."""
    about = [judge.labels, judge.tokens.sequences, judge.encoder.frame, settings]
    digest = hashlib.sha256(json.dumps(about).encode())
    for name, weight in judge.model.named_parameters():
        sample = weight.detach().flatten()[:64].cpu().contiguous().view(torch.uint8)
        digest.update(name.encode() + bytes(sample.tolist()))
    return digest.hexdigest()


def table(rows: Sequence[dict[str, Any]], labels: Sequence[str]) -> str:
    """One line an item: its probabilities and what they say."""
    import pandas

    cells = []
    for row in rows:
        marks = "low mass " * ("low_mass" in row) + "flipped" * row.get("flipped", False)
        cells.append([row["id"], *row["predicted"].values(), row["mode"], row.get("mean"), row["entropy"]])
        cells[-1] += [" ".join(row["credible_set"]), row["label_mass"], marks]
    head = ["id", *labels, "mode", "mean", "entropy", "credible set", "label mass", ""]
    frame = pandas.DataFrame(cells, columns=[distjudge.short(name, 12) for name in head])
    frame = frame.map(lambda cell: distjudge.short(cell, 24) if isinstance(cell, str) else cell)
    return frame.dropna(axis=1, how="all").to_string(index=False, float_format="{:.3f}".format)


def draw(rows: Sequence[dict[str, Any]], labels: Sequence[str], path: str) -> None:
    """Bars of the predictions, and of the votes beside them where an item has counts of these labels."""
    import pandas
    from matplotlib.figure import Figure

    names, wide, bars = [distjudge.short(label, 12) for label in labels], min(4, len(rows)), {}
    figure = Figure(figsize=(2.3 * wide, 1.9 * -(-len(rows) // wide)), layout="constrained")
    for number, row in enumerate(rows, 1):
        shares, counts = {"judge": list(row["predicted"].values())}, row.get("counts")
        if isinstance(counts, dict) and set(counts) <= set(labels):
            shares["votes"] = [counts.get(label, 0) / sum(counts.values()) for label in labels]
        ax = figure.add_subplot(-(-len(rows) // wide), wide, number, ylim=(0, 1.02))
        frame = pandas.DataFrame(shares, index=names)
        frame.plot.bar(ax=ax, rot=20, legend=False, color=["#e08214", "#4878a8"])
        ax.set_title(distjudge.short(row["id"], 24).replace("$", r"\$"), fontsize=8)
        bars |= {bar.get_label(): bar for bar in ax.containers}
    figure.legend(bars.values(), bars.keys(), loc="outside upper right", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)


def main(config: JudgeConfig) -> None:
    config.check()
    out = None if config.out == "-" else Path(config.out)
    if config.out.endswith(".gz"):
        raise InputError(f"out: {out}: judgments are appended line by line, not compressed")
    if config.items != "-" and not Path(config.items).exists():
        raise InputError(f"{config.items}: no such file")
    if out and config.items != "-" and out.exists() and out.samefile(config.items):
        raise InputError("out: is the file of the items")
    if config.figure and Path(config.figure).suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"figure: {config.figure}: must end with .png, .svg or .pdf")
    work, tally = Judging(config), Tally(config)
    asks = work.read(config.items, tally)
    if out and out.exists():
        for row in work.kept(out, asks):
            tally.add(row)
    elif out:
        out.parent.mkdir(parents=True, exist_ok=True)
    kept = tally.number["items"]
    text = {"encoding": "utf-8", "errors": "backslashreplace"}  # a lone surrogate, as JSON writes it
    if not out:
        sys.stdout.reconfigure(**text)
    with open(out, "a", newline="\n", **text) if out else contextlib.nullcontext(sys.stdout) as file:
        for row in work.answers(asks):
            tally.add(row)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
    if not (items := tally.number["items"]):
        raise InputError(f"{config.items}: no items")
    if items <= SHOW:
        print(table(tally.first, work.judge.labels), file=sys.stdout if out else sys.stderr)
    if config.figure:
        draw(tally.first, work.judge.labels, config.figure)
    said = [f"judged {items - kept} items"] + [f"kept {kept} judged before"] * bool(kept)
    print("; ".join(said + tally.summary()), file=sys.stderr)


if __name__ == "__main__":
    distjudge.cli(main, JudgeConfig)
