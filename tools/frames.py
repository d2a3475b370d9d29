"""Strips of the sampled frames of a training run's questions, for the report.

The report decodes no video itself.

    python tools/frames.py runs/toy-grpo     # writes runs/toy-grpo/frames/<sample_id>.png

Of the first 200 samples; --samples says otherwise. The frames are those that the model saw:
read_media's, by the run's own settings.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo_video as g


def run_settings(config):
    """The run's config.json -> its grpo_video.Config."""
    saved = json.loads(config.read_text())["run"]
    known = g.Config.__dataclass_fields__
    return g.Config(**{key: value for key, value in saved.items() if key in known})


def first_samples(rollouts, count):
    """-> the first `count` sample_ids in rollouts.jsonl, each once."""
    lines = rollouts.read_bytes().split(b"\n")[:-1]  # a kill may have left half a line at the end
    names = [json.loads(line)["sample_id"] for line in lines]
    return list(dict.fromkeys(names))[:count]


def main():
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
    args = parser.parse_args()
    rollouts = args.run / "rollouts.jsonl"
    config = args.run / "config.json"
    if not (rollouts.is_file() and config.is_file()):
        g.fail(
            f"{args.run}: holds no rollouts.jsonl and config.json, as a run of grpo_video.py does"
        )

    c = run_settings(config)
    root = Path(c.data_root)
    annotations = Path(c.annotations or root / "annotations/training_6k.jsonl")
    records = {record["sample_id"]: record for record in g.load_records(annotations, root)}

    def strip_of(media):  # uint8 [size, T * size, 3], the frames side by side
        frames = []
        for kind, path in media:
            frames += g.read_media(kind, path, c.frame_size, c.fps, c.max_frames)
        return torch.cat(frames, dim=1).numpy()

    decoder = g.Decoder(strip_of, c.decode_timeout)
    (args.run / "frames").mkdir(exist_ok=True)
    for name in tqdm(first_samples(rollouts, args.samples), desc="samples"):
        video = [(kind, path) for kind, path in records[name]["media"] if kind == "video"]
        if not video:
            continue
        strip, problem = decoder(video)
        if problem:
            tqdm.write(f"sample_id {name}: {video[0][1]}: {problem}", file=sys.stderr)
        else:
            Image.fromarray(strip).save(args.run / f"frames/{name}.png")


if __name__ == "__main__":
    main()
