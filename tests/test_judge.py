"""Prompts, label tokens and the readout against plain transformers; saving, and what it is checked by."""

import copy
import json
import shutil

import distjudge
from distjudge import InputError, PromptEncoder, label_logprobs, label_tokens, load_judge, save_judge

import common
import numpy
import pytest
import torch
from conftest import change_json, change_weights

TEXTS = ["Is this fine?", "The soup was good and the service was bad.", "Hi", " two  spaces\n\nand lines \n"]
TEXTS += ["émoji 😀, 中文 and ﬁ", "yes no maybe " * 20]
YES_NO = ["yes", "no"]


def stock_logprobs(folder):
    """The tokenizer, and full-vocabulary log-probabilities after a rendered prompt, the plain way."""
    import transformers

    tokenizer = distjudge.load_tokenizer(str(folder))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def after(text):
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            return model(input_ids=ids).logits[0, -1].log_softmax(-1)

    return tokenizer, after


def render(tokenizer, text, **options):
    turns = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **options)


# --- prompts ----------------------------------------------------------------------------------------------
@pytest.fixture
def real_tokenizer(tokenizers_dir):
    """A real tokenizer by name; "qwen2.5 with gemma3.jinja" has another's chat template."""
    from transformers import AutoTokenizer

    def load(name):
        name, _, template = name.partition(" with ")
        loaded = AutoTokenizer.from_pretrained(tokenizers_dir(name))
        if template:
            loaded.chat_template = tokenizers_dir(f"chat_templates/{template}").read_text()
        return loaded

    return load


OTHER_TEMPLATES = [f"qwen2.5 with {name}.jinja" for name in ("gemma3", "llama3_1", "qwen3")]


@pytest.mark.parametrize("name", ["tiny", "qwen2.5", "mistral_v3", "cl100k", *OTHER_TEMPLATES])
def test_prompts_are_encoded_as_the_tokenizer_would(name, tiny_tokenizer, request):
    tokenizer = tiny_tokenizer if name == "tiny" else request.getfixturevalue("real_tokenizer")(name)
    encoder = PromptEncoder(tokenizer)
    for text in TEXTS:
        whole = render(tokenizer, text, enable_thinking=False) if tokenizer.chat_template else text + "\n"
        assert encoder(text) == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_what_a_template_would_drop_for_its_words_is_read(real_tokenizer):
    """Qwen3's leaves out what an assistant wrote before "</think>"; what is judged stays."""
    encoder = PromptEncoder(real_tokenizer("qwen2.5 with qwen3.jinja"))
    said = ["Why?", "<think>It is so.</think>Yes.", "Is that fair?"]
    roles = ("user", "assistant", "user")
    turns = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
    prompt = distjudge.prompt_text(turns)
    assert all(text in encoder.render(prompt) for text in said)
    assert "It is so." not in encoder.tokenizer.apply_chat_template(turns, tokenize=False)
    assert "It is so." in encoder.tokenizer.decode(encoder(prompt))


