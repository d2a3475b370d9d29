"""Every frame is the frame that was asked for: videos and images of all kinds, and what is refused.

The clips of tests/media carry their frames' numbers; truth.json holds the numbers that each shows,
in the order of display. Others are made here by PyAV.
"""

import ast
import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numbered
import numpy as np
import pytest
import torch
from PIL import Image

import grpo_video as g
from test_smoke import ROOT

MEDIA = Path(__file__).resolve().parent / "media"
TRUTH = json.loads((MEDIA / "truth.json").read_text())
SIZE = (192, 128)


def numbers(frames):
    return [numbered.read(frame)[0] for frame in frames]


def make_video(path, count=60, size=SIZE, codec="libx264", rate=30, first=0, **options):
    """Writes numbered frames as a video -> path. `options` are FFmpeg's, "x" for "_"."""
    pixels = dict(gif="rgb8", rawvideo="bgr24").get(codec, "yuv420p")
    with av.open(str(path), "w", options=options.pop("container", {})) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height = size
        stream.pix_fmt = pixels
        for place in range(count):
            picture = numbered.frame(first + place, *size)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = place
            frame.time_base = Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def make_sound(path, seconds=5):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        for start in range(0, 16000 * seconds, 1024):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            silence.sample_rate = 16000
            silence.pts = start
            container.mux(stream.encode(silence))
        container.mux(stream.encode())
    return path


# ---- Frames by their place in the order of display -----------------------------------------------
CLIPS = [name for name in TRUTH if name != "trunc.mkv"]


@pytest.mark.parametrize("fps, max_frames", [(2.0, 16), (0.1, 4), (7.0, 1000)])
@pytest.mark.parametrize("name", CLIPS)
def test_every_frame_is_the_one_that_was_asked_for(name, fps, max_frames):
    """Trap 22: edit lists, open groups of pictures, B-frames, packed streams, other frame rates."""
    shown = TRUTH[name]["numbers"]
    indices = g.frame_indices(len(shown), TRUTH[name]["fps"], fps, max_frames)
    frames = g.read_video(MEDIA / name, fps, max_frames)
    assert numbers(frames) == [shown[index] for index in indices]


def test_a_turned_video_is_upright_and_small_ones_are_read():
    """rot90.mp4 is stored lying, and is to be shown a quarter turn against the clock."""
    frame = g.read_video(MEDIA / "rot90.mp4", 2.0, 4)[0]
    assert frame.shape == (192, 128, 3)
    assert numbered.read(frame) == (0, 3)

    assert g.read_video(MEDIA / "72x72.mp4", 2.0, 4).shape == (4, 72, 72, 3)
    assert g.read_media("video", MEDIA / "72x72.mp4", 56, 2.0, 4).shape == (4, 56, 56, 3)


