"""The node pack for ComfyUI: its ``custom_nodes`` import these two names (docs/comfyui.md).

Importing it needs neither ComfyUI nor anything of it; nodes are met with the objects that ComfyUI gives them.
"""

from sloth_fx.integrations.comfy.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
