"""Measure a closed or served model as a raw judge, through any OpenAI-compatible endpoint.

    OPENAI_API_KEY=... python recipes/api.py --items test.jsonl --model gpt-4o-mini --price_in 0.15
    python recipes/api.py --items test.jsonl --base_url http://localhost:8000/v1 --model mine  # vLLM, ...
    python recipes/api.py --items test.jsonl --base_url ... --model ... --samples 20    # no log-probabilities
    python recipes/api.py --items test.jsonl --base_url ... --model ... --percent       # nor many answers
    python recipes/api.py --items test.jsonl --base_url ... --model judge --render merged  # ours, under vLLM

Label probabilities come from the log-probabilities of the endpoint's --top tokens where the answer begins,
spellings added up; labels outside count as 0, as in the paper. With --render, prompts go as token ids to
vLLM, which is asked for exactly the labels' tokens. Every answer is kept in cache.jsonl in --out: a stopped
run goes on without paying twice. recipes/README.md has more ("Closed and served models").
"""

import asyncio
import collections
import dataclasses
import hashlib
import json
import math
import os
import random
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import distjudge
from distjudge import InputError, Item

import httpx  # transformers brings it
import torch
from tqdm import tqdm

OPENAI, KEY = "https://api.openai.com/v1", "OPENAI_API_KEY"  # a key may be missing where it is not OpenAI's
WAYS_OUT = "give --spellings that begin apart, use --match whole if every label is one token, or --samples n"
PILOT = 16  # the first prompts go alone: an endpoint that cannot be read is refused before all is paid
USAGE = ("requests", "prompt_tokens", "completion_tokens")
LONGEST = 8 << 20  # bytes of a reply, unpacked
FILTERED = {"content_filter", "safety", "prohibited_content", "blocklist", "recitation", "refusal"}
BY_ITEM = (400, 403, 413, 422, 451)  # what may be wrong with one prompt alone
HINTS = {  # what a refusal speaks of -> what helps; the first that fits
    r"logprobs.*(max|most|less|fewer|great|above|exceed|between|<|range)|max\S* logprobs": "use --top 5",
    r"logprob": "use --samples n or --percent",
    r"max_\w*tokens.*(max_\w*tokens|unsup|unkn|not sup)": "use --token_field max_completion_tokens",
    r"temperature": "use --temperature 1, with --samples n where there are no log-probabilities",
    r"": "if it is this prompt alone, --low_mass drop goes on without it and counts it",
}
PERCENT = """

Do not give one answer. If many people are asked this, what percentage of them gives each answer? Write a line
for each answer in this form, and nothing else. The percentages add up to 100.
"""
TAG = r"(?:think|thinking|thought|reasoning)[>\]]"  # <think>...</think> and the like
MARKS, STOPS = " \t\r\n\"'`*_()[]{}\u201c\u201d\u2018\u2019\u00ab\u00bb", ".,;:!\u3002\uff0c\uff01"
CUT = "\u2026"  # behind an answer that the budget of tokens ended
ODD = (ValueError, KeyError, TypeError, AttributeError, IndexError)  # what an answer of another form raises
SHOWN = "kl kl_noise_floor kl_marginal accuracy label_mass label_mass_min labels_missing order_flips".split()


class EndpointError(RuntimeError):
    """The endpoint fails for good, or the money is spent."""

    def __str__(self) -> str:
        return f"{self.args[0]}. The answers so far are kept; the same command goes on from here"


