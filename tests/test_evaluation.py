"""The evaluation: counts, batches, going on after a kill, ranks, ablations, tables, pass rates."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig, Qwen2VLForConditionalGeneration

import eval_video as e
import sft_video
from test_smoke import CPU, ROOT, transformers_inputs
from tools import select_chains as chains
from tools import select_records

ENDS = ["<|im_end|>", "<|endoftext|>"]
L1, L2, L3 = "validation_L1", "validation_L2", "validation_L3"
PREDICTIONS = f"predictions_{L1}.jsonl"


@pytest.fixture(scope="module")
def model(toy):
    """The toy's untrained model, stirred until its greedy responses differ among prompts."""
    folder = toy / "stirred"
    shutil.copytree(toy / "init", folder)
    noise = torch.Generator().manual_seed(0)
    weights = load_file(folder / "model.safetensors")
    for name, x in weights.items():
        if x.dim() == 1:
            x += 0.1 * torch.randn(x.shape, generator=noise)
        elif "embed_tokens" not in name:
            x += 1.2 * x
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture
def evaluate(toy, model, monkeypatch, capsys):
    """evaluate(output_dir, **flags) -> what eval_video.py prints, run in this process.

    On the toy's L1 if not told else.
    """
    common = dict(
        model=model,
        data_root=toy / "data",
        splits=L1,
        max_frames=8,
        frame_size=56,
        batch_size=8,
        max_completion_length=8,
        dataloader_num_workers=0,
    )

    def run(output_dir, **flags):
        words = ["eval_video.py"]
        for name, value in (common | dict(output_dir=output_dir) | flags).items():
            words += [f"--{name}", *str(value).split()]
        monkeypatch.setattr(sys, "argv", words)
        capsys.readouterr()
        try:
            e.main()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        return capsys.readouterr().out

    return run


@pytest.fixture
def fails(evaluate, capsys):
    """fails(output_dir, **flags) -> what a run that must end with exit code 2 says on stderr."""

    def run(output_dir, **flags):
        with pytest.raises(SystemExit) as end:
            evaluate(output_dir, **flags)
        assert end.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        return [line for line in lines if line.startswith("eval_video.py: error: ")]

    return run


@pytest.fixture
def say(monkeypatch):
    """say(answer): the model says answer(i), a list of texts, to the i-th question from then on."""

    def patch(answer):
        asked = iter(range(10**6))

        def generate(model, prompts, G, C, end_ids, seeds, *sampling):
            tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
            rows = []
            for _ in seeds:
                for text in answer(next(asked)):
                    rows.append(tokenizer(text).input_ids + end_ids[:1])

            longest = max(map(len, rows))
            padded = [row + end_ids[:1] * (longest - len(row)) for row in rows]
            return torch.tensor(padded).view(len(seeds), G, longest), None

        monkeypatch.setattr(e, "generate", generate)

    return patch


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read(folder, split=L1):
    return read_rows(folder / f"predictions_{split}.jsonl")


def summary(folder, split=L1):
    return json.loads((folder / "summary.json").read_text())[split]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def made_up(folder, split, rows):
    """A folder as an evaluation leaves it.

    rows: (sample_id, domain, right or wrong or None: failed).
    """
    folder.mkdir(exist_ok=True)
    lines = []
    for name, domain, right in rows:
        failed = right is None
        row = dict(
            sample_id=name,
            domain=domain,
            gold="A",
            predicted=None if failed else "AB"[not right],
            correct=bool(right),
            response=None,
            error="unreadable" if failed else None,
        )
        lines.append(json.dumps(row) + "\n")

    (folder / f"predictions_{split}.jsonl").write_text("".join(lines))
    return folder


def small_root(toy, folder, n=6):
    """A data root with L1's first n questions alone, to be changed."""
    for kind in ("annotations", "videos/EpicKitchens", "images/EpicKitchens"):
        (folder / kind).mkdir(parents=True)
    lines = (toy / f"data/annotations/{L1}.jsonl").read_text().splitlines(keepends=True)[:n]
    (folder / f"annotations/{L1}.jsonl").write_text("".join(lines))

    for raw in map(json.loads, lines):
        video = f"videos/EpicKitchens/{raw['video_basename']}"
        image = f"images/EpicKitchens/{raw['current_observation_basename']}"
        shutil.copy(toy / "data" / video, folder / video)
        shutil.copy(toy / "data" / image, folder / image)
    return folder


def draw_choices(root):
    """Takes the fixed choices from L1's questions, for some to be drawn -> its rows."""
    path = root / f"annotations/{L1}.jsonl"
    raws = read_rows(path)
    for raw in raws:
        raw["golden_choice_idx"] = None
        raw["negative_answers"] = ["fly", "swim", "dive", "sit", "lie"]
    path.write_text("".join(json.dumps(raw) + "\n" for raw in raws))
    return raws


def asked(evaluate, monkeypatch, folder, **flags):
    """The samples that an evaluation hands to the model."""
    samples = []
    predict = e.predict

    def predict_and_keep(*args):
        samples.extend(args[2])
        return predict(*args)

    monkeypatch.setattr(e, "predict", predict_and_keep)
    evaluate(folder, **flags)
    monkeypatch.setattr(e, "predict", predict)
    return samples