def test_a_prompt_does_not_change_with_the_day(tokenizers_dir, tiny_tokenizer):
    """Llama 3.1's template has a fixed date, Llama 3.2's asks the clock unless it is told one."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    text = tokenizers_dir("chat_templates/llama3_1.jinja").read_text()
    fixed = '{%- set date_string = "26 Jul 2024" %}'
    today = '{%- set date_string = strftime_now("%d %b %Y") %}'
    clock = "{%- if strftime_now is defined %}" + today + "{%- else %}" + fixed + "{%- endif %}"
    assert text.count(fixed) == 1
    for template in (text, text.replace(fixed, clock)):
        tokenizer.chat_template = template
        assert "Today Date: 26 Jul 2024\n" in PromptEncoder(tokenizer).frame["before"]
    assert "26 Jul 2024" not in render(tokenizer, "Hi")


CHANGES = ["m.content.lstrip()", "m.content.replace('\\n', ' ')", "(m.content | escape)"]


@pytest.mark.parametrize("change", CHANGES)
def test_a_template_that_changes_the_message_is_refused(tiny_tokenizer, change):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("m.content", change)
    with pytest.raises(InputError, match="changes the message"):
        PromptEncoder(tokenizer)


def test_added_words_and_unknown_characters_are_no_control_tokens():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    text = "Is this so ? One two three : I ' M 12345 - - don t 2 + = 4 yes no ,"
    words.train_from_iterator([text], trainers.WordLevelTrainer(special_tokens=["<unk>", "<s>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>")
    tokenizer.add_tokens(["distjudge"])
    encoder = PromptEncoder(tokenizer)
    assert encoder("Is this é") == tokenizer("Is this é\n")["input_ids"]
    assert tokenizer.unk_token_id in encoder("Is this é")
    assert encoder("this distjudge") == tokenizer("this distjudge")["input_ids"]
    assert tokenizer.bos_token_id not in encoder("this <s>")


def test_without_a_template_the_text_begins_as_the_tokenizer_begins_one(tiny_tokenizer):
    """Base models of Llama and Gemma have seen no text without their beginning-of-sequence token."""
    from tokenizers.processors import TemplateProcessing

    plain = copy.deepcopy(tiny_tokenizer)
    plain.chat_template, plain.bos_token = None, "<|im_start|>"
    first = plain.bos_token_id
    assert PromptEncoder(plain)("soup") == plain("soup\n")["input_ids"]  # has it, begins nothing with it
    form = TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", first)])
    plain.backend_tokenizer.post_processor = form
    encoder = PromptEncoder(plain)
    assert encoder("soup") == plain("soup\n")["input_ids"] and encoder("soup").count(first) == 1
    assert encoder("soup", "yes") == plain("soup\nyes")["input_ids"]


def test_a_tokenizer_that_transformers_would_rebuild_otherwise_is_read_as_saved(tmp_path):
    """A Qwen2 model makes AutoTokenizer put Qwen2's own splitting rule in the place of tokenizer.json's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config

    whole_words = Tokenizer(models.BPE())
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    whole_words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), bytes_of])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    whole_words.train_from_iterator(TEXTS * 3, trainer)
    saved = PreTrainedTokenizerFast(tokenizer_object=whole_words, eos_token="<|end|>")
    saved.save_pretrained(tmp_path)
    Qwen2Config().save_pretrained(tmp_path)
    ids = saved("12345 It's fine")["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path)("12345 It's fine")["input_ids"] != ids
    loaded = distjudge.load_tokenizer(str(tmp_path))
    assert loaded.get_vocab() == saved.get_vocab() and loaded("12345 It's fine")["input_ids"] == ids


# --- label tokens -----------------------------------------------------------------------------------------
def pieces(tokenizer, labels, spellings=None):
    """Whether whole labels are read, and the tokens of each."""
    tokens = label_tokens(tokenizer, labels, spellings)
    found = {tokens.labels[i]: tokenizer.convert_ids_to_tokens(list(ids)) for i, ids in tokens.sequences}
    return tokens.whole, {label: " ".join(found[label]) for label in labels}


NLI = ["entailment", "neutral", "contradiction"]


def test_labels_on_real_tokenizers(real_tokenizer):
    qwen = real_tokenizer("qwen2.5")
    assert pieces(qwen, NLI) == (False, dict(zip(NLI, ["ent", "neutral", "contr"], strict=True)))
    assert pieces(qwen, list("12345")) == (False, {digit: digit for digit in "12345"})
    ten = {"1": "1 <|im_end|>", "5": "5 <|im_end|>", "10": "1 0 <|im_end|>"}
    assert pieces(qwen, ["1", "5", "10"]) == (True, ten)
    spaced = {"1": "Ġ 1 <|im_end|>", "2": "Ġ 2 <|im_end|>"}
    assert pieces(qwen, ["1", "2"], {"1": [" 1"], "2": [" 2"]}) == (True, spaced)
    spellings = {"contradiction": ["contradiction", "contradict", " contradiction"]}
    spelled = label_tokens(qwen, ["no", "contradiction"], spellings)
    assert not spelled.whole and spelled.owner == [0, 1, 1]  # "contr" once, " contradiction"
    firsts = [ids[0] for _, ids in spelled.sequences]
    assert qwen.convert_ids_to_tokens(firsts) == ["no", "contr", "Ġcontradiction"]
    assert "10: '1' '0' '<|im_end|>'" in common.reading(label_tokens(qwen, ["1", "5", "10"]), qwen)
    mistral = real_tokenizer("mistral_v3")
    assert pieces(mistral, NLI) == (False, dict(zip(NLI, ["▁ent", "▁neutral", "▁contrad"], strict=True)))
    stars = {digit: f"▁ {digit} </s>" for digit in "12"}  # behind [/INST] every digit follows the same "▁"
    assert pieces(mistral, ["1", "2"]) == (True, stars)
    base = real_tokenizer("cl100k")  # the base vocabulary of Llama 3
    assert pieces(base, ["1", "5", "10"]) == (False, {"1": "1", "5": "5", "10": "10"})
    with pytest.raises(InputError, match="no end-of-turn"):
        label_tokens(base, ["1", "2"], {"1": ["Score 1"], "2": ["Score 2"]})
    with pytest.raises(InputError, match="label '1': ' yes' merges with the end of the prompt"):
        label_tokens(base, ["1", "2"], {"1": ["\nyes"]})  # behind the prompt's line break: a token of two


@pytest.mark.parametrize(
    ("labels", "spellings", "words"),
    [
        (["a"], None, "two different labels"),
        (["a", "a"], None, "two different labels"),
        (["1-5"], None, r"not \{1-5\}; name each: 1 2 3"),
        (["yes", "no"], {"yes": "yes,yeah"}, "label 'yes': a list of texts is needed, not one text"),
    ],
)
def test_labels_that_cannot_be_read_are_refused(tiny_tokenizer, labels, spellings, words):
    with pytest.raises(InputError, match=words):
        label_tokens(tiny_tokenizer, labels, spellings)


# --- reading ----------------------------------------------------------------------------------------------
def test_first_token_reading_is_the_softmax_over_label_tokens(tiny_model):
    judge = load_judge(tiny_model, ["yes", "no", "maybe"], spellings={"yes": ["yes", "Yes", "good"]})
    tokenizer, after = stock_logprobs(tiny_model)
    first = lambda word: tokenizer(word, add_special_tokens=False)["input_ids"][0]  # noqa: E731
    logq, mass = judge.score(TEXTS)
    q = judge.predict(TEXTS)
    assert not judge.tokens.whole and torch.allclose(logq.exp(), torch.tensor(q))
    assert isinstance(q, numpy.ndarray) and q.dtype == numpy.float32 and q.shape == (len(TEXTS), 3)
    for i, text in enumerate(TEXTS):
        p = after(render(tokenizer, text)).exp()
        said_yes = sum(p[t] for t in {first("yes"), first("Yes"), first("good")})
        expected = torch.stack([said_yes, p[first("no")], p[first("maybe")]])
        assert torch.allclose(mass[i], expected.sum(), atol=1e-6)
        assert torch.allclose(torch.tensor(q[i]), expected / expected.sum(), atol=1e-5)


def test_whole_labels_are_read_exactly(tiny_model):
    judge = load_judge(tiny_model, ["1", "10", "2"], spellings={"2": ["2", "two"]})
    assert judge.tokens.whole
    tokenizer, after = stock_logprobs(tiny_model)

    def whole(word, text):
        said, total = render(tokenizer, text), 0.0
        for token in [*tokenizer(word, add_special_tokens=False)["input_ids"], judge.encoder.end_id]:
            total += after(said)[token].item()
            said += tokenizer.decode([token])
        return total

    assert judge.encoder.end_id == tokenizer.convert_tokens_to_ids("<|end|>")
    logq, mass = judge.score(TEXTS)
    for i, text in enumerate(TEXTS):
        one, ten, *two = (whole(word, text) for word in ("1", "10", "2", "two"))
        scores = torch.tensor([one, ten, numpy.logaddexp(*two)], dtype=torch.float32)
        assert torch.allclose(logq[i], scores.log_softmax(0), atol=1e-5)
        assert torch.allclose(mass[i], scores.exp().sum(), atol=1e-6)


def test_a_model_whose_logits_we_cannot_reproduce_is_refused(tiny_model, monkeypatch):
    plain = distjudge.add_label_readout

    def wrong(model):
        plain(model)
        model.lm_head.register_forward_hook(lambda module, args, out: out + 0.02)  # more than we know of

    monkeypatch.setattr(distjudge, "add_label_readout", wrong)
    with pytest.raises(InputError, match="cannot be read exactly"):
        load_judge(tiny_model, YES_NO)


def test_a_judge_from_a_model_in_memory_is_the_one_from_its_folder_and_knows_its_name(tiny_model, tmp_path):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    judge = distjudge.make_judge(model, tokenizer, YES_NO, lora_rank=2)
    assert numpy.allclose(judge.predict(TEXTS), load_judge(tiny_model, YES_NO).predict(TEXTS), atol=1e-6)
    distjudge.save_judge(judge, tmp_path / "run")
    assert numpy.array_equal(load_judge(tmp_path / "run").predict(TEXTS), judge.predict(TEXTS))
    judge.base = ""
    with pytest.raises(InputError, match=r"set judge\.base"):
        distjudge.save_judge(judge, tmp_path / "run")
    assert (tmp_path / "run" / "judge.json").exists()


def test_devices_and_labels_are_taken_as_libraries_give_them(tiny_model):
    judge = load_judge(tiny_model, numpy.array(YES_NO), device=torch.device("cpu"))
    assert judge.labels == YES_NO and judge.model.get_input_embeddings().weight.dtype == torch.float32
    spelled = load_judge(tiny_model, [1, 2], spellings={1: ["one", "1"]})
    assert spelled.labels == ["1", "2"] and len(spelled.tokens.sequences) == 3
    with pytest.raises(InputError, match="label '1': '7' is not text"):
        load_judge(tiny_model, [1, 2], spellings={1: [7]})


@pytest.mark.skipif(torch.cuda.is_available(), reason="is there")
def test_a_device_that_is_not_there_is_one_line(tiny_model):
    with pytest.raises(InputError, match=r"model: cannot be loaded: .*CUDA"):
        load_judge(tiny_model, YES_NO, device="cuda")


def test_label_scores_stay_float32_under_bfloat16_autocast(tiny_model):
    judge = load_judge(tiny_model, YES_NO)
    batch = {k: v for k, v in judge.batch(judge.encode(TEXTS)).items() if k != "reads"}
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = judge.model(**batch)
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())


