"""The trace file against the fields that the Trace Event Format documents, and the numbers of a trace."""

import json
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from simulator import VirtualWorld
from simulator.clusters import A100_NODES, H100_NODE
from simulator.trace import Arrow, Span, Trace

NUMBER = (int, float)
FIELDS = {
    "X": {"name": str, "cat": str, "pid": int, "tid": int, "ts": NUMBER, "dur": NUMBER, "args": dict},
    "s": {"name": str, "cat": str, "id": int, "pid": int, "tid": int, "ts": NUMBER},
    "f": {"name": str, "cat": str, "id": int, "pid": int, "tid": int, "ts": NUMBER, "bp": str},
    "M": {"name": str, "pid": int, "args": dict},
}
"""The fields of each phase: complete events, beginning and end of a flow, metadata."""

METADATA = {
    "process_name": {"name": str},
    "process_sort_index": {"sort_index": int},
    "thread_name": {"name": str},
    "thread_sort_index": {"sort_index": int},
}


def problems(file):
    """What in the file is not as the format says, in words."""
    found = [text for event in file["traceEvents"] for text in missing_fields(event)]
    if found:
        return found
    slices, flows, named = defaultdict(list), defaultdict(list), set()
    for event in file["traceEvents"]:
        if event["ph"] == "M":
            named.add((event["name"], event["pid"], event["tid"] if "thread" in event["name"] else None))
        elif event["ph"] == "X":
            slices[event["pid"], event["tid"]].append(event)
        else:
            flows[event["name"], event["cat"], event["id"]].append(event)
    for (pid, tid), row in slices.items():
        names = [(name, pid, tid if "thread" in name else None) for name in METADATA]
        found += [f"no {name[0]}" for name in names if name not in named] + overlaps(row)
    for (name, _, _), ends in flows.items():
        if [end["ph"] for end in ends] != ["s", "f"]:
            found.append("a flow that is no pair")
        elif ends[0]["ts"] > ends[1]["ts"]:
            found.append("a flow that ends before it begins")
        else:
            found += ["a flow outside of a slice" for end in ends if not is_inside(end, name, slices)]
            found += ["bp is not e" for end in ends[1:] if end["bp"] != "e"]
    return found


def missing_fields(event):
    wanted = FIELDS.get(event.get("ph"))
    if wanted is None:
        return ["unknown phase"]
    found = [f"{event['ph']} without {k}" for k, kind in wanted.items() if not isinstance(event.get(k), kind)]
    if event["ph"] == "M" and not found:
        kinds = METADATA.get(event["name"], {"unknown metadata": int})
        found = [
            f"{event['name']} without {k}"
            for k, kind in kinds.items()
            if type(event["args"].get(k)) is not kind
        ]
    return found


def ns(microseconds):
    return round(microseconds * 1000)


def overlaps(row):
    """Slices of a row may lie in each other, and not across each other's ends."""
    found, open_ends = [], []
    for event in sorted(row, key=lambda x: (ns(x["ts"]), -ns(x["dur"]))):
        start, end = ns(event["ts"]), ns(event["ts"]) + ns(event["dur"])
        if start < 0 or end < start:
            found.append("a negative time")
        while open_ends and open_ends[-1] <= start:
            open_ends.pop()
        if open_ends and open_ends[-1] < end:
            found.append("slices overlap")
        open_ends.append(end)
    return found


def is_inside(end, name, slices):
    """Whether the end of a flow lies in a slice of its own row that belongs to the same transfer."""
    return any(
        ns(x["ts"]) <= ns(end["ts"]) < ns(x["ts"]) + ns(x["dur"]) and (x["name"] == name or name == "send")
        for x in slices[end["pid"], end["tid"]]
    )


