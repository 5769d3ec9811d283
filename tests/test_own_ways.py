"""A way of one's own: what it may change, and what is refused before anything is trained."""

from dataclasses import FrozenInstanceError

import pytest
import torch
from helpers import one_line
from helpers_ways import run_way, same_weights

from ssah_nb import WAYS, anchoring
from ssah_nb.engine.models import tiny_model
from ssah_nb.engine.run import SsahError
from ssah_nb.freezing import frozen_rows_and_columns


def test_a_way_of_ones_own_runs_by_name(scored, own_way):
    own_way(
        freezes=lambda case: case.units.scu,
        trains=lambda case, model: {"lr_factor": 0.5, "extra": case.needed_refusals()[:3]},
    )
    assert str(WAYS["mine"]) == "a way of one's own (nobody)"
    model, done = run_way(scored, "mine")
    assert done["frozen"] == len(scored[1].scu) > 0
    for name, (rows, dim) in frozen_rows_and_columns(model, scored[1].scu).items():
        a, b = (m.get_submodule(name).weight.movedim(dim, 0)[rows] for m in (model, tiny_model()))
        assert torch.equal(a, b), name
    wanted, _ = run_way(scored, "full", lr=0.5e-2)
    assert not same_weights(model, wanted)  # frozen units and three more pairs


def test_each_change_does_what_it_says(scored, own_way):
    own_way(trains=lambda case, model: {"lr_factor": 0.5})
    assert same_weights(run_way(scored, "mine")[0], run_way(scored, "full", lr=0.5e-2)[0])
    own_way(trains=lambda case, model: {"ema": 0.95})
    assert same_weights(run_way(scored, "mine")[0], run_way(scored, "ema")[0])
    own_way(trains=lambda case, model: {"token_losses": lambda losses, pairs: 0 * losses})
    assert same_weights(run_way(scored, "mine")[0], tiny_model())
    seen = []
    look = lambda model, masters: seen.append(all(m.grad is not None for m in masters.values()))
    back = lambda model, masters: [m.zero_() for m in masters.values()]
    own_way(trains=lambda case, model: {"before_step": look, "correct_step": torch.no_grad()(back)})
    model, _ = run_way(scored, "mine")
    assert seen == [True] * 4 and not any(p.any() for p in model.parameters())
    own_way(trains=lambda case, model: {"finish": zero})
    model, done = run_way(scored, "mine", target=9.0)
    assert (
        done["training_perplexity"] == pytest.approx(model.config.vocab_size)
        and not done["reached"]
    )


@torch.no_grad()
def zero(model):
    for p in model.parameters():
        p.zero_()


def test_correcting_a_step_in_bfloat16_reaches_the_weights(scored, own_way):
    back = torch.no_grad()(lambda model, masters: [m.fill_(0.5) for m in masters.values()])
    own_way(trains=lambda case, model: {"correct_step": back})
    model, _ = run_way(scored, "mine", tiny_model().to(torch.bfloat16))
    assert all(p.dtype == torch.bfloat16 and (p == 0.5).all() for p in model.parameters())


def test_what_is_wrong_with_a_way_is_said(scored, own_way):
    own_way(trains=lambda case, model: {"speed": 2})
    with pytest.raises(SsahError) as error:
        run_way(scored, "mine")
    assert "mine changes speed; use keys of CHANGES: lr_factor" in one_line(error)
    own_way(freezes=lambda case: [3])
    with pytest.raises(SsahError, match="freezes of mine gave a list; return a UnitMask"):
        run_way(scored, "mine")
    WAYS["mine"] = "text"
    with pytest.raises(SsahError, match="is a str; make it a Way"):
        run_way(scored, "mine")
    with pytest.raises(FrozenInstanceError):
        WAYS["full"].what = "nothing"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"finish": 3}, "int 3 as finish; give a function"),
        ({"lr_factor": "half"}, "str 'half' as lr_factor; give a number"),
        ({"extra": 3}, "int 3 as extra; give pairs"),
        ({"before_step": 3}, "int 3 as before_step; give a function"),
        ({"adapter": [8]}, "list [8] as adapter; give a dict of options"),
        ({"anchor": anchoring.Anchor}, "as anchor; give an object with loss(model)"),
        (None, "trains of mine gave a NoneType; return a dict"),
    ],
)
def test_wrong_values_of_a_way_are_named_before_training(scored, own_way, change, said):
    own_way(trains=lambda case, model: change)
    model = tiny_model()
    with pytest.raises(SsahError) as error:
        run_way(scored, "mine", model)
    assert said in one_line(error) and same_weights(model, tiny_model())


def test_what_a_way_cannot_be(scored, own_way):
    own_way(freezes=scored[1].scu)
    with pytest.raises(SsahError, match="freezes of mine is a UnitMask; make it a function"):
        run_way(scored, "mine")
    own_way(trains=lambda case, model: {"finish": lambda model: tiny_model()})
    with pytest.raises(SsahError, match="finish of mine returned another LlamaForCausalLM; let it"):
        run_way(scored, "mine")


def test_what_changes_nothing_may_be_none(scored, own_way):
    nothing = dict.fromkeys(("anchor", "adapter", "extra", "token_losses", "before_step"))
    own_way(trains=lambda case, model: nothing | {"finish": lambda model: model})
    model, _ = run_way(scored, "mine")
    assert same_weights(model, run_way(scored, "full")[0])


@pytest.mark.parametrize("way", ["lora", "safe_lora"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_an_adapter_that_was_trained_is_not_thrown_away(scored, way, wrapped):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = tiny_model()
    model = peft.get_peft_model(model, config) if wrapped else (model.add_adapter(config), model)[1]
    ids = torch.arange(9)[None]
    wanted = model(input_ids=ids).logits
    with pytest.raises(SsahError, match="carries an adapter already") as error:
        run_way(scored, way, model, unaligned=tiny_model(seed=1))
    one_line(error)
    assert torch.equal(model(input_ids=ids).logits, wanted)
