"""Backbones in transformers: importing this registers the config, the models and the image processor of "vim".

AutoConfig, AutoModel, AutoBackbone, AutoModelForImageClassification and AutoImageProcessor then know backbones by their
folder or id, without code from either. Shape letters: b pictures, l patches, special: class token, registers.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ViTImageProcessor,
)
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils.hub import cached_file

from vim_backbone.config import SIZES, VimConfig
from vim_backbone.doors import MODEL_TYPE, TIMM_KEYS, timm_fields
from vim_backbone.errors import UserError
from vim_backbone.files import write_json
from vim_backbone.preprocessing import PREPROCESSOR, RGB, Preprocessing, preprocessor, read_preprocessing
from vim_backbone.vim import VisionMamba

PREFIX = "vim"
FIELDS = tuple(VimConfig.__dataclass_fields__)
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""Options of from_pretrained that say where a file of a folder or an id is."""


def our_preprocessing(folder: Path) -> Preprocessing | None:
    """What is done to pictures, where preprocessor_config.json is one of ours."""
    try:
        return read_preprocessing(folder)
    except UserError:
        return None


class VimPreTrainedConfig(BackboneConfigMixin, PreTrainedConfig):
    """The fields of `VimConfig`, and what transformers adds: labels, and the stages that a backbone gives.

    Stage 0, "stem", are the patches before the first block; stage i, "stage<i>", is the stream after i blocks.
    `num_labels` or `id2label`, where given, say the size of the classifier in place of `num_classes`.
    """

    model_type = MODEL_TYPE
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model", "num_hidden_layers": "depth", "image_size": "img_size", "num_channels": "in_chans",
    }  # fmt: skip
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **options: Any) -> None:
        self.pretrained_cfg = options.get("pretrained_cfg") or {}
        for key in TIMM_KEYS:  # written anew when this is saved
            options.pop(key, None)
        fields = {name: options.pop(name) for name in FIELDS if name in options}
        labels = options.pop("num_labels", None if self.id2label is None else len(self.id2label))
        if labels is not None:
            fields["num_classes"] = labels
        config = VimConfig.from_dict(SIZES["vim_tiny"] | fields)
        self.stage_names = ["stem", *(f"stage{index + 1}" for index in range(config.depth))]
        options.pop("stage_names", None)
        self.set_output_features_output_indices(
            out_indices=options.pop("out_indices", None), out_features=options.pop("out_features", None)
        )
        super().__post_init__(num_labels=config.num_classes, **options)
        for name, value in config.to_dict().items():
            if name != "num_classes":
                setattr(self, name, value)

    @property
    def vim(self) -> VimConfig:
        """The architecture. Raises UserError for values that do not fit together."""
        fields = {name: getattr(self, name) for name in FIELDS if name != "num_classes" and hasattr(self, name)}
        return VimConfig.from_dict(fields | {"num_classes": self.num_labels or 0})

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, which `vim_backbone` and timm read too."""
        vim, described = self.vim, self.pretrained_cfg
        same = len(described.get("mean", ())) == len(described.get("std", ())) == vim.in_chans
        preprocessing = Preprocessing(mean=described["mean"], std=described["std"]) if same else RGB
        return super().to_dict() | vim.to_dict() | timm_fields(vim, preprocessing)


class VimPreTrainedModel(PreTrainedModel):
    """A `VisionMamba` in transformers; the names of its tensors are those of the folder, without a prefix."""

    config_class = VimPreTrainedConfig
    base_model_prefix = PREFIX
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = False
    _no_split_modules = ("Block",)  # pyright: ignore[reportAssignmentType, reportIncompatibleVariableOverride]
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [  # pyright: ignore
        r"head\.(weight|bias)"
    ]
    has_classifier = False
    preprocessing: Preprocessing | None = None
    """Of the folder that the weights came from."""

    def __init__(self, config: VimPreTrainedConfig) -> None:
        super().__init__(config)
        vim = config.vim
        self.vim = VisionMamba(vim if self.has_classifier else VimConfig.from_dict(vim.to_dict() | {"num_classes": 0}))
        for parameter in self.vim.parameters():
            if not parameter.is_meta:  # weights are drawn as the model is made; on meta they are to be read
                parameter._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw a fresh classifier. Raises UserError for another tensor that the file lacks."""
        if module is self.vim.head:
            self.vim._init_head()
            return
        for name, parameter in module.named_parameters(recurse=False):
            if not getattr(parameter, "_is_hf_initialized", False):
                raise UserError(f"the file of weights lacks {name} of {type(module).__name__}: is it of another model?")

    @classmethod
    def from_pretrained(cls, name: str | Path | None, *inputs: Any, **options: Any) -> Any:  # pyright: ignore
        """As transformers has it; what is done to pictures is kept, for `save_pretrained`."""
        loaded = super().from_pretrained(name, *inputs, **options)
        if name is not None:
            where = {key: options[key] for key in HUB_OPTIONS if key in options}
            file = cached_file(str(name), PREPROCESSOR, **where, _raise_exceptions_for_missing_entries=False)
            model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
            model.preprocessing = None if file is None else our_preprocessing(Path(file).parent)
        return loaded

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:  # pyright: ignore
        """As transformers has it, with the names of tensors that `vim_backbone` and timm read.

        preprocessor_config.json is written where the model was loaded from a folder that has one.
        """
        state = options.pop("state_dict", None) or self.state_dict()
        state = {name.removeprefix(f"{PREFIX}."): tensor for name, tensor in state.items()}
        super().save_pretrained(save_directory, state_dict=state, **options)
        if not self.has_classifier:
            config = deepcopy(self.config)
            config.num_labels = 0
            config.save_pretrained(save_directory)
        vim, preprocessing = self.vim.config, self.preprocessing
        if preprocessing is not None and preprocessing.in_chans == vim.in_chans:
            write_json(Path(save_directory) / PREPROCESSOR, preprocessor(vim, preprocessing))


