"""How fast prompts are read at the paper's settings: 16 frames and an image, 252 x 252.

They are decoded, resized and cut into patches.

    python benchmarks/input_pipeline.py   # on a clip it makes: 1080p, 30 s, 30 fps, H.264
    python benchmarks/input_pipeline.py --video FILE --step_seconds 9
                                          # your own; is a step of 9 s kept waiting?
    python benchmarks/input_pipeline.py --train 12
                                          # and 12 steps of grpo_video.py on it: time_data in them
    python benchmarks/input_pipeline.py --readers
                                          # PyAV beside decord: 480p, 1080p, 10 minutes

The tokenizer and the configuration are the toy's.

Tables: where a sample's time goes; samples a second through VideoDataset and load_batches, by
number of workers; other ways to decode and to resize the same frames, and how far their pixels are
off. Times are medians; torch has one thread, as in the workers.

--readers reads clips of 30 s at 480p and 1080p, and one of 10 minutes at 1080p, by each reader in a
process of its own, in turn: CPU seconds, and the growth of the peak memory.

--train runs grpo_video.py with its defaults on a random model of 26M parameters, whose steps are
short as the paper's are not: what it keeps from waiting, a larger one does too.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import av
import decord
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoConfig, AutoTokenizer, Qwen2VLForConditionalGeneration

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import grpo_video as g  # noqa: E402


def fail(problem):
    sys.exit(f"input_pipeline.py: error: {problem}")


def make_clip(path, seconds=30, fps=30, height=1080, width=1920):
    """A textured plane that drifts, with grain on it: H.264 of 5 Mbit/s.

    A key frame comes every 250 frames, which is x264's default.
    """
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (68, 120, 3), dtype=np.uint8))
    plane = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC)) // 2 + 60
    grain = rng.integers(0, 8, (height, width, 3), dtype=np.uint8)

    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=fps, options=dict(preset="veryfast"))
        stream.width = width
        stream.height = height
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 5_000_000
        for t in range(seconds * fps):
            frame = np.roll(plane, 3 * t, 1) + np.roll(grain, 17 * t, 0)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())


def repeat_clip(source, path, times):
    """The clip so many times in a row, without coding it again."""
    with av.open(str(source)) as clip:
        stream = clip.streams.best("video")
        packets = [packet for packet in clip.demux(stream) if packet.size]
        length = stream.duration
        with av.open(str(path), "w") as file:
            copy = file.add_stream_from_template(stream)
            for n in range(times):
                for packet in packets:
                    again = av.Packet(bytes(packet))
                    again.pts = packet.pts + n * length
                    again.dts = packet.dts + n * length
                    again.time_base = packet.time_base
                    again.is_keyframe = packet.is_keyframe
                    again.stream = copy
                    file.mux(again)


READ_ONCE = """
import resource, sys, time
sys.path.insert(0, sys.argv[1])
import grpo_video as g
import torch
torch.set_num_threads(1)
g.read_media("video", sys.argv[2], 252, 2.0, 16, sys.argv[4])  # a small clip, to warm up
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.process_time()
g.read_media("video", sys.argv[3], 252, 2.0, 16, sys.argv[4])
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
print(time.process_time() - start, grown / 1024)
"""


def compare_readers(folder, repetitions):
    """Prints the CPU seconds and the memory of PyAV and of decord, clip by clip."""
    small = folder / "small.mp4"
    make_clip(small, seconds=1, height=64, width=64)
    clips = {}
    for height, width in ((480, 854), (1080, 1920)):
        name = f"{height}p, 30 s"
        clips[name] = folder / f"{height}.mp4"
        make_clip(clips[name], height=height, width=width)
    clips["1080p, 10 min"] = folder / "long.mp4"
    repeat_clip(clips["1080p, 30 s"], clips["1080p, 10 min"], 20)

    print(
        "\n| clip | PyAV, CPU s | decord, CPU s | PyAV, MiB | decord, MiB |\n|---|---|---|---|---|"
    )
    for name, clip in clips.items():
        found = dict(pyav=[], decord=[])
        for _ in range(repetitions):
            for reader, results in found.items():
                command = [sys.executable, "-c", READ_ONCE, ROOT, small, clip, reader]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                results.append([float(word) for word in done.stdout.split()])
        (ours, our_mib), (theirs, their_mib) = np.median(list(found.values()), axis=1)
        print(f"| {name} | {ours:.2f} | {theirs:.2f} | {our_mib:.0f} | {their_mib:.0f} |")


def clock(run, repetitions):
    """-> (median seconds, what run() returned)."""
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


def clock_all(ways, repetitions):
    """ways {name: function} -> {name: (median seconds, what it returned)}."""
    return {name: clock(way, repetitions) for name, way in ways.items()}


def ways_to_decode(path, indices, c, size):
    """{name: function -> uint8 frames [T, height, width, 3]}; the first is read_media's."""

    def reader(num_threads=1, **more):
        return decord.VideoReader(str(path), num_threads=num_threads, **more)

    return {
        "read_video (read_media)": lambda: g.read_video(path, c.fps, c.max_frames),
        "its packets alone": lambda: len(g.timeline(path)[0]),
        "decord, get_batch": lambda: reader().get_batch(indices).asnumpy(),
        "decord, num_threads=2": lambda: reader(2).get_batch(indices).asnumpy(),
        "decord, num_threads=0, its choice": lambda: reader(0).get_batch(indices).asnumpy(),
        "decord resizes": lambda: reader(width=size, height=size).get_batch(indices).asnumpy(),
        "decord, opening alone": lambda: len(reader()),
    }


