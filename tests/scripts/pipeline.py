"""A pipeline of linear stages over send and recv: microbatches go forward, then their gradients come back.

    torchrun --nproc-per-node 2 pipeline.py --microbatches 4

Written in the manner of tutorials on point-to-point communication and of PiPPy's GPipe schedule.
"""

import argparse

import torch
import torch.distributed as dist


def forward_all(stage, microbatches, size):
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    inputs, outputs, sends = [], [], []
    for _ in range(microbatches):
        if rank == 0:
            x = torch.randn(size, stage.in_features)
        else:
            x = torch.empty(size, stage.in_features)
            dist.recv(x, src=rank - 1)
            x.requires_grad_()
        y = torch.relu(stage(x))
        if rank < last:
            sends.append(dist.isend(y.detach(), dst=rank + 1))
        inputs.append(x)
        outputs.append(y)
    for work in sends:
        work.wait()
    return inputs, outputs


def backward_all(inputs, outputs):
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    for x, y in zip(inputs, outputs, strict=True):
        if rank == last:
            y.square().mean().backward()
        else:
            gradient = torch.empty_like(y)
            dist.recv(gradient, src=rank + 1)
            y.backward(gradient)
        if rank > 0:
            dist.send(x.grad, dst=rank - 1)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    stage = torch.nn.Linear(64, 64)
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
    for _ in range(args.steps):
        optimizer.zero_grad()
        backward_all(*forward_all(stage, args.microbatches, size=8))
        optimizer.step()
    norms = [None] * dist.get_world_size()
    dist.all_gather_object(norms, round(stage.weight.norm().item(), 6))
    if dist.get_rank() == 0:
        print("norms of the stages:", *norms)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
