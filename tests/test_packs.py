"""Packs: the layout, its economy, and the same scores and gradients as one prompt at a time."""

import functools
import itertools
import random
import re
from types import SimpleNamespace

import distjudge
from distjudge import Config, build_pack, label_logprobs, load_judge, pack_prompts, shuffled, train

import pytest
import torch
from conftest import SIZES
from hypothesis import given, settings
from hypothesis import strategies as st


@st.composite
def prompts(draw):
    """Token lists that share beginnings in every way: nested, none, all, prefixes of one another, repeats."""
    stems = draw(st.lists(st.lists(st.integers(4, 7), max_size=6), min_size=1, max_size=4))
    made = []
    for _ in range(draw(st.integers(1, 8))):
        parts = draw(st.lists(st.sampled_from(stems), max_size=3))
        made.append([4, *itertools.chain(*parts), *draw(st.lists(st.integers(4, 7), max_size=3))])
    return made


def trie_size(token_lists):
    return len({tuple(ids[:k]) for ids in token_lists for k in range(1, len(ids) + 1)})


def visible(pack, i):
    return [j for j in range(len(pack.ids)) if j <= i < pack.ends[j]]


def check_paths(pack, token_lists):
    """Each prompt's tokens stand along its path, at their positions, and see those before them alone."""
    for tokens, path in zip(token_lists, pack.paths, strict=True):
        assert [pack.ids[i] for i in path] == tokens
        assert [pack.positions[i] for i in path] == list(range(len(tokens)))
        assert all(visible(pack, i) == path[: k + 1] for k, i in enumerate(path))


@settings(max_examples=300, deadline=None)
@given(prompts(), st.integers(1, 60), st.sampled_from([((),), ((5,), (5, 6)), ((), (7,))]))
def test_every_prompt_sees_itself_alone(token_lists, max_tokens, branches):
    packs = pack_prompts(token_lists, max_tokens, branches)
    members = sorted(i for pack in packs for i in pack.members)
    assert members == list(range(len(token_lists)))  # nothing lost, nothing twice
    assert packs == pack_prompts(token_lists, max_tokens, branches)
    for pack in packs:
        with_branches = [[*token_lists[i], *branch] for i in pack.members for branch in branches]
        assert len(pack.ids) <= max_tokens or len(pack.members) == 1
        if branches == ((),):
            assert len(pack.ids) == trie_size(with_branches)  # every shared token once
        else:  # once too, but for prompts that go on as a label does
            alone = trie_size([token_lists[i] for i in pack.members])
            assert trie_size(with_branches) <= len(pack.ids) <= alone + 2 * len(pack.members)
        check_paths(pack, with_branches)


@settings(max_examples=60, deadline=None)
@given(prompts(), st.integers(8, 40))
def test_the_division_into_packs_is_the_cheapest(token_lists, max_tokens):
    """Against every division of the sorted prompts into runs."""
    order, best = sorted(token_lists), None
    for cuts in itertools.product((False, True), repeat=len(order) - 1):
        runs, start = [], 0
        for k, cut in enumerate((*cuts, True), 1):
            if cut:
                runs.append(order[start:k])
                start = k
        sizes = [trie_size(run) for run in runs]
        if all(size <= max_tokens or len(run) == 1 for size, run in zip(sizes, runs, strict=True)):
            best = min(best or (sum(sizes), len(runs)), (sum(sizes), len(runs)))
    packs = pack_prompts(token_lists, max_tokens)
    assert (sum(len(pack.ids) for pack in packs), len(packs)) == best


def test_packs_by_hand():
    pack = build_pack([[1, 2, 3, 4], [1, 2, 5], [1, 2, 5, 6], [9]], [0, 1, 2, 3])
    assert pack.ids == [1, 2, 3, 4, 5, 6, 9] and pack.positions == [0, 1, 2, 3, 2, 3, 0]
    assert pack.ends == [6, 6, 4, 4, 6, 6, 7] and pack.paths == [[0, 1, 2, 3], [0, 1, 4], [0, 1, 4, 5], [6]]
    pack = build_pack([[1, 2, 3, 4], [1, 2, 3, 5], [1, 9], [8]], [0, 1, 2, 3], two_levels=True)
    assert pack.ids == [1, 2, 3, 4, 5, 1, 9, 8] and pack.positions == [0, 1, 2, 3, 3, 0, 1, 0]
    assert pack.ends == [5, 5, 5, 4, 5, 7, 7, 8]  # groups of 5, 2 and 1 tokens


