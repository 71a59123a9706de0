"""Hugging Face configs of every supported kind of network."""

from tests.tiny import LLAMA, NEMOTRON, QWEN2, QWEN3, SEED_OSS

LLAMA3_ROPE = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
CONFIGS = {
    "llama": LLAMA,
    "heads that make up the width": {**LLAMA, "head_dim": 8},
    "llama3 rope": {**LLAMA, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e3, **LLAMA3_ROPE}},
    "tied": {**LLAMA, "tie_word_embeddings": True},
    "mistral": {**LLAMA, "model_type": "mistral", "hidden_size": 46, "sliding_window": None},
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "seed_oss": SEED_OSS,
    "nemotron": NEMOTRON,
    "nemotron, all rotated": {
        **NEMOTRON,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5.0, "partial_rotary_factor": 1.0},
    },
    "nemotron, untied": {**NEMOTRON, "tie_word_embeddings": False},
}