# ---- Statistics ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "correct, total, low, high",
    [
        # z = 1.96, z2 = 3.8415: (8 + 1.9207 -+ 1.96 sqrt(8 * 2 / 10 + .9604)) / 13.8415
        # = (9.9207 -+ 3.1364) / 13.8415
        (8, 10, 0.4902, 0.9433),
        (0, 10, 0.0, 0.2775),  # the upper end is z2 / (10 + z2)
        (10, 10, 0.7225, 1.0),
        (1237, 2432, 0.4888, 0.5285),  # .50863; 1.96 sqrt(p (1 - p) / n) = .01987 either way
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson(correct, total, low, high):
    """The 95 % Wilson score interval against numbers worked by hand."""
    assert e.wilson(correct, total) == pytest.approx([low, high], abs=1e-4)


@pytest.mark.parametrize(
    "gained, lost, p",
    [
        (10, 2, 0.0386),  # 2 (1 + 12 + 66) / 4096
        (2, 10, 0.0386),
        (1, 5, 0.2188),  # 2 (1 + 6) / 64
        (0, 6, 0.03125),  # 2 / 64
        (3, 3, 1.0),  # 2 (1 + 6 + 15 + 20) / 64 is above 1
        (0, 0, 1.0),
        # Beyond the range of floats on the way; z = (199 / 40) = 4.975 without ties.
        (700, 900, 6.3e-7),
    ],
)
def test_mcnemar(gained, lost, p):
    """The exact two-sided p-value of McNemar's test against numbers worked by hand."""
    assert e.mcnemar(gained, lost) == pytest.approx(p, abs=1e-4, rel=0.1 if p < 1e-4 else None)


# 4 of 6 Work right, 1 of 2 Hobbies, and a failed one each in Hobbies and Recreation.
ROWS = [(f"w{i}", "Work", i < 4) for i in range(6)]
ROWS += [
    ("h0", "Hobbies", True),
    ("h1", "Hobbies", False),
    ("h2", "Hobbies", None),
    ("r0", "Recreation", None),
]


def test_tally_by_domain(tmp_path):
    """Counts, accuracy and interval of a split and of its domains, worked by hand."""
    rows = read(made_up(tmp_path, L3, ROWS), L3)
    rows[5]["predicted"] = None  # a wrong one that gave no answer
    x = e.tally(rows, "domain")

    # 5 of 8: (5 + 1.9207 -+ 1.96 sqrt(5 * 3 / 8 + .9604)) / 11.8415 = (6.9207 -+ 3.3000) / 11.8415
    assert x["ci95"] == pytest.approx([0.3057, 0.8632], abs=1e-4)
    assert (x["correct"], x["total"], x["failed"], x["no_answer"]) == (5, 8, 2, 1)
    assert (x["accuracy"], x["accuracy_failed_wrong"]) == (5 / 8, 5 / 10)

    keys = ("accuracy", "correct", "total", "failed", "no_answer", "accuracy_failed_wrong")
    found = {}
    for name, domain in x["by_domain"].items():
        found[name] = tuple(domain[key] for key in keys)
    assert found == {
        "Hobbies": (1 / 2, 1, 2, 1, 0, 1 / 3),
        "Recreation": (0, 0, 0, 1, 0, 0),
        "Work": (4 / 6, 4, 6, 0, 1, 4 / 6),
    }
    assert x["by_domain"]["Work"]["ci95"] == pytest.approx([0.3000, 0.9032], abs=1e-4)


KEYS = {"sample_id", "response", "ids", "predicted", "gold", "correct", "domain", "error"}


def test_summary_of_the_tiers(tmp_path, evaluate, say):
    """L1, L2 and L3 in one run: the summary counts the predictions, L3's domains add up to L3."""
    say(lambda i: ["<think>x</think><answer>A. move left</answer>" if i % 3 else "I do not know"])
    out = evaluate(tmp_path, splits=f"{L1} {L2} {L3}", limit=24, paper="")
    for split in (L1, L2, L3):
        rows = read(tmp_path, split)
        x = summary(tmp_path, split)
        assert len(rows) == 24 == x["total"]
        assert x["failed"] == 0
        assert x["no_answer"] == 8
        right = sum(row["gold"] == "A" for row in rows if row["predicted"])
        assert x["correct"] == right == sum(row["correct"] for row in rows) > 0
        assert set(rows[0]) == KEYS

    domains = summary(tmp_path, L3)["by_domain"]
    assert list(domains) == ["Daily life", "Hobbies", "Recreation", "Work"]
    for key in ("correct", "total", "no_answer"):
        assert sum(x[key] for x in domains.values()) == summary(tmp_path, L3)[key]
    assert {type(row["sample_id"]) for row in read(tmp_path, L1)} == {int}
    assert {type(row["sample_id"]) for row in read(tmp_path, L3)} == {str}

    lines = out.splitlines()
    columns = "L1 | L2 | L3 | L3 Daily life | L3 Hobbies | L3 Recreation | L3 Work"
    assert lines[0] == f"| model | {columns} | failed | missing |"
    x = summary(tmp_path)
    low, high = x["ci95"]
    cell = f"{100 * x['accuracy']:.1f} ({100 * low:.0f}–{100 * high:.0f}), n = 24"
    assert lines[2].startswith(f"| {tmp_path} | {cell} ")
    paper = "| paper: + GRPO | 46.01 | 50.16 | 44.89 | 48.52 | 45.08 | 43.72 | 41.34 |  |  |"
    assert lines[5] == paper
    assert lines[8] == "| DeepVideo-R1: 2B + GRPO | 38.4 | 42.0 | 36.8 |  |  |  |  |  |  |"
    assert (tmp_path / "summary.md").read_text().splitlines() == lines[:9]


def test_several_samples(tmp_path, evaluate, say):
    """Mean accuracy, pass@K, and the majority's answer: the first sampled of equals.

    An unreadable answer votes for none.
    """
    responses = [  # G: the right letter, W: a wrong one, V: another wrong one, ?: no answer
        "GWGV",  # majority right: 2 of 4
        "WWGG",  # a draw: W came first
        "GWGW",  # a draw: G came first
        "?WGG",  # right: 2 of 4
        "????",  # no answer
        "WWVW",  # wrong: 0 of 4
    ]
    evaluate(tmp_path / "golds", limit=6)
    golds = [row["gold"] for row in read(tmp_path / "golds")]

    def answer(i):
        right = "ABCD".index(golds[i])
        letters = dict(G=golds[i], W="ABCD"[right - 1], V="ABCD"[right - 2])
        return [letters.get(x, "who knows") for x in responses[i]]

    say(answer)
    out = evaluate(tmp_path / "out", limit=6, num_samples=4)
    rows = read(tmp_path / "out")
    assert [row["correct"] for row in rows] == [True, False, True, True, False, False]
    assert [len(row["responses"]) for row in rows] == [4] * 6
    assert rows[4]["answers"] == [None] * 4
    assert rows[3]["answers"] == [None, answer(3)[1], golds[3], golds[3]]
    assert rows[3]["response"] == "who knows"

    x = summary(tmp_path / "out")
    assert (x["accuracy"], x["no_answer"]) == (3 / 6, 1)
    assert x["mean_accuracy"] == pytest.approx((2 + 2 + 2 + 2 + 0 + 0) / 24)
    assert x["pass_at_k"] == pytest.approx(4 / 6)
    low, high = x["ci95"]
    accuracy = f"50.0 ({100 * low:.0f}–{100 * high:.0f}), n = 6"
    assert f"| {accuracy}, mean_accuracy 33.3 (10–70), pass_at_k 66.7 (30–90) | 0 |" in out


# ---- LongVideoBench ------------------------------------------------------------------------------
def test_longvideobench(tmp_path, toy, evaluate, say):
    """Four candidates or five: E is an answer among five alone.

    Counted by duration and by question category.
    """
    say(lambda i: ["<answer>E</answer>" if i % 2 else "<answer>A</answer>"])
    out = evaluate(tmp_path, limit=8, longvideobench=toy / "data", paper="")
    raws = json.loads((toy / "data/lvb_val.json").read_text())[:8]
    rows = read(tmp_path, "LVB")
    x = summary(tmp_path, "LVB")
    assert [len(raw["candidates"]) for raw in raws] == [4] * 4 + [5] * 4
    assert [row["predicted"] for row in rows] == ["A", None, "A", None, "A", "E", "A", "E"]
    assert [row["gold"] for row in rows] == ["ABCD"[raw["correct_choice"]] for raw in raws]

    domains = {name: counts["total"] for name, counts in x["by_domain"].items()}
    assert list(domains) == sorted(domains)
    assert domains == {"15 s": 2, "60 s": 2, "600 s": 2, "3600 s": 2}
    categories = x["by_category"]
    assert set(categories) == {raw["question_category"] for raw in raws}
    assert sum(counts["total"] for counts in categories.values()) == 8 == x["total"]
    columns = "L1 | LVB | LVB 15 s | LVB 60 s | LVB 600 s | LVB 3600 s"
    assert out.splitlines()[0] == f"| model | {columns} | failed | missing |"
    published = "| DeepVideo-R1: 7B + GRPO |  | 43.4 | 54.5 | 53.5 | 42.5 | 37.2 |  |  |"
    assert out.splitlines()[8] == published

    # Alone, without any annotations; one video of it is missing.
    root = tmp_path / "lvb"
    shutil.copytree(toy / "data/videos", root / "videos")
    shutil.copy(toy / "data/lvb_val.json", root)
    (root / "videos" / raws[1]["video_path"]).unlink()
    alone = dict(splits="LVB", longvideobench=root, data_root="none", limit=3)
    out = evaluate(tmp_path / "alone", skip_missing=True, **alone)
    asked = [raw["id"] for raw in (raws[0], *raws[2:4])]
    assert [row["sample_id"] for row in read(tmp_path / "alone", "LVB")] == asked
    assert set(json.loads((tmp_path / "alone/summary.json").read_text())) == {"LVB"}
    assert summary(tmp_path / "alone", "LVB")["missing"] == 1
    file = str(root / "videos" / raws[1]["video_path"])
    lost = [dict(split="LVB", sample_id=raws[1]["id"], file=file)]
    assert read_rows(tmp_path / "alone/missing.jsonl") == lost
    assert out.splitlines()[-2].endswith(" | 0 | 1 |")


GOOD = dict(
    id="v_0",
    video_path="lvb_00.avi",
    question="What?",
    candidates=list("wxyz"),
    correct_choice=3,
    duration_group=15,
    question_category="S2A",
)


@pytest.mark.parametrize(
    "entry, words",
    [
        (GOOD | dict(correct_choice=4), "4"),
        (GOOD | dict(correct_choice=-1), "-1"),
        (GOOD | dict(correct_choice="A"), "'A'"),
        (GOOD | dict(correct_choice=None), "None"),
        (GOOD | dict(candidates=list("xyz")), "['x', 'y', 'z']"),
        (GOOD | dict(candidates=list("uvwxyz")), "'u'"),
        (GOOD | dict(candidates="wxyz"), "wxyz"),
        (GOOD | dict(candidates=[1, 2, 3, 4]), "[1, 2, 3, 4]"),
        (GOOD | dict(candidates=None), "None"),
        (GOOD | dict(candidates=["w", "x", "y", "<|image_pad|>"]), "special token"),
        (GOOD | dict(question=""), "question"),
        (GOOD | dict(question_category=None), "question_category"),
        (GOOD | dict(video_path=""), "video_path"),
        (GOOD | dict(video_path="../../outside.avi"), "leaves"),
        (GOOD | dict(question="What is <|image_pad|>?"), "special token"),
        (GOOD | dict(id="v_1"), "v_1"),
        (GOOD | dict(id=7), "'id'"),
        ({key: value for key, value in GOOD.items() if key != "duration_group"}, "duration_group"),
        (5, ""),
        ([], ""),
    ],
)
def test_bad_longvideobench_entry(tmp_path, toy, capsys, entry, words):
    """A bad entry of lvb_val.json: exit code 2, naming it and what is wrong; so are all others."""
    root = tmp_path / "root"
    (root / "videos").mkdir(parents=True)
    shutil.copy(toy / "data/videos/lvb_00.avi", root / "videos")
    shutil.copy(toy / "data/videos/lvb_00.avi", tmp_path / "outside.avi")
    five = GOOD | dict(id="v_1", candidates=list("vwxyz"), correct_choice=4)
    (root / "lvb_val.json").write_text(json.dumps([five, entry, GOOD | dict(question=5, id="v_2")]))
    with pytest.raises(SystemExit) as end:
        e.load_longvideobench(root)

    err = capsys.readouterr().err
    assert end.value.code == 2
    first, second = err.splitlines()
    assert f"{root}/lvb_val.json:2: " in first
    assert words in first
    assert f"{root}/lvb_val.json:3: sample_id v_2: field 'question'" in second

    (root / "lvb_val.json").write_text(json.dumps([five, GOOD | dict(correct_choice=3.0)]))
    keys = ("sample_id", "gold", "domain", "category")
    first, second = e.load_longvideobench(root)
    assert [first[key] for key in keys] == ["v_1", "E", "15 s", "S2A"]
    assert [second[key] for key in keys] == ["v_0", "D", "15 s", "S2A"]


@pytest.mark.parametrize("text", [None, "", "{", "null", "7"])
def test_malformed_longvideobench(tmp_path, capsys, text):
    """A lvb_val.json that is missing or no list: exit code 2, its path and how to get it."""
    if text is not None:
        (tmp_path / "lvb_val.json").write_text(text)
    with pytest.raises(SystemExit) as end:
        e.load_longvideobench(tmp_path)
    err = capsys.readouterr().err
    assert end.value.code == 2
    assert f"{tmp_path}/lvb_val.json" in err
    assert "hf download" in err


# ---- Decoding ------------------------------------------------------------------------------------
def samples_of(toy, model, places, max_frames=8, more=""):
    """-> (samples of these places in L1, the model, its tokenizer).

    A sample is as VideoDataset gives it, with the kinds of its media. The first question has no
    `more` words, the next as many as `more` has, the next twice as many, and so on.
    """
    ours = e.load_model(model, CPU, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    all_records = e.load_records(toy / f"data/annotations/{L1}.jsonl", toy / "data")
    records = []
    for n, place in enumerate(places):
        record = all_records[place]
        records.append(record | dict(question=record["question"] + n * more))

    c = e.Config(frame_size=56, max_frames=max_frames)
    dataset = e.VideoDataset(records, tokenizer, ours.config, c, shuffle=False)
    samples = []
    for i, record in enumerate(records):
        kinds = [kind for kind, _ in record["media"]]
        samples.append(dataset.begin(i)() | dict(kinds=kinds))
    return samples, ours, tokenizer


def test_batched_greedy_decoding(toy, model):
    """Prompts of different lengths decoded together give each the tokens it gets alone, in fp32."""
    samples, ours, tokenizer = samples_of(toy, model, range(16, 26), more=" move now")
    assert len({len(s["ids"]) for s in samples}) >= 8
    assert {len(s["grids"]) for s in samples} == {1, 2}  # four have no video
    ends = tokenizer.convert_tokens_to_ids(ENDS)

    def greedy(batch):
        prompts = e.Prompts.collate(batch, CPU, torch.float32)
        return e.generate(ours, prompts, 1, 16, ends, [0] * len(batch), temperature=0)[0]

    together = greedy(samples)
    for s, row in zip(samples, together):
        [alone] = greedy([s])
        length = alone.shape[1]
        assert torch.equal(row[:, :length], alone)
        assert (row[:, length:] == ends[0]).all()
    assert len({tuple(row) for row in together[:, 0].tolist()}) == 10


def test_greedy_responses_are_transformers(tmp_path, toy, model, evaluate):
    """Trap 1: on every L1 prompt the greedy response is that of transformers' generate.

    It has settings of ours, though the vendor's generation_config.json lies in the model's folder.
    Four frames a video: behind the toy's eight, of 2 x 2 merged patches, transformers' positions
    differ from the trained rule (docs/deviations.md).
    """
    evaluate(tmp_path, batch_size=16, max_frames=4)
    rows = read(tmp_path)
    samples, _, tokenizer = samples_of(toy, model, range(120), max_frames=4)

    assert json.loads((model / "generation_config.json").read_text())["top_k"] == 1
    hf = Qwen2VLForConditionalGeneration.from_pretrained(model).eval()
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=8,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids(ENDS),
    )
    hf.generation_config = greedy
    nothing = torch.zeros(1, 1, 0, dtype=torch.long)
    for s, row in zip(samples, rows):
        hf.model.rope_deltas = None
        inputs = transformers_inputs(hf.config, [s], nothing)
        [theirs] = hf.generate(**inputs, generation_config=greedy)
        response = tokenizer.decode(theirs[len(s["ids"]) :], skip_special_tokens=True)
        assert row["sample_id"] == s["sample_id"]
        assert row["response"] == response
    assert len({row["response"] for row in rows}) > 60


def test_vendors_generation_config_changes_nothing(tmp_path, toy, model, evaluate):
    """Trap 1: sampling at temperature 1 stays sampling, whatever generation_config.json says.

    Without the file there are the same rows.
    """
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("generation_config.json"))
    evaluate(tmp_path / "vendor", model=model, limit=4, num_samples=4)
    evaluate(tmp_path / "none", model=bare, limit=4, num_samples=4)
    rows = read(tmp_path / "vendor")
    assert rows == read(tmp_path / "none")
    assert all(len(set(row["responses"])) == 4 for row in rows)


