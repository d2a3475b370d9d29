"""What is read from a response, and how completions are drawn."""
import inspect
import math
import random
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoTokenizer, TopKLogitsWarper, TopPLogitsWarper

import grpo_video as g
from test_smoke import CPU, collate, make_sample

END, OTHER_END = 396, 395  # the tiny model's end tokens
LAST = 1 - 2 ** -53  # the largest number that torch.rand gives in float64


# ---- The answer -----------------------------------------------------------------------------------------------------
ANSWERS = {
    "A": ["A. Cut vitamin C", "A. Cut vitamin C.", "The answer is A.", "choice (A)"],
    "B": [
        "B", "b", " B \n", "\nB\n", "B.", "(B)", "(b)", "[B]", "**B**", "`B`",
        r"\boxed{B}", r"$\boxed{B}$", r"\boxed{\text{B}}", "B。", "（B）",
        "B. grab onion", "B) grab onion", "B: grab onion", "(B) grab onion", "**B.** grab onion", "B.\ngrab onion",
        "Answer: B", "answer: (B)", "Answer:\nB", "Answer: **B**", r"The answer is \boxed{B}.", "It moves.\nAnswer: B. grab onion",
        "<answer>B</answer>", "<answer> B. grab onion </answer>", "<answer>\nB\n</answer>", "<answer>B", "A. or so <answer>B</answer>",
        "<think>A or C?</think><answer>B</answer>", "<think>A.</think>\n<answer>Answer: B</answer>", "<think>A.</think>B",
        "<think>A.</think> The answer is B.", "<answer>B</answer><answer>B. grab onion</answer>", "<answer>B<answer>B</answer>"],
    "C": ["the answer is (C)", "The correct answer is: C."],
    "D": ["Option D", "Option D: set stopwatch", "D. all of A, B and C"],
    None: [
        # words, other letters, cut off, empty
        "Cut the onion", "A knife", "<answer>A knife</answer>", "the answer is a knife", "Answer: A knife", "Drop it",
        "I see a Big knife", "E", "(E)", "F. fly", "Answer: E", "AB", "42", "é", "Ｂ", "答案", "", " \n", "<answer></answer>", "<answer>",
        "<think>the answer is B", "<think>B", "<think>A</think>",
        # several letters
        "A or B", "A, B", "A and B", "A/B", "(A) or (B)", "A. B.", "**A** or **B**", "A. open drawer B. grab knife", "A. Cut it.\nB. Peel it.",
        "Option A or option B", "Either option A or option B.", "Answer: A, B", "Answer: A/B", "Answer: A & B", "Answer: A or B", "The answer is (A) or (B)",
        "Answer: A\nAnswer: B",
        "<answer>A</answer><answer>B</answer>", "<answer>A<answer>B</answer>", "<answer>A or B</answer>"],
}


@pytest.mark.parametrize("text, expected", [(text, letter) for letter, texts in ANSWERS.items() for text in texts])
def test_extract_answer(text, expected):
    """Trap 11: the table of accepted forms, and what must score 0."""
    assert g.extract_answer(text) == expected


@pytest.mark.parametrize("text, letters, expected", [
    ("E", "ABCDE", "E"), ("(e)", "ABCDE", "E"), ("Answer: E", "ABCDE", "E"), ("E. none", "ABCDE", "E"), ("D or E", "ABCDE", None),
    ("F", "ABCDE", None), ("C", "AB", None), ("B", "AB", "B")])
def test_extract_answer_among_other_letters(text, letters, expected):
    """LongVideoBench has four or five candidates: a letter counts if it is one of them."""
    assert g.extract_answer(text, letters) == expected


@pytest.mark.parametrize("text", [
    "A " * 20000, "A, " * 20000 + "x", "A" + " " * 50000 + "x", "(" * 50000, "answer: " * 20000, "answer is A or " * 9000, "<answer>" * 20000,
    r"\boxed{" * 20000, "<think></think>" * 9000, "<think>" + "</think><answer>" * 9000], ids=lambda text: text[:20])
