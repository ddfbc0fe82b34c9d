"""Public bug reports of this field that this code had too: which test holds each of them today.

Reports were tried as small inputs, on a first version. Nine gave a wrong result in silence, nine a
traceback or a message that misled, five passed in part. The number is that of the report; the test
is what would fail if it came back.
"""

import ast
from pathlib import Path

import pytest

SILENT = {  # a wrong result without a word
    1: ("a LoRA's alpha is only in the metadata", "lora", "strength_in_the_metadata"),
    2: ("a scheduler with trained_betas", "teachers", "trained_betas_are_used"),
    3: ("cached latents of other pixels", "latent_fm_data", "stale_caches_are_refused"),
    4: ("resumed on another number of GPUs, the batch doubles", "resume",
        "the_same_command_goes_on_on_another_number_of_ranks"),
    6: ("a folder called like an embedded world", "bad_inputs", "a_folder_called_like_a_world"),
    7: ("images beside class subfolders", "latent_fm_data",
        "all_images_without_classes_and_a_word_with"),
    8: ("images of floats or of 12 bits become black", "latent_fm_data", "float_and_deep_images"),
    11: ("a clock of 500 betas", "pixart", "clock_of_another_table_of_betas"),
    12: ("int8 weights under plain names", "teachers", "integers_are_no_weights"),
}  # fmt: skip
TRACEBACKS = {  # a traceback, or a remedy that is not the cause
    13: ("an empty negative prompt", "bad_inputs", "prompts_with_a_wrong_row"),
    15: ("NaN in the features of a prompt", "bad_inputs", "prompts_with_a_wrong_row"),
    17: ("an image-to-video network", "wan", "image_to_video_is_refused"),
    19: ("no module named resource", "trust",
         "systems_without_resource_and_without_flushing_of_folders"),
    20: ("srun without torchrun", "trust", "environments_that_are_no_torchrun"),
    21: ("only *.fp16.safetensors", "bad_inputs", "only_a_variant_of_the_weights"),
    22: ("a LoRA with layers of several ranks", "lora", "a_kohya_file_as_diffusers_reads_it"),
    24: ("a folder that cannot be made", "trust", "an_output_folder_that_cannot_be_made"),
    25: ("WORLD_SIZE left in the environment", "trust", "environments_that_are_no_torchrun"),
}  # fmt: skip
IN_PART = {  # what had passed in part
    42: ("a state that is truncated: an earlier one is named", "sharding",
         "a_broken_part_of_a_state_is_one_line"),
    43: ("a full disk", "trust", "a_full_disk_is_one_line_and_the_run_goes_on"),
    44: ("Ctrl-C and SIGTERM", "trust", "a_signal_ends_a_run_after_its_update"),
    47: ("a progress bar in a pipe", "trust", "a_progress_bar_in_a_pipe_writes_once_a_minute"),
    48: ("Python 3.10 to 3.13", "trust", "python_versions"),
}  # fmt: skip


@pytest.mark.parametrize("number", [*SILENT, *TRACEBACKS, *IN_PART])
def test_each_report_has_its_test(number):
    """It is there under this name, and is not one of those that --long alone runs."""
    _, file, name = {**SILENT, **TRACEBACKS, **IN_PART}[number]
    tree = ast.parse((Path(__file__).parent / f"test_{file}.py").read_text())
    (found,) = [n for n in tree.body if getattr(n, "name", "") == f"test_{name}"]
    assert "long" not in " ".join(map(ast.unparse, found.decorator_list))
