"""Every attention backend at UNITE's shapes, forward and backward, side by side.

    python benchmarks/bench_attention.py --device cuda     rows in results/<device>/attention.jsonl
    python benchmarks/bench_attention.py                   on this CPU, as ratios to torch's plain operations

544 keys: tokenization with class tokens, of which all ask or, in the last block, the 256 registers alone; 288: a flow
pass; 257: the decoder. Head size 64 with 12 heads (Base), 72 with 16 (XL). The tensors have the strides that the
step gives them (attention_inputs.py). Before a backend is timed, its output and gradients are compared with float32
ones.
FLOPs are the useful ones: 4 B H T S E forward, 2.5 times that backward.

fa3 and fa4 take the place of torch's flash kernel, so each has its own round, beside the others but flash.
"""

from __future__ import annotations

import argparse

import torch
from attention_inputs import queries_keys_values
from harness import interleaved, quantiles, ratio, record, require_equal
from torch import Tensor

from unite_fast.layers import attention as module
from unite_fast.layers.attention import attention

KEYS = (544, 288, 257)
DECODER = 257
PRUNED = (256, 544)  # queries, keys of the encoder's last block
HEADS = {64: 12, 72: 16}  # by head size


def bench(
    device: torch.device, batch: int, keys: int, head_size: int, rounds: int, backends: list[str], queries: int = 0
) -> list[dict]:
    """The rows of the backends that run here. queries: that ask, the others of the tokens do not; 0: all."""
    half = device.type == "cuda"
    shape, dtype = (batch, HEADS[head_size], keys, head_size), torch.bfloat16 if half else torch.float32
    q, k, v = queries_keys_values(shape, device, dtype, queries, decoder=keys == DECODER)
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    reference = attention(*exact, backend="math")
    dy = torch.randn(reference.shape, device=device)
    truth = [reference, *torch.autograd.grad(reference, exact, dy)]
    del exact, reference
    flops = 4.0 * batch * HEADS[head_size] * keys * (queries or keys) * head_size
    dy = dy.to(q.dtype)

    outputs: dict[str, Tensor] = {}
    for name in backends:
        why = module.obstacle(name, device, half, head_size)
        why = why or module.trial(name, device, half, keys, HEADS[head_size], head_size)
        if why:
            print(f"  {name:10} cannot run: {why}")
            continue
        outputs[name] = attention(q, k, v, backend=name)
        found = [outputs[name], *torch.autograd.grad(outputs[name], (q, k, v), dy, retain_graph=True)]
        try:
            require_equal(name, found, truth, 2e-2 if half else 1e-4)
        except SystemExit as wrong:
            if name == "math":  # the others are compared with it
                raise
            print(f"  {wrong}")
            del outputs[name]
    del truth

    def forward(name: str) -> Tensor:
        with torch.no_grad():
            return attention(q, k, v, backend=name)

    def backward(name: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs[name], (q, k, v), dy, retain_graph=True)

    rows = []
    for kind, call, factor in (("fwd", forward, 1.0), ("bwd", backward, 2.5)):
        times = interleaved({name: (lambda name=name, call=call: call(name)) for name in outputs}, device, rounds)
        for name, values in times.items():
            spread = quantiles(values)
            rate = factor * flops / spread["median"] / 1e9
            rows.append(
                {"op": "attention", "pass": kind, "backend": name, "beside": list(outputs), "batch": batch}
                | {"heads": HEADS[head_size], "keys": keys, "queries": queries or keys}
                | {"head_size": head_size, "n": rounds}
                | {"dtype": str(q.dtype).removeprefix("torch."), "tflops": rate}
                | {f"{quantile}_ms": value for quantile, value in spread.items()}
            )
            against_math = ratio(times, "math", name)["median"]
            speed = f"{spread['median']:8.3f} ms  {rate:7.1f} TFLOP/s  " if half else ""
            print(f"  {name:10}{kind}  {speed}{against_math:.2f}x math")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, help="default: 64 on a GPU, 1 on a CPU")
    parser.add_argument("--keys", type=int, nargs="*", default=list(KEYS))
    parser.add_argument("--backends", nargs="*", choices=module.BACKENDS, default=list(module.BACKENDS))
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--no-record", action="store_true", help="print only")
    args = parser.parse_args()
    device = torch.device(args.device)
    batch = args.batch or (64 if device.type == "cuda" else 1)
    plugged = [n for n in args.backends if n in module.PLUGGED and not module.obstacle(n, device, True, min(HEADS))]
    others = [n for n in dict.fromkeys(["math", *args.backends]) if n not in plugged]
    groups = [others] + [[*(n for n in others if n not in ("flash", "sdpa")), name] for name in plugged]
    for group in groups:
        for head_size in HEADS:
            for keys in args.keys:
                print(f"{keys} keys, head size {head_size}, {HEADS[head_size]} heads, batch {batch}")
                new = bench(device, batch, keys, head_size, args.rounds, group)
                if not args.no_record:  # at once: what follows may run out of time
                    print(f"  {len(new)} rows in {record('attention', device, new).name}", flush=True)


if __name__ == "__main__":
    main()
