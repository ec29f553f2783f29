"""Train a small transformer with fully_shard (FSDP2), mixed precision, prefetching and clipped gradients.

    torchrun --nproc-per-node 2 train_fsdp2.py --mixed-precision

Written in the manner of pytorch/examples, distributed/FSDP2 (BSD-3-Clause): on GPUs only, without a fallback to the
CPU.
"""

import argparse
import os

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard


class Transformer(nn.Module):
    def __init__(self, vocabulary=128, dim=32, layers=3):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, nhead=4, dim_feedforward=64, dropout=0.0, batch_first=True)
            for _ in range(layers)
        )
        self.head = nn.Linear(dim, vocabulary, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def reset_parameters(self):
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.1)


def full_state_dict(model):
    state = {}
    for name, parameter in model.state_dict().items():
        full = parameter.full_tensor()
        if torch.distributed.get_rank() == 0:
            state[name] = full.cpu()
    return state


def main(args):
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device(f"cuda:{rank}")
    torch.cuda.set_device(device)
    torch.distributed.init_process_group(backend="nccl", device_id=device)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Transformer()
    options = {}
    if args.mixed_precision:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    model.to_empty(device="cuda")
    model.reset_parameters()
    for parameter in model.parameters():
        assert parameter.placements == (Shard(0),)
    for layer, following in zip(model.layers, list(model.layers)[1:], strict=False):
        layer.set_modules_to_forward_prefetch([following])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    torch.distributed.barrier()
    for step in range(args.steps):
        tokens = torch.randint(0, 128, (4, 16), device=device)
        logits = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            print(f"step {step}: loss {loss.item():.4f}, {torch.cuda.max_memory_allocated()} bytes")
    state = full_state_dict(model)
    if rank == 0:
        print(f"{len(state)} parameters, {sum(x.numel() for x in state.values())} numbers")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="PyTorch FSDP2 example")
    parser.add_argument("--mixed-precision", action="store_true")
    parser.add_argument("--steps", type=int, default=2)
    main(parser.parse_args())
