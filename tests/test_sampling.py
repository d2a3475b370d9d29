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
from transformers import AutoTokenizer

import grpo_video as g
from test_smoke import CPU, collate, make_sample

END, OTHER_END = 396, 395  # the tiny model's end tokens
LAST = 1 - 2**-53  # the largest number that torch.rand gives in float64


# ---- The answer ----------------------------------------------------------------------------------
ANSWERS = {
    "A": [
        "A. Cut vitamin C",
        "A. Cut vitamin C.",
        "The answer is A.",
        "choice (A)",
        "A - Cut vitamin C",
        "A, knife",
        "A\nknife",
        "A.knife",
        "A、knife",
        "[A] knife",
    ],
    "B": [
        # the letter alone
        "B",
        "b",
        " B \n",
        "\nB\n",
        "B.",
        "(B)",
        "(b)",
        "[B]",
        "**B**",
        "`B`",
        r"\boxed{B}",
        r"$\boxed{B}$",
        r"\boxed{\text{B}}",
        "B。",
        "（B）",
        "Ｂ",
        "（Ｂ）",
        # with the choice's words
        "B. grab onion",
        "B) grab onion",
        "B: grab onion",
        "(B) grab onion",
        "**B.** grab onion",
        "B.\ngrab onion",
        "B.grab onion",
        "B.Grab onion",
        "B.2 onions",
        "B．grab onion",
        "B、grab onion",
        "B，grab onion",
        "Ｂ．grab onion",
        "[B] grab onion",
        "B - grab onion",
        "B – grab onion",
        "B — grab onion",
        "B- grab onion",
        "B\ngrab onion",
        "B\n\nThe onion is next. It is not peeled.",
        "B\nA knife would come later.",
        "**B**\ngrab onion",
        "B, grab onion",
        "B grab onion",
        "B grab onion.",
        "B Grab onion",
        "Ｂ grab onion",
        "<answer>B grab onion, then peel it. So B.</answer>",
        "<answer>B, grab onion, then peel it.</answer>",
        "<answer>B is not C</answer>",
        "<answer>**B** grab onion</answer>",
        "<think>C cut it</think>B grab onion",
        # announced
        "Answer: B",
        "answer: (B)",
        "Answer:\nB",
        "Answer: **B**",
        r"The answer is \boxed{B}.",
        "It moves.\nAnswer: B. grab onion",
        # in tags, or behind the thinking
        "<answer>B</answer>",
        "<answer> B. grab onion </answer>",
        "<answer>\nB\n</answer>",
        "<answer>B",
        "A. or so <answer>B</answer>",
        "<think>A or C?</think><answer>B</answer>",
        "<think>A.</think>\n<answer>Answer: B</answer>",
        "<think>A.</think>B",
        "<think>A.</think> The answer is B.",
        "<answer>B</answer><answer>B. grab onion</answer>",
        "<answer>B<answer>B</answer>",
    ],
    "C": ["the answer is (C)", "The correct answer is: C."],
    "D": [
        "Option D",
        "Option D: set stopwatch",
        "D. all of A, B and C",
        "<answer>D all of A, B and C</answer>",
        "C is wrong. The answer is D.",
        "C, which is wrong. The answer is D.",
    ],
    None: [
        # words
        "Cut the onion",
        "A knife",
        "<answer>A knife</answer>",
        "the answer is a knife",
        "Answer: A knife",
        "Drop it",
        "I see a Big knife",
        "I think",
        "Be careful",
        "<answer>Be careful</answer>",
        "C'est",
        "<answer>C'est bon</answer>",
        "<answer>C-clamp</answer>",
        "D.C.",
        "a knife",
        "b grab onion",
        "<answer>b grab onion</answer>",
        "b, grab onion",
        "b - grab onion",
        "<answer>a knife</answer>",
        # prose, which goes on
        "B is wrong. Then the lid goes on.",
        "C is the pot, D is the pan.",
        "D, which is a pan, is wrong.",
        "The lid comes next, B grab onion",
        # other letters
        "E",
        "(E)",
        "E grab onion",
        "F. fly",
        "<answer>F fly</answer>",
        "Answer: E",
        "AB",
        "42",
        "é",
        "Ｆ",
        "答案",
        # empty, cut off
        "",
        " \n",
        "<answer></answer>",
        "<answer>",
        "<think>the answer is B",
        "<think>B",
        "<think>A</think>",
        # several letters
        "A or B",
        "A, B",
        "A and B",
        "A/B",
        "(A) or (B)",
        "A. B.",
        "**A** or **B**",
        "A. open drawer B. grab knife",
        "A. Cut it.\nB. Peel it.",
        "Option A or option B",
        "Either option A or option B.",
        "Answer: A, B",
        "Answer: A/B",
        "Answer: A & B",
        "Answer: A or B",
        "The answer is (A) or (B)",
        "Answer: A\nAnswer: B",
        "<answer>A</answer><answer>B</answer>",
        "<answer>A<answer>B</answer>",
        "<answer>A or B</answer>",
        "B or C",
        "B and C",
        "B or",
        "<answer>B or</answer>",
        "<answer>B and C are right</answer>",
        "<answer>B or C grab onion</answer>",
        "<answer>B, C grab onion</answer>",
        "<answer>B, or C</answer>",
        "<answer>B and/or C</answer>",
        "<answer>B grab onion or C cut it</answer>",
        "<answer>B grab onion\nC cut it</answer>",
        "A - Cut it.\nB - Peel it.",
        "A.Cut it.\nB.Peel it.",
        "A.Cut it B.Peel it",
        "[A] Cut it [B] Peel it",
        "B、C",
        "<answer>B grab onion</answer><answer>C cut it</answer>",
    ],
}
ANSWER_CASES = []
for letter, texts in ANSWERS.items():
    ANSWER_CASES += [(text, letter) for text in texts]


