"""SFT against transformers' own loss with labels -100, however the batch is cut, and the held-out loss."""
import json

import pytest
import torch
from safetensors.torch import load_file

import sft_video as s
from test_smoke import CPU, make_sample, random_completions, transformers_gradients, transformers_inputs

LENGTHS = (3, 6, 1)  # supervised tokens of three rows


@pytest.fixture
def rows(tiny_model):
    """-> (folder, transformers' model, samples, responses [3, 1, 6], mask [3, 1, 6])."""
    folder, hf, ours = tiny_model()
    kinds = ((5, ("video", (2, 4, 6)), 2, ("image", (1, 4, 4)), 3), (9, ("image", (1, 6, 4)), 1), (4, ("video", (2, 4, 4)), 2))
    samples = [make_sample(ours.config, *parts, seed=i) for i, parts in enumerate(kinds)]
    mask = torch.arange(6) < torch.tensor(LENGTHS)[:, None, None]
    return folder, hf, samples, random_completions(3, 1, 6), mask


def test_loss_and_gradients_are_transformers(rows):
    """The loss has another denominator, another shift or another mask than cross-entropy with labels -100; it must not depend
    on how the three rows are cut into micro-batches either (trap 15)."""
    folder, hf, samples, responses, mask = rows
    inputs = transformers_inputs(hf.config, samples, responses)
    labels = torch.full_like(inputs["input_ids"], -100)
    for i, (sample, length) in enumerate(zip(samples, LENGTHS)):
        labels[i, len(sample["ids"]):len(sample["ids"]) + length] = responses[i, 0, :length]
    expected = hf(**inputs, labels=labels).loss
    expected.backward()
    expected = float(expected.detach())
    theirs = transformers_gradients(hf)
    for cut in ([[0, 1, 2]], [[0], [1], [2]], [[2, 0], [1]]):
        model, loss = s.load_model(folder, CPU, torch.float32), 0.0
        for part in cut:
            prompts = s.Prompts.collate([samples[i] for i in part], CPU, torch.float32)
            value, greedy = s.cross_entropy(model, prompts, responses[part], mask[part], sum(LENGTHS))
            value.backward()
            loss += float(value.detach())
            assert 0 <= int(greedy) <= int(mask[part].sum())
        assert loss == pytest.approx(expected, abs=1e-5)
        for name, p in model.named_parameters():
            assert (p.grad - theirs[name]).norm() <= 1e-4 * theirs[name].norm() + 1e-7, (cut, name)


def sft(toy, out, monkeypatch, *flags):
    """Runs sft_video.py's main in this process on the untrained toy."""
    monkeypatch.setattr("sys.argv", ["sft_video.py", "--model", str(toy / "init"), "--data_root", str(toy / "data"), "--output_dir",
                                     str(out), "--max_frames", "8", "--frame_size", "56", "--dataloader_num_workers", "0",
                                     "--max_steps", "2", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps",
                                     "1", *flags])
    try:
        s.main()
    finally:
        if torch.distributed.is_initialized():  # main leaves it to a failing process's end
            torch.distributed.destroy_process_group()
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_held_out_loss(toy, tmp_path, monkeypatch):
    """eval_loss is of other rows than the file's last ones, or of the model before the step, or changes the training."""
    plain = sft(toy, tmp_path / "plain", monkeypatch, "--annotations", str(first_rows(toy, tmp_path, 20)))
    rows = sft(toy, tmp_path / "run", monkeypatch, "--annotations", str(first_rows(toy, tmp_path, 26)), "--eval_every", "2",
               "--eval_rows", "6")
    assert "eval_loss" not in rows[0] and [row["loss"] for row in rows] == [row["loss"] for row in plain]
    model = s.load_model(tmp_path / "run", CPU, torch.float32)
    tokenizer = s.AutoTokenizer.from_pretrained(toy / "init")
    records = s.load_records(first_rows(toy, tmp_path, 26), toy / "data", s.parse_chat)[20:]
    dataset = s.VideoDataset(records, tokenizer, model.config, s.Config(max_frames=8, frame_size=56), shuffle=False)
    with torch.no_grad():
        batch = s.supervise([dataset[i] for i in range(6)], tokenizer, model.config, CPU, torch.float32)
        expected = s.cross_entropy(model, *batch, int(batch[2].sum()))[0]
    assert rows[1]["eval_loss"] == pytest.approx(float(expected), abs=1e-5)


def first_rows(toy, folder, count):
    lines = (toy / "data/annotations/training_with_cot_6k.jsonl").read_text().splitlines(keepends=True)
    (folder / f"{count}.jsonl").write_text("".join(lines[:count]))
    return folder / f"{count}.jsonl"


def test_unreadable_held_out_row(toy, tmp_path, monkeypatch, capsys):
    """A held-out row that cannot be read is left out of eval_loss in silence."""
    (tmp_path / "broken.avi").write_bytes(b"no video")
    monkeypatch.setattr(s, "read_media", lambda *args: (_ for _ in ()).throw(OSError("unreadable")))
    with pytest.raises(SystemExit) as end:
        sft(toy, tmp_path / "run", monkeypatch, "--eval_every", "1", "--eval_rows", "2")
    assert end.value.code == 2 and capsys.readouterr().err.count("--eval_rows: sample_id") == 2
    assert not (tmp_path / "run").exists()


def test_answer_only(toy, tmp_path, monkeypatch):
    """Plain annotation rows are supervised on anything but `<answer>X. text</answer>`, or the vision tower moves when frozen."""
    seen, supervise = [], s.supervise

    def spy(samples, tokenizer, *args, **kwargs):
        batch = supervise(samples, tokenizer, *args, **kwargs)
        seen.extend((sample["gold"], tokenizer.decode(row[keep])) for sample, row, keep in zip(samples, batch[1][:, 0], batch[2][:, 0]))
        return batch

    monkeypatch.setattr(s, "supervise", spy)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.jsonl").write_text("mine\n")
    sft(toy, tmp_path / "run", monkeypatch, "--answer_only", "--freeze_vision")
    moves = dict(A="move left", B="move right", C="move up", D="move down")
    assert len(seen) == 8 and all(text == f"<answer>{gold}. {moves[gold]}</answer><|im_end|>" for gold, text in seen)
    before, after = load_file(toy / "init/model.safetensors"), load_file(tmp_path / "run/model.safetensors")
    assert (tmp_path / "run/notes.jsonl").read_text() == "mine\n"  # a run removes its own logs alone
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any(name.startswith("visual.") for name in moved)
