"""A small model made from nothing, for `accord quickstart` and tests: tokenizer, random weights.

The tokenizer is byte-level BPE (any text can be written, nothing is unknown). Its template puts an
answer directly after <|assistant|> and <|end|> directly after the answer, so that the generation
prompt is a prefix of the answered conversation.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cluster.contracts.errors import UserError
from learner.models.load import save_policy

Architecture = Literal["qwen2", "llama", "qwen3", "gemma", "mistral"]

PAD, END = "<|pad|>", "<|end|>"
SPECIAL = (PAD, "<|user|>", "<|assistant|>", "<|system|>", END)
MAX_POSITIONS = 512

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, directory: str | Path) -> Any:
    """Train on `texts`, save to `directory`, and return the transformers tokenizer.

    vocab_size: upper limit (at least 256 bytes + 5 special tokens, else UserError); the end token
    is <|end|>, the padding token another one.
    """
    least = 256 + len(SPECIAL)
    if vocab_size < least:
        raise UserError(
            f"a byte-level vocabulary has at least {least} tokens, not {vocab_size}",
            where="vocab_size",
            fix=f"set it to {least} or more",
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[s for s in SPECIAL if s not in (PAD, END)],
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return tokenizer


def fresh_model(
    tokenizer: Any,
    directory: str | Path,
    *,
    hidden: int = 128,
    layers: int = 4,
    heads: int = 4,
    intermediate: int = 384,
    arch: Architecture = "qwen2",
    seed: int = 0,
    initializer_range: float = 0.02,
) -> Path:
    """Random float32 weights from `seed`, tied embeddings, saved with the tokenizer; the directory.

    Raises UserError when `hidden` does not divide into `heads`.
    """
    if hidden % heads:
        raise UserError(f"hidden {hidden} does not divide into {heads} heads", where="fresh_model")
    config = transformers.AutoConfig.for_model(
        arch,
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=intermediate,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        initializer_range=initializer_range,
        attention_dropout=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return save_policy(model, tokenizer, directory)
