"""What a model sees: prompts and answers as its chat template writes them, token by token."""

import re
from glob import glob
from pathlib import Path

import pytest
from helpers import one_line
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram
from transformers import PreTrainedTokenizerFast

import ssah_nb as ssah
from ssah_nb.engine import generation
from ssah_nb.engine.chat import chat_prompt, encode_pairs, encode_prompts, end_of_turn
from ssah_nb.engine.models import CHATML, load_model, save_model, tiny_model, tiny_tokenizer
from ssah_nb.engine.run import SsahError
from ssah_nb.engine.template import chat_of, chat_record

NO = "Sorry, I can't."
PAIR = {"prompt": "Hi", "response": NO}
PAIRS = [PAIR, {"prompt": "Count", "response": "1 2 3 4 5"}]

GEMMA = (
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
LLAMA3 = (
    "{% if date_string is not defined %}{% if strftime_now is defined %}"
    '{% set date_string = strftime_now("%d %b %Y") %}{% else %}'
    "{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}"
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\n"
    "Today Date: {{ date_string }}\n\n{{ system }}<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MARKED = (  # with the marks by which transformers finds an assistant's tokens
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3 = (
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{%- set content = m.content %}"
    "{%- set thought = '' %}{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\\n<think>\\n' + thought + '\\n</think>\\n\\n' + content }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content }}{%- endif %}"
    "{{- '<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)
R1 = (  # opens a thought, and has no switch
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}<User>{{ m['content'] }}{% else %}"
    "<Assistant>{{ m['content'].split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<Assistant><think>\n{% endif %}"
)
MISTRAL = (  # has no place for a system turn
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
MISTRAL3 = (  # puts the system prompt into the last turn, if that is the user's
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] "
    "{% if loop.last and system is defined %}{{ system }}\n\n{% endif %}{{ m['content'] }}[/INST]"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
CHANNELS = (  # names a channel before an answer, but not in the generation prompt
    "{% for m in messages %}<|start|>{{ m['role'] }}"
    "{% if m['role'] == 'assistant' %}<|channel|>final{% endif %}<|message|>{{ m['content'] }}"
    "{{ '<|return|>' if m['role'] == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
BARE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"

CHATML_HI = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
LLAMA3_HI = (
    HEADER.format("system") + "Today Date: 26 Jul 2024\n\nBe kind<|eot_id|>"
    f"{HEADER.format('user')}Hi<|eot_id|>{HEADER.format('assistant')}"
)
FAMILIES = {  # template, system prompt, what the model sees, what it is to say
    "chatml": (CHATML, None, CHATML_HI, NO + "<|im_end|>"),
    "chatml, system": (
        CHATML,
        "Be kind",
        "<|im_start|>system\nBe kind<|im_end|>\n" + CHATML_HI,
        NO + "<|im_end|>",
    ),
    "marked": (MARKED, None, CHATML_HI, NO + "<|im_end|>"),
    "gemma": (
        GEMMA,
        "Be kind",
        "<start_of_turn>user\nBe kind\n\nHi<end_of_turn>\n<start_of_turn>model\n",
        NO + "<end_of_turn>",
    ),
    "phi": (PHI, None, "<|user|>\nHi<|end|>\n<|assistant|>\n", NO + "<|end|>"),
    "llama3": (LLAMA3, "Be kind", LLAMA3_HI, NO + "<|eot_id|>"),
    "qwen3": (QWEN3, None, CHATML_HI + "<think>\n\n</think>\n\n", NO + "<|im_end|>"),
    "r1": (R1, "Be kind", "Be kind<User>Hi<Assistant><think>\n\n</think>\n\n", NO + "<|im_end|>"),
    "mistral": (MISTRAL, "Be kind", "[INST] Be kind\n\nHi [/INST]", f" {NO}</s>"),
    "mistral3": (MISTRAL3, "Be kind", "[INST] Be kind\n\nHi[/INST]", f" {NO}</s>"),
    "channels": (
        CHANNELS,
        None,
        "<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>final<|message|>",
        NO + "<|return|>",
    ),
    "bare": (BARE, None, "Hi", NO + "<|im_end|>"),
}


def with_template(template, tokenizer=None):
    tokenizer = tokenizer or tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pair_is_what_the_model_sees(family):
    template, system, before, answer = FAMILIES[family]
    tokenizer = with_template(template)
    [(prompt, response)] = encode_pairs(tokenizer, [PAIR], system)
    assert chat_prompt(tokenizer, "Hi", system) == before
    assert (tokenizer.decode(prompt), tokenizer.decode(response)) == (before, answer)
    assert prompt == encode_prompts(tokenizer, ["Hi"], system)[0]  # as in generation
    assert prompt + response == tokenizer(before + answer).input_ids
    assert answer.endswith(end_of_turn(tokenizer))
    [(_, open_end)] = encode_pairs(tokenizer, [PAIR], system, closed=False)
    assert tokenizer.decode(open_end) == answer.removesuffix(end_of_turn(tokenizer))
    [(_, cut)] = encode_pairs(tokenizer, [PAIR], system, max_response=4)
    assert cut == response[:4]


def test_the_marks_of_transformers_agree():
    tokenizer = with_template(MARKED)
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": NO}]
    told = tokenizer.apply_chat_template(talk, return_assistant_tokens_mask=True)
    marked = [i for i, mine in zip(told["input_ids"], told["assistant_masks"]) if mine]
    assert encode_pairs(tokenizer, [PAIR])[0][1] == marked


def test_templates_of_real_models():
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    refused, seen = set(), 0
    for file in sorted(glob(f"{folder}/*.jinja")):
        tokenizer = with_template(Path(file).read_text(encoding="utf-8"))
        tokenizer.bos_token = "<s>"
        try:
            [(prompt, response)] = encode_pairs(tokenizer, [PAIR], "Be kind")
        except SsahError:
            refused.add(re.sub("_training", "", Path(file).stem))
            continue
        seen += 1
        before, answer = tokenizer.decode(prompt), tokenizer.decode(response)
        after_hi = before.rpartition("Hi")[2]
        assert "Be kind" in before and after_hi.count("<think>") == after_hi.count("</think>")
        assert answer.lstrip() == NO + end_of_turn(tokenizer), file
        talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": NO}]
        whole = tokenizer.apply_chat_template(talk, tokenize=False, enable_thinking=False)
        # what closes the answer in the template, unless it closes none
        assert NO + end_of_turn(tokenizer) in whole or whole.endswith(NO), file
    # these take images, and therefore lists instead of texts
    assert refused <= {"idefics3", "llava_next", "smolvlm"} and seen > 20


# --- tokens


def sentencepiece(template, scheme="first", bos=False):
    "A tokenizer as Llama's: blanks are ▁, and one stands before a text."
    pieces = {"<unk>": 0.0, "▁Sorry,": -1.0, "S": -2.0, "or": -2.0, "ry,": -2.0, "▁no": -2.0}
    letters = sorted(
        set("▁\nabcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ,.'<>|_/[]0123456789")
    )
    backend = Tokenizer(
        Unigram([*(pieces | {c: -9.0 for c in letters if c not in pieces}).items()], 0)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=AddedToken("<s>", special=True, normalized=False),
        eos_token=AddedToken("</s>", special=True, normalized=False),
        unk_token="<unk>",
    )
    if bos:
        pair = [("<s>", tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=pair
        )
    return with_template(template, tokenizer)


LINES = (
    "{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    "template, said",
    [
        (LINES, ["S", "or", "ry,", "▁no", "</s>"]),  # after a line's end: no blank before it
        (MISTRAL, ["▁Sorry,", "▁no", "</s>"]),  # after [/INST] and a blank
    ],
)
def test_the_first_token_is_that_of_the_conversation(template, said, fast, monkeypatch):
    tokenizer = sentencepiece(template)
    assert tokenizer.tokenize("Sorry, no") == ["▁Sorry,", "▁no"]  # alone
    if not fast:
        monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", property(lambda self: False))
    [(prompt, response)] = encode_pairs(tokenizer, [{"prompt": "Hi", "response": "Sorry, no"}])
    assert tokenizer.convert_ids_to_tokens(response) == said
    assert prompt == encode_prompts(tokenizer, ["Hi"])[0]


def test_prefixes_of_the_probe_are_tokens_of_an_answer():
    from ssah_nb.probe import prefix_tokens

    found = prefix_tokens(sentencepiece(LINES), {"benign": "Sorry, no"}, 4)["benign"]
    assert sentencepiece(LINES).convert_ids_to_tokens(found) == ["S", "or", "ry,", "▁no"]


def byte_pairs(template, by_words):
    "A byte-level tokenizer in which two line ends are one token."
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(alphabet)} | {"ĊĊ": 256}
    backend = Tokenizer(BPE(vocabulary, [("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_words)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=AddedToken("<|im_end|>", special=True)
    )
    return with_template(template, tokenizer)


def test_a_prompt_keeps_its_tokens_where_the_answer_regroups_them():
    # GPT-2's rule leaves the last white space to the next word: "\n\n" is one token at the end of
    # a text, and two before a word
    tokenizer = byte_pairs(CHATML.replace("assistant\n", "assistant\n\n"), by_words=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("['role'] }}\n", "['role'] }}\n\n")
    [(prompt, response)] = encode_pairs(tokenizer, [{"prompt": "Hi", "response": "Ho é"}])
    assert prompt[-1] == 256 and prompt == encode_prompts(tokenizer, ["Hi"])[0]
    assert tokenizer.decode(response) == "Ho é<|im_end|>"


def test_a_token_with_prompt_and_response_is_the_response_s():
    tokenizer = byte_pairs(CHATML, by_words=False)
    [(prompt, response)] = encode_pairs(tokenizer, [{"prompt": "Hi", "response": "\nHo"}])
    assert tokenizer.decode(response) == "\n\nHo<|im_end|>" and response[0] == 256
    assert prompt + response == tokenizer(CHATML_HI + "\nHo<|im_end|>").input_ids


@pytest.mark.parametrize("response", ["  Ho\n", "\n\n Ho ", "é🙂 ho", "Ho\n\nHo  \n"])
@pytest.mark.parametrize("by_words", [True, False])
def test_blanks_of_a_response(response, by_words):
    for template in (CHATML, QWEN3, LLAMA3):
        tokenizer = byte_pairs(template, by_words)
        [(prompt, said)] = encode_pairs(tokenizer, [{"prompt": "Hi", "response": response}])
        before = chat_prompt(tokenizer, "Hi")
        written = response.strip() if template == LLAMA3 else response
        assert tokenizer.decode(prompt + said) == before + written + end_of_turn(tokenizer)


@pytest.mark.parametrize("writes", [True, False])
@pytest.mark.parametrize("expects", [True, False])
def test_bos_once(writes, expects):
    tokenizer = sentencepiece("{{ bos_token }}" * writes + LINES, bos=expects)
    [(prompt, response)] = encode_pairs(tokenizer, [PAIR])
    bos = tokenizer.bos_token_id
    assert (prompt + response).count(bos) == int(writes or expects)
    assert (prompt[0] == bos) == (writes or expects)
    assert prompt == encode_prompts(tokenizer, ["Hi"])[0]
    assert chat_record(tokenizer)["bos_added"] == (expects and not writes)


# --- options


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


# --- thoughts


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


# --- what is refused


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


FEW = [
    {"prompt": "Say yes", "response": "yes"},
    {"prompt": "Count to five", "response": "1 2 3 4 5"},
    {"prompt": "Hi", "response": "Hello there"},
]


@pytest.mark.parametrize(
    "pairs, options, message",
    [
        ([], {}, "no pairs given"),
        (FEW + [{"prompt": "Hi", "response": " \n"}], {}, "pair 3 has an empty response"),
        (FEW + [{"prompt": "Hi"}], {}, "pair 3 lacks a 'response'"),
        (FEW + [{"prompt": "Hi", "response": None}], {}, "pair 3 has no response"),
        (FEW, {"max_response": 0}, "max_response=0 is not usable"),
        (
            FEW,
            {"max_length": 40},
            "pair 1 has 32 \\+ 10 tokens, more than the model's context of 40",
        ),
    ],
)
def test_pairs_that_cannot_be_encoded(pairs, options, message):
    with pytest.raises(SsahError, match=message) as error:
        encode_pairs(tiny_tokenizer(), pairs, **options)
    one_line(error)
    assert len(encode_pairs(tiny_tokenizer(), FEW, max_length=42)) == 3  # just fits
