"""The few things an algorithm asks of a group of ranks, and how a torch process group answers them.

An algorithm sees a `Group`: its rank, its size and two collectives. Nothing in this package asks which
backend is behind it. Ranks are counted inside the group: in a sub-group of the world they are not the global
ranks.

Source: docs.pytorch.org/docs/stable/distributed.html, `all_to_all_single` and `all_gather_single`.
"""

from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .checks import no_type_check
from .errors import GroupError


@runtime_checkable
class Work(Protocol):
    """What is under way, as torch.distributed's own."""

    def wait(self) -> bool:
        """Return when it is done; on a GPU, make the current stream wait for it."""


@runtime_checkable
class Group(Protocol):
    """Ranks that exchange with each other."""

    @property
    def rank(self) -> int:
        """This rank, 0 to size - 1."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_splits: list[int],
        input_splits: list[int],
        async_op: bool = False,
    ) -> Work | None:
        """Send `input_splits[r]` elements to rank r and receive `output_splits[r]` from it, in rank order.

        With `async_op` return at once: the output is there, and the input may be written to, after `wait()`
        on what is returned.

        Args:
            output, input: flat, [elements], dense, of one dtype.
        """

    def all_gather_integers(self, record: list[int], device: torch.device) -> list[list[int]]:
        """Every rank's record, by rank. All records have one length."""


@dataclass(frozen=True)
class TorchGroup:
    """A `Group` over a torch process group.

    Args:
        process_group: what torch.distributed calls the group.
        rank: this rank in the group, from 0.
        size: number of ranks.
    """

    process_group: dist.ProcessGroup
    rank: int
    size: int

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_splits: list[int],
        input_splits: list[int],
        async_op: bool = False,
    ) -> Work | None:
        """See `Group`: `output` and `input` are flat, [elements]."""
        return dist.all_to_all_single(
            output, input, output_splits, input_splits, group=self.process_group, async_op=async_op
        )

    def all_gather_integers(self, record: list[int], device: torch.device) -> list[list[int]]:
        """See `Group`. Sends 8 bytes for each integer to each other rank."""
        mine = torch.tensor(record, dtype=torch.int64, device=device)
        everyone = torch.empty(self.size * len(record), dtype=torch.int64, device=device)
        dist.all_gather_single(everyone, mine, group=self.process_group)
        return everyone.view(self.size, len(record)).tolist()


GroupLike: TypeAlias = "dist.ProcessGroup | DeviceMesh | TorchGroup | None"


@no_type_check
def group_of(group: GroupLike) -> TorchGroup:
    """The group that a caller means: a process group, a device mesh of one axis, or None for the whole world.

    Raises:
        GroupError: torch.distributed is not initialised, this rank is no member, the mesh has several axes,
            or the group or mesh belongs to another run.
    """
    if isinstance(group, TorchGroup):
        return group
    if not dist.is_available() or not dist.is_initialized():
        raise GroupError(
            "torch.distributed has no process group yet.",
            "Call torch.distributed.init_process_group first, or run the function in simulator.VirtualWorld.",
        )
    if isinstance(group, DeviceMesh):
        group = _group_of_mesh(group)
    if group is None:
        group = dist.group.WORLD
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise _not_a_member()
    if not isinstance(group, dist.ProcessGroup):
        raise _wrong_kind(group)
    try:
        rank = dist.get_rank(group)
    except (ValueError, RuntimeError) as error:
        raise GroupError(
            f"the process group is not in use: {error}.", "Pass one that was not destroyed."
        ) from error
    if rank < 0:
        raise _not_a_member()
    return TorchGroup(group, rank, dist.get_world_size(group))


@no_type_check
def check_kind(group: GroupLike) -> None:
    """Refuse what `group_of` could never use. Needs no process group to be there yet.

    Raises:
        GroupError: something that is no process group, no device mesh and not None.
    """
    known = isinstance(group, dist.ProcessGroup | DeviceMesh | TorchGroup | None)
    if not known and group is not dist.GroupMember.NON_GROUP_MEMBER:
        raise _wrong_kind(group)


def check_size(group: Group, ranks: int) -> None:
    """Refuse a group that has another number of ranks than the plan.

    Args:
        group: any group.
        ranks: number of ranks of the plan.

    Raises:
        GroupError: with both numbers.
    """
    if group.size != ranks:
        raise GroupError(
            f"the group has {group.size} ranks, the plan {ranks}.",
            f"Make the plan with ranks={group.size}, or pass the group of the {ranks} ranks it was made for.",
        )


def _group_of_mesh(mesh: DeviceMesh) -> dist.ProcessGroup:
    if mesh.ndim != 1:
        raise GroupError(
            f"the device mesh has {mesh.ndim} axes, {mesh.mesh_dim_names or tuple(mesh.mesh.shape)}.",
            'Pass the one axis that splits the sequence, for example mesh["sequence"].',
        )
    if mesh.get_coordinate() is None:
        raise _not_a_member()
    try:
        return mesh.get_group()
    except RuntimeError as error:
        raise GroupError(
            f"the device mesh is not in use on this rank: {error}.",
            "Pass a mesh that this rank made, in this run.",
        ) from error


def _wrong_kind(group: object) -> GroupError:
    return GroupError(
        f"group is a {type(group).__name__}.",
        "Pass a torch.distributed.ProcessGroup, a DeviceMesh of one axis, or None for all ranks.",
    )


def _not_a_member() -> GroupError:
    return GroupError(
        f"global rank {dist.get_rank()} is no member of the group.",
        "Call this only on the ranks of the group, or pass each rank the group that it belongs to.",
    )
