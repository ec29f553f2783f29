"""Virtual time against times worked out by hand.

On `TINY` writing n bytes takes n seconds, and so does sending n bytes inside a node; between nodes they take 4 n. There
is no latency. All numbers are integers or halves, so that times are compared exactly.
"""

import gc
import weakref
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.nn.functional as F

from simulator import VirtualWorld
from simulator.clusters import CLUSTERS, H100_NODE, H100_NODES, Cluster, cluster_of
from simulator.costs import transfer_seconds
from simulator.errors import ClusterError, DeadlockError, WorldError

TINY = Cluster(
    name="tiny",
    devices_per_node=2,
    nodes=None,
    float64_flops=1e30,
    float32_flops=1e30,
    half_flops=1e30,
    compute_efficiency=1.0,
    memory_bandwidth=1.0,
    memory_efficiency=1.0,
    launch_seconds=0.0,
    link_bandwidth=1.0,
    link_efficiency=1.0,
    link_latency=0.0,
    nics_per_node=2,
    network_bandwidth=0.25,
    network_efficiency=1.0,
    network_latency=0.0,
    call_latency=0.0,
)


def compute(seconds):
    torch.empty(seconds, dtype=torch.uint8).fill_(0)


def empty(*sizes):
    """A tensor that nobody has written to, which takes no time."""
    return torch.empty(*sizes, dtype=torch.uint8)


def exchange(sent, is_async=False, group=None):
    """An all-to-all in which group rank r sends sent[r][s] bytes to s."""
    rank = dist.get_rank(group)
    received = [row[rank] for row in sent]
    return dist.all_to_all_single(
        empty(sum(received)), empty(sum(sent[rank])), received, sent[rank], async_op=is_async, group=group
    )


def timeline(trace, rank):
    """(lane, start, end) of one rank's spans, earliest first."""
    spans = [(x.lane, x.start, x.start + x.duration) for x in trace.spans if x.rank == rank]
    return sorted(spans, key=lambda span: (span[1], span[0]))


def run(size, body, cluster=TINY, **options):
    world = VirtualWorld(size, cluster=cluster, **options)
    world.run(body)
    return world.trace


BOTH = [[0, 4], [4, 0]]
"""Two ranks send each other 4 bytes."""


def test_operations_follow_each_other_and_views_take_no_time():
    def body():
        compute(3)
        empty(6).view(2, 3).t()
        compute(2)

    trace = run(1, body)
    assert timeline(trace, 0) == [("compute", 0, 3), ("compute", 3, 5)]
    assert trace.seconds == 5


def test_an_operation_takes_the_longer_of_computing_and_moving_after_its_launch():
    def body():
        torch.mm(torch.empty(2, 3), torch.empty(3, 5))  # 60 FLOPs, 4 (6 + 15 + 10) = 124 bytes

    by_memory = replace(TINY, float32_flops=1.0, memory_bandwidth=2.0, launch_seconds=0.5)
    assert timeline(run(1, body, by_memory), 0) == [("compute", 0, 0.5 + 62)]
    by_flops = replace(TINY, float32_flops=0.5, memory_bandwidth=2.0, launch_seconds=0.5)
    assert timeline(run(1, body, by_flops), 0) == [("compute", 0, 0.5 + 120)]
    slower = replace(by_flops, compute_efficiency=0.5)
    assert timeline(run(1, body, slower), 0) == [("compute", 0, 0.5 + 240)]
    still_slower = replace(slower, memory_efficiency=0.125)
    assert timeline(run(1, body, still_slower), 0) == [("compute", 0, 0.5 + 496)]


@pytest.mark.parametrize(
    "dtype, seconds",
    [(torch.float64, 1), (torch.float32, 2), (torch.bfloat16, 4), (torch.float16, 4), (torch.complex64, 2)],
)
def test_each_dtype_has_its_own_peak(dtype, seconds):
    cluster = replace(TINY, memory_bandwidth=1e30, float64_flops=60, float32_flops=30, half_flops=15)
    trace = run(1, lambda: torch.mm(torch.empty(2, 3, dtype=dtype), torch.empty(3, 5, dtype=dtype)), cluster)
    assert trace.spans[0].duration == seconds


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_on_cpu_counts_the_flops_of_attention(kv_heads):
    """2 products of 2 b h s_q s_k d each; backward does these and the scores once more: 5."""

    def body():
        query = torch.randn(2, 4, 3, 8, requires_grad=True)
        key, value = (torch.randn(2, kv_heads, 5, 8, requires_grad=True) for _ in range(2))
        F.scaled_dot_product_attention(query, key, value, enable_gqa=True).sum().backward()

    counted = [x.facts["FLOPs"] for x in run(1, body).spans if "attention" in x.name]
    product = 2 * 2 * 4 * 3 * 5 * 8
    assert counted == [2 * product, 5 * product]


