"""The process that opens a stranger's pickle: `python -I pickle_child.py SOURCE TARGET MEMORY SECONDS FOLDER…`.

It runs as a file and in isolated mode (-I), so that neither the current folder nor the environment says where modules come
from: the folders of torch and safetensors are given. It imports nothing of loratool.
"""

from __future__ import annotations

import os
import resource
import sys


def convert_pickle(source: str, target: str, memory: int, seconds: int) -> None:
    """Turns a pickle into a safetensors file; exits with a one-line reason where the pickle is not tensors."""
    # Limits before torch is imported and the pickle opened.
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    import torch
    from safetensors.torch import save_file

    try:
        loaded = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a hostile pickle provokes ends here, in the child
        sys.exit(f"{type(error).__name__}; torch's restricted loader refuses it")
    if not isinstance(loaded, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in loaded.values()):
        sys.exit("it does not hold a dictionary of tensors")
    # An expanded tensor claims elements that it does not store, and would be written out in full.
    if sum(tensor.numel() * tensor.element_size() for tensor in loaded.values()) > os.stat(source).st_size:
        sys.exit("its tensors claim more bytes than the file has")
    save_file({str(name): tensor.contiguous() for name, tensor in loaded.items()}, target)


if __name__ == "__main__":
    # Last: what Python itself brings along is not to be hidden by anything.
    sys.path += sys.argv[5:]
    convert_pickle(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