VOCABULARY = 151_936  # Qwen's


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Watches for the largest tensor that is made, but for the weights themselves."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and VOCABULARY not in tensor.shape[:1]:
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("labels", [YES_NO, ["1", "10"]])
def test_no_tensor_of_positions_times_vocabulary(qwen2, tiny_tokenizer, labels):
    """Forward and backward, training and judging: the largest is a slice of the output layer's product."""
    more = {"num_hidden_layers": 1, "initializer_range": 0.5, "tie_word_embeddings": True}
    model = qwen2(vocab_size=VOCABULARY, hidden_size=8, intermediate_size=16, **more)
    judge = distjudge.make_judge(model, tiny_tokenizer, labels, lora_rank=2)
    texts = [f"Is this soup number {n}?" for n in range(80)]
    batch = judge.batch(judge.encode(texts))
    positions = len(batch["answer_at"])
    assert positions >= 80
    judge.model.train()
    with Largest() as trained:
        label_logprobs(judge.model, batch, judge.tokens)[0].sum().backward()
    with Largest() as judged:
        judge.score(texts)
    assert judged.numel == positions * 16_384 >= trained.numel
    assert trained.numel == judged.numel if judge.tokens.whole else trained.numel < 100 * 1000


def test_four_bit_weights_on_a_cpu(tmp_path, qwen2, tiny_tokenizer):
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    qwen2(**sizes).save_pretrained(tmp_path / "m")
    tiny_tokenizer.save_pretrained(tmp_path / "m")
    exact = load_judge(tmp_path / "m", ["yes", "no", "maybe"]).predict(TEXTS)
    judge = load_judge(tmp_path / "m", ["yes", "no", "maybe"], four_bit=True)
    linear = judge.model.base_model.model.model.layers[0].mlp.up_proj
    assert linear.base_layer.weight.dtype == torch.uint8
    assert linear.base_layer.weight.quant_state.quant_type == "nf4"
    assert linear.lora_A["default"].weight.dtype == torch.float32
    four = judge.predict(TEXTS)
    assert 0 < numpy.abs(four - exact).max() < 0.3 and numpy.allclose(four.sum(1), 1, atol=1e-6)
    save_judge(judge, tmp_path / "run")
    again = load_judge(tmp_path / "run")
    assert again.model.is_loaded_in_4bit and numpy.allclose(again.predict(TEXTS), four, atol=1e-6)
    with pytest.raises(InputError, match="lora_rank"):
        load_judge(tmp_path / "m", YES_NO, four_bit=True, lora_rank=0)


