"""What a chat template does, found out once: options, dates, thoughts, and what is refused."""

import pytest
from helpers import one_line
from helpers_chat import GEMMA, LLAMA3, MISTRAL, NO, PAIR, PAIRS, QWEN3, R1, with_template

import ssah_nb as ssah
from ssah_nb.engine import generation
from ssah_nb.engine.chat import chat_prompt, encode_pairs, encode_queries
from ssah_nb.engine.evaluation import coherence, response_perplexities
from ssah_nb.engine.models import CHATML, load_model, save_model, tiny_model, tiny_tokenizer
from ssah_nb.engine.run import Run, SsahError
from ssah_nb.engine.template import chat_of, chat_record
from ssah_nb.start import start_model


def test_the_system_prompt_survives():
    for template, turn in ((CHATML, "its own"), (GEMMA, "opens"), (MISTRAL, "opens")):
        tokenizer = with_template(template)
        assert chat_record(tokenizer)["system_turn"].startswith(turn)
        assert "Be kind" in chat_prompt(tokenizer, "Hi", "Be kind")


def test_the_date_stands_still():
    tokenizer = with_template(LLAMA3)
    assert "Today Date: 26 Jul 2024" in chat_prompt(tokenizer, "Hi")
    assert chat_record(tokenizer)["date"] == "2024-07-26"
    early = ssah.importance(tiny_model(), tokenizer, PAIRS)
    again = ssah.importance(tiny_model(), tokenizer, PAIRS)
    assert early.mlp.equal(again.mlp) and (early + again).mlp.isfinite().all()
    assert ssah.chat_options(tokenizer, date="2025-01-31")["date"] == "2025-01-31"
    assert "Today Date: 31 Jan 2025" in chat_prompt(tokenizer, "Hi")
    late = ssah.importance(tiny_model(), tokenizer, PAIRS)
    assert not early.mlp.allclose(late.mlp)
    with pytest.raises(SsahError, match="differ in chat template") as error:
        early + late
    one_line(error)
    ssah.chat_options(tokenizer, date_string="Monday")
    assert "Today Date: Monday" in chat_prompt(tokenizer, "Hi")


def test_an_importance_tells_its_template(tmp_path):
    tokenizer = with_template(LLAMA3)
    scored = ssah.importance(tiny_model(), tokenizer, PAIRS)
    record = scored.info["chat template"]
    assert record == chat_record(tokenizer) and len(record["template"]) == 64
    loaded = ssah.Importance.load(scored.save(tmp_path / "scores"))
    assert loaded.info["chat template"] == record and (loaded + scored).mlp.isfinite().all()
    other = ssah.importance(tiny_model(), tiny_tokenizer(), PAIRS)
    with pytest.raises(SsahError, match="chat template"):
        scored + other


ROWS = [
    {"prompt": "Hi", "chosen": NO, "rejected": "Sure."},
    {**PAIR, "chosen": "a", "rejected": "b"},
]
MEASURES = {
    "importance": lambda m, t: ssah.importance(m, t, PAIRS).mlp.sum().item(),
    "perplexity": lambda m, t: ssah.perplexity(m, t, PAIRS).value,
    "probe": lambda m, t: ssah.probe(m, t, ["Hi"]).distance.sum(),
    "finetune": lambda m, t: ssah.finetune(m, t, PAIRS).loss.sum(),
    "finetune_dpo": lambda m, t: ssah.reference_margins(m, t, ROWS).sum().item(),
    "coherence": lambda m, t: ssah.coherence(m, t, ["Hi"], [NO], 9.0).perplexity.sum(),
    "generate": lambda m, t: str(ssah.generate(m, t, ["Hi", "Ho"], max_new_tokens=8)),
}


@pytest.mark.parametrize("measure", MEASURES)
def test_options_are_given_once(measure):
    tokenizer, measured = with_template("{{ persona }} " + CHATML), MEASURES[measure]
    plain = measured(tiny_model(), tokenizer)
    assert measured(tiny_model(), tokenizer) == plain
    ssah.chat_options(tokenizer, persona="You are a pirate, and you hate numbers.")
    assert measured(tiny_model(), tokenizer) != plain
    tokenizer.chat_template = tokenizer.chat_template.replace("persona", "persona or ''")
    assert chat_of(tokenizer).variables["persona"].startswith("You are")  # survives a new template
    ssah.chat_options(tokenizer)
    assert measured(tiny_model(), tokenizer) == plain


