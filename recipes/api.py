"""Measure a closed or served model as a raw judge, through any OpenAI-compatible endpoint.

    pip install openai
    OPENAI_API_KEY=... python recipes/api.py --items test.jsonl --model gpt-4o-mini --price_in 0.15
    python recipes/api.py --items test.jsonl --base_url http://localhost:8000/v1 --model mine  # vLLM, ...
    python recipes/api.py --items test.jsonl --base_url ... --model ... --samples 20    # no log-probabilities
    python recipes/api.py --items test.jsonl --base_url ... --model judge --render merged  # ours, under vLLM

Label probabilities come from the first answer token: the log-probabilities of the endpoint's --top tokens,
spellings added up. A token counts for a label if it is a spelling of the label or begins one, white space
around it and capitals aside; with --match whole it must be one. A token that begins two labels counts for
none. Where such tokens hold over 1 % of the probability, the item is refused. Labels outside the top tokens
count as 0, as in the paper. Items whose labels hold less than --min_mass are refused, dropped or kept, as
--low_mass says.

With --render, the tokenizer of a run folder or model folder makes the prompts. They go to the completions
endpoint as token ids, and vLLM is asked for exactly the labels' tokens. So probabilities and mass are those
of the full vocabulary, as our own judge has them.

Every answer is appended to cache.jsonl in --out at once, so that a stopped run goes on without paying
twice. The key is read from the environment and stands in no file. Items with "swap" (see recipes/judge.py)
are asked in both orders. The folder is one that plots/figures.py and plots/report.py draw.
"""

import asyncio
import collections
import contextlib
import dataclasses
import email.utils
import hashlib
import json
import math
import os
import random
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import distjudge
from distjudge import InputError, Item

OPENAI = "https://api.openai.com/v1"
WAYS_OUT = "give --spellings that begin apart, use --match whole if every label is one token, or --samples n"
PILOT = 16  # the first prompts go alone: an endpoint that cannot be read is refused before all is paid
USAGE = ("requests", "prompt_tokens", "completion_tokens")
SHOWN = "kl kl_noise_floor kl_marginal accuracy label_mass label_mass_min labels_missing order_flips".split()


class EndpointError(RuntimeError):
    """The endpoint fails for good, or the money is spent."""

    def __str__(self) -> str:
        return f"{self.args[0]}. The answers so far are kept; the same command goes on from here"