def test_answers_of_any_text_are_read_soon(text):
    """A policy may say anything: no text of 100,000 characters makes reading its reward slow."""
    start = time.perf_counter()
    g.reward_of(text, "B", 0.5)
    assert time.perf_counter() - start < 2


REWARDS = [  # (text, gold, format_reward_weight) -> reward, answer
    ("<think>so</think><answer>B</answer>", "B", 0, 1, "B"),
    ("<think>so</think><answer>B</answer>", "B", 0.5, 1.5, "B"),
    (" <think>so\nit is</think>\n<answer>B. grab\nonion</answer>\n", "B", 0.5, 1.5, "B"),
    ("<think>so</think><answer>B</answer>", "C", 0.5, 0.5, "B"),
    ("<think></think><answer>I see</answer>", "C", 0.5, 0.5, None),
    ("B", "B", 0.5, 1, "B"),
    ("<answer>B</answer>", "B", 0.5, 1, "B"),
    ("<answer>B</answer><think>so</think>", "B", 0.5, 1, "B"),
    ("<think>so</think><answer>B", "B", 0.5, 1, "B"),
    ("<think>so</think>so<answer>B</answer>", "B", 0.5, 1, "B"),
    ("<think>so</think><answer>B</answer> I hope", "B", 0.5, 1, "B"),
    ("<think>so</think><answer>B</answer><answer>B</answer>", "B", 0.5, 1, "B"),
    ("<think>so", "B", 0.5, 0, None),
    ("", "B", 0.5, 0, None),
]


@pytest.mark.parametrize("text, gold, weight, reward, answer", REWARDS)
def test_reward(text, gold, weight, reward, answer):
    """1 for the right letter, in any accepted form; the format reward for <think></think><answer></answer> and no more."""
    assert g.reward_of(text, gold, weight) == (reward, answer)


# ---- pick -----------------------------------------------------------------------------------------------------------
def draw(logits, n=40000, temperature=1.0, top_k=0, top_p=1.0, seed=0):
    """-> how often each token of logits [V] is picked at n uniform numbers."""
    uniform = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    ids = g.pick(torch.tensor(logits).float().expand(n, -1), uniform, temperature, top_k, top_p)
    return torch.bincount(ids, minlength=len(logits))


def chi_square(counts, probs):
    """Pearson's statistic over its number of standard deviations: (X² - df) / sqrt(2 df), under 5 unless they differ. Tokens that
    should come fewer than 10 times are counted as one."""
    expected = probs.double() * counts.sum()
    rare = expected < 10
    counts, expected = (torch.cat((z[~rare].double(), z[rare].sum().double()[None])) for z in (counts, expected))
    keep = expected > 0
    assert counts[~keep].sum() == 0
    df = int(keep.sum()) - 1
    return float((((counts - expected) ** 2)[keep] / expected[keep]).sum() - df) / math.sqrt(2 * df)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_pick_follows_the_softmax(temperature):
    """Sampled tokens follow softmax(logits / T), and not that of another temperature."""
    logits = [2.0, 1.0, 0.5, 0.0, -1.0, -3.0]
    counts = draw(logits, temperature=temperature)
    for T in (0.7, 1.0, 1.5):
        statistic = chi_square(counts, (torch.tensor(logits) / T).softmax(0))
        assert (statistic < 4) == (T == temperature), (T, statistic)


