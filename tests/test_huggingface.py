"""A model of transformers over several ranks against the same on one device, and every refusal by name."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from seqpar_ref import make_plan
from seqpar_ref.errors import ArgumentError, GroupError, PlanError
from simulator import VirtualWorld
from tests.launch import on_gloo, on_virtual

transformers = pytest.importorskip("transformers")

from seqpar_ref import huggingface as hf  # noqa: E402
from seqpar_ref import huggingface_refusals as refusals  # noqa: E402

TOKENS = [5, 2, 4, 3]


@pytest.fixture(autouse=True)
def _forget_registration():
    yield
    for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
        interface._global_mapping.pop("seqpar", None)


def tiny_llama(heads: int = 6, kv_heads: int = 2, **options) -> transformers.LlamaForCausalLM:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=heads * 8, intermediate_size=40, num_hidden_layers=2, head_dim=8,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=64, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double()


def token_ids(batch: int = 2, tokens: int = sum(TOKENS)) -> Tensor:
    return torch.arange(batch * tokens).view(batch, tokens) * 7 % 31


def shard(tensor: Tensor, tokens: list[int]) -> Tensor:
    """This rank's part of the last dim."""
    start = sum(tokens[: dist.get_rank()])
    return tensor[..., start : start + tokens[dist.get_rank()]]


def train_step(
    model: torch.nn.Module, tokens: list[int], planned: bool, chunks: int = 1
) -> tuple[Tensor, list[Tensor]]:
    """One rank's logits, and its part of every parameter's gradient of the sum of all targets' losses."""
    model = copy.deepcopy(model)
    ids = token_ids(tokens=sum(tokens))
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    plan = make_plan(ranks=len(tokens), heads=heads, kv_heads=kv_heads, tokens=tokens) if planned else None
    hf.register(plan=plan, chunks=chunks)
    model.set_attn_implementation("seqpar")
    positions = torch.arange(sum(tokens))[None]
    logits = model(shard(ids, tokens), position_ids=shard(positions, tokens), use_cache=False).logits
    targets = shard(ids.roll(-1, dims=1), tokens)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    return logits.detach(), [parameter.grad for parameter in model.parameters()]


def on_one_device(model: torch.nn.Module, tokens: int) -> tuple[Tensor, list[Tensor]]:
    model = copy.deepcopy(model)
    ids = token_ids(tokens=tokens)
    logits = model(ids, use_cache=False).logits
    targets = ids.roll(-1, dims=1)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    return logits.detach(), [parameter.grad for parameter in model.parameters()]


def assert_equals_one_device(results: list, model: torch.nn.Module, tokens: list[int]) -> None:
    logits, gradients = on_one_device(model, sum(tokens))
    # transformers computes the rotary angles and the norms in float32, on one device and on many
    torch.testing.assert_close(torch.cat([part for part, _ in results], dim=1), logits, rtol=0, atol=1e-12)
    for index, expected in enumerate(gradients):
        summed = sum(parts[index] for _, parts in results)
        torch.testing.assert_close(summed, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (9, 3), (4, 4), (5, 1), (2, 1)])
@pytest.mark.parametrize("planned", [True, False])
def test_training_equals_one_device(heads, kv_heads, planned):
    model = tiny_llama(heads, kv_heads)
    results = on_virtual(train_step, len(TOKENS), model, TOKENS, planned)
    assert_equals_one_device(results, model, TOKENS)


@pytest.mark.gloo
@pytest.mark.parametrize("planned", [True, False])
def test_training_equals_one_device_on_gloo(planned):
    model = tiny_llama(5, 1)
    results = on_gloo(train_step, 2, model, [4, 5], planned)
    assert_equals_one_device(results, model, [4, 5])


@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (8, 8)])
def test_heads_in_chunks_give_the_same_bits(heads, kv_heads):
    model = tiny_llama(heads, kv_heads)
    plain, chunked = (on_virtual(train_step, 2, model, [4, 5], True, chunks) for chunks in (1, 2))
    for (logits, gradients), (others, other_gradients) in zip(plain, chunked, strict=True):
        assert torch.equal(logits, others)
        assert all(torch.equal(one, two) for one, two in zip(gradients, other_gradients, strict=True))


def test_one_swapped_head_is_outside_the_tolerance():
    model = tiny_llama()
    results = on_virtual(train_step, len(TOKENS), model, TOKENS, True)
    projection = model.model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        projection[:16] = projection[:16].view(2, 8, -1).flip(0).reshape(16, -1)
    with pytest.raises(AssertionError):
        assert_equals_one_device(results, model, TOKENS)


