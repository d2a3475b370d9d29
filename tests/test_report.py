"""tools/report.py: what it reads and refuses, and its page in headless Chromium through a pipe.

apt-get install -y --no-install-recommends chromium     # else the page's tests are skipped
python -m pytest -q tests/test_report.py
"""

import base64
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import report  # noqa: E402

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
EVIL = "<script>alert(1)</script></script><!--<script>\u2028\u2029&lt;<img src=x onerror=alert(2)>"
# 你 is E4 BD | A0, split over tokens 3 and 4; 5 is 好 whole.
VOCAB = ["it", "Ġmoves", "Ġup", "ä½", "ł", "å¥½", "Ċ", "<"]
TOKENIZER = json.dumps(
    dict(
        model=dict(vocab={token: i for i, token in enumerate(VOCAB)}),
        added_tokens=[dict(id=100, content="<|im_end|>")],
    )
)


# ---- The folders that a report is about ----------------------------------------------------------
def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def completion(text="it moves up", answer="A", **changes):
    row = dict(
        ids=[0, 1, 2, 100],
        length=4,
        truncated=False,
        text=text,
        reward=float(answer == "A"),
        answer=answer,
        kl=0.01234567,
        entropy=0.5,
        clip_ratio=0.0,
        advantage=0.5,
        logprob_sum=-1.0,
        log_ratio=[0.0, -3.0, 1.0, 0.1234],
    )

    return row | changes


def rollout(step, sample_id, completions, prompt="What next?"):
    before = "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>"
    behind = "\n Output the thinking process in <think> it"
    return dict(
        step=step,
        sample_id=sample_id,
        prompt=before + prompt + behind,
        prompt_ids_len=9,
        gold="A",
        completions=completions,
    )


def write_run(folder, data):
    """30 steps with 2 prompts each, the first with what a page must not take for its own markup."""
    metrics = [
        dict(
            step=i,
            epoch=i / 30,
            reward=i / 30,
            kl=None if i == 7 else i / 100,
            time_data=0.1,
            time_rollout=0.2,
            surprise=3.0,
        )
        for i in range(1, 31)
    ]
    write(folder / "metrics.jsonl", metrics)

    rows = []
    for step in range(1, 31):
        for _ in range(2):
            rows.append(rollout(step, step % 4, [completion(), completion("no", "B")]))
    truncated = completion(
        EVIL, None, ids=[7, *range(7)], log_ratio=[0.1] * 8, truncated=True, consistent=True
    )
    diverged = completion(EVIL, log_ratio=[None, math.nan] * 2, kl=None, consistent=False)
    rows[0] = rollout(1, "1", [truncated, diverged], EVIL)
    del rows[1]["completions"][0]["log_ratio"]
    rows[1]["completions"][0]["text"] = EVIL
    write(folder / "rollouts.jsonl", rows)
    with open(folder / "rollouts.jsonl", "a") as f:
        f.write('{"step": 31, "sample_')  # a kill's half line

    settings = dict(data_root=str(data), annotations="", model="nowhere")
    (folder / "config.json").write_text(json.dumps(dict(model_type="qwen2_vl", run=settings)))
    (folder / "checkpoint-20").mkdir()
    (folder / "checkpoint-20/tokenizer.json").write_text(TOKENIZER)
    (folder / "frames").mkdir()
    Image.new("RGB", (2000, 250), "blue").save(folder / "frames/2.png")


def write_sft(folder):
    """10 steps, with a held-out loss at every fifth."""
    metrics = [dict(step=i, loss=1 / i, token_accuracy=0.5) for i in range(1, 11)]
    for row in metrics[4::5]:
        row["eval_loss"] = 2.0
    write(folder / "metrics.jsonl", metrics)


