"""Losses, importance and answers are the model's own, and each row's as if it were alone."""

import copy
import random
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from helpers import one_line
from transformers import AutoConfig, AutoModelForCausalLM

from ssah_nb.attribution import importance
from ssah_nb.engine.batches import pad_batch, response_losses, token_batches
from ssah_nb.engine.chat import encode_pairs
from ssah_nb.engine.evaluation import pair_losses, perplexity
from ssah_nb.engine.forward import context_of, has_recurrent_state, needs_equal_prompts
from ssah_nb.engine.forward import reset_rotaries
from ssah_nb.engine.generation import greedy_tokens
from ssah_nb.engine.models import ARCHITECTURES, TINY_SIZES, tiny_model, tiny_tokenizer
from ssah_nb.engine.preferences import reference_margins
from ssah_nb.engine.run import SsahError
from ssah_nb.engine.training import finetune
from ssah_nb.engine.watching import watched_moments
from ssah_nb.probe import block_states

DRAW = random.Random(1)
ENCODED = [
    ([DRAW.randrange(1, 250) for _ in range(p)], [DRAW.randrange(1, 250) for _ in range(q)])
    for p, q in ((7, 5), (20, 9), (3, 14))
]
MAMBA = dict(mamba_d_state=8, mamba_n_heads=4, mamba_d_head=16, mamba_chunk_size=16, mamba_d_ssm=64)
ROUTED = dict(num_local_experts=4, num_experts_per_tok=2)
LINEAR = dict(
    linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8
)
OTHERS = {
    "cohere": dict(logit_scale=0.3),
    "cohere2": dict(logit_scale=0.3),
    "granite": dict(logits_scaling=4.0),
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4),
    "gpt_neox": {},
    "olmo2": {},
    "mixtral": ROUTED,
    "granitemoe": ROUTED | dict(logits_scaling=4.0),
}
HYBRIDS = {
    "mamba": dict(state_size=8, time_step_rank=4),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "falcon_h1": MAMBA,
    "granitemoehybrid": MAMBA | ROUTED | dict(layer_types=["mamba", "attention"]),
    "qwen3_next": LINEAR | ROUTED | dict(layer_types=["linear_attention", "full_attention"]),
    "jamba": dict(num_hidden_layers=2, attn_layer_period=2, attn_layer_offset=1, mamba_dt_rank=4),
    "recurrent_gemma": dict(num_hidden_layers=3, lru_width=32, attention_window_size=64),
}
LONG = dict(
    rope_parameters={
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [6.0] * 4,
    },
    original_max_position_embeddings=64,
)
STRETCHED = dict(
    rope_parameters={"rope_type": "dynamic", "factor": 8.0}, max_position_embeddings=64
)


def model_of(name):
    if name in ARCHITECTURES:
        return tiny_model(name)
    sizes = TINY_SIZES | (OTHERS | HYBRIDS)[name]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes)).eval().float()


def own_losses(model, ids, mask, response):
    """Each response token's loss from full logits, and their sum as the model itself sums them."""
    with torch.no_grad():
        labels = ids.masked_fill(~response, -100)
        out = model(input_ids=ids, attention_mask=mask, labels=labels)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -ids.shape[1] :]
    predicted = logits.float().log_softmax(-1)
    each = [-predicted[r, t - 1, ids[r, t]] for r, t in response.nonzero().tolist()]
    return torch.stack(each), out.loss * len(each)


def check_losses(model):
    batch = pad_batch(ENCODED, [0, 1, 2])
    each, total = own_losses(model, batch.input_ids, batch.attention_mask, batch.response_mask)
    with torch.no_grad():
        found = response_losses(model, batch)
        alone = [response_losses(model, pad_batch(ENCODED, [row])) for row in range(3)]
    torch.testing.assert_close(found, each, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.sum(), total, rtol=1e-5, atol=0)
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *OTHERS, *HYBRIDS])
def test_losses_are_what_the_model_says(name):
    check_losses(model_of(name))


