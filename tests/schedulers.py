"""scheduler/scheduler_config.json of released teachers, but for the version of diffusers.

Read in public copies of the files and in code that quotes them. CogVideoX-2b was uploaded with
linspace steps and later had trailing ones; here is the later file.
"""

COMMON = dict(trained_betas=None, num_train_timesteps=1000)
SCALED = dict(COMMON, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
LINEAR = dict(COMMON, beta_schedule="linear", beta_start=0.0001, beta_end=0.02)
STABLE = dict(
    SCALED, clip_sample=False, set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1
)
PLAIN_SIGMAS = dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"))
PLAIN_SIGMAS = {key: False for key in PLAIN_SIGMAS}
UNIPC = dict(
    COMMON,
    **PLAIN_SIGMAS,
    _class_name="UniPCMultistepScheduler",
    beta_schedule="linear",
    beta_start=0.0001,
    beta_end=0.02,
    disable_corrector=[],
    dynamic_thresholding_ratio=0.995,
    final_sigmas_type="zero",
    lower_order_final=True,
    predict_x0=True,
    prediction_type="flow_prediction",
    rescale_betas_zero_snr=False,
    sample_max_value=1.0,
    solver_order=2,
    solver_p=None,
    solver_type="bh2",
    steps_offset=0,
    thresholding=False,
    timestep_spacing="linspace",
    use_flow_sigmas=True,
)
FLOW = dict(
    _class_name="FlowMatchEulerDiscreteScheduler",
    num_train_timesteps=1000,
    use_dynamic_shifting=False,
)
PIXART = dict(
    LINEAR,
    _class_name="DPMSolverMultistepScheduler",
    algorithm_type="dpmsolver++",
    dynamic_thresholding_ratio=0.995,
    euler_at_final=False,
    lambda_min_clipped=float("-inf"),
    lower_order_final=True,
    prediction_type="epsilon",
    sample_max_value=1.0,
    solver_order=2,
    solver_type="midpoint",
    steps_offset=0,
    thresholding=False,
    timestep_spacing="linspace",
    use_karras_sigmas=False,
    use_lu_lambdas=False,
    variance_type=None,
)
SCHEDULERS = {
    # stable-diffusion-v1-5/stable-diffusion-v1-5
    "Stable Diffusion 1.5": dict(
        STABLE, _class_name="PNDMScheduler", prediction_type="epsilon", timestep_spacing="leading"
    ),
    # stabilityai/stable-diffusion-2-1, which says nothing of timestep_spacing
    "Stable Diffusion 2.1": dict(
        STABLE, _class_name="DDIMScheduler", prediction_type="v_prediction"
    ),
    # stabilityai/stable-diffusion-xl-base-1.0
    "SDXL base 1.0": dict(
        STABLE,
        _class_name="EulerDiscreteScheduler",
        interpolation_type="linear",
        prediction_type="epsilon",
        sample_max_value=1.0,
        timestep_spacing="leading",
        use_karras_sigmas=False,
    ),
    "PixArt-alpha 512": PIXART,
    "PixArt-alpha 1024": PIXART,
    "PixArt-Sigma": PIXART,
    # facebook/DiT-XL-2-256
    "DiT-XL/2 256": dict(
        LINEAR,
        _class_name="DDIMScheduler",
        clip_sample=False,
        prediction_type="epsilon",
        set_alpha_to_one=True,
        steps_offset=0,
    ),
    # THUDM/CogVideoX-2b
    "CogVideoX-2B": dict(
        SCALED,
        _class_name="CogVideoXDDIMScheduler",
        clip_sample=False,
        clip_sample_range=1.0,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        sample_max_value=1.0,
        set_alpha_to_one=True,
        snr_shift_scale=3.0,
        steps_offset=0,
        timestep_spacing="trailing",
    ),
    # Qwen/Qwen-Image
    "Qwen-Image": dict(
        PLAIN_SIGMAS,
        _class_name="FlowMatchEulerDiscreteScheduler",
        base_image_seq_len=256,
        base_shift=0.5,
        invert_sigmas=False,
        max_image_seq_len=8192,
        max_shift=0.9,
        num_train_timesteps=1000,
        shift=1.0,
        shift_terminal=0.02,
        stochastic_sampling=False,
        time_shift_type="exponential",
        use_dynamic_shifting=True,
    ),
    # Alpha-VLLM/Lumina-Image-2.0, Tongyi-MAI/Z-Image and Z-Image-Turbo
    "Lumina-Image 2.0": dict(FLOW, shift=6.0),
    "Z-Image": dict(FLOW, shift=6.0),
    "Z-Image-Turbo": dict(FLOW, shift=3.0),
    # Wan-AI/Wan2.1-T2V-*-Diffusers and Wan2.2-T2V-A14B-Diffusers; Wan2.2-TI2V-5B-Diffusers
    "Wan 2.1 T2V 1.3B": dict(UNIPC, flow_shift=3.0),
    "Wan 2.1 T2V 14B": dict(UNIPC, flow_shift=3.0),
    "Wan 2.2 T2V A14B": dict(UNIPC, flow_shift=3.0),
    "Wan 2.2 TI2V 5B": dict(
        UNIPC, flow_shift=5.0, time_shift_type="exponential", use_dynamic_shifting=False
    ),
}
SCHEDULERS["PixArt-LCM"] = dict(PIXART, _class_name="LCMScheduler")
SCHEDULERS["DiT-XL/2 512"] = SCHEDULERS["DiT-XL/2 256"]
COGVIDEOX_SCHEDULER = SCHEDULERS["CogVideoX-2B"]