@pytest.mark.parametrize("text, expected", ANSWER_CASES)
def test_extract_answer(text, expected):
    """Trap 11: the table of accepted forms, and what must score 0."""
    assert g.extract_answer(text) == expected
    if expected and "<" not in text:
        assert g.extract_answer(f"<answer>{text}</answer>") == expected
        assert g.extract_answer(f"<think>A, B or C</think>\n{text}\n") == expected


@pytest.mark.parametrize(
    "text, count, expected",
    [
        ("E", 5, "E"),
        ("(e)", 5, "E"),
        ("Answer: E", 5, "E"),
        ("E. none", 5, "E"),
        ("E none", 5, "E"),
        ("E - none", 5, "E"),
        ("D or E", 5, None),
        ("F", 5, None),
        ("C", 2, None),
        ("C none", 2, None),
        ("B", 2, "B"),
        ("B none", 2, "B"),
    ],
)
def test_extract_answer_among_other_letters(text, count, expected):
    """LongVideoBench has four or five candidates: a letter counts if it is one of them."""
    assert g.extract_answer(text, ["up"] * count) == expected


@pytest.mark.parametrize(
    "text, choice, expected",
    [
        ("A knife", "knife", "A"),
        ("A knife.", "knife", "A"),
        ("A  Knife", "knife", "A"),
        ("A knife", "Knife.", "A"),
        ("A grab\nthe knife", "grab  the knife", "A"),
        ("Ａ knife", "knife", "A"),
        ("A ½ cup", "½ cup", "A"),
        ("A pan, then a lid", "pan, then a lid", "A"),
        ("A A knife", "A knife", "A"),
        ("A c++ (new)", "C++ (new)", "A"),
        ("A knife", "A knife", None),
        ("A knife", "lid", None),
        ("A lid", "knife", None),
        ("A knife and a lid", "knife", None),
        ("A kni", "knife", None),
        ("A knifes", "knife", None),
        ("a knife", "knife", None),
        ("a knife", "a knife", None),
        ("A knife", "", None),
        ("A or knife", "knife", None),
        ("A. knife", "lid", "A"),
        ("B knife", "knife", "B"),
    ],
)
@pytest.mark.parametrize("form", ["{}", "<answer>{}</answer>", "<think>A lid</think>{}"])
def test_extract_answer_of_a_choices_text(form, text, choice, expected):
    """The A of `A knife` may be an article: it is the letter where choice A is the knife."""
    text = form.format(text)
    assert g.extract_answer(text, [choice, "cut", "peel", "wash"]) == expected