@dataclasses.dataclass
class ApiConfig:
    items: tuple[str, ...]
    """Items with votes: one or more .jsonl or .jsonl.gz files."""
    model: str
    """The model's name at the endpoint."""
    out: str = "runs/api"
    """The folder for the results."""
    base_url: str = OPENAI
    """The endpoint, for example http://localhost:8000/v1."""
    key_env: str = "OPENAI_API_KEY"
    """The environment variable with the key. It may be missing where --base_url is not OpenAI's."""
    split: Literal["all", "train", "test"] = "all"
    """Judge only the items with this "split". With test, the others give the marginal to compare with."""
    train: tuple[str, ...] = ()
    """Training items, only for the marginal to compare with."""
    limit: int = 0
    """Only the first so many items; 0 is all."""

    labels: tuple[str, ...] = ()
    """Label order. Default: numeric order, or the order of the first item's counts."""
    spellings: tuple[str, ...] = ()
    """More spellings of a label, as LABEL=TEXT,TEXT; they add up."""
    match: Literal["begin", "whole"] = "begin"
    """Whether a token that only begins a label counts for it, or only one that is the whole label."""
    top: int = 20
    """How many tokens' log-probabilities to ask for (OpenAI gives 20, the paper's models gave 5)."""
    samples: int = 0
    """Count the labels of so many answers, for endpoints without log-probabilities."""
    render: str = ""
    """A run folder or model folder whose tokenizer renders the prompts (vLLM; see above)."""
    system: str = ""
    """A system message before the prompt."""
    extra: str = ""
    """Request fields, as JSON; null takes one out: {"max_tokens": null, "max_completion_tokens": 8}"""
    min_mass: float = 0.5
    """Items whose labels hold less probability (or share of the samples) together cannot be read."""
    low_mass: Literal["refuse", "drop", "keep"] = "refuse"
    """What to do with them: stop, leave them out, or keep what was captured (nothing captured: uniform)."""

    concurrency: int = 8
    """Requests at a time."""
    timeout: float = 60.0
    """Seconds a request may take."""
    retries: int = 6
    """How often a request is tried again after 408, 409, 425, 429, 5xx, a timeout or a malformed answer."""
    max_wait: float = 120.0
    """Longest wait between two tries; an endpoint that asks for more stops the run."""
    price_in: float = 0.0
    """Price of a million prompt tokens."""
    price_out: float = 0.0
    """Price of a million answer tokens."""
    max_cost: float = 0.0
    """Stop when this run has cost so much; 0 is never."""

    def check(self) -> None:
        for name in ("limit", "samples", "retries", "max_wait", "price_in", "price_out", "max_cost"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name}: must be 0 or more, not {getattr(self, name)}")
        if min(self.top, self.concurrency) < 1 or not self.timeout > 0 or not 0 <= self.min_mass <= 1:
            raise InputError("top, concurrency: must be 1 or more, timeout above 0, min_mass between 0 and 1")
        if self.max_cost and not self.price_in + self.price_out:
            raise InputError("max_cost: needs price_in and price_out")
        if self.render and (self.samples or self.system or self.spellings):
            raise InputError("render: goes without samples, system and spellings: the run folder has its own")
        if urlsplit(self.base_url).scheme not in ("http", "https"):
            raise InputError(f"base_url: must begin with http:// or https://, not '{self.base_url}'")
        try:
            if not isinstance(json.loads(self.extra or "{}"), dict):
                raise InputError("extra: must be a JSON object")
        except json.JSONDecodeError as error:
            raise InputError(f"extra: broken JSON: {error}") from None


# --- reading labels ---
class LabelReader:
    """Which label a token, or a sampled answer, stands for. Raises InputError for labels that look alike."""

    def __init__(self, labels: Sequence[str], config: ApiConfig):
        spellings = distjudge.parse_spellings(config.spellings)
        if unknown := sorted(set(spellings) - set(labels)):
            raise InputError(f"spellings: unknown label {distjudge.listed(unknown)}")
        self.labels, self.match, self.texts = labels, config.match, {}
        for i, label in enumerate(labels):
            for text in map(self.normal, spellings.get(label, [label])):
                if not text or self.texts.setdefault(text, i) != i:
                    wrong = f"is one of '{labels[self.texts[text]]}' too" if text else "is empty"
                    raise InputError(f"spellings: label '{label}': '{text}' {wrong}")
        if not config.samples and self.match == "begin":  # then no first token may tell which label is meant
            for text, i in self.texts.items():
                longer = [other for other, k in self.texts.items() if k != i and other.startswith(text)]
                if longer:
                    raise InputError(f"labels: '{text}' begins '{longer[0]}' too; {WAYS_OUT}")

    def normal(self, text: str) -> str:
        """Without white space around it, tokenizers' marks for it included, and in small letters."""
        return re.sub("[\u0120\u2581\u010a]", " ", text).strip().casefold()

    def token(self, token: str) -> int | None:
        """The label a token counts for, -1 where it begins two, None for anything else."""
        text = self.normal(token)
        if not text or text in self.texts or self.match == "whole":
            return self.texts.get(text)
        owners = {i for spelling, i in self.texts.items() if spelling.startswith(text)}
        return owners.pop() if len(owners) == 1 else -1 if owners else None

    def read(self, top: Iterable[tuple[str, float]]) -> tuple[torch.Tensor, float]:
        """Captured probabilities of the labels, (C,) float64, and that of tokens that begin two labels."""
        q = torch.zeros(len(self.labels) + 1, dtype=torch.float64)  # the last place is for token()'s -1
        for token, logprob in top:
            label = self.token(token)
            if label is not None:
                q[label] += math.exp(logprob)
        return q[:-1], q[-1].item()

    def answer(self, text: str) -> int | None:
        """The label an answer begins with, after white space and marks, and before no letter or digit."""
        text = self.normal(text).lstrip(" \t\r\n\"'`*_([{")
        for spelling in sorted(self.texts, key=len, reverse=True):
            if text.startswith(spelling) and not text[len(spelling) :][:1].isalnum():
                return self.texts[spelling]
        return None

    def request(self, prompt: str, config: ApiConfig) -> dict[str, Any]:
        messages = [{"role": "system", "content": config.system}] * bool(config.system)
        body = {"model": config.model, "messages": [*messages, {"role": "user", "content": prompt}]}
        if config.samples:
            return body | {"temperature": 1.0, "max_tokens": 8}
        return body | {"temperature": 0, "max_tokens": 1, "logprobs": True, "top_logprobs": config.top}