def ways_to_resize(frames, size):
    """{name: function -> uint8 [T, size, size, 3]} of frames [T, height, width, 3].

    The first is read_media's.
    """
    frames = torch.from_numpy(frames).permute(0, 3, 1, 2)

    def resize(z):
        return F.interpolate(z, (size, size), mode="bicubic", antialias=True).permute(0, 2, 3, 1)

    def in_fp32(z):
        return resize(z.float()).round().clamp(0, 255).byte()

    def frame_by_frame():
        return torch.cat([in_fp32(frame) for frame in frames.split(1)])

    return {
        "resize in fp32, frame by frame (read_media)": frame_by_frame,
        "resize in fp32, all at once": lambda: in_fp32(frames),
        "resize in uint8": lambda: resize(frames),
    }


# ---- A run of grpo_video.py ----


def make_model(folder):
    """A random model of 26M parameters with the toy's tokenizer."""
    shutil.copytree(ROOT / "toy/model", folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config |= dict(
        hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=1408
    )
    config["rope_scaling"]["mrope_section"] = [8, 12, 12]
    config["vision_config"] |= dict(depth=4, embed_dim=320, hidden_size=512)
    file.write_text(json.dumps(config))
    model = Qwen2VLForConditionalGeneration(AutoConfig.from_pretrained(folder))
    model.save_pretrained(folder)


def make_data(root, video, image, samples):
    """A data root whose training samples all are the same clip and image."""
    for source, kind in ((video, "videos"), (image, "images")):
        (root / kind / "clip").mkdir(parents=True)
        shutil.copy(source, root / kind / "clip")

    row = dict(
        question="What comes next?",
        golden_choice_idx="A",
        video_source="clip",
        video_basename=video.name,
        current_observation_basename=image.name,
        task_progress_metadata=[0],
        **{f"choice_{letter}": letter for letter in "abcd"},
    )
    (root / "annotations").mkdir()
    rows = [row | dict(sample_id=i) for i in range(samples)]
    g.append_rows(root / "annotations/training_6k.jsonl", rows)


def train(folder, video, image, steps):
    """Runs grpo_video.py for so many steps on the clip, at its defaults -> its metrics' rows."""
    make_model(folder / "model")
    make_data(folder / "data", video, image, steps)

    flags = {
        "model": folder / "model",
        "data_root": folder / "data",
        "output_dir": folder / "run",
        "max_steps": steps,
    }
    command = [sys.executable, str(ROOT / "grpo_video.py")]
    for flag, value in flags.items():
        command += [f"--{flag}", str(value)]

    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in open(folder / "run/metrics.jsonl")]


# ---- The tables ----


def make_records(video, image, count):
    """Records as load_records', of the same clip and image."""
    record = dict(
        domain="all",
        question="What comes next?",
        choices=["a", "b", "c", "d"],
        gold="A",
        media=[("video", video), ("image", image)],
    )
    return [record | dict(sample_id=i) for i in range(count)]


def open_clip(video, image, c):
    """Describes the clip, and writes its last frame as the image -> indices of the frames read."""
    times, keys, rate, _ = g.timeline(video)
    indices = g.frame_indices(len(times), rate, c.fps, c.max_frames)
    frames = g.read_video(video, c.fps, c.max_frames)
    Image.fromarray(frames[-1]).save(image)
    height, width = frames.shape[1:3]
    print(
        f"{len(times)} frames of {width}x{height}, {rate:.0f} a second, {keys} key frames; "
        f"{len(indices)} frames are read"
    )
    return indices


def print_parts(parts, whole, frames):
    """parts {name: seconds} of a sample that takes `whole` seconds and has so many frames."""
    rest = whole - sum(parts.values())
    print("\n| part | ms | share | frames/s |\n|---|---|---|---|")
    for name, seconds in {**parts, "the rest": rest, "a sample": whole}.items():
        share = f"{seconds / whole:.1%}"
        print(f"| {name} | {1000 * seconds:.0f} | {share} | {frames / seconds:.0f} |")


