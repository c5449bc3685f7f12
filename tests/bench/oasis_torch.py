"""Times of the PyTorch definition (tests/reference/oasis.py) at the public 500M model's shapes, random weights, beside which
`refrain bench --what world --synthetic-weights oasis-500m` stands. bf16 autocast, CUDA.

    python tests/bench/oasis_torch.py            eager
    python tests/bench/oasis_torch.py --compile  torch.compile(mode="reduce-overhead"): with CUDA graphs

Prints one JSON line a case: forward of a window of T frames, as the public loop runs it in every denoising step."""
import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "reference"))
from oasis import DiT  # noqa: E402


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--frames", type=int, nargs="+", default=[1, 32])
    args = parser.parse_args()
    torch.manual_seed(0)
    dit = DiT(input_h=18, input_w=32, patch_size=2, in_channels=16, hidden_size=1024, depth=16, num_heads=16,
              external_cond_dim=25, max_frames=32).cuda().eval()
    run = torch.compile(dit, mode="reduce-overhead") if args.compile else dit
    for frames in args.frames:
        x = torch.randn(1, frames, 16, 18, 32, device="cuda")
        t = torch.full((1, frames), 14, device="cuda", dtype=torch.long)
        a = torch.zeros(1, frames, 25, device="cuda")
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            for _ in range(5):
                run(x, t, a)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(20):
                run(x, t, a)
            end.record()
            torch.cuda.synchronize()
        print(json.dumps({"what": "oasis-500m forward", "frames": frames, "compiled": args.compile, "ms": round(start.elapsed_time(end) / 20, 3),
                          "device": torch.cuda.get_device_name(), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