@pytest.mark.parametrize("top_k, top_p, kept", [
    (1, 1.0, [0, 0, 1, 0, 0]), (2, 1.0, [0, 3, 4, 0, 0]), (3, 1.0, [0, 3, 4, 0, 2]), (4, 1.0, [1, 3, 4, 0, 2]), (9, 1.0, [1, 3, 4, 0, 2]),
    (0, 0.01, [0, 0, 1, 0, 0]), (0, 0.39, [0, 0, 1, 0, 0]), (0, 0.41, [0, 3, 4, 0, 0]), (0, 0.69, [0, 3, 4, 0, 0]),
    (0, 0.71, [0, 3, 4, 0, 2]), (0, 0.91, [1, 3, 4, 0, 2]), (0, 0.99, [1, 3, 4, 0, 2]),
    (2, 0.55, [0, 0, 1, 0, 0]),  # of .4 and .3, the .4 is 57 %: it reaches 55 % alone
    (2, 0.60, [0, 3, 4, 0, 0]), (3, 0.50, [0, 3, 4, 0, 0]),  # of .4, .3 and .2, the .4 is 44 %
])
def test_pick_keeps_exactly_the_right_set(top_k, top_p, kept):
    """Probabilities .1 .3 .4 0 .2: which tokens top_k and top_p leave, in their old proportions. Zero never comes."""
    logits = [math.log(0.1), math.log(0.3), math.log(0.4), -math.inf, math.log(0.2)]
    counts, kept = draw(logits, top_k=top_k, top_p=top_p), torch.tensor(kept)
    assert ((counts > 0) == (kept > 0)).all(), counts
    assert (kept > 0).sum() == 1 or chi_square(counts, kept / kept.sum()) < 4


def test_pick_filters_as_transformers():
    """On random logits, the tokens that top_k and then top_p leave are those of transformers' own warpers."""
    logits = 2 * torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    for top_k, top_p in ((0, 0.3), (0, 0.9), (5, 1.0), (20, 0.8), (3, 0.5)):
        theirs = TopKLogitsWarper(top_k)(None, logits) if top_k else logits
        theirs = TopPLogitsWarper(top_p)(None, theirs) if top_p < 1 else theirs
        for row, kept in zip(logits, theirs.isfinite()):
            grid = torch.arange(4000, dtype=torch.float64) / 4000
            ours = g.pick(row.expand(4000, -1), grid, 1.0, top_k, top_p).unique()
            likely = torch.where(kept, row, -math.inf).softmax(0) > 1 / 3000  # the grid finds what has over 1/4000 of the mass
            assert set(likely.nonzero()[:, 0].tolist()) <= set(ours.tolist()) <= set(kept.nonzero()[:, 0].tolist())


def test_pick_is_greedy_at_temperature_0():
    """Temperature 0 is the most likely token, whatever the uniform number; a high temperature nearly forgets the logits."""
    logits, uniform = torch.tensor([[0.0, 3.0, 2.9], [5.0, -1.0, 4.0]]), torch.tensor([0.0, LAST], dtype=torch.float64)
    assert g.pick(logits, uniform, 0, 0, 1.0).tolist() == g.pick(logits, uniform.flip(0), 0, 0, 1.0).tolist() == [1, 0]
    assert chi_square(draw([3.0, 0.0, -3.0], temperature=1e4), torch.ones(3) / 3) < 4


@pytest.mark.parametrize("probs", [
    [0, 0.5, 0, 0.5, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 1e-12, 1, 1e-12, 0], [0] + [1e-5] * 1000 + [0]], ids=lambda probs: len(probs))
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (2, 1.0), (0, 0.9)])
def test_pick_at_the_ends(probs, top_k, top_p):
    """Uniform 0 gives the first token that can come and 1 - 2^-53 the last; a token of probability 0 never comes."""
    logits = torch.tensor(probs).log().expand(3, -1)
    first, middle, last = g.pick(logits, torch.tensor([0, 0.5, LAST], dtype=torch.float64), 1.0, top_k, top_p).tolist()
    possible = [i for i, p in enumerate(probs) if p > 1e-9]
    assert min(probs[first], probs[middle], probs[last]) > 0 and first <= middle <= last
    if top_p == 1 and max(probs) < 1:
        assert first == possible[0] and last == possible[-1]


def test_pick_rows_are_their_own():
    """A row's token comes from its own logits and number: alone, in a batch, in another order, it is the same."""
    torch.manual_seed(0)
    logits, uniform = torch.randn(64, 300), torch.rand(64, dtype=torch.float64)
    for options in ((1.0, 0, 1.0), (0.7, 20, 0.9)):
        whole, order = g.pick(logits, uniform, *options), torch.randperm(64)
        assert torch.equal(g.pick(logits[order], uniform[order], *options), whole[order])
        assert [int(g.pick(x[None], u[None], *options)) for x, u in zip(logits, uniform)] == whole.tolist()


