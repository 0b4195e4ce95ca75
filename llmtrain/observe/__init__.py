"""The step record and where it goes: JSON, CSV, console, TensorBoard, W&B, curves."""
