"""A backbone on the Hugging Face Hub: found by its id, in the cache first where there is no network, and put there."""

from pathlib import Path
from typing import Any

from vim_backbone.errors import UserError, first_line
from vim_backbone.folder import CONFIG, WEIGHTS, read_config
from vim_backbone.preprocessing import PREPROCESSOR

FILES = [CONFIG, WEIGHTS, PREPROCESSOR]
"""What is downloaded: nothing in it can start a program."""


def find_backbone(name: str | Path, revision: str | None = None) -> Path:
    """The folder that a name means, downloaded first where it is the id of one on the Hub.

    Only a text of the form "owner/name" whose owner is no folder here leads to the network; HF_HUB_OFFLINE=1 keeps to
    the cache.

    Args:
        revision: branch, tag or commit on the Hub; the newest of its main branch when None.

    Raises:
        UserError: the Hub does not give it, or what it gives is no backbone.
    """
    text = str(name)
    place = Path(text).expanduser()
    if isinstance(name, Path) or place.exists() or not _is_id(text) or place.parent.is_dir():
        if revision is not None:
            raise UserError(f"revision is {revision!r}, but {text} is a folder here: only the Hub has revisions")
        return place
    try:
        folder = Path(_hub().snapshot_download(text, allow_patterns=FILES, revision=revision))
    except UserError:
        raise
    except Exception as error:  # the Hub's client raises a dozen unrelated classes
        raise UserError(
            f"backbone {text} is no folder here, and the Hub does not give it; without a network, give a folder "
            f"({first_line(error)})"
        ) from error
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"backbone {text} on the Hub has no config.json: the official weights go through vim_backbone.convert first"
        )
    return folder


def push_to_hub(
    folder: str | Path, name: str, *, private: bool = False, revision: str | None = None, message: str | None = None
) -> str:
    """Put the folder of a backbone on the Hub as `name`, "owner/name", and return its address.

    The repository is made where there is none. Who may write is what `hf auth login` or HF_TOKEN says.

    Args:
        private: of a repository that is made; one that exists stays as it is.
        revision: an existing branch; main when None.
        message: of the commit.

    Raises:
        UserError: the folder holds no backbone, the name is no id, or the Hub refuses.
    """
    folder = Path(folder)
    read_config(folder)
    if not _is_id(name):
        raise UserError(f"{name!r} is no id on the Hub: give owner/name")
    try:
        hub = _hub().HfApi()
        address = str(hub.create_repo(name, private=private, exist_ok=True))
        hub.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=[*FILES, "README.md"],
            revision=revision,
            commit_message=message or "A Vision Mamba backbone",
        )
    except UserError:
        raise
    except Exception as error:  # as above
        raise UserError(f"the Hub does not take {folder} as {name}: {first_line(error)}") from error
    return address


def _is_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and all(name.split("/"))


def _hub() -> Any:
    """The Hub's client. Raises UserError where it is not installed."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError("backbones on the Hub need its client: pip install huggingface_hub") from error
    return huggingface_hub