def test_the_choices_come_with_a_completion():
    """The reward of `A knife` is by the sample's own choices."""
    sample = dict(
        gold="A", sample_id=7, text="Next?", ids=[1], choices=["knife", "cut", "peel", "wash"]
    )
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: "<answer>A knife</answer>")
    c = g.Config(format_reward_weight=0)
    said = torch.ones(1, 1, 2, dtype=torch.bool)
    group = g.Group(None, torch.tensor([[[1, END]]]), said, said, [sample])

    for first, expected in (("knife", (1, "A")), ("lid", (0, None))):
        sample["choices"][0] = first
        g.judge(group, c, tokenizer, [END], 0)
        [entry] = group.rows[0]["completions"]
        assert (entry["reward"], entry["answer"]) == expected


@pytest.mark.parametrize(
    "text",
    [
        "A " * 20000,
        "A, " * 20000 + "x",
        "A" + " " * 50000 + "x",
        "(" * 50000,
        "answer: " * 20000,
        "answer is A or " * 9000,
        "<answer>" * 20000,
        r"\boxed{" * 20000,
        "<think></think>" * 9000,
        "<think>" + "</think><answer>" * 9000,
        "answer A" + "," * 90000,
        "answer A" + ", " * 50000 + "x",
        "B" + "\n" * 90000 + "x",
        "B, " + " " * 90000 + "x.y",
        "B " + "put lid or " * 9000,
        "B\n" * 40000 + "x",
        "\ufdfa" * 100000,  # 18 characters each, once normalised
    ],
    ids=lambda text: text[:20],
)
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
    """1 for the right letter, in any accepted form.

    The format reward is for <think></think><answer></answer> and no more.
    """
    assert g.reward_of(text, gold, weight) == (reward, answer)


# ---- pick ----------------------------------------------------------------------------------------
def pick(logits, uniform, temperature):
    """g.pick as generate calls it."""
    log_probs = (logits / (temperature or 1)).log_softmax(-1)
    return g.pick(log_probs, uniform, temperature == 0)


def draw(logits, n=40000, temperature=1.0, seed=0):
    """-> how often each token of logits [V] is picked at n uniform numbers."""
    uniform = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rows = torch.as_tensor(logits).float().expand(n, -1)
    ids = pick(rows, uniform, temperature)
    return torch.bincount(ids, minlength=len(logits))


def chi_square(counts, probs):
    """Pearson's statistic over its standard deviation: (X² - df) / sqrt(2 df).

    It is under 5 unless they differ. Tokens that should come fewer than 10 times count as one.
    """
    counts = counts.double()
    expected = probs.double() * counts.sum()
    rare = expected < 10
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))

    possible = expected > 0
    assert counts[~possible].sum() == 0
    df = int(possible.sum()) - 1
    statistic = (((counts - expected) ** 2)[possible] / expected[possible]).sum()
    return float(statistic - df) / math.sqrt(2 * df)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_pick_follows_the_softmax(temperature):
    """Sampled tokens follow softmax(logits / T), and not that of another temperature."""
    logits = [2.0, 1.0, 0.5, 0.0, -1.0, -3.0]
    counts = draw(logits, temperature=temperature)
    for T in (0.7, 1.0, 1.5):
        statistic = chi_square(counts, (torch.tensor(logits) / T).softmax(0))
        assert (statistic < 4) == (T == temperature), (T, statistic)


def test_pick_never_takes_what_cannot_come():
    """Probabilities .1 .3 .4 0 .2: they come in these proportions, and the zero never."""
    probs = [0.1, 0.3, 0.4, 0.0, 0.2]
    counts = draw(torch.tensor(probs).log())
    assert (counts > 0).tolist() == [True, True, True, False, True], counts
    assert chi_square(counts, torch.tensor(probs)) < 4


def test_pick_is_greedy_at_temperature_0():
    """Temperature 0 is the most likely token, whatever the uniform number.

    A high temperature nearly forgets the logits.
    """
    logits = torch.tensor([[0.0, 3.0, 2.9], [5.0, -1.0, 4.0]])
    uniform = torch.tensor([0.0, LAST], dtype=torch.float64)
    assert pick(logits, uniform, 0).tolist() == [1, 0]
    assert pick(logits, uniform.flip(0), 0).tolist() == [1, 0]
    assert chi_square(draw([3.0, 0.0, -3.0], temperature=1e4), torch.ones(3) / 3) < 4


