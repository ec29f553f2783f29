"""What init_process_group and new_group do on virtual ranks: two functions that take the place of torch's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from . import process_state
from .errors import StaleGroupError, UnsupportedOperationError
from .process_group import VirtualGroup


def new_process_group(
    group_size: int,
    group_rank: int,
    ranks: Sequence[int],
    backend: Any,
    store: Any,
    group_name: Any,
    **options: Any,
) -> tuple[Any, Any]:
    """Takes the place of torch's `_new_process_group_helper` on virtual ranks; `ranks` is empty for the default group.

    Any backend name is accepted and kept, because programs ask for it: the ranks are virtual all the same.
    """
    state = process_state.current()
    if state is None:
        raise StaleGroupError("a virtual group is made outside of a virtual rank.\n  Make it inside run().")
    members = tuple(ranks) or tuple(range(state.run.size))
    if group_size != len(members) or (not ranks and group_rank != state.rank):
        raise UnsupportedOperationError(
            f"init_process_group asks for rank {group_rank} of {group_size}; this is rank {state.rank} of "
            f"{state.run.size} virtual ranks.\n  Take both from the environment: RANK and WORLD_SIZE are set."
        )
    if state.rank not in members:
        return dist.GroupMember.NON_GROUP_MEMBER, None
    tag = options.get("pg_tag")
    if tag and (existing := c10d._find_pg_by_ranks_and_tag(tag, list(members))) is not None:
        return existing, c10d._world.pg_map[existing][1]
    prefix_store = dist.PrefixStore(f"{group_name}/", store)
    group = VirtualGroup(members.index(state.rank), len(members), state.run.channel(group_name, members))
    group._name = group_name
    group._set_group_name(group_name)
    group._set_group_desc(options.get("group_desc") or "undefined")
    registered = {"pg_tag": f"user:{tag}"} if tag else {"add_to_default_tag": True}
    c10d._register_pg_in_world(group, backend, prefix_store, group_name, _config(str(backend)), **registered)
    return group, prefix_store


@cache
def _config(backend: str) -> str:
    """What torch remembers of a backend: its devices."""
    return str(c10d.BackendConfig(c10d.Backend(backend)))


def rendezvous(
    url: str, rank: int = -1, world_size: int = -1, **options: Any
) -> Iterator[tuple[Any, int, int]]:
    """Takes the place of torch's rendezvous on virtual ranks, which have met already."""
    state = process_state.current()
    if state is None:
        raise StaleGroupError("a virtual group is made outside of a virtual rank.\n  Make it inside run().")
    yield (
        state.run.store,
        rank if rank >= 0 else state.rank,
        world_size if world_size >= 0 else state.run.size,
    )


def make_default_group(own_ranks: dict[int, int]) -> None:
    """The default group of the calling rank, without what init_process_group reads and checks, in a third of the time.

    `own_ranks` is every global rank's rank in the group; torch only reads it, so that all virtual ranks may share it.
    """
    state = process_state.current()
    if state is None:
        raise StaleGroupError("a virtual group is made outside of a virtual rank.\n  Make it inside run().")
    name = c10d._process_group_name([], use_hashed_name=False)
    group, _ = new_process_group(
        len(own_ranks), state.rank, (), "gloo", state.run.store, name, group_desc="default_pg"
    )
    c10d._world.default_pg = group
    c10d._world.pg_group_ranks[group] = own_ranks
