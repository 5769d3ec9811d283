"""Classes against a slow, obvious reference."""

import copy

import pytest
import torch
from helpers_calibration import TOKENIZER
from helpers_units import as_set, made_up, pairs, same_bits, use

from ssah_nb.attribution import Importance, importance
from ssah_nb.classes import classify, pruned
from ssah_nb.engine.models import tiny_model
from ssah_nb.engine.run import SsahError
from ssah_nb.units import CLASSES, UnitMask


def slow_scores(scored: Importance) -> dict:
    "{(kind, layer, unit): mean z-score of its channels}."
    found = {}
    for layer in range(2):
        for kind, width in (("mlp", 1), ("attention", 8)):
            x = scored.channels[kind][layer].double()
            values = ((x - x.mean()) / x.std()).tolist()
            for u in range(len(values) // width):
                found[kind, layer, u] = sum(values[u * width : (u + 1) * width]) / width
    return found


def slow_classes(safety: Importance | None, utility: Importance, scu, ucu, ru, ratio_of) -> dict:
    "{(kind, layer, unit): class}, unit by unit."

    size = {"mlp": 96, "attention": 768} if ratio_of != "units" else {"mlp": 1, "attention": 1}
    u = slow_scores(utility)
    s = slow_scores(safety) if safety else {k: 0 for k in u}
    whole = 20_000 if ratio_of == "model" else sum(size[k[0]] for k in u)

    def best(score, ratio):
        chosen, room = [], ratio * whole
        for unit in sorted(u, key=score):
            room -= size[unit[0]]
            if room < -1e-6:
                break
            chosen.append(unit)
        return chosen

    classes = dict.fromkeys(u, "CU" if safety else "UU")
    classes |= dict.fromkeys(best(lambda k: s[k] + u[k], ru), "RU")
    if safety:
        classes |= dict.fromkeys(best(lambda k: s[k] - u[k], ucu), "UCU")
        classes |= dict.fromkeys(best(lambda k: u[k] - s[k], scu), "SCU")
    return classes


@pytest.mark.parametrize("ratio_of", ["parameters", "units", "model"])
@pytest.mark.parametrize(
    "ratios", [(0.01, 0.1, 0.1), (0.05, 0.2, 0.3), (0.0, 0.0, 0.0), (0.15, 0.1, 0.2)]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_classify_is_the_slow_reference(ratio_of, ratios, seed):
    safety, utility = made_up(seed), made_up(seed + 10)
    for s in (safety, None):
        units = classify(s, utility, *ratios, ratio_of=ratio_of)
        expected = slow_classes(s, utility, *ratios, ratio_of)
        got = {(r.kind, r.layer, r.unit): r["class"] for _, r in units.to_pandas().iterrows()}
        assert got == expected
        for name in CLASSES:
            assert as_set(units.units(name)) == {k for k, c in expected.items() if c == name}
        assert units.shares().units.sum() == 72 and abs(units.shares().share_units.sum() - 1) < 1e-9
    units = classify(safety, utility, *ratios, ratio_of=ratio_of)
    assert as_set(units.scu) == as_set(units.units("SCU"))


def test_scu_and_ucu_take_precedence_over_ru():
    safety, utility = made_up(0), made_up(1)
    # channels 0 and 1 of layer 0: smallest sum, largest and smallest difference
    safety.channels["mlp"][0, :2] = torch.tensor([-1.0, -30.0])
    utility.channels["mlp"][0, :2] = torch.tensor([-30.0, -1.0])
    units = classify(safety, utility, scu=1 / 72, ucu=1 / 72, ru=10 / 72, ratio_of="units")
    assert as_set(units.scu) == {("mlp", 0, 0)} and as_set(units.ucu) == {("mlp", 0, 1)}
    assert len(units.ru) == 8
    only_ru = classify(safety, utility, scu=0, ucu=0, ru=10 / 72, ratio_of="units").ru
    assert len(only_ru) == 10
    assert as_set(units.ru) == as_set(only_ru) - as_set(units.scu | units.ucu)


def test_the_default_ratios_give_the_shares_that_the_paper_prints():
    llama2 = {"parameters": {"mlp": 3 * 4096, "attention": 4 * 128 * 4096}, "total": 6_738_415_616}
    safety, utility = (made_up(seed, 32, 11008, 32, 128, **llama2) for seed in (0, 1))
    units = classify(safety, utility)
    share = units.shares().set_index("class").share_units
    assert 0.013 <= share["SCU"] <= 0.015 and 0.13 <= share["UCU"] <= 0.15
    # random scores: a sixth of the RU are SCU or UCU, too, and stay that
    alone = classify(safety, utility, scu=0, ucu=0)
    assert 0.13 <= alone.share(alone.ru)["units"] <= 0.15
    assert 0.12 <= share["RU"] < alone.share(alone.ru)["units"]
    parameters = units.share(units.scu)
    assert parameters["unit_parameters"] == pytest.approx(0.01, rel=0.05)
    assert parameters["parameters"] < parameters["unit_parameters"]
    by_model = classify(safety, utility, ratio_of="model")
    assert by_model.share(by_model.scu)["parameters"] == pytest.approx(0.01, rel=0.05)
    by_units = classify(safety, utility, ratio_of="units")
    assert len(by_units.scu) == int(0.01 * 32 * (11008 + 32))
    assert len(by_units.ucu) == int(0.1 * 32 * (11008 + 32))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(scu=-0.01), "scu=-0.01 is not between 0 and 1"),
        (dict(ru=1.5), "ru=1.5 is not between"),
        (dict(ucu=float("nan")), "ucu=nan"),
        (dict(scu=0.5, ucu=0.3, ru=0.3), "overlap: together they are more than 1"),
        (dict(ratio_of="heads"), "unknown ratio_of 'heads'; use one of parameters"),
        (
            dict(ru=0.9, scu=0, ucu=0, ratio_of="model"),
            "ratio 0.9 of the model is more than all units together",
        ),
        (dict(scu=0.3, ucu=0.3, ru=0, ratio_of="model"), "the ratios scu=0.3 and ucu=0.3 overlap"),
    ],
)
def test_bad_ratios(options, message):
    info = {"total": 24_000}  # the units hold 12 288 of them
    with pytest.raises(SsahError, match=message) as error:
        classify(made_up(0, **info), made_up(1, **info), **options)
    assert "\n" not in str(error.value)
    just_fits = dict(scu=0.5, ucu=0.3, ru=0.2, ratio_of="units")
    assert len(classify(made_up(0), made_up(1), **just_fits).cu) < 72


