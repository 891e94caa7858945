"""Look at a file of items before any training.

    python plots/data.py votes/snli/train.jsonl                      # text, and votes/snli/train.png and train.txt beside the file
    python plots/data.py votes.jsonl --model models/qwen --out look  # lengths and shared beginnings in the tokens of a judge

Shows the labels and how often each was chosen, votes an item, how much people disagree (entropy of an item's votes, in nats;
Krippendorff's alpha, which needs the package krippendorff), how long the prompts are, what share of them stands in common
beginnings that packs compute once, and the items most and least agreed on.
"""
import dataclasses
import math
import random
import statistics
import sys
import textwrap
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import tyro

import distjudge
from distjudge import InputError, Item, short

VOTES, MAJORITY, LINE, NEUTRAL = "#4878a8", "#e08214", "#222222", "#777777"
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 150,
         "axes.titlesize": 9}


@dataclasses.dataclass
class Look:
    """What is shown of a data set. entropy (N,) in nats; lengths (N,) in `unit`; shared is a share of `packed` items' lengths."""

    items: list[Item]
    labels: list[str]
    counts: torch.Tensor
    entropy: torch.Tensor
    majority: torch.Tensor
    ordered: bool
    alpha: float | str
    floor: float | None
    lengths: list[int]
    unit: str
    shared: float
    packed: int

    @property
    def p(self) -> torch.Tensor:
        return self.counts / self.counts.sum(1, keepdim=True)

    def extremes(self, each: int) -> tuple[list[int], list[int]]:
        """Items most and least agreed on, one a group; of equals, those with more votes, then the earlier."""
        votes, entropy = self.counts.sum(1).tolist(), [round(e, 9) for e in self.entropy.tolist()]
        found: list[list[int]] = []
        for sign in (1, -1):
            chosen: dict[str, int] = {}
            for i in sorted(range(len(self.items)), key=lambda i: (sign * entropy[i], -votes[i])):
                if len(chosen) < each:
                    chosen.setdefault(self.items[i].group or f"item {i}", i)
            found.append(list(chosen.values()))
        return found[0], found[1]


def krippendorff_alpha(counts: torch.Tensor, ordered: bool) -> float | str:
    """Krippendorff's alpha of counts (N, C), nominal or ordinal: 1 is full agreement, 0 what chance gives. Or why there is none."""
    try:
        import krippendorff
    except ImportError:
        return "not computed: it needs the package krippendorff (pip install krippendorff)"
    if (counts.sum(1) < 2).all():
        return "none: every item has one vote"
    if (counts != counts.round()).any():
        return "none: the panels are weighted"
    if (counts.sum(0) > 0).sum() < 2:
        return "none: all votes are for one label"
    pairable = counts[counts.sum(1) >= 2].long().numpy()
    if (pairable.sum(0) > 0).sum() < 2:
        return "none: all votes that can be compared are for one label"
    return float(krippendorff.alpha(value_counts=pairable, level_of_measurement="ordinal" if ordered else "nominal"))


def some_groups(items: list[Item], most: int, seed: int = 0) -> list[Item]:
    """At most `most` items, of whole groups drawn at random, so that what they share can be seen."""
    if len(items) <= most:
        return items
    groups: dict[str, list[Item]] = {}
    for i, item in enumerate(items):
        groups.setdefault(item.group or f"item {i}", []).append(item)
    drawn, order = [], list(groups.values())
    random.Random(seed).shuffle(order)
    for group in order:
        drawn += group[: most - len(drawn)]
    return drawn


def look(items: list[Item], model: str = "", pack_tokens: int = 8192, most: int = 2000) -> Look:
    """Computes what is shown. model: a folder with a tokenizer; without, lengths are in characters."""
    counts, labels = distjudge.counts_of(items), distjudge.labels_of(items)
    p = counts / counts.sum(1, keepdim=True)
    encode = distjudge.PromptEncoder(distjudge.load_tokenizer(model)) if model else None
    lengths = [len(encode(item.prompt)) if encode else len(item.prompt) for item in items]
    sample = [encode(item.prompt) if encode else list(map(ord, item.prompt)) for item in some_groups(items, most)]
    packs = distjudge.pack_prompts(sample, pack_tokens)
    shared = 1 - sum(len(pack.ids) for pack in packs) / sum(map(len, sample))
    ordered = distjudge.are_numeric(labels)
    return Look(items, labels, counts, distjudge.entropy(p), distjudge.majority(p), ordered, krippendorff_alpha(counts, ordered),
                distjudge.noise_floor(some_groups(items, 10_000)), lengths, "tokens" if model else "characters", shared, len(sample))


