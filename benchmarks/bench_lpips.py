"""LPIPS as the official code calls it against ours: value, gradient of the reconstruction, time and memory.

    python benchmarks/bench_lpips.py --device cuda           batch 32, 256 x 256, bfloat16 autocast
    python benchmarks/bench_lpips.py                         2 images of 64 x 64 on this CPU, float32

official: lpips.LPIPS (VGG16) on both images, contiguous, with a graph through both branches, heads of separate
operations. channels_last: the same module in that memory format. no_graph: the real branch without a graph besides.
compiled: with the fused head, the trunk by torch.compile. ours: the head and the trunk (conv_relu_stages) fused. These
two on a GPU alone. Random VGG16 weights, dropout off everywhere. All must agree before anything is timed. Target: 0.40
ms per image, 0.27 excellent. Rows go to benchmarks/results/<device>/lpips.jsonl.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from harness import ROOT, interleaved, quantiles, ratio, record, require_equal
from torch import Tensor

from unite_fast.efficiency import compiling, precision
from unite_fast.modality.lpips import Perceptual

GIB = 2**30


def forms(device: torch.device) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """name -> (images, reconstruction) -> scalar; all with the same weights."""
    torch.manual_seed(0)
    fused = Perceptual(None, backend="fused" if device.type == "cuda" else "eager").to(device)
    channels_last = fused.net
    official = copy.deepcopy(channels_last).to(memory_format=torch.contiguous_format)
    eager = Perceptual(None).to(device)
    eager.load_state_dict(fused.state_dict())

    def as_official(net) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda images, reconstruction: net(images, reconstruction).mean()

    def last(images: Tensor, reconstruction: Tensor) -> Tensor:
        formatted = (x.contiguous(memory_format=torch.channels_last) for x in (images, reconstruction))
        return channels_last(*formatted).mean()

    table = {"official": as_official(official), "channels_last": last, "no_graph": eager}
    if device.type != "cuda":
        return table
    compiled = copy.deepcopy(fused)
    compiled.compile_trunk(compiling.region)
    return table | {"compiled": compiled, "ours": fused}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--size", type=int)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--no-record", action="store_true", help="print only")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    precision.setup(device, training=True)
    on_gpu = device.type == "cuda"
    batch, size = arguments.batch or (32 if on_gpu else 2), arguments.size or (256 if on_gpu else 64)
    generator = torch.Generator(device).manual_seed(0)
    images, start = (torch.rand(batch, 3, size, size, generator=generator, device=device) for _ in range(2))

    def both(form: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        """The loss and its gradient in the reconstruction."""
        reconstruction = start.detach().requires_grad_()
        with precision.autocast("bf16" if on_gpu else "fp32", device):
            loss = form(images, reconstruction).float()
        loss.backward()
        assert reconstruction.grad is not None
        return [loss.detach(), reconstruction.grad]

    table = forms(device)
    expected = both(table["official"])
    for name, form in table.items():
        require_equal(f"lpips {name}", both(form), expected, 8e-2 if on_gpu else 1e-4)
    memory = {}
    for name, form in table.items() if on_gpu else ():
        torch.cuda.reset_peak_memory_stats(device)
        base = torch.cuda.memory_allocated(device)
        both(form)
        memory[name] = (torch.cuda.max_memory_allocated(device) - base) / GIB
    times = interleaved({name: (lambda f=f: both(f)) for name, f in table.items()}, device, arguments.rounds)
    rows = []
    for name in table:
        faster = ratio(times, "official", name)
        ms = quantiles(times[name])
        text = f"{name:16}{faster['median']:6.2f}x official ({faster['p20']:.2f}..{faster['p80']:.2f})"
        if on_gpu:
            text += f"  {ms['median'] / batch:.3f} ms/image  {memory[name]:.2f} GiB"
        print(text)
        rows.append({"form": name, "batch": batch, "size": size, "dtype": "bfloat16" if on_gpu else "float32", "ms": ms,
                     "faster_than_official": faster, "gib": memory.get(name), "n": arguments.rounds})  # fmt: skip
    if not arguments.no_record:
        print(f"{len(rows)} rows in {record('lpips', device, rows).relative_to(ROOT)}")


if __name__ == "__main__":
    main()
