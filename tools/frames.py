"""Strips of the sampled frames of a training run's questions, for the report, which decodes no video itself.

    python tools/frames.py runs/toy-grpo            # writes runs/toy-grpo/frames/<sample_id>.png, of the first 200 samples

The frames are those that the model saw: read_media's, by the run's own settings.
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

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=int, default=200, help="how many, in the order in which they come in rollouts.jsonl")
    args = parser.parse_args()
    rollouts, config = args.run / "rollouts.jsonl", args.run / "config.json"
    if not (rollouts.is_file() and config.is_file()):
        g.fail(f"{args.run}: holds no rollouts.jsonl and config.json, as a run of grpo_video.py does")
    c = g.Config(**{key: value for key, value in json.loads(config.read_text())["run"].items() if key in g.Config.__dataclass_fields__})
    root = Path(c.data_root)
    records = {r["sample_id"]: r for r in g.load_records(Path(c.annotations or root / "annotations/training_6k.jsonl"), root)}
    wanted = list(dict.fromkeys(json.loads(line)["sample_id"] for line in rollouts.read_bytes().split(b"\n")[:-1]))[:args.samples]
    (args.run / "frames").mkdir(exist_ok=True)
    decoder = g.Decoder(lambda media: torch.cat([  # the frames side by side
        frame for kind, path in media for frame in g.read_media(kind, path, c.frame_size, c.fps, c.max_frames)], 1).numpy(),
        c.decode_timeout)
    for name in tqdm(wanted, desc="samples"):
        video = [m for m in records[name]["media"] if m[0] == "video"]
        strip, problem = decoder(video) if video else (None, None)
        if problem:
            tqdm.write(f"sample_id {name}: {video[0][1]}: {problem}", file=sys.stderr)
        elif video:
            Image.fromarray(strip).save(args.run / f"frames/{name}.png")

if __name__ == "__main__":
    main()
