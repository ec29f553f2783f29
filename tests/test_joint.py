"""One autograd node over all ranks: the judge of hand-written backward passes."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.nn.functional as nn_functional
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.gradcheck import GradcheckError
from torch.utils.checkpoint import checkpoint

from simulator import UnsupportedOperationError, VirtualWorld, collectives

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
SPLITS = [[1, 2, 0], [0, 1, 3], [2, 1, 1]]


class AllToAll(torch.autograd.Function):
    """A hand-written pair of passes over plain torch.distributed."""

    factor = 1.0

    @staticmethod
    def forward(ctx, x, received, sent):
        ctx.splits = received, sent
        output = torch.empty(sum(received), *x.shape[1:], dtype=x.dtype)
        dist.all_to_all_single(output, x.contiguous(), received, sent)
        return output

    @staticmethod
    def backward(ctx, gradient):
        received, sent = ctx.splits
        return AllToAll.apply(gradient.contiguous(), sent, received), None, None


class WrongAllToAll(AllToAll):
    @staticmethod
    def backward(ctx, gradient):
        return (2 * AllToAll.backward(ctx, gradient)[0], None, None)


def exchange(x, function=AllToAll):
    rank = dist.get_rank()
    return function.apply(x, [row[rank] for row in SPLITS], SPLITS[rank])


def inputs():
    return [torch.randn(sum(row), 2, dtype=torch.float64, requires_grad=True) for row in SPLITS]


def hand_written(*xs):
    return exchange(xs[dist.get_rank()].sin()) ** 2


def of_nn(*xs):
    return nn_functional.all_reduce(xs[dist.get_rank()].sum() * xs[0].sum()) * 1


def of_functional_collectives(*xs):
    x = xs[dist.get_rank()][:1]
    return functional.all_gather_tensor_autograd(x**3, 0, dist.group.WORLD) + 0


def checkpointed(*xs):
    return checkpoint(lambda x: exchange(x) ** 2, xs[dist.get_rank()], use_reentrant=False)


def tied(body):
    return lambda *xs: tuple(VirtualWorld(3, autograd="joint").run(body, *xs))


@pytest.mark.parametrize(
    "body", [hand_written, of_nn, of_functional_collectives, checkpointed], ids=lambda b: b.__name__
)
def test_gradcheck_and_gradgradcheck_run_through_any_rank_program(body):
    xs = inputs()
    assert gradcheck(tied(body), xs)
    if body is not checkpointed:  # torch: checkpointing has no double backward under autograd.grad
        assert gradgradcheck(tied(body), xs)


def test_gradcheck_finds_a_wrong_backward():
    with pytest.raises(GradcheckError):
        gradcheck(tied(lambda *xs: exchange(xs[dist.get_rank()], WrongAllToAll)), inputs())


def test_forward_and_gradient_equal_the_pure_function():
    xs = inputs()
    received = tied(lambda *xs: exchange(xs[dist.get_rank()]))(*xs)
    expected = collectives.all_to_all(xs, SPLITS)
    upstream = [torch.randn_like(x) for x in expected]
    assert all(torch.equal(a, b) for a, b in zip(received, expected, strict=True))
    ours = torch.autograd.grad(received, xs, upstream)
    assert all(
        torch.equal(a, b) for a, b in zip(ours, torch.autograd.grad(expected, xs, upstream), strict=True)
    )


def test_joint_and_faithful_gradients_have_the_same_bits():
    xs = inputs()

    def faithful():
        x = xs[dist.get_rank()].detach().requires_grad_()
        (exchange(x.sin()) ** 2).sum().backward()
        return x.grad

    joint = torch.autograd.grad([y.sum() for y in tied(hand_written)(*xs)], xs)
    own = VirtualWorld(3).run(faithful)
    assert all(torch.equal(a, b) for a, b in zip(joint, own, strict=True))


def test_a_tensor_that_several_ranks_use_gets_the_sum_in_containers_and_closures():
    layer = torch.nn.Linear(2, 2, dtype=torch.float64)
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)

    def body(given):
        rank = dist.get_rank()
        return {"y": layer(given["x"][0]) * (rank + 1), "rank": rank, "nothing": None}

    results = VirtualWorld(3, autograd="joint").run(body, {"x": [x]})
    assert [r["rank"] for r in results] == [0, 1, 2]
    gradients = torch.autograd.grad(sum(r["y"].sum() for r in results), [x, layer.weight])
    expected = torch.autograd.grad(6 * layer(x).sum(), [x, layer.weight])
    assert all(torch.allclose(a, b, atol=1e-14) for a, b in zip(gradients, expected, strict=True))


def test_backward_counts_its_bytes_to_its_run_and_runs_twice_if_asked():
    xs, world = inputs(), VirtualWorld(3, autograd="joint")
    results = world.run(lambda *xs: exchange(xs[dist.get_rank()]), *xs)
    forward = world.bytes
    results[0].sum().backward(retain_graph=True)
    assert (world.bytes == forward + forward.T).all()
    results[0].sum().backward()
    assert (world.bytes == forward + 2 * forward.T).all()
    with pytest.raises(RuntimeError, match="second time"):
        results[0].sum().backward()


def test_a_script_that_destroys_its_group_can_be_differentiated():
    def body(x):
        dist.init_process_group("gloo")
        y = nn_functional.all_reduce(x * dist.get_rank())
        dist.destroy_process_group()
        return y

    x = torch.ones(2, requires_grad=True)
    VirtualWorld(3, autograd="joint").run(body, x)[0].sum().backward()
    assert x.grad.tolist() == [3.0, 3.0]


def test_hooks_of_a_leaf_see_the_whole_gradient_once():
    x, seen = torch.ones(2, requires_grad=True), []
    x.register_hook(lambda gradient: seen.append(gradient.tolist()) or 2 * gradient)
    results = VirtualWorld(2, autograd="joint").run(lambda x: x * (dist.get_rank() + 1), x)
    sum(y.sum() for y in results).backward()
    assert seen == [[3.0, 3.0]] and x.grad.tolist() == [6.0, 6.0]
    with pytest.raises(UnsupportedOperationError, match="1 hooks"):
        VirtualWorld(2, autograd="joint").run(lambda: x * 2)


def test_double_backward_takes_the_newest_node_first_on_every_rank():
    """Ranks make different numbers of nodes, and the second backward has two collectives that do not depend on
    each other: only their age says which comes first."""

    def body(x):
        for _ in range(5 * dist.get_rank()):
            x = x * 1
        first = nn_functional.all_reduce(x * x)
        second = nn_functional.all_reduce(x[:1] * x[1:] * x[:1])
        return (first * first).sum() * 1 + (second * second).sum()

    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(lambda x: tuple(VirtualWorld(3, autograd="joint").run(body, x)), (x,))


def test_results_without_gradient_pass_through():
    results = VirtualWorld(2, autograd="joint").run(lambda x: (x + 1, dist.get_rank()), torch.ones(1))
    assert [(x.item(), rank) for x, rank in results] == [(2.0, 0), (2.0, 1)]
    x = torch.ones(1, requires_grad=True)
    with torch.no_grad():
        assert not VirtualWorld(2, autograd="joint").run(lambda x: x * 2, x)[0].requires_grad


def test_a_tensor_with_a_history_gets_its_gradient_once():
    """It is an argument, what it was computed from is captured: neither path may count twice."""
    layer = torch.nn.Linear(2, 2, dtype=torch.float64)
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    hidden, captured = layer(x), layer(x) * 3

    def body(given):
        return layer(given) * (dist.get_rank() + 1) + captured

    results = VirtualWorld(2, autograd="joint").run(body, hidden)
    ours = torch.autograd.grad(
        sum((r * r).sum() for r in results), [hidden, layer.weight, x], retain_graph=True
    )
    plain = [layer(hidden) * (rank + 1) + captured for rank in range(2)]
    expected = torch.autograd.grad(sum((r * r).sum() for r in plain), [hidden, layer.weight, x])
    assert all(torch.allclose(a, b, atol=1e-13) for a, b in zip(ours, expected, strict=True))