class Renderer:
    """Prompts as token ids and labels as tokens, as the judge of a run or model folder has them."""

    def __init__(self, labels: Sequence[str], config: ApiConfig):
        folder, saved = Path(config.render), {}
        if (folder / "judge.json").is_file():
            saved = json.loads((folder / "judge.json").read_text(encoding="utf-8"))
            if saved["labels"] != labels:
                raise InputError(f"{folder}: labels: that judge has {saved['labels']}, the items {labels}")
        tokenizer = distjudge.load_tokenizer(str(folder / "tokenizer" if saved else folder))
        self.encoder, self.labels = distjudge.PromptEncoder(tokenizer, saved.get("frame")), labels
        tokens = distjudge.label_tokens(tokenizer, labels, saved.get("spellings"), self.encoder)
        if tokens.whole:
            raise InputError(f"{folder}: labels: some begin with the same token, which no endpoint can tell")
        self.owner = {f"token_id:{ids[0]}": label for label, ids in tokens.sequences}

    def read(self, top: Iterable[tuple[str, float]]) -> tuple[torch.Tensor, float]:
        q, found = torch.zeros(len(self.labels), dtype=torch.float64), dict(top)
        if not set(self.owner) <= set(found):
            raise InputError("render: the endpoint ignores logprob_token_ids: it is not vLLM, or an old one")
        for token, label in self.owner.items():
            q[label] += math.exp(found[token])
        return q, 0.0

    def request(self, prompt: str, config: ApiConfig) -> dict[str, Any]:
        wanted = sorted(int(token.split(":")[1]) for token in self.owner)
        body = {"model": config.model, "prompt": self.encoder(prompt), "temperature": 0, "max_tokens": 1}
        return body | {"logprobs": 1, "logprob_token_ids": wanted, "return_tokens_as_token_ids": True}


# --- asking ---
class Cache:
    """Answers by the hash of what was asked: JSON lines, each written to the disk before it is used."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.answers, self.file, raw = {}, open(path, "a+b"), b"\n"
        self.file.seek(0)
        for number, raw in enumerate(self.file, 1):
            try:
                row = json.loads(raw)
                self.answers[row["key"]] = row["answer"]
            except (ValueError, KeyError, TypeError):
                print(f"{path}:{number}: not an answer; it will be asked for again", file=sys.stderr)
        if not raw.endswith(b"\n"):  # a line that was cut
            self.file.write(b"\n")

    def put(self, key: str, answer: dict[str, Any]) -> None:
        self.file.write((json.dumps({"key": key, "answer": answer}) + "\n").encode())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.answers[key] = answer


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds to wait by the header Retry-After, seconds or a date (RFC 9110, 10.2.3); None without one."""
    value = (headers.get("retry-after") or "").strip()
    with contextlib.suppress(ValueError):
        return max(0.0, float(value)) if math.isfinite(float(value)) else None
    with contextlib.suppress(TypeError, ValueError, IndexError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now)
    return None