class Refused(InputError):
    """The endpoint refuses one prompt, which the message names; others may go on."""


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
    percent: bool = False
    """Ask for the percentage of every label, in words."""
    temperature: float | None = None
    """Default: 0, or 1 where answers are sampled."""
    max_tokens: int = 0
    """Tokens of an answer, thoughts among them. 0: 1, or with --samples 8, with --percent 24 a label."""
    token_field: str = "max_tokens"
    """The request's field for it; some models want max_completion_tokens."""
    render: str = ""
    """A run folder or model folder whose tokenizer renders the prompts (vLLM; see above)."""
    extra: str = ""
    """Request fields, as JSON; null takes one out: {"seed": 1, "temperature": null}"""
    min_mass: float = 0.5
    """Items whose labels hold less probability (or share of the samples) together cannot be read."""
    low_mass: Literal["refuse", "drop", "keep"] = "refuse"
    """What to do with them and with prompts the endpoint refuses: stop, leave out, or keep what there is."""

    concurrency: int = 8
    """Requests at a time."""
    timeout: float = 60.0
    """Seconds a request may take, up to the last byte of its answer."""
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
        names = "limit samples max_tokens retries max_wait price_in price_out max_cost".split()
        least = dict.fromkeys(names, 0) | {"top": 1, "concurrency": 1, "timeout": 0.001}
        for name, low in least.items():
            if not low <= getattr(self, name) < math.inf:
                raise InputError(f"{name}: must be {low} or more, not {getattr(self, name)}")
        if not 0 <= self.min_mass <= 1:
            raise InputError("min_mass: must be between 0 and 1")
        if self.max_cost and not self.price_in + self.price_out:
            raise InputError("max_cost: needs price_in and price_out")
        own = "samples percent spellings match top temperature".split()  # what render settles
        if self.render and any(getattr(self, name) != getattr(ApiConfig, name) for name in own):
            raise InputError(f"render: goes without {distjudge.listed(own)} of this command")
        host = r"https?://([^\[\]/?#]*@)?(\[[0-9a-f:.]+\]|[^\[\]/?#:@]+)(:\d{1,5})?([/?]|$)"
        place = re.match(host, self.base_url)
        if not place or int((place[3] or ":0")[1:]) > 65_535:
            raise InputError(f"base_url: must be like http://localhost:8000/v1, not '{self.base_url}'")
        extra, wrong = distjudge.parse_json(self.extra or "{}")
        if wrong or {"stream", "logprobs"} & set(extra):
            raise InputError(f"extra: {wrong or 'stream and logprobs cannot be changed'}")

    @property
    def answers(self) -> int:
        """How many answers to read for a prompt; 0: log-probabilities."""
        return self.samples or int(self.percent)


# --- reading labels ---
def after_thought(text: str) -> str:
    """What an answer says after its thoughts; nothing where they do not end."""
    text = re.split(rf"(?i)[<\[]/{TAG}", text)[-1].strip()
    return "" if re.search(rf"(?i)[<\[]{TAG}", text) else text


