import contextlib
import sys

import pytest

from tests.integrations.comfy_real import PATH


@pytest.fixture(scope="session")
def comfy():
    """ComfyUI's modules, told to stay on the CPU."""
    sys.path.insert(0, PATH)
    arguments, sys.argv = sys.argv, ["pytest", "--cpu"]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cldm.cldm
        import comfy.cli_args
        import comfy.controlnet
        import comfy.lora
        import comfy.model_management
        import comfy.model_patcher
        import comfy.ops
        import comfy.sample
        import comfy.supported_models
        import comfy.utils

        yield comfy
    finally:
        sys.argv = arguments
        with contextlib.suppress(ValueError):
            sys.path.remove(PATH)
