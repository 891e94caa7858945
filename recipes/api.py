"""Measure a closed or served model as a raw judge, through any OpenAI-compatible endpoint. Needs: pip install openai

    OPENAI_API_KEY=... python recipes/api.py --items test.jsonl --model gpt-4o-mini --price_in 0.15 --price_out 0.6
    python recipes/api.py --items test.jsonl --base_url http://localhost:8000/v1 --model my-model          # vLLM, llama.cpp
    python recipes/api.py --items test.jsonl --base_url ... --model ... --samples 20                       # no log-probabilities
    python recipes/api.py --items test.jsonl --base_url ... --model merged --render merged                 # our judge under vLLM

Label probabilities come from the log-probabilities of the first answer token: what the endpoint's --top tokens hold, spellings
added up. Without the endpoint's tokenizer a token counts for a label if, white space around it and case aside, it is a spelling of
the label or the beginning of one (--match whole: only if it is one). What begins two labels counts for none, and above 1 % of an
item's probability it is refused. Labels outside the top tokens count as 0, as in the paper; the mass that was captured is reported
for each item, and items under --min_mass are refused, dropped or kept as --low_mass says.

With --render a run folder's or model folder's own tokenizer makes the prompts, which go to the completions endpoint as token
ids, and vLLM is asked for exactly the labels' tokens: probabilities and mass of the full vocabulary, as our own judge has them.

Every answer is appended to a cache at once, so that a stopped run goes on without paying twice; the key is read from the environment
and stands in no file. Items with "swap" (see recipes/judge.py) are asked in both orders. Writes predictions.jsonl, metrics.json and
config.json, as a run folder has them: plots/figures.py and plots/report.py draw them.
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

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch

import distjudge
from distjudge import InputError, Item, average_orders

OPENAI = "https://api.openai.com/v1"
WAYS_OUT = "give --spellings that begin apart, use --match whole if every label is one token there, or --samples n"
PILOT = 16  # the first prompts are judged alone: an endpoint that cannot be read is refused before all is paid


class EndpointError(RuntimeError):
    """The endpoint does not answer, or not in time, or the money is spent. What came before is in the cache."""


@dataclasses.dataclass
class ApiConfig:
    items: tuple[str, ...]
    """Items with votes: one or more .jsonl or .jsonl.gz files."""
    model: str
    """The model's name at the endpoint."""
    out: str = "runs/api"
    """The folder for the results; the cache is in it too, unless --cache names another place."""
    base_url: str = OPENAI
    """The endpoint, for example http://localhost:8000/v1."""
    key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the key. It may be missing where --base_url is not OpenAI's."""
    split: Literal["all", "train", "test"] = "all"
    """Judge only the items whose "split" is this; with test, the training items give the marginal to compare with."""
    limit: int = 0
    """Only the first so many items; 0 is all."""
    labels: tuple[str, ...] = ()
    """Label order. Default: numeric order, or the order of the first item's counts."""
    ordered: bool | None = None
    """Whether the labels are a scale. Default: they are if all are numbers."""
    spellings: tuple[str, ...] = ()
    """More spellings of a label, as LABEL=TEXT,TEXT; they add up."""
    match: Literal["begin", "whole"] = "begin"
    """Whether a token that only begins a label counts for it, or only one that is the whole label."""
    case: bool = False
    """Tell capitals from small letters."""

    top: int = 20
    """How many tokens' log-probabilities to ask for (OpenAI gives 20, the paper's models gave 5)."""
    samples: int = 0
    """Ask for so many answers and count labels, for endpoints without log-probabilities; 0 reads log-probabilities."""
    smoothing: float = 0.0
    """With --samples: added to every label's count, so that a label never sampled is not ruled out."""
    temperature: float = 1.0
    """With --samples: the temperature."""
    max_tokens: int = 8
    """With --samples: the longest answer in tokens."""
    token_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """How the endpoint calls the longest answer."""
    system: str = ""
    """A system message before the prompt."""
    extra: str = ""
    """More fields of the request, as JSON, for example '{"chat_template_kwargs": {"enable_thinking": false}}'."""
    render: str = ""
    """A run folder or model folder whose tokenizer renders the prompts (vLLM; see above)."""
    min_mass: float = 0.5
    """Items whose labels hold less probability (or share of the samples) together cannot be read."""
    low_mass: Literal["refuse", "drop", "keep"] = "refuse"
    """What to do with such items: stop, leave them out and say how many, or keep what was captured (nothing captured: uniform)."""

    concurrency: int = 8
    """Requests at a time."""
    timeout: float = 60.0
    """Seconds a request may take."""
    retries: int = 6
    """How often a request is tried again after 408, 409, 425, 429, 5xx, a timeout, a cut connection or a malformed answer."""
    first_wait: float = 1.0
    """Seconds before the first retry, doubled each time (half of it at random); Retry-After is honoured where it is longer."""
    max_wait: float = 120.0
    """Longest wait; an endpoint that asks for more stops the run."""
    price_in: float = 0.0
    """Price of a million prompt tokens."""
    price_out: float = 0.0
    """Price of a million answer tokens."""
    max_cost: float = 0.0
    """Stop when this run has cost so much; 0 is never."""
    cache: str = ""
    """The cache file. Default: cache.jsonl in the folder of the results."""
    train: tuple[str, ...] = ()
    """Training items, only for the marginal to compare with."""
    seed: int = 0
    """Seed of the noise floor's simulation."""

    def check(self) -> None:
        """Raises InputError naming the field for a value outside its range."""
        for name, low in dict(limit=0, top=1, samples=0, smoothing=0, temperature=0, max_tokens=1, concurrency=1, retries=0, first_wait=0,
                              max_wait=0, price_in=0, price_out=0, max_cost=0).items():
            if not low <= getattr(self, name) < math.inf:
                raise InputError(f"{name}: must be {low} or more, not {getattr(self, name)}")
        if not self.timeout > 0:
            raise InputError(f"timeout: must be above 0, not {self.timeout}")
        if not 0 <= self.min_mass <= 1:
            raise InputError(f"min_mass: must be between 0 and 1, not {self.min_mass}")
        if self.max_cost and not (self.price_in or self.price_out):
            raise InputError("max_cost: needs price_in and price_out")
        if self.render and (self.samples or self.system or self.spellings):
            raise InputError("render: goes without samples, system and spellings: the run folder has its own")
        if urlsplit(self.base_url).scheme not in ("http", "https"):
            raise InputError(f"base_url: must begin with http:// or https://, not '{distjudge.short(self.base_url)}'")
        try:
            extra = json.loads(self.extra or "{}")
        except ValueError as error:
            raise InputError(f"extra: broken JSON: {error}") from None
        if not isinstance(extra, dict):
            raise InputError("extra: must be a JSON object")