@pytest.mark.parametrize(
    "probs",
    [
        [0, 0.5, 0, 0.5, 0],
        [0, 1, 0],
        [1, 0, 0],
        [0, 0, 1],
        [0, 1e-12, 1, 1e-12, 0],
        [0] + [1e-5] * 1000 + [0],
    ],
    ids=lambda probs: len(probs),
)
def test_pick_at_the_ends(probs):
    """Uniform 0 gives the first token that can come and 1 - 2^-53 the last.

    A token of probability 0 never comes.
    """
    logits = torch.tensor(probs).log().expand(3, -1)
    uniform = torch.tensor([0, 0.5, LAST], dtype=torch.float64)
    first, middle, last = pick(logits, uniform, 1.0).tolist()
    assert min(probs[first], probs[middle], probs[last]) > 0
    assert first <= middle <= last
    if max(probs) < 1:
        possible = [i for i, p in enumerate(probs) if p > 1e-9]
        assert first == possible[0]
        assert last == possible[-1]


def test_pick_rows_are_their_own():
    """A row's token comes from its own logits and number: alone or in a batch, in any order."""
    torch.manual_seed(0)
    logits = torch.randn(64, 300)
    uniform = torch.rand(64, dtype=torch.float64)
    for temperature in (1.0, 0.7):
        whole = pick(logits, uniform, temperature)
        order = torch.randperm(64)
        assert torch.equal(pick(logits[order], uniform[order], temperature), whole[order])
        alone = [pick(x[None], u[None], temperature) for x, u in zip(logits, uniform)]
        assert torch.equal(torch.cat(alone), whole)


# ---- generate ------------------------------------------------------------------------------------
def prompts_of(model):
    """Three samples of different length, with a video and an image, an image, and text alone."""
    parts = (
        [3, ("video", (2, 4, 4)), 2, ("image", (1, 4, 4)), 4],
        [5, ("image", (1, 4, 4)), 1],
        [4],
    )
    return [make_sample(model.config, *p, seed=i) for i, p in enumerate(parts)]


def sample(model, samples, G=6, C=8, ends=(END, OTHER_END), seeds=None, **options):
    """-> completions [B, G, C] of these samples, seeded by their sample_id."""
    seeds = seeds or [s["sample_id"] for s in samples]
    return g.generate(model, collate(*samples), G, C, list(ends), seeds, **options)[0]


def distinct(completions):
    """How many different rows completions [B, G, C] hold."""
    return len({tuple(row) for row in completions.flatten(0, 1).tolist()})


def watch_decoder(model):
    """-> a list that takes the number of rows of each later call of the model's decoder."""
    sizes = []
    decoder = model.decoder

    def watched(x, *rest):
        sizes.append(len(x))
        return decoder(x, *rest)

    model.decoder = watched
    return sizes


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_first_tokens_follow_the_scored_policy(toy, temperature):
    """Traps 1 and 2: first tokens follow exactly the distribution that the forward scores.

    That of this temperature and no other, though the folder's generation_config.json says top_k 1
    and temperature 0.01.
    """
    assert '"top_k": 1,' in (toy / "init/generation_config.json").read_text()
    model = g.load_model(toy / "init", CPU, torch.float32)
    # An untrained model is nearly uniform: make its logits wider.
    model.model.norm.weight.data *= 2
    prompts = collate(make_sample(model.config, 3, ("image", (1, 4, 4)), 2))
    V = model.config.text_config.vocab_size
    tokens, _ = g.generate(model, prompts, 20000, 1, [V - 1, V - 2], [1], temperature)
    counts = torch.bincount(tokens.flatten(), minlength=V)

    for T in (0.7, 1.0, 1.5):
        with torch.no_grad():
            probs = model(prompts, torch.arange(V).view(1, V, 1), T).exp()[0, :, 0]
        assert float(probs.sum()) == pytest.approx(1, abs=1e-4)
        statistic = chi_square(counts, probs)
        assert (statistic < 4) == (T == temperature), (T, statistic)