def test_sampling_does_not_depend_on_the_batch(tmp_path, evaluate):
    """A question's samples come from (seed, sample_id).

    The same bytes from any batch size, others from another seed.
    """
    sampling = dict(num_samples=2, temperature=1.1)

    def predictions(name, **flags):
        evaluate(tmp_path / name, limit=24, **sampling, **flags)
        return contents(tmp_path / name)[PREDICTIONS]

    one = predictions("one", batch_size=1)
    five = predictions("five", batch_size=5)
    everything = predictions("all", batch_size=24)
    other = predictions("other", seed=1)
    assert one == five == everything != other

    texts = set()
    for row in read(tmp_path / "one"):
        texts.update(row["responses"])
    assert len(texts) == 48


def test_do_sample(tmp_path, evaluate):
    """Greedy by default; --do_sample and --do_sample True both sample.

    At a temperature near 0 it is greedy again.
    """

    def rows(name, **flags):
        evaluate(tmp_path / name, limit=4, **flags)
        return read(tmp_path / name)

    greedy = rows("greedy")
    bare = rows("bare", do_sample="")
    true = rows("true", do_sample=True)
    false = rows("false", do_sample=False)
    cold = rows("cold", do_sample="", temperature=1e-6)
    assert greedy == false == cold != bare == true


