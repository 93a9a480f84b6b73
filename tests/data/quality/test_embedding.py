"""The encoder's path, on a tiny language model: any Hugging Face model that has hidden states."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raylign.config import UserError
from raylign.config.synthesis import FitConfig
from raylign.data.quality.classifier import fit, load
from raylign.data.quality.embedding import embed


def test_vectors_are_means_over_the_texts_own_tokens(tiny_model: Path) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    texts: list[str | None] = ["w1 w2 w3", "w4", "", None, " ".join(["w5 w6"] * 40)]
    vectors = embed(texts, tiny_model, 60)
    tokens = AutoTokenizer.from_pretrained(tiny_model)("w1 w2 w3", return_tensors="pt")
    with torch.inference_mode():
        hidden = AutoModel.from_pretrained(tiny_model)(tokens["input_ids"]).last_hidden_state[0]
    mean = hidden.mean(0).numpy()
    np.testing.assert_allclose(vectors[0], mean / np.linalg.norm(mean), atol=1e-5)
    # Neither order nor company matters.
    alone = np.concatenate([embed([text], tiny_model, 60) for text in texts])
    np.testing.assert_allclose(vectors, alone, atol=1e-5)
    assert embed([], tiny_model, 60).shape == (0, 64)


def test_a_classifier_on_vectors_learns_saves_and_loads(tiny_model: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 200)
    texts = [" ".join(["w1"] * int(n) * 2 + ["w2"] * int(5 - n) * 2) for n in labels]
    config = FitConfig(embedding_model=tiny_model, ridge=1e-3)
    classifier = fit(texts, labels, config, seed=0)
    assert classifier.metrics["pearson"] > 0.9
    classifier.save(tmp_path)
    scores = load(tmp_path).score(pa.array(texts[:9]))
    np.testing.assert_allclose(scores, classifier.score(texts[:9]), atol=1e-5)
    assert scores.dtype == np.float32


def test_a_directory_without_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"embedding_model=.* cannot be loaded"):
        embed(["x"], tmp_path, 8)
