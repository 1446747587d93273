"""The folder of a backbone: which files it has, what is in them, and how they are written."""

from pathlib import Path

from torch import Tensor, nn

from vim_backbone.config import VimConfig
from vim_backbone.doors import FOREIGN, MODEL_TYPE, timm_fields
from vim_backbone.errors import UserError
from vim_backbone.files import read_json, write_json, write_tensors, write_text
from vim_backbone.preprocessing import IMAGENET_MEAN, IMAGENET_STD, PREPROCESSOR, RGB, Preprocessing, preprocessor

CONFIG = "config.json"
WEIGHTS = "model.safetensors"


def save_pretrained(
    model: nn.Module,
    config: VimConfig,
    folder: str | Path,
    *,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    preprocessing: Preprocessing | None = None,
    card: str | None = None,
    tensors: dict[str, Tensor] | None = None,
) -> Path:
    """Write config.json, model.safetensors, preprocessor_config.json and README.md into `folder`.

    Args:
        mean, std: what pictures in [0, 1] were normalised with, a value a channel; ImageNet's for three channels.
        preprocessing: that, with bands, range and nodata; in place of mean and std.
        card: Markdown text of README.md; a short one is made when None.
        tensors: the model's state dict, where its parameters are spread over processes; its own when None.

    Raises:
        UserError: the folder cannot be written, the disk is full, or mean and std have not a value for each channel.
    """
    folder = Path(folder)
    if preprocessing is not None:
        mean, std = preprocessing.mean, preprocessing.std
    if not len(mean) == len(std) == config.in_chans:
        raise UserError(
            f"the backbone has {config.in_chans} channels, mean {len(mean)} values and std {len(std)}: give "
            "save_pretrained a mean and std with a value for each channel"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from error
    write_tensors(folder / WEIGHTS, model.state_dict() if tensors is None else tensors)
    preprocessing = preprocessing or Preprocessing(mean=mean, std=std)
    write_json(folder / PREPROCESSOR, preprocessor(config, preprocessing))
    write_text(folder / "README.md", card or model_card(config, folder.name, preprocessing))
    described = {"model_type": MODEL_TYPE, "architectures": ["VisionMamba"]} | config.to_dict()
    write_json(folder / CONFIG, described | timm_fields(config, preprocessing))
    return folder


def read_config(folder: Path) -> VimConfig:
    """The config of a backbone folder. Raises UserError naming what is missing."""
    path = folder / CONFIG
    if not folder.is_dir():
        raise UserError(f"no backbone at {folder}: the folder does not exist")
    if not path.exists():
        raise UserError(f"no backbone at {folder}: config.json is missing")
    data = read_json(path)
    if not isinstance(data, dict) or data.get("model_type") != MODEL_TYPE:
        raise UserError(f"{path} describes no Vim backbone: its model_type is not {MODEL_TYPE!r}")
    try:
        return VimConfig.from_dict({k: v for k, v in data.items() if k not in FOREIGN})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def model_card(config: VimConfig, name: str, preprocessing: Preprocessing = RGB) -> str:
    """A short README.md for a backbone folder."""
    height, width = config.img_size
    pictures = f"{'RGB' if config.in_chans == 3 else f'{config.in_chans} channels'} in [0, 1]"
    accepted = "a file, a PIL picture, an array or a tensor"
    if preprocessing.bands is not None:
        accepted = "an array (bands, h, w)"
        pictures = (
            f"bands {list(preprocessing.bands)} of files of {preprocessing.dtype}, which\n"
            f'`vim_backbone.read_preprocessing("{name}").model_input(values)` takes as an array (bands, h, w)'
        )
    if config.channels == "tokens":
        numbers = sorted({config.in_chans, *(len(each) for each in config.channel_sets or ())})
        pictures += f";\na picture has {' or '.join(map(str, numbers))} of them, and each gives tokens of its own"
    return f"""---
library_name: vim_backbone
tags: [vision-mamba, image-feature-extraction]
---
# {name}

Vision Mamba (Vim, arXiv 2401.09417) backbone: {config.depth} blocks of width {config.d_model}, patches of
{config.patch_size} pixels every {config.stride}, made for pictures of {height} x {width}; other sizes work too.

```python
import vim_backbone

model, transform = vim_backbone.load("{name}")  # the path of this folder; of one on the Hub "owner/name"
features = model(transform(picture))  # {accepted}, of any size
```

`timm.create_model("local-dir:{name}", pretrained=True)` after `import vim_backbone.timm` and
`AutoModel.from_pretrained("{name}")` after `import vim_backbone.transformers` give the same model.

Pictures: {pictures}, normalised as `preprocessor_config.json` says.
"""
