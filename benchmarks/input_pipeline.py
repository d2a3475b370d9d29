"""How fast prompts are read at the paper's settings (16 frames and an image, 252 x 252): decoded, resized, cut into patches.

    python benchmarks/input_pipeline.py                               # on a clip it makes: 1080p, 30 s, 30 fps, H.264
    python benchmarks/input_pipeline.py --video FILE --step_seconds 9 # your own; is a step of 9 s kept waiting?
    python benchmarks/input_pipeline.py --train 12                    # and 12 steps of grpo_video.py on it: time_data in them

The clip needs PyAV (`pip install av`), which the scripts do not. The tokenizer and the configuration are the toy's.
Tables: where a sample's time goes; samples a second through VideoDataset and load_batches, by number of workers; other ways to
decode and to resize the same frames, and how far their pixels are off. Times are medians; torch has one thread, as in the workers.
--train runs grpo_video.py with its defaults on a random model of 26M parameters, whose steps are short as the paper's are not: what
it keeps from waiting, a larger one does too.
"""
import argparse, json, shutil, statistics, subprocess, sys, tempfile, time
from pathlib import Path

import decord
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoConfig, AutoTokenizer, Qwen2VLForConditionalGeneration

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import grpo_video as g  # noqa: E402

def make_clip(path, seconds=30, fps=30, height=1080, width=1920):
    """A textured plane that drifts, with grain on it: H.264 of 5 Mbit/s, and x264's default of a key frame every 250 frames."""
    try:
        import av
    except ImportError:
        sys.exit("input_pipeline.py: error: making the clip needs PyAV: `pip install av`, or give --video FILE")
    rng = np.random.default_rng(0)
    plane = Image.fromarray(rng.integers(0, 256, (68, 120, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    plane, grain = np.array(plane) // 2 + 60, rng.integers(0, 8, (height, width, 3), dtype=np.uint8)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=fps, options=dict(preset="veryfast"))
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = width, height, "yuv420p", 5_000_000
        for t in range(seconds * fps):
            frame = np.roll(plane, 3 * t, 1) + np.roll(grain, 17 * t, 0)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())

def clock(run, repetitions):
    """-> (median seconds, what run() returned)."""
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result

def ways_to_decode(path, indices, size):
    """{name: function -> uint8 frames [T, height, width, 3]}; the first is read_media's."""
    def reader(num_threads=1, **more):
        return decord.VideoReader(str(path), num_threads=num_threads, **more)

    def one_by_one(seek):
        video, frames = reader(), []
        for i in indices.tolist():
            getattr(video, seek)(i)
            frames.append(video.next().asnumpy())
        return np.stack(frames)

    def scan():
        video, frames = reader(), {}
        for i in range(len(video)):
            frame = video.next()
            if i in indices:
                frames[i] = frame.asnumpy()
        return np.stack([frames[i] for i in indices.tolist()])

    return {"get_batch (read_media)": lambda: reader().get_batch(indices).asnumpy(),
            "get_batch, num_threads=2": lambda: reader(2).get_batch(indices).asnumpy(),
            "get_batch, num_threads=0, decord's choice": lambda: reader(0).get_batch(indices).asnumpy(),
            "get_batch, decord resizes": lambda: reader(width=size, height=size).get_batch(indices).asnumpy(),
            "seek_accurate, next": lambda: one_by_one("seek_accurate"), "seek to a key frame, next": lambda: one_by_one("seek"),
            "next, through all frames": scan, "opening alone": lambda: len(reader())}

def ways_to_resize(frames, size):
    """{name: function -> uint8 [T, size, size, 3]} of frames [T, height, width, 3]; the first is read_media's."""
    def resize(z):
        return F.interpolate(z, (size, size), mode="bicubic", antialias=True).permute(0, 2, 3, 1)

    frames = torch.from_numpy(frames).permute(0, 3, 1, 2)
    return {"resize in fp32, frame by frame (read_media)": lambda: torch.cat(
                [resize(frame.float()).round().clamp(0, 255).byte() for frame in frames.split(1)]),
            "resize in fp32, all at once": lambda: resize(frames.float()).round().clamp(0, 255).byte(),
            "resize in uint8": lambda: resize(frames)}

def train(folder, video, image, steps):
    """Runs grpo_video.py for so many steps on the clip, at its defaults -> the rows of its metrics.jsonl."""
    shutil.copytree(ROOT / "toy/model", folder / "model")
    config = json.loads((file := folder / "model/config.json").read_text())
    config |= dict(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=1408)
    config["rope_scaling"]["mrope_section"] = [8, 12, 12]
    config["vision_config"] |= dict(depth=4, embed_dim=320, hidden_size=512)
    file.write_text(json.dumps(config))
    Qwen2VLForConditionalGeneration(AutoConfig.from_pretrained(folder / "model")).save_pretrained(folder / "model")
    for source in (video, image):
        (home := folder / "data" / ("videos" if source is video else "images") / "clip").mkdir(parents=True)
        shutil.copy(source, home)
    (folder / "data/annotations").mkdir()
    row = dict(question="What comes next?", golden_choice_idx="A", video_source="clip", video_basename=video.name,
               current_observation_basename=image.name, task_progress_metadata=[0], **{f"choice_{z}": z for z in "abcd"})
    g.append_rows(folder / "data/annotations/training_6k.jsonl", (row | dict(sample_id=i) for i in range(steps)))
    subprocess.run([sys.executable, ROOT / "grpo_video.py", "--model", folder / "model", "--data_root", folder / "data", "--output_dir",
                    folder / "run", "--max_steps", str(steps)], check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in open(folder / "run/metrics.jsonl")]

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", type=Path, help="anything decord reads; default: a clip made for this run")
    parser.add_argument("--samples", type=int, default=4, help="timed for each number of workers")
    parser.add_argument("--repetitions", type=int, default=3, help="of the other times")
    parser.add_argument("--step_seconds", type=float, nargs="+", default=[1, 2, 5, 10, 20], help="of a step less time_data")
    parser.add_argument("--train", type=int, default=0, help="steps of grpo_video.py to run on the clip; the first three warm up")
    args = parser.parse_args()
    if 0 < args.train < 4:
        parser.error(f"--train {args.train}: must be at least 4, as the first three steps warm up, or 0")
    if not (ROOT / "toy/model").is_dir():
        sys.exit("input_pipeline.py: error: there is no toy/model: python toy/make_toy.py builds it")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        video, image, c = args.video or Path(folder, "clip.mp4"), Path(folder, "now.png"), g.Config()
        if not args.video:
            make_clip(video)
        reader = decord.VideoReader(str(video), num_threads=1)
        indices = g.frame_indices(len(reader), reader.get_avg_fps(), c.fps, c.max_frames)
        Image.fromarray(reader[len(reader) - 1].asnumpy()).save(image)
        record = dict(domain="all", question="What comes next?", choices=["a", "b", "c", "d"], gold="A",
                      media=[("video", video), ("image", image)])
        records = [record | dict(sample_id=i) for i in range(args.samples + 2)]
        toy = [auto.from_pretrained(ROOT / "toy/model") for auto in (AutoTokenizer, AutoConfig)]
        data = g.VideoDataset(records, *toy, c)
        print(f"{len(reader)} frames of {reader[0].shape[1]}x{reader[0].shape[0]}, {reader.get_avg_fps():.0f} a second, "
              f"{len(reader.get_key_indices())} key frames; {len(indices)} frames are read")
        del reader
        decoded = {name: clock(way, args.repetitions) for name, way in ways_to_decode(video, indices, data.size).items()}
        decode, frames = next(iter(decoded.values()))
        resized = {name: clock(way, args.repetitions) for name, way in ways_to_resize(frames, data.size).items()}
        resize, small = next(iter(resized.values()))
        cut, _ = clock(lambda: g.to_patches(small, data.vision), args.repetitions)
        still, _ = clock(lambda: g.read_media("image", image, data.size, c.fps, c.max_frames), args.repetitions)
        whole, _ = clock(lambda: data[0], args.repetitions)
        rest = whole - decode - resize - cut - still
        print("\n| part | ms | share | frames/s |\n|---|---|---|---|")
        for name, seconds in {"decode": decode, "resize": resize, "cut into patches": cut, "image": still, "the rest": rest,
                              "a sample": whole}.items():
            print(f"| {name} | {1000 * seconds:.0f} | {seconds / whole:.1%} | {len(indices) / seconds:.0f} |")
        print("\n| workers | samples/s | frames/s |\n|---|---|---|")
        for workers in (0, 1, 2):
            # A new dataset: the last one has a decoding child by now, which forked workers must not share.
            data, count = g.VideoDataset(records, *toy, c), args.samples + max(1, workers)
            batches = iter(g.load_batches(data, [[i] for i in range(count)], workers))
            for _ in range(max(1, workers)):  # each worker's first sample starts its processes
                next(batches)
            start = time.perf_counter()
            if errors := [sample["error"] for batch in batches for sample in batch if "error" in sample]:
                sys.exit(f"input_pipeline.py: error: {errors[0]}")
            rate = args.samples / (time.perf_counter() - start)
            print(f"| {workers} | {rate:.2f} | {rate * len(indices):.0f} |")
        print("\n| way | ms | pixels off by at most |\n|---|---|---|")
        for name, (seconds, result) in {**decoded, **resized}.items():
            standard = {z.shape: z for z in (frames, small.numpy())}.get(np.shape(result))
            off = "" if standard is None else abs(np.asarray(result).astype(int) - standard).max()
            print(f"| {name} | {1000 * seconds:.0f} | {off} |")
        workers = c.dataloader_num_workers
        print(f"\nTime waiting with {workers} workers, max(0, {whole:.2f} s / {workers} - step): " + ", ".join(
            f"{max(0, whole / workers - step) / step:.0%} of a step of {step:g} s" for step in args.step_seconds))
        if args.train:
            rows = train(Path(folder), video, image, args.train)[3:]
            waited, total = (sum(row[key] for row in rows for key in row if key.startswith(name)) for name in ("time_data", "time_"))
            print(f"\nTrained: {len(rows)} steps of {total / len(rows):.1f} s, {waited / total:.2%} of it waiting for data (time_data)")

if __name__ == "__main__":
    main()