def write_evaluation(folder):
    """Four questions of L3: one without an answer, two right, one that failed."""
    counts = dict(
        accuracy=2 / 3,
        correct=2,
        total=3,
        failed=1,
        no_answer=1,
        ci95=[0.2, 0.9],
        accuracy_failed_wrong=0.5,
    )
    domain = counts | dict(accuracy=0.123)
    domains = dict(by_domain={"Work": domain, EVIL: domain}, by_category={})
    summary = dict(validation_L3=counts | domains)
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(summary))

    answers = [
        (1, EVIL, None, None),
        (2, "A", "A", None),
        (3, "A", "A", None),
        (4, None, None, "unreadable"),
    ]
    predictions = [
        dict(
            sample_id=i,
            response=text,
            predicted=letter,
            gold="A",
            correct=letter == "A",
            domain="Work",
            error=error,
        )
        for i, text, letter, error in answers
    ]
    # The first row is an older version's.
    tokens = dict(tokens=["A", " ", ""], nats=[1.0, math.nan, 3.0])
    analysis = [
        dict(sample_id=2, consistent=False, p_answer=0.5),
        dict(sample_id=3, consistent=None, p_answer=None, visual_reliance=tokens),
    ]
    write(folder / "predictions_validation_L3.jsonl", predictions)
    write(folder / "analysis_validation_L3.jsonl", analysis)


