"""Greedy generation equals `model.generate` on each prompt alone."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from datasets import Dataset
from helpers import PROMPTS, one_line
from transformers import GenerationConfig

from ssah_nb.engine.chat import encode_prompts
from ssah_nb.engine.generation import evaluating, generate, greedy_tokens, stop_ids
from ssah_nb.engine.models import ARCHITECTURES, is_mixed, tiny_model, tiny_tokenizer
from ssah_nb.engine.run import SsahError


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


def test_each_row_ends_at_its_own_stop_token():
    model, encoded = tiny_model(), encode_prompts(tiny_tokenizer(), PROMPTS)
    free = greedy_tokens(model, encoded, [], 12)
    assert all(len(tokens) == 12 for tokens in free)
    stop = [free[0][3], free[1][5], free[3][7]]  # ends the rows at different steps
    cut = [tokens[: next((i for i, t in enumerate(tokens) if t in stop), 12)] for tokens in free]
    assert greedy_tokens(model, encoded, stop, 12) == cut
    assert len(set(map(len, cut))) > 2


def test_batches_hold_prompts_of_like_length(monkeypatch):
    model, encoded, seen = tiny_model(), [[5] * n for n in (3, 40, 4, 39, 5, 38)], []
    own = model.generate

    def spy(ids, **options):
        seen.append(tuple(ids.shape))
        return own(ids, **options)

    monkeypatch.setattr(model, "generate", spy)
    assert len(greedy_tokens(model, encoded, [256], 2, batch_size=3)) == 6
    assert sorted(seen) == [(3, 5), (3, 40)]  # together they would be padded to 6 x 40


@pytest.mark.parametrize("fails", [False, True])
def test_the_models_own_settings_are_ignored_and_come_back(fails, monkeypatch):
    encoded = encode_prompts(tiny_tokenizer(), PROMPTS)
    plain = greedy_tokens(tiny_model(), encoded, [256], 8)
    model = tiny_model()
    own = GenerationConfig(
        do_sample=True,
        temperature=2.0,
        repetition_penalty=5.0,
        max_length=3,
        eos_token_id=plain[0][0],
    )
    model.generation_config = own
    if fails:
        monkeypatch.setattr(model, "generate", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            greedy_tokens(model, encoded, [256], 8)
    else:
        assert greedy_tokens(model, encoded, [256], 8) == plain
    assert model.generation_config is own
    assert (own.repetition_penalty, own.temperature, own.max_length) == (5.0, 2.0, 3)


@pytest.mark.parametrize("mixed", [False, True])
def test_evaluating_follows_the_mark_of_the_run(mixed):
    model, seen = tiny_model(), []
    model.lm_head.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    model.ssah_mixed = mixed
    assert is_mixed(model) is mixed
    dtype = torch.bfloat16 if mixed else torch.float32
    with evaluating(model):
        assert model(torch.tensor([[1, 2]])).logits.dtype == dtype
    greedy_tokens(model, [[5, 6]], [256], 2)
    assert set(seen) == {dtype}
    assert model(torch.tensor([[1, 2]])).logits.dtype == torch.float32  # outside, as ever


def test_generation_keeps_order_modes_and_gradients():
    model, tokenizer = tiny_model().train(), tiny_tokenizer()
    model.model.layers[0].eval()
    prompts = Dataset.from_list([{"prompt": p} for p in PROMPTS])
    together = generate(model, tokenizer, prompts, max_new_tokens=5, batch_size=2)
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
    one_line(e)
    too_long = r"prompt 1 has \d+ tokens, and with 8 new ones .* context of 512"
    with pytest.raises(SsahError, match=too_long) as e:
        generate(model, tokenizer, ["Hi", "x" * 600], max_new_tokens=8)
    one_line(e)
    with pytest.raises(SsahError, match="prompt 1 has no tokens") as e:
        greedy_tokens(model, [[5], []], [256])
    one_line(e)


def test_stop_ids_know_the_end_of_the_turn():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.generation_config.eos_token_id = [3, 256]
    assert stop_ids(model, tokenizer) == [3, 256]
    model.generation_config.eos_token_id = None
    assert stop_ids(model, tokenizer) == [256]


def test_a_prefilled_answer_goes_on_from_its_first_words():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    prompts, opening = ["Open box 1", "Hi"], "Sure, here"
    found = generate(model, tokenizer, prompts, max_new_tokens=5, prefill=opening)
    for prompt, said in zip(prompts, found):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        ids = torch.tensor([tokenizer(ids + opening, add_special_tokens=False).input_ids])
        for _ in range(5):  # greedy, one token at a time, without a cache
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        assert said == tokenizer.decode(ids[0, -5:], skip_special_tokens=True)
    assert generate(model, tokenizer, prompts, 5, prefill=" ") == generate(
        model, tokenizer, prompts, 5
    )


def test_threads_take_turns_on_one_model():
    model, tokenizer = tiny_model().train(), tiny_tokenizer()
    settings, long = model.generation_config, generate(model, tokenizer, PROMPTS, 40)
    short = generate(model, tokenizer, PROMPTS, 2)
    with ThreadPoolExecutor(4) as pool:
        sizes = [40, 2] * 8
        found = list(pool.map(lambda size: generate(model, tokenizer, PROMPTS, size), sizes))
    assert found == [long, short] * 8
    assert model.generation_config is settings and all(m.training for m in model.modules())
