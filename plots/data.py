"""Look at a file of items before any training.

    python plots/data.py votes/snli/train.jsonl                        # prints; plots/train.png and .txt
    python plots/data.py votes.jsonl --model models/qwen --out look    # lengths in the tokens of a judge

Shows the labels and how often each was chosen, votes an item, how much people disagree (entropy of an item's
votes in nats; Krippendorff's alpha), how long the prompts are, what share of them stands in beginnings that
packs compute once, and the items most and least agreed on.
"""

import dataclasses
import math
import statistics
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import distjudge
from distjudge import InputError, Item, short

import pandas
import torch
import tyro

from plots.figures import HUMAN, MODEL, TRUTH, Run, draw_item, name_labels, pieces, plt, save

PACK_TOKENS = 8192  # beginnings are shared within packs of this size; a token is taken for four characters


class Look:
    """What is shown of items: votes counts and p (N, C), entropy (N,) in nats, lengths (N,) in `unit`.

    alpha: a number, or why there is none. shared: the share of `packed` items' lengths that is computed once.
    shares: {"votes", "majorities"}: that of each label (C,). model: a folder with a tokenizer; without,
    lengths are in characters.
    """

    def __init__(self, items: list[Item], model: str = "", most: int = 2000):
        self.items, self.counts, self.labels = items, distjudge.counts_of(items), distjudge.labels_of(items)
        self.p = distjudge.shares_of(items)
        self.shares = {"votes": self.counts.sum(0) / self.counts.sum()}
        self.shares["majorities"] = distjudge.majority(self.p).mean(0)
        self.entropy, self.unit = distjudge.entropy(self.p), "tokens" if model else "characters"
        ordered = distjudge.are_numeric(self.labels)
        along = sorted(range(len(self.labels)), key=lambda c: float(self.labels[c]) if ordered else c)
        self.alpha = krippendorff_alpha(self.counts[:, along], ordered)
        self.floor = distjudge.noise_floor(some_groups(items, 10_000))
        encode = distjudge.PromptEncoder(distjudge.load_tokenizer(model)) if model else list
        self.lengths = [len(encode(item.prompt)) for item in items]
        drawn = some_groups(items, most)
        sample = [encode(prompt) for item in drawn for prompt in item.prompts]
        packs = distjudge.pack_prompts(sample, PACK_TOKENS if model else 4 * PACK_TOKENS)
        self.shared = 1 - sum(len(pack.ids) for pack in packs) / sum(map(len, sample))
        self.packed = len(drawn)

    def extremes(self, each: int) -> list[list[int]]:
        """Items most and least agreed on, one a group; of equals, those with more votes, then the earlier."""
        groups = distjudge.group_numbers([item.group for item in self.items])
        columns = {"group": groups, "entropy": self.entropy.round(decimals=9), "votes": self.counts.sum(1)}
        table = pandas.DataFrame(columns)
        by_entropy = [table.sort_values(["entropy", "votes"], ascending=[up, False]) for up in (True, False)]
        return [rows.drop_duplicates("group").index[:each].tolist() for rows in by_entropy]


def krippendorff_alpha(counts: torch.Tensor, ordered: bool) -> float | str:
    """Krippendorff's alpha of counts (N, C), 1 full agreement and 0 chance, or why there is none.

    Source: Krippendorff (2011), Computing Krippendorff's alpha-reliability.
    """
    pairs = counts[counts.sum(1) >= 2]  # a single vote cannot be compared
    if not len(pairs):
        return "none: no item has two votes"
    if (counts != counts.round()).any():
        return "none: the panels are weighted"
    total, size = pairs.sum(0), pairs.sum()
    if (total > 0).sum() < 2:
        return "none: all votes that can be compared are for one label"
    weighted = pairs / (pairs.sum(1, keepdim=True) - 1)
    observed = weighted.T @ pairs - weighted.sum(0).diag()  # how often two labels meet in an item
    expected = (total.outer(total) - total.diag()) / (size - 1)
    distance = 1 - torch.eye(len(total), dtype=torch.float64)
    if ordered:
        middle = total.cumsum(0) - total / 2
        distance = (middle[:, None] - middle) ** 2
    return 1 - ((observed * distance).sum() / (expected * distance).sum()).item()


def some_groups(items: list[Item], most: int, seed: int = 0) -> list[Item]:
    """At most `most` items, group by group at random, to show what they share; the last is cut."""
    if len(items) <= most:
        return items
    groups = distjudge.group_numbers([item.group for item in items])
    place = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))[groups]
    return [items[i] for i in place.argsort(stable=True)[:most]]


