"""What a user may have meant by a field that does not exist: names that other projects have for the same."""

import difflib
from collections.abc import Iterable

from vim_backbone.errors import nearest

LAUNCHER = ("gpus", "num_gpus", "n_gpus", "ngpus", "devices", "num_processes", "nproc_per_node", "nproc", "world_size",
            "num_machines", "nnodes", "nodes", "config_file", "multi_gpu", "gpu_ids", "deepspeed")  # fmt: skip
"""Of the launcher, not of the run."""
SYNONYMS = {
    "optim.base_lr": ("lr", "learning_rate", "blr", "rate", "max_lr", "lr_init"),
    "optim.min_lr": ("final_lr", "end_lr", "lr_min"),
    "optim.weight_decay": ("wd", "decay", "l2"),
    "optim.warmup_steps": ("warmup", "num_warmup_steps", "warmup_iters", "lr_warmup_steps"),
    "optim.clip_grad": ("max_grad_norm", "grad_clip", "gradient_clipping", "gradient_clip_val", "clip"),
    "optim": ("optimizer", "optimiser", "opt"),
    "out": ("output_dir", "output", "outdir", "out_dir", "output_path", "save_dir", "logging_dir", "log_dir",
            "work_dir"),
    "name": ("run_name", "experiment", "exp_name", "experiment_name"),
    "data.source": ("data", "dataset", "data_dir", "data_path", "data_root", "root", "train_dir", "input", "images",
                    "pictures", "dataset_name", "train_data"),
    "data.workers": ("num_workers", "n_workers", "dataloader_num_workers"),
    "batch_size": ("bs", "batch", "batchsize", "train_batch_size", "per_device_train_batch_size", "global_batch_size"),
    "epochs": ("num_epochs", "num_train_epochs", "n_epochs", "max_epochs", "epoch"),
    "steps": ("max_steps", "num_steps", "iterations", "iters", "max_iters", "num_iterations", "total_steps"),
    "model.name": ("model", "arch", "architecture", "model_name", "size", "variant"),
    "backbone": ("model", "pretrained", "weights", "init", "finetune", "model_name_or_path", "arch"),
    "init": ("backbone", "pretrained", "weights", "finetune", "model_name_or_path", "init_from", "load_from"),
    "model.img_size": ("image_size", "resolution", "input_size", "crop_size", "imgsz"),
    "stages": ("progressive_resizing", "resolution_schedule", "size_schedule", "curriculum"),
    "data.batch_by": ("tokens_per_step", "tokens_per_batch", "max_tokens", "patches_per_step", "token_budget"),
    "resume": ("resume_from_checkpoint", "resume_from", "continue", "load"),
    "accumulation": ("gradient_accumulation_steps", "accum_iter", "accumulate_grad_batches", "grad_accum"),
    "precision": ("bf16", "fp16", "amp", "mixed_precision", "dtype"),
    "trackers": ("logger", "loggers", "report_to", "log_with", "wandb", "tensorboard", "tracker"),
    "checkpoint_every": ("save_steps", "save_every", "save_freq", "checkpoint_interval"),
    "keep_checkpoints": ("save_total_limit",),
    "log_every": ("logging_steps", "log_interval", "print_freq"),
    "eval.source": ("eval_data", "val_data", "eval_dataset", "val_dataset", "validation_data", "probe_data"),
    "eval.share": ("val_share", "val_fraction", "validation_split", "held_out", "holdout", "eval_fraction"),
    "eval.every": ("eval_every", "eval_steps", "eval_interval", "eval_freq", "val_interval", "evaluation_interval"),
    "overwrite": ("overwrite_output_dir", "force"),
    "mask.ratio": ("masking_ratio",),
    "objective": ("method", "pretext", "ssl", "pretraining"),
    "model.drop_path_rate": ("drop_path",),
    "model.recompute": ("grad_checkpointing", "gradient_checkpointing", "checkpointing", "activation_checkpointing"),
    "ema_decay": ("ema", "model_ema", "model_ema_decay"),
    "trials": ("num_samples", "n_trials"),
    "scheduler.kind": ("scheduler",),
}  # fmt: skip


def suggestion(wrong: str, types: Iterable[str]) -> str:
    """A hint that ends an error line about a field that is not among `types`."""
    names = sorted(types)
    plain = wrong.replace("-", "_").lower()
    group, _, last = plain.rpartition(".")
    if plain in LAUNCHER:
        return "it is the launcher's: python -m launch --num_processes 2 --multi_gpu PROGRAM.py [FIELDS]"
    endings = {name: name.rpartition(".")[2] for name in names}
    likely = (
        [name for name, others in SYNONYMS.items() if name in names and plain in others]
        or difflib.get_close_matches(plain, names, n=1, cutoff=0.85)
        or [name for name in names if endings[name] == last]
        or [name for name, others in SYNONYMS.items() if name in names and last in others]
    )
    inside = [name for name in names if group and name.startswith(f"{group}.")]
    if inside and not any(name in inside for name in likely):
        return f"choose from {', '.join(inside)}"
    if likely:
        first = list(dict.fromkeys(likely))[:3]
        return f"did you mean {' or '.join(repr(name) for name in first)}?"
    hint = nearest(wrong, names)
    return hint if hint.startswith("did you") else "none has a name like it"
