"""What holds for any text: prompts in splits, containers of rows, tokens of a conversation."""

import unicodedata

import pandas as pd
import pyarrow as pa
from datasets import Dataset
from helpers import one_line
from helpers_chat import FAMILIES, with_template
from helpers_properties import fewer
from hypothesis import example, given
from hypothesis import strategies as st

from ssah_nb.engine.chat import chat_prompt, encode_pairs, encode_prompts, end_of_turn
from ssah_nb.engine.evaluation import repetition
from ssah_nb.engine.inputs import as_pairs, as_prompts, normalised
from ssah_nb.engine.judges import JUDGES, judged
from ssah_nb.engine.margin import begins_with, longest_stems, prefix_free
from ssah_nb.engine.run import SsahError
from ssah_nb.engine.splits import SIZES, Splits, make_splits

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
WORDS = "Öffne die Straße don’t ﬁle naïve ΣΟΦΟΣ 2² e\u0301t wait… x?y 5″ don´t".split()
BASES = st.lists(st.sampled_from(WORDS), min_size=1, max_size=3).map(" ".join)
INVISIBLE = ["\u200b", "\u200d", "\ufeff", "\u00ad"]
SAME = {  # ways to write one prompt again
    "NFC": lambda t: unicodedata.normalize("NFC", t),
    "NFD": lambda t: unicodedata.normalize("NFD", t),
    "NFKC": lambda t: unicodedata.normalize("NFKC", t),
    "NFKD": lambda t: unicodedata.normalize("NFKD", t),
    "upper": str.upper,
    "lower": str.lower,
    "folded": str.casefold,
    "stop": lambda t: t + ".",
    "question": lambda t: t + " ?!",
    "blanks": lambda t: f"\t {t.replace(' ', '  ')}\n",
    "no-break": lambda t: t.replace(" ", "\u00a0"),
    "quotes": lambda t: t.translate({ord(c): "'" for c in "’´`"}).replace('"', "“"),
    "wide": lambda t: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in t),
} | {f"invisible {i}": lambda t, c=c: c.join(t) for i, c in enumerate(INVISIBLE)}
AGAIN = st.lists(st.sampled_from(sorted(SAME)), max_size=4)


def again(text: str, ways: list[str]) -> str:
    "The text, written again in these ways, one after the other."
    for way in ways:
        text = SAME[way](text)
    return text


@given(BASES, AGAIN)
@example("naïve", ["NFD", "invisible 0"])  # a mark that is not seen before an accent
@example("5″", ["NFKC"])
@example("don´t", ["quotes"])
def test_a_prompt_written_again_is_the_same_prompt(text, ways):
    assert normalised(again(text, ways)) == normalised(text)


@given(TEXTS)
def test_a_normal_form_is_normal(text):
    form = normalised(text)
    assert normalised(form) == form
    assert normalised(text.upper()) == normalised(text.lower().upper())
    assert not form or form == form.strip()


@st.composite
def sources(draw):
    "Rows of each source of splits, in which some prompts are written several times."
    rows = st.lists(
        st.tuples(st.integers(0, 30), AGAIN, st.sampled_from("ab")), min_size=5, max_size=12
    )
    names = ("harmful", "benign", "align_harmful", "second_harmful")
    made = {}
    for offset, name in enumerate(names):
        shared = draw(st.sampled_from([0, 0, 1]))  # 1: prompts of the first source, too
        first = 0 if shared else 100 * offset
        made[name] = [
            {"prompt": again(f"Naïve ﬁles, {first + n} Straße", ways), "response": answer}
            for n, ways, answer in draw(rows)
        ]
    return made


def number(pair: dict) -> int:
    "Which prompt it is, in whatever way it is written."
    plain = unicodedata.normalize("NFKC", pair["prompt"])
    return int("".join(c for c in plain if c.isdigit()))