def test_a_convolution_with_other_strides_is_counted_again():
    def body():
        image, kernel = torch.empty(1, 1, 5, 5), torch.empty(1, 1, 1, 1)
        F.conv2d(image, kernel)
        F.conv2d(image, kernel, stride=2)

    assert [x.facts["FLOPs"] for x in run(1, body).spans] == [2 * 25, 2 * 9]


def test_an_expanded_tensor_is_read_once():
    trace = run(1, lambda: empty(1).expand(10).clone())
    assert trace.spans[0].facts["bytes"] == 1 + 10


def test_an_asynchronous_call_hides_behind_computation():
    def body():
        compute(1)
        work = exchange(BOTH, is_async=True)
        compute(10)
        work.wait()
        compute(2)

    trace = run(2, body)
    assert timeline(trace, 0) == [
        ("compute", 0, 1),
        ("communication", 1, 5),
        ("compute", 1, 11),
        ("compute", 11, 13),
    ]
    times = trace.by_rank()[0]
    assert (times.compute, times.communication, times.exposed, times.idle) == (13, 4, 0, 0)


def test_what_is_not_hidden_is_exposed():
    def body():
        work = exchange(BOTH, is_async=True)
        compute(3)
        work.wait()
        compute(2)

    trace = run(2, body)
    assert timeline(trace, 1) == [("communication", 0, 4), ("compute", 0, 3), ("compute", 4, 6)]
    times = trace.by_rank()[1]
    assert (times.compute, times.communication, times.exposed, times.idle) == (5, 4, 1, 0)


def test_a_synchronous_call_holds_the_lane():
    def body():
        exchange(BOTH)
        compute(3)

    assert timeline(run(2, body), 0) == [("communication", 0, 4), ("compute", 4, 7)]


def test_a_collective_begins_when_the_last_rank_has_come():
    def body():
        compute(1 + 9 * dist.get_rank())
        exchange(BOTH)

    trace = run(2, body)
    assert timeline(trace, 0) == [("compute", 0, 1), ("communication", 10, 14)]
    assert timeline(trace, 1) == [("compute", 0, 10), ("communication", 10, 14)]
    early, late = trace.by_rank()
    assert (early.exposed, early.idle) == (4, 9)
    assert (late.exposed, late.idle) == (4, 0)


def test_collectives_of_one_rank_follow_each_other():
    def body():
        works = [exchange(BOTH, is_async=True), exchange([[0, 1], [2, 0]], is_async=True)]
        compute(1)
        for work in works:
            work.wait()

    assert timeline(run(2, body), 0) == [
        ("communication", 0, 4),
        ("compute", 0, 1),
        ("communication", 4, 6),
    ]


def test_each_pair_uses_the_link_between_it():
    """Ranks 0 and 1 share a node: 7 bytes inside it take 7 s, 2 to another one 8 s; the other way round 2 s, 28 s."""

    def body(within, between):
        return lambda: exchange([[0, within, 0, 0], [0, 0, between, 0], [0] * 4, [0] * 4])

    assert run(4, body(7, 2)).seconds == 8
    assert run(4, body(9, 2)).seconds == 9
    assert run(4, body(2, 7)).seconds == 28


def test_the_busiest_rank_decides_and_both_directions_go_at_once():
    sent = [[0, 5, 1, 0], [3, 0, 0, 0], [0, 2, 0, 0], [0, 6, 0, 0]]  # rank 0 sends 6, rank 1 receives 13
    cluster = replace(TINY, devices_per_node=4, nics_per_node=4)
    assert run(4, lambda: exchange(sent), cluster).seconds == 13