def write_data(folder):
    """The questions of both, one observation that can be read and one that cannot."""
    choices = {f"choice_{letter}": f"move {letter}" for letter in "abcd"}
    rows = [
        dict(
            sample_id=i,
            question=f"Question {i}?",
            video_source="E",
            current_observation_basename=f"{i}.png",
            **choices,
        )
        for i in range(5)
    ]
    write(folder / "annotations/training_6k.jsonl", rows)
    write(folder / "annotations/validation_L3.jsonl", rows)

    (folder / "images/E").mkdir(parents=True)
    Image.new("RGBA", (300, 200), "red").save(folder / "images/E/2.png")
    (folder / "images/E/3.png").write_bytes(b"no picture")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with run/, sft/, an evaluation eval/, and their data/."""
    home = tmp_path_factory.mktemp("report")
    write_run(home / "run", home / "data")
    write_sft(home / "sft")
    write_evaluation(home / "eval")
    write_data(home / "data")
    return home


def write_report(*args):
    command = [sys.executable, str(ROOT / "tools/report.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def page(folders):
    """The report about everything -> its path."""
    sources = [folders / name for name in ("run", "sft", "eval")]
    done = write_report(*sources, "--output", folders / "all.html")
    assert done.returncode == 0, done
    assert "2 runs, 1 evaluations, 64 prompts" in done.stdout, done
    return folders / "all.html"


def embedded(html, name):
    """The JSON that a page holds under this name."""
    return json.loads(html.split(f'id="{name}">')[1].split("</script>")[0])


# ---- What is read, embedded and refused ----------------------------------------------------------
def test_bytes_of_tokens_are_grouped_into_characters(folders):
    """A character split over tokens is shown whole, at the first, with the sum of their log-ratios.

    Bytes that are no character show as the replacement character; an id that the tokenizer lacks
    by its number; an added token as it is.
    """
    tokens = report.load_tokens([folders, folders / "run/checkpoint-20"])
    assert tokens[1] == b" moves"
    assert tokens[6] == b"\n"
    assert report.load_tokens([folders]) == {}

    ids = [0, 3, 4, 5, 1, 100, 999]
    texts, ratios = report.pieces(tokens, ids, [0.1, 0.2, 0.3, math.nan, -0.12345, 0.0, 1.0])
    assert texts == ["it", "你", "好", " moves", "<|im_end|>", "[999]"]
    assert ratios == [0.1, 0.5, None, -0.123, 0.0, 1.0]

    texts, ratios = report.pieces(tokens, [4, 3, 0], [1.0, 2.0, 3.0])
    assert texts == ["\ufffd", "\ufffd", "it"]
    assert ratios == [1.0, 2.0, 3.0]
    assert sorted(report.BYTE.values()) == list(range(256))


def test_data_cannot_become_markup(page):
    """No `<` of a model's or a data set's is in the page, U+2028 and U+2029 neither.

    All of it comes back from JSON.
    """
    html = page.read_text()
    for text in ("alert(1)<", "<img", "\u2028", "\u2029"):
        assert text not in html
    assert html.count("<script>") == 1
    assert html.count("</script>") == html.count("<script")

    first = embedded(html, "prompt-0")
    truncated, diverged = first["completions"]
    assert first["question"] == EVIL.strip()
    assert "".join(diverged["text"]) == "it moves up<|im_end|>"
    assert diverged["kl"] is None
    assert truncated["kl"] == 0.01235

    # Without a log_ratio it is the text as it was logged.
    assert embedded(html, "prompt-1")["completions"][0]["text"] == EVIL

    # SVG's name is no address.
    rest = html.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")
    assert "http" not in rest


@pytest.fixture(scope="module")
def models(folders, tmp_path_factory):
    """A page of three evaluations; the third is of other questions."""
    home = tmp_path_factory.mktemp("models")
    for name, letters, asked in (("base", "B-B", 1), ("grpo", "AAA", 1), ("else", "ABC", 2)):
        rows = []
        for i, letter in enumerate(letters):
            answer = None if letter == "-" else letter
            error = None if answer else "unreadable"
            text = answer and f"chain of {name}"
            row = dict(sample_id=i, response=text, predicted=answer, gold="A", error=error)
            rows.append(row)
        if name == "grpo":
            rows[0] |= dict(responses=[text, "another"], answers=["A", "C"])
            rows.append(dict(sample_id=3, response="so", predicted="A", gold="A", error=None))

        write(home / name / "predictions_validation_L3.jsonl", rows)
        settings = home / name / "settings_validation_L3.json"
        settings.write_text(json.dumps(dict(data_sha256=str(asked))))
        counts = dict(accuracy=0.5, correct=1, total=2, failed=0, no_answer=0, ci95=[0, 1])
        summary = dict(validation_L3=counts | dict(by_domain={}))
        (home / name / "summary.json").write_text(json.dumps(summary))

    # What the analysis says is of the first response.
    fits = dict(sample_id=0, consistent=True)
    write(home / "grpo/analysis_validation_L3.jsonl", [fits])
    names = [home / name for name in ("base", "grpo", "else")]
    done = write_report(*names, "--data_root", folders / "data", "--output", home / "all.html")
    assert "0 runs, 3 evaluations, 7 prompts" in done.stdout, done
    return home / "all.html"


def test_models_side_by_side(models):
    """A question stands once, with each model's responses in the order of the command.

    Other questions stand apart, whatever their ids. Who failed is named; who was not asked is not.
    """
    html = models.read_text()
    home = models.parent
    page = embedded(html, "page")
    assert page["sources"] == ["validation_L3, 2 models", f"{home}/else validation_L3"]
    assert page["index"]["source"] == [0, 0, 0, 0, 1, 1, 1]
    assert page["index"]["sample_id"] == ["0", "1", "2", "3", "0", "1", "2"]
    assert page["index"]["flags"] == ["050", "1", "01", "1", "1", "0", "0"]

    first = embedded(html, "prompt-0")
    assert first["question"].startswith("Question 0?")
    shown = [(x["model"], x["text"], x["answer"]) for x in first["completions"]]
    assert shown == [
        (f"{home}/base", "chain of base", "B"),
        (f"{home}/grpo", "chain of grpo", "A"),
        (f"{home}/grpo", "another", "C"),
    ]
    assert embedded(html, "prompt-1")["error"] == f"{home}/base: unreadable"
    [alone] = embedded(html, "prompt-4")["completions"]
    assert alone == dict(text="chain of else", answer="A")


def test_pictures(page):
    """The strip of frames and the observation are embedded, at most 140 high.

    A picture that cannot be read is left out.
    """
    html = page.read_text()
    number = embedded(html, "prompt-2")["pictures"]
    assert number is not None
    assert embedded(html, "prompt-4")["pictures"] is None

    sizes = []
    for uri in embedded(html, f"picture-{number}"):
        data = base64.b64decode(uri.split(",")[1])
        sizes.append(Image.open(io.BytesIO(data)).size)
    assert sizes == [(1120, 140), (200, 133)]


def test_pictures_have_a_limit(folders, monkeypatch):
    """Pictures of a source's first samples alone, however many prompts, and a note that says so."""
    monkeypatch.setattr(report, "MAX_PICTURED", 1)
    page = report.Report(folders / "data")
    page.add_source("a run", folders / "data/annotations/training_6k.jsonl")
    page.records = {i: dict(video_source="E", current_observation_basename="2.png") for i in "12"}
    assert [page.picture(folders, i) for i in "1212"] == [0, None, 0, None]
    assert page.notes == ["a run: pictures of the first 1 samples alone"]


