"""Chat templates of many families, and tokenizers of both kinds."""

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram
from transformers import PreTrainedTokenizerFast

from ssah_nb.engine.models import CHATML, tiny_tokenizer

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
SMOLLM3 = (  # tells in its system turn whether it is to think
    "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
    "<|im_start|>system\nMode: {{ '/think' if enable_thinking else '/no_think' }}\n\n"
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% for m in messages %}{% if m['role'] == 'user' %}<|im_start|>user\n"
    "{{ m['content'] }}<|im_end|>\n{% elif m['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n{% endif %}"
    "{% generation %}{{ m['content'].lstrip('\n') }}<|im_end|>{% endgeneration %}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n{% endif %}{% endif %}"
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
    "smollm3": (
        SMOLLM3,
        "Be kind",
        "<|im_start|>system\nMode: /no_think\n\nBe kind<|im_end|>\n"
        + f"{CHATML_HI}<think>\n\n</think>\n",
        NO + "<|im_end|>",
    ),
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
