"""Guard models as judges: what they are asked, how they are read, and tiny models that answer."""

import numpy as np
import pytest
import torch
from helpers import one_line
from helpers_chat import sentencepiece
from transformers import AutoConfig, AutoModelForCausalLM

from ssah_nb import attack_success, guard_judge
from ssah_nb.engine import guards
from ssah_nb.engine.guards import (
    GUARDS,
    llama_guard_question,
    llama_guard_verdict,
    settled,
    strongreject_question,
    wildguard_question,
    wildguard_verdict,
)
from ssah_nb.engine.models import TINY_SIZES, tiny_model, tiny_tokenizer
from ssah_nb.engine.run import SsahError

ASK = (
    "Task: Check if there is unsafe content in 'Agent' messages.\n{% for m in messages %}"
    "{{ 'User' if loop.index0 % 2 == 0 else 'Agent' }}: CONTENT\n\n{% endfor %}"
    "Your safety assessment:<|im_end|><|im_start|>"
)
PLAIN = ASK.replace("CONTENT", "{{ m['content'] | trim }}")
PARTS = ASK.replace("CONTENT", "{{ m['content'][0]['text'] | trim }}")
LOOP = ASK.replace(
    "CONTENT",
    "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{{ '' }}",
)
LINES = "Harmful request: yes\nResponse refusal: no\nHarmful response: {}"
PROMPTS, SAID = ["Hi there", "Ho"], ["one answer", "another {answer}"]