def test_default_output_and_missing_data(folders, tmp_path):
    """Without --output the page is in the first folder; without the data it has notes instead."""
    shutil.copytree(folders / "eval", tmp_path / "eval")
    done = write_report(tmp_path / "eval", "--data_root", tmp_path / "nowhere")
    assert done.returncode == 0, done

    html = (tmp_path / "eval/report.html").read_text()
    [note] = embedded(html, "page")["notes"]
    assert "nowhere/annotations/validation_L3.jsonl; --data_root says where" in note


@pytest.mark.parametrize(
    "file, content, message",
    [
        (
            "other.txt",
            "",
            "{0}: no metrics.jsonl, as a training run's folder has, "
            "and no summary.json, as an evaluation's has",
        ),
        (
            "metrics.jsonl",
            '{"step": 1}\n{"step": \n{"step": 3}\n',
            "{0}/metrics.jsonl:2: JSONDecodeError",
        ),
        ("metrics.jsonl", '{"reward": 1}\n', "{0}/metrics.jsonl:1: KeyError: 'step'"),
        ("metrics.jsonl", "[1]\n", "{0}/metrics.jsonl:1: AttributeError"),
        ("rollouts.jsonl", '{"step": 1}\n', "{0}/rollouts.jsonl:1: KeyError: 'completions'"),
        ("summary.json", "{", "{0}/summary.json: JSONDecodeError"),
        ("summary.json", '{"L1": {}}', "{0}/summary.json: KeyError: 'by_domain'"),
    ],
)
def test_bad_input(tmp_path, file, content, message):
    """Exit code 2 and one line that names the folder, or the file and its line."""
    folder = tmp_path / "folder"
    folder.mkdir()
    if file == "rollouts.jsonl":
        write(folder / "metrics.jsonl", [])
        run = dict(data_root="nowhere", annotations="", model="nowhere")
        (folder / "config.json").write_text(json.dumps(dict(run=run)))
    (folder / file).write_text(content)

    done = write_report(folder)
    expected = "report.py: error: " + message.format(folder)
    assert done.returncode == 2
    assert not (folder / "report.html").exists()
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(expected), done.stderr


# ---- What the curves say -------------------------------------------------------------------------
def log(steps=100, **changes):
    """A healthy run's metrics.jsonl; a change is a metric's value at a share of the run."""
    curves = dict(
        reward=lambda t: 0.25 + 0.7 * t,
        frac_reward_zero_std=lambda t: 0.2 + 0.6 * t,
        entropy=lambda t: 0.22 - 0.16 * t,
        frac_truncated=lambda t: 0.3 - 0.3 * t,
        kl=lambda t: 0.3 * t,
        frac_no_answer=lambda t: 0.6 - 0.6 * t,  # the format is learnt
        logprob_gap_mean=lambda t: 0.01,
        logprob_gap_max=lambda t: 0.8,
    )
    curves |= changes

    rows = []
    for i in range(steps):
        wave = 0.02 * math.sin(i)
        values = {key: curve(i / (steps - 1)) for key, curve in curves.items()}
        rows.append(dict(step=i + 1, **values | dict(reward=values["reward"] + wave)))
    return rows


TROUBLES = {
    "reward_is_flat": (
        dict(reward=lambda t: 0.25 + 0.03 * t, frac_reward_zero_std=lambda t: 0.9),
        "The reward does not rise: 0.25, then 0.28; 0.90 of the groups have zero variance",
    ),
    "entropy_is_gone": (
        dict(entropy=lambda t: 0.5 * math.exp(-5 * t)),
        "The entropy is gone: 0.32 nats, then 0.0057",
    ),
    "completions_do_not_end": (
        dict(frac_truncated=lambda t: 0.98 * t),
        "Completions do not end: 0.89 are truncated",
    ),
    "kl_runs_away": (
        dict(kl=lambda t: 0.01 * math.exp(7 * t)),
        "The KL runs away: 0.021 nats a token, then 6.1",
    ),
    "answers_are_unreadable": (
        dict(frac_no_answer=lambda t: 0.7),
        "Answers are unreadable: 0.70 give no single letter",
    ),
    "policies_are_apart": (
        dict(logprob_gap_mean=lambda t: 0.1 * t),
        "The scored policy is not the one that sampled: its log-probs are 0.09 nats apart",
    ),
}


