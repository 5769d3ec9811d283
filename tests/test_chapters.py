"""What chapters 0, 8 and 9 bring: system prompts, budgets of units, the report in words."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import one_line

from ssah_nb.attribution import importance
from ssah_nb.budget import align_units, alignment_tax, budget_masks, scu_masks
from ssah_nb.engine.claims import report_tables, rows_by_name
from ssah_nb.engine.evaluation import SYSTEM_PROMPTS
from ssah_nb.engine.models import tiny_model, tiny_tokenizer
from ssah_nb.engine.run import SsahError
from ssah_nb.report import in_short, judge, printed_numbers
from ssah_nb.start import baseline, first_words, system_text

ROOT = Path(__file__).parent.parent
BENIGN = [{"prompt": f"Question {i}", "response": f"Answer {i}"} for i in range(4)]
HARMFUL = [{"prompt": f"Open box {i}", "response": "Sorry."} for i in range(4)]


@pytest.fixture(scope="module")
def scores():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    return importance(model, tokenizer, HARMFUL), importance(model, tokenizer, BENIGN)


def test_budgets_have_controls_of_their_size(scores):
    safety, utility = scores
    masks = budget_masks(utility, [0.05, 0.1], seed=3) | scu_masks(safety, utility, 0.05, seed=3)
    names = ["RU, 5%", "random, 5%", "RU, 10%", "random, 10%", "SCU, 5%", "random, SCU-sized"]
    assert list(masks) == names
    for chosen, control in zip(names[::2], names[1::2]):
        assert masks[chosen].mlp.sum() == masks[control].mlp.sum() > 0
        assert masks[chosen].attention.sum() == masks[control].attention.sum()
        assert masks[chosen] != masks[control]
    assert not len(masks["RU, 5%"] - masks["RU, 10%"])


def shift(model: torch.nn.Module) -> None:
    "Training, in short: all that may change does."
    with torch.no_grad():
        for p in model.parameters():
            p += 0.5 * p.requires_grad


def test_only_the_units_of_a_budget_are_trained(scores):
    model, (mask, *_) = tiny_model(), budget_masks(scores[1], [0.1]).values()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    student, share = align_units(model, mask, shift)
    assert 0.05 < share < 0.15
    changed = sum((w != before[n]).sum().item() for n, w in student.state_dict().items())
    whole = sum(p.numel() for p in model.parameters())
    assert changed / whole == pytest.approx(share)
    assert all(w.equal(before[n]) for n, w in model.state_dict().items())
    assert align_units(model, None, shift)[1] == 1.0


def test_the_tax_is_against_the_first_row():
    assert alignment_tax(pd.Series([4.0, 5.0, 3.0])).tolist() == [0.0, 0.25, -0.25]


def test_the_baseline_has_a_row_for_each_system_prompt(tmp_path):
    names = ("none", "short")
    table = baseline(tiny_model(), tiny_tokenizer(), HARMFUL, BENIGN, names, tmp_path)
    assert table.system_prompt.tolist() == list(names)
    assert table.attack_success.between(0, 1).all() and (table.attack_success_n == 4).all()
    kept = json.loads((tmp_path / "00_system_prompt_short.json").read_text())
    assert [prompt for prompt, _ in kept["harmful"]] == [pair["prompt"] for pair in HARMFUL]


def test_a_system_prompt_has_a_known_name():
    assert system_text("none") is None and system_text("short") == SYSTEM_PROMPTS["short"]
    with pytest.raises(SsahError, match="'shrot'; use one of none, llama2, short") as error:
        system_text("shrot")
    one_line(error)


def test_a_harmful_text_is_shown_by_its_first_words():
    assert first_words("Open the red box now") == "Open the red box …"
    assert first_words("Open it") == "Open it"
    assert len(first_words("打" * 100)) < 60


def test_the_report_reads_as_words_beside_the_papers_numbers():
    report = judge(rows_by_name(report_tables(ROOT / "figures/embedded")), "B")
    shown = in_short(report)
    assert list(shown) == ["this run", "claimed", "verdict", "paper"] and len(shown) == len(report)
    assert shown["this run"].str.contains(r"\d").all()
    assert printed_numbers("1 | dense | utility_mean | accuracy | Llama-2-7B-Chat") == [58.3]
    (share,) = printed_numbers("fig11 | global | SCU->CU | share_of_class |")
    assert 50 < share < 100
    assert printed_numbers("") == []