def test_checkpointed_layers_give_the_same_gradients():
    model = tiny_llama()
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    results = on_virtual(train_step, len(TOKENS), model, TOKENS, True)
    assert_equals_one_device(results, model, TOKENS)


def test_bytes_with_and_without_a_plan():
    model = tiny_llama().eval()

    def forward(planned: bool):
        heads = make_plan(ranks=4, heads=6, kv_heads=2, tokens=TOKENS)
        hf.register(plan=heads if planned else None)
        model.set_attn_implementation("seqpar")
        world = VirtualWorld(4)
        world.run(run_forward, model, {})
        return world.bytes, 2 * heads.bytes(2, 8, torch.float64)

    sent, planned = forward(planned=True)
    assert (sent == planned).all()
    sent, planned = forward(planned=False)
    extra = sent - planned
    record = (
        extra[0, 1] // 2 - 16
    )  # of each of 2 layers: two integers of 8 bytes, and DistributedAttention's record
    assert record > 0 and record % 8 == 0
    assert (extra[~torch.eye(4, dtype=torch.bool).numpy()] == extra[0, 1]).all()


@torch.no_grad()
def run_forward(model: torch.nn.Module, changes: dict, one_rank_alone: int | None = None) -> Tensor:
    """A forward pass on this rank, with some arguments changed (on one rank only, where that is given)."""
    arguments = {
        "input_ids": shard(token_ids(), TOKENS),
        "position_ids": shard(torch.arange(sum(TOKENS))[None], TOKENS),
        "use_cache": False,
    }
    if one_rank_alone in (None, dist.get_rank()):
        for name, value in changes.items():
            arguments[name] = value() if callable(value) else value
    return model(**arguments).logits


def registered(model: torch.nn.Module) -> torch.nn.Module:
    hf.register()
    model.set_attn_implementation("seqpar")
    return model.eval()


def local_ones(hidden: int = 0) -> Tensor:
    mask = torch.ones(2, TOKENS[dist.get_rank()], dtype=torch.long)
    mask[0, :hidden] = 0
    return mask


def test_a_mask_that_hides_nothing_is_accepted():
    model = registered(tiny_llama())
    with_mask = VirtualWorld(4).run(run_forward, model, {"attention_mask": local_ones})
    without = VirtualWorld(4).run(run_forward, model, {})
    assert all(torch.equal(*pair) for pair in zip(with_mask, without, strict=True))


REFUSED_CALLS = {
    "padding": ({"attention_mask": lambda: local_ones(hidden=1)}, refusals.PaddingError, "hides 1 of"),
    "a mask over all ranks' tokens": (
        {"attention_mask": lambda: torch.ones(2, sum(TOKENS))}, refusals.PaddingError, "shape"),
    "a ready-made mask": (
        {"attention_mask": lambda: torch.ones(2, 1, TOKENS[dist.get_rank()], sum(TOKENS), dtype=torch.bool)},
        refusals.CustomMaskError, "mask of shape"),
    "local positions": (
        {"position_ids": lambda: torch.arange(TOKENS[dist.get_rank()])[None]},
        refusals.PositionIdsError, "count from 0 on each rank"),
    "no positions": ({"position_ids": None}, refusals.PositionIdsError, "count from 0 on each rank"),
    "positions in another order of the ranks": (
        {"position_ids": lambda: 20 - 5 * dist.get_rank() + torch.arange(TOKENS[dist.get_rank()])[None]},
        refusals.PositionIdsError, "do not count on"),
    "restarted positions": (
        {"position_ids": lambda: torch.arange(TOKENS[dist.get_rank()])[None] % 2},
        refusals.PositionIdsError, "restart or jump"),
    "restarted positions beside a mask": (
        {"position_ids": lambda: torch.arange(TOKENS[dist.get_rank()])[None] % 2,
         "attention_mask": local_ones},
        refusals.PositionIdsError, "restart or jump"),
}  # fmt: skip


@pytest.mark.parametrize("changes, error, message", REFUSED_CALLS.values(), ids=REFUSED_CALLS)
def test_refused_calls(changes, error, message):
    model = registered(tiny_llama())
    with pytest.raises(error, match=message):
        VirtualWorld(4).run(run_forward, model, changes)


def raised(model: torch.nn.Module, changes: dict) -> str:
    try:
        run_forward(model, changes)
    except refusals.PositionIdsError as error:
        return str(error)
    return "nothing raised"


