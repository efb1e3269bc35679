"""Keys of other tools, with the key of a recipe that each one means. Only the messages about unknown keys use them."""

from collections.abc import Collection

HABITS: dict[str, str] = {
    **dict.fromkeys(("lr", "learning_rate", "max_lr", "peak_lr", "lr_max"), "stages.NAME.lr.peak"),
    **dict.fromkeys(("min_lr", "lr_min", "end_lr", "final_lr"), "stages.NAME.lr.end"),
    **dict.fromkeys(
        ("warmup", "warmup_steps", "warmup_iters", "warmup_tokens", "warmup_ratio"), "stages.NAME.lr.warmup"
    ),
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type", "lr_decay_style", "scheduler"), "stages.NAME.lr.kind"),
    **dict.fromkeys(("batch_size", "global_batch_size", "train_batch_size", "gbs", "batch"), "stages.NAME.batch_size"),
    **dict.fromkeys(
        ("micro_batch", "micro_batch_size", "mbs", "per_device_train_batch_size", "local_batch_size"),
        "stages.NAME.micro_batch",
    ),
    **dict.fromkeys(
        ("seq_len", "seq_length", "seqlen", "sequence_length", "context_length", "block_size", "max_seq_len"),
        "stages.NAME.seq_len",
    ),
    **dict.fromkeys(
        ("tokens", "train_tokens", "num_tokens", "steps", "max_steps", "train_steps", "train_iters", "epochs"),
        "stages.NAME.tokens",
    ),
    **dict.fromkeys(("mix", "mixture", "weights"), "stages.NAME.mix"),
    **dict.fromkeys(("rope_theta", "rope_base", "theta"), "stages.NAME.rope_theta_full"),
    **dict.fromkeys(("hidden", "hidden_size", "hidden_dim", "d_model", "dim", "n_embd", "width"), "model.hidden_size"),
    **dict.fromkeys(("layers", "n_layers", "n_layer", "num_layers", "num_hidden_layers", "depth"), "model.num_layers"),
    **dict.fromkeys(("heads", "n_heads", "n_head", "num_heads", "num_attention_heads"), "model.full.num_heads"),
    **dict.fromkeys(("kv_heads", "n_kv_heads", "num_kv_heads", "num_key_value_heads"), "model.full.num_kv_heads"),
    **dict.fromkeys(("window", "sliding_window", "window_size"), "model.sliding.window"),
    **dict.fromkeys(("vocab", "vocab_size", "n_vocab"), "model.vocab_size"),
    **dict.fromkeys(
        ("experts", "n_experts", "num_experts", "num_local_experts", "n_routed_experts"), "model.moe.num_experts"
    ),
    **dict.fromkeys(("top_k", "topk", "num_experts_per_tok", "moe_top_k", "moe_router_topk"), "model.moe.top_k"),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "ffn_dim", "ffn_size", "d_ff"), "model.ffn_size"),
    **dict.fromkeys(("moe_intermediate_size", "expert_size", "moe_ffn_hidden_size"), "model.moe.ffn_size"),
    **dict.fromkeys(("init_std", "initializer_range", "init_method_std"), "model.init_std"),
    **dict.fromkeys(("optimizer", "optim_type"), "optim.matrix_optimizer"),
    **dict.fromkeys(("weight_decay", "wd"), "optim.weight_decay"),
    **dict.fromkeys(("clip", "clip_grad", "grad_clip", "max_grad_norm", "gradient_clipping"), "optim.clip_norm"),
    **dict.fromkeys(("betas", "beta1", "adam_beta1"), "optim.beta1"),
    **dict.fromkeys(("beta2", "adam_beta2"), "optim.beta2"),
    **dict.fromkeys(("adam_epsilon", "adam_eps", "epsilon"), "optim.eps"),
    **dict.fromkeys(("tp", "tp_size", "tensor_parallel", "tensor_model_parallel_size"), "parallel.dense.tp"),
    **dict.fromkeys(("cp", "cp_size", "context_parallel", "context_parallel_size"), "parallel.dense.cp"),
    **dict.fromkeys(("dp", "fsdp", "dp_shard", "data_parallel", "data_parallel_size"), "parallel.dense.dp_shard"),
    **dict.fromkeys(("pp", "pp_size", "pipeline_parallel", "pipeline_model_parallel_size"), "parallel.pp"),
    **dict.fromkeys(("ep", "ep_size", "expert_parallel", "expert_model_parallel_size"), "parallel.expert.ep"),
    **dict.fromkeys(("save_every", "save_steps", "save_interval", "checkpoint_every"), "checkpoint.every"),
    **dict.fromkeys(("load", "init_from", "pretrained", "resume_from"), "checkpoint.init_from"),
    **dict.fromkeys(("name", "run_name", "exp_name", "experiment"), "run.name"),
    **dict.fromkeys(("dir", "out", "out_dir", "output_dir", "save", "save_dir", "run_dir"), "run.dir"),
    **dict.fromkeys(("device", "gpu"), "run.device"),
    **dict.fromkeys(("dtype", "amp", "bf16", "fp16", "mixed_precision", "torch_dtype"), "precision"),
    **dict.fromkeys(("tokenizer", "tokenizer_path"), "data.tokenizer"),
    **dict.fromkeys(("sources", "dataset", "datasets", "train_data"), "data.sources"),
    **dict.fromkeys(("wandb", "wandb_mode"), "monitor.wandb.mode"),
    **dict.fromkeys(("wandb_project", "project"), "monitor.wandb.project"),
}
"""Names from habit → the full key, with NAME for the name of a stage."""


def meant(path: str, key: str, known: Collection[str]) -> str:
    """Return the key that `key`, unknown in the section at `path`, means from habit. Empty if there is none.

    `key` may have parts, `optimizer.lr`: the last one decides. A key of the section itself is not returned by its full
    name: `model.sliding.heads` means `num_heads` there, although `heads` alone means those of full layers.
    """
    words = key.lower().replace("-", "_").split(".")
    full = next((HABITS[word] for word in reversed(words) if word in HABITS), "")
    name = full.rpartition(".")[2]
    if name in known:
        return f"{path}.{name}" if path else name
    if path.startswith("stages.") and full.startswith("stages."):
        return full.replace("NAME", path.split(".")[1])
    return full
