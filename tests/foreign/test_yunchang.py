"""yunchang (long-context-attention): Ulysses, ring and their product USP against attention on one device.

Its kernels are stood in for by `flash_attention.py`. Its own kernels in plain torch serve no CPU: they call an operator
that torch has for CUDA only, and their backward raises.
"""

import pytest
import torch
import torch.distributed as dist

from simulator.errors import CollectiveMismatchError, InFlightWriteError
from tests.foreign import flash_attention, packages
from tests.foreign.models import same_bits
from tests.launch import on_virtual

BATCH, TOKENS, HEADS, DIM = 2, 24, 6, 5


def problem(dtype):
    """Query, key, value and the gradient of the output, [batch, seq, heads, dim]."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, TOKENS, HEADS, DIM, generator=generator, dtype=dtype) for _ in range(4)]


def on_one_device(causal, dtype):
    """Output and the gradients of query, key and value, computed in float64 from values that `dtype` has."""
    query, key, value, gradient = (x.double() for x in problem(dtype))
    inputs = [x.requires_grad_() for x in (query, key, value)]
    output = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in inputs), is_causal=causal
    ).transpose(1, 2)
    output.backward(gradient)
    return [output.detach(), *(x.grad for x in inputs)]


def ulysses(causal):
    """This rank's tokens of the output and the gradients, and what they should be."""
    import yunchang

    layer = yunchang.UlyssesAttention(dist.group.WORLD, attn_type=yunchang.kernels.AttnType.FA)

    def take(x):
        return yunchang.basic_extract_local(x, dist.get_rank(), dist.get_world_size())

    return through(layer, take, causal, torch.float64)


def usp(ulysses_degree, ring_degree, ring, causal, dtype=torch.bfloat16):
    """The same for a world that is cut by heads and, in a ring, by tokens. Its groups are a global of yunchang."""
    import yunchang

    degree = ulysses_degree * ring_degree
    yunchang.set_seq_parallel_pg(ulysses_degree, ring_degree, dist.get_rank(), dist.get_world_size())
    layer = yunchang.LongContextAttention(ring_impl_type=ring, attn_type=yunchang.kernels.AttnType.FA)

    def take(x):
        place = {"world_size": degree, "rd": ring_degree, "ud": ulysses_degree}
        return yunchang.EXTRACT_FUNC_DICT[ring](x, dist.get_rank() % degree, **place)

    return through(layer, take, causal, dtype)


def through(layer, take, causal, dtype):
    query, key, value, gradient = (take(x).clone() for x in problem(dtype))
    inputs = [x.requires_grad_() for x in (query, key, value)]
    output = layer(*inputs, causal=causal)
    output.backward(gradient)
    return [output.detach(), *(x.grad for x in inputs)], [take(x) for x in on_one_device(causal, dtype)]


@pytest.fixture(scope="module", autouse=True)
def _yunchang():
    with packages.standing_in(flash_attention.modules()):
        packages.load("yunchang")


def on_ranks(body, size, *args, **options):
    """Each rank has its own groups in yunchang's global."""
    import yunchang

    return on_virtual(body, size, *args, singletons=[yunchang.globals.PROCESS_GROUP], **options)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [2, 3, 6])
def test_ulysses(size, causal):
    for actual, expected in on_ranks(ulysses, size, causal):
        for own, right in zip(actual, expected, strict=True):
            torch.testing.assert_close(own, right, rtol=0.0, atol=1e-12)


def check_ring(results):
    """Every tensor is a sum of at most four blocks, each of which was rounded to bfloat16, by 2^-9 of it at most.

    Another head's values would not pass.
    """
    for actual, expected in results:
        for own, right in zip(actual, expected, strict=True):
            error, other = (own - right).abs().max(), (own - right.roll(1, dims=2)).abs().max()
            assert error <= right.abs().max() * 2**-6 < other


RINGS = [("basic", False), ("basic", True), ("zigzag", True), ("strip", True)]


@pytest.mark.parametrize(("ring", "causal"), RINGS)
@pytest.mark.parametrize(
    ("ulysses_degree", "ring_degree"), [(1, 2), (1, 4), (2, 2), (3, 2), (2, 3)], ids=lambda n: str(n)
)
def test_ring_and_usp(ulysses_degree, ring_degree, ring, causal):
    check_ring(on_ranks(usp, ulysses_degree * ring_degree, ulysses_degree, ring_degree, ring, causal))


def test_two_usp_groups_side_by_side():
    check_ring(on_ranks(usp, 8, 2, 2, "zigzag", True))


@pytest.mark.parametrize(("ring", "causal"), RINGS)
def test_no_report_in_other_orders(ring, causal):
    expected = on_ranks(usp, 4, 2, 2, ring, causal)
    for seed in range(8):
        assert same_bits(on_ranks(usp, 4, 2, 2, ring, causal, seed=seed), expected)


def test_ulysses_gives_no_report_in_other_orders():
    expected = on_ranks(ulysses, 3, True)
    for seed in range(8):
        assert same_bits(on_ranks(ulysses, 3, True, seed=seed), expected)


def test_a_ring_in_float32_writes_into_a_gradient_that_it_is_sending():
    """`.to(float32)` copies a buffer in bfloat16, one in float32 it does not. flash-attn itself takes no float32."""
    with pytest.raises(
        InFlightWriteError, match=r"(?s)ring/utils\.py.* in commit;.*ring_flash_attn_backward"
    ):
        on_ranks(usp, 3, 1, 3, "basic", False, torch.float32)


def test_a_causal_ring_in_float64_sends_another_dtype_than_is_received():
    """A rank that has computed adds float64 to float32; one that has nothing to compute passes float32 on."""
    with pytest.raises(CollectiveMismatchError, match=r"dtype float64.*dtype float32"):
        on_ranks(usp, 3, 1, 3, "basic", True, torch.float64)