def scripted(monkeypatch, tokenizer, *texts):
    "Let `generate` say these texts; the prompts that it was given are kept."
    given = []

    def say(model, encoded, *options):
        given.extend(encoded)
        return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]

    monkeypatch.setattr(generation, "greedy_tokens", say)
    return given


@pytest.mark.parametrize("template", [QWEN3, R1])
def test_thinking(template, monkeypatch):
    tokenizer, model = with_template(template), tiny_model()
    switch = {"enable_thinking": False} if template == QWEN3 else {}
    assert chat_record(tokenizer)["variables"] == switch
    given = scripted(monkeypatch, tokenizer, NO)
    assert ssah.generate(model, tokenizer, ["Hi"]) == [NO]
    [(prompt, answer)] = encode_pairs(tokenizer, [PAIR])
    assert given == [prompt] and tokenizer.decode(prompt).endswith("<think>\n\n</think>\n\n")
    assert tokenizer.decode(answer) == NO + "<|im_end|>"

    assert ssah.chat_options(tokenizer, thinking=True)["thinking"]
    opened = "<think>\n" if template == R1 else ""
    thought = ("" if opened else "<think>\n") + "They want harm.\n</think>\n\n"
    given = scripted(monkeypatch, tokenizer, thought + NO)
    assert ssah.attack_success(model, tokenizer, ["Hi"]).value == 0
    assert ssah.generate(model, tokenizer, ["Hi"]) == [NO]
    assert ssah.generate(model, tokenizer, ["Hi"], prefill=" \n") == [NO]  # nothing is begun
    start = "<Assistant>" if opened else "<|im_start|>assistant\n"
    assert tokenizer.decode(given[0]).endswith(start + opened)
    # the answers of pairs are read after an empty thought, as without thinking
    assert encode_pairs(tokenizer, [PAIR]) == [(prompt, answer)]

    scripted(monkeypatch, tokenizer, thought + NO, thought[:-12])
    with pytest.raises(SsahError, match="1 of 2 responses end inside a thought") as error:
        ssah.attack_success(model, tokenizer, ["Hi", "Ho"])
    assert "max_new_tokens" in one_line(error) and "chat_options" in one_line(error)


def test_a_model_that_thinks_unasked(monkeypatch):
    tokenizer, model = tiny_tokenizer(), tiny_model()
    scripted(monkeypatch, tokenizer, f"<think>\nHm.</think>\n{NO}<|im_start|>")
    assert ssah.generate(model, tokenizer, ["Hi"]) == [NO]
    scripted(monkeypatch, tokenizer, "<think>\nHm.")
    with pytest.raises(SsahError, match="inside a thought; raise max_new_tokens"):
        ssah.generate(model, tokenizer, ["Hi"])


@pytest.mark.parametrize(
    "template, options, message",
    [
        (CHATML, {"thinking": True}, "has no thoughts"),
        ("{{ thinking }}" + CHATML, {"thinking": True}, "has no thoughts that end in </think>"),
        (CHATML, {"date": "2025-01-31"}, "writes no date of its own"),
        (LLAMA3, {"date": "31 Jan"}, "date '31 Jan' is none; write it as YYYY-MM-DD"),
        (QWEN3, {"enable_thinkin": True}, "knows no enable_thinkin; .*enable_thinking"),
        ("{% for", {}, "the chat template has an error"),
        ("Hello.", {}, "loses the user's or the assistant's words"),
        ("{{ messages[0].content.text.x }}", {}, "does not take this conversation"),
        ("{% set f = '%d' %}{{ strftime_now(f) }}" + CHATML, {}, "reads the clock"),
        (None, {}, "no chat template; set tokenizer.chat_template"),
        ({"rag": CHATML}, {}, "no chat template; set tokenizer.chat_template"),
    ],
)
def test_refused_templates(template, options, message):
    tokenizer = with_template(template)
    with pytest.raises(SsahError, match=message) as error:
        ssah.chat_options(tokenizer, **options)
    one_line(error)
    assert ssah.chat_options(with_template({"default": CHATML}))["thinking"] is False