@given(sources(), st.integers(0, 5), st.data())
def test_splits_never_share_a_prompt(rows, seed, data):
    sizes = {name: data.draw(st.integers(0, 2), name) for name in SIZES}
    try:
        splits = make_splits(**rows, seed=seed, sizes=sizes)
    except SsahError as error:
        assert "overlap" in one_line(error_of(error)) or "are left" in str(error)
        return
    seen = [{number(pair) for pair in pairs} for pairs in splits.pairs.values()]
    assert sum(map(len, seen)) == len(set().union(*seen))
    for (kind, split), pairs in splits.pairs.items():
        if split != "evaluate_second":
            assert len(pairs) == sizes[f"{kind}_{split}"] or split in ("align", "attribute")
    assert make_splits(**{k: v[::-1] for k, v in rows.items()}, seed=seed, sizes=sizes) == splits
    assert Splits(splits.pairs) == splits


class error_of:
    "What `one_line` takes."

    def __init__(self, value):
        self.value = value


FORMS = {
    "generator": iter,
    "columns": lambda rows: {k: [row[k] for row in rows] for k in rows[0]},
    "DataFrame": pd.DataFrame,
    "Arrow": pa.Table.from_pylist,
    "Dataset": Dataset.from_list,
    "messages": lambda rows: [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["response"]},
            ]
        }
        for row in rows
    ],
}
PAIRS = st.lists(
    st.fixed_dictionaries({"prompt": TEXTS, "response": TEXTS}), min_size=1, max_size=4
)


@fewer(2)
@given(PAIRS)
def test_pairs_are_the_same_in_any_container(pairs):
    def read(rows):
        try:
            return as_pairs(rows)
        except SsahError as error:
            return one_line(error_of(error))

    wanted = read(pairs)
    assert wanted == pairs or "empty" in wanted
    for name, form in FORMS.items():
        assert read(form(pairs)) == wanted, name
    if wanted == pairs:
        assert as_prompts(pairs) == [pair["prompt"] for pair in pairs]


@given(st.sampled_from(sorted(FAMILIES)), PAIRS, st.none() | TEXTS)
@example("bare", [{"prompt": "0", "response": "0\r"}], None)
def test_a_response_keeps_its_words(family, pairs, system):
    tokenizer = with_template(FAMILIES[family][0])
    try:
        encoded = encode_pairs(tokenizer, pairs, system)
    except SsahError as error:
        one_line(error_of(error))
        return
    prompts = encode_prompts(tokenizer, [pair["prompt"] for pair in pairs], system)
    for pair, (before, said), prompt in zip(pairs, encoded, prompts):
        assert before == prompt
        assert tokenizer.decode(before) == chat_prompt(tokenizer, pair["prompt"], system)
        answer, end = tokenizer.decode(said), end_of_turn(tokenizer)
        assert answer.endswith(end) and answer.removesuffix(end).strip() == pair["response"].strip()


@given(TEXTS, st.integers(1, 4))
def test_repetition_is_a_share(text, n):
    assert 0 <= repetition(text, n) <= 1
    assert repetition(" ".join(["again"] * 20), n) > 0.8


@given(st.lists(TEXTS, min_size=1, max_size=3), st.none() | st.integers(1, 200))
def test_every_judge_gives_a_verdict_on_anything(responses, window):
    for judge in JUDGES:
        verdicts = judged(judge, ["?"] * len(responses), responses, window)
        assert [type(verdict) for verdict in verdicts] == [bool] * len(responses)
        alone = [judged(judge, ["?"], [response], window)[0] for response in responses]
        assert verdicts == alone


TOKENS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple), min_size=1)


@given(TOKENS)
def test_openings_are_prefix_free_and_cover_all(openings):
    kept = prefix_free(openings)
    assert not any(a != b and begins_with(a, b) for a in kept for b in kept)
    assert len(set(kept)) == len(kept) and set(kept) <= set(openings)
    assert all(any(begins_with(opening, k) for k in kept) for opening in openings)
    heads = longest_stems(kept)
    assert all(any(begins_with(head, tokens[:-1]) for head in heads) for tokens in kept)
    assert not any(a != b and begins_with(a, b) for a in heads for b in heads)