def adapted(kind, architecture="llama"):
    """A tiny model with a trained-looking adapter."""
    task = dict(task_type="CAUSAL_LM")
    configs = {
        "lora": lambda: peft.LoraConfig(
            r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **task
        ),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=5, **task),
        "p-tuning": lambda: peft.PromptEncoderConfig(
            num_virtual_tokens=5, encoder_hidden_size=16, **task
        ),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=5, **task),
    }
    torch.manual_seed(0)
    return peft.get_peft_model(tiny_model(architecture), configs[kind]()).eval()


ADAPTERS = ("lora", "prompt", "p-tuning", "prefix")


@pytest.mark.parametrize("kind", ADAPTERS)
def test_losses_count_the_adapter(kind):
    model = adapted(kind)
    check_losses(model)
    with torch.no_grad(), model.disable_adapter():
        plain = response_losses(model, pad_batch(ENCODED, [0, 1, 2]))
        assert torch.equal(plain, response_losses(tiny_model(), pad_batch(ENCODED, [0, 1, 2])))
    with torch.no_grad():
        tuned = response_losses(model, pad_batch(ENCODED, [0, 1, 2]))
    assert not torch.allclose(tuned, plain, atol=0.1)


def with_real_prompt():
    """A tuned prompt that consists of real tokens, and those tokens."""
    model, real = adapted("prompt"), [9, 33, 70, 71, 120]
    words = model.get_base_model().get_input_embeddings().weight
    model.prompt_encoder["default"].embedding.weight.data = words[real].detach().clone()
    return model, [(real + prompt, response) for prompt, response in ENCODED]


def test_a_tuned_prompt_of_real_tokens_is_the_same_as_those_tokens():
    model, longer = with_real_prompt()
    plain, batch = tiny_model(), pad_batch(ENCODED, [0, 1, 2])
    longer_batch = pad_batch(longer, [0, 1, 2])
    with torch.no_grad():
        expected = response_losses(plain, longer_batch)
        torch.testing.assert_close(response_losses(model, batch), expected, rtol=1e-5, atol=1e-5)
    states = block_states(plain, longer_batch)[:, :, 5:]
    kept = batch.attention_mask.bool()
    torch.testing.assert_close(block_states(model, batch)[:, kept], states[:, kept])
    names = ["layers.0.mlp.down_proj", "layers.1.self_attn.o_proj"]
    for gradient in (False, True):
        signal = (lambda x, g: x * g) if gradient else (lambda x: x)
        found, wanted = (
            watched_moments(m, [start + n for n in names], batches, signal, gradient)
            for m, start, batches in (
                (model, "base_model.model.", list(token_batches(ENCODED, 30, model))),
                (plain, "model.", [longer_batch]),
            )
        )
        for a, b in zip(found.values(), wanted.values()):
            assert a.count == b.count == sum(len(response) for _, response in ENCODED)
            torch.testing.assert_close(a.mean, b.mean, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(a.variance, b.variance, rtol=1e-4, atol=1e-6)
    prompts, real = [prompt for prompt, _ in ENCODED], [prompt for prompt, _ in longer]
    assert greedy_tokens(model, prompts, [], 6) == greedy_tokens(plain, real, [], 6)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_answer_of_an_adapted_model_is_its_own(kind):
    model, prompts = adapted(kind), [prompt for prompt, _ in ENCODED]
    expected = []
    for prompt in prompts:  # token by token, without a cache
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        expected.append(ids[len(prompt) :])
    assert greedy_tokens(model, prompts, [], 6) == expected


def test_prefix_moments_equal_those_of_each_pair_alone():
    model, name = adapted("prefix"), "base_model.layers.0.mlp.down_proj"
    name = next(n for n, _ in model.named_modules() if n.endswith("layers.0.mlp.down_proj"))
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0][0]))
    with torch.no_grad():
        for prompt, response in ENCODED:
            model(input_ids=torch.tensor([prompt + response]))
            seen[-1] = seen[-1][len(prompt) :]
    handle.remove()
    found = watched_moments(model, [name], list(token_batches(ENCODED, model=model)), lambda x: x)
    torch.testing.assert_close(found[name].mean.float(), torch.cat(seen).mean(0))


