"""Strips of the sampled frames of a training run's questions, for the report.

The report decodes no video itself.

    python tools/frames.py runs/toy-grpo     # writes runs/toy-grpo/frames/<sample_id>.png

Of the first 200 samples; --samples says otherwise. The frames are those that the model saw: by the
run's own settings, in the size that VideoDataset takes.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from pebble import ProcessExpired
from PIL import Image
from tqdm import tqdm
from transformers import AutoConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo_video as g


def main():
    args = parse_arguments()
    rollouts = args.run / "rollouts.jsonl"
    if not (rollouts.is_file() and (args.run / "config.json").is_file()):
        g.fail(
            f"{args.run}: holds no rollouts.jsonl and config.json, as a run of grpo_video.py does"
        )

    # The run's settings and its questions.
    config = AutoConfig.from_pretrained(args.run)
    known = g.Config.__dataclass_fields__
    c = g.Config(**{key: value for key, value in config.run.items() if key in known})
    root = Path(c.data_root)
    annotations = Path(c.annotations or root / "annotations/training_6k.jsonl")
    records = {record["sample_id"]: record for record in g.load_records(annotations, root)}
    videos = {}
    for name in first_samples(rollouts, args.samples):
        paths = [path for kind, path in records[name]["media"] if kind == "video"]
        if paths:
            videos[name] = paths

    folder = args.run / "frames"
    folder.mkdir(exist_ok=True)
    size = g.VideoDataset([], None, config, c).size
    write_strips(videos, folder, size, c)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument(
        "--samples",
        type=int,
        default=200,
        help="how many, in the order in which they come in rollouts.jsonl",
    )
    return parser.parse_args()


def first_samples(rollouts, count):
    """-> the first `count` sample_ids in rollouts.jsonl, each once."""
    lines = rollouts.read_bytes().split(b"\n")[:-1]  # a kill may have left half a line at the end
    names = [json.loads(line)["sample_id"] for line in lines]
    return list(dict.fromkeys(names))[:count]


def write_strips(videos, folder, size, c):
    """{sample_id: its videos} -> a picture of each sample, several at a time.

    What cannot be decoded is reported, and the rest goes on."""
    pool = g.decoding_pool(c.dataloader_num_workers)
    strips = []
    for name, paths in videos.items():
        wanted = (folder / f"{name}.png", paths, size, c.fps, c.max_frames, c.video_reader)
        strips.append(pool.schedule(write_strip, wanted, timeout=c.decode_timeout))

    for name, strip in zip(tqdm(videos, desc="samples"), strips):
        try:
            problem = strip.result()
        except TimeoutError:
            problem = f"decoding took over {c.decode_timeout} s"
        except ProcessExpired as error:
            problem = f"decoder died with exit code {error.exitcode}"
        if problem:
            tqdm.write(f"sample_id {name}: {videos[name][0]}: {problem}", file=sys.stderr)
    pool.stop()
    pool.join()


def write_strip(picture, videos, *how):
    """Writes the videos' frames side by side, read as `how` says -> what went wrong, or None."""
    try:
        frames = [g.read_media("video", path, *how) for path in videos]
    except Exception as error:  # whatever a decoder raises is this sample's failure
        return f"{type(error).__name__}: {error}".splitlines()[0]
    pixels = torch.cat(tuple(torch.cat(frames)), dim=1)  # [size, T * size, 3]
    Image.fromarray(pixels.numpy()).save(picture)


if __name__ == "__main__":
    main()
