"""Make data/panel.jsonl: short reviews, five simulated raters' stars for each, and their true distribution.

    python data/make_panel.py                                           # writes data/panel.jsonl again
    python data/make_panel.py --out fresh.jsonl --test 3000 --seed 2    # another panel of the same kind

Everybody reads clear words the same way ("spotless", "awful"). Disputed words split the raters by taste:
"spicy" pleases some and puts off others. A rater's leaning on an item is 3 + the values of its words, each
disputed word by that rater's own taste. The stars are that leaning plus normal noise, rounded to 1..5.
"I suppose" and the like widen the noise. So the distribution of the stars is known, a mixture over tastes:
"truth" in the file. An item's five votes are drawn from it. Text, words and votes are this project's own.
"""

import itertools
import json
import math
import random
import sys
from pathlib import Path

import tyro

PROMPT = "How many stars, from 1 to 5, does this review give? Answer with the number only.\n\nReview: {}"
NOISE, WIDE_NOISE = 0.6, 1.15  # standard deviation of the stars before rounding, plain and half-hearted
PLACES = {
    "cafe": ["coffee", "service", "music", "menu", "seating"],
    "hotel": ["room", "breakfast", "service", "decor", "lobby"],
    "film": ["plot", "acting", "soundtrack", "ending", "humour"],
    "novel": ["plot", "style", "ending", "dialogue", "humour"],
    "concert": ["sound", "crowd", "setlist", "venue", "light show"],
    "restaurant": ["food", "service", "menu", "decor", "wine list"],
    "phone": ["screen", "design", "camera", "battery", "interface"],
    "podcast": ["host", "sound", "humour", "format", "music"],
}
# word: what it adds to a rater's leaning, the same for everybody
CLEAR = """superb 1.3, wonderful 1.2, excellent 1.2, spotless 1.0, delightful 1.1, very-good 0.9, lovely 0.9,
pleasant 0.6, solid 0.5, decent 0.3, passable 0.0, ordinary -0.1, forgettable -0.5, dull -0.7, sloppy -0.9,
disappointing -1.0, poor -1.0, clumsy -1.1, hopeless -1.2, awful -1.3, dreadful -1.3"""
# word: share of raters who like it, what it adds for them, what it adds for the others
DISPUTED = """spicy 0.6 1.0 -1.2, loud 0.35 0.9 -1.3, minimalist 0.5 1.1 -1.1, quirky 0.65 1.0 -1.2,
old-fashioned 0.4 1.2 -1.0, experimental 0.45 1.3 -1.3, sentimental 0.5 1.0 -1.2, intense 0.7 0.9 -1.4,
rambling 0.25 0.9 -1.2, flashy 0.35 1.0 -1.1, chaotic 0.3 1.1 -1.3, bittersweet 0.6 1.1 -0.9"""
CLEAR = {w.replace("-", " "): float(value) for w, value in map(str.split, CLEAR.split(","))}
DISPUTED = {w: [float(n) for n in numbers] for w, *numbers in map(str.split, DISPUTED.split(","))}
SENTENCES = "the {} was {}/I found the {} {}/the {} struck me as {}/expect the {} to be {}/the {} is {}"
SENTENCES = SENTENCES.split("/")
OPENINGS = "My visit to this {}/This {}/A word on this {}/About the {}/The {} everyone talks about".split("/")
HALF_HEARTED = ["I suppose", "if you ask me on a good day", "though I may be wrong", "but who can tell"]


def stars(leaning: float, noise: float) -> list[float]:
    """P(1..5) of a normal variable around `leaning`, rounded and kept within 1..5."""
    below = [0.5 * (1 + math.erf((cut - leaning) / noise / math.sqrt(2))) for cut in (1.5, 2.5, 3.5, 4.5)]
    return [high - low for low, high in itertools.pairwise([0.0, *below, 1.0])]


def true_distribution(words: list[str], noise: float) -> list[float]:
    """The mixture of star distributions over all combinations of tastes on the disputed words."""
    base = 3 + sum(CLEAR.get(word, 0.0) for word in words)
    total = [0.0] * 5
    disputed = [DISPUTED[word] for word in words if word in DISPUTED]
    tastes = [((share, liked), (1 - share, disliked)) for share, liked, disliked in disputed]
    for combination in itertools.product(*tastes):
        share = math.prod(weight for weight, _ in combination)
        for star, p in enumerate(stars(base + sum(value for _, value in combination), noise)):
            total[star] += share * p
    return total


def write_review(rng: random.Random) -> tuple[str, list[str], float]:
    """A review, its judging words and the raters' noise. A disputed word describes two aspects in five."""
    place = rng.choice(list(PLACES))
    aspects = rng.sample(PLACES[place], rng.choice([1, 2, 2, 3]))
    words = [rng.choice(list(DISPUTED if rng.random() < 0.4 else CLEAR)) for _ in aspects]
    parts = [rng.choice(SENTENCES).format(aspect, word) for aspect, word in zip(aspects, words, strict=True)]
    half_hearted = rng.random() < 0.2
    opening = rng.choice(OPENINGS).format(place)
    doubt = ", " + rng.choice(HALF_HEARTED) if half_hearted else ""
    return f"{opening}: {', and '.join(parts)}{doubt}.", words, WIDE_NOISE if half_hearted else NOISE


def make_panel(train: int, test: int, votes: int, seed: int) -> list[dict]:
    """Items in the format of load_items, no two with the same review."""
    rng, seen, rows = random.Random(seed), set(), []
    while len(rows) < train + test:
        text, words, noise = write_review(rng)
        if text in seen:
            continue
        seen.add(text)
        truth = true_distribution(words, noise)
        ballots = rng.choices("12345", weights=truth, k=votes)
        row = {"id": f"review-{len(rows):04d}", "split": "train" if len(rows) < train else "test"}
        row |= {"prompt": PROMPT.format(text), "counts": {star: ballots.count(star) for star in "12345"}}
        rows.append(row | {"truth": {star: round(p, 5) for star, p in zip("12345", truth, strict=True)}})
    return rows


SAMPLE = str(Path(__file__).with_name("panel.jsonl"))


def main(out: str = SAMPLE, train: int = 1200, test: int = 300, votes: int = 5, seed: int = 1) -> None:
    """out: the file to write. train, test: items of each. votes: an item. seed: of everything random."""
    if min(train, test, votes) < 1:
        sys.exit("train, test, votes: must be 1 or more")
    rows = make_panel(train, test, votes, seed)
    Path(out).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"wrote {out}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
