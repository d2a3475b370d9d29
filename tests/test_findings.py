"""toy/findings.py: what it reads from an evaluation, its files, table and picture.

tests/test_toy.py runs it whole.
"""

import json
import xml.etree.ElementTree as ET

import pytest

from toy import findings


@pytest.mark.parametrize(
    "response, word",
    [
        ("<think>it moves up</think><answer>C. move up</answer>", "up"),
        ("<think>it moves down, not up</think><answer>C", "down"),
        ("<think>it moves</think><answer>C. move up</answer>", None),
        ("<think>upwards</think>", None),
        ("", None),
    ],
)
def test_the_thought(response, word):
    """The direction is taken from the answer, or from inside another word."""
    assert findings.thought(response) == word


def test_the_words_letter():
    """A response without a thought and without a letter counts as consistent."""
    letters = ["A", "B", "C", "D", None]
    matching = [findings.word_matches_letter("up", letter) for letter in letters]
    assert matching == [False, False, True, False, False]
    assert not findings.word_matches_letter(None, None)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def evaluated(folder, responses):
    """An evaluation of (response, predicted, gold) on each tier; their reliance grows."""
    folder.mkdir()
    rows = []
    for response, predicted, gold in responses:
        correct = predicted == gold
        rows.append(dict(response=response, predicted=predicted, gold=gold, correct=correct))
    for tier in findings.TIERS:
        write_rows(folder / f"predictions_validation_{tier}.jsonl", rows)

    looked = []
    for i, (response, _, _) in enumerate(responses):
        tokens = response.replace("<", " <").split(" ")
        reliance = dict(tokens=[f" {token}" for token in tokens], nats=[*range(i, len(tokens) + i)])
        attention = dict(overall=[0.1, 0.2, 0.6][i])
        reliance["letter"] = [0.5, None, 1.5][i]
        looked.append(dict(attention=attention, visual_reliance=reliance))
    write_rows(folder / "analysis_validation_L1.jsonl", looked)


def test_measures(tmp_path):
    """A share is of the wrong responses, or a reliance is another token's. Worked by hand."""
    evaluated(
        tmp_path / "eval",
        [
            ("<think>it moves up</think><answer>C. move up</answer>", "C", "C"),
            ("<think>it moves</think><answer>up</answer>", None, "C"),
            ("<think>it moves left</think><answer>C. move up</answer>", "C", "A"),
        ],
    )
    found = findings.read_measures(tmp_path / "eval")
    assert found["accuracy L2"] == pytest.approx(1 / 3)
    assert found["word_matches_letter L3"] == pytest.approx(1 / 3)
    assert found["chain right L1"] == pytest.approx(2 / 3)
    assert found["visual attention L1"] == pytest.approx(0.3)
    # " " and "<think>it" and "moves", then the word: at 3, and at 3 + 2; the second names none.
    assert found["visual reliance L1: word"] == 4
    assert found["letter"] == 1
    assert {*findings.HEADS} <= {*found}


def test_annotations(toy, tmp_path, monkeypatch):
    """Other records than the first, or another share of wrong letters; SFT's differ from GRPO's."""
    (tmp_path / "toy").symlink_to(toy)
    monkeypatch.setattr(findings, "ROOT", tmp_path)
    findings.write_annotations(tmp_path)

    true = findings.read_rows(toy / "data/annotations/training_6k.jsonl")
    chats = findings.read_rows(toy / "data/annotations/training_with_cot_6k.jsonl")
    assert findings.read_rows(tmp_path / "grpo-few.jsonl") == true[:24]
    assert findings.read_rows(tmp_path / "sft-few.jsonl") == chats[:24]
    for share in findings.NOISE:
        noisy = findings.read_rows(tmp_path / f"grpo-noise-{share}.jsonl")
        taught = findings.read_rows(tmp_path / f"sft-noise-{share}.jsonl")
        wrong = 0
        for record, said, chat in zip(true, noisy, taught, strict=True):
            letter = said["golden_choice_idx"]
            word = findings.DIRECTIONS[letter]
            assert said == record | dict(golden_choice_idx=letter)
            assert (
                f"<think>it moves {word}</think><answer>{letter}. move {word}<" in chat["response"]
            )
            wrong += letter != record["golden_choice_idx"]
        assert wrong == share * len(true) / 100

    # Every command of the table finds its file.
    for name, (_, command) in findings.MODELS.items():
        if "{folder}" in command:
            assert (tmp_path / f"{name}.jsonl").is_file()
            assert f"{{folder}}/{name}.jsonl" in command


def made_up(**changes):
    values = dict.fromkeys(findings.HEADS, 0.5)
    return values | changes


def test_table_and_picture():
    """A cell has another column's number, another mean, or a range of one seed."""
    found = {
        "base": [made_up()],
        "sft": [made_up(**{"accuracy L1": 0.9, "letter": 0.04})],
        "grpo": [made_up(**{"accuracy L1": 0.9}), made_up(**{"accuracy L1": 1.0, "letter": 2.5})],
        "care": [made_up()],
    }
    lines = findings.table(found)
    assert lines[0].startswith("| model | accuracy L1 | accuracy L2 | accuracy L3 |")
    assert {line.count("|") for line in lines} == {len(findings.HEADS) + 2}
    assert lines[3] == "| + SFT | 90 | 50 | 50 | 50 | 50 | 50 | 50 | 50 | 0.5 | 0.0 |"
    assert lines[4].startswith("| + GRPO | 95 (90–100) | 50 (50–50) |")
    assert lines[4].endswith("| 1.5 (0.5–2.5) |")

    svg = ET.fromstring(findings.picture(found))
    circles = svg.findall("{*}circle")
    places = [(circle.get("cx"), circle.get("cy")) for circle in circles]
    assert places == [("320", "190"), ("320", "70"), ("320", "55"), ("320", "190")]
    arrows = [path for path in svg.findall("{*}path") if path.get("marker-end")]
    assert len(arrows) == 3


def test_a_table_is_replaced():
    """Text around the table is lost, or a page without it is written all the same."""
    old = ["| model | a |", "|---|---|", "| x | 1 |", "| y | 2 |"]
    new = ["| model | a |", "|---|---|", "| z | 3 |"]
    page = "Before.\n\n" + "\n".join(old) + "\n\nAfter.\n\n| other | b |\n|---|---|\n"
    assert findings.with_table(page, new) == page.replace("\n".join(old), "\n".join(new))
    with pytest.raises(SystemExit, match="0 tables"):
        findings.with_table("Nothing.\n", new)
