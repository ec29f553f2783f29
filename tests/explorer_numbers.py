"""The explorer's numbers against seqpar_ref: drawn settings, and what the packages say of them.

The page computes in JavaScript. Tests run it in node, or in the browser, by a function
`run(name, settings) -> answers` and hand it to the checks here.
"""

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from explorer.from_python import SHOWN, shown_lines
from seqpar_ref import make_plan
from seqpar_ref.checks import check_tensor
from seqpar_ref.errors import SeqparError
from seqpar_ref.exchange import heads_to_sequence, qkv_to_heads
from seqpar_ref.plan import Plan
from seqpar_ref.routes import FUSED_UP_TO, Load, Route, routes_to_heads, wire_of
from seqpar_ref.shapes import LAYOUTS, layout_of
from simulator import VirtualWorld

Setting = dict[str, str]
Run = Callable[[str, list[Setting]], list[Any]]

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
WRONG = ("", "-1", "0", "2.5", "1e300", "1e17", "1e-7", "x", "it's", "7", "300000000", "99999999999999999999")


def drawn_settings(count: int = 330) -> list[Setting]:
    """Settings of all kinds, the same in every run; about a third of them are refused."""
    draw = random.Random(5)
    settings = []
    for _ in range(count):
        ranks, kv_heads = draw.randint(1, 20), draw.randint(1, 9)
        setting = {
            "ranks": str(ranks),
            "heads": str(kv_heads * draw.randint(1, 7)),
            "kv_heads": draw.choice(["", str(kv_heads), str(kv_heads)]),
            "tokens": draw.choice([str(draw.randint(0, 10**6)), by_rank(draw, ranks)]),
            "policy": draw.choice(["auto", "balanced", "groups"]),
            "layout": draw.choice(list(LAYOUTS)),
            "batch": str(draw.randint(0, 5)),
            "head_dim": str(draw.choice([1, 8, 64, 128])),
            "dtype": draw.choice(list(DTYPES)),
        }
        if draw.random() < 0.35:
            setting[draw.choice(list(setting))] = draw.choice(WRONG)
        settings.append(setting)
    return settings


def settings_at_bounds() -> list[Setting]:
    """Where one more, or one less, decides."""
    small = {"ranks": "8", "heads": "2", "kv_heads": "2", "policy": "auto", "layout": "b s h d", "batch": "1"}
    small |= {"tokens": "8", "head_dim": "1", "dtype": "float32"}
    many = {
        **small,
        "ranks": "1",
        "heads": str(2**10),
        "kv_heads": "1",
        "tokens": str(2**30),
        "head_dim": str(2**10),
    }
    smollm = {**small, "ranks": "4", "heads": "9", "kv_heads": "3"}
    return [
        *({**small, "tokens": str(2**44 - less)} for less in (0, 1)),  # tokens times heads times ranks: 2**48
        *({**many, "batch": str(2**9 - less)} for less in (0, 1)),  # what Plan.bytes can count
        *(
            {**smollm, "tokens": tokens} for tokens in ("0, 0, 1, 5", "0, 1, 1, 5")
        ),  # kv heads decide for "auto"
        *({**small, "heads": "4", "kv_heads": kv_heads} for kv_heads in ("3", "5", "0", "")),
    ]


def by_rank(draw: random.Random, ranks: int) -> str:
    """A count of tokens for each rank; sometimes one too many."""
    counts = [str(draw.choice([0, 1, 5, 4096])) for _ in range(ranks + (draw.random() < 0.1))]
    return ", ".join(counts) + ("," if ranks == 1 else "")


