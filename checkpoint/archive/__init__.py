"""Files of other programs, without their payload: torch.save archives, pickles and safetensors.

Nothing here imports torch, and nothing in a file is executed.
"""