# --- reading labels --------------------------------------------------------------------------------------------------------
class LabelReader:
    """Which label a token, or a sampled answer, stands for. Raises InputError for labels that cannot be told apart by it.

    A token is compared without the white space around it (and tokenizers' marks for it) and, unless `case`, in small letters.
    """

    def __init__(self, labels: Sequence[str], spellings: Mapping[str, Sequence[str]] | None = None, match: str = "begin",
                 case: bool = False):
        self.labels, self.match, self.case = list(labels), match, case
        spellings = dict(spellings or {})
        if unknown := sorted(set(spellings) - set(labels)):
            raise InputError(f"spellings: unknown label {distjudge.listed(unknown)}; the labels are {distjudge.listed(labels)}")
        self.texts: dict[str, int] = {}
        for i, label in enumerate(labels):
            for text in spellings.get(label, [label]):
                text = self.normal(text)
                if not text or self.texts.setdefault(text, i) != i:
                    wrong = f"is one of '{labels[self.texts[text]]}' too" + "; --case tells capitals" * (not case) if text else "is empty"
                    raise InputError(f"spellings: label '{label}': '{text}' {wrong}")

    def normal(self, text: str) -> str:
        text = text.replace("\u0120", " ").replace("\u2581", " ").replace("\u010a", " ").strip()
        return text if self.case else text.casefold()

    def check_first_tokens(self) -> None:
        """Raises InputError where a label is the beginning of another: then no first token tells which one is meant."""
        for text, i in self.texts.items():
            longer = [other for other, k in self.texts.items() if k != i and other.startswith(text)]
            if longer and self.match == "begin":
                raise InputError(f"labels: '{text}' begins '{longer[0]}' too, so the first token may not tell them apart; {WAYS_OUT}")

    def token(self, token: str) -> int | None:
        """The label a token counts for, -1 where it begins two, None for anything else."""
        text = self.normal(token)
        if not text or text in self.texts or self.match == "whole":
            return self.texts.get(text)
        owners = {i for spelling, i in self.texts.items() if spelling.startswith(text)}
        return owners.pop() if len(owners) == 1 else -1 if owners else None

    def read(self, top: Iterable[tuple[str, float]]) -> tuple[torch.Tensor, float]:
        """Probabilities of the labels as captured, (C,) float64, not normalised, and that of tokens that begin two labels."""
        q, unclear = torch.zeros(len(self.labels), dtype=torch.float64), 0.0
        for token, logprob in top:
            label = self.token(token)
            if label == -1:
                unclear += math.exp(logprob)
            elif label is not None:
                q[label] += math.exp(logprob)
        return q, unclear

    def answer(self, text: str) -> int | None:
        """The label that an answer begins with, after white space, quotes and asterisks, and before anything but letters and digits."""
        text = self.normal(text).lstrip(" \t\r\n\"'`*_([{")
        for spelling in sorted(self.texts, key=len, reverse=True):
            if text.startswith(spelling) and not text[len(spelling) : len(spelling) + 1].isalnum():
                return self.texts[spelling]
        return None


