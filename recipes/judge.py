"""Judge items with a trained judge, from the command line: files of any size, or a pipe.

    python recipes/judge.py --run runs/first --items in.jsonl --out out.jsonl
    cat in.jsonl | python recipes/judge.py --run runs/first --items - --out - | ...
    python recipes/judge.py --run runs/first --items five.jsonl --out five.out.jsonl --figure five.png

Each input line needs a "prompt"; "id", votes and any other field pass through. An output line holds them (without the prompt) and

    predicted       {label: probability}
    mode, entropy, credible_set, and for numeric labels mean    (entropy in nats; the smallest set of labels with --level of the mass)
    label_mass      full-vocabulary probability of the labels together; "low_mass": true where it is under --min_mass
    flipped         of an item with "swap", whether the two orders have another verdict (predicted is then the mean of both)
    key             a hash of judge, settings and prompt, by which a later call knows the line

Fields of the input that have these names are replaced. Lines come in the order of the input. Called again, it goes on where it
stopped: lines that --out holds already are compared with the input's first lines and kept, a last line that was cut is redone.
"swap" is the same pair in the other order: {"prompt": ..., "labels": {"a": "b", "b": "a"}}, labels mapping each label of the
prompt to the one that means the same in the swapped prompt; those not named map to themselves.
"""
import collections
import contextlib
import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import distjudge
from distjudge import InputError, Judge, Swap, average_orders

OURS = {"predicted", "mode", "mean", "entropy", "credible_set", "label_mass", "low_mass", "flipped", "key"}


@dataclasses.dataclass
class JudgeConfig:
    run: str
    """The run folder of a trained judge; or a model (folder, hub id), with --labels, as it is."""
    items: str
    """What to judge: a .jsonl or .jsonl.gz file, or - for the standard input."""
    out: str = "-"
    """Where the judgments go: a file, which is continued if it holds some already, or - for the standard output."""
    labels: tuple[str, ...] = ()
    """Labels, for a model that is no run folder."""
    spellings: tuple[str, ...] = ()
    """More spellings of a label, as LABEL=TEXT,TEXT, for a model that is no run folder."""
    four_bit: bool = False
    """Load a model that is no run folder in 4 bits."""
    min_mass: float = 0.5
    """Items whose label mass is less are flagged: the model would rather say something else than a label."""
    level: float = 0.9
    """Probability that a credible set holds at least."""
    skip_bad: bool = False
    """Report lines that cannot be judged and go on, instead of stopping at the first."""
    window: int = 2048
    """Prompts read ahead at a time; those of one window share what they have in common. Sets the memory, not the result."""
    pack_tokens: int = 0
    """Tokens a forward pass, at most. 0: 1,024 on a CPU, 8,192 on CUDA."""
    show: int = 20
    """Print a table if there are no more items than this; 0 is never."""
    figure: str = ""
    """Draw bars of the first --show items into this file (.png, .svg, .pdf)."""


@dataclasses.dataclass(frozen=True)
class Ask:
    """A line to be judged."""

    where: str
    fields: dict[str, Any]
    prompt: str
    swap: Swap | None = None


def check_row(row: dict[str, Any], labels: Sequence[str]) -> tuple[Ask | None, list[tuple[str, str]]]:
    """A line's fields, or what is wrong with them as (field, text). Votes may be missing, but not be wrong."""
    parsed, bad = distjudge.parse_row(row)
    if all(distjudge.is_missing(row.get(field)) for field in ("counts", "annotations", "distribution")):
        bad = [(field, text) for field, text in bad if field != "counts"]
    swap, problem = None, ""
    if parsed["swap"]:
        named = parsed["swap"][1]
        if unknown := [label for label in [*named, *named.values()] if label not in labels]:
            problem = f"unknown label {distjudge.short(repr(unknown[0]))}; the labels are {distjudge.listed(labels)}"
        else:
            swap, problem = distjudge.place_swap(*parsed["swap"], labels)
    bad += [("swap", problem)] if problem else []
    if bad:
        return None, bad
    fields = {"id": parsed["id"]} | {k: v for k, v in row.items() if k not in OURS | {"id", "prompt", "swap"}}
    return Ask("", fields, parsed["prompt"], swap), bad