def drawn_and_scored(monkeypatch, model, prompts, G, C, ends, temperature=1.0):
    """-> completions [B, G, C] and two log-probs of each of their tokens.

    The first is of the distribution that it was drawn from, as generate returns it too; the second
    as the forward scores it.
    """
    steps = []  # log-probs [B*G, V]
    pick = g.pick

    def watch(log_probs, uniform, greedy):
        steps.append(log_probs)
        return pick(log_probs, uniform, greedy)

    monkeypatch.setattr(g, "pick", watch)
    out, said = g.generate(model, prompts, G, C, ends, range(len(prompts.ids)), temperature)
    logp = torch.stack(steps, 1).view(*out.shape, -1)  # [B, G, C, V]
    drawn = logp.gather(-1, out[..., None])[..., 0]
    mask = g.completion_mask(out, ends)
    torch.testing.assert_close(said[mask], drawn[mask], atol=1e-5, rtol=0)
    with torch.no_grad():
        scored = model(prompts, out, temperature)
    return out, drawn, scored


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_every_token_is_drawn_from_the_scored_distribution(tiny_model, monkeypatch, temperature):
    """Trap 2: at every position, in every row, what is sampled from is what the forward scores."""
    _, _, model = tiny_model()
    prompts = collate(*prompts_of(model))
    out, drawn, scored = drawn_and_scored(
        monkeypatch, model, prompts, 6, 8, [END, END], temperature
    )
    mask = g.completion_mask(out, [END])
    assert (drawn - scored)[mask].abs().max() <= 1e-4
    assert len(out.unique()) > 50


def test_bf16_draws_from_what_it_scores(tiny_model, monkeypatch):
    """Trap 2, in bf16: keys with large biases, as Qwen2's are, make large scores.

    Rounded to bf16 in decoding, which SDPA's kernels do not do when they score, they would move the
    log-probs of drawn tokens by several times bf16's own noise.
    """
    folder, _, _ = tiny_model()
    model = g.load_model(folder, CPU, torch.bfloat16)
    for i, layer in enumerate(model.model.layers):
        bias = layer.self_attn.k_proj.bias
        noise = torch.randn(bias.shape, generator=torch.Generator().manual_seed(i))
        bias.data = 60 * noise.bfloat16()

    prompts = g.Prompts.collate(prompts_of(model), CPU, torch.bfloat16)
    _, drawn, scored = drawn_and_scored(monkeypatch, model, prompts, 8, 12, [400])
    apart = (scored - drawn).abs().mean()
    assert apart < 0.02, apart


VENDORS = (
    '{"do_sample": true, "temperature": 0.01, "top_k": 1, "top_p": 0.001,'
    ' "repetition_penalty": 1.05}'
)


def test_vendors_generation_config_changes_nothing(tiny_model):
    """Trap 1: the same varied samples, whatever generation_config.json is in the model's folder.

    The vendor's, another, or none.
    """
    folder, _, model = tiny_model()
    path = folder / "generation_config.json"
    samples = prompts_of(model)
    first = None
    for text in (VENDORS, '{"do_sample": false, "eos_token_id": 5, "max_new_tokens": 2}', None):
        path.unlink()
        if text:
            path.write_text(text)
        out = sample(g.load_model(folder, CPU, torch.float32), samples)
        if first is None:
            first = out
        assert torch.equal(out, first)
        assert distinct(out) == 18


def test_completions_are_prompt_major(tiny_model):
    """Trap 6: in a batch of different prompts, each gets the completions that it gets alone.

    Exactly those, and in its own place.
    """
    _, _, model = tiny_model()
    samples = prompts_of(model)
    together = sample(model, samples)
    for i, s in enumerate(samples):
        alone = sample(model, [s])
        C = alone.shape[2]
        assert torch.equal(together[i, :, :C], alone[0])
        assert (together[i, :, C:] == END).all()

    for order in ([2, 0, 1], [1, 2]):
        assert torch.equal(sample(model, [samples[i] for i in order]), together[order][:, :, :8])
    assert distinct(together) == 18


def test_rows_take_their_numbers_from_their_seed(tiny_model):
    """The same prompt twice: its completions follow its seed, wherever it stands.

    At temperature 0 all rows are the same.
    """
    _, _, model = tiny_model()
    s = prompts_of(model)[0]
    out = sample(model, [s, s], seeds=[5, 6])
    assert torch.equal(sample(model, [s, s], seeds=[6, 5]), out.flip(0))
    assert not torch.equal(out[0], out[1])
    greedy = sample(model, [s, s], temperature=0)
    assert (greedy == greedy[0, 0]).all()