def test_prompts_are_never_cut(tiny_model):
    judge = load_judge(tiny_model, YES_NO, max_length=30)
    words = r"1 of 3 are longer than max_length 30 tokens \(the longest has \d+; the first is number 2"
    with pytest.raises(InputError, match=words):
        judge.predict(["Hi", "yes no " * 40, "Hi"])
    assert load_judge(tiny_model, YES_NO, max_length=10**6).max_length == 512  # the model's positions
    whole = load_judge(tiny_model, ["1", "10"], max_length=10**6)
    assert whole.max_length == 510  # less what the labels need
    for bad in ("", "  ", None):
        with pytest.raises(InputError, match=r"prompts\[0\]: prompt"):
            judge.predict([bad])
    with pytest.raises(InputError, match=r"cannot be|not text|lone surrogate"):
        judge.predict(["\ud800"])


# --- saving, and what a saved judge is checked against ----------------------------------------------------
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_saved_judge_gives_the_same_judgments(tiny_model, tmp_path, lora_rank):
    spellings = {"1": ["1", "one"]}
    judge = load_judge(tiny_model, ["1", "10"], lora_rank=lora_rank, spellings=spellings, max_length=77)
    before = judge.predict(TEXTS[:3])
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in filter(lambda w: w.requires_grad, judge.model.parameters()):
            weight += 0.05 * torch.randn(weight.shape, generator=draw)
    changed = judge.predict(TEXTS[:3])
    assert numpy.abs(changed - before).max() > 1e-3
    save_judge(judge, tmp_path / "run")
    state = torch.get_rng_state()
    again = load_judge(tmp_path / "run")
    assert (again.labels, again.max_length, again.spellings) == (judge.labels, 77, judge.spellings)
    assert numpy.allclose(again.predict(TEXTS[:3]), changed, atol=1e-6)
    assert any(p.requires_grad for p in again.model.parameters())
    load_judge(tiny_model, ["1", "10"], lora_rank=lora_rank)
    assert torch.equal(state, torch.get_rng_state())
    suffixes = {path.suffix for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert ".safetensors" in suffixes and suffixes <= {".safetensors", ".json", ".md", ".jinja"}
    with pytest.raises(InputError, match=r"run: labels: trained for {1, 10}, not {10, 1}"):
        load_judge(tmp_path / "run", ["10", "1"])


def rename_a_word(run):
    path = run / "tokenizer" / "tokenizer.json"
    whole = json.loads(path.read_text())
    vocabulary = whole["model"]["vocab"]
    vocabulary["zz"] = vocabulary.pop(max(vocabulary, key=vocabulary.get))
    path.write_text(json.dumps(whole))


FRAME = {"before": "<|user|>Say yes. ", "after": "<|end|><|judge|>", "end": "<|end|>", "trim": False}
WEIGHTS, TEMPLATE = "adapter/adapter_model.safetensors", "tokenizer/chat_template.jinja"
CHANGED = r"""
rename_a_word(run)                                                       | tokenizer/tokenizer.json: has
(run / TEMPLATE).write_text("{{ messages[0].content }}")                 | chat_template.jinja: has changed
(run / TEMPLATE).unlink()                                                | chat_template.jinja: is missing
(run / "tokenizer/added_tokens.json").write_text("{}")                   | added_tokens.json: was not there
change_json(run / "judge.json", frame=FRAME)                             | judge.json: has changed
change_weights(run / WEIGHTS, lambda name, w: w + 0.01)                  | model.safetensors: has changed
(run / WEIGHTS).rename(run / "adapter/adapter_model.bin")                | model.safetensors: is missing
(run / "judge.json").write_text("{}")                                    | not a judge .* .no digest
(run / "judge.json").write_bytes(b"\xff\xfe")                            | not a judge .* .broken JSON
"""


@pytest.mark.parametrize("case", CHANGED.strip().splitlines())
def test_a_judge_whose_parts_have_changed_is_refused(saved_run, tmp_path, case):
    """A case: what is changed underneath the judge, and what the refusal says of it."""
    run, (change, words) = shutil.copytree(saved_run, tmp_path / "run"), case.split(" | ")
    assert load_judge(run, YES_NO).labels == YES_NO
    eval(change, globals(), {"run": run, "change_json": change_json})
    with pytest.raises(InputError, match=words.strip()) as caught:
        load_judge(run)
    assert str(run) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_judge_is_loaded_in_another_precision_than_trained_in(tiny_model, tmp_path, monkeypatch, dtype):
    """A T4's float16 rounds the base otherwise than a CPU's float32; a copy in bfloat16 is the same base."""
    plain, model = distjudge.load_model, shutil.copytree(tiny_model, tmp_path / "m")
    with monkeypatch.context() as patched:
        patched.setattr(distjudge, "load_model", lambda *a, **k: plain(*a, **k | {"dtype": dtype}))
        save_judge(load_judge(model, YES_NO, lora_rank=2), tmp_path / "run")
    assert load_judge(tmp_path / "run").model.dtype == torch.float32
    change_weights(model / "model.safetensors", lambda name, w: w.bfloat16())
    load_judge(tmp_path / "run")


@pytest.mark.parametrize("four_bit", [False, True])
def test_an_adapter_on_other_base_weights_is_refused(tiny_model, tmp_path, four_bit):
    model = shutil.copytree(tiny_model, tmp_path / "m")
    save_judge(load_judge(model, YES_NO, four_bit=four_bit), tmp_path / "run")
    change_weights(model / "model.safetensors", lambda name, w: 1.5 * w if "mlp" in name else w)
    with pytest.raises(InputError, match=r"run: base: the weights of .*/m are not those the judge was"):
        load_judge(tmp_path / "run")
    shutil.rmtree(model)
    with pytest.raises(InputError, match=r"/m: .*(is not there|no such folder)"):
        load_judge(tmp_path / "run")


def test_the_saved_template_is_used_and_not_rendered_again(tiny_model, tmp_path, monkeypatch):
    """Llama 3.2's writes the date: tomorrow a judge must still get the prompts it was trained with."""
    from transformers import PreTrainedTokenizerBase

    model = shutil.copytree(tiny_model, tmp_path / "m")
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("'<|user|>'", "'<|user|>' + strftime_now('%d') + ' '"))
    judge = load_judge(model, YES_NO)
    save_judge(judge, tmp_path / "run")
    assert load_judge(model, YES_NO).encode(["Hi"]) == judge.encode(["Hi"])  # the date is ours
    plain = PreTrainedTokenizerBase.apply_chat_template

    def tomorrow(*args, **options):
        return plain(*args, **options | {"strftime_now": lambda form: "31"})

    monkeypatch.setattr(PreTrainedTokenizerBase, "apply_chat_template", tomorrow)
    assert load_judge(model, YES_NO).encode(["Hi"]) != judge.encode(["Hi"])
    assert load_judge(tmp_path / "run").encode(["Hi"]) == judge.encode(["Hi"])