# ---- generate -------------------------------------------------------------------------------------------------------
def prompts_of(model):
    """Three samples of different length, with a video and an image, an image, and text alone."""
    parts = ([3, ("video", (2, 4, 4)), 2, ("image", (1, 4, 4)), 4], [5, ("image", (1, 4, 4)), 1], [4])
    return [make_sample(model.config, *p, seed=i) for i, p in enumerate(parts)]


def sample(model, samples, G=6, C=8, ends=(END, OTHER_END), seeds=None, **options):
    return g.generate(model, collate(*samples), G, C, list(ends), seeds or [s["sample_id"] for s in samples], **options)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_first_tokens_follow_the_scored_policy(toy, temperature):
    """Traps 1 and 2: though the folder's generation_config.json says top_k 1 and temperature 0.01, first tokens follow exactly
    the distribution that the forward scores at this temperature, and at no other."""
    assert '"top_k": 1,' in (toy / "init/generation_config.json").read_text()
    model = g.load_model(toy / "init", CPU, torch.float32)
    model.model.norm.weight.data *= 2  # an untrained model is nearly uniform: make its logits wider
    prompts, V = collate(make_sample(model.config, 3, ("image", (1, 4, 4)), 2)), model.config.text_config.vocab_size
    tokens = g.generate(model, prompts, 20000, 1, [V - 1, V - 2], [1], temperature)
    with torch.no_grad():
        for T in (0.7, 1.0, 1.5):
            probs = model(prompts, torch.arange(V).view(1, V, 1), T).exp()[0, :, 0]
            assert float(probs.sum()) == pytest.approx(1, abs=1e-4)
            statistic = chi_square(torch.bincount(tokens.flatten(), minlength=V), probs)
            assert (statistic < 4) == (T == temperature), (T, statistic)


def drawn_and_scored(monkeypatch, model, prompts, G, C, ends, temperature=1.0):
    """-> completions [B, G, C], their tokens' log-probs in the distributions sampled from, and as the forward scores them."""
    seen, pick = [], g.pick
    monkeypatch.setattr(g, "pick", lambda logits, u, T, *rest: seen.append((logits / T).log_softmax(-1)) or pick(logits, u, T, *rest))
    out = g.generate(model, prompts, G, C, ends, range(len(prompts.ids)), temperature)
    with torch.no_grad():
        return out, torch.stack(seen, 1).view(*out.shape, -1).gather(-1, out[..., None])[..., 0], model(prompts, out, temperature)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_every_token_is_drawn_from_the_scored_distribution(tiny_model, monkeypatch, temperature):
    """Trap 2: at every position and in every row, the distribution sampled from is the one that the forward scores."""
    model = tiny_model()[2]
    out, drawn, scored = drawn_and_scored(monkeypatch, model, collate(*prompts_of(model)), 6, 8, [END, END], temperature)
    mask = g.completion_mask(out, [END])
    assert (drawn - scored)[mask].abs().max() <= 1e-4 and len(out.unique()) > 50


def test_bf16_draws_from_what_it_scores(tiny_model, monkeypatch):
    """Trap 2, in bf16: keys with large biases, as Qwen2's are, make large scores. Rounded to bf16 in decoding, which SDPA's kernels
    do not do when they score, they would move the log-probs of drawn tokens by several times bf16's own noise."""
    folder, _, _ = tiny_model()
    model = g.load_model(folder, CPU, torch.bfloat16)
    for i, layer in enumerate(model.model.layers):
        bias = layer.self_attn.k_proj.bias
        bias.data = 60 * torch.randn(bias.shape, generator=torch.Generator().manual_seed(i)).bfloat16()
    prompts = g.Prompts.collate(prompts_of(model), CPU, torch.bfloat16)
    _, drawn, scored = drawn_and_scored(monkeypatch, model, prompts, 8, 12, [400])
    apart = (scored - drawn).abs().mean()
    assert apart < 0.02, apart


