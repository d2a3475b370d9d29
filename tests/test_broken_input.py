"""Wrong flags, annotations and checkpoints, unreadable media: what users are told, what goes on."""

import ast
import hashlib
import inspect
import io
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import tokenize
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

import eval_video
import grpo_video as g
import sft_video
from test_smoke import CPU, ROOT
from tools import analyze, validate
from toy import make_toy

FRAMES = np.random.default_rng(0).integers(0, 256, (8, 56, 56, 3), dtype=np.uint8)
ENV = os.environ | dict(OMP_NUM_THREADS="1")


@pytest.fixture
def lines(capsys):
    """lines(call, *args) -> what a call that must end with exit code 2 says, a line per problem."""

    def told(call, *args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            call(*args)

        out, err = capsys.readouterr()
        prefix = f"{Path(sys.argv[0]).name}: error: "
        assert end.value.code == 2, err
        assert out == "", err
        assert all(line.startswith(prefix) for line in err.splitlines()), err
        return [line.removeprefix(prefix) for line in err.splitlines()]

    return told


@pytest.fixture
def root(tmp_path):
    """A data root with one video, one image, and things that are neither."""
    root = tmp_path / "root"
    for folder in ("videos/Ego4D/folder.avi", "images/Ego4D", "annotations"):
        (root / folder).mkdir(parents=True)
    make_toy.write_avi(root / "videos/Ego4D/1.avi", FRAMES)
    make_toy.write_avi(tmp_path / "outside.avi", FRAMES)
    (root / "videos/Ego4D/link.avi").symlink_to(tmp_path / "outside.avi")
    (root / "videos/Ego4D/loop.avi").symlink_to(root / "videos/Ego4D/loop.avi")
    (root / "images/linked").symlink_to(root / "images/Ego4D")
    os.mkfifo(root / "videos/Ego4D/fifo.avi")
    Image.fromarray(FRAMES[0]).save(root / "images/Ego4D/1.png")
    return root


PLAIN = dict(
    sample_id=1,
    video_source="Ego4D",
    question="What next?",
    answer="cut",
    choice_a="cut",
    choice_b="peel",
    choice_c="wash",
    choice_d="dry",
    golden_choice_idx="A",
    task_progress_metadata=[dict(narration_text="peel", start_frame=0, stop_frame=7)],
    video_basename="1.avi",
    current_observation_basename="1.png",
)
DRAWN = {key: value for key, value in PLAIN.items() if key != "golden_choice_idx"}
DRAWN["negative_answers"] = ["peel", "wash", "dry", "stir"]
CONTENT = [
    dict(type="video", video="videos/Ego4D/1.avi"),
    dict(type="image", image="images/Ego4D/1.png"),
    dict(type="text", text="Next?"),
]
CHAT = dict(
    sample_id=1,
    response="<think>so</think><answer>A. cut</answer>",
    prompt=[dict(role="user", content=CONTENT)],
)


def write_rows(path, *rows):
    """Writes objects as JSON, and bytes as they are, a line each."""
    coded = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(coded) + b"\n")
    return path


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- Flags ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--learning_rat 1", ["no such flag: --learning_rat 1; did you mean --learning_rate?"]),
        ("--saves_steps=5", ["--saves_steps=5; did you mean --save_steps"]),
        # No abbreviations: a new flag would change what they mean.
        ("--temp 0.5", ["no such flag: --temp 0.5; did you mean --help?"]),
        ("stray", ["stray; did you mean --help?"]),
        ("--max_steps 0", ["--max_steps 0: must be a number at least 1"]),
        ("--max_steps=-2", ["--max_steps -2: must be a number at least 1"]),
        ("--num_generations 1", ["--num_generations 1: must be a number at least 2"]),
        ("--temperature 0", ["--temperature 0.0: must be a number above 0"]),
        ("--max_frames 1", ["--max_frames 1: must be a number at least 2"]),
        ("--learning_rate=-1e-6", ["--learning_rate -1e-06: must be a number above 0"]),
        ("--learning_rate inf", ["--learning_rate inf: must be a number above 0"]),
        ("--beta nan", ["--beta nan: must be a number at least 0"]),
        ("--warmup_ratio 2", ["--warmup_ratio 2.0: must be a number at most 1"]),
        ("--epsilon_high 0", ["--epsilon_high 0.0: must be a number above 0"]),
        ("--loss_type ppo", ["--loss_type.* invalid choice: 'ppo' .choose from .*dr_grpo"]),
        ("--num_generations many", ["--num_generations.* invalid int value: 'many'"]),
        ("--num_generations 2.5", ["--num_generations.* invalid int value: '2.5'"]),
        ("--seed", ["--seed.* expected one argument"]),
        ("--scale_rewards maybe", ["--scale_rewards"]),
        ("--toy --fps 0", ["--fps 0.0: must be a number above 0"]),
        (
            "--num_generations 0 --temperature -1 --max_frames 0 --fps nan",
            ["--num_generations 0", "--temperature -1.0", "--max_frames 0", "--fps nan"],
        ),
    ],
)
def test_wrong_flags(lines, flags, expected):
    """An unknown flag or an impossible value: one line per problem, with the flag and the rule."""
    told = lines(g.parse_config, g.Config, g.TOY, flags.split())
    assert len(told) == len(expected)
    for word in expected:
        assert any(re.search(word, line) for line in told), told


@pytest.fixture
def read_once(monkeypatch):
    """parse_config reads a script's source for its comments: once is enough for a whole test."""
    monkeypatch.setattr(inspect, "getsource", cache(inspect.getsource))


# The three scripts, and a tool that adds two settings to one of them.
WITH_SETTINGS = dict(grpo=g, sft=sft_video, eval=eval_video, analyze=analyze)


@pytest.mark.parametrize("script", WITH_SETTINGS.values(), ids=WITH_SETTINGS)
def test_every_number_has_limits(lines, read_once, script):
    """No number may be NaN, infinite or far below zero: it would pass silently into a long run."""
    for field in fields(script.Config):
        if field.type is int:
            values = ["-99"]
        elif "float" in str(field.type):
            values = ["-99", "nan", "inf"]
        else:
            values = []

        for value in values:
            flags = [f"--{field.name}={value}"]
            told = lines(g.parse_config, script.Config, {}, flags)
            assert f"--{field.name} " in told[0]


