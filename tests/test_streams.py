"""Stream code runs on virtual ranks as it is, and a missing synchronisation is a race with both accesses."""

import inspect

import numpy as np
import pytest
import torch
import torch.distributed as dist

from simulator import VirtualWorld, streams
from simulator.accesses import region_of
from simulator.errors import StreamError, StreamRaceError

current = torch.accelerator.current_stream


def side():
    """A stream that has waited for all that came before."""
    stream = torch.Stream()
    stream.wait_stream(torch.accelerator.current_stream())
    return stream


def by_wait_stream(x, stream):
    with stream:
        y = x * 2
    torch.accelerator.current_stream().wait_stream(stream)
    return y + 1


def by_event(x, stream):
    with stream:
        y = x * 2
        event = stream.record_event()
    torch.accelerator.current_stream().wait_event(event)
    return y + 1


def by_event_of_its_own(x, stream):
    event = torch.Event()
    with stream:
        y = x * 2
        event.record()
    event.wait()
    return y + 1


def by_the_host(x, stream):
    with stream:
        y = x * 2
    stream.synchronize()
    return y + 1


def by_an_event_and_the_host(x, stream):
    with stream:
        y = x * 2
    stream.record_event().synchronize()
    return y + 1


def by_synchronizing_everything(x, stream):
    with stream:
        y = x * 2
    torch.accelerator.synchronize()
    return y + 1


def by_a_number(x, stream):
    """Reading a number waits for the stream that computes it."""
    with stream:
        y = x * 2
        y.sum().item()
    return y + 1


def over_a_third_stream(x, stream):
    with stream:
        y = x * 2
    third = torch.Stream()
    third.wait_stream(stream)
    torch.accelerator.current_stream().wait_stream(third)
    return y + 1


def in_words_of_cuda(x, stream):
    with torch.cuda.stream(stream):
        y = x * 2
        y.record_stream(torch.cuda.current_stream())
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream())
    torch.cuda.current_stream().wait_event(event)
    assert isinstance(event, torch.cuda.Event) and isinstance(stream, torch.cuda.Stream)
    return y + 1


def in_words_of_the_simulator(x, stream):
    with streams.stream(stream):
        y = x * 2
    streams.current_stream().wait_stream(stream)
    return y + 1


RIGHT = [
    by_wait_stream,
    by_event,
    by_event_of_its_own,
    by_the_host,
    by_an_event_and_the_host,
    by_synchronizing_everything,
    by_a_number,
    over_a_third_stream,
    in_words_of_cuda,
    in_words_of_the_simulator,
]


@pytest.mark.parametrize("program", RIGHT)
def test_a_synchronised_program_is_right(program):
    for seed in (None, 0, 1):
        assert (
            VirtualWorld(2, seed=seed).run(lambda: program(torch.ones(4), side()).tolist()) == [[3.0] * 4] * 2
        )


def no_wait_for_the_input(x):
    with torch.Stream():
        return x * 2  # ERROR


def no_wait_for_the_result(x):
    with side():
        y = x * 2  # ERROR
    return y + 1  # ERROR


def a_write_over_what_is_read(x):
    with side():
        x.sum()  # ERROR
    x.add_(1)  # ERROR


def event_recorded_too_early(x):
    stream, event = side(), torch.Event()
    event.record(stream)
    with stream:
        y = x * 2  # ERROR
    event.wait()
    return y + 1  # ERROR


def an_event_never_recorded(x):
    with side():
        y = x * 2  # ERROR
    torch.Event().wait()
    return y + 1  # ERROR


def wait_in_the_wrong_direction(x):
    stream = side()
    with stream:
        y = x * 2  # ERROR
    stream.wait_stream(torch.accelerator.current_stream())
    return y + 1  # ERROR


def wait_on_another_stream(x):
    with side() as stream:
        y = x * 2  # ERROR
    torch.Stream().wait_stream(stream)
    return y + 1  # ERROR


def through_a_view(x):
    with side():
        x.view(2, 2)[1].add_(1)  # ERROR
    return x.tolist()  # ERROR


def a_collective_of_what_another_stream_writes(x):
    with side():
        x.add_(1)  # ERROR
    dist.all_reduce(x)  # ERROR


def a_result_waited_for_elsewhere(x):
    work = dist.all_reduce(x, async_op=True)  # ERROR
    with side():
        work.wait()
    return x + 1  # ERROR


def a_result_used_elsewhere(x):
    stream = torch.Stream()
    dist.all_reduce(x)  # ERROR
    with stream:
        return x + 1  # ERROR


WRONG = [
    no_wait_for_the_input,
    no_wait_for_the_result,
    a_write_over_what_is_read,
    event_recorded_too_early,
    an_event_never_recorded,
    wait_in_the_wrong_direction,
    wait_on_another_stream,
    through_a_view,
    a_collective_of_what_another_stream_writes,
    a_result_waited_for_elsewhere,
    a_result_used_elsewhere,
]


@pytest.mark.parametrize("program", WRONG)
def test_a_missing_synchronisation_is_reported_with_both_accesses(program):
    with pytest.raises(StreamRaceError) as caught:
        VirtualWorld(2).run(lambda: program(torch.ones(4)))
    message = str(caught.value)
    lines, first = inspect.getsourcelines(program)
    marked = [first + number for number, line in enumerate(lines) if line.rstrip().endswith("# ERROR")]
    assert marked and "rank " in message
    for line in marked:
        assert f"{__file__}:{line} in {program.__name__}" in message


def test_memory_beside_what_another_stream_writes_is_free():
    def body():
        x = torch.zeros(4, 8)
        with side() as stream:
            x[:, 4:].add_(1)
        x[:, :4].add_(2)
        stream.synchronize()
        return x.sum().item()

    assert VirtualWorld(2).run(body) == [48.0] * 2


