"""The ways to keep a model safe under benign fine-tuning, side by side."""

import copy
import importlib.util

import pytest
import torch

from ssah_nb.attribution import importance
from ssah_nb.classes import classify
from ssah_nb.engine.models import tiny_model, tiny_tokenizer
from ssah_nb.engine.run import SsahError, side_by_side
from ssah_nb.freezing import WAYS, finetune_protected, frozen_rows_and_columns, frozen_units

PAIRS = [
    {"prompt": f"Say {word}", "response": word} for word in ("yes", "no", "maybe", "often")
] * 2


@pytest.fixture(scope="module")
def scored():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    safety = importance(
        model,
        tokenizer,
        [{"prompt": f"Open {i}", "response": f"Sorry, not box {i}"} for i in range(4)],
    )
    utility = importance(model, tokenizer, PAIRS)
    return tokenizer, classify(safety, utility, scu=0.05, ucu=0.1, ru=0.1), safety, utility


@pytest.mark.parametrize("way", WAYS)
def test_each_way_gives_an_ordinary_model(scored, way):
    if "lora" in way and not importlib.util.find_spec("peft"):
        pytest.skip("peft is not installed")
    tokenizer, units, safety, utility = scored
    before = tiny_model()
    unaligned = tiny_model(seed=1)
    training = dict(unaligned=unaligned, lr=1e-2, batch_size=2)
    model, done = finetune_protected(
        way, tiny_model(), tokenizer, PAIRS, units, safety, utility, **training
    )
    mask = frozen_units(way, units, safety, utility)
    assert list(model.state_dict()) == list(before.state_dict())
    assert done["epochs"] == 1
    assert done["reached"]
    assert done["frozen"] == len(mask)
    weights = zip(model.state_dict().values(), before.state_dict().values())
    assert any(not torch.equal(a, b) for a, b in weights)
    for name, (rows, dim) in frozen_rows_and_columns(before, mask).items():
        a, b = (m.get_submodule(name).weight.movedim(dim, 0)[rows] for m in (model, before))
        assert torch.equal(a, b), name


def test_ways_side_by_side_give_the_same_models_as_one_after_the_other(scored):
    base = tiny_model()
    ways = [
        "scu_all_cu",
        "random",
        "ema",
        *(["lora"] * 2 if importlib.util.find_spec("peft") else []),
    ]

    def work(way):
        model = copy.deepcopy(base)
        training = dict(lr=1e-2, batch_size=2)
        model, _ = finetune_protected(way, model, scored[0], PAIRS, *scored[1:], **training)
        return model.state_dict()

    together, threads = side_by_side(work, ways, torch.device("cpu")), torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))
    try:
        alone = [work(way) for way in ways]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(together, alone) for name in a)


def test_the_average_of_weights_is_as_exact_in_bfloat16(scored):
    def moved(dtype):  # an average that is kept in bfloat16 itself does not follow steps this small
        base = tiny_model().to(dtype)
        model, _ = finetune_protected(
            "ema", copy.deepcopy(base), scored[0], PAIRS * 8, *scored[1:], lr=1e-3, batch_size=2
        )
        return torch.cat(
            [
                (a.float() - b.float()).flatten()
                for a, b in zip(model.parameters(), base.parameters())
            ]
        )

    half, full = moved(torch.bfloat16), moved(torch.float32)
    assert (half - full).norm() < 0.2 * full.norm()


def test_optimizer_memory_is_what_is_trained(scored):
    megabytes = {
        way: finetune_protected(
            way, tiny_model(), scored[0], PAIRS, *scored[1:], lr=1e-2, batch_size=2
        )[1]["optimizer_mb"]
        for way in ("full", "scu_all_cu", "low_lr")
    }
    assert megabytes["full"] == megabytes["low_lr"] > 1.5 * megabytes["scu_all_cu"]


def test_training_goes_on_until_the_loss_is_reached_or_says_that_it_never_was(scored):
    def train(target, **options):
        options |= dict(target=target, lr=1e-2, batch_size=2)
        return finetune_protected(
            "scu_all_cu", tiny_model(), scored[0], PAIRS, *scored[1:], **options
        )

    (once, one), (_, never) = train(None), train(1.0)
    assert never["epochs"] == 2
    assert never["reached"] is False
    assert never["training_perplexity"] < one["training_perplexity"]
    after = [train(1.0, max_epochs=1 + i / 8)[1]["training_perplexity"] for i in range(4)]
    assert after[0] == one["training_perplexity"] and sorted(after, reverse=True) == after
    for share in (0.1, 0.9):  # of the two models around the target, the nearer one
        _, done = train(after[1] ** (1 - share) * after[2] ** share)
        assert done["reached"]
        assert done["training_perplexity"] == after[1 if share < 0.5 else 2]
        assert done["epochs"] == (1.125 if share < 0.5 else 1.25)
    model, done = train(0.9999 * one["training_perplexity"])
    assert done["reached"]
    assert done["epochs"] == 1
    weights = zip(model.state_dict().values(), once.state_dict().values())
    assert all(torch.equal(a, b) for a, b in weights)


def test_controls_have_our_size(scored):
    _, units, safety, utility = scored
    masks = {way: frozen_units(way, units, safety, utility) for way in WAYS}
    ours = masks["scu_all_cu"]
    assert masks["random"].mlp.sum() == ours.mlp.sum() and masks["random"] != ours
    assert torch.equal(masks["random_per_layer"].mlp.sum(1), ours.mlp.sum(1))
    sizes = [units.share(mask)["unit_parameters"] for mask in (masks["sn_tune_our_size"], ours)]
    assert abs(sizes[0] - sizes[1]) < 0.12  # a head of the tiny model is 4 %
    assert masks["safety_layers"].mlp.all(1).sum() == masks["safety_layers"].mlp.any(1).sum() == 1


def test_errors_name_what_is_wrong(scored):
    with pytest.raises(SsahError, match="unknown way 'frozen'; use one of full, scu_top_cu"):
        finetune_protected("frozen", tiny_model(), scored[0], PAIRS, *scored[1:])
    with pytest.raises(SsahError, match="safe_lora needs the model before alignment"):
        finetune_protected("safe_lora", tiny_model(), scored[0], PAIRS, *scored[1:])