def comments(script):
    """{field of the script's Config: the comment behind it}, those of the Configs it stands on too.

    It is read by Python's own tokenizer and parser.
    """
    found = {}
    for config in script.Config.__mro__[:-1]:
        source = inspect.getsource(config)
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        behind = {t.start[0]: t.string for t in tokens if t.type == tokenize.COMMENT}
        for node in ast.parse(source).body[0].body:
            if isinstance(node, ast.AnnAssign):
                found[node.target.id] = behind[node.lineno].removeprefix("# ")
    return found


@pytest.mark.parametrize("script", WITH_SETTINGS.values(), ids=WITH_SETTINGS)
def test_help(script, monkeypatch, capsys):
    """--help tells what a script does, and each field of its Config as a flag with its comment.

    Nothing else happens, and the exit code is 0.
    """
    monkeypatch.setattr(sys, "argv", [script.__file__, "--help"])
    monkeypatch.setattr(os, "environ", os.environ | dict(COLUMNS="200"))
    with pytest.raises(SystemExit) as end:
        script.main()
    out, err = capsys.readouterr()
    assert end.value.code == 0
    assert err == ""
    assert script is analyze or script.__doc__.splitlines()[0] in out

    told = " ".join(out.split())
    said = comments(script)
    assert set(said) == {field.name for field in fields(script.Config)}
    for name, comment in said.items():
        assert len(comment) > 10, name
        assert re.search(rf" --{name} .*? {re.escape(comment)}", told), (name, comment)


LIMIT = re.compile(r"(above|at least|at most) (-?\d+)")


@pytest.mark.parametrize("script", WITH_SETTINGS.values(), ids=WITH_SETTINGS)
def test_the_limits_in_the_comments_hold(lines, read_once, script):
    """The limit that a field's comment names passes or fails as it says; what is beyond fails.

    The message has the comment's words.
    """
    count = 0
    for field in fields(script.Config):
        step = 1 if field.type is int else 0.25
        for word, limit in LIMIT.findall(comments(script)[field.name]):
            count += 1
            edge = int(limit)
            beyond = edge + step if word == "at most" else edge - step
            wrong = [beyond] if word != "above" else [edge, beyond]
            right = edge + step if word == "above" else edge
            for value in wrong:
                [told] = lines(g.parse_config, script.Config, {}, [f"--{field.name}={value}"])
                assert told.endswith(f": must be a number {word} {limit}")
            config = g.parse_config(script.Config, {}, [f"--{field.name}={right}"])
            assert getattr(config, field.name) == right
    assert count > 10


def test_good_flags_pass():
    """The defaults are within their own limits, the toy's too.

    Flags win over the toy's, and bools can be switched off.
    """
    flags = "--toy --max_frames 4 --gradient_checkpointing true".split()
    values = dict(toy=True, max_frames=4, gradient_checkpointing=True)
    for script in (g, sft_video):
        assert script.parse_config(script.Config, script.TOY, []) == script.Config()
        toy = script.parse_config(script.Config, script.TOY, flags)
        assert toy == script.Config(**script.TOY | values)

    assert g.parse_config(eval_video.Config, eval_video.TOY, []) == eval_video.Config()
    toy = g.parse_config(eval_video.Config, eval_video.TOY, "--toy --max_frames 4".split())
    assert toy == eval_video.Config(**eval_video.TOY | dict(toy=True, max_frames=4))

    flags = "--epsilon_high 0.28 --scale_rewards false --max_steps -1".split()
    expected = g.Config(epsilon_high=0.28, scale_rewards=False)
    assert g.parse_config(g.Config, g.TOY, flags) == expected


@pytest.mark.parametrize(
    "script", ["grpo_video.py", pytest.param("sft_video.py", marks=pytest.mark.slow)]
)
def test_a_wrong_flag_as_the_shell_sees_it(tmp_path, script):
    """Exit code 2, the script's name and the problems on stderr, no traceback, no output folder."""
    out = tmp_path / "run"
    flags = ["--learning_rate", "0", "--output_dir", out, "--max_frames", "1"]
    command = [sys.executable, ROOT / script, *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV)

    told = [line for line in done.stderr.splitlines() if "requires torchvision" not in line]
    assert done.returncode == 2
    assert done.stdout == ""
    assert not out.exists()
    assert told == [
        f"{script}: error: --max_frames 1: must be a number at least 2",
        f"{script}: error: --learning_rate 0.0: must be a number above 0",
    ]


# ---- Annotations ---------------------------------------------------------------------------------
def test_missing_annotations(lines, tmp_path):
    """No annotation file: its path, the hub's data set, and the way without any download."""
    told = "\n".join(lines(g.load_records, tmp_path / "training_6k.jsonl", tmp_path))
    for word in (str(tmp_path / "training_6k.jsonl"), "TencentARC/SEED-Bench-R1", "--toy"):
        assert word in told

    # A folder is no annotation file either, nor is what Git LFS leaves in place of one.
    assert "no such annotation file" in lines(g.load_records, tmp_path, tmp_path)[0]
    pointer = tmp_path / "pointer.jsonl"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    [told] = lines(g.load_records, pointer, tmp_path)
    assert f"{pointer}: " in told
    assert "a Git LFS pointer in its place (`git lfs pull` fetches it)" in told


def bad(row=PLAIN, without="", **changes):
    """A row with another sample_id, without one key, and with some values changed."""
    changed = row | dict(sample_id=2) | changes
    return {key: value for key, value in changed.items() if key != without}


def message(content):
    return bad(CHAT, prompt=[dict(role="user", content=content)])


def chat(*content):
    return message(list(content))