def plain_url(url: str) -> str:
    """A URL without a user and password that may stand in it, nor a query."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


class Endpoint:
    """Asks the endpoint, so many requests at a time, with retries; keeps the cache and the bill."""

    def __init__(self, config: ApiConfig):
        try:
            import openai
        except ImportError:
            raise InputError("recipes/api.py needs the openai client: pip install openai") from None
        self.openai, self.config, self.url = openai, config, plain_url(config.base_url)
        self.key = os.environ.get(config.key_env, "").strip()
        if not self.key and config.base_url == OPENAI:
            raise InputError(f"the key is missing: set the environment variable {config.key_env}")
        settings = {"base_url": config.base_url, "timeout": config.timeout, "max_retries": 0}
        self.client = openai.AsyncOpenAI(api_key=self.key or "none", **settings)
        self.cache = Cache(Path(config.out) / "cache.jsonl")
        self.gate, self.asking = asyncio.Semaphore(config.concurrency), collections.defaultdict(asyncio.Lock)
        self.not_before, self.retried, self.answered_by, self.paid = 0.0, 0, set(), collections.Counter()

    def clean(self, text: Any) -> str:
        """A message without the key, should the endpoint have sent it back."""
        return distjudge.short(str(text).replace(self.key, "***") if self.key else text, 300)

    def cost(self, usage: Mapping[str, int]) -> float:
        prices = {"prompt_tokens": self.config.price_in, "completion_tokens": self.config.price_out}
        return sum(usage[name] * price for name, price in prices.items()) / 1e6

    async def ask(self, body: dict[str, Any], number: int = 0) -> dict[str, Any]:
        """The endpoint's answer, the number-th to this request; from the cache, if it was given before."""
        asked = {name: value for name, value in body.items() if name != "n"}  # more samples add to these
        key = hashlib.sha256(json.dumps([self.url, asked, number], sort_keys=True).encode()).hexdigest()
        async with self.asking[key]:  # the same prompt twice is paid once
            if key not in self.cache.answers:
                async with self.gate:
                    self.cache.put(key, await self.insist(body))
        answer = self.cache.answers[key]
        self.answered_by |= {answer["model"]} - {None}
        return answer

    async def insist(self, body: dict[str, Any]) -> dict[str, Any]:
        """Sends a request until it is answered.

        Raises InputError for what the endpoint refuses, EndpointError when it fails for good.
        """
        config = self.config
        for attempt in range(config.retries + 1):
            while (wait := self.not_before - time.monotonic()) > 0:  # one request's Retry-After holds for all
                await asyncio.sleep(wait)
            if config.max_cost and self.cost(self.paid) >= config.max_cost:
                spent = f"this run has cost {self.cost(self.paid):.4f}, max_cost is {config.max_cost:g}"
                raise EndpointError(f"{self.url}: {spent}")
            asked = 0.0
            try:
                return await self.send(body)
            except InputError:
                raise
            except self.openai.APIStatusError as error:
                code, why = error.status_code, f"{error.status_code}: {self.clean(error.message)}"
                if code not in (408, 409, 425, 429) and code < 500:
                    raise InputError(f"{self.url}: {why}") from None
                if getattr(error, "code", None) == "insufficient_quota":
                    raise EndpointError(f"{self.url}: {why}") from None
                asked = retry_after(error.response.headers, time.time()) or 0.0
            except self.openai.APITimeoutError:
                why = f"no answer within {config.timeout:g} s"
            except self.openai.APIConnectionError as error:
                why = self.clean(f"{error}: {error.__cause__}")
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                why = self.clean(f"malformed answer: {type(error).__name__}: {error}")
            if asked > config.max_wait:
                why += f"; it asks to wait {asked:.0f} s, max_wait is {config.max_wait:g}"
                raise EndpointError(f"{self.url}: {why}")
            self.not_before = max(self.not_before, time.monotonic() + asked)
            if attempt < config.retries:
                self.retried += 1
                await asyncio.sleep(max(asked, min(config.max_wait, 2**attempt) * random.uniform(0.5, 1)))
        raise EndpointError(f"{self.url}: {why} (tried {config.retries + 1} times)")

    async def send(self, body: dict[str, Any]) -> dict[str, Any]:
        """One request, and what we keep of its answer: log-probabilities or texts, and numbers of tokens."""
        chat = "messages" in body
        at = self.client.chat.completions if chat else self.client.completions
        known = {name: body[name] for name in ("model", "prompt", "messages") if name in body}
        more = {name: value for name, value in body.items() if name not in known}
        reply = await at.with_raw_response.create(**known, extra_body=more)
        content = json.loads(reply.http_response.text)
        found = content.get("usage") or {}
        usage = {"requests": 1} | {name: int(found.get(name) or 0) for name in USAGE[1:]}
        self.paid.update(usage)
        choices = content["choices"]
        if not choices:
            raise ValueError("no choices")
        answer = {"model": content.get("model"), "usage": usage}
        if not body.get("logprobs"):
            return answer | {"texts": [choice["message"]["content"] or "" for choice in choices]}
        tokens = (choices[0].get("logprobs") or {}).get("content" if chat else "top_logprobs")
        if tokens is None:
            raise InputError(f"{self.url}: the answers hold no log-probabilities; use --samples n")
        first = tokens[0] if tokens else {}
        if chat:
            found = [(entry["token"], entry["logprob"]) for entry in first.get("top_logprobs", [])]
            if first and first["token"] not in dict(found):  # what was chosen, from below the top
                found.append((first["token"], first["logprob"]))
        else:
            found = list(first.items())
        return answer | {"top": [(token, float(logprob)) for token, logprob in found]}


