"""A tiny, random model of every causal architecture of transformers, without the network.

The default configuration of an architecture is made small, entry by entry, by the entries' names.
What that does not reach is written down in OWN.
"""

import inspect
import re

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

LARGEST = 3_000_000  # parameters
SIZES = {  # pattern of an entry's name -> its value in a tiny model; the first that fits counts
    r"(\w+_)?vocab_size(_per_layer_input)?|unpadded_vocab_size|\w+_byte_group_vocab": 258,
    r"hidden_size_per_layer_input|num_index_heads": 4,
    r"intermediate_size(_mlp)?|ffn_dim|n_inner|\w*ffn_(hidden_)?(dim|size)|feed_forward_size": 32,
    r"\w+_intermediate_size|intermediate_size_\w+|expert_ffn_hidden_size": 16,
    r"(text_|word_|cross_attention_)?hidden_size|hidden_size_global|d_model|n_embd": 32,
    r"dim|embed_dim|embedding_size": 32,
    r"word_embed_proj_dim|emb_dim|lru_width|output_proj_dims|width|dim_model_base": 32,
    r"num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers|depth|num_blocks": 2,
    r"num_(en|de)coder_layers": 2,
    r"num_attention_heads|n_heads?|(en|de)coder_attention_heads|num_heads": 4,
    r"num_(en|de)coder_attention_heads|swa_num_attention_heads|linear_num_(value_)?heads": 4,
    r"(swa_|num_global_)?num_key_value_heads|num_kv_heads|kv_n_heads|n_head_kv": 2,
    r"(swa_|global_|linear_(key_|value_)?|v_|qk_nope_|index_)?head_dim|attention_head_size|d_kv": 8,
    r"qk_rope_head_dim": 8,
    r"qk_head_dim": 16,
    r"hc_lowrank|d_rel|rotary_dim": 4,
    r"(kv_|q_|o_)?lora_rank|adapter_rank": 8,
    r"linear_num_key_heads|index_n_heads|o_groups": 2,
    r"(n_routed_|num_(local_)?|moe_num_)experts": 4,
    r"num_experts_per_tok|moe_topk|moe_top_k|top_k_experts|moe_k|num_selected_experts": 2,
    r"n_group|topk_group|n_groups|first_k_dense_replace|zero_expert_num|num_dense_layers": 1,
    r"n_shared_experts|num_shared_experts|moe_layer_start_index": 1,
    r"max_position_embeddings|n_positions|max_seq_len|n_ctx|max_target_positions": 512,
    r"mamba_n_heads|mamba_num_heads|n_mamba_heads": 4,
    r"mamba_d_head|mamba_head_dim": 16,
    r"mamba_d_ssm": 64,
    r"mamba_d_state|ssm_state_size|state_size|mamba_dt_rank|time_step_rank": 8,
    r"sliding_window(_size)?|attention_window_size|keep_window_size|window_size": 64,
    r"(pad|bos|eos|decoder_start)_token_id": 256,
    r"image_size": 28,
    r"patch_size": 14,
    r"initializer_range|init_std": 0.2,
}
LATENT = (  # keys and values of all heads come from one latent vector
    "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 dots3_note_text glm4_moe_lite glm_moe_dsa "
    "longcat_flash minicpm3 youtu"
).split()
OWN: dict[str, dict] = {  # architecture -> entries that its tiny model needs
    **{name: {"num_key_value_heads": 4} for name in LATENT},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10_000.0}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {"attn_config": {"rope_theta": 10_000.0, "clip_qkv": 8.0}},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 16},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": (16, 32),
        "axial_pos_embds_dim": (16, 16),
    },
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}
VARIANTS = {  # an architecture with a switch that changes what its heads are
    "cohere, use_qk_norm": ("cohere", {"use_qk_norm": True}),
    "deepseek_v2, no q_lora_rank": ("deepseek_v2", {"q_lora_rank": None}),
    "gemma4_text, two head widths": ("gemma4_text", {"global_head_dim": 16}),
    "gemma4_text, shared keys and values": (
        "gemma4_text",
        {"num_kv_shared_layers": 2, "num_hidden_layers": 4, "layer_types": ["full_attention"] * 4},
    ),
    "stablelm, qk_layernorm": ("stablelm", {"qk_layernorm": True}),
}


def small(config_class: type, changes: dict) -> PreTrainedConfig:
    """A configuration with tiny sizes, also in the configurations inside it."""
    default = config_class()
    names = {**vars(default), **inspect.signature(config_class.__init__).parameters}
    sizes = {}
    for name in names:
        if name in config_class.sub_configs or name.startswith("_"):
            continue
        for pattern, size in SIZES.items():
            if re.fullmatch(pattern, name):
                sizes[name] = size
                break
    for name, part in config_class.sub_configs.items():
        if isinstance(getattr(default, name, None), PreTrainedConfig):
            part = type(getattr(default, name))
            sizes[name] = small(part, changes.get(name, {}))
    own = {name: v for name, v in changes.items() if name not in config_class.sub_configs}
    return config_class(**(sizes | own))


def architectures() -> dict[str, tuple[str, dict]]:
    """Each row of the table: its name -> architecture, entries of the configuration."""
    plain = {name: (name, OWN.get(name, {})) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    variants = {
        name: (kind, OWN.get(kind, {}) | changes) for name, (kind, changes) in VARIANTS.items()
    }
    return dict(sorted((plain | variants).items()))


def build(kind: str, changes: dict) -> nn.Module:
    """The tiny model, no weight of it zero. Raises `ValueError` when it is not tiny."""
    config = small(CONFIG_MAPPING[kind], changes)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if model_class.config_class in config.sub_configs.values():
        config = config.get_text_config(decoder=True)
    with torch.device("meta"):
        count = sum(p.numel() for p in model_class(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{count / 1e6:.1f} M parameters at these sizes")
    torch.manual_seed(0)
    model = model_class(config).eval()
    for p in model.parameters():
        if p.is_floating_point():
            p.data += 0.05 * torch.randn_like(p)
    return model
