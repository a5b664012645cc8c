"""Tiny random models of many architectures, for the tests of dlogp_kernels.hf."""

from collections.abc import Callable, Iterator

import pytest
import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 160

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_GPT_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_GPT2_SIZES = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
}
_VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}

#: Name → class, config class, options. What stands between backbone and logits differs, or how that sees positions.
_ARCHITECTURES: dict[str, tuple[str, str, dict]] = {
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_SIZES, "head_dim": 8}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _SIZES),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**_SIZES, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "qwen3_5": ("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", {**_SIZES, **_LINEAR_ATTENTION}),
    "llama_bias": ("LlamaForCausalLM", "LlamaConfig", {**_SIZES, "attention_bias": True, "mlp_bias": True}),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**_SIZES, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48},
    ),
    "mistral_sliding": ("MistralForCausalLM", "MistralConfig", {**_SIZES, "sliding_window": 4}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_SIZES, "head_dim": 8, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_SIZES, "head_dim": 8, "final_logit_softcapping": 3.0}),
    "cohere": ("CohereForCausalLM", "CohereConfig", {**_SIZES, "logit_scale": 0.25}),
    "cohere2": ("Cohere2ForCausalLM", "Cohere2Config", {**_SIZES, "head_dim": 8, "logit_scale": 0.25}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", {**_SIZES, "logits_scaling": 4.0}),
    "hyperclovax": ("HyperCLOVAXForCausalLM", "HyperCLOVAXConfig", {**_SIZES, "logits_scaling": 4.0}),
    "minicpm3": (
        "MiniCPM3ForCausalLM",
        "MiniCPM3Config",
        {
            **_SIZES,
            "num_key_value_heads": 4,
            "dim_model_base": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
        },
    ),
    "falcon_h1": (
        "FalconH1ForCausalLM",
        "FalconH1Config",
        {
            **_SIZES,
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_ssm": 64,
            "mamba_d_state": 8,
            "lm_head_multiplier": 0.3,
        },
    ),
    "gpt2_tied": ("GPT2LMHeadModel", "GPT2Config", _GPT2_SIZES),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**_GPT_SIZES, "intermediate_size": 48}),
    "gptj_bias": ("GPTJForCausalLM", "GPTJConfig", {**_GPT2_SIZES, "rotary_dim": 4}),
    "phi_bias": ("PhiForCausalLM", "PhiConfig", _SIZES),
    "opt_project_out": (
        "OPTForCausalLM",
        "OPTConfig",
        {**_GPT_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 16, "max_position_embeddings": 64},
    ),
    "falcon": ("FalconForCausalLM", "FalconConfig", _GPT_SIZES),
    "falcon_alibi": ("FalconForCausalLM", "FalconConfig", {**_GPT_SIZES, "alibi": True}),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    ),
    "mpt": ("MptForCausalLM", "MptConfig", {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4}),
    "mamba": ("MambaForCausalLM", "MambaConfig", {**_GPT_SIZES, "state_size": 8}),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {
            "text_config": {
                **_SIZES,
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
            },
            "vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2},
        },
    ),
    "gemma3_vision": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": {**_SIZES, "head_dim": 8},
            "vision_config": {**_VISION, "image_size": 28, "patch_size": 14},
            "mm_tokens_per_image": 4,
            "image_token_index": VOCABULARY - 1,
        },
    ),
    # Rotary frequencies change at 8 tokens, and with each token beyond.
    "phi3_longrope": (
        "Phi3ForCausalLM",
        "Phi3Config",
        {
            **_SIZES,
            "pad_token_id": 0,
            "original_max_position_embeddings": 8,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [1.0, 4.0, 7.0, 10.0],
                "original_max_position_embeddings": 8,
                "factor": 8.0,
            },
        },
    ),
    "llama_dynamic": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {
            **_SIZES,
            "max_position_embeddings": 8,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        },
    ),
    # Their bodies do not count what is in the cache.
    "bamba": (
        "BambaForCausalLM",
        "BambaConfig",
        {
            **_SIZES,
            "attn_layer_indices": [1],
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 8,
        },
    ),
    "minimax": (
        "MiniMaxForCausalLM",
        "MiniMaxConfig",
        {
            **_SIZES,
            "head_dim": 8,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    # It counts masked padding as positions.
    "bart": (
        "BartForCausalLM",
        "BartConfig",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "decoder_layers": 2,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 64,
            "is_encoder_decoder": False,
        },
    ),
    # Its attention sees all tokens, its cache those of the window alone.
    "moshi": (
        "MoshiForCausalLM",
        "MoshiConfig",
        {
            **{name: size for name, size in _SIZES.items() if name != "intermediate_size"},
            "ffn_dim": 48,
            "head_dim": 8,
            "sliding_window": 24,
        },
    ),
    # Its index picks among equal scores by the length of a call.
    "hy_v4": (
        "HYV4ForCausalLM",
        "HYV4Config",
        {
            **_SIZES,
            "pad_token_id": 0,
            "head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "index_topk": 4,
            "index_n_heads": 2,
            "index_head_dim": 8,
            "layer_types": ["indexed_attention"] * 2,
        },
    ),
    "jamba": (
        "JambaForCausalLM",
        "JambaConfig",
        {
            **_SIZES,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "use_mamba_kernels": False,
            "mamba_d_state": 8,
        },
    ),
    "bert": ("BertLMHeadModel", "BertConfig", {**_GPT_SIZES, "intermediate_size": 48, "is_decoder": True}),
    "roberta_masked": ("RobertaForMaskedLM", "RobertaConfig", {**_GPT_SIZES, "intermediate_size": 48}),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": VOCABULARY, "d_model": 32, "num_layers": 1, "num_heads": 4, "d_ff": 48, "d_kv": 8},
    ),
}

#: What lm_head_inputs takes, and what it refuses (the backbone's hidden states are not those of the last layer, or no
#: token is predicted from those before it alone).
REFUSED = ("bert", "roberta_masked", "t5")
CAUSAL = tuple(name for name in _ARCHITECTURES if name not in REFUSED)
#: Whose cache can not be fed several tokens at a time.
WITHOUT_CHUNKS = ("mamba", "jamba", "minimax", "hy_v4")


def tiny_model(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **options: object) -> PreTrainedModel:
    """A random model in evaluation mode whose logits are some units wide; `options` are of its config."""
    model_name, config_name, sizes = _ARCHITECTURES[name]
    make_model: Callable = getattr(transformers, model_name)
    config = getattr(transformers, config_name)(**{**sizes, **options})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make_model(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.15 if parameter.dim() > 1 else 0.3)
            # Norms scale by something near 1.
            if parameter.dim() == 1:
                parameter.data += 0.7
    return model.to(dtype).eval()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For all of a module that imports this: tiny models are slower on several threads, the more so where other
    processes use them too, and how many share a matrix product shows in the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