BAD_ROWS = {  # name: (the line, what the message must say)
    "malformed JSON": (b'{"sample_id": 2, "question": ', "line 1 column"),
    "not UTF-8": (b'{"sample_id": 2, "question": "\xff\xfe"}', "utf-8"),
    "UTF-16": (json.dumps(PLAIN).encode("utf-16"), "utf-8"),
    "a list": ([PLAIN], "must be an object"),
    "a number": (b"7", "must be an object"),
    "null": (b"null", "must be an object"),
    "nested without end": (b"[" * 10**5, ""),
    "10 MB of junk": (b'{"sample_id": 2, "question": "' + b"x" * 10**7, ""),
    "10 MB where a letter belongs": (bad(golden_choice_idx="x" * 10**7), "golden_choice_idx"),
    "no sample_id": (bad(without="sample_id"), "sample_id"),
    "sample_id null": (PLAIN | dict(sample_id=None), "sample_id"),
    "sample_id a list": (PLAIN | dict(sample_id=[2]), "sample_id"),
    "sample_id again": (PLAIN, "line 1's already"),
    "sample_id again, as text": (PLAIN | dict(sample_id="1"), "line 1's already"),
    **{
        f"no {key}": (bad(without=key), key)
        for key in PLAIN
        if key not in ("sample_id", "answer", "golden_choice_idx")
    },
    **{
        f"{key} null": (bad(**{key: None}), key)
        for key in ("question", "choice_b", "video_source", "task_progress_metadata")
    },
    "question a number": (bad(question=5), "question"),
    "empty choice": (bad(choice_c=" "), "choice_c"),
    "gold E": (bad(golden_choice_idx="E"), "golden_choice_idx 'E' must be A, B, C or D"),
    "gold a": (bad(golden_choice_idx="a"), "golden_choice_idx 'a'"),
    "gold 0": (bad(golden_choice_idx=0), "golden_choice_idx 0"),
    "gold empty": (bad(golden_choice_idx=""), "golden_choice_idx ''"),
    "no negatives": (bad(DRAWN, "negative_answers"), "negative_answers"),
    "two negatives": (bad(DRAWN, negative_answers=["peel", "wash"]), "at least 3"),
    "a negative twice": (bad(DRAWN, negative_answers=["peel", "wash", "wash"]), "at least 3"),
    "the answer among three negatives": (
        bad(DRAWN, negative_answers=["peel", "cut", "wash"]),
        "at least 3",
    ),
    "an empty negative": (
        bad(DRAWN, negative_answers=["peel", "wash", "dry", ""]),
        "negative_answers",
    ),
    "negatives in one string": (bad(DRAWN, negative_answers="peel wash dry"), "negative_answers"),
    "no answer": (bad(DRAWN, "answer"), "answer"),
    "progress not a list": (bad(task_progress_metadata="some"), "task_progress_metadata"),
    "path ../": (bad(video_basename="../../../outside.avi"), "leaves the data root"),
    "source ../": (bad(video_source="../.."), "leaves the data root"),
    "special token": (bad(question="<|video_pad|>?"), "special token"),
    "special token in a choice": (bad(choice_a="cut<|im_end|>"), "special token"),
    "special token, escaped": (
        json.dumps(bad(question="<|video_pad|>?")).replace("<", r"\u003c").encode(),
        "special token",
    ),
    "half a character": (bad(question="\ud83d?"), ""),
}
BAD_CHAT_ROWS = {
    "no prompt": (bad(CHAT, "prompt"), "prompt"),
    "a plain row": (bad(), "--answer_only"),
    "prompt a string": (bad(CHAT, prompt="Next?"), "prompt"),
    "an empty prompt": (bad(CHAT, prompt=[]), "field 'prompt' must be a list of chat messages"),
    "an empty message": (chat(), "field 'content' must be a non-empty"),
    "a message that is none": (bad(CHAT, prompt=["Next?"]), "must be an object with a role of"),
    "no role": (bad(CHAT, prompt=[dict(content=CONTENT)]), "must be an object with a role of"),
    "an unknown role": (
        bad(CHAT, prompt=[dict(role="robot", content=CONTENT)]),
        "must be an object with a role of",
    ),
    "no content": (bad(CHAT, prompt=[dict(role="user")]), "field 'content' must be a non-empty"),
    "content null": (message(None), "field 'content' must be a non-empty"),
    "content a number": (message(5), "field 'content' must be a non-empty"),
    "content an object": (message(CONTENT[2]), "field 'content' must be a non-empty"),
    "content an empty string": (message(""), "field 'content' must be a non-empty"),
    "content of strings": (chat("Next?"), "must be an object with a type of"),
    "a video without a path": (chat(dict(type="video", video=None)), "field 'video'"),
    "a type that is a list": (chat(dict(type=["video"])), "must be an object with a type of"),
    "an image without a type": (
        chat(dict(image="images/Ego4D/1.png")),
        "must be an object with a type of",
    ),
    "a text without text": (chat(dict(type="text", image="")), "field 'text' must be"),
    "path ../ in a chat": (chat(dict(type="image", image="../x.png")), "leaves the data root"),
    "absolute path": (chat(dict(type="image", image="/etc/passwd")), "leaves the data root"),
    "no response": (bad(CHAT, "response"), "response"),
    "empty response": (bad(CHAT, response=""), "response"),
    "special token in the response": (
        bad(CHAT, response="<answer>A</answer><|im_end|>"),
        "special token",
    ),
}
BAD_ROW_CASES = [
    pytest.param(PLAIN, g.parse_record, *case, id=name) for name, case in BAD_ROWS.items()
]
BAD_ROW_CASES += [
    pytest.param(CHAT, sft_video.parse_chat, *case, id=f"chat: {name}")
    for name, case in BAD_CHAT_ROWS.items()
]


@pytest.mark.parametrize("good, parse, row, word", BAD_ROW_CASES)
def test_a_bad_row(lines, root, good, parse, row, word):
    """Before any training: one short line with file:line, sample_id and what is wrong."""
    path = write_rows(root / "rows.jsonl", good, row)
    start = time.perf_counter()
    told = lines(g.load_records, path, root, parse)

    told = [line for line in told if f"{path}:2: " in line]
    assert len(told) == 1
    line = told[0]
    assert f"{path}:2: sample_id " in line
    assert word in line
    assert len(line) < 1000 + len(str(root)) or "too long" in line
    if isinstance(row, dict) and isinstance(row.get("sample_id"), (int, str)):
        assert f": sample_id {row['sample_id']}: " in line
    assert time.perf_counter() - start < 5


def test_many_bad_rows(lines, root):
    """All bad rows are reported in one go: 20 lines and the count; exactly 20 need no count."""
    path = root / "rows.jsonl"
    rows = [PLAIN | dict(sample_id=f"uuid_{n}", question=None) for n in range(45)]
    write_rows(path, *rows)
    told = lines(g.load_records, path, root)
    assert len(told) == 21
    assert "45" in told[20]
    for n, line in enumerate(told[:20]):
        assert f"{path}:{n + 1}: sample_id uuid_{n}: " in line

    write_rows(path, *rows[:20])
    assert len(lines(g.load_records, path, root)) == 20


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_an_empty_file(lines, root, content):
    """A file without records is an error, not a training run of no steps."""
    path = root / "rows.jsonl"
    path.write_bytes(content)
    assert lines(g.load_records, path, root) == [f"{path}: holds no records"]


