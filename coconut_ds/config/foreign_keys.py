"""Keys that people bring from other trainers: forks of the published code, HF Trainer, TRL, axolotl, DeepSpeed's JSON.

A key is looked up before a misspelling is thought of, without its case, underscores and hyphens. Each text follows
`KEY: unknown key; ` and says what to set here, or that there is no such setting and what to do.
"""

from __future__ import annotations

from coconut_ds.errors import plain_spelling


def _here(key: str, note: str = "") -> str:
    return f"here it is {key}{note}"


_TEXTS: dict[str, str] = {}
"""Text by plain spelling; keys of sections and of DeepSpeed's JSON stand with the section before a dot."""

for _text, _keys in {
    # Forks of the published code
    "make epochs_per_stage a list: [6, 3] trains stage 0 for 6 epochs and every later one for 3": """
        stage_0_epochs stage0_epochs epochs_stage_0 num_epochs_stage_0 initial_epochs first_stage_epochs""",
    _here("train_size", ", beside val_size and test_size"): """max_size max_samples max_examples subset_size num_samples
        debug_train_size num_train_samples max_train_samples n_train""",
    _here("val_size", ", or test_size with only_eval"): """valid_size eval_size debug_val_size num_eval_samples
        max_eval_samples max_val_samples n_val""",
    "validation questions have a file of their own, val_path, which may be a split of a hub dataset": """val_set_size
        test_split_size validation_split_percentage""",
    "train_size is a number of records": "data_fraction train_fraction",
    _here("columns", ": {question: .., steps: .., answer: ..}"): """prompt_column response_column dataset_text_field
        question_column answer_column text_column column_mapping field_instruction field_output question_key answer_key
        input_column target_column""",
    _here("steps_separator"): "steps_delimiter step_delimiter delimiter cot_separator",
    _here("curriculum", ": reversed"): "reversed reverse reverse_curriculum",
    "steps that are written from thoughts have supervision.steps.weight": "explain_loss_factor aux_loss_weight",
    _here("supervision.distill", ", with alpha, beta and gamma"): "alpha beta gamma distillation distill",
    _here("supervision.distill.gamma", " (with method: codi or supervision.distill)"): """distill_loss_factor
        distill_loss_weight kd_weight""",
    _here("supervision.distill.alpha", " (with method: codi or supervision.distill)"): """ref_loss_factor
        teacher_loss_weight""",
    "the distance of states is always divided by a standard deviation, see supervision.distill.deviation": """
        distill_loss_div_std""",
    _here("supervision.mixture", ", with weights latent, verbal and direct"): "multi_mode multimode mode_weights",
    "weights of losses are supervision.steps.weight, those of supervision.distill and those of supervision.mixture": """
        loss_weights ce_loss_factor kl_coef kl_coeff""",
    "the loss of the tokens has nothing to set but loss_normalization; remove the key": """label_smoothing
        label_smoothing_factor neftune_noise_alpha""",
    "what a thought is made of is set by latent_context and latent_norm": """replacement_method feedback thought_source
        context_window window_size context_weights window_weights""",
    "the model is not compiled; remove the key": """torch_compile compile use_compile torch_compile_backend
        torch_compile_mode jit_mode_eval torchdynamo""",
    "the number of processes is the launcher's: deepspeed --num_gpus N, or RANKS=N ./launch.sh; remove the key": """
        distributed_training distributed use_ddp ddp fsdp use_fsdp fsdp_config ddp_backend local_rank num_gpus n_gpus
        gpus num_processes world_size nproc_per_node accelerator devices num_nodes""",
    _here("lora", ": true, or with r, alpha, dropout and targets"): """use_lora use_peft peft peft_config lora_config
        adapter lora_enable""",
    _here("lora.r"): "lora_r lora_rank lora_dim lora.rank lora.lora_r",
    _here("lora.alpha"): "lora_alpha lora.lora_alpha",
    _here("lora.dropout"): "lora_dropout lora.lora_dropout",
    _here("lora.targets", ", names of linear layers; null is all of them"): """lora_target_modules lora_target_linear
        lora_target lora.target_modules lora.modules""",
    "besides adapters only rows of marker tokens are trained, see lora.trainable_tokens; remove the key": """
        lora_modules_to_save lora.modules_to_save additional_target""",
    "adapters are plain LoRA without biases; remove the key": """lora_bias use_dora use_rslora lora_init pissa_init
        lora.bias""",
    "a 4-bit base is not supported; remove the key": "qlora",
    _here("c_thought"): """num_thoughts n_latent num_latent num_latents n_latent_tokens num_latent_tokens latent_length
        thoughts_per_step""",
    _here("solver.iterations"): "num_iterations n_iterations jacobi_iterations num_jacobi_iterations",
    _here("latent_projection", ", the inner size; null is off"): "use_prj prj_dim projection use_projection prj_size",
    "the projection of thoughts has a layer norm and no dropout; remove the key": "prj_no_ln prj_dropout",
    _here("max_latent_stage"): "max_stage max_stages num_stages n_stages scheduled_to",
    _here("load_model_path"): """checkpoint_path load_path pretrained_path ckpt_path ckpt init_from checkpoint
        load_checkpoint lora_model_dir adapter_name_or_path""",
    # HF Trainer, TRL, axolotl, LLaMA-Factory
    _here("lr"): "learning_rate base_lr max_lr peak_lr",
    _here("batch_size_training", ", the examples of one rank in one forward"): """per_device_train_batch_size
        micro_batch_size train_micro_batch_size train_micro_batch_size_per_gpu per_gpu_train_batch_size
        per_device_batch_size""",
    "the examples of one rank in one forward are batch_size_training, those of an optimizer step over all ranks "
    "train_batch_size": "batch_size bs effective_batch_size global_batch_size total_batch_size batchsize",
    _here("eval_batch_size"): """per_device_eval_batch_size batch_size_eval batch_size_val per_gpu_eval_batch_size
        test_batch_size""",
    _here("gradient_accumulation_steps"): """grad_accum gradient_accumulation accumulate_grad_batches grad_accum_steps
        accumulation_steps grad_accumulation""",
    _here("num_epochs"): "num_train_epochs epochs n_epochs max_epochs total_epochs train_epochs epoch",
    "a run has a length in epochs; set num_epochs": """max_steps num_steps total_steps train_steps num_training_steps
        max_train_steps num_train_steps""",
    "set warmup_steps, in optimizer steps": "warmup_ratio warmup_epochs warmup num_warmup_steps warmup_proportion",
    _here("lr_schedule", ": constant, linear or cosine"): """lr_scheduler_type lr_scheduler scheduler scheduler_type
        learning_rate_scheduler lr_decay_style cosine_min_lr_ratio lr_scheduler_kwargs lr_decay""",
    "the run folder is save_path/name": """output_dir save_dir out_dir output_path output run_dir run_folder log_dir
        checkpoint_dir ckpt_dir logging_dir logdir save_folder default_root_dir results_dir experiment_dir""",
    _here("name"): "run_name wandb_name exp_name experiment_name wandb_run_name job_name wandb_run_id exp_id expt_name",
    "set precision: fp16 (or bf16, fp32, auto)": """fp16 half mixed_precision fp16_full_eval bf16_full_eval dtype
        torch_dtype model_dtype use_fp16 use_bf16 half_precision float16 bfloat16 fp32 tf32 amp use_amp pure_bf16""",
    _here("log_every_steps"): """logging_steps log_steps log_interval log_every log_every_n_steps log_freq
        logging_interval""",
    _here("save_every_steps", ", between the checkpoints that every epoch ends with"): """save_steps checkpoint_steps
        checkpointing_steps save_interval save_every saves_per_epoch save_freq save_strategy save_every_n_steps""",
    _here("keep_checkpoints"): "save_total_limit max_checkpoints keep_last keep_last_n num_checkpoints_to_keep",
    "no run stops early; save_only_improve keeps the checkpoints with a better accuracy": """load_best_model_at_end
        save_best save_best_only early_stopping early_stopping_patience metric_for_best_model greater_is_better""",
    "evaluations come at the end of every epoch; remove the key": """do_eval eval_steps evaluation_strategy
        eval_strategy evals_per_epoch eval_interval eval_every eval_freq val_check_interval eval_on_start eval_delay
        do_train""",
    _here("max_grad_norm"): "grad_clip gradient_clipping clip_grad clip_grad_norm gradient_clip_val max_norm grad_norm",
    _here("adam_betas", ", both in one list"): "adam_beta1 adam_beta2 beta1 beta2 betas",
    "eps of AdamW is 1e-8; remove the key": "adam_epsilon adam_eps eps epsilon",
    _here("weight_decay"): "wd adam_weight_decay",
    "the optimizer is AdamW; remove the key": """optim optimizer optimizer_name optimizer_type optim_args use_8bit_adam
        adam8bit opt""",
    _here("activation_checkpointing", ": {enabled: true}"): """gradient_checkpointing use_gradient_checkpointing
        gradient_checkpointing_kwargs grad_checkpointing recompute use_checkpointing""",
    _here("seed"): "random_seed data_seed manual_seed rng_seed",
    _here("model_id"): """model_name_or_path model_name base_model model_path model_dir pretrained_model
        pretrained_model_name hf_model base_model_config llm_path""",
    "the tokenizer is that of model_id; remove the key": """tokenizer tokenizer_name tokenizer_path
        tokenizer_name_or_path tokenizer_type tokenizer_config""",
    "the class is read from the config.json of model_id; remove the key": "model_type model_class architecture",
    _here("train_path"): "train_file train_data train_data_path train_dataset train_files",
    "set train_path and val_path, each a file or hub:OWNER/NAME:SPLIT": """data_path dataset_path dataset datasets
        data_dir dataset_name data_name data dataset_dir""",
    _here("val_path"): """val_file valid_path valid_file validation_file eval_file eval_path eval_data val_data
        validation_path dev_path dev_file eval_dataset test_datasets val_dataset""",
    _here("test_path"): "test_file test_data test_data_path test_dataset",
    _here("deepspeed", ", a file of ds_configs/"): """deepspeed_config ds_config zero_stage zero deepspeed_config_file
        zero_config deepspeed_stage""",
    _here("answer_match", ": text or number"): """match_type answer_type numeric_match eval_match exact_match
        answer_format""",
    _here("max_new_tokens"): """generation_max_length max_gen_length max_generate_tokens gen_max_tokens
        max_completion_length""",
    "nothing is cut: an example longer than the model's positions is named; remove the key": """max_length
        max_seq_length max_seq_len sequence_len cutoff_len model_max_length block_size seq_len max_position_embeddings
        max_tokens max_prompt_length truncation max_token_num max_source_length seq_length max_target_length n_ctx
        context_length""",
    _here("resume", ", the first epoch of a run from load_model_path; an interrupted run resumes by itself"): """
        resume_from_checkpoint resume_from resume_path auto_resume resume_training resume_epoch start_epoch
        auto_resume_from_checkpoints""",
    _here("only_eval"): "eval_only evaluate do_predict test_only eval_mode",
    _here("method"): "training_method algorithm method_name train_mode task_mode",
    _here("debug"): "debug_mode is_debug fast_dev_run",
    "it is an option and no key: --dry-run": "dry_run",
    "set project, name and wandb (online, offline, disabled)": """report_to wandb_project wandb_entity wandb_mode
        use_wandb wandb_watch wandb_log_model wandb_enabled no_wandb entity logger""",
    _here("project"): "project_name",
    _here("tensorboard"): "use_tensorboard tensorboard_dir",
    "the attention is chosen by the trainer; remove the key": """flash_attention use_flash_attention flash_attn
        attn_implementation use_flash_attn flash_attention_2 sdp_attention xformers_attention use_cache use_liger_kernel
        liger""",
    "weights are trained in fp32, bf16 or fp16; set precision, and deepspeed=ds_configs/zero2_offload.json": """
        load_in_8bit load_in_4bit quantization bnb_4bit_compute_dtype load_in_8_bit quantization_config""",
    "padding follows from the batch, and group_by_length keeps it small; remove the key": """packing sample_packing
        pad_to_sequence_len pad_to_multiple_of padding padding_side eval_packing padding_free pad_to_max_length""",
    _here("group_by_length"): "length_grouped_sampler train_sampling_strategy",
    _here("prompt_format", ": chat, for the tokenizer's own template"): """chat_template template apply_chat_template
        use_chat_template prompt_template prompt_style conversation_template""",
    "there is no system message but the template's own; put its text into `question` of the data": """system_prompt
        default_system_message system_message""",
    _here("num_workers"): "dataloader_num_workers n_workers workers dataloader_workers",
    _here("deterministic"): "full_determinism use_deterministic_algorithms cudnn_deterministic",
    "batches are made from all columns that training needs; remove the key": """preprocessing_num_workers
        dataloader_drop_last drop_last shuffle dataloader_pin_memory pin_memory dataset_num_proc dataset_processes
        remove_unused_columns""",
    "upload a finished run with python -m coconut_ds.export CHECKPOINT OUT --push-to-hub REPO_ID; remove the key": """
        push_to_hub hub_model_id hub_token hub_strategy hub_private_repo""",
    "no code of a model's repository is run; remove the key": "trust_remote_code",
    _here("hang_limit_s"): "ddp_timeout timeout",
    "the shape is the model's own, from its config.json; a model from scratch has its shape in model.n_layer etc.": """
        n_layer n_layers n_embd n_head num_layers hidden_size d_model vocab_size num_hidden_layers n_positions""",
    # Sections
    _here("model.n_layer"): "model.num_hidden_layers model.num_layers model.depth model.layers",
    _here("model.n_embd"): "model.hidden_size model.d_model model.dim model.embed_dim model.hidden_dim",
    _here("model.n_head"): "model.num_attention_heads model.num_heads model.heads",
    _here("model.n_positions"): """model.max_position_embeddings model.n_ctx model.block_size model.max_length
        model.max_seq_len model.context_length""",
    _here("model.architecture"): "model.type model.model_type model.arch model.family",
    _here("model.dropout"): """model.attention_dropout model.resid_pdrop model.attn_pdrop model.embd_pdrop
        model.dropout_p""",
    "the vocabulary is made of the words of the training set; remove the key": "model.vocab_size",
    "the MLP is 4 times as wide as the states in gpt2, 3 times in llama; remove the key": """model.intermediate_size
        model.n_inner""",
    _here("latent_context.window"): """latent_context.size latent_context.window_size latent_context.m latent_context.n
        latent_context.length""",
    _here("latent_context.learned"): "latent_context.learnable latent_context.trainable",
    _here("latent_norm", ", a key of the run"): "latent_context.norm latent_context.latent_norm",
    _here("activation_checkpointing.offload"): """activation_checkpointing.cpu_checkpointing
        activation_checkpointing.cpu_offload""",
    # DeepSpeed's JSON, where training values are the run file's
    "set activation_checkpointing in the run YAML": "ds.gradient_checkpointing",
    "set lr, weight_decay or adam_betas in the run YAML": """ds.lr ds.learning_rate ds.weight_decay ds.betas
        ds.adam_betas""",
    "set batch_size_training in the run YAML": "ds.micro_batch_size ds.batch_size ds.train_micro_batch_size",
    "set max_grad_norm in the run YAML": "ds.max_grad_norm ds.grad_clip ds.clip_grad",
}.items():
    _TEXTS |= {plain_spelling(_key): _text for _key in _keys.split()}


def known_elsewhere(key: str, section: str = "") -> str:
    """`"; here it is lr"` and the like for a key of other trainers, or an empty string.

    `section`: that of the run file in which the key stands, or `ds` for the top level of a DeepSpeed JSON.
    """
    text = _TEXTS.get(plain_spelling(f"{section}.{key}" if section else key))
    return f"; {text}" if text else ""