def test_a_network_card_sends_and_receives_at_once_and_serves_its_own_node_only():
    def seconds(*pairs):
        sent = np.zeros((6, 6), dtype=np.int64)
        for sender, receiver in pairs:
            sent[sender, receiver] = 3
        return transfer_seconds(TINY, "all_to_all_single", sent, range(6))

    assert seconds((0, 2)) == 12
    assert seconds((0, 2), (2, 0)) == 12
    assert seconds((0, 2), (0, 4)) == 24
    assert seconds((0, 4), (2, 4)) == 24


def test_devices_that_share_a_network_card_share_its_bandwidth():
    sent = [[0, 0, 3, 0], [0, 0, 0, 3], [0] * 4, [0] * 4]
    assert run(4, lambda: exchange(sent)).seconds == 12
    assert run(4, lambda: exchange(sent), replace(TINY, nics_per_node=1)).seconds == 24


LINK, NET = 0.5, 3.0
RINGS = [
    # kind, ranks, bytes [sender, receiver], seconds
    ("all_reduce", 4, 4, 1 + 6 * LINK + 6),  # 2 * 4 * 3/4 bytes
    ("all_gather_single", 4, 4, 1 + 3 * LINK + 12),  # 4 shards of 4: 16 * 3/4
    ("reduce_scatter_single", 4, 4, 1 + 3 * LINK + 12),
    ("broadcast", 4, 4, 1 + 3 * LINK + 4),
    ("reduce", 4, 4, 1 + 3 * LINK + 4),
    ("barrier", 4, 4, 1 + 6 * LINK),
    ("all_reduce", 1, 4, 0),
]


@pytest.mark.parametrize("kind, size, count, seconds", RINGS)
def test_ring_collectives_take_the_time_of_a_ring(kind, size, count, seconds):
    cluster = replace(TINY, devices_per_node=4, call_latency=1.0, link_latency=LINK, network_latency=NET)
    trace = run(size, lambda: ring_call(kind, size, count), cluster)
    assert trace.seconds == seconds


def ring_call(kind, size, count):
    if kind == "barrier":
        dist.barrier()
    elif kind == "all_gather_single":
        dist.all_gather_single(empty(size * count), empty(count))
    elif kind == "reduce_scatter_single":
        dist.reduce_scatter_single(empty(count), empty(size * count))
    else:
        rooted = {"src": 1} if kind == "broadcast" else {"dst": 1} if kind == "reduce" else {}
        getattr(dist, kind)(empty(count), **rooted)


def test_a_ring_over_two_nodes_crosses_them_through_all_their_cards():
    """4 ranks a node: 2 steps between nodes and 6 within, twice; 2 * 8 * 7/8 = 14 bytes on each link."""
    body = lambda: dist.all_reduce(empty(8))  # noqa: E731
    cluster = replace(TINY, devices_per_node=4, call_latency=1.0, link_latency=LINK, network_latency=NET)
    steps = 1 + 2 * (6 * LINK + 1 * NET)
    assert run(8, body, replace(cluster, nics_per_node=4)).seconds == steps + 14  # 4 cards carry 1 B/s
    assert run(8, body, replace(cluster, nics_per_node=8)).seconds == steps + 14  # the link is slower: 1 B/s
    assert run(8, body, replace(cluster, nics_per_node=1)).seconds == steps + 56
    assert run(8, body, replace(cluster, nics_per_node=2)).seconds == steps + 28


def test_the_node_with_fewest_cards_slows_a_ring_down():
    """3 ranks on nodes of 2: one node has one rank, and so one card; 2 * 6 * 2/3 = 8 bytes on each link."""
    assert run(3, lambda: dist.all_reduce(empty(6))).seconds == 32


def test_uneven_shards_leave_out_the_smallest_one():
    def body():
        sizes = [1, 5, 3]
        dist.all_gather([empty(size) for size in sizes], empty(sizes[dist.get_rank()]))

    assert run(3, body, replace(TINY, devices_per_node=3)).seconds == 8