@pytest.mark.parametrize("rule", report.VERDICTS, ids=lambda rule: rule.__name__)
def test_a_trouble_in_the_curves(rule):
    """Its verdict alone comes, with the numbers; not where its metrics are not logged."""
    changes, words = TROUBLES[rule.__name__]
    [verdict] = report.verdicts(log(**changes))
    assert verdict == dict(found=words, rule=rule.__doc__, advice=report.VERDICTS[rule])

    without = [{k: x for k, x in row.items() if k not in changes} for row in log(**changes)]
    assert report.verdicts(without) == []


def test_a_healthy_run_has_no_verdicts():
    """At no step of it; nor an SFT run, one without steps, one whose numbers are not finite."""
    rows = log()
    assert not any(report.verdicts(rows[:n]) for n in range(20, 101))
    assert report.verdicts([dict(step=i, loss=1 / i, token_accuracy=1.0) for i in (1, 2)]) == []
    assert report.verdicts([]) == []
    assert report.verdicts([dict(step=1, kl=math.nan, entropy=None, frac_truncated=math.inf)]) == []


def test_curves_are_judged_by_their_ends():
    """The rules' limits, worked by hand on fifths of 25 steps, 5 each."""

    def found(key, first, last, **others):
        values = [first] * 5 + [9] * 15 + [last] * 5
        return report.verdicts([{key: value, **others} for value in values])

    high = dict(frac_reward_zero_std=0.7)
    assert found("reward", 0.25, 0.29, **high)
    assert not found("reward", 0.25, 0.31, **high)
    assert not found("reward", 0.25, 0.2, frac_reward_zero_std=0.69)
    for key, good, bad in (
        ("entropy", 0.051, 0.049),  # of 0.5
        ("frac_truncated", 0.49, 0.5),
        ("kl", 0.99, 1.0),
        ("frac_no_answer", 0.49, 0.5),
        ("logprob_gap_mean", 0.049, 0.05),
        ("logprob_gap_max", 4.9, 5.0),
    ):
        assert len(found(key, 0.5, bad)) == 1, key
        assert found(key, 0.5, good) == [], key

    # A trend needs 20 steps, a state does not.
    assert report.verdicts([dict(reward=0.2, **high)] * 19) == []
    assert len(report.verdicts([dict(reward=0.2, **high)] * 20)) == 1
    assert len(report.verdicts([dict(frac_truncated=1.0)])) == 1


def test_advice_names_flags_and_files():
    """What a verdict tells the reader to use is there."""
    advice = " ".join(report.VERDICTS.values())
    source = (ROOT / "grpo_video.py").read_text()
    flags = re.findall(r"--(\w+)", advice)
    assert len(flags) >= 5
    assert all(re.search(rf"^    {flag}: ", source, re.M) for flag in flags)
    files = re.findall(r"[\w/]+\.py", advice)
    assert len(files) >= 3
    assert all((ROOT / file).is_file() for file in files)