class LabelReader:
    """Which label a token, or a sampled answer, stands for. Raises InputError for labels that look alike."""

    def __init__(self, labels: Sequence[str], config: ApiConfig):
        spellings = distjudge.parse_spellings(config.spellings)
        if unknown := sorted(set(spellings) - set(labels)):
            raise InputError(f"spellings: unknown label {distjudge.listed(unknown)}")
        self.labels, self.match, self.percent, self.texts = labels, config.match, config.percent, {}
        for i, label in enumerate(labels):
            for text in map(self.normal, spellings.get(label, [label])):
                if not text or self.texts.setdefault(text, i) != i:
                    wrong = f"is one of '{labels[self.texts[text]]}' too" if text else "is empty"
                    raise InputError(f"spellings: label '{label}': '{text}' {wrong}")
        if not config.answers and self.match == "begin":  # then no first token may tell which label is meant
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

    def read(self, top: Sequence[tuple[str, float]]) -> tuple[torch.Tensor, float]:
        """Captured probabilities of the labels, (C,) float64, and that of tokens that begin two labels."""
        q = torch.zeros(len(self.labels) + 1, dtype=torch.float64)  # the last place is for token()'s -1
        for token, logprob in top:
            label = self.token(token)
            if label is not None:
                q[label] += math.exp(logprob)
        return q[:-1], q[-1].item()

    def spoken(self, text: str) -> int | None:
        """The label that a text is, marks and brackets around it aside."""
        text = self.normal(text)
        return self.texts.get(text, self.texts.get(text.strip(MARKS).rstrip(STOPS + MARKS)))

    def answer(self, text: str) -> int | None:
        """The label that an answer, or its last line, is; None for anything else.

        What was cut has no last line, and may have been about to say a longer label.
        """
        text = after_thought(text).replace("\uff1a", ":")
        if text.endswith(CUT):
            label = None if "\n" in text else self.answer(text.removesuffix(CUT))
            own = [spelling for spelling, i in self.texts.items() if i == label]
            longer = (text for text, i in self.texts.items() if i != label and text.startswith((*own,)))
            return None if any(longer) else label
        line = text.rpartition("\n")[2]
        name, _, value = line.rpartition(":")
        labels = [label for label in map(self.spoken, [name, *name.split()]) if label is not None]
        if not labels and re.fullmatch(r"[^\W\d_]+( [^\W\d_]+)?", name.strip(MARKS)):  # "Rating: 4"
            line = value
        return self.spoken(line)

    def shares(self, text: str) -> torch.Tensor | None:
        """What an answer says, (C,): its label, or with --percent every label once, 99 to 101 in all."""
        q = torch.zeros(len(self.labels), dtype=torch.float64)
        if not self.percent:
            label = self.answer(text)
            return None if label is None else q.index_fill(0, torch.tensor(label), 1.0)
        text = re.sub("(?m)^```.*$", "", after_thought(text).replace("\uff1a", ":")).strip(" {}\n")
        found: dict[int | None, float] = {None: 0.0}
        for part in filter(str.strip, re.split("\n" if "\n" in text else ",", text)):  # lines, or JSON
            name, _, value = part.rpartition(":")
            label = self.spoken(name if self.spoken(name) is not None else name.lstrip("-\u2022* "))
            number = re.fullmatch(r"\s*(\d{1,3}(\.\d{1,9})?)\s*%?[\s,;.*]*", value, re.ASCII)
            if label in found or not number:
                return None
            found[label] = q[label] = float(number[1])
        return q / q.sum() if len(found) > len(q) and 99 <= q.sum() <= 101 else None

    def request(self, prompt: str, config: ApiConfig) -> dict[str, Any]:
        if config.percent:
            prompt += PERCENT + "".join(f"\n{label}: ...%" for label in self.labels)
        length = 24 * len(self.labels) if config.percent else 8 if config.samples else 1
        temperature = (1.0 if config.answers else 0) if config.temperature is None else config.temperature
        body = {"model": config.model, "messages": distjudge.messages_of(prompt)}
        body |= {"temperature": temperature, config.token_field: config.max_tokens or length}
        return body if config.answers else body | {"logprobs": True, "top_logprobs": config.top}


class Renderer(LabelReader):
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

    def token(self, token: str) -> int | None:
        return self.owner.get(token)

    def read(self, top: Sequence[tuple[str, float]]) -> tuple[torch.Tensor, float]:
        if not set(self.owner) <= set(dict(top)):
            raise InputError("render: the endpoint ignores logprob_token_ids: it is not vLLM, or an old one")
        return super().read(top)

    def request(self, prompt: str, config: ApiConfig) -> dict[str, Any]:
        wanted = sorted(int(token.split(":")[1]) for token in self.owner)
        body = {"model": config.model, "prompt": self.encoder(prompt), "temperature": 0, "max_tokens": 1}
        return body | {"logprobs": 1, "logprob_token_ids": wanted, "return_tokens_as_token_ids": True}