@pytest.mark.parametrize("ends", [(END, OTHER_END), (OTHER_END, END)])
def test_stops_at_either_end_token(tiny_model, monkeypatch, ends):
    """Behind the first end token of either kind a row holds end_ids[0] alone.

    Decoding ends when every row has ended.
    """
    _, _, model = tiny_model()
    one, two, _ = prompts_of(model)
    a, b = ends
    said = [
        [5, b, 7, 8, 9, 9],
        [a, 6, b, 6, 9, 9],
        [5, 6, 7, b, 9, 9],
        [5, 6, 7, 8, 9, a],
    ]

    def say(logits, uniform, *_):
        """Row i says said[i]; a row is known by its random numbers, one seed a prompt."""
        known = []
        for seed in range(B):
            rng = torch.Generator().manual_seed(seed)
            known.append(torch.rand(4 // B, C, dtype=torch.float64, generator=rng))
        row, t = (torch.cat(known)[None] == uniform[:, None, None]).nonzero()[:, 1:].T
        return torch.tensor(said)[row, t]

    monkeypatch.setattr(g, "pick", say)
    B, C = 2, 9
    out = sample(model, [one, two], G=2, C=9, ends=ends)
    assert out.flatten(0, 1).tolist() == [
        [5, b, a, a, a, a],
        [a] * 6,
        [5, 6, 7, b, a, a],
        [5, 6, 7, 8, 9, a],
    ]
    assert g.completion_mask(out, list(ends)).sum(-1).flatten().tolist() == [2, 1, 4, 6]

    # The longest of these has 4.
    B = 1
    said[3] = said[0]
    assert sample(model, [one], G=4, C=9, ends=ends).shape == (1, 4, 4)

    # C is the limit.
    C = 2
    said[3] = [5, 6, 7, 8, 9, a]
    short = sample(model, [one], G=4, C=2, ends=ends)
    assert short.tolist() == [[[5, b], [a, a], [5, 6], [5, 6]]]


# Operations that wait for a result, or take in a Python value.
NOT_CAPTURED = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "lift_fresh",
    "unique_dim",
    "_unique2",
    "repeat_interleave",
}


class Recorded(TorchDispatchMode):
    """Stands in for torch.cuda.graph: notes the operations of its block and undoes what they did.

    It gives `graph` a replay() that runs them again on the same memory. As a CUDA graph, it takes
    all Python values for fixed and refuses to wait for results.
    """

    def __init__(self, graph, capture_error_mode):
        super().__init__()
        assert capture_error_mode == "thread_local"
        self.tape = []
        self.undo = []
        graph.replay = self.replay
        Recorded.made.append(self)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [z for z in tree_leaves((args, kwargs)) if isinstance(z, torch.Tensor)]
        name = func._schema.name.removeprefix("aten::")
        assert name not in NOT_CAPTURED, f"{func} cannot be captured"
        if "index" in name:
            masked = any(z.dtype == torch.bool for z in tensors[1:2])
            assert not masked, f"{func} of a mask waits for it"

        if func._schema.is_mutable:
            self.undo += [(z, z.clone()) for z in tensors]
        out = func(*args, **kwargs)
        self.tape.append((func, args, kwargs, out))
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        for z, before in self.undo[::-1]:
            z.copy_(before)

    def replay(self):
        for func, args, kwargs, out in self.tape:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                assert old.shape == new.shape
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.mark.parametrize(
    "G, temperature",
    [
        (2, 1.5),
        (2, 0),
        (16, 1.5),
    ],
    ids=str,
)
def test_a_token_can_be_a_cuda_graph(tiny_model, monkeypatch, G, temperature):
    """The same tokens and log-probs where a step is recorded once and repeated, as on a GPU.

    On the same memory: nothing in them depends on a Python number that changes, or is asked for by
    the host.
    """
    _, _, model = tiny_model()
    arguments = (model, collate(*prompts_of(model)), G, 30, list(range(40)), [1, 2, 3], temperature)
    expected, expected_logp = g.generate(*arguments)

    sizes = watch_decoder(model)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "graph", Recorded)
    monkeypatch.setattr(Recorded, "made", [], raising=False)
    found, logp = g.generate(*arguments)
    assert torch.equal(found, expected)
    assert torch.equal(logp, expected_logp)

    # The prompts, then a token at once and a token recorded; the rest is repeated.
    rows = 3 * G
    assert sizes[1:] == [rows, rows]
    assert len(Recorded.made) == 1
    assert expected.shape[2] > 4