def test_an_adapter_that_wants_a_task_is_refused():
    config = peft.MultitaskPromptTuningConfig(
        num_virtual_tokens=3, num_tasks=2, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(tiny_model(), config)
    for call in (
        lambda: response_losses(model, pad_batch(ENCODED, [0])),
        lambda: greedy_tokens(model, [[5]], []),
    ):
        with pytest.raises(SsahError, match="needs a task for each row") as error:
            call()
        one_line(error)


def test_a_model_that_sees_the_future_is_refused():
    sizes = {k: v for k, v in TINY_SIZES.items() if k not in ("num_key_value_heads", "head_dim")}
    bert = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **sizes))
    for call in (
        lambda: list(token_batches(ENCODED, model=bert)),
        lambda: response_losses(bert, pad_batch(ENCODED, [0])),
        lambda: greedy_tokens(bert, [[5]], []),
    ):
        with pytest.raises(SsahError, match="no causal language model") as error:
            call()
        one_line(error)


PAIRS = [
    {"prompt": "Say yes", "response": "yes"},
    {"prompt": "Count, please", "response": "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16"},
    {"prompt": "Hm?", "response": "no, and no again"},
    {"prompt": "A word", "response": "word for word, and then yet another one, as is the custom"},
]
TOKENIZER = tiny_tokenizer()


@pytest.mark.parametrize("name", ["cohere", "granite"])
def test_gradient_equals_autograd_through_the_whole_model(name):
    model, encoded = model_of(name), encode_pairs(TOKENIZER, PAIRS)
    linear = "model.layers.1.mlp.down_proj"
    products = []
    for prompt, response in encoded:
        kept = []
        handle = model.get_submodule(linear).register_forward_pre_hook(
            lambda _, x: (x[0].retain_grad(), kept.append(x[0]))[0]
        )
        labels = torch.tensor([[-100] * len(prompt) + response])
        loss = model(input_ids=torch.tensor([prompt + response]), labels=labels).loss
        (loss * len(response)).backward()
        handle.remove()
        products.append((kept[0] * kept[0].grad)[0, len(prompt) :].detach().abs())
    found = importance(model, TOKENIZER, PAIRS, method="gradient").moments["mlp"][1]
    torch.testing.assert_close(found.mean.float(), torch.cat(products).mean(0), rtol=1e-4, atol=0)


def test_fine_tuning_descends_the_models_own_loss():
    model, (prompt, response) = model_of("cohere"), encode_pairs(TOKENIZER, PAIRS)[0]
    labels = torch.tensor([[-100] * len(prompt) + response])
    loss = model(input_ids=torch.tensor([prompt + response]), labels=labels).loss.item()
    assert finetune(model, TOKENIZER, PAIRS[:1]).loss[0] == pytest.approx(loss, rel=1e-5)
    tuned = adapted("prompt")
    before = perplexity(tuned, TOKENIZER, PAIRS).value
    finetune(tuned, TOKENIZER, PAIRS, lr=0.1, epochs=8)
    assert perplexity(tuned, TOKENIZER, PAIRS).value < before


def rotary_model(name):
    options = {"phi3": LONG, "llama": STRETCHED}[name]
    model = tiny_model(name, **options)
    for layer in model.model.layers:  # attention that looks at positions
        for weight in layer.self_attn.parameters():
            weight.data *= 1.5
    return model


def fresh_losses(model, pair):
    prompt, response = pair
    ids = torch.tensor([prompt + response])
    labels = torch.tensor([[-100] * len(prompt) + response])
    with torch.no_grad():
        return float(copy.deepcopy(model)(input_ids=ids, labels=labels).loss) * len(response)