# --- asking ---
def checked(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer as the cache keeps it. Raises one of ODD for another form, and for what is no probability."""
    usage, once, texts = answer["usage"], {}, answer.get("refused", answer.get("texts"))
    if not all(type(usage[name]) is int and 0 <= usage[name] < 1e9 for name in USAGE):
        raise ValueError(f"usage: {usage}")
    if texts == [] or not all(isinstance(text, str) for text in [answer["model"] or "", *(texts or [])]):
        raise ValueError(f"no text: {texts or answer['model']}")
    if texts:
        return answer
    for token, logprob in answer["top"]:
        if not isinstance(token, str) or type(logprob) not in (int, float) or not logprob <= 0:
            raise ValueError(f"no token with its log-probability: {token}, {logprob}")
        logprob = max(logprob, -1e9)  # some servers write minus infinity for probability 0
        if (token, logprob) in once and math.exp(logprob) > 0.01:  # rare tokens may look alike
            raise ValueError(f"the token '{token}' stands twice, with one log-probability")
        once[token, logprob] = math.exp(logprob)
    if once and not any(once.values()):
        raise ValueError("every token has the probability 0")
    if (mass := sum(once.values())) > 1.001:
        raise ValueError(f"the tokens hold {mass:.4g} of the probability")
    return answer | {"top": list(map(list, once))}


def read_reply(reply: dict[str, Any], body: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a reply: log-probabilities, texts or a refusal, and numbers of tokens."""
    found, model, texts, refused = reply.get("usage") or {}, reply.get("model"), [], ""
    usage = {"requests": 1} | {name: found.get(name) or 0 for name in USAGE[1:]}
    answer = {"model": model and distjudge.short(model, 100), "usage": usage}
    logprobs, chat = reply["choices"][0].get("logprobs") or {}, "messages" in body
    for choice in reply["choices"] if chat else ():
        message, ended = choice["message"], choice.get("finish_reason") or ""
        texts.append(text := message.get("content") or "")
        why = message.get("refusal") or (logprobs.get("refusal") and "refusal")
        if not text and (why or ended.lower() in FILTERED):
            refused = f"no answer: {distjudge.short(why or ended, 200)}"
        budget = body.get("max_tokens") or body.get("max_completion_tokens") or 0
        if text and ended == "length" and not 0 < usage["completion_tokens"] < budget:
            texts[-1] += CUT
    if refused and not "".join(texts):
        return checked(answer | {"refused": [refused]})
    if not body.get("logprobs"):
        return checked(answer | {"texts": texts})
    tokens = logprobs.get("content" if chat else "top_logprobs")
    first = tokens[0] if tokens else {}
    if tokens is None or (chat and first.get("top_logprobs", []) is None):
        raise InputError("the answers hold no log-probabilities; use --samples n or --percent")
    top = list(first.items())
    if chat:
        top = [(entry["token"], entry["logprob"]) for entry in first.get("top_logprobs", [])]
        if first and first["token"] not in dict(top):  # what was chosen, from below the top
            top.append((first["token"], first["logprob"]))
    return checked(answer | {"top": top})


def read_cache(path: Path) -> dict[str, dict[str, Any]]:
    """Answers by the hash of what was asked, from JSON lines; others are reported. Ends a cut line."""
    answers, raw = {}, b"\n"
    with open(path, "a+b") as file:
        file.seek(0)
        for number, raw in enumerate(file, 1):
            row, wrong = distjudge.parse_json(raw)
            try:
                answers[row["key"]] = checked(row["answer"])
            except ODD as error:
                why = distjudge.short(wrong or error, 100)
                print(f"{path}:{number}: not an answer, to be asked for again: {why}", file=sys.stderr)
        file.write(b"" if raw.endswith(b"\n") else b"\n")
    return answers


class Endpoint:
    """Asks the endpoint, so many requests at a time, with retries; keeps the cache and the bill."""

    def __init__(self, config: ApiConfig):
        self.config, self.parts = config, urlsplit(config.base_url)
        self.key = os.environ.get(KEY, "").strip()
        if not re.fullmatch("[!-~]+" if config.base_url == OPENAI else "[!-~]*", self.key):
            raise InputError(f"the key is missing or no ASCII: set the environment variable {KEY}")
        host = self.parts.netloc.rpartition("@")[2]  # without user and password
        self.url = self.parts._replace(netloc=host, query="", fragment="").geturl()
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        headers |= {"api-key": self.key} if "api-version=" in self.parts.query else {}  # Azure's name for it
        limits = httpx.Limits(max_connections=None)  # the gate limits them
        self.client = httpx.AsyncClient(headers=headers, timeout=None, limits=limits)
        self.answers, self.cache = read_cache(path := Path(config.out) / "cache.jsonl"), open(path, "ab")
        self.gate, self.asking = asyncio.Semaphore(config.concurrency), collections.defaultdict(asyncio.Lock)
        self.not_before, self.retried, self.answered_by, self.paid = 0.0, 0, set(), collections.Counter()

    def cost(self, usage: Mapping[str, int]) -> float:
        prices = {"prompt_tokens": self.config.price_in, "completion_tokens": self.config.price_out}
        return sum(usage[name] * price for name, price in prices.items()) / 1e6

    async def ask(self, body: dict[str, Any], number: int, where: str) -> dict[str, Any]:
        """The endpoint's answer, the number-th to this request; from the cache, if it was given before."""
        asked = {name: value for name, value in body.items() if name != "n"}  # more samples add to these
        place = self.url + (self.parts.query and f"?{self.parts.query}")
        key = hashlib.sha256(json.dumps([place, asked, number], sort_keys=True).encode()).hexdigest()
        forms = {"refused", "top" if body.get("logprobs") else "texts"}
        async with self.asking[key]:  # the same prompt twice is paid once
            if not forms & set(self.answers.get(key, ())):
                async with self.gate:
                    answer = await self.insist(body, where)
                self.cache.write((json.dumps({"key": key, "answer": answer}) + "\n").encode())
                self.cache.flush()
                os.fsync(self.cache.fileno())  # on the disk before it is used
                self.answers[key] = answer
        answer = self.answers[key]
        self.answered_by |= {answer["model"]} - {None}
        if "refused" in answer:
            raise Refused(f"{where}: {answer['refused'][0]}; {HINTS['']}")
        return answer

    async def insist(self, body: dict[str, Any], where: str) -> dict[str, Any]:
        """Sends a request until it is answered; where the answer has another form, three times at most.

        Raises Refused or InputError for what the endpoint refuses, EndpointError when it fails for good.
        """
        config, odd = self.config, 0
        for attempt in range(config.retries + 1):
            while (wait := self.not_before - time.monotonic()) > 0:  # one request's Retry-After holds for all
                await asyncio.sleep(wait)
            if config.max_cost and self.cost(self.paid) >= config.max_cost:
                spent = f"this run has cost {self.cost(self.paid):.4f}, max_cost is {config.max_cost:g}"
                raise EndpointError(f"{self.url}: {spent}")
            asked = 0.0
            try:
                status, headers, content = await asyncio.wait_for(self.send(body), config.timeout)
                reply, wrong = distjudge.parse_json(content)
                if status < 300 and reply.get("choices"):
                    answer = read_reply(reply, body)
                    self.paid.update(answer["usage"])
                    return answer
                error = reply.get("error") or {}  # a few answer 200, with the error and its status inside
                error = error if isinstance(error, dict) else {"message": error}
                code, message = error.get("code"), error.get("message") or reply.get("detail") or wrong
                status = status if status >= 300 else code if isinstance(code, int) else 500
                why = distjudge.short(f"{status}: {message or content.decode(errors='replace')}", 300)
                said = f"{code} {error.get('param')} {message}"
                hint = next(hint for words, hint in HINTS.items() if re.search(words, said, re.I | re.S))
                if config.render and "logprob" in said.lower():
                    hint = "let the server give as many as labels have tokens (vLLM's --max-logprobs)"
                if status in BY_ITEM:
                    raise Refused(f"{why}; {hint}")
                if status not in (408, 409, 425, 429) and status < 500:
                    raise InputError(why)
                if code == "insufficient_quota":
                    raise EndpointError(f"{self.url}: {why}")
                asked = headers.get("retry-after", "")  # seconds; a date there has the usual wait
                asked = float(asked) if re.fullmatch(r"\d{1,9}(\.\d+)?", asked) else 0.0
            except InputError as error:
                raise type(error)(f"{where}: {self.url}: {error}") from None
            except asyncio.TimeoutError:
                why = f"no whole answer within {config.timeout:g} s (--timeout)"
            except (httpx.HTTPError, *ODD) as error:
                odd += (bad := isinstance(error, ODD))
                kind = "malformed answer" if bad else "no connection"
                why = distjudge.short(f"{kind}: {type(error).__name__}: {error}", 300)
            if asked > config.max_wait:
                why += f"; it asks to wait {asked:.0f} s, max_wait is {config.max_wait:g}"
                raise EndpointError(f"{self.url}: {why}")
            self.not_before = max(self.not_before, time.monotonic() + asked)
            if attempt == config.retries or odd > 2:
                break
            self.retried += 1
            await asyncio.sleep(max(asked, min(config.max_wait, 2**attempt) * random.uniform(0.5, 1)))
        raise EndpointError(f"{where}: {self.url}: {why} (tried {attempt + 1} times)")

    async def send(self, body: dict[str, Any]) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and content (without the key) of one request. ValueError over LONGEST bytes."""
        end, content = "/chat/completions" if "messages" in body else "/completions", bytearray()
        url = self.parts._replace(path=self.parts.path.rstrip("/").removesuffix(end) + end).geturl()
        async with self.client.stream("POST", url, content=json.dumps(body)) as reply:
            if (packing := reply.headers.get("content-encoding", "identity")) not in ("identity", "gzip"):
                raise ValueError(f"packed as {packing}, which was not asked for")
            async for part in reply.aiter_bytes():  # at most 64 KiB before they are unpacked
                content += part
                if len(content) > LONGEST:
                    raise ValueError(f"over {LONGEST >> 20} MiB")
        key = self.key.encode()
        return reply.status_code, reply.headers, bytes(content.replace(key, b"***") if key else content)


@dataclasses.dataclass
class Reading:
    """What was read for a prompt: q (C,) normalised (uniform where mass is 0), mass, labels not seen."""

    q: torch.Tensor
    mass: float
    missing: int
    usage: collections.Counter[str]
    unread: Sequence[str]  # answers that are no label, or the likeliest token
    alone: bool  # one token has all the probability, or only the chosen one was given
    refused: str  # why the endpoint refuses the prompt


async def read_prompt(prompt: str, where: str, endpoint: Endpoint, reader: LabelReader) -> Reading:
    config, usage, texts, unread, alone, refused = endpoint.config, collections.Counter(), [], [], False, ""
    body = reader.request(prompt, config) | json.loads(config.extra or "{}")
    body = {name: value for name, value in body.items() if value is not None}
    q = torch.zeros(len(reader.labels), dtype=torch.float64)
    try:
        while not usage or len(texts) < config.answers:  # an endpoint may give fewer than asked for
            wanted = config.answers - len(texts)
            asked = body | {"n": wanted} if wanted > 1 else body
            answer = await endpoint.ask(asked, usage["requests"], where)
            usage.update(answer["usage"])
            texts += answer.get("texts", [])
    except Refused as error:
        if config.low_mass == "refuse":
            raise
        texts, refused = [], str(error)
    for text in texts[: config.answers]:
        shares = reader.shares(text)
        unread += [text] if shares is None else []
        q += 0 if shares is None else shares
    q /= max(1, config.answers)
    if not (config.answers or refused):
        q, unclear = reader.read(answer["top"])
        if unclear > 0.01:
            unclear = f"tokens that begin two labels hold {unclear:.1%} of the probability"
            raise InputError(f"{where}: {unclear}; {WAYS_OUT}")
        *others, (token, _) = sorted(answer["top"], key=lambda row: row[1]) or [("", 0.0)]
        unread, alone = [token], sum(math.exp(logprob) for _, logprob in others) < 1e-20
    mass, missing = q.sum().item(), int((q == 0).sum())
    q = q / mass if mass else torch.full_like(q, 1 / len(q))
    return Reading(q, mass, missing, usage, unread, alone, refused)


async def read_all(items: Sequence[Item], config: ApiConfig) -> tuple[list[Reading], Endpoint]:
    """Readings of all prompts, an item's swapped one behind its own, and the endpoint with its bill."""
    reader = (Renderer if config.render else LabelReader)(distjudge.labels_of(items), config)
    prompts = [(prompt, item.named) for item in items for prompt in item.prompts]
    endpoint, readings = Endpoint(config), []
    bar = tqdm(total=len(prompts), desc=config.model, unit="prompt", disable=None)
    async with endpoint.client:
        with bar, endpoint.cache:
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
                check_readings(readings, [where for _, where in prompts], config)
    return readings, endpoint


def check_readings(readings: Sequence[Reading], wheres: Sequence[str], config: ApiConfig) -> None:
    """Raises InputError where readings are no distributions, or too few of them hold labels."""
    refused = [reading.refused for reading in readings if reading.refused]
    if 2 * len(refused) > len(readings):
        raise InputError(f"{refused[0]}; so it is for {len(refused)} of {len(readings)} prompts")
    if all(reading.alone for reading in readings if not reading.refused):
        sure = "here and in every other answer one token has all the probability, or is given alone"
        mode = "vLLM's --logprobs-mode raw_logprobs, if the server takes them after sampling"
        way = f"--temperature 1, or {mode}; else a greater --top, --samples n or --percent"
        raise InputError(f"{wheres[0]}: {sure}: use {mode if config.render else way}")
    low = [i for i, reading in enumerate(readings) if reading.mass < config.min_mass and not reading.refused]
    if low and config.low_mass == "refuse":
        first, way, what = readings[low[0]], "use --samples n", "of the probability is on labels"
        if config.answers:
            what, way = "of the answers can be read", "sample longer answers (--max_tokens)"
        if any(not after_thought(text) for text in first.unread):
            no_thought = """--extra '{"chat_template_kwargs": {"enable_thinking": false}}'"""
            way = f"ask the model not to think ({no_thought}), use --samples n with a greater --max_tokens"
        said = f"only {first.mass:.1%} {what} ('{distjudge.short(''.join(first.unread[-1:]))}')"
        said += f"; so it is for {len(low)} of the {len(readings)} prompts judged so far"
        remedy = f"let the prompt ask for the label only, name --spellings, {way}, or use --low_mass"
        if config.render:
            remedy = "train with --answer 1, which teaches to answer with a label, or use --low_mass keep"
        raise InputError(f"{wheres[low[0]]}: {said} (min_mass {config.min_mass:g}): {remedy}")


# --- the run ---
def main(config: ApiConfig) -> None:
    config.check()
    items, out = distjudge.load_items(*config.items, labels=config.labels or None), Path(config.out)
    labels = distjudge.labels_of(items)
    train = distjudge.load_items(*config.train, labels=labels) if config.train else []
    if config.split == "test":
        train = train or [item for item in items if item.split == "train"]
    items = [item for item in items if config.split in ("all", item.split)][: config.limit or None]
    if not items:
        raise InputError(f"{config.items[0]}: split: no item has {config.split}")
    distjudge.check_out(out, "cache.jsonl")
    out.mkdir(parents=True, exist_ok=True)
    with distjudge.locked(out):
        readings, endpoint = asyncio.run(read_all(items, config))
    rows, kept, predicted, own = [], [], [], iter(readings)
    for item in items:
        found = [next(own) for _ in item.prompts]
        low, q = any(reading.refused or reading.mass < config.min_mass for reading in found), found[0].q
        if low and config.low_mass == "drop":
            continue
        row: dict[str, Any] = {"id": item.id, "counts": item.counts}
        row["prompt"] = distjudge.prompt_field(item.prompt)
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
    refused = [reading.refused for reading in readings if reading.refused]
    unread = [text for reading in readings for text in reading.unread if config.answers]
    metrics |= {"order_flips": sum(flips) / len(flips)} if flips else {}
    metrics |= {"dropped": dropped, "refused": len(refused), "unread": len(unread)}
    metrics |= {"labels_missing": sum(r.missing for r in readings) / len(readings)}
    metrics |= {name: usage[name] for name in USAGE} | {"cost": endpoint.cost(usage)}
    distjudge.write_json(out / "metrics.json", metrics)
    about = {"base_url": endpoint.url, "recipe": "api", "labels": labels, "files": config.items}
    about |= {"versions": distjudge.versions() | {"httpx": httpx.__version__}}
    about |= {"answered_by": sorted(endpoint.answered_by), "items": {"train": len(train), "test": len(kept)}}
    distjudge.write_json(out / "config.json", dataclasses.asdict(config) | about)
    shown = [f"{name} {metrics[name]:.3f}" for name in SHOWN if metrics.get(name) is not None]
    some, of = distjudge.listed(sorted(set(unread))[:5]), len(readings) * config.answers
    paid, retried = endpoint.paid, endpoint.retried
    said = {
        f"{len(kept)} items: {', '.join(shown)}": kept,
        f"{len(unread)} of {of} answers cannot be read and count for no label, such as {some}": unread,
        f"{len(refused)} of {len(readings)} prompts were refused, such as {''.join(refused[:1])}": refused,
        f"dropped {dropped} of {len(items)} items, refused or under label mass {config.min_mass:g}": dropped,
        f"{usage['requests']} requests, {usage['prompt_tokens']:,} + {usage['completion_tokens']:,} tokens, "
        f"cost {metrics['cost']:.4f}; of these now {paid['requests']} requests ({retried} retries), cost "
        f"{endpoint.cost(paid):.4f}, the rest from the cache\nwrote {out}": True,
    }
    print(*(line for line, is_so in said.items() if is_so), sep="\n")


if __name__ == "__main__":
    distjudge.cli(main, ApiConfig, failures=(EndpointError,))
