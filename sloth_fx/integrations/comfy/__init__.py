"""ComfyUI, met by what its objects can do: nothing of it is imported."""
