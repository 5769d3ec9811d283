"""Fixed, seeded, disjoint splits."""

import hashlib
import json

import pytest
from datasets import Dataset
from helpers import one_line, write

from ssah_nb.engine.data import toy_benign, toy_harmful
from ssah_nb.engine.run import SsahError
from ssah_nb.engine.splits import TOY_SIZES, Splits, make_splits, normalised


def prompts(splits: Splits) -> list[str]:
    return [pair["prompt"] for pairs in splits.pairs.values() for pair in pairs]


def test_toy_splits_are_disjoint_and_the_same_everywhere():
    splits = make_splits(toy_harmful(), toy_benign(), sizes=TOY_SIZES)
    assert len(set(map(normalised, prompts(splits)))) == len(prompts(splits)) == 160
    digest = hashlib.sha256("\n".join(prompts(splits)).encode()).hexdigest()
    assert digest == "c19283d173af793016e170b651e4cf1ca1191d246e9a1137064812202b5ff866"
    benign = Dataset.from_list(toy_benign())
    assert prompts(make_splits(toy_harmful()[::-1], benign, sizes=TOY_SIZES)) == prompts(splits)
    another = make_splits(toy_harmful(), toy_benign(), sizes=TOY_SIZES, seed=1)
    assert prompts(another) != prompts(splits)


def test_prompts_lent_to_alignment_leave_the_attribution_split_only():
    without, lent = (
        make_splits(toy_harmful(), sizes=TOY_SIZES | {"align_from_harmful": n, "harmful_align": n})
        for n in (0, 10)
    )
    assert without["harmful", "evaluate"] == lent["harmful", "evaluate"]
    assert without["harmful", "attribute"][10:] == lent["harmful", "attribute"]
    assert without["harmful", "attribute"][:10] == lent["harmful", "align"]
    assert ("harmful", "align") not in without.pairs


def test_second_harmful_set_may_be_shared_with_alignment():
    second = [{"prompt": f"Paint door {n}", "response": ""} for n in range(10)]
    further = [{"prompt": f"Lift stone {n}", "response": ""} for n in range(10)]
    splits = make_splits(
        toy_harmful(),
        align_harmful=further,
        second_harmful=second,
        sizes=TOY_SIZES | {"align_from_harmful": 2, "align_from_second": 5, "harmful_align": 12},
    )
    begins = [pair["prompt"].split()[0] for pair in splits["harmful", "align"]]
    assert len(splits["harmful", "evaluate_second"]) == 5
    assert begins.count("Paint") == 5
    assert begins.count("Lift") == 5
    assert len(begins) == 12


@pytest.mark.parametrize(
    "role, rows, split, left",
    [("align_harmful", 20, "align", 20), ("second_harmful", 0, "evaluate_second", 40)],
)
def test_further_harmful_pairs_are_never_dropped(role, rows, split, left):
    further = {role: toy_harmful()}
    with pytest.raises(SsahError, match="only 0 are left; give more rows") as error:
        make_splits(benign=toy_benign(), sizes=TOY_SIZES, **further)
    one_line(error)
    none = dict.fromkeys(("align_from_harmful", "harmful_attribute", "harmful_evaluate"), 0)
    splits = make_splits(sizes=none | {"harmful_align": rows}, **further)
    assert len(splits["harmful", split]) == left


def test_overlap_names_the_rows():
    stolen = make_splits(toy_harmful(), sizes=TOY_SIZES)["harmful", "evaluate"][3]["prompt"]
    further = [{"prompt": f"  {stolen.upper()} ", "response": ""}]
    with pytest.raises(SsahError) as error:
        make_splits(toy_harmful(), align_harmful=further, sizes=TOY_SIZES | {"harmful_align": 13})
    message = one_line(error)
    assert "harmful/align row 12" in message
    assert "harmful/evaluate row 3" in message
    assert stolen.casefold() in message.casefold()


def test_responses_to_one_prompt_stay_in_one_split():
    benign = [
        {"prompt": f"Question {n}", "response": f"Answer {k}"} for n in range(10) for k in range(3)
    ]
    sizes = {"benign_align": 12, "benign_attribute": 2, "benign_attack": 2, "benign_evaluate": 2}
    splits = make_splits(benign=benign, sizes=sizes)
    table = splits.to_pandas().set_index("split")
    assert table.loc["align", "pairs"] == 12
    assert table.loc["align", "prompts"] == 4
    assert table.loc["attack", "prompts"] == 2


def test_refusals_and_long_prompts_leave_the_benign_data():
    benign = toy_benign() + [
        {"prompt": "a", "response": "As an AI, no."},
        {"prompt": "b " * 81, "response": "fine"},
    ]
    assert prompts(make_splits(benign=benign, sizes=TOY_SIZES)) == prompts(
        make_splits(benign=toy_benign(), sizes=TOY_SIZES)
    )


@pytest.mark.parametrize(
    "sizes, words",
    [
        ({"harmful_test": 1}, "harmful_evaluate"),
        ({"harmful_evaluate": -1}, "-1"),
        ({"harmful_evaluate": 0.5}, "0.5"),
        ({}, "only 40 are left; give more rows, or lower harmful_evaluate or harmful_attribute"),
        (TOY_SIZES | {"harmful_align": 13}, "harmful_align wants 1 rows, only 0 are left"),
    ],
)
def test_bad_sizes(sizes, words):
    with pytest.raises(SsahError, match=words) as error:
        make_splits(toy_harmful(), sizes=sizes)
    one_line(error)


def test_splits_survive_a_file_and_are_checked_when_read(tmp_path):
    splits = make_splits(toy_harmful(), toy_benign(), sizes=TOY_SIZES)
    splits.save(tmp_path / "splits.json")
    assert Splits.load(tmp_path / "splits.json") == splits
    assert ("harmful", "align") in splits and ("harmful", "attack") not in splits
    assert set(splits) == set(splits.pairs) and len(splits) == len(splits.pairs)
    with pytest.raises(SsahError, match="unknown split"):
        splits["harmful", "attack"]
    spoilt = json.loads((tmp_path / "splits.json").read_text())
    spoilt[0]["pairs"].append(spoilt[1]["pairs"][0])
    write(tmp_path / "splits.json", json.dumps(spoilt))
    with pytest.raises(SsahError, match="overlap"):
        Splits.load(tmp_path / "splits.json")