def literal(text: str) -> object:
    """A field of the form as an argument: an integer or a float where it is one, None where it is empty."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text or None


def literals(text: str) -> object:
    """The field for tokens: a list where there is a comma."""
    return [literal(part.strip()) for part in text.strip(", ").split(",")] if "," in text else literal(text)


def plan_of(setting: Setting) -> Plan:
    return make_plan(
        ranks=literal(setting["ranks"]),  # type: ignore[arg-type]
        heads=literal(setting["heads"]),  # type: ignore[arg-type]
        kv_heads=literal(setting["kv_heads"]),  # type: ignore[arg-type]
        tokens=literals(setting["tokens"]),  # type: ignore[arg-type]
        policy=setting["policy"],  # type: ignore[arg-type]
    )


def expected(setting: Setting) -> dict[str, Any]:
    """What the page has to say."""
    batch, head_dim = literal(setting["batch"]), literal(setting["head_dim"])
    dtype = DTYPES.get(setting["dtype"], setting["dtype"])
    try:
        plan = plan_of(setting)
        sent = plan.bytes(batch, head_dim, dtype)  # type: ignore[arg-type]
        layout = layout_of(setting["layout"])
        if head_dim == 0:
            shape = layout.shape(batch, len(plan.tokens_of(0)), plan.heads, 0)  # type: ignore[arg-type]
            check_tensor("query", torch.empty(shape, dtype=dtype), layout)  # type: ignore[arg-type]
    except SeqparError as error:
        return {"error": f"{type(error).__name__}: {error}"}

    def runs(runs: Any) -> list[dict[str, int]]:
        return [
            {"first": int(first), "end": int(end)} for first, end in zip(runs.first, runs.end, strict=True)
        ]

    wire = wire_of("auto", plan, batch, (head_dim,) * 3, dtype) if plan.ranks <= 16 else None  # type: ignore
    return {
        "plan": {
            "ranks": plan.ranks,
            "tokens": plan.tokens,
            "heads": plan.heads,
            "kvHeads": plan.kv_heads,
            "tokenRuns": runs(plan.token_runs),
            "headRuns": {kind: runs(plan.head_runs[kind]) for kind in ("query", "kv", "kv once")},  # type: ignore
            "table": str(plan),
        },
        "vectors": {kind: plan.vectors(kind).tolist() for kind in ("query", "kv", "kv once")},  # type: ignore
        "bytes": [[str(entry) for entry in row] for row in sent.tolist()],
        "wire": wire,
    }


def check_numbers(run: Run) -> None:
    """Every drawn setting has the plan, the vectors, the bytes or the error of Python."""
    settings = [*drawn_settings(), *settings_at_bounds()]
    refused = 0
    for setting, answer in zip(settings, run("answer", settings), strict=True):
        said = expected(setting)
        refused += "error" in said
        assert answer == said, setting
    assert refused >= 80 and len(settings) - refused >= 200


def drawn_worlds() -> list[Setting]:
    """Small settings that can be drawn, and one so large that q, k and v travel one by one."""
    draw = random.Random(6)
    settings = []
    for index in range(15):
        ranks, kv_heads = draw.randint(1, 5), draw.randint(1, 4)
        settings.append(
            {
                "ranks": str(ranks),
                "heads": str(kv_heads * draw.randint(1, 4)),
                "kv_heads": str(kv_heads),
                "tokens": draw.choice(
                    [str(ranks * 2), ", ".join(str(draw.randint(0, 3)) for _ in range(ranks)) + ","]
                ),
                "policy": draw.choice(["auto", "balanced", "groups"]),
                "layout": list(LAYOUTS)[index % 3],
                "batch": str(draw.randint(1, 3)),
                "head_dim": "2",
                "dtype": "float32",
            }
        )
    large = {
        "ranks": "2",
        "heads": "2",
        "kv_heads": "1",
        "tokens": "4",
        "batch": "1",
        "head_dim": str(FUSED_UP_TO // 16),
    }
    return [*settings, {**settings[0], **large}]


def check_frames(run: Run) -> None:
    """Every tile shows the slice that has its block: of the tensors, and of the buffers that pack makes."""
    settings = drawn_worlds()
    for setting, steps in zip(settings, run("shown", settings), strict=True):
        World(setting).check(steps)


class World:
    """One setting, run on virtual ranks with values that are different everywhere."""

    def __init__(self, setting: Setting) -> None:
        self.plan = plan_of(setting)
        self.layout = LAYOUTS[setting["layout"]]
        batch, dim = int(setting["batch"]), int(setting["head_dim"])
        heads = {"query": self.plan.heads, "key": self.plan.kv_heads, "value": self.plan.kv_heads}
        heads["output"] = self.plan.heads
        self.all: dict[str, torch.Tensor] = {}
        start = 0
        for name, count in heads.items():
            shape = self.layout.shape(batch, self.plan.tokens, count, dim)
            size = batch * self.plan.tokens * count * dim
            self.all[name] = torch.arange(start, start + size, dtype=torch.float64).view(shape)
            start += size
        self.fused = wire_of("auto", self.plan, batch, (dim,) * 3, torch.float32) == "fused"
        self.dim = dim

    def block(self, name: str, tokens_of: int, heads_of: int) -> torch.Tensor:
        """What one rank's tokens have of another rank's heads."""
        plan, layout = self.plan, self.layout
        query = name in ("query", "output")
        tokens = plan.tokens_of(tokens_of)
        heads = plan.query_heads(heads_of) if query else plan.kv_heads_of(heads_of)
        part = self.all[name].narrow(layout.sequence, tokens.start, len(tokens))
        return part.narrow(layout.heads, heads.start, len(heads))

    def shard(self, name: str, rank: int) -> torch.Tensor:
        tokens = self.plan.tokens_of(rank)
        return self.all[name].narrow(self.layout.sequence, tokens.start, len(tokens))

    def held(self, name: str, rank: int) -> torch.Tensor:
        heads = self.plan.query_heads(rank) if name == "output" else self.plan.kv_heads_of(rank)
        return self.all[name].narrow(self.layout.heads, heads.start, len(heads))

    def check(self, steps: dict[str, Any]) -> None:
        plan, layout = self.plan, self.layout

        def there(rank: int) -> tuple[torch.Tensor, ...]:
            shards = (self.shard(name, rank) for name in ("query", "key", "value"))
            return qkv_to_heads(*shards, plan, layout=layout.name)

        def program() -> tuple[torch.Tensor, ...]:
            rank = torch.distributed.get_rank()
            return (*there(rank), heads_to_sequence(self.held("output", rank), plan, layout=layout.name))

        results = VirtualWorld(plan.ranks).run(program)
        for rank, (query, key, value, output) in enumerate(results):
            own = {name: self.shard(name, rank) for name in ("query", "key", "value")}
            self.check_tensors(steps["shards"]["frames"][rank], own, rank, "tokensOf")
            whole = {"query": query, "key": key, "value": value}
            self.check_tensors(steps["unpack"]["frames"][rank], whole, rank, "headsOf")
            attended = {"output": self.held("output", rank)}
            self.check_tensors(steps["attention"]["frames"][rank], attended, rank, "headsOf")
            self.check_tensors(steps["unpack output"]["frames"][rank], {"output": output}, rank, "tokensOf")
        self.check_buffers(steps, self.routes(("query", "key", "value")), "")
        self.check_buffers(steps, self.routes(("output",)), " output")
        self.check_flights(steps)

    def check_tensors(self, frames: list[Any], tensors: dict[str, torch.Tensor], rank: int, own: str) -> None:
        assert [frame["name"] for frame in frames] == list(tensors)
        for frame, tensor in zip(frames, tensors.values(), strict=True):
            assert frame["kind"] == "tensor" and frame["shape"] == str(tuple(tensor.shape))
            others = set()
            for tile in frame["tiles"]:
                assert tile["slice"].startswith(f"{frame['name']}[") and tile[own] == rank
                sliced = eval(tile["slice"], {frame["name"]: tensor})
                block = self.block(frame["name"], tile["tokensOf"], tile["headsOf"])
                assert torch.equal(sliced, block)
                others.add((tile["tokensOf"], tile["headsOf"]))
            pairs = [(other, rank) if own == "headsOf" else (rank, other) for other in range(self.plan.ranks)]
            assert others == {pair for pair in pairs if self.block(frame["name"], *pair).numel()}
            check_areas(frame["tiles"])
            self.check_widths(frame, own)

    def check_widths(self, frame: Any, own: str) -> None:
        """Blocks are to scale, in heads or in tokens; one of a thin block is 0.4 of the mean width."""
        plan, layout = self.plan, self.layout
        if own == "headsOf":
            lengths = {rank: float(len(plan.tokens_of(rank))) for rank in range(plan.ranks)}
        else:
            kind = "query" if frame["name"] in ("query", "output") else "kv"
            held = [plan.head_runs[kind][rank] for rank in range(plan.ranks)]  # type: ignore[index]
            holders = Counter(head for run in held for head in run)
            lengths = {rank: sum(1 / holders[head] for head in run) for rank, run in enumerate(held)}
        total, thinnest = sum(lengths.values()), 0.4 / max(1, sum(length > 0 for length in lengths.values()))
        widths = {rank: max(length / total, thinnest) for rank, length in lengths.items() if length}
        across = (own == "headsOf") == (layout.sequence == 2)
        rows = 1 if across or layout.name == "s b h d" else self.all["query"].shape[layout.batch]
        for tile in frame["tiles"]:
            other = tile["tokensOf"] if own == "headsOf" else tile["headsOf"]
            width = tile["at"]["width" if across else "height"] * rows
            assert abs(width - widths[other] / sum(widths.values())) < 1e-9

    def routes(self, names: tuple[str, ...]) -> dict[tuple[str, ...], list[Route]]:
        """By the tensors that travel together, the route of each rank."""
        together = [names] if self.fused or names == ("output",) else [(name,) for name in names]
        routes = {}
        for group in together:
            kinds = tuple("query" if name in ("query", "output") else "kv" for name in group)
            load = Load(kinds, (self.dim,) * len(group))  # type: ignore[arg-type]
            like = self.all["query"]
            routes[group] = [
                routes_to_heads(self.plan, rank, self.layout, (load,), like)[0]
                for rank in range(self.plan.ranks)
            ]
        if names == ("output",):
            routes = {group: [route.reverse() for route in by_rank] for group, by_rank in routes.items()}
        return routes

    def check_buffers(
        self, steps: dict[str, Any], routes: dict[tuple[str, ...], list[Route]], suffix: str
    ) -> None:
        """The buffers before and behind the all-to-all: the first is packed, the second made of its chunks."""
        sent_frames = [iter(frames) for frames in steps[f"pack{suffix}"]["frames"]]
        arrived_step = "output arrived" if suffix else "arrived"
        received_frames = [iter(frames) for frames in steps[arrived_step]["frames"]]
        for names, by_rank in routes.items():
            source = self.held if suffix else self.shard
            sent = []
            for rank, route in enumerate(by_rank):
                (cut,) = route.outgoing
                sent.append(cut.pack(tuple(source(name, rank) for name in names)))
                self.check_code(steps[f"pack{suffix}"]["code"], "pack", way_to_pack(cut), rank)
                self.check_buffer(sent_frames[rank], sent[-1], names, cut.kept, rank, "send")
            for rank, route in enumerate(by_rank):
                chunks = [
                    buffer.split(other.outgoing[0].splits[0])[rank]
                    for buffer, other in zip(sent, by_rank, strict=True)
                ]
                (cut,) = route.incoming
                assert [chunk.numel() for chunk in chunks] == cut.splits[0]
                self.check_code(steps[f"unpack{suffix}"]["code"], "unpack", way_to_unpack(cut), rank)
                self.check_buffer(received_frames[rank], torch.cat(chunks), names, cut.kept, rank, "receive")
        for frames in (*sent_frames, *received_frames):
            assert next(frames, None) is None

    def check_buffer(
        self,
        frames: Any,
        buffer: torch.Tensor,
        names: tuple[str, ...],
        kept: int | None,
        rank: int,
        verb: str,
    ) -> None:
        frame = next(frames)
        assert frame["kind"] == "buffer" and frame["name"] == f"{verb} buffer: {', '.join(names)}"
        assert frame["shape"] == f"({buffer.numel()},)"
        shown = 0
        for tile in frame["tiles"]:
            text, _, places = tile["slice"].partition("buffer")
            block = self.block(tile["tensor"], tile["tokensOf"], tile["headsOf"])
            assert text == f"{verb} " and torch.equal(eval(f"buffer{places}"), block.flatten())
            shown += block.numel()
        assert shown == buffer.numel()
        check_areas(frame["tiles"])
        if kept is None:
            return
        assert kept == rank
        frame = next(frames)
        assert frame["kind"] == "kept"
        blocks = {(tile["tensor"], tile["tokensOf"], tile["headsOf"]) for tile in frame["tiles"]}
        assert blocks == {(name, rank, rank) for name in names if self.block(name, rank, rank).numel()}

    def check_flights(self, steps: dict[str, Any]) -> None:
        for step, names in (("in flight", ["query", "key", "value"]), ("output in flight", ["output"])):
            for sender, row in enumerate(steps[step]["blocks"]):
                for receiver, blocks in enumerate(row):
                    ends = (sender, receiver) if step == "in flight" else (receiver, sender)
                    travelling = [name for name in names if self.block(name, *ends).numel()]
                    assert blocks == [
                        {"tensor": name, "tokensOf": ends[0], "headsOf": ends[1]} for name in travelling
                    ]

    def check_code(self, code: list[dict[str, Any]], verb: str, way: str, rank: int) -> None:
        """The line beside the step is the one that runs on this rank."""
        lines = shown_lines(*SHOWN[f"{verb} {way}"])["lines"]
        (entry,) = (entry for entry in code if entry["lines"] == lines)
        assert holds_on(entry["ranks"], rank)


def check_areas(tiles: list[Any]) -> None:
    """The tiles fill their frame, and none lies on another one."""
    if not tiles:
        return
    areas = [tile["at"] for tile in tiles]
    assert abs(sum(area["width"] * area["height"] for area in areas) - 1) < 1e-9
    for i, a in enumerate(areas):
        for b in areas[:i]:
            beside = a["left"] + a["width"] <= b["left"] + 1e-9 or b["left"] + b["width"] <= a["left"] + 1e-9
            below = a["top"] + a["height"] <= b["top"] + 1e-9 or b["top"] + b["height"] <= a["top"] + 1e-9
            assert beside or below


def holds_on(words: str, rank: int) -> bool:
    """Whether "on ranks 0, 2 and 3", "on ranks 0-2", or nothing, which is everywhere, names the rank."""
    if not words:
        return True
    named = words.removeprefix("on rank").removeprefix("s").replace(" and ", ", ").split(",")
    for part in named:
        first, _, last = part.strip().partition("-")
        if int(first) <= rank <= int(last or first):
            return True
    return False


def way_to_pack(cut: Any) -> str:
    return "in order" if cut.in_order else "ragged" if cut.blocks[0] is None else "strided"


def way_to_unpack(cut: Any) -> str:
    return "in order" if cut.in_order else "strided" if cut.strided else "ragged"