def describe(data: Look, each: int = 3) -> list[str]:
    """The lines of text."""
    n, votes = len(data.items), data.counts.sum(1)
    groups = len({item.group for item in data.items if item.group is not None})
    width = max(map(len, [short(label, 24) for label in data.labels])) + 2
    lines = [f"{n:,} items, {votes.sum():,.0f} votes, {len(data.labels)} labels" + (f", {groups:,} groups" if groups else ""), "",
             f"{'label':<{width}}{'votes':>10}{'share':>9}{'majority of':>14}"]
    for label, given, share, most in zip(data.labels, data.counts.sum(0), data.p.mean(0), data.majority.mean(0), strict=True):
        lines.append(f"{short(label, 24):<{width}}{given:>10,.0f}{share:>9.1%}{most:>14.1%}")
    tally = Counter(f"{v:g}" for v in votes.tolist())
    shown = sorted(tally.items(), key=lambda pair: float(pair[0]))
    shown = [f"{v}: {k:,}" for v, k in shown] if len(shown) <= 12 else [f"from {shown[0][0]} to {shown[-1][0]}"]
    alpha = f"{data.alpha:.3f} ({'ordinal' if data.ordered else 'nominal'})" if isinstance(data.alpha, float) else data.alpha
    several = votes >= 2
    if several.any():
        tied = ((data.majority[several] > 0).sum(1) > 1).double().mean()
        panels = f"; of {several.sum():,} items with two votes or more {(data.entropy[several] < 1e-9).double().mean():.1%} are unanimous"
        panels += f", {tied:.1%} tied"
    else:
        panels = ""
    floor = "none: no item has two votes" if data.floor is None else f"{data.floor:.3f} nats, KL of the true distributions to such votes"
    lines += ["", f"votes an item      {', '.join(shown)}",
              f"entropy            mean {data.entropy.mean():.3f} nats of {math.log(len(data.labels)):.3f} at most{panels}",
              f"agreement          Krippendorff's alpha {alpha}",
              f"noise floor        {floor}",
              f"prompt length      {min(data.lengths):,} to {max(data.lengths):,} {data.unit}, "
              f"median {statistics.median(data.lengths):,.0f}",
              f"common beginnings  {data.shared:.0%} of the {data.unit}" + (f" of {data.packed:,} items drawn" if data.packed < n else "")]
    for name, chosen in zip(("most", "least"), data.extremes(each), strict=True):
        lines += ["", f"{name} agreed on"]
        for i in chosen:
            item = data.items[i]
            given = ", ".join(f"{short(label, 20)} {count:g}" for label, count in item.counts.items() if count)
            lines.append(f"  {short(item.id, 40)}: {given}: {tail(item.prompt, 100)}")
    return lines


def tail(prompt: str, width: int) -> str:
    """The end of a prompt in one line: instructions come first, the judged text last."""
    text = " ".join(prompt.split())
    return text if len(text) <= width else "..." + text[3 - width:]