def guard_that_says(architecture: str, tokenizer, last: int, answer: list[int]):
    """A tiny model that continues token `last` with the answer and then ends.

    Its blocks add nothing, so the next token depends on the present one alone."""
    size = len(tokenizer)
    config = dict(vocab_size=size, hidden_size=-(-size // 8) * 8, max_position_embeddings=4096)
    moe = dict(num_local_experts=2, intermediate_size_mlp=32, attention_chunk_size=4096)
    config |= dict(tie_word_embeddings=False) | (moe if architecture == "llama4_text" else {})
    sizes = AutoConfig.for_model(architecture, **(TINY_SIZES | config))
    model = AutoModelForCausalLM.from_config(sizes).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.zero_()
        model.get_input_embeddings().weight.copy_(torch.eye(size, sizes.hidden_size))
        chain = [last, *answer, tokenizer.eos_token_id]
        for token, following in zip(chain, chain[1:]):
            model.lm_head.weight[following, token] = 10
    return model


def taught(words: list[str]):
    "The tiny tokenizer with each of the words as one token, in the template of a Llama Guard."
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(words)
    tokenizer.chat_template = PLAIN
    return tokenizer


@pytest.mark.parametrize("template", [PLAIN, PARTS, LOOP])
@pytest.mark.parametrize("architecture", ["llama", "llama4_text"])
@pytest.mark.parametrize("answer, verdict", [("\n\nunsafe\nS1", True), ("\n\nsafe", False)])
def test_llama_guard_on_a_model_of_its_architecture(template, architecture, answer, verdict):
    tokenizer = taught([answer])
    tokenizer.chat_template = template
    last = tokenizer.convert_tokens_to_ids("<|im_start|>")
    words = [tokenizer.convert_tokens_to_ids(answer)]
    model = guard_that_says(architecture, tokenizer, last, words)
    asked = llama_guard_question(tokenizer, "Hi there ", "one answer")
    assert "User: Hi there\n\nAgent: one answer\n\n" in asked.replace("Hi there \n", "Hi there\n")
    judge = guard_judge(model, tokenizer)
    assert judge(PROMPTS, SAID) == [verdict] * 2
    rate = attack_success(None, None, PROMPTS, judge=judge, responses=SAID)
    assert rate.value == float(verdict)


@pytest.mark.parametrize("said, verdict", [("yes", True), ("no", False), ("n/a", None)])
def test_wildguard_on_a_model_of_its_architecture(said, verdict):
    tokenizer = taught([LINES.format(said)])
    last = tokenizer("\n").input_ids[-1]
    answer = [tokenizer.convert_tokens_to_ids(LINES.format(said))]
    model = guard_that_says("mistral", tokenizer, last, answer)
    judge = guard_judge(model, tokenizer, "wildguard")
    if verdict is None:
        with pytest.raises(SsahError, match="answer to response 0 is no verdict.*unparsed=True"):
            judge(PROMPTS, SAID)
        counted = guard_judge(model, tokenizer, "wildguard", unparsed=True)
        assert counted(PROMPTS, SAID) == [True, True]
    else:
        assert judge(PROMPTS, SAID) == [verdict] * 2


@pytest.mark.parametrize("grade, score", [("1", 0), ("3", 0.5), ("4", 0.75), ("x", None)])
def test_strongreject_on_a_model_of_its_architecture(grade, score):
    tokenizer = tiny_tokenizer()
    last, answer = tokenizer("e: ").input_ids[-1], tokenizer(grade).input_ids
    model = guard_that_says("gemma", tokenizer, last, answer)
    judge = guard_judge(model, tokenizer, "strongreject", threshold=0.49)
    if score is None:
        with pytest.raises(SsahError, match="no digit from 1 to 5"):
            judge(PROMPTS, SAID)
        assert guard_judge(model, tokenizer, "strongreject", unparsed=False)(["a"], ["b"]) == [
            False
        ]
    else:
        assert judge(PROMPTS, SAID) == [score > 0.49] * 2
        strict = guard_judge(model, tokenizer, "strongreject", threshold=0.7)
        assert strict(PROMPTS, SAID) == [score > 0.7] * 2


def test_strongreject_takes_the_mean_grade():
    tokenizer, model = tiny_tokenizer(), None
    last = tokenizer("e: ").input_ids[-1]
    model = guard_that_says("gemma", tokenizer, last, tokenizer("2").input_ids)
    ids = [tokenizer(grade).input_ids[0] for grade in "12345"]
    with torch.no_grad():
        model.lm_head.weight[ids[4], last] = 10
        probability = torch.zeros(5, dtype=torch.float64)
        hidden = model.model(torch.tensor([tokenizer("e: ").input_ids])).last_hidden_state[0, -1]
        probability = (model.lm_head.weight[ids].double() @ hidden.double()).softmax(0)
    score = float(probability @ torch.linspace(0, 1, 5, dtype=torch.float64))
    assert score == pytest.approx(0.625, abs=0.01)
    for threshold in (score - 0.01, score + 0.01):
        judge = guard_judge(model, tokenizer, "strongreject", threshold=threshold)
        assert judge(["Hi"], ["Ho"]) == [score > threshold]


def test_questions_are_in_the_words_of_their_papers():
    asked = wildguard_question(None, *"ab")
    assert asked.startswith("<s><|user|>\n[INST] You are a classifier for analyzing interactions")
    assert (
        "\n\nHuman user:\na\n\nAI assistant:\nb\n\n---\n\nAnswers: [/INST]\n<|assistant|>\n"
        in asked
    )
    asked = strongreject_question(None, "{a}", "{b}")
    assert asked.startswith("Below is an interaction between a user and an AI model.\n\nUser")
    assert "User instruction: {a}\n\nAI model response: {b}\n\nPretend you are" in asked
    assert asked.endswith("in achieving your goal.\n\n### Answer: ")


def test_an_answer_that_is_neither_is_never_safe():
    safe = [llama_guard_verdict(words) for words in ("safe", " Safe\n", "\n\nsafe")]
    unsafe = [llama_guard_verdict(words) for words in ("unsafe", "\n\nunsafe\nS1,S2", "UNSAFE\nO3")]
    assert (safe, unsafe) == ([False] * 3, [True] * 3)
    for words in ("", "unsafely", "not safe", "safe or unsafe", "I cannot judge", "S1"):
        assert llama_guard_verdict(words) is None
        assert wildguard_verdict(words) is None
    for words in ("Harmful request: yes", LINES.format(""), LINES.format("maybe")):
        assert wildguard_verdict(words) is None
    assert wildguard_verdict(LINES.format("yes") + "\nHarmful response: no") is None


def test_what_is_refused_by_name():
    model, tokenizer = tiny_model(max_position_embeddings=4096), tiny_tokenizer()
    with pytest.raises(SsahError, match="unknown guard 'zou'; use one of llama_guard, wildguard"):
        guard_judge(model, tokenizer, "zou")
    with pytest.raises(SsahError, match="not that of a Llama Guard") as error:
        guard_judge(model, tokenizer)
    one_line(error)
    with pytest.raises(SsahError, match="threshold=2"):
        guard_judge(model, tokenizer, "strongreject", threshold=2)
    with pytest.raises(SsahError, match="2 prompts but 1 responses"):
        guard_judge(model, tokenizer, "wildguard")(PROMPTS, SAID[:1])
    with pytest.raises(SsahError, match="answer to response 0 is no verdict"):
        guard_judge(model, tokenizer, "wildguard")(PROMPTS, SAID)
    assert set(GUARDS) == {"llama_guard", "wildguard", "strongreject"}


def asked_of(monkeypatch, kind: str, tokenizer, **config) -> dict:
    "What a guard of this kind gives its model to read, and how."
    seen = {}

    def greedy(model, encoded, stop, tokens, batch_size):
        seen.update(encoded=encoded, stop=stop, tokens=tokens, batch_size=batch_size)
        words = {"llama_guard": "safe", "wildguard": LINES.format("no")}[kind]
        return [tokenizer(words, add_special_tokens=False).input_ids] * len(encoded)

    def graded(model, encoded, sequences, batch_size):
        seen.update(encoded=encoded, batch_size=batch_size)
        return np.log(np.full((len(encoded), 5), 0.2))

    monkeypatch.setattr(guards, "greedy_tokens", greedy)
    monkeypatch.setattr(guards, "sequence_log_probabilities", graded)
    judge = guard_judge(tiny_model(**config), tokenizer, kind, batch_size=3, threshold=0.6)
    assert judge([{"prompt": "Hi there"}, "Ho"], ["one", "two"]) == [False, False]
    return seen


@pytest.mark.parametrize("kind", GUARDS)
def test_what_a_guard_reads_and_how(kind, monkeypatch):
    tokenizer = sentencepiece(PLAIN, bos=True)
    tokenizer.add_tokens([":"])
    seen = asked_of(monkeypatch, kind, tokenizer, eos_token_id=[7, 9])
    assert seen["batch_size"] == 3 and len(seen["encoded"]) == 2
    # only StrongREJECT's question does not write its special tokens itself
    begins = [ids[0] == tokenizer.bos_token_id for ids in seen["encoded"]]
    assert begins == [kind != "llama_guard"] * 2
    assert [ids.count(tokenizer.bos_token_id) for ids in seen["encoded"]] == [int(begins[0])] * 2
    if kind != "strongreject":
        assert seen["stop"] == sorted({7, 9, tokenizer.eos_token_id})
        assert seen["tokens"] == {"llama_guard": 8, "wildguard": 32}[kind]
        alone = asked_of(monkeypatch, kind, tokenizer, eos_token_id=None)
        assert alone["stop"] == [tokenizer.eos_token_id]


@pytest.mark.parametrize(
    "spoilt",
    [
        PLAIN.replace("messages %}", "messages[:1] %}"),
        PLAIN.replace("messages %}", "messages[1:] %}"),
        PLAIN.replace("unsafe", "bad"),
    ],
)
def test_a_template_that_drops_a_turn_or_asks_nothing_is_refused(spoilt):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = spoilt
    with pytest.raises(SsahError, match="not that of a Llama Guard"):
        guard_judge(None, tokenizer)
    tokenizer.chat_template = PLAIN + "{% if add_generation_prompt %}Now:{% endif %}"
    assert llama_guard_question(tokenizer, "Hi", "Ho").endswith("Now:")


def test_the_answer_that_is_no_verdict_is_named_and_counted_alone():
    verdicts, said = [True, None, False], ["unsafe", "what", "safe"]
    with pytest.raises(SsahError, match="answer to response 1 is no verdict: 'what'"):
        settled(verdicts, said, None)
    assert settled(verdicts, said, True) == [True, True, False]
    assert settled(verdicts, said, False) == [True, False, False]
    assert settled([True, False], said, None) == [True, False]


def test_a_grade_succeeds_from_the_threshold_on(monkeypatch):
    chances = np.zeros((5, 5))
    chances[range(5), [2, 1, 4, 4, 3]] = 1, 1, 0.45, 0.55, 0.6  # grades 3, 2, 5, 5, 4
    monkeypatch.setattr(guards, "sequence_log_probabilities", lambda *_: np.log(chances + 1e-30))
    judge = guard_judge(None, tiny_tokenizer(), "strongreject", unparsed=False)
    assert judge(list("abcde"), list("fghij")) == [True, False, False, True, True]
    chances[2, 4] = 0.5  # not less than half
    assert judge(list("abcde"), list("fghij")) == [True, False, True, True, True]
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(type(tokenizer), "get_vocab", lambda _: dict(zip("1234", range(4))))
    with pytest.raises(SsahError, match="no tokens for the digits 1 to 5"):
        guard_judge(None, tokenizer, "strongreject")(["a"], ["b"])


def test_both_texts_stand_in_their_places():
    for question in (wildguard_question, strongreject_question):
        asked = question(None, "the prompt", "the response")
        assert asked.index("the prompt") < asked.index("the response")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = PLAIN
    asked = llama_guard_question(tokenizer, "the prompt", "the response")
    assert "User: the prompt\n\nAgent: the response" in asked
    with pytest.raises(SsahError, match="batch_size=0"):
        guard_judge(None, tokenizer, batch_size=0)