def test_a_model_needs_labels_and_a_backend_that_is_there(tiny_model, monkeypatch):
    with pytest.raises(InputError, match="needs labels"):
        load_judge(tiny_model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused = {"unsloth": "Unsloth cannot be used: no CUDA device", "keras": "must be auto, "}
    for backend, words in refused.items():
        with pytest.raises(InputError, match=f"^backend: {words}"):
            load_judge(tiny_model, YES_NO, backend=backend)


def test_judging_leaves_a_model_in_training_as_it_was(tiny_model):
    judge = load_judge(tiny_model, YES_NO)
    for training in (True, False):
        judge.model.train(training)
        judge.predict(["Hi"])
        assert judge.model.training is training


def test_a_folder_of_another_judge_leaves_nothing_in_the_new_one(tiny_model, tiny_tokenizer, tmp_path):
    """A chat template that stayed behind would be the new judge's."""
    from transformers import Qwen2ForCausalLM

    save_judge(load_judge(tiny_model, ["yes", "no"], lora_rank=0), tmp_path / "run")
    assert (tmp_path / "run" / "model").is_dir()
    plain = copy.deepcopy(tiny_tokenizer)
    plain.chat_template = None
    model = Qwen2ForCausalLM.from_pretrained(tiny_model)
    other = distjudge.make_judge(model, plain, ["yes", "no"], lora_rank=0)
    save_judge(other, tmp_path / "run")
    again = load_judge(tmp_path / "run")
    first = load_judge(tiny_model, YES_NO)
    assert again.encode(["Hi"]) == other.encode(["Hi"]) != first.encode(["Hi"])
    for name in ("metrics.json", "config.json", "predictions.jsonl"):
        (tmp_path / "run" / name).touch()
    save_judge(load_judge(tiny_model, ["yes", "no"], lora_rank=2), tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"adapter", "judge.json", "tokenizer"}
    base = shutil.copytree(tiny_model, tmp_path / "own" / "model")  # but for the model that it needs itself
    save_judge(load_judge(base, ["yes", "no"], lora_rank=2), tmp_path / "own")
    assert load_judge(tmp_path / "own").labels == ["yes", "no"]


# --- products in bfloat16 on CPUs made for them ------------------------------------------------------------
@pytest.mark.parametrize("bias", [True, False])
def test_products_in_bfloat16_against_float64(bias):
    draw = torch.Generator().manual_seed(0)
    x, weight, a, b, gradient, offset = (
        torch.randn(shape, generator=draw, dtype=torch.float64)
        for shape in [(2, 5, 64), (32, 64), (4, 64), (32, 4), (2, 5, 32), (32,)]
    )
    weight, offset = weight.bfloat16().double(), offset if bias else None
    a, b = a.requires_grad_(), b.requires_grad_()
    inputs = x.requires_grad_(), a, b
    exact = torch.nn.functional.linear(x, weight, offset) + 0.5 * x @ a.T @ b.T
    wanted = torch.autograd.grad(exact, inputs, gradient)
    x, a, b = (t.detach().float().requires_grad_() for t in inputs)
    offset = offset if offset is None else offset.float()
    out = distjudge.half_products(x, weight.bfloat16(), offset, a, b, 0.5)
    found = torch.autograd.grad(out, (x, a, b), gradient.float())
    for one, other in zip((out, *found), (exact, *wanted), strict=True):
        assert one.dtype == torch.float32 and one.shape == other.shape
        assert (one - other).norm() < 0.006 * other.norm()
    small = distjudge.half_products(x, weight.bfloat16(), offset, a, 1e-5 * b, 0.5)
    none = distjudge.half_products(x, weight.bfloat16(), offset, a, 0 * b, 0.5)
    part = 0.5e-5 * x @ a.T @ b.T  # of an adapter that has hardly begun to learn: it is not rounded away
    assert (small - none - part).norm() < 0.05 * part.norm()


@pytest.mark.parametrize("has, faster", [("amx_bf16", True), ("avx512_bf16", True), ("avx512_f", False)])
def test_a_processor_says_whether_it_multiplies_bfloat16_faster(has, faster, monkeypatch):
    known = {"avx512_bf16": False} | {has: True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert distjudge.multiplies_bf16("cpu") is faster and not distjudge.multiplies_bf16("cuda:0")


def test_a_judge_computes_in_bfloat16_where_the_processor_does(tiny_model, votes, tmp_path, monkeypatch):
    items, texts = votes(24), [item.prompt for item in votes(24)]
    exact = load_judge(tiny_model, ["1", "2", "3"], lora_rank=4)
    q = exact.predict(texts)
    monkeypatch.setattr(distjudge, "multiplies_bf16", lambda device: False)
    judge = load_judge(tiny_model, ["1", "2", "3"], lora_rank=4, bf16=True)
    assert numpy.array_equal(judge.predict(texts), q)

    monkeypatch.setattr(distjudge, "multiplies_bf16", lambda device: True)
    judge = load_judge(tiny_model, ["1", "2", "3"], lora_rank=4, bf16=True)
    kinds = {"base_layer.weight" in name: w.dtype for name, w in judge.model.named_parameters()}
    assert kinds == {True: torch.bfloat16, False: torch.float32}
    assert judge.packs and 0 < numpy.abs(judge.predict(texts) - q).max() < 0.02
    config = distjudge.Config(out=str(tmp_path / "run"), learning_rate=1e-3, epochs=4, save_every=0)
    losses = [[row["loss"] for row in distjudge.train(one, items, config)] for one in (exact, judge)]
    assert losses[0] != losses[1] and numpy.allclose(*losses, atol=0.02)
    assert sum(losses[1][-3:]) < 0.9 * sum(losses[1][:3])
    with judge.model.disable_adapter():
        assert numpy.abs(judge.predict(texts) - q).max() < 0.02 < numpy.abs(exact.predict(texts) - q).max()
    save_judge(judge, tmp_path / "run")
    again, q = load_judge(tmp_path / "run"), judge.predict(texts)
    assert again.bf16 and numpy.array_equal(again.predict(texts), q)
    again.model.merge_adapter()  # then it is not added a second time
    assert numpy.abs(again.predict(texts) - q).max() < 0.01
    plain = load_judge(tmp_path / "run", bf16=False)
    assert {w.dtype for w in plain.model.parameters()} == {torch.float32}
    assert 0 < numpy.abs(plain.predict(texts) - q).max() < 0.02