def test_local_positions_are_refused_on_all_ranks_alike():
    model = registered(tiny_llama())
    messages = VirtualWorld(4).run(raised, model, {"position_ids": None})
    assert len(set(messages)) == 1
    assert "rank 1 starts at 0, rank 2 starts at 0, rank 3 starts at 0" in messages[0]
    assert "5 on rank 1, 7 on rank 2, 11 on rank 3" in messages[0]


def test_with_a_plan_a_rank_sees_local_positions_alone():
    hf.register(plan=make_plan(ranks=4, heads=6, kv_heads=2, tokens=TOKENS))
    model = tiny_llama().eval()
    model.set_attn_implementation("seqpar")
    world = VirtualWorld(4)
    with pytest.raises(refusals.PositionIdsError, match="rank 2 starts at 0"):
        world.run(run_forward, model, {"position_ids": lambda: torch.arange(4)[None]}, one_rank_alone=2)


def test_a_rank_that_sees_padding_alone_stops_the_world_before_it_communicates():
    model = registered(tiny_llama())
    world = VirtualWorld(4)
    with pytest.raises(refusals.PaddingError):
        world.run(run_forward, model, {"attention_mask": lambda: local_ones(hidden=1)}, one_rank_alone=0)
    assert world.bytes[0].sum() == 0


def second_call_with_its_cache(model: torch.nn.Module) -> None:
    first = model(
        shard(token_ids(), TOKENS), position_ids=shard(torch.arange(14)[None], TOKENS), use_cache=True
    )
    position_ids = torch.tensor([[sum(TOKENS)]])
    model(
        token_ids()[:, :1], position_ids=position_ids, past_key_values=first.past_key_values, use_cache=True
    )


def test_a_filled_cache_is_refused():
    with pytest.raises(refusals.FilledCacheError, match="keys for 1 queries"):
        VirtualWorld(4).run(torch.no_grad()(second_call_with_its_cache), registered(tiny_llama()))


def test_dropout_is_refused():
    model = registered(tiny_llama(attention_dropout=0.1)).train()
    with pytest.raises(refusals.DropoutError, match=r"0\.1"):
        VirtualWorld(4).run(run_forward, model, {})


def test_a_bidirectional_model_is_refused():
    model = registered(tiny_llama(is_causal=False))
    with pytest.raises(refusals.NotCausalError):
        VirtualWorld(4).run(run_forward, model, {})


def test_a_sliding_window_is_refused():
    config = transformers.MistralConfig(
        vocab_size=31, hidden_size=48, intermediate_size=40, num_hidden_layers=1, num_attention_heads=6,
        num_key_value_heads=2, sliding_window=3, max_position_embeddings=64,
    )  # fmt: skip
    model = registered(transformers.MistralForCausalLM(config).double())
    with pytest.raises(refusals.SlidingWindowError, match="window or chunk of 3 tokens"):
        VirtualWorld(4).run(run_forward, model, {})
    config.sliding_window = None
    model = registered(transformers.MistralForCausalLM(config).double())
    assert len(VirtualWorld(4).run(run_forward, model, {})) == 4


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("name", ["bloom", "falcon", "gptj", "mpt"])
def test_a_model_that_computes_attention_by_itself_is_refused(name, tokens):
    hf.register()
    config = transformers.CONFIG_MAPPING[name](
        vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, rotary_dim=4
    )
    if name in ("falcon", "gptj"):
        with pytest.raises(KeyError, match="seqpar"):  # transformers has a table of its own for them
            transformers.AutoModelForCausalLM.from_config(config, attn_implementation="seqpar")
        return
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="seqpar").eval()
    world = VirtualWorld(2)
    with pytest.raises(refusals.NoAttentionInterfaceError, match="AttentionInterface"):
        world.run(lambda: model(torch.ones(1, tokens, dtype=torch.long), use_cache=False))


def test_registering_something_that_is_no_group_is_refused_at_once():
    with pytest.raises(GroupError, match="group is a str"):
        hf.register(group="x")
    with pytest.raises(PlanError, match="0 chunks"):
        hf.register(chunks=0)


def tiny_gemma(**options) -> transformers.Gemma3ForCausalLM:
    config = transformers.Gemma3TextConfig(
        vocab_size=31, hidden_size=48, intermediate_size=40, num_hidden_layers=2, head_dim=8,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=64, **options,
    )  # fmt: skip
    return transformers.Gemma3ForCausalLM(config).double()