def describe(data: Look, each: int = 3) -> list[str]:
    """The lines of text."""
    votes, total = data.counts.sum(1), math.log(len(data.labels))
    names = [short(label, 24) for label in data.labels]
    groups, width = len({item.group for item in data.items} - {None}), max(map(len, ["label", *names])) + 2
    head = f"{len(votes):,} items, {votes.sum():,.0f} votes, {len(names)} labels"
    lines = [head + (f", {groups:,} groups" if groups else ""), ""]
    lines.append(f"{'label':<{width}}{'votes':>10}{'share':>9}{'majority of':>14}")
    for name, n, share, most in zip(names, data.counts.sum(0), *data.shares.values(), strict=True):
        lines.append(f"{name:<{width}}{n:>10,.0f}{share:>9.1%}{most:>14.1%}")
    panels = ", ".join(f"{v:g}: {n:,}" for v, n in sorted(Counter(votes.round(decimals=6).tolist()).items()))
    if len(votes.unique()) > 12:
        panels = f"from {votes.min():g} to {votes.max():g}"
    alpha, floor = data.alpha, "none: no item has two votes"
    if isinstance(alpha, float):
        alpha = f"{alpha:.3f} ({'ordinal' if distjudge.are_numeric(data.labels) else 'nominal'})"
    if data.floor is not None:
        floor = f"{data.floor:.3f} nats, KL of the true distributions to such votes"
    entropy = f"mean {data.entropy.mean():.3f} nats of {total:.3f} at most"
    if len(several := data.p[votes >= 2]):
        sure = (distjudge.entropy(several) < 1e-9).double().mean()
        tied = ((distjudge.majority(several) > 0).sum(1) > 1).double().mean()
        entropy += f"; of {len(several):,} items with several votes {sure:.1%} unanimous, {tied:.1%} tied"
    lengths = f"{min(data.lengths):,} to {max(data.lengths):,} {data.unit}"
    drawn = f" of {data.packed:,} items drawn" if data.packed < len(votes) else ""
    facts = {
        "votes an item": panels,
        "entropy": entropy,
        "agreement": f"Krippendorff's alpha {alpha}",
        "noise floor": floor,
        "prompt length": f"{lengths}, median {statistics.median(data.lengths):,.0f}",
        "common beginnings": f"{data.shared:.0%} of the {data.unit}{drawn}",
    }
    lines += ["", *(f"{name:<19}{text}" for name, text in facts.items())]
    texts = pieces([item.prompt for item in data.items], 100)
    for name, chosen in zip(("most", "least"), data.extremes(each), strict=True):
        lines += ["", f"{name} agreed on"]
        for i in chosen:
            given = [f"label {short(label, 20)}: {n:g}" for label, n in data.items[i].counts.items() if n]
            lines.append(f"  {short(data.items[i].id, 40)}\n    votes  {', '.join(given)}")
            lines.append(f"    text   {texts[i]}")
    return lines


def draw(data: Look) -> plt.Figure:
    """Labels, votes an item, entropy and prompt lengths; below, two items most and two least agreed on."""
    figure = plt.figure(figsize=(11, 6))
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    labels, votes, entropy, lengths = top.subplots(1, 4)
    at, given = torch.arange(len(data.labels)), data.counts.sum(1)
    for k, (name, shares) in enumerate(data.shares.items()):
        labels.bar(at - 0.2 + 0.4 * k, shares, 0.4, color=(HUMAN, MODEL)[k], label=name)
    name_labels(labels, data.labels)
    labels.set(title="labels", ylabel="share", ylim=(0, 1.22 * max(map(max, data.shares.values()))))
    labels.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", columnspacing=1, handlelength=1.2)
    low, high = round(given.min().item()), round(given.max().item())
    width = math.ceil((high - low + 1) / 30)  # whole: bins of one and of two numbers would look like a comb
    edges = [low - 0.5 + width * k for k in range((high - low) // width + 2)]
    votes.hist(given, edges, rwidth=0.8, color=HUMAN)
    votes.set_xlim(low - 1, high + 1)
    votes.xaxis.get_major_locator().set_params(integer=True)
    votes.set(title="votes an item", ylabel="items")
    end = math.log(len(data.labels))  # rounding must not carry an item beyond it
    entropy.hist(data.entropy.clamp(max=end), bins=24, range=(0, end), color=HUMAN)
    entropy.axvline(data.entropy.mean(), color=TRUTH, linestyle="--", linewidth=1.2)
    agreed = f", alpha {data.alpha:.2f}" if isinstance(data.alpha, float) else ""
    title = f"disagreement: mean {data.entropy.mean():.2f}{agreed}"
    entropy.set(title=title, xlabel="entropy of the votes, nats", ylabel="items")
    lengths.hist(data.lengths, bins=30, color=HUMAN)
    lengths.set(title=f"prompts: {data.shared:.0%} in common beginnings", xlabel=data.unit, ylabel="items")
    lengths.set_xlim(left=0)
    most, least = data.extremes(2)
    shown = [(i, "most") for i in most] + [(i, "least") for i in least]
    run = Run(data.items, data.p)
    axes = bottom.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for ax, (i, kind) in zip(axes, shown, strict=True):
        draw_item(ax, run, i, {}, f"{kind} agreed on: {given[i]:g} votes, {short(data.items[i].id, 20)}")
    bottom.supylabel("share of votes", fontsize=9)
    return figure


@dataclasses.dataclass
class DataConfig:
    files: tyro.conf.Positional[tuple[str, ...]]
    """Files of items, .jsonl or .jsonl.gz."""
    model: str = ""
    """A folder with a tokenizer: lengths and beginnings are then in its tokens, chat template included."""
    out: str = ""
    """The folder for NAME.png and NAME.txt. Default: plots/ beside the first file."""
    labels: tuple[str, ...] = ()
    """Label order, as in training."""


def main(config: DataConfig) -> None:
    if not config.files:
        raise InputError("files: name a file of items")
    first = Path(config.files[0])
    data = Look(distjudge.load_items(*config.files, labels=config.labels or None), config.model)
    lines = [" ".join(short(file, 200) for file in config.files), *describe(data)]
    print("\n".join(lines))
    out, name = Path(config.out or first.parent / "plots"), first.name.split(".jsonl")[0]
    distjudge.write_lines(out / f"{name}.txt", lines)
    save(draw(data), out / f"{name}.png")
    print(f"\nwrote {short(out / f'{name}.png', 200)} and {short(name)}.txt")


if __name__ == "__main__":
    distjudge.cli(main, DataConfig)
