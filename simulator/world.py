"""`VirtualWorld`: runs ordinary torch.distributed code on virtual ranks in one process.

The function sees what it would see under torchrun: its own rank, world size, environment and process groups. Only the
words that it says are matched and executed here instead of on a network.

Source: docs.pytorch.org/docs/stable/distributed.html and, for the environment, .../stable/elastic/run.html.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import numpy as np

from . import joint
from .clusters import Cluster
from .errors import WorldError
from .hazards import Hazard, Reports
from .ledger import Ledger
from .run import Run
from .singletons import singletons_of
from .trace import Trace

Result = TypeVar("Result")


class VirtualWorld:
    r"""`size` virtual ranks, in one process and on one device.

    Args:
        size: number of ranks $P \ge 1$.
        autograd: "faithful": each rank runs its own backward inside the function, as on hardware. "joint": what `run`
            returns is tied together by one autograd node, so that `backward`, `torch.autograd.grad`, `gradcheck` and
            `gradgradcheck` outside of `run` go through all ranks' graphs and the collectives between them.
        seed: None runs the ranks in one fixed order; an integer draws another legal order, the same for the same seed.
        hazards: what happens when a rank touches memory that is in flight, forgets a Work, races between two streams or
            trains a module of another rank. "raise": the world stops with a `HazardError`. "record": it goes on, and
            `hazards` lists them. "off": nobody looks, and no operation is watched.
        ledger: keep a record of every collective, in `ledger`.
        cluster: a model of hardware, by name ("h100-node", ...) or as a `Cluster`; `trace` then says how long the
            program would take on it. None keeps no time.
        singletons: what a package keeps once per process and each rank is to have for itself: objects, all of whose
            attributes are then each rank's own, and pairs (module, "NAME"). See `simulator.singletons`.

    Raises:
        ClusterError: there is no such cluster, or it has fewer devices than there are ranks.
        WorldError: size is no positive integer, or another argument is not one of the above.

    Examples:
        >>> def body():
        ...     x = torch.tensor([dist.get_rank()])
        ...     dist.all_reduce(x)
        ...     return x.item()
        >>> VirtualWorld(4).run(body)
        [6, 6, 6, 6]
    """

    def __init__(
        self,
        size: int,
        autograd: Literal["faithful", "joint"] = "faithful",
        seed: int | None = None,
        *,
        hazards: Literal["raise", "record", "off"] = "raise",
        ledger: bool = True,
        cluster: str | Cluster | None = None,
        singletons: Sequence[Any] = (),
    ) -> None:
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
            raise WorldError(f"a world of {size!r} ranks.\n  Pass a positive integer as size.")
        if autograd not in ("faithful", "joint"):
            raise WorldError(f"autograd={autograd!r} is no mode.\n  Use 'faithful' or 'joint'.")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise WorldError(f"seed={seed!r} is no integer.\n  Pass an integer, or None for the fixed order.")
        if hazards not in ("raise", "record", "off"):
            raise WorldError(f"hazards={hazards!r} is no policy.\n  Use 'raise', 'record' or 'off'.")
        if not isinstance(ledger, bool):
            raise WorldError(f"ledger={ledger!r}.\n  Use True or False.")
        self.size, self.autograd, self.seed = int(size), autograd, seed
        exchanged = singletons_of(singletons)
        self._make_run = lambda: Run(self.size, seed, Reports(hazards), ledger, cluster, exchanged)
        self._last = self._make_run()

    @property
    def bytes(self) -> np.ndarray:
        """Bytes sent in the last run, int64 `[sender, receiver]`, what a rank keeps for itself not counted.

        A joint backward adds to the run that it belongs to. `simulator.executions` says how each collective is counted.
        """
        return self._last.bytes.copy()

    @property
    def hazards(self) -> list[Hazard]:
        """What a run with hazards="record" has found, in that order."""
        return list(self._last.reports.found.values())

    @property
    def ledger(self) -> Ledger:
        """Every collective and message of the last run; prints as a table, and draws itself in a notebook.

        Raises:
            WorldError: the world keeps no ledger.
        """
        if self._last.ledger is None:
            raise WorldError("the world keeps no ledger.\n  Leave out ledger=False.")
        return self._last.ledger

    @property
    def trace(self) -> Trace:
        """When the last run did what, on the cluster. A joint backward adds to the run that it belongs to.

        Raises:
            WorldError: the world has no cluster.
        """
        if self._last.clock is None:
            raise WorldError(
                "the world has no cluster, so nothing has a time.\n"
                "  Pass cluster, such as VirtualWorld(size, cluster='h100-node')."
            )
        return self._last.clock.trace()

    def run(self, fn: Callable[..., Result], *args: Any, **kwargs: Any) -> list[Result]:
        """Call `fn(*args, **kwargs)` on every rank, and return the results by rank.

        Raises:
            CollectiveMismatchError: ranks disagree on a collective; the message says where each rank stands.
            DeadlockError: no rank can go on; likewise.
            Exception: what `fn` raises on a rank comes out as the same object, with a note that names the rank.
            HazardError: a rank did what `hazards` looks for.
            UnsupportedTransformError: called under forward-mode AD or inside a functorch transform.
            WorldError: `fn` cannot be called.
        """
        if not callable(fn):
            raise WorldError(
                f"run() got {fn!r}, which cannot be called.\n  Pass the function that every rank runs."
            )
        joint.refuse_transforms((args, kwargs))
        self._last = run = self._make_run()
        if self.autograd == "joint":
            return joint.run(run, fn, args, kwargs)
        return run.execute(lambda rank: fn(*args, **kwargs))