@pytest.mark.parametrize("name", ["phi3", "llama"])
def test_a_long_neighbour_changes_nothing(name):
    model, encoded = rotary_model(name), encode_pairs(TOKENIZER, PAIRS)
    lengths = [len(prompt) + len(response) for prompt, response in encoded]
    assert min(lengths) <= 64 < sorted(lengths)[-2] < max(lengths) <= context_of(model)
    alone = [fresh_losses(model, pair) for pair in encoded]
    for max_tokens in (1, 150, 4096):
        found = pair_losses(model, encoded, max_tokens)[:, 0]
        assert found == pytest.approx(alone, rel=1e-5)
    with torch.no_grad():
        naive = response_losses(model, pad_batch(encoded, [0, 1, 2, 3]))
    assert abs(float(naive.sum()) - sum(alone)) > 0.1  # so the batches matter
    scores = [importance(model, TOKENIZER, PAIRS, max_tokens=m).mlp for m in (1, 150, 4096)]
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(scores[2], scores[0], rtol=1e-4, atol=0)
    rows = [
        {"prompt": a["prompt"], "chosen": a["response"], "rejected": b["response"]}
        for a, b in zip(PAIRS, PAIRS[1:] + PAIRS[:1])
    ]
    both = encode_pairs(
        TOKENIZER,
        [{"prompt": r["prompt"], "response": r[k]} for k in ("chosen", "rejected") for r in rows],
    )
    each = [fresh_losses(model, pair) for pair in both]
    margins = [rejected - chosen for chosen, rejected in zip(each[:4], each[4:])]
    for max_tokens in (1, 4096):
        found = reference_margins(model, TOKENIZER, rows, max_tokens=max_tokens)
        assert found.tolist() == pytest.approx(margins, rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("name", ["phi3", "llama"])
@pytest.mark.parametrize("batch_size", [1, 2, 50])
def test_a_long_prompt_changes_no_other_answer(name, batch_size):
    model, draw = rotary_model(name), random.Random(2)
    lengths = (9, 60, 61, 61, 64, 70, 70, 90, 9)
    prompts = [[draw.randrange(1, 250) for _ in range(n)] for n in lengths]
    expected = []
    for ids in prompts:
        new = copy.deepcopy(model).generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=8,
            min_new_tokens=8,
            eos_token_id=None,
        )
        expected.append(new[0, len(ids) :].tolist())
    assert greedy_tokens(model, prompts, [], 8, batch_size) == expected
    assert greedy_tokens(model, prompts, [], 8, batch_size) == expected  # nothing is remembered


def test_dynamic_factors_are_forgotten():
    model, ids = rotary_model("llama"), torch.tensor([list(range(1, 65))])
    first = model(input_ids=ids).logits
    model(input_ids=ids.repeat(1, 3))
    assert not torch.allclose(model(input_ids=ids).logits, first, atol=1e-3)  # transformers' own
    reset_rotaries(model)
    assert torch.equal(model(input_ids=ids).logits, first)


@pytest.mark.parametrize("name", ["layer_types", "layers_block_type"])  # today's, and older
@pytest.mark.parametrize("kind, recurrent", [("attention", False), ("recurrent", True)])
def test_layers_are_known_by_both_names(name, kind, recurrent):
    config = SimpleNamespace(**{name: ["attention", kind]})
    config.get_text_config = lambda: config
    assert has_recurrent_state(SimpleNamespace(config=config)) == recurrent


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_hybrids_answer_is_its_own(name):
    model, prompts = model_of(name), [prompt for prompt, _ in ENCODED] + [ENCODED[0][1]]
    assert needs_equal_prompts(model)
    expected = []
    for prompt in prompts:  # token by token, without a cache
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                out = model(input_ids=torch.tensor([ids]), use_cache=False)
            ids.append(int(out.logits[0, -1].argmax()))
        expected.append(ids[len(prompt) :])
    assert greedy_tokens(model, prompts, [], 6) == expected


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapted_models_settings_come_back(kind):
    model = adapted(kind)
    base = model.get_base_model()
    before = model.generation_config, base.generation_config
    assert len(greedy_tokens(model, [[5, 6]], [], 3)[0]) == 3
    assert (model.generation_config, base.generation_config) == before


def test_a_model_without_a_head_is_refused():
    with pytest.raises(SsahError, match="LlamaModel has no language-model head") as error:
        response_losses(tiny_model().model, pad_batch(ENCODED, [0]))
    one_line(error)


def test_two_threads_may_measure_one_model():
    "The report of one model judges with another, which a second thread may be using."
    model, tokenizer = tiny_model(), tiny_tokenizer()
    sets = [[{"prompt": "a" * n, "response": "bc" * n}] * 3 for n in (3, 40)]
    encoded = [encode_pairs(tokenizer, pairs) for pairs in sets]
    alone = [pair_losses(model, pairs) for pairs in encoded]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: pair_losses(model, encoded[i % 2]), range(80)))
    for i, losses in enumerate(found):
        assert np.allclose(losses, alone[i % 2], atol=1e-5)