def test_vendors_generation_config_changes_nothing(tiny_model):
    """Trap 1: with the vendor's generation_config.json in the model's folder, or another, or none, the same varied samples."""
    folder, _, model = tiny_model()
    outs, samples = [], prompts_of(model)
    for text in ('{"do_sample": true, "temperature": 0.01, "top_k": 1, "top_p": 0.001, "repetition_penalty": 1.05}',
                 '{"do_sample": false, "eos_token_id": 5, "max_new_tokens": 2}', None):
        (folder / "generation_config.json").unlink()
        if text:
            (folder / "generation_config.json").write_text(text)
        outs.append(sample(g.load_model(folder, CPU, torch.float32), samples))
        assert torch.equal(outs[-1], outs[0]) and len({tuple(row) for row in outs[-1].flatten(0, 1).tolist()}) == 18


def test_completions_are_prompt_major(tiny_model):
    """Trap 6: in a batch of different prompts, each gets exactly the completions that it gets alone, in its own place."""
    model = tiny_model()[2]
    samples = prompts_of(model)
    together = sample(model, samples)
    for i, s in enumerate(samples):
        alone = sample(model, [s])
        assert torch.equal(together[i, :, :alone.shape[2]], alone[0]) and (together[i, :, alone.shape[2]:] == END).all()
    for order in ([2, 0, 1], [1, 2]):
        assert torch.equal(sample(model, [samples[i] for i in order]), together[order][:, :, :8])
    assert len({tuple(row) for row in together.flatten(0, 1).tolist()}) == 18


def test_rows_take_their_numbers_from_their_seed(tiny_model):
    """The same prompt twice: its completions follow its seed, wherever it stands; at temperature 0 all rows are the same."""
    model = tiny_model()[2]
    s = prompts_of(model)[0]
    out = sample(model, [s, s], seeds=[5, 6])
    assert torch.equal(sample(model, [s, s], seeds=[6, 5]), out.flip(0)) and not torch.equal(out[0], out[1])
    greedy = sample(model, [s, s], temperature=0)
    assert (greedy == greedy[0, 0]).all()