def print_rates(make_dataset, samples, frames):
    """Samples a second of load_batches, by number of workers; a sample has so many frames."""
    print("\n| workers | samples/s | frames/s |\n|---|---|---|")
    for workers in (0, 1, 2):
        data = make_dataset(workers)  # load_batches stops its processes at the end
        warm_up = max(1, workers)  # each process is started by its first sample
        positions = [[i] for i in range(samples + warm_up)]
        batches = iter(g.load_batches(data, positions, workers))
        for _ in range(warm_up):
            next(batches)

        start = time.perf_counter()
        for [sample] in batches:
            if "error" in sample:
                fail(sample["error"])
        rate = samples / (time.perf_counter() - start)
        print(f"| {workers} | {rate:.2f} | {rate * frames:.0f} |")


def print_ways(ways, standards):
    """ways {name: (seconds, result)}; a result's standard is the one of its shape."""
    by_shape = {standard.shape: standard for standard in standards}
    print("\n| way | ms | pixels off by at most |\n|---|---|---|")
    for name, (seconds, result) in ways.items():
        standard = by_shape.get(np.shape(result))
        off = ""
        if standard is not None:
            off = abs(np.asarray(result).astype(int) - standard).max()
        print(f"| {name} | {1000 * seconds:.0f} | {off} |")


def print_waiting(whole, workers, steps):
    """What share of steps of so many seconds waits for samples that take `whole` seconds each."""
    shares = []
    for step in steps:
        waiting = max(0, whole / workers - step)
        shares.append(f"{waiting / step:.0%} of a step of {step:g} s")
    formula = f"max(0, {whole:.2f} s / {workers} - step)"
    print(f"\nTime waiting with {workers} workers, {formula}: {', '.join(shares)}")


def print_trained(rows):
    """rows of metrics.jsonl -> how long their steps took, and what of it was time_data."""
    waited = total = 0
    for row in rows:
        waited += row["time_data"]
        total += sum(value for key, value in row.items() if key.startswith("time_"))
    print(
        f"\nTrained: {len(rows)} steps of {total / len(rows):.1f} s, "
        f"{waited / total:.2%} of it waiting for data (time_data)"
    )


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--video", type=Path, help="a video; default: a clip made for this run")
    add("--readers", action="store_true", help="compare PyAV and decord, and nothing else")
    add("--samples", type=int, default=4, help="timed for each number of workers")
    add("--repetitions", type=int, default=3, help="of the other times")
    add(
        "--step_seconds",
        type=float,
        nargs="+",
        default=[1, 2, 5, 10, 20],
        help="of a step less time_data",
    )
    add(
        "--train",
        type=int,
        default=0,
        help="steps of grpo_video.py to run on the clip; the first three warm up",
    )
    args = parser.parse_args()

    if 0 < args.train < 4:
        parser.error(
            f"--train {args.train}: must be at least 4, as the first three steps warm up, or 0"
        )
    return args


def main():
    args = parse_arguments()
    if not (ROOT / "toy/model").is_dir():
        fail("there is no toy/model: python toy/make_toy.py builds it")
    torch.set_num_threads(1)
    c = g.Config()
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy/model")
    config = AutoConfig.from_pretrained(ROOT / "toy/model")

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        video = args.video or folder / "clip.mp4"
        image = folder / "now.png"
        if args.readers:
            return compare_readers(folder, args.repetitions)
        if not args.video:
            make_clip(video)
        indices = open_clip(video, image, c)
        records = make_records(video, image, args.samples + 2)

        def make_dataset(workers):
            settings = replace(c, dataloader_num_workers=workers)
            return g.VideoDataset(records, tokenizer, config, settings)

        data = make_dataset(1)
        decoded = clock_all(ways_to_decode(video, indices, c, data.size), args.repetitions)
        decode, frames = next(iter(decoded.values()))
        resized = clock_all(ways_to_resize(frames, data.size), args.repetitions)
        resize, small = next(iter(resized.values()))
        cut, _ = clock(lambda: g.to_patches(small), args.repetitions)
        still, _ = clock(
            lambda: g.read_media("image", image, data.size, c.fps, c.max_frames), args.repetitions
        )
        whole, _ = clock(lambda: data[0], args.repetitions)

        parts = {"decode": decode, "resize": resize, "cut into patches": cut, "image": still}
        print_parts(parts, whole, len(indices))
        print_rates(make_dataset, args.samples, len(indices))
        print_ways(decoded | resized, (frames, small.numpy()))
        print_waiting(whole, c.dataloader_num_workers, args.step_seconds)
        if args.train:
            # The first three steps warm up.
            print_trained(train(folder, video, image, args.train)[3:])


if __name__ == "__main__":
    main()
