"""Greedy generation equals `model.generate` on each prompt alone."""

import pytest
import torch
from datasets import Dataset

from ssah_nb.engine.batches import encode_prompts
from ssah_nb.engine.generation import evaluating, generate, greedy_tokens, stop_ids
from ssah_nb.engine.models import ARCHITECTURES, tiny_model, tiny_tokenizer
from ssah_nb.engine.run import SsahError

PROMPTS = [
    "Hi",
    "Name three colours, please",
    "Sum 2 and 3",
    "Tell a story about a fox and a hen",
    "Hm?",
    "Sum 4 and 3",
]


def alone(model, ids: list[int], max_new_tokens: int) -> list[int]:
    "What transformers generates for one prompt, up to its end token."
    new = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=max_new_tokens,
    )
    new = new[0, len(ids) :].tolist()
    return new[: new.index(256)] if 256 in new else new


WINDOWED = [(name, {"sliding_window": 24}) for name in ("mistral", "gemma2", "gemma3_text", "phi3")]
WINDOWED += [("qwen2", {"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 0})]


@pytest.mark.parametrize("name, config", [(name, {}) for name in ARCHITECTURES] + WINDOWED)
@pytest.mark.parametrize("system", [None, "Be kind."])
def test_generation_equals_transformers(name, config, system):
    model = tiny_model(name, tie_word_embeddings=False, **config)
    encoded = encode_prompts(tiny_tokenizer(), PROMPTS[2:], system)
    expected = [alone(model, ids, 8) for ids in encoded]
    for batch_size in (3, 50):
        assert greedy_tokens(model, encoded, [256], 8, batch_size) == expected
    assert len({tuple(e) for e in expected}) > 1  # the model does not say the same to everyone


def test_ended_rows_are_dropped(monkeypatch):
    model, encoded = tiny_model(), encode_prompts(tiny_tokenizer(), PROMPTS)
    free = greedy_tokens(model, encoded, [], 12)
    stop = [free[0][3], free[1][5], free[3][7]]  # ends the rows at different steps
    cut = [tokens[: next((i for i, t in enumerate(tokens) if t in stop), 12)] for tokens in free]
    sizes, forward = [], model.forward
    monkeypatch.setattr(
        model, "forward", lambda ids, **kw: (sizes.append(ids.shape[0]), forward(ids, **kw))[1]
    )
    assert greedy_tokens(model, encoded, stop, 12) == cut
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < len(encoded)
    assert len(sizes) <= max(map(len, cut))


def test_generation_keeps_order_modes_and_gradients():
    model, tokenizer = tiny_model().train(), tiny_tokenizer()
    model.model.layers[0].eval()
    together = generate(
        model,
        tokenizer,
        Dataset.from_list([{"prompt": p} for p in PROMPTS]),
        max_new_tokens=5,
        batch_size=2,
    )
    assert together == [generate(model, tokenizer, [p], max_new_tokens=5)[0] for p in PROMPTS]
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training
    model(torch.tensor([[1, 2]])).logits.sum().backward()
    with pytest.raises(ZeroDivisionError):
        with evaluating(model):
            1 / 0
    assert model.training and not torch.is_inference_mode_enabled()


def test_generation_in_bfloat16_and_one_token_prompts():
    model = tiny_model().to(torch.bfloat16)
    assert all(len(tokens) == 3 for tokens in greedy_tokens(model, [[5], [6, 7], [5]], [], 3))
    assert greedy_tokens(model, [[5], [5]], [], 3)[0] == greedy_tokens(model, [[5]], [], 3)[0]


def test_generation_errors_are_one_line():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with pytest.raises(SsahError, match="no prompts") as e:
        generate(model, tokenizer, [])
    with pytest.raises(
        SsahError, match=r"prompt 1 has \d+ tokens, and with 8 new ones .* context of 512"
    ) as e:
        generate(model, tokenizer, ["Hi", "x" * 600], max_new_tokens=8)
    assert "\n" not in str(e.value)


def test_stop_ids_know_the_end_of_the_turn():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.generation_config.eos_token_id = [3, 256]
    assert stop_ids(model, tokenizer) == [3, 256]
    model.generation_config.eos_token_id = None
    assert stop_ids(model, tokenizer) == [256]