def test_columns_that_meet_race():
    def body():
        x = torch.zeros(4, 8)
        with side():
            x[:, 3:].add_(1)
        x[:, :4].add_(2)

    with pytest.raises(StreamRaceError):
        VirtualWorld(2).run(body)


def test_two_streams_may_read_and_new_memory_belongs_to_its_stream():
    def body():
        x = torch.ones(4)
        one, other = side(), side()
        with one:
            a = torch.empty(4).copy_(x)
        with other:
            b = torch.tensor([1.0, 2.0, 3.0, 4.0]) + torch.full_like(x, 2) + x
        for stream in (one, other):
            torch.accelerator.current_stream().wait_stream(stream)
        return (a + b).tolist()

    assert VirtualWorld(2).run(body) == [[5.0, 6.0, 7.0, 8.0]] * 2


def test_memory_that_was_freed_is_forgotten():
    def body():
        stream = torch.Stream()
        for _ in range(50):
            with stream:
                torch.empty(64).add_(1)
            torch.empty(64).add_(1)  # most likely where the other was

    VirtualWorld(2).run(body)


def test_communication_in_the_background_of_a_side_stream():
    """Issue on one stream, wait on the one that uses the result; a right program of overlap."""

    def body():
        x, y = torch.ones(4), torch.ones(4)
        with side() as stream:
            work = dist.all_reduce(x, async_op=True)
        y.mul_(2)
        with stream:
            work.wait()
            x.add_(1)
        torch.accelerator.current_stream().wait_stream(stream)
        return (x + y).tolist()

    for seed in range(20):
        assert VirtualWorld(2, seed=seed).run(body) == [[5.0] * 4] * 2


def test_backward_follows_all_streams():
    def body():
        x = torch.ones(4, requires_grad=True)
        with side():
            y = (x * x).sum()
        y.backward()
        return x.grad.tolist()

    assert VirtualWorld(2).run(body) == [[2.0] * 4] * 2


def test_streams_are_each_ranks_own():
    shared = []

    def body():
        if dist.get_rank() == 0:
            shared.append(torch.Stream())
        dist.barrier()
        if dist.get_rank() == 1:
            shared[0].synchronize()

    with pytest.raises(StreamError, match="another rank"):
        VirtualWorld(2).run(body)


def test_events_of_another_run_are_refused():
    kept = []

    def body():
        if kept:
            kept[0].wait()
        kept.append(torch.accelerator.current_stream().record_event())

    world = VirtualWorld(1)
    world.run(body)
    with pytest.raises(StreamError, match="another run"):
        world.run(body)


def test_outside_of_a_world_streams_are_torchs():
    before = torch.Stream, torch.Event, torch.cuda.current_stream, torch.Tensor.record_stream
    VirtualWorld(1).run(lambda: torch.Stream())
    assert (torch.Stream, torch.Event, torch.cuda.current_stream, torch.Tensor.record_stream) == before
    with pytest.raises(StreamError, match="VirtualWorld"):
        streams.Stream()


def test_which_stream_is_current():
    def body():
        default, other = torch.accelerator.current_stream(), torch.Stream()
        assert default == streams.default_stream() == torch.cuda.default_stream()
        with other:
            assert torch.cuda.current_stream() == other != default
            with torch.cuda.stream(None):
                assert streams.current_stream() == other
        assert streams.current_stream() == default
        torch.accelerator.set_stream(other)
        assert streams.current_stream() == other and other.query() and torch.Event().query()
        with pytest.raises(StreamError, match="cluster="):
            torch.Event(enable_timing=True).elapsed_time(torch.Event())

    VirtualWorld(2).run(body)


def test_with_the_checks_off_stream_code_runs_unwatched():
    def body():
        with torch.Stream():
            y = torch.ones(4) * 2
        return (y + 1).tolist()

    assert VirtualWorld(2, hazards="off").run(body) == [[3.0] * 4] * 2


def test_regions_meet_where_tensors_share_a_byte():
    """Against the addresses themselves, for random views of one buffer."""
    generator = np.random.default_rng(0)
    base = torch.zeros(6, 5, 4)

    def view():
        out = base
        for dim, size in enumerate(base.shape):
            first, end = sorted(generator.integers(0, size + 1, 2).tolist())
            out = out.narrow(dim, first, end - first)
        step = int(generator.integers(1, 3))
        return out[:, ::step].permute(*generator.permutation(3).tolist())

    addresses = torch.arange(base.numel()).view(base.shape)

    def bytes_of(tensor):
        return set(
            addresses.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).reshape(-1).tolist()
        )

    met = 0
    for _ in range(2000):
        one, other = view(), view()
        expected = bool(bytes_of(one) & bytes_of(other))
        assert region_of(one).meets(region_of(other)) == expected
        if region_of(one).covers(region_of(other)) and other.numel():
            assert bytes_of(other) <= bytes_of(one)
        met += expected
    assert 100 < met < 1900


def test_streams_are_lanes_of_virtual_time():
    """Two streams compute at once; an event makes one wait for the other."""

    def body(waits):
        x = torch.ones(1024, 1024)
        stream = side()
        with stream:
            x @ x
        if waits:
            torch.accelerator.current_stream().wait_stream(stream)
        x @ x

    def multiplications(waits):
        world = VirtualWorld(1, cluster="h100-node")
        world.run(body, waits)
        spans = {span.lane: span for span in world.trace.spans if span.name == "aten.mm.default"}
        return spans["compute"], spans["stream 1"]

    on_default, on_side = multiplications(waits=False)
    assert on_default.start == on_side.start
    on_default, on_side = multiplications(waits=True)
    assert on_default.start == on_side.start + on_side.duration