# ---- Going on after a kill -----------------------------------------------------------------------
@pytest.fixture
def unbroken(tmp_path, evaluate):
    """A whole run of 24 questions, in batches of 5."""
    evaluate(tmp_path / "unbroken", limit=24, batch_size=5)
    return tmp_path / "unbroken"


@pytest.mark.parametrize(
    "cut", ["nothing", "in the first line", "behind a line", "in a line", "before the last newline"]
)
def test_resume(tmp_path, unbroken, evaluate, cut):
    """Killed at any byte, the run goes on behind the last whole line.

    Its files are the unbroken run's, byte for byte.
    """
    whole = contents(unbroken)
    data = whole[PREDICTIONS]
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    size = {
        "nothing": 0,
        "in the first line": 9,
        "behind a line": ends[6],
        "in a line": ends[12] + 30,
        "before the last newline": len(data) - 1,
    }
    folder = tmp_path / "killed"
    shutil.copytree(unbroken, folder)
    os.truncate(folder / PREDICTIONS, size[cut])
    for name in ("summary.json", "summary.md"):
        (folder / name).unlink()

    evaluate(folder, limit=24, batch_size=5)
    files = contents(folder)
    assert {name: text.replace(b"killed", b"unbroken") for name, text in files.items()} == whole


def test_resume_is_by_sample_id(tmp_path, unbroken, evaluate, monkeypatch):
    """Trap 18: what is missing is found by sample_id, not by a count.

    Every question is there once and in the denominator.
    """
    path = unbroken / PREDICTIONS
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[5:10] + lines[:2]))

    samples = asked(evaluate, monkeypatch, unbroken, limit=24, batch_size=5)
    missing = [json.loads(line)["sample_id"] for line in lines[2:5] + lines[10:]]
    assert [s["sample_id"] for s in samples] == missing
    assert sorted(path.read_text().splitlines(keepends=True)) == sorted(lines)
    assert summary(unbroken)["total"] == 24


def test_the_ranks_own_files(unbroken, evaluate, monkeypatch):
    """Rows that killed ranks, of any number, wrote beside the file are lost or asked again.

    Half a line behind them is no row; a row that a kill left in two files is one.
    """
    whole = contents(unbroken)
    path = unbroken / PREDICTIONS
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]))
    (unbroken / "predictions_validation_L1.rank0").write_text("".join(lines[4:8]) + lines[8][:50])
    (unbroken / "predictions_validation_L1.rank5").write_text("".join(lines[2:4] + lines[20:]))
    (unbroken / "predictions_validation_L2.rank0").write_text("another split's")

    samples = asked(evaluate, monkeypatch, unbroken, limit=24, batch_size=5)
    missing = {json.loads(line)["sample_id"] for line in lines[8:20]}
    assert {sample["sample_id"] for sample in samples} == missing
    (unbroken / "predictions_validation_L2.rank0").unlink()
    assert contents(unbroken) == whole


def test_killed_ranks_of_another_model(unbroken, fails):
    """Rows that stand in the ranks' files alone have settings, too."""
    path = unbroken / PREDICTIONS
    path.rename(path.with_suffix(".rank1"))
    before = contents(unbroken)
    assert len(fails(unbroken, limit=24, seed=7)) == 1
    assert contents(unbroken) == before


def test_another_limit(unbroken, evaluate):
    """A larger --limit goes on; a smaller one answers nothing.

    It summarises the questions within it alone.
    """
    data = contents(unbroken)[PREDICTIONS]
    evaluate(unbroken, limit=12)
    assert contents(unbroken)[PREDICTIONS] == data
    assert summary(unbroken)["total"] == 12

    evaluate(unbroken, limit=30)
    assert contents(unbroken)[PREDICTIONS].startswith(data)
    assert summary(unbroken)["total"] == 30


@pytest.mark.parametrize(
    "flags, words",
    [
        (dict(do_sample=True), ["do_sample False, not True"]),
        (dict(seed=7), ["seed 42, not 7"]),
        (dict(max_completion_length=9), ["max_completion_length 8, not 9"]),
        (dict(max_frames=6), ["max_frames 8, not 6"]),
        (dict(ablate="no_image"), ["ablate 'none', not 'no_image'"]),
        (dict(fps=1.5), ["fps 2.0, not 1.5"]),
        (
            dict(num_samples=2, temperature=0.5),
            ["do_sample False, not True", "temperature 1.0, not 0.5", "num_samples 1, not 2"],
        ),
    ],
)
def test_changed_settings(unbroken, fails, flags, words):
    """Another setting in the same folder: exit code 2, a line for each, and not a byte changes.

    The line has both values.
    """
    before = contents(unbroken)
    told = fails(unbroken, **dict(limit=24) | flags)
    assert [line.partition(" has ")[2] for line in told] == words
    assert contents(unbroken) == before
    for line in told:
        assert str(unbroken) in line
        assert L1 in line


def test_changed_model_or_data(tmp_path, toy, model, evaluate, fails):
    """Another model or another question, here in its negatives, is an error with both hashes.

    A data root that has moved is none.
    """
    root = small_root(toy, tmp_path / "root")
    folder = tmp_path / "out"
    evaluate(folder, data_root=root, limit=3)
    before = contents(folder)
    told = fails(folder, data_root=root, model=toy / "init")
    assert len(told) == 1
    assert " has model_sha256 " in told[0]
    assert f"--output_dir {folder} (remove it, or give another): " in told[0]
    assert contents(folder) == before

    root = root.rename(tmp_path / "moved")
    evaluate(folder, data_root=root, limit=3)
    assert contents(folder) == before

    # The question is beyond the limit.
    path = root / f"annotations/{L1}.jsonl"
    *lines, last = path.read_text().splitlines()
    changed = json.dumps(json.loads(last) | dict(choice_d="stay"))
    path.write_text("\n".join([*lines, changed]))
    told = fails(folder, data_root=root, limit=3)
    old = json.loads((folder / f"settings_{L1}.json").read_text())["data_sha256"]
    assert len(told) == 1
    assert f" has data_sha256 {old!r}, not '" in told[0]
    assert contents(folder) == before


def test_the_default_folder(tmp_path, toy, on_ranks, monkeypatch):
    """Checkpoints of one step of two runs share a folder, or one has another name than its own."""
    monkeypatch.chdir(tmp_path)
    data = small_root(toy, tmp_path / "root", 1)
    for name in ("one", "one/checkpoint-2", "two/checkpoint-2"):
        shutil.copytree(toy / "init", name)
        words = ["--data_root", data, "--splits", L1, "--frame_size", 56]
        words += ["--model", name, "--max_completion_length", 1]
        [(code, _, err)] = on_ranks(e, words, 1)
        assert code == 0, err
    names = ["eval-one", "eval-one-checkpoint-2", "eval-two-checkpoint-2"]
    assert sorted(os.listdir("runs")) == names