@settings(max_examples=200, deadline=None)
@given(prompts(), st.sampled_from([((),), ((), (7,))]))
def test_two_levels_are_groups_of_one_beginning(token_lists, branches):
    order = sorted(range(len(token_lists)), key=token_lists.__getitem__)
    pack, tree = (build_pack(token_lists, order, branches, two_levels) for two_levels in (True, False))
    lists = [[*token_lists[i], *branch] for i in order for branch in branches]
    assert len(tree.ids) <= len(pack.ids) <= sum(map(len, lists))
    assert all(len({pack.ends[i] for i in path}) <= 2 for path in pack.paths)
    check_paths(pack, lists)


def runs(order, size):
    """The lengths of the runs of members of one group, groups being of so many."""
    return [len(list(run)) for _, run in itertools.groupby(order, key=lambda i: i // size)]


def test_shuffling_keeps_groups_together_or_not_and_loses_nothing():
    draw = random.Random(0)
    articles = [[1] * 30 + [draw.randrange(100) for _ in range(40)] for _ in range(6)]
    lists = [article + [draw.randrange(100) for _ in range(10)] for article in articles for _ in range(5)]
    together, apart = shuffled(lists, 3, keep_together=16), shuffled(lists, 3, keep_together=10**6)
    assert sorted(together) == sorted(apart) == list(range(30))
    assert together == shuffled(lists, 3, keep_together=16) != shuffled(lists, 4, keep_together=16)
    assert runs(together, 5) == [5] * 6 and len(runs(apart, 5)) > 15
    lists = [[1] * 30 + [k, *range(k)] for k in range(2, 40)]  # the instructions are common to all: no groups
    flat = shuffled(lists, 0, keep_together=16)
    assert flat != sorted(flat) and sorted(flat) == list(range(38))
    # a rubric, articles, summaries: groups within groups stay whole where they fit
    lists = [[1] * 40 + [50 + a] * 30 + [n] for a in range(30) for n in range(4)]
    assert runs(shuffled(lists, 0, keep_together=16, chunk=8), 4) == [4] * 30


def test_large_groups_are_dealt_into_random_chunks():
    """Two rubrics of 200 items: in chunks of 8, both all through the epoch, others together each time."""
    lists = [[r] * 40 + [100 + n, 5] for r in (1, 2) for n in range(200)]
    one, other = (shuffled(lists, seed, keep_together=16, chunk=8) for seed in (0, 1))
    assert sorted(one) == list(range(400))
    chunks, others = ([frozenset(order[k : k + 8]) for k in range(0, 400, 8)] for order in (one, other))
    rubrics = [{i // 200 for i in chunk} for chunk in chunks]
    assert all(len(some) == 1 for some in rubrics)
    assert 15 < rubrics.count({0}) < 35 and 5 < rubrics[:25].count({0}) < 20  # not one block
    assert all(max(chunk) - min(chunk) > 8 for chunk in chunks)  # members are drawn, not neighbours
    assert not set(chunks) & set(others)


STRUCTURES = {
    "nested": [
        "Rate this. Soup: good. Service: bad.",
        "Rate this. Soup: good. Service: fine.",
        "Rate this. Soup: bad.",
        "Rate that.",
    ],
    "prefixes of one another": ["Rate", "Rate this", "Rate this soup", "Rate this soup and the service"],
    "nothing in common": ["yes", "no maybe", "The soup was good"],
    "all the same": ["The soup was good and the service was bad."] * 3,
    "one": ["Is this fine?"],
    "longer than the window": ["word " * 30 + ending for ending in ("good", "bad", "fine", "good and bad")],
}
EVERYTHING = [text for texts in STRUCTURES.values() for text in texts]


def scores_and_gradients(judge, encoded, passes):
    logq = torch.zeros(len(encoded), len(judge.labels))
    judge.model.zero_grad()
    for members in passes:
        batch = judge.batch([encoded[i] for i in members])
        logq[members] = label_logprobs(judge.model, batch, judge.tokens)[0]
    (logq * torch.linspace(-1, 1, logq.numel()).view_as(logq)).sum().backward()
    grads = [w.grad.flatten() for w in judge.model.parameters() if w.grad is not None]
    return logq.detach(), torch.cat(grads)


def check_packed(judge, encoded, passes):
    """Passes of packs against one row a prompt."""
    judge.packs = True
    packed, packed_grad = scores_and_gradients(judge, encoded, passes)
    judge.packs = False
    single, single_grad = scores_and_gradients(judge, encoded, [[i] for i in range(len(encoded))])
    assert (packed - single).abs().max() < 1e-5
    assert (packed_grad - single_grad).abs().max() < 1e-5 * max(1.0, float(single_grad.abs().max()))


@pytest.mark.parametrize("labels", [["yes", "no", "maybe"], ["1", "10", "2"]])
def test_packs_give_the_scores_and_gradients_of_one_prompt_at_a_time(architecture, labels):
    judge = load_judge(architecture, labels, lora_rank=0)
    assert judge.packs
    for texts in (*STRUCTURES.values(), EVERYTHING):
        check_packed(judge, judge.encode(texts), [list(range(len(texts)))])


@pytest.fixture(scope="module")
def whole_label_judge(architecture):
    return load_judge(architecture, ["1", "10", "2"], lora_rank=0)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(token_lists=prompts(), max_tokens=st.integers(5, 80))
def test_random_structures_give_the_same_scores_and_gradients(whole_label_judge, token_lists, max_tokens):
    whole_label_judge.packs, whole_label_judge.pack_tokens = True, max_tokens
    check_packed(whole_label_judge, token_lists, whole_label_judge.plan(token_lists))


@settings(max_examples=100, deadline=None)
@given(prompts(), st.sampled_from([None, 1, 3]), st.integers(1, 7))
def test_blocks_are_the_dense_mask(token_lists, window, size):
    pack = build_pack(token_lists, sorted(range(len(token_lists)), key=token_lists.__getitem__))
    ends, positions = torch.tensor(pack.ends), torch.tensor(pack.positions)
    config = lambda kind: SimpleNamespace(_attn_implementation=kind, sliding_window=window)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distjudge, "block_length", lambda device: size)
        blocks = distjudge.tree_mask(config(distjudge.BLOCKS), torch.float32, ends, positions).blocks
    dense = distjudge.tree_mask(config("sdpa"), torch.float32, ends, positions)[0, 0]
    rebuilt, start = torch.zeros_like(dense), 0
    for rows, columns, seen in blocks:
        rebuilt[start : start + rows, columns] = seen[0, 0]
        assert rows <= size and seen[0, 0].any(0).all() and seen[0, 0].any(1).all()
        start += rows
    assert torch.equal(rebuilt, dense) and start == len(pack.ids)


def test_eager_and_flex_attention_agree_with_sdpa(tiny_model):
    judge = load_judge(tiny_model, ["yes", "no"])
    expected = judge.score(STRUCTURES["nested"])[0]
    config = judge.model.config.get_text_config()
    assert config._attn_implementation == distjudge.BLOCKS
    for implementation in ("eager", "flex_attention", "sdpa"):
        judge.model.base_model.model.set_attn_implementation(implementation)
        assert config._attn_implementation == implementation
        assert (judge.score(STRUCTURES["nested"])[0] - expected).abs().max() < 1e-5


def save_random(folder, tokenizer, name, **changes):
    import transformers

    torch.manual_seed(0)
    settings = {"vocab_size": len(tokenizer), **({} if name in NOT_LIKE_THESE else SIZES), **changes}
    config = getattr(transformers, f"{name}Config")(**settings)
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


NOT_LIKE_THESE = ("Mamba", "GPTNeo")
RECURRENT = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
WINDOW = {"attention_types": [[["global", "local"], 1]], "window_size": 8}
UNPACKABLE = {  # with the small weights of a fresh model, too: the check must not need one that has opinions
    "recurrent": ("Mamba", RECURRENT),
    "recurrent, large weights": ("Mamba", RECURRENT | {"initializer_range": 0.5}),
    "a window of its own": ("GPTNeo", WINDOW | {"hidden_size": 32, "num_layers": 2, "num_heads": 2}),
}


@pytest.mark.parametrize("case", UNPACKABLE)
def test_what_cannot_be_packed_is_run_in_rows_and_says_so(tmp_path, tiny_tokenizer, caplog, case):
    name, changes = UNPACKABLE[case]
    judge = load_judge(save_random(tmp_path, tiny_tokenizer, name, **changes), ["yes", "no"], lora_rank=0)
    assert not judge.packs and "cannot be run on packed prompts" in caplog.text
    texts = STRUCTURES["nested"]
    one_by_one = torch.cat([judge.score([text])[0] for text in texts])
    assert (judge.score(texts)[0] - one_by_one).abs().max() < 1e-5


def test_the_check_sees_a_mask_wrong_beyond_the_window(tmp_path, tiny_tokenizer, monkeypatch, caplog):
    """The window by rows of the pack instead of by positions: the same until a pack is longer than it."""
    folder = save_random(tmp_path, tiny_tokenizer, "Mistral", sliding_window=100)
    assert load_judge(folder, ["yes", "no"], lora_rank=0).packs
    plain = distjudge.tree_mask

    def by_rows(config, dtype, ends, positions):
        return plain(config, dtype, ends, torch.arange(len(ends)))

    monkeypatch.setattr(distjudge, "tree_mask", by_rows)
    assert not load_judge(folder, ["yes", "no"], lora_rank=0).packs and "hidden states are off" in caplog.text


def test_the_check_allows_for_the_rounding_of_a_deep_model(tmp_path, tiny_tokenizer, monkeypatch, caplog):
    """In 16 bits 40 layers are off by more than 5 %, in padded rows as in packs; a wrong mask by far more."""
    deep = {"num_hidden_layers": 40, "num_key_value_heads": 2, "initializer_range": 0.3}
    folder = save_random(tmp_path, tiny_tokenizer, "Qwen2", **deep)
    from transformers import AutoModelForCausalLM

    load = functools.partial(AutoModelForCausalLM.from_pretrained, folder, dtype=torch.bfloat16)
    make = lambda: distjudge.make_judge(load(), tiny_tokenizer, ["yes", "no"], lora_rank=4)  # noqa: E731
    assert make().packs and not caplog.text
    plain = distjudge.tree_mask

    def all_before(config, dtype, ends, positions):
        return plain(config, dtype, torch.full_like(ends, len(ends)), positions)

    monkeypatch.setattr(distjudge, "tree_mask", all_before)
    assert not make().packs
    off, rows = map(float, re.search(r"off by ([\d.]+)%, padded rows by ([\d.]+)%", caplog.text).groups())
    assert rows > 3 and off > 100


def test_running_out_of_memory_in_the_check_is_not_an_architecture(tiny_model):
    judge = load_judge(tiny_model, ["yes", "no"])
    Scarce(judge.model.base_model.model, 5)
    with pytest.raises(torch.OutOfMemoryError):
        distjudge.check_model(judge)


def test_position_codes_that_depend_on_the_longest_prompt_bound_the_length(tmp_path, tiny_tokenizer, caplog):
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 128}
    options = {"max_position_embeddings": 512, "rope_parameters": rope}
    judge = load_judge(save_random(tmp_path, tiny_tokenizer, "Llama", **options), ["yes", "no"], lora_rank=0)
    assert judge.max_length == 128 and "may have about 128 tokens, not 2048" in caplog.text


RECOMPUTED = {"gradient_checkpointing": True}


def trained(judge, items, **changes):
    """The weights after training, and the losses and lengths of gradients on the way."""
    log = train(judge, items, Config(learning_rate=1e-3, **changes))
    weights = torch.cat([w.detach().flatten() for w in judge.model.parameters() if w.requires_grad])
    return weights, [row[name] for row in log for name in ("loss", "grad_norm")]


def test_training_with_packs_without_and_in_small_ones_is_the_same(tiny_model, votes, tmp_path):
    after = []
    for packs, changes in ((True, {}), (False, {}), (True, {"pack_tokens": 40}), (True, RECOMPUTED)):
        judge = load_judge(tiny_model, ["1", "2", "3"], lora_rank=4)
        judge.packs = packs
        after.append(trained(judge, votes(20), out=str(tmp_path), epochs=2.0, **changes))
        assert not judge.model.is_gradient_checkpointing
    for weights, losses in after[1:]:
        assert torch.allclose(weights, after[0][0], atol=2e-5)
        assert losses == pytest.approx(after[0][1], abs=1e-5)


class Scarce:
    """A forward that runs out of memory over a number of tokens; if so wished late in the backward pass."""

    def __init__(self, model, limit, in_backward=False):
        self.plain, self.limit, self.in_backward, self.model = model.forward, limit, in_backward, model
        self.refused = self.passes = 0
        model.forward = self

    def __call__(self, *args, **kwargs):
        def fail(*_):
            raise torch.OutOfMemoryError("CUDA out of memory")

        self.passes += 1
        if kwargs["input_ids"].numel() <= self.limit or (self.passes == 1 and self.in_backward):
            return self.plain(*args, **kwargs)
        self.refused += 1
        if not self.in_backward:
            fail()

        def watch(module, inputs, output):  # at the embeddings: by then most weights have their gradients
            output.requires_grad_().register_hook(fail)

        hook = self.model.get_input_embeddings().register_forward_hook(watch)
        try:
            return self.plain(*args, **kwargs)
        finally:
            hook.remove()


@pytest.mark.parametrize("in_backward", [False, True])
def test_out_of_memory_makes_passes_smaller_no_item_is_lost(tiny_model, votes, tmp_path, in_backward, caplog):
    after = []
    for limit in (10**6, 60):
        judge = load_judge(tiny_model, ["1", "2", "3"], lora_rank=4)
        scarce = Scarce(judge.model.base_model.model, limit, in_backward)
        after.append(trained(judge, votes(12), out=str(tmp_path), batch_size=12, pack_tokens=160))
    assert scarce.refused and "no item is lost" in caplog.text
    assert judge.pack_tokens == 1024  # what was set before training is back
    (weights, losses), (others, other_losses) = after
    assert torch.allclose(weights, others, atol=1e-6) and losses == pytest.approx(other_losses, abs=1e-5)


def test_passes_that_wait_when_one_runs_out_of_memory_shrink_once(tiny_model):
    many = load_judge(tiny_model, ["yes", "no"])
    texts = [f"{n} soup " * 4 for n in range(40)]
    expected = many.score(texts)[0]
    many.pack_tokens, encoded = 200, many.encode(texts)
    sizes = [many.batch([encoded[i] for i in group])["input_ids"].numel() for group in many.plan(encoded)]
    scarce = Scarce(many.model.base_model.model, max(sizes) - 1)
    assert torch.allclose(many.score(texts)[0], expected, atol=1e-6)
    assert scarce.refused == 1 and many.pack_tokens >= (max(sizes) - 1) // 2
    Scarce(many.model.base_model.model, 5)
    with pytest.raises(torch.OutOfMemoryError, match="one prompt alone"):
        many.score(texts)


def test_a_list_is_checked_before_anything_is_judged(tiny_model, monkeypatch):
    judge = load_judge(tiny_model, ["yes", "no"])
    assert judge.predict([]).shape == (0, 2)
    with pytest.raises(distjudge.InputError, match=r"prompts\[9\]: prompt: empty"):
        list(judge.stream([*["soup"] * 9, ""], window=8))
    monkeypatch.setattr(judge, "judge_encoded", lambda *args: pytest.fail("judged before all was checked"))
    prompt = r"prompts\[3000\]: prompt: "
    cases = [("", prompt + "empty"), (7, prompt + "not text"), ("word " * 600, "longer than max_length")]
    for wrong, message in cases:
        with pytest.raises(distjudge.InputError, match=message):
            judge.predict(["soup"] * 3000 + [wrong])
