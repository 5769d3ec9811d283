"""A frozen model's state dict behaves as any other: each entry is fresh, and writing is kept."""

import copy
import io

import pytest
import torch
from helpers_freezing import LONG, adamw, arguments, half, lora, refused, same, snapshot, train
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ssah_nb.engine.models import ARCHITECTURES, tiny_model, tiny_tokenizer
from ssah_nb.freezing import freeze, merge

WRITES = {
    "in place": lambda t: t.add_(1),
    "operator": lambda t: t.__imul__(2),
    "one number": lambda t: t.__setitem__((0,) * t.dim(), 7.0),
    "a view": lambda t: t.view(-1)[2:5].fill_(3.0),
    "a transposed view": lambda t: t.t()[0].neg_(),
    "data": lambda t: t.data.mul_(0.5),
    "detached": lambda t: t.detach().lerp_(torch.ones_like(t), 0.3),
    "copy": lambda t: t.copy_(torch.arange(t.numel()).view(t.shape)),
    "foreach": lambda t: torch._foreach_lerp_([t], [torch.ones_like(t)], 0.3),
    "out": lambda t: torch.mul(t, 3, out=t),
    "init": lambda t: torch.nn.init.constant_(t, 0.125),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_every_entry_keeps_what_is_written(architecture):
    plain, frozen = tiny_model(architecture), freeze(tiny_model(architecture), half())
    for name in plain.state_dict():
        for way, write in WRITES.items():
            write(plain.state_dict()[name])
            write(frozen.state_dict()[name])
            assert torch.equal(frozen.state_dict()[name], plain.state_dict()[name]), (name, way)
    plain.load_state_dict(tiny_model(architecture, seed=1).state_dict())
    for name, value in frozen.state_dict().items():
        value.copy_(plain.state_dict()[name])
    torch.testing.assert_close(frozen(LONG).logits, plain(LONG).logits, atol=1e-4, rtol=1e-4)
    assert same(snapshot(merge(frozen)), snapshot(plain))


def test_an_adapter_keeps_what_is_written():
    model = freeze(lora(tiny_model()), half())
    for name, value in model.state_dict().items():
        value.fill_(0.5)
        assert (model.state_dict()[name] == 0.5).all(), name


def test_the_weight_of_a_split_linear_is_live():
    model, new = freeze(tiny_model(), half()), torch.randn(32, 32)
    split = model.model.layers[0].mlp.up_proj
    split.weight.data = new
    split.weight.data.mul_(2)
    refused(lambda: setattr(split.state_dict()["weight"], "data", new), "use .copy_", model)
    assert torch.equal(merge(model).model.layers[0].mlp.up_proj.weight.data, 2 * new)


def test_a_state_from_before_training_shows_the_model_afterwards():
    model, name = freeze(tiny_model().train(), half()), "model.layers.0.mlp.up_proj.weight"
    state, before = model.state_dict(), snapshot(model)
    train(model, adamw(model))
    after = dict(merge(copy.deepcopy(model)).named_parameters())
    assert all(torch.equal(state[n], p) for n, p in after.items()) and not same(state, before)
    assert state[name].numpy().tolist() == state[name].tolist() == after[name].tolist()


def test_copies_are_plain_and_stay(tmp_path):
    model = freeze(tiny_model(), half())
    before, state = snapshot(model), model.state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "a")
    torch.save(state, file := io.BytesIO())
    file.seek(0)
    copies = [
        copy.deepcopy(state),
        {name: value.clone() for name, value in state.items()},
        {name: value.double().float() for name, value in state.items()},
        load_file(tmp_path / "a"),
        torch.load(file, weights_only=True),
    ]
    for value in state.values():
        value.zero_()
    for kept in copies:
        assert all(type(value) is torch.Tensor for value in kept.values())
        assert same({name: kept[name] for name in before}, before)


def test_arrays_of_numpy_refuse_to_be_written():
    model = freeze(tiny_model(), half())
    name = next(name for name in model.state_dict() if "down_proj" in name)
    with pytest.raises(ValueError, match="read-only"):
        model.state_dict()[name].numpy()[0] = 1


