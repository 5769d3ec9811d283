"""Broken numbers, packed weights and weights that are not there are refused by name."""

import copy

import accelerate
import pytest
import torch
from helpers import one_line
from helpers_freezing import half, lora
from helpers_units import TOKENIZER
from torch import nn

from ssah_nb.attribution import importance
from ssah_nb.classes import prune, pruned
from ssah_nb.engine.adapters import project_updates
from ssah_nb.engine.evaluation import attack_success, coherence, perplexity, text_perplexity
from ssah_nb.engine.generation import generate, greedy_tokens
from ssah_nb.engine.models import tiny_model
from ssah_nb.engine.moments import sums_of_columns, weight_of
from ssah_nb.engine.preferences import finetune_dpo, reference_margins
from ssah_nb.engine.run import SsahError
from ssah_nb.engine.states import FiniteLogits
from ssah_nb.engine.training import finetune
from ssah_nb.freezing import freeze
from ssah_nb.probe import probe

PAIRS = [{"prompt": f"Say {i} to me", "response": f"{i} it is"} for i in range(6)]
PROMPTS = [pair["prompt"] for pair in PAIRS]
ROWS = [{"prompt": prompt, "chosen": "No.", "rejected": "Yes."} for prompt in PROMPTS]


def refusal(call) -> str:
    with pytest.raises(SsahError) as error:
        call()
    return one_line(error)


def large(dtype: torch.dtype):
    "Its activations exceed 65504, the largest number of float16."
    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data *= 5e4
    return model.to(dtype)


MEASURES = {
    "generate": lambda m: generate(m, TOKENIZER, PROMPTS, max_new_tokens=3),
    "attack_success": lambda m: attack_success(m, TOKENIZER, PROMPTS, max_new_tokens=3),
    "perplexity": lambda m: perplexity(m, TOKENIZER, PAIRS),
    "text_perplexity": lambda m: text_perplexity(m, TOKENIZER, "hello world " * 9),
    "coherence": lambda m: coherence(m, TOKENIZER, PROMPTS, ["Yes"] * 6, 9.0),
    "margins": lambda m: reference_margins(m, TOKENIZER, ROWS),
    "importance": lambda m: importance(m, TOKENIZER, PAIRS),
    "gradient": lambda m: importance(m, TOKENIZER, PAIRS, method="gradient"),
    "probe": lambda m: probe(m, TOKENIZER, PROMPTS, steps=(2,)),
}
TRAININGS = {
    "finetune": lambda m: finetune(m, TOKENIZER, PAIRS),
    "finetune_dpo": lambda m: finetune_dpo(m, TOKENIZER, ROWS),
}


@pytest.mark.parametrize("name", MEASURES | TRAININGS)
def test_a_model_that_overflows_is_refused_and_is_fine_in_bfloat16(name):
    call = (MEASURES | TRAININGS)[name]
    model = large(torch.float16)
    before = copy.deepcopy(model).state_dict()
    message = refusal(lambda: call(model))
    assert "nan" in message.lower()
    assert "float16" in message or name == "finetune"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    call(large(torch.bfloat16))


def test_the_row_that_is_broken_is_named():
    "One token's embedding is NaN: only the prompts that hold it are broken."
    model = tiny_model(tie_word_embeddings=False)
    (token,) = TOKENIZER("~", add_special_tokens=False).input_ids
    model.get_input_embeddings().weight.data[token] = torch.nan
    prompts = [*PROMPTS[:4], "what ~ is", PROMPTS[5]]
    pairs = [pair | {"prompt": prompt} for pair, prompt in zip(PAIRS, prompts)]
    rows = [row | {"prompt": prompt} for row, prompt in zip(ROWS, prompts)]
    generate(model, TOKENIZER, PROMPTS, 3)
    assert "prompt 4 is NaN" in refusal(lambda: generate(model, TOKENIZER, prompts, 3))
    assert "loss of row 4 is NaN" in refusal(lambda: perplexity(model, TOKENIZER, pairs))
    assert "margin of row 4 is NaN" in refusal(lambda: reference_margins(model, TOKENIZER, rows))
    assert "query 4's state after block 1" in refusal(
        lambda: probe(model, TOKENIZER, prompts, steps=(2,))
    )
    said = ["", "a", "b", "c", "d~", "e"]
    assert "loss of row 4" in refusal(lambda: coherence(model, TOKENIZER, PROMPTS, said, 9.0))