def test_two_evaluations_in_one_folder(tmp_path, unbroken, evaluate, fails):
    """Both write. The second is told, and changes nothing; a killed one's lock is gone."""
    before = contents(unbroken)
    lock = "file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX)"
    hold = f"import fcntl, sys, time; {lock}; print(flush=True); time.sleep(99)"
    command = [sys.executable, "-c", hold, unbroken / ".lock"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE)
    first.stdout.readline()
    [told] = fails(unbroken, limit=24)
    assert f"--output_dir {unbroken}: another run is writing there" in told
    assert contents(unbroken) == before

    first.kill()
    first.wait()
    evaluate(unbroken, limit=24)


def test_broken_predictions(unbroken, fails):
    """A whole line that is no JSON is no trace of a kill: exit code 2, naming the file."""
    path = unbroken / PREDICTIONS
    path.write_bytes(b"{]\n" + path.read_bytes())
    before = contents(unbroken)
    told = fails(unbroken, limit=24)
    assert len(told) == 1
    assert str(path) in told[0]
    assert contents(unbroken) == before


@pytest.mark.parametrize("K", [1, 3])
def test_a_resumed_folder_has_one_grader(tmp_path, unbroken, evaluate, say, K):
    """Stored responses are graded anew: a changed grade is mended, beyond --limit too.

    --compare reads what is stored.
    """
    folder = unbroken
    if K > 1:
        folder = tmp_path / "several"
        say(lambda i: [f"<answer>{x}</answer>" for x in ("B", "ACBB"[i % 4], "A")])
        evaluate(folder, limit=24, num_samples=K)
    whole = contents(folder)

    rows = read(folder)
    for i in (0, 11, 23):
        other = "CD"[rows[i]["predicted"] == "C"]
        rows[i] |= dict(predicted=other, correct=rows[i]["gold"] == other)
        if K > 1:
            rows[i]["answers"] = [other] * K
    path = folder / PREDICTIONS
    e.write_rows(path, rows, "w")
    changed = path.read_bytes()
    assert changed != whole[PREDICTIONS]

    evaluate(tmp_path / "none", compare=folder)
    assert path.read_bytes() == changed
    path.write_bytes(changed + b'{"sample_id": ')  # a kill's
    evaluate(folder, limit=12, num_samples=K)
    assert path.read_bytes() == whole[PREDICTIONS]
    evaluate(folder, limit=24, num_samples=K)
    assert contents(folder) == whole


def test_rows_are_graded_by_their_choices(tmp_path, toy, evaluate, say):
    """`A swim` is A where choice A, here drawn, is "swim": in a new row, and when graded anew."""
    root = small_root(toy, tmp_path / "root", 8)
    draw_choices(root)
    say(lambda i: ["<answer>A swim</answer>"])
    evaluate(tmp_path / "out", data_root=root)
    rows = read(tmp_path / "out")
    records = e.load_records(root / f"annotations/{L1}.jsonl", root)
    swim = [e.choose(record, 42, 0)[0][0] == "swim" for record in records]
    assert {*swim} == {True, False}
    assert [row["predicted"] for row in rows] == ["A" if x else None for x in swim]

    path = tmp_path / "out" / PREDICTIONS
    e.write_rows(path, [row | dict(predicted="D", correct=False) for row in rows], "w")
    evaluate(tmp_path / "out", data_root=root)
    assert read(tmp_path / "out") == rows


# ---- Failures ------------------------------------------------------------------------------------
def test_an_answer_lost(tmp_path, evaluate, fails, monkeypatch):
    """Fewer rows than questions, whatever ended the loop: exit code 2, after all is written."""
    load_batches = e.load_batches

    def lossy(dataset, batches, workers):
        return load_batches(dataset, batches[:-1], workers)

    monkeypatch.setattr(e, "load_batches", lossy)
    told = fails(tmp_path, splits=f"{L1} {L2}", limit=6, batch_size=4)
    assert len(told) == 2
    assert f"{tmp_path}/{PREDICTIONS}: 4 rows of 6 questions" in told[0]
    assert f"predictions_{L2}.jsonl: 4 rows of 6 questions" in told[1]
    assert summary(tmp_path)["total"] == summary(tmp_path, L2)["total"] == 4

    monkeypatch.setattr(e, "load_batches", load_batches)
    evaluate(tmp_path, splits=f"{L1} {L2}", limit=6)
    assert summary(tmp_path)["total"] == summary(tmp_path, L2)["total"] == 6


def test_failed_samples(tmp_path, toy, evaluate, say, monkeypatch):
    """Traps 13 and 18: an unreadable video is a row with its error, and in no denominator.

    It is in the column `failed` and a line on stderr; the others of its batch are answered. A batch
    of failures alone passes too.
    """
    told = []
    monkeypatch.setattr(e.tqdm, "write", lambda text, file: told.append((text, file)))
    root = small_root(toy, tmp_path / "root")
    for name in ("1001", "1004", "1005"):
        (root / f"videos/EpicKitchens/{name}.avi").write_bytes(b"no video")
    say(lambda i: ["<answer>A</answer>"])
    out = evaluate(tmp_path / "out", data_root=root, batch_size=4)

    rows = read(tmp_path / "out")
    assert [row["sample_id"] for row in rows] == [*range(1000, 1006)]
    assert [row["sample_id"] for row in rows if row["error"]] == [1001, 1004, 1005]
    assert "1001.avi" in rows[1]["error"]
    failed = [row for row in rows if row["error"]]
    lines = [f"{L1}: sample_id {row['sample_id']} failed: {row['error']}" for row in failed]
    assert told == [(line, sys.stderr) for line in lines]
    assert rows[1]["response"] is rows[1]["predicted"] is None
    assert not rows[1]["correct"]

    x = summary(tmp_path / "out")
    right = sum(row["gold"] == "A" for row in rows if not row["error"])
    assert (x["correct"], x["total"], x["failed"], x["no_answer"]) == (right, 3, 3, 0)
    assert (x["accuracy"], x["accuracy_failed_wrong"]) == (right / 3, right / 6)
    line = out.splitlines()[2]
    assert line.endswith(" | 3 | 0 |")
    assert (f", accuracy_failed_wrong {100 * right / 6:.1f} (" in line) == (right > 0)

    before = contents(tmp_path / "out")
    evaluate(tmp_path / "out", data_root=root)
    assert contents(tmp_path / "out") == before  # a failed one is answered too


def test_failed_samples_among_several(tmp_path, toy, evaluate, say):
    """With K samples a question, a failed one has no vote and is in no mean."""
    root = small_root(toy, tmp_path / "root", 3)
    evaluate(tmp_path / "golds", data_root=root)
    golds = [row["gold"] for row in read(tmp_path / "golds")]
    (root / "videos/EpicKitchens/1001.avi").write_bytes(b"no video")
    say(lambda i: [[golds[0]] * 3, [golds[2], "?", golds[2]]][i])

    evaluate(tmp_path / "out", data_root=root, num_samples=3)
    x = summary(tmp_path / "out")
    assert (x["correct"], x["total"], x["failed"], x["accuracy_failed_wrong"]) == (2, 2, 1, 2 / 3)
    assert (x["mean_accuracy"], x["pass_at_k"]) == (5 / 6, 1)
    assert [row["response"] is None for row in read(tmp_path / "out")] == [False, True, False]


