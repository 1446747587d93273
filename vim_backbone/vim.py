"""Vision Mamba: patches, positions, class token and registers, a stack of bidirectional blocks, a head.

Shape letters: b batch, c h w picture, l patch tokens; special: number of class token and registers. Where channels are
tokens, l is places times channels: place by place, and of a place channel by channel, in the picture's order of them.
"""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vim_backbone.block import Block, RMSNorm, drop_path, run_blocks, set_recompute
from vim_backbone.config import VimConfig
from vim_backbone.errors import UserError
from vim_backbone.folder import save_pretrained
from vim_backbone.gaps import with_special_tokens
from vim_backbone.hub import push_to_hub
from vim_backbone.inputs import Images, grid_of, number_of
from vim_backbone.lines import GridLines, batch_lines, packed_lines
from vim_backbone.mixer import ScanMetadata
from vim_backbone.packing import Layout, joined, layout_of
from vim_backbone.position import resize_table, sincos_table, with_channels
from vim_backbone.tokens import TokenLayout
from vim_backbone.weights import lecun_normal_


class PatchEmbed(nn.Module):
    """Patches to tokens by one strided convolution, which all channels share where each gives tokens of its own."""

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        self.by_channel = config.channels == "tokens"
        inputs = 1 if self.by_channel else config.in_chans
        self.proj = nn.Conv2d(inputs, config.d_model, config.patch_size, config.stride)

    def forward(self, images: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, l, d_model), row by row."""
        if self.by_channel:
            planes = self.project(images.flatten(0, 1)[:, None])
            return planes.unflatten(0, images.shape[:2]).transpose(1, 2).flatten(1, 2)
        return self.project(images)

    def project(self, images: Tensor) -> Tensor:
        """As `forward`, one token a place."""
        if images.is_cuda and self.proj.stride == self.proj.kernel_size:
            return self.as_product(images)  # a fifth of cuDNN's time for this convolution in bfloat16 on an H200
        return self.proj(images).flatten(2).transpose(1, 2)

    def as_product(self, images: Tensor) -> Tensor:
        """The same for patches that do not overlap, as one product over them."""
        size_h, size_w = self.proj.kernel_size
        patches = images.unflatten(3, (-1, size_w)).unflatten(2, (-1, size_h)).permute(0, 2, 4, 1, 3, 5)
        return F.linear(patches.flatten(3).flatten(1, 2), self.proj.weight.flatten(1), self.proj.bias)


class VisionMamba(nn.Module):
    """Vim (arXiv 2401.09417); parameter names are those of the official checkpoints.

    Calling it with pictures (b, c, h, w), any h and w that the stride divides, gives logits (b, num_classes), or the
    pooled features (b, d_model) when `num_classes` is 0. The feature methods follow timm. All take a list of pictures
    (c, h, w) of different sizes too, and scan them packed into one row, without padding, each as if it were alone.
    """

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        self.config = config
        d_model = config.d_model
        self.num_features = self.head_hidden_size = self.embed_dim = d_model
        self.in_chans = config.in_chans
        self.num_classes = config.num_classes
        self.global_pool = config.global_pool
        self.layout = TokenLayout(config.class_token, config.num_registers)
        self.position_layout = TokenLayout(config.class_token, 0)
        self.grid_size = config.grid(*config.img_size)

        self.patch_embed = PatchEmbed(config)
        self.channel_embed = (
            nn.Parameter(torch.zeros(1, config.in_chans, d_model)) if config.channels == "tokens" else None
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d_model)) if config.class_token != "none" else None
        self.register_tokens = (
            nn.Parameter(torch.zeros(1, config.num_registers, d_model)) if config.num_registers else None
        )
        table = torch.zeros(1, self.grid_size[0] * self.grid_size[1] + self.position_layout.num_special, d_model)
        self.pos_embed = nn.Parameter(table, requires_grad=config.position == "learned")
        # the official model shifts the linear schedule by one block; the full rate falls on the add before norm_f
        rates = [config.drop_path_rate * max(0, i - 1) / max(1, config.depth - 1) for i in range(config.depth)]
        self.layers = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm_f = RMSNorm(d_model, config.norm_eps)
        self.head = nn.Linear(d_model, config.num_classes) if config.num_classes else nn.Identity()
        self.feature_info = [
            {"num_chs": d_model, "reduction": config.stride, "module": f"layers.{i}"} for i in range(config.depth)
        ]
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw the parameters outside the blocks from torch's generator; a block draws its own when it is made."""
        if self.pos_embed.is_meta:  # as in `init_mixer`
            return
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(self.patch_embed.proj.bias)  # pyright: ignore[reportArgumentType] - it has one
        for token in (self.cls_token, self.register_tokens, self.channel_embed):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)
        if self.config.position == "sincos":
            patches = sincos_table(self.grid_size, self.embed_dim)[None]
            special = patches.new_zeros(1, self.position_layout.num_special, self.embed_dim)
            self.pos_embed.copy_(self.position_layout.join(special, patches))
        else:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self._init_head()

    def _init_head(self) -> None:
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def forward(self, images: Images) -> Tensor:
        """Pictures -> logits (b, num_classes), or pooled features (b, d_model) without a head."""
        return self.forward_head(self.forward_features(images))

    @overload
    def forward_features(self, images: Tensor) -> Tensor: ...
    @overload
    def forward_features(self, images: Sequence[Tensor]) -> list[Tensor]: ...
    @overload
    def forward_features(self, images: Images) -> Tensor | list[Tensor]: ...

    def forward_features(self, images: Images) -> Tensor | list[Tensor]:
        """(b, c, h, w) -> normed tokens (b, special + l, d_model): class token, registers, then patches row by row.

        Where channels are tokens, c is `in_chans` or the length of one of the config's `channel_sets`.
        Of a list of pictures, the list of each one's (special + l, d_model).
        """
        lengths = self.lengths(images)
        return joined(*self.encode(self.embed(images), lengths, self.lines(images)), lengths)

    def forward_head(self, tokens: Tensor | list[Tensor], pre_logits: bool = False) -> Tensor:
        """Tokens of `forward_features` -> pooled (b, d_model) when `pre_logits`, else through the classifier."""
        if isinstance(tokens, Tensor):
            pooled = tokens[:, 0] if self.global_pool == "token" else tokens[:, self.num_prefix_tokens :].mean(dim=1)
        else:
            pooled = torch.cat([self.forward_head(picture[None], pre_logits=True) for picture in tokens])
        return pooled if pre_logits else self.head(pooled)

    def embed_patches(self, images: Tensor) -> Tensor:
        """(b, c, h, w) -> patch tokens with their positions (b, l, d_model)."""
        grid = grid_of(images, self.config)
        channels = self.config.channels_of(images.shape[1])
        positions = self._positions(grid)[1]
        if self.channel_embed is not None:
            positions = with_channels(positions, self.channel_embed, channels)
        return self.patch_embed(images.to(self.patch_embed.proj.weight.dtype)) + positions

    def embed(self, images: Images) -> Tensor:
        """Pictures -> patch tokens with their positions (b, l, d_model); of a list, one row (1, l, d_model)."""
        if isinstance(images, Tensor):
            return self.embed_patches(images)
        return torch.cat([self.embed_patches(image[None]) for image in images], dim=1)

    def lengths(self, images: Images) -> list[int] | None:
        """Patch tokens of each picture of a list; None for a batch. Raises UserError for what cannot be packed."""
        if isinstance(images, Tensor):
            return None
        if not images:
            raise UserError("the list of pictures is empty")
        for image in images:
            if image.dim() != 3:
                raise UserError(f"a picture of the list has shape {tuple(image.shape)}, it must be (channels, h, w)")
        grids = [grid_of(image[None], self.config) for image in images]
        sizes = zip(grids, self.config.tokens_of(images), strict=True)
        return [rows * columns * tokens for (rows, columns), tokens in sizes]

    def lines(self, images: Images, visible: Tensor | None = None) -> GridLines | None:
        """Rows and columns of the pictures where the scan is pooled, else None.

        `visible` (b, v) are the patches that have tokens, of a list counted through all pictures (1, v); their lines
        are divided by all patches of a line. Without it the mean is multiplied by the config's `visible_share`.
        """
        if self.config.scan == "full":
            return None
        return lines_of(images, self.config, visible, self.config.visible_share if visible is None else 1.0)

    def encode(
        self,
        patches: Tensor,
        lengths: Sequence[int] | None = None,
        lines: GridLines | None = None,
        apart: bool = False,
        gaps: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Patch tokens in scan order, all or the visible ones -> normed: special (b, special, d_model), patches
        (b, l, d_model).

        With `lengths`, one row (1, l, d_model) with so many patches of each picture -> (pictures, special, d_model) and
        (1, l, d_model). `lines`: those of `self.lines`, where the scan is pooled. `apart`: the directions never meet in
        any block, and what each made of the pictures comes one after the other, forward first, in twice the batch.
        `gaps` (2, b, l): those of `vim_backbone.gaps.scan_gaps`, for full scans.
        """
        if gaps is not None and (apart or lines):
            raise UserError("gaps go with full scans of both directions together: give neither apart nor lines")
        layout, cu_seqlens = layout_of(self.layout, lengths, patches.device)
        pictures = len(lengths) if lengths else patches.shape[0]
        gaps = None if gaps is None else with_special_tokens(gaps, layout, pictures)
        h = [self.join_special(patches, layout, pictures)]  # given away: what is used up is free while the blocks run
        del patches
        if apart:
            h = [torch.cat(h * 2)]
        h, residual = run_blocks(self.layers, h, ScanMetadata(cu_seqlens, None, apart, gaps), lines)
        h = drop_path(h, self.config.drop_path_rate, self.training, cu_seqlens)
        normed, _ = self.norm_f(h, residual)
        if apart:
            (special, patches), (other_special, other_patches) = map(layout.split, normed.chunk(2))
            return torch.cat([special, other_special]), torch.cat([patches, other_patches])
        return layout.split(normed)

    def join_special(self, patches: Tensor, layout: Layout, pictures: int) -> Tensor:
        """Patches with class token and registers among them, each picture's own, where the layout has them."""
        special = [] if self.cls_token is None else [self.cls_token + self._positions(self.grid_size)[0]]
        if self.register_tokens is not None:
            special.append(self.register_tokens)
        if not special:
            return patches
        return layout.join(torch.cat(special, dim=1).to(patches.dtype).expand(pictures, -1, -1), patches)

    def _positions(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Positions of the class token (1, 0 or 1, d_model) and of the patches of `grid` (1, l, d_model)."""
        return self.position_layout.split(resize_table(self.pos_embed, self.position_layout, self.grid_size, grid))

    def forward_intermediates(
        self,
        images: Images,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Residual streams after chosen blocks, as timm's method of this name.

        Args:
            images: (b, c, h, w), or a list of (c, h, w); each intermediate is then a list too.
            indices: blocks to take, counted from 0 or from the end; an int n takes the last n; None takes all.
            return_prefix_tokens: give each as (patches, prefix tokens).
            norm: pass each through the final norm.
            stop_early: run no block after the last one taken.
            output_fmt: "NCHW" (b, d_model, rows, columns) or "NLC" (b, rows * columns, d_model). Where channels are
                tokens, a place has the mean over them.
            intermediates_only: leave out the final tokens.

        Returns:
            The list of intermediates, or (final tokens as `forward_features` gives them, that list).
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise UserError(f"output_fmt is {output_fmt!r}: choose NCHW or NLC")
        chosen = self._block_indices(indices)
        last = max(chosen) + 1 if stop_early and intermediates_only else len(self.layers)
        lengths, lines = self.lengths(images), self.lines(images)
        layout, cu_seqlens = layout_of(self.layout, lengths, images[0].device)
        h, residual, results = self.join_special(self.embed(images), layout, number_of(images)), None, {}

        def intermediate(special: Tensor, patches: Tensor, image: Tensor) -> Any:
            if self.channel_embed is not None:
                patches = patches.unflatten(-2, (-1, image.shape[-3])).mean(-2)
            if output_fmt == "NCHW":
                patches = patches.transpose(-1, -2).unflatten(-1, self.config.grid(*image.shape[-2:]))
            return (patches, special) if return_prefix_tokens else patches

        for index, block in enumerate(self.layers[:last]):
            h, residual = block(h, residual, ScanMetadata(cu_seqlens, lines and lines[index % 2]))
            if index in chosen:
                normed, stream = self.norm_f(h, residual)
                special, patches = layout.split(normed if norm else stream.to(h.dtype))
                if lengths is None:
                    results[index] = intermediate(special, patches, images)  # pyright: ignore[reportArgumentType]
                else:
                    results[index] = list(map(intermediate, special, patches[0].split(lengths), images))
        intermediates = [results[index] for index in chosen]
        if intermediates_only:
            return intermediates
        h = drop_path(h, self.config.drop_path_rate, self.training, cu_seqlens)
        return joined(*layout.split(self.norm_f(h, residual)[0]), lengths), intermediates

    def get_intermediate_layers(
        self,
        images: Images,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Any]:
        """`forward_intermediates` in DINO's names: (b, l, d_model) of the last n blocks, or of the n counted from 0."""
        fmt: Literal["NCHW", "NLC"] = "NCHW" if reshape else "NLC"
        return self.forward_intermediates(images, n, return_prefix_tokens, norm, True, fmt, intermediates_only=True)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last one taken, and the norm or head; returns the indices taken."""
        chosen = self._block_indices(indices)
        self.layers = self.layers[: max(chosen) + 1]
        if prune_norm:
            nn.init.ones_(self.norm_f.weight)
        if prune_head:
            self.reset_classifier(0)
        return chosen

    def _block_indices(self, indices: int | Sequence[int] | None) -> list[int]:
        depth = len(self.layers)
        if indices is None:
            return list(range(depth))
        positions = list(range(depth - indices, depth)) if isinstance(indices, int) else list(indices)
        for index in positions:
            if not -depth <= index < depth or (isinstance(indices, int) and index < 0):
                raise UserError(f"block index {index} is out of range: the model has {depth} blocks")
        return [index % depth for index in positions]

    def push_to_hub(self, name: str, *, private: bool = False, revision: str | None = None, **options: Any) -> str:
        """Put this backbone on the Hub, "owner/name", and return its address; options as those of `save_pretrained`.

        A folder that a run published goes there with `vim_backbone.push_to_hub`, which keeps its card and statistics.
        """
        with TemporaryDirectory() as place:
            folder = self.save_pretrained(Path(place) / name.rpartition("/")[2], **options)
            return push_to_hub(folder, name, private=private, revision=revision)

    def save_pretrained(self, folder: str | Path, **options: Any) -> Path:
        """Write this backbone as a folder that `vim_backbone.from_pretrained` reads; see `folder.save_pretrained`."""
        return save_pretrained(self, self.config, folder, **options)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches in `forward_features`: class token and registers."""
        return self.layout.num_special

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Literal["token", "avg"] | None = None) -> None:
        """Put on a fresh head for `num_classes` (0: none), and maybe pool otherwise."""
        data = self.config.to_dict() | {"num_classes": num_classes}
        if global_pool is not None:
            data["global_pool"] = global_pool
        self.config = VimConfig.from_dict(data)
        self.num_classes, self.global_pool = num_classes, self.config.global_pool
        weight = self.norm_f.weight
        self.head = nn.Linear(self.embed_dim, num_classes, device=weight.device) if num_classes else nn.Identity()
        with torch.no_grad():
            self._init_head()

    @torch.no_grad()
    def set_input_size(self, img_size: int | tuple[int, int] | None = None, patch_size: int | None = None) -> None:
        """Resample the position table for pictures of another size in pixels, as timm's method of this name.

        Raises UserError for a size that the stride does not divide, and for another patch size.
        """
        if patch_size not in (None, self.config.patch_size, (self.config.patch_size,) * 2):
            raise UserError(f"patch_size is {patch_size}: the weights are made for {self.config.patch_size}")
        size = self.config.img_size if img_size is None else img_size
        self.config = VimConfig.from_dict(self.config.to_dict() | {"img_size": size})
        old, self.grid_size = self.grid_size, self.config.grid(*self.config.img_size)
        table = resize_table(self.pos_embed, self.position_layout, old, self.grid_size)
        self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that decay would harm although they have two axes or more."""
        learned = {"cls_token", "register_tokens", "pos_embed", "channel_embed"}
        ends = (".A_log", ".A_b_log", ".D", ".D_b")
        return {name for name, _ in self.named_parameters() if name in learned or name.endswith(ends)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into stem and blocks, for layer-wise learning rates."""
        stem = r"^(?:cls_token|register_tokens|pos_embed|channel_embed|patch_embed)"
        if coarse:
            return {"stem": stem, "blocks": r"^layers"}
        return {"stem": stem, "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep as little as `vim_backbone.block.set_recompute` can of a block for the backward pass, as in timm."""
        set_recompute(self, "products" if enable else "inputs")


def lines_of(images: Images, config: VimConfig, visible: Tensor | None, share: float) -> GridLines:
    """Rows and columns of a batch of one grid, or of a list with a grid each; see `batch_lines`."""
    if isinstance(images, Tensor):
        tokens, grid = config.tokens_a_patch(images.shape[1]), config.grid(*images.shape[-2:])
        return batch_lines(images.shape[0], grid, images.device, visible=visible, share=share, tokens=tokens)
    grids = [config.grid(*image.shape[-2:]) for image in images]
    return packed_lines(grids, images[0].device, visible=visible, share=share, tokens=config.tokens_of(images))