def test_the_layer_that_is_broken_is_named():
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[3] = torch.inf
    message = refusal(lambda: importance(model, TOKENIZER, PAIRS))
    assert message.startswith("importance of mlp units in layer 1 is NaN or infinite")


def test_forbidden_tokens_are_legal_and_what_follows_an_end_is_not_looked_at():
    inf, nan = torch.inf, torch.nan
    ids = [torch.ones(3, n, dtype=torch.int64) for n in (4, 5, 6)]
    ids[1][1, -1] = ids[2][1, -2] = 9  # row 1 ends with its first new token
    watch = FiniteLogits([9, 8], prompt=4)
    steps = [
        torch.tensor([[-inf, 1.0], [0.0, 1.0], [2.0, -inf]]),
        torch.tensor([[-inf, 1.0], [nan, nan], [2.0, -inf]]),
        torch.tensor([[3.0, 1.0], [inf, 1.0], [2.0, -inf]]),
    ]
    for row, scores in zip(ids, steps):
        assert watch(row, scores) is scores
    watch.check(tiny_model(), [5, 6, 7])
    for bad in ([nan, 1.0], [inf, 1.0], [-inf, -inf]):
        watch = FiniteLogits([], prompt=4)
        watch(ids[0], torch.tensor([[0.0, 1.0], [0.0, 1.0], bad]))
        assert "prompt 7" in refusal(lambda: watch.check(tiny_model(), [5, 6, 7]))


def test_a_gradient_that_overflows_makes_no_step():
    model = tiny_model()
    before = copy.deepcopy(model).state_dict()
    model.lm_head.register_full_backward_hook(lambda m, g_in, g_out: (g_in[0] * torch.inf,))
    message = refusal(lambda: finetune(model, TOKENIZER, PAIRS))
    assert "gradient is NaN or infinite" in message
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Float8Linear(nn.Linear):
    "As transformers and compressed-tensors keep it: a number of 8 bits, and scales."

    def __init__(self, linear: nn.Linear, scale: str):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        largest = linear.weight.detach().abs().amax(1, keepdim=True) / 448
        small = (linear.weight.detach() / largest).to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(small, requires_grad=False)
        self.register_buffer(scale, largest)


def plain_class(linear, scale):
    "compressed-tensors keeps the class `nn.Linear` itself."
    packed = Float8Linear(linear, scale)
    packed.__class__ = nn.Linear
    return packed


class Blocks(nn.Module):
    "As GPTQ, AWQ and HQQ keep it: no `weight` at all."

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", torch.zeros(4, linear.out_features, dtype=torch.int32))


class FourBit(nn.Linear):
    "As bitsandbytes keeps it: bytes in one column."

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        packed = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)


def scaled(linear):
    "Half precision in memory, and yet a scale that the forward pass multiplies by."
    linear.to(torch.float16).weight_scale = nn.Parameter(torch.full((32, 1), 1e-3))
    return linear


class Unpacks(torch.Tensor):
    "As torchao keeps it: a tensor that says it is float32."


def disguised(linear):
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Unpacks), requires_grad=False)
    return linear


PACKED = {
    "Float8Linear with a weight in torch.float8_e4m3fn beside weight_scale_inv": lambda linear: (
        Float8Linear(linear, "weight_scale_inv")
    ),
    "Linear with a weight in torch.float8_e4m3fn beside weight_scale": lambda linear: plain_class(
        linear, "weight_scale"
    ),
    "Blocks with no weight beside qweight": Blocks,
    "FourBit with a weight in torch.uint8": FourBit,
    "Linear with a weight in torch.float16 beside weight_scale": scaled,
    "Linear with a weight in torch.float32 of class Unpacks": disguised,
}


