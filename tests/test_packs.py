"""Packs: the layout, its economy, and the same label scores and gradients as one prompt at a time on every architecture we name."""
import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_judge import architecture  # noqa: F401

import distjudge
from distjudge import Config, build_pack, label_logprobs, load_judge, pack_prompts, shuffled, train


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


@settings(max_examples=300, deadline=None)
@given(prompts(), st.integers(1, 60), st.sampled_from([((),), ((5,), (5, 6)), ((), (7,))]))
def test_every_prompt_sees_itself_alone(token_lists, max_tokens, branches):
    packs = pack_prompts(token_lists, max_tokens, branches)
    assert sorted(i for pack in packs for i in pack.members) == list(range(len(token_lists)))  # nothing lost, nothing twice
    assert packs == pack_prompts(token_lists, max_tokens, branches)
    for pack in packs:
        with_branches = [[*token_lists[i], *branch] for i in pack.members for branch in branches]
        assert len(pack.ids) <= max_tokens or len(pack.members) == 1
        if branches == ((),):
            assert len(pack.ids) == trie_size(with_branches)  # every shared token once
        else:  # once too, but for prompts that go on as a label does
            assert trie_size(with_branches) <= len(pack.ids) <= trie_size([token_lists[i] for i in pack.members]) + 2 * len(pack.members)
        for tokens, path in zip(with_branches, pack.paths, strict=True):
            assert [pack.ids[i] for i in path] == tokens and [pack.positions[i] for i in path] == list(range(len(tokens)))
            for k, i in enumerate(path):
                assert visible(pack, i) == path[: k + 1]
        assert [pack.ids[i] for i in pack.answers(token_lists)] == [token_lists[i][-1] for i in pack.members]


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


def test_a_pack_by_hand():
    pack = build_pack([[1, 2, 3, 4], [1, 2, 5], [1, 2, 5, 6], [9]], [0, 1, 2, 3])
    assert pack.ids == [1, 2, 3, 4, 5, 6, 9] and pack.positions == [0, 1, 2, 3, 2, 3, 0] and pack.ends == [6, 6, 4, 4, 6, 6, 7]
    assert pack.paths == [[0, 1, 2, 3], [0, 1, 4], [0, 1, 4, 5], [6]] and pack.answers([[1, 2, 3, 4], [1, 2, 5], [1, 2, 5, 6], [9]]) == [3, 4, 5, 6]
    assert pack.segments == [(-1, 0, 2), (0, 2, 4), (0, 4, 6), (-1, 6, 7)]


@settings(max_examples=200, deadline=None)
@given(prompts(), st.sampled_from([((),), ((), (7,))]))
def test_two_levels_are_groups_of_one_beginning(token_lists, branches):
    order = sorted(range(len(token_lists)), key=token_lists.__getitem__)
    pack, tree = build_pack(token_lists, order, branches, two_levels=True), build_pack(token_lists, order, branches)
    lists = [[*token_lists[i], *branch] for i in order for branch in branches]
    assert len(tree.ids) <= len(pack.ids) <= sum(map(len, lists))
    table = pack.segments
    assert all(parent == -1 or table[parent][0] == -1 for parent, _, _ in table)
    for tokens, path in zip(lists, pack.paths, strict=True):
        assert [pack.ids[i] for i in path] == tokens
        assert all(visible(pack, i) == path[: k + 1] for k, i in enumerate(path))


def test_two_levels_by_hand():
    pack = build_pack([[1, 2, 3, 4], [1, 2, 3, 5], [1, 9], [8]], [0, 1, 2, 3], two_levels=True)
    assert pack.ids == [1, 2, 3, 4, 5, 1, 9, 8] and pack.segments == [(-1, 0, 3), (0, 3, 4), (0, 4, 5), (-1, 5, 7), (-1, 7, 8)]


