"""Train the backbone on public digits and write it to a file.

python pretrain.py backbone.safetensors
"""

import sys
from pathlib import Path

from frozen_backbone_app.task import Net, load_public, recipe_of
from safetensors.torch import save_file

from flwr_cloned_kd import Core

PREFIX = "backbone."


def main(path: str) -> None:
    """Train the whole network, and keep its backbone."""
    core = Core(model=Net(), dataset=load_public(), recipe=recipe_of(epochs=20))
    params = core.pretrain()
    backbone = {
        name.removeprefix(PREFIX): tensor.contiguous()
        for name, tensor in params.items()
        if name.startswith(PREFIX)
    }
    save_file(backbone, path)
    print(f"{Path(path).absolute()}: {sum(t.numel() for t in backbone.values()):,} numbers")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