# ---- rollout -------------------------------------------------------------------------------------
@pytest.fixture
def roll(toy):
    """roll(samples, step=0, **changes of Config) -> judged rollout of the toy's untrained model."""
    tokenizer = AutoTokenizer.from_pretrained(toy / "init")
    model = g.load_model(toy / "init", CPU, torch.float32)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]

    def run(samples, step=0, **changes):
        c = g.Config(**dict(num_generations=4, max_completion_length=6) | changes)
        group = g.rollout(model, samples, c, ends, step, CPU, torch.float32)
        g.judge(group, c, tokenizer, ends, step)
        return group

    run.tokenizer = tokenizer
    run.config = model.config
    run.ends = ends
    return run


def completions_of(group, key):
    """-> per prompt, what its completions have under `key`."""
    found = []
    for row in group.rows:
        found.append([x[key] for x in row["completions"]])
    return found


def test_rollout_is_seeded_by_seed_step_and_sample(roll):
    """The same (seed, step, sample_id) gives the same completions.

    Whatever shares the batch and whatever torch's own generator did. Another seed, step or
    sample_id gives others.
    """
    samples = []
    for n in range(3):
        drawn = make_sample(roll.config, 4, ("image", (1, 4, 4)), n + 1)
        samples.append(drawn | dict(sample_id=f"s{n}"))
    one = samples[:1]
    [first] = completions_of(roll(one), "ids")

    torch.manual_seed(5)
    random.seed(5)
    assert completions_of(roll(one), "ids") == [first]
    assert completions_of(roll(samples[::-1]), "ids")[2] == first

    renamed = [samples[0] | dict(sample_id="s9")]
    for other in (roll(one, step=1), roll(one, seed=43), roll(renamed)):
        assert completions_of(other, "ids") != [first]
    assert len({tuple(ids) for ids in first}) == 4


def test_rollout_rewards_are_prompt_major(roll, monkeypatch):
    """Trap 6: each prompt's completions meet its own gold letter.

    And each group its own mean and standard deviation.
    """
    responses = [
        ["<answer>A</answer>", "B", "A. cut", "C"],
        ["B", "B", "<answer>B</answer>", "A or B"],
    ]
    end = roll.ends[:1]
    ids = []
    for group in responses:
        ids.append([roll.tokenizer(text).input_ids + end for text in group])
    C = max(len(row) for row in ids[0] + ids[1])
    padded = [row + end * (C - len(row)) for row in ids[0] + ids[1]]
    completions = torch.tensor(padded).view(2, 4, C)

    logp = torch.zeros(completions.shape)
    monkeypatch.setattr(g, "generate", lambda *args, **kwargs: (completions, logp))
    samples = [dict(make_sample(roll.config, 4, seed=i), gold=gold) for i, gold in enumerate("AB")]
    out = roll(samples)
    assert completions_of(out, "answer") == [["A", "B", "A", "C"], ["B", "B", "B", None]]
    assert completions_of(out, "reward") == [[1, 0, 1, 0], [1, 1, 1, 0]]
    # std of 1 0 1 0: sqrt(4 * .25 / 3) = .577350; of 1 1 1 0: sqrt((3 / 16 + 9 / 16) / 3) = .5
    golden = [[0.5 / 0.57745, -0.5 / 0.57745] * 2, [0.25 / 0.5001] * 3 + [-0.75 / 0.5001]]
    torch.testing.assert_close(out.advantages, torch.tensor(golden), atol=1e-5, rtol=0)

    # Through the end token, without the padding.
    assert completions_of(out, "ids") == ids
    assert completions_of(out, "truncated") == [[False] * 4] * 2


def test_rollout_samples_what_is_scored(roll, monkeypatch):
    """Trap 2: rollouts are drawn at --temperature, which scores them too, and no other setting."""
    calls = []
    original = g.generate
    signature = inspect.signature(original)

    def watch(*args, **kwargs):
        calls.append(signature.bind(*args, **kwargs))
        return original(*args, **kwargs)

    monkeypatch.setattr(g, "generate", watch)
    roll([make_sample(roll.config, 4)], temperature=0.7)
    calls[0].apply_defaults()
    inputs = ("model", "prompts", "seeds")
    settings = {key: value for key, value in calls[0].arguments.items() if key not in inputs}
    assert settings == dict(G=4, C=6, temperature=0.7, end_ids=roll.ends)


def test_rollout_without_samples(roll):
    """A rank whose samples could not be read takes part with no row, no token, no advantage."""
    out = roll([])
    assert out.rows == []
    assert not out.mask.any()
    assert not out.advantages.any()
    assert out.completions.shape[1] == 4