@pytest.mark.parametrize("ends", [(END, OTHER_END), (OTHER_END, END)])
def test_stops_at_either_end_token(tiny_model, monkeypatch, ends):
    """Behind the first end token of either kind a row holds end_ids[0] alone; decoding ends when every row has ended."""
    said = [[5, ends[1], 7, 8, 9, 9], [ends[0], 6, ends[1], 6, 9, 9], [5, 6, 7, ends[1], 9, 9], [5, 6, 7, 8, 9, ends[0]]]
    model, a = tiny_model()[2], ends[0]

    def say(logits, uniform, *_):  # a row is known by its random numbers
        known = [torch.rand(4 // B, C, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in range(B)]
        row, t = (torch.cat(known)[None] == uniform[:, None, None]).nonzero()[:, 1:].T
        return torch.tensor(said)[row, t]

    monkeypatch.setattr(g, "pick", say)
    B, C = 2, 9
    out = sample(model, prompts_of(model)[:2], G=2, C=9, ends=ends)
    assert out.flatten(0, 1).tolist() == [[5, ends[1], a, a, a, a], [a] * 6, [5, 6, 7, ends[1], a, a], [5, 6, 7, 8, 9, a]]
    assert g.completion_mask(out, list(ends)).sum(-1).flatten().tolist() == [2, 1, 4, 6]
    B, said[3] = 1, said[0]
    assert sample(model, prompts_of(model)[:1], G=4, C=9, ends=ends).shape == (1, 4, 4)  # the longest of these has 4
    C, said[3] = 2, [5, 6, 7, 8, 9, ends[0]]
    short = sample(model, prompts_of(model)[:1], G=4, C=2, ends=ends)  # C is the limit
    assert short.tolist() == [[[5, ends[1]], [a, a], [5, 6], [5, 6]]]


@pytest.mark.parametrize("count, G", [(1, 48), (3, 16)])
def test_finished_rows_leave_the_batch(tiny_model, monkeypatch, count, G):
    """Rows that go on in a smaller batch, of fewer prompts and fewer completions each, get another's keys, mask or numbers. So few
    that none of them would cost less are left together."""
    model, ends, sizes = tiny_model()[2], list(range(40)), []
    samples, decoder = prompts_of(model)[:count], model.decoder
    out = sample(model, samples, G=G, C=30, ends=ends, temperature=1.5)
    model.decoder = lambda x, *rest: sizes.append(len(x)) or decoder(x, *rest)
    assert torch.equal(sample(model, samples, G=G, C=30, ends=ends, temperature=1.5), out)
    lengths = g.completion_mask(out, ends).sum(-1)
    going = [lengths > t for t in range(out.shape[2])]  # [B, G] that need step t
    assert all(int(x.any(1).sum() * x.sum(1).max()) <= size for x, size in zip(going, sizes[1:]))
    assert sizes[1] == G * count and sizes[-1] <= sizes[1] // 2 and len({*lengths.flatten().tolist()}) > 3
    monkeypatch.setattr(g.KVCache, "compact", lambda self, going: None)
    assert torch.equal(sample(model, samples, G=G, C=30, ends=ends, temperature=1.5), out)
    monkeypatch.undo()
    sizes.clear()
    sample(model, samples[:1], G=32, C=30, ends=ends, temperature=1.5)
    assert len(sizes) > 5 and {*sizes[1:]} == {32}


class Recorded(TorchDispatchMode):
    """Stands in for torch.cuda.graph: notes the operations of its block, undoes what they did, and gives `graph` a replay() that
    runs them again on the same memory. As a CUDA graph, it takes all Python values for fixed and refuses to wait for results."""
    forbidden = {"_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "unique_dim", "_unique2", "repeat_interleave"}

    def __init__(self, graph, capture_error_mode):
        super().__init__()
        assert capture_error_mode == "thread_local"
        self.tape, self.undo, graph.replay = [], [], self.replay
        Recorded.made.append(self)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [z for z in tree_leaves((args, kwargs)) if isinstance(z, torch.Tensor)]
        assert func._schema.name.removeprefix("aten::") not in self.forbidden, f"{func} cannot be captured"
        assert "index" not in func._schema.name or all(z.dtype != torch.bool for z in tensors[1:2]), f"{func} of a mask waits for it"
        self.undo += [(z, z.clone()) for z in tensors] if func._schema.is_mutable else []
        self.tape.append((func, args, kwargs or {}, out := func(*args, **kwargs or {})))
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        for z, before in self.undo[::-1]:
            z.copy_(before)

    def replay(self):
        for func, args, kwargs, out in self.tape:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                assert old.shape == new.shape
                old.copy_(new) if old.data_ptr() != new.data_ptr() else None


@pytest.mark.parametrize("G, options", [(2, dict(temperature=1.5)), (2, dict(temperature=0)), (16, dict(temperature=1.5)),
                                        (16, dict(top_k=20, top_p=0.9))], ids=str)
def test_a_token_can_be_a_cuda_graph(tiny_model, monkeypatch, G, options):
    """The same tokens where a step's operations are recorded once and repeated on the same memory, as on a GPU: nothing in them
    depends on a Python number that changes, or is asked for by the host. Each smaller batch is recorded anew."""
    model, ends = tiny_model()[2], list(range(40))
    samples, sizes = prompts_of(model), []
    expected, decoder = sample(model, samples, G=G, C=30, ends=ends, **options), model.decoder
    model.decoder = lambda x, *rest: sizes.append(len(x)) or decoder(x, *rest)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "graph", Recorded)
    monkeypatch.setattr(Recorded, "made", [], raising=False)
    assert torch.equal(sample(model, samples, G=G, C=30, ends=ends, **options), expected)
    assert sizes[1:] == [size for size in dict.fromkeys(sizes[1:]) for _ in range(2)]  # once at once, once recorded
    assert len(Recorded.made) == len({*sizes[1:]}) and (G == 2 or len(Recorded.made) > 1) and expected.shape[2] > 4


# ---- rollout --------------------------------------------------------------------------------------------------------
@pytest.fixture
def roll(toy):
    """roll(samples, step=0, **changes of Config) -> rollout of the toy's untrained model."""
    tokenizer, model = AutoTokenizer.from_pretrained(toy / "init"), g.load_model(toy / "init", CPU, torch.float32)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]

    def run(samples, step=0, **changes):
        c = g.Config(**dict(num_generations=4, max_completion_length=6) | changes)
        return g.rollout(model, samples, c, tokenizer, ends, step, CPU, torch.float32)
    run.tokenizer, run.config, run.ends = tokenizer, model.config, ends
    return run


def texts(group, i=0):
    return [x["ids"] for x in group["rows"][i]["completions"]]


def test_rollout_is_seeded_by_seed_step_and_sample(roll):
    """The same (seed, step, sample_id) gives the same completions, whatever shares the batch and whatever torch's own generator
    did; another seed, step or sample_id gives others."""
    samples = [dict(make_sample(roll.config, 4, ("image", (1, 4, 4)), n + 1), sample_id=f"s{n}") for n in range(3)]
    first = texts(roll(samples[:1]))
    torch.manual_seed(5), random.seed(5)
    assert texts(roll(samples[:1])) == first == texts(roll(samples[::-1]), 2)
    for other in (roll(samples[:1], step=1), roll(samples[:1], seed=43), roll([samples[0] | dict(sample_id="s9")])):
        assert texts(other) != first
    assert len({tuple(ids) for ids in first}) == 4


def test_rollout_rewards_are_prompt_major(roll, monkeypatch):
    """Trap 6: each prompt's completions meet its own gold letter, and each group its own mean and standard deviation."""
    responses = [["<answer>A</answer>", "B", "A. cut", "C"], ["B", "B", "<answer>B</answer>", "A or B"]]
    ids = [[roll.tokenizer(text).input_ids + roll.ends[:1] for text in group] for group in responses]
    C = max(len(row) for group in ids for row in group)
    completions = torch.tensor([[row + roll.ends[:1] * (C - len(row)) for row in group] for group in ids])
    monkeypatch.setattr(g, "generate", lambda *args, **kwargs: completions)
    samples = [dict(make_sample(roll.config, 4, seed=i), gold=gold) for i, gold in enumerate("AB")]
    out = roll(samples)
    assert [[x["answer"] for x in row["completions"]] for row in out["rows"]] == [["A", "B", "A", "C"], ["B", "B", "B", None]]
    assert [[x["reward"] for x in row["completions"]] for row in out["rows"]] == [[1, 0, 1, 0], [1, 1, 1, 0]]
    # std of 1 0 1 0: sqrt(4 * .25 / 3) = .577350; of 1 1 1 0: sqrt((3 / 16 + 9 / 16) / 3) = .5
    golden = [[0.5 / 0.57745, -0.5 / 0.57745] * 2, [0.25 / 0.5001] * 3 + [-0.75 / 0.5001]]
    torch.testing.assert_close(out["advantages"], torch.tensor(golden), atol=1e-5, rtol=0)
    assert [[x["ids"] for x in row["completions"]] for row in out["rows"]] == ids  # through the end token, without the padding
    assert not any(x["truncated"] for row in out["rows"] for x in row["completions"])


def test_rollout_samples_what_is_scored(roll, monkeypatch):
    """Trap 2: rollouts are drawn at --temperature, which also scores them, without top_k or top_p."""
    calls, signature, original = [], inspect.signature(g.generate), g.generate
    monkeypatch.setattr(g, "generate", lambda *args, **kwargs: calls.append(signature.bind(*args, **kwargs)) or original(*args, **kwargs))
    roll([make_sample(roll.config, 4)], temperature=0.7)
    calls[0].apply_defaults()
    assert {key: calls[0].arguments[key] for key in ("G", "C", "temperature", "top_k", "top_p", "end_ids")} == dict(
        G=4, C=6, temperature=0.7, top_k=0, top_p=1.0, end_ids=roll.ends)


def test_rollout_without_samples(roll):
    """A rank whose samples could not be read takes part with nothing: no row, no token, no advantage."""
    out = roll([])
    assert out["rows"] == [] and not out["mask"].any() and not out["advantages"].any() and out["completions"].shape[1] == 4