def test_a_direct_transfer_pays_one_step():
    cluster = replace(TINY, call_latency=1.0, link_latency=LINK, network_latency=NET)

    def seconds(*row):
        sent = np.zeros((4, 4), dtype=np.int64)
        sent[0] = row
        return transfer_seconds(cluster, "all_to_all_single", sent, range(4))

    assert seconds(0, 0, 0, 0) == 1
    assert seconds(0, 2, 0, 0) == 1 + LINK + 2
    assert seconds(0, 2, 0, 1) == 1 + NET + 4


def test_messages_around_a_ring_go_at_once():
    def body():
        rank = dist.get_rank()
        operations = [
            dist.P2POp(dist.isend, empty(4), (rank + 1) % 8),
            dist.P2POp(dist.irecv, empty(4), (rank - 1) % 8),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    trace = run(8, body, replace(TINY, devices_per_node=8))
    assert timeline(trace, 3) == [("receive", 0, 4), ("send", 0, 4)]
    assert trace.seconds == 4


def test_messages_of_one_sender_follow_each_other():
    def body():
        if dist.get_rank() == 0:
            for work in [dist.isend(empty(2), 1), dist.isend(empty(3), 2)]:
                work.wait()
        else:
            dist.recv(empty(1 + dist.get_rank()), 0)

    trace = run(3, body, replace(TINY, devices_per_node=3))
    assert timeline(trace, 0) == [("send", 0, 2), ("send", 2, 5)]
    assert timeline(trace, 2) == [("receive", 2, 5)]


def test_a_blocking_send_waits_for_its_receiver():
    def body():
        if dist.get_rank() == 0:
            dist.send(empty(2), 1)
            compute(1)
        else:
            compute(10)
            dist.recv(empty(2), 0)

    assert timeline(run(2, body), 0) == [("send", 10, 12), ("compute", 12, 13)]


def test_a_functional_collective_is_waited_for_where_it_is_used():
    def body():
        result = functional.all_gather_single(empty(4), 0, dist.group.WORLD)
        compute(3)
        result + 1

    assert [x[1:] for x in timeline(run(2, body), 0)] == [(0, 4), (0, 3), (4, 4 + 16)]


def test_who_is_ready_first_goes_first_whatever_the_order_of_the_ranks():
    """Groups (0, 1) and (1, 2) share rank 1. Rank 0 comes late, so the second call of rank 1 starts first."""

    def body():
        rank = dist.get_rank()
        left, right = dist.new_group([0, 1]), dist.new_group([1, 2])
        compute([5, 1, 2][rank])
        works = [
            exchange(BOTH, True, group)
            for group, members in ((left, (0, 1)), (right, (1, 2)))
            if rank in members
        ]
        compute(1)
        for work in works:
            work.wait()

    cluster = replace(TINY, devices_per_node=3)
    trace = run(3, body, cluster)
    assert [x for x in timeline(trace, 1) if x[0] == "communication"] == [
        ("communication", 2, 6),
        ("communication", 6, 10),
    ]
    for seed in range(20):
        assert run(3, body, cluster, seed=seed) == trace


def test_a_transfer_that_has_to_wait_for_a_port_lets_others_go_first():
    """The pair (1, 2) is ready before (2, 3), but rank 1 is taken until 4; so (2, 3) goes at 2."""

    def body():
        rank = dist.get_rank()
        pairs = [(0, 1), (1, 2), (2, 3)]
        groups = [dist.new_group(list(pair)) for pair in pairs]
        works = []
        for pair, group in zip(pairs, groups, strict=True):
            if rank in pair:
                works.append(exchange(BOTH, True, group))
                compute(1 if pair[0] == rank or rank == 1 else 2)
        for work in works:
            work.wait()

    trace = run(4, body, replace(TINY, devices_per_node=4))
    starts = {x.facts["group"]: x.start for x in trace.spans if x.lane == "communication"}
    assert sorted(starts.values()) == [0, 2, 6]


def test_of_two_that_wait_for_the_same_port_the_one_that_was_ready_first_goes_first():
    """Rank 1 is taken until 4. Then comes (1, 3), ready at 2, then (1, 2), ready at 3."""

    def body():
        rank = dist.get_rank()
        pairs = [(0, 1), (1, 2), (1, 3)]
        groups = [dist.new_group(list(pair)) for pair in pairs]
        compute([0, 0, 3, 2][rank])
        works = [
            exchange(BOTH, True, group) for pair, group in zip(pairs, groups, strict=True) if rank in pair
        ]
        for work in works:
            work.wait()

    trace = run(4, body, replace(TINY, devices_per_node=4))
    assert timeline(trace, 3)[-1] == ("communication", 4, 8)
    assert timeline(trace, 2)[-1] == ("communication", 8, 12)


def test_a_message_to_a_rank_in_a_collective_waits():
    def body():
        rank = dist.get_rank()
        pair = dist.new_group([0, 1])
        works = [] if rank == 2 else [exchange(BOTH, True, pair)]
        if rank != 1:
            works.append(dist.isend(empty(3), 0) if rank else dist.irecv(empty(3), 2))
        for work in works:
            work.wait()

    assert timeline(run(3, body, replace(TINY, devices_per_node=3)), 2) == [("send", 4, 7)]


def test_messages_between_two_ranks_keep_their_order():
    def body():
        call = dist.irecv if dist.get_rank() else dist.isend
        for work in [call(empty(size), 1 - dist.get_rank()) for size in (2, 5, 3)]:
            work.wait()

    assert timeline(run(2, body), 1) == [("receive", 0, 2), ("receive", 2, 7), ("receive", 7, 10)]


def test_collectives_of_a_group_keep_their_order_on_every_stream():
    def body():
        stream = torch.Stream()
        compute(5)
        works = [exchange(BOTH, is_async=True)]
        with stream:  # which is at time 0
            works.append(exchange([[0, 1], [2, 0]], is_async=True))
        for work in works:
            work.wait()

    assert timeline(run(2, body), 0) == [
        ("compute", 0, 5),
        ("communication", 5, 9),
        ("communication", 9, 11),
    ]


def test_the_same_program_gives_the_same_trace_under_every_seed():
    def body():
        rank = dist.get_rank()
        compute(1 + rank * 3 % 5)
        halves = [dist.new_group([0, 1, 2]), dist.new_group([3, 4, 5])]
        rows = dist.new_group([rank % 3, rank % 3 + 3], use_local_synchronization=True)
        works = [dist.all_reduce(torch.empty(8), group=halves[rank // 3], async_op=True)]
        works.append(dist.all_reduce(torch.empty(4), group=rows, async_op=True))
        works.append(dist.isend(empty(3), (rank + 1) % 6))
        compute(2)
        works.append(dist.irecv(empty(3), (rank - 1) % 6))
        for work in reversed(works):
            work.wait()
            compute(1)
        dist.barrier()

    trace = run(6, body)
    assert trace.seconds > 0
    for seed in range(20):
        assert run(6, body, seed=seed) == trace


def test_lanes_of_streams_wait_where_they_are_told_to():
    """What virtual streams call: a lane for a stream, a mark for an event, a join for a wait."""

    def body():
        clock = world._last.clock
        compute(3)
        event = clock.mark(0)
        clock.switch(0, "side")
        compute(1)  # a new stream waits for nothing
        clock.join(0, event)
        compute(2)
        work = exchange([[0]], is_async=True)
        done = clock.mark(0)
        clock.switch(0, "compute")
        compute(4)
        clock.join(0, done)
        work.wait()
        compute(1)
        clock.synchronize(0, clock.mark(0))
        clock.switch(0, "new")
        compute(1)

    world = VirtualWorld(1, cluster=TINY)
    world.run(body)
    spans = [x for x in timeline(world.trace, 0) if x[0] != "communication"]
    assert spans == [
        ("compute", 0, 3),
        ("side", 0, 1),
        ("compute", 3, 7),
        ("side", 3, 5),
        ("compute", 7, 8),
        ("new", 8, 9),
    ]


def test_a_host_that_has_waited_for_several_lanes_begins_a_new_one_after_all_of_them():
    def body():
        streams = [torch.Stream() for _ in range(2)]
        for seconds, stream in zip((7, 3), streams, strict=True):
            with stream:
                compute(seconds)
        for stream in streams:
            stream.synchronize()
        with torch.Stream():
            compute(1)

    assert timeline(run(1, body), 0) == [("stream 1", 0, 7), ("stream 2", 0, 3), ("stream 3", 7, 8)]


def test_a_wait_holds_only_the_lane_on_which_it_is_called():
    def body():
        clock, rank = world._last.clock, dist.get_rank()
        work = exchange(BOTH, is_async=True)
        clock.switch(rank, "side")
        compute(1)
        work.wait()
        compute(1)
        clock.switch(rank, "compute")
        compute(6)

    world = VirtualWorld(2, cluster=TINY)
    world.run(body)
    assert timeline(world.trace, 1) == [
        ("communication", 0, 4),
        ("compute", 0, 6),
        ("side", 0, 1),
        ("side", 4, 5),
    ]


def test_a_joint_backward_goes_on_where_the_run_ended():
    x = torch.ones(4, requires_grad=True)
    world = VirtualWorld(2, "joint", cluster=TINY)
    results = world.run(lambda: x * 2)
    forward = world.trace
    assert forward.seconds == 32  # reads 16 bytes and writes 16
    torch.stack(results).sum().backward()
    assert [timeline(world.trace, rank)[0] for rank in range(2)] == [("compute", 0, 32)] * 2
    assert [timeline(world.trace, rank)[1][1] for rank in range(2)] == [32] * 2


def test_a_run_that_fails_keeps_its_trace_so_far():
    def body():
        compute(2)
        if dist.get_rank() == 0:
            dist.barrier()

    world = VirtualWorld(2, cluster=TINY)
    with pytest.raises(DeadlockError):
        world.run(body)
    assert world.trace.seconds == 2


def test_calls_that_nobody_waits_for_are_in_the_trace():
    trace = run(2, lambda: exchange(BOTH, is_async=True) and None, hazards="off")
    assert trace.seconds == 4


def test_the_clock_keeps_no_tensor_alive():
    def body():
        received = empty(4)
        dist.all_to_all_single(received, empty(4), async_op=True)
        return weakref.ref(received)

    world = VirtualWorld(2, cluster=TINY, hazards="off")
    references = world.run(body)
    assert world.trace.seconds == 2
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_presets_are_found_by_name_and_hold_their_ranks():
    for name, cluster in CLUSTERS.items():
        assert cluster_of(name, 8) is cluster_of(cluster, 8) is cluster
        assert cluster.name == name
    assert cluster_of("a100-nodes", 64).devices_per_node == 8
    with pytest.raises(ClusterError, match="9 ranks do not fit on 'h100-node', which has 8 devices"):
        VirtualWorld(9, cluster="h100-node")
    with pytest.raises(ClusterError, match=r"'b100' is no cluster.\n.*a100-node, h100-node, a100-nodes"):
        VirtualWorld(2, cluster="b100")
    with pytest.raises(ClusterError, match="is no cluster"):
        VirtualWorld(2, cluster=8)


def test_published_times_beside_the_models():
    """The comparison that the docstring of `simulator.clusters` states."""
    sent = np.full((8, 8), 84_700_000 // 7)
    np.fill_diagonal(sent, 0)
    seconds = transfer_seconds(H100_NODE, "all_to_all_single", sent, range(8))
    assert round(seconds * 1e6) == 237
    ring = transfer_seconds(H100_NODES, "all_reduce", np.full((16, 16), 2**30 // 8), range(16))
    assert 2**30 * 2 * 15 / 16 / ring < 8 * 50e9  # no faster than the network cards


@pytest.mark.parametrize("field", [field.name for field in fields(Cluster) if field.name != "name"])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "8", True])
def test_a_number_that_cannot_be_is_refused(field, value):
    with pytest.raises(ClusterError, match=f"cluster 'tiny' has {field}=.*\n  Give {field} "):
        replace(TINY, **{field: value})


def test_zero_is_refused_where_it_divides_and_allowed_where_it_is_a_time():
    for field in fields(Cluster):
        if field.name.endswith(("_latency", "_seconds")):
            replace(TINY, **{field.name: 0})
        elif field.name != "name":
            with pytest.raises(ClusterError, match=field.name):
                replace(TINY, **{field.name: 0})
    with pytest.raises(ClusterError, match=r"link_efficiency=1\.5"):
        replace(TINY, link_efficiency=1.5)


def test_a_world_without_a_cluster_has_no_trace():
    world = VirtualWorld(2)
    with pytest.raises(WorldError, match=r"has no cluster.*\n  Pass cluster"):
        _ = world.trace