class Renderer:
    """Prompts as token ids and labels as tokens, as the judge of a run folder (or a plain model folder) has them."""

    def __init__(self, folder: str, labels: Sequence[str]):
        path, saved = Path(folder), {}
        if (path / "judge.json").is_file():
            saved = json.loads((path / "judge.json").read_text(encoding="utf-8"))
            if saved["labels"] != list(labels):
                theirs = distjudge.listed(saved["labels"])
                raise InputError(f"{folder}: labels: that judge has {theirs}, the items {distjudge.listed(labels)}")
        tokenizer = distjudge.load_tokenizer(str(path / "tokenizer") if saved else folder)
        self.encoder = distjudge.PromptEncoder(tokenizer, saved.get("frame"))
        self.tokens = distjudge.label_tokens(tokenizer, labels, saved.get("spellings"), self.encoder)
        if self.tokens.whole:
            raise InputError(f"{folder}: labels: some begin with the same token, and whole labels are not read from an endpoint")
        self.owner = {ids[0]: label for label, ids in self.tokens.sequences}

    def read(self, top: Iterable[tuple[str, float]]) -> tuple[torch.Tensor, float]:
        q, seen = torch.zeros(len(self.tokens.labels), dtype=torch.float64), set()
        for token, logprob in top:
            found = re.fullmatch(r"token_id:(\d+)", token)
            if not found:
                raise InputError("render: the endpoint answers with text, not with token ids: it is not vLLM, or an old one")
            number = int(found[1])
            if number in self.owner and number not in seen:
                q[self.owner[number]] += math.exp(logprob)
                seen.add(number)
        if seen != set(self.owner):
            raise InputError("render: the endpoint left out tokens asked for with logprob_token_ids: it is not vLLM, or an old one")
        return q, 0.0