def prompt_problems(ask: Ask, fits: Callable[[str], str]) -> list[tuple[str, str]]:
    """What `fits` says of the prompts of a line, as (field, text)."""
    prompts = {"prompt": ask.prompt} | ({"swap": ask.swap.prompt} if ask.swap else {})
    return [(field, text) for field, prompt in prompts.items() if (text := fits(prompt))]


def read_asks(path: str, labels: Sequence[str], bad: Callable[[str], None], fits: Callable[[str], str] = lambda prompt: "",
              ) -> Iterator[Ask]:
    """The lines of a file (- is the standard input), one at a time; `bad` gets one line of text for each that cannot be used.

    fits: says what is wrong with a prompt, "" for nothing.
    """
    for where, row, problem in distjudge.read_rows(path):
        ask, problems = check_row(row, labels) if not problem else (None, [])
        if ask:
            problems = prompt_problems(ask, fits)
        if problem or problems:
            name = "" if problem or not distjudge.as_label(row.get("id")) else f"item '{distjudge.short(row['id'])}': "
            bad(f"{where}: {name}" + (problem or "; ".join(f"{field}: {text}" for field, text in problems)))
        else:
            yield dataclasses.replace(ask, where=where)


def too_long(judge: Judge) -> Callable[[str], str]:
    def fits(prompt: str) -> str:
        try:
            length = len(judge.encoder(prompt))
        except InputError as error:
            return str(error)
        return f"{length} tokens, more than the judge's max_length {judge.max_length}" if length > judge.max_length else ""

    return fits


def judge_asks(judge: Judge, asks: Iterable[Ask], window: int = 2048, progress: bool = False,
               ) -> Iterator[tuple[Ask, torch.Tensor, float, bool | None]]:
    """Yields (ask, probabilities (C,), label mass, verdict flipped or None) in order, reading `window` prompts ahead."""
    waiting: collections.deque[Ask] = collections.deque()

    def prompts() -> Iterator[str]:
        for ask in asks:
            waiting.append(ask)
            yield ask.prompt
            if ask.swap:
                yield ask.swap.prompt

    judged = judge.stream(prompts(), progress, window)
    for logq, mass in judged:
        ask, q, flipped = waiting.popleft(), logq.exp(), None
        if ask.swap:
            other, other_mass = next(judged)
            (q, flipped), mass = average_orders(q, other.exp(), ask.swap.labels), (mass + other_mass) / 2
        yield ask, q, mass, flipped


def judge_hash(judge: Judge, *settings: Any) -> str:
    """A hash of what decides a judgment: labels, their tokens, template, a sample of every weight, and the settings given."""
    digest = hashlib.sha256(json.dumps([judge.labels, judge.tokens.sequences, judge.encoder.frame, judge.top_k, settings]).encode())
    for name, weight in judge.model.named_parameters():
        digest.update(name.encode() + bytes(weight.detach().flatten()[:64].cpu().contiguous().view(torch.uint8).tolist()))
    return digest.hexdigest()


def key_of(ask: Ask, judged_by: str) -> str:
    swapped = (ask.swap.prompt, ask.swap.labels) if ask.swap else (None, ())
    return hashlib.sha256(json.dumps([judged_by, ask.fields["id"], ask.prompt, *swapped]).encode()).hexdigest()[:16]


def describe(q: torch.Tensor, labels: Sequence[str], mass: float, flipped: bool | None, min_mass: float, level: float) -> dict[str, Any]:
    """What an output line says about a prediction (C,); numbers rounded to the seven digits that float32 has."""
    digits = lambda x: float(f"{float(x):.7g}")  # noqa: E731
    row = {"predicted": {label: digits(x) for label, x in zip(labels, q, strict=True)}, "mode": distjudge.modes(q[None], labels)[0]}
    if distjudge.are_numeric(labels):
        row["mean"] = digits(distjudge.mean_rating(q[None], labels)[0])
    row |= {"entropy": digits(distjudge.entropy(q[None])[0]), "credible_set": distjudge.credible_sets(q[None], labels, level)[0],
            "label_mass": digits(mass)}
    return row | ({"low_mass": True} if mass < min_mass else {}) | ({"flipped": flipped} if flipped is not None else {})


