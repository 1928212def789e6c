"""A model of transformers without its weights."""

import pytest

from lilliput.models.transformers import empty, pretrained

pytest.importorskip("transformers")


def test_an_empty_model_has_the_names_and_shapes_of_the_model(tmp_path):
    model = pretrained("llama_9m", layers=2, vocabulary=100)
    model.save_pretrained(tmp_path)
    for source, options in (("llama_9m", {"layers": 2, "vocabulary": 100}), (str(tmp_path), {})):
        made = empty(source, **options)
        assert all(p.is_meta for p in made.parameters())
        assert {n: p.shape for n, p in made.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