# --- asking ----------------------------------------------------------------------------------------------------------------
class Cache:
    """Answers by the hash of what was asked: JSON lines, each written to the disk before it is used. A torn last line is cut off."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.answers, end = path, {}, 0
        if path.exists():
            with open(path, "rb") as file:
                for number, raw in enumerate(file, 1):
                    if not raw.endswith(b"\n"):
                        break
                    end += len(raw)
                    try:
                        row = json.loads(raw)
                        self.answers[row["key"]] = row["answer"]
                    except (ValueError, KeyError, TypeError):
                        print(f"{path}:{number}: not an answer; it will be asked for again", file=sys.stderr)
            os.truncate(path, end)
        self.file = open(path, "ab")

    def put(self, key: str, answer: dict[str, Any]) -> None:
        self.file.write((json.dumps({"key": key, "answer": answer}) + "\n").encode())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.answers[key] = answer

    def close(self) -> None:
        self.file.close()


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds to wait by the header Retry-After, which holds seconds or a date (RFC 9110, 10.2.3); None without a usable one."""
    value = (headers.get("retry-after") or "").strip()
    with contextlib.suppress(ValueError):
        return max(0.0, float(value)) if math.isfinite(float(value)) else None
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now)
    except (TypeError, ValueError, IndexError):
        return None