@pytest.mark.parametrize(
    "flags, words",
    [
        (dict(splits="validation_L9"), "--splits validation_L9: not in "),
        (dict(splits="trainin_6k"), "did you mean training_6k"),
        (dict(output_dir=__file__), f"--output_dir {__file__}: [Errno 17] File exists"),
        (dict(splits="training_with_cot_6k"), "sample_id 0"),
        (dict(data_root="nowhere"), "nowhere/annotations"),
        (dict(model="nowhere/model"), "--model nowhere/model"),
        (dict(ablate="sound"), "--ablate: invalid choice: 'sound'"),
        (dict(temperature=0), "--temperature 0.0"),
        (dict(num_samples=0), "--num_samples 0"),
        (dict(temperature="nan"), "--temperature nan"),
        (dict(compare="nowhere"), "--compare nowhere: no predictions there"),
    ],
)
def test_errors(tmp_path, toy, fails, flags, words):
    """What cannot be evaluated ends with exit code 2 and says why, before anything is written."""
    told = fails(**dict(output_dir=tmp_path / "out") | flags)
    assert any(words in line for line in told), told
    assert not (tmp_path / "out").exists()


# ---- Ranks ---------------------------------------------------------------------------------------
def test_no_rank_waits_for_another(tmp_path, evaluate, monkeypatch):
    """Between two batches a rank asks nothing of the others; the last meeting can take days.

    The default group gives up after minutes, and ranks can end hours apart.
    """
    events = []

    def noted(name, call):
        def wrapper(*args, **options):
            events.append(name)
            return call(*args, **options)

        return wrapper

    for name in ("barrier", "all_gather_object", "broadcast_object_list", "all_reduce"):
        monkeypatch.setattr(dist, name, noted(name, getattr(dist, name)))
    new_group = dist.new_group

    def make_group(timeout, backend):
        assert timeout.days >= 1
        return new_group(timeout=timeout, backend=backend)

    monkeypatch.setattr(dist, "new_group", noted("new_group", make_group))
    monkeypatch.setattr(e, "predict", noted("predict", e.predict))
    evaluate(tmp_path, splits=f"{L1} {L2}", limit=12, batch_size=4)

    first = events.index("predict")
    assert "new_group" in events[:first]  # to make one is a meeting, too
    assert events[first:] == ["predict"] * 6 + ["barrier"]


def test_a_batchs_prompts_are_alike(tmp_path, toy, evaluate, monkeypatch):
    """The longest prompts come first, and each batch has neighbours; the file has its own order."""
    root = small_root(toy, tmp_path / "root", 12)
    path = root / f"annotations/{L1}.jsonl"
    raws = read_rows(path)
    for i, raw in enumerate(raws):
        raw["choice_a"] = "far " * (5 * i % 12) + raw["choice_a"]
        raw["task_progress_metadata"] = raw["task_progress_metadata"] if i % 3 else []
    path.write_text("".join(json.dumps(raw) + "\n" for raw in raws))

    samples = asked(evaluate, monkeypatch, tmp_path / "out", data_root=root, batch_size=4)
    lengths = [len(sample["ids"]) for sample in samples]
    assert lengths == sorted(lengths, reverse=True)
    assert len({*lengths}) == 12
    rows = read(tmp_path / "out")
    assert [row["sample_id"] for row in rows] == [raw["sample_id"] for raw in raws]


