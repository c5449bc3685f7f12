"""Writes the model card of an exported world to standard output, from its files, scores.json and the logs of its training.

    python maze_card.py MODEL_FOLDER scores.json LOG.jsonl [LOG.jsonl ...] > MODEL_FOLDER/README.md

The logs are those of the commands of one run, in their order. Every number comes from these files; nothing is measured here."""
import argparse
import json
from pathlib import Path

CURVE_ROWS = 10


def table(header, rows):
    lines = [header, ["---"] * len(header)] + rows
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("scores", type=Path)
    parser.add_argument("logs", type=Path, nargs="+")
    args = parser.parse_args()
    config, scores = json.loads((args.folder / "config.json").read_text()), json.loads(args.scores.read_text())
    log = [json.loads(line) for path in args.logs for line in path.read_text().splitlines()]
    of = lambda kind: [entry for entry in log if entry["kind"] == kind]
    start, vae_done, judged = of("start"), of("vae_done")[-1], of("judge")
    first, dit, vae = start[0], config["dit"], config["vae"]
    files = [p for p in args.folder.iterdir() if p.suffix in (".safetensors", ".json")]
    size, minutes = sum(p.stat().st_size for p in files), sum(e["at_s"] for e in of("end")) / 60
    flags = lambda a: " ".join([f"--seconds {a['seconds']:g}"] + [f"--vae-seconds {a['vae_seconds']:g}"] * (a["stage"] == "all") +
                               [f"--seconds-total {a['seconds_total']:g}"] * (a["seconds_total"] > 0) + ["--finish"] * a["finish"])
    resume = lambda a: " --resume-work WORK" if a.get("resume_work") else " --resume OUT" if a.get("resume") else ""
    launch = "python" if first["world"] == 1 else f"torchrun --nproc-per-node {first['world']}"
    commands = "\n".join(f"    {launch} samples/train/train_maze.py {e['args']['stage']}{resume(e['args'])} --out OUT --work WORK {flags(e['args'])}"
                         for e in start)
    steps = [e for e in of("dit")]
    steps = steps[max(1, len(steps) // CURVE_ROWS) - 1::max(1, len(steps) // CURVE_ROWS)]
    shown = [i for i in (1, 2, 4, 8, 16, 24, 31, 40, 48, 56, 63) if i < scores["frames"]]
    at = lambda values, prompt: [f"{values[i - prompt]:.1f}" if i >= prompt else "" for i in shown]
    one, eight, loop, wall = scores["prompt_1"], scores["prompt_8"], scores["loop"], scores.get("wall")
    late = scores["frames"] - len(eight["per_frame"])
    print(f"""# maze: a first-person walk through a maze, one frame for each action

A space-time DiT ({first['dit_params']:,} parameters: width {dit['hidden_size']}, {dit['depth']} blocks, {dit['num_heads']} heads, window of {dit['max_frames']} frames) on the
{vae['latent_dim']} x {dit['input_h']} x {dit['input_w']} latents of a ViT autoencoder ({first['vae_params']:,} parameters), in the layout of open-oasis. Frames are
{vae['input_width']} x {vae['input_height']}. Weights are f16, {size:,} bytes in all. Actions: {', '.join(config['actions'])}.
Licence: Apache 2.0, as the rest of the tree.

Data: rendered by `samples/worlds/maze.c` while training, none stored, nothing from anywhere else. Made to show what reuse does to a
world model, not to model any world but this one.

## How it was trained

On {first['world']} x {first['device']}, PyTorch {first['torch']}, {minutes:.1f} minutes for everything, evaluations on the way included:

{commands}
    python samples/train/train_maze.py export --resume OUT --out samples/models/maze

{vae_done['steps']:,} steps of the autoencoder ({first['args']['vae_batch'] * first['world']} frames each), then {scores['step'] or judged[-1]['step']:,} of the DiT, each on {of('dit_start')[0]['frames_per_step']:,} noisy
frames behind as many of context. V-prediction, sigmoid schedule, {first['args']['optimizer']}, rate {first['args']['lr']:g} annealed to 1 % of it, weight
average exported. `v200` is the mean squared error of v at timesteps 200..399, and so on.

{table(['step', 'loss', 'v0', 'v200', 'v400', 'v600', 'v800'], [[e[c] for c in ('step', 'loss', 'v0', 'v200', 'v400', 'v600', 'v800')] for e in steps])}
On {len(judged)} occasions: PSNR to the simulator over 23 frames after one true frame, and after eight; the loop test over eight seeds.

{table(['step', 'after 1', 'after 8', 'loop', 'v of validation'], [[e['step'], e['psnr_after_1'], e['psnr_after_8'], e['loop'], e['val_v']] for e in judged])}
## Scores

Autoencoder: {scores['vae_psnr']} dB on held-out frames, {scores['vae_psnr_worst']} dB on the worst; {scores['vae_psnr_noise15']} dB with noise of the stabilisation level added.

Rollouts of {scores['frames']} frames, {scores['clips']} held-out walks, {scores['steps']} steps a frame, stabilisation level {scores['stabilization_level']}; PSNR to the simulator in dB, mean
over walks. What was never seen has to be made up, so the numbers fall as new places come into view; `frozen` repeats the first
frame. The window slides after frame {scores['window'] - 1} and is rebuilt for each frame from there on.

{table(['frame'] + shown, [['after 1 true frame'] + at(one['per_frame'], 1), [f'after {late} true frames'] + at(eight['per_frame'], late), ['frozen'] + at(scores['frozen'], 1)])}
Sharpness (mean absolute gradient over the simulator's): {one['sharpness']:.2f} over the rollout, {one['last_8_frames_sharpness']:.2f} in its last eight frames.

Loop test, `right*8,left*8` from one true frame, {loop['seeds']} worlds: PSNR of frame 16 to frame 0 of the same rollout is {loop['median']} dB in the
median, {loop['worst']} at worst, over 20 dB in {100 * loop['over_20_db']:.0f} % (the simulator comes back exactly, but for balls that rolled on).
""")
    if wall:
        print(f"""Wall test, {wall['walks']} walks that push into a wall: frames change by {wall['last_8']:.2f} of 255 a frame in the end (on walks that move:
{wall['simulator_while_moving']}); the last frame is at {wall['psnr_last']} dB to the simulator's.
""")
    print(f"""Steps and stabilisation levels, {min(scores['window'], scores['frames'])} frames from one true frame:

{table(['steps', 'level', 'PSNR', 'loop, median', 'sharpness'], [[r['steps'], r['stabilization_level'], r['psnr'], r['loop'], r['sharpness']] for r in scores['sweep']])}
## Known limits

- A view that was not seen before is invented, plausibly and not truly: the model has no map, and its memory is the window.
- Turning away for longer than the window holds forgets what was there.
- A wall at arm's length, one flat shade from edge to edge, says little about where the walk is: the rollout can go on elsewhere,
  and a pattern can shift while the walk pushes into it.
- Balls are rare in the data: they blur, and one that leaves the picture need not come back.""")


if __name__ == "__main__":
    main()