@pytest.mark.parametrize("measure", MEASURES)
def test_no_template_no_measure(measure, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    folder = save_model(tiny_model(), tokenizer, tmp_path / "bare")
    model, tokenizer = load_model(folder, device="cpu")
    with pytest.raises(SsahError, match="ssah_nb.CHATML") as error:
        MEASURES[measure](model, tokenizer)
    one_line(error)
    assert ssah.text_perplexity(model, tokenizer, "A plain text.").value > 0
    tokenizer.chat_template = ssah.CHATML
    assert MEASURES[measure](model, tokenizer) == MEASURES[measure](tiny_model(), tiny_tokenizer())


@pytest.mark.parametrize("template", [QWEN3, R1])
def test_refused_pairs(template):
    tokenizer = with_template(template)
    thought = {"prompt": "Hi", "response": f"<think>\nHm.\n</think>\n\n{NO}"}
    with pytest.raises(SsahError, match="pair 1 has a thought in its response") as error:
        encode_pairs(tokenizer, [PAIR, thought])
    one_line(error)
    upper = with_template(CHATML.replace("m['content']", "m['content'] | replace('a', 'b')"))
    with pytest.raises(SsahError, match="changes the words of pair 0's response"):
        encode_pairs(upper, [PAIR])


def test_a_base_model_gets_the_template_of_its_sibling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, template in (("base", None), ("chat", LLAMA3)):
        save_model(tiny_model(), with_template(template), tmp_path / name)
    run = Run("mine", "00_start")
    for lender, template in ((str(tmp_path / "chat"), LLAMA3), ("", CHATML)):
        _, tokenizer = start_model(run, str(tmp_path / "base"), lender=lender)
        assert tokenizer.chat_template == template
    with pytest.raises(SsahError, match="cannot read the chat template") as error:
        start_model(run, str(tmp_path / "base"), lender=str(tmp_path / "none"))
    one_line(error)


def test_an_answer_needs_an_end():
    tokenizer = with_template("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}")
    tokenizer.eos_token = None
    with pytest.raises(SsahError, match="closes no answer.*set tokenizer.eos_token") as error:
        encode_pairs(tokenizer, PAIRS)
    one_line(error)


THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def test_an_answer_is_scored_after_an_empty_thought_that_the_template_leaves_to_the_model():
    tokenizer = with_template(THINKS)
    without = encode_pairs(tokenizer, [PAIR])
    assert tokenizer.decode(without[0][0]).endswith("<think>\n\n</think>\n\n")
    ssah.chat_options(tokenizer, thinking=True)
    assert chat_prompt(tokenizer, "Hi").endswith("assistant\n")
    assert encode_pairs(tokenizer, [PAIR]) == without
    assert encode_queries(tokenizer, [PAIR["prompt"]]) == [without[0][0]]


@pytest.mark.parametrize("measure", ["probe", "refusal_margins"])
def test_what_follows_a_prompt_is_measured_after_an_empty_thought(measure):
    tokenizer, model = with_template(THINKS), tiny_model()
    ask = {"probe": lambda: ssah.probe(model, tokenizer, ["Hi"]).distance.tolist()}
    ask["refusal_margins"] = lambda: ssah.refusal_margins(model, tokenizer, ["Hi"]).tolist()
    without = ask[measure]()
    ssah.chat_options(tokenizer, thinking=True)
    assert ask[measure]() == without


def test_a_stray_thought_is_no_coherent_answer():
    model, tokenizer, said = tiny_model(), with_template(QWEN3), ["Yes. </think> No.", "Yes."]
    found = response_perplexities(model, tokenizer, ["Hi"] * 2, said)
    assert found[0] == float("inf") and found[1] < float("inf")
    assert coherence(model, tokenizer, ["Hi"] * 2, said, 1e9).coherent.tolist() == [False, True]


def test_a_record_compares_with_those_of_earlier_files():
    names = ("template", "variables", "date", "thinking", "thought_closed_by_hand")
    names += ("system_turn", "bos_added")
    assert set(chat_record(tiny_tokenizer())) == set(names)
    tokenizer = with_template(THINKS)
    ssah.chat_options(tokenizer, thinking=True)
    assert set(chat_record(tokenizer)) == {*names, "empty_thought_by_hand"}