@dataclasses.dataclass
class Reading:
    """What was read for a prompt: q (C,) normalised (uniform where mass is 0), mass, labels not seen."""

    q: torch.Tensor
    mass: float
    missing: int
    usage: collections.Counter[str]


async def read_prompt(prompt: str, where: str, endpoint: Endpoint, reader: LabelReader | Renderer) -> Reading:
    config, usage, texts = endpoint.config, collections.Counter(), []
    body = reader.request(prompt, config) | json.loads(config.extra or "{}")
    body = {name: value for name, value in body.items() if value is not None}
    while not usage or len(texts) < config.samples:  # an endpoint may give fewer samples than asked for
        wanted = config.samples - len(texts)
        answer = await endpoint.ask(body | ({"n": wanted} if wanted > 1 else {}), usage["requests"])
        usage.update(answer["usage"])
        texts += answer.get("texts", [])
    if config.samples:
        found = [reader.answer(text) for text in texts[: config.samples]]
        counts = [found.count(label) for label in range(len(reader.labels))]
        q = torch.tensor(counts, dtype=torch.float64) / len(found)
    else:
        q, unclear = reader.read(answer["top"])
        if unclear > 0.01:
            unclear = f"tokens that begin two labels hold {unclear:.1%} of the probability"
            raise InputError(f"{where}: {unclear}; {WAYS_OUT}")
    mass, missing = q.sum().item(), int((q == 0).sum())
    return Reading(q / mass if mass else torch.full_like(q, 1 / len(q)), mass, missing, usage)


async def read_all(items: Sequence[Item], config: ApiConfig) -> tuple[list[Reading], Endpoint]:
    """Readings of all prompts, an item's swapped one behind its own, and the endpoint with its bill."""
    from tqdm.auto import tqdm

    reader = (Renderer if config.render else LabelReader)(distjudge.labels_of(items), config)
    prompts = []
    for item in items:
        where = f"{item.where}: item '{distjudge.short(item.id)}'"
        prompts += [(prompt, where) for prompt in item.prompts]
    endpoint, readings = Endpoint(config), []
    bar = tqdm(total=len(prompts), desc=config.model, unit="prompt", disable=not sys.stderr.isatty())
    async with endpoint.client:
        with bar, endpoint.cache.file:
            for part in (prompts[:PILOT], prompts[PILOT:]):
                tasks = [asyncio.ensure_future(read_prompt(*pair, endpoint, reader)) for pair in part]
                for task in tasks:
                    task.add_done_callback(lambda _: bar.update())
                try:
                    readings += await asyncio.gather(*tasks)
                finally:  # after an error the others must not go on paying
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)
                check_mass(readings, prompts, config)
    return readings, endpoint


