"""The demo: a language model reads a text that is split over ranks, and everything about it is checked.

Each rank holds a part of the tokens and runs the whole model on it; only the attention layers exchange. Its
logits are compared with those of one device, and the bytes that each rank sent with those that the plan says.
"""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from simulator import VirtualWorld
from simulator.draw import draw_exchange

from .demo_models import LanguageModel, read_smollm2, read_tiny, smollm2_file
from .errors import ArgumentError, SeqparError
from .plan import Plan, make_plan
from .progress import Steps
from .torchrun import check_ranks

POSITIONS = 8192  # that SmolLM2 was trained for; the tiny model keeps to them as well
CHUNK = 512  # tokens whose logits are compared at a time: 100 MB of SmolLM2's
TOLERANCE = 1e-4  # of the largest logit: far above rounding in another order, far below one wrong head


class DemoFailedError(SeqparError, RuntimeError):
    """The demo ran, and what it checks does not hold."""


@dataclass(frozen=True)
class Options:
    """What to run; the command line's options."""

    ranks: int = 4
    tokens: int = 4096
    backend: str = "virtual"
    text: Path | None = None
    model: str = "smollm2"
    out: Path = Path("seqpar-demo")


@dataclass(frozen=True)
class Comparison:
    """One rank's logits beside one device's, over the rank's tokens."""

    largest_error: float
    largest_logit: float
    bitwise_equal: bool
    same_next_token: int  # tokens after which both find the same next token most likely
    right_next_token: int  # tokens after which that is the one in the text


def check_options(options: Options) -> None:
    """Refuse what cannot run, before anything is loaded. Makes the folder for the figure.

    Raises:
        ArgumentError: a number out of range, an unknown backend or model, a text that is no file, a folder
            that cannot be made or written to.
        MissingPackageError: SmolLM2 is asked for and not installed.
    """
    if options.backend not in ("virtual", "gloo", "nccl"):
        raise ArgumentError(f"--backend {options.backend} does not exist.", "Use virtual, gloo or nccl.")
    if options.model not in ("smollm2", "tiny"):
        raise ArgumentError(f"--model {options.model} does not exist.", "Use smollm2 or tiny.")
    check_ranks(options.ranks, options.backend)
    if not options.ranks <= options.tokens <= POSITIONS:
        raise ArgumentError(
            f"--tokens {options.tokens} cannot be read on {options.ranks} ranks.",
            f"Use {options.ranks} (one on each rank) to {POSITIONS} tokens (the model's positions).",
        )
    if options.text is not None and not options.text.is_file():
        raise ArgumentError(f"--text {options.text} is no file.", "Name a text file, or leave it out.")
    if options.model == "smollm2":
        smollm2_file()
    _make_folder(options.out)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ArgumentError(
            f"cannot write to {folder}: {error}.", "Name another folder with --out."
        ) from error


def read_inputs(options: Options) -> tuple[LanguageModel, Int[Tensor, "1 seq"]]:
    """The model and the first `options.tokens` token ids of the text.

    Raises:
        ArgumentError: the text is no UTF-8, or too short.
    """
    path = options.text or Path(str(files("seqpar_ref") / "data" / "us_constitution.txt"))
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{path} is not UTF-8: {error}.", "Save the text as UTF-8.") from error
    if not text:
        raise ArgumentError(f"{path} is empty.", "Name a text of at least one token for each rank.")
    model: LanguageModel
    if options.model == "smollm2":
        model, token_ids = read_smollm2(smollm2_file(), text)
    else:
        model, token_ids = read_tiny(text)
    if token_ids.shape[1] < options.tokens:
        raise ArgumentError(
            f"{path} has {token_ids.shape[1]} tokens, fewer than --tokens {options.tokens}.",
            f"Use --tokens {token_ids.shape[1]} or less, or a longer text.",
        )
    return model, token_ids[:, : options.tokens]


def plan_for(model: LanguageModel, ranks: int, tokens: int) -> Plan:
    """Who owns which tokens and heads of the model."""
    return make_plan(ranks=ranks, heads=model.heads, kv_heads=model.kv_heads, tokens=tokens)


def planned_bytes(plan: Plan, model: LanguageModel) -> np.ndarray:
    """Bytes [sender, receiver] of one forward pass: each layer's attention sends the same."""
    return model.layers * plan.bytes(batch=1, head_dim=model.head_dim, dtype=torch.float32)


@torch.inference_mode()
def read_on_one_device(model: LanguageModel, token_ids: Int[Tensor, "1 seq"]) -> Float[Tensor, "1 seq width"]:
    """What the ranks together must equal. Call it before `model.distribute`."""
    return model.hidden(token_ids, torch.arange(token_ids.shape[1], device=token_ids.device)[None])


@torch.inference_mode()
def read_own_part(
    model: LanguageModel, token_ids: Int[Tensor, "1 seq"], plan: Plan
) -> Float[Tensor, "1 seq_local width"]:
    """What each rank runs, virtual or real: the model on its own tokens with their global positions."""
    mine = plan.tokens_of(dist.get_rank())
    position_ids = torch.arange(mine.start, mine.stop, device=token_ids.device)[None]
    return model.hidden(token_ids[:, mine.start : mine.stop], position_ids)