def step():
    """Collectives, messages, a side stream and a backward pass."""
    rank, stream = dist.get_rank(), torch.Stream()
    x = torch.randn(8, 16, requires_grad=True)
    received = torch.empty(8, 16)
    work = dist.all_to_all_single(received, (x @ x.T @ x).detach(), async_op=True)
    with stream:
        torch.ones(64).sin()
    y = x.sin().sum()
    work.wait()
    (y * received.sum()).backward()
    dist.all_reduce(x.grad)
    operations = [
        dist.P2POp(dist.isend, received, (rank + 1) % 4),
        dist.P2POp(dist.irecv, torch.empty(8, 16), (rank - 1) % 4),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


@pytest.fixture(scope="module")
def trace():
    world = VirtualWorld(4, cluster=replace(A100_NODES, devices_per_node=2))
    world.run(step)
    return world.trace


@pytest.fixture
def file(trace, tmp_path):
    trace.save(str(tmp_path / "trace.json"))
    return json.loads((tmp_path / "trace.json").read_text(), parse_constant=pytest.fail)


def test_the_file_keeps_to_the_format(file):
    assert problems(file) == []
    assert {event["ph"] for event in file["traceEvents"]} == set(FIELDS)


def first(file, phase, category=None):
    """The first event of a phase; on "compute" one that takes a little more than 3 us."""
    return next(x for x in file["traceEvents"] if x["ph"] == phase and category in (None, x.get("cat")))


@pytest.mark.parametrize(
    "damage, problem",
    [
        (lambda file: first(file, "X").pop("dur"), "X without dur"),
        (lambda file: first(file, "X").update(ts=None), "X without ts"),
        (lambda file: first(file, "X", "compute").update(dur=4), "slices overlap"),
        (lambda file: first(file, "X").update(dur=-1.0), "a negative time"),
        (lambda file: first(file, "s").update(tid=1_000), "a flow outside of a slice"),
        (lambda file: first(file, "s").update(ts=1e9), "a flow that ends before it begins"),
        (lambda file: first(file, "f").update(id=-1), "a flow that is no pair"),
        (lambda file: first(file, "f").update(pid=3 - first(file, "f")["pid"], ts=0), "a flow that ends"),
        (lambda file: first(file, "f").update(bp="x"), "bp is not e"),
        (lambda file: first(file, "M").update(name="thread_colour"), "unknown metadata"),
        (lambda file: first(file, "M")["args"].clear(), "process_name without name"),
    ],
)
def test_the_checks_of_this_file_find_damage(file, damage, problem):
    damage(file)
    assert any(problem in text for text in problems(file))


def test_rows_are_ranks_and_their_lanes_in_order(file):
    names = [e for e in file["traceEvents"] if e["name"] == "process_name"]
    assert [(e["pid"], e["args"]["name"]) for e in names] == [(rank, f"rank {rank}") for rank in range(4)]
    threads = [
        (e["pid"], e["tid"], e["args"]["name"]) for e in file["traceEvents"] if e["name"] == "thread_name"
    ]
    lanes = ["compute", "stream 1", "communication", "receive", "send"]
    assert threads == [(rank, tid, lane) for rank in range(4) for tid, lane in enumerate(lanes)]


def test_times_are_microseconds_and_add_up(trace, file):
    ends = [e["ts"] + e["dur"] for e in file["traceEvents"] if e["ph"] == "X"]
    assert max(ends) == pytest.approx(trace.seconds * 1e6, abs=1e-3)  # the file has nanoseconds
    assert len(ends) == len(trace.spans)


def test_slices_say_bytes_flops_and_source_line(file):
    by_name = {e["name"]: e["args"] for e in file["traceEvents"] if e["ph"] == "X"}
    product = by_name["aten.mm.default"]
    assert (product["FLOPs"], product["bytes"]) == (2 * 8 * 8 * 16, 4 * (8 * 8 + 8 * 16 + 8 * 16))
    assert "test_trace.py" in product["line"] and product["line"].endswith("in step")
    exchange = by_name["all_to_all_single"]
    assert (exchange["bytes sent"], exchange["bytes received"]) == (3 * 128, 3 * 128)
    assert exchange["asynchronous"] and exchange["line"].endswith("in step")


def test_arrows_go_from_each_sender_to_each_receiver(file):
    ends = defaultdict(dict)
    for event in file["traceEvents"]:
        if event["ph"] in "sf":
            ends[event["name"], event["id"]][event["ph"]] = event
    pairs = defaultdict(set)
    for (name, _), both in ends.items():
        pairs[name].add((both["s"]["pid"], both["f"]["pid"], both["s"]["args"]["bytes"]))
    everyone = {(a, b) for a in range(4) for b in range(4) if a != b}
    assert pairs["all_to_all_single"] == {(a, b, 128) for a, b in everyone}
    assert pairs["all_reduce"] == {(a, b, 256) for a, b in everyone}
    assert pairs["send"] == {(rank, (rank + 1) % 4, 512) for rank in range(4)}


def test_an_uneven_exchange_has_no_arrow_where_no_bytes_go():
    def body():
        sent = [[2, 3, 0], [0, 0, 1], [0, 0, 0]]
        rank = dist.get_rank()
        received = [row[rank] for row in sent]
        dist.all_to_all_single(torch.empty(sum(received)), torch.zeros(sum(sent[rank])), received, sent[rank])

    world = VirtualWorld(3, cluster="h100-node")
    world.run(body)
    trace = world.trace
    assert [(x.sender, x.receiver, x.bytes) for x in trace.arrows] == [(0, 1, 12), (1, 2, 4)]
    facts = [x.facts for x in trace.spans if x.lane == "communication"]
    assert [(x["bytes sent"], x["bytes received"]) for x in facts] == [(12, 0), (4, 12), (0, 4)]


def test_a_large_collective_keeps_a_stated_part_of_its_arrows():
    world = VirtualWorld(17, cluster="h100-nodes")
    world.run(lambda: dist.all_to_all_single(torch.empty(17), torch.zeros(17)))
    trace = world.trace
    assert trace.pairs == 17 * 16
    assert len(trace.arrows) == 255
    assert {(x.receiver - x.sender) % 17 for x in trace.arrows} == set(range(1, 16))
    assert trace.as_json()["otherData"]["arrows"].startswith("255 of 272 pairs")
    assert problems(trace.as_json()) == []


def test_a_large_collective_has_no_arrow_where_no_bytes_go():
    def body():
        rank = dist.get_rank()
        sent = [[int((sender, receiver) != (0, 1)) for receiver in range(18)] for sender in range(18)]
        received = [row[rank] for row in sent]
        dist.all_to_all_single(torch.empty(sum(received)), torch.zeros(sum(sent[rank])), received, sent[rank])

    world = VirtualWorld(18, cluster="h100-nodes")
    world.run(body)
    pairs = {(x.sender, x.receiver) for x in world.trace.arrows}
    assert len(pairs) == 18 * 14 - 1 and (0, 1) not in pairs
    assert world.trace.pairs == 18 * 17 - 1


def test_the_file_says_which_model_made_its_times(file):
    cluster = file["otherData"]["cluster"]
    assert (cluster["name"], cluster["devices_per_node"], cluster["nodes"]) == ("a100-nodes", 2, None)
    assert cluster["link_bandwidth"] == 300e9


def test_the_same_program_writes_the_same_bytes(trace, tmp_path):
    files = set()
    for seed in (None, 1, 2, 3):
        world = VirtualWorld(4, seed=seed, cluster=replace(A100_NODES, devices_per_node=2))
        world.run(step)
        world.trace.save(tmp_path / "again.json")
        files.add((tmp_path / "again.json").read_bytes())
    assert len(files) == 1


def test_neighbouring_slices_do_not_overlap_after_rounding():
    spans, start = [], 0.0
    for number in range(2_000):
        spans.append(Span(0, "compute", str(number), start, 1.23456789e-6 / 7, {}))
        start += spans[-1].duration
    assert problems(Trace(spans, [], 0, H100_NODE).as_json()) == []


def spans_of(rank, *spans):
    return [Span(rank, lane, "x", start, end - start, {}) for lane, start, end in spans]


def test_busy_times_are_unions():
    """Two streams that compute at once are busy once; hidden communication is not exposed."""
    spans = spans_of(
        0, ("compute", 0, 4), ("side", 2, 6), ("communication", 5, 9), ("send", 8, 10), ("receive", 12, 13)
    ) + spans_of(3, ("send", 0, 15))
    one, other = Trace(spans, [], 0, H100_NODE).by_rank()
    assert (one.rank, one.compute, one.communication, one.exposed, one.idle) == (0, 6, 6, 5, 4)
    assert (other.rank, other.compute, other.communication, other.exposed, other.idle) == (3, 0, 15, 15, 0)


def test_the_table_has_units():
    spans = spans_of(0, ("compute", 0, 2.5), ("communication", 2.5, 2.504)) + spans_of(1, ("send", 0, 3e-6))
    assert str(Trace(spans, [], 0, H100_NODE)).splitlines() == [
        "2.50 s on 'h100-node', a model of the hardware",
        "rank      compute  communication      exposed         idle",
        "   0       2.50 s        4.00 ms      4.00 ms      0.00 us",
        "   1      0.00 us        3.00 us      3.00 us       2.50 s",
    ]


def test_a_trace_without_spans_is_empty(tmp_path):
    trace = Trace([], [], 0, H100_NODE)
    assert trace.seconds == 0 and trace.by_rank() == []
    trace.save(tmp_path / "empty.json")
    assert json.loads((tmp_path / "empty.json").read_text())["traceEvents"] == []


def test_an_arrow_between_rows_that_do_not_meet_would_be_found():
    """Arrows take their rows from the lanes of sender and receiver."""
    spans = spans_of(0, ("send", 0, 4)) + spans_of(1, ("receive", 0, 4), ("send", 5, 6))
    right = Arrow("send", 0, "send", 1, "receive", 8, 0.0, 4.0)
    assert problems(Trace(spans, [right], 1, H100_NODE).as_json()) == []
    swapped = right._replace(receiver_lane="send")
    assert "a flow outside of a slice" in problems(Trace(spans, [swapped], 1, H100_NODE).as_json())


def test_a_trace_draws_itself(trace):
    svg = trace._repr_svg_()
    assert "<svg" in svg and svg == trace.draw()._repr_svg_()


def test_a_file_that_cannot_be_written_raises(trace, tmp_path):
    with pytest.raises(OSError, match="missing"):
        trace.save(tmp_path / "missing" / "trace.json")