def test_a_state_from_before_merge_refuses_to_be_written():
    model = freeze(tiny_model(), half())
    name = next(name for name in model.state_dict() if "down_proj" in name)
    entry, before = model.state_dict()[name], snapshot(model)[name]
    merge(model)
    refused(lambda: entry.zero_(), "merged by now.*take it anew", model)
    assert torch.equal(entry, before)


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("decay", [None, 0.9])
def test_averaged_model_of_torch(buffers, decay):
    model = freeze(tiny_model("qwen2").train(), half())
    options = {"multi_avg_fn": get_ema_multi_avg_fn(decay)} if decay else {}
    averaged, wanted = AveragedModel(model, use_buffers=buffers, **options), None
    optimizer = adamw(model)
    for step in range(3):
        train(model, optimizer, 1)
        averaged.update_parameters(model)
        new, share = snapshot(model), 1 - decay if decay else 1 / (step + 1)
        wanted = {n: wanted[n] + share * (new[n] - wanted[n]) for n in new} if wanted else new
    plain = tiny_model("qwen2")
    plain.load_state_dict(wanted)
    with torch.no_grad():
        expected = plain(LONG).logits
        torch.testing.assert_close(averaged.module(LONG).logits, expected, atol=1e-4, rtol=1e-4)
    for name, value in merge(averaged.module).state_dict().items():
        torch.testing.assert_close(value, wanted[name], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_an_average_that_is_written_into_another_models_state():
    "As several training scripts keep it: the states of two models, entry by entry."
    model, kept = freeze(tiny_model(seed=1), half()), freeze(tiny_model(), half())
    wanted = {n: v + 0.1 * (model.state_dict()[n] - v) for n, v in snapshot(kept).items()}
    for mean, new in zip(kept.state_dict().values(), model.state_dict().values()):
        mean.lerp_(new, 0.1)
    for name, value in merge(kept).state_dict().items():
        torch.testing.assert_close(value, wanted[name])


LATE = {
    "all-linear": lambda model, peft: lora(model),
    "names": lambda model, peft: lora(model, target_modules=["q_proj", "down_proj"]),
    "a copy": lambda model, peft: lora(copy.deepcopy(model)),
    "transformers": lambda model, peft: model.add_adapter(
        peft.LoraConfig(target_modules="all-linear")
    ),
    "another method": lambda model, peft: peft.get_peft_model(
        model, peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    ),
}


@pytest.mark.parametrize("way", LATE)
def test_an_adapter_on_a_frozen_model_is_refused(way, tmp_path):
    peft = pytest.importorskip("peft")
    model = freeze(tiny_model(), half())
    refused(lambda: LATE[way](model, peft), "frozen already.*put the adapter on, and freeze", model)
    train(model.train(), adamw(model), 1)  # the refusal has left nothing behind
    model.save_pretrained(tmp_path)
    assert same(snapshot(type(model).from_pretrained(tmp_path)), snapshot(merge(model)))
    LATE[way](model, peft)  # merged: all is well again


@pytest.mark.parametrize("first, second", [(["down_proj"], ["q_proj"]), (["q_proj"], ["q_proj"])])
def test_a_further_adapter_on_a_frozen_one_is_refused(first, second):
    peft = pytest.importorskip("peft")
    model = freeze(lora(tiny_model(), target_modules=first), half())
    config = peft.LoraConfig(r=4, target_modules=second)
    refused(lambda: model.add_adapter("more", config), "frozen already", model)
    again = lora(model.merge_and_unload())
    assert any("lora_A" in name for name, _ in again.named_parameters())


def test_a_trainer_that_would_put_the_adapter_on_is_refused(tmp_path):
    trl, datasets, peft = map(pytest.importorskip, ("trl", "datasets", "peft"))
    model = freeze(tiny_model(), half())
    rows = [{"prompt": "Say", "completion": " it"}] * 4
    trainer = lambda: trl.SFTTrainer(
        model,
        args=trl.SFTConfig(**arguments(tmp_path, max_length=64)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        peft_config=peft.LoraConfig(target_modules="all-linear"),
    )
    refused(trainer, "frozen already", model)
