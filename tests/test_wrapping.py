"""A way to protect wraps the model while it is trained, and leaves an ordinary one."""

import pytest
from helpers import one_line
from helpers_ways import PAIRS, run_way, same_weights, scored_units

from ssah_nb.engine.models import tiny_model
from ssah_nb.engine.parts import split_linears
from ssah_nb.engine.run import SsahError
from ssah_nb.freezing import finetune_protected, freeze, frozen_units


@pytest.fixture(scope="module")
def scored():
    return scored_units()


def can_train(model) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


def ordinary(way, scored, model):
    "Whether a model is as good as a fresh one, whose embeddings are not trained."
    fresh = tiny_model()
    fresh.model.embed_tokens.requires_grad_(False)
    assert can_train(model) == can_train(fresh)
    training = dict(unaligned=tiny_model(seed=1))
    models = [run_way(scored, way, m, **training)[0] for m in (model, fresh)]
    assert can_train(models[0]) == can_train(models[1]) == can_train(model)
    return same_weights(*models)


WRAPPING = ["full", "scu_all_cu", "lora", "safe_lora"]


@pytest.mark.parametrize("way", WRAPPING)
def test_what_could_be_trained_can_be_trained_afterwards(scored, way):
    if "lora" in way:
        pytest.importorskip("peft")
    model = tiny_model()
    model.model.embed_tokens.requires_grad_(False)
    before = can_train(model)
    assert {True, False} == set(before.values())
    tuned, _ = run_way(scored, way, model, unaligned=tiny_model(seed=1))
    assert tuned is model and can_train(model) == before


def interrupt(losses, pairs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("way", WRAPPING)
@pytest.mark.parametrize(
    "wrong, error",
    [
        ({"token_losses": interrupt}, KeyboardInterrupt),
        ({"token_losses": lambda losses, pairs: losses * float("nan")}, SsahError),
        ({"target": "low"}, SsahError),
        ({"no_such_option": 1}, TypeError),
    ],
)
def test_a_training_that_fails_leaves_an_ordinary_model(scored, way, wrong, error):
    if "lora" in way:
        pytest.importorskip("peft")
    model = tiny_model()
    model.model.embed_tokens.requires_grad_(False)
    with pytest.raises(error):
        run_way(scored, way, model, unaligned=tiny_model(seed=1), **wrong)
    assert list(model.state_dict()) == list(tiny_model().state_dict())
    assert same_weights(model, tiny_model())
    assert ordinary(way, scored, model)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "mlp"]},
        {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 0}},
        {"rank": 4},
    ],
    ids=["module", "rank", "option"],
)
def test_an_adapter_that_fails_in_the_middle_leaves_an_ordinary_model(scored, options):
    pytest.importorskip("peft")
    model = tiny_model()
    names, trained = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(SsahError, match="PEFT cannot put this adapter on the model"):
        run_way(scored, "lora", model, lora=options)
    assert list(model.state_dict()) == names and not hasattr(model, "peft_config")
    assert [p.requires_grad for p in model.parameters()] == trained
    again, _ = run_way(scored, "lora", model)
    assert same_weights(again, run_way(scored, "lora")[0])


def test_a_model_that_was_frozen_before_stays_frozen(scored):
    model, mask = tiny_model(), scored[1].scu
    names = list(freeze(model, mask).state_dict())
    parts = [name for name, _ in model.named_parameters()]
    with pytest.raises(SsahError, match="frozen already; merge"):
        run_way(scored, "scu_all_cu", model)
    assert [name for name, _ in model.named_parameters()] == parts
    run_way(scored, "full", model)
    assert list(model.state_dict()) == names and split_linears(model)


@pytest.mark.parametrize(
    "option, instead", [({"epochs": 3}, "use max_epochs"), ({"after_step": print}, "use ema")]
)
def test_options_of_another_name_are_refused_before_training(scored, option, instead):
    model = tiny_model()
    with pytest.raises(SsahError) as error:
        run_way(scored, "scu_all_cu", model, **option)
    message = one_line(error)
    assert next(iter(option)) in message and instead in message
    assert same_weights(model, tiny_model())


def test_a_mask_in_the_place_of_the_map_is_refused(scored):
    tokenizer, units, safety, utility = scored
    for wrong in (units.scu, None):
        with pytest.raises(SsahError, match="has no classes of units; pass the UnitMap"):
            finetune_protected("full", tiny_model(), tokenizer, PAIRS, wrong, safety, utility)
        with pytest.raises(SsahError, match="has no classes of units; pass the UnitMap"):
            frozen_units("scu_all_cu", wrong, safety, utility)
