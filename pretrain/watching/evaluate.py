"""What an evaluation measures: the loss of held-out pictures, RankMe, and probes of frozen features.

Shape letters: n pictures, d d_model.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from launch.data.labelled import Labelled
from launch.data.loading import number_of_workers
from launch.data.pictures import Box
from launch.data.reading import read_pixels
from launch.data.sources import ImageSource
from launch.embedding.probes import linear_probe, nearest_neighbours
from launch.run.accelerator import autocast, gather_in_order
from launch.run.randomness import generator
from pretrain.config import PretrainConfig
from pretrain.data import View
from pretrain.objective import Objective
from pretrain.watching.sets import EvalSets, key_of
from vim_backbone import VisionMamba
from vim_backbone.images import reason
from vim_backbone.preprocessing import to_model
from vim_backbone.vim import Images

NEIGHBOURS, TEMPERATURE = 20, 0.07
"""Of the vote of nearest neighbours, as DINO has it (arXiv 2104.14294)."""
PENALTY = 1e-2
"""On the weights of the linear probe, one for the whole run, so that its curve is that of the features."""


class Read(NamedTuple):
    """A picture as it is evaluated."""

    number: int
    """Of the picture in its source."""
    image: Tensor
    """(c, h, w) as `read_pixels` gives it."""
    extra: Tensor
    """What the objective adds to it; empty for a labelled one."""


Reader = Callable[[int], Read]


class Evaluator:
    """Measures a model on what is held out and on labelled pictures: the same views of them, and masks, every time.

    It draws from no generator that training draws from.
    """

    def __init__(
        self,
        config: PretrainConfig,
        objective: Objective,
        sets: EvalSets,
        accelerator: Accelerator,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.objective = objective
        self.sets = sets
        self.accelerator = accelerator
        self.beat = beat
        """Called for each batch: an evaluation is long, and no hang."""
        self.bad: dict[str, str] = {}
        """Pictures that could not be read in the last evaluation, with the reason. On the main process."""

    def measure(self, model: nn.Module, view: View, batch_size: int) -> dict[str, float]:
        """held_out_loss, rank_me, knn and linear, as far as there are pictures for them. For all processes.

        Args:
            model: the objective's, without gradients, as `Training.evaluating` gives it.
            view: cuts views of the size that the model is trained on now.
            batch_size: pictures of a forward pass of one process.
        """
        self.bad = {}
        measured: dict[str, float] = {}
        ranked = None
        if self.sets.held_out is not None:
            measured["held_out_loss"], ranked = self._held_out(self.sets.held_out, model, view, batch_size)
        if self.sets.train is not None and self.sets.val is not None:
            bank, labels = self._features(self.sets.train, model, view, batch_size)
            queries, targets = self._features(self.sets.val, model, view, batch_size)
            ranked = bank if ranked is None else ranked
            several = labels.unique().numel() >= 2  # of a bank of one class nothing can be learned
            if self.accelerator.is_main_process and several and all(map(usable, (bank, queries))):
                classes = len(self.sets.train.classes)
                votes = min(NEIGHBOURS, len(bank))
                neighbours = nearest_neighbours(bank, labels, queries, classes, votes, TEMPERATURE)
                logits, _ = linear_probe(bank, labels, queries, classes, [PENALTY])
                for name, scores in (("knn", neighbours), ("linear", logits)):
                    measured[name] = (scores.argmax(1) == targets).double().mean().item()
        if ranked is not None and usable(ranked):
            measured["rank_me"] = rank_me(ranked)
        return measured

    def _held_out(self, source: ImageSource, model: nn.Module, view: View, batch_size: int) -> tuple[float, Tensor]:
        """Mean loss over held-out pictures, and their features (n, d)."""
        config, device = self.config, self.accelerator.device
        encoder = self.objective.encoder(model)

        def read(number: int) -> Read:
            with source.open(number) as picture:
                image, extra = view.draw(picture, generator(config.seed, key_of(source.name(number), config.seed)))
            return Read(number, image, extra)

        total = torch.zeros(2, dtype=torch.float64, device=device)
        numbers, features = [], []
        for reads in self._batches(source, read, batch_size):
            images, extras = self._images(reads, view), [each.extra for each in reads] or [self._blank_extra(view)]
            stacked = torch.stack(extras) if isinstance(images, Tensor) else extras
            inputs = self.objective.inputs(stacked, device, encoder.config.tokens_of(images))
            with autocast(self.config.precision, device):
                loss = model(images, *inputs.arguments)
            total += torch.stack([loss.double() * len(reads), torch.full_like(total[0], len(reads))]) if reads else 0
            features.append(self._pooled(encoder, images)[: len(reads)])
            numbers += [each.number for each in reads]
        shared = self.accelerator.reduce(total, reduction="sum")
        assert isinstance(shared, Tensor)
        loss, count = shared.tolist()
        return loss / count if count else math.nan, self._in_order(numbers, torch.cat(features))[1]

    def _features(self, data: Labelled, model: nn.Module, view: View, batch_size: int) -> tuple[Tensor, Tensor]:
        """Features (n, d) of the middle of labelled pictures, and their classes (n,)."""
        encoder, options = self.objective.encoder(model), self.config.data

        def read(number: int) -> Read:
            with data.source.open(number) as picture:
                box = middle(picture.size, view.img_size)
                args = options.preprocessing, options.max_megapixels, box, view.img_size, options.resize
                return Read(number, read_pixels(picture, *args), torch.empty(0))

        numbers, features = [], []
        for reads in self._batches(data.source, read, batch_size):
            images = self._images(reads, view, native=False)
            features.append(self._pooled(encoder, images)[: len(reads)])
            numbers += [each.number for each in reads]
        order, every = self._in_order(numbers, torch.cat(features))
        return every, torch.tensor(data.labels, device=every.device)[order]

    def _batches(self, source: ImageSource, read: Reader, batch_size: int) -> Iterator[list[Read]]:
        """The share of this process of a source, the next batch read while one is used; without what cannot be read.

        All processes get as many batches, some of them empty, because under ZeRO-3 a forward pass is for all of them.
        """
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        mine = range(rank, len(source), world)
        count = math.ceil(math.ceil(len(source) / world) / batch_size)
        batches = [mine[number * batch_size : (number + 1) * batch_size] for number in range(count)]

        def attempt(number: int) -> Read | tuple[str, str]:
            try:
                return read(number)
            except Exception as error:  # a decoder may raise anything on damaged data
                return source.name(number), reason(error)

        bad: list[tuple[str, str]] = []
        with ThreadPoolExecutor(max(1, number_of_workers(self.config.data.workers))) as threads:
            ahead = [threads.submit(attempt, number) for number in batches[0]]
            for batch in [*batches[1:], range(0)]:
                self.beat()
                now, ahead = ahead, [threads.submit(attempt, number) for number in batch]
                results = [each.result() for each in now]
                bad += [each for each in results if not isinstance(each, Read)]
                yield [each for each in results if isinstance(each, Read)]
        self.bad |= dict(gather_object(bad))

    def _images(self, reads: list[Read], view: View, native: bool = True) -> Images:
        """Pictures as the model takes them; a blank one where none could be read."""
        preprocessing, device = self.config.data.preprocessing, self.accelerator.device
        images = [to_model(each.image, device, preprocessing) for each in reads]
        images = images or [torch.zeros(preprocessing.in_chans, *view.img_size, device=device)]
        return images if (view.packed and native) or preprocessing.channel_sets is not None else torch.stack(images)

    def _blank_extra(self, view: View) -> Tensor:
        return self.objective.draw(view.grid, generator(self.config.seed))

    def _pooled(self, encoder: VisionMamba, images: Images) -> Tensor:
        """(n, d) as the published backbone gives them."""
        with autocast(self.config.precision, self.accelerator.device):
            return encoder(images).float()

    def _in_order(self, numbers: list[int], features: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers (n,) of the pictures of all processes, rising, and their features (n, d)."""
        number = torch.tensor(numbers, dtype=torch.long, device=features.device)
        number, feature = gather_in_order(self.accelerator, number, features)
        return number, feature