# ---- The page in a browser -----------------------------------------------------------------------
class Browser:
    """Headless Chromium: browser("Domain.method", **params) -> result.

    Its --remote-debugging-pipe reads commands from file 3 and writes answers and events to file 4,
    each JSON with a zero byte behind it.
    """

    def __init__(self, profile):
        commands, self.commands = os.pipe()
        self.answers, answers = os.pipe()
        command = [
            "bash",
            "-c",
            f'exec "$0" "$@" 3<&{commands} 4>&{answers}',
            CHROMIUM,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
            "--window-size=1280,1600",
        ]
        pipes = (commands, answers)
        self.process = subprocess.Popen(command, pass_fds=pipes, stderr=subprocess.DEVNULL)
        os.close(commands)
        os.close(answers)

        self.buffer = b""
        self.events = []
        self.number = 0
        self.session = {}
        target = self("Target.createTarget", url="about:blank")["targetId"]
        session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.session = dict(sessionId=session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def message(self):
        while b"\0" not in self.buffer:
            self.buffer += os.read(self.answers, 1 << 20) or pytest.fail("chromium has left")
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def __call__(self, method, **params):
        self.number += 1
        command = dict(id=self.number, method=method, params=params) | self.session
        os.write(self.commands, json.dumps(command).encode() + b"\0")

        message = self.message()
        while message.get("id") != self.number:
            self.events.append(message)
            message = self.message()
        assert "error" not in message, (method, message)
        return message["result"]

    def js(self, expression):
        """The value of an expression in the page."""
        result = self(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def open(self, path, fragment=""):
        """Opens a file and waits until it is loaded and drawn -> seconds."""
        # Another fragment of the same file would be no new page.
        self("Page.navigate", url="about:blank")
        self.events = []
        start = time.perf_counter()
        self("Page.navigate", url=path.as_uri() + fragment)
        while self.js("document.readyState + location.protocol") != "completefile:":
            time.sleep(0.01)
        self.js("new Promise(done => requestAnimationFrame(() => setTimeout(done)))")
        return time.perf_counter() - start

    def faults(self):
        """What must not happen: exceptions, console errors, refusals by the policy, requests.

        Only the file and its pictures may be asked for.
        """
        found = []
        for event in self.events:
            method = event["method"]
            params = event["params"]
            if method in ("Runtime.exceptionThrown", "Log.entryAdded"):
                found.append(event)
            if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
                found.append(event)
            if method == "Network.requestWillBeSent":
                url = params["request"]["url"]
                if not url.startswith(("file:", "data:")):
                    found.append(url)
        return found

    def texts(self, selector):
        nodes = f"[...document.querySelectorAll({json.dumps(selector)})]"
        return self.js(f"{nodes}.map(node => node.textContent)")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip(
            "no chromium, chromium-browser or google-chrome on the PATH; "
            "on Debian: apt-get install -y chromium"
        )
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.session = {}
    browser("Browser.close")
    browser.process.wait(20)


def test_page_opens_without_errors(browser, page):
    """Everything is there: a chart for each metric, the table's numbers, prompts, and the notes.

    The numbers are as summary.json has them.
    """
    browser.open(page)
    assert browser.faults() == []
    titles = " ".join(browser.texts(".charts h3"))
    for name in ("Reward", "KL", "time_rollout", "Held-out loss", "Token accuracy", "surprise"):
        assert name in titles

    assert browser.texts("th")[:3] == ["", "L3", "L3 Work"]
    [cell, *_] = browser.texts("td")
    assert cell == "66.7 (20–90)2 of 3 right1 failed, 1 no answeraccuracy_failed_wrong 50.0 (20–90)"
    assert browser.texts("#count") == ["prompts 1–20 of 64"]
    assert len(browser.texts("article")) == 20
    assert any("log_ratio" in note for note in browser.texts("#notes li"))
    assert browser.js("document.documentElement.scrollWidth <= innerWidth")


def test_verdicts_stand_at_the_top(browser, folders, tmp_path):
    """A line each, with run, rule and advice; no such section where the curves are well."""
    changes, words = TROUBLES["kl_runs_away"]
    write(tmp_path / "sick/metrics.jsonl", log(**changes))
    page = report.Report(None)
    page.add_run(tmp_path / "sick")
    page.add_run(folders / "sft")
    (tmp_path / "sick.html").write_text(page.html())
    browser.open(tmp_path / "sick.html")
    [line] = browser.texts("#verdicts li")
    assert line.startswith(f"{tmp_path}/sick {words}. Lower --learning_rate")
    assert line.endswith(" Rule: 1 or more.")
    assert browser.js("document.querySelector('h2').textContent") == "What the curves say"
    assert browser.js("document.querySelector('#verdicts').offsetHeight") > 20
    assert browser.faults() == []

    page = report.Report(None)
    page.add_run(folders / "sft")
    (tmp_path / "well.html").write_text(page.html())
    browser.open(tmp_path / "well.html")
    assert browser.js("document.querySelector('#verdicts').offsetHeight") == 0


def test_script_shows_as_text(browser, page):
    """A completion, a question and a domain that say <script> or <img onerror> are words.

    They are shown on the page, and nothing of them runs.
    """
    browser.open(page, "#step=1")
    assert EVIL in browser.texts(".card .text")
    assert browser.texts(".asked .text")[0] == EVIL.strip()
    assert f"L3 {EVIL}" in browser.texts("th")
    markup = "article script, article img[src=x], th img"
    assert browser.js(f"document.querySelectorAll('{markup}').length") == 0
    assert browser.texts("article")[0].count("<it moves up你好\n") == 1
    assert browser.faults() == []


def test_tokens_are_coloured(browser, page):
    browser.open(page, "#step=2")
    spans = browser.js(
        "[...document.querySelector('.card .text').children]"
        ".map(s => [s.textContent, s.title, s.style.background])"
    )
    texts, titles, backgrounds = zip(*spans)
    assert texts == ("it", " moves", " up", "<|im_end|>")
    assert titles == ("log-ratio 0", "log-ratio -3", "log-ratio 1", "log-ratio 0.123")
    assert "--less" in backgrounds[1]
    assert "0.6" in backgrounds[1]
    assert "--more" in backgrounds[2]
    assert "0.3" in backgrounds[2]


def test_where_the_video_enters(browser, page):
    """An analysed response's tokens have the colour of their visual reliance; others have none."""
    source = f"#source={page.parent}/eval validation_L3".replace(" ", "%20")
    browser.open(page, f"{source}&sample_id=3")
    spans = browser.js(
        "[...document.querySelector('.card .text').children]"
        ".map(s => [s.textContent, s.title, s.style.background])"
    )
    texts, titles, backgrounds = zip(*spans)
    assert texts == ("A", " ")
    assert titles == ("visual reliance 1", "visual reliance not finite")
    assert "--enters" in backgrounds[0]
    assert "0.3" in backgrounds[0]

    browser.open(page, f"{source}&sample_id=2")
    assert browser.texts(".card .text") == ["A"]
    assert browser.js("document.querySelector('.card .text span').title") == ""
    assert browser.faults() == []


@pytest.mark.parametrize(
    "state, count",
    [
        ("step=3", 2),
        ("step=3-5", 6),
        ("step=29-", 4),
        ("sample_id=2", 17),
        ("answer=right", 62),
        ("answer=wrong", 61),
        ("truncated=yes", 1),
        ("truncated=no", 63),
        ("consistent=yes", 1),
        ("consistent=no", 2),
        ("truncated=yes&answer=right", 0),
        ("source=eval&answer=wrong", 1),
        ("step=3&answer=right&sample_id=3", 2),
        ("step=99", 0),
    ],
)
def test_filters(browser, page, state, count):
    """Over the whole set, all at once; a completion meets all that is asked of it.

    The form shows what the address asks for.
    """
    state = state.replace("source=eval", f"source={page.parent}/eval validation_L3")
    browser.open(page, "#" + state.replace(" ", "%20"))
    [shown] = browser.texts("#count")
    if count:
        assert shown == f"prompts 1–{min(20, count)} of {count}"
    else:
        assert shown == "no such prompt"

    values = browser.js("[...new FormData(document.forms[0])].filter(([, value]) => value)")
    assert dict(values) == dict(part.split("=") for part in state.split("&"))
    assert browser.faults() == []


@pytest.mark.parametrize(
    "state, count", [("", 7), ("answer=mixed", 2), ("answer=right", 5), ("answer=wrong", 4)]
)
def test_models_on_the_page(browser, models, state, count):
    """Each response has its model's name and its mark; `mixed` asks where models differ."""
    browser.open(models, f"#{state}")
    assert browser.texts("#count") == [f"prompts 1–{count} of {count}"]
    heads = browser.texts("article:first-of-type .card b")
    assert heads == ["✗ wrong: B", "✓ right: A", "✗ wrong: C"]
    names = browser.texts("article:first-of-type .card .soft")
    expected = ["base", "grpo · fits its thinking", "grpo"]
    assert names == [f"{models.parent}/{name}" for name in expected]

    tops = browser.js(
        "[...document.querySelectorAll('article:first-of-type .card')]"
        ".map(card => card.getBoundingClientRect().top)"
    )
    assert len(set(tops)) == 1
    if not state:
        assert "gold A · failed · 1 of 1 right" in browser.texts("article h3")[1]
        assert browser.texts(".asked .text")[1].endswith(f"{models.parent}/base: unreadable")
    assert browser.faults() == []


def test_form_and_pages(browser, page):
    """Next and previous turn pages; what is typed and chosen in the form filters.

    It filters from the first page, and is in the address.
    """
    browser.open(page)
    browser.js("document.querySelector('#next').click()")
    assert browser.texts("#count") == ["prompts 21–40 of 64"]

    browser.js("document.forms[0].elements.sample_id.focus()")
    browser("Input.insertText", text="2")
    browser.js("new Promise(done => setTimeout(done, 50))")
    assert browser.texts("#count") == ["prompts 1–17 of 17"]
    assert browser.js("location.hash") == "#sample_id=2"
    for button in ("#previous", "#next"):
        assert browser.js(f"document.querySelector('{button}').disabled")
    assert browser.js("document.querySelectorAll('article img').length") > 2
    assert browser.faults() == []
    assert browser.js("[...document.images].every(image => image.naturalWidth > 0)")


def test_hover_reads_out_every_chart(browser, page):
    """Mouse, arrow keys and address show the nearest step's values in all charts.

    When the mouse has left, they show the last step's.
    """

    def reading(title):
        return next(text for text in browser.texts(".charts .card") if text.startswith(title))

    browser.open(page, "#hover=12")
    assert "step 12" in reading("Reward")
    assert "0.4" in reading("Reward")
    assert "0.12" in reading("KL")
    assert "step 10" in reading("Held-out")  # its last

    # Step 7 in a plot from 56 to 354 of 360, steps 1 to 30.
    box = browser.js("document.querySelector('.charts svg').getBoundingClientRect().toJSON()")
    x = box["x"] + box["width"] * (56 + (354 - 56) * 6 / 29) / 360
    y = box["y"] + box["height"] / 2
    browser("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    assert "step 7" in reading("Reward")
    assert "0.2333" in reading("Reward")
    assert "not finite" in reading("KL")
    visibility = "document.querySelector('.charts svg line').getAttribute('visibility')"
    assert browser.js(visibility) == "visible"

    browser.js("document.querySelector('.charts svg').focus()")
    browser("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight")
    assert "step 8" in reading("Reward")
    browser("Input.dispatchMouseEvent", type="mouseMoved", x=2, y=2)
    assert "step 30" in reading("Reward")
    assert browser.faults() == []


@pytest.mark.parametrize("scheme, background", [("light", (247, 247, 245)), ("dark", (20, 23, 26))])
def test_screenshot(browser, page, tmp_path, scheme, background):
    """The page is drawn, in the colours that the system prefers.

    It is a picture with its background and much beside it.
    """
    preference = dict(name="prefers-color-scheme", value=scheme)
    browser("Emulation.setEmulatedMedia", features=[preference])
    browser.open(page)
    path = tmp_path / f"{scheme}.png"
    path.write_bytes(base64.b64decode(browser("Page.captureScreenshot")["data"]))

    colours = sorted(Image.open(path).convert("RGB").getcolors(1 << 24), reverse=True)
    share = colours[0][0] / sum(count for count, _ in colours)
    # One of the two is the page's, the other the cards' on it.
    assert background in (colours[0][1], colours[1][1])
    assert len(colours) > 100
    assert 0.2 < share < 0.98


@pytest.mark.slow
def test_ten_thousand_rollouts_open_in_3_seconds(browser, tmp_path):
    """10,000 prompts with 8 completions each: from the click until the first page is drawn.

    The same again for a filter over all.
    """
    write(tmp_path / "metrics.jsonl", [dict(step=i, reward=0.5) for i in range(1, 1251)])
    long = completion(ids=[0, 1, 2] * 4, log_ratio=[0.1, -0.2, 0.3] * 4)
    row = json.dumps(rollout(0, 0, [long, completion("no", "B")] * 4))
    tail = row.removeprefix('{"step": 0, "sample_id": 0')
    with open(tmp_path / "rollouts.jsonl", "w") as f:
        for i in range(10_000):
            f.write(f'{{"step": {i // 8 + 1}, "sample_id": {i}{tail}\n')
    run = dict(data_root="nowhere", annotations="", model="nowhere")
    (tmp_path / "config.json").write_text(json.dumps(dict(run=run)))
    (tmp_path / "tokenizer.json").write_text(TOKENIZER)
    assert write_report(tmp_path).returncode == 0

    seconds = browser.open(tmp_path / "report.html")
    assert browser.texts("#count") == ["prompts 1–20 of 10000"]
    assert browser.faults() == []
    assert seconds < 3

    start = time.perf_counter()
    browser.js(
        "location.replace('#step=1250&answer=right'), "
        "new Promise(done => addEventListener('hashchange', done))"
    )
    assert browser.texts("#count") == ["prompts 1–8 of 8"]
    assert time.perf_counter() - start < 1