def test_rows_that_look_bad_but_are_not(root):
    """A byte-order mark, CRLF, blank lines, other alphabets and unknown fields pass.

    An answer among enough negatives is no negative.
    """
    rows = [
        PLAIN,
        PLAIN | dict(sample_id="é🙂", question="切る\u2028?", extra=None),
        PLAIN | dict(sample_id=3, video_basename="link.avi", domain=float("nan")),
        DRAWN | dict(sample_id=4, negative_answers=["peel", "cut", "wash", "dry"]),
        DRAWN | dict(sample_id=5, golden_choice_idx=None),
    ]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\r\n"
    (root / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\n\n")

    records = g.load_records(root / "rows.jsonl", root)
    assert [r["sample_id"] for r in records] == [1, "é🙂", 3, 4, 5]
    assert {r["domain"] for r in records} == {"all"}
    assert records[1]["question"] == "切る\u2028?"
    for epoch in range(30):
        choices, gold = g.choose(records[3], 42, epoch)
        assert sorted(choices) == ["cut", "dry", "peel", "wash"]
        assert choices["ABCD".index(gold)] == "cut"


def test_chains_of_one_question(root):
    """Chat rows of several runs may share a sample_id. An entry keeps its own value alone."""
    content = [CONTENT[0] | dict(image=None), dict(type="text", text="Next?", image="")]
    write_rows(root / "rows.jsonl", CHAT, CHAT | dict(prompt=[dict(role="user", content=content)]))
    records = g.load_records(root / "rows.jsonl", root, sft_video.parse_chat)
    assert [record["sample_id"] for record in records] == [1, 1]
    assert records[1]["messages"][0]["content"] == [CONTENT[0], CONTENT[2]]


# ---- Media that are missing ----------------------------------------------------------------------
def record(name, *files):
    return dict(sample_id=name, media=[("video", file) for file in files])


def test_links_are_followed(root):
    """Videos on another disk, a linked folder, the files of a hub cache: all links."""
    rows = [
        PLAIN | dict(video_basename="link.avi"),
        PLAIN | dict(sample_id=2, task_progress_metadata=[], video_source="linked"),
    ]
    write_rows(root / "rows.jsonl", *rows)
    records, missing = g.with_media(g.load_records(root / "rows.jsonl", root), False)
    assert missing == []
    frames = g.read_media("video", records[0]["media"][0][1], 56, 2.0, 8)
    assert np.array_equal(frames, FRAMES)


@pytest.mark.parametrize(
    "name", ["none.avi", "folder.avi", "fifo.avi", "loop.avi", "x" * 5000, "a\0.avi", "no/1.avi"]
)
def test_a_missing_file(lines, root, name, capsys):
    """Before any work: how many files a folder lacks, the flag that goes on, and each by name.

    What is no regular file is missing too: a folder, a pipe, a link to itself.
    """
    write_rows(root / "rows.jsonl", PLAIN, bad(video_basename=name))
    records = g.load_records(root / "rows.jsonl", root)
    folder = (root / "videos/Ego4D" / name).parent
    told = lines(g.with_media, records, False)
    assert told == [
        f"{folder}: 1 files are missing, no archive of them is there; --skip_missing leaves their "
        "records out",
        f"missing: {dict(sample_id=2, file=f'{root}/videos/Ego4D/{name}')}",
    ]

    there, missing = g.with_media(records, True)
    assert [record["sample_id"] for record in there] == [1]
    assert missing == [dict(sample_id=2, file=f"{root}/videos/Ego4D/{name}")]
    assert "1 records are left out: missing.jsonl names" in capsys.readouterr().out

    # Nothing is left: no run of no records.
    assert len(lines(g.with_media, records[1:], True)) == 2


def test_many_missing_files(lines, root):
    """The counts come first, a folder each, then the files: 20 lines and the count of all."""
    videos = [record(n, root / f"videos/Ego4D/{n}.avi") for n in range(1, 31)]
    images = [record(f"i{n}", root / f"images/Ego4D/{n}.png") for n in range(1, 5)]
    told = lines(g.with_media, videos + images, False)
    assert told[0].startswith(f"{root}/videos/Ego4D: 29 files are missing, ")
    assert told[1].startswith(f"{root}/images/Ego4D: 3 files are missing, ")
    assert told[2].startswith("missing: {'sample_id': 2, ")
    assert len(told) == 21
    assert "34 problems in all" in told[20]


@pytest.mark.parametrize(
    "near",
    [
        "videos/Ego4D/batch_1.tar.gz",
        "videos/Ego4D.tar",
        "videos/Ego4D.zip",
        "videos/Ego4D/batch_1/2.avi",
    ],
)
def test_what_is_not_unpacked_is_named(lines, root, near):
    """An archive beside the missing files, or the files one folder deeper."""
    (root / near).parent.mkdir(exist_ok=True)
    (root / near).write_bytes(b"")
    told = lines(g.with_media, [record(2, root / "videos/Ego4D/2.avi")], False)
    assert f" 1 files are missing, {root / near} is there; " in told[0]


# ---- Checkpoints ---------------------------------------------------------------------------------
def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def write_pointer(folder):
    """What is there in place of the weights after a clone without Git LFS."""
    pointer = "version https://git-lfs.github.com/spec/v1\n"
    (folder / "model.safetensors").write_text(pointer)


def drop_norm(folder):
    change_weights(folder, lambda weights: weights.pop("model.norm.weight"))


def add_extra(folder):
    change_weights(folder, lambda weights: weights.update(extra=torch.zeros(1)))


def remove_files(folder):
    for file in folder.iterdir():
        file.unlink()


BAD_CHECKPOINTS = {
    "another architecture": (lambda f: change_config(f, model_type="llama"), "'llama'"),
    "an unknown architecture": (lambda f: change_config(f, model_type="no_such_model"), ""),
    "no config": (lambda f: (f / "config.json").unlink(), ""),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), ""),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "weights cut off": (lambda f: os.truncate(f / "model.safetensors", 5000), ""),
    "weights of text": (write_pointer, ""),
    "a tensor too few": (drop_norm, "model.norm.weight"),
    "a tensor too many": (add_extra, "extra"),
    "another width": (lambda f: change_config(f, intermediate_size=96), "must be [64, 96]"),
    "empty": (remove_files, ""),
}