def test_a_model_that_may_have_windows_is_refused_only_where_a_layer_has_one():
    full = ["full_attention"] * 2
    model = tiny_gemma(layer_types=full)
    one_device = model(token_ids(), use_cache=False).logits
    logits = VirtualWorld(4).run(run_forward, registered(model), {})
    torch.testing.assert_close(torch.cat(logits, dim=1), one_device, rtol=0, atol=1e-12)
    with pytest.raises(refusals.SlidingWindowError):
        VirtualWorld(4).run(
            run_forward, registered(tiny_gemma(layer_types=[*full[1:], "sliding_attention"])), {}
        )


def test_the_softcap_of_gemma2_is_refused():
    config = transformers.Gemma2Config(
        vocab_size=31, hidden_size=48, intermediate_size=40, num_hidden_layers=2, head_dim=8,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=64, attn_logit_softcapping=30.0,
    )  # fmt: skip
    with pytest.raises(refusals.SoftcapError, match=r"30\.0"):
        VirtualWorld(4).run(run_forward, registered(transformers.Gemma2ForCausalLM(config).double()), {})


def test_the_sinks_of_gpt_oss_are_refused():
    config = transformers.GptOssConfig(
        vocab_size=31, hidden_size=48, intermediate_size=40, num_hidden_layers=2, head_dim=8,
        num_attention_heads=6, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    with pytest.raises(refusals.SinksError):
        VirtualWorld(4).run(run_forward, registered(transformers.GptOssForCausalLM(config)), {})


REFUSED_LAYERS = {
    "softcap": ({"softcap": 30.0}, refusals.SoftcapError, "30.0"),
    "sinks": ({"s_aux": torch.zeros(6)}, refusals.SinksError, "s_aux"),
    "sliding window": ({"sliding_window": 7}, refusals.SlidingWindowError, "7 tokens"),
    "not causal": ({"is_causal": False}, refusals.NotCausalError, "later tokens"),
    "position bias": ({"position_bias": torch.zeros(1)}, refusals.UnknownArgumentError, "position_bias"),
    "attention weights": ({"output_attentions": True}, refusals.UnknownArgumentError, "output_attentions"),
    "packed lengths": ({"cu_seq_lens_q": torch.zeros(2)}, refusals.UnknownArgumentError, "cu_seq_lens_q"),
    "no position ids": ({"position_ids": None}, refusals.PositionIdsError, "no position ids"),
    "position ids of 3 tokens": ({"position_ids": torch.zeros(1, 3)}, refusals.PositionIdsError, r"\(1, 3\)"),
}  # fmt: skip


@pytest.mark.parametrize("changes, error, message", REFUSED_LAYERS.values(), ids=REFUSED_LAYERS)
def test_what_a_layer_asks_beyond_causal_attention_is_refused_without_communication(changes, error, message):
    """Also before a process group is looked for: there is none here."""
    hf.register()
    attention = transformers.AttentionInterface()["seqpar"]
    layer = tiny_llama().model.layers[0].self_attn
    query, key = torch.zeros(1, 6, 4, 8), torch.zeros(1, 2, 4, 8)
    arguments = {"position_ids": torch.arange(4)[None], "softcap": None, "use_cache": False, **changes}
    with pytest.raises(error, match=message):
        attention(layer, query, key, key, None, **arguments)


def test_custom_mask_functions_are_refused():
    from transformers.masking_utils import and_masks, causal_mask_function, chunked_causal_mask_function

    window = chunked_causal_mask_function(3, torch.zeros(1, dtype=torch.int))
    empty = refusals.check_mask(1, 4, 4, mask_function=window, local_size=3)
    assert empty == refusals.MaskMarker(window=3)
    with pytest.raises(refusals.SlidingWindowError, match="3 tokens"):
        refusals.check_call(torch.nn.Identity(), 4, 4, empty, True, 0.0, {})
    with pytest.raises(refusals.CustomMaskError):
        refusals.check_mask(1, 4, 4, mask_function=and_masks(causal_mask_function, causal_mask_function))
    with pytest.raises(refusals.FilledCacheError):
        refusals.check_mask(1, 4, 9, mask_function=causal_mask_function)
    assert refusals.check_mask(1, 4, 4, mask_function=causal_mask_function) == refusals.MaskMarker()


@pytest.mark.parametrize("name", ["", "eager", "sdpa", "paged|eager", 3, None])
def test_names_that_cannot_be_registered(name):
    with pytest.raises(ArgumentError):
        hf.register(name=name)
    assert "seqpar" not in transformers.AttentionInterface()


def test_without_transformers_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from seqpar_ref.huggingface import TransformersMissingError, register\n"
        "try: register()\n"
        "except TransformersMissingError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install -e '.[hf]'" in done.stdout
