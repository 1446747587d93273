"""What timm and transformers read and write in config.json beside the fields of a backbone."""

from typing import Any

from vim_backbone.config import VimConfig
from vim_backbone.preprocessing import Preprocessing

MODEL_TYPE = "vim"
"""By which transformers knows a backbone."""
ARCHITECTURE = "vim"
"""By which timm knows a backbone of any sizes."""
STATED_ELSEWHERE = ("num_classes", "in_chans")
"""Fields that timm reads from its description of the weights, where a caller may replace them."""
TIMM_KEYS = {"architecture", "num_features", "pretrained_cfg", "model_args"}
"""Keys of config.json that timm reads."""
FOREIGN = TIMM_KEYS | {
    "model_type", "architectures",
    "transformers_version", "dtype", "torch_dtype", "id2label", "label2id", "problem_type", "output_hidden_states",
    "return_dict", "chunk_size_feed_forward", "is_encoder_decoder", "out_features", "out_indices", "stage_names",
}  # fmt: skip
"""Keys of config.json that are no fields of a backbone."""


def timm_fields(config: VimConfig, preprocessing: Preprocessing) -> dict[str, Any]:
    """What `timm.create_model("local-dir:...")` and `("hf-hub:...")` read of config.json."""
    return {
        "architecture": ARCHITECTURE,
        "num_features": config.d_model,
        "model_args": {name: value for name, value in config.to_dict().items() if name not in STATED_ELSEWHERE},
        "pretrained_cfg": timm_description(config, preprocessing),
    }


def timm_description(config: VimConfig, preprocessing: Preprocessing) -> dict[str, Any]:
    """What timm calls a pretrained_cfg: input, normalisation, and the names of the first and the last layer."""
    return {
        "input_size": [config.in_chans, *config.img_size],
        "fixed_input_size": False,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "num_classes": config.num_classes,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