def usable(features: Tensor) -> bool:
    """Whether there are features, and all of them are numbers."""
    return len(features) > 0 and bool(features.isfinite().all())


def rank_me(features: Tensor) -> float:
    """Effective rank of features (n, d): exp of the entropy of their singular values over the sum of these.

    RankMe (Garrido et al., arXiv 2210.02885, equation 1), with its epsilon of 1e-7; between 1 and min(n, d).
    """
    features = features.double()
    gram = features @ features.T if len(features) < features.shape[1] else features.T @ features
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    shares = values / values.sum().clamp(min=1e-300) + 1e-7
    return torch.exp(-(shares * shares.log()).sum()).item()


def middle(picture_size: tuple[int, int], img_size: tuple[int, int]) -> Box:
    """Left, upper, right and lower edge of the largest box in the middle of a picture that has the view's shape."""
    (height, width), (rows, columns) = picture_size, img_size
    scale = min(height / rows, width / columns)
    h, w = max(1, round(rows * scale)), max(1, round(columns * scale))
    top, left = (height - h) // 2, (width - w) // 2
    return left, top, left + w, top + h


@contextmanager
def forward_is(encoder: VisionMamba, method: Callable[[Images], Any]) -> Iterator[None]:
    """Calling the encoder runs this method of it: under ZeRO-3 a module has its parameters inside such a call alone."""
    vars(encoder)["forward"] = method
    try:
        yield
    finally:
        del vars(encoder)["forward"]


def patch_features(encoder: VisionMamba, images: Images) -> list[Tensor]:
    """Normed features of the patches of each picture, (rows, columns, d); of a place with several channels the mean.

    One picture after the other: together they may take more memory than a training step has.
    """
    with forward_is(encoder, encoder.forward_features):
        tokens: list[Tensor] = [encoder(image[None])[0] for image in images]
    grids = [encoder.config.grid(*image.shape[-2:]) for image in images]
    return [
        each[encoder.num_prefix_tokens :].unflatten(0, (*grid, -1)).mean(2).float()
        for each, grid in zip(tokens, grids, strict=True)
    ]