def check_mass(readings: Sequence[Reading], prompts: Sequence[tuple[str, str]], config: ApiConfig) -> None:
    low = [i for i, reading in enumerate(readings) if reading.mass < config.min_mass]
    if low and config.low_mass == "refuse":
        what = "of the samples are a label" if config.samples else "of the probability is on labels"
        way = "sample longer answers (--extra)" if config.samples else "use --samples n"
        raise InputError(
            f"{prompts[low[0]][1]}: only {readings[low[0]].mass:.1%} {what}; so it is for {len(low)} of the "
            f"{len(readings)} prompts judged so far (min_mass {config.min_mass:g}). Let the prompt ask for "
            f"the label only, name --spellings, {way}, or use --low_mass"
        )


# --- the run ---
def load(config: ApiConfig) -> tuple[list[Item], list[Item]]:
    """The items to judge, and those that give the marginal."""
    items = distjudge.load_items(*config.items, labels=config.labels or None)
    train = distjudge.load_items(*config.train, labels=distjudge.labels_of(items)) if config.train else []
    if config.split == "test" and not train:
        train = [item for item in items if item.split == "train"]
    items = [item for item in items if config.split in ("all", item.split)]
    if not items:
        raise InputError(f"{config.items[0]}: split: no item has {config.split}")
    return items[: config.limit or None], train


def main(config: ApiConfig) -> None:
    config.check()
    items, train = load(config)
    labels, out = distjudge.labels_of(items), Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    readings, endpoint = asyncio.run(read_all(items, config))
    rows, kept, predicted, own = [], [], [], iter(readings)
    for item in items:
        found = [next(own) for _ in item.prompts]
        low, q = any(reading.mass < config.min_mass for reading in found), found[0].q
        if low and config.low_mass == "drop":
            continue
        row: dict[str, Any] = {"id": item.id, "counts": item.counts, "prompt": item.prompt}
        if item.swap:
            q, row["flipped"] = distjudge.average_orders(q, found[1].q, item.swap.labels)
        row["predicted"] = dict(zip(labels, q.tolist(), strict=True))
        row["label_mass"] = sum(reading.mass for reading in found) / len(found)
        row |= {"low_mass": True} if low else {}
        row |= {name: value for name in ("group", "truth") if (value := getattr(item, name)) is not None}
        rows.append(row)
        kept.append(item)
        predicted.append(q)
    dropped = len(items) - len(kept)
    if not kept:
        raise InputError(f"no items are left: all {dropped} are under min_mass {config.min_mass:g}")
    distjudge.write_lines(out / "predictions.jsonl", [json.dumps(row, ensure_ascii=False) for row in rows])
    masses = [row["label_mass"] for row in rows]
    metrics = distjudge.evaluate(torch.stack(predicted), kept, train_items=train or None, label_mass=masses)
    flips = [row["flipped"] for row in rows if "flipped" in row]
    usage = sum((reading.usage for reading in readings), collections.Counter())
    metrics |= {"order_flips": sum(flips) / len(flips)} if flips else {}
    metrics |= {"dropped": dropped, "labels_missing": sum(r.missing for r in readings) / len(readings)}
    metrics |= {name: usage[name] for name in USAGE} | {"cost": endpoint.cost(usage)}
    distjudge.write_json(out / "metrics.json", metrics)
    about = {"base_url": endpoint.url, "recipe": "api", "labels": labels, "files": config.items}
    about |= {"versions": distjudge.versions() | {"openai": endpoint.openai.__version__}}
    about |= {"answered_by": sorted(endpoint.answered_by), "items": {"train": len(train), "test": len(kept)}}
    distjudge.write_json(out / "config.json", dataclasses.asdict(config) | about)
    shown = [f"{name} {metrics[name]:.3f}" for name in SHOWN if metrics.get(name) is not None]
    print(f"{len(kept)} items: {', '.join(shown)}")
    if dropped:
        print(f"dropped {dropped} of {len(items)} items under label mass {config.min_mass:g}")
    paid, retried = endpoint.paid, endpoint.retried
    print(
        f"{usage['requests']} requests, {usage['prompt_tokens']:,} + {usage['completion_tokens']:,} tokens, "
        f"cost {metrics['cost']:.4f}; of these now {paid['requests']} requests ({retried} retries), cost "
        f"{endpoint.cost(paid):.4f}, the rest from the cache\nwrote {out}"
    )


if __name__ == "__main__":
    distjudge.cli(main, ApiConfig, failures=(EndpointError,))