def test_two_ranks(tmp_path, toy, model, evaluate):
    """Two ranks leave the same files as one.

    They share an odd number of batches and go on with a half-done file.
    """
    one = tmp_path / "one"
    two = tmp_path / "two"
    few = dict(limit=21, batch_size=4, max_completion_length=6, num_samples=2)
    evaluate(one, **few)
    whole = contents(one)
    two.mkdir()
    shutil.copy(one / f"settings_{L1}.json", two)
    lines = whole[PREDICTIONS].splitlines(keepends=True)
    (two / PREDICTIONS).write_bytes(b"".join(lines[:3]) + lines[3][:40])
    (two / "predictions_validation_L1.rank1").write_bytes(b"".join(lines[7:9]))

    flags = few | dict(
        model=model,
        data_root=toy / "data",
        splits=L1,
        output_dir=two,
        max_frames=8,
        frame_size=56,
        dataloader_num_workers=0,
    )
    words = [f"--{name}={value}" for name, value in flags.items()]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *torchrun, ROOT / "eval_video.py", *words],
        env=os.environ | dict(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "100%" in done.stderr  # the bar knows how many batches there are
    files = contents(two)
    assert {name: text.replace(b"/two", b"/one") for name, text in files.items()} == whole

    # Rank 0 alone speaks.
    assert done.stdout.count("| model |") == 1
    assert len(done.stdout.splitlines()) == 4


# ---- Ablations -----------------------------------------------------------------------------------
def test_ablations(tmp_path, toy, model, evaluate, monkeypatch):
    """Each ablation takes what it says from the prompt and from the pixels, and nothing else."""
    config = e.load_model(model, CPU, torch.float32).config

    def placeholders(sample):
        """How many a sample has for the video and for the image."""
        ids = sample["ids"].tolist()
        return ids.count(config.video_token_id), ids.count(config.image_token_id)

    few = dict(limit=22, max_completion_length=2)
    runs = {}
    for name in ("none", "no_video", "no_image", "text_only", "shuffle_frames"):
        runs[name] = asked(evaluate, monkeypatch, tmp_path / name, ablate=name, **few)

    for i, whole in enumerate(runs["none"]):
        has_video = i < 20
        video = 16 * has_video
        assert whole["grids"] == [(4, 4, 4)] * has_video + [(1, 4, 4)]
        assert placeholders(whole) == (video, 4)

        left = dict(
            no_video=(0, 4),
            no_image=(video, 0),
            text_only=(0, 0),
            shuffle_frames=(video, 4),
        )
        question = whole["text"].split("<|vision_end|>")[-1]
        for name, (videos, images) in left.items():
            s = runs[name][i]
            assert placeholders(s) == (videos, images)
            assert s["sample_id"] == whole["sample_id"]
            assert s["text"].endswith(question)
            assert s["text"].count("<|vision_start|>") == bool(videos) + bool(images)

        patches = whole["patches"]
        assert torch.equal(runs["no_video"][i]["patches"], patches[-16:])
        assert torch.equal(runs["no_image"][i]["patches"], patches[:-16])
        assert torch.equal(runs["text_only"][i]["patches"], patches[:0])

    # The order of the frames is the question's own, whatever its batch.
    shuffled = runs["shuffle_frames"]
    check_shuffled(runs["none"], shuffled)
    flags = dict(few, ablate="shuffle_frames", batch_size=3)
    again = asked(evaluate, monkeypatch, tmp_path / "again", **flags)
    for a, b in zip(again, shuffled):
        assert torch.equal(a["patches"], b["patches"])


def check_shuffled(plain, shuffled):
    """The same slices of two frames, in another order; the image stays."""
    moved = 0
    for whole, s in zip(plain, shuffled):
        before = whole["patches"].view(-1, 16, 1176)
        after = s["patches"].view(-1, 16, 1176)
        assert torch.equal(before[-1], after[-1])
        assert s["ids"].tolist() == whole["ids"].tolist()

        slices = sorted(x.numpy().tobytes() for x in before)
        assert slices == sorted(x.numpy().tobytes() for x in after)
        moved += not torch.equal(before, after)
    assert 15 <= moved <= 20


# ---- Rejection sampling --------------------------------------------------------------------------
@pytest.fixture
def select_chains(toy, monkeypatch, capsys):
    """select_chains(folder, output, **flags) -> what tools/select_chains.py says of L1."""

    def run(folder, output, annotations=toy / f"data/annotations/{L1}.jsonl", **flags):
        words = ["select_chains.py", folder, "--output", output, "--annotations", annotations]
        for name, value in flags.items():
            words += [f"--{name}", value]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        capsys.readouterr()
        chains.main()
        return capsys.readouterr().out

    return run


def test_select_chains(tmp_path, toy, evaluate, say, select_chains):
    """Kept are the right responses that show their thinking, shortest first.

    They are rows that sft_video.py reads.
    """
    evaluate(tmp_path / "golds", limit=3)
    golds = [row["gold"] for row in read(tmp_path / "golds")]

    def answer(i):
        right = f"<answer>{golds[i]}</answer>"
        wrong = f"<answer>{'ABCD'[golds[i] == 'A']}</answer>"
        if i == 2:
            return [right] * 5
        return [
            "<think>it moves up</think>" + right,
            "<think>it</think>" + wrong,
            "<think>it moves</think>" + right,
            right,
            "<think>it moves</think>" + right,
        ]

    say(answer)
    evaluate(tmp_path / "out", limit=3, num_samples=5)
    rows = {}
    for keep in (1, 2, 9):
        file = tmp_path / f"{keep}.jsonl"
        told = select_chains(tmp_path / "out", file, per_question=keep)
        rows[keep] = e.load_records(file, toy / "data", sft_video.parse_chat)
        assert f"holds {len(rows[keep])} chains" in told
    assert [len(rows[keep]) for keep in (1, 2, 9)] == [2, 4, 4]
    assert rows[1] == rows[9][::2]
    expected = []
    for gold in golds[:2]:
        expected.append(f"<think>it moves</think><answer>{gold}</answer>")
        expected.append(f"<think>it moves up</think><answer>{gold}</answer>")
    assert [row["response"] for row in rows[9]] == expected

    content = read_rows(file)[0]["prompt"][0]["content"]
    assert content[:2] == [
        dict(type="video", video="videos/EpicKitchens/1000.avi"),
        dict(type="image", image="images/EpicKitchens/1000.png"),
    ]

    # Each has the prompt that was answered.
    records = e.load_records(toy / f"data/annotations/{L1}.jsonl", toy / "data")
    tokenizer = AutoTokenizer.from_pretrained(toy / "init")
    for row, record in zip(rows[1], records):
        assert e.extract_answer(row["response"]) == record["gold"]
        assert row["media"] == record["media"]
        prompt = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        messages = e.build_messages(record, record["choices"])
        assert prompt == tokenizer.apply_chat_template(messages, tokenize=False)


def test_chains_that_are_refused(tmp_path, toy, evaluate, say, select_chains, capsys):
    """Exit code 2 and one line, and no file is written.

    Right answers alone teach no thinking. Other annotations would put other prompts before them.
    """
    evaluate(tmp_path / "golds", limit=3)
    golds = [row["gold"] for row in read(tmp_path / "golds")]
    say(lambda i: [f"<answer>{golds[i]}</answer>"])
    out = tmp_path / "out"
    evaluate(out, limit=3)
    root = small_root(toy, tmp_path / "root", 3)
    path = root / f"annotations/{L1}.jsonl"
    raws = read_rows(path)
    raws[1]["golden_choice_idx"] = "ABCD"[golds[1] == "A"]
    path.write_text("".join(json.dumps(raw) + "\n" for raw in raws))

    def refused(*args, **flags):
        with pytest.raises(SystemExit) as end:
            select_chains(*args, **flags)
        assert end.value.code == 2
        [line] = capsys.readouterr().err.splitlines()
        return line

    new = tmp_path / "chains.jsonl"
    assert "no right response has a </think>" in refused(out, new)
    assert f"{path}: has no sample_id 1001 with the gold" in refused(out, new, annotations=path)
    assert "--per_question 0: must be" in refused(out, new, per_question=0)
    other = toy / f"data/annotations/{L2}.jsonl"
    assert f"predictions_{L2}.jsonl: no such file" in refused(out, new, annotations=other)
    assert "exists already" in refused(out, path)
    assert not new.exists()


def test_drawn_choices(tmp_path, toy, evaluate, say, select_chains, monkeypatch):
    """A question with negative_answers is asked, judged and saved with the same drawn choices."""
    root = small_root(toy, tmp_path / "root", 4)
    raws = draw_choices(root)

    flags = dict(data_root=root, limit=22, max_completion_length=2)
    samples = asked(evaluate, monkeypatch, tmp_path / "golds", **flags)
    say(lambda i: [f"<think>so</think><answer>{samples[i]['gold']}</answer>"])
    evaluate(tmp_path / "out", data_root=root)
    annotations = root / f"annotations/{L1}.jsonl"
    select_chains(tmp_path / "out", tmp_path / "chains.jsonl", annotations=annotations)
    rows = read_rows(tmp_path / "chains.jsonl")
    assert len(rows) == 4 == summary(tmp_path / "out")["correct"]
    assert len({s["gold"] for s in samples}) > 1
    for s, raw, row in zip(samples, raws, rows):
        gold = s["gold"]
        text = row["prompt"][0]["content"][-1]["text"]
        assert s["choices"]["ABCD".index(gold)] == raw["answer"]
        assert text in s["text"]
        assert f"\n{gold}. {raw['answer']}\n" in s["text"]


# ---- Comparison ----------------------------------------------------------------------------------
def cells_of(out):
    """A printed table: (the row's first cell, the column's name) -> cell."""
    rows = []
    for line in out.splitlines():
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    cells = {}
    for row in rows:
        for column, cell in zip(rows[0], row):
            cells[row[0], column] = cell
    return cells


def test_compare(tmp_path, evaluate):
    """One table: each folder's accuracy, and behind the first the difference with McNemar's p.

    The difference is on the questions that both have. The numbers are worked by hand.
    """
    base = tmp_path / "base"
    other = tmp_path / "run" / "base"
    other.parent.mkdir()
    # 20 questions: 2 lost, 10 gained, 3 right in both, 5 wrong in both; one more failed in each.
    pairs = [(1, 0)] * 2 + [(0, 1)] * 10 + [(1, 1)] * 3 + [(0, 0)] * 5 + [(None, 1), (0, None)]
    for folder, side in ((base, 0), (other, 1)):
        made_up(folder, L1, [(i, "all", pair[side]) for i, pair in enumerate(pairs)])
        made_up(folder, L3, ROWS)
    made_up(other, "LVB", [("v", "15 s", True)])
    before = {**contents(base), **contents(other)}

    out = evaluate(tmp_path / "none", compare=f"{base} {other}", paper="True")
    cells = cells_of(out)
    first = str(base)
    second = str(other)
    # base: 5 of 21 = 23.8 % (.1063, .4509), of 22 22.7; other: 14 of 21 = 66.7 % (.4537, .8281), of
    # 22 63.6. 8 of 20 more: 40 points; p = 2 (1 + 12 + 66) / 4096.
    assert cells[first, "L1"] == "23.8 (11–45), n = 21, accuracy_failed_wrong 22.7 (10–43)"
    more = "accuracy_failed_wrong 63.6 (43–80), +40.0 (p = 0.039)"
    assert cells[second, "L1"] == f"66.7 (45–83), n = 21, {more}"
    assert cells[first, "L3 Work"] == "66.7 (30–90), n = 6"
    assert cells[second, "L3 Work"] == "66.7 (30–90), n = 6, +0.0 (p = 1)"
    assert cells[first, "LVB"] == ""
    assert cells[second, "LVB 15 s"] == "100.0 (21–100), n = 1"
    assert cells[first, "failed"] == "3"
    assert cells[second, "failed"] == "3"
    assert cells["paper: + GRPO", "L3 Work"] == "41.34"
    assert cells["paper: Qwen2-VL-7B", "L3"] == "31.57"
    assert cells["DeepVideo-R1: 7B + SFT", "LVB 15 s"] == "45.0"
    assert {**contents(base), **contents(other)} == before
    assert not (tmp_path / "none").exists()


def test_published_numbers(tmp_path, evaluate):
    """Each row has a number for each of its places; rows and columns of other splits stay away."""
    sizes = [len(values.split()) for values in e.PAPER.values()]
    assert sizes == [7] * 3 + [12] * 3 + [7] * 3
    assert len(e.COLUMNS) == 12

    folder = made_up(tmp_path / "a", "LVB", [("v", "3600 s", True)])
    cells = cells_of(evaluate(tmp_path / "none", compare=folder, paper="True"))
    kinds = ("Qwen2-VL-7B", "7B + SFT", "7B + GRPO")
    rows = ["model", "---", str(folder), *(f"DeepVideo-R1: {kind}" for kind in kinds)]
    assert [*dict.fromkeys(row for row, _ in cells)] == rows
    columns = {"model", "LVB", "LVB 3600 s", "failed", "missing"}
    assert {column for _, column in cells} == columns
    for column, values in (("LVB", "32.9 40.0 43.4"), ("LVB 3600 s", "25.4 36.4 37.2")):
        assert [cells[row, column] for row in rows[3:]] == values.split()


def test_compare_leaves_a_running_evaluation_alone(tmp_path, evaluate):
    """Half a last line belongs to a run that is writing it: it is not counted and not cut off."""
    folder = made_up(tmp_path / "a", L1, [(0, "all", 1), (1, "all", 0)])
    path = folder / PREDICTIONS
    size = path.stat().st_size - 5
    os.truncate(path, size)
    out = evaluate(tmp_path / "none", compare=folder)
    assert "| 100.0 (21–100), n = 1 | 0 |" in out
    assert path.stat().st_size == size


def test_compare_errors(tmp_path, fails):
    """A folder without predictions, or with a broken line: exit code 2, naming it."""
    (tmp_path / "empty").mkdir()
    a = made_up(tmp_path / "a", L1, [(0, "all", 1)])
    told = fails(tmp_path / "none", compare=f"{a} {tmp_path}/empty")
    assert f"--compare {tmp_path}/empty: no predictions there" in told[0]

    (a / PREDICTIONS).write_text("no json\n")
    told = fails(tmp_path / "none", compare=a)
    assert f"{a}/{PREDICTIONS}: " in told[0]


# ---- Records by pass rate ------------------------------------------------------------------------
@pytest.fixture
def select(tmp_path, monkeypatch, capsys):
    """select(*flags) -> what tools/select_records.py prints, run in this process.

    Of the evaluation tmp_path/passes and the annotations tmp_path/training.jsonl.
    """
    home = tmp_path
    common = f"{home}/passes --annotations {home}/training.jsonl --output {home}/kept.jsonl"

    def run(*flags):
        words = ["select_records.py", *common.split(), *map(str, flags)]
        monkeypatch.setattr(sys, "argv", words)
        capsys.readouterr()
        select_records.main()
        return capsys.readouterr().out

    return run


def passes(folder, rates, samples=10):
    """An evaluation of training.jsonl whose questions were right so many times; None failed."""
    folder.mkdir(exist_ok=True)
    rows = []
    for name, right in rates.items():
        row = dict(sample_id=name, gold="B", error=None)
        if right is None:
            row["error"] = "unreadable"
        else:
            row["answers"] = ["B"] * right + [None, "A"] * samples
            row["answers"] = row["answers"][:samples]
        rows.append(json.dumps(row) + "\n")
    (folder / "predictions_training.jsonl").write_text("".join(rows))


def test_records_by_pass_rate(tmp_path, select):
    """Bounds are included; rows keep order and bytes, whatever their spaces and ends of line."""
    lines = [b'{"sample_id": 7,   "x": "\xc3\xa9 \\u00e9"}', b'{"sample_id":"7"}\r', b"", b" "]
    lines += [b'{"sample_id": %d}' % i for i in range(6)]
    path = tmp_path / "training.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))  # no end behind the last line
    passes(tmp_path / "passes", {5: 9, 0: 0, 1: 10, 2: 1, 3: None, 7: 3, "7": 9})
    out = select("--pass_rate", 0.1, 0.9)
    assert out.splitlines() == [
        "pass rates below 0.1: 1, within: 4, above 0.9: 1; failed: 1, not asked: 1",
        f"{tmp_path}/kept.jsonl holds the 4 records within",
    ]
    kept = (tmp_path / "kept.jsonl").read_bytes()
    assert kept == b"".join(lines[i] + b"\n" for i in (0, 1, 6, 9))

    (tmp_path / "kept.jsonl").unlink()
    assert "below 0.3: 2, within: 1, above 0.3: 3;" in select("--pass_rate", 0.3, 0.3)
    assert (tmp_path / "kept.jsonl").read_bytes() == lines[0] + b"\n"


def test_selected_records_train(tmp_path, toy, evaluate, say, select):
    """From an evaluation's own files; with the default bounds a half right record is kept."""
    evaluate(tmp_path / "golds", limit=4)
    golds = [row["gold"] for row in read(tmp_path / "golds")]
    say(lambda i: [golds[i] if i == 0 or i == 2 and k < 2 else "?" for k in range(4)])
    evaluate(tmp_path / "passes", limit=4, num_samples=4)
    annotations = toy / f"data/annotations/{L1}.jsonl"
    out = select("--annotations", annotations)
    assert out.startswith("pass rates below 0.1: 2, within: 1, above 0.9: 1; failed: 0, not asked:")

    whole = e.load_records(annotations, toy / "data")
    assert e.load_records(tmp_path / "kept.jsonl", toy / "data") == [whole[2]]


@pytest.mark.parametrize(
    "rates, flags, problem",
    [
        ({1: 5}, "--pass_rate 0.9 0.1", "--pass_rate 0.9 0.1: must be two shares"),
        ({1: 5}, "--pass_rate 0 1.5", "--pass_rate 0.0 1.5: must be two shares"),
        ({1: 5}, "--pass_rate nan 1", "--pass_rate nan 1.0: must be two shares"),
        ({1: 5}, "--output {0}/training.jsonl", "training.jsonl: exists already"),
        ({1: 5}, "--output {0}/none/kept.jsonl", "none/kept.jsonl: No such file or directory"),
        ({1: 5}, "--annotations {0}/none.jsonl", "none.jsonl: no such file"),
        ({1: 5}, "--annotations {0}/bad.jsonl", "bad.jsonl:2: sample_id 1 a second time"),
        ({1: 5}, "--annotations {0}/worse.jsonl", "worse.jsonl:1: list indices"),
        ({1: 5}, "--annotations {0}/other.jsonl", "predictions_other.jsonl: no such file"),
        ({1: 5, 9: 5, 8: None}, "", "training.jsonl: lacks 2 sample_ids of"),
        ({1: 0, 2: 10, 3: 10}, "", "leaves no record: below 0.1: 1, within: 0, above 0.9: 2"),
    ],
)
def test_selections_that_are_refused(tmp_path, select, capsys, rates, flags, problem):
    """One line, exit code 2, and no file is written."""
    (tmp_path / "training.jsonl").write_text("".join(f'{{"sample_id": {i}}}\n' for i in range(4)))
    (tmp_path / "bad.jsonl").write_text('{"sample_id": 1}\n' * 2)
    (tmp_path / "worse.jsonl").write_text("[1]\n")
    (tmp_path / "other.jsonl").write_text('{"sample_id": 1}\n')
    passes(tmp_path / "passes", rates)
    check_refused(select, flags.format(tmp_path).split(), problem, capsys)
    assert not list(tmp_path.rglob("kept.jsonl"))
    assert (tmp_path / "training.jsonl").stat().st_size == 4 * 17


def check_refused(select, flags, problem, capsys):
    with pytest.raises(SystemExit) as end:
        select(*flags)
    assert end.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("select_records.py: error: ")
    assert problem in line


def test_one_sample_has_no_pass_rate(tmp_path, select, capsys):
    """Predictions without `answers` are of one response a question."""
    (tmp_path / "training.jsonl").write_text('{"sample_id": 0}\n')
    folder = tmp_path / "passes"
    made_up(folder, "training", [(0, "all", True)])
    problem = "predictions_training.jsonl: holds no `answers`; must come from eval_video.py with"
    check_refused(select, [], problem, capsys)
