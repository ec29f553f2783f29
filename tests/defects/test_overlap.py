"""D2, D3, D4, D5, D12, D19: attention with `sp_stream`, whose exchanges run beside computation."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from tests.defects.cases import INPUTS, Case, attend, causal_attention, check, compare
from tests.defects.implementations import NoAccelerator

EVEN = Case(heads=4, tokens=(3, 3))
WIDTH = 7


def projected(case, x, weights, kind):
    """Query, key and value, [batch, tokens, heads, dim], of x: [batch, tokens, WIDTH]."""
    if kind == "fused":
        fused = torch.nn.functional.linear(x, torch.cat(weights))
        return fused.unflatten(-1, (-1, case.dim)).chunk(3, dim=2)
    tensors = [torch.nn.functional.linear(x, weight).view(*x.shape[:2], -1, case.dim) for weight in weights]
    if kind == "scaled":
        return [2 * tensor for tensor in tensors]
    return tensors


def drawn(case):
    """x of all ranks, and the three weights."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.batch, sum(case.tokens), WIDTH, generator=generator, dtype=torch.float64)
    size = case.heads * case.dim, WIDTH
    return x, [
        torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)
    ]


def train(implementation, case, kind):
    """The weights' gradients, and which of dq and dk were waited for when they were first read."""
    rank = dist.get_rank()
    attention, _, arrived = implementation.attention_with_overlap(causal_attention("b s h d"))
    x, weights = drawn(case)
    inputs = projected(case, x.split(case.tokens, dim=1)[rank], weights, kind)
    read = {}

    def note(name):
        read[name] = arrived(name)

    output = attention(*inputs)
    for name, tensor in zip("qk", inputs, strict=False):  # behind the hooks of the attention itself
        tensor.register_hook(lambda gradient, name=name: note(name))
    output.backward(case.shard(case.whole("upstream"), rank))
    return [weight.grad for weight in weights], read


def check_weights(case, kind, results):
    x, weights = drawn(case)
    output = causal_attention("b s h d")(*projected(case, x, weights, kind))
    output.backward(case.whole("upstream"))
    for index, (name, weight) in enumerate(zip(INPUTS, weights, strict=True)):
        total = sum(gradients[index] for gradients, _ in results)
        compare(
            total / weight.grad.abs().max(),
            weight.grad / weight.grad.abs().max(),
            f"gradient of W of the {name}",
        )


def test_d2_the_projections_get_their_gradients(run):
    check_weights(EVEN, "projected", run(train, 2, EVEN, "projected"))


def test_d3_an_operation_behind_the_projection_reads_what_has_arrived(run):
    results = run(train, 2, EVEN, "scaled")
    for rank, (_, read) in enumerate(results):
        early = [name for name, arrived in read.items() if not arrived]
        assert not early, f"rank {rank} read the gradients of {early} before waiting for them"
    check_weights(EVEN, "scaled", results)


def attend_leaves(implementation, case):
    return attend(implementation.attention_with_overlap(causal_attention("b s h d")).attention, case)


def test_d4_query_key_and_value_may_be_leaves(run):
    check(EVEN, run(attend_leaves, 2, EVEN))


def test_d4_one_projection_may_give_all_three(run):
    check_weights(EVEN, "fused", run(train, 2, EVEN, "fused"))


class Stream(NoAccelerator):
    """A stream that is compared by its number, with streams."""

    number = 1

    def __eq__(self, other):
        return self.number == other.number

    __hash__ = None


def steps_from_leaves(leaves):
    """Tensors two steps away from the leaves, as the original's hooks need."""
    return [leaf.view_as(leaf).view_as(leaf) for leaf in leaves]


def attend_views(implementation, case, stream=None):
    attention = implementation.attention_with_overlap(causal_attention("b s h d"), stream).attention
    return attend(lambda *inputs: attention(*steps_from_leaves(inputs)), case)


@pytest.mark.gloo  # virtual ranks have streams of their own
def test_d5_a_stream_is_not_compared_with_none(run):
    answer = EVEN.answer()
    for rank, result in enumerate(run(attend_views, 2, EVEN, Stream())):
        for name in ("output", "value"):  # those of query and key are D2's
            compare(result[name], EVEN.shard(answer[name], rank), f"{name} on rank {rank}")


def test_d12_uneven_heads_have_a_backward_pass(run):
    case = Case(heads=5, tokens=(3, 3))
    check(case, run(attend_views, 2, case))


class Accelerator:
    """A stand-in with streams that note who waits for whom, and when an exchange begins."""

    def __init__(self):
        self.notes = []
        self.main, self.other, self.side = (NotingStream(self, name) for name in ("main", "other", "side"))
        self.current = self.main

    def current_stream(self):
        return self.current

    def default_stream(self):
        return self.main

    @contextmanager
    def noting_exchanges(self):
        real = dist.all_to_all_single

        def exchange(*args, **options):
            self.notes.append("exchange")
            return real(*args, **options)

        dist.all_to_all_single = exchange
        try:
            yield
        finally:
            dist.all_to_all_single = real


class NotingStream:
    def __init__(self, accelerator, name):
        self.accelerator, self.name = accelerator, name
        self.device = torch.device("meta")  # no tensor of this test is there

    def wait_stream(self, other):
        self.accelerator.notes.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.accelerator.notes.append(f"{self.name} waits for {event.name}")

    def record_event(self):
        return NotingEvent(self.accelerator, self.name)


class NotingEvent:
    def __init__(self, accelerator, name):
        self.accelerator, self.name = accelerator, name

    def wait(self):
        self.accelerator.current.wait_event(self)


def before_the_first_exchange(implementation, case, events):
    """Who waits for whom. The module is made while one stream is current, and used on another one."""
    accelerator = Accelerator()
    inputs = steps_from_leaves(
        case.shard(case.whole(name), dist.get_rank()).requires_grad_() for name in INPUTS
    )
    for name, tensor in zip(INPUTS, inputs, strict=True):
        if events:
            tensor.done_event = NotingEvent(accelerator, name)
    with implementation.on_accelerator(accelerator), accelerator.noting_exchanges():
        module = implementation.names().DistributedAttention(
            lambda query, key, value: value, dist.group.WORLD, 2, 1, accelerator.side
        )
        accelerator.current = accelerator.other
        module(*inputs, 0)
    return accelerator.notes[: accelerator.notes.index("exchange")]


@pytest.mark.gloo
def test_d19_the_stream_in_use_waits_for_the_event(run):
    for notes in run(before_the_first_exchange, 2, EVEN, True):
        assert "other waits for query" in notes, f"before the first exchange: {notes}"


@pytest.mark.gloo
def test_d19_without_an_event_it_waits_for_the_side_stream(run):
    for notes in run(before_the_first_exchange, 2, EVEN, False):
        assert "other waits for side" in notes, f"before the first exchange: {notes}"