def test_the_square_of_attention_is_ranked():
    safety, utility = made_up(0), made_up(1)
    for square in (True, False):
        units = classify(safety, utility, square_attention=square)
        s, u = (scores.standardized(square) for scores in (safety, utility))
        assert torch.equal(units.order.attention, s.attention - u.attention)
        assert torch.equal(units.order.mlp, s.mlp - u.mlp)
    assert not torch.equal(
        safety.standardized(True).attention, safety.standardized(False).attention
    )


def test_importances_of_two_models_do_not_mix():
    base = importance(tiny_model(), TOKENIZER, pairs("No"))
    # the first has the same shape and the same signature
    for other in (tiny_model(seed=1), tiny_model("mistral"), tiny_model(num_key_value_heads=4)):
        with pytest.raises(SsahError, match="score both sets on one model"):
            classify(base, importance(other, TOKENIZER, pairs("Yes")))
    classify(base, importance(tiny_model(), TOKENIZER, pairs("Yes")))


@pytest.mark.parametrize("what", ["pruned", "prune", "freeze"])
def test_units_of_another_model_are_refused(what):
    sets = {"safety": pairs("No"), "utility": pairs("Yes")}
    units = classify(**importance(tiny_model(), TOKENIZER, sets), scu=0.1, ucu=0.1, ru=0.1)
    same_shape = tiny_model("mistral")
    for model, mask, message in (
        (same_shape, units.scu, "another model .model_type llama instead of mistral"),
        (same_shape, units.top_cu(0.1) | ~units.ru, "another model"),
        (same_shape, units.scu.random_like(), "another model"),
        (tiny_model(intermediate_size=48), units.scu, "channels 32 instead of 48"),
        (tiny_model(num_key_value_heads=4), units.scu, "group 2 instead of 1"),
        (
            tiny_model(),
            UnitMask(units.scu.mlp[:, 1:], units.scu.attention),
            r"mask has mlp units of shape \(2, 31\), the model \(2, 32\)",
        ),
        (
            tiny_model(),
            UnitMask(units.scu.mlp, units.scu.attention[:1]),
            "mask has attention units of shape",
        ),
        (tiny_model(), units, "UnitMap.* units.scu"),
        (tiny_model(), units.scu.mlp, "UnitMask.* units.scu"),
    ):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(SsahError, match=message) as error:
            use(what, model, mask)
        assert "\n" not in str(error.value) and same_bits(before, model.state_dict())
    # fine-tuned weights of the same architecture: the same units
    use(what, tiny_model(seed=1), units.scu)
    with (
        pytest.raises(SsahError, match="another model"),
        pruned(tiny_model(), units.scu, compensate=importance(same_shape, TOKENIZER, pairs("No"))),
    ):
        pass