@pytest.mark.parametrize("damage, word", BAD_CHECKPOINTS.values(), ids=BAD_CHECKPOINTS)
def test_a_bad_checkpoint(lines, toy, tmp_path, damage, word):
    """A folder that is no Qwen2-VL, or half of one, is named with --model and what is wrong.

    A tensor that is wrong is named too.
    """
    model = tmp_path / "model"
    shutil.copytree(toy / "init", model)
    damage(model)
    told = lines(g.load_model, model, CPU, torch.float32)
    assert all(line.startswith(f"--model {model}: ") for line in told)
    assert word in told[0]


def test_no_model_and_no_hub(lines, monkeypatch):
    """No folder, and not to be had from the hub: how to get the paper's, and the way without."""

    def offline(*args, **kwargs):
        raise OSError("offline\nand so on")

    monkeypatch.setattr(g, "snapshot_download", offline)
    told = "\n".join(lines(g.find_model, "no/such-model"))
    assert "--model no/such-model" in told
    assert "Qwen/Qwen2-VL-7B-Instruct" in told
    assert "--toy" in told
    assert "and so on" not in told


def test_a_hub_model_of_another_family(lines, monkeypatch):
    """Its config.json, a small file, is asked first: no weights are fetched."""
    family = SimpleNamespace(model_type="llama")
    monkeypatch.setattr(g.AutoConfig, "from_pretrained", lambda name: family)
    monkeypatch.setattr(g, "snapshot_download", lambda *args, **options: pytest.fail("fetched"))
    [told] = lines(g.find_model, "no/such-model")
    assert "--model no/such-model: " in told
    assert "model_type 'llama' in config.json, must be 'qwen2_vl'" in told


def test_a_chat_template_in_a_file_of_its_own(toy, tmp_path):
    """chat_template.json, as the processor of older transformers writes it."""
    model = tmp_path / "model"
    shutil.copytree(toy / "init", model)
    template = g.load_tokenizer(model).chat_template
    assert template
    (model / "chat_template.jinja").unlink()
    assert not AutoTokenizer.from_pretrained(model).chat_template
    (model / "chat_template.json").write_text(json.dumps(dict(chat_template=template)))
    assert g.load_tokenizer(model).chat_template == template

    # The tokenizer's own comes first.
    (model / "chat_template.jinja").write_text("its own")
    assert g.load_tokenizer(model).chat_template == "its own"


# ---- Media ---------------------------------------------------------------------------------------
def avi(folder, frames=FRAMES, declared=None):
    """-> the bytes of an AVI file, whose headers may declare another number of frames."""
    make_toy.write_avi(folder / "made.avi", frames)
    data = bytearray((folder / "made.avi").read_bytes())
    if declared is not None:
        # The number stands in two headers, 16 and 32 bytes behind their 8 bytes of name and size.
        struct.pack_into("<I", data, data.find(b"avih") + 8 + 16, declared)
        struct.pack_into("<I", data, data.find(b"strh") + 8 + 32, declared)
    return bytes(data)


def png(folder, *shape):
    """-> the bytes of a PNG file of this height and width."""
    Image.fromarray(np.resize(FRAMES, (*shape, 3))).save(folder / "made.png")
    return (folder / "made.png").read_bytes()


def png_bomb(folder):
    """A PNG of one pixel, which declares 10^10."""
    size = struct.pack(">2I", 1, 1)
    declared = struct.pack(">2I", 10**5, 10**5)
    return png(folder, 1, 1).replace(size, declared)


def cut_mp4(folder):
    """The start of an MP4 file, whose second box is longer than the file."""
    kind = struct.pack(">I4s4sI4s", 20, b"ftyp", b"isom", 512, b"isom")
    index = struct.pack(">I4s", 9999, b"moov")
    return kind + index + bytes(99)


def dataset_of(toy, media, **changes):
    """-> the data set of one record with these media."""
    record = dict(
        sample_id="uuid_1",
        domain="all",
        question="What next?",
        choices=["cut", "peel", "wash", "dry"],
        gold="A",
        media=media,
    )

    tokenizer = AutoTokenizer.from_pretrained(toy / "init")
    config = AutoConfig.from_pretrained(toy / "init")
    settings = g.Config(**dict(frame_size=56, max_frames=8, decode_timeout=5.0) | changes)
    return g.VideoDataset([record], tokenizer, config, settings)


def load(toy, media, **changes):
    """-> the sample of a record with these media, decoded as in training."""
    return dataset_of(toy, media, **changes).begin(0)()


@pytest.mark.parametrize(
    "name, make",
    [
        ("empty.avi", lambda folder: b""),
        ("text.avi", lambda folder: b"this is no video\n" * 99),
        ("cut_in_the_header.avi", lambda folder: avi(folder)[:100]),
        ("cut_in_a_frame.avi", lambda folder: avi(folder)[:-20000]),
        ("zero_frames.avi", lambda folder: avi(folder, FRAMES[:0])),
        ("an_image.avi", lambda folder: b"\x89PNG" + bytes(range(256)) * 9),
        ("huge.avi", lambda folder: avi(folder, declared=2**31 - 1)),
        ("empty.png", lambda folder: b""),
        ("text.png", lambda folder: b"this is no image\n" * 99),
        ("cut.png", lambda folder: png(folder, 56, 56)[:2000]),
        ("bomb.png", png_bomb),
        ("gone.avi", None),
        ("declares_5000.avi", lambda folder: avi(folder, declared=5000)),
        ("text.mp4", lambda folder: b"this is no video\n" * 99),
        ("cut.mp4", cut_mp4),
    ],
)
def test_unreadable_media(toy, tmp_path, name, make):
    """Trap 13: {sample_id, error} with the path and the cause in one line, soon.

    There are no pixels and no prompt.
    """
    path = tmp_path / name
    if make:
        path.write_bytes(make(tmp_path))
    kind = "image" if name.endswith("png") else "video"
    start = time.perf_counter()
    sample = load(toy, [(kind, path)])

    assert sample["sample_id"] == "uuid_1"
    assert str(path) in sample["error"]
    assert "\n" not in sample["error"]
    assert not {"patches", "ids", "text"} & set(sample)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    "name, word", [("secret.avi", "permission denied"), ("fifo.avi", "decoding took over 1.0 s")]
)
def test_media_that_cannot_be_read(toy, name, word):
    """Unreadable permissions are told; a pipe that never answers ends at the time limit.

    Trap 14: such a pipe may have taken the file's place.
    """
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to other users
        os.chmod(folder, 0o755)
        path = Path(folder, name)
        if name == "fifo.avi":
            os.mkfifo(path)
            os.chmod(path, 0o666)
        else:
            path.write_bytes(b"")
            os.chmod(path, 0)

        dataset = dataset_of(toy, [("video", path)], decode_timeout=1.0)
        user = os.geteuid()
        try:
            os.seteuid(user or 65534)  # root reads everything
            [[sample]] = g.load_batches(dataset, [[0]], 1)
        finally:
            os.seteuid(user)
        assert "patches" not in sample
        assert word in sample["error"].lower(), sample["error"]


