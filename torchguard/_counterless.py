"""Which operators of torch write to which of their arguments without moving the version counter?

Generated: ``make probe`` runs every operator that can write and puts down here what it saw.
"""

#: The version that was probed.
TORCH = "2.13.0"

#: Arguments that are written to and whose version counter stays where it was.
UNCOUNTED: dict[str, tuple[str, ...]] = {
    "_amp_foreach_non_finite_check_and_unscale_": ("found_inf", "self"),
    "_amp_update_scale_": ("growth_tracker",),
    "_batch_norm_impl_index": ("running_mean", "running_var"),
    "_batch_norm_with_update": ("running_mean", "running_var"),
    "_cummax_helper": ("indices", "values"),
    "_cummin_helper": ("indices", "values"),
    "_fill_mem_eff_dropout_mask_": ("self",),
    "_fused_adagrad_": ("grads", "self", "state_steps", "state_sums"),
    "_fused_adam_": ("exp_avg_sqs", "exp_avgs", "grads", "max_exp_avg_sqs", "self"),
    "_fused_adamw_": ("exp_avg_sqs", "exp_avgs", "grads", "max_exp_avg_sqs", "self"),
    "_fused_moving_avg_obs_fq_helper": ("running_max", "running_min", "scale", "zero_point"),
    "_fused_sgd_": ("grads", "momentum_buffer_list", "self"),
    "_native_batch_norm_legit": ("running_mean", "running_var"),
    "_sobol_engine_ff_": ("self",),
    "_sobol_engine_scramble_": ("self",),
    "apply_": ("self",),
    "batch_norm": ("running_mean", "running_var"),
    "batch_norm_gather_stats": ("running_mean", "running_var"),
    "batch_norm_gather_stats_with_counts": ("running_mean", "running_var"),
    "batch_norm_update_stats": ("running_mean", "running_var"),
    "cudnn_batch_norm": ("running_mean", "running_var"),
    "fused_moving_avg_obs_fake_quant": ("running_max", "running_min", "scale", "zero_point"),
    "map2_": ("self",),
    "map_": ("self",),
    "miopen_batch_norm": ("running_mean", "running_var"),
    "native_batch_norm": ("running_mean", "running_var"),
    "rrelu_with_noise": ("noise",),
    "rrelu_with_noise_": ("noise",),
}

#: Of these the operators whose schema does not say that they write: position and name of what they write to.
UNMARKED: dict[str, tuple[tuple[int, str], ...]] = {
    "_batch_norm_impl_index": ((3, "running_mean"), (4, "running_var")),
    "batch_norm": ((3, "running_mean"), (4, "running_var")),
    "batch_norm_gather_stats": ((3, "running_mean"), (4, "running_var")),
    "batch_norm_gather_stats_with_counts": ((3, "running_mean"), (4, "running_var")),
    "batch_norm_update_stats": ((1, "running_mean"), (2, "running_var")),
    "cudnn_batch_norm": ((3, "running_mean"), (4, "running_var")),
    "miopen_batch_norm": ((3, "running_mean"), (4, "running_var")),
    "native_batch_norm": ((3, "running_mean"), (4, "running_var")),
}