class VimModel(VimPreTrainedModel):
    """Tokens and pooled features."""

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, return_dict: bool | None = None, **_: Any
    ) -> Any:
        """(b, c, h, w) -> last_hidden_state (b, special + l, d_model), pooler_output (b, d_model).

        `output_hidden_states`: also the stream (b, special + l, d_model) after each block; where channels are tokens, a
        place has the mean over them.
        """
        streams = None
        if output_hidden_states or (output_hidden_states is None and self.config.output_hidden_states):
            tokens, pairs = self.vim.forward_intermediates(pixel_values, return_prefix_tokens=True, output_fmt="NLC")
            streams = tuple(torch.cat([special, patches], dim=1) for patches, special in pairs)
        else:
            tokens = self.vim.forward_features(pixel_values)
        pooled = self.vim.forward_head(tokens, pre_logits=True)
        output = BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=pooled, hidden_states=streams)
        return output.to_tuple() if return_dict is False else output


class VimForImageClassification(VimPreTrainedModel):
    """Logits of the classifier, and the loss where there are labels."""

    has_classifier = True

    def __init__(self, config: VimPreTrainedConfig) -> None:
        if not config.num_labels:
            raise UserError("the backbone has no classifier: give num_labels, the number of classes of a fresh one")
        super().__init__(config)
        self.num_labels = config.num_labels

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None, **_: Any
    ) -> Any:
        """(b, c, h, w) -> logits (b, num_labels); of `labels` (b,) or (b, num_labels) the loss of the problem_type."""
        logits = self.vim(pixel_values)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        output = ImageClassifierOutput(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output


class VimBackbone(BackboneMixin, VimPreTrainedModel):
    """Feature maps of the stages that `out_features` or `out_indices` choose."""

    has_attentions = False

    def __init__(self, config: VimPreTrainedConfig) -> None:
        super().__init__(config)
        self.num_features = [config.d_model] * len(self.stage_names)

    def forward(self, pixel_values: Tensor, *_: Any, return_dict: bool | None = None, **__: Any) -> Any:  # pyright: ignore
        """(b, c, h, w) -> feature_maps, each (b, d_model, rows, columns): the stream after so many blocks."""
        blocks = [index - 1 for index in map(self.stage_names.index, self.out_features) if index]
        maps = []
        if len(blocks) < len(self.out_features):
            rows, columns = self.vim.config.grid(*pixel_values.shape[-2:])
            patches = self.vim.embed_patches(pixel_values).unflatten(1, (rows, columns, -1)).mean(3)
            maps.append(patches.permute(0, 3, 1, 2))
        if blocks:
            maps += self.vim.forward_intermediates(pixel_values, blocks, stop_early=True, intermediates_only=True)
        output = BackboneOutput(feature_maps=tuple(maps))
        return output.to_tuple() if return_dict is False else output


class VimImageProcessor(ViTImageProcessor):
    """Of RGB; it refuses bands, whose ranges transformers does not know."""

    def __init__(self, bands: list[int] | None = None, **options: Any) -> None:
        if bands is not None:
            raise UserError(
                f"the backbone takes bands {bands} of files, for which transformers has no image processor: take the "
                "transform of vim_backbone.load"
            )
        super().__init__(**options)


AutoConfig.register(MODEL_TYPE, VimPreTrainedConfig, exist_ok=True)
AutoModel.register(VimPreTrainedConfig, VimModel, exist_ok=True)
AutoModelForImageClassification.register(VimPreTrainedConfig, VimForImageClassification, exist_ok=True)
AutoBackbone.register(VimPreTrainedConfig, VimBackbone, exist_ok=True)
AutoImageProcessor.register(VimPreTrainedConfig, VimImageProcessor, exist_ok=True)
