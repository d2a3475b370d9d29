"""SFT against transformers' own loss with labels -100, however the batch is cut; held-out loss."""

import json

import pytest
import torch
from safetensors.torch import load_file

import sft_video as s
from test_smoke import (
    CPU,
    make_sample,
    random_completions,
    transformers_gradients,
    transformers_inputs,
)

LENGTHS = (3, 6, 1)  # supervised tokens of three rows
SHORT_RUN = """
--max_frames 8 --frame_size 56 --dataloader_num_workers 0 --max_steps 2
--per_device_train_batch_size 4 --gradient_accumulation_steps 1
"""
MOVES = dict(A="move left", B="move right", C="move up", D="move down")


# ---- The loss ------------------------------------------------------------------------------------
@pytest.fixture
def rows(tiny_model):
    """-> (folder, transformers' model, samples, responses [3, 1, 6], mask [3, 1, 6])."""
    folder, hf, ours = tiny_model()
    kinds = (
        (5, ("video", (2, 4, 6)), 2, ("image", (1, 4, 4)), 3),
        (9, ("image", (1, 6, 4)), 1),
        (4, ("video", (2, 4, 4)), 2),
    )
    samples = [make_sample(ours.config, *parts, seed=i) for i, parts in enumerate(kinds)]
    mask = torch.arange(6) < torch.tensor(LENGTHS)[:, None, None]
    return folder, hf, samples, random_completions(3, 1, 6), mask


def transformers_loss(hf, samples, responses):
    """-> (loss, gradients) of cross-entropy, labels -100 on all but the supervised tokens."""
    inputs = transformers_inputs(hf.config, samples, responses)
    labels = torch.full_like(inputs["input_ids"], -100)
    for i, (sample, length) in enumerate(zip(samples, LENGTHS)):
        begin = len(sample["ids"])
        labels[i, begin : begin + length] = responses[i, 0, :length]

    loss = hf(**inputs, labels=labels).loss
    loss.backward()
    return float(loss.detach()), transformers_gradients(hf)


def test_loss_and_gradients_are_transformers(rows):
    """The loss has another denominator, shift or mask than cross-entropy with labels -100.

    It must not depend on how the three rows are cut into micro-batches either (trap 15).
    """
    folder, hf, samples, responses, mask = rows
    expected, theirs = transformers_loss(hf, samples, responses)

    for cut in ([[0, 1, 2]], [[0], [1], [2]], [[2, 0], [1]]):
        model = s.load_model(folder, CPU, torch.float32)
        loss = 0.0
        for part in cut:
            prompts = s.Prompts.collate([samples[i] for i in part], CPU, torch.float32)
            value, greedy = s.cross_entropy(
                model, prompts, responses[part], mask[part], sum(LENGTHS)
            )
            value.backward()
            loss += float(value.detach())
            assert 0 <= int(greedy) <= int(mask[part].sum())

        assert loss == pytest.approx(expected, abs=1e-5)
        for name, p in model.named_parameters():
            apart = (p.grad - theirs[name]).norm()
            assert apart <= 1e-4 * theirs[name].norm() + 1e-7, (cut, name)


# ---- Runs of the script --------------------------------------------------------------------------
def sft(toy, out, monkeypatch, *flags):
    """Runs sft_video.py's main in this process on the untrained toy -> metrics.jsonl's rows."""
    folders = ["--model", toy / "init", "--data_root", toy / "data", "--output_dir", out]
    command = ["sft_video.py", *folders, *SHORT_RUN.split(), *flags]
    monkeypatch.setattr("sys.argv", [str(part) for part in command])
    try:
        s.main()
    finally:
        if torch.distributed.is_initialized():  # main leaves it to a failing process's end
            torch.distributed.destroy_process_group()
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def first_rows(toy, folder, count):
    """-> a file with the first rows of the toy's annotations with thinking."""
    annotations = toy / "data/annotations/training_with_cot_6k.jsonl"
    lines = annotations.read_text().splitlines(keepends=True)
    path = folder / f"{count}.jsonl"
    path.write_text("".join(lines[:count]))
    return path


def test_held_out_loss(toy, tmp_path, monkeypatch):
    """eval_loss is of other rows than the file's last, or of the model before the step.

    Nor may it change the training.
    """
    fewer = first_rows(toy, tmp_path, 20)
    more = first_rows(toy, tmp_path, 26)
    held_out = ["--eval_every", "2", "--eval_rows", "6"]
    plain = sft(toy, tmp_path / "plain", monkeypatch, "--annotations", fewer)
    rows = sft(toy, tmp_path / "run", monkeypatch, "--annotations", more, *held_out)
    assert "eval_loss" not in rows[0]
    assert [row["loss"] for row in rows] == [row["loss"] for row in plain]

    model = s.load_model(tmp_path / "run", CPU, torch.float32)
    tokenizer = s.AutoTokenizer.from_pretrained(toy / "init")
    records = s.load_records(more, toy / "data", s.parse_chat)[20:]
    settings = s.Config(max_frames=8, frame_size=56)
    dataset = s.VideoDataset(records, tokenizer, model.config, settings, shuffle=False)
    samples = [dataset.begin(i)() for i in range(6)]
    with torch.no_grad():
        batch = s.supervise(samples, tokenizer, CPU, torch.float32)
        expected, _ = s.cross_entropy(model, *batch, int(batch[2].sum()))
    assert rows[1]["eval_loss"] == pytest.approx(float(expected), abs=1e-5)


def test_unreadable_held_out_row(toy, tmp_path, monkeypatch, capsys):
    """A held-out row that cannot be read is left out of eval_loss in silence."""

    def refuse(*args):
        raise OSError("unreadable")

    monkeypatch.setattr(s, "read_media", refuse)
    with pytest.raises(SystemExit) as end:
        sft(toy, tmp_path / "run", monkeypatch, "--eval_every", "1", "--eval_rows", "2")
    assert end.value.code == 2
    assert capsys.readouterr().err.count("--eval_rows: sample_id") == 2
    assert not (tmp_path / "run").exists()


def test_answer_only(toy, tmp_path, monkeypatch):
    """Plain annotation rows are supervised on anything but `<answer>X. text</answer>`.

    Or the vision tower moves though it is frozen.
    """
    seen = []
    supervise = s.supervise

    def spy(samples, tokenizer, *args, **kwargs):
        batch = supervise(samples, tokenizer, *args, **kwargs)
        for sample, row, keep in zip(samples, batch[1][:, 0], batch[2][:, 0]):
            seen.append((sample["gold"], tokenizer.decode(row[keep])))
        return batch

    monkeypatch.setattr(s, "supervise", spy)
    out = tmp_path / "run"
    out.mkdir()
    (out / "notes.jsonl").write_text("mine\n")
    sft(toy, out, monkeypatch, "--answer_only", "--freeze_vision")

    assert len(seen) == 8
    for gold, text in seen:
        assert text == f"<answer>{gold}. {MOVES[gold]}</answer><|im_end|>"
    # A run removes its own logs alone.
    assert (out / "notes.jsonl").read_text() == "mine\n"

    before = load_file(toy / "init/model.safetensors")
    after = load_file(out / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert not any(name.startswith("visual.") for name in moved)