KINDS = {
    "raw.h264": {},
    "stream.ts": dict(codec="mpeg2video", bf="2", rate=25),
    "program.mpg": dict(codec="mpeg2video", bf="2", rate=25),
    "old.wmv": dict(codec="wmv2"),
    "b_frames.mp4": dict(codec="mpeg4", bf="2"),
    "open.mp4": {"x264-params": "open-gop=1:keyint=15:bframes=3"},
    "open.mkv": {"x264-params": "open-gop=1:keyint=15:bframes=3"},
    "web.webm": dict(codec="libvpx-vp9", deadline="realtime"),
    "moving.gif": dict(codec="gif", rate=10),
    "eight.mp4": dict(size=(8, 8)),
    "sixteen.mp4": dict(size=(16, 8)),
    "one.mp4": dict(count=1),
    "one.mkv": dict(count=1),
    "two.mp4": dict(count=2),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_files(tmp_path, name):
    """Codecs and containers of all kinds, from 8 pixels and one frame up."""
    options = dict(KINDS[name])
    path = make_video(tmp_path / name, **options)

    count = options.get("count", 60)
    rate = 25 if name == "raw.h264" else options.get("rate", 30)  # such a stream has no times
    indices = g.frame_indices(count, rate, 2.0, 16)
    frames = g.read_video(path, 2.0, 16)
    if "size" in options:
        assert frames.shape == (4, *options["size"][::-1], 3)
    else:
        assert numbers(frames) == indices.tolist()


@pytest.mark.parametrize("name", ["long.mp4", "long.mkv", "long.avi", "long.ts"])
def test_long_videos_are_sought(tmp_path, monkeypatch, name):
    """Over 1,000 frames and with key frames between the wanted ones, the rest is not decoded.

    What cannot be sought (a transport stream) is counted.
    """
    options = {"x264-params": "open-gop=1:keyint=24:bframes=3"}
    if name == "long.avi":
        options = dict(codec="mpeg4", g="24")
    path = make_video(tmp_path / name, 1200, (48, 32), **options)
    decoded = []
    original = g.decoded

    def count(*args):
        for frame in original(*args):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(g, "decoded", count)
    frames = g.read_video(path, 2.0, 16)
    assert numbers(frames) == g.frame_indices(1200, 30, 2.0, 16).tolist()
    if name != "long.ts":
        assert len(decoded) < 16 * 30


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_time_that_disagrees_is_counted(tmp_path, monkeypatch, shift):
    """A frame of another time than the packets promise is never taken: all are counted instead."""
    path = make_video(tmp_path / "long.mp4", 1200, (48, 32), g="24")
    original = g.decoded
    counted = []

    def wrong(path, start=None):
        if start is None:
            counted.append(path)
        for frame in original(path, start):
            if start is not None:
                frame.pts += shift
            yield frame

    monkeypatch.setattr(g, "decoded", wrong)
    frames = g.read_video(path, 2.0, 16)
    assert counted == [path]
    assert numbers(frames) == g.frame_indices(1200, 30, 2.0, 16).tolist()


def test_fewer_frames_than_promised_are_counted_anew(monkeypatch):
    """Of 300 promised frames 280 come: the sampled ones are spread over these."""
    original = g.decoded

    def cut(path, start=None):
        for place, frame in enumerate(original(path, start)):
            if place < 280:
                yield frame

    monkeypatch.setattr(g, "decoded", cut)
    frames = g.read_video(MEDIA / "open_gop.mkv", 2.0, 16)
    assert numbers(frames) == g.frame_indices(280, 30, 2.0, 16).tolist()


@pytest.mark.parametrize("name", ["still.mp4", "still.mkv"])
def test_a_last_frame_may_stay_long(tmp_path, name):
    """20 of 22 s show the last frame: that is no file that was cut off."""
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream("libx264", rate=30, options=dict(bf="0"))
        stream.width, stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        packets = []
        for place in range(60):
            frame = av.VideoFrame.from_ndarray(numbered.frame(place, *SIZE), format="rgb24")
            frame.pts = place
            frame.time_base = Fraction(1, 30)
            packets += stream.encode(frame)
        packets += stream.encode()
        packets[-1].duration = 20 * 30
        for packet in packets:
            container.mux(packet)

    frames = g.read_video(tmp_path / name, 2.0, 16)
    assert numbers(frames)[-1] == 59


# ---- What is refused -----------------------------------------------------------------------------
def cut_in_half(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def two_sizes(path):
    """A transport stream that goes on in another size."""
    first = make_video(path.with_name("1.ts"))
    second = make_video(path.with_name("2.ts"), size=(240, 160))
    path.write_bytes(first.read_bytes() + second.read_bytes())
    return path


def damaged(path):
    """Zeros in place of the second half of the pictures."""
    make_video(path, 300, **{"x264-params": "keyint=30"})
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) * 3 // 4] = bytes(len(data) // 4)
    path.write_bytes(data)
    return path


REFUSED = {
    "cut off": (lambda path: MEDIA / "trunc.mkv", r"cut off: 10\.0 of about 20\.0 s decode"),
    "cut off, its index first": (
        lambda path: cut_in_half(
            make_video(path.with_suffix(".mp4"), 600, container=dict(movflags="faststart"))
        ),
        r"cut off: \d\.\d of about 20\.0 s decode",
    ),
    "damaged": (lambda path: damaged(path.with_suffix(".mp4")), r"cut off: .* 10\.0 s decode"),
    "cut off before its index": (
        lambda path: cut_in_half(make_video(path.with_suffix(".mp4"), 300)),
        "Invalid data found",
    ),
    "sound alone": (lambda path: make_sound(path.with_suffix(".mp4")), "holds no video"),
    "two sizes": (lambda path: two_sizes(path.with_suffix(".ts")), "its frames change their size"),
}


@pytest.mark.parametrize("make, words", REFUSED.values(), ids=REFUSED)
def test_what_is_refused(tmp_path, make, words):
    """One clear line, and never another frame."""
    path = make(tmp_path / "clip")
    found, problem = g.decode([("video", path)], 56, 2.0, 16)
    assert found is None
    assert "\n" not in problem
    with pytest.raises((ValueError, av.FFmpegError), match=words):
        g.read_video(path, 2.0, 16)


def test_nothing_decodes(tmp_path, monkeypatch):
    monkeypatch.setattr(g, "decoded", lambda path, start=None: iter(()))
    with pytest.raises(ValueError, match="no frame of it decodes"):
        g.read_video(MEDIA / "live_vp8.webm", 2.0, 16)


# ---- Images --------------------------------------------------------------------------------------
def test_an_image_is_turned_as_its_exif_says():
    """exif6.jpg is to be shown a quarter turn with the clock."""
    picture = np.array(g.read_image(MEDIA / "exif6.jpg"))
    assert picture.shape == (192, 128, 3)
    assert numbered.read(picture) == (1234, 1)


def test_16_bit_grey_keeps_its_brightness():
    stored = np.array(Image.open(MEDIA / "gray16.png"))
    picture = np.array(g.read_image(MEDIA / "gray16.png"))
    assert stored.max() == 65535
    assert np.array_equal(picture, np.repeat((stored >> 8)[..., None], 3, axis=2))


def test_a_damaged_png_is_an_error(tmp_path):
    """Not a picture that is black from there on."""
    _, problem = g.decode([("image", MEDIA / "png_crc.png")], 56, 2.0, 16)
    assert "broken PNG file" in problem

    image = Image.fromarray(numbered.frame(7, *SIZE))
    for name in ("good.png", "good.jpg", "good.webp"):
        image.save(tmp_path / name)
        assert numbered.read(np.array(g.read_image(tmp_path / name))) == (7, 0)


# ---- The released run's reader -------------------------------------------------------------------
def test_decord_is_an_option(tmp_path):
    """On an ordinary file its pixels are PyAV's; on an edit list its frames are others (trap 22).

    It is imported only where it is asked for.
    """
    pytest.importorskip("decord")
    path = make_video(tmp_path / "plain.mp4")
    ours = g.read_media("video", path, 56, 2.0, 16)
    assert torch.equal(g.read_media("video", path, 56, 2.0, 16, "decord"), ours)

    path = MEDIA / "el_8.mp4"
    ours = g.read_media("video", path, 112, 2.0, 16)
    theirs = g.read_media("video", path, 112, 2.0, 16, "decord")
    assert numbers(ours.numpy()) != numbers(theirs.numpy())

    for script in ("grpo_video.py", "sft_video.py", "eval_video.py"):
        body = ast.parse((ROOT / script).read_text()).body
        imports = [node for node in body if isinstance(node, ast.Import)]
        assert "decord" not in [alias.name for node in imports for alias in node.names]


# ---- Leaks ---------------------------------------------------------------------------------------
DECODE_MANY = """
import gc, json, os, resource, sys
sys.path[:0] = sys.argv[1:3]
import grpo_video as g
from pathlib import Path

files = [Path(name) for name in json.loads(sys.argv[3])]
kinds = ["image" if f.suffix in (".png", ".jpg") else "video" for f in files]

def state():
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return len(os.listdir("/proc/self/fd")), pages * resource.getpagesize() / 2**20

states = []
for n in range(2000):
    if n in (200, 1999):
        states.append(state())
    place = n % len(files)
    g.decode([(kinds[place], files[place])], 56, 0.5, 4)
print(json.dumps(states))
"""


@pytest.mark.slow
def test_2000_decodes_leave_nothing_behind(tmp_path):
    """Files of all kinds, good and bad: open files and memory stay where they were."""
    (tmp_path / "text.mp4").write_bytes(b"no video\n" * 99)
    long = make_video(tmp_path / "long.mkv", 1200, (48, 32), g="24")
    files = [str(path) for path in MEDIA.iterdir() if path.suffix != ".json"]
    files += [str(long), str(tmp_path / "text.mp4"), str(tmp_path / "none.avi")]
    command = [sys.executable, "-c", DECODE_MANY, ROOT, MEDIA.parent, json.dumps(files)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    (files_before, memory_before), (files_after, memory_after) = json.loads(done.stdout)
    assert files_after == files_before
    assert memory_after < memory_before + 20, "MiB"