@torch.inference_mode()
def compare(
    model: LanguageModel,
    hidden: Float[Tensor, "1 seq_local width"],
    reference: Float[Tensor, "1 seq width"],
    token_ids: Int[Tensor, "1 seq"],
    mine: range,
) -> Comparison:
    """Compare the logits over a rank's tokens with one device's, some tokens at a time."""
    error, largest, equal, same, right = 0.0, 0.0, True, 0, 0
    for start in range(0, len(mine), CHUNK):
        here = range(start, min(start + CHUNK, len(mine)))
        there = mine[here.start : here.stop]
        logits = model.logits(hidden[:, here.start : here.stop])
        expected = model.logits(reference[:, there.start : there.stop])
        error = max(error, (logits - expected).abs().max().item())
        largest = max(largest, expected.abs().max().item())
        equal = equal and torch.equal(logits, expected)
        guesses, following = logits.argmax(-1), token_ids[:, there.start + 1 : there.stop + 1]
        same += int((guesses == expected.argmax(-1)).sum())
        right += int((guesses[:, : following.shape[1]] == following).sum())
    return Comparison(error, largest, equal, same, right)


def run_virtual(options: Options, console: Console) -> Path:
    """The whole demo on virtual ranks in this process. Returns the figure's path.

    Raises:
        DemoFailedError: see `report`.
    """
    steps = Steps(console)
    with steps.step(f"loading the model ({options.model}) and the text"):
        model, token_ids = read_inputs(options)
    plan = plan_for(model, options.ranks, options.tokens)
    with steps.step(f"one device reads {options.tokens:,} tokens"):
        reference = read_on_one_device(model, token_ids)
    model.distribute(plan)
    world = VirtualWorld(options.ranks)
    with steps.step(f"{options.ranks} virtual ranks read the same {options.tokens:,} tokens, split"):
        shards = world.run(read_own_part, model, token_ids, plan)
    with steps.step("comparing the logits"):
        rows = [
            compare(model, shard, reference, token_ids, plan.tokens_of(rank))
            for rank, shard in enumerate(shards)
        ]
    return report(options, console, model, plan, world.bytes, rows)


def report(
    options: Options,
    console: Console,
    model: LanguageModel,
    plan: Plan,
    sent: np.ndarray,
    rows: list[Comparison],
) -> Path:
    """Print the table, save the figure and say whether everything holds.

    Raises:
        DemoFailedError: a rank sent other bytes than planned, or its logits differ by more than rounding.
    """
    planned = planned_bytes(plan, model)
    console.print(_table(plan, sent, planned, rows))
    console.print(
        f"{model.name}: {model.layers} layers, {plan.heads} query heads, {plan.kv_heads} kv heads; "
        f"{sum(row.right_next_token for row in rows):,} of {plan.tokens - 1:,} next tokens guessed right.",
        highlight=False,
        soft_wrap=True,
    )
    path = _save_figure(options, model, plan, sent)
    console.print(f"what moved where: {path}", highlight=False, soft_wrap=True)
    if not np.array_equal(sent, planned):
        differing = [rank for rank in range(plan.ranks) if not np.array_equal(sent[rank], planned[rank])]
        raise DemoFailedError(
            f"ranks {differing} sent {sent.sum(axis=1)[differing].tolist()} bytes, "
            f"the plan says {planned.sum(axis=1)[differing].tolist()}.",
            "This is a defect of seqpar: please report it with the command you ran.",
        )
    wrong = [rank for rank, row in enumerate(rows) if row.largest_error > TOLERANCE * row.largest_logit]
    if wrong:
        raise DemoFailedError(
            f"the logits of ranks {wrong} differ from one device's by up to "
            f"{max(rows[rank].largest_error for rank in wrong):.2g}, more than rounding.",
            "This is a defect of seqpar: please report it with the command you ran.",
        )
    console.print(
        f"All {plan.ranks} ranks agree with one device, and sent exactly the plan's "
        f"{int(planned.sum()):,} bytes.",
        highlight=False,
        soft_wrap=True,
    )
    return path


def _table(plan: Plan, sent: np.ndarray, planned: np.ndarray, rows: list[Comparison]) -> Table:
    title = f"{plan.tokens:,} tokens on {plan.ranks} ranks, beside one device"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    names = ("rank", "tokens", "heads\nq, kv", "bytes\nsent", "bytes\nplanned", "logit\nerror", "equal\nbits")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("same next\ntoken", justify="right", no_wrap=True)
    for rank, row in enumerate(rows):
        mine = plan.tokens_of(rank)
        table.add_row(
            str(rank),
            f"{mine.start}-{mine.stop - 1}",
            f"{len(plan.query_heads(rank))}, {len(plan.kv_heads_of(rank))}",
            f"{int(sent[rank].sum()):,}",
            f"{int(planned[rank].sum()):,}",
            f"{row.largest_error:.2g}",
            "yes" if row.bitwise_equal else "no",
            f"{row.same_next_token}/{len(mine)}",
        )
    return table


def _save_figure(options: Options, model: LanguageModel, plan: Plan, sent: np.ndarray) -> Path:
    ranks = range(plan.ranks)
    picture = draw_exchange(
        [plan.tokens_of(rank) for rank in ranks],
        {
            "query heads": [plan.query_heads(rank) for rank in ranks],
            "kv heads": [plan.kv_heads_of(rank) for rank in ranks],
        },
        sent,
        title=f"{model.name}: {plan.tokens:,} tokens on {plan.ranks} ranks, bytes of {model.layers} layers",
    )
    path = options.out / "exchange.png"
    try:
        picture.savefig(path)
    except OSError as error:
        raise ArgumentError(f"cannot write {path}: {error}.", "Name another folder with --out.") from error
    return path
