"""torch.distributed.pipelining: stages that send and receive, in two of its schedules."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from tests.foreign.models import TOLERANCE, batches, build_model, same_bits
from tests.launch import on_virtual

MICRO_BATCHES = 4


def loss_of(output, target):
    return torch.nn.functional.mse_loss(output, target)


def train(schedule):
    """One step; a rank has one layer of the model, two with an interleaved schedule. Gradients by layer."""
    rank, size, layers = dist.get_rank(), dist.get_world_size(), build_model()
    numbers = [rank] if schedule is not ScheduleInterleaved1F1B else [rank, rank + size]
    stages = [PipelineStage(copy.deepcopy(layers[i]), i, len(layers), torch.device("cpu")) for i in numbers]
    several = schedule is ScheduleInterleaved1F1B
    steps = schedule(stages if several else stages[0], n_microbatches=MICRO_BATCHES, loss_fn=loss_of)
    (inputs, targets), *_ = batches(1)
    arguments = (inputs,) if rank == 0 else ()
    losses = []
    steps.step(*arguments, **({"target": targets, "losses": losses} if rank == size - 1 else {}))
    return {i: [x.grad for x in stage.submod.parameters()] for i, stage in zip(numbers, stages, strict=True)}


SCHEDULES = [(ScheduleGPipe, 4), (Schedule1F1B, 4), (ScheduleInterleaved1F1B, 2)]


@pytest.mark.parametrize(("schedule", "size"), SCHEDULES)
def test_a_pipeline_has_the_gradients_of_one_device(schedule, size):
    model = build_model()
    (inputs, targets), *_ = batches(1)
    loss_of(model(inputs), targets).backward()
    for own in on_virtual(train, size, schedule):
        for layer, gradients in own.items():
            for parameter, gradient in zip(model[layer].parameters(), gradients, strict=True):
                torch.testing.assert_close(gradient, parameter.grad, **TOLERANCE)


@pytest.mark.parametrize(("schedule", "size"), SCHEDULES)
def test_no_report_in_other_orders(schedule, size):
    expected = on_virtual(train, size, schedule)
    for seed in range(8):
        assert same_bits(on_virtual(train, size, schedule, seed=seed), expected)