@pytest.mark.parametrize("found", PACKED)
@pytest.mark.parametrize("kind", ["mlp.down_proj", "self_attn.o_proj"])
def test_packed_weights_are_refused_wherever_a_weight_is_read(found, kind):
    model, name, mask = tiny_model(), f"model.layers.1.{kind}", half()
    parent, child = name.rsplit(".", 1)
    replaced = PACKED[found](copy.deepcopy(model.get_submodule(name)))
    replaced.forward = model.get_submodule(name).forward  # it runs as the real ones do
    setattr(model.get_submodule(parent), child, replaced)
    calls = {
        "score": lambda: importance(model, TOKENIZER, PAIRS),
        "magnitude": lambda: importance(model, TOKENIZER, PAIRS, method="magnitude"),
        "freeze": lambda: freeze(model, mask),
        "prune": lambda: prune(model, mask),
        "pruned": lambda: pruned(model, mask).__enter__(),
        "sums": lambda: sums_of_columns(model, name, torch.Tensor.square_),
        "project": lambda: project_updates(model, tiny_model(), tiny_model(seed=1), [name]),
    }
    for what, call in calls.items():
        message = refusal(call)
        assert f"{name} is a {found}" in message, (what, message)
        assert "load the model unquantized" in message, what


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_plain_weights_of_each_precision_are_read(dtype):
    linear = nn.Linear(6, 5).to(dtype)
    assert torch.equal(weight_of(linear), linear.weight)


@torch.no_grad()
def test_what_a_frozen_or_adapted_model_shows_is_read():
    model, name = freeze(tiny_model(), half()), "model.layers.0.mlp.down_proj"
    sums = sums_of_columns(model, name, torch.Tensor.square_)
    expected = tiny_model().get_submodule(name).weight.double().square().sum(0)
    torch.testing.assert_close(sums, expected)
    adapted = lora(tiny_model(), init_lora_weights=False)
    module = adapted.base_model.model.get_submodule(name)
    pair = module.lora_B["default"].weight @ module.lora_A["default"].weight
    torch.testing.assert_close(
        weight_of(module), module.base_layer.weight + module.scaling["default"] * pair
    )


def test_an_adapter_that_is_no_plain_lora_is_refused():
    model = lora(tiny_model(), use_dora=True)
    message = refusal(lambda: importance(model, TOKENIZER, PAIRS))
    assert "carries an adapter that is no plain LoRA; merge it first" in message
    importance(model.merge_and_unload(), TOKENIZER, PAIRS)


@pytest.mark.parametrize("name", MEASURES | TRAININGS)
def test_a_model_without_numbers_is_refused(name):
    model = tiny_model().to("meta")
    message = refusal(lambda: (MEASURES | TRAININGS)[name](model))
    assert "21 weights are on the meta device, e.g. model.embed_tokens.weight" in message


def offloaded(*parts: str, folder):
    names = ["embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb"]
    places = {f"model.{name}": "disk" if name in parts else "cpu" for name in names}
    return accelerate.dispatch_model(
        tiny_model(tie_word_embeddings=False),
        places | {"lm_head": "cpu"},
        main_device="cpu",
        offload_dir=str(folder),
        force_hooks=True,
    )


def test_an_offloaded_model_is_measured_and_not_trained(tmp_path):
    model = offloaded("layers.1", folder=tmp_path)
    for name, call in TRAININGS.items():
        assert "offloaded, e.g. model.layers.1" in refusal(lambda: call(model)), name
    assert "is offloaded" in refusal(lambda: freeze(model, half()))
    whole = tiny_model(tie_word_embeddings=False)
    assert generate(model, TOKENIZER, PROMPTS) == generate(whole, TOKENIZER, PROMPTS)
    assert perplexity(model, TOKENIZER, PAIRS) == perplexity(whole, TOKENIZER, PAIRS)


@pytest.mark.parametrize("name", MEASURES)
def test_an_offloaded_embedding_is_refused(name, tmp_path):
    model = offloaded("embed_tokens", folder=tmp_path)
    assert "the embedding is offloaded" in refusal(lambda: MEASURES[name](model))


def test_the_check_of_logits_changes_no_answer():
    model, ids = tiny_model(), [[1, 2, 3], [4, 5]]
    expected = [
        model.generate(
            torch.tensor([row]), max_new_tokens=6, do_sample=False, logits_processor=None
        )[0, len(row) :].tolist()
        for row in ids
    ]
    assert greedy_tokens(model, ids, [], 6) == expected