@pytest.mark.parametrize(
    "data, frames",
    [
        (lambda folder: avi(folder, FRAMES[:1]), [0, 0, 0, 0]),
        (lambda folder: avi(folder, FRAMES[:3]), [0, 1, 1, 2]),
        (lambda folder: avi(folder, declared=1), [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
    ids=["one frame", "three frames", "declares 1"],
)
def test_odd_but_readable_videos(toy, tmp_path, data, frames):
    """Trap 14: a short video repeats its own frames, and a header that counts too few cuts none."""
    (tmp_path / "clip.avi").write_bytes(data(tmp_path))
    sample = load(toy, [("video", tmp_path / "clip.avi")])
    patches, _ = g.to_patches(torch.from_numpy(FRAMES[frames]))
    assert torch.equal(sample["patches"], patches)


@pytest.mark.parametrize("shape", [(1, 1), (30, 500), (720, 1280)])
def test_images_of_another_size(toy, tmp_path, shape):
    """An image of the wrong size is resized to the frame size."""
    (tmp_path / "now.png").write_bytes(png(tmp_path, *shape))
    sample = load(toy, [("image", tmp_path / "now.png")], frame_size=84)
    assert sample["grids"] == [(1, 6, 6)]


# ---- Runs ----------------------------------------------------------------------------------------
def make_data(data):
    """Writes 8 records with their videos, as plain rows and as chat rows -> the plain rows."""
    (data / "annotations").mkdir(parents=True)
    split = make_toy.SPLITS["training_6k"]._replace(size=8)
    rows = make_toy.make_split("training_6k", split, data, np.random.default_rng(0))
    chats = [make_toy.sft_row(row, 0, 0, row["sample_id"]) for row in rows]
    write_rows(data / "annotations/training_6k.jsonl", *rows)
    write_rows(data / "annotations/training_with_cot_6k.jsonl", *chats)
    return rows


def first_order(data, model):
    """The sample_ids as the first epoch takes them."""
    dataset = g.VideoDataset(
        g.load_records(data / "annotations/training_6k.jsonl", data),
        AutoTokenizer.from_pretrained(model),
        AutoConfig.from_pretrained(model),
        g.Config(frame_size=56, max_frames=4),
    )
    return [dataset.begin(position)()["sample_id"] for position in range(8)]


@pytest.fixture
def run(toy, tmp_path, monkeypatch, capsys):
    """run(script, **flags) -> (exit code, stderr, output_dir) of its main() on 8 records.

    Their sample_ids are 0 to 7. run.videos are their videos, run.order is how the first epoch
    takes them, run.stdout is what the last run printed.
    """
    data = tmp_path / "data"
    rows = make_data(data)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    common = dict(
        model=toy / "init",
        data_root=data,
        output_dir=tmp_path / "run",
        frame_size=56,
        max_frames=4,
        dataloader_num_workers=0,
        gradient_checkpointing=False,
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def main(script, **flags):
        small = dict(gradient_accumulation_steps=1)
        if script is g:
            small = dict(num_generations=2, max_completion_length=3)
        flags = common | small | flags
        words = [f"--{key}={value}" for key, value in flags.items()]
        monkeypatch.setattr(sys, "argv", [script.__file__, *words])
        capsys.readouterr()
        try:
            script.main()
            code = 0
        except SystemExit as end:
            code = end.code
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            for number, handler in handlers.items():
                signal.signal(number, handler)

        main.stdout, err = capsys.readouterr()
        return code, err, Path(flags["output_dir"])

    main.videos = [data / "videos/EpicKitchens" / row["video_basename"] for row in rows]
    main.order = first_order(data, toy / "init")
    return main


def test_a_run_over_bad_samples_goes_on(run):
    """Trap 13: two unreadable videos are reported, counted in metrics.jsonl, and left out.

    The report has sample_id, path and cause. All the other samples are trained on.
    """
    bad = (1, 6)
    run.videos[1].write_bytes(b"")
    run.videos[6].write_bytes(b"no video\n" * 99)
    code, err, out = run(g, per_device_train_batch_size=4, max_bad_samples=2)

    assert code == 0, err
    for n in bad:
        told = [line for line in err.splitlines() if f"sample_id {n} left out: " in line]
        assert len([line for line in told if str(run.videos[n]) in line]) == 1
    log = read_rows(out / "metrics.jsonl")
    rollouts = read_rows(out / "rollouts.jsonl")
    assert sum(row["bad_samples"] for row in log) == 2
    assert [row["step"] for row in log] == [1, 2]
    assert sorted(row["sample_id"] for row in rollouts) == [n for n in range(8) if n not in bad]
    for row in log:
        assert row["loss"] is not None
        assert row["grad_norm"] is not None


@pytest.mark.parametrize("script", [g, sft_video], ids=["grpo", "sft"])
def test_a_run_without_missing_media(run, script):
    """--skip_missing trains on the records whose media are there, and says which are not."""
    run.videos[3].unlink()
    run.videos[5].unlink()
    code, err, out = run(script, per_device_train_batch_size=4)
    assert code == 2
    assert "2 files are missing" in err
    assert not out.exists()

    code, err, out = run(script, per_device_train_batch_size=2, skip_missing=True)
    assert code == 0, err
    assert "2 records are left out: missing.jsonl names" in run.stdout
    lost = [dict(sample_id=n, file=str(run.videos[n])) for n in (3, 5)]
    assert read_rows(out / "missing.jsonl") == lost
    settings = json.loads((out / "config.json").read_text())["run"]
    assert settings["missing"] == 2
    assert settings["missing_sha256"] == hashlib.sha256(b"[3, 5]").hexdigest()
    log = read_rows(out / "metrics.jsonl")
    assert len(log) == 3
    assert sum(row["bad_samples"] for row in log) == 0


@pytest.mark.parametrize("script", [g, sft_video], ids=["grpo", "sft"])
def test_steps_without_any_readable_sample(run, script):
    """Three steps in a row whose only sample is unreadable aren't taken for a diverged run.

    They have loss 0 and no gradient.
    """
    for n in run.order[2:5]:
        run.videos[n].write_bytes(b"")
    code, err, out = run(script, max_bad_samples=3)

    assert code == 0, err
    log = read_rows(out / "metrics.jsonl")
    assert "NaN" not in (out / "metrics.jsonl").read_text()  # which is no JSON
    if script is g:
        assert [row["reward"] is None for row in log] == [row["bad_samples"] > 0 for row in log]
    assert [row["bad_samples"] for row in log] == [0, 0, 1, 1, 1, 0, 0, 0]
    assert [row["loss"] for row in log[2:5]] == [0, 0, 0]
    assert [row["grad_norm"] for row in log[2:5]] == [0, 0, 0]
    if script is sft_video:  # an untrained policy earns no reward to learn from
        assert all(row["grad_norm"] > 0 for row in log[:2] + log[5:])
    assert (out / "model.safetensors").exists()
    assert "nan" not in run.stdout


@pytest.mark.parametrize("script", [g, sft_video], ids=["grpo", "sft"])
def test_too_many_bad_samples_end_the_run(run, script):
    """--max_bad_samples 0: the first unreadable sample is reported, then exit code 2."""
    run.videos[0].write_bytes(b"")
    code, err, out = run(script, per_device_train_batch_size=4, max_bad_samples=0)
    assert code == 2
    assert "sample_id 0 left out: " in err
    assert re.search("error: 1 samples could not be read.*--max_bad_samples 0", err)
    assert sum(row["bad_samples"] for row in read_rows(out / "metrics.jsonl")) == 1
    assert not (out / "model.safetensors").exists()


@pytest.mark.parametrize("script", [g, sft_video], ids=["grpo", "sft"])
def test_a_finished_run_is_not_overwritten(run, script, tmp_path):
    """An output_dir that holds a run is refused without --overwrite_output_dir, and stays as is."""
    out = tmp_path / "run"
    (out / "checkpoint-3/resume").mkdir(parents=True)
    for name in (
        "metrics.jsonl",
        "rollouts.jsonl",
        "config.json",
        "model.safetensors",
        "checkpoint-3/config.json",
        "notes.txt",
    ):
        (out / name).write_text(f'{{"name": "{name}"}}\n')

    def state():
        return {
            path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
            for path in [out, *out.rglob("*")]
        }

    before = state()
    code, err, _ = run(script)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert str(out) in err
    assert "--overwrite_output_dir" in err
    assert "--resume_from_checkpoint" in err
    assert before == state()


@pytest.mark.parametrize(
    "flag, value, count, word",
    [
        ("annotations", "bad.jsonl", 1, "{}:1: sample_id uuid_3: "),
        ("max_prompt_length", 50, 8, "over the limit of 50"),
        ("model", "empty", 1, "--model {}"),
        ("model", "llama", 1, "--model {}"),
        ("resume_from_checkpoint", "none", 1, "--resume_from_checkpoint {}"),
        ("output_dir", "file", 1, "--output_dir {}"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    run, toy, tmp_path, flag, value, count, word
):
    """One line each, exit code 2, and no output_dir.

    A bad row, prompts over the limit, a folder that is no Qwen2-VL, no checkpoint to go on from,
    an output_dir that is a file.
    """
    write_rows(tmp_path / "bad.jsonl", PLAIN | dict(sample_id="uuid_3", question=None))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    shutil.copytree(toy / "init", tmp_path / "llama")
    change_config(tmp_path / "llama", model_type="llama")

    if isinstance(value, str):
        value = tmp_path / value
    code, err, _ = run(g, **{flag: value})
    told = err.splitlines()
    assert code == 2, err
    assert len(told) == count, err
    assert all(line.startswith("grpo_video.py: error: ") for line in told)
    assert word.format(value) in told[0]
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "file").read_text() == "mine"


def test_resume_reads_what_the_policy_wrote(tmp_path):
    """Cutting the logs back to the checkpoint's step neither chokes on a text nor loses a row.

    Completions may hold any character, line separators such as U+2028 and U+0085 among them. Going
    on from an earlier checkpoint removes the later ones, and what a kill left half written.
    """
    rows = [dict(step=step, text="a\u2028b\x85c\u2029d\n") for step in (1, 2, 3)]
    log = tmp_path / "rollouts.jsonl"
    g.append_rows(log, rows)
    with open(log, "a") as f:
        f.write('{"step": 2, "te')  # cut off by a power loss
    for name in ("checkpoint-1", "checkpoint-2", "checkpoint-2.tmp"):
        (tmp_path / name / "resume").mkdir(parents=True)

    g.cut_back(tmp_path, 2)
    assert [json.loads(line) for line in log.read_text().split("\n")[:-1]] == rows[:2]
    assert g.checkpoints(tmp_path) == [tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"]
    assert not (tmp_path / "checkpoint-2.tmp").exists()

    # Without the removal 'auto' would go on from a future that the logs no longer tell.
    g.cut_back(tmp_path, 1)
    assert g.checkpoints(tmp_path) == [tmp_path / "checkpoint-1"]


# ---- The whole data root, other people's packages, a full disk -----------------------------------
BAD_VIDEOS = ("empty.avi", "cut.avi", "text.avi", "none.avi")
VALIDATE_TELLS = [  # the words of each problem's line
    ["training_6k.jsonl:6: sample_id 9", "question"],
    ["lvb_val.json:2: sample_id 2", "4 or 5 candidates"],
    ["videos/Ego4D: 1 of 6 files are missing, no archive of them is there"],
    ["root: 1 of 1 files are missing"],
    ["videos: 1 of 1 files are missing"],
    ["empty.avi: ", "of training_6k.jsonl: sample_id empty.avi and 1 more"],
    ["cut.avi: ", "and 0 more"],
    ["text.avi: ", "and 0 more"],
    ["none.avi: is missing; of training_6k.jsonl: sample_id none.avi and 0 more"],
    ["none.png: is missing; of training_with_cot_6k.jsonl: sample_id 2 and 0 more"],
    ["trunc.mkv: ValueError: cut off: 10.0 of about 20.0 s decode; of validation_L1.jsonl"],
    ["videos/none.mp4: is missing; of lvb_val.json: sample_id 1 and 0 more"],
]
VALIDATE_COUNTS = [
    "annotations/training_6k.jsonl: 5 checked, 1 wrong",
    "annotations/training_with_cot_6k.jsonl: 2 checked, 0 wrong",
    "annotations/validation_L1.jsonl: 3 checked, 0 wrong",
    "lvb_val.json: 1 checked, 1 wrong",
    "videos: 7 checked, 6 wrong",
    "images: 2 checked, 1 wrong",
]


@pytest.fixture
def validate_alone(monkeypatch, capsys):
    """validate_alone(*args) -> exit code, stdout, stderr of tools/validate.py in this process."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["validate.py", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            validate.main()
        return end.value.code, *capsys.readouterr()

    return run


def test_validate(root, validate_alone):
    """tools/validate.py tells all that is wrong in a data root, by name, and exits with 2.

    It looks at rows of all kinds and at files. FFmpeg's own words, which name none, are not there.
    """
    videos = root / "videos/Ego4D"
    (videos / "empty.avi").write_bytes(b"")
    (videos / "cut.avi").write_bytes(avi(root)[:100])
    (videos / "text.avi").write_bytes(b"no video")
    (root / "made.avi").unlink()

    annotations = root / "annotations"
    rows = [bad(sample_id=name, video_basename=name) for name in BAD_VIDEOS]
    no_question = bad(DRAWN, sample_id=9, question=None)
    no_image = chat(dict(type="image", image="none.png"))
    again = bad(sample_id=3, video_basename="empty.avi")
    write_rows(annotations / "training_6k.jsonl", PLAIN, *rows, no_question)
    write_rows(annotations / "training_with_cot_6k.jsonl", CHAT, no_image)
    shutil.copy(Path(__file__).parent / "media/trunc.mkv", videos)
    late = bad(sample_id=4, video_basename="trunc.mkv")
    write_rows(annotations / "validation_L1.jsonl", PLAIN, again, late)
    entry = dict(
        id="1",
        video_path="none.mp4",
        question="What?",
        candidates=["cut", "peel", "wash", "dry"],
        correct_choice=0,
        duration_group=15,
        question_category="S2E",
    )
    entries = [entry, entry | dict(id="2", candidates=["cut"])]
    (root / "lvb_val.json").write_text(json.dumps(entries))

    command = [sys.executable, ROOT / "tools/validate.py", root]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV)
    told = done.stdout.splitlines()
    assert done.returncode == 2, done.stderr
    for line, words in zip(told, VALIDATE_TELLS):
        assert all(word in line for word in words), line
    assert [line.removeprefix(f"{root}/") for line in told[12:]] == VALIDATE_COUNTS
    assert "files: 100%" in done.stderr
    assert "@ 0x" not in done.stderr

    write_rows(annotations / "good.jsonl", PLAIN)
    code, out, _ = validate_alone(root, annotations / "good.jsonl")
    assert code == 0
    assert "videos: 1 checked, 0 wrong\nimages: 1 checked, 0 wrong" in out

    code, _, err = validate_alone(root / "videos")
    assert code == 2
    assert "must be a data root" in err


def test_validate_goes_on(root, validate_alone, monkeypatch):
    """Trap 14: behind a file that hangs, crashes the decoder or raises, the others are checked.

    What is asked of a file is what the run will ask.
    """
    names = ("hangs.avi", "crashes.avi", "raises.avi", "good.avi")
    for name in names:
        shutil.copyfile(root / "videos/Ego4D/1.avi", root / f"videos/Ego4D/{name}")
    rows = [bad(sample_id=name, video_basename=name) for name in names]
    write_rows(root / "annotations/training_6k.jsonl", *rows)

    read_media = sft_video.read_media

    def read(kind, path, *how):
        assert how == (256, 1.5, 16, "pyav")
        if path.name == "hangs.avi":
            time.sleep(60)
        if path.name == "crashes.avi":
            os._exit(7)
        if path.name == "raises.avi":
            raise ValueError("no frame\nof this many")
        return read_media(kind, path, *how)

    monkeypatch.setattr(sft_video, "read_media", read)
    start = time.perf_counter()
    flags = ("--decode_timeout", 1.5, "--fps", 1.5, "--workers", 2)
    code, out, _ = validate_alone(root, *flags)
    assert time.perf_counter() - start < 15
    assert code == 2

    videos = root / "videos/Ego4D"
    where = "of training_6k.jsonl: sample_id"
    assert out.splitlines() == [
        f"{videos}/hangs.avi: decoding took over 1.5 s; {where} hangs.avi and 0 more",
        f"{videos}/crashes.avi: decoder died with exit code 7; {where} crashes.avi and 0 more",
        f"{videos}/raises.avi: ValueError: no frame; {where} raises.avi and 0 more",
        f"{root}/annotations/training_6k.jsonl: 4 checked, 0 wrong",
        "videos: 4 checked, 3 wrong",
        "images: 1 checked, 0 wrong",
    ]


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_checkpoint(toy, tmp_path):
    """The disk fills up while a checkpoint is written: one line and exit code 1.

    The last complete checkpoint goes on.
    """
    out = tmp_path / "run"
    folders = ["--model", toy / "init", "--data_root", toy / "data", "--output_dir", out]
    flags = """
        --max_frames 4 --frame_size 56 --num_generations 2 --max_completion_length 3
        --save_steps 4 --dataloader_num_workers 1
    """.split()
    command = [sys.executable, ROOT / "grpo_video.py", *folders, *flags]
    endless = [*command, "--max_steps", "400"]
    started = subprocess.Popen(endless, env=ENV, stderr=subprocess.PIPE, text=True)
    while not (out / "checkpoint-4").exists() and started.poll() is None:
        time.sleep(0.01)
    # The logs are smaller than this, the weights larger.
    resource.prlimit(started.pid, resource.RLIMIT_FSIZE, (2**19, 2**19))

    _, error = started.communicate(timeout=100)
    assert started.returncode == 1, error
    assert "File too large" in error.splitlines()[-1], error
    assert "Traceback" not in error, error
    complete = [p.name for p in out.glob("checkpoint-*") if not p.name.endswith(".tmp")]
    steps = [int(name.removeprefix("checkpoint-")) for name in complete]
    assert steps
    last = max(steps)
    assert list(out.glob(f"checkpoint-{last + 4}.tmp"))

    resume = ["--max_steps", str(last + 5), "--resume_from_checkpoint", "auto"]
    done = subprocess.run([*command, *resume], env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    log = read_rows(out / "metrics.jsonl")
    assert [row["step"] for row in log] == list(range(1, last + 6)), done.stderr
    assert not list(out.glob("*.tmp"))