def line_of(row: dict[str, Any]) -> str:
    line = json.dumps(row, ensure_ascii=False)
    return (line if distjudge.is_text(line) else json.dumps(row)) + "\n"  # a field that passes through may hold a lone surrogate


def kept_rows(out: Path, asks: Iterator[Ask], judged_by: str) -> Iterator[tuple[dict[str, Any], int]]:
    """The judgments that a file holds already, and where each ends in it, taken off `asks`; an incomplete last line is not one.

    Raises InputError for a line that is not the judgment of its input line by this judge with these settings.
    """
    size, at = out.stat().st_size, 0
    with open(out, "rb") as file:
        for number, raw in enumerate(file, 1):
            at += len(raw)
            try:
                row = json.loads(raw) if raw.endswith(b"\n") else None
            except ValueError:
                row = None
            if row is None and at == size:
                return
            ask = next(asks, None)
            if not isinstance(row, dict) or ask is None or row.get("key") != key_of(ask, judged_by):
                whose = f"the judgment of {ask.where} by this judge with these settings" if ask else "there any more in the input"
                raise InputError(f"{out}:{number}: is not {whose}; name another --out, or remove the file")
            yield row, at


def table(rows: Sequence[dict[str, Any]], labels: Sequence[str]) -> list[str]:
    """One line an item: its probabilities and what they say."""
    head = ["id", *(distjudge.short(label, 12) for label in labels), "mode", *["mean"] * ("mean" in rows[0]), "entropy",
            "credible set", "label mass", ""]
    cells = [head]
    for row in rows:
        marks = ["low mass"] * row.get("low_mass", False) + ["flipped"] * bool(row.get("flipped"))
        cells.append([distjudge.short(row["id"], 24), *(f"{x:.3f}" for x in row["predicted"].values()), distjudge.short(row["mode"], 12),
                      *([f"{row['mean']:.2f}"] if "mean" in row else []), f"{row['entropy']:.2f}",
                      distjudge.short(" ".join(row["credible_set"]), 30), f"{row['label_mass']:.3f}", ", ".join(marks)])
    widths = [max(len(line[k]) for line in cells) for k in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def draw(rows: Sequence[dict[str, Any]], labels: Sequence[str], path: str) -> None:
    """Bars of the predictions, with the shares of the votes beside them where an item has counts of the judge's labels."""
    from plots import figures

    plt, columns = figures.plt, min(4, len(rows))
    figure, axes = plt.subplots(-(-len(rows) // columns), columns, figsize=(2.3 * columns, 1.9 * -(-len(rows) // columns)), sharey=True,
                                squeeze=False, layout="constrained")
    at = torch.arange(len(labels))
    for ax, row in zip(axes.flat, rows, strict=False):
        counts = row.get("counts")
        votes = [counts.get(label, 0) for label in labels] if isinstance(counts, dict) and set(counts) <= set(labels) else []
        ax.bar(at + (0.2 if votes else 0), list(row["predicted"].values()), 0.4 if votes else 0.7, color=figures.MODEL, label="judge")
        if votes:
            ax.bar(at - 0.2, [n / sum(votes) for n in votes], 0.4, color=figures.HUMAN, label="votes")
        ax.set_xticks(at, [distjudge.short(label, 12) for label in labels], rotation=0 if max(map(len, labels)) < 5 else 20)
        ax.set_title(distjudge.short(row["id"], 24).replace("$", r"\$"), fontsize=8)
        ax.set_ylim(0, 1.02)
    for ax in list(axes.flat)[len(rows):]:
        ax.set_visible(False)
    handles = {name: handle for ax in axes.flat for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper right", ncols=2, frameon=False)
    try:
        figure.savefig(path)
    except ValueError as error:
        raise InputError(f"figure: {path}: {error}") from None
    finally:
        plt.close(figure)


def load(config: Any) -> Judge:
    """The judge that --run (and, for a model as it is, --labels) name."""
    import transformers

    transformers.utils.logging.disable_progress_bar()  # of loading weights; judging keeps its own
    is_run = (Path(config.run) / "judge.json").is_file()
    if is_run and config.spellings:
        raise InputError("spellings: a run folder has its own")
    judge = distjudge.load_judge(config.run, config.labels or None, spellings=distjudge.parse_spellings(config.spellings),
                                 four_bit=config.four_bit)
    judge.pack_tokens = config.pack_tokens or judge.pack_tokens
    return judge


def main(config: JudgeConfig) -> None:
    if config.window < 1 or config.pack_tokens < 0 or config.show < 0:
        raise InputError("window must be 1 or more, pack_tokens and show 0 or more")
    if not 0 < config.level <= 1 or not 0 <= config.min_mass <= 1:
        raise InputError("level must be above 0 and at most 1, min_mass between 0 and 1")
    if config.figure and not config.show:
        raise InputError("figure: draws the first --show items, so show must be 1 or more")
    if config.out.endswith(".gz"):
        raise InputError(f"out: {config.out}: judgments are appended line by line, not compressed")
    if config.items != "-" and not Path(config.items).is_file():
        raise InputError(f"{config.items}: no such file")
    if config.out != "-" and config.items != "-" and Path(config.out).exists() and Path(config.out).samefile(config.items):
        raise InputError("out: is the file of the items")
    if config.out == "-" and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8")
    judge, problems = load(config), 0

    def bad(line: str) -> None:
        nonlocal problems
        problems += 1
        if not config.skip_bad:
            raise InputError(line)
        print(f"skipped: {line}", file=sys.stderr)

    asks = read_asks(config.items, judge.labels, bad, too_long(judge))
    judged_by = judge_hash(judge, config.min_mass, config.level)
    tally: collections.Counter[str] = collections.Counter()
    first: list[dict[str, Any]] = []

    def count(row: dict[str, Any]) -> None:
        tally.update(items=1, low=row.get("low_mass", False), pairs="flipped" in row, flipped=bool(row.get("flipped")))
        if len(first) < config.show:
            first.append(row)

    resumed, end, to_file = 0, 0, config.out != "-"
    if to_file and Path(config.out).exists():
        for row, end in kept_rows(Path(config.out), asks, judged_by):  # noqa: B007
            count(row)
            resumed += 1
        with open(config.out, "r+b") as file:
            file.truncate(end)
    elif to_file:
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    with open(config.out, "a", encoding="utf-8", newline="\n") if to_file else contextlib.nullcontext(sys.stdout) as file:
        for ask, q, mass, flipped in judge_asks(judge, asks, config.window, progress=sys.stderr.isatty()):
            row = ask.fields | describe(q, judge.labels, mass, flipped, config.min_mass, config.level) | {"key": key_of(ask, judged_by)}
            count(row)
            file.write(line_of(row))
            file.flush()
    if not tally["items"]:
        raise InputError(f"{config.items}: no items")
    words = [f"judged {tally['items'] - resumed} items"] + [f"kept {resumed} judged before"] * bool(resumed)
    words += [f"skipped {problems} bad lines"] * bool(problems)
    words += [f"{tally['low']} of {tally['items']} have a label mass under {config.min_mass:g}"] * bool(tally["low"])
    words += [f"the verdict flips with the order in {tally['flipped']} of {tally['pairs']} pairs"] * bool(tally["pairs"])
    if tally["items"] <= config.show:
        print("\n".join(table(first, judge.labels)), file=sys.stdout if to_file else sys.stderr)
    if config.figure:
        draw(first, judge.labels, config.figure)
    print("; ".join(words), file=sys.stderr)


if __name__ == "__main__":
    distjudge.cli(main, JudgeConfig)