def test_shuffling_keeps_groups_together_or_not_and_loses_nothing():
    draw = random.Random(0)
    articles = [[1] * 30 + [draw.randrange(100) for _ in range(40)] for _ in range(6)]
    lists = [article + [draw.randrange(100) for _ in range(10)] for article in articles for _ in range(5)]
    together, apart = shuffled(lists, 3, keep_together=16), shuffled(lists, 3)
    assert sorted(together) == sorted(apart) == list(range(30)) and together == shuffled(lists, 3, keep_together=16) != shuffled(lists, 4, keep_together=16)
    blocks = [len(list(run)) for _, run in itertools.groupby(together, key=lambda i: i // 5)]
    assert blocks == [5] * 6 and len(list(itertools.groupby(apart, key=lambda i: i // 5))) > 15
    flat = shuffled([[1] * 30 + [k, *range(k)] for k in range(2, 40)], 0, keep_together=16)  # the instructions are common to all: no groups
    assert flat != sorted(flat) and sorted(flat) == list(range(38))


def test_large_groups_are_dealt_into_random_chunks():
    """Two rubrics of 200 items: in chunks of 8, both all through the epoch, other items together every time."""
    lists = [[r] * 40 + [100 + n, 5] for r in (1, 2) for n in range(200)]
    order = shuffled(lists, 0, keep_together=16, chunk=8)
    assert sorted(order) == list(range(400))
    chunks = [order[k : k + 8] for k in range(0, 400, 8)]
    rubrics = [{i // 200 for i in chunk} for chunk in chunks]
    assert all(len(some) == 1 for some in rubrics)
    assert 15 < sum(some == {0} for some in rubrics[:50]) < 35 and 5 < sum(some == {0} for some in rubrics[:25]) < 20  # not one block
    assert all(max(chunk) - min(chunk) > 8 for chunk in chunks)  # members are drawn, not neighbours
    other = shuffled(lists, 1, keep_together=16, chunk=8)
    together = lambda order: {frozenset(order[k : k + 8]) for k in range(0, 400, 8)}  # noqa: E731
    assert not together(order) & together(other)


def test_groups_within_groups_stay_whole_where_they_fit():
    lists = [[1] * 40 + [50 + a] * 30 + [n] for a in range(30) for n in range(4)]  # a rubric, articles, summaries
    order = shuffled(lists, 0, keep_together=16, chunk=8)
    assert [len(list(run)) for _, run in itertools.groupby(order, key=lambda i: i // 4)] == [4] * 30


STRUCTURES = {
    "nested": ["Rate this. Soup: good. Service: bad.", "Rate this. Soup: good. Service: fine.", "Rate this. Soup: bad.", "Rate that."],
    "prefixes of one another": ["Rate", "Rate this", "Rate this soup", "Rate this soup and the service"],
    "nothing in common": ["yes", "no maybe", "The soup was good"],
    "all the same": ["The soup was good and the service was bad."] * 3,
    "one": ["Is this fine?"],
    "longer than the window": ["word " * 30 + ending for ending in ("good", "bad", "fine", "good and bad")],
}


@pytest.mark.parametrize("labels", [["yes", "no", "maybe"], ["1", "10", "2"]])
def test_packs_give_the_scores_and_gradients_of_one_prompt_at_a_time(architecture, labels):  # noqa: F811
    judge = load_judge(architecture, labels=labels, lora_rank=0)
    assert judge.packs
    everything = [text for texts in STRUCTURES.values() for text in texts]
    for texts in (*STRUCTURES.values(), everything):
        results = []
        for packs in (True, False):
            judge.packs = packs
            encoded, members = judge.encode(texts), list(range(len(texts)))
            passes = [members] if packs else [[i] for i in members]
            judge.model.zero_grad()
            logq = torch.cat([label_logprobs(judge.model, judge.batch([encoded[i] for i in some]), judge.tokens)[0] for some in passes])
            (logq * torch.linspace(-1, 1, logq.numel()).view_as(logq)).sum().backward()
            results.append((logq.detach(), torch.cat([w.grad.flatten() for w in judge.model.parameters() if w.grad is not None])))
        (packed, packed_grad), (single, single_grad) = results
        assert (packed - single).abs().max() < 1e-5
        assert (packed_grad - single_grad).abs().max() < 1e-5 * max(1.0, float(single_grad.abs().max()))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(token_lists=prompts(), max_tokens=st.integers(5, 80))
def test_random_structures_give_the_same_scores_and_gradients(architecture, token_lists, max_tokens):  # noqa: F811
    judge, results = _judge(architecture), []
    for packs in (True, False):
        judge.packs, judge.pack_tokens = packs, max_tokens
        logq = torch.zeros(len(token_lists), 3)
        judge.model.zero_grad()
        for members in judge.plan(token_lists) if packs else [[i] for i in range(len(token_lists))]:
            logq[members] = label_logprobs(judge.model, judge.batch([token_lists[i] for i in members]), judge.tokens)[0]
        (logq * torch.linspace(-1, 1, logq.numel()).view_as(logq)).sum().backward()
        results.append((logq.detach(), torch.cat([w.grad.flatten() for w in judge.model.parameters() if w.grad is not None])))
    (packed, packed_grad), (single, single_grad) = results
    assert (packed - single).abs().max() < 1e-5
    assert (packed_grad - single_grad).abs().max() < 1e-5 * max(1.0, float(single_grad.abs().max()))


@settings(max_examples=100, deadline=None)
@given(prompts(), st.sampled_from([None, 1, 3]), st.integers(1, 7))
def test_blocks_are_the_dense_mask(token_lists, window, size):
    from types import SimpleNamespace

    pack = build_pack(token_lists, sorted(range(len(token_lists)), key=token_lists.__getitem__))
    ends, positions = torch.tensor(pack.ends), torch.tensor(pack.positions)
    plain = torch.Tensor.split
    torch.Tensor.split = lambda self, *a, **k: plain(self, size if a and a[0] == 128 else a[0], **k)
    try:
        blocks = distjudge.tree_mask(SimpleNamespace(_attn_implementation=distjudge.BLOCKS, sliding_window=window), torch.float32, ends, positions).blocks
    finally:
        torch.Tensor.split = plain
    dense = distjudge.tree_mask(SimpleNamespace(_attn_implementation="sdpa", sliding_window=window), torch.float32, ends, positions)[0, 0]
    rebuilt, start = torch.zeros_like(dense), 0
    for rows, columns, seen in blocks:
        rebuilt[start : start + rows, columns] = seen[0, 0]
        assert rows <= size and seen[0, 0].any(0).all() and seen[0, 0].any(1).all()
        start += rows
    assert torch.equal(rebuilt, dense) and start == len(pack.ids)


_judges = {}


def _judge(folder):
    if folder not in _judges:
        _judges[folder] = load_judge(folder, ["1", "10", "2"], lora_rank=0)
    return _judges[folder]


def test_eager_and_flex_attention_agree_with_sdpa(tiny_model):
    judge = load_judge(tiny_model, ["yes", "no"])
    expected = judge.score(STRUCTURES["nested"])[0]
    config = judge.model.config.get_text_config()
    assert config._attn_implementation == distjudge.BLOCKS
    for implementation in ("eager", "flex_attention", "sdpa"):
        judge.model.base_model.model.set_attn_implementation(implementation)
        assert config._attn_implementation == implementation
        assert (judge.score(STRUCTURES["nested"])[0] - expected).abs().max() < 1e-5


def save_random(folder, tokenizer, name, **settings):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(vocab_size=len(tokenizer), **settings)
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


UNPACKABLE = {  # with the small weights of a fresh model, too: the check must not need a model that has opinions
    "recurrent": ("Mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "recurrent, large weights": ("Mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.5}),
    "a window of its own": ("GPTNeo", {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8}),
}


@pytest.mark.parametrize("case", UNPACKABLE)
def test_an_architecture_that_cannot_be_packed_is_run_in_rows_and_says_so(tmp_path, tiny_tokenizer, caplog, case):
    name, settings = UNPACKABLE[case]
    judge = load_judge(save_random(tmp_path, tiny_tokenizer, name, **settings), ["yes", "no"], lora_rank=0)
    assert not judge.packs and "cannot be run on packed prompts" in caplog.text
    texts = STRUCTURES["nested"]
    one_by_one = torch.cat([judge.score([text])[0] for text in texts])
    assert (judge.score(texts)[0] - one_by_one).abs().max() < 1e-5


def test_the_check_at_load_sees_a_mask_that_is_wrong_beyond_the_window(tmp_path, tiny_tokenizer, monkeypatch, caplog):
    """The window by rows of the pack instead of by positions: the same until a pack is longer than it."""
    folder = save_random(tmp_path, tiny_tokenizer, "Mistral", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, sliding_window=100)
    assert load_judge(folder, ["yes", "no"], lora_rank=0).packs
    plain = distjudge.tree_mask
    monkeypatch.setattr(distjudge, "tree_mask", lambda config, dtype, ends, positions: plain(config, dtype, ends, torch.arange(len(ends))))
    assert not load_judge(folder, ["yes", "no"], lora_rank=0).packs and "hidden states are off" in caplog.text


def test_running_out_of_memory_in_the_check_is_not_an_architecture(tiny_model):
    judge = load_judge(tiny_model, ["yes", "no"])
    Scarce(judge.model.base_model.model, 5)
    with pytest.raises(torch.OutOfMemoryError):
        distjudge.check_packs(judge)


def test_layers_that_mix_full_and_sliding_attention(tmp_path, tiny_tokenizer):
    folder = save_random(tmp_path, tiny_tokenizer, "Qwen3", hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, head_dim=16,
                         num_key_value_heads=1, sliding_window=8, use_sliding_window=True, initializer_range=0.1,
                         layer_types=["full_attention", "sliding_attention", "full_attention"])
    judge = load_judge(folder, ["yes", "no"], lora_rank=0)
    texts = [text for texts in STRUCTURES.values() for text in texts]
    packed, judge.packs = judge.score(texts)[0], False
    assert judge.packs is False and (torch.cat([judge.score([text])[0] for text in texts]) - packed).abs().max() < 1e-5


def test_position_codes_that_depend_on_the_longest_prompt_bound_the_length(tmp_path, tiny_tokenizer, caplog):
    folder = save_random(tmp_path, tiny_tokenizer, "Llama", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                         max_position_embeddings=512, rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0,
                                                                       "original_max_position_embeddings": 128})
    judge = load_judge(folder, ["yes", "no"], lora_rank=0)
    assert judge.max_length == 128 and "may have about 128 tokens, not 2048" in caplog.text


def test_training_with_packs_without_and_in_small_ones_is_the_same(tiny_model, votes, tmp_path):
    items, after = votes(20), []
    for changes in ({}, {"packs": False}, {"pack_tokens": 40}, {"gradient_checkpointing": True}):
        judge = load_judge(tiny_model, ["1", "2", "3"], lora_rank=4)
        log = train(judge, items, Config(out=str(tmp_path), learning_rate=1e-3, epochs=2.0, shuffle="items", log_every=1, **changes))
        after.append((torch.cat([w.detach().flatten() for w in judge.model.parameters() if w.requires_grad]), [row["loss"] for row in log if "loss" in row]))
    for weights, losses in after[1:]:
        assert torch.allclose(weights, after[0][0], atol=2e-5) and losses == pytest.approx(after[0][1], abs=1e-5)


class Scarce:
    """A model's forward that runs out of memory over a number of tokens; if so wished late in the backward pass, at the embeddings."""

    def __init__(self, model, limit, in_backward=False):
        self.plain, self.limit, self.in_backward, self.refused, self.passes = model.forward, limit, in_backward, 0, 0
        self.model, model.forward = model, self

    def __call__(self, *args, **kwargs):
        def fail(*_):
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.passes += 1
        if kwargs["input_ids"].numel() <= self.limit or (self.passes == 1 and self.in_backward):
            return self.plain(*args, **kwargs)
        self.refused += 1
        if not self.in_backward:
            fail()

        def watch(module, inputs, output):  # by then most weights have their gradients, of this pass and of those before it
            output.requires_grad_().register_hook(fail)
        hook = self.model.get_input_embeddings().register_forward_hook(watch)
        try:
            return self.plain(*args, **kwargs)
        finally:
            hook.remove()


@pytest.mark.parametrize("in_backward", [False, True])
def test_out_of_memory_makes_passes_smaller_and_loses_no_item(tiny_model, votes, tmp_path, in_backward, caplog):
    items, after = votes(12), []
    for limit in (10**6, 60):
        judge = load_judge(tiny_model, ["1", "2", "3"], lora_rank=4)
        scarce = Scarce(judge.model.base_model.model, limit, in_backward)
        log = train(judge, items, Config(out=str(tmp_path), learning_rate=1e-3, batch_size=12, log_every=1, pack_tokens=160))
        after.append((torch.cat([w.detach().flatten() for w in judge.model.parameters() if w.requires_grad]), [row["loss"] for row in log if "loss" in row]))
    assert scarce.refused and judge.pack_tokens == 1024 and "no item is lost" in caplog.text  # what was set before training is back
    assert torch.allclose(after[0][0], after[1][0], atol=1e-6) and after[0][1] == pytest.approx(after[1][1], abs=1e-6)


def test_out_of_memory_while_judging(tiny_model):
    judge = load_judge(tiny_model, ["yes", "no"])
    expected = judge.score(STRUCTURES["nested"])[0]
    whole = judge.batch(judge.encode(STRUCTURES["nested"]))["input_ids"].numel()
    scarce = Scarce(judge.model.base_model.model, whole - 1)
    assert torch.allclose(judge.score(STRUCTURES["nested"])[0], expected, atol=1e-6) and scarce.refused
    many = load_judge(tiny_model, ["yes", "no"])
    texts = [f"{n} soup " * 4 for n in range(40)]
    expected = many.score(texts)[0]
    many.pack_tokens = 200  # several passes wait when the first one fails: together they shrink once, not once each
    limit = max(many.batch([many.encode(texts)[i] for i in group])["input_ids"].numel() for group in many.plan(many.encode(texts))) - 1
    scarce = Scarce(many.model.base_model.model, limit)
    assert torch.allclose(many.score(texts)[0], expected, atol=1e-6) and scarce.refused == 1 and many.pack_tokens >= limit // 2
    Scarce(judge.model.base_model.model, 5)
    with pytest.raises(torch.OutOfMemoryError, match="one prompt alone"):
        judge.score(STRUCTURES["nested"])


def test_judging_streams_in_order_and_reads_no_further_than_it_must(tiny_model):
    judge = load_judge(tiny_model, ["yes", "no"])
    texts = [f"Is this {word} {n}?" for n in range(10) for word in ("soup", "good")]
    read = []
    rows = judge.stream((read.append(text) or text for text in texts), window=8)
    first = next(rows)
    assert len(read) == 8
    streamed = torch.stack([first[0], *(logq for logq, _ in rows)])
    assert len(read) == 20 and torch.allclose(streamed, judge.score(texts)[0], atol=1e-6)
    assert judge.predict([]).shape == (0, 2)
    with pytest.raises(distjudge.InputError, match=r"prompts\[9\]: prompt: empty"):
        list(judge.stream([*texts[:9], ""], window=8))


def test_a_list_is_checked_before_anything_is_judged(tiny_model, monkeypatch):
    judge = load_judge(tiny_model, ["yes", "no"])
    monkeypatch.setattr(judge, "_score", lambda *a: pytest.fail("judged before all was checked"))
    for wrong, message in (("", r"prompts\[3000\]: prompt: empty"), (7, r"prompts\[3000\]: prompt: not text"), ("word " * 600, "longer than max_length")):
        with pytest.raises(distjudge.InputError, match=message):
            judge.predict(["soup"] * 3000 + [wrong])


def test_a_shared_rubric_is_computed_once(tiny_model):
    judge = load_judge(tiny_model, ["yes", "no"])
    texts = ["Rate this soup by these rules: " + "good is good " * 20 + f"Soup {n}" for n in range(16)]
    sizes = []
    plain = judge.batch
    judge.batch = lambda encoded: sizes.append(batch["input_ids"].numel()) or batch if (batch := plain(encoded)) else None
    judge.score(texts)
    assert len(sizes) == 1 and sizes[0] < 0.2 * sum(map(len, judge.encode(texts)))