def draw(data: Look) -> plt.Figure:
    """Labels, votes an item, entropy and prompt lengths; below, two items most and two least agreed on."""
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(11, 6), layout="constrained")
        top, bottom = figure.subfigures(2, 1, height_ratios=(1.15, 1))
        labels, votes, entropy, lengths = top.subplots(1, 4)
        at, given = torch.arange(len(data.labels)), data.counts.sum(1)
        names, tilt = [short(label, 14) for label in data.labels], 0 if max(map(len, data.labels)) < 5 else 25
        labels.bar(at - 0.2, data.p.mean(0), 0.4, color=VOTES, label="votes")
        labels.bar(at + 0.2, data.majority.mean(0), 0.4, color=MAJORITY, label="majorities")
        labels.set_xticks(at, names, rotation=tilt)
        labels.set(title="labels", ylabel="share", ylim=(0, 1.22 * max(data.p.mean(0).max().item(), data.majority.mean(0).max().item())))
        labels.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", columnspacing=1, handlelength=1.2)
        low, high = round(given.min().item()), round(given.max().item())
        if high - low <= 20:
            tally = Counter(given.round().long().tolist())
            votes.bar(list(tally), list(tally.values()), 0.8, color=VOTES)
            votes.set_xticks(range(low, high + 1, 1 if high - low <= 10 else 2))
            votes.set_xlim(low - 1, high + 1)
        else:
            votes.hist(given.numpy(), bins=30, color=VOTES)
        votes.set(title="votes an item", ylabel="items")
        entropy.hist(data.entropy.numpy(), bins=24, range=(0, math.log(len(data.labels))), color=VOTES)
        entropy.axvline(data.entropy.mean().item(), color=LINE, linestyle="--", linewidth=1.2)
        agreed = f", alpha {data.alpha:.2f}" if isinstance(data.alpha, float) else ""
        entropy.set(title=f"disagreement: mean {data.entropy.mean():.2f}{agreed}", xlabel="entropy of the votes, nats", ylabel="items")
        lengths.hist(data.lengths, bins=30, color=VOTES)
        lengths.set(title=f"prompts: {data.shared:.0%} in common beginnings", xlabel=data.unit, ylabel="items")
        lengths.set_xlim(left=0)
        most, least = data.extremes(2)
        for k, (ax, i) in enumerate(zip(bottom.subplots(1, len(most + least), sharey=True, squeeze=False)[0], most + least, strict=True)):
            ax.bar(at, data.p[i], 0.7, color=VOTES if k < len(most) else MAJORITY)
            ax.set_xticks(at, names, rotation=tilt)
            ax.set_ylim(0, 1.02)
            kind = "most" if k < len(most) else "least"
            ax.set_title(f"{kind} agreed on: {given[i]:g} votes\n{short(data.items[i].id, 34)}", fontsize=8)
            words = "\n".join(textwrap.wrap(tail(data.items[i].prompt, 120), 42))
            ax.set_xlabel(words.replace("$", r"\$"), fontsize=7, color=NEUTRAL)
            ax.set_ylabel("" if k else "share of votes")
    return figure


@dataclasses.dataclass
class DataConfig:
    files: tyro.conf.Positional[tuple[str, ...]]
    """Files of items, .jsonl or .jsonl.gz."""
    model: str = ""
    """A folder with a tokenizer: lengths and shared beginnings are then in its tokens, chat template included."""
    out: str = ""
    """The folder for NAME.png and NAME.txt. Default: that of the first file."""
    labels: tuple[str, ...] = ()
    """Label order, as in training."""
    pack_tokens: int = 8192
    """Size of the packs within which beginnings are shared."""
    examples: int = 3
    """Items most and least agreed on, each."""


def main(config: DataConfig) -> None:
    if not config.files:
        raise InputError("files: name a file of items")
    if config.pack_tokens < 1 or config.examples < 0:
        raise InputError(f"pack_tokens: must be 1 or more, not {config.pack_tokens}" if config.pack_tokens < 1 else
                         f"examples: must be 0 or more, not {config.examples}")
    data = look(distjudge.load_items(*config.files, labels=config.labels or None), config.model, config.pack_tokens)
    lines = [" ".join(config.files), *describe(data, config.examples)]
    print("\n".join(lines))
    out, name = Path(config.out or Path(config.files[0]).parent), Path(config.files[0]).name.split(".jsonl")[0]
    out.mkdir(parents=True, exist_ok=True)
    distjudge.write_lines(out / f"{name}.txt", lines)
    figure = draw(data)
    figure.savefig(out / f"{name}.png", bbox_inches="tight")
    plt.close(figure)
    print(f"\nwrote {out / f'{name}.png'} and {name}.txt")


if __name__ == "__main__":
    distjudge.cli(main, DataConfig)
