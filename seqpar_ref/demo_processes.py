"""The demo on real processes, one rank each: under torchrun, or started here through torchrun.

Rank 0 reads the model, the others receive its weights; then every rank does what a virtual rank does.
"""

import os
from datetime import timedelta
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from .demo import (
    DemoFailedError,
    Options,
    compare,
    plan_for,
    read_inputs,
    read_on_one_device,
    read_own_part,
    report,
)
from .demo_models import LanguageModel, SmolLM2, Tiny
from .device import device_of_backend
from .errors import SeqparError
from .progress import Steps
from .sent import BytesSent
from .torchrun import become_torchrun, is_started, local_rank

TIMEOUT = timedelta(minutes=10)


def run(options: Options, console: Console) -> None:
    """One rank's part where torchrun started this process; else torchrun takes its place."""
    if not is_started():
        device_of_backend(options.backend, 0, options.ranks)
        _launch(options)
    _run_rank(options, console)


def _launch(options: Options) -> NoReturn:
    """Start the same command under torchrun, on this machine."""
    arguments = ["demo", "--ranks", str(options.ranks), "--tokens", str(options.tokens)]
    arguments += ["--backend", options.backend, "--model", options.model, "--out", str(options.out)]
    if options.text is not None:
        arguments += ["--text", str(options.text)]
    become_torchrun(arguments, options.ranks)


def _run_rank(options: Options, console: Console) -> None:
    """This process's part of the demo, as one rank under torchrun. Rank 0 prints and draws.

    Raises:
        ArgumentError: whatever rank 0 refuses, on all ranks.
        DemoFailedError: on rank 0, see `demo.report`.
    """
    device = device_of_backend(options.backend, *local_rank())
    dist.init_process_group(options.backend, timeout=TIMEOUT)
    try:
        _read_and_report(options, Steps(console), device)
    finally:
        dist.destroy_process_group()


def _read_and_report(options: Options, steps: Steps, device: torch.device) -> None:
    rank = dist.get_rank()
    with steps.step(f"loading the model ({options.model}) and the text, for {options.ranks} ranks"):
        model, token_ids = _read_once(options, device)
    plan = plan_for(model, options.ranks, options.tokens)
    with steps.step(f"one device reads {options.tokens:,} tokens"):
        reference = _read_on_rank_0(model, token_ids)
    model.distribute(plan)
    counter = BytesSent(options.ranks)
    with steps.step(f"{options.ranks} processes read the same {options.tokens:,} tokens, split"):
        with counter:
            hidden = read_own_part(model, token_ids, plan)
        dist.barrier()
    with steps.step("comparing the logits"):
        row = compare(model, hidden, reference, token_ids, plan.tokens_of(rank))
        everyone: list[Any] = [None] * options.ranks
        dist.all_gather_object(everyone, (row, counter.by_receiver, counter.uncounted))
    if rank == 0:
        uncounted = set().union(*(names for _, _, names in everyone))
        if uncounted:
            raise DemoFailedError(
                f"collectives ran that the plan does not know: {', '.join(sorted(uncounted))}.",
                "This is a defect of seqpar: please report it with the command you ran.",
            )
        sent = np.stack([by_receiver for _, by_receiver, _ in everyone])
        report(options, steps.console, model, plan, sent, [row for row, _, _ in everyone])


def _read_once(options: Options, device: torch.device) -> tuple[LanguageModel, Tensor]:
    """Rank 0 reads model and text; the others get the configuration, the weights and the token ids from it."""
    shared: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            model, token_ids = read_inputs(options)
            shared = [getattr(model.module, "config", None), token_ids]
        except SeqparError as error:
            shared = [error, None]
    dist.broadcast_object_list(shared, src=0, device=device)
    if isinstance(shared[0], SeqparError):
        raise shared[0]
    if dist.get_rank() != 0:
        model, token_ids = _same_model(options, shared[0]), shared[1]
    model.module.to(device)
    with torch.no_grad():
        for parameter in model.module.parameters():
            dist.broadcast(parameter, src=0)
    return model, token_ids.to(device)


def _same_model(options: Options, config: Any) -> LanguageModel:
    """A model of the same sizes, whose weights are to be received."""
    if options.model == "tiny":
        return Tiny()
    from transformers import AutoModelForCausalLM

    del config.quantization_config  # the weights arrive in float32
    return SmolLM2(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def _read_on_rank_0(model: LanguageModel, token_ids: Tensor) -> Tensor:
    """One device's hidden states, made on rank 0 with every core and sent to all."""
    threads = torch.get_num_threads()
    shape = (1, token_ids.shape[1], model.heads * model.head_dim)
    reference = torch.empty(shape, device=token_ids.device)
    if dist.get_rank() == 0:
        torch.set_num_threads(os.cpu_count() or 1)
        reference = read_on_one_device(model, token_ids).clone()
        torch.set_num_threads(threads)
    dist.broadcast(reference, src=0)
    return reference
