"""Train the real CMT under DistributedDataParallel: a command for `flashbias ab`.

    flashbias ab --seed 0 -- torchrun --nproc_per_node 2 benchmarks/ddp_train.py \\
        --cmt DIR --frame DIR --model fusion0100

An ordinary training, which knows nothing of patches: every process has samples of its own, AdamW,
gradients clipped to a norm of 35. Rank 0 prints the loss of every step.
"""

from __future__ import annotations

import argparse
import logging
import warnings

import torch
import torch.distributed as dist
from ranks import Builder, Processes, Samples, freeze_unused, loss_of


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cmt", metavar="DIR", required=True, help="a checkout of junjie18/CMT")
    parser.add_argument(
        "--frame", metavar="DIR", required=True, help="a nuScenes frame in mmdet3d's info format"
    )
    parser.add_argument("--model", choices=("cmt", "fusion0100", "fusion0075"), default="cmt")
    parser.add_argument("--size", help="default: 800x320 for fusion0100, else 1600x640")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--bs", type=int, default=2, help="samples a process")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dropout", type=float, default=0.1, help="of the attention")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    processes = Processes(args.device)
    detector = Builder(args, processes).build(args.bs, args.dropout)
    samples = Samples(detector, args.bs * processes.world, processes.device)
    own = samples.take(args.bs * processes.rank, args.bs)
    freeze_unused(detector.net, samples.take(0, 1))
    net = processes.ddp(detector.net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0.01)
    for step in range(args.steps):
        torch.manual_seed(100 + step + 1000 * processes.rank)
        loss = loss_of(net, own)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 35.0)
        optimizer.step()
        if processes.rank == 0:
            print(f"step {step} loss: {float(loss):.5f}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