class Endpoint:
    """Asks the endpoint, a limited number of requests at a time, with retries; keeps the cache and the bill."""

    def __init__(self, config: ApiConfig, cache: Cache):
        try:
            import openai
        except ImportError:
            raise InputError("recipes/api.py needs the openai client: pip install openai") from None
        self.openai, self.config, self.cache = openai, config, cache
        self.key = os.environ.get(config.key_env, "").strip()
        if not self.key and config.base_url == OPENAI:
            raise InputError(f"the key is missing: set the environment variable {config.key_env}")
        self.client = openai.AsyncOpenAI(api_key=self.key or "none", base_url=config.base_url, timeout=config.timeout, max_retries=0)
        self.gate, self.not_before = asyncio.Semaphore(config.concurrency), 0.0
        self.paid = {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0}
        self.retried, self.answered_by, self.asking = 0, set(), collections.defaultdict(asyncio.Lock)

    def clean(self, text: Any) -> str:
        """A message without the key, should the endpoint have sent it back."""
        return distjudge.short(str(text).replace(self.key, "***") if self.key else text, 300)

    def cost(self, usage: Mapping[str, int]) -> float:
        return (usage["prompt_tokens"] * self.config.price_in + usage["completion_tokens"] * self.config.price_out) / 1e6

    async def ask(self, body: dict[str, Any], number: int = 0, hidden: Sequence[str] = ()) -> dict[str, Any]:
        """The endpoint's answer, from the cache if it was given before. Fields in `hidden` (the number of samples) do not matter for that.

        Raises InputError for requests the endpoint refuses, EndpointError when it fails for good.
        """
        asked = {name: value for name, value in body.items() if name not in hidden}
        key = hashlib.sha256(json.dumps([plain_url(self.config.base_url), asked, number], sort_keys=True).encode()).hexdigest()
        async with self.asking[key]:  # the same prompt twice is paid once
            if key not in self.cache.answers:
                async with self.gate:
                    answer = await self._insist(body)
                self.cache.put(key, answer)
        self.answered_by |= {self.cache.answers[key]["model"]} - {None}
        return self.cache.answers[key]

    async def _insist(self, body: dict[str, Any]) -> dict[str, Any]:
        config = self.config
        for attempt in range(config.retries + 1):
            while (wait := self.not_before - time.monotonic()) > 0:  # one request's Retry-After holds for all
                await asyncio.sleep(wait)
            if config.max_cost and self.cost(self.paid) >= config.max_cost:
                raise EndpointError(f"this run has cost {self.cost(self.paid):.4f}, max_cost is {config.max_cost:g}")
            try:
                return await self._send(body)
            except self.openai.APIStatusError as error:
                code, said = error.status_code, self.clean(error.message)
                if code not in (408, 409, 425, 429) and code < 500:
                    raise InputError(f"{plain_url(config.base_url)}: {code}: {said}") from None
                if getattr(error, "code", None) == "insufficient_quota":
                    raise EndpointError(f"{code}: {said}") from None
                why, asked = f"{code}: {said}", retry_after(error.response.headers, time.time())
            except self.openai.APITimeoutError:
                why, asked = f"no answer within {config.timeout:g} s", None
            except self.openai.APIConnectionError as error:
                why, asked = self.clean(f"{error}: {error.__cause__}"), None
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                if isinstance(error, InputError):
                    raise
                why, asked = self.clean(f"malformed answer: {type(error).__name__}: {error}"), None
            if (asked or 0) > config.max_wait:
                raise EndpointError(f"{why}; it asks to wait {asked:.0f} s, max_wait is {config.max_wait:g}")
            wait = min(config.max_wait, config.first_wait * 2**attempt) * random.uniform(0.5, 1)
            if asked is not None:
                wait = max(wait, asked)
                self.not_before = max(self.not_before, time.monotonic() + asked)
            if attempt < config.retries:
                self.retried += 1
                await asyncio.sleep(wait)
        raise EndpointError(f"{why} (tried {config.retries + 1} times)")

    async def _send(self, body: dict[str, Any]) -> dict[str, Any]:
        """One request, and what we keep of its answer: tokens and log-probabilities, or texts, and the number of tokens."""
        at = self.client.completions if "prompt" in body else self.client.chat.completions
        known = {name: body[name] for name in ("model", "prompt", "messages") if name in body}
        reply = await at.with_raw_response.create(**known, extra_body={k: v for k, v in body.items() if k not in known})
        content = json.loads(reply.http_response.text)
        usage = content.get("usage") or {}
        usage = {name: int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")}
        self.paid = {name: self.paid[name] + (usage | {"requests": 1})[name] for name in self.paid}
        choices = content["choices"]
        if not choices:
            raise ValueError("no choices")
        answer: dict[str, Any] = {"model": content.get("model"), "usage": usage}
        if not body.get("logprobs"):
            return answer | {"texts": [choice["message"]["content"] or "" for choice in choices]}
        logprobs = choices[0].get("logprobs")
        tokens = logprobs and logprobs.get("top_logprobs" if "prompt" in body else "content")
        if tokens is None:
            raise InputError(f"{plain_url(self.config.base_url)}: the answers hold no log-probabilities; use --samples n")
        if "prompt" in body:
            top = [(token, float(value)) for token, value in (tokens[0] if tokens else {}).items()]
        else:
            first = tokens[0] if tokens else {"top_logprobs": []}
            top = [(entry["token"], float(entry["logprob"])) for entry in first["top_logprobs"]]
            if tokens and first["token"] not in [token for token, _ in top]:
                top.append((first["token"], float(first["logprob"])))  # what was chosen, from below the top
        return answer | {"top": top}


def plain_url(url: str) -> str:
    """A URL without a user and password that may stand in it, nor a query."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def request_for(prompt: str, config: ApiConfig, renderer: Renderer | None) -> dict[str, Any]:
    """The body of the request for one prompt."""
    extra = json.loads(config.extra or "{}")
    if renderer:
        return {"model": config.model, "prompt": renderer.encoder(prompt), "temperature": 0, config.token_field: 1, "logprobs": 1,
                "logprob_token_ids": sorted(renderer.owner), "return_tokens_as_token_ids": True} | extra
    body = {"model": config.model, "messages": [{"role": "system", "content": config.system}] * bool(config.system)
            + [{"role": "user", "content": prompt}]}
    if config.samples:
        return body | {"temperature": config.temperature, config.token_field: config.max_tokens} | extra
    return body | {"temperature": 0, config.token_field: 1, "logprobs": True, "top_logprobs": config.top} | extra


@dataclasses.dataclass
class Reading:
    """What was read for one prompt: q (C,) normalised (uniform where nothing was captured), mass captured, labels not seen."""

    q: torch.Tensor
    mass: float
    missing: int
    usage: dict[str, int]


async def read_prompt(prompt: str, endpoint: Endpoint, reader: LabelReader | Renderer, where: str) -> Reading:
    config, renderer = endpoint.config, reader if isinstance(reader, Renderer) else None
    body, usage = request_for(prompt, config, renderer), {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0}
    texts: list[str] = []
    while True:
        wanted = max(1, config.samples - len(texts))
        answer = await endpoint.ask(body | ({"n": wanted} if wanted > 1 else {}), usage["requests"], hidden=("n",))
        usage = {name: usage[name] + (answer["usage"] | {"requests": 1})[name] for name in usage}
        texts += answer.get("texts", [])
        if len(texts) >= config.samples:  # an endpoint may give fewer answers than asked for, one at a time
            break
    if config.samples:
        found = [reader.answer(text) for text in texts[: config.samples]]
        counts = torch.tensor([float(found.count(c)) for c in range(len(reader.labels))], dtype=torch.float64)
        mass = counts.sum().item() / config.samples
        seen, q = counts > 0, counts + config.smoothing
    else:
        q, unclear = reader.read(answer["top"])
        if unclear > 0.01:
            raise InputError(f"{where}: tokens that begin two labels hold {unclear:.1%} of the probability; {WAYS_OUT}")
        seen, mass = q > 0, q.sum().item()
    q = q / q.sum() if q.sum() > 0 else torch.full_like(q, 1 / len(q))
    return Reading(q, mass, int((~seen).sum()), usage)


async def read_all(prompts: Sequence[tuple[str, str]], endpoint: Endpoint, reader: LabelReader | Renderer) -> list[Reading]:
    """Readings of (prompt, where) in order. The first ones alone, to refuse early what cannot be read."""
    from tqdm.auto import tqdm

    config = endpoint.config
    readings: list[Reading] = []
    with tqdm(total=len(prompts), desc=config.model, unit="prompt", disable=not sys.stderr.isatty()) as bar:
        async def one(prompt: str, where: str) -> Reading:
            reading = await read_prompt(prompt, endpoint, reader, where)
            bar.update()
            return reading

        for part in (prompts[:PILOT], prompts[PILOT:]):
            tasks = [asyncio.ensure_future(one(*pair)) for pair in part]
            try:
                readings += await asyncio.gather(*tasks)
            finally:  # after an error the others must not go on paying
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            check_mass(readings, prompts, config)
    return readings


def check_mass(readings: Sequence[Reading], prompts: Sequence[tuple[str, str]], config: ApiConfig) -> None:
    low = [i for i, reading in enumerate(readings) if reading.mass < config.min_mass]
    if low and config.low_mass == "refuse":
        first = low[0]
        what = "of the samples are a label" if config.samples else "of the probability is on labels"
        raise InputError(f"{prompts[first][1]}: only {readings[first].mass:.1%} {what}; so it is for {len(low)} of the {len(readings)} "
                         f"prompts judged so far (min_mass {config.min_mass:g}). Let the prompt ask for the label only, name --spellings"
                         + (", or sample longer answers with --max_tokens" if config.samples else ", use --samples n")
                         + ", or --low_mass drop or keep")


# --- the run ---------------------------------------------------------------------------------------------------------------
def load(config: ApiConfig) -> tuple[list[Item], list[Item]]:
    """The items to judge, and those that give the marginal."""
    items = distjudge.load_items(*config.items, labels=config.labels or None)
    train = distjudge.load_items(*config.train, labels=distjudge.labels_of(items)) if config.train else []
    if config.split != "all":
        train = train or ([item for item in items if item.split == "train"] if config.split == "test" else [])
        items = [item for item in items if item.split == config.split]
        if not items:
            raise InputError(f"{config.items[0]}: split: no item has {config.split}")
    return items[: config.limit or None], train


async def judge_items(items: Sequence[Item], config: ApiConfig, labels: Sequence[str]) -> tuple[list[Reading], list[int], Endpoint]:
    """Readings of all prompts, an item's swapped one behind its own, which item each belongs to, and the endpoint with its bill."""
    if config.render:
        reader: LabelReader | Renderer = Renderer(config.render, labels)
    else:
        reader = LabelReader(labels, distjudge.parse_spellings(config.spellings), config.match, config.case)
        if not config.samples:
            reader.check_first_tokens()
    prompts, owner = [], []
    for i, item in enumerate(items):
        prompts.append((item.prompt, f"{item.where}: item '{distjudge.short(item.id)}'"))
        owner.append(i)
        if item.swap:
            prompts.append((item.swap.prompt, f"{item.where}: item '{distjudge.short(item.id)}': swap"))
            owner.append(i)
    cache = Cache(Path(config.cache or Path(config.out) / "cache.jsonl"))
    try:
        endpoint = Endpoint(config, cache)
        readings = await read_all(prompts, endpoint, reader)
        await endpoint.client.close()
    finally:
        cache.close()
    return readings, owner, endpoint


def main(config: ApiConfig) -> None:
    config.check()
    items, train = load(config)
    labels, out = distjudge.labels_of(items), Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    try:
        readings, owner, endpoint = asyncio.run(judge_items(items, config, labels))
    except EndpointError as error:
        print(f"error: {plain_url(config.base_url)}: {error}. The answers so far are kept; the same command goes on from here",
              file=sys.stderr)
        sys.exit(1)
    readings_of, dropped = collections.defaultdict(list), 0
    for reading, i in zip(readings, owner, strict=True):
        readings_of[i].append(reading)
    rows, kept, predicted, masses, flips = [], [], [], [], []
    for i, item in enumerate(items):
        own = readings_of[i]
        low = any(reading.mass < config.min_mass for reading in own)
        if low and config.low_mass == "drop":
            dropped += 1
            continue
        q, mass = own[0].q, sum(reading.mass for reading in own) / len(own)
        row: dict[str, Any] = {"id": item.id, "counts": item.counts}
        if len(own) == 2:
            q, flipped = average_orders(q, own[1].q, item.swap.labels)
            flips.append(flipped)
            row["flipped"] = flipped
        kept.append(item)
        predicted.append(q)
        masses.append(mass)
        row |= {"predicted": dict(zip(labels, q.tolist(), strict=True)), "label_mass": mass} | ({"low_mass": True} if low else {})
        row |= {"prompt": item.prompt} | ({"group": item.group} if item.group is not None else {})
        row |= {"truth": item.truth} if item.truth else {}
        rows.append(json.dumps(row, ensure_ascii=False))
    if not kept:
        raise InputError(f"no items are left: all {dropped} are under min_mass {config.min_mass:g}")
    distjudge.write_lines(out / "predictions.jsonl", rows)
    metrics: dict[str, Any] = distjudge.evaluate(torch.stack(predicted), kept, train_items=train or None, label_mass=masses,
                                                 ordered=config.ordered, seed=config.seed)
    usage = {name: sum(reading.usage[name] for reading in readings) for name in readings[0].usage}
    metrics |= {"dropped": dropped, "labels_missing": sum(r.missing for r in readings) / len(readings), "pairs": len(flips),
                "flip_rate": sum(flips) / len(flips) if flips else None, **usage, "cost": endpoint.cost(usage)}
    distjudge.write_json(out / "metrics.json", metrics)
    versions = distjudge.versions() | {"openai": endpoint.openai.__version__}
    distjudge.write_json(out / "config.json", dataclasses.asdict(config) | {
        "base_url": plain_url(config.base_url), "recipe": "api", "labels": labels, "versions": versions,
        "answered_by": sorted(endpoint.answered_by),
        "items": {"train": len(train), "test": len(kept)}, "files": list(config.items)})
    floor = "" if metrics["kl_noise_floor"] is None else f", noise floor {metrics['kl_noise_floor']:.3f}"
    print(f"{len(kept)} items: KL {metrics['kl']:.3f} nats{floor}, marginal {metrics['kl_marginal']:.3f}, "
          f"accuracy {metrics['accuracy']:.3f}, label mass {metrics['label_mass']:.3f} (least {metrics['label_mass_min']:.3f}), "
          f"{metrics['labels_missing']:.2f} labels a prompt not among what was returned")
    if flips:
        print(f"the verdict flips with the order in {sum(flips)} of {len(flips)} pairs")
    if dropped:
        print(f"dropped {dropped} of {len(items)} items under label mass {config.min_mass:g}")
    paid = endpoint.paid
    print(f"{usage['requests']} requests, {usage['prompt_tokens']:,} + {usage['completion_tokens']:,} tokens, cost {metrics['cost']:.4f}; "
          f"of these now {paid['requests']} requests ({endpoint.retried} retries), cost {endpoint.cost(paid):.4f}, the rest from the cache")
    print(f"wrote {out}")


if __name__ == "__main__":
    distjudge.cli(main, ApiConfig)
