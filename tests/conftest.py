"""Fixtures that several test files share: a private Ray cluster and a tiny model."""

from __future__ import annotations

import os

# Before torch is imported: compilation costs more than these models' whole runs.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator
from pathlib import Path

import pytest

# On several workers whole files are dealt out, in this order: the longest must not come last.
LONGEST_FILES = (
    "test_quickstart_job.py",
    "test_rollout.py",
    "test_training_jobs.py",
    "test_prepare_corpora.py",
    "test_evaluate_job.py",
    "test_resume.py",
    "test_engines.py",
    "test_parallel.py",
    "test_tune_job.py",
    "test_pipeline.py",
)

WORDS = [f"w{i}" for i in range(52)]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<user>{{ m['content'] }}{% else %}"
    "<assistant>{% generation %}{{ m['content'] }}<eos>{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest files first; the others stay in order."""
    places = {name: place for place, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A private cluster of two CPUs."""
    from raylign.config import RayConfig
    from raylign.runtime import connect, disconnect

    connect(RayConfig(num_cpus=2))
    yield
    disconnect()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama of 64 tokens of context with a word tokenizer and chat template."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("tiny_model")
    special = ["<pad>", "<eos>", "<user>", "<assistant>"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS, "<unk>"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            initializer_range=0.1,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    ).save_pretrained(directory)
    return directory
